"""What `tessy analyze` finds is so; what it draws and writes is what it found, with foreign text as text."""

import json
import math
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tessy_hf import TransformersEngine, demo
from tessy_hf.engines.scoring import Scorer, surprise
from tessy_hf.errors import DatasetError, SettingsError, TessyError
from tessy_hf.report import compare as analysis
from tessy_hf.report import compare_page as page
from tessy_hf.report.surprise import of_set
from tessy_hf.text.thinking_format import HARMONY
from tessy_hf.text.vocabulary import Vocabulary
from tests.cli.test_cli import tessy  # noqa: F401 - a fixture
from tests.rows.test_columns import as_row, trajectory
from tests.rules import vocabulary
from tests.test_sft import ROWS

PLAIN = [
    {"problem": f"What is {at}?", "thinking": f"Okay, so {at} apples and {at + 1} pears.", "answer": f"It is {at}."}
    for at in range(12)
]
OTHER = [{**row, "thinking": f"We need to compute {at}. Then {at}."} for at, row in enumerate(PLAIN)]
NASTY = '<script>alert(1)</script> $x_1$ & "quoted" 你好'


@pytest.fixture(scope="module")
def found():
    return analysis.analyze({"a": PLAIN, "b": OTHER}, vocabulary("qwen"))


@pytest.fixture(scope="module")
def student():
    model = AutoModelForCausalLM.from_pretrained(demo.STUDENT).eval()
    return Vocabulary(AutoTokenizer.from_pretrained(demo.STUDENT), "student"), model


# --- what is read


def test_all_kinds_of_rows_are_read():
    row = as_row(trajectory())
    text = analysis.read(row)
    assert text.prompt == "How many?" and text.part("thinking") == row["thinking"]
    assert text.part("answer") == row["answer"]
    assert [author for author, *_ in text.pieces] == [span["author"] for span in row["spans"]]
    harmony = analysis.read(as_row(trajectory(), "harmony", HARMONY))
    assert harmony == text
    for other in (
        {"prompt": "How many?", "thinking": row["thinking"], "answer": row["answer"]},
        {"question": " How many? ", "reasoning": row["thinking"], "answer": row["answer"]},
        {"messages": row["messages"]},
        {**row, "spans": []},
    ):
        read = analysis.read(other)
        assert (read.prompt, read.part("thinking"), read.part("answer")) == (
            "How many?", row["thinking"], row["answer"]
        )  # fmt: skip
        assert {author for author, *_ in read.pieces} == {""}
    system = [{"role": "system", "content": "Be brief."}, *row["messages"]]
    assert analysis.read({**row, "messages": system}).prompt == "How many?"
    assert analysis.read({"thinking": "text"}) is None


def test_rows_are_matched_by_their_prompts():
    mixed = [*reversed(OTHER[2:]), {"problem": "What else?", "thinking": "x"}, {**OTHER[3], "thinking": "again"}]
    left, right = analysis.match({"a": PLAIN, "b": mixed}, 100)
    assert [text.prompt for text in left.texts] == [text.prompt for text in right.texts]
    assert len(left.texts) == 10 and right.texts[1].part("thinking") == OTHER[3]["thinking"]
    few = analysis.match({"a": PLAIN, "b": OTHER}, 4)[0].texts
    assert [text.prompt for text in few] == [PLAIN[at]["problem"] for at in (0, 3, 6, 9)]


@pytest.mark.parametrize(
    "datasets,error,told",
    [
        ({"a": PLAIN, "b": [{"problem": "Other?", "thinking": "x"}]}, DatasetError, "share 0 prompts"),
        ({"a": PLAIN, "b": [{"text": "x"}]}, DatasetError, "No row of 'b' has a prompt and a text"),
        ({"a": PLAIN}, SettingsError, "1 datasets"),
        (dict.fromkeys("abcd", PLAIN), SettingsError, "4 datasets"),
    ],
)
def test_what_cannot_be_compared_is_told(datasets, error, told):
    with pytest.raises(error, match=told):
        analysis.analyze(datasets, vocabulary("qwen"))


# --- what is found


