"""A release leaves its repository loadable with plain `datasets`, or is refused before anything is uploaded."""

import io

import pytest
import yaml
from datasets import Dataset, load_dataset

from tessy_hf import push_to_hub
from tessy_hf.errors import DatasetError, HubError
from tests.hub_server import HubServer, clients_of
from tests.hub_sweep import REPO, finished, patched, state

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

OTHER = {"q": ["x", "y"], "n": [1, 2]}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer(tmp_path / "storage") as server, clients_of(server, tmp_path / "home", monkeypatch):
        with patched(monkeypatch):
            yield server


def push(rows, version="1.0.0", **options):
    settings = {"backoff": 0, "retry_timeout": 5, "say": lambda _: None}
    return push_to_hub(rows, REPO, version, **{**settings, **options})


def parquet(dataset):
    buffer = io.BytesIO()
    dataset.to_parquet(buffer)
    return buffer.getvalue()


def put(hub, card=None, **files):
    """Make the repository with these files and this card alone, as by hand."""
    Dataset.from_dict({"a": [1]}).push_to_hub(REPO)
    tree = {".gitattributes": hub.keep(b"*.parquet filter=lfs\n")}
    if card is not None:
        tree["README.md"] = hub.keep(f"---\n{card if isinstance(card, str) else yaml.safe_dump(card)}---\n".encode())
    tree |= {path: hub.keep(data) for path, data in files.items()}
    hub.repo(REPO).commit("main", "by hand", tree)


def listed(path, name="default", split="train", **more):
    return {"config_name": name, "data_files": [{"split": split, "path": path}], **more}


def load_all(**splits):
    """Load splits of main in full, each with its number of rows; names of configurations before a `__`."""
    for where, rows in splits.items():
        name, _, split = where.rpartition("__")
        loaded = load_dataset(REPO, name or None, split=split, download_mode="force_redownload")
        assert len(loaded) == rows, where


# --- refused


def refused(hub, match, **options):
    """Check that a push is refused with these words, and that the Hub is as it was."""
    before, begun, branches = state(hub), len(hub.requests), dict(hub.repo(REPO).branches)
    with pytest.raises(DatasetError, match=match) as error:
        push(finished(8), **{"version": "2.0.0", **options})
    assert str(error.value).endswith("Nothing was uploaded.") or "push to another repository" in str(error.value)
    assert state(hub) == before and hub.repo(REPO).branches == branches and hub.uploaded(begun) == 0
    assert {request.method for request in hub.requests[begun:]} <= {"GET", "HEAD"}, "something was written"


@pytest.mark.slow
def test_a_split_of_other_columns_is_refused_and_still_loads(hub):
    Dataset.from_dict(OTHER).push_to_hub(REPO, split="test")
    refused(
        hub, r"split 'test' in the configuration 'default' with other columns \(not in the rows: q, n;.*config_name"
    )
    load_all(test=2)
    push(finished(8), config_name="sft")
    load_all(default__test=2, sft__train=7)


@pytest.mark.slow
def test_an_own_release_of_other_columns_is_refused_too(hub):
    push(finished(8).remove_columns("question"), split="test")
    refused(hub, r"split 'test'.*\(only in the rows: question\)")
    push(finished(8), "2.0.0", split="test")  # but it can be replaced
    load_all(test=7)


def test_columns_of_another_type_are_refused(hub):
    rows = finished(8)
    rows.cast_column("seed", type(rows.features["seed"])("float64")).push_to_hub(REPO, split="test")
    refused(hub, r"split 'test'.*\(of another type: seed\)")


def test_files_tell_the_columns_where_the_card_does_not(hub):
    card = {"configs": [listed("old/test.parquet", split="test")]}
    put(hub, card, **{"old/test.parquet": parquet(Dataset.from_dict(OTHER))})
    refused(hub, "split 'test'.*not in the rows: q, n")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["default", "other"])
def test_a_configuration_of_a_folder_is_refused(hub, config):
    put(hub, {"configs": [{"config_name": config, "data_dir": "old"}]}, **{"old/a.parquet": parquet(finished(4))})
    refused(hub, rf"only data_dir='old' for the configuration '{config}'")


@pytest.mark.slow
def test_files_of_another_format_are_refused(hub):
    put(hub, {"configs": [listed("a.jsonl", "other")]}, **{"a.jsonl": b'{"q": "x"}\n'})
    refused(hub, r"a\.jsonl for the split 'train' of the configuration 'other'.*one format")
    refused(hub, "one format", config_name="sft")
    load_all(other__train=1)


