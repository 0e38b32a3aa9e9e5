"""What ``credential=`` means, everywhere in this package, and the tokens that all clients of a process share."""

from __future__ import annotations

import base64
import binascii
import contextlib
import inspect
import logging
import os
import pickle
import re
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, cast

from azure.core.credentials import (
    AccessToken,
    AccessTokenInfo,
    AzureNamedKeyCredential,
    AzureSasCredential,
    TokenCredential,
    TokenRequestOptions,
)

from azure_torch_ckpt.errors import CredentialError, CredentialTypeError, LocationError
from azure_torch_ckpt.location import EMULATOR_ACCOUNT, BlobLocation

__all__ = [
    "EMULATOR_ACCOUNT_KEY",
    "STORAGE_SCOPE",
    "Credential",
    "PickledCredential",
    "SdkCredential",
    "SharedTokens",
    "resolve",
]

_logger = logging.getLogger(__name__)

Credential: TypeAlias = "TokenCredential | AzureSasCredential | AzureNamedKeyCredential | str | Literal[False] | None"
"""What a user may pass as ``credential=``; see :func:`resolve`."""

SdkCredential: TypeAlias = "SharedTokens | AzureSasCredential | AzureNamedKeyCredential | None"
"""What the clients of ``azure.storage.blob`` take; there, None is anonymous access."""

# The same for everybody, hence no secret: https://learn.microsoft.com/azure/storage/common/storage-connect-azurite
EMULATOR_ACCOUNT_KEY: Final = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

# Of every account in any cloud: https://learn.microsoft.com/azure/storage/blobs/authorize-access-azure-active-directory
STORAGE_SCOPE: Final = "https://storage.azure.com/.default"

_ACCEPTED: Final = (
    "Pass None (DefaultAzureCredential), False (anonymous), a TokenCredential of azure.identity, AzureSasCredential, "
    "AzureNamedKeyCredential, or a str with a SAS token, an account key or a connection string"
)
_CONNECTION_STRING: Final = re.compile(
    r"(?:^|;)\s*(?:AccountKey|AccountName|SharedAccessSignature|BlobEndpoint|DefaultEndpointsProtocol|EndpointSuffix"
    r"|UseDevelopmentStorage)\s*=",
    re.IGNORECASE,
)
_SAS_SIGNATURE: Final = re.compile(r"(?:^|&)sig=[^&]", re.IGNORECASE)
_PRINTABLE_ASCII: Final = re.compile(r"[!-~]+")
_ACCOUNT_NAME: Final = re.compile(r"[a-z0-9]{3,24}", re.ASCII)
# Azure's keys are 64 bytes; an emulator may be given shorter ones. Short words ("None") are base64, too.
_MIN_KEY_BYTES: Final = 16

# azure-core's own policy begins to ask for a new token 5 to 4 minutes before the old one ends. Here it is the longer
# of the two, so that a policy that asks never gets back the token that it wants to replace.
_REFRESH_BEFORE_EXPIRY_S: Final = 300.0
# A managed identity may hand out its cached token until shortly before the end; asking it once per request is no use.
_ASK_AGAIN_AFTER_S: Final = 30.0


