"""The tasks of `real_model`: `order`, as it ships, and two whose recipes are written here."""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.recipe import Recipe

Row = dict[str, str]

PRODUCTS = """
kettle, toaster, lamp, chair, tent, backpack, keyboard, blender, watch, umbrella, camera, headset,
mattress, ladder, bicycle, pillow, printer, heater, drill, sofa, mirror, wallet, jacket, stroller,
fan, razor, scooter, desk, carpet, cooler, tripod, helmet, clock, radio, grill, vacuum, guitar,
suitcase, thermos, doorbell, projector, juicer, hammock, rug, bench, saddle, monitor, charger
"""
GOOD = (
    "it works very well",
    "I love it",
    "it is worth every penny",
    "I would buy it again",
    "it made my days easier",
    "it looks lovely",
)
BAD = (
    "it broke at once",
    "I want my money back",
    "it is a waste of money",
    "I would never buy it again",
    "it smells awful",
    "it stopped working",
)
REVIEWS = (
    "I bought the {product} last week and {opinion}.",
    "About the {product}: {opinion}.",
    "We have had this {product} for a month, and {opinion}.",
    "The {product} came on Monday. To be honest, {opinion}.",
    "My mother gave me a {product}; {opinion}.",
    "{product} review: {opinion}.",
)
NEW_REVIEWS = (
    "Two words on my new {product}... well, {opinion}!",
    "So, the {product}. After a year, {opinion}.",
)
THINGS = """
rainbows, volcanoes, magnets, bees, clouds, tides, glaciers, whales, mirrors, candles, seeds,
bridges, rockets, spiders, deserts, comets, batteries, owls, mushrooms, maps, clocks, soap, yeast,
coral, fireflies, earthquakes, penguins, kites, echoes, shadows, diamonds, icebergs, lungs, trains,
wind, stars, forests, violins, rivers, ants, salt, paper, glass, snow, honey, caves, roots, feathers
"""
QUESTIONS = (
    "What can you say about {thing}?",
    "Why do people study {thing}?",
    "Tell me something about {thing}.",
    "What is special about {thing}?",
    "What should a child know about {thing}?",
)
NEW_QUESTIONS = ("I wonder about {thing}. Any fact?", "Quick one: {thing}, what about them?")
CURIOUS = """\
You answer curious people. Every answer has exactly this form: the words "Good question!", then one
short sentence that answers, then the words "Stay curious!". Nothing else.

Question: What are birds?
Answer: Good question! Birds are animals with feathers that lay eggs and can fly. Stay curious!

Question: Why is grass green?
Answer: Good question! Grass is green because its leaves hold chlorophyll. Stay curious!

Question: Tell me something about salt lakes.
Answer: Good question! Salt lakes form where water flows in and only leaves as vapour. Stay curious!

Question: {{ query }}
Answer:"""
REVIEW = """\
You read reviews of products. Write one line: product: the product; sentiment: positive or negative
"""


@dataclass(frozen=True)
class Task:
    """A recipe, and what tells that an answer does its work; `reworded` is a split apart."""

    recipe: Recipe
    pattern: str
    reworded: str = "wordings"

    def right(self, answer: str | None, reference: str | None) -> bool:
        """Whether an answer is right: its reference, or where there is none its form."""
        return answer is not None and reference in (None, answer)

    def works(self, text: str) -> bool:
        """Whether a text is an answer to the task, right or wrong."""
        return re.search(self.pattern, text) is not None


def open_task(name: str, out: Path) -> Task:
    """A task by its name; a recipe that doesn't ship is written into a folder of `out`."""
    if name == "order":
        return Task(load_recipe("order"), r"\bname: |quantity: ")
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    return {"review": _review, "curious": _curious}[name](folder)


def _review(folder: Path) -> Task:
    opinions = [(text, "positive") for text in GOOD] + [(text, "negative") for text in BAD]

    def row(product: str, wording: str, place: int) -> Row:
        text, sentiment = opinions[(5 * place + place // len(opinions)) % len(opinions)]
        query = wording.format(product=product, opinion=text)
        return {
            "query": query[0].upper() + query[1:],
            "reference": f"product: {product}; sentiment: {sentiment}",
        }

    rows, shots = _rows(PRODUCTS, REVIEWS, NEW_REVIEWS, row, shots=20)
    _write(
        folder / "examples.jsonl",
        [{"query": one["query"], "response": one["reference"]} for one in shots],
    )
    pattern = r"\A\s*(?P<answer>product: [^;\n]+; sentiment: (?:positive|negative))\s*\Z"
    answer = {"answer": {"pattern": pattern}, "examples": "examples.jsonl"}
    return Task(_recipe(folder, REVIEW, rows, **answer), r"product: |sentiment: ")


def _curious(folder: Path) -> Task:
    def row(thing: str, wording: str, place: int) -> Row:
        return {"query": wording.format(thing=thing)}

    rows, _ = _rows(THINGS, QUESTIONS, NEW_QUESTIONS, row, shots=0)
    pattern = r"\A\s*(?P<answer>Good question! [^\n.!?]+[.!?] Stay curious!)\s*\Z"
    return Task(
        _recipe(folder, CURIOUS, rows, answer={"pattern": pattern}), r"Good question!|Stay curious!"
    )


def _rows(
    entities: str,
    wordings: Sequence[str],
    new: Sequence[str],
    row: Callable[[str, str, int], Row],
    *,
    shots: int,
) -> tuple[list[Row], list[Row]]:
    """Rows of each split, no entity in two; and the shots, whose entities are their own."""
    names = [" ".join(one.split()) for one in entities.split(",")]
    random.Random(0).shuffle(names)
    shown, train, validation, test, reworded = (
        names[:10], names[10:28], names[28:32], names[32:42], names[42:],
    )  # fmt: skip

    def several(some: Sequence[str], texts: Sequence[str], count: int) -> Iterator[Row]:
        for place in range(count):
            yield row(
                some[place % len(some)],
                texts[(place % len(some) + place // len(some)) % len(texts)],
                place,
            )

    plan = [
        ("train", train, wordings, 96),
        ("validation", validation, wordings, 16),
        ("test", test, wordings, 40),
        ("wordings", reworded, new, 24),
    ]
    made = [
        {**one, "split": split, "group": one["query"]}
        for split, some, texts, count in plan
        for one in {line["query"]: line for line in several(some, texts, count)}.values()
    ]
    return made, [*several(shown, wordings, shots)]


def _recipe(folder: Path, prompt: str, rows: Sequence[Row], **keys: object) -> Recipe:
    queries = {"file": "queries.jsonl", "query": "query", "group": "group", "forced_split": "split"}
    if "reference" in rows[0]:
        queries["reference"] = "reference"
    said = {
        "name": folder.name,
        "description": "A task of the benchmark of a real model.",
        "teacher": "pocket",
        "queries": queries,
        "sampling": {"temperature": 0.0, "max_tokens": 64},
        "response": "{{ answer }}",
        "metrics": ["accuracy", "answered", "agreement"],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**said, **keys}), encoding="utf-8")
    (folder / "prompt.md").write_text(prompt, encoding="utf-8")
    _write(folder / "queries.jsonl", rows)
    return load_recipe(folder)


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