def test_similarity_is_the_mean_cosine_of_tf_idf_bags(found):
    bags = [
        [Counter(vocabulary("qwen").encode(row["thinking"]).ids + vocabulary("qwen").encode(row["answer"]).ids)
         for row in rows]
        for rows in (PLAIN, OTHER)
    ]  # fmt: skip
    documents = bags[0] + bags[1]
    idf = {
        t: math.log((1 + len(documents)) / (1 + sum(t in bag for bag in documents))) + 1
        for t in sum(documents, Counter())
    }
    weighed = [[{t: n * idf[t] for t, n in bag.items()} for bag in side] for side in bags]

    def cosine(a, b):
        norms = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
        return sum(value * b.get(t, 0) for t, value in a.items()) / norms

    (one,) = found["similarity"]
    expected = [cosine(a, b) for a, b in zip(*weighed, strict=True)]
    assert one["of"] == ["a", "b"] and one["mean"] == pytest.approx(sum(expected) / 12)
    rolled = [cosine(a, weighed[1][at - 1]) for at, a in enumerate(weighed[0])]
    assert one["other_prompts"] == pytest.approx(sum(rolled) / 12)


def test_the_same_dataset_is_the_same_and_a_third_is_compared_with_both():
    told = analysis.analyze({"a": PLAIN, "b": PLAIN, "c": OTHER}, vocabulary("qwen"))
    means = {tuple(one["of"]): one["mean"] for one in told["similarity"]}
    assert means["a", "b"] == pytest.approx(1) and means["a", "c"] == means["b", "c"] < 0.99
    assert told["pca"]["points"][0] == told["pca"]["points"][1] != told["pca"]["points"][2]
    assert told["pca"]["explained"][0] >= told["pca"]["explained"][1] > 0


def test_lengths_authors_and_words_are_counted(found):
    lengths = [len(vocabulary("qwen").encode(row["thinking"]).ids) for row in PLAIN]
    assert found["tokens"]["a"]["thinking"]["mean"] == pytest.approx(sum(lengths) / 12)
    assert found["authors"] == {"a": None, "b": None} and found["nll"] is None
    words = dict(zip(found["words"]["words"], zip(*found["words"]["per_thousand"], strict=True), strict=True))
    assert words["apples"] == (pytest.approx(1000 / 7, abs=1e-3), 0) and words["compute"][0] == 0 < words["compute"][1]
    row = as_row(trajectory())
    rows = [{**row, "messages": [{"role": "user", "content": str(at)}, row["messages"][-1]]} for at in range(3)]
    told = analysis.analyze({"a": rows, "b": rows}, vocabulary("qwen"))["authors"]["a"]
    assert told == {"teacher": 3 * row["teacher_tokens"], "student": 3 * row["student_tokens"]}


def test_the_likelihood_is_that_of_the_row_as_it_is_trained(student):
    words, model = student
    row = load_dataset("parquet", data_files=str(ROWS), split="train")[0]
    side = analysis.Side("a", [analysis.read(row)])
    scored = analysis.score(side, words, Scorer(TransformersEngine(demo.STUDENT)), 5, 4096)
    told = analysis.likelihood(scored)
    text = words.chat_text(row["messages"]).removesuffix("<|im_end|>\n")
    ids = words.encode_template(text)
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    losses = [-float(scores[at - 1, ids[at]]) for at in range(len(ids))]
    begins = len(words.encode_template(text[: text.index("<think>\n") + len("<think>\n")]))
    marks = words.encode_template("\n</think>\n\n")
    closing = next(at for at in range(begins, len(ids)) if ids[at : at + len(marks)] == marks)
    own = losses[begins:closing] + losses[closing + len(marks) :]
    assert told["all"]["nll"] == pytest.approx(sum(losses[begins:]) / len(losses[begins:]), rel=1e-4)
    assert set(told) == {"all", "student's thinking", "teacher's thinking", "student's answer"}
    by_author = sum(one["nll"] * one["tokens"] for kind, one in told.items() if kind != "all")
    assert by_author == pytest.approx(sum(own), rel=1e-4)
    for kind in ("student", "teacher"):
        counted = sum(s["tokens"] for s in row["spans"] if (s["author"], s["part"]) == (kind, "thinking"))
        assert told[f"{kind}'s thinking"]["tokens"] == counted


def test_the_rank_surprisal_ratio_is_what_one_computes_by_hand():
    first = surprise([math.log(0.5), math.log(0.01), math.log(0.1)], [1, 250, 7])
    second = surprise([math.log(0.25)], [2])
    nats = -math.log(0.5) - math.log(0.01) - math.log(0.1), -math.log(0.25)
    assert first.rsr == pytest.approx((1 + 100 + 7) / nats[0]) and second.rsr == pytest.approx(2 / nats[1])
    told = of_set([first, None, second])
    assert told["rsr"] == pytest.approx((108 / 3 + 2) / (nats[0] / 3 + nats[1])) and told["texts"] == 2
    assert told["surprisal"] == pytest.approx((nats[0] / 3 + nats[1]) / 2) and surprise([], []) is None


