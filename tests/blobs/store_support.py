"""What the tests of the store have in common. Its fixtures come by ``pytest_plugins``."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Iterator

import pytest
from azure.storage.blob import ContainerSasPermissions, generate_container_sas

from azure_torch_ckpt.blobs.access import Access
from azure_torch_ckpt.blobs.store import BlobStore
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.location import BlobLocation

MIB = 1024 * 1024
KEY = Azurite.account_key
ODD_NAMES = [
    "a b",
    "sub folder/x y.pt",
    "ümläut/日本語/🙂",
    "100%",
    "%41",
    "a%2Fb",
    "a+b",
    "a#b",
    "a?b",
    "a&b=c;d,e",
    "'quotes\"",
    "epoch=1-step=200.ckpt",
    ".metadata",
    "x/.metadata",
    "tilde~!$()*[]{}|^`<>:@",
]


@pytest.fixture
def store(container: str) -> Iterator[BlobStore]:
    made = BlobStore(BlobLocation.parse(container), Access(KEY))
    yield made


@pytest.fixture
def proxied(proxied_container: str) -> Iterator[BlobStore]:
    made = BlobStore(BlobLocation.parse(proxied_container), Access(KEY))
    yield made


def sas_for(container: str, permission: str = "racwdl", hours: float = 1) -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    return generate_container_sas(
        Azurite.account_name,
        container.rpartition("/")[2],
        KEY,
        permission=ContainerSasPermissions.from_string(permission),
        start=now - datetime.timedelta(hours=48),
        expiry=now + datetime.timedelta(hours=hours),
    )


def read(store: BlobStore, path: str) -> bytes:
    return store.read(path, limit=100 * MIB)[0]


def texts_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error)
