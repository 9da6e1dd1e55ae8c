"""Measures a pocket model folder on the recipes' queries, which it is never trained on.

Reads the exported model through transformers as a user would. Can also distil the long prompt
into LoRA students, with two controls.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from .corpus import LabelledQuery, load_corpus, recipe_queries, split_corpus
from .prompts import (
    CODES,
    FINAL,
    FORMATS,
    LABELS,
    NAMES,
    TURN_END,
    ChatFrame,
    Format,
    PromptSize,
    draw_prompt,
    edited,
    label_of,
    recipe_prompt,
    system_frame,
    user_frame,
)

CYCLE = (
    *("ar", "bg", "de", "el", "en", "es", "fr", "hi"),
    *("ru", "sw", "th", "tr", "ur", "vi", "zh"),
)
CYCLED = 2000
# Lines that break the cycle, counted from 1: romanised Urdu, and one untranslated sentence.
EXCEPTIONS = {223: "ot", 718: "ot", 1573: "ot", 1858: "ot", 1933: "ot", 291: "en"}
# Gold of the hundred edge cases behind the cycle, by the rules of the prompts.
EDGE_GOLD = (
    ["ar", "ur"] * 5
    + [label for label in ("el", "ru", "zh") for _ in range(10)]
    + [label for label in ("fr", "es", "de", "tr", "vi") for _ in range(3)]
    + ["en"] * 10
    + ["hi"] * 5
    + ["ur", "ar", "ur", "ar", "ur"]
    + ["en", "en", "fr", "es", "ot", "de", "tr", "vi", "ru", "zh"]
    + ["ot"] * 12
    + ["fr", "es", "ot"]
)
TUTORIAL_LINES = (1, *range(3, 10), *range(12, 16))


def recipe_gold() -> list[str]:
    """Return the label of every recipe query, by its position and the prompts' rules."""
    cycle = [label_of(CYCLE[place % len(CYCLE)]) for place in range(CYCLED)]
    for line, label in EXCEPTIONS.items():
        cycle[line - 1] = label
    return cycle + EDGE_GOLD


def score(replies: Sequence[str], gold: Sequence[str], format: Format) -> dict[str, float]:
    """The shares of right and of well-formed answers, by gold labels written in a format."""
    allowed = {format.answer(label) + TURN_END for label in LABELS}
    right = sum(
        reply == format.answer(label) + TURN_END for reply, label in zip(replies, gold, strict=True)
    )
    formed, count = sum(reply in allowed for reply in replies), len(gold)
    shares = {"accuracy": round(right / count, 4), "well_formed": round(formed / count, 4)}
    return {**shares, "count": count}


ROWS = 64


@dataclass(frozen=True)
class PocketModel:
    """A model folder, loaded."""

    # Any: transformers declares these classes untyped, or wider than what a folder holds.
    model: Any
    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        """Return token ids, control tokens included."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def load_pocket(folder: Path) -> PocketModel:
    """Load a model folder in float32, the fastest type on most CPUs."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PocketModel(model.eval(), AutoTokenizer.from_pretrained(folder))


@torch.inference_mode()
def answer(
    pocket: PocketModel, frame: ChatFrame, queries: list[str], *, max_tokens: int = 12
) -> list[str]:
    """Return the greedy answer to each query, `<|im_end|>` included if the model wrote it.

    Queries of equal length run together, so nothing is padded.
    """
    prefix = pocket.model(torch.tensor([pocket.encode(frame.prefix)]), use_cache=True)
    rows = [pocket.encode(frame.around(query)) for query in queries]
    replies = [""] * len(rows)
    for places in _equal_lengths(rows):
        cache = _expanded(prefix.past_key_values, len(places))
        ids = torch.tensor([rows[place] for place in places])
        for place, reply in zip(places, _decode(pocket, ids, cache, max_tokens), strict=True):
            replies[place] = reply
    return replies


