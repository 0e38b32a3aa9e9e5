"""A call of the catalog in a process of its own, which a test may kill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def start(call: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
    """Start a process that runs `call` once it has read a line from stdin.

    Args:
        call: Python with ``copy``, ``prune`` and ``TransferOptions``, which finds `arguments` in ``args``.
    """
    code = (
        "import sys; from azure_torch_ckpt import TransferOptions; from azure_torch_ckpt.catalog import copy, prune\n"
        f"args = sys.argv[1:]; sys.stdin.readline(); {call}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[2],
    )
