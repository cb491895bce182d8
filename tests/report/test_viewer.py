"""The viewer in a real browser: what a reader finds, sees, hears and types, and what foreign text cannot do."""

import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from selenium.webdriver.common.keys import Keys

from tessy_hf.report.page import write_report
from tests.finished import FEATURES, finished, finished_row
from tests.report.browser import Reader, chromium

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def rows():
    return finished(300)


@pytest.fixture(scope="module")
def teacher_only(rows):
    """Rows of another method for every prompt but the last ten, in another order."""
    order = random.Random(1).sample(range(290), 290)
    return (
        finished(300, seed=0, turns=2)
        .select(order)
        .map(lambda row: {"method": "teacher-only", "spans": [{**span, "author": "teacher"} for span in row["spans"]]})
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory, rows, teacher_only):
    folder = tmp_path_factory.mktemp("report")
    rows.to_parquet(folder / "tessy.parquet")
    teacher_only.to_parquet(folder / "teacher.parquet")
    assert (
        write_report(str(folder / "tessy.parquet"), folder / "r.html", against=str(folder / "teacher.parquet")) == 300
    )
    return folder / "r.html"


@pytest.fixture
def reader(driver, path):
    return Reader(driver, path)


def whole(row):
    return row["messages"][-1]["content"]


def pieces(row):
    return [whole(row)[span["start"] : span["end"]] for span in row["spans"]]


# --- search and filter


def test_all_rows_are_listed_and_the_first_is_open(reader, rows):
    reader.open()
    assert reader.found() == "300 rows" and reader.title() == "r0" and reader.selected() == ["r0"]
    assert reader.texts("#list .item .number")[:5] == ["r0", "r1", "r2", "r3", "r4"]
    assert rows[0]["prompt"] in reader.texts(".turn .said")


@pytest.mark.parametrize(
    "text", ["so far so good", "Problem 17", "GRÖßE 🙂", "你好", "HTTP 503", "**5**", "f(x) = x^2", "r29"]
)
def test_search_finds_the_rows_that_hold_the_text(reader, rows, text):
    reader.open()
    reader.search(text)

    def holds(row):
        texts = [row["prompt"], *pieces(row), row["error"] or "", row["id"], row["run_fingerprint"], row["method"]]
        return text.lower() in "\n".join(texts).lower()

    expected = [row["id"] for row in rows if holds(row)]
    assert 0 < reader.count() == len(expected) < 300
    listed = reader.texts("#list .item .number")
    assert listed == expected[: len(listed)] and (reader.selected() == expected[:1])


def test_what_was_searched_is_marked_in_the_row(reader, rows):
    reader.open()
    reader.search("WAIT.")
    row = rows[int(reader.title()[1:])]
    assert set(reader.texts("#row mark")) == {"wait."}
    shown = "".join(reader.texts(".column:first-child .text .span:not(.mark)"))
    assert shown == row["thinking"] + row["answer"]  # marked, not changed


def test_rows_are_filtered_by_finish_reason_share_and_length(reader, rows):
    reader.open()
    reasons = [row["finish_reason"] for row in rows]
    assert {text: int(re.search(r"\d+", text)[0]) for text in reader.texts("#reasons .chip")} == {
        f"{reason}{reasons.count(reason)}": reasons.count(reason) for reason in dict.fromkeys(reasons)
    }
    reader.reason("length")
    assert reader.count() == reasons.count("length")
    reader.reason("error")
    assert reader.count() == reasons.count("length") + reasons.count("error")
    reader.fill("share-min", 40)
    reader.fill("share-max", 70.5)
    reader.fill("length-max", 120)

    def passes(row):
        share, tokens = row["teacher_token_ratio"], row["teacher_tokens"] + row["student_tokens"]
        return row["finish_reason"] in ("length", "error") and share and 0.4 <= share <= 0.705 and tokens <= 120

    expected = [row["id"] for row in rows if passes(row)]
    assert 0 < len(expected) == reader.count() and reader.texts("#list .item .number")[:3] == expected[:3]
    reader.one("#clear").click()
    reader.settle()
    assert reader.found() == "300 rows" and reader.one("#share-min").get_attribute("value") == ""