def test_rows_and_sets_have_their_ratio_under_the_student(student):
    words, model = student
    rows = load_dataset("parquet", data_files=str(ROWS), split="train").select(range(5))
    other = [{**row, "thinking": row["thinking"][::-1], "spans": []} for row in rows]
    scorer = Scorer(TransformersEngine(demo.STUDENT))
    told = analysis.analyze({"a": rows, "b": other}, words, scorer=scorer)["surprise"]
    ids = words.encode_template(words.chat_text(rows[0]["messages"]).removesuffix("<|im_end|>\n"))
    text = words.decode(ids)
    begins = len(words.encode_template(text[: text.index("<think>\n") + len("<think>\n")]))
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    own = [scores[at - 1, ids[at]] for at in range(begins, len(ids))]
    ranks = [int((scores[at - 1] > one).sum()) + 1 for at, one in zip(range(begins, len(ids)), own, strict=True)]
    expected = sum(min(rank, 100) for rank in ranks) / -float(sum(own))
    assert told["a"]["rows"][0]["rsr"] == pytest.approx(expected, rel=1e-3)
    assert told["a"]["rsr"] == pytest.approx(
        sum(row["rank"] for row in told["a"]["rows"]) / sum(row["surprisal"] for row in told["a"]["rows"])
    )
    assert told["b"]["surprisal"] > told["a"]["surprisal"]


def test_columns_on_request_are_those_figures(student):
    rows = load_dataset("parquet", data_files=str(ROWS), split="train").select(range(4))
    scorer = Scorer(TransformersEngine(demo.STUDENT))
    made, cut = analysis.with_surprise(rows, student[0], scorer)
    assert cut == 0
    told = analysis.analyze({"a": rows, "b": rows}, student[0], scorer=scorer)["surprise"]["a"]["rows"]
    assert made["student_rsr"][:] == pytest.approx([row["rsr"] for row in told])
    assert made["student_surprisal"][:] == pytest.approx([row["surprisal"] for row in told])
    assert analysis.with_surprise(made, student[0], scorer)[0][:] == made[:]  # those that are there are replaced


def test_rows_too_long_to_be_read_whole_are_counted(student):
    rows = load_dataset("parquet", data_files=str(ROWS), split="train").select(range(6))
    scorer, texts = Scorer(TransformersEngine(demo.STUDENT)), list(map(analysis.read, rows))
    whole = analysis.score(analysis.Side("a", texts), student[0], scorer, 6, 4096)
    ids = [len(student[0].encode_template(student[0].chat_text(row["messages"]).removesuffix("<|im_end|>\n")))
           for row in rows]  # fmt: skip
    most = sorted(ids)[2]
    made, cut = analysis.with_surprise(rows, student[0], scorer, most)
    told = analysis.analyze({"a": rows, "b": rows}, student[0], scorer=scorer, nll_tokens=most)
    assert cut == told["surprise"]["a"]["cut"] == sum(length > most for length in ids) > 0
    assert f"only the beginning counts: {cut} of a, {cut} of b." in page.tables(told)[-1].note
    for row, text, length in zip(made, whole, ids, strict=True):
        read = text.logprobs[: len(text.logprobs) - max(0, length - most)]
        assert row["student_surprisal"] == pytest.approx(-sum(read) / len(read), rel=1e-4)


def test_words_of_doubt_are_counted_by_method():
    rows = [
        {
            **row,
            "method": "tessy" if at % 2 else "teacher-only",
            "thinking": "Wait, wait. Maybe so." if at % 2 else "So 1 2 3",
        }
        for at, row in enumerate(PLAIN)
    ]
    told = analysis.analyze({"a": rows, "b": OTHER}, vocabulary("qwen"))["markers"]
    assert set(told["a"]) == {"tessy", "teacher-only"} and set(told["b"]) == {""}
    assert told["a"]["tessy"]["wait"] == pytest.approx(2 * told["a"]["tessy"]["maybe"]) != 0
    assert sum(told["a"]["teacher-only"].values()) == 0


# --- figures and the page


def test_figures_show_what_was_found_and_only_what_there_is(found):
    assert page.names(found) == page.names({**found, "nll": {"a": {}, "b": {}}}) == ["map", "tokens", "words"]
    (axes,) = page.draw("map", found).axes
    assert [len(one.get_offsets()) for one in axes.collections] == [12, 12, 1, 1]
    assert axes.collections[2].get_offsets()[0].tolist() == pytest.approx(found["pca"]["centres"][0])
    (axes,) = page.draw("tokens", found).axes
    assert axes.patches[0].get_width() == pytest.approx(found["tokens"]["a"]["thinking"]["mean"])
    (axes,) = page.draw("words", found).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == found["words"]["words"]
    rates = sum(found["words"]["per_thousand"], [])
    strengths = [patch.get_alpha() for patch in axes.patches]
    assert strengths.index(max(strengths)) == rates.index(max(rates)) and min(strengths) == 0


