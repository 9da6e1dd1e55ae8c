"""The texts the model learns from, and the varied queries drawn from them.

Our own sentences, Django's translations, names from CLDR and docstrings of Python.
"""

from __future__ import annotations

import gettext
import hashlib
import importlib
import random
import re
import string
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import ModuleType

from .prompts import OTHER, label_of, phrases

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


# How often each language is drawn. Latin-script labels are the hard ones. Languages close to
# Spanish weigh little, because they teach the model to call Spanish "ot".
WEIGHTS = {
    **{"en": 1.5, "es": 1.5, "de": 1.3, "tr": 1.3, "fr": 1.3, "vi": 0.8, "ur": 1.1, "ar": 0.9},
    **{"hi": 0.6, "el": 0.5, "zh": 0.7, "ru": 0.5, "bg": 0.3, "uk": 0.2},
    **{"sw": 0.9, "th": 0.3, "romanised": 0.5, "mixed": 0.35, "code": 0.3, "noise": 0.35},
    **{"ja": 0.15, "ko": 0.12, "he": 0.08, "pt": 0.15, "it": 0.15, "ca": 0.04, "nl": 0.2},
    **{"pl": 0.2, "id": 0.25, "sv": 0.2, "fi": 0.07, "cs": 0.07, "da": 0.07, "nb": 0.05},
    **{"ro": 0.06, "hu": 0.07, "hr": 0.05, "sk": 0.05},
}
OWN_SHARE = 0.8
# Files whose lines are whole on purpose: cutting or joining them could change their label.
WHOLE = ("mixed", "code", "noise")

NAMES = (
    "Anna Maria Peter Tom Lisa Berlin Paris London Madrid Istanbul Google Microsoft Toyota Amazon "
    "Samsung Netflix Carlos Ahmed Yuki Ivan Elena Nguyen Smith Müller García Dubois Yılmaz WhatsApp"
)
EMOJIS = "😀 😂 🙏 🎉 👍 ❤️ 🔥 😭"
CODE_FRAMES = phrases("code_frames")


@dataclass(frozen=True)
class LabelledQuery:
    """A text and the label the prompts' rules give it."""

    text: str
    label: str


@dataclass(frozen=True)
class Exchange:
    """What a user says, and how it goes on when nobody asked for a label."""

    user: str
    reply: str


