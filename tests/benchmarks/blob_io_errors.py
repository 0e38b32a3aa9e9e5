"""What `BlobIO` and azstoragetorch's raise and return for the same wrong uses, side by side.

    tox -e bench-blob-io

Where azstoragetorch raises a built-in exception, ours must be caught by the same ``except``. This prints every case
as a table and ends with an error if one differs that `ON_PURPOSE` does not name.
"""

from __future__ import annotations

import array
import builtins
import contextlib
import copy
import gc
import io
import pickle
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import azstoragetorch.io
from azure.storage.blob import BlobClient, ContainerSasPermissions, generate_container_sas

from azure_torch_ckpt import BlobIO
from azure_torch_ckpt.emulator import Azurite

Make = Callable[..., Any]
Url = Callable[[str], str]
Use = Callable[[Make, Url], object]
CONTENT = b"one\ntwo\nthree"


@dataclass(frozen=True)
class Case:
    """A use of one of the two classes.

    Attributes:
        use: gets the class, and a function that makes a URL (with a SAS) of a blob's name.
    """

    name: str
    use: Use


# Where ours is another result, and why.
ON_PURPOSE = {
    "mode 'xb'": "it makes a blob that does not exist",
    "url 1": "an AttributeError there, of something inside",
    "credential 'abc'": "a str is a credential here: an account key, a SAS or a connection string; this one is none",
    "empty: read()": "an error there, of the range that no byte fits into",
    "missing: seek(5)": "asks for nothing here",
    "rb: detach()": "io.BufferedIOBase has it, and io.IOBase has not",
    "wb: detach()": "io.BufferedIOBase has it, and io.IOBase has not",
    "rb: pickle": "the pickle would hold the SAS",
    "rb: copy": "two objects would share connections and a position",
    "wb: exception inside with": "commits nothing",
    "wb: lost without close": "commits nothing",
    "wb: write(array('i', [1]))": "any contiguous buffer",
}


def opening() -> Iterator[Case]:
    for mode in ("r", "w", "a", "ab", "rt", "rb+", "r+b", "br", "xb", "", None, 1):
        yield Case(f"mode {mode!r}", opened("new", mode, "close"))
    for wrong in (1, None, "blob", "https://"):
        yield Case(f"url {wrong!r}", partial(opened_by_url, wrong))
    for credential in (object, 1, "abc", True, b"abc"):
        yield Case(f"credential {credential!r}", partial(opened_with, credential))
    yield Case("credential by position", lambda make, url: make(url("a"), "rb", None))
    yield Case("no mode", lambda make, url: make(url("a")))
    for blob in ("none", "empty"):
        for name, values in (("read", ()), ("readline", ()), ("readlines", ()), ("seek", (0, 2)), ("seek", (5,))):
            yield Case(
                f"{'missing' if blob == 'none' else blob}: {shown(name, values)}", opened(blob, "rb", name, *values)
            )


def reading() -> Iterator[Case]:
    uses: list[tuple[str, tuple[Any, ...]]] = [("write", (b"a",)), ("writelines", ([b"a"],)), ("truncate", (0,))]
    uses += [(name, ()) for name in ("truncate", "fileno", "isatty", "detach", "flush", "readable", "writable",
                                     "seekable", "tell", "__iter__", "__next__")]  # fmt: skip
    uses += [("read", (size,)) for size in (None, -1, -2, 0, 5, 100, True, 2.0, "2", b"2")]
    uses += [("readline", (size,)) for size in (None, -1, -5, 0, 2, 100, 1.5, "2")]
    uses += [("readlines", (hint,)) for hint in (None, -1, 0, 5)]
    uses += [("seek", (offset,)) for offset in (0, 5, 100, -1, 1.0, "0", None)]
    uses += [("seek", place) for place in ((5, 0), (2, 1), (-1, 1), (-2, 2), (5, 2), (-100, 2))]
    uses += [("seek", (0, whence)) for whence in (3, -1, None, "0", 1.0)]
    for name, values in uses:
        yield Case(f"rb: {shown(name, values)}", opened("a", "rb", name, *values))
    yield Case("rb: read beyond the end", lambda make, url: at(make(url("a"), "rb"), 100).read(5))
    yield Case("rb: pickle", lambda make, url: bool(pickle.dumps(make(url("a"), "rb"))))
    yield Case("rb: copy", lambda make, url: bool(copy.copy(make(url("a"), "rb"))))


def writing() -> Iterator[Case]:
    uses: list[tuple[str, tuple[Any, ...]]] = [
        (name, ()) for name in ("read", "readline", "readlines", "__next__", "fileno", "isatty", "truncate", "detach",
                                "flush", "readable", "writable", "seekable", "tell")]  # fmt: skip
    uses += [("seek", (0,)), ("writelines", ([b"a", b"b"],)), ("writelines", (["a"],)), ("writelines", (None,))]
    uses += [
        ("write", (data,)) for data in (b"ab", bytearray(b"ab"), b"", "ab", 1, None, [b"a"], array.array("i", [1]))
    ]
    for name, values in uses:
        yield Case(f"wb: {shown(name, values)}", opened("new", "wb", name, *values))
    yield Case("wb: write(memoryview)", opened("new", "wb", "write", memoryview(b"ab")))


