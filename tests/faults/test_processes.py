"""Many threads and processes: one token for all, forks in the middle of a transfer, workers, a writer used again."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from azure.core.credentials import AccessToken
from torch.utils.data import DataLoader, Dataset

from azure_torch_ckpt import (
    AccessDeniedError,
    AzureBlobReader,
    AzureBlobWriter,
    BlobLocation,
    ServiceUnavailableError,
    StoreError,
    TransferOptions,
    prune,
)
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.transport.throttle import RequestCounts
from tests.conftest import UnsignedToken
from tests.support.containers import paths_below, store_of
from tests.support.faults import Action, Answer, Gate, Hold
from tests.support.mixed_checkpoint import KEY, SMALL, assert_right, failure, load, save, state, zeros
from tests.support.proxy import FaultProxy

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),  # Python 3.12 and later, on fork
]

DEADLINE_SECONDS = 60.0


class CountingToken(UnsignedToken):
    """Counts its fetches, and lets none finish before the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.fetches = 0
        self.may_finish = threading.Event()
        self._lock = threading.Lock()

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        with self._lock:
            self.fetches += 1
        assert self.may_finish.wait(DEADLINE_SECONDS)
        return super().get_token(*scopes, **options)


def in_child(work: Callable[[], object], *, seconds: float = DEADLINE_SECONDS) -> None:
    """Do `work` in a forked process; raise what it raised there."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            # What torch's own DataLoader does first in a forked worker: libgomp's threads are not there any more, and a
            # parallel loop of torch would wait for them for ever.
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-60_000:])
        finally:
            os._exit(code)
    os.close(write)
    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
    timer.start()
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    timer.cancel()
    assert status == 0, f"the child ended with {status}: {said or 'it hung'}"


# ---- Requests in flight ---------------------------------------------------------------------------------------------


def test_a_forked_child_does_not_inherit_a_held_lock(container: str) -> None:
    """Of the counter of a store's requests, which another thread is about to change when the fork happens."""
    store = store_of(container)
    store.put("blob", b"data")
    throttle = store.throttle
    held, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with throttle.permit(), throttle._changed:
            held.set()
            assert may_end.wait(DEADLINE_SECONDS)

    def requests() -> None:
        throttle.count_retry()
        start = threading.Barrier(8)

        def one() -> None:
            start.wait()
            for _ in range(200):
                with throttle.permit():
                    pass

        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (throttle.counts, throttle._in_flight) == (RequestCounts(1600, 1), 0)
        assert store.read("blob", limit=10)[0] == b"data"

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(DEADLINE_SECONDS)
    try:
        in_child(requests)
    finally:
        may_end.set()
        holder.join()


# ---- Tokens ----------------------------------------------------------------------------------------------------------


def test_sixteen_threads_with_a_store_each_fetch_one_token(azurite_tls: Azurite) -> None:
    url = azurite_tls.create_container("test-one-token")
    token = CountingToken()
    stores = [
        BlobStore(BlobLocation.parse(url), Access(token, ca_file=str(azurite_tls.certificate))) for _ in range(16)
    ]
    start = threading.Barrier(17)

    def use(store: BlobStore) -> None:
        start.wait(DEADLINE_SECONDS)
        assert list(store.list("")) == []

    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(use, store) for store in stores]
        start.wait(DEADLINE_SECONDS)
        token.may_finish.set()
        for future in futures:
            future.result(DEADLINE_SECONDS)
    assert token.fetches == 1

    # Saves and loads with all their workers share it, too; and a child goes on with it.
    place: dict[str, Any] = {"credential": token, "ca_file": str(azurite_tls.certificate)}
    save(f"{url}/a", 1, **place)
    assert_right(load(f"{url}/a", **place), 1)
    assert token.fetches == 1

    def child() -> None:
        assert_right(load(f"{url}/a", **place), 1)
        assert token.fetches == 1

    in_child(child)


# ---- Fork ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_parent_and_child_go_on_after_a_fork(azurite: Azurite, azurite_tls: Azurite, tls: bool) -> None:
    emulator = azurite_tls if tls else azurite
    place: dict[str, Any] = {"credential": KEY, "ca_file": str(azurite_tls.certificate)}
    url = f"{emulator.create_container(f'test-fork-{tls}'.lower())}/a"
    writer = AzureBlobWriter(url, options=SMALL, **place)
    reader = AzureBlobReader(url, options=SMALL, **place)
    dcp.save(state(1), storage_writer=writer)

    def read(version: int) -> None:
        loaded = zeros()
        dcp.load(loaded, storage_reader=reader)
        assert_right(loaded, version)

    read(1)

    def child() -> None:
        read(1)
        dcp.save(state(2), storage_writer=writer)
        read(2)

    in_child(child)
    read(2)  # on the connections that it has had all the time
    dcp.save(state(3), storage_writer=writer)
    in_child(lambda: read(3))
    read(3)


