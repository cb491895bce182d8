"""A card says what the rows say, keeps what its user wrote, and shows foreign text as text."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from tessy_hf.hub import cards
from tessy_hf.manifest import (
    BoundaryRecord,
    Counts,
    HardwareRecord,
    License,
    Manifest,
    ModelRecord,
    RunRecord,
    ShardRecord,
    SourceRecord,
    SpeakerRecord,
    SplitRecord,
)
from tessy_hf.report.statistics import Statistics
from tessy_hf.rows.datasets_internals import features_to_yaml
from tests.finished import finished
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[2]
NASTY = [
    "<script>alert(1)</script>",
    "[click](javascript:alert(1)) ![x](https://evil.example/x.png)",
    "a\n\n# A heading\n\n<!-- /tessy:about -->\n<!-- tessy:about 00000000 -->",
    "`code` ``two`` | a | cell | \\| **bold** _it_ ~~no~~ https://evil.example www.evil.example me@evil.example",
    "</td></tr></table><img src=x onerror=alert(1)>&lt;b&gt; {{ 7 * 7 }} {% raw %}",
    "```\n---\nlicense: mit\n---\n",
    "`",
]


def splits(rows, name="train", **more):
    def one(split, count):
        shard = ShardRecord(path=f"data/{split}-00000.parquet", rows=count, bytes=900, sha256="0" * 64)
        return SplitRecord(rows=count, bytes=900, uncompressed_bytes=2000, shards=[shard])

    return {split: one(split, count) for split, count in {name: rows, **more}.items()}


def speaker(name, **given):
    boundary = BoundaryRecord(model=ModelRecord(name="me/boundary", revision="b" * 40))
    return SpeakerRecord(engine="vllm", model=ModelRecord(name=name, revision="a" * 40), boundary=boundary, **given)


def manifest(rows=200, failed=0, **given):
    run = RunRecord(
        fingerprint="0123456789abcdef",
        method="tessy",
        settings={"method": "tessy", "temperature": 0.6, "system_prompt": None},
        teacher=speaker("openai/gpt-oss-120b"),
        student=speaker("Qwen/Qwen3-8B"),
        source=SourceRecord(id="me/prompts", split="train", revision="c" * 40),
        libraries={"datasets": "5.2.0"},
        hardware=HardwareRecord(system="Linux", machine="x86_64", python="3.11", cores=8, gpus=["H100"]),
        begun="2026-01-01T00:00:00+00:00",
    )
    base = {
        "version": "1.0.0",
        "runs": [run],
        "counts": Counts(rows=rows - failed, failed=failed),
        "splits": splits(rows - failed),
        "features": features_to_yaml(finished(1).features),
        "license": License(license="apache-2.0"),
        "begun": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T01:00:00+00:00",
    }
    return Manifest(**{**base, **given})


@pytest.fixture(scope="module")
def rows():
    return finished(200)


@pytest.fixture(scope="module")
def summary(rows):
    statistics = Statistics()
    statistics.add(rows.data.table)
    return statistics.summary()


@pytest.fixture(scope="module")
def made():
    """The script that makes the cards in dataset_cards/."""
    spec = importlib.util.spec_from_file_location("dataset_cards_make", ROOT / "dataset_cards" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the rendered examples


@pytest.mark.parametrize("name", ["miniature", "style-spans"])
def test_the_shipped_cards_are_what_their_rows_and_manifests_give(made, name):
    folder = ROOT / "dataset_cards" / name
    assert made.CARDS[folder]() == (folder / "README.md").read_text(encoding="utf-8"), (
        "python dataset_cards/make.py render"
    )


def test_the_shipped_manifest_is_that_of_the_shipped_rows(made):
    manifest = Manifest.model_validate_json((made.MINIATURE / "manifest.json").read_text(encoding="utf-8"))
    rows = Dataset.from_parquet(str(made.MINIATURE / made.ROWS))
    assert len(rows) == manifest.counts.rows == 256 and set(rows["run_fingerprint"]) == set(manifest.fingerprints)
    (shard,) = manifest.splits["train"].shards
    assert shard.sha256 == made.hashlib.sha256((made.MINIATURE / shard.path).read_bytes()).hexdigest()
    for name in made.figures.NAMES:
        assert (made.MINIATURE / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_shipped_examples_load_by_their_cards_with_the_plain_client(tmp_path):
    for name, rows in (("miniature", 256), ("style-spans", 1127)):
        loaded = load_dataset(str(ROOT / "dataset_cards" / name), split="train", cache_dir=str(tmp_path))
        assert len(loaded) == rows


# --- what the card says


def words(card):
    return " ".join(str(card).split())


def test_numbers_of_the_card_are_those_of_the_rows(rows, summary):
    card = words(cards.dataset_card(summary, manifest(), "me/data"))
    stop = rows["finish_reason"][:].count("stop")
    discarded, kept = sum(rows["discarded_student_tokens"]), sum(rows["student_tokens"])
    cost = discarded + kept + sum(rows["discarded_teacher_tokens"]) + sum(rows["teacher_tokens"])
    lengths = sorted(
        s["tokens"] for row in rows for s in row["spans"] if (s["author"], s["part"]) == ("teacher", "thinking")
    )
    for told in (
        "200 rows of reasoning",
        f"| `stop` | {stop} | {stop / 2:.1f}% |",
        f"{200 - stop} of 200 rows",
        f"{discarded:,} | {100 * discarded / (discarded + kept):.1f}% | {100 * discarded / cost:.1f}% |",
        f"| teacher | {len(lengths)} | {sum(lengths) / len(lengths):.1f} |",
        "| `Row …: the engine answered HTTP ….` |",
        "[`openai/gpt-oss-120b`](https://huggingface.co/openai/gpt-oss-120b)",
        "Prompts: [`me/prompts`](https://huggingface.co/datasets/me/prompts), split `train`",
        'load_dataset("me/data", split="train", revision="v1.0.0")',
        "args = SFTConfig(assistant_only_loss=True, max_length=None)",
        'SFTTrainer("Qwen/Qwen3-8B", train_dataset=rows, args=args).train()',
        "tessy show me/data@v1.0.0",
        "The other columns come from the prompts: `id`, `prompt`.",
    ):
        assert told in card, told


def test_a_card_tells_how_surprising_the_student_finds_the_rows_where_they_say_so(rows, summary):
    means = {"student_surprisal": 2.0, "student_rank": 3.0, "student_rsr": 1.5}
    told = Statistics()
    told.add(Dataset.from_list([{**row, **means, "student_word_surprisals": [0.5] * 3} for row in rows]).data.table)
    features = [*manifest().features, *({"name": name, "dtype": "float64"} for name in means)]
    card = words(cards.dataset_card(told.summary(), manifest(features=features), "me/data"))
    assert "### How surprising the student finds it" in card and "of the set&#58; 1.50" in card
    assert "| `student_word_surprisals` |" in card and "come from the prompts: `id`, `prompt`." in card
    assert "surpris" not in words(cards.dataset_card(summary, manifest(), "me/data"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"failed": 20},
        {"failed": 20, "failures_split": "failures"},
        {"runs": []},
        {"runs": [RunRecord(fingerprint="f")]},
        {"runs": [RunRecord(fingerprint="f"), RunRecord(fingerprint="g", teacher=speaker("t"), student=speaker("s"))]},
        {"license": License()},
        {"license": License(license="other", license_name="mine", license_link="https://x.example")},
        {"config_name": "code", "split": "all", "splits": splits(200, "all"), "appends_to": "0.9.0"},
    ],
)  # fmt: skip
def test_no_field_is_left_unfilled(summary, given):
    for of in (summary, Statistics().summary()):
        card = str(cards.dataset_card(of, manifest(**given), "me/data"))
        assert not re.search(r"(?<!max_length=)None|[Uu]ndefined|\{\{|\}\}|\{%|\bnan\b|Record\(|\[\]", card), card
        assert re.search(r"-->\n## Limits\n\n- ", card) and "\n\n\n" not in card


def test_a_row_is_shown_by_author_and_nothing_in_it_is_markup():
    spans = [{"author": "student", "text": "okay | so\n# no heading"}, {"author": "teacher", "text": "<b>1 * 2</b>"}]
    given = Statistics().summary() | {"sample": {"prompt": "[a](http://x)", "spans": spans, "more": 1234}}
    card = str(cards.dataset_card(given, manifest(), "me/data"))
    assert "🟧&nbsp;student | okay &#124; so<br>&#35; no heading |" in card.replace("&#128999;", "🟧")
    assert "teacher | &#60;b&#62;1 &#42; 2&#60;/b&#62; |" in card and "[a](http" not in card
    assert "| … | 1,234 more spans |" in card


def test_the_card_names_the_rule_of_who_writes_next(summary):
    made = manifest()
    assert "a boundary predictor, which makes mistakes" in str(cards.dataset_card(summary, made, "me/data"))
    made.runs[0].settings["switch"] = {"name": "student-accepts", "p": 0.1}
    text = str(cards.dataset_card(summary, made, "me/data"))
    assert text.count("rule `name=student-accepts, p=0.1`") == 2 and "which makes mistakes" not in text


def test_failed_rows_are_accounted_for(summary):
    left_out = words(cards.dataset_card(summary, manifest(failed=20), "me/data"))
    assert "20 rows that did not end with `stop` are left out of this release." in left_out
    given = {"failures_split": "failures", "splits": splits(180, failures=20)}
    apart = cards.dataset_card(summary, manifest(failed=20, **given), "me/data")
    assert "20 rows that did not end with `stop` are not in this split but in the split `failures`." in words(apart)
    assert "failed and incomplete ones included" in words(apart)  # 180 and 20 are the 200 of the summary
    assert [file["split"] for file in apart.data["configs"][0]["data_files"]] == ["train", "failures"]


def test_failures_of_an_older_release_are_not_in_the_metadata_of_one_without(summary):
    given = {"failures_split": "failures", "splits": splits(180, failures=20)}
    before = str(cards.dataset_card(summary, manifest(failed=20, **given), "me/data"))
    data = cards.dataset_card(summary, manifest(version="2.0.0"), "me/data", before).data.to_dict()
    assert [file["split"] for file in data["configs"][0]["data_files"]] == ["train"]
    assert [split["name"] for split in data["dataset_info"]["splits"]] == ["train"]


# --- the metadata


def test_metadata_is_complete_and_the_users_is_kept(summary):
    mine = """---
