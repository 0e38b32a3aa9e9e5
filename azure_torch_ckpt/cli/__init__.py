"""What does the command ``azure-torch-ckpt`` print and do?

`commands/` has one file for each subcommand; `app` runs them and turns errors into messages and exit codes. Others may
use `main` alone.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]


def main() -> None:
    """Run the command with the arguments of this process, then exit."""
    missing = [name for name in ("click", "rich") if find_spec(name) is None]
    if missing:
        print(
            f"azure-torch-ckpt: error: the command needs {' and '.join(missing)}: pip install 'azure-torch-ckpt[cli]'",
            file=sys.stderr,
        )
        sys.exit(7)
    from azure_torch_ckpt.cli.app import run

    sys.exit(run(sys.argv[1:]))
