"""Real reasoning through the whole machine: replay real traces of the same problems, and check every row.

Two engines play the traces, the small predictor decides. Each engine goes on turn by turn: what it says when it takes
over is what follows in its trace where a run of its own kind begins, so that style goes on as style and steps as
steps; with `--whole` it goes on where it was cut. Both write in the predictor's vocabulary with
special tokens of their own, so text is handed over, not ids::

    python benchmarks/replay.py --teacher traces_gpt-oss.jsonl --student traces_qwen3.jsonl --out rows.jsonl --show 20

A trace is a JSON line with `problem_id`, `problem`, `thinking` and `answer`.
"""

import argparse
import json
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from datasets import disable_progress_bars, load_dataset
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

import tessy_hf
from tessy_hf import BoundaryPredictor, Script, ScriptedEngine, Speaker, TessyTransform
from tessy_hf.boundary.predictor import SHIPPED
from tessy_hf.boundary_training.readings import read
from tessy_hf.text.traces import thinking
from tessy_hf.text.vocabulary import words
from tests.worlds import make_tokenizer

SMALL = Path(tessy_hf.__file__).parent / "boundary" / "small"


def tokenizer_of(kind, folder=SMALL):
    """Return a predictor's tokenizer with the special tokens and the chat template of a kind of model."""
    kind = make_tokenizer(kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(kind.added_tokens_decoder.values()))
    tokenizer.eos_token, tokenizer.chat_template = kind.eos_token, kind.chat_template
    return tokenizer


def read_traces(path):
    """Return the traces by problem."""
    rows = (json.loads(line) for line in path.read_text("utf-8").split("\n") if line)
    return {row["problem_id"]: {**row, "thinking": thinking(row) or ""} for row in rows}


def turns(reading, text, own_kind):
    """Cut a trace where a run of the author's own kind begins."""
    kinds, places = reading.words(text, own_kind), words(text)
    cuts = [places[i][0] for i in range(1, len(places)) if kinds[i] == own_kind != kinds[i - 1]]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def speaker(traces, predictor, kind, own_kind, whole):
    """Return a speaker that replays traces."""
    texts = [trace["thinking"] for trace in traces.values()]
    plays = texts if whole else map(turns, read(predictor, texts), texts, [own_kind] * len(texts))
    scripts = {key: Script(play, traces[key]["answer"]) for key, play in zip(traces, plays, strict=True)}
    folder = SMALL if predictor.model == SHIPPED else predictor.model
    return Speaker(ScriptedEngine(scripts, tokenizer=tokenizer_of(kind, folder)), boundary=predictor)


def check(row, answer):
    """Raise AssertionError unless a row is whole: its spans are its text, its authors take turns, its end is told."""
    text, spans = row["messages"][-1]["content"], row["spans"]
    assert row["error"] is None and row["thinking"], row["problem_id"]
    assert text == f"<think>\n{row['thinking']}\n</think>\n\n{row['answer']}", row["problem_id"]
    assert [span["start"] for span in spans] == [0, *(span["end"] for span in spans[:-1])], row["problem_id"]
    assert spans[-1]["end"] == len(text) and all(span["start"] < span["end"] for span in spans), row["problem_id"]
    assert all((a["author"], a["part"]) != (b["author"], b["part"]) for a, b in pairwise(spans)), row["problem_id"]
    assert row["answer"] == answer.strip(), row["problem_id"]


def spans_of(row):
    """Return who wrote each span of thinking, and what."""
    text = row["messages"][-1]["content"]
    return [(s["author"], text[s["start"] : s["end"]]) for s in row["spans"] if s["part"] == "thinking"]


def figures(rows):
    """Return what the rows are like."""
    said = [span for row in rows for span in spans_of(row)]
    size = {author: sum(len(text) for who, text in said if who == author) for author in ("teacher", "student")}
    lengths = {author: [len(text.split()) for who, text in said if who == author] for author in size}
    return {
        "rows": len(rows),
        "finish_reasons": Counter(row["finish_reason"] for row in rows),
        "not_ascii": sum(not row["thinking"].isascii() for row in rows),
        "characters_of_thinking": sum(size.values()),
        "teacher_share": round(size["teacher"] / sum(size.values()), 3),
        "generated_per_kept": round(
            sum(row[f"generated_{author}_tokens"] for row in rows for author in size)
            / sum(row[f"{author}_tokens"] for row in rows for author in size),
            3,
        ),
        "spans_a_row": round(len(said) / len(rows), 1),
        "words_a_span": {
            author: dict(zip(("median", "p90", "most"), map(int, np.quantile(of, (0.5, 0.9, 1))), strict=True))
            for author, of in lengths.items()
        },
    }


def main():
    """Replay, check and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="JSONL file of traces")
    parser.add_argument("--student", type=Path, required=True, help="likewise, of the same problems")
    parser.add_argument("--predictor", default=SHIPPED, help="the folder of a predictor; by default the shipped one")
    parser.add_argument("--out", type=Path, help="where to write the rows")
    parser.add_argument("--limit", type=int, help="replay so many problems only")
    parser.add_argument("--whole", action="store_true", help="go on where a trace was cut, whatever follows there")
    parser.add_argument("--show", type=int, default=0, help="print the thinking of so many rows, [[style]] marked")
    args = parser.parse_args()
    disable_progress_bars()
    prompts = load_dataset("json", data_files=str(args.student), split="train", streaming=True)
    prompts = prompts.select_columns(["problem_id", "problem"]).take(args.limit or 1 << 40)
    asked = [row["problem_id"] for row in prompts]
    teacher, student = ({key: read_traces(path)[key] for key in asked} for path in (args.teacher, args.student))
    predictor = BoundaryPredictor.from_pretrained(args.predictor)
    transform = TessyTransform(
        teacher=speaker(teacher, predictor, "harmony", False, args.whole),
        student=speaker(student, predictor, "qwen", True, args.whole),
        prompt_column="problem", id_column="problem_id", journal=None,
    )  # fmt: skip
    begin = time.monotonic()
    with transform:
        rows = list(prompts.map(transform, batched=True, features=transform.features(prompts)))
    seconds = time.monotonic() - begin
    if args.out:
        args.out.write_text("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows), "utf-8")
    assert [row["problem_id"] for row in rows] == asked, f"{len(asked)} rows went in, {len(rows)} came out"
    for row in rows:
        check(row, student[row["problem_id"]]["answer"])
    for row in rows[:: max(1, len(rows) // args.show)][: args.show] if args.show else ():
        marked = "".join(f"[[{text}]]" if who == "student" else text for who, text in spans_of(row))
        print(f"--- {row['problem_id']}\n{marked}\n")
    print(json.dumps({**figures(rows), "seconds": round(seconds)}))


if __name__ == "__main__":
    main()
