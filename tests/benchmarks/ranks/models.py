"""Models and how ranks share them: the state dict of any one rank of any number, made in milliseconds.

A rank that is measured has real DTensors (`dtensors`). For the plans of all the other ranks there are `VirtualShard`
objects, which planners take for tensors by torch's ``_Checkpointable`` protocol and which say the same of themselves
as a DTensor would, without a mesh: a tenth of the time. `check_virtual` proves that, for one rank, every time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

State = dict[str, Any]
Sizes = tuple[int, ...]
Allocate = Callable[[Sizes], torch.Tensor]

_DTYPE = torch.float32
_MOMENTS = ("exp_avg", "exp_avg_sq")
_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama's parameters.

    Attributes:
        columns: the most columns that a matrix keeps; 0 for all of them. Tensors of few bytes have the same rows, so
            the same shards.
    """

    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int = 128_256
    columns: int = 0


# https://huggingface.co/meta-llama/Meta-Llama-3-70B/blob/main/config.json
LLAMA_70B = Llama(layers=80, hidden=8192, intermediate=28_672, key_value=1024)
# https://huggingface.co/meta-llama/Llama-3.1-405B/blob/main/config.json
LLAMA_405B = Llama(layers=126, hidden=16_384, intermediate=53_248, key_value=1024)
MODELS = {
    "Llama 3 70B": LLAMA_70B,
    "Llama 3 70B, one column": dataclasses.replace(LLAMA_70B, columns=1),
    "Llama 3.1 405B": LLAMA_405B,
    "tiny": Llama(layers=2, hidden=16, intermediate=24, key_value=8, vocabulary=65),
}


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name, its sizes, and the dimension that tensor parallelism splits (None: it does not)."""

    name: str
    sizes: Sizes
    split: Literal[0, 1] | None


@dataclass(frozen=True)
class Sharding:
    """A model, its AdamW's two moments for each parameter, and the ranks that share them.

    Ranks are numbered as torch's meshes number them: pipeline stages outermost, then FSDP, then tensor parallelism.
    FSDP2 shards the rows of all tensors, within the rows that tensor parallelism has left.

    Attributes:
        model: a name of `MODELS`.
    """

    model: str
    fsdp: int
    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.fsdp * self.tp * self.pp

    @property
    def name(self) -> str:
        if self.tp == self.pp == 1:
            return f"{self.model}, FSDP2 {self.fsdp}"
        return f"{self.model}, FSDP2 {self.fsdp} x TP {self.tp} x PP {self.pp}"

    @property
    def tensors(self) -> int:
        """How many tensors all ranks have together."""
        return (1 + len(_MOMENTS)) * sum(len(self.parameters(stage)) for stage in range(self.pp))

    def parameters(self, stage: int) -> list[Parameter]:
        return _parameters(MODELS[self.model], stage, self.pp)

    def chunk(self, parameter: Parameter, rank: int) -> tuple[Sizes, Sizes]:
        """Offsets and sizes of a rank's shard."""
        fsdp, tp = rank // self.tp % self.fsdp, rank % self.tp
        offsets, sizes = [0] * len(parameter.sizes), list(parameter.sizes)
        if parameter.split is not None:
            offsets[parameter.split], sizes[parameter.split] = _share(sizes[parameter.split], tp, self.tp)
        start, sizes[0] = _share(sizes[0], fsdp, self.fsdp)
        offsets[0] += start
        return tuple(offsets), tuple(sizes)

    def state(self, rank: int, make: Callable[[Parameter], Any]) -> State:
        """A rank's state dict as torch's ``get_state_dict`` nests it, with what `make` returns for each tensor."""
        parameters = self.parameters(rank // (self.tp * self.fsdp))
        return {
            "model": {one.name: make(one) for one in parameters},
            "optim": {"state": {one.name: {moment: make(one) for moment in _MOMENTS} for one in parameters}},
        }

    def virtual(self, rank: int, allocate: Allocate | None = None) -> State:
        """A rank's state dict of `VirtualShard` objects."""
        return self.state(rank, lambda one: VirtualShard.make(self, one, rank, allocate or _untouched))

    def dtensors(self, rank: int, mesh: DeviceMesh | None = None) -> State:
        """A rank's state dict of DTensors, whose memory nobody has touched.

        Args:
            mesh: `mesh` of this process's group. None makes one of torch's fake process group, which has ended when
                this returns: planning needs no group.
        """
        if mesh is not None:
            return self._dtensors(rank, mesh)
        stage = self.fsdp * self.tp
        dist.init_process_group("fake", rank=rank % stage, world_size=stage, store=FakeStore())
        try:
            return self._dtensors(rank, self.mesh())
        finally:
            dist.destroy_process_group()

    def mesh(self) -> DeviceMesh:
        """Of all processes of this group, which are one pipeline stage."""
        if self.tp == 1:
            return init_device_mesh("cpu", (self.fsdp,), mesh_dim_names=("fsdp",))
        return init_device_mesh("cpu", (self.fsdp, self.tp), mesh_dim_names=("fsdp", "tp"))

    def _dtensors(self, rank: int, mesh: DeviceMesh) -> State:
        def make(parameter: Parameter) -> DTensor:
            sizes = torch.Size(parameter.sizes)
            made: DTensor = DTensor.from_local(
                _untouched(self.chunk(parameter, rank)[1]),
                mesh,
                self._placements(parameter),
                run_check=False,
                shape=sizes,
                stride=torch.empty(sizes, device="meta").stride(),
            )
            return made

        return self.state(rank, make)

    def _placements(self, parameter: Parameter) -> list[Placement]:
        if self.tp == 1:
            return [Shard(0)]
        if parameter.split is None:
            return [Shard(0), Replicate()]
        if parameter.split == 0:
            return [_StridedShard(0, split_factor=self.tp), Shard(0)]
        return [Shard(0), Shard(1)]


class VirtualShard(torch.Tensor):
    """A rank's shard of one tensor: what planners and writers ask a DTensor, computed when they ask.

    A tensor itself only because torch looks for shards in tensors alone.
    """

    @staticmethod
    def make(sharding: Sharding, parameter: Parameter, rank: int, allocate: Allocate) -> VirtualShard:
        shard: VirtualShard = torch.Tensor._make_subclass(VirtualShard, _NOTHING)
        shard._sharding, shard._parameter, shard._rank, shard._allocate = sharding, parameter, rank, allocate
        return shard

    _sharding: Sharding
    _parameter: Parameter
    _rank: int
    _allocate: Allocate

    def size(self, dim: int | None = None) -> Any:
        sizes = torch.Size(self._parameter.sizes)
        return sizes if dim is None else sizes[dim]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        chunk = self.__create_chunk_list__()[0]
        data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=_DTYPE), size=self.size())
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        offsets, sizes = self._sharding.chunk(self._parameter, self._rank)
        return [ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self._allocate(self._sharding.chunk(self._parameter, self._rank)[1])


def check_virtual(sharding: Sharding, rank: int) -> None:
    """Raise AssertionError unless torch's planner makes the same plan of virtual shards and of DTensors."""
    virtual, real = (local_plan(state) for state in (sharding.virtual(rank), sharding.dtensors(rank)))
    assert virtual == real, "the plan of virtual shards is not that of DTensors"
    sizes = [len(pickle.dumps(plan)) for plan in (virtual, real)]
    assert sizes[0] == sizes[1], f"the plans are pickled to {sizes} bytes"


def local_plan(state: State) -> Any:
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, None, False)
    return planner.create_local_plan()


