"""A teacher for tests of `synthesize`, which reads what it is asked and does it."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_datasets.models.sampler import Reply, Sample, Sampling, Usage, digest
from distill_datasets.schema import Message

TOPICS = ["flowers", "weather", "cars", "clothes", "food"]
RULES = [
    "Name one colour.",
    "Say 'none' for a thing without a colour.",
    "Answer in English whatever the language.",
    "Refuse to name the colour of a person.",
]
MARKS = {2: "transparent", 3: "auf Deutsch", 4: "a person's skin"}


@dataclass
class Author:
    """Knows `topics` and `rules`; writes queries that are new unless it repeats itself.

    The rules of `hard` come up only when a request names them. `says` replaces the reply to
    requests that hold its key.
    """

    rules: Sequence[str] = tuple(RULES)
    hard: tuple[int, ...] = (4,)
    repeats: bool = False
    says: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    @property
    def model(self) -> str:
        return "author"

    @property
    def identity(self) -> str:
        return "author/1"

    @property
    def kinds(self) -> Counter[str]:
        return Counter(kind_of(text) for text in self.asked)

    async def sample(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        text = messages[-1]["content"]
        self.asked.append(text)
        said = next((reply for key, reply in self.says.items() if key in text), None)
        said = self.answer(text) if said is None else said
        return Reply((Sample(said, "stop", len(said.split())),), Usage(len(text.split()), 0))

    def answer(self, text: str) -> str:
        """What it says to a request."""
        kind = kind_of(text)
        if kind == "topics":
            return json.dumps(TOPICS)
        if kind == "rules":
            if not self.rules:
                return "[]"
            return "Here they are:\n" + "\n".join(
                f"{number}. {rule}" for number, rule in enumerate(self.rules, 1)
            )
        if kind == "coverage":
            return self._judge(text)
        return f"```json\n{json.dumps(self._write(text), ensure_ascii=False)}\n```"

    def _write(self, text: str) -> list[Any]:
        count = int(re.search(r"Write (\d+) (?:inputs|conversations)", text)[1])
        aimed = [number for number, rule in enumerate(self.rules, 1) if json.dumps(rule) in text]
        topic = re.search(r"- topic: (.*)", text)
        about = topic[1] if topic else "things"
        written = []
        for place in range(count):
            word = digest([text, place] if not self.repeats else place)
            spoken = " ".join(re.findall("......", word))[:40]
            easy = [number for number in MARKS if number not in self.hard]
            mark = MARKS.get((aimed or [easy[place % len(easy)]])[0], "") if place % 2 else ""
            written.append(f"{spoken}: what colour among {about} {mark}".strip())
        if turns := re.search(r"- turns: (\d+)", text):
            before = int(turns[1]) - 1
            return [[f"{n} {one}" for n in range(before)] + [one] for one in written]
        return written

    def _judge(self, text: str) -> str:
        queries = json.loads(re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)[2])
        judged = {
            number: None
            if "remark" in query
            else [1] * (len(self.rules) > 0)
            + [rule for rule, mark in MARKS.items() if mark in query]
            for number, query in queries.items()
        }
        return json.dumps(judged)


def kind_of(text: str) -> str:
    """Which of the four questions a request is."""
    marks = {
        "List 40 topics": "topics",
        "List the rules": "rules",
        "These are its rules": "coverage",
    }
    return next((kind for mark, kind in marks.items() if mark in text), "queries")