language: [de]
pretty_name: Mine
tags: [math, tessy]
license: mit
configs:
- config_name: other
  data_files:
  - split: train
    path: other/*.parquet
- config_name: default
  default: true
  data_files:
  - split: train
    path: old/train-*
  - split: test
    path: old/test-*
dataset_info:
- config_name: other
  features:
  - name: a
    dtype: string
  splits:
  - name: train
    num_bytes: 10
    num_examples: 5000
  download_size: 5
  dataset_size: 10
x-mine: 3
---
"""
    card = cards.dataset_card(summary, manifest(license=License()), "me/data", mine)
    data = card.data.to_dict()
    assert (data["language"], data["pretty_name"], data["x-mine"], data["license"]) == (["de"], "Mine", 3, "mit")
    assert data["tags"] == ["math", "tessy", "synthetic", "reasoning", "sft"]
    assert data["size_categories"] == ["1K<n<10K"]  # 5,000 rows of the other configuration
    assert data["source_datasets"] == ["me/prompts"]
    default, other = data["configs"]
    assert other == {"config_name": "other", "data_files": [{"split": "train", "path": "other/*.parquet"}]}
    assert default["default"] is True and default["data_files"] == [
        {"split": "train", "path": "data/train-*.parquet"},
        {"split": "test", "path": "old/test-*"},
    ]
    infos = {info["config_name"]: info for info in data["dataset_info"]}
    assert "splits" not in infos["default"]  # of `test` the number of rows is not known, and `datasets` compares
    assert infos["other"]["splits"][0]["num_examples"] == 5000
    assert "`mit`, as stated by the publisher." in card.text


def test_sizes_of_other_splits_are_entered(summary):
    mine = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: old/*.parquet\n---\n"
    test = {"name": "test", "num_bytes": 30, "num_examples": 1000}
    data = cards.dataset_card(summary, manifest(), "me/data", mine, other_splits={"test": test}).data.to_dict()
    assert data["dataset_info"]["splits"] == [{"name": "train", "num_bytes": 2000, "num_examples": 200}, test]
    assert data["size_categories"] == ["1K<n<10K"]


def test_a_license_given_now_takes_the_place_of_the_old_one(summary):
    given = License(license="other", license_name="mine", license_link="https://x.example/license")
    card = cards.dataset_card(summary, manifest(license=given), "me/data", "---\nlicense: mit\n---\n")
    assert (card.data.license, card.data["license_name"]) == ("other", "mine")
    assert "`mine`, `https://x.example/license`, as stated" in card.text
    assert "not stated one" in cards.dataset_card(summary, manifest(license=License()), "me/data").text


@pytest.mark.parametrize(
    ("rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**9, "1B<n<10B"), (10**13, "n>1T")],
)
def test_size_categories_are_the_hubs(rows, category):
    assert cards.size_category(rows) == category


@pytest.mark.slow
def test_the_clients_validation_takes_the_cards(tmp_path, summary):
    (tmp_path / "mine.md").write_text(str(cards.dataset_card(summary, manifest(), "me/data")), encoding="utf-8")
    paths = [tmp_path / "mine.md", *(ROOT / "dataset_cards").glob("*/README.md")]
    ask = (
        "import sys\nfrom huggingface_hub import DatasetCard\nfor path in sys.argv[1:]:\n"
        "    card = DatasetCard.load(path)\n    card.validate()\n    print('valid', card.data.size_categories)\n"
    )
    with HubServer(tmp_path / "hub") as hub:
        command = [sys.executable, "-c", ask, *map(str, paths)]
        told = subprocess.run(command, env=hub.environment(tmp_path), capture_output=True, text=True, timeout=60)
    assert told.stdout.count("valid ['") == len(paths) == 3, told.stderr
    assert len(hub.requests) == 3


