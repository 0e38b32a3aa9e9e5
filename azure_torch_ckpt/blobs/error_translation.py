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
from azure_torch_ckpt.transport.retry import COPY_SOURCE, DAMAGED, NOT_SUPPORTED, PASSING_STATUS, error_code

__all__ = ["translate"]


_OLD_EMULATOR = (
    "The emulator does not know this. For the CRC64 of blocks take Azurite 3.37 or newer, or pass "
    "options=TransferOptions(checksums=False)"
)
# What to do about a code of https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes, by how it
# begins. None of these heals soon enough for a retry.
_ADVICE = {
    "Lease": "Somebody holds a lease on it. Wait until the lease ends, or break it (az storage blob lease break)",
    "BlobImmutable": (
        "An immutability policy or a legal hold protects it. Write to another name, or wait until the policy ends or "
        "an administrator lifts it"
    ),
    "BlobArchived": (
        "It is in the archive tier. Move it to an online tier (az storage blob set-tier --tier Hot), which takes "
        "hours, and try again"
    ),
    "BlobBeingRehydrated": "It is on its way out of the archive tier, which takes hours. Try again later",
    "BlobUsesCustomerSpecifiedEncryption": (
        "It is encrypted with a key that each request must bring, which this package does not do. Store it again "
        "without (an encryption scope or a customer-managed key of the account works)"
    ),
    "BlobOperationNotSupported": (
        "The blob was made over the account's dfs endpoint, or is of a kind that does not allow this. Delete it first, "
        "or take another name"
    ),
    "InvalidBlobType": (
        "There is an append blob or a page blob of this name, and this works with block blobs only. Delete it first, "
        "or take another name"
    ),
    "DirectoryIsNotEmpty": "It is a directory of a hierarchical namespace. Delete what lies in it first",
    "OperationNotSupportedOnDirectory": "It is a directory of a hierarchical namespace. Take the name of a blob",
    "SnapshotsPresent": "It has snapshots. Delete those first",
    "PendingCopyOperation": "A copy to it is under way. Wait until that is done, or abort it",
    "InvalidBlobOrBlock": (
        "Blocks of another length of ids are staged there, by another program. They vanish after a week; delete the "
        "blob, or take another name"
    ),
    "InvalidBlockList": "Blocks of this write are gone: somebody else wrote the blob meanwhile. Write it again",
    "ContainerBeingDeleted": (
        "The container was deleted a moment ago, which takes the service half a minute or more. Create it after that, "
        "or take another one"
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
    """Our error for an error of the SDK.

    Args:
        failed: what could not be done, and where; the message begins with it.
        location: of the container.
        anonymous: whether requests carry no credential.
        note: what an `AccessDeniedError` adds: `azure_torch_ckpt.credentials.environment_note`.
    """
    # The base class that the SDK declares lacks the headers that every response has.
    response: Any = error.response if isinstance(error, HttpResponseError) else None
    if response is None:
        return _unanswered(error, failed, location, note)
    status = int(response.status_code or 0)
    code = error_code(response)
    said = f"{failed}: {status} {code or response.reason}"
    result = _by_status(status, code or "", said, location, anonymous, note)
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
            f"{failed}: {location.endpoint} does not prove who it is ({_first_line(error)}). Check the URL; if the "
            "certificate is from an authority of your own, pass its PEM file as ca_file="
        )
    return ServiceUnavailableError(
        f"{failed}: no answer ({_first_line(error)}). Check that the endpoint {location.endpoint} is right and "
        "can be reached from here"
    )


def _by_status(status: int, code: str, said: str, location: BlobLocation, anonymous: bool, note: str) -> StoreError:
    if code == COPY_SOURCE and status != 412:  # its status is what the source answered to the service, not to us
        return RequestRefusedError(f"{said}. {_ADVICE[code]}")
    if status in (401, 403) or code in ("InvalidAuthenticationInfo", "PublicAccessNotPermitted"):  # 400 and 409
        return AccessDeniedError(f"{said}. {_access_advice(code, location, anonymous)}{note}")
    if status == 404:
        if not code:
            # Whether a blob is there decides what may be deleted, and the service names its reason.
            return RequestRefusedError(f"{said}, without the error code that the service sends: a proxy answered")
        return _not_there(code, said, location, anonymous)
    if (status == 409 and code == "BlobAlreadyExists") or (status == 412 and not code.startswith("Lease")):
        return BlobChangedError(said)
    if status in PASSING_STATUS and code != NOT_SUPPORTED:
        return ServiceUnavailableError(f"{said}, also after retries. The service is busy or down; try again later")
    if code in DAMAGED:
        return RequestRefusedError(
            f"{said}, also after retries: what arrived is not what was checksummed. Something on the way damages it, "
            "or the tensors changed while they were being saved; leave them alone until the save has returned"
        )
    advice = next((advice for start, advice in _ADVICE.items() if code.startswith(start)), None)
    if not code:
        advice = "The answer does not say why. Check the URL, and what stands between this machine and the service"
    return RequestRefusedError(said if advice is None else f"{said}. {advice}")


def _access_advice(code: str, location: BlobLocation, anonymous: bool) -> str:
    if anonymous or code == "PublicAccessNotPermitted":
        return f"The account {location.account!r} wants to know who asks. Pass a credential= instead of False"
    if code == "KeyBasedAuthenticationNotPermitted":
        return f"The account {location.account!r} takes no keys, nor a SAS made with one. Log in (az login), pass None"
    return (
        f"Check that the credential is meant for account {location.account!r}, has not expired and allows this (role "
        "Storage Blob Data Contributor, or a SAS with read, write, delete and list), and that the account's firewall "
        "lets this machine in"
    )


def _not_there(code: str, said: str, location: BlobLocation, anonymous: bool) -> StoreError:
    # A container that is not public looks to a stranger as if it were not there.
    hint = ", or pass a credential= instead of False: a private container answers so as well" if anonymous else ""
    if code.startswith("Container") or code == "ResourceNotFound":
        return ContainerNotFoundError(
            f"{said}. Create the container {location.container!r} in account {location.account!r}, or correct the "
            f"URL{hint}"
        )
    return BlobNotFoundError(said)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
