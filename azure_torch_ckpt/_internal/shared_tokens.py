"""`SharedTokens`: the tokens of one credential, fetched once for all clients and threads of a process."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final, TypeAlias, cast

from azure.core.credentials import AccessToken, AccessTokenInfo, TokenCredential, TokenRequestOptions

from azure_torch_ckpt.errors import CredentialError

__all__ = ["STORAGE_SCOPE", "SharedTokens", "TokenCache", "default_tokens", "shared_tokens"]

_logger = logging.getLogger(__name__)

STORAGE_SCOPE: Final = "https://storage.azure.com/.default"
"""The scope of every account in any cloud:
https://learn.microsoft.com/azure/storage/blobs/authorize-access-azure-active-directory"""

# azure-core's own policy begins to ask for a new token 5 to 4 minutes before the old one ends. Here it is the longer
# of the two, so that a policy that asks never gets back the token that it wants to replace.
_REFRESH_BEFORE_EXPIRY_S: Final = 300.0
# A managed identity may return its cached token until shortly before the end; asking it for every request is useless.
_ASK_AGAIN_AFTER_S: Final = 30.0


class SharedTokens:
    """A ``TokenCredential`` whose tokens are fetched once for all clients and threads that share it.

    Clients of the SDK keep their tokens for themselves, and a writer has many of them: without this, each would run
    ``az account get-access-token`` or ask the metadata service, all at the same moment.

    A token is replaced when its ``refresh_on`` has come, or five minutes before its end. One thread fetches; the others
    use the old token while it is valid, and wait otherwise. If the fetch fails, a valid old token stays in use; without
    one, every thread that waited gets the error of this one fetch.

    Args:
        endpoint: of the account, whose tenant may differ from the credential's: `remember_tenant`.

    Attributes:
        cache: the tokens; the same object for every account that is reached with the same credential.
    """

    def __init__(self, credential: TokenCredential, cache: TokenCache, endpoint: str) -> None:
        self._credential = credential
        self.cache = cache
        self._endpoint = endpoint

    def at(self, endpoint: str) -> SharedTokens:
        """The same tokens for another account."""
        return SharedTokens(self._credential, self.cache, endpoint)

    def remember_tenant(self, tenant: str) -> None:
        """Fetch this account's tokens from its own tenant from now on; the service has named it."""
        self.cache.tenants[self._endpoint] = tenant

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._credential).__name__})"

    def __reduce__(self) -> tuple[Any, ...]:
        return shared_tokens, (self._credential, self._endpoint)  # tokens stay in their process

    def get_token(
        self,
        *scopes: str,
        claims: str | None = None,
        tenant_id: str | None = None,
        enable_cae: bool = False,
        **_kwargs: Any,
    ) -> AccessToken:
        """azure-core's ``TokenCredential`` protocol. Raises whatever the credential raises."""
        given = {"claims": claims, "tenant_id": tenant_id, "enable_cae": enable_cae}
        options = {name: value for name, value in given.items() if value}
        info = self.get_token_info(*scopes, options=cast(TokenRequestOptions, options))
        return AccessToken(info.token, info.expires_on)

    def get_token_info(self, *scopes: str, options: TokenRequestOptions | None = None) -> AccessTokenInfo:
        """azure-core's ``SupportsTokenInfo`` protocol, which its policies prefer where a credential has it."""
        options = options or TokenRequestOptions()
        if "tenant_id" not in options and self._endpoint in self.cache.tenants:
            options = {**options, "tenant_id": self.cache.tenants[self._endpoint]}
        key = (scopes, tuple(sorted((name, str(value)) for name, value in options.items())))

        def fetch() -> AccessTokenInfo:
            credential: Any = self._credential
            if hasattr(credential, "get_token_info"):
                return cast(AccessTokenInfo, credential.get_token_info(*scopes, options=options))
            token: AccessToken = credential.get_token(*scopes, **options)
            return AccessTokenInfo(token.token, int(token.expires_on))

        return self.cache.token(key, fetch)


_TokenKey: TypeAlias = "tuple[tuple[str, ...], tuple[tuple[str, str], ...]]"


