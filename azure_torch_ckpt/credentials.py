"""What ``credential=`` means in every function and class, and `Access`: how a container is reached."""

from __future__ import annotations

import base64
import binascii
import inspect
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, cast

from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential, TokenCredential

from azure_torch_ckpt._internal.shared_tokens import SharedTokens, default_tokens, shared_tokens
from azure_torch_ckpt.errors import CredentialError, CredentialTypeError, LocationError
from azure_torch_ckpt.location import EMULATOR_ACCOUNT, BlobLocation, is_account_name, is_sas
from azure_torch_ckpt.options import TransferOptions

__all__ = [
    "EMULATOR_ACCOUNT_KEY",
    "Access",
    "Credential",
    "PickledCredential",
    "SdkCredential",
    "environment_note",
    "environment_values",
    "named_endpoint",
    "resolve",
]

Credential: TypeAlias = "TokenCredential | AzureSasCredential | AzureNamedKeyCredential | str | Literal[False] | None"
"""What a user may pass as ``credential=``; see `resolve`."""

SdkCredential: TypeAlias = "SharedTokens | AzureSasCredential | AzureNamedKeyCredential | None"
"""What the clients of ``azure.storage.blob`` take; there, None is anonymous access."""

# The same for every user, so it is not secret: https://learn.microsoft.com/azure/storage/common/storage-connect-azurite
EMULATOR_ACCOUNT_KEY: Final = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
# https://learn.microsoft.com/azure/storage/common/storage-configure-connection-string
_EMULATOR_ENDPOINT: Final = f"http://127.0.0.1:10000/{EMULATOR_ACCOUNT}"

# https://learn.microsoft.com/cli/azure/azure-cli-configuration#cli-configuration-values-and-environment-variables
_ACCOUNT_VARIABLE: Final = "AZURE_STORAGE_ACCOUNT"
_CONNECTION_STRING_VARIABLE: Final = "AZURE_STORAGE_CONNECTION_STRING"
_KEY_VARIABLE: Final = "AZURE_STORAGE_KEY"
_SAS_VARIABLE: Final = "AZURE_STORAGE_SAS_TOKEN"

_ACCEPTED: Final = (
    "Pass None (DefaultAzureCredential), False (anonymous), a TokenCredential of azure.identity, AzureSasCredential, "
    "AzureNamedKeyCredential, or a str with a SAS token, an account key or a connection string"
)
_CONNECTION_STRING: Final = re.compile(
    r"(?:^|;)\s*(?:AccountKey|AccountName|SharedAccessSignature|BlobEndpoint|DefaultEndpointsProtocol|EndpointSuffix"
    r"|UseDevelopmentStorage)\s*=",
    re.IGNORECASE,
)
# Azure's keys have 64 bytes; an emulator may have shorter ones. Short words ("None") are base64, too.
_MIN_KEY_BYTES: Final = 16


def resolve(location: BlobLocation, credential: Credential = None) -> SdkCredential:
    """Return the credential for the SDK, to be used with ``account_url=location.endpoint``. The rule:

    1. A SAS in the URL wins over everything.
    2. ``False``: anonymous.
    3. ``None``: the first variable of the environment that is set, not blank and for the URL's account; without one,
       the published key on the emulator, and elsewhere one ``DefaultAzureCredential`` for the whole process, made when
       the first token is needed, and made anew in a forked child. The variables are those of the Azure CLI:
       ``AZURE_STORAGE_CONNECTION_STRING``, ``AZURE_STORAGE_KEY``, ``AZURE_STORAGE_SAS_TOKEN``.
    4. ``str``: a connection string, a SAS token (with or without ``?``), or an account key. A bare key needs a URL that
       names the account; a connection string must be for the URL's account.
    5. ``AzureNamedKeyCredential``: its name must be the URL's account. A custom domain does not name the account, so
       any name is accepted there.
    6. ``AzureSasCredential``: used unchanged.
    7. ``TokenCredential``: wrapped in `SharedTokens`, the same tokens for every call with the same object.

    A variable of the environment that names another account is ignored, so that a job can have its data in one account
    and its checkpoints in another. A connection string names its account; a key and a SAS token are for the account in
    ``AZURE_STORAGE_ACCOUNT``. Without that they are used for any account that the URL names, except on the emulator,
    where only what names its account replaces the published key.

    Raises:
        CredentialTypeError: the credential is of another type. It is a CredentialError and a TypeError.
        CredentialError: the credential (or the variable) has a wrong form, the credential is for another account, or it
            is a token that would travel over plain HTTP. No message contains the value.
    """
    if location.sas is not None:
        return AzureSasCredential(location.sas)
    if credential is False:
        return None
    if credential is None:
        return _from_environment(location)
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
        raise CredentialTypeError(f"{type(credential).__name__} is not a credential for Blob Storage. {_ACCEPTED}.")
    if inspect.iscoroutinefunction(get_token):
        raise CredentialTypeError(
            f"{type(credential).__name__} is an asynchronous credential (azure.identity.aio). "
            "Pass the class of the same name from azure.identity."
        )
    return _over_tls(location, shared_tokens(credential, location.endpoint))


