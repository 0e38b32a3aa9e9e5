"""`GatherTransport` sends and receives exactly the right bytes, and raises an error for every broken connection.

Requests are signed with a SAS and go directly to the transport, without the SDK's pipeline.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.transport.buffers import Gather, Scatter
from azure_torch_ckpt.transport.gather_transport import GatherTransport
from tests.support.faults import Reframe
from tests.support.proxy import FaultProxy
from tests.transport.signed_requests import KIB, MIB, Blobs, cut_up, some_bytes

pytest_plugins = ("tests.transport.signed_requests",)

# Sizes around the one below which views are joined, and around the 1 MiB that goes to a socket at once.
SIZES = [
    [1],
    [0, 0, 5, 0],
    [64 * KIB - 1],
    [64 * KIB],
    [64 * KIB + 1],
    [64 * KIB - 1, 1],
    [64 * KIB - 1, 0, 64 * KIB - 1, 2],
    [1, 64 * KIB, 1, 64 * KIB + 1, 1],
    [MIB - 1],
    [MIB],
    [MIB + 1],
    [3 * MIB + 7, 9, MIB, 64 * KIB - 1, 0, 2 * MIB],
    [3] * 10_000,
    [100, 0, 64 * KIB] * 40,
]
NAMES = ["-".join(map(str, sizes[:6])) for sizes in SIZES]


# ---- Sending -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=NAMES)
def test_a_gathered_body_arrives_as_it_is(
    transport: GatherTransport, blobs: Blobs, proxy: FaultProxy, sizes: list[int]
) -> None:
    data = some_bytes(sum(sizes))
    assert blobs.put(transport, "blob", Gather(cut_up(data, sizes))).status_code == 201
    assert [seen.body_length for seen in proxy.requests("Put Blob")] == [len(data)]
    assert blobs.get(transport, "blob", 0, len(data)).content == data


def test_a_gather_copies_small_pieces_only_and_can_be_sent_again() -> None:
    sizes = [10] * 5_000 + [3 * MIB, 10, 128 * KIB, 10, 64 * KIB, 10]
    data = some_bytes(sum(sizes))
    views = cut_up(data, sizes)
    body = Gather(views)
    assert len(body) == len(data)
    for _ in range(2):
        pieces = list(body)
        assert b"".join(pieces) == data
        assert len(pieces) == 1 + 3 + 1 + 1 + 1
        assert all(len(piece) <= MIB for piece in pieces)
        owners = [piece.obj for piece in pieces if isinstance(piece, memoryview)]
        assert [owner is views[5_000].obj for owner in owners[:3]] == [True] * 3


@pytest.mark.parametrize("body", [b"bytes", bytearray(b"bytearray"), memoryview(b"memoryview"), b""])
def test_other_bodies_are_sent_too(transport: GatherTransport, blobs: Blobs, body: Any) -> None:
    assert blobs.put(transport, "blob", body).status_code == 201
    if len(body):
        assert blobs.get(transport, "blob", 0, len(body)).content == bytes(body)


# ---- Receiving -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=NAMES)
def test_a_body_is_scattered_exactly(either: Any, sizes: list[int]) -> None:
    _, blobs, transport = either
    data = some_bytes(sum(sizes) + 20)
    blobs.put(transport, "blob", data)
    # The views are one byte apart in one memory, which shows bytes that are written beyond a view.
    arena = bytearray(b"#" * (sum(sizes) + len(sizes)))
    starts = list(itertools.accumulate((size + 1 for size in sizes), initial=0))
    views = [memoryview(arena)[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    dest = Scatter(views)
    response = blobs.get(transport, "blob", 10, dest.size, dest)
    assert response.status_code == 206 and response.content == b"" and dest.received
    assert b"".join(views) == data[10:-10]
    assert all(arena[start + size] == ord("#") for start, size in zip(starts, sizes, strict=False))


@pytest.mark.parametrize("wanted", [99, 101])
def test_a_response_of_another_length_leaves_the_views_alone(either: Any, wanted: int) -> None:
    _, blobs, transport = either
    blobs.put(transport, "blob", some_bytes(100))
    memory = bytearray(wanted)
    dest = Scatter([memoryview(memory)])
    response = blobs.get(transport, "blob", 0, 100, dest)
    assert not dest.received and not any(memory)
    assert response.content == response.body() == response.read() == some_bytes(100)
    assert b"".join(response.iter_bytes()) == some_bytes(100)


def test_an_error_of_the_right_length_leaves_the_views_alone(transport: GatherTransport, blobs: Blobs) -> None:
    length = len(blobs.get(transport, "missing", 0, 1).content)
    memory = bytearray(length)
    dest = Scatter([memoryview(memory)])
    response = blobs.get(transport, "missing", 0, length, dest)
    assert response.status_code == 404 and len(response.content) == length
    assert not dest.received and not any(memory)


def test_a_chunked_response_is_read_whole(either: Any) -> None:
    proxy, blobs, transport = either
    data = some_bytes(3 * MIB + 1)
    blobs.put(transport, "blob", data)
    proxy.when("Get Blob").do(Reframe(chunked=True))
    memory = bytearray(len(data))
    dest = Scatter([memoryview(memory)])
    response = blobs.get(transport, "blob", 0, len(data), dest)
    assert response.content == data
    assert not dest.received and not any(memory)  # the length is unknown beforehand
    assert blobs.get(transport, "blob", 5, 2).content == data[5:7]
    assert proxy.connections == 1


def test_a_response_that_ends_its_connection_is_received(either: Any) -> None:
    proxy, blobs, transport = either
    data = some_bytes(MIB + 1)
    blobs.put(transport, "blob", data)
    proxy.when("Get Blob").do(Reframe(close=True))
    memory = bytearray(len(data))
    view = memoryview(memory)
    dest = Scatter([view[:10], view[10 : 300 * KIB], view[300 * KIB :]])
    blobs.get(transport, "blob", 0, len(data), dest)
    assert dest.received and memory == data
    assert blobs.get(transport, "blob", 5, 2).content == data[5:7]
    assert [seen.connection for seen in proxy.log] == [1, 1, 2]


def test_16_threads_receive_over_tls_at_once(azurite_tls: Azurite) -> None:
    """From the emulator itself: its TLS comes from OpenSSL, as ours does, in records of 16 KiB."""
    blobs = Blobs(azurite_tls.create_container(f"test-{os.getpid()}-{time.time_ns()}"))
    data = some_bytes(MIB) * 16

    def receive(start: int) -> bool:
        memory = bytearray(min(2 * MIB + 12_345, len(data) - start))
        view = memoryview(memory)
        dest = Scatter([view[:100], view[100 : 100 + 70 * KIB], view[100 + 70 * KIB :]])
        blobs.get(shared, "blob", start, dest.size, dest)
        return dest.received and memory == data[start : start + dest.size]

    with contextlib.closing(GatherTransport(ca_file=str(azurite_tls.certificate))) as shared:
        assert blobs.put(shared, "blob", Gather([memoryview(data)])).status_code == 201
        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(receive, range(0, len(data), MIB)))
