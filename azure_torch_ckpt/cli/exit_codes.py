"""Exit codes of the command, and the exit code of each error."""

from __future__ import annotations

from azure_torch_ckpt.errors import (
    AccessDeniedError,
    AzureCheckpointError,
    BlobChangedError,
    BlobNotFoundError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    CommitConflictError,
    ContainerNotFoundError,
    CorruptCheckpointError,
    CredentialError,
    IncompleteSaveError,
    LocationError,
    ServiceUnavailableError,
    UnsafeMetadataError,
    UnsupportedCheckpointError,
)

__all__ = [
    "ACCESS",
    "BUG",
    "EXISTS",
    "EXIT_CODES",
    "FAILED",
    "INTERRUPTED",
    "NOT_FOUND",
    "OK",
    "PROBLEM",
    "UNAVAILABLE",
    "USAGE",
    "exit_code",
]

OK, PROBLEM, USAGE, NOT_FOUND, ACCESS, UNAVAILABLE, EXISTS, FAILED, BUG, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 7, 70, 130

EXIT_CODES = {
    OK: "all is well",
    PROBLEM: "a checkpoint has a problem: verify found damage, diff found differences, the metadata cannot be used",
    USAGE: "the command line, the URL or the credential is invalid",
    NOT_FOUND: "the checkpoint, container or file does not exist",
    ACCESS: "the service or the file system refused access",
    UNAVAILABLE: "the service could not be reached or is too busy, even after retries",
    EXISTS: "the target exists already, or a checkpoint was replaced meanwhile",
    FAILED: "any other failure: a full disk, a request that the service refused",
    BUG: "an error in this program; please report it",
    INTERRUPTED: "Ctrl-C, or the answer to a question was no",
}

# The first row that fits counts.
_CODES: tuple[tuple[int, tuple[type[BaseException], ...]], ...] = (
    (USAGE, (LocationError, CredentialError)),
    (ACCESS, (AccessDeniedError, PermissionError)),
    (NOT_FOUND, (CheckpointNotFoundError, ContainerNotFoundError, BlobNotFoundError, FileNotFoundError)),
    (
        EXISTS,
        (CheckpointExistsError, CheckpointReplacedError, CommitConflictError, BlobChangedError, FileExistsError),
    ),
    (UNAVAILABLE, (ServiceUnavailableError,)),
    (PROBLEM, (CorruptCheckpointError, UnsafeMetadataError, UnsupportedCheckpointError, IncompleteSaveError)),
    (FAILED, (AzureCheckpointError, OSError)),
)


def exit_code(error: BaseException) -> int:
    """Return the exit code of an error; `BUG` for an error that the package does not raise on purpose."""
    for code, kinds in _CODES:
        if isinstance(error, kinds):
            return code
    return BUG