def resolve(location: BlobLocation, credential: Credential = None) -> SdkCredential:
    """The one rule. The result goes to the SDK together with ``account_url=location.endpoint``.

    1. A SAS in the URL wins over everything.
    2. ``False``: anonymous.
    3. ``None``: on the emulator its published key; elsewhere one ``DefaultAzureCredential`` for the whole process,
       made when the first token is needed, and made anew in a forked child.
    4. ``str``: a connection string, a SAS token (with or without ``?``), or an account key. A bare key needs a URL that
       names the account; a connection string must be for the URL's account.
    5. ``AzureNamedKeyCredential``: its name must be the URL's account. On a custom domain, which does not name the
       account, any name is taken.
    6. ``AzureSasCredential``: taken as it is.
    7. ``TokenCredential``: wrapped in :class:`SharedTokens`, the same tokens for every call with the same object.

    Raises:
        CredentialTypeError: the credential is of another type. It is a CredentialError and a TypeError.
        CredentialError: the credential has a wrong form, is for another account, or is a token that would travel over
            plain HTTP. No message contains the value.
    """
    if location.sas is not None:
        return AzureSasCredential(location.sas)
    if credential is False:
        return None
    if credential is None:
        if location.is_emulator:
            return AzureNamedKeyCredential(EMULATOR_ACCOUNT, EMULATOR_ACCOUNT_KEY)
        return _over_tls(location, SharedTokens(_process_default, _default_cache, location.endpoint))
    if isinstance(credential, str):
        return _from_text(location, credential.strip())
    if isinstance(credential, AzureSasCredential):
        _check_sas(credential.signature)
        return credential
    if isinstance(credential, AzureNamedKeyCredential):
        _check_account(location, credential.named_key.name)
        _check_key(credential.named_key.key)
        return credential
    if isinstance(credential, SharedTokens):
        return _over_tls(location, credential.at(location.endpoint))
    get_token = getattr(credential, "get_token", None)
    if isinstance(credential, type) or not callable(get_token):
        raise CredentialTypeError(f"{type(credential).__name__} is no credential for Blob Storage. {_ACCEPTED}.")
    if inspect.iscoroutinefunction(get_token):
        raise CredentialTypeError(
            f"{type(credential).__name__} is an asynchronous credential (azure.identity.aio). "
            "Pass the class of the same name from azure.identity."
        )
    return _over_tls(location, _shared_tokens(credential, location.endpoint))


class SharedTokens:
    """A ``TokenCredential`` whose tokens are fetched once for all clients and threads that share it.

    Clients of the SDK keep their tokens for themselves, and a writer has many of them: without this, each would run
    ``az account get-access-token`` or ask the metadata service, all at the same moment.

    A token is replaced when its ``refresh_on`` has come, or five minutes before its end. One thread fetches; the others
    go on with the old token while it is valid, and wait otherwise. If the fetch fails, an old token that is still valid
    stays in use, and else every thread that waited gets the error of this one fetch.

    Args:
        endpoint: of the account, whose tenant may be another one than the credential's: `remember_tenant`.
    """

    def __init__(self, credential: TokenCredential, cache: TokenCache, endpoint: str) -> None:
        self._credential = credential
        self._cache = cache
        self._endpoint = endpoint

    def at(self, endpoint: str) -> SharedTokens:
        """The same tokens for another account."""
        return SharedTokens(self._credential, self._cache, endpoint)

    def remember_tenant(self, tenant: str) -> None:
        """The account's tenant, which the service has named: from now on tokens for this account are of this one."""
        self._cache.tenants[self._endpoint] = tenant

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._credential).__name__})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _shared_tokens, (self._credential, self._endpoint)  # tokens stay in their process

    def get_token(
        self,
        *scopes: str,
        claims: str | None = None,
        tenant_id: str | None = None,
        enable_cae: bool = False,
        **_kwargs: Any,
    ) -> AccessToken:
        """azure-core's ``TokenCredential`` protocol. Raises whatever the credential raises."""
        options = TokenRequestOptions()
        if claims:
            options["claims"] = claims
        if tenant_id:
            options["tenant_id"] = tenant_id
        if enable_cae:
            options["enable_cae"] = True
        info = self.get_token_info(*scopes, options=options)
        return AccessToken(info.token, info.expires_on)

    def get_token_info(self, *scopes: str, options: TokenRequestOptions | None = None) -> AccessTokenInfo:
        """azure-core's ``SupportsTokenInfo`` protocol, which its policies prefer where a credential has it."""
        options = options or TokenRequestOptions()
        if "tenant_id" not in options and self._endpoint in self._cache.tenants:
            options = {**options, "tenant_id": self._cache.tenants[self._endpoint]}
        key = (scopes, tuple(sorted((name, str(value)) for name, value in options.items())))

        def fetch() -> AccessTokenInfo:
            credential: Any = self._credential
            if hasattr(credential, "get_token_info"):
                return cast(AccessTokenInfo, credential.get_token_info(*scopes, options=options))
            token: AccessToken = credential.get_token(*scopes, **options)
            return AccessTokenInfo(token.token, int(token.expires_on))

        return self._cache.token(key, fetch)


