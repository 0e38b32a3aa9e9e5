"""What goes wrong while saving and loading is one clear error, in time, and leaves what was there as it was."""

from __future__ import annotations

import base64
import contextlib
import pickle
import socket
import struct
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from azure_torch_ckpt import (
    AccessDeniedError,
    AzureBlobReader,
    AzureBlobWriter,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ContainerNotFoundError,
    CorruptCheckpointError,
    LocationError,
    ServiceUnavailableError,
    StoreError,
)
from azure_torch_ckpt.transport import connections
from tests.support import sharded
from tests.support.containers import container_sas, content, paths_below, put, snapshot, store_of
from tests.support.failing_attempts import IMPATIENT, load, raised, raised_everywhere, raised_on_ranks, save, unchanged
from tests.support.faults import Answer, Hold
from tests.support.proxy import FaultProxy
from tests.support.waits import without_waiting

if TYPE_CHECKING:
    from tests.support.ranks import Ranks
from tests.support.mixed_checkpoint import save_without_collectives

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

WRONG_KEY = base64.b64encode(b"not the key" * 6).decode()


@pytest.fixture
def url(container: str) -> str:
    return f"{container}/run/step-1"


# No checkpoint


def nothing(url: str) -> None:
    pass


def save_two_below(url: str) -> None:
    for name in ("a", "b"):
        save(f"{url}/{name}", 1)


def leave_data_alone(url: str) -> None:
    save(url, 1)
    assert store_of(url).delete(paths_below(url, ".metadata")[0])


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (nothing, r"/run/step-1: \.metadata .*check the URL"),
        (leave_data_alone, "Data blobs .*older checkpoint"),
        (save_two_below, "below it: a, b"),
    ],
    ids=["nothing", "data without metadata", "folder of checkpoints"],
)
def test_no_checkpoint(ranks: Ranks, url: str, prepare: Callable[[str], object], says: str) -> None:
    prepare(url)
    raised_everywhere(ranks, CheckpointNotFoundError, load, url, says)


def test_no_checkpoint_in_the_root_of_a_container(container: str) -> None:
    save(f"{container}/run/step-1", 1)
    with unchanged(container):
        raised(CheckpointNotFoundError, lambda: load(container), "below it: run/step-1")


def test_metadata_of_single_ranks_is_told_and_not_taken_for_a_failed_save(container: str) -> None:
    for rank in (0, 1):
        save_without_collectives(f"{container}/run", rank)
    with pytest.raises(CheckpointNotFoundError, match=r"ranks 0, 1 .*use_collectives=False"):
        sharded.reader(f"{container}/run").read_metadata()


def test_what_lies_there_is_shown_as_a_folder_would_show_it(container: str) -> None:
    for path in ("run/notes.txt", "run/a/1", "run/a/2", *(f"run/z{number}/x" for number in range(5))):
        put(container, path)
    says = r": a/, notes\.txt, z0/, z1/, z2/, \.\.\.$"
    with pytest.raises(CheckpointNotFoundError, match=says):
        sharded.reader(f"{container}/run").read_metadata()


def test_read_metadata_itself_raises(url: str) -> None:
    reader = sharded.reader(url)
    # torch's own load calls it twice, and the second call is the one that must not raise; these are not that one.
    for _ in range(2):
        with pytest.raises(CheckpointNotFoundError, match=r": \.metadata "):
            reader.read_metadata()
    for rank in (0, 1):
        for _ in range(2):
            with pytest.raises(CheckpointNotFoundError, match=rf"__{rank}\.metadata"):
                sharded.reader(url).read_metadata(rank=rank)
    other = sharded.reader(url)
    for _ in range(2):
        with pytest.raises(CheckpointNotFoundError, match=r"__0\.metadata"):
            other.read_metadata(rank=0)