def left() -> Iterator[Case]:
    yield Case("wb: exception inside with", interrupted)
    yield Case("wb: lost without close", lost)


def closed() -> Iterator[Case]:
    uses: list[tuple[str, tuple[Any, ...]]] = [
        (name, ()) for name in ("read", "readline", "readlines", "tell", "readable", "writable", "seekable", "flush",
                                "fileno", "isatty", "truncate", "close", "__enter__", "__iter__", "__next__")
    ]  # fmt: skip
    uses += [("seek", (0,)), ("write", (b"a",)), ("writelines", ([b"a"],))]
    for mode, blob in (("rb", "a"), ("wb", "new")):
        for name, values in uses:
            yield Case(f"closed {mode}: {shown(name, values)}", opened(blob, mode, "close", then=(name, values)))


def opened(blob: str, mode: Any, name: str, *values: Any, then: tuple[str, tuple[Any, ...]] | None = None) -> Use:
    def use(make: Make, url: Url) -> object:
        file = make(url(blob), mode)
        result = getattr(file, name)(*values)
        if then is not None:
            result = getattr(file, then[0])(*then[1])
        return "itself" if result is file else result

    return use


def opened_by_url(wrong: Any, make: Make, url: Url) -> object:
    return make(wrong, "rb").read()


def opened_with(credential: Any, make: Make, url: Url) -> object:
    return make(url("a").partition("?")[0], "rb", credential=credential)


def interrupted(make: Make, url: Url) -> object:
    place = url(uuid.uuid4().hex)
    with contextlib.suppress(RuntimeError), make(place, "wb") as file:
        file.write(b"half")
        raise RuntimeError
    return content_of(place)


def lost(make: Make, url: Url) -> object:
    place = url(uuid.uuid4().hex)
    file = make(place, "wb")
    file.write(b"half")
    del file
    gc.collect()
    return content_of(place)


def content_of(url: str) -> object:
    client = BlobClient.from_blob_url(url)
    return client.download_blob().readall() if client.exists() else "no blob"


def shown(name: str, values: tuple[Any, ...]) -> str:
    return f"{name}({', '.join(map(repr, values))})"


def at(file: Any, offset: int) -> Any:
    file.seek(offset)
    return file


class Nothing(BaseHTTPRequestHandler):
    """A service whose blobs are empty or missing.

    azstoragetorch wants the request's id in every answer, and Azurite leaves it out of those that refuse.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        if self.path.partition("?")[0].endswith("/empty"):
            self._answer(200, {"ETag": '"0x1"', "Last-Modified": "Sat, 31 Jan 2026 12:00:00 GMT"})
        else:
            self._answer(404, {"x-ms-error-code": "BlobNotFound"})

    def do_GET(self) -> None:
        if self.path.partition("?")[0].endswith("/empty"):
            self._answer(416, {"x-ms-error-code": "InvalidRange"})
        else:
            self._answer(404, {"x-ms-error-code": "BlobNotFound"})

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        headers = {**headers, "x-ms-client-request-id": self.headers["x-ms-client-request-id"], "Content-Length": "0"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@dataclass(frozen=True)
class Outcome:
    """The result of a use: a value, or the built-in classes that an ``except`` may name for its error."""

    shown: str
    kinds: frozenset[type[BaseException]] | None


def outcome(case: Case, make: Make, url: Url) -> Outcome:
    try:
        return Outcome(repr(case.use(make, url)), None)
    except Exception as error:
        known = {kind for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind}
        if isinstance(error, io.UnsupportedOperation):
            known.add(io.UnsupportedOperation)
        return Outcome(type(error).__name__, frozenset(known))


def differ(ours: Outcome, theirs: Outcome) -> bool:
    if theirs.kinds is None or ours.kinds is None:
        return ours != theirs
    return not ours.kinds >= theirs.kinds


def main() -> None:
    print("| | azstoragetorch | here |\n|---|---|---|")
    unexpected = []
    nothing = ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    threading.Thread(target=nothing.serve_forever, daemon=True).start()
    with Azurite() as azurite, contextlib.redirect_stderr(io.StringIO()):
        container = azurite.create_container("errors")
        permission = ContainerSasPermissions(read=True, write=True, create=True)
        expiry = datetime.now(timezone.utc) + timedelta(hours=1)
        sas = generate_container_sas(
            azurite.account_name, "errors", account_key=azurite.account_key, permission=permission, expiry=expiry
        )

        def url(name: str) -> str:
            if name in ("none", "empty"):
                return f"http://127.0.0.1:{nothing.server_port}/{azurite.account_name}/errors/{name}?{sas}"
            return f"{container}/{name}?{sas}"

        with BlobIO(url("a"), "wb") as file:
            file.write(CONTENT)
        for case in (*opening(), *reading(), *writing(), *left(), *closed()):
            theirs, ours = (outcome(case, make, url) for make in (azstoragetorch.io.BlobIO, BlobIO))
            print(f"| {case.name} | {theirs.shown} | {ours.shown} |")
            if differ(ours, theirs) != (case.name in ON_PURPOSE):
                unexpected.append(case.name)
    if unexpected:
        sys.exit(f"differ, or do not although ON_PURPOSE says so: {', '.join(unexpected)}")


if __name__ == "__main__":
    main()
