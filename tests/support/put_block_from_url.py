"""What the service does with Put Block From URL and Azurite answers 501 to: fetch a range of another blob as a block.

    with FromUrlServer(azurite) as server:
        copy(f"{server.endpoint}/a", f"{server.endpoint}/b", credential=KEY)
        assert server.fetched == [(0, 67108864), ...]

It stands in front of the emulator and hands everything else on. The source is fetched by the URL (and with the ETag)
that the request names, so its SAS must be good; the answer has the block's CRC64, as
https://learn.microsoft.com/rest/api/storageservices/put-block-from-url has it.
"""

from __future__ import annotations

import base64
import http.client
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import awscrt.checksums  # type: ignore[import-untyped]
from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob import BlobClient

from azure_torch_ckpt.emulator import Azurite

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


class FromUrlServer:
    """See the module's docstring.

    Attributes:
        fetched: offset and length of every range.
        read: paths of the blobs whose content was asked for.
        tells: whether the answer has the CRC64.
        damage: whether the first byte of every range is changed.
        refuses_empty: whether Copy Blob From URL of an empty blob is refused.
    """

    def __init__(self, azurite: Azurite) -> None:
        self.fetched: list[tuple[int, int]] = []
        self.read: list[str] = []
        self.tells = True
        self.damage = False
        self.refuses_empty = False
        self._azurite = azurite
        upstream = urlsplit(azurite.endpoint)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("x-ms-copy-source") and parse_qs(urlsplit(self.path).query).get("comp") == [
                    "block"
                ]:
                    self.answer(*outer._fetch(self.path, {k.lower(): v for k, v in self.headers.items()}))
                    return
                if self.headers.get("x-ms-copy-source") and outer.refuses_empty:
                    with urllib.request.urlopen(self.headers["x-ms-copy-source"]) as source:
                        if not source.read():
                            self.answer(400, {"x-ms-error-code": "InvalidHeaderValue"}, b"")
                            return
                if self.command == "GET" and "comp=" not in self.path:
                    outer.read.append(self.path)
                headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
                # Not urllib, which writes the names of headers, and so those of metadata, in a case of its own.
                connection = http.client.HTTPConnection(upstream.netloc)
                try:
                    connection.request(self.command, self.path, body if self.command == "PUT" else None, headers)
                    with connection.getresponse() as response:
                        self.answer(response.status, dict(response.headers), response.read())
                finally:
                    connection.close()

            do_GET = do_PUT = do_HEAD = do_DELETE = handle_one

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in _HOP:
                        self.send_header(name, value)
                told = {name.lower(): value for name, value in headers.items()}
                length = told.get("content-length", "0") if self.command == "HEAD" else str(len(body))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}{urlsplit(self._azurite.endpoint).path}"

    def _fetch(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        wanted = {"x-ms-range": headers["x-ms-source-range"], "If-Match": headers["x-ms-source-if-match"]}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(headers["x-ms-copy-source"], headers=wanted)
            ) as response:
                data = bytearray(response.read())
        except urllib.error.HTTPError as error:
            code = "SourceConditionNotMet" if error.code == 412 else "CannotVerifyCopySource"
            return error.code, {"x-ms-error-code": code}, b""
        if self.damage:
            data[0] ^= 1
        first, _, last = headers["x-ms-source-range"].removeprefix("bytes=").partition("-")
        self.fetched.append((int(first), int(last) - int(first) + 1))
        target, container_and_blob = urlsplit(path), urlsplit(path).path.split("/", 3)
        blob = BlobClient(
            self._azurite.endpoint,
            container_and_blob[2],
            unquote(container_and_blob[3]),
            credential=AzureNamedKeyCredential(Azurite.account_name, Azurite.account_key),
        )
        blob.stage_block(base64.b64decode(parse_qs(target.query)["blockid"][0]).decode(), bytes(data))
        crc = awscrt.checksums.crc64nvme(bytes(data)).to_bytes(8, "little")
        return 201, {"x-ms-content-crc64": base64.b64encode(crc).decode()} if self.tells else {}, b""

    def __enter__(self) -> FromUrlServer:
        self._thread = threading.Thread(target=self._server.serve_forever, name="from-url", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
