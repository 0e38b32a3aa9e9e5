"""``ls``, ``latest`` and ``show``: what is there, and what is in it."""

from __future__ import annotations

import fnmatch
from collections import Counter
from typing import TYPE_CHECKING

import click
from rich.text import Text

from azure_torch_ckpt._internal.units import format_bytes
from azure_torch_ckpt.cli.options import Session, session_options
from azure_torch_ckpt.cli.output import Output, age, local_time, printable, ranges, zone
from azure_torch_ckpt.cli.tables import Table

if TYPE_CHECKING:
    from azure_torch_ckpt.catalog import CheckpointContents, CheckpointEntry

__all__ = ["latest", "ls", "plural", "print_entries", "show"]


@click.command(short_help="List checkpoints.")
@click.argument("url")
@click.option("--complete", "only", flag_value="complete", help="Only those that can be loaded.")
@click.option("--incomplete", "only", flag_value="incomplete", help="Only those of saves that run or have failed.")
@session_options
def ls(session: Session, url: str, only: str | None) -> None:
    """List the checkpoints at and below URL.

    One listing of the container's blobs is all that is read. A checkpoint is complete when its metadata is there;
    verify tells whether its data is. Steps are sorted as numbers. Times are in the local time zone.

    \b
    Examples:
      azure-torch-ckpt ls azblob://myaccount/checkpoints
      azure-torch-ckpt ls azblob://myaccount/checkpoints/run-7 --incomplete
      azure-torch-ckpt ls azblob://myaccount/checkpoints --json | jq -r '.checkpoints[] | select(.step > 1000) | .url'
    """
    from azure_torch_ckpt.catalog import list_checkpoints

    output = session.output
    with output.waiting("listing"):
        entries = list_checkpoints(url, **session.access)
    if only is not None:
        entries = [entry for entry in entries if entry.complete == (only == "complete")]
    if output.as_json:
        output.json(checkpoints=entries)
    elif entries:
        print_entries(output, entries)
    else:
        output.note(f"no {only + ' ' if only else ''}checkpoints at or below this URL")


@click.command(short_help="Print the URL of the newest complete checkpoint.")
@click.argument("url")
@session_options
def latest(session: Session, url: str) -> None:
    """Print the URL of the newest complete checkpoint at or below URL.

    If all of them have a step in their name, it is the one with the highest step, compared as a number; else the one
    that was completed last. Without any, the exit code is 3.

    \b
    Examples:
      azure-torch-ckpt latest azblob://myaccount/checkpoints/run-7
      torchrun train.py --resume-from "$(azure-torch-ckpt latest azblob://myaccount/checkpoints/run-7)"
    """
    from azure_torch_ckpt.catalog import latest as find

    output = session.output
    with output.waiting("listing"):
        entry = find(url, **session.access)
    if output.as_json:
        output.json(checkpoint=entry)
    else:
        output.print(Text(printable(entry.url)))


