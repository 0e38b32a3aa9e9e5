"""pandas and pyarrow on ``azblob://`` URLs."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet
import pytest

from tests.filesystem.emulated_filesystem import azblob, connection_string, filesystem

FRAME = pd.DataFrame({"number": range(1000), "text": [f"row {number % 7}" for number in range(1000)]})


@pytest.fixture
def root(container: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(container))
    return azblob(container)


def test_pandas_writes_and_reads_tables(root: str):
    FRAME.to_parquet(f"{root}/table.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(f"{root}/table.parquet"), FRAME)
    assert list(pd.read_parquet(f"{root}/table.parquet", columns=["text"]).columns) == ["text"]
    for name in ("table.csv", "table.csv.gz"):
        FRAME.to_csv(f"{root}/{name}", index=False)
        pd.testing.assert_frame_equal(pd.read_csv(f"{root}/{name}"), FRAME)
    FRAME.to_json(f"{root}/table.json", orient="records", lines=True)
    pd.testing.assert_frame_equal(pd.read_json(f"{root}/table.json", orient="records", lines=True), FRAME)
    with pytest.raises(FileNotFoundError):
        pd.read_csv(f"{root}/none.csv")


def test_pandas_takes_storage_options(container: str):
    options: dict[str, Any] = dict(filesystem(container).storage_options)
    url = f"{azblob(container)}/table.parquet"
    FRAME.to_parquet(url, storage_options=options)
    pd.testing.assert_frame_equal(pd.read_parquet(url, storage_options=options), FRAME)


def test_partitioned_tables_are_read_whole_and_in_parts(root: str):
    FRAME.to_parquet(f"{root}/parts", partition_cols=["text"])
    back = pd.read_parquet(f"{root}/parts")
    assert sorted(back["number"]) == list(range(1000))
    assert len(pd.read_parquet(f"{root}/parts", filters=[("text", "==", "row 3")])) == 143


def test_pyarrow_datasets_through_its_own_handler(container: str):
    fs = filesystem(container)
    root = azblob(container).removeprefix("azblob://")
    arrow = pa.fs.PyFileSystem(pa.fs.FSSpecHandler(fs))
    table = pa.Table.from_pandas(FRAME)
    pa.dataset.write_dataset(
        table, f"{root}/data", filesystem=arrow, format="parquet", partitioning=["text"], max_rows_per_group=50
    )
    data = pa.dataset.dataset(f"{root}/data", filesystem=arrow, format="parquet", partitioning=["text"])
    assert data.count_rows() == 1000
    assert data.to_table(filter=pa.dataset.field("number") < 10).num_rows == 10
    infos = arrow.get_file_info(pa.fs.FileSelector(f"{root}/data", recursive=True))
    assert sum(info.type == pa.fs.FileType.Directory for info in infos) == 7
    assert sum(info.type == pa.fs.FileType.File for info in infos) == 7
    assert arrow.get_file_info(f"{root}/none").type == pa.fs.FileType.NotFound
    arrow.move(f"{root}/data/row 1/part-0.parquet", f"{root}/moved.parquet")
    assert pa.parquet.read_table(f"{root}/moved.parquet", filesystem=arrow).num_rows == 143
    arrow.copy_file(f"{root}/moved.parquet", f"{root}/copy.parquet")
    arrow.delete_file(f"{root}/moved.parquet")
    arrow.delete_dir(f"{root}/data")
    assert [info.base_name for info in arrow.get_file_info(pa.fs.FileSelector(root))] == ["copy.parquet"]


def test_pyarrow_takes_the_filesystem_itself(container: str):
    fs = filesystem(container)
    path = f"{azblob(container)}/table.csv".removeprefix("azblob://")
    with fs.open(path, "wb") as file:
        pa.csv.write_csv(pa.Table.from_pandas(FRAME), file)
    assert pa.dataset.dataset(path, filesystem=fs, format="csv").count_rows() == 1000
