"""`BlobLocation`: the URL of a blob, a prefix or a container, parsed once and printed without its secret."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final
from urllib.parse import quote, unquote

from azure_torch_ckpt.errors import LocationError

__all__ = ["EMULATOR_ACCOUNT", "BlobLocation", "has_empty_segment", "is_account_name", "is_sas"]

EMULATOR_ACCOUNT: Final = "devstoreaccount1"

_RIGHT_FORM: Final = (
    "A location looks like https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH or azblob://ACCOUNT/CONTAINER/PATH"
)
_FOREIGN_SCHEMES: Final = {
    "abfs": "abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH",
    "abfss": "abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH",
    "wasb": "wasb://CONTAINER@ACCOUNT.blob.core.windows.net/PATH",
    "wasbs": "wasbs://CONTAINER@ACCOUNT.blob.core.windows.net/PATH",
    "az": "az://CONTAINER/PATH",
}

# Resource names: https://learn.microsoft.com/rest/api/storageservices/naming-and-referencing-containers--blobs--and-metadata
_MAX_PATH_CHARS: Final = 1024
_MAX_PATH_SEGMENTS: Final = 254
_CONTAINER: Final = re.compile(r"(?=.{3,63}\Z)[a-z0-9]+(?:-[a-z0-9]+)*|\$(?:root|web|logs)", re.ASCII)

_ACCOUNT: Final = re.compile(r"[a-z0-9]{3,24}", re.ASCII)
_HOST_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
# account[-secondary|-ipv6|-microsoftrouting ...][.z01][.privatelink].blob.(core.<cloud> | storage.azure.net)
# https://learn.microsoft.com/azure/storage/common/storage-account-overview#storage-account-endpoints
_AZURE_HOST: Final = re.compile(
    r"(?P<account>[a-z0-9]{3,24})(?:-[a-z0-9]+)*(?:\.z[0-9]{1,2})?(?:\.privatelink)?"
    r"\.(?P<service>[a-z]+)\.(?:core\.[a-z0-9.-]+|storage\.azure\.net)",
    re.ASCII,
)
_AZURE_SUFFIX: Final = re.compile(r"(?:.*\.)?(?:blob|dfs|file|queue|table|web)\.(?:core\..+|storage\.azure\.net)")
_PATH_STYLE_ACCOUNT: Final = re.compile(r"(?P<account>[a-z0-9]{3,24})(?:-secondary)?", re.ASCII)
# Azurite reads the account from the host's first label if the host has a dot, except for this one.
_PATH_STYLE_HOST_WITH_DOTS: Final = "host.docker.internal"
_DEFAULT_PORT: Final = {"https": 443, "http": 80}

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/*)(.*)\Z", re.DOTALL)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_TIMESTAMP: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?Z", re.ASCII)
_SAS: Final = re.compile(r"[!-~]+")
_SAS_SIGNATURE: Final = re.compile(r"(?:^|&)sig=[^&]", re.IGNORECASE)
_SAS_IN_PATH: Final = re.compile(r"[?&]sig=", re.IGNORECASE)
# Parameters of single requests. Kept like a SAS, they would change the meaning of every request.
_REQUEST_PARAMETERS: Final = frozenset({"comp", "restype", "timeout", "prefix", "marker", "delimiter"})
# Text that a message may repeat: without `=`, `&`, `?`, `@`, `+` and `%`, one of which is in every secret.
_HARMLESS: Final = re.compile(r"[A-Za-z0-9_./~:$-]{1,200}", re.ASCII)


@dataclass(frozen=True, slots=True, repr=False)
class BlobLocation:
    """A blob, a prefix of blobs, or a container, on one service endpoint.

    Make it with `parse`, or with `parse_blob` for a blob of any name. It is immutable and hashable.
    ``str()`` returns the URL without the SAS: ``BlobLocation.parse_blob(str(x)) == x.without_sas()``, and the same
    with ``parse`` unless the path has empty segments. No error of this module repeats a query string.

    A pickle contains the SAS, because another process could do nothing without it. Use `without_sas` for what is
    stored.

    Attributes:
        endpoint: the service's URL without a trailing slash, ``https://account.blob.core.windows.net`` or, path style,
            ``http://127.0.0.1:10000/devstoreaccount1``.
        account: the storage account. On a custom domain it is the host's first label, a guess: see
            `account_is_known`.
        container: the container's name.
        path: the blob's name, or a prefix of names, decoded; ``""`` is the container's root. Only
            `parse_blob` allows empty segments (``a//b``, ``/a``, ``a/``), which are legal in a blob's name.
        sas: the shared access signature unchanged from the URL, without ``?``, or None. Secret.
        snapshot: timestamp of a blob snapshot, or None.
        version_id: timestamp of a blob version, or None.

    Raises:
        LocationError: the container or the path breaks the service's naming rules.
    """

    endpoint: str
    account: str
    container: str
    path: str = ""
    sas: str | None = None
    snapshot: str | None = None
    version_id: str | None = None

    def __post_init__(self) -> None:
        _check_container(self.container)
        _check_path(self.path)
        _check_moment(self)

    @classmethod
    def parse(cls, url: str | os.PathLike[str] | BlobLocation) -> BlobLocation:
        """Parse a URL.

        It may end with ``?`` and a SAS, ``snapshot=`` or ``versionid=``; its path is percent-encoded as in every URL.
        The forms are:

        - ``https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH``, the same in the sovereign clouds, in accounts with
          a DNS zone (``ACCOUNT.z01.blob.storage.azure.net``), on ``privatelink`` and ``-secondary`` hosts, and with
          ``dfs`` for ``blob`` (accounts with a hierarchical namespace serve the same data on both hosts);
        - ``https://HOST/CONTAINER/PATH`` for custom domains and private endpoints;
        - ``http://127.0.0.1:10000/ACCOUNT/CONTAINER/PATH``, path style: the host is an IP address, ``localhost``,
          ``host.docker.internal``, or has no dot. The emulator has such a URL;
        - ``azblob://ACCOUNT/CONTAINER/PATH`` (public cloud) and ``azblob://HOST/CONTAINER/PATH`` (over TLS).

        ``https:/account...``, the result of ``Path("https://account...")``, is repaired.

        Raises:
            LocationError: the URL has another form. The message shows a correct URL and never repeats the query string.
        """
        if isinstance(url, BlobLocation):
            return url
        location = cls.parse_blob(url)
        path = location.path.rstrip("/")
        if path and has_empty_segment(path):
            raise LocationError(
                f"The blob path{_quoted(path)} has an empty segment ('//', or a slash at its start). {_RIGHT_FORM}."
            )
        return dataclasses.replace(location, path=path)

    @classmethod
    def parse_blob(cls, url: str | os.PathLike[str] | BlobLocation) -> BlobLocation:
        """Parse the URL of a blob, as `parse` does, but keep each slash of its name.

        ``a//b``, ``/a`` and ``a/`` are names of blobs, different from ``a/b`` and ``a``. (In accounts with a
        hierarchical namespace, the service drops the empty segments.)

        Raises:
            LocationError: as for `parse`.
        """
        if isinstance(url, BlobLocation):
            return url
        scheme, authority, raw_path, query = _split(_text(url))
        endpoint, account, path_style = _endpoint(scheme, authority, raw_path)
        path = _decode(raw_path).removeprefix("/")
        if path_style:
            path = path.partition("/")[2]
        container, _, blob = path.partition("/")
        if not container:
            raise LocationError(
                f"The URL names no container on {_shown(endpoint) or 'its host'}. {_form_for(endpoint, path_style)}."
            )
        return cls(endpoint, account, container, blob, *_parse_query(query))

    def __str__(self) -> str:
        text = f"{self.endpoint}/{self.container}"
        if self.path:
            text += "/" + _encode(self.path)
        return text + self._moment_query()

    def __repr__(self) -> str:
        return f"BlobLocation({str(self)!r}{', sas=***' if self.sas is not None else ''})"

    @property
    def azblob(self) -> str:
        """The ``azblob://`` form, without the SAS; ``parse`` of it returns the same location.

        Raises:
            LocationError: plain HTTP and path-style endpoints (the emulator) have no such form.
        """
        if not self.is_tls or self.is_path_style:
            raise LocationError(
                f"{self} has no azblob:// form: azblob:// means TLS and the account in the host's name. "
                "Use the http(s):// URL."
            )
        host = self.endpoint.removeprefix("https://").removesuffix(".blob.core.windows.net")
        if not _ACCOUNT.fullmatch(host):  # -secondary, privatelink and DNS-zone hosts keep their full name
            host = self.endpoint.removeprefix("https://")
        text = f"azblob://{host}/{self.container}"
        return (text + "/" + _encode(self.path) if self.path else text) + self._moment_query()

    @property
    def name(self) -> str:
        """The last segment of `path`; ``""`` for the container's root."""
        return self.path.rpartition("/")[2]

    @property
    def prefix(self) -> str:
        """The common beginning of the names of all blobs below this location; ``""`` for a container."""
        return self.path + "/" if self.path else ""

    @property
    def parent(self) -> BlobLocation:
        """The prefix one level up (no snapshot, no version). The container's root is its own parent."""
        return dataclasses.replace(self, path=self.path.rpartition("/")[0], snapshot=None, version_id=None)

    @property
    def is_tls(self) -> bool:
        """Whether the endpoint is reached over TLS."""
        return self.endpoint.startswith("https://")

    @property
    def is_path_style(self) -> bool:
        """Whether the account is the endpoint's path instead of part of its host."""
        return self.endpoint.count("/") > 2

    @property
    def is_emulator(self) -> bool:
        """Whether this is the emulator's well-known account (Azurite's ``devstoreaccount1``, path style)."""
        return self.account == EMULATOR_ACCOUNT and self.is_path_style

    @property
    def account_is_known(self) -> bool:
        """False for a custom domain, whose first label need not be the account's name."""
        return self.is_path_style or _AZURE_HOST.fullmatch(_host(self.endpoint.split("/")[2])[0]) is not None

    def join(self, *names: str) -> BlobLocation:
        """Return a location below this one; every name is a relative path, not percent-encoded.

        Raises:
            LocationError: an empty name or segment, a leading slash, ``.`` or ``..``, or a path that gets too long; or
                this location is a snapshot or version, which has nothing below it.
        """
        if self.snapshot is not None or self.version_id is not None:
            raise LocationError(f"{self} is one blob at one moment; nothing is below it. Omit the query.")
        if any(has_empty_segment(name) for name in names):
            raise LocationError(
                f"Cannot join a name that is empty or has an empty segment ('//', or a slash at its start or end) to "
                f"{self}. Give a relative path."
            )
        return dataclasses.replace(self, path="/".join((self.path, *names) if self.path else names))

    def without_sas(self) -> BlobLocation:
        """Return the same location without its secret."""
        return dataclasses.replace(self, sas=None)

    def container_root(self) -> BlobLocation:
        """Return the container of this location, with the same SAS."""
        return dataclasses.replace(self, path="", snapshot=None, version_id=None)

    def _moment_query(self) -> str:
        if self.snapshot is not None:
            return f"?snapshot={self.snapshot}"
        return f"?versionid={self.version_id}" if self.version_id is not None else ""


