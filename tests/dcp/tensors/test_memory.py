from __future__ import annotations

import ctypes
import gc
import warnings
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from azure_torch_ckpt.dcp.tensors.memory import address_of, is_plain, memory, readable, tensor_views, writable
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


DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.complex128]


def row_major_bytes(tensor: torch.Tensor) -> bytes:
    """Made element by element, without the code under test."""
    return b"".join(ctypes.string_at(element.data_ptr(), element.element_size()) for element in elements(tensor))


def elements(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor] if tensor.dim() == 0 else [element for row in tensor for element in elements(row)]


@st.composite
def views_of_something(draw: st.DrawFn) -> torch.Tensor:
    """Every way in which a tensor can lie in a storage: sliced, strided, permuted, expanded, at an offset."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    tensor = torch.arange(torch.Size(shape).numel()).to(draw(st.sampled_from(DTYPES))).reshape(shape)
    for dim, size in enumerate(shape):
        start = draw(st.integers(0, size))
        tensor = tensor[(slice(None),) * dim + (slice(start, None, draw(st.integers(1, 3))),)]
        if tensor.shape[dim] == 1 and draw(st.booleans()):
            tensor = tensor.expand([4 if i == dim else -1 for i in range(tensor.dim())])
    return tensor.permute(draw(st.permutations(range(tensor.dim()))))


@given(views_of_something(), st.integers(1, 200))
def test_views_are_the_row_major_bytes(tensor: torch.Tensor, limit: int) -> None:
    made = list(tensor_views(tensor, limit))
    assert b"".join(made) == row_major_bytes(tensor)
    assert all(view.readonly and view.ndim == 1 and view.format == "B" for view in made)
    storage = tensor.untyped_storage()
    own = range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())
    copies = [view for view in made if address_of(view) not in own]
    assert max((view.nbytes for view in copies), default=0) <= max(limit, tensor.element_size())


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(12.0), torch.arange(12.0).reshape(3, 4)[1:], torch.tensor(3), torch.ones(5, 1).expand(5, 1)[2]],
    ids=["whole", "rows", "scalar", "element"],
)
def test_contiguous_memory_is_one_view_in_place(tensor: torch.Tensor) -> None:
    (view,) = tensor_views(tensor, 4)
    assert address_of(view) == tensor.data_ptr()
    assert view.nbytes == tensor.nbytes


def test_copies_are_made_only_when_asked_for() -> None:
    tensor = torch.zeros(8, 8, dtype=torch.uint8).t()
    made = tensor_views(tensor, 16)
    assert bytes(next(made)) == bytes(16)
    tensor.fill_(7)
    assert [bytes(view) for view in made] == [bytes([7]) * 16] * 3


@pytest.mark.parametrize(
    ("tensor", "count"),
    [
        (torch.zeros(1024, 1024, dtype=torch.uint8).t(), 16),
        (torch.zeros(1, dtype=torch.uint8).expand(1 << 20), 16),
        (torch.zeros(1 << 10, 1 << 11, dtype=torch.uint8)[:, ::2], 16),
        (torch.zeros(2, 8, 1 << 16, dtype=torch.uint8).transpose(0, 1), 16),
    ],
    ids=["transposed", "expanded", "every other column", "planes"],
)
def test_views_are_as_large_as_the_limit_allows(tensor: torch.Tensor, count: int) -> None:
    assert [view.nbytes for view in tensor_views(tensor, 1 << 16)] == [1 << 16] * count
