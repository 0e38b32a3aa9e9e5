"""The blob service in this process' memory, with faults and other writers at any of its requests.

    with MemoryService() as service:
        service.at = {3: Fault.LOST, 5: Fault.DAMAGED}  # of the requests from now on, the third and the fifth
        dcp.save(state, storage_writer=AzureBlobWriter(f"{service.url}/run", credential=False))

Pairs of faults at every request are thousands of saves: too many for an emulator in a process of its own, and each must
run like the one before. So the connections of this process lead here. Everything above the socket is the package's own:
the SDK, retries, `http.client`, the transport. The service has the requests that a checkpoint needs, with their
conditions: an ETag that every write changes, If-Match and If-None-Match, 409 BlobAlreadyExists, 412 ConditionNotMet,
404 BlobNotFound, as in https://learn.microsoft.com/rest/api/storageservices/put-blob and its neighbours. A sample of
the pairs goes through `tests/support/proxy.py` to Azurite as well.

Damage is only for what has a checksum: blobs. Only TLS could notice a changed letter in a listing.
"""

from __future__ import annotations

import base64
import datetime
import email.utils
import enum
import hashlib
import http.client
import io
import socket
import threading
import xml.sax.saxutils
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

from azure_torch_ckpt.transport import connections as pool

_HOST = "127.0.0.1:9"
_ACCOUNT = "devstoreaccount1"
_CONTAINER = "checkpoints"
_BEGAN = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)


class Fault(enum.Enum):
    """What happens to one request. The values are the words of the table in docs/reliability.md."""

    CUT = "the connection breaks before the request is carried out"
    LOST = "the answer is lost"
    BUSY = "503 in its place"
    FAILED = "500 in its place"
    FAILED_AFTER = "500 after it was carried out"
    REPEATED = "something on the way sends it twice, and hands on the second answer"
    REFUSED = "403 in its place"
    MISSING = "404 without an error code in its place"
    DAMAGED = "a byte of the answer's body is changed"
    TRUNCATED = "the answer's body breaks off"
    KILLED = "SIGKILL before it is carried out"
    KILLED_AFTER = "SIGKILL after it was carried out"


