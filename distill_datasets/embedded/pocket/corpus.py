"""Collects the training text: our own sentences, Django's translations, CLDR and docstrings."""

from __future__ import annotations

import gettext
import hashlib
import importlib
import random
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import ModuleType

OWN_SENTENCES = Path(__file__).parent / "corpus"
DEV_SHARE = 0.05

PLAIN_LOCALES = (
    "ar bg ca cs da de el en es fi fr he hi hu id it "
    "ja ko nb nl pl pt ro ru sk sv sw th tr uk ur vi"
)
# Django locales we read, and the language each stands for.
DJANGO_LOCALES = {
    **{code: code for code in PLAIN_LOCALES.split()},
    **{"es_AR": "es", "es_MX": "es", "es_CO": "es", "pt_BR": "pt"},
    **{"zh_Hans": "zh", "zh_Hant": "zh"},
}
# Languages with few Django translations get phrases made of CLDR names.
CLDR_PHRASES = {"ur": 600, "sw": 500, "hi": 300, "ar": 150, "th": 150, "vi": 150, "tr": 150}
DOCUMENTED_MODULES = (
    "argparse asyncio collections datetime email functools http json logging os pathlib random "
    "re shutil socket sqlite3 statistics string subprocess tempfile threading typing unittest "
    "urllib.request zipfile"
)

OTHER_SCRIPTS = ("ar", "bg", "el", "he", "hi", "ja", "ko", "ru", "th", "uk", "ur", "zh")
NO_SPACES = ("zh", "ja", "th")
SENTENCE_END = re.compile(r"(?<=[.!?।؟۔。])\s+|\n\s*\n")
PLACEHOLDER = re.compile(r"%[-0-9.]*[a-zA-Z]|%\([^)]*\)[a-z]|\{[^}]*\}|&\w+;|<[^>]*>")
TECHNICAL = re.compile(r"https?:|--\w|[/\\]\w+/|[<>{}=|%`]|\w_\w|::|>>>")


@dataclass(frozen=True)
class Corpus:
    """Texts by language; `own` was written for this model, `collected` comes from elsewhere."""

    own: dict[str, list[str]]
    collected: dict[str, list[str]]

    def lines(self) -> Iterator[str]:
        """Yield every text of every language."""
        for texts in (*self.own.values(), *self.collected.values()):
            yield from texts

    def languages(self) -> list[str]:
        """Return the languages that have at least one text, sorted."""
        present = {**self.own, **self.collected}
        return sorted(language for language in present if self.texts(language))

    def texts(self, language: str) -> list[str]:
        """Return all texts of a language, our own first."""
        return self.own.get(language, []) + self.collected.get(language, [])


def read_own_sentences(folder: Path = OWN_SENTENCES) -> dict[str, list[str]]:
    """Read the sentences written for this model: one per line, one file per language."""
    own = {}
    for path in sorted(folder.glob("*.txt")):
        lines = path.read_text(encoding="utf-8").splitlines()
        own[path.stem] = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    return own


def collect() -> dict[str, list[str]]:
    """Collect the text of installed packages; needs the `pocket` extra."""
    texts: dict[str, dict[str, None]] = {}
    for language, text in (*_django(), *_docstrings(), *_cldr()):
        texts.setdefault(language, {})[text] = None
    return {language: list(unique) for language, unique in sorted(texts.items())}


def load_corpus() -> Corpus:
    """Return all training text, without lines that overlap with the recipes' queries."""
    queries = recipe_queries()
    own, collected = read_own_sentences(), collect()
    return Corpus(without_queries(own, queries), without_queries(collected, queries))


def split_corpus(corpus: Corpus) -> tuple[Corpus, dict[str, list[str]]]:
    """Return the texts to train on, and the own sentences held back to measure progress."""
    train: dict[str, list[str]] = {}
    dev: dict[str, list[str]] = {}
    for language, texts in corpus.own.items():
        for text in texts:
            chosen = dev if _is_held_back(text) else train
            chosen.setdefault(language, []).append(text)
    return Corpus(train, corpus.collected), dev


