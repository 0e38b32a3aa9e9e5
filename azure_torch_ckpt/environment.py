"""The credential that the environment names, in the variables of the Azure CLI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from azure_torch_ckpt.credentials import Credential

__all__ = ["VARIABLES", "credential_from_environment"]

_ACCOUNT: Final = "AZURE_STORAGE_ACCOUNT"
_CONNECTION_STRING: Final = "AZURE_STORAGE_CONNECTION_STRING"
_KEY: Final = "AZURE_STORAGE_KEY"
_SAS_TOKEN: Final = "AZURE_STORAGE_SAS_TOKEN"

VARIABLES: Final = (_CONNECTION_STRING, _KEY, _SAS_TOKEN)
"""The variables that hold a secret, the strongest first."""


def credential_from_environment(environment: Mapping[str, str] | None = None) -> Credential:
    """What to pass as ``credential=`` where the user passed nothing: None is ``DefaultAzureCredential``.

    The variables are those of the Azure CLI
    (https://learn.microsoft.com/cli/azure/azure-cli-configuration#cli-configuration-values-and-environment-variables).
    The first of them that is set and not blank counts: ``AZURE_STORAGE_CONNECTION_STRING``, ``AZURE_STORAGE_KEY``,
    ``AZURE_STORAGE_SAS_TOKEN``. A key goes with ``AZURE_STORAGE_ACCOUNT`` if that is set, and is then refused for any
    other account; else it is tried with the account of the URL. Whatever is wrong with a value shows when it is used
    (`CredentialError`), not here.

    Args:
        environment: instead of ``os.environ``.
    """
    environment = os.environ if environment is None else environment
    values = {name: environment.get(name, "").strip() for name in (_ACCOUNT, *VARIABLES)}
    if values[_CONNECTION_STRING]:
        return values[_CONNECTION_STRING]
    if values[_KEY] and values[_ACCOUNT]:
        return f"AccountName={values[_ACCOUNT]};AccountKey={values[_KEY]}"
    return values[_KEY] or values[_SAS_TOKEN] or None
