from __future__ import annotations

import array
import base64
import mmap
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azure_torch_ckpt._internal.checksums import combine, crc64, header_value

CHECK = 0xAE8B14860A799888  # of b"123456789": the check value in the catalogue of parametrised CRC algorithms


def reference(data: bytes) -> int:
    """CRC64-NVME by its definition: the reflected polynomial, bit by bit."""
    crc = 0xFFFFFFFFFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x9A6C9329AC4BC9B5 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFFFFFFFFFF


def test_the_published_check_value() -> None:
    assert crc64(b"123456789") == CHECK == reference(b"123456789")
    assert crc64(b"") == 0


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_parts_give_the_value_of_the_whole(a: bytes, b: bytes) -> None:
    whole = reference(a + b)
    assert crc64(a + b) == whole
    assert crc64(b, crc64(a)) == whole
    assert combine(crc64(a), crc64(b), len(b)) == whole


def test_any_contiguous_buffer_is_read_as_its_bytes() -> None:
    numbers = array.array("q", range(1000))
    raw = numbers.tobytes()
    expected = crc64(raw)
    assert crc64(numbers) == expected
    assert crc64(memoryview(numbers)) == expected
    assert crc64(memoryview(bytearray(raw))) == expected
    assert crc64(memoryview(b"x" + raw)[1:]) == expected
    with pytest.raises(BufferError):
        crc64(memoryview(raw)[::2])


@pytest.fixture
def zeros() -> Iterator[memoryview]:
    """4 GiB and 5 bytes. Nothing writes to the pages, so the kernel serves all of them from one."""
    length = (1 << 32) + 5
    with mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ) as pages:
        view = memoryview(pages)
        yield view
        view.release()


def test_lengths_above_32_bits(zeros: memoryview) -> None:
    quarter = crc64(bytes(1 << 20))
    for doubling in range(20, 30):
        quarter = combine(quarter, quarter, 1 << doubling)
    half = combine(quarter, quarter, 1 << 30)
    whole = combine(half, half, 1 << 31)
    rest = crc64(bytes(5))
    expected = combine(whole, rest, 5)
    assert crc64(zeros) == expected != rest
    assert combine(rest, whole, 1 << 32) == expected


def test_other_threads_run_meanwhile(zeros: memoryview) -> None:
    begun, may_run, has_run = threading.Event(), threading.Event(), threading.Event()

    def run() -> None:
        begun.set()
        may_run.wait()
        has_run.set()

    other = threading.Thread(target=run)
    interval = sys.getswitchinterval()
    other.start()
    assert begun.wait(60)
    try:
        sys.setswitchinterval(1000)  # from here on a thread runs only when another one lets go of the GIL by itself
        may_run.set()
        for _ in range(20):  # the system may take its time to let it run
            if has_run.is_set():
                break
            crc64(zeros[: 1 << 30])
        meanwhile = has_run.is_set()
    finally:
        sys.setswitchinterval(interval)
        other.join()
    assert meanwhile


def test_the_header_is_base64_of_the_bytes_lowest_first() -> None:
    assert base64.b64decode(header_value(CHECK)) == bytes.fromhex("8898790a86148bae")
    assert header_value(0) == "AAAAAAAAAAA="
    assert header_value(1) == "AQAAAAAAAAA="