def test_only_where_there_is_no_metadata_a_ranks_own_is_read(
    proxy: FaultProxy, proxied_container: str, url: str
) -> None:
    writer = sharded.writer(url)
    dcp.save(sharded.plain(1), storage_writer=writer, use_collectives=False)
    assert paths_below(url, "metadata") == ["run/step-1/__0.metadata"]
    sharded.assert_version(url, 1, sharded.plain)

    proxied = f"{proxied_container}/run/step-1"
    proxy.when(lambda seen: seen.path.endswith("/.metadata")).do(Answer(403, "AuthorizationFailure"))
    with unchanged(url):
        raised(AccessDeniedError, lambda: load(proxied), r"/run/step-1/\.metadata: 403 AuthorizationFailure")
    assert proxy.count("Get Blob") == 1
    put(url, "run/step-1/.metadata", b"garbage")
    with unchanged(url):
        raised(CorruptCheckpointError, lambda: load(url), r"/run/step-1/\.metadata")


# Data


def cut_short(url: str, name: str) -> None:
    data = content(url, name)
    put(url, name, data[: len(data) // 3])


def remove(url: str, name: str) -> None:
    assert store_of(url).delete(name)


def damage(url: str, name: str) -> None:
    data = content(url, name)
    put(url, name, data.replace(b"archive/data", b"arch1ve/data"))


def load_tensors(url: str) -> None:
    """Without the object, which only one rank writes, and all ranks read."""
    load(url, {name: value for name, value in sharded.empty(sharded.rows()).items() if name in sharded.GLOBAL})


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (remove, "is missing.*another checkpoint"),
        (cut_short, "is shorter .*another checkpoint"),
        (damage, "CRC64 [0-9a-f]{16} .*[0-9a-f]{16} .*older checkpoint"),
    ],
    ids=["removed", "cut short", "damaged"],
)
def test_harmed_data(ranks: Ranks, url: str, harm: Callable[[str, str], None], says: str) -> None:
    save(url, 1)
    [name] = paths_below(url, ".distcp")
    harm(url, name)
    with unchanged(url):
        error = raised(CorruptCheckpointError, lambda: load(url), says)
    assert harm is damage or (name in str(error) and isinstance(error.__cause__, StoreError))

    # Only the second rank reads from what is harmed here, and both of them hear of it.
    two = f"{url}-of-two"
    ranks(2).run(save, two, 1)
    harm(two, next(name for name in paths_below(two, ".distcp") if "/__1_" in name))
    with unchanged(url):
        ranks(2).run(raised_on_ranks, CorruptCheckpointError, load_tensors, two, says, [1])


@pytest.mark.parametrize("key", ["even", "step"])
def test_one_item_of_a_blob_that_is_gone(url: str, key: str) -> None:
    """A tensor's raw bytes and an object's pickle take different ways."""
    save(url, 1)
    remove(url, paths_below(url, ".distcp")[0])
    raised(CorruptCheckpointError, lambda: load(url, {key: sharded.plain()[key]}), "is missing")


# Containers, credentials, URLs


@pytest.mark.parametrize(("attempt", "failed"), [(load, [0, 1]), (partial(save, version=1), [0])], ids=["load", "save"])
def test_no_container(ranks: Ranks, url: str, attempt: Callable[[str], None], failed: list[int]) -> None:
    elsewhere = url.replace("/test-", "/none-")
    says = "404 ContainerNotFound.*'none-[0-9a-f]+' .*'devstoreaccount1'"
    error = raised(ContainerNotFoundError, lambda: attempt(elsewhere), says)
    assert (error.status, error.error_code) == (404, "ContainerNotFound")
    assert type(error.__cause__).__name__ == "ResourceNotFoundError"
    # Only the coordinator looks at the URL before a save.
    ranks(2).run(raised_on_ranks, ContainerNotFoundError, attempt, elsewhere, says, failed)
    with pytest.raises(ContainerNotFoundError):
        snapshot(elsewhere)


def test_wrong_key(ranks: Ranks, url: str) -> None:
    save(url, 1)
    says = "403 AuthorizationFailure.* credential .*'devstoreaccount1'"
    raised_everywhere(ranks, AccessDeniedError, partial(load, credential=WRONG_KEY), url, says)
    saving = partial(save, version=2, credential=WRONG_KEY)
    raised_everywhere(ranks, AccessDeniedError, saving, url, says, failed=[0])


