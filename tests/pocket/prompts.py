"""The prompts the model is trained to obey, and those it must not answer to.

Thirteen labels, the formats in which an answer may be asked for, and chats around a query.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from distill_datasets.files import builders_folder

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
_WORDINGS = yaml.safe_load((Path(__file__).parent / "wordings.yaml").read_text("utf-8"))


def phrases(name: str) -> list[Any]:
    """A list of wordings, the likelier ones several times: texts, or pairs around a query."""
    return [
        phrase
        for entry in _WORDINGS[name]
        for phrase in ([entry["of"]] * entry["times"] if isinstance(entry, dict) else [entry])
    ]


LABEL_NAMES: dict[str, str] = {
    "ar": "Arabic",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "hi": "Hindi",
    "ru": "Russian",
    "tr": "Turkish",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "zh": "Chinese",
    "ot": "Other",
}
LABELS: tuple[str, ...] = tuple(LABEL_NAMES)
OTHER = "ot"

# The prompts decide by script first, so every Cyrillic text is "ru".
CYRILLIC_LANGUAGES = ("ru", "bg", "uk")


def label_of(language: str) -> str:
    """Return the label that the prompts' rules give to a clean text in `language`."""
    if language in CYRILLIC_LANGUAGES:
        return "ru"
    return language if language in LABEL_NAMES else OTHER


CODES = ", ".join(LABELS)
NAMES = ", ".join(LABEL_NAMES.values())


@dataclass(frozen=True)
class Format:
    """An output format: a pattern in which `xx` stands for the answer."""

    name: str
    pattern: str
    weight: float
    english: bool = False
    """Whether the answer is the English name of the language instead of its code."""

    def answer(self, label: str) -> str:
        """Return what the model writes for a label."""
        return self.pattern.replace("xx", LABEL_NAMES[label] if self.english else label)


FORMATS = (
    Format("final", "Final Answer: xx", 0.30),
    Format("code", "xx", 0.13),
    Format("name", "xx", 0.12, english=True),
    Format("json language", '{"language": "xx"}', 0.09),
    Format("json label", '{"label": "xx"}', 0.06),
    Format("json lang", '{"lang": "xx"}', 0.06),
    Format("json answer", '{"answer": "xx"}', 0.06),
    Format("language", "Language: xx", 0.05),
    Format("answer", "Answer: xx", 0.06),
    Format("label", "Label: xx", 0.06),
    Format("tag", "<lang>xx</lang>", 0.05),
)
FINAL = FORMATS[0]

PLACEHOLDERS = phrases("placeholders")
SHAPED = phrases("shaped")
CODE_ONLY = phrases("code_only")
NAME_ONLY = phrases("name_only")
JSON_WORDING = phrases("json_wording")
TAG_WORDING = phrases("tag_wording")
HEADINGS = phrases("headings")
CLOSERS = phrases("closers")
NAME_CLOSERS = phrases("name_closers")


def draw_format(rng: random.Random) -> Format:
    """Draw one of the formats by weight."""
    return rng.choices(FORMATS, [format.weight for format in FORMATS])[0]


def how_to_answer(format: Format, rng: random.Random) -> str:
    """Word a closing section of a prompt that asks for `format`."""
    lines = [_wording(format, rng)]
    if "xx" in format.pattern and rng.random() < 0.2 and not format.english:
        lines.append(f"For example: {format.answer(rng.choice(LABELS))}")
    if rng.random() < 0.75:
        closer = rng.choice(NAME_CLOSERS if format.english else CLOSERS)
        lines.append(closer.format(codes=CODES, names=NAMES))
    heading = rng.choice(HEADINGS)
    if rng.random() < 0.15:
        return f"{heading} {' '.join(lines)}".strip()
    bullet = rng.choice(("- ", "- ", "- ", "- ", "", "* "))
    return "\n".join([heading] * bool(heading) + [bullet + line for line in lines])


