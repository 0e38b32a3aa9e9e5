"""Fixtures of the tests of the Lightning parts, and the warnings of Lightning that these tests expect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.trainers import NAMESPACES, Namespace

# What Lightning, torch and jsonargparse say about runs as small as these.
EXPECTED_WARNINGS = (
    ".*does not have many workers",
    ".*number of training batches",
    ".*LeafSpec",
    ".*exists and is not empty",
    ".*dirpath has changed",
    "Trying to infer the `batch_size`",
    ".*there is no last checkpoint available",
    ".*was called without a model",
    ".*your dataloader is not resumable",
    ".*callbacks used to create the checkpoint",
    ".*but have no `val_dataloader`",
    ".*uploads checkpoints only from a local disk",
    "LightningCLI's args parameter",
    "No seed found",
    "(?s).*Jsonargparse",
    "(?s).*Unable to serialize instance",
    "(?s).*deprecated in v4",
    "ComplexHalf support",
    "torch.distributed is disabled",
)


def pytest_itemcollected(item: pytest.Item) -> None:
    for text in EXPECTED_WARNINGS:
        item.add_marker(pytest.mark.filterwarnings(f"ignore:{text}"))


@pytest.fixture(params=NAMESPACES)
def space(request: pytest.FixtureRequest) -> Namespace:
    return Namespace(request.param)


@pytest.fixture
def lightning() -> Namespace:
    return Namespace("lightning")


@pytest.fixture
def url(container: str) -> str:
    return f"{container}/run 7/last.ckpt"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder. At the end it has nothing that was meant for a URL, and checkpoints only below ``local``."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("http", "azblob"))]
    assert not [path for path in tmp_path.rglob("*.ckpt") if path.relative_to(tmp_path).parts[0] != "local"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the process; and with more threads, a model this small takes ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
