"""The recipes that come along can be read, say what they need, and those that can run here run here."""

import importlib.util
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tessy_hf import Script, ScriptedEngine, ServerEngine, Speaker, TessyTransform, VLLMEngine, demo
from tessy_hf.cluster.merge import Merge
from tessy_hf.errors import SettingsError
from tessy_hf.recipe import Placement, read, read_placement
from tests.engines.servers import free_ports
from tests.worlds import R1, make_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
RUNS = sorted([*RECIPES.glob("*.yaml"), RECIPES / "miniature" / "tessy.yaml"])
CLUSTER = sorted((RECIPES / "cluster").glob("*.yaml"))
PROMPTS = sorted((RECIPES / "prompts").glob("*.yaml"))
GUIDES = ["docs/guides/servers.md", "docs/guides/large-runs.md"]
SERVED_WITH = (
    "--enable-scale-out --enable-prompt-tokens-details --scheduling-policy priority "
    "--middleware tessy_hf.vllm_middleware.Deltas"
)
"""What docs/guides/servers.md recommends for all vLLM servers."""


def name_of(path):
    return str(path.relative_to(RECIPES))


@pytest.fixture
def collect():
    """The script that collects prompts."""
    spec = importlib.util.spec_from_file_location("collect_prompts", RECIPES / "prompts" / "collect.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:The teacher and the student have no boundary predictor")
