"""Templates that may take any time or memory are computed apart, and ended."""

from pathlib import Path

import pytest

from distill_datasets.errors import RecipeError
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.prompt import holds, render
from tests.conftest import edit


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'x' * 3000000000 }}", "MemoryError"),
        ("{{ 'x' | center(3000000000) }}", "MemoryError"),
        ("{% for a in range(99999) %}{{ query * 2000 }}{% endfor %}", "over 67,108,864 characters"),
        ("{{ query.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_takes_too_much_is_an_error_and_the_next_one_is_filled(
    template: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        render(template, query="some text")
    lines = "{% for line in query.splitlines() %}{{ loop.index }}: {{ line }};{% endfor %}"
    assert render(lines, query="a\nb") == "1: a;2: b;"


def test_nested_loops_without_end_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_datasets.recipes.prompt._SECONDS", 0.2)
    loops = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
    with pytest.raises(RecipeError, match="takes over 0.2 s"):
        render(loops)
    assert render("{{ query.upper() }}", query="on") == "ON"


def test_an_expression_may_call_and_compute() -> None:
    assert holds("answer.split()[0] == reference", answer="a b", reference="a")
    with pytest.raises(RecipeError, match="MemoryError"):
        holds("'x' * 3000000000", answer="a")


def test_a_prompt_that_is_a_template_is_filled_as_jinja_fills_it(recipe_folder: Path) -> None:
    edit(recipe_folder, "recipe.yaml", "license:", "template: jinja\nvariables: {n: two}\nlicense:")
    (recipe_folder / "prompt.md").write_text(
        "{# hidden #}{% for w in query.split() %}{{ w }}-{% endfor %}{{ n }}"
    )
    (message,) = load_recipe(recipe_folder).messages("a b")
    assert message["content"] == "a-b-two"
