"""The environment of azstoragetorch, which wants an older azure-storage-blob than everything else here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# constraints.txt can name one version of a package only. 12.27.0 is the newest that azstoragetorch 0.2.0 takes.
_PACKAGES = ["azstoragetorch==0.2.0", "azure-storage-blob==12.27.0"]


def packages() -> Path:
    """A folder with these two packages, made at the first call; the rest comes from this environment, torch too.

    Raises:
        subprocess.CalledProcessError: pip could not install them.
    """
    folder = Path(sys.prefix, "benchmark-peer")
    if not (folder / "azstoragetorch").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), *_PACKAGES], check=True)
    return folder
