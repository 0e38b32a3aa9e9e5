"""What an error becomes: an exit code, a message in terms of the command line without secrets, and a hint."""

from __future__ import annotations

import re

from azure_torch_ckpt import errors

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
    "message_for_people",
    "without_secrets",
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
    (USAGE, (errors.LocationError, errors.CredentialError)),
    (ACCESS, (errors.AccessDeniedError, PermissionError)),
    (
        NOT_FOUND,
        (errors.CheckpointNotFoundError, errors.ContainerNotFoundError, errors.BlobNotFoundError, FileNotFoundError),
    ),
    (
        EXISTS,
        (
            errors.CheckpointExistsError,
            errors.CheckpointReplacedError,
            errors.CommitConflictError,
            errors.BlobChangedError,
            FileExistsError,
        ),
    ),
    (UNAVAILABLE, (errors.ServiceUnavailableError,)),
    (
        PROBLEM,
        (
            errors.CorruptCheckpointError,
            errors.UnsafeMetadataError,
            errors.UnsupportedCheckpointError,
            errors.IncompleteSaveError,
        ),
    ),
    (FAILED, (errors.AzureCheckpointError, OSError)),
)


def exit_code(error: BaseException) -> int:
    """Return the exit code of an error; `BUG` for an error that the package does not raise on purpose."""
    for code, kinds in _CODES:
        if isinstance(error, kinds):
            return code
    return BUG


_SECRET = re.compile(r"((?:[?&;\s]|^|['\"])(?:sig|AccountKey|SharedAccessSignature)=)[^\s;'\"]+", re.IGNORECASE)

# Python arguments in the package's messages, and the options of the command that set them.
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
# How a program passes a credential; `hint` lists where the command takes one from.
_ACCEPTED = re.compile(r" Pass (?:None \(DefaultAzureCredential\)|AzureNamedKeyCredential\().*$", re.DOTALL)
_FUNCTION = re.compile(r"(?<![\w./])(inspect|verify|prune|list_checkpoints|latest)\(\)")
_COMMANDS = {"inspect": "show", "list_checkpoints": "ls"}


def message_for_people(text: str) -> str:
    """Rewrite a message of the package: arguments become options, functions subcommands, and secrets ``***``."""
    text = text.replace("verify=False", "--no-verify")
    text = _ACCEPTED.sub("", text)
    text = _ARGUMENT.sub(lambda found: _OPTIONS.get(found[1], found[0]), text)
    text = _FUNCTION.sub(lambda found: f"azure-torch-ckpt {_COMMANDS.get(found[1], found[1])}", text)
    return without_secrets(text)


def hint(error: BaseException) -> str | None:
    """Return advice about an error in terms of the command line, or None."""
    if isinstance(error, (errors.AccessDeniedError, errors.CredentialError)):
        return (
            "a credential comes from, in this order: a SAS in the URL, --sas, AZURE_STORAGE_CONNECTION_STRING, "
            "AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN, a login (az login) or a managed identity"
        )
    if isinstance(error, errors.ServiceUnavailableError) and "ca_file" in str(error):
        return "--ca-file takes the PEM file of your own certificate authority"
    if isinstance(error, errors.CheckpointNotFoundError):
        return "azure-torch-ckpt ls URL lists the checkpoints below a URL"
    return None


def without_secrets(text: str) -> str:
    """Replace everything that looks like a signature or a key by ``***``. Messages may repeat users' arguments."""
    return _SECRET.sub(r"\1***", text)
