"""No secret gets out, no token travels in clear, no server is believed without proof, and no metadata is trusted."""

from __future__ import annotations

import base64
import datetime
import logging
import pickle
import threading
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from azure.core.credentials import AccessToken, AzureNamedKeyCredential, AzureSasCredential
from azure.storage.blob import ContainerSasPermissions, generate_container_sas
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

import azure_torch_ckpt.transport.retry
from azure_torch_ckpt import (
    AccessDeniedError,
    AzureBlobReader,
    AzureBlobWriter,
    AzureCheckpointError,
    BlobLocation,
    CheckpointError,
    CorruptCheckpointError,
    CredentialError,
    ServiceUnavailableError,
    TransferOptions,
    UnsafeMetadataError,
    prune,
    remove_checkpoint,
    verify,
)
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.emulator import Azurite
from tests.conftest import UnsignedToken
from tests.faults.tally import Tally
from tests.support.containers import content, put
from tests.support.faults import Action, Answer, Cut
from tests.support.mixed_checkpoint import KEY, SMALL, assert_right, error_of, failure, load, save, state, zeros
from tests.support.proxy import FaultProxy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

IMPATIENT = TransferOptions(retry_seconds=0.05)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a retry waits is not the subject here."""
    monkeypatch.setattr(azure_torch_ckpt.transport.retry, "_FIRST_DELAY", 0.01)


@pytest.fixture
def tls_proxy(azurite_tls: Azurite, tls_files: tuple[Path, Path]) -> Iterator[FaultProxy]:
    with FaultProxy(azurite_tls.endpoint, tls=tls_files) as between:
        yield between


# ---- Secrets ---------------------------------------------------------------------------------------------------------


class Listener(logging.Handler):
    """All that is logged, by whomever, as it would be printed."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.names: set[str] = set()
        self.threads: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.names.add(record.name.partition(".")[0])
        self.threads |= {thread.name for thread in threading.enumerate()}
        self.lines.append(logging.Formatter("%(threadName)s %(name)s %(message)s").format(record))


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Hears every logger at DEBUG, those of the SDK and of urllib3 included."""
    handler = Listener()
    loggers = [logging.getLogger(name) for name in (None, "azure", "urllib3", "azure_torch_ckpt")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    loggers[0].addHandler(handler)
    yield handler
    loggers[0].removeHandler(handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


class FixedToken(UnsignedToken):
    """Says what it handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.token = super().get_token()

    def get_token(self, *scopes: str, **_: Any) -> AccessToken:
        return self.token


def sas_for(container: str, key: str = KEY) -> str:
    expiry = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1)
    allowed = ContainerSasPermissions(read=True, write=True, delete=True, list=True, create=True)
    return generate_container_sas(Azurite.account_name, container, account_key=key, permission=allowed, expiry=expiry)


WRONG_KEY = base64.b64encode(b"not the key of this account, but it has the length of one......").decode()


def credentials_of(kind: str, container: str) -> tuple[str, Any, list[str]]:
    """What goes behind the URL, what is passed as ``credential=``, and what of it is secret."""
    if kind == "token":
        token = FixedToken()
        return "", token, [token.token.token, token.token.token.split(".")[1]]
    if kind == "key":
        return "", AzureNamedKeyCredential(Azurite.account_name, KEY), [KEY]
    if kind == "wrong key":
        return "", WRONG_KEY, [WRONG_KEY]
    sas = sas_for(container, WRONG_KEY if kind == "wrong SAS" else KEY)
    signature = sas.partition("sig=")[2].partition("&")[0]
    decoded = signature.replace("%2F", "/").replace("%2B", "+").replace("%3D", "=")
    if kind == "SAS credential":
        return "", AzureSasCredential(sas), [sas, signature, decoded]
    return f"?{sas}", None, [sas, signature, decoded]


def seen_of(error: BaseException) -> list[str]:
    """Every text that an error, or the one that it comes from, turns up as."""
    texts = [*traceback.format_exception(error), pickle.dumps(error).decode("latin-1")]
    current: BaseException | None = error
    while current is not None:
        texts += [str(current), repr(current), repr(current.args)]
        current = current.__cause__ or current.__context__
    return texts


