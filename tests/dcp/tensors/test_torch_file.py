from __future__ import annotations

import gc
import io
import subprocess
import sys
import tracemalloc
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.utils import _create_file_view
from torch.utils.serialization import config

from azure_torch_ckpt.dcp.tensors.memory import address_of, readable
from azure_torch_ckpt.dcp.tensors.torch_file import Envelope, envelope, load_saved, load_tensor, serialize
from azure_torch_ckpt.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError

# torch.save refuses the others: torch.int1 to int7 and uint1 to uint7 ("is not recognized"), and quantized ones, which
# need a quantizer.
DTYPES = [
    dtype
    for dtype in sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
    if not str(dtype).startswith(("torch.q", "torch.quint"))
    and dtype not in [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in range(1, 8)]
]
SHAPES = [(), (0,), (0, 3), (3, 0, 2), (1,), (7,), (3, 5), (1, 1, 1), (2, 3, 4, 5), (1 << 15,)]

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:.*quantized tensor creation")


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    envelope.cache_clear()
    yield
    envelope.cache_clear()


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bits at all, so all sorts of NaN among them; 0 and 1 where others are no value."""
    tensor = torch.empty(shape, dtype=dtype)
    raw_bytes(tensor).random_(0, 2 if dtype is torch.bool else 256)
    return tensor


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def file_of(tensor: torch.Tensor) -> bytes:
    around = envelope(tensor.dtype, tensor.shape)
    return around.head + bytes(readable(tensor)) + around.trailer


def saved(obj: object) -> bytes:
    stream = io.BytesIO()
    torch.save(obj, stream)
    return stream.getvalue()


def assert_same(loaded: torch.Tensor, tensor: torch.Tensor) -> None:
    assert type(loaded) is torch.Tensor
    assert (loaded.dtype, loaded.shape, loaded.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert loaded.device.type == "cpu" and loaded.is_contiguous() and not loaded.requires_grad
    assert torch.equal(raw_bytes(loaded), raw_bytes(tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_load_reads_every_dtype_and_shape(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tensor = random_tensor(dtype, shape)
        file = file_of(tensor)
        assert_same(torch.load(io.BytesIO(file), weights_only=True), tensor)
        assert_same(torch.load(io.BytesIO(file), weights_only=False), tensor)


@settings(deadline=None)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=6).map(tuple))
def test_torch_load_reads_any_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(dtype, shape)
    assert_same(torch.load(io.BytesIO(file_of(tensor)), weights_only=True), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_file_is_the_one_of_torch_save_but_for_checksums(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tensor = random_tensor(dtype, shape)
        ours, theirs = file_of(tensor), saved(tensor)
        assert len(ours) == len(theirs)
        differing = [i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
        with zipfile.ZipFile(io.BytesIO(theirs)) as archive:
            serialization_id = archive.read("archive/.data/serialization_id")
            names = archive.namelist()
            marks = {name: archive.read(name) for name in names if not name.endswith(("/0", "_id"))}
            start = local_payload_start(theirs, archive.getinfo("archive/data/0"))
        assert start == len(envelope(tensor.dtype, tensor.shape).head)
        # Two CRC32 of two records each (behind the record and in the directory), and the 40 digits of the id.
        assert len(differing) <= 4 * 4 + len(serialization_id) == 56
        if differing:
            assert differing[0] >= start + tensor.nbytes
        with zipfile.ZipFile(io.BytesIO(ours)) as archive:
            assert archive.namelist() == names
            assert {name: archive.read(name) for name in marks} == marks
            if tensor.numel():
                with pytest.raises(zipfile.BadZipFile, match="CRC-32"):
                    archive.read("archive/data/0")


def local_payload_start(file: bytes, record: zipfile.ZipInfo) -> int:
    at = record.header_offset
    name_length = int.from_bytes(file[at + 26 : at + 28], "little")
    extra_length = int.from_bytes(file[at + 28 : at + 30], "little")
    return at + 30 + name_length + extra_length


@pytest.mark.parametrize("before", [0, 1, 4097])
def test_loads_from_the_middle_of_a_data_blob(before: int) -> None:
    """As torch's own reader does: a view of one item in a file of many."""
    kinds: list[tuple[torch.dtype, tuple[int, ...]]] = [
        (torch.bfloat16, (5, 3)),
        (torch.int64, ()),
        (torch.uint8, (0, 2)),
    ]
    tensors = [random_tensor(dtype, shape) for dtype, shape in kinds]
    blob, places = io.BytesIO(b"\xff" * before), []
    blob.seek(before)
    for tensor in tensors:
        places.append((blob.tell(), blob.write(file_of(tensor))))
    blob.write(b"\xff" * 100)
    for (offset, length), tensor in zip(places, tensors, strict=True):
        view = cast("IO[bytes]", _create_file_view(blob, offset, length))
        assert_same(torch.load(view, map_location="cpu", weights_only=True), tensor)


