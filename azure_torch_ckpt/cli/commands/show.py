"""``show``: print the tensors and objects of a checkpoint."""

from __future__ import annotations

import fnmatch
from collections import Counter
from typing import TYPE_CHECKING

import click

from azure_torch_ckpt._internal.units import format_bytes
from azure_torch_ckpt.cli.options import Session, session_options
from azure_torch_ckpt.cli.output import Output, Table, age, local_time, plural, ranges, zone

if TYPE_CHECKING:
    from azure_torch_ckpt.catalog import CheckpointContents

__all__ = ["show"]


@click.command(short_help="Show what a checkpoint holds.")
@click.argument("url")
@click.option("--match", metavar="PATTERN", help="Only keys that match, such as 'model.layers.*.weight'.")
@click.option(
    "--shards", is_flag=True, help="Print a line for each stored shard: its place in the tensor, and its blob."
)
@session_options
def show(session: Session, url: str, match: str | None, shards: bool) -> None:
    """Show what the checkpoint at URL holds: tensors, objects, and who saved it.

    The command reads only the metadata, with one request. The size of a tensor is that of its elements.

    \b
    Examples:
      azure-torch-ckpt show azblob://myaccount/checkpoints/run-7/step-1000
      azure-torch-ckpt show azblob://myaccount/checkpoints/run-7/step-1000 --match '*.attn.*' --shards
      azure-torch-ckpt show URL --json | jq '[.contents.tensors[].size] | add'
    """
    from azure_torch_ckpt.catalog import inspect

    output = session.output
    with output.spinner("reading the metadata"):
        contents = inspect(url, **session.access)
    tensors = [entry for entry in contents.tensors if match is None or fnmatch.fnmatchcase(entry.key, match)]
    objects = [entry for entry in contents.objects if match is None or fnmatch.fnmatchcase(entry.key, match)]
    if output.as_json:
        contents.tensors[:], contents.objects[:] = tensors, objects
        output.json(contents=contents)
        return
    _print_summary(output, contents)
    if tensors:
        output.print()
        table = Table("TENSOR", "DTYPE", "SHAPE", "SIZE", "SHARDS", "RANKS", right=("SIZE", "SHARDS"))
        if shards:
            table = Table("TENSOR", "AT", "SHAPE", "SIZE", "CRC64", "BLOB", "OFFSET", right=("SIZE", "OFFSET"))
        for tensor in tensors:
            if not shards:
                ranks = ranges({shard.rank for shard in tensor.shards if shard.rank is not None})
                table.add_row(
                    tensor.key,
                    tensor.dtype,
                    _dims(tensor.shape),
                    format_bytes(tensor.size),
                    str(len(tensor.shards)),
                    ranks or "?",
                )
                continue
            for shard in tensor.shards:
                table.add_row(
                    tensor.key,
                    _dims(shard.offsets),
                    _dims(shard.sizes),
                    format_bytes(shard.length),
                    "-" if shard.crc64 is None else f"{shard.crc64:016x}",
                    shard.blob.removeprefix(f"{contents.save_id}/"),
                    f"{shard.offset}",
                )
        output.print(table)
    if objects:
        output.print()
        table = Table("OBJECT", "PICKLE", "RANK", right=("PICKLE", "RANK"))
        for entry in objects:
            rank = "?" if entry.rank is None else str(entry.rank)
            table.add_row(entry.key, format_bytes(entry.length), rank)
        output.print(table)
    if match is not None and not tensors and not objects:
        output.note("no key matches")


def _print_summary(output: Output, contents: CheckpointContents) -> None:
    blobs = {shard.blob for tensor in contents.tensors for shard in tensor.shards}
    blobs |= {entry.blob for entry in contents.objects}
    writers = []
    if contents.torch_version is not None:
        writers.append(f"torch {contents.torch_version}")
    if contents.writer_version is not None:
        writers.append(f"azure-torch-ckpt {contents.writer_version}")
    sizes = Counter({tensor.dtype: 0 for tensor in contents.tensors})
    for tensor in contents.tensors:
        sizes[tensor.dtype] += tensor.size
    dtype_sizes = ", ".join(f"{dtype} {format_bytes(size)}" for dtype, size in sizes.most_common())
    lines = [
        ("completed", f"{local_time(contents.modified)} {zone()}, {age(contents.modified)}"),
        ("size", f"{format_bytes(contents.size)} in {plural(len(blobs), 'blob')}"),
        ("tensors", f"{len(contents.tensors)}{f' ({dtype_sizes})' if dtype_sizes else ''}"),
        ("objects", f"{len(contents.objects)}"),
        ("saved by", ", ".join(writers) or "unknown"),
        ("save id", contents.save_id or "none"),
    ]
    output.print(contents.url, style="bold")
    for name, value in lines:
        output.print(f"  {name:<9}  {value}")


def _dims(numbers: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, numbers))}]"
