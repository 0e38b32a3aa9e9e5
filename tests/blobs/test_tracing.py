"""azure-core's tracing sees the requests of a transfer below the caller's span, in the workers' threads too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from azure.core.settings import settings
from azure.core.tracing.ext.opentelemetry_span import OpenTelemetrySpan
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, TransferOptions
from azure_torch_ckpt.emulator import Azurite
from azure_torch_ckpt.events import TransferEvent, listening

KEY = Azurite.account_key


class ThreadNames(SpanProcessor):
    """Notes the thread in which each span began."""

    def __init__(self) -> None:
        self.of: dict[int, str] = {}

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self.of[span.get_span_context().span_id] = threading.current_thread().name


exporter, threads = InMemorySpanExporter(), ThreadNames()


@pytest.fixture(scope="module", autouse=True)
def tracing() -> Iterator[None]:
    """OpenTelemetry as an application sets it up; its provider can be set once in a process."""
    provider = TracerProvider()
    provider.add_span_processor(threads)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    settings.tracing_implementation = OpenTelemetrySpan
    yield
    settings.tracing_implementation = None


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_requests_of_workers_are_spans_below_the_span_of_the_training_step(container: str) -> None:
    url = f"{container}/run/step-1"
    options = TransferOptions(block_size=64 * 1024)
    state = {"weight": torch.arange(100_000.0)}
    heard: list[TransferEvent] = []
    exporter.clear()
    with listening(heard.append), trace.get_tracer("training").start_as_current_span("step 1"):
        dcp.save(state, storage_writer=AzureBlobWriter(url, credential=KEY, options=options))
        dcp.load(state, storage_reader=AzureBlobReader(url, credential=KEY, options=options))
    spans = {span.context.span_id: span for span in exporter.get_finished_spans() if span.context is not None}
    sent = [span for span in spans.values() if span.kind is trace.SpanKind.CLIENT]
    assert len(sent) == sum(event.requests for event in heard)
    assert all(outermost(span, spans).name == "step 1" for span in sent)
    names = {threads.of[span.context.span_id].rpartition("-")[0] for span in sent if span.context is not None}
    assert {"blob-upload", "blob-download"} <= names


def outermost(span: ReadableSpan, spans: dict[int, ReadableSpan]) -> ReadableSpan:
    while span.parent is not None:
        span = spans[span.parent.span_id]
    return span
