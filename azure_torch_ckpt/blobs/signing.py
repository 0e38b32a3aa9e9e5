"""How a request is signed: a token, a signature with the account's key, or a SAS in its URL.

For the requests of `DirectRequests`; the client of azure-storage-blob signs its own.
"""

from __future__ import annotations

import base64
import hmac
import re
import urllib.parse
from typing import Any

from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential, TokenRequestOptions
from azure.core.pipeline import PipelineRequest, PipelineResponse
from azure.core.pipeline.policies import AzureSasCredentialPolicy, HTTPPolicy, SansIOHTTPPolicy
from azure.core.rest import HttpRequest, HttpResponse

from azure_torch_ckpt._internal.shared_tokens import STORAGE_SCOPE, SharedTokens
from azure_torch_ckpt.credentials import SdkCredential

__all__ = ["signing_policies"]

# https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key#constructing-the-signature-string:
# these are signed by their place, present or not; x-ms-* and the query follow by name.
_SIGNED_HEADERS = (
    "content-encoding",
    "content-language",
    "content-length",
    "content-md5",
    "content-type",
    "date",
    "if-modified-since",
    "if-match",
    "if-none-match",
    "if-unmodified-since",
    "range",
)
# Bearer authorization_uri=https://login.microsoftonline.com/TENANT/oauth2/authorize resource_id=...
_TENANT = re.compile(r"\bauthorization_uri=\"?https://[^/\s\",]+/([A-Za-z0-9.-]+)/")


def signing_policies(credential: SdkCredential) -> list[Any]:
    """The policies of azure-core that sign each attempt of a request; none for anonymous access."""
    if credential is None:
        return []
    if isinstance(credential, AzureNamedKeyCredential):
        return [_SharedKeySigning(credential)]
    if isinstance(credential, AzureSasCredential):
        return [AzureSasCredentialPolicy(credential)]
    return [_TokenSigning(credential)]


class _TokenSigning(HTTPPolicy[HttpRequest, HttpResponse]):
    """Sends a token; one of the account's tenant once the service has named that tenant.

    azure-core's own policy does not answer the service's challenge, and azure-storage-blob's policy forgets the answer
    with its client: https://learn.microsoft.com/rest/api/storageservices/authorize-with-azure-active-directory#bearer-challenge
    """

    def __init__(self, tokens: SharedTokens) -> None:
        super().__init__()
        self._tokens = tokens

    def send(self, request: PipelineRequest[HttpRequest]) -> PipelineResponse[HttpRequest, HttpResponse]:
        response = self._send(request, {})
        if response.http_response.status_code != 401:
            return response
        # Only the tenant is believed, not what the token is valid for: the scope stays.
        named = _TENANT.search(response.http_response.headers.get("WWW-Authenticate", ""))
        if named is None:
            return response
        response = self._send(request, {"tenant_id": named[1]})
        if response.http_response.status_code != 401:
            self._tokens.remember_tenant(named[1])
        return response

    def _send(
        self, request: PipelineRequest[HttpRequest], options: TokenRequestOptions
    ) -> PipelineResponse[HttpRequest, HttpResponse]:
        token = self._tokens.get_token_info(STORAGE_SCOPE, options=options)
        request.http_request.headers["Authorization"] = f"Bearer {token.token}"
        return self.next.send(request)


class _SharedKeySigning(SansIOHTTPPolicy[HttpRequest, HttpResponse]):
    """Signs with the account's key: https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key."""

    def __init__(self, credential: AzureNamedKeyCredential) -> None:
        super().__init__()
        self._credential = credential

    def on_request(self, request: PipelineRequest[HttpRequest]) -> None:
        account, key = self._credential.named_key
        message = _string_to_sign(request.http_request, account)
        signature = base64.b64encode(hmac.digest(base64.b64decode(key), message.encode(), "sha256")).decode()
        request.http_request.headers["Authorization"] = f"SharedKey {account}:{signature}"


def _string_to_sign(request: HttpRequest, account: str) -> str:
    headers = {name.lower(): value for name, value in request.headers.items()}
    lines = [request.method]
    lines += [headers.get(name, "") for name in _SIGNED_HEADERS]
    lines += [f"{name}:{value}" for name, value in sorted(headers.items()) if name.startswith("x-ms-")]
    target = urllib.parse.urlsplit(request.url)
    lines.append(f"/{account}{target.path}")
    lines += [f"{name}:{value}" for name, value in sorted(urllib.parse.parse_qsl(target.query))]
    return "\n".join(lines)
