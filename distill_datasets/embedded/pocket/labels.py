"""The thirteen labels of the language task, and the label each source language earns."""

from __future__ import annotations

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