def _equal_lengths(rows: list[list[int]]) -> Iterator[list[int]]:
    """Yield the places of rows that have the same length, a few at a time."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for _, places in groupby(order, key=lambda place: len(rows[place])):
        alike = list(places)
        for start in range(0, len(alike), ROWS):
            yield alike[start : start + ROWS]


def _expanded(prefix: Any, rows: int) -> DynamicCache:
    cache = DynamicCache()
    for number, layer in enumerate(prefix.layers):
        keys, values = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
        cache.update(keys, values, number)
    return cache


def _decode(pocket: PocketModel, ids: Tensor, cache: DynamicCache, max_tokens: int) -> list[str]:
    end = pocket.tokenizer.convert_tokens_to_ids(TURN_END)
    chosen: list[Tensor] = []
    for _ in range(max_tokens):
        output = pocket.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        chosen.append(ids)
        if torch.cat(chosen, 1).eq(end).any(1).all():
            break
    texts: list[str] = pocket.tokenizer.batch_decode(torch.cat(chosen, 1).tolist())
    return [
        text[: text.find(TURN_END) + len(TURN_END)] if TURN_END in text else text for text in texts
    ]


RANK, ALPHA = 16, 32
STUDENT_RATE = 3e-3
STUDENT_BATCH = 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """A frozen projection plus a trainable one of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        down = torch.randn(RANK, base.in_features) / math.sqrt(base.in_features)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """Project."""
        low = functional.linear(functional.linear(x, self.down), self.up)
        result: Tensor = self.base(x) + low * (ALPHA / RANK)
        return result