def recipe_queries() -> list[str]:
    """Return the sentences that the recipes ask about, which no model may be trained on."""
    source = files("tinker_cookbook").joinpath("example_data", "multilingual.txt")
    return source.read_text(encoding="utf-8").splitlines()


def folded(text: str) -> str:
    """Return the text with white space and case folded, the form in which overlap is judged."""
    return " ".join(text.split()).casefold()


def overlapping(lines: Iterable[str], queries: list[str], *, shortest: int = 20) -> set[str]:
    """Return the lines that equal a query, or contain or are contained in one.

    Containment counts when the contained text has at least `shortest` characters.
    """
    asked = {folded(query) for query in queries}
    haystack = "\n".join(sorted(asked))
    lines = list(lines)
    forms = {line: folded(line) for line in lines}
    everything = "\n".join(forms.values())
    found = {query for query in asked if len(query) >= shortest and query in everything}
    return {
        line
        for line, form in forms.items()
        if form in asked
        or (len(form) >= shortest and form in haystack)
        or any(query in form for query in found)
    }


def without_queries(texts: dict[str, list[str]], queries: list[str]) -> dict[str, list[str]]:
    """Return the texts that do not overlap with a query."""
    bad = overlapping((line for lines in texts.values() for line in lines), queries)
    return {
        language: [line for line in lines if line not in bad] for language, lines in texts.items()
    }


def _is_held_back(text: str) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    return digest[0] < 256 * DEV_SHARE


def _django() -> Iterator[tuple[str, str]]:
    django = _optional_module("django")
    for path in sorted(Path(str(django.__file__)).parent.rglob("LC_MESSAGES/*.mo")):
        language = DJANGO_LOCALES.get(path.parts[-3])
        if language is None:
            continue
        with path.open("rb") as stream:
            catalog = vars(gettext.GNUTranslations(stream))["_catalog"]
        for key, translation in catalog.items():
            source = key[0] if isinstance(key, tuple) else key
            source = source.split("\x04")[-1]  # drops the message context
            yield from _sentences("en", source)
            if translation != source:
                yield from _sentences(language, translation)


def _docstrings() -> Iterator[tuple[str, str]]:
    for name in DOCUMENTED_MODULES.split():
        members = vars(importlib.import_module(name)).values()
        with warnings.catch_warnings():
            # Reading the docstring of `typing.io` warns on Python 3.11 that it goes away.
            warnings.simplefilter("ignore", DeprecationWarning)
            docstrings = [getattr(member, "__doc__", None) for member in members]
        for docstring in docstrings:
            if isinstance(docstring, str):
                yield from _sentences("en", docstring)


def _cldr() -> Iterator[tuple[str, str]]:
    babel = _optional_module("babel")
    rng = random.Random(0)
    for language, count in CLDR_PHRASES.items():
        locale = babel.Locale(language)
        names = [
            str(name)
            for table in (locale.territories, locale.languages, locale.currencies)
            for name in table.values()
        ]
        for _ in range(count):
            phrase = " ".join(rng.sample(names, rng.randint(2, 5)))
            yield from _sentences(language, phrase)


def _sentences(language: str, text: str) -> Iterator[tuple[str, str]]:
    """Split a text into clean sentences that are long enough to show their language."""
    for piece in SENTENCE_END.split(text):
        sentence = " ".join(PLACEHOLDER.sub("", piece).split()).strip(" *•-|:")
        words = len(sentence) // 3 if language in NO_SPACES else len(sentence.split())
        if 3 <= words <= 60 and not TECHNICAL.search(sentence) and _fits(language, sentence):
            yield language, sentence


def _fits(language: str, sentence: str) -> bool:
    """Tell whether most letters are of the script that the language is written in."""
    letters = [character for character in sentence if character.isalpha()]
    latin = sum(character < "\u0250" or "\u1e00" <= character < "\u1f00" for character in letters)
    share = latin / max(1, len(letters))
    return len(letters) >= 4 and (share < 0.2 if language in OTHER_SCRIPTS else share > 0.9)


def _optional_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"expected the package {name!r}, whose texts this model is trained on, and found none: "
            "run pip install 'distill-datasets[pocket]'"
        ) from error