@pytest.mark.parametrize("kind", ["token", "key", "SAS", "SAS credential", "wrong key", "wrong SAS"])
def test_no_secret_gets_out(
    azurite_tls: Azurite, tls_proxy: FaultProxy, tls_files: tuple[Path, Path], listener: Listener, kind: str
) -> None:
    name = azurite_tls.create_container(f"test-{kind.lower().replace(' ', '-')}").rpartition("/")[2]
    query, credential, secrets = credentials_of(kind, name)
    place: dict[str, Any] = {"credential": credential, "ca_file": str(tls_files[0])}
    url = f"{tls_proxy.endpoint}/{name}/a{query}"
    texts: list[str] = []

    # Objects
    writer, reader = AzureBlobWriter(url, **place), AzureBlobReader(url, **place)
    location = BlobLocation.parse(url)
    store = BlobStore(location, Access(credential, options=IMPATIENT, ca_file=str(tls_files[0])))
    for thing in (writer, reader, store, location, writer.checkpoint_id, writer.storage_meta(), IMPATIENT):
        texts += [repr(thing), str(thing), f"{thing}"]
    # What a process could do nothing without: documented in BlobStore, BlobLocation and PickledCredential.
    if kind != "token":
        assert any(secret.encode() in pickle.dumps(writer) for secret in secrets)

    # A save and a load: what is stored, and what travels between ranks
    if not kind.startswith("wrong"):
        tls_proxy.when(lambda _: True, nth=2).do(Answer(503, "ServerBusy"))  # something to log about
        dcp.save(state(), storage_writer=writer)
        loaded = zeros()
        dcp.load(loaded, storage_reader=reader)
        assert_right(loaded)
        store = BlobStore(BlobLocation.parse(azurite_tls.url(name)), Access(KEY, ca_file=str(tls_files[0])))
        for blob in store.list(""):
            texts += [blob.path, store.read(blob.path, limit=1 << 30)[0].decode("latin-1")]
        texts.append(pickle.dumps(reader.read_metadata()).decode("latin-1"))
        writer.set_up_storage_writer(True)
        plans = writer.prepare_global_plan([writer.prepare_local_plan(dcp.SavePlan([]))])
        texts.append(pickle.dumps(plans).decode("latin-1"))
        assert verify(url, **place).ok
        assert prune(url, **place).remains == []
        remove_checkpoint(url, **place)

    # Errors
    place["options"] = IMPATIENT
    faults: list[Action] = [
        Answer(403, "AuthorizationFailure"),
        Answer(404, "ContainerNotFound"),
        Answer(503, "ServerBusy"),
        Cut("answer"),
    ]
    actions: list[Callable[[], object]] = [
        lambda: dcp.save(state(), storage_writer=AzureBlobWriter(url, **place)),
        lambda: dcp.load(zeros(), storage_reader=AzureBlobReader(url, **place)),
        lambda: prune(url, **place),
    ]
    errors = 0
    for fault in faults:
        rule = tls_proxy.when(lambda _: True, times=None)
        rule.do(fault)
        for act in actions:
            try:
                act()
            except (AzureCheckpointError, CheckpointException) as error:
                errors += 1
                texts += seen_of(error)
        rule.do()
    assert errors == len(faults) * len(actions)
    if kind.startswith("wrong"):  # the service's own words
        with pytest.raises(CheckpointException) as caught:
            actions[0]()
        assert isinstance(error_of(caught), AccessDeniedError)
        texts += seen_of(caught.value) + seen_of(error_of(caught))
    dead = url.replace(tls_proxy.endpoint, "https://127.0.0.1:9/devstoreaccount1")
    with pytest.raises(ServiceUnavailableError) as dead_end:
        verify(dead, **place)
    texts += seen_of(dead_end.value)

    # Logs and threads
    texts += listener.lines + list(listener.threads)
    assert "azure" in listener.names and len(listener.lines) > 20
    if not kind.startswith("wrong"):
        assert "azure_torch_ckpt" in listener.names and any("blob-" in name for name in listener.threads)
    for text in texts:
        for secret in secrets:
            assert secret not in text, text.replace(secret, "***")


def test_a_token_does_not_travel_over_plain_http(proxy: FaultProxy, container: str, proxied_container: str) -> None:
    token = FixedToken()
    makers: list[Callable[[], object]] = [
        lambda: AzureBlobWriter(f"{proxied_container}/a", credential=token),
        lambda: AzureBlobReader(f"{proxied_container}/a", credential=token),
        lambda: verify(f"{proxied_container}/a", credential=token),
        lambda: prune(f"{proxied_container}/a", credential=token),
        lambda: remove_checkpoint(f"{proxied_container}/a", credential=token),
    ]
    for make in makers:
        with pytest.raises(CredentialError, match="clear text"):
            make()
    assert proxy.connections == 0


def test_a_redirection_does_not_lead_a_token_into_plain_http(
    proxy: FaultProxy, tls_proxy: FaultProxy, tls_files: tuple[Path, Path]
) -> None:
    elsewhere = Answer(307, "Moved", {"Location": f"{proxy.endpoint}/container/a/.metadata"})
    tls_proxy.when(lambda _: True, times=None).do(elsewhere)
    reader = AzureBlobReader(
        f"{tls_proxy.endpoint}/container/a", credential=FixedToken(), ca_file=str(tls_files[0]), options=IMPATIENT
    )
    with pytest.raises(AzureCheckpointError):
        reader.read_metadata()
    assert not any("authorization" in seen.headers for seen in proxy.log)


# ---- Who the server is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["unknown authority", "wrong host name"])
def test_a_certificate_that_proves_nothing_is_an_error_at_once(
    azurite: Azurite, tls_files: tuple[Path, Path], what: str, tally: Tally
) -> None:
    host = "127.0.0.1" if what == "unknown authority" else "127.0.0.2"  # the certificate is for 127.0.0.1
    ca_file = None if what == "unknown authority" else str(tls_files[0])
    with FaultProxy(azurite.endpoint, tls=tls_files, host=host) as proxy:
        for run in (save, load):
            connections = proxy.connections
            error = failure(ServiceUnavailableError, run, f"{proxy.endpoint}/container/a", ca_file=ca_file)
            assert "ca_file=" in str(error)
            assert proxy.connections <= connections + 1
        assert proxy.log == []
    tally.add(f"certificate: {what}", 2, "clear error at once, nothing sent", 2)


