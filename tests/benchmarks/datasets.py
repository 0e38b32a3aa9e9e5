"""What our datasets and azstoragetorch's do with the same blobs: requests, seconds, memory, sharing.

    tox -e bench-blob-io

Both read the same container through a proxy that counts and that holds every request back for 20 ms. Prints the table
of docs/datasets.md.
"""

from __future__ import annotations

import itertools
import os
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from typing import Any

import azstoragetorch.datasets
from azure.storage.blob import ContainerSasPermissions, generate_container_sas
from torch.utils.data import DataLoader

import azure_torch_ckpt.datasets
from azure_torch_ckpt.emulator import Azurite
from tests.datasets.sample_blobs import fill
from tests.support.faults import Hold
from tests.support.proxy import FaultProxy

LATENCY = 0.02
COUNT = 64
SIZE = 100_000
TRANSFORM_SECONDS = 0.01
NAMES = 5_000
RUNS = 5
KINDS = {"azstoragetorch": azstoragetorch.datasets, "here": azure_torch_ckpt.datasets}


@dataclass(frozen=True)
class Bench:
    proxy: FaultProxy
    url: str


Trait = Callable[[Any, Bench], str]


def number_of(blob: Any) -> int:
    with blob.reader() as file:
        data = file.read()
    assert len(data) == SIZE
    return int(data[:4])


def slowly(blob: Any) -> int:
    number = number_of(blob)
    time.sleep(TRANSFORM_SECONDS)
    return number


def requests(bench: Bench) -> str:
    counts = Counter(request.kind for request in bench.proxy.requests())
    return f"{counts['List']} list, {counts['Head']} HEAD, {counts['Get Blob']} GET"


def iterable_epoch(kind: Any, bench: Bench) -> str:
    started = time.perf_counter()
    found = list(kind.IterableBlobDataset.from_container_url(bench.url, transform=slowly))
    seconds = time.perf_counter() - started
    assert sorted(found) == list(range(COUNT))
    return f"{requests(bench)}, {seconds:.2f} s"


def mapped_epoch(kind: Any, bench: Bench) -> str:
    started = time.perf_counter()
    dataset = kind.BlobDataset.from_container_url(bench.url, transform=number_of)
    found = [number for batch in DataLoader(dataset, batch_size=16, collate_fn=list) for number in batch]
    seconds = time.perf_counter() - started
    assert found == list(range(COUNT))
    return f"{requests(bench)}, {seconds:.2f} s"


def two_epochs(kind: Any, bench: Bench) -> str:
    dataset = kind.IterableBlobDataset.from_container_url(bench.url, transform=number_of)
    loader = DataLoader(dataset, batch_size=4, num_workers=4, collate_fn=list)
    for _ in range(2):
        assert sorted(itertools.chain(*loader)) == list(range(COUNT))
    return requests(bench)


def length(kind: Any, bench: Bench) -> str:
    try:
        return str(len(kind.IterableBlobDataset.from_container_url(bench.url)))
    except TypeError:
        return "`TypeError`"


def over_ranks(kind: Any, bench: Bench) -> str:
    found = []
    for rank in range(2):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        found.append(set(kind.IterableBlobDataset.from_container_url(bench.url, transform=number_of)))
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    return f"{len(found[0])} and {len(found[1])}, {len(found[0] & found[1])} of them twice"


def in_batches(kind: Any, bench: Bench) -> str:
    settings = {"batch_size": 4} if kind is azure_torch_ckpt.datasets else {}
    orders = []
    for workers in (0, 2):
        dataset = kind.IterableBlobDataset.from_container_url(bench.url, transform=number_of, **settings)
        orders.append(list(itertools.chain(*DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=list))))
    return "the same" if orders[0] == orders[1] else "another"


def used_before(kind: Any, bench: Bench) -> str:
    """Workers that are forked while the process has connections open."""
    outcomes: Counter[str] = Counter()
    for _ in range(RUNS):
        dataset = kind.BlobDataset.from_container_url(bench.url, transform=first_bytes)
        assert dataset[0] == b"0000"
        loader = DataLoader(dataset, batch_size=1, num_workers=4, collate_fn=list)
        try:
            right = list(itertools.chain(*loader)) == [b"%04d" % number for number in range(COUNT)]
            outcomes["right" if right else "with wrong data"] += 1
        except Exception as error:  # "Caught ... in DataLoader worker process"
            outcomes[f"`{str(error).split()[1]}`"] += 1
    return f"of {RUNS} runs " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())


def first_bytes(blob: Any) -> bytes:
    with blob.reader() as file:
        return bytes(file.read()[:4])


def below_a_path(kind: Any, bench: Bench) -> str:
    base, query = bench.url.split("?")
    try:
        return f"{len(kind.BlobDataset.from_container_url(f'{base}/data/003?{query}'))} blobs"
    except Exception:
        return "an error"


def reader(kind: Any, bench: Bench) -> str:
    def name(blob: Any) -> str:
        with blob.reader() as file:
            return type(file).__name__

    names = set(kind.IterableBlobDataset.from_container_url(bench.url, transform=name))
    return ", ".join(f"`{name}`" for name in sorted(names))


def unread(kind: Any, bench: Bench) -> str:
    urls = [f"https://account.blob.core.windows.net/data/train/{number:07}.jpg" for number in range(NAMES)]
    kind.BlobDataset.from_blob_urls(urls[:10], credential=False)
    tracemalloc.start()
    dataset = kind.BlobDataset.from_blob_urls(urls, credential=False)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return f"{held // len(dataset):,} bytes"


TRAITS: dict[str, Trait] = {
    f"`IterableBlobDataset`, {COUNT} blobs of 100 kB, a transform of 10 ms": iterable_epoch,
    f"`BlobDataset`, {COUNT} blobs in batches of 16": mapped_epoch,
    "`IterableBlobDataset`, 2 epochs with 4 workers": two_epochs,
    "`len()` of an `IterableBlobDataset`": length,
    f"two ranks, of {COUNT} samples": over_ranks,
    "order with 2 workers instead of none": in_batches,
    "4 workers, after `dataset[0]` in the process that starts them": used_before,
    "a blob that is not being read": unread,
    "`blob.reader()`": reader,
    "a `container_url` with the path `data/003`, where `data/003.txt` is": below_a_path,
}


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"{LATENCY * 1000:.0f} ms a request.\n")
    print(f"| | azstoragetorch {version('azstoragetorch')} | here |\n|---|---|---|")
    with Azurite() as azurite, FaultProxy(azurite.endpoint) as proxy:
        container = azurite.create_container("bench")
        fill(container, {f"data/{number:03}.txt": b"%04d" % number + bytes(SIZE - 4) for number in range(COUNT)})
        sas = generate_container_sas(
            azurite.account_name,
            "bench",
            account_key=azurite.account_key,
            permission=ContainerSasPermissions(read=True, list=True),
            expiry=datetime.now(timezone.utc) + timedelta(hours=2),
        )
        proxy.when(lambda request: True, times=None).do(Hold(LATENCY))
        bench = Bench(proxy, f"{proxy.endpoint}/bench?{sas}")
        for name, trait in TRAITS.items():
            cells = []
            for kind in KINDS.values():
                proxy.log.clear()
                cells.append(trait(kind, bench))
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