_TokenKey: TypeAlias = "tuple[tuple[str, ...], tuple[tuple[str, str], ...]]"


class _Slot:
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
        self._slots: dict[_TokenKey, _Slot] = {}
        _caches.add(self)

    def token(self, key: _TokenKey, fetch: Callable[[], AccessTokenInfo]) -> AccessTokenInfo:
        """The current token. One thread at a time calls ``fetch``, and its error goes to all that waited."""
        slot = self._slots.setdefault(key, _Slot())
        fetches_seen = slot.fetches
        if not slot.due():
            return cast(AccessTokenInfo, slot.token)
        valid = slot.valid()
        lock = slot.lock  # after_fork may put another one in its place
        if not lock.acquire(blocking=valid is None) and valid is not None:
            return valid
        try:
            if not slot.due():
                return cast(AccessTokenInfo, slot.token)
            if slot.fetches != fetches_seen and slot.error is not None:
                raise slot.error
            return self._replace(slot, fetch)
        finally:
            lock.release()

    def _replace(self, slot: _Slot, fetch: Callable[[], AccessTokenInfo]) -> AccessTokenInfo:
        slot.error = None
        try:
            slot.token = fetch()
        except Exception as error:
            valid = slot.valid()
            if valid is None:
                slot.error = error
                raise
            _logger.warning("could not refresh the Azure token (%s); the old one is still valid", type(error).__name__)
            return valid
        finally:
            slot.fetched_at = time.time()
            slot.fetches += 1
        return slot.token

    def after_fork(self) -> None:
        """In a forked child: free what a thread of the parent held. The tokens themselves are still good."""
        for slot in list(self._slots.values()):
            slot.lock = threading.Lock()
            slot.error = None


_caches: weakref.WeakSet[TokenCache] = weakref.WeakSet()
_registry_lock = threading.Lock()
# By identity, because two credentials that compare equal may still be different logins, and some have no hash.
_cache_of: dict[int, tuple[weakref.ref[Any], TokenCache]] = {}


def _shared_tokens(credential: TokenCredential, endpoint: str) -> SharedTokens:
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
_default_cache = TokenCache()


def _after_fork_in_child() -> None:
    global _registry_lock
    _registry_lock = threading.Lock()
    _process_default.after_fork()
    for cache in list(_caches):
        cache.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


@dataclass(frozen=True, slots=True)
class PickledCredential:
    """A ``credential=`` argument on its way to another process. What it holds is secret.

    Keys and SAS travel as their public values. A ``TokenCredential`` is pickled as it is: azure-identity's can be, as
    long as they were not made with a token cache or a callback that cannot (azure-identity drops its own cache and
    connections). Tokens never travel.
    """

    payload: bytes = field(repr=False)

    @classmethod
    def of(cls, credential: Credential) -> PickledCredential:
        """Pickle a credential.

        Raises:
            CredentialError: it cannot be pickled; the message says what to pass instead.
        """
        form: tuple[object, ...]
        if isinstance(credential, AzureNamedKeyCredential):
            form = ("named key", *credential.named_key)
        elif isinstance(credential, AzureSasCredential):
            form = ("sas", credential.signature)
        else:
            form = ("as is", credential)
        try:
            return cls(pickle.dumps(form))
        except Exception as error:
            raise CredentialError(
                f"This {type(credential).__name__} cannot be pickled, so it cannot go to another process. Pass "
                "credential=None, which makes a DefaultAzureCredential in each process, or a SAS or key, or save from "
                "this process (AsyncCheckpointerType.THREAD, a DataLoader without workers)."
            ) from error

    def restore(self) -> Credential:
        """The credential again, in this process."""
        kind, *values = pickle.loads(self.payload)
        if kind == "named key":
            return AzureNamedKeyCredential(*values)
        if kind == "sas":
            return AzureSasCredential(*values)
        return cast(Credential, values[0])


