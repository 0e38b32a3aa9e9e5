"""`consolidate` writes what torch's converter would, or safetensors, in bounded memory, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from azure_torch_ckpt import (
    AzureBlobWriter,
    BlobExistsError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    LocationError,
    TransferOptions,
    UnsupportedCheckpointError,
)
from azure_torch_ckpt.catalog import consolidate, copy
from azure_torch_ckpt.dcp.metadata.schema import stored_item
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.errors import LocalFileError
from azure_torch_ckpt.progress import Progress
from tests.dcp.memory_growth import child_result
from tests.support.containers import content, paths_below, put
from tests.support.faults import Answer, Call
from tests.support.mixed_checkpoint import KEY, flip_in_storage, item_of, save, save_without_collectives, state
from tests.support.proxy import FaultProxy
from tests.support.ranks import Ranks
from tests.support.sharded import GLOBAL, expected, rows, writer
from tests.support.states import COPIED, DTYPES, assert_same, fill

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
]

MIB = 1 << 20
# Windows of 128 KiB, so that a tensor of a few hundred KiB comes in parts.
TIGHT = TransferOptions(memory_budget=MIB, concurrency=2, block_size=64 * 1024)


def nested(dtypes: Sequence[torch.dtype] = DTYPES) -> dict[str, Any]:
    """A state dict of every kind of value that the format has, with tensors larger than a window."""
    return {
        "dtypes": {str(dtype): fill(torch.empty(3, 4, dtype=dtype)) for dtype in dtypes},
        "shapes": {str(shape): torch.full(shape, 7.0) for shape in [(), (0,), (0, 3), (1,), (2, 3, 4)]},
        "large": fill(torch.empty(500, 700, dtype=torch.int32)),
        "strided": fill(torch.empty(300, 400, dtype=torch.int32)).t(),
        "wide": fill(torch.empty(2, 90_000)),
        "list": [torch.full((5,), 1.0), {"rate": torch.tensor(3)}, "text"],
        "optim": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}], "step": 7},
        "object": ("x", torch.arange(4)),
        "none": None,
    }


def assert_equal(found: Any, wanted: Any, where: str = "") -> None:
    assert type(found) is type(wanted), where
    if isinstance(wanted, torch.Tensor):
        assert_same(found, wanted, where)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted), where
        for key, value in wanted.items():
            assert_equal(found[key], value, f"{where}/{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), where
        for number, value in enumerate(wanted):
            assert_equal(found[number], value, f"{where}/{number}")
    else:
        assert found == wanted, where


def by_torch(url: str, folder: Path) -> Any:
    """Convert a checkpoint with torch's own converter."""
    copy(url, folder / "dcp", credential=KEY)
    dcp_to_torch_save(folder / "dcp", folder / "torch.pt")
    return torch.load(folder / "torch.pt", weights_only=True)


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [None, TIGHT], ids=["", "in parts"])
def test_the_file_is_what_torchs_converter_makes(
    container: str, tmp_path: Path, options: TransferOptions | None
) -> None:
    dcp.save(nested(COPIED), storage_writer=AzureBlobWriter(f"{container}/a", credential=KEY))
    reports: list[Progress] = []
    file = tmp_path / "new" / "whole.pt"
    report = consolidate(f"{container}/a", file, credential=KEY, options=options, progress=reports.append)
    assert_equal(torch.load(file, weights_only=True), by_torch(f"{container}/a", tmp_path))
    assert_equal(torch.load(file, weights_only=True, mmap=True), nested(COPIED))
    assert (report.dst, report.format, report.bytes) == (str(file), "torch", file.stat().st_size)
    assert reports[-1].operation == "consolidate" and reports[-1].done == reports[-1].total == report.bytes
    assert (report.tensors, report.objects) == (len(COPIED) + 5 + 5, 6)
    assert [path.name for path in file.parent.iterdir()] == ["whole.pt"]


def save_rows(url: str) -> None:
    """On a rank: everything sharded by rows."""
    dcp.save(rows(3), storage_writer=writer(url))