def has_empty_segment(path: str) -> bool:
    """Whether a path begins or ends with a slash, or has two in a row; true for the empty path."""
    return not path or path[0] == "/" or path[-1] == "/" or "//" in path


def is_account_name(text: str) -> bool:
    """Whether a storage account can have this name."""
    return _ACCOUNT.fullmatch(text) is not None


def is_sas(text: str) -> bool:
    """Whether this looks like a shared access signature (without ``?``): printable ASCII with a ``sig=``."""
    return _SAS.fullmatch(text) is not None and _SAS_SIGNATURE.search(text) is not None


def _text(url: str | os.PathLike[str]) -> str:
    if isinstance(url, PurePath):
        text = url.as_posix()  # a WindowsPath would come with backslashes
    elif isinstance(url, (str, os.PathLike)):
        text = os.fspath(url)
    else:
        text = None
    if not isinstance(text, str):
        raise LocationError(f"A location is a str, a path or a BlobLocation, not {type(url).__name__}. {_RIGHT_FORM}.")
    if _CONTROL.search(text):
        raise LocationError(f"The URL contains control characters (a line break?). {_RIGHT_FORM}.")
    return text


def _split(text: str) -> tuple[str, str, str, str]:
    """Return scheme, authority, raw path (with its leading slash, or empty) and query."""
    found = _SCHEME.match(text)
    if found is None or len(found[1]) == 1 or found[1].lower() == "file":  # C:\... has a "scheme" of one letter
        hint = " Put https:// before it." if re.match(r"[a-z0-9.-]+\.(?:blob|dfs)\.", text) else ""
        raise LocationError(f"This is a local path or not a URL{_quoted(text)}.{hint} {_RIGHT_FORM}.")
    scheme, slashes, rest = found[1].lower(), found[2], found[3]
    if scheme in _FOREIGN_SCHEMES:
        raise LocationError(
            f"{scheme}:// is not supported. Instead of {_FOREIGN_SCHEMES[scheme]} "
            "write https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH."
        )
    if scheme not in ("https", "http", "azblob"):
        raise LocationError(f"The URL's scheme{_quoted(scheme)} is not for Azure Blob Storage. {_RIGHT_FORM}.")
    if "#" in rest:
        raise LocationError(f"The URL contains '#'. In a blob's name write it as %23. {_RIGHT_FORM}.")
    location, _, query = rest.partition("?")
    authority, slash, path = location.partition("/")
    if len(slashes) not in (1, 2) or not authority:
        raise LocationError(f"The URL has no host. {_RIGHT_FORM}.")
    return scheme, authority, slash + path, query


