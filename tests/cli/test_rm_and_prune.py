"""`rm` and `prune` show what they would remove, ask, and remove that and nothing else."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import AzureBlobWriter
from azure_torch_ckpt.emulator import Azurite
from tests.cli.command_process import Done, cli, cli_on_terminal
from tests.support.containers import put

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KEY = Azurite.account_key
SAVE_ID = "ab" * 16


def save(url: str, step: int) -> None:
    state: dict[str, Any] = {"weight": torch.full((100, 50), float(step)), "step": step}
    dcp.save(state, storage_writer=AzureBlobWriter(url, credential=KEY))


def names(container: str) -> list[str]:
    return [entry["name"] for entry in cli("ls", container, "--json").json("ls")["checkpoints"]]


@pytest.fixture
def steps(container: str) -> str:
    """Four checkpoints of a run and the leftovers of a failed save."""
    for step in (100, 200, 300, 1000):
        save(f"{container}/run/step-{step}", step)
    put(container, f"run/step-1100/{SAVE_ID}/__0_0.distcp", bytes(5_000))
    return container


def test_rm_asks_on_a_terminal_and_no_is_no(steps: str) -> None:
    done = cli_on_terminal("rm", f"{steps}/run/step-100", question="[y/N]", answer="n")
    assert done.code == 130
    assert "Remove? This cannot be undone. [y/N]" in done.out and "nothing was done" in done.out
    assert "run/step-100" in names(steps)


def test_rm_removes_after_a_yes(steps: str) -> None:
    done = cli_on_terminal("rm", f"{steps}/run/step-100", question="[y/N]", answer="y")
    assert done.code == 0 and "removed 1 checkpoint" in done.out
    assert names(steps) == ["run/step-200", "run/step-300", "run/step-1000", "run/step-1100"]


def test_rm_without_a_terminal_wants_yes_on_the_command_line(steps: str) -> None:
    refused = cli("rm", f"{steps}/run/step-100", stdin="y\n")
    assert refused.code == 2 and "Add --yes" in refused.err
    assert "run/step-100" in names(steps)
    removed = cli("rm", "--yes", "--json", f"{steps}/run/step-100", f"{steps}/run/step-200").json("rm")
    assert removed["removed"] == [f"{steps}/run/step-100", f"{steps}/run/step-200"]
    assert names(steps) == ["run/step-300", "run/step-1000", "run/step-1100"]


def test_rm_removes_nothing_if_one_of_its_urls_is_wrong(steps: str) -> None:
    done = cli("rm", "--yes", f"{steps}/run/step-100", f"{steps}/run/step-101")
    assert done.code == 3 and done.out == ""
    assert "run/step-100" in names(steps)


def test_prune_only_shows_what_it_would_do(steps: str) -> None:
    done = cli("prune", steps, "--keep-last", "2", "--grace", "0s")
    assert done.code == 0
    lines = [line.split()[0] for line in done.out.splitlines() if line.startswith("run/")]
    assert lines == ["run/step-100", "run/step-200", "run/step-1100"]
    assert done.err.endswith("nothing was removed; --delete would remove this and keep 2 checkpoints\n")
    assert len(names(steps)) == 5


def test_prune_as_json_has_what_goes_and_what_stays(steps: str) -> None:
    report = cli("prune", steps, "--keep-every", "100", "--grace", "0s", "--json").json("prune")
    assert report["dry_run"] is True and report["removed"] == []
    assert [leftovers["url"] for leftovers in report["remains"]] == [f"{steps}/run/step-1100"]
    assert report["freed"] == 5_000 and len(report["kept"]) == 4
    done = cli("prune", steps, "--keep-last", "1", "--yes", "--json").json("prune")
    assert done["dry_run"] is False and [entry["step"] for entry in done["removed"]] == [100, 200, 300]
    assert done["freed"] == sum(entry["size"] for entry in done["removed"])
    assert names(steps) == ["run/step-1000", "run/step-1100"]  # a save that may still run stays for a day


def test_prune_asks_before_it_deletes(steps: str) -> None:
    refused = cli("prune", steps, "--keep-last", "1", "--delete", stdin="y\n")
    assert refused.code == 2 and "Add --yes" in refused.err
    no = cli_on_terminal("prune", steps, "--keep-last", "1", "--delete", question="[y/N]", answer="n")
    assert no.code == 130
    assert len(names(steps)) == 5
    yes = cli_on_terminal("prune", steps, "--keep-last", "1", "--delete", "--grace", "0s", question="[y/N]", answer="y")
    assert yes.code == 0 and "removed 3 checkpoints and the leftovers of 1 failed save" in yes.out
    assert names(steps) == ["run/step-1000"]


def test_prune_by_age_keeps_what_is_young(steps: str) -> None:
    done = cli("prune", steps, "--older-than", "30d", "--grace", "1d", "--yes")
    assert (done.code, done.out) == (0, "") and done.err == "nothing to remove; 5 checkpoints stay\n"
    assert len(names(steps)) == 5


@pytest.mark.parametrize("wrong", ["30", "d", "-1d", "1d 2h", "1x", "99999w", ""])
def test_a_duration_needs_a_number_and_a_unit(container: str, wrong: str) -> None:
    done = cli("prune", container, f"--older-than={wrong}")
    assert done.code == 2 and "--older-than" in done.err and ("30d" in done.err or "hundred years" in done.err)


def test_durations_are_added_up() -> None:
    from azure_torch_ckpt.cli.options import duration

    assert duration("1d12h") == datetime.timedelta(hours=36)
    assert duration("2w") == datetime.timedelta(days=14)
    assert duration(" 1.5H ") == datetime.timedelta(minutes=90)
    assert duration("90m") == duration("5400s")


def test_the_summary_counts_one_thing_as_one(container: str) -> None:
    save(f"{container}/run/step-1", 1)
    done: Done = cli("rm", "--yes", f"{container}/run/step-1")
    assert done.err == "removed 1 checkpoint\n" and done.out.startswith("CHECKPOINT")