def test_a_fork_in_the_middle_of_a_load(proxy: FaultProxy, proxied_container: str) -> None:
    """Other threads hold locks and connections at that moment."""
    url = f"{proxied_container}/a"
    save(url, 1)
    gate = Gate()
    proxy.when(lambda seen: seen.path.endswith(".distcp")).do(Hold(gate))
    proxy.when(lambda seen: seen.path.endswith(".distcp"), nth=2).do(Hold(gate, at=10))
    reader = AzureBlobReader(url, credential=KEY, options=SMALL)
    loaded = zeros()

    def child() -> None:
        mine = zeros()
        dcp.load(mine, storage_reader=reader)
        assert_right(mine, 1)

    with ThreadPoolExecutor(1) as pool:
        parent = pool.submit(dcp.load, loaded, storage_reader=reader)
        try:
            gate.wait_for(2)
            in_child(child)
        finally:
            gate.open()
        parent.result(DEADLINE_SECONDS)
    assert_right(loaded, 1)


def test_a_fork_while_the_service_is_busy(proxy: FaultProxy, proxied_container: str) -> None:
    """The places of the parent's requests are not the child's to wait for."""
    store = store_of(proxied_container)
    store.put("x", b"12345678")
    gate = Gate()

    def child() -> None:
        assert store.read("x", limit=8)[0] == b"12345678"

    proxy.when("Get Blob").do(Answer(503, "ServerBusy"))
    proxy.when("Get Blob", nth=2).do(Hold(gate))
    with ThreadPoolExecutor(1) as pool:
        parent = pool.submit(store.read, "x", limit=8)
        try:
            gate.wait_for(1)
            assert store.throttle.limit == 1  # and that one is taken
            in_child(child)
        finally:
            gate.open()
        assert parent.result(DEADLINE_SECONDS)[0] == b"12345678"


# ---- Spawn and DataLoader --------------------------------------------------------------------------------------------


class Rows(Dataset[torch.Tensor]):
    """The rows of a checkpoint's tensor, read from the blob one by one, and the whole of it once per worker."""

    def __init__(self, url: str, store: BlobStore, path: str, payload: int) -> None:
        self._reader = AzureBlobReader(url, credential=KEY, options=SMALL)
        self._store = store
        self._path = path
        self._payload = payload
        self._whole: torch.Tensor | None = None

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        row = bytearray(200 * 4)
        self._store.read_into(self._path, self._payload + index * len(row), [memoryview(row)])
        if self._whole is None:
            self._whole = torch.zeros(300, 200)
            dcp.load({"large": self._whole}, storage_reader=self._reader, no_dist=True)
        got = torch.frombuffer(row, dtype=torch.float32)
        assert torch.equal(got, self._whole[index])
        return got


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers_share_a_reader_and_a_store(container: str, method: str) -> None:
    url = f"{container}/a"
    save(url)
    reader = AzureBlobReader(url, credential=KEY)
    [item] = [info for index, info in reader.read_metadata().storage_data.items() if index.fqn == "large"]
    store = store_of(url)
    path = BlobLocation.parse(url).join(item.relative_path).path
    rows = Rows(url, store, path, item.offset + item.payload_offset)
    assert torch.equal(rows[0], state()["large"][0])  # the parent has connections when the workers come
    workers = 2 if method == "fork" else 1
    loader = DataLoader(
        rows, batch_size=4, num_workers=workers, multiprocessing_context=method, timeout=DEADLINE_SECONDS
    )
    got = torch.cat(list(loader))
    assert torch.equal(got, state()["large"][:24])
    assert torch.equal(rows[5], state()["large"][5])


def test_a_pickled_writer_and_reader_work_in_a_spawned_process(container: str) -> None:
    """Made anew there: a `spawn` child has nothing of this process but the pickle."""
    url = f"{container}/a"
    writer = AzureBlobWriter(url, credential=KEY, options=SMALL)
    reader = AzureBlobReader(url, credential=KEY, options=SMALL)
    save(url, 1)
    assert_right(load(url), 1)
    process = multiprocessing.get_context("spawn").Process(target=_save_and_load, args=(writer, reader))
    process.start()
    process.join(DEADLINE_SECONDS)
    assert process.exitcode == 0
    assert_right(load(url), 2)


