"""Copies of a state dict in host memory, taken while training waits and used again for the next copy."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from azure_torch_ckpt.dcp.tensors.copies import copy_elements

__all__ = ["Snapshot"]


class Snapshot:
    """Memory for one copy of a state dict. The next copy of tensors of the same shapes takes the same memory.

    For tensors on a CUDA or XPU device it is pinned, so that the device's copy engine fills it.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Contiguous copies on the CPU, complete when this returns. They last until the next call."""
        # A tensor that is made in inference mode cannot be written to outside of it, and the memory is used again.
        with torch.inference_mode(False), torch.no_grad():
            return self._take(tensors)

    def _take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept, self._buffers = self._buffers, {}
        filling: set[torch.device] = set()
        for name, tensor in tensors.items():
            pinned = tensor.device.type in ("cuda", "xpu")
            buffer = kept.pop(name, None)
            if buffer is None or not _fits(buffer, tensor, pinned):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            copy_elements(tensor.detach(), buffer, repr(name), non_blocking=pinned)
            self._buffers[name] = buffer
            if pinned:
                filling.add(tensor.device)
        for device in filling:
            torch.accelerator.current_stream(device).synchronize()
        return dict(self._buffers)


def _fits(buffer: torch.Tensor, tensor: torch.Tensor, pinned: bool) -> bool:
    return buffer.shape == tensor.shape and buffer.dtype == tensor.dtype and buffer.is_pinned() == pinned
