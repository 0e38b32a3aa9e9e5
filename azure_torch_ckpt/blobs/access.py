"""`Access`: how a container is reached. Credential, limits and certificates, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from azure_torch_ckpt.credentials import Credential, PickledCredential
from azure_torch_ckpt.options import TransferOptions

__all__ = ["Access"]


@dataclass(frozen=True, init=False)
class Access:
    """The arguments ``credential=``, ``options=`` and ``ca_file=`` of public functions.

    A pickle holds the credential, because it would be useless without: treat it as a secret.

    Attributes:
        credential: see `azure_torch_ckpt.credentials.resolve`.
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