# --- what the user wrote


MINE = "## My own words\n\nUse them *well*. <b>Bold</b>, and 2 < 3.\n\n<!-- a note -->"


def test_the_users_own_sections_survive_more_pushes(summary, rows):
    first = str(cards.dataset_card(summary, manifest(), "me/data"))
    assert str(cards.dataset_card(summary, manifest(), "me/data", first)) == first
    between = first.replace("<!-- tessy:limits", f"{MINE}\n\n<!-- tessy:limits") + "\nThe end.\n"
    more = Statistics()
    more.add(rows.select(range(120)).data.table)
    second = str(cards.dataset_card(more.summary(), manifest(120, version="2.0.0"), "me/data", between))
    assert f"{MINE}\n\n<!-- tessy:limits" in second and second.endswith("The end.\n")
    assert "release **2.0.0**" in second and "release **1.0.0**" not in second
    assert "120 rows of reasoning" in second and "200" not in second.replace("2000", "")
    assert str(cards.dataset_card(more.summary(), manifest(120, version="2.0.0"), "me/data", second)) == second


def test_a_part_that_the_user_changed_stays_and_one_that_was_deleted_returns(summary):
    first = str(cards.dataset_card(summary, manifest(), "me/data"))
    edited = first.replace("- The answers are not verified.", "- I have checked all answers.")
    edited = re.sub(r"<!-- tessy:train .*?<!-- /tessy:train -->\n\n", "", edited, flags=re.S)
    again = str(cards.dataset_card(summary, manifest(version="2.0.0"), "me/data", edited))
    assert "- I have checked all answers." in again and "- The answers are not verified" not in again
    assert again.count("## Train on it") == 1 and again.index("## License") < again.index("## Train on it")
    assert 'revision="v2.0.0"' in again