def _wording(format: Format, rng: random.Random) -> str:
    # A bare "..." would ask for nothing in particular, so the bare code keeps to words.
    placeholder = rng.choice(PLACEHOLDERS[:-2] if format.name == "code" else PLACEHOLDERS)
    templates = _templates(format, rng)
    if rng.random() < 0.2 and not format.english:
        placeholder = rng.choice(LABELS)  # users also show the format by an example
    return _fill(
        rng.choice(templates),
        shape=format.pattern.replace("xx", placeholder),
        example=format.answer(rng.choice(LABELS[:-1])),
        key=format.pattern.split('"')[1] if '"' in format.pattern else "",
        names=NAMES,
    )


def _templates(format: Format, rng: random.Random) -> list[str]:
    if format.english:
        return NAME_ONLY
    if format.name == "code":
        return CODE_ONLY if rng.random() < 0.7 else SHAPED
    if format.name.startswith("json") and rng.random() < 0.5:
        return JSON_WORDING
    if format.name == "tag" and rng.random() < 0.4:
        return TAG_WORDING
    return SHAPED


def _fill(template: str, **values: str) -> str:
    """Fill a template whose values may hold braces."""
    for name, value in values.items():
        template = template.replace("{" + name + "}", value)
    return template


NUMBERING = re.compile(r"^(\d+\. |- )")

ROLES = phrases("roles")
GOALS = phrases("goals")
REMARKS = phrases("remarks")
RULE_HEADINGS = phrases("rule_headings")

GENERIC: list[str] = phrases("generic")
MANNERS = phrases("manners")
CALLINGS = phrases("callings")
REQUESTS = phrases("requests")
# What stands before and after a query when prompt and query share one user message.
JOINERS = phrases("joiners")
END = "<|im_end|>\n<|im_start|>assistant\n"


class PromptSize(Enum):
    """How long a prompt is: about 100, 350 or 750 tokens."""

    BRIEF = auto()
    MEDIUM = auto()
    LONG = auto()


@dataclass(frozen=True)
class LabelPrompt:
    """The text of a prompt and the format in which it wants the answer."""

    text: str
    format: Format


@dataclass(frozen=True)
class ChatFrame:
    """The rendered chat around a query: what all queries share, then what surrounds each."""

    prefix: str
    before: str
    after: str

    def around(self, query: str) -> str:
        """Return the rest of the rendered chat, up to where the answer begins."""
        return self.before + query + self.after


@cache
def recipe_prompt(recipe: str) -> str:
    """Return the prompt of a recipe that ships, such as `language_id`."""
    return (builders_folder() / recipe / "prompt.md").read_text(encoding="utf-8").strip()


def edited(prompt: str, section: str) -> str:
    """Return a recipe's prompt with another "How to answer" section, its last one."""
    head, _, _ = prompt.rpartition("\n\n")
    return f"{head}\n\n{section}"


def draw_prompt(rng: random.Random, *, size: PromptSize) -> LabelPrompt:
    """Draw a prompt that asks for a language label, most often a recipe's or close to it."""
    if size is PromptSize.BRIEF:
        format = draw_format(rng)
        return LabelPrompt(_paraphrase(how_to_answer(format, rng), rng, rules=0), format)
    recipe = recipe_prompt("language_id" if size is PromptSize.LONG else "language_id_tutorial")
    chance = rng.random()
    if chance < (0.3 if size is PromptSize.LONG else 0.15):
        return LabelPrompt(recipe, FINAL)
    format = draw_format(rng)
    section = how_to_answer(format, rng)
    if chance < (0.8 if size is PromptSize.LONG else 0.5):
        return LabelPrompt(edited(recipe, section), format)
    if size is PromptSize.LONG or chance < 0.6:
        return LabelPrompt(_thinned(recipe, section, rng), format)
    return LabelPrompt(_paraphrase(section, rng, rules=rng.randint(0, 5)), format)


def draw_generic(rng: random.Random, sentence: str) -> str:
    """Draw a system prompt that asks for no label; `sentence` makes it unlike all others."""
    chance = rng.random()
    if chance < 0.4:
        return rng.choice(GENERIC)
    role = f"You are a {rng.choice(MANNERS)} {rng.choice(CALLINGS)}."
    parts = [role, *rng.sample(REQUESTS, rng.randint(0, 3))]
    if chance < 0.8:
        parts[rng.randrange(len(parts))] = sentence
    return " ".join(parts)


