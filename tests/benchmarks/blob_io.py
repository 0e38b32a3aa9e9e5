"""Requests, bytes and seconds of `BlobIO` beside azstoragetorch's, for the ways in which libraries read files.

    tox -e bench-blob-io

Both read the same blobs from the same emulator, through a proxy that counts and that holds every request back for
20 ms, which is what one takes in a data centre, and over a link that moves 60 MB/s a connection, which is what the
service does. Prints the table of docs/blob-io.md.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from typing import IO, Any

import azstoragetorch.io
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from azure.storage.blob import ContainerSasPermissions, generate_container_sas

from azure_torch_ckpt import BlobIO
from azure_torch_ckpt.emulator import Azurite
from tests.benchmarks.slow_link import SlowLink
from tests.support.faults import Hold
from tests.support.proxy import FaultProxy

MIB = 1024 * 1024
Open = Callable[[str], Any]


@dataclass(frozen=True)
class Pattern:
    """A way to read one blob.

    Attributes:
        make: the blob's content.
        read: reads it and returns what it read, to be compared.
    """

    name: str
    make: Callable[[], bytes]
    read: Callable[[IO[bytes]], object]


def torch_bytes(tensors: int, numbers: int) -> bytes:
    torch.manual_seed(0)
    torch.save({f"layer.{i}": torch.randn(numbers) for i in range(tensors)}, stream := io.BytesIO())
    return stream.getvalue()


def torch_read(file: IO[bytes]) -> object:
    return [tensor.sum().item() for tensor in torch.load(file).values()]


def safetensors_bytes() -> bytes:
    torch.manual_seed(0)
    return safetensors.torch.save({f"layer.{i}": torch.randn(250_000) for i in range(20)})


def safetensors_read(file: IO[bytes]) -> object:
    length = int.from_bytes(file.read(8), "little")
    start, end = json.loads(file.read(length))["layer.13"]["data_offsets"]
    file.seek(8 + length + start)
    return file.read(end - start)


def zip_bytes() -> bytes:
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        for number in range(200):
            archive.writestr(f"{number}.bin", random.Random(number).randbytes(20_000))
    return stream.getvalue()


def zip_read_one(file: IO[bytes]) -> object:
    with zipfile.ZipFile(file) as archive:
        return archive.read("120.bin")


def zip_read_all(file: IO[bytes]) -> object:
    with zipfile.ZipFile(file) as archive:
        return [archive.read(name) for name in archive.namelist()]


def tar_bytes() -> bytes:
    with tarfile.open(fileobj=(stream := io.BytesIO()), mode="w") as archive:
        for number in range(100):
            entry = tarfile.TarInfo(f"{number}.bin")
            entry.size = 20_000
            archive.addfile(entry, io.BytesIO(random.Random(number).randbytes(entry.size)))
    return stream.getvalue()


def tar_read(file: IO[bytes]) -> object:
    with tarfile.open(fileobj=file, mode="r|") as archive:
        return [member.read() for entry in archive if (member := archive.extractfile(entry))]


def numpy_bytes() -> bytes:
    np.save(stream := io.BytesIO(), np.random.default_rng(0).random(MIB))
    return stream.getvalue()


def numpy_read(file: IO[bytes]) -> object:
    return np.load(file).tobytes()


def image_bytes() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(stream := io.BytesIO(), "JPEG")
    return stream.getvalue()


def image_read(file: IO[bytes]) -> object:
    with PIL.Image.open(file) as image:
        return image.tobytes()


def parquet_bytes() -> bytes:
    generator = np.random.default_rng(0)
    table = pa.table({name: generator.random(100_000) for name in "abcdefgh"})
    pq.write_table(table, stream := io.BytesIO(), row_group_size=25_000)
    return stream.getvalue()


def parquet_read(file: IO[bytes]) -> object:
    return pq.ParquetFile(file).read_row_group(2, columns=["c"]).to_pydict()


def lines_bytes() -> bytes:
    return b"".join(b"%d: a line of a text\n" % number for number in range(100_000))


def lines_read(file: IO[bytes]) -> object:
    return list(file)


def blob_bytes() -> bytes:
    return random.Random(0).randbytes(16 * MIB)


def sequential_read(file: IO[bytes]) -> object:
    return list(iter(lambda: file.read(64 * 1024), b""))


def random_read(file: IO[bytes]) -> object:
    chance = random.Random(1)
    pieces = []
    for _ in range(100):
        file.seek(chance.randrange(16 * MIB - 4096))
        pieces.append(file.read(4096))
    return pieces


PATTERNS = [
    Pattern("`torch.load`, 100 tensors of 8 kB", lambda: torch_bytes(100, 2_000), torch_read),
    Pattern("`torch.load`, 8 tensors of 12 MB", lambda: torch_bytes(8, 3_000_000), torch_read),
    Pattern("safetensors, 1 tensor of 20", safetensors_bytes, safetensors_read),
    Pattern("`zipfile`, 1 member of 200", zip_bytes, zip_read_one),
    Pattern("`zipfile`, all 200 members", zip_bytes, zip_read_all),
    Pattern("`tarfile` stream, 100 members of 20 kB", tar_bytes, tar_read),
    Pattern("`numpy.load`, 8 MB", numpy_bytes, numpy_read),
    Pattern("`PIL.Image.open`, JPEG", image_bytes, image_read),
    Pattern("`pyarrow.parquet`, 1 column of 1 row group of 4", parquet_bytes, parquet_read),
    Pattern("100,000 lines, 2.5 MB", lines_bytes, lines_read),
    Pattern("`read()`, 16 MiB", blob_bytes, lambda file: file.read()),
    Pattern("`read()`, 64 MiB", lambda: 4 * blob_bytes(), lambda file: file.read()),
    Pattern("`read(64 KiB)` to the end, 16 MiB", blob_bytes, sequential_read),
    Pattern("100 times 4 KiB, at random", blob_bytes, random_read),
]


@dataclass(frozen=True)
class Cost:
    requests: int
    megabytes: float
    seconds: float


def measure(proxy: FaultProxy, open_blob: Open, url: str, pattern: Pattern) -> tuple[Cost, str]:
    """What reading costs, and a digest of what was read."""
    proxy.log.clear()
    started = time.perf_counter()
    with open_blob(url) as file:
        result = pattern.read(file)
    seconds = time.perf_counter() - started
    sent = sum(request.sent for request in proxy.requests("Get Blob"))
    cost = Cost(proxy.count("Get Blob", "Head"), sent / 1e6, seconds)
    return cost, hashlib.sha256(repr(result).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.02, metavar="SECONDS", help="of each request")
    parser.add_argument("--speed", type=float, default=60, metavar="MB/S", help="of each connection")
    parser.add_argument("--repeat", type=int, default=3, help="the median of so many runs counts")
    arguments = parser.parse_args()
    print(f"azstoragetorch {version('azstoragetorch')}, torch {torch.__version__}, {arguments.latency * 1000:.0f} ms a "
          f"request, {arguments.speed:.0f} MB/s a connection. GET and HEAD requests, MB, seconds\n")  # fmt: skip
    print("| | `BlobIO` | | | azstoragetorch | | |\n|---|--:|--:|--:|--:|--:|--:|")
    print("| | requests | MB | s | requests | MB | s |")
    with (
        Azurite() as azurite,
        FaultProxy(azurite.endpoint) as proxy,
        SlowLink(proxy.endpoint, arguments.speed) as link,
    ):
        container = azurite.create_container("bench")
        sas = generate_container_sas(
            azurite.account_name,
            "bench",
            account_key=azurite.account_key,
            permission=ContainerSasPermissions(read=True),
            expiry=datetime.now(timezone.utc) + timedelta(hours=2),
        )
        proxy.when(lambda request: True, times=None).do(Hold(arguments.latency))
        openers: list[Open] = [lambda url: BlobIO(url, "rb"), lambda url: azstoragetorch.io.BlobIO(url, "rb")]
        for number, pattern in enumerate(PATTERNS):
            with BlobIO(f"{container}/{number}", "wb") as file:
                file.write(pattern.make())
            url = f"{link.endpoint}/bench/{number}?{sas}"
            cells, digests = [], set()
            for open_blob in openers:
                runs = [measure(proxy, open_blob, url, pattern) for _ in range(arguments.repeat)]
                digests |= {digest for _, digest in runs}
                cost = sorted((cost for cost, _ in runs), key=lambda cost: cost.seconds)[len(runs) // 2]
                cells += [f"{cost.requests}", f"{cost.megabytes:.2f}", f"{cost.seconds:.2f}"]
            assert len(digests) == 1, f"{pattern.name}: the two read different bytes"
            print(f"| {pattern.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
