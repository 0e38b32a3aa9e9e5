"""Messages for people: the package's error messages in terms of the command line, hints, and no secrets."""

from __future__ import annotations

import re

from azure_torch_ckpt.errors import (
    AccessDeniedError,
    CheckpointNotFoundError,
    CredentialError,
    ServiceUnavailableError,
)

__all__ = ["hint", "message_for_people", "without_secrets"]

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
    if isinstance(error, (AccessDeniedError, CredentialError)):
        return (
            "a credential comes from, in this order: a SAS in the URL, --sas, AZURE_STORAGE_CONNECTION_STRING, "
            "AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN, a login (az login) or a managed identity"
        )
    if isinstance(error, ServiceUnavailableError) and "ca_file" in str(error):
        return "--ca-file takes the PEM file of your own certificate authority"
    if isinstance(error, CheckpointNotFoundError):
        return "azure-torch-ckpt ls URL lists the checkpoints below a URL"
    return None


def without_secrets(text: str) -> str:
    """Replace everything that looks like a signature or a key by ``***``. Messages may repeat users' arguments."""
    return _SECRET.sub(r"\1***", text)
