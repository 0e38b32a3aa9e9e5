"""Every fault that heals, at every request of a save and of a load: both succeed, and every item is stored once."""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import logging
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import azure_torch_ckpt.transport.retry
from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, BlobLocation, TransferOptions
from azure_torch_ckpt.dcp.metadata.schema import stored_item
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.transport.connections import close_idle
from tests.faults.tally import Tally
from tests.support.containers import store_of
from tests.support.faults import Action, Answer, Call, Cut, Hold
from tests.support.mixed_checkpoint import KEY, assert_right, load, save
from tests.support.proxy import FaultProxy, meet
from tests.support.states import assert_same, fill

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

# One request after the other, so that the k-th is the same one in every run.
IN_TURN = TransferOptions(block_size=128 * 1024, concurrency=1)
RETRY_LOG = "azure_torch_ckpt.transport.retry"

CONNECTION: dict[str, Sequence[Action]] = {
    "reset before the request": [Cut("request")],
    "closed before the request": [Cut("request", reset=False)],
    "response dropped, reset": [Cut("answer")],
    "response dropped, closed": [Cut("answer", reset=False)],
    "reset inside the body": [Cut(100)],
    "body truncated": [Cut(100, reset=False)],
}
ANSWERS = {
    "500 InternalError": Answer(500, "InternalError"),
    "502 BadGateway": Answer(502, "BadGateway"),
    "503 ServerBusy": Answer(503, "ServerBusy"),
    "504 GatewayTimeout": Answer(504, "GatewayTimeout"),
    "408 RequestTimeout": Answer(408, "RequestTimeout"),
    "429 TooManyRequests": Answer(429, "TooManyRequests"),
}
OTHERS: dict[str, Sequence[Action]] = {
    "delay": [Hold(0.02)],
    "503 at once": [Answer(503, "ServerBusy", read_body=False)],
}


REAL_FIRST_DELAY = azure_torch_ckpt.transport.retry._FIRST_DELAY


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The length of the wait before a retry is the subject of some tests only."""
    monkeypatch.setattr(azure_torch_ckpt.transport.retry, "_FIRST_DELAY", 0.005)


@pytest.fixture
def real_delays(quick_retries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azure_torch_ckpt.transport.retry, "_FIRST_DELAY", REAL_FIRST_DELAY)


@pytest.fixture
def tls_proxy(azurite: Azurite, tls_files: tuple[Path, Path]) -> Iterator[FaultProxy]:
    """This test's own proxy that serves HTTPS; clients must trust ``tls_files[0]``."""
    with FaultProxy(azurite.endpoint, tls=tls_files) as between:
        yield between


def assert_stored_once(url: str, version: int) -> None:
    """The checkpoint is right, its blob holds every item once, and nothing else is below it."""
    location = BlobLocation.parse(url)
    assert_right(load(url, options=None), version)
    storage = AzureBlobReader(url, credential=KEY).read_metadata().storage_data
    items = [stored_item(info) for info in storage.values()]
    [path] = {location.join(item.relative_path).path for item in items}
    sizes = {blob.path: blob.size for blob in store_of(url).list(f"{location.path}/")}
    assert set(sizes) == {path, f"{location.path}/.metadata"}
    assert sizes[path] == sum(item.length for item in items)


