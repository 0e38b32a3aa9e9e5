from __future__ import annotations

import pytest

from azure_torch_ckpt.emulator import Azurite
from tests.support.states import Place


@pytest.fixture
def place(azurite: Azurite, container: str) -> Place:
    return Place(f"{container}/run/step-1", azurite.account_key)