def save_fsdp(url: str) -> None:
    """On a rank: a model and its optimizer under FSDP, after a step."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(37, 53), torch.nn.ReLU(), torch.nn.Linear(53, 11))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(4, 37)).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments, "step": 7}, storage_writer=writer(url))


def test_shards_of_two_ranks_become_whole_tensors(ranks: Ranks, container: str, tmp_path: Path) -> None:
    ranks(2).run(save_rows, f"{container}/rows")
    for options in (None, TIGHT):
        consolidate(f"{container}/rows", tmp_path / "rows.pt", credential=KEY, options=options, overwrite=True)
        found = torch.load(tmp_path / "rows.pt", weights_only=True)
        for name in GLOBAL:
            assert_same(found[name], expected(name, 3), name)
        assert found["step"] == 3


def test_a_model_and_optimizer_under_fsdp(ranks: Ranks, container: str, tmp_path: Path) -> None:
    ranks(2).run(save_fsdp, f"{container}/fsdp")
    consolidate(f"{container}/fsdp", tmp_path / "fsdp.pt", credential=KEY)
    found = torch.load(tmp_path / "fsdp.pt", weights_only=True)
    assert_equal(found, by_torch(f"{container}/fsdp", tmp_path))
    assert found["model"]["0.weight"].shape == (53, 37) and found["step"] == 7


def test_columns_of_a_matrix_are_joined(container: str, tmp_path: Path) -> None:
    """Shards along the second dimension, whose rows lie apart in the file, larger than a window."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    whole = fill(torch.empty(200, 3000, dtype=torch.int16))
    url = f"{container}/columns"
    dcp.save({"a": whole[:, :1700].contiguous(), "b": whole[:, 1700:].contiguous()}, storage_writer=writer(url))
    import pickle

    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    metadata: Metadata = pickle.loads(content(container, "columns/.metadata"))
    entry: Any = metadata.state_dict_metadata.pop("a")
    del metadata.state_dict_metadata["b"]
    infos = {index.fqn: info for index, info in metadata.storage_data.items()}
    entry.size = torch.Size([200, 3000])
    entry.chunks = [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([200, 1700])),
        ChunkStorageMetadata(torch.Size([0, 1700]), torch.Size([200, 1300])),
    ]
    metadata.state_dict_metadata["x"] = entry
    metadata.storage_data = {MetadataIndex("x", (0, 0)): infos["a"], MetadataIndex("x", (0, 1700)): infos["b"]}
    metadata.planner_data = {"x": ("x",)}
    put(container, "columns/.metadata", pickle.dumps(metadata))
    consolidate(url, tmp_path / "x.pt", credential=KEY, options=TIGHT)
    assert_same(torch.load(tmp_path / "x.pt", weights_only=True)["x"], whole)
    # The checksum of each shard is compared, though its bytes come in parts.
    flip_in_storage(url, stored_item(infos["b"]), infos["b"].length - 2000)
    with pytest.raises(CorruptCheckpointError, match="CRC64"):
        consolidate(url, tmp_path / "y.pt", credential=KEY, options=TIGHT)


def test_torchs_own_checkpoints_and_ranks_without_collectives(container: str, tmp_path: Path) -> None:
    dcp.save(nested(), storage_writer=dcp.FileSystemWriter(tmp_path / "foreign"))
    copy(tmp_path / "foreign", f"{container}/foreign", credential=KEY)
    consolidate(f"{container}/foreign", tmp_path / "foreign.pt", credential=KEY, options=TIGHT)
    assert_equal(torch.load(tmp_path / "foreign.pt", weights_only=True), nested())
    save_without_collectives(f"{container}/alone", 0, 1)
    consolidate(f"{container}/alone", tmp_path / "alone.pt", credential=KEY)
    found = torch.load(tmp_path / "alone.pt", weights_only=True)
    assert sorted(found) == ["rank0", "rank1"] and torch.equal(found["rank1"], torch.arange(50))


def test_an_empty_state_dict(container: str, tmp_path: Path) -> None:
    dcp.save({}, storage_writer=AzureBlobWriter(f"{container}/a", credential=KEY))
    for suffix in ("pt", "safetensors"):
        consolidate(f"{container}/a", tmp_path / f"x.{suffix}", credential=KEY)
    assert torch.load(tmp_path / "x.pt", weights_only=True) == {}
    assert load_file(tmp_path / "x.safetensors") == {}


# ---- safetensors -----------------------------------------------------------------------------------------------------


