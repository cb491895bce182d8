"""Rows in the shape of the authors' datasets, on every way that rows of ours go."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tessy_hf import demo
from tessy_hf.boundary_training.sampling import draw
from tessy_hf.boundary_training.segments import Segment
from tessy_hf.boundary_training.settings import AnnotationSettings
from tessy_hf.errors import DatasetError
from tessy_hf.report.statistics import summarize
from tessy_hf.rows import foreign
from tessy_hf.rows.columns import assistant_text, pieces
from tessy_hf.rows.loading import load_finished
from tessy_hf.text.thinking_format import ThinkingFormat
from tessy_hf.text.vocabulary import Vocabulary
from tests.boundary_training.bases import make_base
from tests.cli.test_cli import RECIPE, mark_style, tessy  # noqa: F401 - a fixture
from tests.engines.servers import FakeServer
from tests.test_transform import prompts, scripted
from tests.worlds import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def their_row(number, question):
    thought = f"Okay, so I count {number}.\n\nHmm, wait. {number} + 1 = {number + 1}, so far so good."
    content = f"<think>\n{thought}\n</think>\n\nThe answer is **{number + 1}**."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
    return {"id_ddm": f"{number:08d}-0000-4000-8000-000000000000", "dialogs": turns}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A file of 50 rows that answer the miniature prompts."""
    path = tmp_path_factory.mktemp("theirs") / "tessy-code.jsonl"
    rows = [their_row(number, question) for number, question in enumerate(demo.prompts(50, seed=8)["prompt"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_they_become_rows_of_a_run_without_authors(theirs):
    rows = load_finished(str(theirs))
    first = their_row(0, demo.prompts(50, seed=8)["prompt"][0])
    assert len(rows) == 50 and rows[0]["messages"] == first["dialogs"] and rows[0]["id_ddm"] == first["id_ddm"]
    assert "dialogs" not in rows.column_names and rows[0]["finish_reason"] == "stop" and rows[0]["spans"] == []
    assert rows[3]["thinking"].startswith("Okay, so I count 3.") and rows[3]["answer"] == "The answer is **4**."


@pytest.mark.parametrize("key", [None, "reasoning_content"])
def test_spans_of_an_unknown_author_count_their_tokens(theirs, key):
    form = ThinkingFormat("<think>\n", "\n</think>\n\n", "</think>", key=key)
    vocabulary = Vocabulary(AutoTokenizer.from_pretrained(demo.STUDENT), "student")
    rows = load_finished(str(theirs), thinking_format=form, vocabulary=vocabulary)
    for row in rows:
        cut = pieces(row)
        assert "".join(one.before + one.text + one.after for one in cut) == assistant_text(row)
        assert [(one.author, one.part, one.text) for one in cut] == [
            ("", "thinking", row["thinking"]), ("", "answer", row["answer"])
        ]  # fmt: skip
    lengths = summarize(rows)["lengths"]
    assert lengths["thinking"]["count"] == 50 and lengths["thinking"]["mean"] > lengths["answer"]["mean"] > 0


def test_the_counts_of_the_authors_script_are_read():
    counts = {"n_tokens_total": 10, "n_tokens_teacher": 7, "n_tokens_student": 3}
    cut = {"id_ddm": "x", "dialogs": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>Hm"}]}
    first, second = foreign.finished(Dataset.from_list([{**their_row(1, "?"), **counts}, {**cut, **counts}]))
    assert (first["teacher_tokens"], first["student_tokens"], first["teacher_token_ratio"]) == (7, 3, 0.7)
    assert second["finish_reason"] == "length" and second["messages"][-1]["content"] == "<think>\nHm"


def test_rows_of_an_unknown_format_are_told_the_known_ones(tessy, tmp_path):  # noqa: F811
    Dataset.from_list([{"id": 1, "blob": "?"}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DatasetError, match=r"columns id, blob, .*Known are: .*dialogs \(TESSY\)"):
        load_finished(str(tmp_path / "rows.parquet"))
    code, printed = tessy("report", tmp_path / "rows.parquet", "-o", tmp_path / "report.html")
    assert code == 2 and "Known are: messages" in printed


@pytest.mark.slow
def test_their_rows_are_reported(tessy, theirs, tmp_path):  # noqa: F811
    words = ("report", theirs, "-o", tmp_path / "report.html")
    assert tessy(*words)[0] == 0  # lengths need a tokenizer, all else does not
    code, printed = tessy(*words, "--tokenizer", demo.STUDENT)
    assert code == 0 and "50 rows in" in printed and "Tokens per row" in (tmp_path / "report.html").read_text("utf-8")


def test_their_rows_are_prompts(theirs):
    given = load_dataset("json", data_files=str(theirs), split="train")
    transform = scripted(prompt_column="dialogs", id_column="id_ddm")
    with pytest.warns(UserWarning, match="column 'dialogs' end in an answer of the assistant: it is left out"):
        with transform:
            rows = given.map(transform, batched=True, features=transform.features(given))
    assert [row["messages"][:-1] for row in rows] == [row["dialogs"][:-1] for row in given]


def test_a_journal_is_exported_in_their_format_and_read_again(tessy, tmp_path):  # noqa: F811
    journal, out = tmp_path / "rows.journal", tmp_path / "dialogs.jsonl"
    with scripted(journal=str(journal)) as transform:
        written = transform(prompts(5)[:])
    code, printed = tessy("export", journal, out, "--format", "dialogs")
    assert code == 0 and "5 rows in" in printed
    assert tessy("export", journal, out, "--format", "dialogs")[0] == 2  # it is there already
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert set(rows[0]) == {"id_ddm", "dialogs", "n_tokens_total", "n_tokens_teacher", "n_tokens_student"}
    assert [turn["role"] for turn in rows[0]["dialogs"]] == ["user", "assistant"]
    assert rows[0]["dialogs"][1]["content"].startswith("<think>\n") and rows[0]["id_ddm"] == "r0"
    again = load_finished(str(out))
    for name in ("thinking", "answer", "teacher_tokens", "student_tokens"):
        assert again[name] == written[name]


@pytest.mark.slow
def test_the_authors_dataset_is_compared_with_a_release_by_name(hub, tessy, theirs, tmp_path):  # noqa: F811
    name, ours = "CoopReason/TESSY-Code-80K", "ada/tessy-code@v1.0.0"
    hub.add(name, {"train.jsonl": theirs.read_bytes()})
    demo.prompts(50, seed=8).select(range(6)).to_json(tmp_path / "prompts.jsonl")
    assert tessy("synthesize", RECIPE, tmp_path / "prompts.jsonl", tmp_path / "rows.parquet")[0] == 0
    assert tessy("push", tmp_path / "rows.parquet", "ada/tessy-code", "--private")[0] == 0
    words = ("analyze", name, ours, "--student", demo.STUDENT, "-o", tmp_path / "a.html", "--nll-rows", "3")
    code, printed = tessy(*words)
    assert code == 0, printed
    assert f"{name} and {ours}: similarity 0." in printed and f"{name}: mean tokens: thinking" in printed
    assert "6 prompts compared" in printed


def test_segments_are_drawn_from_their_rows(theirs):
    drawn = list(draw(load_dataset("json", data_files=str(theirs), split="train"), AnnotationSettings.check(words=10)))
    assert {one.trace_id for one in drawn} == {their_row(number, "")["id_ddm"] for number in range(50)}
    assert len({one.problem_id for one in drawn}) == 50 and all("<think>" not in one.text for one in drawn)


def test_their_annotations_are_evaluated(tessy, theirs, tmp_path):  # noqa: F811
    thought = load_finished(str(theirs))[0]["thinking"]
    row = {"id_ddm": "0", "think_text": thought, "pred_result": [{"span": "Okay, so", "start": 0, "end": 8}]}
    Dataset.from_list([row]).to_json(tmp_path / "segments.jsonl")
    assert Segment.from_row(row).problem == "0"  # train-boundary splits by it
    code, printed = tessy("evaluate-boundary", "--data", tmp_path / "segments.jsonl", "--json")
    assert code == 0 and json.loads(printed.splitlines()[0])["overall"]["segments"] == 1
    Dataset.from_list([{**row, "pred_result": [{"span": "Okay", "start": 1, "end": 5}]}]).to_json(
        tmp_path / "segments.jsonl"
    )
    code, printed = tessy("evaluate-boundary", "--data", tmp_path / "segments.jsonl")
    assert code == 2 and "does not fit its text" in printed


@pytest.mark.slow
def test_their_rows_are_annotated_and_train_a_predictor_that_writes_rows(tessy, theirs, tmp_path):  # noqa: F811
    """Each command to its end, upon what the one before it wrote."""
    tokenizer = make_tokenizer("harmony")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    paths = {"/v1/completions": mark_style(tokenizer, "Okay, so|Hmm, wait|so far so good")}
    served = [{"id": "annotator", "max_model_len": 8192}]
    with FakeServer(ways=("ids",), models=served, paths=paths, tokenize=tokenizer.encode) as server:
        options = {"base_url": server.url, "tokenizer": str(tmp_path / "tokenizer")}
        annotator = {"engine": "server", "model": "annotator", "options": options}
        recipe = tmp_path / "annotate.yaml"
        recipe.write_text(yaml.safe_dump({"annotator": annotator, "words": 10}))
        code, printed = tessy("annotate", recipe, theirs, tmp_path / "spans")
    assert code == 0 and "50 segments in" in printed

    texts = [row["text"] for row in load_dataset(str(tmp_path / "spans"), split="train")]
    base = make_base(texts, tmp_path / "base", steps=5)
    recipe = tmp_path / "train.yaml"
    recipe.write_text(f"base: {base}\nepochs: 8\nbatch_size: 8\nlearning_rate: 5.0e-3\ntest_share: 0.2\n")
    code, printed = tessy("train-boundary", recipe, tmp_path / "boundary", "--data", tmp_path / "spans")
    assert code == 0 and "The predictor is in" in printed, printed
    code, printed = tessy("evaluate-boundary", tmp_path / "boundary", "--data", tmp_path / "spans", "--json")
    told = json.loads(printed.splitlines()[0])["overall"]
    assert code == 0 and told["segments"] == 50 and told["char"]["f1"] > 0.8, printed

    demo.prompts(2, seed=8).to_json(tmp_path / "prompts.jsonl")
    words = ("synthesize", RECIPE, tmp_path / "prompts.jsonl", tmp_path / "rows.parquet")
    code, printed = tessy(*words, "--set", f"teacher.boundary={tmp_path / 'boundary'}")
    assert code == 0 and "2 rows in" in printed, printed


@pytest.mark.slow
def test_their_rows_train_a_student(theirs, tmp_path):
    folder = Path(__file__).parents[2] / "recipes" / "sft"
    sys.path.insert(0, str(folder))
    try:
        import train

        words = ["--config", str(folder / "miniature.yaml"), "--data", str(theirs), "--output_dir", str(tmp_path)]
        words += ["--model_name_or_path", str(demo.STUDENT), "--per_device_train_batch_size", "2"]
        trainer = train.main([*words, "--max_steps", "3", "--logging_steps", "1"])
    finally:
        sys.path.remove(str(folder))
        for name in ("train", "author_weights"):
            sys.modules.pop(name, None)
    assert len(trainer.train_dataset) == 50 and trainer.state.global_step == 3
    before, after = (AutoModelForCausalLM.from_pretrained(str(path)).state_dict() for path in (demo.STUDENT, tmp_path))
    assert before.keys() == after.keys() and any(not before[name].equal(after[name]) for name in before)