class _CachedToken:
    """The token for one scope and set of options. ``lock`` is held while one is fetched."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.fetches = 0
        self.fetched_at = 0.0
        self.token: AccessTokenInfo | None = None
        self.error: Exception | None = None

    def valid(self) -> AccessTokenInfo | None:
        return self.token if self.token is not None and self.token.expires_on > time.time() else None

    def due(self) -> bool:
        if self.token is None:
            return True
        now = time.time()
        refresh_at = self.token.refresh_on or self.token.expires_on - _REFRESH_BEFORE_EXPIRY_S
        # A clock that was set back must not stop the refreshing, hence abs.
        return self.token.expires_on <= now or (refresh_at <= now and abs(now - self.fetched_at) >= _ASK_AGAIN_AFTER_S)


class TokenCache:
    """The tokens of one credential, without the credential, so that it can be kept for as long as that one lives."""

    def __init__(self) -> None:
        self.tenants: dict[str, str] = {}  # by endpoints of accounts
        self._tokens: dict[_TokenKey, _CachedToken] = {}
        _caches.add(self)

    def token(self, key: _TokenKey, fetch: Callable[[], AccessTokenInfo]) -> AccessTokenInfo:
        """The current token. One thread at a time calls ``fetch``, and its error goes to all that waited."""
        cached = self._tokens.setdefault(key, _CachedToken())
        fetches_seen = cached.fetches
        if not cached.due():
            return cast(AccessTokenInfo, cached.token)
        valid = cached.valid()
        lock = cached.lock  # after_fork may put another one in its place
        if not lock.acquire(blocking=valid is None) and valid is not None:
            return valid
        try:
            if not cached.due():
                return cast(AccessTokenInfo, cached.token)
            if cached.fetches != fetches_seen and cached.error is not None:
                raise cached.error
            return self._replace(cached, fetch)
        finally:
            lock.release()

    def _replace(self, cached: _CachedToken, fetch: Callable[[], AccessTokenInfo]) -> AccessTokenInfo:
        cached.error = None
        try:
            cached.token = fetch()
        except Exception as error:
            valid = cached.valid()
            if valid is None:
                cached.error = error
                raise
            _logger.warning("could not refresh the Azure token (%s); the old one is still valid", type(error).__name__)
            return valid
        finally:
            cached.fetched_at = time.time()
            cached.fetches += 1
        return cached.token

    def after_fork(self) -> None:
        """In a forked child: free what a thread of the parent held. The tokens themselves are still good."""
        for cached in list(self._tokens.values()):
            cached.lock = threading.Lock()
            cached.error = None


_caches: weakref.WeakSet[TokenCache] = weakref.WeakSet()
_registry_lock = threading.Lock()
# By identity, because two credentials that compare equal may still be different logins, and some have no hash.
_cache_of: dict[int, tuple[weakref.ref[Any], TokenCache]] = {}


def shared_tokens(credential: TokenCredential, endpoint: str) -> SharedTokens:
    """The tokens of `credential` for an account: with the same object always the same tokens."""
    key = id(credential)
    with _registry_lock:
        reference, cache = _cache_of.get(key, (None, None))
        if cache is None or reference is None or reference() is not credential:
            cache = TokenCache()
            # Without __weakref__ (in __slots__), only the clients of this one call share the tokens.
            with contextlib.suppress(TypeError):
                # The callback takes no lock: it may run anywhere, also inside this block.
                _cache_of[key] = weakref.ref(credential, lambda dead: _forget(key, dead)), cache
    return SharedTokens(credential, cache, endpoint)


def default_tokens(endpoint: str) -> SharedTokens:
    """The tokens of the process's one ``DefaultAzureCredential`` for an account."""
    return shared_tokens(_process_default, endpoint)


def _forget(key: int, dead: weakref.ref[Any]) -> None:
    known = _cache_of.get(key)
    if known is not None and known[0] is dead:
        del _cache_of[key]


class _ProcessDefault:
    """``DefaultAzureCredential``, made in the process and at the moment that needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._credential: Any = None

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        return cast(AccessToken, self._current().get_token(*scopes, **options))

    def get_token_info(self, *scopes: str, options: TokenRequestOptions | None = None) -> AccessTokenInfo:
        return cast(AccessTokenInfo, self._current().get_token_info(*scopes, options=options))

    def after_fork(self) -> None:
        # Its connections and locks are the parent's.
        self._lock = threading.Lock()
        self._credential = None

    def _current(self) -> Any:
        with self._lock:
            if self._credential is None:
                from azure.identity import DefaultAzureCredential  # slow to import, and unused with keys and SAS

                try:
                    self._credential = DefaultAzureCredential()
                except ValueError as error:
                    raise CredentialError(
                        "DefaultAzureCredential does not accept this process's environment. "
                        "Check the AZURE_* variables, or pass credential=."
                    ) from error
            return self._credential


_process_default = _ProcessDefault()


def _after_fork_in_child() -> None:
    global _registry_lock
    _registry_lock = threading.Lock()
    _process_default.after_fork()
    for cache in list(_caches):
        cache.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