def environment_values() -> tuple[str | None, ...]:
    """Return the values of the variables that `resolve` reads, for callers that keep its result. They are secret."""
    variables = (_ACCOUNT_VARIABLE, _CONNECTION_STRING_VARIABLE, _KEY_VARIABLE, _SAS_VARIABLE)
    return tuple(os.environ.get(name) for name in variables)


def environment_note(location: BlobLocation, credential: Credential) -> str:
    """Return a sentence for an error about a refused credential: the variables that `resolve` used or ignored."""
    if location.sas is not None or credential is not None:
        return ""
    note = ""
    for name, _, applies in _environment_credentials(location):
        if applies:
            return f"{note}. The credential is from {name}"
        note += f". {name} was ignored: it is not for this account (for a key or a SAS, {_ACCOUNT_VARIABLE} names it)"
    return note


def named_endpoint(credential: Credential, account: str) -> str | None:
    """Return the service endpoint of `account` by the connection string.

    Args:
        credential: may be a connection string; None for the one of the environment.

    Returns:
        None without a connection string, and if it has no endpoint, or another account's.

    Raises:
        CredentialError: the connection string is malformed, or its endpoint is.
    """
    text = os.environ.get(_CONNECTION_STRING_VARIABLE, "").strip() if credential is None else credential
    if not isinstance(text, str) or not _CONNECTION_STRING.search(text):
        return None
    endpoint = _endpoint_in(_settings_in(text))
    if endpoint is None:
        return None
    root = _location_at(endpoint, "container")
    # For another account, `resolve` says what is wrong.
    return root.endpoint if root.account == account else None


@dataclass(frozen=True, slots=True)
class PickledCredential:
    """A ``credential=`` argument that travels to another process. Its content is secret.

    Keys and SAS travel as their public values. A ``TokenCredential`` is pickled itself: those of azure-identity can be,
    unless they were made with a token cache or a callback that cannot be pickled (azure-identity drops its own cache
    and connections). Tokens never travel.
    """

    payload: bytes = field(repr=False)

    @classmethod
    def of(cls, credential: Credential) -> PickledCredential:
        """Pickle a credential.

        Raises:
            CredentialError: it cannot be pickled. The message says what to pass instead.
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
        """Return the credential in this process."""
        kind, *values = pickle.loads(self.payload)
        if kind == "named key":
            return AzureNamedKeyCredential(*values)
        if kind == "sas":
            return AzureSasCredential(*values)
        return cast(Credential, values[0])


@dataclass(frozen=True, init=False)
class Access:
    """The arguments ``credential=``, ``options=`` and ``ca_file=`` of public functions.

    A pickle holds the credential, because it would be useless without: treat it as a secret.

    Attributes:
        credential: see `resolve`.
        options: limits of connections, memory and time.
        ca_file: PEM file with certificates to trust besides the platform's (an endpoint with a private CA, the
            emulator's TLS).
    """

    credential: Credential = field(repr=False)
    options: TransferOptions
    ca_file: str | None

    def __init__(
        self, credential: Credential = None, options: TransferOptions | None = None, ca_file: str | None = None
    ) -> None:
        self.__dict__.update(credential=credential, options=options or TransferOptions(), ca_file=ca_file)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "credential": PickledCredential.of(self.credential)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, credential=state["credential"].restore())


def _over_tls(location: BlobLocation, tokens: SharedTokens) -> SharedTokens:
    if not location.is_tls:
        raise CredentialError(
            f"{location.endpoint} is plain HTTP, and a token would travel in clear text. "
            "Use https://, or pass a SAS, an account key, or False for anonymous access."
        )
    return tokens


def _from_environment(location: BlobLocation) -> SdkCredential:
    for name, credential, applies in _environment_credentials(location):
        if applies:
            try:
                return _from_text(location, credential)
            except CredentialError as error:
                raise CredentialError(f"{name}: {error}") from error
    if location.is_emulator:
        return AzureNamedKeyCredential(EMULATOR_ACCOUNT, EMULATOR_ACCOUNT_KEY)
    return _over_tls(location, default_tokens(location.endpoint))


def _environment_credentials(location: BlobLocation) -> Iterator[tuple[str, str, bool]]:
    """Yield the variables that are set, in order: name, credential, and whether it is for this account."""
    account, text, key, sas = ((value or "").strip() for value in environment_values())
    if text:
        yield _CONNECTION_STRING_VARIABLE, text, _names_account_of(location, text)
    applies = not location.is_emulator
    if account:
        applies = account == location.account or not location.account_is_known
    if key:
        # On a custom domain, a key is useless without its account's name.
        named = f"AccountName={account};AccountKey={key}" if account else key
        yield _KEY_VARIABLE, named, applies and (bool(account) or location.account_is_known)
    if sas:
        yield _SAS_VARIABLE, sas, applies


def _names_account_of(location: BlobLocation, connection_string: str) -> bool:
    """Whether a connection string is for the location's account. True for a malformed one, which raises an error."""
    try:
        settings = _settings_in(connection_string)
        if _is_development(settings):
            return location.is_emulator
        account = settings.get("accountname")
        if account is not None:
            return account == location.account or not location.account_is_known
        return "blobendpoint" not in settings or _is_endpoint_of(location, settings["blobendpoint"])
    except CredentialError:
        return True


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
    settings = _settings_in(text)
    if _is_development(settings):
        if not location.is_emulator:
            raise CredentialError(
                f"UseDevelopmentStorage=true is for the emulator, and {location.endpoint} is not the emulator. Pass "
                "the connection string of this account."
            )
        return AzureNamedKeyCredential(EMULATOR_ACCOUNT, EMULATOR_ACCOUNT_KEY)
    account, endpoint = settings.get("accountname"), settings.get("blobendpoint")
    if account is not None:
        _check_account(location, account)
    elif endpoint is None:
        raise CredentialError("The connection string has neither AccountName nor BlobEndpoint. Copy the whole of it.")
    elif not _is_endpoint_of(location, endpoint):
        raise CredentialError(
            f"The connection string's BlobEndpoint is not that of {location}. Pass this account's credential."
        )
    if account is not None and "accountkey" in settings:
        return AzureNamedKeyCredential(account, _check_key(settings["accountkey"]))
    if "sharedaccesssignature" in settings:
        return AzureSasCredential(_check_sas(settings["sharedaccesssignature"].removeprefix("?")))
    raise CredentialError(
        "The connection string has neither AccountName and AccountKey nor SharedAccessSignature. Copy the whole of it."
    )