def test_foreign_text_stays_text(tmp_path):
    rows = [{**row, "thinking": f"{NASTY} {row['thinking']}"} for row in PLAIN]
    told = analysis.analyze({NASTY: rows, "b": OTHER}, vocabulary("qwen"))
    assert "你好" in told["words"]["words"]
    page.write(tmp_path / "a.html", told)
    written = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script" not in written and "&lt;script&gt;" in written and "$x_1$" in written and "你好" in written
    assert "default-src 'none'" in written and not re.search(r"""(src|href)=["']?(https?:|//)""", written)
    assert written.count("<figure") == 3 and written.endswith("</html>\n")


@pytest.mark.slow
def test_the_command_compares_miniature_datasets(tessy, tmp_path):  # noqa: F811
    rows = load_dataset("parquet", data_files=str(ROWS), split="train").select(range(8))
    rows.to_parquet(tmp_path / "tessy.parquet")
    plain = [{"question": row["source_prompt"], "thinking": row["thinking"], "answer": "so 1 ."} for row in rows]
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, plain)))
    given = ["analyze", tmp_path / "tessy.parquet", tmp_path / "plain.jsonl"]
    code, printed = tessy(*given, "--student", demo.STUDENT, "--out", tmp_path / "a.html", "--nll-rows", 3)
    assert code == 0 and "similarity 0.9" in printed and "8 prompts compared" in printed
    assert "--nll-tokens" not in printed
    written = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert written.count("<figure") == 5 and "Negative log-likelihood under the student" in written
    code, printed = tessy(*given, "--tokenizer", demo.STUDENT, "--json")
    told = json.loads(printed[printed.index('{"names"') :])
    assert code == 0 and told["prompts"] == 8 and told["nll"] is None and told["authors"]["plain.jsonl"] is None
    assert told["authors"]["tessy.parquet"]["teacher"] == sum(rows["teacher_tokens"])
    more = ["--out", tmp_path / "b.html", "--columns", tmp_path / "scored", "--nll-tokens", 40]
    code, printed = tessy(*given, "--student", demo.STUDENT, *more)
    for name in ("tessy.parquet", "scored/plain.jsonl.parquet"):
        assert f"{name}: 8 of 8 rows have more than 40 tokens" in printed
    scored = load_dataset("parquet", data_files=str(tmp_path / "scored" / "tessy.parquet"), split="train")
    assert code == 0 and min(scored["student_rsr"]) > 0
    before = (tmp_path / "tessy.parquet").read_bytes()
    code, printed = tessy(*given, "--student", demo.STUDENT, "--columns", tmp_path)
    assert code == 2 and "is there already" in " ".join(printed.split())
    assert (tmp_path / "tessy.parquet").read_bytes() == before
    for words, seen in [
        (given, "No tokenizer given"),
        ([*given, "--tokenizer", demo.STUDENT, "--out", given[1]], "would be overwritten with a page"),
        ([*given, "--tokenizer", demo.STUDENT, "--columns", tmp_path], "--columns needs"),
        ([*given, "--tokenizer", tmp_path / "none"], "cannot be loaded"),
        ([*given[:2], tmp_path / "none.parquet", "--tokenizer", demo.STUDENT], "there is no such file"),
    ]:
        code, printed = tessy(*words)
        assert code == 2 and seen in " ".join(printed.split()) and "Traceback" not in printed


def test_without_the_extra_one_is_told_what_to_install(monkeypatch, found):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TessyError, match=r'pip install "tessy-hf\[report\]"'):
        page.draw("map", found)
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(TessyError, match=r'pip install "tessy-hf\[report\]"'):
        analysis.analyze({"a": PLAIN, "b": OTHER}, vocabulary("qwen"))


def test_help_loads_neither_matplotlib_nor_scikit_learn():
    ask = (
        "import sys, tessy_hf, tessy_hf.cli.main\nsys.argv = ['tessy', 'analyze', '--help']\n"
        "try:\n    tessy_hf.cli.main.main()\nexcept SystemExit:\n    print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    assert "tessy_hf.cli.main" in loaded and not {"matplotlib", "sklearn", "scipy", "torch", "trl", "peft"} & set(
        loaded
    )
