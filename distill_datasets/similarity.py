"""How alike two texts are, from 0 to 1: chrF and ROUGE-L.

Written here rather than taken from `sacrebleu` and `rouge_score`, with which they agree: the second
knows no word outside ASCII, so that Arabic or Japanese texts are always 0 to it.
"""

from collections import Counter
from functools import lru_cache

import regex

_ORDERS = range(1, 7)  # lengths of chrF's runs of characters
_BETA = 2  # recall weighs so many times as much as precision
_MOST = 20_000  # characters of a text that are compared
# Words; in scripts without spaces every character is one.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}]\p{M}*|[\p{L}\p{N}\p{M}]+"
)


def chrf(found: str, right: str) -> float:
    """The F score of runs of one to six characters, white space aside; recall counts twice.

    That of `sacrebleu.sentence_chrf`, divided by 100.

        >>> round(chrf("the cat sat", "the cat sits"), 3)
        0.61
    """
    ours, theirs = _runs(found[:_MOST]), _runs(right[:_MOST])
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a and b]
    if not pairs:
        return 0.0
    hits = [(sum((a & b).values()), sum(a.values()), sum(b.values())) for a, b in pairs]
    precision = sum(hit / said for hit, said, _ in hits) / len(pairs)
    recall = sum(hit / wanted for hit, _, wanted in hits) / len(pairs)
    if not precision + recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (_BETA**2 * precision + recall)


def rouge_l(found: str, right: str) -> float:
    """The F score of the longest run of words that both have in order, others between them.

    That of `rouge_score` on ASCII texts; words are compared without upper and lower case.
    """
    ours, theirs = _words(found[:_MOST]), _words(right[:_MOST])
    common = _longest_common(ours, theirs)
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def equal(found: str, right: str) -> float:
    """1 for equal texts, white space at their ends aside; two empty ones aren't equal."""
    return float(bool(found.strip()) and found.strip() == right.strip())


@lru_cache(maxsize=64)
def _runs(text: str) -> tuple[Counter[str], ...]:
    plain = "".join(text.split())
    return tuple(
        Counter(plain[start : start + size] for start in range(len(plain) - size + 1))
        for size in _ORDERS
    )


@lru_cache(maxsize=64)
def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


def _longest_common(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """The length of the longest common subsequence; a bit for each word of the first, at once."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    row = 0
    for word in second:
        # Hyyrö's: the bits of `row` mark where the subsequence grows.
        either = row | places.get(word, 0)
        shifted = row << 1 | 1
        row = either & ~(either - shifted)
    return row.bit_count()