def _save_and_load(writer: AzureBlobWriter, reader: AzureBlobReader) -> None:
    dcp.save(state(2), storage_writer=writer)
    loaded = zeros()
    dcp.load(loaded, storage_reader=reader)
    assert_right(loaded, 2)


# ---- Threads ---------------------------------------------------------------------------------------------------------


def test_threads_share_a_reader_and_a_store(container: str) -> None:
    url = f"{container}/a"
    save(url, 1)
    reader = AzureBlobReader(url, credential=KEY, options=SMALL)
    store = pickle.loads(pickle.dumps(store_of(url)))
    start = threading.Barrier(8)

    def use(number: int) -> None:
        start.wait(DEADLINE_SECONDS)
        loaded = zeros()
        dcp.load(loaded, storage_reader=reader, no_dist=True)
        assert_right(loaded, 1)
        store.put(f"thread-{number}", bytes([number]) * 100)
        assert store.read(f"thread-{number}", limit=1000)[0] == bytes([number]) * 100

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(use, number) for number in range(8)]:
            future.result(DEADLINE_SECONDS)


# ---- A writer after an error -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["Get Blob", "Put Block", "Put Block List", "Put Blob"])
def test_a_writer_is_used_again_after_an_error(
    proxy: FaultProxy, container: str, proxied_container: str, where: Any
) -> None:
    url = f"{container}/a"
    options = TransferOptions(block_size=64 * 1024, concurrency=4, retry_seconds=0)
    writer = AzureBlobWriter(f"{proxied_container}/a", credential=KEY, options=options)
    faults: list[tuple[Action, type[StoreError]]] = [
        (Answer(403, "AuthorizationFailure"), AccessDeniedError),
        (Answer(503, "ServerBusy"), ServiceUnavailableError),
    ]
    for version, (fault, expected) in enumerate(faults, 1):
        rule = proxy.when(where, times=None)
        rule.do(fault)
        failure(expected, dcp.save, state(version), storage_writer=writer)
        rule.do()
        dcp.save(state(version), storage_writer=writer)
        assert_right(load(url), version)
        if where == "Put Blob":
            # Whether a commit without an answer was carried out is unknown, so its blobs stay for `prune`.
            assert len(prune(url, credential=KEY, grace=datetime.timedelta(0), dry_run=False).remains) == 1
        names = {info.relative_path for info in _storage_data(url)}
        assert sorted(paths_below(url)) == sorted(["a/.metadata", *(f"a/{name}" for name in names)])


def _storage_data(url: str) -> list[Any]:
    return list(AzureBlobReader(url, credential=KEY).read_metadata().storage_data.values())


# ---- Signals and asynchronous saves ----------------------------------------------------------------------------------


CHILD = """
import sys
import torch
import torch.distributed.checkpoint as dcp
from azure_torch_ckpt import AzureBlobWriter
from tests.support.mixed_checkpoint import KEY, SMALL, state

if __name__ == "__main__":
    url, how = sys.argv[1:]
    writer = AzureBlobWriter(url, credential=KEY, options=SMALL)
    if how == "thread":
        future = dcp.async_save(state(2), storage_writer=writer)
        print("the main thread is done", flush=True)  # and ends before the save: the interpreter must wait for it
    else:
        dcp.save(state(2), storage_writer=writer)
"""


@contextlib.contextmanager
def child_process(tmp_path: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(
        [sys.executable, str(script), *args], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def test_sigterm_in_the_middle_of_a_save_stops_it_and_leaves_nothing_visible(
    proxy: FaultProxy, container: str, proxied_container: str, tmp_path: Path
) -> None:
    url = f"{container}/a"
    save(url, 1)
    gate = Gate()
    proxy.when("Put Block", nth=2, times=None).do(Hold(gate))
    with child_process(tmp_path, f"{proxied_container}/a", "here") as process:
        gate.wait_for(2, DEADLINE_SECONDS)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_SECONDS) == -signal.SIGTERM  # although its requests got no answer
    gate.open()
    assert_right(load(url), 1)
    assert len(paths_below(url)) == 2


def test_an_asynchronous_save_outlives_the_main_thread(
    proxy: FaultProxy, container: str, proxied_container: str, tmp_path: Path
) -> None:
    gate = Gate()
    proxy.when("Put Block", times=None).do(Hold(gate))
    with child_process(tmp_path, f"{proxied_container}/a", "thread") as process:
        assert process.stdout is not None
        assert "main thread is done" in process.stdout.readline()
        gate.wait_for(1, DEADLINE_SECONDS)
        assert process.poll() is None
        gate.open()
        assert process.wait(DEADLINE_SECONDS) == 0
    assert_right(load(f"{container}/a"), 2)