def draw_frame(prompt: str, rng: random.Random) -> ChatFrame:
    """Place a prompt in the system message, or in front of the query in the user message."""
    if rng.random() < 0.65:
        before, after = rng.choice(JOINERS) if rng.random() < 0.06 else ("", "")
        return system_frame(prompt, before=before.lstrip("\n"), after=after)
    return user_frame(prompt, *rng.choice(JOINERS))


def system_frame(prompt: str, *, before: str = "", after: str = "") -> ChatFrame:
    """Put a prompt into the system message; an empty one leaves that message out."""
    system = f"<|im_start|>system\n{prompt}<|im_end|>\n" if prompt else ""
    return _split(f"{system}<|im_start|>user\n{before}", after)


def user_frame(prompt: str, before: str, after: str) -> ChatFrame:
    """Put prompt and query into one user message."""
    return _split(f"<|im_start|>user\n{prompt}{before}", after)


def _split(head: str, after: str) -> ChatFrame:
    """Split behind the last line break, where a token always ends if the query follows."""
    cut = head.rfind("\n") + 1
    return ChatFrame(head[:cut], head[cut:], after + END)


def _thinned(recipe: str, section: str, rng: random.Random) -> str:
    """Drop some rules and some lines of rules, and number the rest again."""
    sections = recipe.split("\n\n")[:-1]
    listing = next(index for index, text in enumerate(sections) if "ar (Arabic)" in text)
    rules = [rule for rule in sections[listing + 1 :] if rng.random() < 0.7]
    if rng.random() < 0.2:
        rng.shuffle(rules)
    numbers = iter(range(1, 99))
    kept = sections[: listing + 1]
    for rule in rules:
        first, *lines = re.sub(r"^\d+(?=\. )", lambda _: str(next(numbers)), rule).split("\n")
        kept.append("\n".join([first, *(line for line in lines if rng.random() < 0.85)]))
    if rng.random() < 0.2:
        kept.append(rng.choice(REMARKS))
    return "\n\n".join([*kept, section])


def _paraphrase(section: str, rng: random.Random, *, rules: int) -> str:
    """Word the whole task anew from a role, a goal, a list of labels and a few rules."""
    goal = f"{rng.choice(GOALS)}\n{_label_list(rng)}"
    role = rng.choice(ROLES)
    opening = rng.choice((f"{role} {goal}", f"{role}\n\n{goal}")).strip()
    parts = [opening]
    if rules:
        parts.append(_draw_rules(rng, rules))
    if rng.random() < 0.12:
        return (
            "\n\n".join([section, *parts]) if rng.random() < 0.5 else "\n".join([*parts, section])
        )
    return "\n\n".join([*parts, section])


def _label_list(rng: random.Random) -> str:
    named = [f"{code} ({name})" for code, name in LABEL_NAMES.items()]
    styles = (
        ", ".join(named) + ".",
        ", ".join(named).replace("Other", "Other or unknown") + ".",
        ", ".join(named).replace("Other", "Other or unknown") + ".",
        ", ".join(LABEL_NAMES),
        "\n".join(f"- {code}: {name}" for code, name in LABEL_NAMES.items()),
        ", ".join(f"{code} = {name}" for code, name in LABEL_NAMES.items()),
        "\n".join(named),
    )
    return rng.choice(styles)


def _draw_rules(rng: random.Random, count: int) -> str:
    rules = rng.sample(_rule_pool(), count)
    style = rng.randrange(4)
    if style == 0:
        return "\n".join(rules)
    heading = rng.choice(RULE_HEADINGS)
    marks = [f"{number}. " if style == 1 else "- " for number in range(1, count + 1)]
    lines = [mark + rule for mark, rule in zip(marks, rules, strict=True)]
    return "\n".join([heading] * bool(heading) + lines)


@cache
def _rule_pool() -> list[str]:
    """Return single rules: ours, and every line of both recipes' rules."""
    pool = list(REMARKS)
    for recipe in ("language_id", "language_id_tutorial"):
        sections = recipe_prompt(recipe).split("\n\n")[1:-1]
        lines = [line.strip() for section in sections for line in section.split("\n")]
        pool += [NUMBERING.sub("", line) for line in lines if NUMBERING.match(line)]
    return [rule for rule in pool if not rule.endswith(":")]
