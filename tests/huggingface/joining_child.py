"""A process that joins the columns of two ranks and prints how much its memory grew, and the bytes it staged, as JSON.

Run as ``python -m tests.huggingface.joining_child URL KEY BUDGET ROWS``.
"""

from __future__ import annotations

import json
import sys

from azure_torch_ckpt import BlobLocation, TransferOptions
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.huggingface.joining import JoinResult, join, joined_block_size
from tests.dcp.memory_growth import measured, settle
from tests.huggingface.plans import columns, laid_out

COLUMNS = 4_096


def main(url: str, key: str, budget: int, rows: int) -> None:
    settle()
    options = TransferOptions(memory_budget=budget, concurrency=4)
    location = BlobLocation.parse(url)
    store = BlobStore(location, Access(key, options=options))

    def joined(rows: int) -> JoinResult:
        tensors = laid_out(columns(of=COLUMNS, rows=rows, ranks=2)).joined
        sums = {(chunk.file, chunk.offset): None for chunk in tensors[0].chunks}
        size = joined_block_size(options, tensors[0].length)
        return join(store, location, tensors, sums, "0" * 16, size, lambda _: None)

    joined(8)  # what the first one leaves behind once: imports, threads, connections
    grown, result = measured(lambda: joined(rows))
    print(json.dumps([grown, sum(block.length for block in result.blocks)]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
