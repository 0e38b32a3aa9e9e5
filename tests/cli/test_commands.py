"""What the subcommands print, for people and for scripts; and what `rm` and `prune` show, ask and remove."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from azure_torch_ckpt import AzureBlobWriter, BlobIO
from azure_torch_ckpt.cli.app import app
from azure_torch_ckpt.cli.options import duration
from azure_torch_ckpt.dcp.save_group import SaveGroup
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.location import BlobLocation
from tests.cli import docs_pages
from tests.cli.command_process import cli, cli_on_terminal
from tests.support.containers import content, paths_below, put
from tests.support.mixed_checkpoint import save_without_collectives

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KEY = Azurite.account_key
ROOT = Path(__file__).resolve().parents[2]
SAVE_ID = "ab" * 16


def state(step: int) -> dict[str, Any]:
    model = {"layers.0.weight": torch.full((100, 50), float(step)), "layers.1.weight": torch.ones(30, 20).bfloat16()}
    return {"model": model, "step": step}


def save(url: str, step: int) -> None:
    dcp.save(state(step), storage_writer=AzureBlobWriter(url, credential=KEY))


@pytest.fixture(scope="module")
def run(azurite: Azurite) -> str:
    """A container that no test changes: three checkpoints of a run, a save that failed, a checkpoint without a step."""
    container = azurite.create_container(f"cli-{uuid.uuid4().hex}")
    for step in (900, 1100, 1000):
        save(f"{container}/run-7/step-{step}", step)
    save(f"{container}/run-8/last", 1)
    put(container, f"run-7/step-1200/{SAVE_ID}/__0_0.distcp", bytes(5_000))
    return container


def damage(url: str) -> str:
    """Flip a bit of a tensor in the checkpoint's data blob; return the blob's name."""
    [path] = paths_below(url, ".distcp")
    data = bytearray(content(url, path))
    data[data.index(b"\x00\x00\xe1\x44") + 400] ^= 1  # 1800.0, in the middle of them
    put(url, path, bytes(data))
    return path.removeprefix(BlobLocation.parse(url).prefix)


def test_saves_without_collectives_are_told_apart(container: str) -> None:
    for step, groups in ((1, ("a", "a")), (2, ("b", "c")), (3, ("d",))):
        for rank, group in enumerate(groups):
            save_without_collectives(f"{container}/run/step-{step}", rank, group=SaveGroup(group, 2))
    lines = cli("ls", container).out.splitlines()[1:4]
    assert [line.split()[-1] for line in lines] == ["complete", "incomplete", "incomplete"]
    assert cli("latest", container).out == f"{container}/run/step-1\n"
    assert cli("verify", f"{container}/run/step-1").code == 0
    for step, says in ((2, "two different saves"), (3, "is missing")):
        done = cli("show", f"{container}/run/step-{step}")
        assert done.code and says in " ".join(done.err.split())


def test_ls_sorts_steps_as_numbers_and_marks_what_is_incomplete(run: str) -> None:
    done = cli("ls", run)
    assert done.code == 0
    head, *lines = done.out.splitlines()
    assert re.fullmatch(r"CHECKPOINT +STEP +SIZE +BLOBS +WRITTEN \(CES?T\) +STATE", head)
    assert [line.split()[0] for line in lines] == [
        "run-7/step-900",
        "run-7/step-1000",
        "run-7/step-1100",
        "run-7/step-1200",
        "run-8/last",
    ]
    assert re.fullmatch(r"run-7/step-900 +900 +2\d\.\d kB +2 +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  complete", lines[0])
    assert re.fullmatch(r"run-7/step-1200 +1200 +5\.0 kB +1 +.*  incomplete", lines[3])
    assert re.fullmatch(r"run-8/last +- +2\d\.\d kB +2 +.*  complete", lines[4])
    assert re.fullmatch(r"5 checkpoints, [\d.]+ kB; 1 incomplete\n", done.err)


def test_ls_filters(run: str) -> None:
    assert [line.split()[0] for line in cli("ls", run, "--incomplete").out.splitlines()[1:]] == ["run-7/step-1200"]
    assert len(cli("ls", run, "--complete").out.splitlines()) == 5
    nothing = cli("ls", f"{run}/nothing")
    assert (nothing.code, nothing.out, nothing.err) == (0, "", "no checkpoints at or below this URL\n")


def test_ls_as_json_has_what_the_schema_says(run: str) -> None:
    entries = cli("ls", run, "--json").json("ls")["checkpoints"]
    assert [entry["step"] for entry in entries] == [900, 1000, 1100, 1200, None]
    assert [entry["complete"] for entry in entries] == [True, True, True, False, True]
    assert entries[0]["url"] == f"{run}/run-7/step-900" and entries[0]["modified"].endswith("Z")
    assert cli("ls", f"{run}/nothing", "--json").json("ls") == {"version": 1, "checkpoints": []}


def test_a_pipe_gets_whole_lines_and_no_colours(run: str, container: str) -> None:
    name = "a-very-long-name-" * 20
    save(f"{container}/{name}", 1)
    done = cli("ls", container)
    assert name in done.out and "\x1b" not in done.out + done.err
    assert all(line == line.rstrip() for line in done.out.splitlines())


def test_a_terminal_gets_colours_and_lines_of_its_width(run: str) -> None:
    done = cli_on_terminal("ls", run, columns=70)
    assert done.code == 0 and "\x1b[33mincomplete" in done.out
    assert all(len(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line)) <= 80 for line in done.out.splitlines())
    assert "run-7/step-1000" in done.out  # short names are not folded


def test_latest_prints_a_url_and_nothing_else(run: str) -> None:
    done = cli("latest", f"{run}/run-7")
    assert (done.code, done.out, done.err) == (0, f"{run}/run-7/step-1100\n", "")
    assert cli("latest", f"{run}/run-7", "--json").json("latest")["checkpoint"]["step"] == 1100
    none = cli("latest", f"{run}/run-7/step-1200")
    assert (none.code, none.out) == (3, "")
    assert none.err.startswith("azure-torch-ckpt: error: No complete checkpoint") and "hint: " in none.err


def test_show_lists_tensors_objects_and_the_writer(run: str) -> None:
    done = cli("show", f"{run}/run-7/step-900")
    assert done.code == 0
    assert done.out.startswith(f"{run}/run-7/step-900\n")
    assert re.search(r"^  tensors +2 \(float32 20\.0 kB, bfloat16 1\.2 kB\)$", done.out, re.MULTILINE)
    assert re.search(rf"^  saved by +torch {re.escape(torch.__version__)}, azure-torch-ckpt ", done.out, re.MULTILINE)
    assert re.search(r"^model\.layers\.0\.weight  float32 +\[100, 50\]  20\.0 kB +1  0$", done.out, re.MULTILINE)
    assert re.search(r"^step +\d+\.\d kB +0$", done.out, re.MULTILINE)


def test_show_of_some_keys_and_their_shards(run: str) -> None:
    done = cli("show", f"{run}/run-7/step-900", "--match", "*.1.*", "--shards")
    assert re.search(
        r"^model\.layers\.1\.weight  \[0, 0\]  \[30, 20\]  [\d.]+ kB  [0-9a-f]{16}  __0_0\.distcp +\d+$",
        done.out,
        re.MULTILINE,
    )
    assert "layers.0" not in done.out
    assert cli("show", f"{run}/run-7/step-900", "--match", "nothing").err == "no key matches\n"


def test_show_as_json_has_what_the_schema_says(run: str) -> None:
    contents = cli("show", f"{run}/run-7/step-900", "--json").json("show")["contents"]
    assert [(tensor["key"], tensor["shape"]) for tensor in contents["tensors"]] == [
        ("model.layers.0.weight", [100, 50]),
        ("model.layers.1.weight", [30, 20]),
    ]
    assert re.fullmatch("[0-9a-f]{16}", contents["tensors"][0]["shards"][0]["crc64"])
    only = cli("show", f"{run}/run-7/step-900", "--json", "--match", "step").json("show")["contents"]
    assert not only["tensors"] and [entry["key"] for entry in only["objects"]] == ["step"]


def test_a_key_cannot_give_orders_to_the_terminal(container: str) -> None:
    writer = AzureBlobWriter(f"{container}/x", credential=KEY)
    dcp.save({"\x1b[2J[red]gone\x07": torch.ones(2)}, storage_writer=writer)
    done = cli_on_terminal("show", f"{container}/x")
    assert r"\x1b[2J[red]gone\x07" in done.out and "\x1b[2J" not in done.out


def test_verify_says_that_a_checkpoint_is_sound(run: str) -> None:
    done = cli("verify", f"{run}/run-7/step-900")
    assert done.code == 0
    assert re.fullmatch(r"sound: 3 of 3 items in 1 blob compared, [\d.]+ kB in .* \(.*/s\)\n", done.out)
    sizes = cli("verify", f"{run}/run-7/step-900", "--sample", "0%")
    assert sizes.code == 0 and sizes.out.startswith("sound: 0 of 3 items")


def test_verify_finds_a_flipped_bit_and_names_the_tensor(container: str) -> None:
    url = f"{container}/run/step-1"
    save(url, 1800)
    blob = damage(url)
    done = cli("verify", url)
    assert done.code == 1
    assert re.search(rf"^{re.escape(blob)}  [\d.]+ kB +3 +3 +1$", done.out, re.MULTILINE)
    assert "'model.layers.0.weight' at [0, 0]" in done.out and "1 problem: 3 of 3 items" in done.out
    report = cli("verify", url, "--json").json("verify")
    assert report["ok"] is False and len(report["blobs"][0]["problems"]) == 1


def test_cp_to_a_disk_and_back(run: str, container: str, tmp_path: Path) -> None:
    done = cli("cp", f"{run}/run-7/step-900", tmp_path / "copy")
    assert done.code == 0 and re.fullmatch(r"copied [\d.]+ kB in 2 blobs, .* \(.*/s\)\n", done.out)
    loaded = state(0)
    dcp.load(loaded, checkpoint_id=str(tmp_path / "copy"))
    assert torch.equal(loaded["model"]["layers.0.weight"], state(900)["model"]["layers.0.weight"])
    assert cli("cp", f"{run}/run-7/step-900", tmp_path / "copy").out == "nothing to copy: 2 blobs were there already\n"
    back = cli("cp", tmp_path / "copy", f"{container}/back", "--json").json("cp")["report"]
    assert (back["blobs"], back["skipped"]) == (2, 0)
    assert cli("verify", f"{container}/back").code == 0


def test_cp_between_containers_takes_all_checkpoints_below_the_source(run: str, container: str) -> None:
    done = cli("cp", f"{run}/run-7", f"{container}/copy")
    assert done.code == 0 and "step-1200 is not copied: it is an incomplete save" in done.err
    assert names(container) == ["copy/step-900", "copy/step-1000", "copy/step-1100"]


def test_cp_does_not_replace_another_checkpoint_unasked(run: str, container: str) -> None:
    save(f"{container}/there", 5)
    refused = cli("cp", f"{run}/run-7/step-900", f"{container}/there")
    assert refused.code == 6 and "error: " in refused.err
    assert cli("cp", f"{run}/run-7/step-900", f"{container}/there", "--overwrite").code == 0


def test_a_terminal_gets_a_bar_with_bytes(run: str, tmp_path: Path) -> None:
    shown = cli_on_terminal("cp", f"{run}/run-7/step-900", tmp_path / "copy").out
    assert "copying" in shown and re.search(r"2\d\.\d kB of 2\d\.\d kB", shown)
    assert re.search(r"copied 2\d\.\d kB in 2 blobs", shown)


def test_the_pages_are_the_command_s_help() -> None:
    folder = docs_pages.FOLDER
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    assert there == docs_pages.pages(), "run: python -m tests.cli.docs_pages"
    assert {path.stem for path in (folder / "schema").iterdir()} == {name[:-3] for name in there} - {"README"}


def test_help_teaches_with_examples() -> None:
    for name in app.commands:
        done = cli(name, "--help")
        assert done.code == 0 and f"\n    azure-torch-ckpt {name} " in done.out, name


def test_the_shell_completes_commands() -> None:
    env = {"_AZURE_TORCH_CKPT_COMPLETE": "bash_complete", "COMP_WORDS": "azure-torch-ckpt ve", "COMP_CWORD": "1"}
    assert cli(env=env).out == "plain,verify\n"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )


def test_python_runs_the_module(run: str) -> None:
    done = python("-m", "azure_torch_ckpt.cli", "latest", f"{run}/run-7")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run}/run-7/step-1100\n", "")


def test_without_rich_the_command_says_what_to_install() -> None:
    script = "import sys; sys.modules['rich'] = None; from azure_torch_ckpt.cli import main; main()"
    done = python("-c", script, "ls")
    assert done.returncode == 7
    assert done.stderr == ("azure-torch-ckpt: error: the command needs rich: pip install 'azure-torch-ckpt[cli]'\n")


def test_consolidate_writes_what_torch_loads(run: str, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    done = cli("consolidate", f"{run}/run-7/step-900", file)
    assert done.code == 0
    assert re.fullmatch(rf"wrote 2 tensors and 1 object to {re.escape(str(file))}: [\d.]+ kB in .*/s\)\n", done.out)
    loaded = torch.load(file)
    assert torch.equal(loaded["model"]["layers.0.weight"], state(900)["model"]["layers.0.weight"])
    assert loaded["step"] == 900
    assert cli("consolidate", f"{run}/run-7/step-900", file).code == 6


def test_consolidate_of_some_keys_into_a_blob(run: str, container: str) -> None:
    target = f"{container}/model.safetensors"
    report = cli("consolidate", f"{run}/run-7/step-900", target, "--match", "model.*", "--json").json("consolidate")
    assert {name: report["report"][name] for name in ("dst", "format", "tensors", "objects")} == {
        "dst": target,
        "format": "safetensors",
        "tensors": 2,
        "objects": 0,
    }
    with BlobIO(target, "rb", credential=KEY) as file:
        tensors = safetensors.torch.load(file.read())
    assert torch.equal(tensors["model.layers.0.weight"], state(900)["model"]["layers.0.weight"])
    none = cli("consolidate", f"{run}/run-7/step-900", f"{container}/none.pt", "--match", "mode1.*")
    assert none.code == 2 and "No key of the checkpoint matches 'mode1.*'" in none.err
    unknown = cli("consolidate", f"{run}/run-7/step-900", f"{container}/model.txt")
    assert unknown.code == 2 and "see azure-torch-ckpt consolidate --help" in unknown.err


def test_diff_of_a_checkpoint_and_its_copy_finds_nothing(run: str, container: str) -> None:
    save(f"{container}/again", 900)
    done = cli("diff", f"{run}/run-7/step-900", f"{container}/again", "--values")
    assert (done.code, done.out) == (0, "no difference: 3 keys with the same shapes, dtypes and values\n")


def test_diff_tells_keys_shapes_and_values(run: str, container: str) -> None:
    other = state(901)
    other["model"]["layers.1.weight"] = torch.ones(30, 21)
    other["model"]["new"] = torch.ones(2)
    other["model"]["layers.0.weight"][0, 0] = float("nan")
    dcp.save(other, storage_writer=AzureBlobWriter(f"{container}/b", credential=KEY))
    structure = cli("diff", f"{run}/run-7/step-900", f"{container}/b")
    assert structure.code == 1
    assert [line.split() for line in structure.out.splitlines()] == [
        ["KEY", "DIFFERENCE", "A", "B"],
        ["model.new", "only", "in", "B"],
        ["model.layers.1.weight", "shape", "[30,", "20]", "[30,", "21]"],
        ["model.layers.1.weight", "dtype", "bfloat16", "float32"],
    ]
    assert structure.err == "2 keys differ, 2 do not (keys, shapes and dtypes compared)\n"
    values = cli("diff", f"{run}/run-7/step-900", f"{container}/b", "--values")
    assert re.search(r"^model\.layers\.0\.weight  5000 elements, by up to nan$", values.out, re.MULTILINE)
    assert re.search(r"^step +value +900 +901$", values.out, re.MULTILINE)
    found = cli("diff", f"{run}/run-7/step-900", f"{container}/b", "--values", "--json").json("diff")
    assert found["same"] is False and found["diff"]["only_b"] == ["model.new"]
    changes = {change["key"]: change for change in found["diff"]["changed"] if change["what"] == "value"}
    assert changes["model.layers.0.weight"]["max_abs_difference"] == "nan"


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
    assert duration("1d12h") == datetime.timedelta(hours=36)
    assert duration("2w") == datetime.timedelta(days=14)
    assert duration(" 1.5H ") == datetime.timedelta(minutes=90)
    assert duration("90m") == duration("5400s")


def test_the_summary_counts_one_thing_as_one(container: str) -> None:
    save(f"{container}/run/step-1", 1)
    done = cli("rm", "--yes", f"{container}/run/step-1")
    assert done.err == "removed 1 checkpoint\n" and done.out.startswith("CHECKPOINT")
