"""`Stores`: the endpoint and the credential for a path, and the `BlobStore` that is made of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access, Credential, environment_values, named_endpoint
from azure_torch_ckpt.errors import CredentialError, LocationError
from azure_torch_ckpt.filesystem.paths import PathParts, locate
from azure_torch_ckpt.location import BlobLocation

__all__ = ["Stores", "one_credential"]


def one_credential(
    credential: Credential,
    account_key: str | None,
    sas_token: str | None,
    connection_string: str | None,
    anon: bool | None,
) -> Credential:
    """Return the credential that was passed under one of these names, or None.

    Raises:
        CredentialError: more than one was passed.
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
        raise CredentialError(f"{', '.join(given)} were passed together, and each is a credential. Pass one of them")
    return next(iter(given.values()), None)


@dataclass(slots=True)
class Stores:
    """Finds the location and the store for a path, without a request.

    Attributes:
        endpoint: the service's endpoint, if it does not follow from a path's account or from a connection string.
        access: with the credential that the user passed. None means the environment's, which is read for every path.
    """

    endpoint: str | None
    access: Access
    _stores: dict[BlobLocation, BlobStore] = field(default_factory=dict, repr=False)
    _environment: tuple[str | None, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.endpoint is not None:
            try:
                BlobLocation.parse(self.endpoint.rstrip("/") + "/container")
            except LocationError as error:
                raise LocationError(
                    "endpoint= is not a URL of Blob Storage. It looks like https://ACCOUNT.blob.core.windows.net or "
                    "http://127.0.0.1:10000/devstoreaccount1, without a container"
                ) from error
            if "?" in self.endpoint:
                raise LocationError("endpoint= has a query. Pass a SAS as sas_token=")

    def locate(self, path: str) -> BlobLocation:
        """Return the location of the blob or folder that a path names. Raises `LocationError`."""
        return locate(path, self.endpoint or named_endpoint(self.access.credential, PathParts.of(path).account))

    def store(self, location: BlobLocation) -> BlobStore:
        """Return the store for a location's container: always the same one, because it keeps connections."""
        environment = environment_values() if self.access.credential is None else ()
        if environment != self._environment:  # may be a new SAS
            self._environment, self._stores = environment, {}
        root = location.container_root()
        store = self._stores.get(root)
        if store is None:
            store = self._stores[root] = BlobStore(root, self.access)
        return store
