from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from azure_torch_ckpt.dcp.tensors.memory import address_of, tensor_views

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