@pytest.mark.parametrize("nbytes", [(1 << 32) - 1, 1 << 32, (1 << 32) + 7], ids=["below", "at", "above"])
def test_payloads_around_4_gib(tmp_path: Path, nbytes: int) -> None:
    """Where zip needs its 64-bit fields. The payload is a hole of a sparse file, and mapped instead of read."""
    around = envelope(torch.uint8, (nbytes,))
    path = tmp_path / "item"
    with path.open("wb") as file:
        file.write(around.head)
        file.write(b"\x05")
        file.seek(len(around.head) + nbytes - 1)
        file.write(b"\x06")
        file.write(around.trailer)
    with zipfile.ZipFile(path) as archive:
        record = archive.getinfo("archive/data/0")
        assert (record.file_size, record.compress_size) == (nbytes, nbytes)
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded.shape == (nbytes,)
    assert (loaded[0].item(), loaded[-1].item(), loaded[1 << 31].item()) == (5, 6, 0)


@pytest.mark.parametrize("shape", [(1 << 42,), (1 << 20, 1 << 22), (1 << 44, 1)])
def test_a_huge_payload_costs_nothing(shape: tuple[int, ...]) -> None:
    """Neither torch's memory, of which no machine has as much, nor Python's."""
    envelope(torch.float32, (2,))  # whatever torch does only once
    tracemalloc.start()
    try:
        around = envelope(torch.float32, shape)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(around.head) + len(around.trailer) < 4096
    assert peak < 1 << 20  # bytes


def test_made_once_per_dtype_and_shape() -> None:
    first = envelope(torch.float32, torch.Size([2, 3]))
    assert envelope(torch.float32, (2, 3)) is first
    assert envelope(torch.float32, (3, 2)) != first
    assert envelope(torch.int32, (2, 3)) != first


@pytest.mark.parametrize(
    "settings",
    [
        {"save.compute_crc32": False},
        {"save.storage_alignment": 4096},
        {"save.storage_alignment": 1},
        {"save.use_pinned_memory_for_d2h": True},
        {"load.mmap": True},
        {"load.calculate_storage_offsets": True},
        {"save.storage_alignment": 512, "load.mmap": True, "load.calculate_storage_offsets": True},
    ],
    ids=str,
)
def test_settings_of_torch_make_no_difference(settings: dict[str, Any], tmp_path: Path) -> None:
    tensor = random_tensor(torch.float16, (33, 5))
    path = tmp_path / "item"
    path.write_bytes(file_of(tensor))
    with config.patch(settings):  # type: ignore[attr-defined]
        if not settings.get("load.mmap"):
            assert_same(torch.load(path, weights_only=True), tensor)
        assert_same(torch.load(path, weights_only=True, mmap=True), tensor)
        # torch keeps the settings per thread since 2.13; before, those of alignment move the payload.
        envelope.cache_clear()
        again = tmp_path / "again"
        again.write_bytes(file_of(tensor))
        envelope.cache_clear()
    assert_same(torch.load(again, weights_only=True), tensor)
    assert_same(torch.load(again, weights_only=True, mmap=True), tensor)


