"""Prompts are recorded with their commit on the Hub and a fingerprint that repeats."""

import pytest
from datasets import Dataset, IterableDataset, load_dataset

from tessy_hf import demo
from tessy_hf.rows.prompt_source import source
from tests.hub_server import HubServer, clients_of

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def test_prompts_are_known_by_their_commit_streamed_or_not(tmp_path, monkeypatch):
    with HubServer(tmp_path / "storage") as hub, clients_of(hub, tmp_path / "home", monkeypatch):
        demo.prompts(6, seed=8).push_to_hub("ada/prompts")
        commit = hub.repo("ada/prompts").branches["main"]
        whole = source(load_dataset("ada/prompts", split="train"))
        stream = load_dataset("ada/prompts", split="train", streaming=True)
        streamed = source(stream)
        for found in (whole, streamed):
            assert (found.id, found.revision, found.split, found.config) == ("ada/prompts", commit, "train", "default")
        assert whole.fingerprint and streamed.fingerprint
        again = source(load_dataset("ada/prompts", split="train", streaming=True))
        assert again == streamed != source(stream.take(3))


def test_local_prompts_have_a_fingerprint_where_it_repeats():
    rows = {"prompt": ["a", "b"]}
    dataset, same, other = Dataset.from_dict(rows), Dataset.from_dict(rows), Dataset.from_dict({"prompt": ["a", "c"]})
    found = [source(one).fingerprint for one in (dataset, same, other)]
    assert found[0] == found[1] != found[2]
    streams = [source(one.to_iterable_dataset()).fingerprint for one in (dataset, same, other)]
    assert streams[0] == streams[1] != streams[2]
    assert source(IterableDataset.from_generator(lambda: iter([rows]))).fingerprint is None
