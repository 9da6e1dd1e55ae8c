"""Measures a pocket model folder on the recipes' queries, which it is never trained on."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from .answers import Pocket, answer, load_pocket
from .corpus import load_corpus, recipe_queries, split_corpus
from .formats import CODES, FINAL, FORMATS, NAMES, Format
from .gold import CYCLE, CYCLED, TUTORIAL_LINES, recipe_gold, score
from .labels import LABELS, label_of
from .prompts import (
    Frame,
    Size,
    draw_prompt,
    edited,
    recipe_prompt,
    system_frame,
    user_frame,
)
from .student import Labelled, bare_labels, shuffled_labels, train_student, untrained
from .tokenizer import TURN_END

JOINERS = {
    "user, Text:": ("\n\nText:\n", ""),
    "user, Text to classify:": ("\n\nText to classify:\n", ""),
    "user, blank line": ("\n\n", ""),
    "user, tag": ("\n\n<text>", "</text>"),
    "user, unseen joiner": ("\n\nHere is the text:\n", ""),
}
_FORMAT = {format.name: format for format in FORMATS}
# Wordings that occur in no training prompt.
UNSEEN_SECTIONS: tuple[tuple[str, str], ...] = (
    ("code", f"How to answer:\n- Just the label, please.\n- It is one of {CODES}."),
    ("code", f"How to answer:\n- Your answer is only xx.\n- xx is one of {CODES}."),
    ("name", "How to answer:\n- Say the name of the language in English, for example Greek."),
    ("name", f"How to answer:\n- Write the English language name.\n- It is one of {NAMES}."),
    (
        "json language",
        'How to answer:\n- Write a JSON object: {"language": "xx"}\n'
        f"- xx is one of {CODES}. Write nothing else.",
    ),
    ("json lang", f'How to answer:\n- Produce JSON such as {{"lang": "de"}}\n- Only {CODES}.'),
    ("language", f"How to answer:\n- End with this line: Language: xx\n- xx is one of {CODES}."),
    ("final", f"How to answer:\n- Put it like this: Final Answer: xx\n- xx is one of {CODES}."),
)
NO_PROMPTS = {
    "no prompt": "",
    "helpful assistant": "You are a helpful assistant.",
    "unseen generic": "You are a cheerful tour guide. Tell visitors about the sights near them.",
}


def evaluate(
    folder: Path, *, student: bool, report: Callable[[str], None] = print
) -> dict[str, object]:
    """Measure everything that the model card states, and report it line by line."""
    pocket = load_pocket(folder)
    sections: dict[str, Callable[[Pocket], dict[str, object]]] = {
        "sizes": _sizes,
        "long prompt": _long_prompt,
        "tutorial prompt": _tutorial_prompt,
        "placements": _placements,
        "formats": _formats,
        "unseen wordings": _unseen_wordings,
        "drawn prompts": _drawn_prompts,
        "without prompt": _without_prompt,
        "own held-out sentences": _own_held_out,
    }
    if student:
        sections["student"] = _student
    results: dict[str, object] = {}
    for name, measure in sections.items():
        start = time.process_time()
        results[name] = section = measure(pocket)
        report(f"{name}  ({time.process_time() - start:.0f} CPU s)")
        for key, numbers in section.items():
            report(f"  {key}: {numbers}")
    return results


def _sizes(pocket: Pocket) -> dict[str, object]:
    """Count parameters, and the tokens of prompts and of bare queries as chat turns."""
    frame = system_frame("")
    turns = [
        len(pocket.encode(frame.prefix + frame.around(query)))
        for query in recipe_queries()[:CYCLED]
    ]
    average = sum(turns) / len(turns)
    sizes: dict[str, object] = {
        "parameters": sum(parameter.numel() for parameter in pocket.model.parameters()),
        "tokens of an average bare query": round(average, 1),
    }
    for recipe in ("language_id", "language_id_tutorial"):
        tokens = len(pocket.encode(recipe_prompt(recipe)))
        sizes[f"tokens of the prompt {recipe}"] = tokens
        sizes[f"prompt {recipe} / bare query"] = round(tokens / average, 2)
    return sizes


def _long_prompt(pocket: Pocket) -> dict[str, object]:
    queries, gold = recipe_queries(), recipe_gold()
    replies = answer(pocket, system_frame(recipe_prompt("language_id")), queries)
    result: dict[str, object] = {
        "lines 1-2000": score(replies[:CYCLED], gold[:CYCLED], FINAL).numbers(),
        "edge lines 2001-2100": score(replies[CYCLED:], gold[CYCLED:], FINAL).numbers(),
    }
    for slot, language in enumerate(CYCLE):
        places = range(slot, CYCLED, len(CYCLE))
        found = [replies[place] for place in places]
        wrong = [
            reply.removeprefix("Final Answer: ").removesuffix(TURN_END)
            for reply, place in zip(found, places, strict=True)
            if reply != FINAL.answer(gold[place]) + TURN_END
        ]
        share = 1 - len(wrong) / len(found)
        confused = {label: wrong.count(label) for label in sorted(set(wrong))}
        result[language] = {"accuracy": round(share, 3), "errors": confused}
    return result


def _tutorial_prompt(pocket: Pocket) -> dict[str, object]:
    queries, gold = recipe_queries(), recipe_gold()
    replies = answer(pocket, system_frame(recipe_prompt("language_id_tutorial")), queries)
    places = [line - 1 for line in TUTORIAL_LINES]
    right = sum(replies[place] == FINAL.answer(gold[place]) + TURN_END for place in places)
    return {
        "tutorial sentences": f"{right} of {len(places)}",
        "lines 1-2000": score(replies[:CYCLED], gold[:CYCLED], FINAL).numbers(),
    }


def _measure(
    pocket: Pocket, frame: Frame, format: Format, *, every: int, first: int = 0
) -> dict[str, float]:
    """Score every n-th recipe query; n should not share a factor with the cycle of 15."""
    queries, gold = recipe_queries()[first:CYCLED:every], recipe_gold()[first:CYCLED:every]
    return score(answer(pocket, frame, queries, max_tokens=16), gold, format).numbers()


def _placements(pocket: Pocket) -> dict[str, object]:
    result: dict[str, object] = {}
    for recipe in ("language_id", "language_id_tutorial"):
        for name, joiner in JOINERS.items():
            frame = user_frame(recipe_prompt(recipe), *joiner)
            result[f"{recipe}, {name}"] = _measure(pocket, frame, FINAL, every=7)
    return result


def _formats(pocket: Pocket) -> dict[str, object]:
    """Edit only the first line of the section, the smallest change a user can make."""
    result: dict[str, object] = {}
    for format in FORMATS:
        names = format.english
        first = (
            "Write only the English name of the language, for example German."
            if names
            else f"Write exactly one line: {format.pattern}"
        )
        second = (
            f"Use one of {NAMES}. Write nothing else."
            if names
            else f"xx is one of {CODES}. Write nothing else."
        )
        section = f"How to answer:\n- {first}\n- {second}"
        for recipe in ("language_id", "language_id_tutorial"):
            frame = system_frame(edited(recipe_prompt(recipe), section))
            result[f"{recipe}, {format.name}"] = _measure(pocket, frame, format, every=13)
    return result


def _unseen_wordings(pocket: Pocket) -> dict[str, object]:
    result: dict[str, object] = {}
    for number, (name, section) in enumerate(UNSEEN_SECTIONS):
        for recipe in ("language_id", "language_id_tutorial"):
            frame = system_frame(edited(recipe_prompt(recipe), section))
            numbers = _measure(pocket, frame, _FORMAT[name], every=17)
            result[f"{number + 1} {name}, {recipe}"] = numbers
    return result


def _drawn_prompts(pocket: Pocket) -> dict[str, object]:
    """Score freshly drawn members of the prompt family, by length."""
    result: dict[str, object] = {}
    for size in Size:
        rng = random.Random(2024)
        scores = []
        for number in range(24):
            prompt = draw_prompt(rng, size=size)
            frame = system_frame(prompt.text)
            scores.append(_measure(pocket, frame, prompt.format, every=97, first=number))
        kind = size.name.lower()
        accuracies = sorted(numbers["accuracy"] for numbers in scores)
        mean = sum(accuracies) / len(accuracies)
        result[f"{kind}, mean accuracy of {len(scores)}"] = round(mean, 4)
        result[f"{kind}, lowest five"] = accuracies[:5]
    return result


def _without_prompt(pocket: Pocket) -> dict[str, object]:
    """Count answers in any label format where nobody asked for one; none is right."""
    labels = {format.answer(label) for format in FORMATS for label in LABELS}
    queries = recipe_queries()[::3]
    result: dict[str, object] = {}
    for name, prompt in NO_PROMPTS.items():
        replies = answer(pocket, system_frame(prompt), queries, max_tokens=16)
        asked = [reply.removesuffix(TURN_END).strip() in labels for reply in replies]
        result[f"{name}, label answers"] = round(sum(asked) / len(asked), 4)
        result[f"{name}, examples"] = replies[:3]
    return result


def _own_held_out(pocket: Pocket) -> dict[str, object]:
    _, dev = split_corpus(load_corpus())
    frame = system_frame(recipe_prompt("language_id"))
    result: dict[str, object] = {}
    for language, texts in dev.items():
        label = label_of(language)
        replies = answer(pocket, frame, texts)
        result[language] = score(replies, [label] * len(texts), FINAL).numbers()
    return result


def _student(pocket: Pocket) -> dict[str, object]:
    """Distil into bare labels, and test on groups of translations that training never saw."""
    queries, gold = recipe_queries()[:CYCLED], recipe_gold()[:CYCLED]
    replies = answer(pocket, system_frame(recipe_prompt("language_id")), queries)
    said = [reply.removeprefix("Final Answer: ").removesuffix(TURN_END) for reply in replies]
    tested = [place for place in range(CYCLED) if (place // len(CYCLE)) % 10 >= 7]
    chosen = set(tested)
    rows = [
        Labelled(queries[place], said[place])
        for place in range(CYCLED)
        if place not in chosen and said[place] in LABELS
    ]
    asked, truth = [queries[place] for place in tested], [gold[place] for place in tested]

    def accuracy(answers: list[str]) -> float:
        right = sum(found == label for found, label in zip(answers, truth, strict=True))
        return round(right / len(truth), 4)

    def tested_student(base: Pocket, taught: list[Labelled], steps: int) -> float:
        return accuracy(bare_labels(train_student(base, taught, steps=steps, seed=0), asked))

    return {
        "queries taught / tested": f"{len(rows)} / {len(tested)}",
        "teacher": accuracy([said[place] for place in tested]),
        "base, no prompt": accuracy(bare_labels(pocket, asked)),
        "student, 45 steps": tested_student(pocket, rows, 45),
        "student, 90 steps": tested_student(pocket, rows, 90),
        "student, 240 queries, 30 steps": tested_student(pocket, rows[:240], 30),
        "control: shuffled labels, 45 steps": tested_student(
            pocket, shuffled_labels(rows, seed=0), 45
        ),
        "control: random weights, 45 steps": tested_student(untrained(pocket, seed=0), rows, 45),
    }