class Rounds:
    """Saves over and over at one URL, and loads, each with one fault at one request."""

    def __init__(self, proxy: FaultProxy, container: str, ca_file: str | None = None) -> None:
        self._proxy = proxy
        self._direct = f"{container}/a"
        self._through = proxy.through(self._direct)
        self._ca_file = ca_file
        self._version = 0
        save(self._direct, 0)
        self.save()
        sent = len(proxy.log)
        self.load()
        self.requests_of = {"save": sent, "load": len(proxy.log) - sent}

    def save(self) -> None:
        self._version += 1
        save(self._through, self._version, IN_TURN, ca_file=self._ca_file)
        assert_stored_once(self._direct, self._version)

    def load(self) -> None:
        assert_right(load(self._through, options=IN_TURN, ca_file=self._ca_file), self._version)

    def break_each(self, fault: str, *actions: Sequence[Action], tally: Tally) -> None:
        """In turn at each request; with more than one set of actions, the next one at the request that follows."""
        for what, run in (("save", self.save), ("load", self.load)):
            outcomes: Counter[str] = Counter()
            usual = self.requests_of[what]
            for nth in range(1, usual + 1):
                rules = [self._proxy.when(lambda _: True, nth=nth + later) for later in range(len(actions))]
                for rule, broken in zip(rules, actions, strict=True):
                    rule.do(*broken)
                run()
                # More requests than usual show that the fault took place; a response without a body cannot break off.
                more = rules[0].seen - usual
                most = len(actions) + ("dropped" in fault)  # a commit whose answer is lost is looked for, too
                assert (0 if "body" in fault or fault == "delay" else len(actions)) <= more <= most
                outcomes["healed" if more or fault == "delay" else "no body to break"] += 1
            # Of a save's responses one has a body, the old metadata.
            assert outcomes["healed"] >= (usual if "body" not in fault or what == "load" else 1)
            tally.add_all(f"{fault}, each request of a {what}", outcomes)


@pytest.mark.parametrize("fault", [*CONNECTION, *OTHERS])
def test_a_fault_at_every_request(proxy: FaultProxy, container: str, fault: str, tally: Tally) -> None:
    Rounds(proxy, container).break_each(fault, {**CONNECTION, **OTHERS}[fault], tally=tally)


@pytest.mark.parametrize("fault", ANSWERS)
def test_an_answer_that_heals_at_every_request(proxy: FaultProxy, container: str, fault: str, tally: Tally) -> None:
    answer = ANSWERS[fault]
    with_header = dataclasses.replace(answer, headers={"Retry-After": "0"})
    both = f"{fault}, without and with Retry-After"
    Rounds(proxy, container).break_each(both, [answer], [with_header], tally=tally)


@pytest.mark.parametrize("fault", [*CONNECTION, "503 at once"])
def test_a_fault_at_every_request_over_tls(
    tls_proxy: FaultProxy, container: str, tls_files: tuple[Path, Path], fault: str, tally: Tally
) -> None:
    rounds = Rounds(tls_proxy, container, str(tls_files[0]))
    rounds.break_each(f"TLS: {fault}", {**CONNECTION, **OTHERS}[fault], tally=tally)


class AcceptsOnceRefused(logging.Handler):
    """Lets the proxy accept connections again when the client has logged that one was refused."""

    def __init__(self, proxy: FaultProxy) -> None:
        super().__init__()
        self._proxy = proxy
        self._refusing = False

    def refuse(self) -> None:
        self._proxy.refuse()
        self._refusing = True

    def emit(self, record: logging.LogRecord) -> None:
        if self._refusing and "refused" in record.getMessage():
            self._refusing = False
            self._proxy.accept()


def test_connections_are_refused_at_every_request(
    proxy: FaultProxy, container: str, tally: Tally, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, RETRY_LOG)
    handler = AcceptsOnceRefused(proxy)
    logging.getLogger(RETRY_LOG).addHandler(handler)
    try:
        rounds = Rounds(proxy, container)
        actions: list[Action] = [Call(handler.refuse, "request"), Cut("request")]
        rounds.break_each("connection refused", actions, tally=tally)
    finally:
        logging.getLogger(RETRY_LOG).removeHandler(handler)
    refusals = sum("refused" in message for message in caplog.messages)
    assert refusals == sum(rounds.requests_of.values())


