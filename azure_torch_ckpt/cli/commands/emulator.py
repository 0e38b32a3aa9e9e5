"""``emulator``: run an emulator of Blob Storage on this machine, to experiment and for tests."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from azure_torch_ckpt.cli.options import output_options
from azure_torch_ckpt.cli.output import Output

if TYPE_CHECKING:
    from azure_torch_ckpt.emulator import Azurite

__all__ = ["emulator"]


@click.command(short_help="Run an emulator of Blob Storage on this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=10000, show_default=True, help="0 takes any free port.")
@click.option("--container", "containers", multiple=True, metavar="NAME", help="Create a container. Can be repeated.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Keep the blobs in this folder. Without it, they are in memory and lost at the end.",
)
@click.option("--tls", is_flag=True, help="Serve https:// with a certificate of its own.")
@output_options
def emulator(output: Output, port: int, containers: tuple[str, ...], data: Path | None, tls: bool) -> None:
    """Run Azurite, Microsoft's emulator of Blob Storage, until Ctrl-C.

    The emulator needs Node.js, or pip install 'azure-torch-ckpt[emulator]'. If Azurite is missing, the command installs
    it into your cache folder. The emulator's account and key are public; the other commands know them, so that a URL of
    the emulator needs no credential. Ctrl-C ends the command with exit code 0.

    \b
    Examples:
      azure-torch-ckpt emulator --container checkpoints
      azure-torch-ckpt emulator --port 0 --data ./blobs --json
      azure-torch-ckpt ls http://127.0.0.1:10000/devstoreaccount1/checkpoints
    """
    from azure_torch_ckpt.emulator import Azurite

    if data is not None:
        data.mkdir(parents=True, exist_ok=True)
    azurite = Azurite(data_dir=data, port=port, tls=tls)
    try:
        with azurite:
            # A container in the folder may exist already.
            urls = [azurite.url(name) for name in containers]
            for name in containers:
                azurite.create_container(name)
            if output.as_json:
                output.json(
                    endpoint=azurite.endpoint,
                    account_name=azurite.account_name,
                    account_key=azurite.account_key,
                    connection_string=azurite.connection_string,
                    containers=urls,
                    certificate=azurite.certificate,
                    pid=azurite.pid,
                )
            else:
                _print(output, azurite, urls)
            signal.pause()
    except KeyboardInterrupt:
        output.note("stopped" if data is None else f"stopped; the blobs are in {data}")


def _print(output: Output, azurite: Azurite, urls: list[str]) -> None:
    lines = [("endpoint", azurite.endpoint)]
    lines += [("container", url) for url in urls]
    lines += [("account", azurite.account_name), ("key", azurite.account_key)]
    if azurite.certificate is not None:
        lines.append(("certificate", str(azurite.certificate)))
    for name, value in lines:
        output.print(f"{name:<11}  {value}")
    output.print()
    output.print(f"export AZURE_STORAGE_CONNECTION_STRING='{azurite.connection_string}'")
    output.note("Ctrl-C stops it")
