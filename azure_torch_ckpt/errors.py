"""Every error that this package raises on purpose, in one tree.

Each message says what happened, where (never with a secret) and what to do next. All of them survive pickling with
their attributes and their cause, because ``torch.distributed.checkpoint`` carries a rank's error to the other ranks
as a pickle: ``CheckpointException.failures[rank][0]`` is one of these classes on every rank.
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
            # What a reader on another rank needs of it is what it said.
            cause = RuntimeError(f"{type(cause).__name__}: {cause}")
        return _rebuild, (type(self), self.args, dict(self.__dict__), cause)


def _may_travel(error: BaseException) -> bool:
    """Whether an error can be pickled and holds no more than it says.

    An SDK error holds its response and, in that one's request, the SAS or the token.
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
    """The URL does not name a place in Blob Storage."""


class CredentialError(AzureCheckpointError, ValueError):
    """``credential=`` cannot be used: its type, its form, or where it would be sent (a token over plain HTTP)."""


class ConfigurationError(AzureCheckpointError, ValueError):
    """Parts that were put together cannot work together: a callback, a plugin, a strategy, their arguments."""


class UnknownOptionError(ConfigurationError, TypeError):
    """An option that is not known here, and that may change what is meant, so it is not ignored."""


class CredentialTypeError(CredentialError, TypeError):
    """What was given as ``credential=`` is none of the things that it may be."""


class EmulatorError(AzureCheckpointError, RuntimeError):
    """Azurite could not be found, installed or started."""


class LocalFileError(AzureCheckpointError, OSError):
    """A file or folder of this machine could not be read or written."""


class TarShardError(AzureCheckpointError, tarfile.ReadError):
    """A tar file of a dataset is damaged or not complete, or holds what cannot be made a sample."""


class MissingDependencyError(AzureCheckpointError, ImportError):
    """A package that only this feature needs is not installed."""


class StoreError(AzureCheckpointError):
    """A request to Blob Storage failed.

    Attributes:
        status: HTTP status, or None where no response came.
        error_code: the service's ``x-ms-error-code``, or None.
        may_be_done: whether the request may have been carried out all the same: no answer came to one of its attempts,
            or one that leaves it open. False only where it certainly was not.
    """

    status: int | None = None
    error_code: str | None = None
    may_be_done: bool = True


class BlobNotFoundError(StoreError, FileNotFoundError):
    """There is no blob of this name."""


class ContainerNotFoundError(StoreError, FileNotFoundError):
    """The container (or the account) does not exist."""


class AccessDeniedError(StoreError, PermissionError):
    """The service refused the credential (401), or the credential lacks the permission (403)."""


class BlobChangedError(StoreError):
    """A conditional request found the blob in another state: it exists already, or its ETag is another one."""


class BlobExistsError(BlobChangedError, FileExistsError):
    """There is a blob of this name already, and the caller wants a new one."""


class RequestRefusedError(StoreError):
    """The service refused the request, and a retry would not heal it."""


class ServiceUnavailableError(StoreError, ConnectionError):
    """No good answer within the time for retries: dead endpoint, broken connections, TLS failure, busy service."""


class CheckpointError(AzureCheckpointError):
    """A checkpoint could not be written or read."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No complete checkpoint lies at the URL."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """A checkpoint lies at the URL already and the writer was told not to replace it."""


class CommitConflictError(CheckpointError):
    """Another save committed at this URL since this one began. That one's checkpoint stands."""


class CommitUnknownError(CheckpointError, ServiceUnavailableError):
    """A commit or a removal was sent, and whether it was carried out is unknown. Nothing was deleted after it.

    At the URL is what was there before or what was to be there, whole either way.
    """


class IncompleteSaveError(CheckpointError):
    """The ranks' results do not cover the plan; nothing was committed."""


class CorruptCheckpointError(CheckpointError):
    """The stored bytes are not the ones that the metadata describes (missing, short, or another checksum)."""


class CheckpointReplacedError(CheckpointError):
    """The checkpoint was replaced or removed while it was being read."""


class UnsafeMetadataError(CheckpointError):
    """``.metadata`` names something that a checkpoint's metadata has no business with."""


class UnsupportedCheckpointError(CheckpointError):
    """The checkpoint uses a feature or version that this reader does not understand."""
