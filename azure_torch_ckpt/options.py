"""`TransferOptions`: how many connections, how much memory and how much time a transfer may use."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TransferOptions"]

_MIB = 1024 * 1024
# https://learn.microsoft.com/azure/storage/blobs/scalability-targets
MAX_BLOCKS = 50_000
_MAX_BLOCK = 4_000 * _MIB
_BLOCK = 32 * _MIB
_SMALL_BLOCK = 8 * _MIB
# Blocks between one size and its double, for a blob of unknown length: 12 of these steps stay below 50,000 blocks.
_BLOCKS_PER_SIZE = 4_000


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """Limits of one save or load of one process. The defaults suit a training job.

    Attributes:
        concurrency: connections, and so requests in flight.
        memory_budget: bytes that may be allocated beside the caller's tensors (contiguous copies of strided tensors,
            staging buffers for device tensors and for columns of a matrix).
        block_size: bytes of an uploaded block and of a downloaded range. None chooses from the amount of data.
        retry_seconds: how long one request is tried again before the transfer fails.
        checksums: send the CRC64 of every block to the service, which checks it; store one of every item, and compare
            it on loading.
    """

    concurrency: int = 16
    memory_budget: int = 512 * _MIB
    block_size: int | None = None
    retry_seconds: float = 120.0
    checksums: bool = True

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {self.concurrency}")
        if self.memory_budget < _MIB:
            raise ValueError(f"memory_budget must be at least 1 MiB ({_MIB}), not {self.memory_budget}")
        if self.block_size is not None and not 1 <= self.block_size <= _MAX_BLOCK:
            raise ValueError(
                f"block_size must be between 1 and {_MAX_BLOCK} (the service's limit), not {self.block_size}"
            )
        if self.retry_seconds < 0:
            raise ValueError(f"retry_seconds must not be negative, not {self.retry_seconds}")

    def part_size(self, total: int) -> int:
        """Return the bytes of one request if about `total` bytes are moved.

        Small enough that all connections have work until the end: with 40 requests for 16 connections, half of the
        connections would idle for a third of the time. Small enough, too, that one for each connection fits into the
        memory budget. Large enough that a request's latency and CPU time do not matter, and that 50,000 blocks hold the
        blob.
        """
        size = self.block_size
        if size is None:
            largest = min(_BLOCK, self._affordable_block())
            rounds = max(-(-total // (largest * self.concurrency)), 2)
            size = min(max(-(-total // (rounds * self.concurrency)), _SMALL_BLOCK), largest)
        # Fewer than 50,000, because the estimate may be too low, and copies leave up to a quarter of a block empty.
        return min(max(size, -(-total // (MAX_BLOCKS * 7 // 10))), _MAX_BLOCK)

    def block_size_at(self, offset: int) -> int:
        """Return the bytes of the block at `offset` of a blob of unknown length.

        It doubles as the blob doubles, from 31 GiB on with the default, so that some 50 TiB fit into the 50,000 blocks
        that a blob may have (https://learn.microsoft.com/azure/storage/blobs/scalability-targets).
        """
        size = self.block_size or min(_SMALL_BLOCK, self._affordable_block())
        return min(size << (offset // (_BLOCKS_PER_SIZE * size)).bit_length(), _MAX_BLOCK)

    def _affordable_block(self) -> int:
        # An upload holds two blocks more than it has connections, one that it passes on and one that it fills.
        return max(self.memory_budget // (self.concurrency + 4), 64 * 1024)
