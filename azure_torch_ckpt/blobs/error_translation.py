"""`translate`: an error of the SDK becomes one of this package: what failed, where, the service's answer, and
advice."""

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
from azure_torch_ckpt.transport.retry import COPY_SOURCE, DAMAGED, NOT_SUPPORTED, PASSING_STATUS, error_code

__all__ = ["translate"]


_OLD_EMULATOR = (
    "The emulator does not support this. For the CRC64 of blocks use Azurite 3.37 or newer, or pass "
    "options=TransferOptions(checksums=False)"
)
# What to do about a code of https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes, by its
# beginning. None of these conditions ends soon enough for a retry.
_ADVICE = {
    "Lease": "A lease protects it. Wait until the lease ends, or break it (az storage blob lease break)",
    "BlobImmutable": (
        "An immutability policy or a legal hold protects it. Write to another name, or wait until the policy ends or "
        "an administrator lifts it"
    ),
    "BlobArchived": (
        "It is in the archive tier. Move it to an online tier (az storage blob set-tier --tier Hot), which takes "
        "hours, and try again"
    ),
    "BlobBeingRehydrated": "It is being moved out of the archive tier, which takes hours. Try again later",
    "BlobUsesCustomerSpecifiedEncryption": (
        "It is encrypted with a key that each request must send, which this package does not support. Store it again "
        "without that (an encryption scope or a customer-managed key of the account works)"
    ),
    "BlobOperationNotSupported": (
        "The blob was made over the account's dfs endpoint, or is of a kind that does not allow this. Delete it first, "
        "or use another name"
    ),
    "InvalidBlobType": (
        "An append blob or a page blob has this name, and this works with block blobs only. Delete it first, or use "
        "another name"
    ),
    "DirectoryIsNotEmpty": "It is a directory of a hierarchical namespace. Delete its content first",
    "OperationNotSupportedOnDirectory": "It is a directory of a hierarchical namespace. Use the name of a blob",
    "SnapshotsPresent": "It has snapshots. Delete those first",
    "PendingCopyOperation": "A copy to it is in progress. Wait for its end, or abort it",
    "InvalidBlobOrBlock": (
        "Another program has staged blocks there whose ids have another length. The service removes them after a week; "
        "delete the blob, or use another name"
    ),
    "InvalidBlockList": "Blocks of this write are gone: another writer wrote the blob meanwhile. Write it again",
    "ContainerBeingDeleted": (
        "The container was deleted a moment ago, which takes the service half a minute or more. Create it after that, "
        "or use another one"
    ),
    NOT_SUPPORTED: _OLD_EMULATOR,
    "APINotImplemented": _OLD_EMULATOR,
    "InvalidResourceName": "Correct the container's name: 3 to 63 lower-case letters, digits and single hyphens",
    "InvalidRange": "The blob is shorter than expected",
    COPY_SOURCE: (
        "The service cannot read the source: it may be private, behind a firewall or a private link, or busy. Give the "
        "source a credential that the service can use (a SAS), or copy the data through this machine"
    ),
}


def translate(
    error: AzureError, failed: str, location: BlobLocation, *, anonymous: bool = False, note: str = ""
) -> StoreError:
    """Return this package's error for an error of the SDK.

    Args:
        failed: the beginning of the message: what could not be done, and where.
        location: of the container.
        anonymous: whether requests carry no credential.
        note: what an `AccessDeniedError` adds: `azure_torch_ckpt.credentials.environment_note`.
    """
    # The base class that the SDK declares lacks `headers`, which every response has.
    response: Any = error.response if isinstance(error, HttpResponseError) else None
    if response is None:
        return _unanswered(error, failed, location, note)
    status = int(response.status_code or 0)
    code = error_code(response)
    failure = f"{failed}: {status} {code or response.reason}"
    result = _by_status(status, code or "", failure, location, anonymous, note)
    result.status = status
    result.error_code = code
    return result


def _unanswered(error: AzureError, failed: str, location: BlobLocation, note: str) -> StoreError:
    if isinstance(error, ClientAuthenticationError):
        return AccessDeniedError(
            f"{failed}: no token or signature could be made ({_first_line(error)}). Log in (az login), give the "
            f"machine a managed identity, or pass credential={note}"
        )
    if isinstance(error.inner_exception, ssl.SSLCertVerificationError):
        return ServiceUnavailableError(
            f"{failed}: {location.endpoint} has no trusted certificate ({_first_line(error)}). Check the URL; if the "
            "certificate is from an authority of your own, pass its PEM file as ca_file="
        )
    return ServiceUnavailableError(
        f"{failed}: no answer ({_first_line(error)}). Check that the endpoint {location.endpoint} is right and "
        "can be reached from here"
    )


def _by_status(status: int, code: str, failure: str, location: BlobLocation, anonymous: bool, note: str) -> StoreError:
    if code == COPY_SOURCE and status != 412:  # its status is the source's answer to the service
        return RequestRefusedError(f"{failure}. {_ADVICE[code]}")
    if status in (401, 403) or code in ("InvalidAuthenticationInfo", "PublicAccessNotPermitted"):  # 400 and 409
        return AccessDeniedError(f"{failure}. {_access_advice(code, location, anonymous)}{note}")
    if status == 404:
        if not code:
            # Whether a blob exists decides what may be deleted, and the service always sends a code.
            return RequestRefusedError(f"{failure}, without the error code that the service sends: a proxy answered")
        return _not_there(code, failure, location, anonymous)
    if (status == 409 and code == "BlobAlreadyExists") or (status == 412 and not code.startswith("Lease")):
        return BlobChangedError(failure)
    if status in PASSING_STATUS and code != NOT_SUPPORTED:
        return ServiceUnavailableError(f"{failure}, also after retries. The service is busy or down; try again later")
    if code in DAMAGED:
        return RequestRefusedError(
            f"{failure}, also after retries: the bytes that arrived do not have the checksum of the bytes that were "
            "sent. The network damages them, or the tensors changed while they were saved; leave them alone until the "
            "save has returned"
        )
    advice = next((advice for start, advice in _ADVICE.items() if code.startswith(start)), None)
    if not code:
        advice = "The answer does not say why. Check the URL, and the proxies between this machine and the service"
    return RequestRefusedError(failure if advice is None else f"{failure}. {advice}")


def _access_advice(code: str, location: BlobLocation, anonymous: bool) -> str:
    if anonymous or code == "PublicAccessNotPermitted":
        return f"The account {location.account!r} allows no anonymous access. Pass a credential= instead of False"
    if code == "KeyBasedAuthenticationNotPermitted":
        return (
            f"The account {location.account!r} accepts no keys, nor a SAS made with one. Log in (az login), pass None"
        )
    return (
        f"Check that the credential is meant for account {location.account!r}, has not expired and allows this (role "
        "Storage Blob Data Contributor, or a SAS with read, write, delete and list), and that the account's firewall "
        "admits this machine"
    )


def _not_there(code: str, failure: str, location: BlobLocation, anonymous: bool) -> StoreError:
    # The service answers an anonymous request for a private container as if it did not exist.
    hint = ", or pass a credential= instead of False: a private container gives the same answer" if anonymous else ""
    if code.startswith("Container") or code == "ResourceNotFound":
        return ContainerNotFoundError(
            f"{failure}. Create the container {location.container!r} in account {location.account!r}, or correct the "
            f"URL{hint}"
        )
    return BlobNotFoundError(failure)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