def _over_tls(location: BlobLocation, tokens: SharedTokens) -> SharedTokens:
    if not location.is_tls:
        raise CredentialError(
            f"{location.endpoint} is plain HTTP, and a token would travel in clear text. "
            "Use https://, or pass a SAS, an account key, or False for anonymous access."
        )
    return tokens


def _from_text(location: BlobLocation, text: str) -> SdkCredential:
    if _CONNECTION_STRING.search(text):
        return _from_connection_string(location, text)
    if "://" in text:
        raise CredentialError("credential= is a URL. Pass a URL with a SAS as the location itself, or only its SAS.")
    if "sig=" in text.lower() and ("&" in text or "?" in text):
        return AzureSasCredential(_check_sas(text.removeprefix("?")))
    key = _check_key(text)
    if not location.account_is_known:
        raise CredentialError(
            f"An account key alone is not enough on the custom domain of {location.endpoint}, which does not name the "
            "account. Pass AzureNamedKeyCredential(ACCOUNT, KEY)."
        )
    return AzureNamedKeyCredential(location.account, key)


def _from_connection_string(location: BlobLocation, text: str) -> SdkCredential:
    """https://learn.microsoft.com/azure/storage/common/storage-configure-connection-string"""
    settings: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, value = part.partition("=")
        if not equals:
            raise CredentialError("The connection string is malformed: its parts are NAME=VALUE, separated by ';'.")
        settings[name.strip().lower()] = value.strip()
    if settings.get("usedevelopmentstorage", "").lower() == "true":
        if not location.is_emulator:
            raise CredentialError(
                f"UseDevelopmentStorage=true is the emulator, but {location.endpoint} is not. Pass the connection "
                "string of this account."
            )
        return AzureNamedKeyCredential(EMULATOR_ACCOUNT, EMULATOR_ACCOUNT_KEY)
    account = settings.get("accountname")
    if account is not None:
        _check_account(location, account)
    else:
        _check_endpoint(location, settings.get("blobendpoint"))
    if account is not None and "accountkey" in settings:
        return AzureNamedKeyCredential(account, _check_key(settings["accountkey"]))
    if "sharedaccesssignature" in settings:
        return AzureSasCredential(_check_sas(settings["sharedaccesssignature"].removeprefix("?")))
    raise CredentialError(
        "The connection string has neither AccountName and AccountKey nor SharedAccessSignature. Copy the whole of it."
    )


def _check_account(location: BlobLocation, account: str) -> None:
    if location.account_is_known and account != location.account:
        # Anything else may be a key in the wrong place.
        named = f"the account {account!r}" if _ACCOUNT_NAME.fullmatch(account) else "something that is no account name"
        raise CredentialError(f"The credential is for {named}, the URL is {location}. Pass this account's credential.")


def _check_endpoint(location: BlobLocation, endpoint: str | None) -> None:
    if endpoint is None:
        raise CredentialError("The connection string has neither AccountName nor BlobEndpoint. Copy the whole of it.")
    try:
        place = BlobLocation.parse(endpoint.rstrip("/") + "/" + location.container)
    except LocationError as error:
        raise CredentialError("The BlobEndpoint of the connection string is no URL of Blob Storage.") from error
    both_known = place.account_is_known and location.account_is_known
    same = place.account == location.account if both_known else place.endpoint == location.endpoint
    if not same:
        raise CredentialError(
            f"The connection string's BlobEndpoint is another place than {location}. Pass this account's credential."
        )


def _check_sas(sas: str) -> str:
    # http.client repeats a URL that has blanks or control characters in its error, with the secret.
    if not _PRINTABLE_ASCII.fullmatch(sas) or not _SAS_SIGNATURE.search(sas.removeprefix("?")):
        raise CredentialError(
            "This is no shared access signature: it looks like sv=...&sig=... and consists of printable ASCII only."
        )
    return sas


def _check_key(key: str) -> str:
    try:
        length = len(base64.b64decode(key, validate=True))
    except (binascii.Error, ValueError):
        length = 0
    if length < _MIN_KEY_BYTES:
        # no cause: it would add nothing, and the value must not get into a message
        raise CredentialError(f"The credential string is no account key (base64 of 64 bytes). {_ACCEPTED}.")
    return key
