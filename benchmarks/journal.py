"""What a journal costs: its share of time at 2,000 kept spans a second, and its bytes per kept character.

Rows in flight keep a span each in turn; a row finishes after 400 spans (8,000 tokens in chunks of 20) and another
begins; the journal is flushed as the transform does it: at once, then not for PAUSE_FACTOR times as long as that
took, and synced to disk twice a second. The same work without a journal runs in the same process, and
all figures are ratios of one run::

    python benchmarks/journal.py [folder] [seconds]
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from tessy_hf.run.commits import LONGEST_PAUSE, PAUSE_FACTOR
from tessy_hf.run.journal import Journal
from tessy_hf.trajectory import Span

SPANS_PER_SECOND, SPANS_PER_ROW, ROWS_IN_FLIGHT, SYNC_SECONDS, TICK = 2_000, 400, 64, 0.5, 0.005
TEXT = "Wait, let me check that again: if n is even then n/2 has to be odd, so we can go on. "


class NoJournal:
    """The same calls, without effect."""

    claim = append = finish = flush = staticmethod(lambda *_, **__: None)


def finished_columns():
    """Return a finished row as the transform gives it: the text twice, and its spans."""
    text = TEXT * SPANS_PER_ROW
    spans = [{"author": "teacher", "part": "thinking", "start": at, "end": at + 85, "tokens": 20} for at in range(400)]
    chat = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": text}]
    return {"messages": chat, "thinking": text, "spans": spans, "finish_reason": "stop"}


def paced(journal, seconds):
    """Keep spans at the pace for some seconds. Returns shares of the wall time, and spans and rows per second."""
    columns = finished_columns()
    rows = {row: row * SPANS_PER_ROW // ROWS_IN_FLIGHT for row in range(ROWS_IN_FLIGHT)}  # so they end one by one
    for row in rows:
        journal.claim(f"row {row}")
    begin, cpu, synced, rests_until = time.perf_counter(), time.process_time(), time.perf_counter(), 0.0
    busy, longest, kept, begun = 0.0, 0.0, 0, ROWS_IN_FLIGHT
    while (now := time.perf_counter()) < begin + seconds:
        while kept < (now - begin) * SPANS_PER_SECOND:
            row = next(iter(rows))
            done = rows.pop(row) + 1
            author = "teacher" if done % 2 else "student"
            counts = {"discarded": {"teacher": done, "student": done}, "generated": {"teacher": done, "student": done}}
            journal.append(f"row {row}", [Span(author, "thinking", TEXT)], {"turn": author, **counts})
            kept += 1
            if done < SPANS_PER_ROW:
                rows[row] = done
            else:
                journal.finish(f"row {row}", columns)
                journal.claim(f"row {begun}")
                rows[begun], begun = 0, begun + 1
        if (flushed := time.perf_counter()) >= rests_until:
            sync = now >= synced + SYNC_SECONDS
            journal.flush(sync=sync)
            synced = now if sync else synced
            ended = time.perf_counter()
            rests_until = ended + min(PAUSE_FACTOR * (ended - flushed), LONGEST_PAUSE)
        pause = time.perf_counter() - now
        busy, longest = busy + pause, max(longest, pause)
        time.sleep(TICK)
    wall = time.perf_counter() - begin
    return {
        "cpu": (time.process_time() - cpu) / wall,
        "busy": busy / wall,
        "longest": longest,
        "spans": kept / wall,
        "rows": (begun - ROWS_IN_FLIGHT) / wall,
    }


def growth(folder, finish):
    """Write rows and finish them or not. Returns the bytes of the closed file per character of text, or of JSON."""
    path, columns, characters = folder / f"finish-{finish}.sqlite", finished_columns(), 0
    journal = Journal(path, "run")
    journal.claim("first")
    journal.close()
    empty = path.stat().st_size
    for generation in range(3):
        rows = [f"row {generation} {row}" for row in range(ROWS_IN_FLIGHT)]
        for row in rows:
            journal.claim(row)
        for number in range(SPANS_PER_ROW):
            for row in rows:
                journal.append(row, [Span("teacher", "thinking", TEXT)], {"turn": "teacher"})
            if number % 8 == 0:
                journal.flush()
        for row in rows if finish else ():
            journal.finish(row, columns)
        characters += len(rows) * (len(json.dumps(columns)) if finish else SPANS_PER_ROW * len(TEXT))
    journal.close()
    return (path.stat().st_size - empty) / characters


def main(folder, seconds):
    """Print the figures."""
    journal = Journal(folder / "paced.sqlite", "run")
    without, with_it = paced(NoJournal, seconds), paced(journal, seconds)
    journal.close()
    cpu, busy = with_it["cpu"] - without["cpu"], with_it["busy"] - without["busy"]
    print(f"pace                      {with_it['spans']:.0f} spans/s, {with_it['rows']:.1f} finished rows/s")
    print(f"CPU time / wall time      {cpu:.2%} of one core")
    print(f"thread's time / wall time {busy:.2%}, waiting for the disk included")
    print(f"longest pause             {with_it['longest'] * 1e3:.0f} ms")
    print(f"bytes per kept character  {growth(folder, False):.2f} under way (spans of {len(TEXT)} ASCII characters)")
    print(f"bytes per JSON character  {growth(folder, True):.2f} finished")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as made:
        main(Path(made), float(sys.argv[2]) if len(sys.argv) > 2 else 15.0)
