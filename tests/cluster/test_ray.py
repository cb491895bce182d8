"""The transform on a Ray cluster of several nodes, with servers shared by all actors: the rows of a single process."""

import threading
import time
from pathlib import Path

import pytest
import ray
import yaml
from datasets import Dataset

from tessy_hf import demo
from tessy_hf.cluster.ray import Placement, RowWriter, map_options, synthesize
from tessy_hf.errors import DatasetError, EngineDeadError, SettingsError
from tessy_hf.run.shared_rows import SharedRows
from tests import ray_cluster
from tests.cli.test_cli import tessy as tessy
from tests.engines import servers
from tests.engines.servers import FakeServer
from tests.engines.test_server import engine, transform

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own processes and log files
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]
SLOWLY = {"/inference/v1/generate": servers.slowly(0.3)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with ray_cluster.nodes(3, tmp_path_factory.mktemp("nodes")) as running:
        yield running


def prompts(count):
    """Prompts; one has no text and two have the same id."""
    ids = [f"r{i}" for i in range(count)]
    texts = [f"calc {i} + 1 + 2" for i in range(count)]
    return Dataset.from_dict(
        {"id": [*ids, "none", "r0"], "prompt": [*texts, "", "calc 0 + 0"], "level": [1] * (count + 2)}
    )


def single(server, count, **settings):
    """The rows of one process."""
    with transform(engine(server), **settings) as alone:
        return prompts(count).map(alone, batched=True, features=alone.features(prompts(count))).to_list()


def in_parts(folder, run):
    """How many rows are in parts by now."""
    there = SharedRows(str(folder), run)
    there.refresh()
    return len(there)


def test_an_actor_and_a_node_that_die_cost_no_row(cluster, tmp_path):
    rows, folder, deaths = 150, tmp_path / "parts", []
    with FakeServer(paths=SLOWLY) as server:
        given = {"rows_in_flight": 8, "journal": "auto", "max_thinking_tokens": 160}
        on_cluster = transform(engine(server, patience=60), **given)

        def kill():
            for least, death in ((20, cluster.kill_actor), (50, cluster.kill_node)):
                while in_parts(folder, on_cluster.run_fingerprint) < least:
                    time.sleep(0.05)
                death()
                deaths.append(in_parts(folder, on_cluster.run_fingerprint))

        killer = threading.Thread(target=kill)
        killer.start()
        written = synthesize(
            prompts(rows), on_cluster, tmp_path / "rows.parquet", parts=str(folder), placement=Placement(actors=3)
        )
        killer.join(60)
        assert len(deaths) == 2 and max(deaths) < rows, "the deaths came too late to show anything"
        asked = len({prompt for prompt in map(str, (body["token_ids"] for _, body in server.texts))})
        assert asked >= rows
    with FakeServer() as server:
        expected = single(server, rows)
    result = Dataset.from_parquet(str(tmp_path / "rows.parquet"))
    assert result.to_list() == expected
    report = written.merge.report
    assert (report.prompts, report.unusable, report.missing, report.foreign) == (rows + 2, 2, [], [])
    assert len(cluster.journals()) >= 2  # each host has its own


def test_what_is_done_is_not_asked_for_again(cluster, tmp_path):
    with FakeServer() as server:
        on_cluster = transform(engine(server), rows_in_flight=8)
        with on_cluster.with_settings(parts=str(tmp_path / "parts")) as part:
            part(prompts(30)[:20])
        before = len(server.texts)
        first = synthesize(prompts(30), on_cluster, parts=str(tmp_path / "parts"), actors=1)
        assert first.found == 20 and first.finish_reasons == {"stop": 10}
        assert 0 < len(server.texts) - before < before
        before = len(server.texts)
        again = synthesize(prompts(30), on_cluster, parts=str(tmp_path / "parts"), actors=1)
        assert again.found == 30 and not again.finish_reasons and len(server.texts) == before
        assert list(again.merge.rows()) == single(server, 30)


def test_plain_map_batches_over_hugging_face_and_parquet(cluster, tmp_path):
    given = prompts(24).select(range(24))
    given.to_parquet(tmp_path / "prompts.parquet")
    with FakeServer() as server:
        expected = single(server, 24)[:24]
        on_cluster = transform(engine(server), rows_in_flight=8)
        options = {"fn_constructor_kwargs": {"transform": on_cluster}, **map_options(on_cluster, Placement())}
        for source in (ray.data.from_huggingface(given), ray.data.read_parquet(str(tmp_path / "prompts.parquet"))):
            rows = source.repartition(target_num_rows_per_block=2).map_batches(RowWriter, **options)
            rows.write_parquet(str(tmp_path / "rows"))
            written = Dataset.from_parquet([str(path) for path in sorted((tmp_path / "rows").iterdir())])
            assert sorted(written.to_list(), key=lambda row: int(row["id"][1:])) == expected
            assert written.features == transform(engine(server)).features(given)
            for path in (tmp_path / "rows").iterdir():
                path.unlink()


def test_an_engine_that_is_gone_ends_the_run_with_its_own_words_and_a_rerun_goes_on(cluster, tmp_path):
    folder = str(tmp_path / "parts")
    with FakeServer(paths=SLOWLY, faults=[None] * 40 + [servers.die]) as server:
        on_cluster = transform(engine(server, patience=0.5), rows_in_flight=4)
        with pytest.raises(EngineDeadError, match="cannot be reached.*server's log"):
            synthesize(prompts(60), on_cluster, parts=folder, actors=1)
    with FakeServer() as server:
        written = synthesize(prompts(60), transform(engine(server)), parts=folder)
        assert 0 < written.found < 60 and sum(written.finish_reasons.values()) == 60 - written.found
        assert list(written.merge.rows()) == single(server, 60)


def test_the_command_reads_what_to_take_from_the_recipe(cluster, tessy, tmp_path):
    prompts(12).to_json(tmp_path / "prompts.jsonl")
    with FakeServer() as server:
        speaker = {"engine": "server", "model": "student", "options": {"base_url": server.url}}
        speaker["options"]["tokenizer"] = str(demo.STUDENT)
        recipe = {"method": "student-only", "id_column": "id", "temperature": 0, "parts": str(tmp_path / "parts")}
        recipe |= {"max_thinking_tokens": 160, "max_answer_tokens": 32, "teacher": speaker, "student": speaker}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "cluster": {"num_cpus": 2}}))
        words = (
            "synthesize",
            tmp_path / "recipe.yaml",
            tmp_path / "prompts.jsonl",
            tmp_path / "rows.parquet",
            "--ray",
        )
        code, printed = tessy(*words)
        assert code == 0 and "14 rows in" in printed and "0 of them found, 0 failed" in printed
        rows = Dataset.from_parquet(str(tmp_path / "rows.parquet")).to_list()
        assert rows == [{**row, "run_fingerprint": rows[0]["run_fingerprint"]} for row in single(server, 12)]
    code, printed = tessy(*words[:3], tmp_path / "rows.jsonl", "--ray")
    assert code == 0 and "12 of them found" in printed
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 14
    code, printed = tessy(*words[:3], tmp_path / "rows.csv", "--ray")
    assert code == 2 and "neither .parquet nor .jsonl" in printed


def test_mistakes_are_told_before_anything_starts(tmp_path):
    with FakeServer() as server:
        mistaken = transform(engine(server), prompt_column="question")
        with pytest.raises(SettingsError, match="a folder that all nodes see.*parts="):
            synthesize(prompts(3), transform(engine(server)))
        with pytest.raises(DatasetError, match="no column 'question'"):
            synthesize(prompts(3), mistaken, parts=str(tmp_path))
        assert not server.requests and not list(Path(tmp_path).iterdir())


def test_a_batch_that_is_no_table_is_told(cluster, tmp_path):
    with FakeServer() as server:
        given = {"fn_constructor_kwargs": {"transform": transform(engine(server))}, "concurrency": 1}
        with pytest.raises(ray.exceptions.RayTaskError, match="batch_format='pyarrow'"):
            ray.data.from_huggingface(prompts(3)).map_batches(RowWriter, **given).materialize()


def test_a_window_that_follows_the_caches_is_refused():
    with FakeServer() as server, transform(engine(server), rows_in_flight="auto") as whole:
        with pytest.raises(SettingsError, match="actors do not see each other's rows. Pass how many"):
            map_options(whole, Placement(actors=2))