def _settings_in(connection_string: str) -> dict[str, str]:
    """https://learn.microsoft.com/azure/storage/common/storage-configure-connection-string, names in lower case."""
    settings: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in connection_string.split(";"))):
        name, equals, value = part.partition("=")
        if not equals:
            raise CredentialError("The connection string is malformed: its parts are NAME=VALUE, separated by ';'.")
        settings[name.strip().lower()] = value.strip()
    return settings


def _is_development(settings: dict[str, str]) -> bool:
    return settings.get("usedevelopmentstorage", "").lower() == "true"


def _endpoint_in(settings: dict[str, str]) -> str | None:
    if _is_development(settings):
        return _EMULATOR_ENDPOINT
    if "blobendpoint" in settings:
        return settings["blobendpoint"]
    if "endpointsuffix" in settings and "accountname" in settings:
        scheme = settings.get("defaultendpointsprotocol", "https")
        return f"{scheme}://{settings['accountname']}.blob.{settings['endpointsuffix']}"
    return None


def _location_at(endpoint: str, container: str) -> BlobLocation:
    try:
        return BlobLocation.parse(endpoint.rstrip("/") + "/" + container)
    except LocationError as error:
        raise CredentialError("The BlobEndpoint of the connection string is not a URL of Blob Storage.") from error


def _is_endpoint_of(location: BlobLocation, endpoint: str) -> bool:
    there = _location_at(endpoint, location.container)
    both_known = there.account_is_known and location.account_is_known
    return there.account == location.account if both_known else there.endpoint == location.endpoint


def _check_account(location: BlobLocation, account: str) -> None:
    if location.account_is_known and account != location.account:
        # Anything else may be a key in the wrong place.
        named = f"the account {account!r}" if is_account_name(account) else "something that is not an account's name"
        raise CredentialError(f"The credential is for {named}, the URL is {location}. Pass this account's credential.")


def _check_sas(sas: str) -> str:
    # http.client's error repeats a URL that has blanks or control characters, with the secret.
    if not is_sas(sas.removeprefix("?")):
        raise CredentialError(
            "Not a shared access signature: one looks like sv=...&sig=... and consists of printable ASCII only."
        )
    return sas


def _check_key(key: str) -> str:
    try:
        length = len(base64.b64decode(key, validate=True))
    except (binascii.Error, ValueError):
        length = 0
    if length < _MIN_KEY_BYTES:
        # Without a cause: the value must not get into a message.
        raise CredentialError(f"The credential string is not an account key (base64 of 64 bytes). {_ACCEPTED}.")
    return key