@pytest.mark.slow
def test_data_that_the_card_does_not_list_is_refused(hub):
    put(hub, None, **{"train.jsonl": b'{"q": "x"}\n'})
    refused(hub, r"data that its card does not list \(train\.jsonl\)")
    load_all(train=1)


@pytest.mark.slow
def test_a_second_default_is_refused(hub):
    put(hub, {"configs": [listed("a.parquet", "code", default=True)]}, **{"a.parquet": parquet(finished(4))})
    refused(hub, "'code' its default.*config_name='code'")


@pytest.mark.slow
def test_metadata_that_overrides_the_card_is_refused(hub):
    override = yaml.safe_dump({"configs": [listed("a.parquet")]}).encode()
    put(hub, {}, **{".huggingface.yaml": override, "a.parquet": parquet(finished(4))})
    refused(hub, r"\.huggingface\.yaml whose metadata takes the place")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["data/*", "**/*.parquet"])
def test_a_pattern_that_would_take_in_the_release_is_refused(hub, pattern):
    put(hub, {"configs": [listed(pattern)]}, **{"data/a.parquet": parquet(finished(4))})
    refused(hub, "of the configuration 'default', which also matches data/test-00000.parquet", split="test")
    push(finished(8), "2.0.0")  # in place of the split itself
    load_all(train=7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("card", "match"),
    [
        ("a: [1\n", "metadata of the dataset's card cannot be read"),
        ("configs: code\n", "`configs` are 'code'"),
        ("configs:\n- config_name: other\n  data_files:\n  - path: a.parquet\n", "'other' has the data_files"),
        ("configs:\n- config_name: other\n  data_files: gone/*.parquet\n", r"gone/\*\.parquet.*no file matches"),
    ],
)
def test_a_card_that_cannot_be_read_is_refused(hub, card, match):
    put(hub, card)
    refused(hub, match)


# --- released


@pytest.mark.slow
def test_splits_that_no_card_counts_are_counted(hub):
    """`datasets` refuses to load a split that `dataset_info` does not list, once it lists any."""
    card = {
        "configs": [listed("old/test-*", split="test"), {"config_name": "other", "data_files": "old/test-*"}],
        "dataset_info": [{"config_name": "other", "download_size": 7}],
    }
    put(hub, card, **{f"old/test-{n}.parquet": parquet(finished(4)) for n in range(2)})
    assert push(finished(8)).rows == 7
    load_all(default__train=7, default__test=8, other__train=8)


@pytest.mark.slow
def test_a_split_given_as_patterns_alone_is_kept(hub):
    put(
        hub,
        {"configs": [{"config_name": "default", "data_files": ["a.parquet"]}]},
        **{"a.parquet": parquet(finished(4))},
    )
    push(finished(8), split="test")
    load_all(train=4, test=7)


@pytest.mark.slow
def test_a_repository_with_one_configuration_loads_without_its_name_after_a_second(hub):
    push(finished(8), config_name="code")
    load_all(train=7)
    push(finished(16), "1.1.0", config_name="math")
    load_all(train=7, code__train=7, math__train=14)


# --- loaded before it is promoted


def test_what_cannot_be_loaded_is_never_promoted(hub):
    """A card may claim columns that its files lack: only loading shows it."""
    finished(8).push_to_hub(REPO, split="test")
    tree = dict(hub.repo(REPO).at("main").tree)
    tree["data/test-00000-of-00001.parquet"] = hub.keep(parquet(Dataset.from_dict(OTHER)))
    hub.repo(REPO).commit("main", "other rows", tree)
    before = state(hub)
    with pytest.raises(
        HubError, match=r"main is as it was.*cannot load the split 'test' of the configuration 'default'"
    ):
        push(finished(8))
    assert state(hub) == before and set(hub.repo(REPO).branches) == {"main"}


@pytest.mark.slow
def test_what_others_change_meanwhile_is_loaded_too(hub):
    push(finished(8))
    finished(8).push_to_hub(REPO, split="test")

    def meanwhile(request):
        if request.path.endswith("/commit/main"):
            hub.fault = lambda request: None
            tree = dict(hub.repo(REPO).at("main").tree)
            tree["data/test-00000-of-00001.parquet"] = hub.keep(parquet(Dataset.from_dict(OTHER)))
            hub.repo(REPO).commit("main", "other rows", tree)
        return None

    hub.fault = meanwhile
    with pytest.raises(HubError, match="cannot load the split 'test'"):
        push(finished(8, "run-b"), "2.0.0")
    assert list(hub.repo(REPO).tags) == ["v1.0.0"]