class KilledError(BaseException):
    """The process has died: nothing that it does from now on reaches the service."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # of the blob in the container; "" of the container itself
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class _Blob:
    data: bytes
    etag: str
    modified: datetime.datetime
    blocks: list[tuple[str, int]]
    md5: bytes | None


class MemoryService:
    """See the module's docstring.

    Attributes:
        at: what happens to the requests from now on, by their number from 1 on: a fault, or a function that is called
            before the request is carried out (another writer; its own requests are not counted and have no faults).
        seen: the requests that were counted: the method and the blob's path.
        dead: whether the process was killed.
        undeletable: blobs under a lease, so that Delete Blob answers 412 LeaseIdMissing.
    """

    url = f"http://{_HOST}/{_ACCOUNT}/{_CONTAINER}"

    def __init__(self) -> None:
        self.blobs: dict[str, _Blob] = {}
        self.undeletable: set[str] = set()
        self._staged: dict[str, dict[str, bytes]] = {}
        self._clock = 0
        self._idle: list[http.client.HTTPConnection] = []
        self._sockets: list[socket.socket] = []
        self._lock = threading.RLock()
        self._patch = pytest.MonkeyPatch()
        self.calm()

    def calm(self) -> None:
        """No faults from now on, and a new process."""
        while self._sockets:
            self._sockets.pop().close()
        self._idle.clear()
        self.at: dict[int, Fault | Callable[[], object]] = {}
        self.seen: list[tuple[str, str]] = []
        self.dead = False
        self._apart = False

    def restore(self, blobs: Mapping[str, _Blob]) -> None:
        """Bring back what `blobs` had at another moment."""
        self.blobs, self._staged = dict(blobs), {}

    def __enter__(self) -> MemoryService:
        def take(way: pool.Route) -> tuple[http.client.HTTPConnection, bool]:
            with self._lock:
                return (self._idle.pop(), True) if self._idle else (self._connect(way), False)

        def give_back(way: pool.Route, connection: http.client.HTTPConnection) -> None:
            with self._lock:
                self._idle.append(connection)

        self._patch.setattr(pool, "take", take)
        self._patch.setattr(pool, "give_back", give_back)
        self._patch.setattr(pool, "connect", self._connect)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        self.calm()

    # The connections

    def _connect(self, way: pool.Route) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(way.netloc)
        connection.sock = _Socket(self)
        self._sockets.append(connection.sock)
        return connection

    def exchange(self, raw: bytes) -> bytes:
        """The bytes that come back for those of a request; none where the connection ends."""
        head, _, body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        parts = urlsplit(target)
        path = unquote(parts.path).removeprefix(f"/{_ACCOUNT}/{_CONTAINER}").removeprefix("/")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        request = Request(method, path, dict(parse_qsl(parts.query, keep_blank_values=True)), headers, body)
        happens = None
        if not self._apart:
            if self.dead:
                raise KilledError
            self.seen.append((method, path))
            happens = self.at.get(len(self.seen))
        if callable(happens):
            self._apart = True
            try:
                happens()
            finally:
                self._apart = False
        with self._lock:
            if isinstance(happens, Fault):
                return self._broken(request, happens)
            return _bytes(request, self._carry_out(request))

    def _broken(self, request: Request, fault: Fault) -> bytes:
        instead = {
            Fault.BUSY: _error(503, "ServerBusy"),
            Fault.FAILED: _error(500, "InternalError"),
            Fault.REFUSED: _error(403, "AuthorizationFailure"),
            Fault.MISSING: Answer(404),
        }
        if fault in instead:
            return _bytes(request, instead[fault])
        if fault is Fault.CUT:
            return b""
        if fault is Fault.KILLED:
            self.dead = True
            raise KilledError
        answer = self._carry_out(request)
        if fault is Fault.LOST:
            return b""
        if fault is Fault.KILLED_AFTER:
            self.dead = True
            raise KilledError
        if fault is Fault.FAILED_AFTER:
            return _bytes(request, _error(500, "InternalError"))
        if fault is Fault.REPEATED:
            return _bytes(request, self._carry_out(request))
        middle = len(answer.body) // 2
        if fault is Fault.DAMAGED and answer.body and request.path:
            changed = bytes([answer.body[middle] ^ 1])
            return _bytes(request, Answer(answer.status, answer.headers, _spliced(answer.body, middle, changed)))
        whole = _bytes(request, answer)
        breaks = fault is Fault.TRUNCATED and answer.body and request.method != "HEAD"
        return whole[: len(whole) - len(answer.body) + middle] if breaks else whole

    # The service

    def _carry_out(self, request: Request) -> Answer:
        comp = request.query.get("comp")
        if not request.path:
            return self._list(request)
        blob = self.blobs.get(request.path)
        if request.method == "PUT" and comp == "block":
            self._staged.setdefault(request.path, {})[request.query["blockid"]] = request.body
            return self._answer(201)
        if request.method == "GET" and comp == "blocklist":
            return _not_found() if blob is None else self._answer(200, _block_list(blob))
        if request.method == "PUT":
            return self._write(request, blob, comp == "blocklist")
        if blob is None:
            breaks = request.method == "DELETE" and "if-match" in request.headers  # as Azurite has it
            return _error(412, "ConditionNotMet") if breaks else _not_found()
        if request.headers.get("if-match", blob.etag) != blob.etag:
            return _error(412, "ConditionNotMet")
        if request.method == "DELETE":
            if request.path in self.undeletable:
                return _error(412, "LeaseIdMissing")
            del self.blobs[request.path]
            return self._answer(202)
        return self._read(request, blob)

    def _write(self, request: Request, blob: _Blob | None, of_blocks: bool) -> Answer:
        wanted = request.headers.get("if-match")
        if wanted is not None and (blob is None or blob.etag != wanted):
            return _error(412, "ConditionNotMet")
        if request.headers.get("if-none-match") == "*" and blob is not None:
            return _error(409, "BlobAlreadyExists")
        if of_blocks:
            ids = [part.partition("<")[0] for part in request.body.decode().split("<Latest>")[1:]]
            known = {**self._staged.get(request.path, {})}
            if blob is not None:
                position = 0
                for block_id, length in blob.blocks:
                    known.setdefault(block_id, blob.data[position : position + length])
                    position += length
            if any(block_id not in known for block_id in ids):
                return _error(400, "InvalidBlockList")
            data, md5 = b"".join(known[block_id] for block_id in ids), None
            blocks = [(block_id, len(known[block_id])) for block_id in ids]
        else:
            data, md5, blocks = request.body, hashlib.md5(request.body).digest(), []
            sent = request.headers.get("content-md5")
            if sent is not None and base64.b64decode(sent) != md5:
                return _error(400, "Md5Mismatch")
        self._clock += 1
        made = _Blob(data, f'"0x{self._clock:x}"', self._now(), blocks, md5)
        self.blobs[request.path] = made
        self._staged.pop(request.path, None)
        return self._answer(201, ETag=made.etag, Last_Modified=_date(made.modified))

    def _read(self, request: Request, blob: _Blob) -> Answer:
        headers = {"ETag": blob.etag, "Last_Modified": _date(blob.modified), "x_ms_blob_type": "BlockBlob"}
        stored = None if blob.md5 is None else base64.b64encode(blob.md5).decode()
        wanted = request.headers.get("x-ms-range")
        if wanted is None or request.method == "HEAD":
            if stored is not None:
                headers["Content_MD5"] = stored
            return self._answer(200, blob.data, **headers)
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        part = blob.data[first : last + 1]
        if not part:
            return _error(416, "InvalidRange")
        if stored is not None:
            headers["x_ms_blob_content_md5"] = stored
        headers["Content_Range"] = f"bytes {first}-{first + len(part) - 1}/{len(blob.data)}"
        return self._answer(206, part, **headers)

    def _list(self, request: Request) -> Answer:
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
        entries: dict[str, str] = {}
        for path, blob in sorted(self.blobs.items()):
            if not path.startswith(prefix):
                continue
            above, found, _ = path[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                name = prefix + above + delimiter
                entries[name] = f"<BlobPrefix><Name>{xml.sax.saxutils.escape(name)}</Name></BlobPrefix>"
                continue
            md5 = "" if blob.md5 is None else f"<Content-MD5>{base64.b64encode(blob.md5).decode()}</Content-MD5>"
            entries[path] = (
                f"<Blob><Name>{xml.sax.saxutils.escape(path)}</Name><Properties>"
                f"<Last-Modified>{_date(blob.modified)}</Last-Modified><Etag>{blob.etag[1:-1]}</Etag>"
                f"<Content-Length>{len(blob.data)}</Content-Length>{md5}<BlobType>BlockBlob</BlobType>"
                "</Properties></Blob>"
            )
        text = f"<Blobs>{''.join(entries.values())}</Blobs><NextMarker />"
        body = f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults>{text}</EnumerationResults>'
        return self._answer(200, body.encode(), Content_Type="application/xml")

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return Answer(status, {"Date": _date(self._now()), "x-ms-version": "2025-01-05", **named}, body)

    def _now(self) -> datetime.datetime:
        return _BEGAN + datetime.timedelta(seconds=self._clock)


class _Socket(socket.socket):
    """The client's end of a connection. A real socket, which leads nowhere, for what breaks requests off."""

    def __init__(self, service: MemoryService) -> None:
        super().__init__()
        self._service = service
        self._sent = bytearray()
        self._received = io.BytesIO()

    def sendall(self, data: Any, *_: Any) -> None:
        self._sent += data

    def makefile(self, mode: Any) -> Any:  # type: ignore[override]
        """Called once all of a request was sent, for its answer."""
        sent, self._sent = bytes(self._sent), bytearray()
        self._received = io.BytesIO(self._service.exchange(sent))
        return io.BufferedReader(self._received)

    def recv_into(self, view: Any, size: int = 0, flags: int = 0) -> int:
        return self._received.readinto(view)


def _bytes(request: Request, answer: Answer) -> bytes:
    lines = [f"HTTP/1.1 {answer.status} {http.client.responses[answer.status]}"]
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    lines.append(f"Content-Length: {len(answer.body)}")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head if request.method == "HEAD" else head + answer.body


def _spliced(body: bytes, at: int, part: bytes) -> bytes:
    return body[:at] + part + body[at + len(part) :]


def _error(status: int, code: str) -> Answer:
    body = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
    return Answer(status, {"x-ms-error-code": code, "Content-Type": "application/xml"}, body.encode())


def _not_found() -> Answer:
    return _error(404, "BlobNotFound")


def _block_list(blob: _Blob) -> bytes:
    blocks = "".join(f"<Block><Name>{name}</Name><Size>{size}</Size></Block>" for name, size in blob.blocks)
    text = f"<CommittedBlocks>{blocks}</CommittedBlocks>"
    return f'<?xml version="1.0" encoding="utf-8"?><BlockList>{text}</BlockList>'.encode()


def _date(moment: datetime.datetime) -> str:
    return email.utils.format_datetime(moment, usegmt=True)
