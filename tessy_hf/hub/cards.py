"""The card of a released dataset: its numbers and its manifest go in, a card comes out, the user's own words kept.

The metadata goes through ``DatasetCardData``. The text is made of parts, each between two marks. A part that was not
touched since it was written is written anew; a part that the user changed, and all text outside the marks, stays as
it is. Whatever comes from models, servers or users is put on the card inert. Knows nothing of the Hub.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache, partial
from importlib import resources
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from tessy_hf.report.tables import Table, count, percent, tables
from tessy_hf.rows.columns import COLUMNS

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard, DatasetCardData
    from jinja2 import Template

    from tessy_hf.manifest import HardwareRecord, Manifest, ModelRecord

TAGS = ("tessy", "synthetic", "reasoning", "sft")
"""Tags of every dataset written with this package."""

SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
"""The Hub's size categories, each ten times the one before, from a thousand rows on."""

_PART = re.compile(
    r"^<!-- tessy:(?P<name>\w+) (?P<digest>\w{8}) -->\n(?P<text>.*?)\n<!-- /tessy:(?P=name) -->$", re.M | re.S
)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def dataset_card(
    summary: dict[str, Any],
    manifest: Manifest,
    repo_id: str,
    previous: str | None = None,
    *,
    figures: Mapping[str, str] | None = None,
) -> DatasetCard:
    """Write the card of a release.

    Args:
        summary: The numbers of all its rows, see :meth:`tessy_hf.report.statistics.Statistics.summary`.
        manifest: Its manifest.
        repo_id: The dataset on the Hub.
        previous: The card that stands there now, whose own words, metadata and other configurations are kept.
        figures: Paths in the repository of the figures to show, with a description of each.

    Returns:
        The card. Its metadata is what was there, with licence (where one was given), tags, size, and the files and
        columns of this configuration brought up to date.
    """
    data, body = _before(previous)
    _update(data, manifest)
    parts = _render(
        "dataset_card.md",
        summary=summary,
        tables=tables(summary),
        manifest=manifest,
        repo_id=repo_id,
        tag=f"v{manifest.version}",
        licences=_licences(data),
        student=_student(manifest),
        alternates=all(method.startswith("tessy") for method in summary["methods"]) and bool(summary["methods"]),
        own_columns=[name for name in _names(manifest.features) if name not in COLUMNS],
        incomplete=summary["rows"] - summary["finish_reasons"].get("stop", 0),
        failures=_failures(manifest),
        counts_failed=0 < manifest.counts.failed == summary["rows"] - manifest.counts.rows,
        figures=[{"path": path, "description": told} for path, told in (figures or {}).items()],
    )
    return _card(data, merge(body, parts))


def style_spans_card(summary: dict[str, Any], repo_id: str, previous: str | None = None) -> DatasetCard:
    """Write the card of a dataset of marked style spans, of the numbers that :func:`style_spans_summary` gives."""
    data, body = _before(previous)
    data.license = data.license or summary["licences"]
    data.language = data.language or ["en"]
    data.task_categories = data.task_categories or ["token-classification"]
    data["tags"] = _united(data.get("tags"), ("tessy", "reasoning", "style", "boundary-prediction"))
    data.size_categories = [size_category(summary["segments"])]
    return _card(data, merge(body, _render("style_spans_card.md", summary=summary, repo_id=repo_id)))