@click.command(short_help="Show what a checkpoint holds.")
@click.argument("url")
@click.option("--match", metavar="PATTERN", help="Only keys that match, such as 'model.layers.*.weight'.")
@click.option(
    "--shards", is_flag=True, help="A line for each stored shard: where it is in the tensor and in which blob."
)
@session_options
def show(session: Session, url: str, match: str | None, shards: bool) -> None:
    """Show what the checkpoint at URL holds: tensors, objects, and who saved it.

    Only the metadata is read, which costs one request. Sizes of tensors are those of their elements.

    \b
    Examples:
      azure-torch-ckpt show azblob://myaccount/checkpoints/run-7/step-1000
      azure-torch-ckpt show azblob://myaccount/checkpoints/run-7/step-1000 --match '*.attn.*' --shards
      azure-torch-ckpt show URL --json | jq '[.contents.tensors[].size] | add'
    """
    from azure_torch_ckpt.catalog import inspect

    output = session.output
    with output.waiting("reading the metadata"):
        contents = inspect(url, **session.access)
    tensors = [entry for entry in contents.tensors if match is None or fnmatch.fnmatchcase(entry.key, match)]
    objects = [entry for entry in contents.objects if match is None or fnmatch.fnmatchcase(entry.key, match)]
    if output.as_json:
        contents.tensors[:], contents.objects[:] = tensors, objects
        output.json(contents=contents)
        return
    _print_head(output, contents)
    if tensors:
        output.print()
        listed = Table("TENSOR", "DTYPE", "SHAPE", "SIZE", "SHARDS", "RANKS", right=("SIZE", "SHARDS"))
        if shards:
            listed = Table("TENSOR", "AT", "SHAPE", "SIZE", "CRC64", "BLOB", "OFFSET", right=("SIZE", "OFFSET"))
        for tensor in tensors:
            if not shards:
                ranks = ranges({shard.rank for shard in tensor.shards if shard.rank is not None})
                listed.add_row(
                    Text(printable(tensor.key)),
                    tensor.dtype,
                    _dims(tensor.shape),
                    format_bytes(tensor.size),
                    str(len(tensor.shards)),
                    ranks or "?",
                )
                continue
            for shard in tensor.shards:
                listed.add_row(
                    Text(printable(tensor.key)),
                    _dims(shard.offsets),
                    _dims(shard.sizes),
                    format_bytes(shard.length),
                    "-" if shard.crc64 is None else f"{shard.crc64:016x}",
                    Text(printable(shard.blob.removeprefix(f"{contents.save_id}/"))),
                    f"{shard.offset}",
                )
        output.print(listed)
    if objects:
        output.print()
        listed = Table("OBJECT", "PICKLE", "RANK", right=("PICKLE", "RANK"))
        for entry in objects:
            rank = "?" if entry.rank is None else str(entry.rank)
            listed.add_row(Text(printable(entry.key)), format_bytes(entry.length), rank)
        output.print(listed)
    if match is not None and not tensors and not objects:
        output.note("no key matches")


def print_entries(output: Output, entries: list[CheckpointEntry]) -> None:
    """A table of checkpoints and a line that sums it up."""
    stepped = any(entry.step is not None for entry in entries)
    columns = ["CHECKPOINT", "STEP", "SIZE", "BLOBS", f"WRITTEN ({zone()})", "STATE"]
    listed = Table(*(column for column in columns if stepped or column != "STEP"), right=("STEP", "SIZE", "BLOBS"))
    for entry in entries:
        cells: list[str | Text] = [Text(printable(entry.name) or ".")]
        if stepped:
            cells.append("-" if entry.step is None else str(entry.step))
        state = Text("complete") if entry.complete else Text("incomplete", style="yellow")
        listed.add_row(*cells, format_bytes(entry.size), str(entry.blobs), local_time(entry.modified), state)
    output.print(listed)
    size = format_bytes(sum(entry.size for entry in entries))
    incomplete = sum(not entry.complete for entry in entries)
    note = f"{plural(len(entries), 'checkpoint')}, {size}" + (f"; {incomplete} incomplete" if incomplete else "")
    output.note(note)


def plural(count: int, noun: str) -> str:
    """``"1 blob"``, ``"2 blobs"``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _print_head(output: Output, contents: CheckpointContents) -> None:
    blobs = {shard.blob for tensor in contents.tensors for shard in tensor.shards}
    blobs |= {entry.blob for entry in contents.objects}
    writers = []
    if contents.torch_version is not None:
        writers.append(f"torch {contents.torch_version}")
    if contents.writer_version is not None:
        writers.append(f"azure-torch-ckpt {contents.writer_version}")
    dtypes = Counter({tensor.dtype: 0 for tensor in contents.tensors})
    for tensor in contents.tensors:
        dtypes[tensor.dtype] += tensor.size
    of_dtypes = ", ".join(f"{dtype} {format_bytes(size)}" for dtype, size in dtypes.most_common())
    lines = [
        ("completed", f"{local_time(contents.modified)} {zone()}, {age(contents.modified)}"),
        ("size", f"{format_bytes(contents.size)} in {plural(len(blobs), 'blob')}"),
        ("tensors", f"{len(contents.tensors)}{f' ({of_dtypes})' if of_dtypes else ''}"),
        ("objects", f"{len(contents.objects)}"),
        ("saved by", ", ".join(writers) or "unknown"),
        ("save id", contents.save_id or "none"),
    ]
    output.print(Text(printable(contents.url), style="bold"))
    for name, value in lines:
        output.print(Text(f"  {name:<9}  {printable(value)}"))


def _dims(numbers: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, numbers))}]"
