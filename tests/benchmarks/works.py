"""The state dicts that are saved and loaded, made from a short text, and the parts of them that a load may ask for."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import LoadPlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tests.benchmarks.spec import GIB, MIB, Step
from tests.support.sharded import ShardPlanner

State = dict[str, torch.Tensor]

_SHARED = "shared"

# Llama 3.2 1B: https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
_LLAMA_HIDDEN = 2048
_LLAMA_INTERMEDIATE = 8192
_LLAMA_KEY_VALUE = 512
_LLAMA_VOCABULARY = 128_256


@dataclass(frozen=True)
class Shape:
    name: str
    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32


def build(tensors: str) -> State:
    """A state dict, filled with a byte of each tensor's own.

    Args:
        tensors: ``COUNTxBYTES`` for that many tensors of that size; ``COUNTxBYTES@shared`` for tensors that share at
            most 1 GiB of memory among them; ``llama/HIDDEN/LAYERS`` for the parameters of a Llama 3.2 1B with another
            hidden size and number of layers, and their AdamW state.
    """
    kind, _, rest = tensors.partition("/")
    if kind == "llama":
        hidden, layers = map(int, rest.split("/"))
        return {shape.name: _filled(shape) for shape in _llama(hidden, layers)}
    numbers, _, shared = tensors.partition("@")
    count, size = map(int, numbers.split("x"))
    if shared:
        return _aliases(count, size)
    columns = 4096 if size >= MIB else 64
    sizes = (size // 4 // columns, columns)
    return {name: _filled(Shape(name, sizes)) for name in (f"layer.{number}.weight" for number in range(count))}


def clear(state: State) -> None:
    """Other content, so that `check` sees what a load did not bring. Touches every page of the tensors as well."""
    for tensor in state.values():
        _bytes(tensor).zero_()


def check(state: State) -> None:
    """Raise unless what a load brought is what `build` put there, at every 4097th byte and at the end."""
    for name, tensor in state.items():
        raw = _bytes(tensor)
        if int(raw[-1]) not in (_byte(name), _byte(_SHARED)) or not bool((raw[::4097] == raw[-1]).all()):
            raise AssertionError(f"{name} was not loaded as it was saved")


def nbytes(state: State) -> int:
    return sum(_local(tensor).nbytes for tensor in state.values())


def narrowed(state: State, step: Step) -> tuple[State, LoadPlanner | None]:
    """What a step loads, and the planner that says which part of the saved tensors it is."""
    if step == "twentieth":
        return dict(list(state.items())[::20]), None
    if step not in ("rows", "columns"):
        return state, None
    part: State = {}
    offsets: dict[str, tuple[int, ...]] = {}
    for name, tensor in state.items():
        sizes, offset = list(tensor.shape), [0] * tensor.dim()
        if sizes:
            axis = 0 if step == "rows" else -1
            sizes[axis] = max(sizes[axis] // 8, 1)
            offset[axis] = min(3 * sizes[axis], tensor.shape[axis] - sizes[axis])
        part[name] = torch.zeros(sizes, dtype=tensor.dtype)
        offsets[name] = tuple(offset)
    return part, ShardPlanner(offsets)


def sharded(state: State) -> State:
    """This rank's rows of every tensor, as DTensors over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        name: DTensor.from_local(tensor.chunk(world)[rank].clone(), mesh, [Shard(0)], run_check=False)
        for name, tensor in state.items()
    }


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return _local(tensor).reshape(-1).view(torch.uint8)


def _byte(name: str) -> int:
    return zlib.crc32(name.encode()) % 250 + 1


def _filled(shape: Shape) -> torch.Tensor:
    tensor = torch.empty(shape.sizes, dtype=shape.dtype)
    _bytes(tensor).fill_(_byte(shape.name))
    return tensor


def _aliases(count: int, size: int) -> State:
    memory = _filled(Shape(_SHARED, (max(GIB // size, 1), size // 4)))
    return {f"layer.{number}.weight": memory[number % len(memory)] for number in range(count)}


def _llama(hidden: int, layers: int) -> list[Shape]:
    scale = hidden / _LLAMA_HIDDEN
    intermediate, key_value, vocabulary = (
        max(round(size * scale), 8) for size in (_LLAMA_INTERMEDIATE, _LLAMA_KEY_VALUE, _LLAMA_VOCABULARY)
    )
    weights: dict[str, tuple[int, ...]] = {"embed_tokens": (vocabulary, hidden)}
    for layer in range(layers):
        weights |= {
            f"layers.{layer}.{name}": sizes
            for name, sizes in {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (key_value, hidden),
                "self_attn.v_proj": (key_value, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (intermediate, hidden),
                "mlp.up_proj": (intermediate, hidden),
                "mlp.down_proj": (hidden, intermediate),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }.items()
        }
    weights["norm"] = (hidden,)
    shapes = []
    for name, sizes in weights.items():
        shapes += [
            Shape(f"model.{name}.weight", sizes, torch.bfloat16),
            Shape(f"optimizer.state.{name}.weight.exp_avg", sizes),
            Shape(f"optimizer.state.{name}.weight.exp_avg_sq", sizes),
            Shape(f"optimizer.state.{name}.weight.step", ()),
        ]
    return shapes
