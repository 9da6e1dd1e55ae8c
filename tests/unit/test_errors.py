from distill_datasets.errors import RecipeError


def test_a_notebook_shows_an_error_as_its_sentence() -> None:
    error = RecipeError("No recipe 'nope'.")
    error.add_note("Look into builders/.")
    shown = error._render_traceback_()
    assert shown == ["RecipeError: No recipe 'nope'.", "Look into builders/."]
