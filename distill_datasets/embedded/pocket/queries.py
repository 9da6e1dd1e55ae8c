"""Draws varied training queries, with their labels, from a corpus."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from .corpus import NO_SPACES, Corpus, folded
from .labels import OTHER, label_of

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
CODE_FRAMES = (
    'print("{}")',
    "# {}\nx = x + 1",
    "// {}",
    "total += n;  // {}",
    "/* {} */ int main() {{ return 0; }}",
    "const message = '{}';",
    'System.out.println("{}");',
    "def run(): return '{}'",
    '{{"text": "{}"}}',
    "<p>{}</p>",
    "raise ValueError('{}')",
    "if ok: say('{}')",
)


@dataclass(frozen=True)
class Query:
    """A text and the label the prompts' rules give it."""

    text: str
    label: str
    language: str


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

    def draw(self, *, long: bool = False) -> Query:
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

    def _draw(self, long: bool) -> Query:
        rng = self.rng
        if rng.random() < 0.02:
            return Query(self._gibberish(), OTHER, "gibberish")
        language = self._language()
        if language in WHOLE:
            text = self._sentence(language)
            return Query(self._surroundings(text) if language != "noise" else text, OTHER, language)
        text = self._passage(language, long)
        if rng.random() < 0.03:
            text = rng.choice(CODE_FRAMES).format(text.replace("\n", " "))
        elif rng.random() < 0.04:
            text = self._with_foreign_words(text, language)
        else:
            text = self._disturbed(text, language)
        return Query(text, label_of(language), language)

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