def test_rows_are_sorted_and_those_without_a_share_come_last(reader, rows):
    reader.open()
    shares = {row["id"]: row["teacher_token_ratio"] for row in rows}
    for choice, sign in (("share-up", 1), ("share-down", -1)):
        reader.one(f"#sort option[value={choice}]").click()
        reader.settle()
        listed = [shares[name] for name in reader.texts("#list .item .number")]
        told = [round(1000 * share) * sign for share in listed]
        best = (min if sign > 0 else max)(share for share in shares.values() if share is not None)
        assert told == sorted(told) and listed[0] == best
        reader.one("#list").send_keys(Keys.END)
        reader.wait(lambda: reader.selected() and shares[reader.selected()[0]] is None)


# --- one row


@pytest.mark.parametrize("number", [0, 1, 5, 42, 137])
def test_a_row_shows_all_of_its_text_by_author(reader, rows, number):
    reader.open(row=number)
    row = rows[number]
    assert reader.title() == f"r{number}" and row["prompt"] in reader.texts(".turn .said")
    column = ".column:first-child"
    marks = ("<think>\n", "\n</think>\n\n")
    texts = [piece.removeprefix(marks[0]).removesuffix(marks[1]) for piece in pieces(row)]
    assert reader.texts(f"{column} .span:is(.teacher, .student)") == texts
    for author in ("teacher", "student"):
        mine = [text for text, span in zip(texts, row["spans"], strict=True) if span["author"] == author]
        assert reader.texts(f"{column} .span.{author}") == mine
    assert "".join(reader.texts(f"{column} .text .span:not(.mark)")) == row["thinking"] + row["answer"]
    assert (row["error"] is not None) == bool(reader.all(f"{column} .failed"))


def test_hovering_tells_author_and_tokens(reader, rows):
    reader.open(row=next(n for n, row in enumerate(rows) if len(row["spans"]) > 4))
    row = rows[int(reader.title()[1:])]
    assert not reader.one("#tip").is_displayed()
    before = 0
    for place, span in enumerate(row["spans"][:3]):
        element = reader.all(".column:first-child .span:is(.teacher, .student)")[place]
        reader.hover(element)
        tip = reader.one("#tip")
        assert tip.is_displayed() and element.get_attribute("aria-describedby") == "tip"
        assert tip.text.startswith(f"{span['author'].capitalize()}, {span['part']}\n{span['tokens']} token")
        total = row["teacher_tokens"] + row["student_tokens"]
        assert (
            f"span {place + 1} of {len(row['spans'])}, tokens {before + 1} to {before + span['tokens']} of {total}"
            in tip.text
        )
        box, inside = tip.rect, reader.js("return [innerWidth, innerHeight]")
        assert box["x"] >= 0 and box["x"] + box["width"] <= inside[0] and 0 <= box["y"] <= inside[1]
        before += span["tokens"]
    reader.hover(reader.one("#row h2"))
    assert not reader.one("#tip").is_displayed()


def test_one_author_can_be_brought_out(reader):
    reader.open()
    colour = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    both = [reader.js(colour, f".span.{author}") for author in ("teacher", "student")]
    assert len(set(both)) == 2 and "rgba(0, 0, 0, 0)" not in both
    reader.one(".legend .chip[value=teacher]").click()
    reader.wait(lambda: reader.js(colour, ".span.student") == "rgba(0, 0, 0, 0)")
    assert reader.js(colour, ".span.teacher") == both[0]


def test_the_ribbon_leads_to_the_span_under_the_pointer(reader, rows):
    reader.open(row=next(n for n, row in enumerate(rows) if len(row["spans"]) > 4))
    row = rows[int(reader.title()[1:])]
    reader.one(".ribbon").click()  # in the middle
    half, before = (row["teacher_tokens"] + row["student_tokens"]) / 2, 0
    for span in row["spans"]:
        if half < before + span["tokens"]:
            break
        before += span["tokens"]
    told = reader.js("return document.activeElement.facts")
    assert (told["before"], told["tokens"], told["author"]) == (before, span["tokens"], span["author"])


