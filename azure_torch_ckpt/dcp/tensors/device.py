"""Copies from an accelerator to the host, on a stream of their own."""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["to_host"]


def to_host(parts: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield contiguous CPU copies of device tensors, in order; the next copy runs while the caller uses the last one.

    The copies wait for what the current stream has been given so far, and for nothing later. The current stream waits
    for none of them. Their memory is pinned and comes from torch's cache of such memory, which takes it back when the
    caller drops the copy; one copy more than the caller holds is alive at a time.
    """
    side: torch.Stream | None = None
    ahead: tuple[torch.Tensor, torch.Event] | None = None
    for part in parts:
        if not _copies_asynchronously(part.device):
            yield part.to("cpu").contiguous()
            continue
        if side is None:
            side = torch.Stream(device=part.device)
            side.wait_stream(torch.accelerator.current_stream(part.device))
        with side:
            host = torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=True)
            host.copy_(part, non_blocking=True)
            copied = side.record_event()
        if ahead is not None:
            ahead[1].synchronize()
            yield ahead[0]
        ahead = host, copied
    if ahead is not None:
        ahead[1].synchronize()
        yield ahead[0]


def _copies_asynchronously(device: torch.device) -> bool:
    # Elsewhere (MPS, privateuse backends without streams) a plain copy is right, and what the backend is good at.
    return device.type in ("cuda", "xpu")
