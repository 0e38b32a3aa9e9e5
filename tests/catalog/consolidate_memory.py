"""A process that consolidates a checkpoint and prints how much its memory grew, and the file's size, as JSON.

Run as ``python -m tests.catalog.consolidate_memory URL TARGET KEY BUDGET``.
"""

from __future__ import annotations

import json
import sys

from azure_torch_ckpt import AzureBlobWriter, TransferOptions
from azure_torch_ckpt.catalog import consolidate
from tests.dcp.memory_growth import full, measured, settle


def main(url: str, target: str, key: str, budget: int) -> None:
    settle()
    import torch.distributed.checkpoint as dcp

    options = TransferOptions(memory_budget=budget, concurrency=4)
    place = url.rpartition("/")[0]
    # What the first one leaves behind once: imports, threads, connections.
    dcp.save({"x": full(256, 256)}, storage_writer=AzureBlobWriter(f"{place}/small", credential=key))
    consolidate(f"{place}/small", f"{place}/small.pt", credential=key, options=options, overwrite=True)
    grown, report = measured(lambda: consolidate(url, target, credential=key, options=options, overwrite=True))
    print(json.dumps([grown, report.bytes]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