class QuerySource:
    """Draws queries from a corpus, never one of the recipes' own."""

    def __init__(self, corpus: Corpus, *, forbidden: list[str], seed: int) -> None:
        """Weigh the languages that the corpus has."""
        self.corpus = corpus
        self.rng = random.Random(seed)
        self.forbidden = {folded(query) for query in forbidden}
        self.languages = [language for language in corpus.languages() if language in WEIGHTS]
        self.weights = [WEIGHTS[language] for language in self.languages]

    def draw(self, *, long: bool = False) -> LabelledQuery:
        """Draw a query; a `long` one is several sentences."""
        while True:
            query = self._draw(long)
            if query.text and folded(query.text) not in self.forbidden:
                return query

    def exchange(self) -> Exchange:
        """Draw a text and its continuation: its second half, or more in the same language."""
        language = self._language()
        text = self._sentence(language)
        units = list(text) if language in NO_SPACES else text.split()
        if len(units) < 6 or self.rng.random() < 0.35:
            return Exchange(text, self._sentence(language))
        glue = "" if language in NO_SPACES else " "
        cut = self.rng.randint(len(units) // 3, len(units) - 2)
        return Exchange(glue.join(units[:cut]), glue.join(units[cut:]))

    def _draw(self, long: bool) -> LabelledQuery:
        rng = self.rng
        if rng.random() < 0.02:
            return LabelledQuery(self._gibberish(), OTHER)
        language = self._language()
        if language in WHOLE:
            text = self._sentence(language)
            return LabelledQuery(self._surroundings(text) if language != "noise" else text, OTHER)
        text = self._passage(language, long)
        if rng.random() < 0.03:
            text = rng.choice(CODE_FRAMES).format(text.replace("\n", " "))
        elif rng.random() < 0.04:
            text = self._with_foreign_words(text, language)
        else:
            text = self._disturbed(text, language)
        return LabelledQuery(text, label_of(language))

    def _language(self) -> str:
        return self.rng.choices(self.languages, self.weights)[0]

    def _sentence(self, language: str) -> str:
        own = self.corpus.own.get(language, [])
        collected = self.corpus.collected.get(language, [])
        if own and (not collected or self.rng.random() < OWN_SHARE):
            return self.rng.choice(own)
        return self.rng.choice(collected)

    def _passage(self, language: str, long: bool) -> str:
        """Return one sentence, a part of one, or several."""
        chance = self.rng.random()
        several = self.rng.randint(2, 6) if long else 2
        count = several if long or chance > 0.88 else 1
        glue = "" if language in NO_SPACES else " "
        text = glue.join(self._sentence(language) for _ in range(count))
        if not long and self.rng.random() < 0.25:
            return self._part(text, language)
        if self.rng.random() < 0.03 and language not in NO_SPACES:
            words = text.split()
            self.rng.shuffle(words)
            return " ".join(words)
        return text

    def _part(self, text: str, language: str) -> str:
        """Return some consecutive words, four at least: fewer would prove nothing."""
        units = list(text) if language in NO_SPACES else text.split()
        if len(units) < 6:
            return text
        size = self.rng.randint(4, min(12, len(units)))
        start = self.rng.randint(0, len(units) - size)
        return ("" if language in NO_SPACES else " ").join(units[start : start + size])

    def _disturbed(self, text: str, language: str) -> str:
        """Change case and punctuation, and add names and noise, without changing the label."""
        rng = self.rng
        if rng.random() < 0.2:
            text = text.rstrip(".。!?؟۔।…")
        if rng.random() < 0.06:
            text = "".join(letter for letter in text if letter not in string.punctuation)
        chance = rng.random()
        if chance < 0.12 and language != "tr":  # lower() breaks the Turkish dotted capital
            text = text.lower()
        elif chance < 0.14 and language not in ("tr", "el", "de"):
            text = text.upper()
        elif chance < 0.22:
            text = text[:1].upper() + text[1:]
        if language == "zh" and rng.random() < 0.2:
            text = text.translate(str.maketrans("，。？！", ",.?!"))
        if rng.random() < 0.06 and language not in NO_SPACES:
            text = self._with_name(text)
        return self._surroundings(text)

    def _with_name(self, text: str) -> str:
        words = text.split()
        words.insert(self.rng.randint(0, len(words)), self.rng.choice(NAMES.split()))
        return " ".join(words)

    def _with_foreign_words(self, text: str, language: str) -> str:
        """Add one or two words of another language to a text that clearly leads."""
        words = text.split()
        if language in NO_SPACES or len(words) < 9:
            return text
        other = self._sentence(self._language()).split()
        start = self.rng.randint(0, max(0, len(other) - 2))
        place = self.rng.randint(0, len(words))
        return " ".join([*words[:place], *other[start : start + 2][:2], *words[place:]])[:400]

    def _surroundings(self, text: str) -> str:
        """Sometimes add what the rules say to ignore."""
        rng = self.rng
        if rng.random() > 0.08:
            return text
        extra = rng.choice(
            (
                f"https://{self._letters(6)}.com/{self._letters(4)}",
                f"#{self._letters(6)}",
                f"@{self._letters(7)}",
                f"{self._letters(5)}@{self._letters(5)}.org",
                str(rng.randint(0, 99_999)),
                rng.choice(EMOJIS.split()),
            )
        )
        return f"{extra} {text}" if rng.random() < 0.3 else f"{text} {extra}"

    def _gibberish(self) -> str:
        """Return digits, signs or random letters: nothing of any language."""
        rng = self.rng
        makers = (
            lambda: str(rng.randint(0, 99_999)),
            lambda: self._letters(rng.randint(3, 9)),
            lambda: "".join(rng.choices("!?.,-+*/()#@%&=<>", k=rng.randint(1, 6))),
            lambda: rng.choice(NAMES.split()),
            lambda: rng.choice(EMOJIS.split()),
            lambda: f"{rng.randint(1, 28)}.{rng.randint(1, 12)}.{rng.randint(1990, 2030)}",
        )
        return " ".join(rng.choice(makers)() for _ in range(rng.randint(1, 5)))

    def _letters(self, count: int) -> str:
        return "".join(self.rng.choices(string.ascii_lowercase, k=count))