def test_safetensors_has_the_tensors_by_their_flat_names_and_simple_values(container: str, tmp_path: Path) -> None:
    names = {"bcomplex32", "complex128", "complex32"}  # which safetensors has not; torch 2.15 has the first
    dtypes = [dtype for dtype in DTYPES if str(dtype).removeprefix("torch.") not in names]
    source = nested()
    source["dtypes"] = {str(dtype): fill(torch.empty(3, 5, dtype=dtype)) for dtype in dtypes}
    dcp.save(source, storage_writer=AzureBlobWriter(f"{container}/a", credential=KEY))
    file = tmp_path / "x.safetensors"
    report = consolidate(f"{container}/a", file, credential=KEY, options=TIGHT, keys=lambda key: key != "object")
    found = load_file(file)
    for name, value in source["dtypes"].items():
        assert_same(found[f"dtypes.{name}"], value, name)
    for name in ("large", "strided", "wide"):
        assert_same(found[name], source[name], name)
    assert found["shapes.(0, 3)"].shape == (0, 3) and found["shapes.()"].item() == 7.0
    assert (report.format, report.tensors, report.bytes) == ("safetensors", len(found), file.stat().st_size)
    with safe_open(file, "pt") as opened:
        texts = opened.metadata()
    assert texts["format"] == "pt" and texts["list.2"] == "text" and texts["none"] == "null"
    assert json.loads(texts["optim.step"]) == 7
    with pytest.raises(UnsupportedCheckpointError, match="'object'"):
        consolidate(f"{container}/a", tmp_path / "y.safetensors", credential=KEY)
    assert not (tmp_path / "y.safetensors").exists()


def test_a_dtype_that_safetensors_does_not_have_is_refused(container: str, tmp_path: Path) -> None:
    dcp.save({"z": torch.zeros(2, dtype=torch.complex128)}, storage_writer=writer(f"{container}/a"))
    with pytest.raises(UnsupportedCheckpointError, match=r"'z' has the dtype torch\.complex128"):
        consolidate(f"{container}/a", tmp_path / "z.safetensors", credential=KEY)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"__metadata__": torch.zeros(2)}, "name '__metadata__'"),
        ({"\ud800": torch.zeros(2)}, r"'\\ud800' has half a surrogate pair"),
        ({"text": "\udfff"}, r"'\\udfff' has half a surrogate pair"),
        ({"DCP_SHARDING_INFO": "not JSON", "w": torch.zeros(2)}, "DCP_SHARDING_INFO"),
    ],
)
def test_what_no_reader_of_safetensors_would_accept_is_refused(
    container: str, tmp_path: Path, source: dict[str, Any], says: str
) -> None:
    dcp.save(source, storage_writer=writer(f"{container}/a"))
    with pytest.raises(UnsupportedCheckpointError, match=says):
        consolidate(f"{container}/a", tmp_path / "z.safetensors", credential=KEY)
    assert not (tmp_path / "z.safetensors").exists()


# ---- the target ------------------------------------------------------------------------------------------------------


def test_a_blob_is_written_in_one_go_and_replaced_only_on_request(container: str, tmp_path: Path) -> None:
    save(f"{container}/a", 1)
    save(f"{container}/b", 2)
    target = f"{container}/whole/model.pt"
    report = consolidate(f"{container}/a", target, credential=KEY, options=TIGHT)
    data = content(container, "whole/model.pt")
    assert report.bytes == len(data) and report.dst == target
    (tmp_path / "x.pt").write_bytes(data)
    assert_equal(torch.load(tmp_path / "x.pt", weights_only=True), state(1))
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        consolidate(f"{container}/b", target, credential=KEY)
    assert content(container, "whole/model.pt") == data
    consolidate(f"{container}/b", target, credential=KEY, overwrite=True)
    (tmp_path / "x.pt").write_bytes(content(container, "whole/model.pt"))
    assert_equal(torch.load(tmp_path / "x.pt", weights_only=True), state(2))
    for name in ("x.pt", "y.pt"):
        if name == "x.pt":
            with pytest.raises(CheckpointExistsError):
                consolidate(f"{container}/a", tmp_path / name, credential=KEY)
        else:
            consolidate(f"{container}/a", tmp_path / name, credential=KEY)


def test_a_file_that_another_process_wrote_meanwhile_stays(
    proxy: FaultProxy, container: str, proxied_container: str, tmp_path: Path
) -> None:
    save(f"{container}/a", 1)
    proxy.when(lambda seen: seen.path.endswith(".distcp")).do(
        Call(lambda: (tmp_path / "x.pt").write_bytes(b"theirs"), "request")
    )
    with pytest.raises(CheckpointExistsError):
        consolidate(f"{proxied_container}/a", tmp_path / "x.pt", credential=KEY)
    assert (tmp_path / "x.pt").read_bytes() == b"theirs" and len(list(tmp_path.iterdir())) == 1
    proxy.when("Put Block List").do(Call(lambda: put(container, "x.pt", b"theirs"), "request"))
    with pytest.raises(BlobExistsError):
        consolidate(f"{proxied_container}/a", f"{proxied_container}/x.pt", credential=KEY)
    assert content(container, "x.pt") == b"theirs"