# --- side by side


def test_rows_of_the_same_prompt_stand_side_by_side(reader, teacher_only):
    reader.open(row=7)
    others = {row["prompt"]: row for row in teacher_only}
    other = others[reader.texts(".turn .said")[0]]
    left, right = reader.all(".column")
    assert left.rect["y"] == right.rect["y"] and right.rect["x"] > left.rect["x"] + left.rect["width"] - 1
    assert reader.texts(".column h3:first-child") == ["tessy.parquet", "teacher.parquet"]
    assert "".join(reader.texts(".column:last-child .text .span:not(.mark)")) == other["thinking"] + other["answer"]
    assert not reader.all(".column:last-child .span.student")
    reader.one("#beside").click()
    reader.wait(lambda: len(reader.all(".column")) == 1)
    reader.keys("b")
    reader.wait(lambda: len(reader.all(".column")) == 2)


def test_a_prompt_that_the_other_dataset_lacks_is_told(reader):
    reader.open(row=295)
    assert reader.texts(".column .note") == ["This dataset has no row with the same prompt."]


# --- keyboard


def test_everything_can_be_done_from_the_keyboard(reader, rows):
    reader.open()
    for keys, row in [
        ("jj", "r2"),
        ("k", "r1"),
        (Keys.ARROW_DOWN, "r2"),
        (Keys.END, "r299"),
        (Keys.HOME, "r0"),
        (Keys.PAGE_DOWN, "r8"),
    ]:
        reader.keys(*keys)
        reader.wait(lambda row=row: reader.title() == row)
        assert reader.selected() == [row]
        assert (
            reader.js("return document.getElementById('list').getAttribute('aria-activedescendant')")
            == f"item-{row[1:]}"
        )
    spans = reader.texts(".column:first-child .span:is(.teacher, .student)")
    for keys, place in [([Keys.ARROW_RIGHT], 0), ([Keys.ARROW_RIGHT], 1), ([Keys.ARROW_LEFT], 0)]:
        reader.keys(*keys)
        assert reader.js("return document.activeElement.textContent") == spans[place]
        assert reader.one("#tip").is_displayed()
    reader.keys("a")
    assert reader.one("#row").get_attribute("data-emphasis") == "teacher"
    reader.keys("/")
    assert reader.js("return document.activeElement.id") == "search"
    reader.keys(*"HTTP")  # letters are letters here
    reader.settle()
    assert reader.count() == sum(row["error"] is not None for row in rows)
    reader.keys(Keys.ESCAPE)
    reader.settle()
    assert reader.found() == "300 rows"
    reader.keys(Keys.ESCAPE)
    assert reader.js("return document.activeElement.id") == "list"
    reader.keys("o")
    assert reader.one("#overview").is_displayed() and not reader.one("#rows").is_displayed()
    reader.keys("o", "?")
    assert reader.one("#help").is_displayed()
    reader.keys(Keys.ESCAPE)
    assert not reader.one("#help").is_displayed() and reader.one("#rows").is_displayed()


def test_tab_reaches_every_control_and_tabs_move_by_arrow(reader):
    reader.open()
    reached = []
    for _ in range(24):
        reader.keys(Keys.TAB)
        reached.append(reader.js("return document.activeElement.id || document.activeElement.className"))
    wanted = {
        "tab-rows",
        "help-button",
        "theme",
        "search",
        "chip",
        "share-min",
        "length-max",
        "sort",
        "list",
        "next",
        "beside",
    }
    assert wanted <= set(reached), reached
    reader.one("#tab-rows").send_keys(Keys.ARROW_RIGHT)
    assert reader.js("return document.activeElement.id") == "tab-overview" and reader.one("#overview").is_displayed()


# --- many rows


