"""Sentences, words, bullet points and characters of a text, counted as a reader would; and its
language.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import regex

_MARKER = re.compile(
    r"^[ \t>]*(?:(?:[-*+•‣◦▪●○·–—]|\d{1,3}\.\)?|\(?(?:\d{1,3}|[A-Za-z])\))[ \t]+)+(?=\S)",
    re.MULTILINE,
)
_LEFT_OUT = re.compile(r"[\[(](?:\.{3}|…)[\])]")
_SPACED = re.compile(r"\.(?:[ \xa0]\.){2,}")
_BULLET = re.compile(r"^[ \t>]*[-*+•‣◦▪●○·–—][ \t]+\S", re.MULTILINE)
_RULE = re.compile(r"^[ \t]*([-*_])(?:[ \t]*\1){2,}[ \t]*$", re.MULTILINE)
_BLOCK = re.compile(r"\n[ \t]*\n")
_ONE_EACH = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc]")
_BETWEEN = re.compile(r"[\s\u2014\u2015]+")
_CLOSING = r"[\"'“”‘’»«›)\]}」』】〉》*_`~]*"
# What ends a sentence: some signs do so wherever they stand, others before white space alone.
_END = re.compile(
    rf"(?:[。！？｡]|．(?!\d))[。！？｡．…]*{_CLOSING}|[.!?…؟۔։।॥።။‽]+{_CLOSING}(?=\s|$)",
    re.MULTILINE,
)
_OPENING = re.compile(r"[\s\"'“‘«‹(\[{¿¡„「『*_`~>]*")
_LAST_WORD = re.compile(r"((?<!°)[\w'’.°-]*)\.$")
_PRONOUN = re.compile(r"(?:^|[^\w\s]\s+|\b[^\W\d_A-Z]\w*\s+)I\.$")
# After a single letter with a point: a name goes on, but not with one of these words.
_BEGINS = re.compile(
    r"(?:The|This|That|These|Those|There|It|He|She|They|We|You|I|In|On|At|As|An?|And|But|So|If|For"
    r"|Its|His|Her|My|Our|Your|Their|How|What|When|Where|Why|Who|Did|Do|Does|Is|Are|Was|Were|Can"
    r"|Could|Please|After|Then|However|No|Not|Yes)\b"
)
_INITIAL_NEXT = re.compile(r"[^\W\d_]\.")
_INITIAL = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
_ORDINAL = re.compile(
    r"(?:Januar|Jänner|Februar|März|April|Mai|Juni|Juli|August|September|Oktober|November|Dezember)\b"
)
# What a point makes short: before a name or within a sentence; and before a number.
_SHORT = re.compile(
    r"""mrs? | ms | dr | prof | st | rev | hon | gen | col | maj | capt | lt | sgt | gov | sen |
    rep | pres | mt | ft | messrs | mme | mlle | sr | sra | srta | hr | fr | frl | dott | sig
    | skt | lic | ing | avv | dir | med | vs | cf | ca | approx | incl | excl | resp | bzw |
    evtl | ggf | vgl | inkl | zzgl | e\.g | i\.e | z\.b | d\.h | u\.a | v\.a | p\.ej | c\.-à-d
    | t\.ex | bl\.a | d\.v\.s | b\.v | т\.е | т\.к | г | ул | им | проф""",
    re.VERBOSE,
)
_BEFORE_A_NUMBER = re.compile(
    "n[o°]|nos|nr|op|vol|figs?|str|eq|sec|ch|chap|pp?|par|art|abs|kap|s|bd|ver|v|núm|n|tel|ext|ст|стр"
)
# ISO codes that can be told from one another.
_CODES = """
    af am ar as az be bg bn br bs ca cs cy da de el en eo es et eu fa fi fr fy ga gd gl gu ha he hi
    hr ht hu hy id ig is it ja jv ka kk km kn ko ku ky la lg ln lo lt lv mg mk ml mn mr ms my nb ne
    nl nn no om or pa pl ps pt qu ro ru sa si sk sl so sq sr sv sw ta te th tl tr ug uk ur uz vi xh
    yo zh zu
