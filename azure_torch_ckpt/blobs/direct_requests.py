"""Put Block, Get Blob and List Blobs over azure-core's pipeline, without the client of azure-storage-blob.

A checkpoint is thousands of the first two, and the client's serializers, hooks and policies take twice as long for one
as everything else that it needs: half a millisecond of the GIL, which all connections wait for. Of a listing, the
client's deserializer takes a second for 5,000 blobs. What these requests send is documented and small. Anything else,
and whatever they are not sure of, goes through the client.
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
"""Names this package in the service's logs."""

_MOST_RESULTS = 5_000  # in one page
# As the client raises them: they are the cause of ours.
_ERRORS: dict[int, type[HttpResponseError]] = {
    403: ClientAuthenticationError,
    404: ResourceNotFoundError,
    409: ResourceExistsError,
    412: ResourceModifiedError,
}


class DirectRequests:
    """All methods return None, and have done nothing, where the caller must ask the client of azure-storage-blob.

    Args:
        api_version: of the service, the one that the client speaks.

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
        """https://learn.microsoft.com/rest/api/storageservices/get-blob. The response has the body, or `dest` has."""
        if moment is not None:
            return None  # a snapshot or a version is read too seldom to be worth a query of our own
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

        With the blobs' metadata, which tell a folder from a blob.
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
            return None  # a span for each call is the client's
        response = self._pipeline.run(request, cancel=cancel, dest=dest).http_response
        if response.status_code == 401:
            return None  # the client may know more
        if response.status_code >= 300:
            map_error(response.status_code, response, _ERRORS)
            raise HttpResponseError(response=response)
        return response


class _Headers(SansIOHTTPPolicy[HttpRequest, HttpResponse]):
    """What every attempt carries."""

    def __init__(self, api_version: str) -> None:
        super().__init__()
        self._api_version = api_version

    def on_request(self, request: PipelineRequest[HttpRequest]) -> None:
        headers = request.http_request.headers
        headers["User-Agent"] = USER_AGENT
        headers["x-ms-version"] = self._api_version
        headers["x-ms-date"] = email.utils.formatdate(usegmt=True)
        headers["x-ms-client-request-id"] = str(uuid.uuid4())
