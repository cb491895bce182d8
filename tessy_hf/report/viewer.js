// The viewer of a report: searches the index of rows, unpacks their texts on demand, colors spans by author.
// Texts of models and prompts reach the page as text nodes only.
"use strict";
(() => {
  const ITEM = 76; // height of a list row in CSS pixels, as in the style sheet
  const KEPT = 48; // unpacked chunks kept in memory, about a megabyte each
  const AHEAD = 4; // chunks unpacked ahead while searching
  const HOTTEST = 6; // nats of a word at which the color is full
  const AUTHORS = ["teacher", "student", "mark", "unknown"];
  const $ = (id) => document.getElementById(id);
  const number = (value) => (value === null ? "–" : value.toLocaleString("en-US"));
  const percent = (share) => (share === null ? "–" : `${(share / 10).toFixed(0)}%`);

  let index; // columns of all rows for the list and the filters
  let chunks; // the first row of each chunk
  let shown = []; // rows that pass the filters, in list order
  let current = null; // the open row
  let query = "";
  let searching = 0; // number of the latest search; older ones stop
  let opening = 0; // likewise for opening a row
  let sideBySide = true;
  let emphasis = "both";
  let heat = false;

  // --- elements and packed data

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in element) element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  async function unpack(id) {
    const holder = $(id) ?? (await parsed.then(() => $(id)));
    const stream = new Blob([bytes(holder.textContent.trim())]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  }

  function bytes(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const letters = atob(text);
    const made = new Uint8Array(letters.length);
    for (let at = 0; at < letters.length; at++) made[at] = letters.charCodeAt(at);
    return made;
  }

  const parsed = new Promise((done) => {
    if (document.readyState !== "loading") done();
    else document.addEventListener("DOMContentLoaded", done, { once: true });
  });

  const unpacked = new Map(); // chunk → promise of its rows, least recently used first
  function chunk(at) {
    const rows = unpacked.get(at) ?? unpack(`rows-${at}`);
    unpacked.delete(at);
    unpacked.set(at, rows);
    if (unpacked.size > KEPT) unpacked.delete(unpacked.keys().next().value);
    return rows;
  }

  function chunkOf(row) {
    let low = 0;
    let high = chunks.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (chunks[middle] <= row) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  async function load(row) {
    const at = chunkOf(row);
    return (await chunk(at))[row - chunks[at]];
  }

  // --- which rows are shown

  function limits(name, scale) {
    const read = (id, none) => ($(id).value === "" ? none : Number($(id).value) * scale);
    return [read(`${name}-min`, -Infinity), read(`${name}-max`, Infinity)];
  }

  function filtered() {
    const [leastShare, mostShare] = limits("share", 10);
    const [fewest, most] = limits("length", 1);
    const [lowest, highest] = limits("score", 1);
    const [reasons, verdicts] = ["reasons", "verdicts"].map(pressed_);
    const anyShare = leastShare === -Infinity && mostShare === Infinity;
    const anyScore = lowest === -Infinity && highest === Infinity;
    const passed = [];
    for (let row = 0; row < index.prompt.length; row++) {
      const share = index.share[row];
      const score = index.score[row];
      if (reasons.size && !reasons.has(index.reasons[index.reason[row]])) continue;
      if (verdicts.size && !verdicts.has(verdict(row) ?? "none")) continue;
      if (!anyScore && (score === null || score < lowest || score > highest)) continue;
      if (!anyShare && (share === null || share < leastShare || share > mostShare)) continue;
      if (index.tokens[row] < fewest || index.tokens[row] > most) continue;
      passed.push(row);
    }
    return sorted(passed);
  }

  const pressed_ = (id) => new Set([...$(id).querySelectorAll("[aria-pressed=true]")].map((chip) => chip.value));

  function verdict(row) { // what a verifier said: a number below 1 ranks wrong answers
    const value = index.verdict[row];
    return value === null ? null : value >= 1 ? "right" : "wrong";
  }

  function sorted(rows) {
    const [by, way] = $("sort").value.split("-");
    if (by === "order") return rows;
    const column = { share: index.share, length: index.tokens, score: index.score }[by];
    const sign = way === "up" ? 1 : -1;
    return rows.sort((a, b) => {
      if (column[a] === null || column[b] === null) return (column[a] === null) - (column[b] === null) || a - b;
      return sign * (column[a] - column[b]) || a - b;
    });
  }

  const lowered = new WeakMap(); // rows of a chunk → their texts in lower case
  function haystacks(rows) {
    if (!lowered.has(rows)) lowered.set(rows, rows.map(haystack));
    return lowered.get(rows);
  }

  function haystack([turns, pieces, error, details]) {
    const texts = turns.map((turn) => turn[1]);
    texts.push(pieces.map((piece) => piece[3]).join(""), error ?? "", ...Object.values(details));
    return texts.join("\n").toLowerCase();
  }

  async function matching(candidates, mine) {
    const wanted = new Map(); // chunk → its candidates
    for (const row of candidates) {
      const at = chunkOf(row);
      if (!wanted.has(at)) wanted.set(at, []);
      wanted.get(at).push(row);
    }
    const hits = new Set();
    const needle = query.toLowerCase();
    let painted = performance.now();
    let done = 0;
    const order = [...wanted.keys()];
    for (const at of order) {
      order.slice(done, done + AHEAD).forEach(chunk);
      const texts = haystacks(await chunk(at));
      if (mine !== searching) return null;
      for (const row of wanted.get(at)) {
        if (texts[row - chunks[at]].includes(needle)) hits.add(row);
      }
      done += 1;
      if (performance.now() - painted > 60) {
        painted = performance.now();
        $("found").textContent = `searching … ${Math.round((100 * done) / wanted.size)}%`;
        await new Promise((next) => setTimeout(next));
        if (mine !== searching) return null;
      }
    }
    return candidates.filter((row) => hits.has(row));
  }

  async function refresh() {
    const mine = ++searching;
    $("list").setAttribute("aria-busy", "true");
    query = $("search").value.trim();
    let rows = filtered();
    if (query) rows = await matching(rows, mine);
    if (rows === null) return;
    shown = rows;
    const all = index.prompt.length;
    $("found").textContent = rows.length === all ? `${number(all)} rows` : `${number(rows.length)} of ${number(all)} rows`;
    $("clear").hidden = rows.length === all && !query;
    $("list").scrollTop = 0;
    if (!shown.includes(current)) {
      if (shown.length) await open(shown[0], { enter: false });
      else close();
    } else {
      await open(current, { enter: false });
    }
    drawList();
    if (mine === searching) $("list").setAttribute("aria-busy", "false");
  }

  // --- the list: only the rows in sight exist

  function drawList() {
    const list = $("list");
    const space = $("space");
    space.style.height = `${shown.length * ITEM}px`;
    if (!shown.length) {
      space.replaceChildren(make("p", { className: "none", textContent: "No row matches. Shorten the search or reset the filters." }));
      return;
    }
    const first = Math.max(0, Math.floor(list.scrollTop / ITEM) - 4);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ITEM) + 4);
    const items = [];
    for (let place = first; place < last; place++) items.push(item(shown[place], place));
    space.replaceChildren(...items);
    if (current === null || !$(`item-${current}`)) list.removeAttribute("aria-activedescendant");
    else list.setAttribute("aria-activedescendant", `item-${current}`);
  }

  function item(row, place) {
    const facts = make("div", { className: "facts" });
    facts.append(make("span", { className: "number", textContent: name(row) }), badges(row, true));
    facts.append(make("span", { className: "share", textContent: index.share[row] === null ? "" : percent(index.share[row]) }));
    facts.append(bar(index.share[row]));
    facts.append(make("span", { className: "tokens", textContent: `${number(index.tokens[row])} tokens` }));
    const element = make("div", { className: "item", id: `item-${row}`, role: "option" });
    element.setAttribute("aria-selected", String(row === current));
    element.setAttribute("aria-posinset", place + 1);
    element.setAttribute("aria-setsize", shown.length);
    element.style.top = `${place * ITEM}px`;
    element.append(make("div", { className: "prompt", dir: "auto", textContent: index.prompt[row] || "(no prompt)" }), facts);
    element.addEventListener("click", () => open(row));
    return element;
  }

  function name(row) {
    return index.id ? index.id[row] : `row ${number(index.number[row])}`;
  }

  function reason(row) {
    const word = index.reasons[index.reason[row]];
    return make("span", { className: `reason ${/^[a-z]+$/.test(word) ? word : ""}`, textContent: word });
  }

  function badges(row, brief = false) { // in the list they leave room for the row's name
    const both = make("span", { className: "badges" });
    if (index.score[row] !== null && !brief) both.append(make("span", { className: "reason", textContent: `score ${number(index.score[row])}` }));
    if (verdict(row)) both.append(make("span", { className: `reason ${verdict(row)}`, textContent: verdict(row) }));
    if (!brief || !verdict(row) || index.reasons[index.reason[row]] !== "stop") both.append(reason(row));
    return both;
  }

  function bar(share) {
    if (share === null) return make("span");
    const teacher = make("i");
    teacher.style.width = `${share / 10}%`;
    return make("span", { className: "bar", title: `${percent(share)} by the teacher` }, teacher);
  }

  function reveal(place) {
    const list = $("list");
    const top = place * ITEM;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ITEM > list.scrollTop + list.clientHeight) list.scrollTop = top + ITEM - list.clientHeight;
  }

  function step(by) {
    if (!shown.length) return;
    const place = shown.indexOf(current);
    const next = Math.min(Math.max(place + by, 0), shown.length - 1);
    if (shown[next] !== current) open(shown[next], { enter: false });
  }

  // --- one row

  async function open(row, { enter = true } = {}) {
    const mine = ++opening;
    const again = row === current;
    current = row;
    reveal(shown.indexOf(row));
    drawList();
    if (enter) $("rows").classList.add("reading");
    const content = await load(row);
    if (mine !== opening) return;
    hideTip();
    drawRow(row, content);
    if (!again) $("row").scrollTop = 0;
    if (query) $("row").querySelector("mark")?.scrollIntoView({ block: "center" });
    history.replaceState(null, "", `#row=${index.number[row]}`);
  }

  function close() {
    opening += 1;
    current = null;
    $("row").replaceChildren(make("p", { className: "wait", textContent: "No row matches the search and the filters." }));
    drawList();
  }

  function drawRow(row, [turns, pieces, error, details, other, warmth]) {
    const place = shown.indexOf(row);
    const head = make("div", { className: "head" });
    head.append(button("back", "← All rows", leave), make("h2", { dir: "auto", textContent: name(row) }), badges(row));
    const steps = make("div", { className: "steps" });
    steps.append(button("previous", "Previous", () => step(-1)), button("next", "Next", () => step(1)));
    steps.children[0].disabled = place <= 0;
    steps.children[1].disabled = place >= shown.length - 1;
    head.append(steps);
    const two = Boolean(index.names[1]) && sideBySide;
    const columns = make("div", { className: two ? "columns two" : "columns" });
    columns.append(column(index.names[0], pieces, error, index.share[row], index.tokens[row], null, warmth));
    if (two) {
      if (other) columns.append(column(index.names[1], ...other));
      else columns.append(missing(index.names[1]));
    }
    $("row").replaceChildren(head, ...turns.map(turn), legend(), columns, more(details));
    $("row").dataset.emphasis = emphasis;
    $("row").dataset.heat = heat ? "on" : "off";
  }

  function button(id, text, action) {
    const element = make("button", { id, type: "button", textContent: text });
    element.addEventListener("click", action);
    return element;
  }

  function turn([role, text]) {
    const said = make("div", { className: "said", dir: "auto" });
    said.append(...dressed(text, 0, notations(text)));
    return make("section", { className: "turn" }, make("h3", { textContent: role }), said);
  }

  function legend() {
    const line = make("div", { className: "legend", role: "group", "aria-label": "Author to highlight" });
    for (const [who, text] of [["both", "Both authors"], ["teacher", "Teacher"], ["student", "Student"]]) {
      const choice = make("button", { type: "button", className: "chip", value: who });
      if (who !== "both") choice.append(make("span", { className: `swatch ${who}` }));
      choice.append(text);
      choice.setAttribute("aria-pressed", String(emphasis === who));
      choice.addEventListener("click", () => emphasize(who));
      line.append(choice);
    }
    if (index.heat) {
      const warm = button("heat", "Heat", toggleHeat);
      warm.className = "chip";
      warm.title = "Color each word by how surprising the student finds it (h)";
      warm.setAttribute("aria-pressed", String(heat));
      line.append(warm);
      if (heat) line.append(make("span", { className: "heatscale", textContent: `0 – ${HOTTEST}+ nats` }));
    }
    if (index.names[1]) {
      const side = button("beside", `Beside ${index.names[1]}`, toggleBeside);
      side.className = "chip side";
      side.setAttribute("aria-pressed", String(sideBySide));
      line.append(side);
    }
    return line;
  }

  function emphasize(who) {
    emphasis = who;
    $("row").dataset.emphasis = who;
    for (const choice of document.querySelectorAll(".legend .chip[value]:not([value=''])")) {
      choice.setAttribute("aria-pressed", String(choice.value === who));
    }
  }

  function column(title, pieces, error, share, tokens, word, warmth) {
    const figures = make("div", { className: "figuresline" });
    if (word) figures.append(make("span", { className: "reason", textContent: word }));
    figures.append(figure(number(tokens), "tokens"));
    if (share !== null) figures.append(figure(percent(share), "by the teacher"));
    const turns = pieces.filter((piece) => piece[0] < 2).length;
    figures.append(figure(number(turns), turns === 1 ? "span" : "spans"));
    const box = make("section", { className: "column", "aria-label": title });
    box.append(make("h3", { textContent: title }), figures);
    if (error) box.append(make("p", { className: "failed", textContent: error }));
    const texts = [text("Thinking", 0, pieces, tokens, warmth), text("Answer", 1, pieces, tokens, warmth)].flat();
    const spans = texts.flatMap((element) => [...element.querySelectorAll(".span.teacher, .span.student")]);
    if (spans.length) box.append(...ribbon(spans, tokens));
    box.append(...texts);
    return box;
  }

  function figure(value, unit) {
    return make("span", {}, make("strong", { textContent: value }), ` ${unit}`);
  }

  function missing(title) {
    const note = make("p", { className: "note", textContent: "This dataset has no row with the same prompt." });
    return make("section", { className: "column" }, make("h3", { textContent: title }), note);
  }

  function text(title, part, pieces, tokens, warmth) {
    const box = make("div", { className: "text", dir: "auto", tabIndex: 0, role: "group", "aria-label": title });
    const own = (piece) => piece[0] !== 2 && piece[1] === part;
    const ranges = notations(pieces.filter(own).map((piece) => piece[3]).join(""));
    let before = 0;
    let turns = 0;
    let at = 0;
    const all = pieces.filter((piece) => piece[0] < 2).length;
    for (const [place, [author, where, length, written]] of pieces.entries()) {
      if (author < 2) turns += 1;
      if (where === part) {
        const warm = heat && warmth?.[place]?.length;
        const said = author === 2 ? [written.trim()] : warm ? heated(written, at, ranges, warmth[place]) : dressed(written, at, ranges); // markers have a line of their own
        const span = make("span", { className: `span ${AUTHORS[author]}` }, ...said);
        if (author !== 2) at += written.length;
        if (author < 2) {
          span.tabIndex = -1;
          span.facts = {
            author: AUTHORS[author], part: part ? "answer" : "thinking", tokens: length, before, all: tokens,
            turn: turns, turns: all, characters: [...written].length,
          };
        }
        box.append(span);
      }
      before += length;
    }
    return box.childNodes.length ? [make("h3", { className: "part", textContent: title }), box] : [];
  }

  // Where a text is code or LaTeX: [from, to, class], in order. A dollar opens a formula as in Pandoc, so prices do not.
  const NOTATION =
    /^[ \t]*```[^\n]*\n[^]*?(?:\n[ \t]*```[ \t]*$|$(?![^]))|`[^`\n]+`|(?:\$\$[^$]+\$\$|\\\[(?:(?!\\\])[^]){1,2000}\\\]|\\\((?:(?!\\\))[^]){1,500}\\\)|\$(?=\S)[^$\n]*[^$\s\\]\$(?!\d))/gm;
  function notations(text) {
    return [...text.matchAll(NOTATION)].map((found) => {
      const kind = found[0].trimStart().startsWith("```") ? "fence" : found[0].startsWith("`") ? "code" : "math";
      return [found.index, found.index + found[0].length, kind];
    });
  }

  // A part of a text that begins at `from`, with its code and its formulas in elements of their own.
  function dressed(written, from, ranges) {
    const parts = [];
    let at = 0;
    const upto = (end) => {
      if (end > at) parts.push(...highlighted(written.slice(at, end)));
      at = Math.max(at, end);
    };
    for (const [begin, end, kind] of ranges) {
      if (end <= from || begin >= from + written.length) continue;
      upto(begin - from);
      const last = Math.min(end - from, written.length);
      parts.push(make("code", { className: kind }, ...highlighted(written.slice(at, last))));
      at = last;
    }
    upto(written.length);
    return parts;
  }

  // The same, each word colored by its surprise in nats; searched text is marked within words only.
  function heated(written, from, ranges, words) {
    const parts = [];
    let at = 0;
    for (const [characters, nats] of words) {
      const end = at + length16(written, at, characters);
      const said = dressed(written.slice(at, end), from + at, ranges);
      if (nats === null) parts.push(...said);
      else {
        const word = make("span", { className: "heat", title: `${nats.toFixed(2)} nats` }, ...said);
        word.style.setProperty("--warmth", `${Math.round(100 * Math.min(1, Math.max(0, nats) / HOTTEST))}%`);
        parts.push(word);
      }
      at = end;
    }
    return parts;
  }

  // How many UTF-16 units so many characters, as Python counts them, have.
  function length16(text, from, characters) {
    let at = from;
    while (characters-- > 0 && at < text.length) at += text.codePointAt(at) > 0xffff ? 2 : 1;
    return at - from;
  }

  function highlighted(written) {
    if (!query) return [written];
    const low = written.toLowerCase();
    const needle = query.toLowerCase();
    if (low.length !== written.length) return [written]; // lower case changed the length, so offsets do not fit
    const parts = [];
    let from = 0;
    for (let at = low.indexOf(needle); at >= 0; at = low.indexOf(needle, from)) {
      parts.push(written.slice(from, at), make("mark", { textContent: written.slice(at, at + needle.length) }));
      from = at + needle.length;
    }
    return [...parts, written.slice(from)];
  }

  // --- the ribbon: the row from left to right, one stripe a span

  function ribbon(spans, tokens) {
    const stops = [];
    const share = (count) => `${((100 * count) / Math.max(tokens, 1)).toFixed(3)}%`;
    for (const { facts } of spans) {
      const color = `var(--${facts.author === "teacher" ? "teacher" : "student-fill"})`;
      stops.push(`${color} ${share(facts.before)} ${share(facts.before + facts.tokens)}`);
    }
    const line = make("div", { className: "ribbon", title: "The row from beginning to end. Click to jump there." });
    line.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
    line.addEventListener("click", (event) => {
      const at = (tokens * event.offsetX) / line.clientWidth;
      const there = spans.find(({ facts }) => at < facts.before + facts.tokens) ?? spans[spans.length - 1];
      there.focus();
    });
    const scale = make("div", { className: "scale" }, make("span", { textContent: "0" }));
    scale.append(make("span", { textContent: `${number(tokens)} tokens` }));
    return [line, scale];
  }

  // --- the tooltip of a span

  function showTip(span) {
    const { author, part, tokens, before, all, turn, turns, characters } = span.facts;
    const tip = $("tip");
    const count = (value, unit) => `${number(value)} ${unit}${value === 1 ? "" : "s"}`;
    tip.replaceChildren(make("b", { textContent: `${author === "teacher" ? "Teacher" : "Student"}, ${part}` }));
    tip.append(`${count(tokens, "token")}, ${count(characters, "character")}`, make("br"));
    const place = tokens ? `tokens ${number(before + 1)} to ${number(before + tokens)} of ${number(all)}` : "no token of its own";
    tip.append(`span ${number(turn)} of ${number(turns)}, ${place}`);
    tip.hidden = false;
    document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
    span.setAttribute("aria-describedby", "tip");
    const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 7;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 60 ? above : box.bottom + 7}px`;
  }

  function hideTip() {
    $("tip").hidden = true;
  }

  function stepSpan(by) {
    const spans = [...$("row").querySelectorAll(".span.teacher, .span.student")];
    if (!spans.length) return;
    const at = spans.indexOf(document.activeElement);
    const next = at < 0 ? (by > 0 ? 0 : spans.length - 1) : at + by;
    spans[Math.min(Math.max(next, 0), spans.length - 1)].focus();
  }

  function more(details) {
    const facts = make("dl");
    for (const [key, value] of Object.entries(details)) {
      facts.append(make("dt", { textContent: key }), make("dd", { textContent: value }));
    }
    return make("details", {}, make("summary", { textContent: "Other columns" }), facts);
  }

  // --- user actions

  function toggleBeside() {
    if (!index.names[1]) return;
    sideBySide = !sideBySide;
    if (current !== null) open(current, { enter: false });
  }

  function toggleHeat() {
    if (!index.heat) return;
    heat = !heat;
    if (current !== null) open(current, { enter: false }).then(() => $("heat").focus());
  }

  function leave() {
    $("rows").classList.remove("reading");
    $("list").focus();
    drawList();
    if (current !== null) reveal(shown.indexOf(current));
  }

  function view(which) {
    for (const [id, panel] of [["tab-rows", "rows"], ["tab-overview", "overview"]]) {
      const chosen = panel === which;
      $(id).setAttribute("aria-selected", String(chosen));
      $(id).tabIndex = chosen ? 0 : -1;
      $(panel).hidden = !chosen;
    }
    hideTip();
    if (which === "rows") drawList();
  }

  function turnTheme() {
    const order = ["auto", "light", "dark"];
    const next = order[(order.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3];
    if (next === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    $("theme").textContent = `Theme: ${next}`;
  }

  function escape() {
    if (document.activeElement === $("search")) {
      if ($("search").value) {
        $("search").value = "";
        refresh();
      } else {
        $("list").focus();
      }
    } else {
      hideTip();
      leave();
    }
  }

  const inOverview = () => $("rows").hidden;
  const KEYS = {
    ArrowDown: () => step(1), j: () => step(1), ArrowUp: () => step(-1), k: () => step(-1),
    PageDown: () => step(8), PageUp: () => step(-8), Home: () => step(-Infinity), End: () => step(Infinity),
    Enter: () => open(current),
    ArrowRight: () => stepSpan(1), ArrowLeft: () => stepSpan(-1),
    a: () => emphasize({ both: "teacher", teacher: "student", student: "both" }[emphasis]),
    b: toggleBeside,
    h: toggleHeat,
  };
  const ANYWHERE = {
    "/": () => { view("rows"); $("rows").classList.remove("reading"); $("search").focus(); },
    o: () => view(inOverview() ? "rows" : "overview"),
    t: turnTheme,
    "?": () => $("help").showModal(),
  };

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const target = event.target;
    const typing = target.matches("input, select");
    if (event.key === "Escape" && !inOverview()) return escape();
    if (target.matches("[role=tab]") && /^Arrow(Left|Right)$/.test(event.key)) {
      view(inOverview() ? "rows" : "overview");
      return document.querySelector("[role=tab][aria-selected=true]").focus();
    }
    if (target === $("search") && event.key === "ArrowDown") {
      event.preventDefault();
      return $("list").focus();
    }
    if (typing) return;
    const press = /^(Enter| )$/.test(event.key) && target.matches("button, summary");
    const scrolls = /^(Arrow(Up|Down)|Page|Home|End)/.test(event.key) && target.closest("#row"); // while reading a row, these keys scroll
    const action = ANYWHERE[event.key] ?? (inOverview() || press || scrolls ? null : KEYS[event.key]);
    if (!action) return;
    event.preventDefault();
    action();
  }

  function chips(id, words, of) {
    for (const word of words) {
      const rows = index.prompt.reduce((sum, _, row) => sum + (of(row) === word), 0);
      if (!rows) continue;
      const chip = make("button", { type: "button", className: "chip", value: word, textContent: word });
      chip.append(make("b", { textContent: number(rows) }));
      chip.setAttribute("aria-pressed", "false");
      chip.addEventListener("click", () => {
        chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
        refresh();
      });
      $(id).append(chip);
    }
  }

  // Filters of judged rows are there where rows were judged.
  function judged() {
    $("verdicts").hidden = index.verdict.every((value) => value === null);
    $("scores").hidden = index.score.every((value) => value === null);
    $("sort").querySelector("[value=score-down]").hidden = $("scores").hidden;
    if (!$("verdicts").hidden) chips("verdicts", ["right", "wrong", "none"], (row) => verdict(row) ?? "none");
  }

  function reset() {
    $("filters").reset();
    for (const chip of document.querySelectorAll(".chips .chip")) chip.setAttribute("aria-pressed", "false");
    refresh();
  }

  function listen() {
    let pending = 0;
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    $("filters").addEventListener("input", (event) => {
      if (event.target === $("sort")) return;
      $("list").setAttribute("aria-busy", "true");
      clearTimeout(pending);
      pending = setTimeout(refresh, 120);
    });
    $("sort").addEventListener("change", () => {
      current = null; // show the first row in the new order
      refresh();
    });
    $("clear").addEventListener("click", reset);
    let drawing = false;
    $("list").addEventListener("scroll", () => {
      if (drawing) return;
      drawing = true;
      requestAnimationFrame(() => { drawing = false; drawList(); });
    });
    new ResizeObserver(drawList).observe($("list"));
    const spanAt = (event) => event.target.closest?.(".span.teacher, .span.student");
    for (const [kind, act] of [["mouseover", showTip], ["focusin", showTip], ["mouseout", hideTip], ["focusout", hideTip]]) {
      $("row").addEventListener(kind, (event) => { if (spanAt(event)) act(spanAt(event)); });
    }
    $("row").addEventListener("scroll", () => {
      const here = document.activeElement?.closest?.(".span");
      if (here && !$("tip").hidden) showTip(here);
      else hideTip();
    });
    $("theme").addEventListener("click", turnTheme);
    $("help-button").addEventListener("click", () => $("help").showModal());
    $("tab-rows").addEventListener("click", () => view("rows"));
    $("tab-overview").addEventListener("click", () => view("overview"));
    document.addEventListener("keydown", pressed);
  }

  async function begin() {
    index = await unpack("index");
    chunks = index.chunks;
    const wanted = /^#row=(\d+)$/.exec(location.hash);
    if (wanted) current = Math.max(0, index.number.indexOf(Number(wanted[1])));
    $("length-max").placeholder = String(index.tokens.reduce((most, tokens) => Math.max(most, tokens), 0));
    chips("reasons", index.reasons, (row) => index.reasons[index.reason[row]]);
    judged();
    listen();
    const narrow = matchMedia("(max-width: 820px)"); // there the list comes first
    const fold = () => { $("more").open = !narrow.matches; };
    narrow.addEventListener("change", fold);
    fold();
    await refresh();
    document.documentElement.dataset.ready = "yes";
  }

  begin().catch((error) => {
    $("row").replaceChildren(make("p", { className: "failed", textContent: `This page cannot show its rows: ${error}` }));
  });
})();