def _endpoint(scheme: str, authority: str, raw_path: str) -> tuple[str, str, bool]:
    """Return the service's URL, the account, and whether the account is the first segment of the path."""
    if "@" in authority:
        raise LocationError(
            "The URL has a user or password before its host ('@'). Blob Storage has neither: "
            f"pass credential= or append a SAS. {_RIGHT_FORM}."
        )
    host, port = _host(authority.lower())
    if scheme == "azblob":
        scheme = "https"
        if port is None and _ACCOUNT.fullmatch(host):
            host += ".blob.core.windows.net"
        elif _is_path_style(host):
            raise LocationError(
                "azblob:// takes an account's name (3 to 24 lower-case letters and digits) or a full host name. "
                "For the emulator use its http:// URL, http://127.0.0.1:10000/devstoreaccount1/CONTAINER/PATH."
            )
    if _is_path_style(host):
        segment = raw_path.removeprefix("/").partition("/")[0]
        found = _PATH_STYLE_ACCOUNT.fullmatch(segment)
        if found is None:
            raise LocationError(
                "On an endpoint that is an IP address or has no dot in its name, the path starts with the account "
                f"(3 to 24 lower-case letters and digits). {_form_for(f'{scheme}://{authority}', True)}."
            )
        return f"{scheme}://{_join_port(host, port, scheme)}/{segment}", found["account"], True
    if not _AZURE_SUFFIX.fullmatch(host):
        return f"{scheme}://{_join_port(host, port, scheme)}", host.partition(".")[0], False
    found = _AZURE_HOST.fullmatch(host)
    if found is None:
        raise LocationError(
            f"The host{_quoted(host)} does not start with a storage account's name "
            f"(3 to 24 lower-case letters and digits). {_RIGHT_FORM}."
        )
    if found["service"] not in ("blob", "dfs"):
        raise LocationError(f"The host{_quoted(host)} is the {found['service']} service. {_RIGHT_FORM}.")
    if scheme != "https":
        raise LocationError(f"The URL of an Azure storage account starts with https://, not http://. {_RIGHT_FORM}.")
    # A data lake account has the same data on its blob host, and only that host has the Blob API.
    blob_host = re.sub(r"\.dfs\.(?=core\.|storage\.)", ".blob.", host)
    return f"{scheme}://{_join_port(blob_host, port, scheme)}", found["account"], False


