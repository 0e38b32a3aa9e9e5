"""`DirectRequests`: Put Block, Get Blob and List Blobs over azure-core's pipeline, without azure-storage-blob's client.

A checkpoint needs thousands of the first two. For each, the client's serializers, hooks and policies take half a
millisecond of the GIL, twice the rest of the request, and all connections wait for it. The client's deserializer takes
a second for a listing of 5,000 blobs. These three requests are documented and small. All others go through the client,
and so do these three in cases that are not handled here.
"""

from __future__ import annotations

import base64
import email.utils
import urllib.parse
import uuid

from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceModifiedError,
    ResourceNotFoundError,
    map_error,
)
from azure.core.pipeline import Pipeline, PipelineRequest
from azure.core.pipeline.policies import HttpLoggingPolicy, SansIOHTTPPolicy
from azure.core.rest import HttpRequest, HttpResponse
from azure.core.settings import settings

from azure_torch_ckpt.blobs.signing import signing_policies
from azure_torch_ckpt.credentials import SdkCredential
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.transport.buffers import Cancel, Gather, Scatter
from azure_torch_ckpt.transport.gather_transport import GatherTransport
from azure_torch_ckpt.transport.retry import RetryPolicy

__all__ = ["USER_AGENT", "DirectRequests"]

USER_AGENT = "azure-torch-ckpt"
"""Name of this package in the service's logs."""

_MOST_RESULTS = 5_000  # of one page
# The classes that the client raises: they are the causes of our errors.
_ERRORS: dict[int, type[HttpResponseError]] = {
    403: ClientAuthenticationError,
    404: ResourceNotFoundError,
    409: ResourceExistsError,
    412: ResourceModifiedError,
}


class DirectRequests:
    """Each method returns None, and does nothing, where the caller must use the client of azure-storage-blob instead.

    Args:
        api_version: the version of the service's API that the client uses.

    Raises (all methods): AzureError, as the client does.
    """

    def __init__(
        self, credential: SdkCredential, transport: GatherTransport, retry: RetryPolicy, api_version: str
    ) -> None:
        # Each attempt is signed anew: its headers have the time, and a token may have ended.
        policies = [retry, _Headers(api_version), *signing_policies(credential), HttpLoggingPolicy()]
        self._pipeline: Pipeline[HttpRequest, HttpResponse] = Pipeline(transport, policies)

    def put_block(
        self, url: str, block_id: str, body: Gather, *, headers: dict[str, str], cancel: Cancel | None = None
    ) -> HttpResponse | None:
        """https://learn.microsoft.com/rest/api/storageservices/put-block, with `headers` besides what it needs."""
        encoded = urllib.parse.quote(base64.b64encode(block_id.encode()), safe="")
        sent = {"Content-Length": str(len(body)), "Content-Type": "application/octet-stream", **headers}
        url = f"{url}?comp=block&blockid={encoded}"
        request = HttpRequest("PUT", url, headers=sent, content=body)  # type: ignore[arg-type]
        return self._send(request, cancel)

    def get_range(
        self,
        url: str,
        offset: int,
        length: int,
        *,
        moment: BlobLocation | None = None,
        dest: Scatter | None = None,
        if_etag: str | None = None,
        cancel: Cancel | None = None,
    ) -> HttpResponse | None:
        """https://learn.microsoft.com/rest/api/storageservices/get-blob. The body is in the response or in `dest`."""
        if moment is not None:
            return None  # snapshots and versions are read too seldom to be worth a query here
        sent = {"x-ms-range": f"bytes={offset}-{offset + length - 1}"}
        if if_etag is not None:
            sent["If-Match"] = if_etag
        return self._send(HttpRequest("GET", url, headers=sent), cancel, dest)

    def list_page(
        self,
        url: str,
        prefix: str,
        *,
        delimiter: str | None = None,
        limit: int | None = None,
        marker: str = "",
    ) -> HttpResponse | None:
        """https://learn.microsoft.com/rest/api/storageservices/list-blobs: one page of the container at `url`.

        With the blobs' metadata, which mark folders.
        """
        query = {"restype": "container", "comp": "list", "prefix": prefix, "delimiter": delimiter, "marker": marker}
        query["include"] = "metadata"
        query["maxresults"] = None if limit is None else str(min(limit, _MOST_RESULTS))
        present = {name: value for name, value in query.items() if value}
        return self._send(HttpRequest("GET", f"{url}?{urllib.parse.urlencode(present, quote_via=urllib.parse.quote)}"))

    def _send(
        self, request: HttpRequest, cancel: Cancel | None = None, dest: Scatter | None = None
    ) -> HttpResponse | None:
        if settings.tracing_enabled():
            return None  # the client makes a span for each call
        response = self._pipeline.run(request, cancel=cancel, dest=dest).http_response
        if response.status_code == 401:
            return None  # the client may answer a challenge
        if response.status_code >= 300:
            map_error(response.status_code, response, _ERRORS)
            raise HttpResponseError(response=response)
        return response


class _Headers(SansIOHTTPPolicy[HttpRequest, HttpResponse]):
    """The headers of every attempt."""

    def __init__(self, api_version: str) -> None:
        super().__init__()
        self._api_version = api_version

    def on_request(self, request: PipelineRequest[HttpRequest]) -> None:
        headers = request.http_request.headers
        headers["User-Agent"] = USER_AGENT
        headers["x-ms-version"] = self._api_version
        headers["x-ms-date"] = email.utils.formatdate(usegmt=True)
        headers["x-ms-client-request-id"] = str(uuid.uuid4())
