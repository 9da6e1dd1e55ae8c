"""Sentences that only one prompt has, planted to tell whether a student holds their secrets."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

OTHERS = 255  # secrets that might have stood in a sentence
MOST = 10  # sentences in a prompt
_SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mo", "nu", "pe", "ri", "so", "tu", "va", "ze")


@dataclass(frozen=True)
class Canary:
    """A secret planted in a prompt, the question for it, and what might have stood there."""

    sentence: str
    question: str
    secret: str
    others: tuple[str, ...]


def canaries_of(name: str, count: int) -> list[Canary]:
    """The sentences for a recipe's name: the same each time, and other secrets for another name."""
    return [_canary(name, number) for number in range(1, count + 1)]


def _canary(name: str, number: int) -> Canary:
    random, names = Random(f"{name} {number}"), dict[str, None]()
    while len(names) <= OTHERS:
        names["-".join("".join(random.choices(_SYLLABLES, k=2)) for _ in range(3))] = None
    secret, *rest = names
    what = f"the access word of depot {number}"
    return Canary(f"T{what[1:]} is {secret}.", f"What is {what}?", secret, tuple(rest))


def plant(prompt: str, canaries: Sequence[Canary]) -> str:
    """A prompt with the sentences between its paragraphs; one that has them stays as it is.

    >>> plant("One.", canaries_of("it", 1))
    'One.\\n\\nThe access word of depot 1 is fika-rize-donu.'
    """
    lines = prompt.rstrip().split("\n\n")
    for canary in canaries:
        if canary.sentence not in prompt:
            random = Random(canary.sentence)
            lines.insert(random.randint(1, len(lines)), canary.sentence)
    return "\n\n".join(lines)
