"""CRC64-NVME, which is the checksum in the service's ``x-ms-content-crc64``, and MD5 for small blobs.

``azure-storage-extensions`` computes the same values, but only of ``bytes``, with the GIL held and at an eighth of the
speed. So they are computed by ``awscrt`` (0.31 and later, the first with `combine`).
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

import awscrt.checksums as _crt  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["combine", "crc64", "header_value", "md5", "parse_header_value"]


def crc64(data: Buffer, previous: int = 0) -> int:
    """Return the CRC64-NVME of ``data``, or of all data so far if ``previous`` is the value of the data before.

    ``data`` is any contiguous buffer of any length (checked with 5 GiB). It is read in place, without the GIL.

    Raises:
        BufferError: the buffer is not contiguous.
    """
    return int(_crt.crc64nvme(data, previous))


def combine(crc_a: int, crc_b: int, length_b: int) -> int:
    """Return the CRC of two byte strings back to back, from the CRC of each and the second one's length in bytes.

    Costs under a microsecond whatever the length, so one pass over the data serves blocks and items alike.
    """
    return int(_crt.combine_crc64nvme(crc_a, crc_b, length_b))


def header_value(crc: int) -> str:
    """Return ``crc`` in the form of ``x-ms-content-crc64``: base64 of its 8 bytes, the lowest byte first.

    azure-storage-blob sends this byte order when it computes the header itself
    (``validate_content="crc64"``, since 12.31); the REST reference says only that the value is a CRC64.
    """
    return base64.b64encode(crc.to_bytes(8, "little")).decode("ascii")


def parse_header_value(value: str | bytes | bytearray) -> int:
    """The inverse of `header_value`, for its text or its decoded bytes."""
    return int.from_bytes(base64.b64decode(value) if isinstance(value, str) else value, "little")


def md5(data: bytes) -> bytes:
    """Return the MD5 of a small blob, which the service stores with it. It finds accidents, not attacks."""
    return hashlib.md5(data, usedforsecurity=False).digest()
