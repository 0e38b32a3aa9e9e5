"""The options that callers of fsspec pass to any filesystem: which are ignored here, and which are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from azure_torch_ckpt.errors import UnknownOptionError

__all__ = ["MEANT_ELSEWHERE", "check_choice", "refuse_unknown", "without_ignored"]

# Options of caches, buffers and event loops. Their values change nothing about what is read, written or found.
_IGNORED: Final = frozenset(
    {
        "asynchronous",
        "auto_mkdir",
        "batch_size",
        "block_size",
        "blocksize",
        "cache_options",
        "cache_type",
        "default_block_size",
        "default_cache",
        "default_cache_type",
        "default_fill_cache",
        "fill_cache",
        "invalidate_cache",
        "listings_expiry_time",
        "loop",
        "max_concurrency",
        "max_gap",
        "max_paths",
        "refresh",
        "size",
        "skip_instance_cache",
        "trim",
        "use_listings_cache",
    }
)
# What to use in place of options that other filesystems have.
_INSTEAD: Final = {
    "account_name": "The account is a part of the path: azblob://ACCOUNT/CONTAINER/NAME",
    "account_host": "Pass endpoint=",
    "client_id": "Pass credential=, an object of azure-identity",
    "client_secret": "Pass credential=ClientSecretCredential(...)",
    "content_settings": "Pass content_type=",
    "overwrite": "Pass mode='create' to keep an existing blob",
    "tenant_id": "Pass credential=, an object of azure-identity",
    "timeout": "Pass options=TransferOptions(retry_seconds=...)",
    "version_id": "BlobIO reads a version by its URL",
}
MEANT_ELSEWHERE: Final = frozenset(_INSTEAD)
"""Options that have a meaning in other filesystems for Azure Storage."""


def without_ignored(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options without those that are ignored here."""
    return {name: value for name, value in options.items() if name not in _IGNORED}


def refuse_unknown(what: str, options: Iterable[str]) -> None:
    """Raise `UnknownOptionError` for all options but the ignored ones, because they would have no effect.

    `what` is the name of the method or class that got the options.
    """
    unknown = sorted(set(options) - _IGNORED)
    if unknown:
        instead = "".join(f". {_INSTEAD[name]}" for name in unknown if name in _INSTEAD)
        named = ", ".join(f"{name}=" for name in unknown)
        raise UnknownOptionError(f"{what} does not know {named}, so it would have no effect{instead}")


def check_choice(name: str, value: str | None, *allowed: str | None) -> None:
    """Raise `ValueError` if the value of an option is not one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}= must be one of {', '.join(map(repr, allowed))}, not {value!r}")
