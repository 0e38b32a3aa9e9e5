"""The SDK's errors as ours: what was tried, where, what the service said, and what to do next."""

from __future__ import annotations

import ssl
from typing import Any

from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

from azure_torch_ckpt.errors import (
    AccessDeniedError,
    BlobChangedError,
    BlobNotFoundError,
    ContainerNotFoundError,
    RequestRefusedError,
    ServiceUnavailableError,
    StoreError,
)
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.retry import DAMAGED, HEALING_STATUS, NOT_SUPPORTED

__all__ = ["translate"]


def translate(error: AzureError, failed: str, location: BlobLocation) -> StoreError:
    """Our error for an error of the SDK.

    Args:
        failed: what could not be done, and where; the message begins with it.
        location: of the container.
    """
    # The base class that the SDK declares lacks the headers that every response has.
    response: Any = error.response if isinstance(error, HttpResponseError) else None
    if response is None:
        result: StoreError
        if isinstance(error, ClientAuthenticationError):
            result = AccessDeniedError(
                f"{failed}: no token or signature could be made ({_first_line(error)}). Log in (az login), give the "
                "machine a managed identity, or pass credential="
            )
        elif isinstance(error.inner_exception, ssl.SSLCertVerificationError):
            result = ServiceUnavailableError(
                f"{failed}: {location.endpoint} does not prove who it is ({_first_line(error)}). Check the URL; if the "
                "certificate is from an authority of your own, pass its PEM file as ca_file="
            )
        else:
            result = ServiceUnavailableError(
                f"{failed}: no answer ({_first_line(error)}). Check that the endpoint {location.endpoint} is right and "
                "can be reached from here"
            )
        return result
    status = int(response.status_code or 0)
    code = response.headers.get("x-ms-error-code") or getattr(error, "error_code", None)
    said = f"{failed}: {status} {code or response.reason}"
    result = _by_status(status, str(code or ""), said, location)
    result.status = status
    result.error_code = None if code is None else str(code)
    return result


def _by_status(status: int, code: str, said: str, location: BlobLocation) -> StoreError:
    if status in (401, 403) or code == "InvalidAuthenticationInfo":  # the latter may come as 400
        return AccessDeniedError(
            f"{said}. Check that the credential is meant for account {location.account!r}, has not expired and allows "
            "this (role Storage Blob Data Contributor, or a SAS with read, write, delete and list), and that the "
            "account's firewall lets this machine in"
        )
    if status == 404:
        if code.startswith("Container") or code == "ResourceNotFound":
            return ContainerNotFoundError(
                f"{said}. Create the container {location.container!r} in account {location.account!r}, or correct the "
                "URL"
            )
        if not code:
            # Whether a blob is there decides what may be deleted, and the service names its reason.
            return RequestRefusedError(f"{said}, without the error code that the service sends: a proxy answered")
        return BlobNotFoundError(said)
    if (status == 409 and code == "BlobAlreadyExists") or (status == 412 and not code.startswith("Lease")):
        return BlobChangedError(said)
    if status in HEALING_STATUS and code != NOT_SUPPORTED:
        return ServiceUnavailableError(f"{said}, also after retries. The service is busy or down; try again later")
    if code in DAMAGED:
        return RequestRefusedError(
            f"{said}, also after retries: what arrived is not what was checksummed. Something on the way damages it, "
            "or the tensors changed while they were being saved; leave them alone until the save has returned"
        )
    return RequestRefusedError(said)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
