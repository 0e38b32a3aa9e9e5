from __future__ import annotations

import ctypes
import gc
import warnings
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from azure_torch_ckpt.dcp.tensors.memory import address_of, is_plain, memory, readable, writable
from azure_torch_ckpt.errors import CheckpointError

ALL_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
# torch.save refuses these with "dtype torch.int4 is not recognized".
WITHOUT_RAW_FORM = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in range(1, 8)}
PLAIN_DTYPES = [dtype for dtype in ALL_DTYPES if dtype not in QUANTIZED | WITHOUT_RAW_FORM]
SHAPES = [(), (0,), (0, 3), (1,), (7,), (3, 5), (2, 1, 4)]

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:.*quantized tensor creation")


def pattern(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[torch.Tensor, bytes]:
    """A tensor and its bytes, made without the code under test."""
    tensor = torch.empty(shape, dtype=dtype)
    raw = bytes((37 * i + 11) % 256 for i in range(tensor.numel() * tensor.element_size()))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    ctypes.memmove(tensor.data_ptr(), raw, len(raw))
    return tensor, raw


@pytest.mark.parametrize("dtype", [*PLAIN_DTYPES, *sorted(WITHOUT_RAW_FORM, key=str)], ids=str)
def test_bytes_of_every_dtype_and_shape(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tensor, raw = pattern(dtype, shape)
        for view in (readable(tensor), writable(tensor)):
            assert (view.format, view.ndim, view.nbytes) == ("B", 1, len(raw))
            assert bytes(view) == raw
            assert not raw or address_of(view) == tensor.data_ptr()


def test_only_writable_can_be_written() -> None:
    tensor = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(TypeError):
        readable(tensor)[0] = 1
    writable(tensor)[4:8] = (7).to_bytes(4, "little")
    assert tensor.tolist() == [0, 7, 0, 0]
    assert readable(torch.empty(0)).readonly and not writable(torch.empty(0)).readonly


def test_writing_leaves_the_version_counter_alone() -> None:
    tensor = torch.zeros(4)
    writable(tensor)[:] = bytes(16)
    assert tensor._version == 0


@given(st.integers(0, 9), st.integers(0, 9))
def test_a_slice_is_only_its_own_bytes(first: int, count: int) -> None:
    whole = torch.arange(10, dtype=torch.int16)
    part = whole[first : first + count]
    assert bytes(readable(part)) == b"".join(i.to_bytes(2, "little") for i in range(10)[first : first + count])
    writable(part)[:] = bytes(2 * part.numel())
    assert whole.tolist() == [0 if first <= i < first + count else i for i in range(10)]


class Origin(bytearray):
    """A storage made of it holds it, so it shows how long the storage lives."""


def test_a_view_keeps_the_memory_and_not_the_tensor() -> None:
    origin = Origin(b"\x01" * 64)
    freed = weakref.ref(origin)
    tensor = torch.frombuffer(origin, dtype=torch.uint8)
    slice_of_view = readable(tensor)[8:16]
    tensor.data = torch.zeros(1, dtype=torch.uint8)
    del tensor, origin
    gc.collect()
    assert freed() is not None
    assert bytes(slice_of_view) == b"\x01" * 8
    del slice_of_view
    gc.collect()
    assert freed() is None


def test_a_parameter_that_requires_grad() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    writable(parameter)[:] = bytes(8)
    assert parameter.tolist() == [0, 0] and is_plain(parameter)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 3).t(),
        torch.zeros(6)[::2],
        torch.zeros(3, dtype=torch.complex64).conj(),
        torch.zeros(3, dtype=torch.complex64).conj().imag,
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch._efficientzerotensor((3,)),
    ],
    ids=["transposed", "strided", "conj", "neg", "meta", "sparse", "zero"],
)
def test_memory_that_is_not_the_value_is_refused(tensor: torch.Tensor) -> None:
    for view_of in (readable, writable):
        with pytest.raises(CheckpointError, match=r"shape \(3"):
            view_of(tensor)


def test_memory_of_no_length_needs_no_address() -> None:
    view = memory(0, 0, None)
    assert view.nbytes == 0 and not view.readonly


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_is_plain_for_every_dtype(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        assert is_plain(torch.empty(shape, dtype=dtype)) is (dtype in PLAIN_DTYPES)


def test_is_plain_says_yes() -> None:
    with_attribute = torch.zeros(2)
    with_attribute.tag = 1  # type: ignore[attr-defined]
    with torch.inference_mode():
        inference = torch.zeros(2)
    for tensor in (
        torch.zeros(3, 4).t(),
        torch.zeros(6)[::2],
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(2, requires_grad=True) * 2,
        torch.zeros(3, dtype=torch.complex64).conj().resolve_conj(),
        torch.nn.Buffer(torch.zeros(2)),
        with_attribute,
        inference,
    ):
        assert is_plain(tensor)


class Subclass(torch.Tensor):
    pass


def test_is_plain_says_no() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls all of these experimental or deprecated
        tensors = [
            torch.zeros(2).as_subclass(Subclass),
            torch.nn.Parameter(torch.zeros(2).as_subclass(Subclass)),
            torch.zeros(2, device="meta"),
            torch.zeros(0, device="meta"),
            torch.eye(3).to_sparse(),
            torch.eye(3).to_sparse_csr(),
            torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
            torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
            torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
            torch.zeros(2, dtype=torch.complex64).conj(),
            torch.zeros(2, dtype=torch.complex64).conj().imag,
            torch._efficientzerotensor((3,)),
        ]
    for tensor in tensors:
        assert not is_plain(tensor)


def test_is_plain_says_no_inside_of_functorch() -> None:
    seen = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(is_plain(tensor))
        with pytest.raises(CheckpointError):
            readable(tensor)
        return tensor.sum()

    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.grad(look)(torch.ones(2))
    torch.func.functionalize(look)(torch.ones(2))
    assert seen == [False, False, False]
