"""Leaves out each rule of a prompt in turn, to see which of them the queries exercise."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill_datasets.conversations import readable
from distill_datasets.errors import RecipeError
from distill_datasets.files import one_writer, writable_folder, write_file
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient, ManyRequests
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.rate_limit import Limits
from distill_datasets.models.sampler import Reply, Sampler, Sampling
from distill_datasets.progress import interruptible
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.parsing import Reading
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.synthesis.interview import open_teacher
from distill_datasets.tables import aligned, html_card, html_preformatted, one_line

if TYPE_CHECKING:
    from pandas import DataFrame

_SHOWN, _LONGEST = 3, 300  # examples of a rule, and characters of each text
_TITLE = 4  # words: a line of so many that ends with a colon is a title
_HEADING = re.compile(r"[ \t]*#{1,6}[ \t]")
_ITEM = re.compile(r"[ \t>]*(?:[-*+•–]|\(?\d{1,3}[.)]|\(?[A-Za-z][.)])[ \t]+\S")
_FENCE = re.compile(r"[ \t]*(?:```|~~~)")
_ROW = re.compile(r"[ \t]*\|")
_UNDER_HEAD = re.compile(r"[ \t]*\|[-:| \t]+\|?[ \t]*$")
_SENTENCE_END = re.compile(r"[.!?;。！？][\"'”’)*_]*[ \t]*$")
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?。！？])\s*(?<=[\s。！？])(?=\S)")
_TEMPLATE = re.compile(r"\{\{\s*query\b|\{%")


class PromptRule(NamedTuple):
    """A part of a prompt's text: its words, and where it begins and ends."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class PromptCoverage:
    """What `prompt_coverage` found, as JSON values in `data`, and the file `path` of it."""

    path: Path
    data: Mapping[str, Any]

    @property
    def unexercised(self) -> list[str]:
        """The rules without which no answer of the sample changes."""
        return [one["rule"] for one in self.data["rules"] if not one["changed"]]

    def to_pandas(self) -> "DataFrame":
        """A row a rule: how many answers change without it, and which checks they fail then."""
        from pandas import DataFrame

        return DataFrame(self.data["rules"])

    def _repr_html_(self) -> str:
        return html_card(
            f"Coverage of the prompt of {self.data['recipe']}", html_preformatted(self.text())
        )

    def text(self) -> str:
        """A line a rule, and those that nothing exercises."""
        queries, noise = self.data["queries"], self.data["changed_by_chance"]
        table = [["changed", "rule left out"]]
        table += [
            [f"{one['changed']:,}", one_line(one["rule"], 90)]
            for one in self.data["rules"]
            if one["changed"]
        ]
        lines = [
            f"{self.data['teacher']} on {queries:,} queries; with the whole prompt, asked again, "
            f"{noise:,} answers change",
            *([aligned(table)] if table[1:] else []),
        ]
        if missed := self.unexercised:
            lines.append(
                f"{len(missed):,} of {len(self.data['rules']):,} rules that no query of the sample "
                "exercises:"
            )
            lines += [f"  {one_line(rule, 90)}" for rule in missed]
        return "\n".join(lines)


