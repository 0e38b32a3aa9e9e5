"""Which cases a run has."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from tests.benchmarks.spec import GIB, KIB, MIB, PLAIN, SLOW, SLOW_PLAIN, TLS, AsyncCase, Case, Regime, Step

SAVE_AND_LOAD: tuple[Step, ...] = ("save", "load")
# What a slow peer moves of the same work: so much less, and its rates are per byte.
_SHARE = 4


def compare(scale: float) -> list[Case]:
    """All clients at the same work; one after the other in this order, round after round."""
    big, few = _big(scale), _big(scale / _SHARE)
    cases: list[Case] = []
    for regime in (PLAIN, TLS):
        for step in SAVE_AND_LOAD:
            ours = Case("ours", step, "big", big, regime.name)
            cases += [replace(ours, client="climit"), ours, replace(ours, checksums=False)]
            cases += [replace(ours, client="obstore"), replace(ours, client="sdk", tensors=few)]
            cases += [replace(ours, client=peer, tensors=few) for peer in ("azstoragetorch", "adlfs")]
    for step in SAVE_AND_LOAD:
        cases += _slow_big(step, big, few)
        cases += _small(step, scale)
        cases += _llama(step, scale)
        cases += [Case("ours", step, "big", big, regime.name, ranks=2) for regime in (TLS, SLOW)]
    return cases + _parts(scale)


def _slow_big(step: Step, big: str, few: str) -> list[Case]:
    cases = [
        Case(client, step, "big", big, SLOW.name, connections)
        for connections in (16, 32)
        for client in ("climit", "ours")
    ]
    cases.append(Case("obstore", step, "big", big, SLOW.name))
    cases += [Case(client, step, "big", few, SLOW.name) for client in ("sdk", "azstoragetorch", "adlfs")]
    return [*cases, Case("ours", step, "big", big, SLOW_PLAIN.name)]


def _small(step: Step, scale: float) -> list[Case]:
    ours = Case("ours", step, "small", _small_tensors(scale), TLS.name)
    # adlfs needs 30 ms to load a tensor and BlobIO 40 ms, independent of everything else.
    few = _small_tensors(scale if step == "save" else scale / 20)
    return [
        replace(ours, client="null"),
        ours,
        replace(ours, client="adlfs", tensors=few),
        replace(ours, client="azstoragetorch", tensors=_small_tensors(scale / 50)),
        replace(ours, regime=PLAIN.name),
        replace(ours, regime=SLOW.name),
    ]


def _llama(step: Step, scale: float) -> list[Case]:
    # Parameters grow with the square of the width, besides the embedding's.
    width = max(round(512 * scale**0.5 / 8) * 8, 16)
    whole, two_layers = f"llama/{width}/16", f"llama/{width}/2"
    return [
        Case("ours", step, "Llama", whole, TLS.name),
        Case("azstoragetorch", step, "Llama", two_layers, TLS.name),  # with latency: 4 s a tensor, at any size
        Case("adlfs", step, "Llama", two_layers, TLS.name),
        Case("ours", step, "Llama", whole, SLOW.name),
        Case("adlfs", step, "Llama", two_layers, SLOW.name),
    ]


def _parts(scale: float) -> list[Case]:
    big, few = _big(scale), _big(scale / _SHARE)
    cases: list[Case] = []
    steps: tuple[Step, ...] = ("rows", "columns")
    for regime in (TLS, SLOW):
        for step in steps:
            part = Case("ours", step, "big", big, regime.name)
            cases += [part, replace(part, client="adlfs", tensors=few)]
        twentieth = Case("ours", "twentieth", "small", _small_tensors(scale), regime.name)
        cases += [twentieth, replace(twentieth, client="adlfs", tensors=_small_tensors(scale / 5))]
    return cases


def asynchronous(scale: float, regime: Regime) -> list[AsyncCase]:
    """A training loop beside a save; 4 connections, so that the server and the save leave a core to the loop."""
    loops: tuple[Literal["python", "torch"], ...] = ("python", "torch")
    writers: tuple[Literal["ours", "disk"], ...] = ("ours", "disk")
    modes: tuple[Literal["THREAD", "PROCESS"], ...] = ("THREAD", "PROCESS")
    return [
        AsyncCase(writer, mode, loop, _big(scale / 2), regime.name, connections=4)
        for loop in loops
        for writer in writers
        for mode in modes
    ]


def growth(scale: float) -> list[Case]:
    """One quantity after the other: bytes, tensors, connections."""
    cases: list[Case] = []
    for step in SAVE_AND_LOAD:
        for gib in (0.125, 0.25, 0.5, 1, 2, 4, 8):
            count = max(round(gib * scale * GIB / (64 * MIB)), 1)
            cases.append(Case("ours", step, "bytes", f"{count}x{64 * MIB}@shared", TLS.name))
        for count in (10, 100, 1_000, 10_000, 50_000):
            tensors = f"{max(round(count * scale), 4)}x{16 * KIB}"
            cases += [Case(client, step, "tensors", tensors, TLS.name) for client in ("null", "ours")]
        for connections in (1, 2, 4, 8, 16, 32, 64):
            # Each connection moves four blocks at least.
            count = min(max(connections, 4), 16)
            tensors = f"{count}x{max(round(64 * scale), 4) * MIB}"
            cases += [
                Case(client, step, "connections", tensors, SLOW.name, connections) for client in ("climit", "ours")
            ]
    return cases


def _big(scale: float) -> str:
    """8 tensors of 128 MiB; fewer, and then smaller ones, for less."""
    count = min(max(round(8 * scale), 2), 8)
    size = max(round(8 * 128 * scale) // count, 1)
    return f"{count}x{size * MIB}"


def _small_tensors(scale: float) -> str:
    return f"{max(round(5000 * scale), 40)}x{64 * KIB}"