# ---- Hostile metadata ------------------------------------------------------------------------------------------------


def rewrite(container: str, change: Callable[[Metadata], None]) -> None:
    """Store the checkpoint's metadata again, changed."""
    metadata = pickle.loads(content(container, "a/.metadata"))
    change(metadata)
    put(container, "a/.metadata", pickle.dumps(metadata))


def set_of(name: str, **fields: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        [info] = [info for index, info in metadata.storage_data.items() if index.fqn == name]
        for field, value in fields.items():
            setattr(info, field, value)

    return change


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the bomb went off')",)


REFUSED: dict[str, Callable[[Metadata], None]] = {
    "bomb": lambda metadata: setattr(metadata, "planner_data", Bomb()),
    **{
        f"path {path!r:.30}": set_of("large", relative_path=path)
        for path in (
            "../b/data",
            "x/../../b/data",
            "/etc/passwd",
            "https://evil.example/data",
            "azblob://evil/container/data",
            "C:\\data",
            "..\\b",
            "a//b",
            ".",
            "",
            "x\x00",
            "y\r\nHost: evil",
            "z" * 1025,
        )
    },
    "negative offset": set_of("large", offset=-1),
    "negative length": set_of("object", length=-1),
    "huge offset": set_of("large", offset=1 << 63),
    "length without end": set_of("object", length=1 << 70),
    "negative payload": set_of("large", payload_offset=-8),
    "payload beyond the item": set_of("large", payload_offset=1 << 40),
    "crc64 of 65 bits": set_of("large", crc64=1 << 64),
}


@pytest.mark.parametrize("what", REFUSED)
def test_hostile_metadata_is_refused_before_anything_else_is_fetched(
    proxy: FaultProxy, container: str, proxied_container: str, what: str
) -> None:
    save(f"{container}/a")
    rewrite(container, REFUSED[what])
    error = failure(UnsafeMetadataError, load, f"{proxied_container}/a")
    assert f"{proxied_container}/a/.metadata" in str(error)
    for act in (verify, remove_checkpoint):
        with pytest.raises(UnsafeMetadataError):
            act(f"{proxied_container}/a", credential=KEY)
    # Three times the metadata (and a listing by the removal), and nothing was deleted.
    assert {seen.path.rpartition("/")[2] for seen in proxy.requests("Get Blob")} == {".metadata"}
    assert proxy.count("Get Blob") == 3 and proxy.count("Delete", "Put Blob") == 0


BEYOND: dict[str, tuple[str, Callable[[Metadata], None]]] = {
    "offset outside the blob": ("large", set_of("large", offset=1 << 40)),
    "object of 1 EiB": ("object", set_of("object", length=1 << 60)),
    "object of 1 TiB": ("object", set_of("object", length=1 << 40)),
    "tensor of 1 EiB without a payload offset": ("large", set_of("large", length=1 << 60, payload_offset=None)),
    "envelope of 1 EiB behind the payload": ("large", set_of("large", length=1 << 60)),
    "envelope of 1 TiB before the payload": ("large", set_of("large", length=1 << 60, payload_offset=1 << 40)),
    "object at the end of the world": ("object", set_of("object", offset=(1 << 63) - 5000, length=4000)),
}


@pytest.mark.parametrize("what", BEYOND)
def test_what_no_blob_has_is_neither_allocated_nor_fetched(
    proxy: FaultProxy, container: str, proxied_container: str, what: str
) -> None:
    save(f"{container}/a")
    name, change = BEYOND[what]
    rewrite(container, change)
    into = {name: zeros()[name]}
    tracemalloc.start()
    try:
        error = failure(CorruptCheckpointError, load, f"{proxied_container}/a", into)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert " shorter " in str(error)
    assert peak < 8 << 20
    for seen in proxy.requests("Get Blob"):
        assert seen.path.endswith(".metadata") or seen.status == 416
    report = verify(f"{container}/a", credential=KEY)
    assert not report.ok and "beyond its end" in report.problems[0]


@pytest.fixture(scope="module")
def damaged_place(azurite: Azurite) -> tuple[str, bytes]:
    url = f"{azurite.create_container('test-damaged-metadata')}/a"
    save(url)
    return url, content(url, "a/.metadata")


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_metadata_is_read_or_refused(damaged_place: tuple[str, bytes], data: st.DataObject) -> None:
    url, sound = damaged_place
    mutated = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        piece = data.draw(st.binary(max_size=6))
        mutated[at : at + data.draw(st.integers(0, 6))] = piece
    put(url, "a/.metadata", bytes(mutated))
    reader = AzureBlobReader(url, credential=KEY, options=SMALL)
    tracemalloc.start()
    try:
        assert isinstance(reader.read_metadata(), Metadata)
    except CheckpointError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 16 << 20