class TlsBreaker:
    """A TCP relay to a TLS server that changes one encrypted byte, once."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self._lock = threading.Lock()
        self._upwards = True
        self._left: int | None = None
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def break_after(self, count: int, *, upwards: bool) -> None:
        """Change the byte that comes after `count` others from now on."""
        with self._lock:
            self._left, self._upwards = count, upwards

    @property
    def broke(self) -> bool:
        return self._left is None

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._upstream)) as server:
            back = threading.Thread(target=self._relay, args=(server, client, False), daemon=True)
            back.start()
            self._relay(client, server, True)
            back.join()

    def _relay(self, source: socket.socket, target: socket.socket, upwards: bool) -> None:
        try:
            while data := bytearray(source.recv(65536)):
                with self._lock:
                    if self._left is not None and self._upwards == upwards:
                        if self._left < len(data):
                            data[self._left] ^= 0x01
                            self._left = None
                        else:
                            self._left -= len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            for side in (source, target):
                with contextlib.suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)


def test_a_tls_connection_that_breaks_is_made_anew(
    tls_proxy: FaultProxy, container: str, tls_files: tuple[Path, Path], tally: Tally
) -> None:
    """In the handshake, in a request's head, in a body, and in a response."""
    name = container.rpartition("/")[2]
    ca_file = str(tls_files[0])
    breaker = TlsBreaker(int(tls_proxy.endpoint.split(":")[2].split("/")[0]))
    try:
        through = f"https://127.0.0.1:{breaker.port}/devstoreaccount1/{name}/a"
        tried = 0
        for upwards in (True, False):
            # A handshake takes some 500 bytes up and 1,500 down; a save moves 260 kB up, a load as much down.
            for after in (40, 300, 1_000, 100_000):
                moves = "save" if upwards or after < 2_000 else "load"
                if moves == "load":
                    save(f"{container}/a", tried)
                close_idle()  # so that each breaks in its handshake, or after as many bytes as are counted here
                connections = breaker.connections
                breaker.break_after(after, upwards=upwards)
                if moves == "save":
                    save(through, tried, IN_TURN, ca_file=ca_file)
                    assert_stored_once(f"{container}/a", tried)
                else:
                    assert_right(load(through, options=IN_TURN, ca_file=ca_file), tried)
                assert breaker.broke
                assert breaker.connections > connections + 1
                tried += 1
    finally:
        breaker.close()
    tally.add("TLS record damaged", tried, "healed", tried)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_break_while_a_large_body_is_on_its_way(
    proxy: FaultProxy, tls_proxy: FaultProxy, container: str, tls_files: tuple[Path, Path], tls: bool, tally: Tally
) -> None:
    """Far more than the sockets hold, so the client is still sending, or the service, when the connection ends."""
    between, ca_file = (tls_proxy, str(tls_files[0])) if tls else (proxy, None)
    url = between.through(f"{container}/a")
    options = TransferOptions(block_size=8 << 20, concurrency=2)
    saved = {"x": fill(torch.empty(16 << 20, dtype=torch.uint8))}
    ways_up: list[Action] = [Cut("request"), Cut("request", reset=False), Answer(503, "ServerBusy", read_body=False)]
    for break_up in ways_up:
        rule = between.when("Put Block", nth=2)
        rule.do(break_up)
        dcp.save(saved, storage_writer=AzureBlobWriter(url, credential=KEY, options=options, ca_file=ca_file))
        assert rule.seen == 4  # 16 MiB and an envelope are three blocks, and one of them came twice
    ways_down = [Cut(5_000_000), Cut(5_000_000, reset=False), Cut(8_000_000)]
    for cut in ways_down:
        rule = between.when("Get Blob", nth=2)
        rule.do(cut)
        loaded = {"x": torch.zeros(16 << 20, dtype=torch.uint8)}
        dcp.load(loaded, storage_reader=AzureBlobReader(url, credential=KEY, options=options, ca_file=ca_file))
        assert_same(loaded["x"], saved["x"])
        assert rule.seen == 4  # the metadata, two parts, and one of them a second time
    tried = len(ways_up) + len(ways_down)
    tally.add(f"{'TLS: ' if tls else ''}connection breaks inside an 8 MiB body", tried, "healed", tried)


@pytest.mark.parametrize("seed", range(3))
def test_a_bad_day(proxy: FaultProxy, container: str, seed: int, tally: Tally) -> None:
    """Every fifth request fails in some way, on eight connections at once."""
    rng = random.Random(seed)
    faults = [*CONNECTION.values(), [Answer(503, "ServerBusy")], [Answer(500, "InternalError")]]
    rules = [proxy.when(lambda _: rng.random() < 0.2 / len(faults), times=None) for _ in faults]
    for rule, actions in zip(rules, faults, strict=True):
        rule.do(*actions)
    url = proxy.through(f"{container}/a")
    options = TransferOptions(block_size=16 * 1024, concurrency=8)
    for version in range(4):
        save(url, version, options)
        assert_right(load(url, options=options), version)
        assert_stored_once(f"{container}/a", version)
    assert sum(rule.seen for rule in rules) > 0.1 * len(proxy.log)
    tally.add("a fifth of all requests fails, 8 connections", 8, "healed", 8)


