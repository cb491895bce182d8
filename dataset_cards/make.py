"""The cards of the datasets in this folder, as a release would carry them. Tests render them again and compare.

python dataset_cards/make.py miniature      # writes the rows again with the demo's models, then manifest and card
python dataset_cards/make.py style-spans    # the card, from its rows
python dataset_cards/make.py render         # both cards and the figures, from rows and manifest
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from tessy_hf import demo
from tessy_hf.hub import cards
from tessy_hf.manifest import (
    Counts,
    License,
    Manifest,
    ShardRecord,
    SourceRecord,
    SplitRecord,
    libraries,
    now,
    record,
)
from tessy_hf.report import figures
from tessy_hf.report.statistics import summarize
from tessy_hf.report.tables import Table, count, percent
from tessy_hf.rows.datasets_internals import features_to_yaml
from tessy_hf.run.finished import Rows

HERE = Path(__file__).parent
MINIATURE, STYLE_SPANS = HERE / "miniature", HERE / "style-spans"
ROWS = "data/train-00000.parquet"
ENGLISH = "---\nlanguage: [en]\n---\n"
STYLE_HEAD = ("segments", "style spans", "characters", "style, of the characters", "characters of a span, mean")


def make_miniature(rows: int = 256) -> None:
    """Have the miniature teacher and student write a dataset, and describe it."""
    begun = now()
    prompts = demo.prompts(rows, seed=0)
    with demo.transform(seed=0, journal=None) as transform:
        dataset = Rows(prompts.map(transform, batched=True, features=transform.features(prompts))).dataset()
        source = SourceRecord(id="tessy_hf.demo.prompts", split="train")
        run = record(transform.teacher, transform.student, transform.settings, transform.run_fingerprint, source)
    path = MINIATURE / ROWS
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(path)
    size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    summary = summarize(dataset)
    manifest = Manifest(
        version="1.0.0",
        runs=[run],
        counts=Counts(
            rows=rows,
            failed=0,
            finish_reasons=summary["finish_reasons"],
            runs=summary["run_fingerprints"],
        ),
        splits={
            "train": SplitRecord(
                rows=rows,
                bytes=size,
                uncompressed_bytes=dataset.data.nbytes,
                shards=[ShardRecord(path=ROWS, rows=rows, bytes=size, sha256=digest)],
            )
        },
        features=features_to_yaml(dataset.features),
        license=License(license="apache-2.0"),
        begun=begun,
        finished=now(),
        pushed_with=libraries(),
    )
    (MINIATURE / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")


def miniature_card() -> str:
    """Render the card of the miniature dataset from its rows and its manifest."""
    summary = summarize(Dataset.from_parquet(str(MINIATURE / ROWS)))
    manifest = Manifest.model_validate_json((MINIATURE / "manifest.json").read_text(encoding="utf-8"))
    shown = {f"figures/{name}.png": figures.describe(name, summary) for name in figures.NAMES}
    return str(cards.dataset_card(summary, manifest, "tessy-hf/miniature", ENGLISH, figures=shown))


def style_spans_card() -> str:
    """Render the card from the rows that are there."""
    rows = [json.loads(line) for line in (STYLE_SPANS / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    sources = json.loads((STYLE_SPANS / "sources.json").read_text(encoding="utf-8"))
    summary = _summarize_spans(rows, sources)
    data, body = cards.read_card(None)
    data.license, data.language, data.task_categories = summary["licenses"], ["en"], ["token-classification"]
    data["tags"] = ["tessy", "reasoning", "style", "boundary-prediction"]
    data.size_categories = [cards.size_category(summary["segments"])]
    parts = cards.render_parts(
        (STYLE_SPANS / "card.md.jinja").read_text(encoding="utf-8"),
        summary=summary,
        repo_id="tessy-hf/style-spans",
        by_model=_table("model", summary["source_model"]),
        by_annotator=_table("annotator", summary["annotator"]),
    )
    return str(cards.make_card(data, cards.merge(body, parts)))


def _summarize_spans(rows: Iterable[Mapping[str, Any]], sources: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Count segments with marked style spans.

    Args:
        rows: Rows with ``text``, ``style_spans``, ``source_model``, ``problem_id``, ``trace_id`` and ``annotator``.
        sources: Where the segments come from, by the beginning of their ``trace_id``.
    """
    kept = list(rows)
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {"source_model": {}, "annotator": {}, "source": {}}
    for row in kept:
        for column in ("source_model", "annotator"):
            groups[column].setdefault(str(row[column]), []).append(row)
        groups["source"].setdefault(str(row["trace_id"]).split("-")[0], []).append(row)
    counted = {column: {name: _marked(of) for name, of in sorted(by.items())} for column, by in groups.items()}
    return {
        **_marked(kept),
        "problems": len({row["problem_id"] for row in kept}),
        "words": round(sum(len(row["text"].split()) for row in kept) / max(len(kept), 1)),
        **counted,
        "sources": {name: dict(sources[name]) for name in counted["source"]},
        "licenses": sorted({sources[name]["license"] for name in counted["source"]}),
    }


def _marked(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    spans = [span["end"] - span["start"] for row in rows for span in row["style_spans"]]
    characters = sum(len(row["text"]) for row in rows)
    return {
        "segments": len(rows),
        "spans": len(spans),
        "characters": characters,
        "style_share": sum(spans) / characters if characters else None,
        "span_characters": sum(spans) / len(spans) if spans else None,
    }


def _table(title: str, groups: Mapping[str, Mapping[str, Any]]) -> Table:
    lines = [
        (
            name,
            *(count(group[key]) for key in ("segments", "spans", "characters")),
            percent(group["style_share"]),
            count(group["span_characters"]),
        )
        for name, group in groups.items()
    ]
    return Table("", (title, *STYLE_HEAD), lines)


CARDS: dict[Path, Callable[[], str]] = {MINIATURE: miniature_card, STYLE_SPANS: style_spans_card}


def render() -> None:
    """Write the cards and the figures anew."""
    for folder, card in CARDS.items():
        (folder / "README.md").write_text(card(), encoding="utf-8")
    summary = summarize(Dataset.from_parquet(str(MINIATURE / ROWS)))
    for name in figures.NAMES:
        (MINIATURE / "figures" / f"{name}.png").write_bytes(figures.image(name, summary, kind="png"))


if __name__ == "__main__":
    if sys.argv[1:] not in (["miniature"], ["style-spans"], ["render"]):
        sys.exit(__doc__)
    if sys.argv[1] == "miniature":
        make_miniature()
    render()
