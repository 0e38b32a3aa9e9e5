"""Every error that this package raises on purpose, in one tree.

Each message says what happened, where (never with a secret) and what to do next. All errors survive pickling with their
attributes and their cause, because ``torch.distributed.checkpoint`` sends a rank's error to the other ranks as a
pickle: ``CheckpointException.failures[rank][0]`` is one of these classes on every rank.
"""

from __future__ import annotations

import pickle
import tarfile
from typing import Any

__all__ = [
    "AccessDeniedError",
    "AzureCheckpointError",
    "BlobChangedError",
    "BlobExistsError",
    "BlobNotFoundError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "CheckpointReplacedError",
    "CommitConflictError",
    "CommitUnknownError",
    "ConfigurationError",
    "ContainerNotFoundError",
    "CorruptCheckpointError",
    "CredentialError",
    "CredentialTypeError",
    "EmulatorError",
    "IncompleteSaveError",
    "LocalFileError",
    "LocationError",
    "MissingDependencyError",
    "RequestRefusedError",
    "ServiceUnavailableError",
    "StoreError",
    "TarShardError",
    "UnknownOptionError",
    "UnsafeMetadataError",
    "UnsupportedCheckpointError",
]


class AzureCheckpointError(Exception):
    """Base of all errors of this package."""

    def __reduce__(self) -> tuple[Any, ...]:
        cause = self.__cause__
        if cause is not None and not _may_travel(cause):
            # On another rank, its type and its message suffice.
            cause = RuntimeError(f"{type(cause).__name__}: {cause}")
        return _rebuild, (type(self), self.args, dict(self.__dict__), cause)


def _may_travel(error: BaseException) -> bool:
    """Whether an error can be pickled and holds nothing but its message.

    An SDK error holds its response, and the response holds its request with the SAS or the token.
    """
    if not isinstance(error, AzureCheckpointError) and type(error).__module__ != "builtins":
        return False
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def _rebuild(
    cls: type[AzureCheckpointError], args: tuple[Any, ...], state: dict[str, Any], cause: BaseException | None
) -> AzureCheckpointError:
    error = cls(*args)
    error.__dict__.update(state)
    error.__cause__ = cause
    return error


class LocationError(AzureCheckpointError, ValueError):
    """The URL does not name a location in Blob Storage."""


class CredentialError(AzureCheckpointError, ValueError):
    """``credential=`` cannot be used: its type or form is wrong, or a token would be sent over plain HTTP."""


class ConfigurationError(AzureCheckpointError, ValueError):
    """Components cannot work together: a callback, a plugin, a strategy, their arguments."""


class UnknownOptionError(ConfigurationError, TypeError):
    """An unknown option. It may change the meaning of the call, so it is not ignored."""


class CredentialTypeError(CredentialError, TypeError):
    """The argument ``credential=`` has an unsupported type."""


class EmulatorError(AzureCheckpointError, RuntimeError):
    """Azurite could not be found, installed or started."""


class LocalFileError(AzureCheckpointError, OSError):
    """A file or folder of this machine could not be read or written."""


class TarShardError(AzureCheckpointError, tarfile.ReadError):
    """A tar file of a dataset is damaged or incomplete, or has a member that cannot become a sample."""


class MissingDependencyError(AzureCheckpointError, ImportError):
    """A package that this feature needs is not installed."""


class StoreError(AzureCheckpointError):
    """A request to Blob Storage failed.

    Attributes:
        status: HTTP status; None without a response.
        error_code: the service's ``x-ms-error-code``, or None.
        may_be_done: whether the request may have been carried out nevertheless, because an attempt had no answer, or
            one that leaves it open. False only if it certainly was not carried out.
    """

    status: int | None = None
    error_code: str | None = None
    may_be_done: bool = True


class BlobNotFoundError(StoreError, FileNotFoundError):
    """The blob does not exist."""


class ContainerNotFoundError(StoreError, FileNotFoundError):
    """The container (or the account) does not exist."""


class AccessDeniedError(StoreError, PermissionError):
    """The service refused the credential (401), or the credential lacks the permission (403)."""


class BlobChangedError(StoreError):
    """A conditional request found the blob in another state: it exists already, or it has another ETag."""


class BlobExistsError(BlobChangedError, FileExistsError):
    """The blob exists already, and the caller wants to make a new one."""


class RequestRefusedError(StoreError):
    """The service refused the request, and a retry would not help."""


class ServiceUnavailableError(StoreError, ConnectionError):
    """No successful answer within the time for retries: dead endpoint, broken connections, TLS failure, busy
    service."""


class CheckpointError(AzureCheckpointError):
    """A checkpoint could not be written or read."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The URL has no complete checkpoint."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """The URL has a checkpoint already, and the writer may not replace it."""


class CommitConflictError(CheckpointError):
    """Another save committed at this URL since this one began. The other save's checkpoint is at the URL."""


class CommitUnknownError(CheckpointError, ServiceUnavailableError):
    """A commit or a removal was sent, and whether it was carried out is unknown. Nothing was deleted after it.

    The old state or the new one is at the URL, complete in either case.
    """


class IncompleteSaveError(CheckpointError):
    """The ranks' results do not cover the plan; nothing was committed."""


class CorruptCheckpointError(CheckpointError):
    """The stored bytes differ from the metadata's description: missing, too short, or with another checksum."""


class CheckpointReplacedError(CheckpointError):
    """The checkpoint was replaced or removed while it was being read."""


class UnsafeMetadataError(CheckpointError):
    """``.metadata`` names something that does not belong in a checkpoint's metadata."""


class UnsupportedCheckpointError(CheckpointError):
    """The checkpoint uses a feature or version that this reader does not understand."""