# ---- When the next attempt follows -----------------------------------------------------------------------------------


def delays(caplog: pytest.LogCaptureFixture) -> list[float]:
    """Seconds that each retry waited, as it was logged."""
    return [
        record.args[3]
        for record in caplog.records
        if record.name == RETRY_LOG and isinstance(record.args, tuple) and isinstance(record.args[3], float)
    ]


@pytest.mark.usefixtures("real_delays")
def test_the_first_retry_follows_within_a_fraction_of_a_second_and_later_ones_back_off(
    proxy: FaultProxy, proxied_container: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, RETRY_LOG)
    proxy.when("List", times=3).do(Answer(503, "ServerBusy"))
    store_of(proxied_container).now()
    waited = delays(caplog)
    assert len(waited) == 3
    for number, seconds in enumerate(waited):
        assert 0.1 * 2**number <= seconds <= 0.3 * 2**number
    came = [seen.received_at for seen in proxy.requests("List")]
    assert all(after - before >= seconds for before, after, seconds in zip(came, came[1:], waited, strict=False))


@pytest.mark.parametrize(("status", "form"), [(503, "seconds"), (429, "date")])
def test_retry_after_is_honoured(
    proxy: FaultProxy, proxied_container: str, caplog: pytest.LogCaptureFixture, status: int, form: str
) -> None:
    caplog.set_level(logging.INFO, RETRY_LOG)
    value = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    proxy.when("List").do(Answer(status, "ServerBusy", {"Retry-After": value}))
    store_of(proxied_container).now()
    [waited] = delays(caplog)
    first, second = proxy.requests("List")
    assert first.answered_at is not None
    assert 0 < waited <= 2 if form == "date" else waited == 1
    assert second.received_at - first.answered_at >= waited - 0.01


# ---- A busy service --------------------------------------------------------------------------------------------------


def test_concurrency_backs_off_while_the_service_is_busy_and_comes_back(
    proxy: FaultProxy, container: str, tally: Tally
) -> None:
    url = proxy.through(f"{container}/a")
    options = TransferOptions(block_size=16 * 1024, concurrency=16)
    state = {"x": fill(torch.empty(200, 16 * 1024, dtype=torch.uint8))}
    # Some time for each request, as a real service takes it: otherwise few are ever in flight together.
    proxy.when("Put Block", times=None).do(Hold(0.01))
    writer = AzureBlobWriter(url, credential=KEY, options=options)
    throttle = writer._store.throttle

    meet(proxy, 16, "Put Block")
    dcp.save(state, storage_writer=writer)
    assert throttle.limit is None
    assert proxy.most_in_flight == 16

    allowed = 4
    sent, proxy.max_in_flight = len(proxy.log), allowed
    limits: list[float] = []
    proxy.when("Put Block", times=None).do(Call(lambda: limits.append(throttle.limit or 16.0), "answer"))
    dcp.save(state, storage_writer=writer)
    blocks = [seen for seen in proxy.log[sent:] if seen.kind == "Put Block"]
    refused = sum(seen.status == 503 for seen in blocks)
    assert refused > 0
    assert len(blocks) - refused == 201
    assert refused < 0.35 * len(blocks)
    settled = sorted(limits[len(limits) // 2 :])
    assert 1 <= settled[len(settled) // 2] <= allowed + 2
    assert throttle.limit is not None and throttle.limit < 16

    proxy.max_in_flight = None
    dcp.save(state, storage_writer=writer)
    assert throttle.limit is None
    meet(proxy, 16, "Put Block")
    dcp.save(state, storage_writer=writer)
    loaded = {"x": torch.zeros_like(state["x"])}
    dcp.load(loaded, storage_reader=AzureBlobReader(f"{container}/a", credential=KEY))
    assert_same(loaded["x"], state["x"])
    tally.add("503 above 4 requests in flight, 16 connections", len(blocks), "refused and sent again", refused)
    tally.add("503 above 4 requests in flight, 16 connections", len(blocks), "stored", len(blocks) - refused)
