"""Keys of state dicts, and where they come from, come back exactly as they were, and take few bytes."""

from __future__ import annotations

import pickle
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from azure_torch_ckpt.dcp.metadata.names import pack_names, unpack_names
from azure_torch_ckpt.dcp.plan_paths import LocalPaths, PackedPaths
from tests.dcp.metadata.virtual_saves import NAMES


@given(st.lists(NAMES))
@example(
    ["\0", "0", "a\0" + "1", "a" + "\0", "a1", "a01", "a-1", "1a2", "٣", "²", "\ud83d\ude00", "\U0001f600", "000000000"]
)
@example(["999999999", "0999999999", "1000000000", "9" * 5000])
def test_names_come_back(names: list[str]) -> None:
    assert unpack_names(pack_names(tuple(names))) == tuple(names)


def test_names_of_a_model_take_few_bytes() -> None:
    parts = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
    names = [f"model.layers.{layer}.{part}" for layer in range(500) for part in parts]
    assert len(pack_names(tuple(names))) < 2 * len(names)
    # Ranks have the same names: the bytes that the coordinator compares must be the same as well.
    assert pack_names(tuple(names)) == pack_names(tuple(f"{name}" for name in names))


STEPS = st.one_of(NAMES, st.integers(0, 2**70), st.integers(-3, -1), st.booleans(), st.floats(allow_nan=False))
PATHS = st.lists(STEPS, min_size=1, max_size=4).map(tuple)


@st.composite
def mappings(draw: st.DrawFn) -> dict[str, tuple[Any, ...]]:
    """As torch flattens state dicts, and as a planner of a user may do it."""
    found = {}
    for path in draw(st.lists(PATHS, max_size=5)):
        key = ".".join(map(str, path)) if draw(st.integers(0, 3)) else draw(NAMES)
        found[key] = path
    return found


@given(mappings())
@example({"": ("",), ".": ("", ""), "..": (".", ""), "0": (0,), "a.0": ("a", "0"), "a.b": ("a.b",)})
@example({"True": (True,), "1": (1,), "1.0": (1.0,), "-1": (-1,), "٣": ("٣",), "x": (), "a.b": ("a", "c")})
def test_paths_come_back(paths: dict[str, tuple[Any, ...]]) -> None:
    assert LocalPaths(paths) == paths
    sent = pickle.loads(pickle.dumps(LocalPaths(paths)))
    assert type(sent) is PackedPaths
    found = sent.unpacked()
    assert found == paths and list(found) == list(paths)
    assert [list(map(type, path)) for path in found.values()] == [list(map(type, path)) for path in paths.values()]