"""
LANGUAGES = frozenset(_CODES.split())
_NORWEGIAN = frozenset(("nb", "nn", "no"))
_LEAST_TO_TELL = 30  # bytes of letters
_LIKELY = 0.2
_AHEAD = 40  # characters around a sign that decide what it is


def count_characters(text: str) -> int:
    """Characters as a reader sees them: an emoji of several parts is one."""
    return len(regex.findall(r"\X", text.strip()))


def count_bullets(text: str) -> int:
    """Lines that begin with a bullet; numbered lines are none."""
    return len(_BULLET.findall(_RULE.sub("", text)))


def count_words(text: str) -> int:
    """What stands between white space or long dashes and has a letter or a digit.

    A Chinese or Japanese character is a word. Markers of lists are none.
    """
    text, signs = _ONE_EACH.subn(" ", _MARKER.sub("", text))
    return signs + sum(any(map(str.isalnum, piece)) for piece in _BETWEEN.split(text))


def count_sentences(text: str) -> int:
    """Sentences, by their signs and by what follows.

    A paragraph, and an item of a list, ends a sentence even without a sign. No end is a sign
    before a small letter, nor the point of a number, of an initial or of a common abbreviation.
    """
    whole = _SPACED.sub("…", _LEFT_OUT.sub("", _RULE.sub("\n\n", text)))
    marked = _MARKER.sub("\n\n", whole)
    return sum(map(_sentences, _BLOCK.split(marked)))


def _sentences(block: str) -> int:
    count, start = 0, 0
    for end in _END.finditer(block):
        if _goes_on(block, end):
            continue
        count += any(map(str.isalnum, block[start : end.end()]))
        start = end.end()
    return count + any(map(str.isalnum, block[start:]))


def _goes_on(block: str, end: re.Match[str]) -> bool:
    """Whether the sentence goes on after a sign that may end it."""
    opening = _OPENING.match(block, end.end())
    next_word = opening.end() if opening else end.end()
    rest = block[next_word : next_word + _AHEAD]
    if rest[:1].islower():
        return True
    if not end[0].startswith(".") or end[0].startswith(".."):
        return False
    before = block[max(0, end.start() - _AHEAD) : end.start() + 1]
    last = _LAST_WORD.search(before)
    if not last or not rest or _PRONOUN.search(before):
        return False
    return _abbreviates(last[1], rest)


def _abbreviates(word: str, rest: str) -> bool:
    """Whether a word before a point is short for another, given what follows."""
    plain = word.lower().lstrip("'’.-")
    if _SHORT.fullmatch(plain):
        return True
    if rest[:1].isdigit() and _BEFORE_A_NUMBER.fullmatch(plain):
        return True
    if plain.isdecimal():
        return len(plain) < 3 and _ORDINAL.match(rest) is not None
    if plain in ("a.m", "p.m") or not _INITIAL.fullmatch(word):
        return False
    letters = word[:1].isupper() or len(word) > 1
    return _INITIAL_NEXT.match(rest) is not None or (letters and not _BEGINS.match(rest))


def is_in_language(text: str, codes: Sequence[str]) -> bool | None:
    """Whether a text may well be in one of the languages; None where it is too short to tell.

    Of texts as short as a sentence close languages, such as Spanish and Portuguese, can pass for
    one another.
    """
    if not _can_tell(text):
        return None
    norwegian = _NORWEGIAN if _NORWEGIAN & {*codes} else ()
    likely: Mapping[str, float] = dict(_identifier().rank(text))
    return sum(likely.get(code, 0.0) for code in {*codes, *norwegian}) >= _LIKELY


def language_of(text: str) -> str | None:
    """The likeliest language of a text, as an ISO code; None where it is too short to tell."""
    return str(_identifier().classify(text)[0]) if _can_tell(text) else None


def _can_tell(text: str) -> bool:
    letters = "".join(filter(str.isalpha, text))
    return len(letters.encode(errors="replace")) >= _LEAST_TO_TELL


@cache
def _identifier() -> Any:
    # Its model is read when the first text comes.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
