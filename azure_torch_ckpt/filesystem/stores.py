"""Which endpoint and which credential belong to a path, and the stores that are made of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Credential, PickledCredential, environment_values, named_endpoint
from azure_torch_ckpt.errors import CredentialError, LocationError
from azure_torch_ckpt.filesystem.paths import PathParts, locate
from azure_torch_ckpt.location import BlobLocation
from azure_torch_ckpt.options import TransferOptions

__all__ = ["Stores", "one_credential"]


def one_credential(
    credential: Credential,
    account_key: str | None,
    sas_token: str | None,
    connection_string: str | None,
    anon: bool | None,
) -> Credential:
    """What was given under one of these names; None if none was.

    Raises:
        CredentialError: more than one was given.
    """
    given: dict[str, Credential] = {
        name: value
        for name, value in (
            ("credential", credential),
            ("account_key", account_key),
            ("sas_token", sas_token),
            ("connection_string", connection_string),
            ("anon", False if anon else None),
        )
        if value is not None
    }
    if len(given) > 1:
        raise CredentialError(f"{', '.join(given)} were given together, and each is a credential. Pass one of them")
    return next(iter(given.values()), None)


@dataclass(slots=True)
class Stores:
    """The way from a path to its container. Nothing is requested here.

    Attributes:
        endpoint: of the service, where it does not follow from a path's account or from a connection string.
        given: the credential that the user passed. None: that of the environment, looked up anew for every path.
    """

    endpoint: str | None
    given: Credential = field(repr=False)
    options: TransferOptions | None
    ca_file: str | None
    _stores: dict[BlobLocation, BlobStore] = field(default_factory=dict, repr=False)
    _environment: tuple[str | None, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.endpoint is not None:
            try:
                BlobLocation.parse(self.endpoint.rstrip("/") + "/container")
            except LocationError as error:
                raise LocationError(
                    "endpoint= is no URL of Blob Storage; it looks like https://ACCOUNT.blob.core.windows.net or "
                    "http://127.0.0.1:10000/devstoreaccount1, without a container"
                ) from error
            if "?" in self.endpoint:
                raise LocationError("endpoint= has a query. Pass a SAS as sas_token=")

    def locate(self, path: str) -> BlobLocation:
        """The blob or folder that a path names. Raises `LocationError`."""
        return locate(path, self.endpoint or named_endpoint(self.given, PathParts.of(path).account))

    def store(self, location: BlobLocation) -> BlobStore:
        """The store for a location's container: always the same one, for it keeps connections."""
        environment = environment_values() if self.given is None else ()
        if environment != self._environment:  # a new SAS, perhaps
            self._environment, self._stores = environment, {}
        root = location.container_root()
        store = self._stores.get(root)
        if store is None:
            store = self._stores[root] = BlobStore(root, Access(self.given, self.options, self.ca_file))
        return store

    def pickled(self) -> PickledCredential:
        """The user's credential, in a form that pickles. Raises `CredentialError`."""
        return PickledCredential.of(self.given)