def style_spans_summary(rows: Iterable[Mapping[str, Any]], sources: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Count segments with marked style spans.

    Args:
        rows: Rows with ``text``, ``style_spans``, ``source_model``, ``family``, ``problem_id``, ``trace_id`` and
            ``annotator``.
        sources: Where the segments are from, by the beginning of their ``trace_id``: ``name``, ``url``, ``licence``.
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
        "licences": sorted({sources[name]["license"] for name in counted["source"]}),
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


def size_category(rows: int) -> str:
    """Return the Hub's name for so many rows."""
    return next((size for power, size in enumerate(SIZES) if rows < 1000 * 10**power), "n>1T")


# --- the metadata


def _before(previous: str | None) -> tuple[DatasetCardData, str]:
    """Return the metadata and the text of the card that is there now, if there is one."""
    from huggingface_hub import DatasetCard, DatasetCardData

    if previous is None or not previous.strip():
        return DatasetCardData(), ""
    text = previous.replace("\r\n", "\n")
    card = DatasetCard(text if text.lstrip().startswith("---\n") else f"---\n{{}}\n---\n{text}")
    return cast("DatasetCardData", card.data), card.text


def _update(data: DatasetCardData, manifest: Manifest) -> None:
    """Bring the metadata up to date; what the user wrote there and other configurations stay."""
    given = manifest.licence.model_dump(exclude_none=True) if manifest.licence.license else {}
    for name, value in given.items():
        data[name] = value
    data.task_categories = data.task_categories or ["text-generation"]
    data.annotations_creators = data.annotations_creators or ["machine-generated"]
    data.language_creators = data.language_creators or ["machine-generated"]
    methods = sorted({run.method for run in manifest.runs if run.method})
    data["tags"] = _united(data.get("tags"), (*TAGS, *(method for method in methods if method != "tessy")))
    sources = [run.source.id for run in manifest.runs if run.source and run.source.id]
    if prompts := list(filter(_REPO.fullmatch, sources)):
        data.source_datasets = _united(data.source_datasets, prompts)
    _update_files(data, manifest)
    infos = data["dataset_info"] if isinstance(data["dataset_info"], list) else [data["dataset_info"]]
    data.size_categories = [size_category(sum(split["num_examples"] for info in infos for split in info["splits"]))]


def _update_files(data: DatasetCardData, manifest: Manifest) -> None:
    """Say where the files of this configuration's splits are and what is in them, beside those of other splits."""
    from datasets import DatasetInfo
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs

    from tessy_hf.manifest import failures_split

    name, pushed = manifest.config_name, manifest.splits
    config = MetadataConfigs.from_dataset_card_data(data).get(name, {})
    gone = {*pushed, failures_split(manifest.split)}
    others = [file for file in config.get("data_files", []) if isinstance(file, dict) and file["split"] not in gone]
    files = [{"split": split, "path": _pattern(of.shards[0].path)} for split, of in pushed.items() if of.shards]
    MetadataConfigs({name: {**config, "data_files": [*files, *others]}}).to_dataset_card_data(data)
    known = DatasetInfosDict.from_dataset_card_data(data).get(name, DatasetInfo())
    splits = [
        {"name": split, "num_bytes": record.uncompressed_bytes, "num_examples": record.rows}
        for split, record in pushed.items()
    ]
    kept = [split for split in known._to_yaml_dict().get("splits") or [] if split["name"] not in gone]
    info = DatasetInfo._from_yaml_dict({"features": manifest.features, "splits": [*splits, *kept]})
    info.download_size = sum(record.bytes for record in pushed.values())
    info.dataset_size = sum(split["num_bytes"] for split in (*splits, *kept))
    DatasetInfosDict({name: info}).to_dataset_card_data(data)


def _pattern(path: str) -> str:
    """Return the pattern of a split's files, from the path of one of them."""
    return re.sub(r"\d+(-of-\d+)?\.parquet$", "*.parquet", path)


def _licences(data: DatasetCardData) -> list[str]:
    """Return what the card states: the licence by its own name, where it has one, and where to read it."""
    stated = data.get("license_name") or data.license or []
    return [*_united(stated, ()), *filter(None, [data.get("license_link")])]


def _united(given: Any, ours: Iterable[str]) -> list[str]:
    there = [given] if isinstance(given, str) else list(given or [])
    return [*there, *(name for name in ours if name not in there)]


# --- the text


def merge(body: str, parts: Mapping[str, str]) -> str:
    """Put newly written parts into a card's text, in the places of those that nobody has changed since.

    Args:
        body: The text as it is, without its metadata.
        parts: The parts by name, in the order of a new card.

    Returns:
        The text. Parts that it lacks come after those that it has; in a text without any they come first.
    """
    left = dict(parts)

    def again(part: re.Match[str]) -> str:
        new = left.pop(part["name"], None)
        if part["digest"] != _digest(part["text"]):
            return part[0]  # changed by hand
        return _marked_part(part["name"], new) if new is not None else ""

    if not _PART.search(body):
        own = body.strip()
        return "\n\n".join(_marked_part(name, text) for name, text in parts.items()) + (f"\n\n{own}" if own else "")
    merged = _PART.sub(again, body).strip()
    return "\n\n".join([merged, *(_marked_part(name, text) for name, text in left.items())])


def _marked_part(name: str, text: str) -> str:
    return f"<!-- tessy:{name} {_digest(text)} -->\n{text}\n<!-- /tessy:{name} -->"


def _digest(text: str) -> str:
    return hashlib.sha256("\n".join(line.rstrip() for line in text.strip().split("\n")).encode()).hexdigest()[:8]


def _card(data: DatasetCardData, body: str) -> DatasetCard:
    from huggingface_hub import DatasetCard

    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _render(template: str, **fields: Any) -> dict[str, str]:
    """Render each block of a template; a field that is missing is an error."""
    made = _template(template)
    context = made.new_context(fields)
    return {name: _tidy("".join(block(context))) for name, block in made.blocks.items()}


def _tidy(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", text.strip())


@cache
def _template(name: str) -> Template:
    """Load a template whose every value is made inert, unless a filter already has."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, finalize=_inert, autoescape=False)  # noqa: S701 - Markdown
    environment.filters.update(
        code=code,
        cell=partial(code, cell=True),
        count=lambda value: Markdown(count(value)),
        percent=lambda value: Markdown(html.escape(percent(value))),
        python=lambda value: Markdown(json.dumps(value, ensure_ascii=False)),
        json=lambda value: Markdown(json.dumps(value, indent=2, ensure_ascii=False)),
        model=lambda name: _link(name, "https://huggingface.co/", cell=True),
        dataset=lambda name: _link(name, "https://huggingface.co/datasets/"),
        revision=_revision,
        url=lambda path: Markdown(quote(path)),
        github=lambda name: _link(name, "https://github.com/"),
        grid=_grid,
        marked_by=lambda title, groups: _grid(_by_group(title, groups), names=True),
        join_codes=lambda names: Markdown(", ".join(map(code, names))),
    )
    environment.globals["hardware"] = _hardware
    return environment.from_string((resources.files("tessy_hf.hub") / "templates" / name).read_text("utf-8"))


class Markdown(str):
    """Text that is put on a card as it is."""


def code(text: Any, cell: bool = False) -> Markdown:
    """Return any text as a code span in one line: nothing in it is markup, nor a link.

    Args:
        text: The text.
        cell: Whether it stands in a table, where a bar would end the cell.
    """
    line = " ".join(re.sub(r"[\x00-\x1f\x7f\u2028\u2029]", " ", str(text)).split()) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line[0] == "`" or line[-1] == "`" or len(fence) > 1 else ""
    span = f"{fence}{space}{line}{space}{fence}"
    return Markdown(span.replace("|", "\\|") if cell else span)


def _inert(value: Any) -> Markdown:
    """Return a value so that it is shown as it is: every sign that could be markup is spelled as an entity."""
    if isinstance(value, Markdown):
        return value
    if value is None:
        raise ValueError("A field of the card is empty. Its template has to say what is written where it is.")
    line = " ".join(str(value).split())
    return Markdown(re.sub(r"[^\w\s,.;%()–’'/-]|_", lambda sign: f"&#{ord(sign[0])};", line))


def _grid(table: Table, names: bool = False) -> Markdown:
    """Return a table; ``names`` says that the first column holds names, in code spans, and not words."""
    lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)]]
    lines += [[code(line[0], cell=True) if names else _inert(line[0]), *map(_inert, line[1:])] for line in table.lines]
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return Markdown(drawn + (f"\n\n{_inert(table.note)}" if table.note else ""))


def _by_group(title: str, groups: Mapping[str, Mapping[str, Any]]) -> Table:
    head = (title, "segments", "style spans", "characters", "style, of the characters", "characters of a span, mean")
    lines = [
        (name, *(count(told[key]) for key in ("segments", "spans", "characters")), percent(told["style_share"]),
         count(told["span_characters"]))
        for name, told in groups.items()
    ]  # fmt: skip
    return Table("", head, lines)


def _link(name: str, base: str, cell: bool = False) -> Markdown:
    return Markdown(f"[{code(name)}]({base}{name})") if _REPO.fullmatch(name) else code(name, cell)


def _revision(model: ModelRecord) -> Markdown:
    known = model.revision or model.digest or model.requested_revision
    return Markdown("–") if known is None else code(known if len(known) <= 20 else known[:19] + "…", cell=True)


def _hardware(hardware: HardwareRecord) -> str:
    machine = f"{hardware.system}, {hardware.machine}, {hardware.cores} cores"
    return ", ".join([machine, *hardware.gpus])


def _student(manifest: Manifest) -> str:
    students = [run.student.model.name for run in manifest.runs if run.student]
    return students[0] if students else "the-student"


def _names(features: list[Any] | dict[str, Any]) -> list[str]:
    return list(features) if isinstance(features, dict) else [feature["name"] for feature in features]


def _failures(manifest: Manifest) -> Markdown | None:
    """Say what became of failed and incomplete rows."""
    if not manifest.counts.failed:
        return None
    complete = ", ".join(map(code, manifest.complete))
    told = f"{count(manifest.counts.failed)} rows that did not end with {complete} are "
    if manifest.failures_split:
        return Markdown(told + f"not in this split but in the split {code(manifest.failures_split)}.")
    return Markdown(told + "left out of this release.")