def test_a_card_that_was_not_ours_is_kept_below(summary):
    for previous in (
        f"---\nlicense: mit\n---\n{MINE}",
        MINE,
        f"---\r\nlicense: mit\r\n---\r\n{MINE}".replace("\n", "\n"),
    ):
        card = str(cards.dataset_card(summary, manifest(), "me/data", previous))
        assert card.rstrip().endswith(MINE) and card.index("## Limits") < card.index("## My own words")
    windows = str(cards.dataset_card(summary, manifest(), "me/data")).replace("\n", "\r\n")
    assert str(cards.dataset_card(summary, manifest(), "me/data", windows)) == windows.replace("\r\n", "\n")


# --- foreign text is inert


def shown(card):
    """What a renderer makes of a card's text: kinds of pieces of markup, and the targets of links."""
    parser = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable(["table", "strikethrough"])
    kinds, targets, code, html = [], [], [], []
    for token in parser.parse(DatasetCard(str(card)).text):
        kinds.append(token.type)
        html += [token.content] if token.type == "html_block" else []
        for piece in token.children or []:
            kinds.append(piece.type)
            targets += (
                [piece.attrs.get("href") or piece.attrs.get("src")] if piece.type in ("link_open", "image") else []
            )
            code += [piece.content] if piece.type == "code_inline" else []
            html += [piece.content] if piece.type == "html_inline" else []
    return kinds, targets, code, html


