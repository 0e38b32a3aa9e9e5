from __future__ import annotations

import pytest


@pytest.fixture
def url(container: str) -> str:
    """Of a model."""
    return f"{container}/models/llama"


@pytest.fixture
def proxied(proxied_container: str) -> str:
    """The same URL through the proxy."""
    return f"{proxied_container}/models/llama"
