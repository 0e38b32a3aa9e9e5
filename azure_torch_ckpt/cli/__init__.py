"""The command ``azure-torch-ckpt``: what a person does around checkpoints, from a terminal or a script."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]


def main() -> None:
    """The command's entry point. Ends the process."""
    missing = [name for name in ("click", "rich") if find_spec(name) is None]
    if missing:
        print(
            f"azure-torch-ckpt: error: the command needs {' and '.join(missing)}. Install what belongs to it: "
            "pip install 'azure-torch-ckpt[cli]'",
            file=sys.stderr,
        )
        sys.exit(7)
    from azure_torch_ckpt.cli.app import run

    sys.exit(run(sys.argv[1:]))
