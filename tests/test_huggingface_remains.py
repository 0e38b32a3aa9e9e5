"""What a killed save of a model left behind: `prune` removes it, and nothing that a model consists of."""

from __future__ import annotations

import datetime
import json
import signal
from typing import Any

import pytest

from azure_torch_ckpt import BlobLocation, CorruptCheckpointError
from azure_torch_ckpt.catalog import PruneReport, prune
from azure_torch_ckpt.store import BlobStore
from tests import hf_support as hf
from tests import jobs
from tests.faults import Call, Kill
from tests.proxy import FaultProxy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

NO_GRACE = datetime.timedelta(0)


@pytest.fixture
def url(container: str) -> str:
    return f"{container}/models/llama"


def pruned(url: str, **how: Any) -> PruneReport:
    return prune(url, credential=hf.KEY, **{"grace": NO_GRACE, "dry_run": False, **how})


def named(url: str) -> set[str]:
    return {*json.loads(hf.get(url, hf.INDEX))["weight_map"].values(), hf.INDEX}


def killed_save(url: str, proxied_container: str, proxy: FaultProxy, version: int = 1) -> None:
    """All files are there, and the index is not."""
    with jobs.Job(hf.save_alone, [(f"{proxied_container}/models/llama", version)]) as job:
        proxy.when("Put Blob").do(Kill(job.pid(), at="request"))
        job.go()
        assert job.end().exitcode == -signal.SIGKILL


@pytest.mark.parametrize("stands", [False, True])
def test_files_of_a_killed_save_go_and_the_model_stays(
    url: str, container: str, proxied_container: str, proxy: FaultProxy, stands: bool
) -> None:
    if stands:
        hf.save_alone(url, 0)
    before = set(hf.files(url))
    killed_save(url, proxied_container, proxy)
    left = set(hf.files(url)) - before
    assert left
    assert pruned(container, grace=datetime.timedelta(hours=1)).remains == []  # it may still run
    [found] = pruned(container, dry_run=True).remains
    assert {path.rpartition("/")[2] for path in found.blobs} == left and found.url == url
    assert set(hf.files(url)) == before | left
    assert [one.save_id for one in pruned(url).remains] == [found.save_id]
    assert set(hf.files(url)) == before
    if stands:
        hf.load_alone(url, 0)
    assert pruned(container).remains == []


def test_shards_that_were_to_be_joined_go(url: str) -> None:
    hf.save_alone(url)
    save_id = hf.files(url)[0].split("-")[1]
    hf.put(url, f"model-{save_id}-000001.shards", bytes(10))
    hf.put(url, f"model-{'a' * 16}-000000.shards", bytes(10))
    hf.put(url, "model-of-mine.safetensors", bytes(10))
    assert sum(one.size for one in pruned(url).remains) == 20
    assert set(hf.files(url)) == named(url) | {"model-of-mine.safetensors"}
    hf.load_alone(url)


def test_a_model_costs_no_request_and_one_in_doubt_costs_one(
    url: str, container: str, proxied_container: str, proxy: FaultProxy
) -> None:
    hf.save_alone(url)
    assert pruned(proxied_container).remains == []
    assert proxy.count("Get Blob") == 0
    hf.put(url, f"model-{'a' * 16}-00001-of-00001.safetensors", b"")
    assert len(pruned(proxied_container).remains) == 1
    assert proxy.count("Get Blob") == 1
    hf.load_alone(url)


def test_files_that_an_index_of_another_name_names_stay(url: str) -> None:
    name = f"model-{'a' * 16}-00001-of-00001.safetensors"
    hf.put(url, name, bytes(10))
    hf.put(url, "text_encoder.safetensors.index.json", json.dumps({"weight_map": {"w": name}}).encode())
    assert pruned(url).remains == []
    assert name in hf.files(url)


def test_an_index_that_cannot_be_read_stops_all_removals(url: str) -> None:
    name = f"model-{'a' * 16}-00001-of-00001.safetensors"
    hf.put(url, hf.INDEX, b"{")
    hf.put(url, name, bytes(10))
    hf.put(url, name.replace("a" * 16, "b" * 16), bytes(10))
    with pytest.raises(CorruptCheckpointError, match="it holds no JSON"):
        pruned(url)
    assert name in hf.files(url)


def test_a_save_that_is_committed_meanwhile_stands(
    url: str, container: str, proxied_container: str, proxy: FaultProxy
) -> None:
    """Between the listing and the look at the index."""
    hf.save_alone(url, 0)
    index, old = hf.get(url, hf.INDEX), set(hf.files(url)) - {hf.INDEX}
    store = BlobStore(BlobLocation.parse(url), hf.KEY)
    assert store.delete(BlobLocation.parse(url).join(hf.INDEX).path)
    proxy.when("Get Blob").do(Call(lambda: hf.put(url, hf.INDEX, index), at="request"))
    assert pruned(proxied_container).remains == []
    assert set(hf.files(url)) == old | {hf.INDEX}
    hf.load_alone(url, 0)
