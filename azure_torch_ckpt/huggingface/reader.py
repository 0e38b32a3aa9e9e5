"""`AzureBlobHuggingFaceReader`: loads safetensors files, whole or by shards, with ranges of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan

from azure_torch_ckpt.blobs.blob_info import BlobInfo
from azure_torch_ckpt.blobs.download import Download, Read
from azure_torch_ckpt.blobs.workers import run_all
from azure_torch_ckpt.dcp.base import step
from azure_torch_ckpt.dcp.metadata.schema import check_metadata, storage_info
from azure_torch_ckpt.dcp.reader import AzureBlobReader, SeenMetadata
from azure_torch_ckpt.dcp.tensors.chunks import is_whole
from azure_torch_ckpt.errors import (
    BlobChangedError,
    BlobNotFoundError,
    CheckpointNotFoundError,
    CheckpointReplacedError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)
from azure_torch_ckpt.huggingface.blob_names import INDEX, INDEX_LIMIT, SINGLE, ModelIndex, parse_index, save_id_of
from azure_torch_ckpt.huggingface.safetensors_header import (
    HEADER_LENGTH_BYTES,
    StoredTensor,
    header_length,
    parse_header,
)

__all__ = ["AzureBlobHuggingFaceReader"]

# Bytes. Most headers are shorter, so most files cost one request.
_FIRST_READ = 128 * 1024


class AzureBlobHuggingFaceReader(AzureBlobReader):
    """Load a model from safetensors files under a URL, on any number of ranks and with any sharding.

        state = model.state_dict()
        dcp.load(state, storage_reader=AzureBlobHuggingFaceReader(url))

    Reads what `AzureBlobHuggingFaceWriter`, transformers' ``save_pretrained`` and the Hub's users write
    (``model.safetensors``, or several files with ``model.safetensors.index.json``; the first wins, as in
    transformers), and the shards of torch's ``HuggingFaceStorageWriter``. Only the bytes that the state dict asks for
    are fetched. Tensors that our writer saved are compared with their checksums where they are read whole.

    Arguments and errors are those of `AzureBlobReader`.
    """

    _etags: dict[str, str]
    _odd_dtypes: dict[str, str]  # by the names of tensors: dtypes that this torch does not have

    @step
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Raise `UnsupportedCheckpointError` if torch lacks the dtype of a tensor that is asked for."""
        for item in plan.items:
            name = item.storage_index.fqn
            if name in self._odd_dtypes:
                raise UnsupportedCheckpointError(
                    f"{name[:200]!r} of {self.checkpoint_id} has the dtype {self._odd_dtypes[name][:50]!r}, and torch "
                    f"{torch.__version__} has none for its shape. Use a newer torch, or load without this tensor"
                )
        return super().prepare_local_plan(plan)

    def _run(self, download: Download, reads: Iterable[Read]) -> None:
        wanted = list(reads)
        super()._run(download, wanted)
        # Files of other writers keep their names when they are replaced. Then the header that was read is the old one.
        paths = {read.path for read in wanted}
        foreign = [file for file in self._etags if save_id_of(file) is None and self._at(file) in paths]
        run_all(
            (functools.partial(self._check_unchanged, file) for file in foreign),
            self._store.options.concurrency,
            "blob-look",
        )

    def _at(self, file: str) -> str:
        return self._location.join(file).path

    def _check_unchanged(self, file: str) -> None:
        try:
            self._store.stat(self._at(file), if_etag=self._etags[file])
        except (BlobChangedError, BlobNotFoundError) as error:
            raise self._replaced() from error

    def _read_metadata(self, rank: int | None) -> Metadata:
        if rank is not None:
            raise self._why_no_metadata or CheckpointNotFoundError(
                f"A model at {self.checkpoint_id} has no metadata of a single rank"
            )
        self._etags, self._odd_dtypes = {}, {}
        index, files = self._find()
        headers = self._headers(sorted(set(index.files.values())) if files is None else files)
        metadata = self._metadata_of(index, headers, files is None)
        check_metadata(metadata, f"The headers of the files at {self.checkpoint_id}")
        return metadata

    def _find(self) -> tuple[ModelIndex, list[str] | None]:
        """Read the index, or list the files of a model without one."""
        try:
            single = self._store.stat(self._location.join(SINGLE).path)
        except BlobNotFoundError:
            pass
        else:
            self._seen = SeenMetadata(SINGLE, single.etag)
            return ModelIndex({}, {}), [SINGLE]
        try:
            data, etag = self._store.read(self._location.join(INDEX).path, limit=INDEX_LIMIT)
        except BlobNotFoundError:
            files = self._files_without_index()
            return ModelIndex({}, {}), files
        self._seen = SeenMetadata(INDEX, etag)
        return parse_index(data, f"{self.checkpoint_id}/{INDEX}"), None

    def _files_without_index(self) -> list[str]:
        prefix = self._location.prefix
        blobs = [entry for entry in self._store.list_folder(prefix) if isinstance(entry, BlobInfo)]
        named = {blob.path[len(prefix) :]: blob for blob in blobs if blob.path.endswith(".safetensors")}
        # Files of our writer count only if an index names them, for their save may have failed.
        files = sorted(name for name in named if save_id_of(name) is None)
        if not files:
            hint = "There are no blobs at all; check the URL" if not blobs else "None of the blobs there is a model's"
            if named:
                hint = f"There are {len(named)} files without it, of a save that did not finish. Load an older model"
            raise CheckpointNotFoundError(f"No model at {self.checkpoint_id}: {INDEX} is not there. {hint}")
        self._seen = SeenMetadata(files[0], named[files[0]].etag)
        return files

    def _headers(self, files: Iterable[str]) -> dict[str, dict[str, StoredTensor]]:
        headers: dict[str, dict[str, StoredTensor]] = {}

        def read(file: str) -> None:
            headers[file] = self._header(file)

        run_all((functools.partial(read, file) for file in files), self._store.options.concurrency, "blob-headers")
        return headers

    def _header(self, file: str) -> dict[str, StoredTensor]:
        path, where = self._at(file), f"{self.checkpoint_id}/{file}"
        try:
            data, info = self._store.read_some(path, 0, _FIRST_READ)
            end = HEADER_LENGTH_BYTES + header_length(data, info.size, where)
            if end > len(data):
                data += self._store.read_some(path, len(data), end - len(data), if_etag=info.etag)[0]
        except BlobNotFoundError as error:
            self._raise_if_replaced(error)
            raise CorruptCheckpointError(
                f"A file of the model is missing: {error}. It was deleted; use another checkpoint"
            ) from error
        except BlobChangedError as error:
            raise self._replaced() from error
        self._etags[file] = info.etag
        return parse_header(data[HEADER_LENGTH_BYTES:end], info.size, where)

    def _metadata_of(
        self, index: ModelIndex, headers: dict[str, dict[str, StoredTensor]], is_indexed: bool
    ) -> Metadata:
        wanted = (
            [(name, file) for name, file in index.files.items()]
            if is_indexed
            else [(name, file) for file, tensors in headers.items() for name in tensors]
        )
        chunks: dict[str, list[tuple[str, StoredTensor]]] = {}
        for name, file in wanted:
            stored = headers[file].get(name)
            if stored is None:
                raise CorruptCheckpointError(
                    f"The index of {self.checkpoint_id} has {name[:200]!r} in {file}, but that file does not have it. "
                    "The file is damaged, or of another save; use another checkpoint"
                )
            chunks.setdefault(name, []).append((file, stored))
        tensors: dict[str, Any] = {}
        storage: dict[MetadataIndex, Any] = {}
        for name, in_files in chunks.items():
            tensors[name] = self._tensor(name, [stored for _, stored in in_files])
            for file, stored in in_files:
                storage[MetadataIndex(name, torch.Size(stored.at))] = storage_info(
                    file,
                    stored.offset,
                    stored.length,
                    payload_offset=None if stored.dtype is None else 0,
                    crc64=index.crc64.get(name) if len(in_files) == 1 else None,
                )
        return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta(checkpoint_id=self.checkpoint_id))

    def _tensor(self, name: str, stored: list[StoredTensor]) -> TensorStorageMetadata:
        first = stored[0]
        if first.dtype is None:
            self._odd_dtypes[name] = first.dtype_name
        if any((one.dtype_name, len(one.shape)) != (first.dtype_name, len(first.shape)) for one in stored):
            raise CorruptCheckpointError(f"{self.checkpoint_id} has chunks of {name[:200]!r} that do not fit together")
        ends = [[start + size for start, size in zip(one.at, one.shape, strict=True)] for one in stored]
        shape = torch.Size([max(column) for column in zip(*ends, strict=True)])
        chunks = [ChunkStorageMetadata(torch.Size(one.at), torch.Size(one.shape)) for one in stored]
        # The dtype of a tensor that cannot be loaded is not used.
        entry = TensorStorageMetadata(TensorProperties(first.dtype or torch.uint8), shape, chunks)
        if not is_whole(entry):
            count = sum(math.prod(one.shape) for one in stored)
            raise CorruptCheckpointError(
                f"{self.checkpoint_id} has {count} of the {math.prod(shape)} elements of {name[:200]!r}: files are "
                "missing, or some elements are stored twice. Use another checkpoint"
            )
        return entry

    def _replaced(self) -> CheckpointReplacedError:
        return CheckpointReplacedError(
            f"The model at {self.checkpoint_id} was replaced or removed while it was being read. Load again"
        )