def _share(extent: int, number: int, count: int) -> tuple[int, int]:
    """Start and length of a share as ``torch.chunk`` cuts it: the last ones may be short, or empty."""
    each = -(-extent // count)
    start = min(number * each, extent)
    return start, min(each, extent - start)


def _untouched(sizes: Sizes) -> torch.Tensor:
    """A tensor whose memory nobody has touched, so that the larger ones have none."""
    return torch.empty(sizes, dtype=_DTYPE)


@functools.cache
def _parameters(model: Llama, stage: int, stages: int) -> list[Parameter]:
    """Those of one pipeline stage. Where the layers do not divide, the first and last stages have fewer."""
    each = -(-model.layers // stages)
    missing = each * stages - model.layers
    first = stage * each - (missing + 1) // 2 * (stage > 0)
    count = each - (missing + 1) // 2 * (stage == 0) - missing // 2 * (stage == stages - 1)
    found = []
    if stage == 0:
        found.append(_parameter(model, "tok_embeddings.weight", (model.vocabulary, model.hidden), 0))
    for layer in range(first, first + count):
        found += _layer(model, f"layers.{layer}.")
    if stage == stages - 1:
        found.append(_parameter(model, "norm.weight", (model.hidden,), None))
        found.append(_parameter(model, "output.weight", (model.vocabulary, model.hidden), 0))
    return found


def _layer(model: Llama, prefix: str) -> Iterator[Parameter]:
    hidden, intermediate, key_value = model.hidden, model.intermediate, model.key_value
    sizes: list[tuple[str, Sizes, Literal[0, 1] | None]] = [
        ("attention.wq.weight", (hidden, hidden), 0),
        ("attention.wk.weight", (key_value, hidden), 0),
        ("attention.wv.weight", (key_value, hidden), 0),
        ("attention.wo.weight", (hidden, hidden), 1),
        ("feed_forward.w1.weight", (intermediate, hidden), 0),
        ("feed_forward.w2.weight", (hidden, intermediate), 1),
        ("feed_forward.w3.weight", (intermediate, hidden), 0),
        ("attention_norm.weight", (hidden,), None),
        ("ffn_norm.weight", (hidden,), None),
    ]
    for name, shape, split in sizes:
        yield _parameter(model, prefix + name, shape, split)


def _parameter(model: Llama, name: str, sizes: Sizes, split: Literal[0, 1] | None) -> Parameter:
    if len(sizes) > 1 and model.columns:
        sizes = (sizes[0], min(sizes[1], model.columns))
    return Parameter(name, sizes, split)


def nbytes(sharding: Sharding, rank: int) -> int:
    """Bytes of a rank's tensors."""
    parameters = sharding.parameters(rank // (sharding.tp * sharding.fsdp))
    elements = sum(math.prod(sharding.chunk(one, rank)[1]) for one in parameters)
    return (1 + len(_MOMENTS)) * elements * _DTYPE.itemsize
