"""The error types: documented, exported, and complete after a pickle, by which torch sends them to other ranks."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
from azure.core.exceptions import AzureError, HttpResponseError

import azure_torch_ckpt
from azure_torch_ckpt import (
    AzureCheckpointError,
    BlobLocation,
    BlobNotFoundError,
    CheckpointError,
    RequestRefusedError,
    StoreError,
    errors,
)
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.credentials import Access
from azure_torch_ckpt.emulator import Azurite

CLASSES: list[type[AzureCheckpointError]] = [getattr(errors, name) for name in errors.__all__]
EXPECTED_BASES = {
    "BlobNotFoundError": FileNotFoundError,
    "ContainerNotFoundError": FileNotFoundError,
    "CheckpointNotFoundError": FileNotFoundError,
    "CheckpointExistsError": FileExistsError,
    "AccessDeniedError": PermissionError,
    "ServiceUnavailableError": ConnectionError,
    "LocationError": ValueError,
    "CredentialError": ValueError,
}


def through_pickle(error: AzureCheckpointError, protocol: int = pickle.HIGHEST_PROTOCOL) -> Any:
    return pickle.loads(pickle.dumps(error, protocol))


def test_all_errors_are_listed_sorted_and_exported() -> None:
    defined = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == errors.__name__
    ]
    assert errors.__all__ == sorted(defined)
    assert set(defined) <= set(azure_torch_ckpt.__all__)
    assert all(getattr(azure_torch_ckpt, cls.__name__) is cls for cls in CLASSES)


@pytest.mark.parametrize("cls", CLASSES)
def test_each_is_documented_and_in_the_tree(cls: type[AzureCheckpointError]) -> None:
    assert (vars(cls).get("__doc__") or "").strip().endswith(".")
    assert issubclass(cls, AzureCheckpointError) and cls.__name__.endswith("Error")


@pytest.mark.parametrize(("name", "base"), EXPECTED_BASES.items())
def test_who_catches_the_builtin_error_catches_ours(name: str, base: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), base)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("cls", CLASSES)
def test_a_pickle_keeps_type_message_attributes_and_cause(cls: type[AzureCheckpointError], protocol: int) -> None:
    error = cls("could not do it: é")
    error.__cause__ = KeyError("why")
    error.where = "on rank 7"  # type: ignore[attr-defined]
    if isinstance(error, StoreError):
        error.status, error.error_code = 412, "ConditionNotMet"
    for other in (through_pickle(error, protocol), copy.deepcopy(error), through_pickle(through_pickle(error))):
        assert type(other) is cls
        assert str(other) == str(error) == "could not do it: é"
        assert other.args == error.args
        assert vars(other) == vars(error)
        assert type(other.__cause__) is KeyError and other.__cause__.args == ("why",)
        assert other.__suppress_context__


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("args", [(), (2, "two arguments")], ids=["none", "two"])
def test_any_number_of_arguments(cls: type[AzureCheckpointError], args: tuple[Any, ...]) -> None:
    other = through_pickle(cls(*args))
    assert type(other) is cls and other.args == args and str(other) == str(cls(*args))


def test_without_attributes_and_cause() -> None:
    other = through_pickle(StoreError("x"))
    assert (other.status, other.error_code, other.__cause__) == (None, None, None)


def test_a_chain_of_ours_keeps_all_its_links() -> None:
    inner = BlobNotFoundError("inner")
    inner.status = 404
    inner.__cause__ = OSError(2, "no such file")
    outer = CheckpointError("outer")
    outer.__cause__ = inner
    other = through_pickle(outer)
    assert type(other.__cause__) is BlobNotFoundError and other.__cause__.status == 404
    assert type(other.__cause__.__cause__) is FileNotFoundError and other.__cause__.__cause__.errno == 2


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("cannot")


class NotRebuilt(Exception):
    """Pickles, but cannot be made again from its one argument."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("cause", "says"),
    [
        (Unpicklable("broken"), "Unpicklable: broken"),
        (NotRebuilt("this", "that"), "NotRebuilt: this and that"),
        (ValueError("holds", threading.Lock()), "ValueError: .*holds"),
        (HttpResponseError("the SDK's"), "HttpResponseError: the SDK's"),
    ],
)
def test_a_cause_that_cannot_travel_is_told_in_words(cause: Exception, says: str) -> None:
    error = RequestRefusedError("refused")
    error.__cause__ = cause
    other = through_pickle(error)
    assert type(other.__cause__) is RuntimeError
    with pytest.raises(RuntimeError, match=f"^{says}"):
        raise other.__cause__
    assert error.__cause__ is cause  # the original is as it was


@pytest.mark.parametrize("inside", [False, True], ids=["as a cause", "as a cause of the cause"])
def test_no_request_of_the_sdk_travels(azurite: Azurite, container: str, inside: bool) -> None:
    """Its URL may hold a SAS, and its headers a token."""
    store = BlobStore(BlobLocation.parse(container), Access(azurite.account_key))
    with pytest.raises(StoreError) as caught:
        store.stat("none")
    cause: Any = caught.value.__cause__
    assert isinstance(cause, AzureError)
    request = cause.response.request  # type: ignore[attr-defined]
    secret = request.headers["Authorization"].partition(":")[2]
    assert secret.encode() in pickle.dumps(request)
    error: AzureCheckpointError = caught.value
    if inside:
        error = CheckpointError("outer")
        error.__cause__ = caught.value
    assert secret.encode() not in pickle.dumps(error)
    assert "BlobNotFound" in str(through_pickle(error)) + str(through_pickle(error).__cause__)
