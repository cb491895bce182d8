"""The reference point: the released protocol, restated plainly.

Rounds with a barrier: every row under way asks its current author for a few tokens, as text over `/v1/completions`;
when all have answered, the last 200 tokens of every row are classified in one batch; what is not the author's own is
cut off and the other author is next. When the thinking is closed, the student is asked for the answer.
"""

import asyncio

import httpx2
import tenacity
import torch

from tessy_hf.rows import columns
from tessy_hf.text.thinking_format import render
from tessy_hf.trajectory import Trajectory

STEP = {"student": 5, "teacher": 10}
WINDOW = 200
LIMITS = httpx2.Limits(max_connections=None, keepalive_expiry=1.0)  # servers close what rests for some seconds


class LockStep:
    """Writes rows in rounds.

    Args:
        speakers: Teacher and student by name; only their templates and vocabularies are used.
        urls: Their servers.
        classifiers: Their predictors' networks and vocabularies (label 1 is style).
        budget: Most tokens of thinking, in the student's.
    """

    def __init__(self, speakers, urls, classifiers, budget):
        self._speakers, self._urls, self._classifiers, self._budget = speakers, urls, classifiers, budget

    async def write(self, prompts, in_flight):
        """Write all rows, ``in_flight`` at a time. Returns their columns."""
        torch.set_num_threads(1)  # the servers use the other cores
        waiting, active, done = list(prompts)[::-1], [], []
        async with httpx2.AsyncClient(limits=LIMITS, timeout=600) as self._client:
            while waiting or active:
                while waiting and len(active) < in_flight:
                    active.append(_Row(waiting.pop(), self._speakers))
                texts = await asyncio.gather(*map(self._ask, active))  # the barrier
                written = [(row.turn, row, text) for row, text in zip(active, texts, strict=True)]
                for author in STEP:
                    self._judge(author, [(row, text) for turn, row, text in written if turn == author])
                done += [row for row in active if row.done]
                active = [row for row in active if not row.done]
        student = self._speakers["student"]
        return [
            columns.row(
                row.trajectory(), [], student.vocabulary, student.thinking_format, method="tessy", run_fingerprint=""
            )
            for row in sorted(done, key=lambda row: row.number)
        ]

    async def _ask(self, row):
        """Return the text that a row's author writes next, and whether it ended the thinking."""
        author = "student" if row.closed else row.turn
        speaker = self._speakers[author]
        prompt = row.prompts[author] + row.text + (speaker.thinking_format.close if row.closed else "")
        end = speaker.vocabulary.special_ids if row.closed else speaker.end_ids
        body = {
            "model": author,
            "prompt": prompt,
            "max_tokens": 32 if row.closed else STEP[author],
            "temperature": 0,
            "stop_token_ids": sorted(end),
        }
        choice = await self._post(f"{self._urls[author]}/completions", body)
        return choice["text"], choice["finish_reason"] == "stop"

    @tenacity.retry(retry=tenacity.retry_if_exception_type(httpx2.TransportError), stop=tenacity.stop_after_attempt(5))
    async def _post(self, url, body):
        answer = await self._client.post(url, json=body)
        answer.raise_for_status()
        return answer.json()["choices"][0]

    def _judge(self, author, rows):
        for row, (text, _) in rows:
            if row.closed:
                row.answer, row.done = text.strip(), True
        rows = [(row, text, ended) for row, (text, ended) in rows if not row.done]
        if not rows:
            return
        cuts = self._cuts(author, [(row.text, text) for row, text, _ in rows])
        for (row, text, ended), cut in zip(rows, cuts, strict=True):
            if cut == 0 and row.fresh:  # an author that has just begun keeps something, or nobody would go on
                cut = next((at for at in range(1, len(text)) if text[at].isspace()), len(text))
            row.keep(text[:cut])
            row.closed = ended and cut == len(text)
            if cut < len(text):
                row.turn, row.fresh = ("teacher" if author == "student" else "student"), True
            if not row.closed and (row.rounds * 3 > 10 * self._budget or len(row.text) > 8 * self._budget):
                row.done = True

    def _cuts(self, author, texts):
        """Return where, in each new text, the author's own kind ends; from one batch of the last 200 tokens each."""
        network, vocabulary = self._classifiers[author]
        encoded = [vocabulary.encode(before + new) for before, new in texts]
        windows = [one.ids[-WINDOW:] for one in encoded]
        longest = max(1, max(map(len, windows)))
        ids = torch.zeros((len(windows), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for at, window in enumerate(windows):
            ids[at, : len(window)] = torch.tensor(window)
            mask[at, : len(window)] = 1
        with torch.inference_mode():
            style = network(input_ids=ids, attention_mask=mask).logits.argmax(-1).tolist()
        cuts = []
        for (before, new), one, labels in zip(texts, encoded, style, strict=True):
            offsets = one.offsets[-WINDOW:]
            other = (
                start - len(before)
                for (start, end), label in zip(offsets, labels, strict=False)
                if end > len(before) and start >= len(before) and bool(label) != (author == "student")
            )
            cut = next(other, None)  # the space before a word is the word's
            cuts.append(len(new) if cut is None else len(new[:cut].rstrip()))
        return cuts


class _Row:
    """A row under way: its text so far and whose turn it is."""

    def __init__(self, given, speakers):
        self.number, messages = given
        self.prompts = {name: render(s.vocabulary, s.thinking_format, messages) for name, s in speakers.items()}
        self.turn, self.fresh, self.closed, self.done, self.rounds = "student", True, False, False, 0
        self.text = self.answer = ""
        self._spans = Trajectory(str(self.number))

    def keep(self, text):
        self._spans.add(self.turn, "thinking", text)
        self.text, self.rounds = self.text + text, self.rounds + 1
        self.fresh = self.fresh and not text

    def trajectory(self):
        """Return the row as the transform's own rows are kept."""
        self._spans.add("student", "answer", self.answer)
        self._spans.closed = self.closed
        self._spans.finish_reason = "stop" if self.closed else "length"
        return self._spans