@pytest.mark.parametrize("name", ["large", "object"])
def test_damage_leaves_no_file(container: str, tmp_path: Path, name: str) -> None:
    save(f"{container}/a", 1)
    flip_in_storage(f"{container}/a", item_of(f"{container}/a", name), 100)
    for target in (tmp_path / "x.pt", f"{container}/x.pt"):
        with pytest.raises(CorruptCheckpointError, match=f"'{name}'"):
            consolidate(f"{container}/a", target, credential=KEY, options=TIGHT)
    assert list(tmp_path.iterdir()) == []
    assert "x.pt" not in paths_below(container)


def test_data_that_is_missing_or_refused_leaves_no_file(
    proxy: FaultProxy, container: str, proxied_container: str, tmp_path: Path
) -> None:
    save(f"{container}/a", 1)
    proxy.when(lambda seen: seen.path.endswith(".distcp"), nth=2, times=None).do(Answer(404, "BlobNotFound"))
    with pytest.raises(CorruptCheckpointError, match="missing"):
        consolidate(f"{proxied_container}/a", tmp_path / "x.pt", credential=KEY, options=TIGHT)
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_at_once(container: str, tmp_path: Path) -> None:
    save(f"{container}/a", 1)
    with pytest.raises(ValueError, match=r"'\.gguf'"):
        consolidate(f"{container}/a", tmp_path / "x.gguf", credential=KEY)
    with pytest.raises(ValueError, match="'torch' or 'safetensors'"):
        consolidate(f"{container}/a", tmp_path / "x", credential=KEY, format="gguf")  # type: ignore[arg-type]
    consolidate(f"{container}/a", tmp_path / "x.gguf", credential=KEY, format="torch")
    with pytest.raises(CheckpointNotFoundError):
        consolidate(f"{container}/nothing", tmp_path / "x.pt", credential=KEY)
    with pytest.raises(LocationError, match="append the name"):
        consolidate(f"{container}/a", container, credential=KEY, format="torch")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LocalFileError):
        consolidate(f"{container}/a", tmp_path / "file" / "x.pt", credential=KEY)


class Unsafe:
    """A class that torch.load does not trust."""


def test_an_object_that_torch_does_not_trust_is_refused_by_name(container: str, tmp_path: Path) -> None:
    dcp.save({"x": torch.ones(2), "config": Unsafe()}, storage_writer=writer(f"{container}/a"))
    with pytest.raises(UnsupportedCheckpointError, match=r"'config'.*add_safe_globals"):
        consolidate(f"{container}/a", tmp_path / "x.pt", credential=KEY)
    consolidate(f"{container}/a", tmp_path / "x.pt", credential=KEY, keys=lambda key: key == "x")
    assert torch.load(tmp_path / "x.pt", weights_only=True).keys() == {"x"}


def test_keys_that_accept_nothing_are_refused_and_nothing_is_written(container: str, tmp_path: Path) -> None:
    save(f"{container}/run", 1)
    for target in (str(tmp_path / "a.pt"), f"{container}/a.safetensors"):
        with pytest.raises(ConfigurationError, match=r"none of the 4 keys of .*/run.*'large'"):
            consolidate(f"{container}/run", target, keys=lambda key: key.startswith("model."), credential=KEY)
    assert not list(tmp_path.iterdir())
    dcp.save({}, storage_writer=AzureBlobWriter(f"{container}/empty", credential=KEY))
    with pytest.raises(ConfigurationError, match="is empty"):
        consolidate(f"{container}/empty", tmp_path / "b.pt", keys=lambda key: True, credential=KEY)


# ---- memory ----------------------------------------------------------------------------------------------------------

BUDGET = 32 * MIB


@pytest.mark.parametrize("target", ["x.pt", "blob"])
def test_a_checkpoint_of_300_mib_takes_a_budget_of_32(
    azurite: Azurite, tmp_path: Path, large: str, target: str
) -> None:
    dst = f"{large.rpartition('/')[0]}/whole.pt" if target == "blob" else str(tmp_path / target)
    grown, size = child_result("tests.catalog.consolidate_memory", large, dst, KEY, BUDGET)
    assert size > 300 * MIB
    assert grown < BUDGET + 16 * MIB  # threads' stacks, and what torch keeps
    if target == "x.pt":
        found = torch.load(tmp_path / target, weights_only=True, mmap=True)
        assert all(bool((found["deep"][f"t{n}"] == n).all()) for n in range(5))


@pytest.fixture(scope="module")
def large(azurite: Azurite) -> str:
    """URL of a checkpoint of five tensors of 64 MiB."""
    url = azurite.create_container("large-to-consolidate") + "/a"
    tensors = {f"t{n}": torch.full((4096, 4096), n, dtype=torch.int32) for n in range(5)}
    dcp.save({"deep": tensors}, storage_writer=AzureBlobWriter(url, credential=KEY))
    return url