@pytest.mark.parametrize(
    ("permission", "hours", "save_says", "load_says"),
    [
        ("racwdl", -1, "could not read .*/.metadata: 403", "could not read .*/.metadata: 403"),
        ("rl", 1, "could not write a block of .*distcp: 403", None),
        ("wdl", 1, "could not read .*/.metadata: 403", "could not read .*/.metadata: 403"),
    ],
    ids=["expired", "no write", "no read"],
)
def test_sas_that_does_not_do(
    container: str, url: str, permission: str, hours: float, save_says: str, load_says: str | None
) -> None:
    save(url, 1)
    signed = f"{url}?{container_sas(container, permission, hours)}"
    with unchanged(url):
        raised(AccessDeniedError, lambda: save(signed, 2, credential=None), save_says)
        if load_says is None:
            load(signed, credential=None)
        else:
            raised(AccessDeniedError, lambda: load(signed, credential=None), load_says)


def test_sas_without_list_still_says_that_nothing_is_there(container: str, url: str) -> None:
    signed = f"{url}?{container_sas(container, 'rw')}"
    says = r"\.metadata .*credential does not allow listing"
    raised(CheckpointNotFoundError, lambda: load(signed, credential=None), says)
    save(signed, 1, credential=None)
    load(signed, credential=None)


