"""Options that callers of fsspec pass to any filesystem: those that mean nothing here, and all others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from azure_torch_ckpt.errors import UnknownOptionError

__all__ = ["MEANT_ELSEWHERE", "refuse_unknown", "without_hints"]

# Of caches, buffers and event loops. Whatever their values, what is read, written or found is the same.
_HINTS: Final = frozenset(
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
# What users of other filesystems look for.
_INSTEAD: Final = {
    "account_name": "The account is a part of the path: azblob://ACCOUNT/CONTAINER/NAME",
    "account_host": "Pass endpoint=",
    "client_id": "Pass credential=, an object of azure-identity",
    "client_secret": "Pass credential=ClientSecretCredential(...)",
    "content_settings": "Pass content_type=",
    "overwrite": "Pass mode='create' to leave a blob alone that is there",
    "tenant_id": "Pass credential=, an object of azure-identity",
    "timeout": "Pass options=TransferOptions(retry_seconds=...)",
    "version_id": "BlobIO reads a version by its URL",
}
MEANT_ELSEWHERE: Final = frozenset(_INSTEAD)
"""Options that mean something in other filesystems of Azure's storage."""


def without_hints(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that mean something, or that nobody here knows."""
    return {name: value for name, value in options.items() if name not in _HINTS}


def refuse_unknown(what: str, options: Iterable[str]) -> None:
    """Refuse all options but those that mean nothing here: what they ask for would not be done.

    Args:
        what: takes the options, for the message.

    Raises:
        UnknownOptionError: there is such an option.
    """
    unknown = sorted(set(options) - _HINTS)
    if unknown:
        instead = "".join(f". {_INSTEAD[name]}" for name in unknown if name in _INSTEAD)
        named = ", ".join(f"{name}=" for name in unknown)
        raise UnknownOptionError(f"{what} does not know {named} and would not do what it asks for{instead}")