def _host(authority: str) -> tuple[str, int | None]:
    """Return host (an IPv6 address in its brackets) and port. No error repeats the text, which may be a secret."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", authority, re.ASCII)
    if found is None:
        raise LocationError(f"The URL's host or port is malformed. {_RIGHT_FORM}.")
    host, port = found[1], int(found[2]) if found[2] else None
    named = not host.startswith("[") and all(_HOST_LABEL.fullmatch(label) for label in host.split("."))
    if not (named or _is_ip_address(host)) or (port is not None and not 0 < port < 65536):
        raise LocationError(f"The URL's host or port is malformed. {_RIGHT_FORM}.")
    return host, port


def _join_port(host: str, port: int | None, scheme: str) -> str:
    return host if port is None or port == _DEFAULT_PORT[scheme] else f"{host}:{port}"


def _is_path_style(host: str) -> bool:
    return "." not in host or host == _PATH_STYLE_HOST_WITH_DOTS or _is_ip_address(host)


def _is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _decode(raw_path: str) -> str:
    try:
        path = unquote(raw_path, errors="strict")
        path.encode()
    except UnicodeError:
        # `from None`: the text of the error contains the bytes
        raise LocationError(f"The URL's path is not valid UTF-8. {_RIGHT_FORM}.") from None
    return path


def _encode(path: str) -> str:
    return quote(path, safe="/~=,@+:")


def _parse_query(query: str) -> tuple[str | None, str | None, str | None]:
    """Return SAS, snapshot and version id. The SAS is unchanged: decoding would break its signature."""
    moments: dict[str, str] = {}
    rest: list[str] = []
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key.lower() in ("snapshot", "versionid"):
            moments[key.lower()] = unquote(value)
        elif key.lower() in _REQUEST_PARAMETERS:
            raise LocationError(
                "The URL's query belongs to a request (a listing, perhaps), not to a location. "
                "Keep only its SAS, snapshot= or versionid=."
            )
        else:
            rest.append(part)
    sas = "&".join(rest)
    if sas and not is_sas(sas):
        raise LocationError(
            "The URL's query is not a shared access signature (a SAS has a sig= and only printable ASCII), and not "
            "snapshot= or versionid=. If the '?' is part of the blob's name, write it as %3F."
        )
    return sas or None, moments.get("snapshot"), moments.get("versionid")


def _check_container(container: str) -> None:
    if not _CONTAINER.fullmatch(container):
        raise LocationError(
            f"Invalid container name{_quoted(container, 63)}: 3 to 63 lower-case letters, digits and single hyphens, "
            f"with a letter or digit at both ends (or $root, $web, $logs). {_RIGHT_FORM}."
        )


def _check_path(path: str) -> None:
    wrong = None
    segments = path.split("/")
    if not path:
        return
    if _SAS_IN_PATH.search(path):
        wrong = "contains what looks like a SAS. Append it with a plain '?', not percent-encoded"
    elif len(path) > _MAX_PATH_CHARS or len(segments) > _MAX_PATH_SEGMENTS:
        wrong = f"is longer than the service's {_MAX_PATH_CHARS:,} characters or {_MAX_PATH_SEGMENTS} segments"
    elif {".", ".."} & set(segments):
        wrong = "has a segment '.' or '..'. Write the full path"
    elif "\\" in path:
        wrong = "contains a backslash, which the service changes to '/'. Write '/'"
    elif _CONTROL.search(path):
        wrong = "contains control characters"
    elif any("\ud800" <= char <= "\udfff" for char in path):
        wrong = "contains half of a surrogate pair, which has no UTF-8 form"
    if wrong is not None:
        raise LocationError(f"The blob path{_quoted(path)} {wrong}. {_RIGHT_FORM}.")


def _check_moment(location: BlobLocation) -> None:
    moments = [moment for moment in (location.snapshot, location.version_id) if moment is not None]
    if not moments:
        return
    if len(moments) > 1 or not location.path or not _TIMESTAMP.fullmatch(moments[0]):
        raise LocationError(
            "snapshot= or versionid= (one of the two) is a timestamp like 2026-01-31T12:00:00.1234567Z "
            "and belongs to a blob, not to a container."
        )


def _form_for(endpoint: str, path_style: bool) -> str:
    if not path_style:
        return _RIGHT_FORM
    host = _shown("/".join(endpoint.split("/")[:3])) or "http://127.0.0.1:10000"
    return f"A location there looks like {host}/ACCOUNT/CONTAINER/PATH (the emulator's account is {EMULATOR_ACCOUNT})"


def _shown(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit and _HARMLESS.fullmatch(text) else ""


def _quoted(text: str, limit: int = 200) -> str:
    shown = _shown(text, limit)
    return f" ({shown!r})" if shown else ""
