"""Exit codes: what an error means for a script, and what a person is told."""

from __future__ import annotations

import re

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
    "hint",
    "in_words_of_the_command",
    "without_secrets",
]

OK, PROBLEM, USAGE, NOT_FOUND, ACCESS, UNAVAILABLE, EXISTS, FAILED, BUG, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 7, 70, 130

EXIT_CODES = {
    OK: "all is well",
    PROBLEM: "a checkpoint has a problem: verify found damage, diff found differences, the metadata cannot be used",
    USAGE: "the command line, the URL or the credential makes no sense",
    NOT_FOUND: "there is no such checkpoint, container or file",
    ACCESS: "the service or the file system refused access",
    UNAVAILABLE: "the service could not be reached or is too busy, also after retries",
    EXISTS: "something is there already, or was replaced meanwhile",
    FAILED: "anything else that failed: a full disk, a request that the service refused",
    BUG: "an error in this program; please report it",
    INTERRUPTED: "Ctrl-C, or a question was answered with no",
}

# The first that fits counts.
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

_SECRET = re.compile(r"((?:[?&;\s]|^|['\"])(?:sig|AccountKey|SharedAccessSignature)=)[^\s;'\"]+", re.IGNORECASE)


# What the messages of the package say to programmers, and what that is on the command line.
_ARGUMENT = re.compile(r"(?<![\w/?&=.'-])([a-z_]+)=(True|None)?(?=[\s,.;:)]|$)")
_OPTIONS = {
    "ca_file": "--ca-file",
    "credential": "--sas",
    "dst_credential": "--target-sas",
    "b_credential": "--b-sas",
    "format": "--format",
    "grace": "--grace",
    "keep_every": "--keep-every",
    "keep_last": "--keep-last",
    "keys": "--match",
    "older_than": "--older-than",
    "overwrite": "--overwrite",
    "sample": "--sample",
}
# How a program passes a credential; `hint` says where the command takes one from.
_ACCEPTED = re.compile(r" Pass (?:None \(DefaultAzureCredential\)|AzureNamedKeyCredential\().*$", re.DOTALL)
_FUNCTION = re.compile(r"(?<![\w./])(inspect|verify|prune|list_checkpoints|latest)\(\)")
_COMMANDS = {"inspect": "show", "list_checkpoints": "ls"}


def in_words_of_the_command(text: str) -> str:
    """A message of the package in which arguments and functions are options and subcommands."""
    text = text.replace("verify=False", "--no-verify")
    text = _ACCEPTED.sub("", text)
    text = _ARGUMENT.sub(lambda found: _OPTIONS.get(found[1], found[0]), text)
    return _FUNCTION.sub(lambda found: f"azure-torch-ckpt {_COMMANDS.get(found[1], found[1])}", text)


def exit_code(error: BaseException) -> int:
    """What the process ends with after an error; `BUG` for one that nobody meant to raise."""
    for code, kinds in _CODES:
        if isinstance(error, kinds):
            return code
    return BUG


def hint(error: BaseException) -> str | None:
    """What to do about an error, in the terms of the command line; the error itself speaks to programmers."""
    if isinstance(error, (AccessDeniedError, CredentialError)):
        return (
            "a credential comes from, in this order: a SAS in the URL, --sas, AZURE_STORAGE_CONNECTION_STRING, "
            "AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN, a login (az login) or a managed identity"
        )
    if isinstance(error, ServiceUnavailableError) and "ca_file" in str(error):
        return "--ca-file takes the PEM file of an authority of your own"
    if isinstance(error, CheckpointNotFoundError):
        return "azure-torch-ckpt ls URL lists what lies below a URL"
    return None


def without_secrets(text: str) -> str:
    """`text`, in which whatever looks like a signature or a key is ``***``: users' arguments are echoed, too."""
    return _SECRET.sub(r"\1***", text)
