"""What is private of `datasets`: there, and as it was after a transform is closed."""

import subprocess
import sys
import textwrap

import pytest
from datasets import Dataset, IterableDataset

from tessy_hf.errors import DatasetError, SettingsError
from tessy_hf.rows import datasets_internals
from tests.rows.test_prompt import USER
from tests.test_transform import scripted


@pytest.fixture
def fresh_check():
    datasets_internals.check.cache_clear()
    yield datasets_internals.check
    datasets_internals.check.cache_clear()


def test_the_installed_datasets_has_all_that_is_used_of_it(fresh_check):
    fresh_check()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("datasets.utils._dill.pklregister", None, "has no datasets.utils._dill.pklregister"),
        ("datasets.Features._to_yaml_list", None, "Features._to_yaml_list"),
        (
            "datasets.iterable_dataset._convert_to_arrow",
            lambda iterable: iter(()),
            r"_convert_to_arrow\(iterable, batch",
        ),
    ],
)
def test_a_release_without_it_is_told(fresh_check, monkeypatch, name, value, told):
    if value is None:
        monkeypatch.delattr(name)
    else:
        monkeypatch.setattr(name, value)
    with pytest.raises(SettingsError, match=f"datasets 5.*{told}.*pip install"):
        fresh_check()


@pytest.mark.slow
def test_streams_are_converted_by_their_features_only_while_a_transform_is_open(tmp_path):
    code = """
        import copy, gc, pickle
        import datasets
        from datasets import iterable_dataset as streams
        own = streams._convert_to_arrow
        import tessy_hf.transform
        from tests.test_transform import prompts, scripted
        assert streams._convert_to_arrow is own and gc.get_freeze_count() == 0

        transform = scripted()
        assert streams._convert_to_arrow is not own
        copied = pickle.loads(pickle.dumps(transform))
        transform.close()
        assert streams._convert_to_arrow is not own
        copied.close()
        copied.close()
        assert streams._convert_to_arrow is own

        with transform:
            transform(prompts(1)[:])
            assert streams._convert_to_arrow is not own and gc.get_freeze_count() == 0
        assert streams._convert_to_arrow is own

        other = scripted()
        del other
        gc.collect()
        assert streams._convert_to_arrow is own
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pair", [([USER], 7), ("Hi", "half \ud83d")], ids=["types", "surrogate"])
def test_a_stream_whose_rows_fit_no_schema_is_told_and_can_be_mapped_without(pair):
    stream = IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in pair))
    with scripted(id_column=None) as transform:
        with pytest.raises(DatasetError, match=r"fit none: .* Json\(\) .*map\(transform, batched=True\)"):
            transform.map(stream)
        rows = list(stream.map(transform, batched=True))
    assert [row["finish_reason"] for row in rows] == ["stop", "error"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([{"prompt": "Hi"}], "A list cannot be mapped"),
        (Dataset.from_dict({"prompt": ["Hi"]}).to_pandas(), "A DataFrame cannot be mapped"),
        (IterableDataset.from_generator(lambda: iter(())), "it has no rows"),
    ],
    ids=["list", "pandas", "empty"],
)
def test_what_is_no_dataset_with_rows_is_told(given, told):
    with scripted(id_column=None) as transform, pytest.raises(DatasetError, match=told):
        transform.map(given)