def test_ten_thousand_rows_are_painted_at_once_and_do_not_freeze(driver, tmp_path, rows):
    table = rows.remove_columns("id").data.table
    pq.write_table(pa.concat_tables([table] * 34).slice(0, 10_000), tmp_path / "many.parquet")
    assert write_report(str(tmp_path / "many.parquet"), tmp_path / "many.html") == 10_000
    reader = Reader(driver, tmp_path / "many.html").open()
    entries = "return performance.getEntriesByType('paint').map((paint) => paint.startTime)"
    reader.wait(lambda: reader.js(entries))  # they are noted some time after the page is there
    paints = reader.js(entries)
    assert max(paints) < 2000, paints
    assert reader.found() == "10,000 rows" and len(reader.all(".item")) < 40
    reader.js(
        "window.longest = 0; new PerformanceObserver((list) => {"
        " for (const task of list.getEntries()) window.longest = Math.max(window.longest, task.duration);"
        "}).observe({entryTypes: ['longtask']})"
    )
    reader.keys(Keys.END)
    reader.wait(lambda: reader.title() == "row 9,999")
    assert len(reader.all(".item")) < 40 and reader.selected() == ["row 9,999"]
    reader.js("document.getElementById('list').scrollTop = 5000 * 76")
    reader.wait(lambda: "row 5,000" in reader.texts(".item .number"))
    reader.search("HTTP 503")
    assert reader.count() == sum("HTTP 503" in (rows[n % 300]["error"] or "") for n in range(10_000))
    assert reader.js("return window.longest") < 1000  # ms: the page never stood still


def test_rows_beyond_the_limit_are_left_out_evenly(driver, tmp_path, rows):
    rows.to_parquet(tmp_path / "r.parquet")
    assert write_report(str(tmp_path / "r.parquet"), tmp_path / "r.html", rows=7) == 7
    reader = Reader(driver, tmp_path / "r.html").open(row=128)
    assert reader.found() == "7 rows" and reader.title() == "r128"
    assert reader.texts(".item .number") == [f"r{n * 300 // 7}" for n in range(7)]
    assert "7 of 300 rows" in reader.texts("header p")[0] and reader.texts(".tiles dd")[0].startswith("300")


# --- foreign text does nothing

NASTY = (
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>"
    "</script><script>window.pwned = 3</script><!--<svg onload=window.pwned=4>"
    "{{ 7 * 7 }} ${window.pwned = 5} [a](javascript:window.pwned=6) **bold** `x` &lt;b&gt; \u202e\u2028 \\u003cscript>"
)  # fmt: skip


def test_scripts_and_markup_in_any_text_do_nothing(driver, tmp_path):
    row = finished_row(1, turns=3)
    spans, at = [], 0
    for span, text in zip(row["spans"], [NASTY] * len(row["spans"]), strict=True):
        spans.append({**span, "start": at, "end": at + len(text)})
        at += len(text)
    chat = [
        {"role": NASTY, "content": NASTY},
        {"role": "user", "content": NASTY},
        {"role": "assistant", "content": NASTY * len(spans)},
    ]
    texts = dict.fromkeys(("id", "prompt", "error", "finish_reason", "method", "run_fingerprint"), NASTY)
    from datasets import Dataset

    name = tmp_path / "<img src=x onerror=window.pwned=7>.parquet"
    Dataset.from_list([{**row, **texts, "messages": chat, "spans": spans}] * 2, features=FEATURES).to_parquet(name)
    write_report(str(name), tmp_path / "r.html", against=str(name))
    driver.get_log("browser")
    reader = Reader(driver, tmp_path / "r.html").open()
    reader.search("window.pwned")
    assert reader.count() == 2
    reader.hover(reader.all(".span.teacher")[0])
    reader.js("document.querySelector('details').open = true; document.getElementById('tab-overview').click()")
    assert reader.js("return window.pwned") is None and name.name in reader.js("return document.title")
    reader.js("document.getElementById('tab-rows').click()")
    assert reader.title() == NASTY and reader.texts(".failed") == [NASTY, NASTY]
    assert reader.texts(".turn h3")[0] == NASTY and reader.texts(".turn .said") == [NASTY, NASTY]
    assert "".join(reader.texts(".column:first-child .text .span")) == NASTY * len(spans)
    assert not reader.all("#row :is(script, img, svg, a, b, iframe)") and not reader.all("body > :is(img, svg)")
    assert reader.js("return [...document.scripts].filter((s) => s.type !== 'text/plain').length") == 1
    assert driver.get_log("browser") == []


