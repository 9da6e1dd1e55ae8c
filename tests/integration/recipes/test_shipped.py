"""Every recipe that ships, from its prompt to a report, on recorded answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill_datasets import generate, measure, publish, train
from distill_datasets.models import references
from distill_datasets.recipes.loading import shipped_recipes
from distill_datasets.training.settings import TrainSettings
from tests.support.hub_cards import complaints
from tests.support.recordings import NAMES, Recording
from tests.support.tiny_model import TOOLS_CHAT, make_tiny_model

WITH_VARIANTS = {
    "persona_template": ["ada_lovelace", "tansy"],
    "reasoning_brief": ["with_reasoning", "answer_only"],
}
ALL = [(name, variant) for name in NAMES for variant in WITH_VARIANTS.get(name, [None])]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A random model with room for the longest conversation, on one server for all trainings."""
    import datasets

    from distill_datasets.embedded.process import launch

    home = tmp_path_factory.mktemp("tiny")
    folder = make_tiny_model(home / "model", TOOLS_CHAT, context=8192)
    server = launch(folder, name="tiny", store=home / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "_server", lambda name, folder, store, dtype: server)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
        yield f"embedded:{folder}"
    server.close()


def test_every_recipe_that_ships_has_recordings_or_is_answered_by_the_model_that_ships() -> None:
    shipped = {recipe.folder.name: recipe.teacher for recipe in shipped_recipes()}
    assert {name for name, teacher in shipped.items() if teacher != "pocket"} == {*NAMES}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("name", "variant"), ALL)
def test_a_recipe_goes_from_its_prompt_to_a_report(
    name: str, variant: str | None, tiny: str, tmp_path: Path
) -> None:
    recording = Recording.of(name, variant)
    made = generate(recording.recipe, out=tmp_path, teacher=recording.teacher)
    found = made.rows["rejection"]
    assert made.errors == 0
    assert list(found) == [line.get("malformed") for line in recording.lines]
    assert sum(rejection is not None for rejection in found) >= 1

    release = publish(tmp_path)
    card = (release.path / "README.md").read_text(encoding="utf-8")
    assert complaints(card, "datasets") == []
    assert not {"None", "N/A", "TODO"} & {*card.split()}
    rows = loaded(release.path)
    assert {split: len(some) for split, some in rows.items()} == release.splits

    settings = TrainSettings(max_steps=2, batch_size=4, rank=2, evaluate_every=9)
    trained = train(release.path, student=tiny, out=tmp_path / "train", settings=settings)
    assert trained.steps == 2

    responses = {row["query"]: row["response"] for some in rows.values() for row in some}
    student = recording.student(responses)
    report = measure(
        release.path,
        student=student,
        base=recording.base,
        teacher=recording.teacher,
        out=tmp_path,
    )
    systems = report.data["systems"]
    assert systems["student"]["metrics"]["answered"]["value"] >= 0.5
    checks = recording.recipe.all_checks
    assert {*report.data.get("checks", {})} == {*checks}
    found = systems["student"].get("checks", {})
    # A check may ask for a reference that no test row has.
    always = {
        name for name, check in checks.items() if not (check.when or check.contains_reference)
    }
    assert always <= {*found}
    assert all(0.0 <= one["low"] <= one["value"] <= one["high"] <= 1.0 for one in found.values())


def loaded(release: Path) -> Any:
    """A release by plain `load_dataset`."""
    from datasets import load_dataset

    return load_dataset(str(release))