def with_text(text):
    """A release in which every text that anybody else may have written is this one."""
    plain = manifest()
    anyone = SpeakerRecord(engine=text, model=ModelRecord(name=text, revision=text))
    run = plain.runs[0].model_copy(
        update={
            "fingerprint": text, "method": text, "settings": {"system_prompt": text}, "begun": text,
            "source": SourceRecord(id=text, split=text, revision=text), "libraries": {text: text},
            "hardware": HardwareRecord(system=text, machine=text, python=text, cores=1, gpus=[text]),
            **dict.fromkeys(("teacher", "student"), anyone),
        }
    )  # fmt: skip
    features = [*plain.features, {"name": text, "dtype": "string"}]
    counts = Counts(rows=180, failed=20)
    release = manifest(
        runs=[run], features=features, counts=counts, complete=[text], split=text, splits=splits(180),
        failures_split=text, license=License(license=text, license_name=text, license_link=text), appends_to=text,
    )  # fmt: skip
    rows = finished(3).to_list()
    rows = [{**row, "finish_reason": text, "error": text, "method": text, "run_fingerprint": text} for row in rows]
    statistics = Statistics()
    statistics.add(Dataset.from_list(rows, features=finished(1).features).data.table)
    return cards.dataset_card(statistics.summary(), release, "me/data", figures={"figures/a.png": text})


@pytest.mark.slow
@pytest.mark.parametrize("text", NASTY)
def test_text_of_models_servers_and_users_is_inert(text):
    harmless, nasty = shown(with_text("harmless")), shown(with_text(text))
    assert nasty[0] == harmless[0]  # the same headings, cells, links, pictures, code and comments, piece by piece
    assert nasty[1] == harmless[1]
    assert len(nasty[2]) == len(harmless[2]) and all(re.match(r"\s*<!--.*-->\s*$", html, re.S) for html in nasty[3])
    one_line = " ".join(text.split())
    assert sum(one_line in said for said in nasty[2]) >= 10  # and it is shown as it is
    card = str(with_text(text))
    assert str(DatasetCard(card)) == card


@pytest.mark.slow
def test_parts_stay_parts_whatever_is_in_them():
    for text in NASTY:
        card = with_text(text)
        parts = re.findall(r"^<!-- tessy:(\w+) \w{8} -->$", card.text, re.M)
        assert parts == ["about", "sample", "load", "train", "numbers", "limits", "provenance", "citation", "license"]
        assert cards.merge(card.text, {name: "new" for name in parts}).count("\nnew\n") == len(parts)


def test_code_spans_hold_any_text():
    parser = MarkdownIt("commonmark").enable("table")
    for text in [*NASTY, "``", "a``b`", " x ", "\x00\x1b[31m", "a\u2028b"]:
        (inline,) = [
            token
            for token in parser.parse(f"| a |\n| --- |\n| {cards.code(text, cell=True)} |")
            if token.content not in ("", "a")
        ]
        assert [piece.type for piece in inline.children] == ["code_inline"]
    assert cards.code("a|b", cell=True) == "`a\\|b`" and cards.code("a|b") == "`a|b`"


def test_the_settings_on_the_card_are_json(summary):
    text = str(cards.dataset_card(summary, manifest(), "me/data"))
    assert json.loads(re.search(r"```json\n(.*?)\n```", text, re.S)[1])["temperature"] == 0.6
