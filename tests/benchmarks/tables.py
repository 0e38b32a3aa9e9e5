"""The results as tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from tests.benchmarks.results import Part, Result
from tests.benchmarks.spec import KIB, MIB
from tests.benchmarks.targets import Target, targets

CLIENTS = {
    "ours": "azure_torch_ckpt",
    "climit": "C client (the limit)",
    "obstore": "obstore, no DCP",
    "sdk": "azure-storage-blob, no DCP",
    "azstoragetorch": "DCP over azstoragetorch's BlobIO",
    "adlfs": "DCP over fsspec and adlfs",
    "null": "DCP alone, nothing stored",
}
STEPS = {
    "save": "save",
    "load": "load",
    "rows": "load 1/8 of the rows",
    "columns": "load 1/8 of the columns",
    "twentieth": "load 5% of the tensors",
}
_WORKS = {"big": "Few big tensors", "small": "Many small tensors", "Llama": "A Llama with AdamW"}


def header(part: Part) -> str:
    rounds = "One round" if part.rounds == 1 else f"Medians of {part.rounds} rounds"
    return f"Measured on {part.date}: {part.machine}. {part.software}. {rounds}.\n"


def target_table(part: Part) -> str:
    rows = [[target.what, _measured(target), _bound(target), _verdict(target)] for target in targets(part)]
    return header(part) + "\n" + markdown_table(["work: figure", "measured", "target", "met"], rows)


def compare_tables(part: Part) -> str:
    """One table for each state dict and step."""
    order = list(_WORKS)
    results = [result for result in part.results if result.case["work"] in order]
    results.sort(key=lambda result: (order.index(result.case["work"]), list(STEPS).index(result.case["step"])))
    text = header(part)
    for (work, step), group in groupby(results, key=lambda result: (result.case["work"], result.case["step"])):
        text += f"\n**{_WORKS[work]}: {STEPS[step]}**\n\n"
        columns = ["connection", "client", "tensors", "MB/s (lowest to highest)", "CPU s/GiB", "memory MiB"]
        columns += ["requests", "moved / wanted", "connections"]
        in_order = sorted(group, key=lambda result: str(result.case["regime"]) != "plain")
        text += markdown_table(columns, [_compare_row(result) for result in in_order])
    return text


def async_table(part: Part) -> str:
    columns = [
        "loop",
        "writer",
        "mode",
        "call blocks s",
        "saved after s",
        "loop lost s",
        "of its speed beside the save",
    ]
    rows = [
        [
            {"python": "pure Python", "torch": "torch, CPU"}[result.case["loop"]],
            {"ours": "AzureBlobWriter", "disk": "FileSystemWriter, local disk"}[result.case["writer"]],
            result.case["mode"],
            f"{result.values['blocked']:.2f}",
            f"{result.values['save']:.2f}",
            f"{result.values['lost']:.2f} ({result.lowest:.2f} to {result.highest:.2f})",
            f"{max(result.values['share'], 0):.0%}",
        ]
        for result in part.results
    ]
    return header(part) + "\n" + markdown_table(columns, rows)


def growth_table(part: Part) -> str:
    columns = ["what grows", "step", "client", "tensors", "connections", "s", "MB/s", "CPU s/GiB", "memory MiB"]
    rows = [
        [
            result.case["work"],
            result.case["step"],
            CLIENTS[result.case["client"]],
            _tensors(result.case["tensors"]),
            str(result.case["connections"]),
            f"{result.values['seconds']:.3f}",
            _rate(result.values["MBps"]),
            f"{result.values['cpu_per_GiB']:.2f}",
            _memory(result),
        ]
        for result in part.results
    ]
    return header(part) + "\n" + markdown_table(columns, rows)


def _compare_row(result: Result) -> list[str]:
    case, values = result.case, result.values
    client = CLIENTS[case["client"]]
    if not case["checksums"]:
        client += ", checksums off"
    if case["ranks"] > 1:
        client += f", {case['ranks']} ranks"
    regime = case["regime"] if case["connections"] == 16 else f"{case['regime']}, {case['connections']} connections"
    rates = f"{_rate(result.values['MBps'])} ({_rate(result.lowest)} to {_rate(result.highest)})"
    stores = case["client"] != "null"
    moved = f"{values['moved'] / values['payload']:.3f}" if stores and "moved" in values else ""
    return [
        regime,
        client,
        _tensors(case["tensors"]),
        rates if stores else f"{values['seconds']:.2f} s",
        f"{values['cpu_per_GiB']:.2f}" if stores else f"{values['cpu']:.2f} s",
        _memory(result),
        f"{values['requests']:.0f}" if stores and "requests" in values else "",
        moved,
        f"{values['connections']:.0f}" if stores and "connections" in values else "",
    ]


def _tensors(text: str) -> str:
    """``8x134217728`` as ``8 x 128 MiB``."""
    if text.startswith("llama"):
        _, width, layers = text.split("/")
        return f"width {width}, {layers} layers"
    count, size = map(int, text.partition("@")[0].split("x"))
    amount = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
    return f"{count:,} x {amount}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _memory(result: Result) -> str:
    return f"{result.values['rss'] / MIB:.0f}" if "rss" in result.values else ""


def _measured(target: Target) -> str:
    return "not measured" if target.measured is None else f"{target.measured:.3g} {target.unit}"


def _bound(target: Target) -> str:
    return f"{'<=' if target.at_most else '>='} {target.bound:g} {target.unit}"


def _verdict(target: Target) -> str:
    return {True: "yes", False: "**no**", None: ""}[target.is_met]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
