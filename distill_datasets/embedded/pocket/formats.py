"""The output formats the model knows, and the many ways to ask for one."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .labels import LABEL_NAMES, LABELS

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

PLACEHOLDERS = ("xx", "xx", "xx", "xx", "xx", "LABEL", "<label>", "<code>", "[label]", "...", "??")
SHAPED = (
    "Write exactly one line: {shape}",
    "Write exactly one line: {shape}",
    "Write exactly one line: {shape}",
    "Write one line: {shape}",
    "Write exactly: {shape}",
    "Write only {shape}",
    "Answer with exactly one line: {shape}",
    "Answer with {shape}",
    "Answer: {shape}",
    "Answer in this format: {shape}",
    "Answer in the form {shape} and add nothing.",
    "Reply with exactly one line of the form {shape}",
    "Reply with {shape} and nothing else.",
    "Reply: {shape}",
    "Respond with {shape}",
    'Respond with EXACTLY one line: "{shape}"',
    "Respond in exactly this format: {shape}",
    "Return {shape}",
    "Return only {shape}, without explanation.",
    "Print only {shape}",
    "Output {shape}",
    "Use this format: {shape}",
    "The answer must look like this: {shape}",
    "Your whole answer is one line: {shape}",
    "Your reply must be exactly {shape}",
    "Give the result as {shape}",
    "Finish with one line: {shape}",
)
CODE_ONLY = (
    "Reply with the label only, nothing else.",
    "Write only the label.",
    "Write the label only.",
    "Write the label and nothing else.",
    "Write exactly one label: xx",
    "Write exactly one word: the label.",
    "Answer with the label alone.",
    "Answer with just the label, for example {example}.",
    "Answer with the two-letter label only.",
    "Answer with one of the labels and nothing more.",
    "Reply with the bare code, such as {example}.",
    "Reply with exactly one of the labels.",
    "Give only the label, with no other words.",
    "Give the two-letter code, like {example}.",
    "Output only the two-letter code.",
    "Output the code of the language, nothing else.",
    "Return just the label.",
    "Respond with a single label, without any other text.",
    "The answer is the label alone, for example {example}",
    "Print the label and stop.",
)
NAME_ONLY = (
    "Write only the English name of the language, for example {example}.",
    "Write the English name of the language.",
    "Write exactly one word: the English name of the language.",
    "Write exactly one line: the name of the language in English.",
    "Answer with the English name of the language, nothing else.",
    "Answer with the name of the language in English, such as {example}.",
    "Answer with the full language name, not the code.",
    "Reply with the language name in English, for example {example}.",
    "Reply with the English name only.",
    "Give the name of the language in English, or Other.",
    "Give only the language's English name, like {example}.",
    "Name the language in English and write nothing else.",
    "Output the English language name instead of the code.",
    "Output only the name of the language (English, French, German and so on, or Other).",
    "Return the language's name, spelled out in English.",
    "Respond with the English name of the language, e.g. {example}.",
    "Use the English name of the language as the answer: {example}, for instance.",
    "The answer is the English name of the language, one of: {names}.",
    "Write one of these names: {names}.",
)
JSON_WORDING = (
    "Answer with JSON: {shape}",
    "Answer as JSON: {shape}",
    "Answer with one JSON object: {shape}",
    "Reply in JSON, exactly {shape}",
    "Reply with JSON only: {shape}",
    "Write one line of JSON: {shape}",
    "Write exactly one line of JSON: {shape}",
    "Write exactly one JSON object: {shape}",
    "Output valid JSON in this form: {shape}",
    "Return a JSON object like {shape}",
    "Return JSON and nothing else: {shape}",
    'Return a JSON object with the single key "{key}", for example {example}',
    'Respond with a JSON object whose only key is "{key}": {shape}',
)
TAG_WORDING = (
    "Put the label in a tag: {shape}",
    "Write the label between tags, like this: {shape}",
    "Wrap the label in a lang tag: {shape}",
    "Answer with an XML tag: {shape}",
)
HEADINGS = (
    *("How to answer:",) * 6,
    *("Output format:", "Output:", "Answer format:", "Format:", "Response format:", "Answer:", ""),
)
CLOSERS = (
    *("xx is one of {codes}. Write nothing else.",) * 5,
    "xx is one of {codes}.",
    "where xx is one of {codes}",
    "{codes} are the only labels.",
    "The label is one of {codes}. Write nothing else.",
    "xx is one of the thirteen labels. Write nothing else.",
    *(
        "Write nothing else.",
        "Do not explain.",
        "No other text.",
        "Nothing else.",
        "One line only.",
    ),
)
NAME_CLOSERS = (
    "Use one of {names}. Write nothing else.",
    "The name is one of {names}.",
    "One of {names}.",
    *("Write nothing else.", "Do not write the code.", "Nothing else.", "No explanation."),
    "xx is one of {codes}. Write nothing else.",
)


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


def _templates(format: Format, rng: random.Random) -> tuple[str, ...]:
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