@interruptible
def prompt_coverage(  # noqa: PLR0913 (whom to ask for how much, how fast, and where it goes)
    recipe: Recipe | str | Path,
    *,
    out: str | Path,
    sample: int = 20,
    teacher: Sampler | str | None = None,
    limits: Limits | None = None,
    meter: Meter | None = None,
    before: Callable[[str], None] = lambda said: None,
) -> PromptCoverage:
    """Ask a `sample` of queries with each rule of the prompt left out, and compare the answers.

    Rules are those of `synthesis.rules`, where all stand word for word in the prompt, else its
    items, lines and paragraphs; see `rules_of`. The first teacher answers, at temperature 0, and
    once more with the whole prompt and another seed, which says what changes by chance. Of a
    conversation whose turns are all answered the first is. `before` is told what that takes
    before anything is asked. Replies are kept in `out/journal.sqlite`, and the result in
    `out/coverage.json`. Raises `RecipeError` for a prompt in which no rules are found.

        found = prompt_coverage("support", out="runs/support/coverage", before=print)
        found.unexercised
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    rules = rules_of(recipe)
    rows = load_queries(recipe).select_columns(["query", "reference"])
    digests = [sha256(query.encode()).digest() for query in rows["query"]]
    # By their digests, so that the same are drawn whatever the order.
    queries = list(rows.select(sorted(range(len(rows)), key=digests.__getitem__)[:sample]))
    recipe, sampler = open_teacher(recipe, teacher)
    folder = writable_folder(Path(out))
    ablation = _Ablation(recipe, rules, queries, sampler)
    with one_writer(folder, "coverage"), Journal(folder / "journal.sqlite") as journal:
        requests = ablation.requests
        said = requests.said(journal, meter.prices if meter else None)
        before(f"coverage: {len(rules)} rules on {len(queries)} queries: {said}")
        client = CachedClient(journal, limits=limits, meter=meter)
        data = ablation.compare(requests.ask(client, title="coverage"))
        path = folder / "coverage.json"
        write_file(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    return PromptCoverage(path, data)


def rules_of(recipe: Recipe) -> list[PromptRule]:
    """The parts of a recipe's prompt that can be left out, in its order.

    Those of `synthesis.rules`, where each stands in the prompt word for word. Else each item of a
    list with what belongs to it, row of a table, and paragraph; a line of a paragraph that ends a
    sentence ends a part, and so does a sentence where the prompt is a single part. Headings, heads
    of tables and what holds the query or a Jinja statement are none.
    """
    if recipe.members:
        raise RecipeError(
            f"{recipe.name!r} has several prompts: look at each of its recipes, "
            f"{sorted(one.name for one in recipe.members.values())}."
        )
    prompt, named = recipe.prompt, recipe.synthesis.rules
    if named and all(rule in prompt for rule in named):
        found = [PromptRule(rule, prompt.index(rule), 0) for rule in named]
        return [one._replace(end=one.start + len(one.text)) for one in found]
    rules = [one for one in _parts(prompt) if _can_go(one.text)]
    if len(rules) == 1:
        rules = [one for one in _sentences(prompt, rules[0]) if _can_go(one.text)]
    if len(rules) < 2:  # noqa: PLR2004
        raise RecipeError(
            f"The prompt of {recipe.name!r} has no rules that can be left out: expected at least "
            f"two items, lines, paragraphs or sentences; found {len(rules)}."
        )
    return rules


def _can_go(text: str) -> bool:
    """Whether a part of a prompt says something, and the prompt can be read without it."""
    title = text.endswith((":", "：")) and len(text.split()) <= _TITLE
    return any(map(str.isalnum, text)) and not title and not _TEMPLATE.search(text)


def _parts(prompt: str) -> Iterator[PromptRule]:
    """What lies between headings and empty lines; items, rows and finished lines apart."""
    start = end = place = 0
    fenced = False
    before = ""
    for line in prompt.splitlines(keepends=True):
        inside = fenced
        fenced ^= bool(_FENCE.match(line))
        if not inside and _begins(line, before):
            if end > start:
                yield _part(prompt, start, end)
            start = place
        place += len(line)
        out = not inside and (not line.strip() or _HEADING.match(line) or _UNDER_HEAD.match(line))
        if out:  # what stands above a line of dashes is the head of a table
            if end > start and not _UNDER_HEAD.match(line):
                yield _part(prompt, start, end)
            start = place
        end, before = place, line
    if end > start:
        yield _part(prompt, start, end)


def _begins(line: str, before: str) -> bool:
    """Whether a line begins a part of its own."""
    if _ROW.match(line):
        return not _UNDER_HEAD.match(line)
    if _ITEM.match(line) or _HEADING.match(line):
        return True
    return bool(_SENTENCE_END.search(before.rstrip("\n"))) and not line[:1].isspace()


def _part(prompt: str, start: int, end: int) -> PromptRule:
    return PromptRule(prompt[start:end].strip(), start, end)


def _sentences(prompt: str, whole: PromptRule) -> Iterator[PromptRule]:
    start = whole.start
    for gap in _BETWEEN_SENTENCES.finditer(prompt, whole.start, whole.end):
        yield _part(prompt, start, gap.end())
        start = gap.end()
    yield _part(prompt, start, whole.end)


@dataclass(frozen=True)
class _Ablation:
    """A recipe, and what is asked of it with each of its rules left out."""

    recipe: Recipe
    rules: Sequence[PromptRule]
    queries: Sequence[Mapping[str, Any]]
    sampler: Sampler

    @property
    def requests(self) -> ManyRequests:
        """Every query with the whole prompt, again with another seed, then without each rule."""
        own = self.recipe.sampling_of(self.recipe.all_teachers[0])
        plain = replace(own, temperature=0.0, top_p=1.0, top_k=-1, n=1, top_logprobs=None, seed=0)
        prompt = self.recipe.prompt
        kept = [prompt[: one.start] + prompt[one.end :] for one in self.rules]
        without = [self.recipe.replace(prompt=text.strip()) for text in kept]
        asked: list[tuple[Recipe, Sampling]] = [
            (self.recipe, plain),
            (self.recipe, replace(plain, seed=1)),
            *((one, plain) for one in without),
        ]
        return ManyRequests(
            [
                (self.sampler, one.messages(row["query"]), sampling)
                for one, sampling in asked
                for row in self.queries
            ]
        )

    def compare(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """What each rule changes."""
        count = len(self.queries)
        rows = [replies[at : at + count] for at in range(0, len(replies), count)]
        whole, again, *others = rows
        return {
            "recipe": self.recipe.name,
            "teacher": self.sampler.model,
            "queries": count,
            "changed_by_chance": sum(
                self._answer(a) != self._answer(b) for a, b in zip(whole, again, strict=True)
            ),
            "rules": [
                {"rule": rule.text, **self._changes(whole, other)}
                for rule, other in zip(self.rules, others, strict=True)
            ],
        }

    def _changes(self, whole: Sequence[Reply], other: Sequence[Reply]) -> dict[str, Any]:
        failing: Counter[str] = Counter()
        examples: list[dict[str, str]] = []
        changed = 0
        for row, first, second in zip(self.queries, whole, other, strict=True):
            if self._answer(first) == self._answer(second):
                continue
            changed += 1
            passed, passing = self._checks(row, first), self._checks(row, second)
            failing.update(
                name for name, one in passing.items() if one is False and passed[name] is True
            )
            texts = {
                "query": readable(row["query"]),
                "with": first.samples[0].text,
                "without": second.samples[0].text,
            }
            examples.append({name: one_line(text, _LONGEST) for name, text in texts.items()})
        return {"changed": changed, "checks": dict(failing), "examples": examples[:_SHOWN]}

    def _answer(self, reply: Reply) -> Reading:
        sample = reply.samples[0]
        return self.recipe.teacher_reader.read(sample.text, sample.stop_reason)

    def _checks(self, row: Mapping[str, Any], reply: Reply) -> dict[str, bool | None]:
        sample, answer = reply.samples[0], self._answer(reply).answer
        said = row["query"], row["reference"], sample.text, sample.stop_reason, answer
        return self.recipe.check(*said)