def train_student(
    pocket: PocketModel, rows: list[LabelledQuery], *, steps: int, seed: int
) -> PocketModel:
    """Train a copy of the model to answer a query without prompt by the bare label."""
    torch.manual_seed(seed)
    model = copy.deepcopy(pocket.model).requires_grad_(False)
    trained = _add_low_rank(model)
    student = PocketModel(model, pocket.tokenizer)
    optimizer = torch.optim.AdamW(trained, lr=STUDENT_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    order = _shuffled_forever(rows, steps * STUDENT_BATCH, seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = STUDENT_RATE * min(1, (step + 1) / 5) * (1 - step / steps)
        _loss(student, order[step * STUDENT_BATCH : (step + 1) * STUDENT_BATCH]).backward()  # type: ignore[no-untyped-call]  # torch
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return student


def bare_labels(student: PocketModel, queries: list[str]) -> list[str]:
    """Return what a student answers without a prompt, the end of turn cut off."""
    replies = answer(student, system_frame(""), queries, max_tokens=4)
    return [reply.removesuffix(TURN_END) for reply in replies]


def shuffled_labels(rows: list[LabelledQuery], *, seed: int) -> list[LabelledQuery]:
    """Return the queries with each other's labels: what remains is format and frequency."""
    labels = [row.label for row in rows]
    random.Random(seed).shuffle(labels)
    return [LabelledQuery(row.text, label) for row, label in zip(rows, labels, strict=True)]


def untrained(pocket: PocketModel, *, seed: int) -> PocketModel:
    """Return the same architecture with random weights."""
    torch.manual_seed(seed)
    model = type(pocket.model)(pocket.model.config).float().eval()
    return PocketModel(model, pocket.tokenizer)


def _add_low_rank(model: nn.Module) -> list[nn.Parameter]:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in PROJECTIONS and isinstance(child, nn.Linear):
                setattr(module, name, LowRank(child))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _shuffled_forever(rows: list[LabelledQuery], count: int, seed: int) -> list[LabelledQuery]:
    rng = random.Random(seed)
    order: list[LabelledQuery] = []
    while len(order) < count:
        order += rng.sample(rows, len(rows))
    return order[:count]


def _loss(student: PocketModel, rows: list[LabelledQuery]) -> Tensor:
    """Return the mean loss of the answer's tokens."""
    frame = system_frame("")
    contexts = [student.encode(frame.prefix + frame.around(row.text)) for row in rows]
    replies = [student.encode(row.label + TURN_END) for row in rows]
    longest = max(len(c) + len(r) for c, r in zip(contexts, replies, strict=True))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    scored = torch.zeros(len(rows), longest, dtype=torch.bool)
    for place, (context, reply) in enumerate(zip(contexts, replies, strict=True)):
        end = len(context) + len(reply)
        ids[place, :end] = torch.tensor(context + reply)
        scored[place, len(context) : end] = True
    # Padding is on the right, where a causal model never looks from the scored positions.
    logits = student.model(ids).logits[:, :-1][scored[:, 1:]]
    return functional.cross_entropy(logits, ids[:, 1:][scored[:, 1:]])


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
    sections: dict[str, Callable[[PocketModel], dict[str, object]]] = {
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


def _sizes(pocket: PocketModel) -> dict[str, object]:
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


def _long_prompt(pocket: PocketModel) -> dict[str, object]:
    queries, gold = recipe_queries(), recipe_gold()
    replies = answer(pocket, system_frame(recipe_prompt("language_id")), queries)
    result: dict[str, object] = {
        "lines 1-2000": score(replies[:CYCLED], gold[:CYCLED], FINAL),
        "edge lines 2001-2100": score(replies[CYCLED:], gold[CYCLED:], FINAL),
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


def _tutorial_prompt(pocket: PocketModel) -> dict[str, object]:
    queries, gold = recipe_queries(), recipe_gold()
    replies = answer(pocket, system_frame(recipe_prompt("language_id_tutorial")), queries)
    places = [line - 1 for line in TUTORIAL_LINES]
    right = sum(replies[place] == FINAL.answer(gold[place]) + TURN_END for place in places)
    return {
        "tutorial sentences": f"{right} of {len(places)}",
        "lines 1-2000": score(replies[:CYCLED], gold[:CYCLED], FINAL),
    }


def _measure(
    pocket: PocketModel, frame: ChatFrame, format: Format, *, every: int, first: int = 0
) -> dict[str, float]:
    """Score every n-th recipe query; n should not share a factor with the cycle of 15."""
    queries, gold = recipe_queries()[first:CYCLED:every], recipe_gold()[first:CYCLED:every]
    return score(answer(pocket, frame, queries, max_tokens=16), gold, format)


def _placements(pocket: PocketModel) -> dict[str, object]:
    result: dict[str, object] = {}
    for recipe in ("language_id", "language_id_tutorial"):
        for name, joiner in JOINERS.items():
            frame = user_frame(recipe_prompt(recipe), *joiner)
            result[f"{recipe}, {name}"] = _measure(pocket, frame, FINAL, every=7)
    return result


def _formats(pocket: PocketModel) -> dict[str, object]:
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


def _unseen_wordings(pocket: PocketModel) -> dict[str, object]:
    result: dict[str, object] = {}
    for number, (name, section) in enumerate(UNSEEN_SECTIONS):
        for recipe in ("language_id", "language_id_tutorial"):
            frame = system_frame(edited(recipe_prompt(recipe), section))
            numbers = _measure(pocket, frame, _FORMAT[name], every=17)
            result[f"{number + 1} {name}, {recipe}"] = numbers
    return result


def _drawn_prompts(pocket: PocketModel) -> dict[str, object]:
    """Score freshly drawn members of the prompt family, by length."""
    result: dict[str, object] = {}
    for size in PromptSize:
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


def _without_prompt(pocket: PocketModel) -> dict[str, object]:
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


def _own_held_out(pocket: PocketModel) -> dict[str, object]:
    _, dev = split_corpus(load_corpus())
    frame = system_frame(recipe_prompt("language_id"))
    result: dict[str, object] = {}
    for language, texts in dev.items():
        label = label_of(language)
        replies = answer(pocket, frame, texts)
        result[language] = score(replies, [label] * len(texts), FINAL)
    return result


def _student(pocket: PocketModel) -> dict[str, object]:
    """Distil into bare labels, and test on groups of translations that training never saw."""
    queries, gold = recipe_queries()[:CYCLED], recipe_gold()[:CYCLED]
    replies = answer(pocket, system_frame(recipe_prompt("language_id")), queries)
    said = [reply.removeprefix("Final Answer: ").removesuffix(TURN_END) for reply in replies]
    tested = [place for place in range(CYCLED) if (place // len(CYCLE)) % 10 >= 7]
    chosen = set(tested)
    rows = [
        LabelledQuery(queries[place], said[place])
        for place in range(CYCLED)
        if place not in chosen and said[place] in LABELS
    ]
    asked, truth = [queries[place] for place in tested], [gold[place] for place in tested]

    def accuracy(answers: list[str]) -> float:
        right = sum(found == label for found, label in zip(answers, truth, strict=True))
        return round(right / len(truth), 4)

    def tested_student(base: PocketModel, taught: list[LabelledQuery], steps: int) -> float:
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