def test_modes_of_the_caller_do_not_reach_it() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class LooksAtEverything(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel():
                bytes(readable(result))
            return result

    expected = envelope(torch.float32, (1 << 34,))
    looking: Any = LooksAtEverything()  # type: ignore[no-untyped-call]
    for mode in (looking, torch.device("meta"), torch.inference_mode(), torch.serialization.skip_data()):
        envelope.cache_clear()
        with mode:
            assert envelope(torch.float32, (1 << 34,)) == expected


def test_a_save_that_outlives_the_main_thread() -> None:
    """As an asynchronous save does when the script ends right after it began. Executors refuse new work then."""
    script = """
import threading
from concurrent.futures import ThreadPoolExecutor
import torch
from azure_torch_ckpt.dcp.tensors.torch_file import envelope

def save():
    while True:
        try:
            e = ThreadPoolExecutor(1); e.submit(int); e.shutdown()
        except RuntimeError:
            break
    print(len(envelope(torch.float32, (5,)).head))

threading.Thread(target=save).start()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == [str(len(envelope(torch.float32, (5,)).head))], done.stderr


@pytest.mark.parametrize("dtype", [torch.int4, torch.qint8], ids=str)  # type: ignore[attr-defined]
def test_a_dtype_that_torch_cannot_save_is_a_clear_error(dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match=rf"{dtype} and shape \(2, 3\)") as caught:
        envelope(dtype, (2, 3))
    assert caught.value.__cause__ is not None


def test_a_torch_that_writes_something_else_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such torch exists yet, so torch.save is replaced here."""

    def compressed(obj: object, stream: Any, **_: Any) -> None:
        with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data/0", bytes(24))
        stream.write(buffer.getvalue())

    def elsewhere(obj: object, stream: Any, **_: Any) -> None:
        with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
            archive.writestr("archive/data/0", bytes(24))
        stream.write(buffer.getvalue())

    def no_zip(obj: object, stream: Any, **_: Any) -> None:
        stream.write(b"something new")

    for other_save in (compressed, elsewhere, no_zip):
        monkeypatch.setattr(torch, "save", other_save)
        with pytest.raises(CheckpointError, match="did not write"):
            envelope(torch.float32, (2, 3))
    monkeypatch.undo()
    monkeypatch.delattr(torch.serialization, "skip_data")
    with pytest.raises(CheckpointError, match="did not write"):
        envelope(torch.float32, (2, 3))
    monkeypatch.undo()
    assert isinstance(envelope(torch.float32, (2, 3)), Envelope)


class Subclass(torch.Tensor):
    pass


class Origin(bytearray):
    """A storage made of it holds it, so it shows how long the storage lives."""


BIG = 1 << 16  # float32 elements: several times what is copied rather than kept


def special_objects() -> dict[str, object]:
    dense = torch.rand(BIG)
    return {
        "a subclass": dense.as_subclass(Subclass),
        "sparse": torch.diag(torch.arange(1.0, 301)).to_sparse(),
        "csr": torch.rand(300, 300).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.rand(BIG), 0.1, 0, torch.qint8),
        "conj": torch.rand(BIG, dtype=torch.complex64).conj(),
        "not contiguous": torch.rand(300, 300).t(),
        "a part of a storage": dense[10:20],
        "several, one shared": {"a": dense, "b": [torch.rand(BIG), dense[5:]], "c": torch.zeros(())},
        "no tensor": {"step": 7, "text": "x" * 200_000},
        "a bare storage": dense.untyped_storage(),
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_serialize_writes_what_torch_save_writes() -> None:
    for name, obj in special_objects().items():
        views = serialize(obj)
        assert b"".join(views) == saved(obj), name
        assert all(view.format == "B" and view.readonly and view.nbytes for view in views)


def test_serialize_copies_no_tensor_memory() -> None:
    tensors = [torch.rand(BIG), torch.rand(4 * BIG), torch.rand(3)]
    views = serialize({"a": tensors[0].as_subclass(Subclass), "b": tensors[1], "small": tensors[2]})
    in_place = [view for view in views if address_of(view) in {tensor.data_ptr() for tensor in tensors}]
    assert [view.nbytes for view in in_place] == [4 * BIG, 16 * BIG]
    assert sum(view.nbytes for view in views) - 20 * BIG < 8192
    assert len(views) == 5

    quantized = torch.quantize_per_tensor(torch.rand(BIG), 0.1, 0, torch.qint8)
    assert quantized.data_ptr() in {address_of(view) for view in serialize(quantized)}


def test_the_views_keep_the_memory() -> None:
    origin = Origin(4 * BIG)
    freed = weakref.ref(origin)
    views = serialize({"weight": torch.frombuffer(origin, dtype=torch.float32)})
    del origin
    gc.collect()
    assert freed() is not None
    loaded = torch.load(io.BytesIO(b"".join(views)), weights_only=True)
    assert torch.equal(loaded["weight"], torch.zeros(BIG))
    del views
    gc.collect()
    assert freed() is None


def test_serialize_passes_on_what_torch_save_raises() -> None:
    with pytest.raises(KeyError, match="int4"):
        serialize(torch.empty(3, dtype=torch.int4))  # type: ignore[attr-defined]


# Reading


def test_a_class_that_torch_refuses_is_not_damage() -> None:
    with pytest.raises(UnsupportedCheckpointError, match=r"x has a class.*\(.*Origin\).*add_safe_globals first, or y"):
        load_saved(io.BytesIO(saved(Origin(3))), "x", ", or y")
    for damage in (b"", b"not a zip file", saved(torch.ones(2))[:-30]):
        with pytest.raises(CorruptCheckpointError, match="cannot read x"):
            load_saved(io.BytesIO(damage), "x")
    with pytest.raises(CorruptCheckpointError, match="holds dict, not a tensor"):
        load_tensor(io.BytesIO(saved({})), "x")
