"""Fixtures for the tests of the catalog."""

from __future__ import annotations

import pytest

from azure_torch_ckpt.emulator import Azurite


@pytest.fixture
def other(azurite: Azurite, container: str) -> str:
    """A second container."""
    return azurite.create_container("to-" + container.rpartition("-")[2])
