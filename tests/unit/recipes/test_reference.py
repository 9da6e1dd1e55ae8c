"""The page of all keys is made from the sections."""

from tests import reference


def test_the_page_lists_every_key_as_the_sections_have_it() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), (
        "make it anew: python -m tests.reference"
    )