@pytest.mark.parametrize("path", [*RUNS, *CLUSTER], ids=name_of)
def test_each_recipe_can_be_read_and_is_the_method(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    transform = TessyTransform.from_yaml(path)
    assert transform.settings.method == "tessy" and len(transform.run_fingerprint) == 16
    for speaker in (transform.teacher, transform.student):
        assert speaker.boundary is not None


@pytest.mark.parametrize("path", [*RUNS, *CLUSTER, *PROMPTS], ids=name_of)
def test_each_recipe_names_its_hardware_first_and_what_its_hours_assume(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# Hardware: ")
    assert re.search(r"hours: [\d.]+ for .* at an assumed ", first) or "seconds" in first
    assert f"({name_of(path)})" in (RECIPES / "README.md").read_text(), "the table of recipes/README.md lacks it"


def test_each_served_model_has_its_command():
    text = (RECIPES / "README.md").read_text()
    served = {
        (speaker["model"], re.search(r":(\d+)/", speaker["options"]["base_url"])[1])
        for recipe in map(yaml.safe_load, map(Path.read_text, RUNS))
        for speaker in (recipe["teacher"], recipe["student"])
        if speaker["engine"] == "server"
    }
    assert len(served) == 3
    for model, port in served:
        assert re.search(rf"vllm serve {re.escape(model)} --port {port} {re.escape(SERVED_WITH)}", text), model


@pytest.mark.parametrize(
    "path", ["recipes/README.md", "recipes/prompts/contest.yaml", "recipes/cluster/servers.sh", *GUIDES]
)
def test_servers_are_started_with_the_options_that_were_measured(path):
    text = re.sub(r"\\\n[\s#]*", "", (ROOT / path).read_text())
    commands = re.findall(r"vllm serve \S+ .*", text)
    generating = [command for command in commands if "--runner pooling" not in command]
    assert generating
    for command in generating:
        assert SERVED_WITH in command, command


def test_the_recipes_for_clusters_say_what_they_take_and_where_rows_go():
    placed = {path.name: read_placement(path) for path in CLUSTER}
    assert placed["ray-servers.yaml"] == Placement(actors=4, num_cpus=8)
    assert placed["ray-gpus.yaml"] == Placement(actors=4, num_cpus=8, num_gpus=2)
    assert placed["slurm.yaml"] == Placement()
    for path in CLUSTER:
        engines = [speaker.engine for speaker in read(path)[:2]]
        assert all(
            isinstance(engine, VLLMEngine if path.name == "ray-gpus.yaml" else ServerEngine) for engine in engines
        )
        assert read(path)[2].get("parts") == (None if path.name == "slurm.yaml" else "/shared/tessy/parts")


def test_a_placement_is_changed_as_settings_are():
    assert read_placement(CLUSTER[0], ["cluster.actors=9"]).actors == 9
    for change in ("cluster.actors=0", "cluster.actor=1"):
        with pytest.raises(SettingsError, match="invalid at cluster.actor"):
            read_placement(CLUSTER[0], [change])


def run_script(name, *arguments, path, environment):
    return subprocess.Popen(
        ["bash", RECIPES / "cluster" / name, *map(str, arguments)],
        env={"PATH": f"{path}:/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
    )


def test_the_tasks_of_a_slurm_array_make_the_whole(tmp_path):
    """The script itself with the miniature models, in the environment that SLURM gives to tasks; one runs twice."""
    demo.prompts(7, seed=8).to_json(tmp_path / "prompts.jsonl")
    (tmp_path / "bin").mkdir()
    command(tmp_path / "bin" / "tessy", f'exec "{sys.executable}" -m tessy_hf.cli.main "$@"')
    recipe = RECIPES / "miniature" / "tessy.yaml"
    for task, count in ((0, 2), (1, 2), (1, 1)):
        slurm = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(count)}
        again = ["2"] if count == 1 else []
        given = {**slurm, "TMPDIR": str(tmp_path), "HF_HOME": str(tmp_path / "home")}
        arguments = (recipe, tmp_path / "prompts.jsonl", tmp_path / "run", *again)
        assert run_script("slurm.sh", *arguments, path=tmp_path / "bin", environment=given).wait(200) == 0
    merged = Merge([tmp_path / "run" / "parts"], demo.prompts(7, seed=8))
    assert len(list(merged.rows())) == 7 and not merged.report.duplicates
    journals = [path.name for path in (tmp_path / "tessy-journals").glob("*.journal")]
    assert sorted(journals) == ["7-0.journal", "7-1.journal"]


def command(path, line):
    path.write_text(f"#!/usr/bin/env bash\n{line}\n")
    path.chmod(0o755)


def test_a_server_is_listed_for_as_long_as_it_answers(tmp_path):
    """The script itself; in vLLM's place a server of files, which has nothing but /health."""
    (tmp_path / "health").write_text("")
    [port], servers = free_ports(1), tmp_path / "servers.txt"
    serve = f'"{sys.executable}" -m http.server --bind 127.0.0.1 --directory "{tmp_path}"'
    command(tmp_path / "vllm", f'echo "$@" > "{tmp_path}/asked"; exec {serve} "$4"')
    servers.write_text("http://other:8000/v1\n")
    given = {"SLURMD_NODENAME": "localhost", "DRAIN_SECONDS": "0"}
    task = run_script("servers.sh", servers, port, "me/model", "--dtype", "half", path=tmp_path, environment=given)
    wait_until(lambda: len(servers.read_text().splitlines()) == 2)
    assert servers.read_text() == f"http://other:8000/v1\nhttp://localhost:{port}/v1\n"
    asked = (tmp_path / "asked").read_text()
    assert asked == f"serve me/model --port {port} {SERVED_WITH} --dtype half\n"
    task.terminate()
    assert task.wait(60) != 0 and servers.read_text() == "http://other:8000/v1\n"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_the_code_recipe_has_the_paper_s_figures():
    settings = read(RECIPES / "qwen3-8b--gpt-oss-120b--code.yaml")[2]
    assert (settings["chunk_tokens"], settings["temperature"]) == (20, 0.6) and "stream" not in settings
    assert settings["max_thinking_tokens"] + settings["max_answer_tokens"] == 40 * 1024


def test_the_other_recipes_ask_in_the_way_that_was_faster():
    own = {RECIPES / "qwen3-8b--gpt-oss-120b--code.yaml", RECIPES / "miniature" / "tessy.yaml"}  # chunks of their own
    for path in {*RUNS, *CLUSTER} - own:
        settings, engine = read(path)[2], read(path)[0].engine
        assert settings.get("chunk_tokens", "auto") == "auto", path
        assert settings.get("stream", False) is isinstance(engine, ServerEngine), path


def test_the_template_of_the_distilled_student_keeps_the_thinking():
    student = read(RECIPES / "deepseek-r1-distill-llama-8b--gpt-oss-120b--math.yaml")[1]
    tokenizer = make_tokenizer("r1")
    engine = ScriptedEngine({}, tokenizer=tokenizer)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    opened = tokenizer.apply_chat_template(chat, chat_template=R1, tokenize=False, add_generation_prompt=True)
    speaker = Speaker(engine, chat_template=student.chat_template)
    speaker.check_templates(student=True)
    assert speaker.vocabulary.chat_text(chat, add_generation_prompt=True) == opened


# --- collecting prompts


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": "json", "data_files": str(path), "split": "train"}


@pytest.fixture
def sources(tmp_path):
    plain = write(
        tmp_path / "plain.jsonl",
        [
            {"question": "Sort n numbers.", "domain": "code"},
            {"question": "  sort N  numbers", "domain": "code"},  # a copy
            {"question": "What is Git?", "domain": "code"},
            {"question": "A cat.", "domain": "science"},
            {"question": "", "domain": "code"},
        ],
    )
    chats = write(
        tmp_path / "chats.jsonl",
        [
            {"conversations": [{"from": "human", "value": "Find a path."}, {"from": "gpt", "value": "Dijkstra."}]},
            {"conversations": [{"from": "human", "value": "Sort n numbers!"}, {"from": "gpt", "value": "sorted"}]},
            {"conversations": [{"from": "human", "value": "Beyond the limit."}]},
        ],
    )
    return [
        {"load": plain, "prompt": "question", "where": {"domain": "code"}},
        {"load": chats, "prompt": "conversations", "limit": 2},
    ]


@pytest.fixture
def judged(collect, sources):
    """Collect with a scripted judge who says what `said` has for a question."""

    def run(said, instruction="{{ question }}: yes or no?", rows=10, **settings):
        questions = {row["id"]: row["question"] for row in collect.unique(sources, collect.Counter())}
        asked = []

        def script(key):
            return Script("let me see", said[questions[key]])

        def fault(request):
            asked.append(judge.vocabulary.decode(request.prompt_ids))

        judge = Speaker(ScriptedEngine(script, fault=fault))
        prompts, counts = collect.collect(sources, judge, instruction, rows, {"journal": None, **settings})
        return prompts, counts, asked

    return run


SAID = {"Sort n numbers.": "yes", "What is Git?": "No.", "Find a path.": "Yes."}


def test_each_question_is_asked_once_and_kept_where_the_judge_says_yes(judged):
    prompts, counts, asked = judged(SAID)
    assert {row["question"]: row["copies"] for row in prompts} == {"Sort n numbers.": 3, "Find a path.": 1}
    assert prompts.column_names == ["id", "question", "source", "copies"]
    assert counts == {"rows": 7, "questions": 5, "unique questions": 3, "yes": 2, "no": 1}
    assert len(asked) == 2 * 3  # thinking and answer
    assert not any("Dijkstra" in text or "cat" in text for text in asked)


def test_what_is_neither_yes_nor_no_is_counted_and_left_out(judged):
    prompts, counts, _ = judged({**SAID, "Find a path.": "yes, I think"})
    assert prompts["question"] == ["Sort n numbers."] and counts["unclear"] == 1
    prompts, counts, _ = judged({**SAID, "Find a path.": "yes " * 30}, max_answer_tokens=8)
    assert prompts["question"] == ["Sort n numbers."] and counts["length"] == 1


def test_rows_are_drawn_at_random_and_the_same_each_time(judged):
    everything = dict.fromkeys(SAID, "yes")
    drawn = [judged(everything, rows=2, seed=seed)[0]["question"] for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 2
    assert len({tuple(sorted(questions)) for questions in drawn}) > 1


def test_a_rerun_asks_nothing_again(judged, tmp_path):
    settings = {"journal": str(tmp_path / "prompts.journal")}
    first, _, asked = judged(SAID, **settings)
    again, counts, asked_again = judged(SAID, **settings)
    assert asked and not asked_again
    assert again["question"] == first["question"] and counts["yes"] == 2


LONG = "Given a list of n numbers print the sum of those that are odd and the product of all the others in one line"


def test_near_duplicates_become_one_and_questions_of_evaluation_sets_go(collect, tmp_path):
    pytest.importorskip("datasketch")
    rows = [{"question": text} for text in (LONG, LONG + " please", f"Hello! {LONG}?", "Find a path.", "Sort it.")]
    rows += [{"question": f"{LONG} {' and again'.join('abcdefgh')}"}, {"question": "Sort it!"}]
    counts = collect.Counter()
    found = collect.unique([{"load": write(tmp_path / "rows.jsonl", rows), "prompt": "question"}], counts)
    held_out = [{"problem": "find a PATH"}, {"problem": "the product of all the others in one line and again b"}]
    sets = [{"load": write(tmp_path / "eval.jsonl", held_out), "prompt": "problem"}]
    clean = list(collect.uncontaminated(found, counts, sets, words=9))
    assert [row["question"] for row in clean] == ["Sort it."] and counts["in json"] == 5
    clean = list(collect.uncontaminated(found, counts, sets, words=13))
    kept = collect.distinct(clean, counts, similarity=0.7, words=3)
    assert {row["question"]: row["copies"] for row in kept} == {LONG: 3, "Sort it.": 2, rows[5]["question"]: 1}
    assert counts["near-duplicates"] == 2

    recipe = {"sources": [{"load": {"path": "me/a"}}], "near_duplicates": {"similarity": 0.7}}
    collect.write_card(tmp_path / "prompts.parquet", recipe, 3, counts)
    card = (tmp_path / "README.md").read_text()
    assert "| near-duplicates | 2 |" in card and "| in json | 6 |" in card and "similarity: 0.7" in card
    (tmp_path / "README.md").write_text("mine")
    collect.write_card(tmp_path / "prompts.parquet", recipe, 3, counts)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_instruction_of_the_recipe_shows_the_question(judged):
    [recipe] = PROMPTS
    instruction = recipe.with_name(yaml.safe_load(recipe.read_text())["instruction"]).read_text()
    asked = judged(SAID, instruction=instruction)[2]
    assert any("Find a path." in text and "programming contest" in text for text in asked)


def test_the_recipe_for_prompts_can_be_read(collect):
    [path] = PROMPTS
    recipe = yaml.safe_load(path.read_text())
    judge, settings = collect.read_judge(recipe, path)
    assert judge.engine.model == "openai/gpt-oss-120b" and settings["temperature"] == 0
    assert {"load", "prompt"} <= set.intersection(*map(set, recipe["sources"]))


def test_it_runs_as_a_command_with_a_real_model(sources, tmp_path):
    """The miniature teacher never says yes; what it says is counted."""
    recipe = {
        "sources": sources,
        "instruction": "ask.jinja",
        "rows": 5,
        "judge": {"engine": "transformers", "model": str(demo.TEACHER)},
        "ask": {"temperature": 0, "max_thinking_tokens": 60, "max_answer_tokens": 8, "journal": None},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "ask.jinja").write_text("calc 1 + 1 {# {{ question }} #}")
    script = RECIPES / "prompts" / "collect.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "recipe.yaml", tmp_path / "out" / "prompts.parquet"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "0 prompts in" in done.stdout and "unique questions: 3" in done.stdout and "unclear: 3" in done.stdout
    assert (tmp_path / "out" / "prompts.parquet").exists()
