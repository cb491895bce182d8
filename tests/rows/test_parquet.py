"""Finished rows as files: typed whatever is empty, bounded, the same each time."""

import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset, load_dataset

from tessy_hf.errors import DatasetError
from tessy_hf.rows import columns
from tessy_hf.rows import parquet as shards
from tessy_hf.rows.parquet import ShardWriter
from tessy_hf.run.finished import TRAINERS_OWN, Rows
from tests.hub_sweep import as_stream, finished
from tests.test_transform import prompts, scripted


def written(rows, folder, max_bytes):
    folder.mkdir()
    given = Rows(rows)
    writer = ShardWriter(folder, "data/train-", 0, given.features, max_bytes)
    made = [pair for table in given.tables() for pair in writer.write(table)]
    return [*made, *writer.close()]


def test_the_same_rows_give_the_same_files_from_a_dataset_and_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BATCH_ROWS", 8)
    rows = finished(60)
    made = [written(kind, tmp_path / name, 2000) for name, kind in (("a", rows), ("b", as_stream(rows)))]
    assert [shard for shard, _ in made[0]] == [shard for shard, _ in made[1]]
    assert len(made[0]) > 3 and [shard.path for shard, _ in made[0]][:2] == [
        "data/train-00000.parquet",
        "data/train-00001.parquet",
    ]
    files = [str(path) for _, path in made[0]]
    back = load_dataset("parquet", data_files=files, split="train")
    assert list(back) == list(rows) and back.features == rows.features


def test_files_and_row_groups_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BATCH_ROWS", 4)
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 2000)
    for shard, path in written(finished(100), tmp_path / "a", 8000):
        metadata = pq.read_metadata(path)
        assert metadata.num_rows == shard.rows and metadata.num_row_groups > 1 or shard.rows <= 16
        assert shard.bytes == path.stat().st_size and shard.sha256 == shards.sha256(path)


def test_columns_that_trainers_take_for_their_own_are_renamed(tmp_path):
    rows = finished(5).rename_columns({"question": "prompt"}).add_column("images", [1] * 5)
    for kind in (rows, as_stream(rows)):
        released = Rows(kind).dataset()
        assert released.column_names[1] == "source_prompt" and released.column_names[-1] == "source_images"
        assert released["source_prompt"][:] == rows["prompt"][:] and released["messages"][:] == rows["messages"][:]
    assert not TRAINERS_OWN & {*columns.COLUMNS}
    with pytest.raises(DatasetError, match="a column 'source_prompt'.*'prompt' as their own"):
        Rows(rows.add_column("source_prompt", [1] * 5))


def test_failed_rows_of_a_stream_are_typed_as_the_others(tmp_path):
    """None, [] and no thinking in one row, values in the next."""
    rows = finished(5)
    assert [table.schema for table in Rows(as_stream(rows)).tables()] == [rows.features.arrow_schema]


def test_streams_that_are_not_ours_are_left_to_datasets(tmp_path):
    transform = scripted()
    assert transform.features(prompts(1))  # our conversion is installed with the transform
    stream = IterableDataset.from_generator(lambda: iter([{"a": 1}, {"a": None}])).map(lambda row: row)
    with pytest.raises(Exception, match="Schema at index 1 was different"):
        stream.to_parquet(tmp_path / "x.parquet")
