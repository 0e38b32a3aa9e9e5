"""Put Block From URL, to which Azurite answers 501: the service fetches a range of another blob as a block.

    with FromUrlServer(azurite) as server:
        copy(f"{server.endpoint}/a", f"{server.endpoint}/b", credential=KEY)
        assert server.fetched == [(0, 67108864), ...]

It forwards everything else to the emulator. It fetches the source by the URL (and with the ETag) that the request
names, so the SAS in it must be valid. The answer has the block's CRC64, as documented in
https://learn.microsoft.com/rest/api/storageservices/put-block-from-url.
"""

from __future__ import annotations

import base64
import urllib.error
import urllib.request
from urllib.parse import parse_qs, unquote, urlsplit

import awscrt.checksums  # type: ignore[import-untyped]
from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob import BlobClient

from azure_torch_ckpt.emulator import Azurite
from tests.support.forwarding import ForwardingHandler, ForwardingServer, Response


class FromUrlServer(ForwardingServer):
    """See the module's docstring.

    Attributes:
        fetched: offset and length of every range.
        read: paths of the blobs whose content was asked for.
        tells: whether the answer has the CRC64.
        damage: whether the first byte of every range is changed.
        refuses_empty: whether Copy Blob From URL of an empty blob is refused.
    """

    def __init__(self, azurite: Azurite) -> None:
        super().__init__(azurite.endpoint, _Handler)
        self.fetched: list[tuple[int, int]] = []
        self.read: list[str] = []
        self.tells = True
        self.damage = False
        self.refuses_empty = False

    def fetch(self, path: str, headers: dict[str, str]) -> Response:
        """Put Block From URL: fetch the range that the headers name, stage it as the block that the path names."""
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
            self.upstream,
            container_and_blob[2],
            unquote(container_and_blob[3]),
            credential=AzureNamedKeyCredential(Azurite.account_name, Azurite.account_key),
        )
        blob.stage_block(base64.b64decode(parse_qs(target.query)["blockid"][0]).decode(), bytes(data))
        crc = awscrt.checksums.crc64nvme(bytes(data)).to_bytes(8, "little")
        return 201, {"x-ms-content-crc64": base64.b64encode(crc).decode()} if self.tells else {}, b""


class _Handler(ForwardingHandler):
    double: FromUrlServer

    def respond(self, body: bytes) -> Response:
        source = self.headers.get("x-ms-copy-source")
        if source and parse_qs(urlsplit(self.path).query).get("comp") == ["block"]:
            return self.double.fetch(self.path, {name.lower(): value for name, value in self.headers.items()})
        if source and self.double.refuses_empty:
            with urllib.request.urlopen(source) as content:
                if not content.read():
                    return 400, {"x-ms-error-code": "InvalidHeaderValue"}, b""
        if self.command == "GET" and "comp=" not in self.path:
            self.double.read.append(self.path)
        return self.forward(self.path, body)
