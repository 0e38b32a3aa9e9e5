"""A destination for which the credential allows writing alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from azure.core.credentials import AzureSasCredential

from azure_torch_ckpt import AccessDeniedError, CheckpointExistsError
from azure_torch_ckpt.catalog import consolidate, copy
from azure_torch_ckpt.emulator import Azurite
from tests.cli.command_process import cli
from tests.support.containers import container_sas, content
from tests.support.mixed_checkpoint import KEY, assert_right, load, save
from tests.support.put_block_from_url import FromUrlServer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_consolidate(container: str, other: str, suffix: str) -> None:
    save(f"{container}/a", 1)
    credential = AzureSasCredential(container_sas(other, "w"))
    to = f"{other}/m.{suffix}"
    report = consolidate(f"{container}/a", to, credential=KEY, dst_credential=credential)
    assert report.bytes == len(content(other, f"m.{suffix}"))
    before = content(other, f"m.{suffix}")
    with pytest.raises(CheckpointExistsError):
        consolidate(f"{container}/a", to, credential=KEY, dst_credential=credential)
    assert content(other, f"m.{suffix}") == before
    consolidate(f"{container}/a", to, credential=KEY, dst_credential=credential, overwrite=True)


def test_the_command(container: str, other: str, tmp_path: Path) -> None:
    save(f"{container}/a", 1)
    sas = container_sas(other, "w")
    done = cli("consolidate", f"{container}/a", f"{other}/m.pt", "--target-sas", sas)
    assert (done.code, done.err) == (0, "")
    (tmp_path / "m.pt").write_bytes(content(other, "m.pt"))
    assert torch.load(tmp_path / "m.pt", weights_only=True)["small"].shape == (10, 7)
    assert cli("cp", f"{container}/a", f"{other}/a", "--target-sas", sas).code == 0
    done = cli("cp", f"{container}/a", f"{other}/a", "--target-sas", sas, "--overwrite")
    assert done.code == 4 and "Without --overwrite" in done.err


@pytest.mark.parametrize("source", ["container", "disk"])
def test_copy(container: str, other: str, tmp_path: Path, source: str) -> None:
    save(f"{container}/run/a", 1)
    save(f"{container}/run/b", 2)
    place: str | Path = f"{container}/run"
    if source == "disk":
        copy(place, tmp_path, credential=KEY)
        place = tmp_path
    credential = AzureSasCredential(container_sas(other, "w"))
    copy(place, f"{other}/run", credential=KEY, dst_credential=credential)
    assert_right(load(f"{other}/run/a"), 1)
    assert_right(load(f"{other}/run/b"), 2)
    save(f"{container}/new", 3)
    with pytest.raises(CheckpointExistsError):
        copy(f"{container}/new", f"{other}/run/a", credential=KEY, dst_credential=credential)
    assert_right(load(f"{other}/run/a"), 1)


def test_what_the_service_copies_is_still_compared(azurite: Azurite, container: str, other: str) -> None:
    save(f"{container}/a", 1)
    credential = AzureSasCredential(container_sas(other, "w"))
    with FromUrlServer(azurite) as server:
        source, target = (f"{server.endpoint}/{url.rpartition('/')[2]}" for url in (container, other))
        copy(f"{source}/a", f"{target}/a", credential=KEY, dst_credential=credential)
        assert [path for path in server.read if path.endswith(".distcp")]  # the service returned no checksum
        server.read.clear()
        copy(f"{source}/a", f"{target}/b", credential=KEY, dst_credential=credential, verify=False)
        assert not [path for path in server.read if path.endswith(".distcp")]
        credential = AzureSasCredential(container_sas(other, "wl"))
        with pytest.raises(AccessDeniedError, match="pass verify=False"):
            copy(f"{source}/a", f"{target}/c", credential=KEY, dst_credential=credential)
    assert_right(load(f"{other}/a"), 1)
    assert_right(load(f"{other}/b"), 1)
