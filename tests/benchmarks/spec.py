"""Cases, jobs and addresses: the data classes that travel between the processes of a benchmark."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

WARM = "4x65536"
"""The state dict of a warm-up (`tests.benchmarks.works.build`)."""

Step = Literal["save", "load", "rows", "columns", "twentieth"]


@dataclass(frozen=True)
class Regime:
    """The connection to the server.

    Attributes:
        latency_ms: what every request waits before it is answered.
        mbps: MB/s that one connection carries; 0 for no limit.
    """

    name: str
    tls: bool
    latency_ms: int = 0
    mbps: int = 0

    @property
    def is_slow(self) -> bool:
        return self.latency_ms > 0 or self.mbps > 0


PLAIN = Regime("plain", tls=False)
TLS = Regime("TLS", tls=True)
SLOW = Regime("TLS, 20 ms, 60 MB/s", tls=True, latency_ms=20, mbps=60)
SLOW_PLAIN = Regime("plain, 20 ms, 60 MB/s", tls=False, latency_ms=20, mbps=60)
REGIMES = {regime.name: regime for regime in (PLAIN, TLS, SLOW, SLOW_PLAIN)}


@dataclass(frozen=True)
class Case:
    """One client that does one thing.

    Attributes:
        client: a name of `tests.benchmarks.clients.make`, or ``climit``.
        step: ``rows`` and ``columns`` load an eighth of every tensor, ``twentieth`` every twentieth tensor.
        work: what the tables call the state dict.
        tensors: the state dict itself, as `tests.benchmarks.works.build` takes it.
        regime: a name of `REGIMES`.
        connections: how many the client may use, where it has such an option.
    """

    client: str
    step: Step
    work: str
    tensors: str
    regime: str
    connections: int = 16
    ranks: int = 1
    checksums: bool = True

    @property
    def name(self) -> str:
        parts = [
            f"{self.work} ({self.tensors})",
            self.step,
            self.regime,
            f"{self.connections} connections",
            self.client,
        ]
        if self.ranks > 1:
            parts.append(f"{self.ranks} ranks")
        if not self.checksums:
            parts.append("no checksums")
        return ", ".join(parts)


@dataclass(frozen=True)
class AsyncCase:
    """A loop that runs while ``dcp.async_save`` saves.

    Attributes:
        writer: ``ours``, or ``disk`` for torch's FileSystemWriter.
        loop: ``python`` (pure Python) or ``torch`` (a training step).
    """

    writer: Literal["ours", "disk"]
    mode: Literal["THREAD", "PROCESS"]
    loop: Literal["python", "torch"]
    tensors: str
    regime: str
    connections: int

    @property
    def name(self) -> str:
        return f"async, {self.writer}, {self.mode}, {self.loop}"


@dataclass(frozen=True)
class Address:
    """How a client reaches the container.

    Attributes:
        account: URL of the account.
        key: the account key; None for ``DefaultAzureCredential``.
        sas: for a client that takes no key. Empty where it needs none.
        ca_file: PEM file of a certificate to trust.
        counts: whether the server counts requests, bytes and connections (``GET /__stats``).
    """

    account: str
    container: str
    key: str | None
    sas: str
    ca_file: str | None
    counts: bool

    @property
    def container_url(self) -> str:
        return f"{self.account}/{self.container}"


@dataclass(frozen=True)
class Job:
    """One run of a case, for the process that carries it out.

    Attributes:
        path: of the checkpoint in the container; a load finds one there.
        warm: the same of a tiny state dict, which is saved or loaded first and not measured.
    """

    case: Case | AsyncCase
    address: Address
    path: str
    warm: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"kind": type(self.case).__name__}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Job:
        case_type: type[Case | AsyncCase] = Case if data["kind"] == "Case" else AsyncCase
        return cls(case_type(**data["case"]), Address(**data["address"]), data["path"], data["warm"])