def test_no_other_script_would_run_and_nothing_is_fetched(reader):
    reader.open()
    reader.search("a")
    assert reader.js("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    reader.driver.get_log("browser")
    reader.js(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned = 1\">');"
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 2'; document.body.append(s);"
        "fetch('http://127.0.0.1:9/x').catch(() => { window.refused = true; });"
    )
    reader.wait(lambda: reader.js("return window.refused"))
    assert reader.js("return window.pwned") is None
    refused = " ".join(entry["message"] for entry in reader.driver.get_log("browser"))
    assert "connect-src" in refused and "script-src" in refused and "img-src" in refused


# --- looks


def contrast(one, other):
    def light(colour):
        parts = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark, bright = sorted((light(one), light(other)))
    return (bright + 0.05) / (dark + 0.05)


def over(colour, ground):
    """A colour that lets the ground show through, as it is seen."""
    *parts, alpha = [*colour, 1.0][:4]
    return [alpha * part + (1 - alpha) * below for part, below in zip(parts, ground, strict=True)]


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_light_and_in_dark(reader, dark):
    reader.open(dark=dark)

    def colour(selector, name):
        told = reader.js("return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, name)
        return [float(part) for part in re.findall(r"[\d.]+", told)]

    ground = colour("body", "backgroundColor")
    assert (sum(ground) < 200) == dark
    for selector in (".span.teacher", ".span.student"):
        assert contrast(over(colour(selector, "color"), ground), over(colour(selector, "backgroundColor"), ground)) > 7
        assert contrast(over(colour(selector, "borderBottomColor"), ground), ground) > 3
    styles = [
        reader.js(f"return getComputedStyle(document.querySelector('.span.{who}')).borderBottomStyle")
        for who in ("teacher", "student")
    ]
    assert styles == ["solid", "dotted"]  # not by colour alone
    side = colour("#filters", "backgroundColor")
    for selector, below in (
        (".item .facts", side if len(side) == 3 else ground),
        ("header p", ground),
        ("legend", ground),
        (".part", ground),
    ):
        assert contrast(colour(selector, "color"), below) > 4.5, selector
    reader.one("#theme").click()
    reader.one("#theme").click()
    assert reader.one("#theme").text == "Theme: dark" and sum(colour("body", "backgroundColor")) < 200
    reader.keys("tt")  # dark → auto → light
    assert sum(colour("body", "backgroundColor")) > 600


@pytest.mark.parametrize("width", [360, 700, 1000, 1900])
def test_nothing_sticks_out_at_any_width(reader, width):
    reader.open(width=width)
    wide = (
        "const row = document.getElementById('row');"
        "return [document.documentElement.scrollWidth, row.scrollWidth - row.clientWidth]"
    )
    assert reader.js(wide)[0] <= width
    lines = "return [...document.querySelectorAll('.item')].every((item) => item.scrollWidth <= item.clientWidth)"
    assert reader.js(lines)
    if width < 820:
        assert reader.one("#list").is_displayed() and not reader.one("#row").is_displayed()
        reader.all(".item")[1].click()
        reader.wait(lambda: reader.one("#row").is_displayed())
        assert not reader.one("#list").is_displayed()
    assert reader.js(wide)[0] <= width and reader.js(wide)[1] <= 0
    if width < 820:
        reader.one("#back").click()
        assert reader.one("#list").is_displayed() and not reader.one("#row").is_displayed()
    reader.keys("o")
    assert reader.js("const o = document.getElementById('overview'); return o.scrollWidth - o.clientWidth") <= 0
    assert len(reader.all("figure svg")) == 4 and all(
        figure.rect["width"] > 250 for figure in reader.all("figure svg")
    )
    assert all(figure.get_attribute("aria-label") for figure in reader.all("figure"))


# --- code, formulas, directions, verdicts


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Rows with verdicts and scores; the first holds code that two authors wrote, and a formula, and prices."""
    texts = ["Okay:\n```python\na = 1\n", "b = 2\n```\nso $x^2$ costs $20 or $30. ", "`done`"]
    spans, at = [], len("<think>\n")
    for number, text in enumerate(texts):
        begin = 0 if number == 0 else at
        at += len(text)
        author = "student" if number % 2 == 0 else "teacher"
        spans.append({"author": author, "part": "thinking", "start": begin, "end": at, "tokens": 1})
    whole = "<think>\n" + "".join(texts) + "\n</think>\n\n"
    spans[-1]["end"] = len(whole)
    first = finished_row(0) | {"thinking": "".join(texts), "answer": "", "spans": spans, "finish_reason": "stop"}
    first["messages"] = [{"role": "user", "content": "كم عدد التفاحات؟"}, {"role": "assistant", "content": whole}]
    verdicts = [1.0, 0.5, 0.0, None]
    rows = [first | {"id": f"r{n}", "verdict": verdicts[n % 4], "teacher_score": n} for n in range(8)]
    folder = tmp_path_factory.mktemp("judged")
    Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "rows.parquet")
    write_report(str(folder / "rows.parquet"), folder / "r.html")
    return folder / "r.html"


def test_judged_rows_are_filtered_by_verdict_and_score(reader, judged):
    reader.open(judged)
    assert reader.texts("#verdicts .chip") == ["right2", "wrong4", "none2"]
    reader.all("#verdicts .chip")[0].click()
    reader.settle()
    assert reader.texts("#list .item .number") == ["r0", "r4"]
    reader.fill("score-min", 3)
    assert reader.texts("#list .item .number") == ["r4"]
    reader.open()
    assert not reader.one("#verdicts").is_displayed() and not reader.one("#scores").is_displayed()


def test_code_and_formulas_are_set_apart_and_every_text_has_its_direction(reader, judged):
    reader.open(judged)
    kinds = {kind: reader.texts(f".text code.{kind}") for kind in ("fence", "code", "math")}
    assert kinds == {"fence": ["```python\na = 1\n", "b = 2\n```"], "code": ["`done`"], "math": ["$x^2$"]}
    assert reader.js("return getComputedStyle(document.querySelector('.said')).direction") == "rtl"
    assert reader.js("return getComputedStyle(document.querySelector('.text')).direction") == "ltr"


def test_heat_colors_words_by_surprise_and_foreign_text_stays_text(driver, tmp_path):
    row = finished_row(5, turns=4)
    words = len(f"{row['thinking']} {row['answer']}".split())
    means = {"student_surprisal": 2.0, "student_rank": 3.0, "student_rsr": 1.5}
    warm = {**row, **means, "student_word_surprisals": [9.0, 0.0, *[1.5] * (words - 2)]}
    Dataset.from_list([warm]).to_parquet(tmp_path / "rows.parquet")
    write_report(str(tmp_path / "rows.parquet"), tmp_path / "r.html")
    reader = Reader(driver, tmp_path / "r.html").open(row=0)
    assert (
        reader.js("return getComputedStyle(document.querySelector('.span.teacher')).backgroundColor")
        != "rgba(0, 0, 0, 0)"
    )
    text = reader.js("return document.querySelector('#row .text').textContent")
    reader.keys("h")
    reader.wait(lambda: reader.all(".heat"))
    assert len(reader.all(".heat")) == words
    assert reader.texts(".heat")[0] == row["thinking"].split()[0]
    assert reader.one(".heat").get_attribute("title") == "9.00 nats"
    warmth = "return [...document.querySelectorAll('.heat')].map((e) => e.style.getPropertyValue('--warmth'))"
    assert reader.js(warmth)[:2] == ["100%", "0%"]
    assert reader.js("return document.querySelector('#row .text').textContent") == text
    reader.keys("h")
    reader.wait(lambda: not reader.all(".heat"))


def test_without_the_column_there_is_no_switch(reader):
    reader.open(row=0)
    assert not reader.all("#heat")