def test_sas_without_delete_replaces_and_says_what_stays(
    container: str, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(url, 1)
    [old] = paths_below(url, ".distcp")
    save(f"{url}?{container_sas(container, 'rwl')}", 2, credential=None)
    sharded.assert_version(url, 2, sharded.plain)
    assert old in paths_below(url, ".distcp")
    assert f"could not remove {container}/{old}" in caplog.text


def test_no_secret_in_what_torch_reports(container: str, url: str) -> None:
    token = container_sas(container, "rl")
    signature = token.partition("sig=")[2].partition("&")[0]
    assert len(signature) > 40
    save(url, 1)
    remove(url, paths_below(url, ".distcp")[0])
    signed = f"{url}?{token}"
    attempts: list[Callable[[], None]] = [
        lambda: load(signed, credential=None),
        lambda: save(signed, 2, credential=None),
    ]
    for attempt in attempts:
        with pytest.raises(CheckpointException) as caught:
            attempt()
        shown = str(caught.value) + repr(caught.value) + "".join(traceback.format_exception(caught.value))
        pickled = pickle.dumps(caught.value.failures)
        assert signature not in shown
        assert signature.encode() not in pickled and b"sig=" not in pickled


@pytest.mark.parametrize(
    "bad", ["/local/folder", "s3://bucket/run", "https://account.blob.core.windows.net", "http://"]
)
def test_no_url_of_blob_storage(url: str, bad: str) -> None:
    says = r"https://ACCOUNT\.blob\.core\.windows\.net/CONTAINER/PATH"
    for place in (AzureBlobReader, AzureBlobWriter):
        with pytest.raises(LocationError, match=says):
            place(bad)
    with unchanged(url):
        with pytest.raises(LocationError, match=says):
            dcp.save(sharded.plain(1), storage_writer=sharded.writer(url), checkpoint_id=bad)
        with pytest.raises(LocationError, match=says):
            dcp.load(sharded.plain(), storage_reader=sharded.reader(url), checkpoint_id=bad)


# The network


@contextlib.contextmanager
def port(*, listens: bool) -> Iterator[str]:
    """An account's endpoint at which connections are refused, or are made and never answered."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listens:
            taken.listen()
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/devstoreaccount1/container/run"


@contextlib.contextmanager
def short_time_outs() -> Iterator[None]:
    """A request without an answer fails after a second; without waits, at least three more follow it."""
    with (
        mock.patch.object(connections, "IO_SECONDS", 1.0),
        mock.patch.object(connections, "TIMEVAL", struct.pack("ll", 1, 0)),
        without_waiting(),
    ):
        yield


def load_impatiently(url: str) -> None:
    with short_time_outs():
        load(url, options=IMPATIENT)


def save_impatiently(url: str) -> None:
    with short_time_outs():
        save(url, 2, options=IMPATIENT)


@pytest.mark.parametrize("listens", [False, True], ids=["refuses", "never answers"])
def test_dead_endpoint(ranks: Ranks, listens: bool) -> None:
    said = "time(d )?out" if listens else "Connection ?[Rr]efused"
    says = f"no answer .*{said}.* endpoint http://127.0.0.1:[0-9]+/devstoreaccount1"
    with port(listens=listens) as url:
        error = raised(ServiceUnavailableError, lambda: load_impatiently(url), says)
        assert error.status is None and error.__cause__ is not None
        raised(ServiceUnavailableError, lambda: save_impatiently(url), says)
        ranks(2).run(raised_on_ranks, ServiceUnavailableError, load_impatiently, url, says, [0, 1])
        ranks(2).run(raised_on_ranks, ServiceUnavailableError, save_impatiently, url, says, [0])


def test_service_that_falls_silent(ranks: Ranks, proxy: FaultProxy, proxied_container: str, url: str) -> None:
    """Everything answers but one kind of request, for ever."""
    save(url, 1)
    proxied = f"{proxied_container}/run/step-1"
    [data] = paths_below(url, ".distcp")
    proxy.when(lambda seen: seen.method == "GET" and seen.path.endswith(data), times=None).do(Hold(at=200))
    proxy.when("Put Block", times=None).do(Hold())
    with unchanged(url):
        says = "could not read .*distcp: no answer .* endpoint"
        raised(ServiceUnavailableError, lambda: load_impatiently(proxied), says)
        ranks(2).run(raised_on_ranks, ServiceUnavailableError, load_impatiently, proxied, says, [0, 1])
        says = "could not write a block of .*distcp: no answer .* endpoint"
        raised(ServiceUnavailableError, lambda: save_impatiently(proxied), says)
        ranks(2).run(raised_on_ranks, ServiceUnavailableError, save_impatiently, proxied, says, [0, 1])
    sharded.assert_version(url, 1, sharded.plain)


# State dicts that do not fit the checkpoint


def load_more(url: str) -> None:
    load(url, {"even": torch.zeros(12, 8), "more": torch.zeros(2)})


def load_larger(url: str) -> None:
    load(url, {"even": torch.zeros(12, 9)})


@pytest.mark.parametrize(
    ("attempt", "kind", "says"),
    [(load_more, RuntimeError, "Missing key.*more"), (load_larger, ValueError, "Size mismatch.*even")],
)
def test_keys_and_shapes_are_checked_by_torch(
    ranks: Ranks, url: str, attempt: Callable[[str], None], kind: type[BaseException], says: str
) -> None:
    save(url, 1)
    raised_everywhere(ranks, kind, attempt, url, says)


def test_overwrite_false(ranks: Ranks, url: str) -> None:
    save(url, 1, overwrite=False)
    says = "/run/step-1 .*overwrite=False.* overwrite=True"
    saving = partial(save, version=2, overwrite=False)
    raised_everywhere(ranks, CheckpointExistsError, saving, url, says, failed=[0])


def save_rank_by_rank(url: str, says: str) -> None:
    # Without collectives no rank gathers the failures: each raises its own.
    state: dict[str, Any] = sharded.plain(2)
    with pytest.raises(CheckpointExistsError, match=says):
        dcp.save(state, storage_writer=sharded.writer(url), use_collectives=False)


def test_no_save_without_collectives_beneath_one_with(ranks: Ranks, url: str) -> None:
    save(url, 1)
    says = "/run/step-1.*use_collectives=False"
    with unchanged(url):
        save_rank_by_rank(url, says)
        ranks(2).run(save_rank_by_rank, url, says)
