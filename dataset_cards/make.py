"""The cards of the datasets in this folder, as a release would carry them. Tests render them again and compare.

python dataset_cards/make.py miniature      # writes the rows anew with the demo's models, then manifest and card
python dataset_cards/make.py style-spans    # the card, from the rows that are there
python dataset_cards/make.py render         # both cards and the figures, from what is there
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

from tessy_hf import demo
from tessy_hf.hub import cards
from tessy_hf.manifest import (
    Counts,
    Licence,
    Manifest,
    ShardRecord,
    SourceRecord,
    SplitRecord,
    libraries,
    now,
    record,
)
from tessy_hf.report import figures, summarise
from tessy_hf.run.finished import Rows

HERE = Path(__file__).parent
MINIATURE, STYLE_SPANS = HERE / "miniature", HERE / "style-spans"
ROWS = "data/train-00000.parquet"


def make_miniature(rows: int = 256) -> None:
    """Let the miniature teacher and student write a dataset, and describe it."""
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
    summary = summarise(dataset)
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
        features=dataset.features._to_yaml_list(),
        licence=Licence(license="apache-2.0"),
        begun=begun,
        finished=now(),
        pushed_with=libraries(),
    )
    (MINIATURE / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")


def miniature_card() -> str:
    """Render the card of the miniature dataset from its rows and its manifest."""
    summary = summarise(Dataset.from_parquet(str(MINIATURE / ROWS)))
    manifest = Manifest.model_validate_json((MINIATURE / "manifest.json").read_text(encoding="utf-8"))
    shown = {f"figures/{name}.png": figures.describe(name, summary) for name in figures.NAMES}
    return str(cards.dataset_card(summary, manifest, "tessy-hf/miniature", figures=shown))


def style_spans_card() -> str:
    """Render the card of the style-span dataset from its rows."""
    rows = [json.loads(line) for line in (STYLE_SPANS / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    sources = json.loads((STYLE_SPANS / "sources.json").read_text(encoding="utf-8"))
    return str(cards.style_spans_card(cards.style_spans_summary(rows, sources), "tessy-hf/style-spans"))


CARDS: dict[Path, Callable[[], str]] = {MINIATURE: miniature_card, STYLE_SPANS: style_spans_card}


def render() -> None:
    """Write the cards and the figures anew."""
    for folder, card in CARDS.items():
        (folder / "README.md").write_text(card(), encoding="utf-8")
    figures.write(summarise(Dataset.from_parquet(str(MINIATURE / ROWS))), MINIATURE / "figures")


if __name__ == "__main__":
    if sys.argv[1:] not in (["miniature"], ["style-spans"], ["render"]):
        sys.exit(__doc__)
    if sys.argv[1] == "miniature":
        make_miniature()
    render()
