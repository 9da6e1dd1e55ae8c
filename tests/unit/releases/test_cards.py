import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.cards import dataset_card, model_card, read_card, report_markdown

GOLDEN = Path(__file__).parent / "golden" / "dataset_card.md"
BEGIN, END = "<!-- distill-datasets:begin -->", "<!-- distill-datasets:end -->"

MANIFEST: dict[str, Any] = {
    "version": "1.2.0",
    "recipe": "greetings",
    "recipe_digest": "a" * 64,
    "content_digest": "b" * 64,
    "teacher": "tinker:org/large",
    "identity": "tinker:org/large/chatml",
    "renderer": "chatml",
    "sampling": {"temperature": 0.15, "max_tokens": 64, "seed": None, "stop": [], "n": 1},
    "prompt_sha256": "c" * 64,
    "splits": {"train": 1400, "test": 300, "edge": 20},
    "kept": 1720,
    "rejected": {"truncated": 3, "outside choices": 2},
    "errors": 1,
    "references": {"rows": 1700, "agreeing": 1650},
    "tokens": {"prompt": 1_035_600, "cached": 1_000_000, "response": 8_600},
    "mean_prompt_tokens": 600.1,
    "created": "2026-11-21",
    "versions": {"distill-datasets": "0.1.0", "datasets": "5.2.0"},
}
LAYOUT = {"configs": [{"config_name": "default", "version": "1.2.0", "data_files": "data/*"}]}
EXAMPLE = {"id": "id0", "query": "¿qué? 👋 שלום", "messages": [{"role": "user", "content": "```"}]}


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def system(model: str, prompt: bool, value: float) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "metrics": {"accuracy": interval(value)},
        "tokens": {"prompt_mean": 612.25 if prompt else 11.5, "response_mean": 3},
        "latency_ms": {"p50": 120.0, "p95": 1300.04},
    }


REPORT: dict[str, Any] = {
    "recipe": "greetings",
    "dataset": {"path": "runs/greetings/release", "revision": "b" * 64, "rows": 1720},
    "split": "test",
    "n": 1300,
    "systems": {
        "base": system("tinker:org/small", False, 0.2),
        "teacher": system("tinker:org/large", True, 0.95),
        "student": system("tinker://run-1/sampler_weights/final", False, 0.9),
    },
    "differences": {"student-teacher": {"accuracy": interval(-0.05)}},
    "notes": ["Accuracy is over the 1,200 rows with a label."],
}
TRAINING = {
    "student": "tinker:org/small",
    "settings": {"rank": 32, "learning_rate": 0.0002, "renderer": None},
    "dataset": {"rows": {"train": 1400}},
    "checkpoint": {"name": "final", "validation_loss": 0.01},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "queries.txt").write_text("hello\n", encoding="utf-8")
    return Recipe(
        name="greetings",
        description="Which language a greeting is in.",
        teacher="tinker:org/large",
        queries={"file": "queries.txt", "forced_split": "split"},
        prompt="Sort greetings.\n\n```text\nhola -> es\n```\n\nOne word.",
        answer={"choices": ["en", "es"]},
        license="CC-BY-4.0",
        attribution="Greetings by the Example Society.",
        languages=("en", "es", "no", "swh", "ot", "Spanish"),
        folder=tmp_path,
    )


def written(recipe: Recipe, **changes: Any) -> str:
    return dataset_card({**MANIFEST, **changes}, recipe, example=EXAMPLE, layout=LAYOUT)


def metadata(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_dataset_card_is_the_golden_one(recipe: Recipe) -> None:
    """To accept a change: write `written(recipe)` to the golden file, and read the difference."""
    assert written(recipe) == GOLDEN.read_text("utf-8")


def test_the_hub_library_reads_the_metadata(recipe: Recipe) -> None:
    data = DatasetCard(written(recipe)).data
    assert data.license == "cc-by-4.0"
    assert data.language == ["en", "es", "no", "swh"]
    assert data.size_categories == ["1K<n<10K"]
    assert data.tags == ["synthetic", "prompt-distillation", "distill-datasets"]
    assert data["configs"] == LAYOUT["configs"]
    assert "task_categories" not in metadata(written(recipe))


@pytest.mark.parametrize(
    ("rows", "category"),
    [(999, "n<1K"), (1_000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**12, "n>1T")],
)
def test_the_size_category_follows_from_the_rows(rows: int, category: str, recipe: Recipe) -> None:
    assert metadata(written(recipe, splits={"train": rows}))["size_categories"] == [category]


def test_without_a_licence_none_is_claimed(recipe: Recipe) -> None:
    card = written(recipe.replace(license=None, languages=()))
    assert "license" not in metadata(card)
    assert "language" not in metadata(card)
    assert "No licence is stated." in card


def test_a_licence_that_the_hub_does_not_know_is_another_one(recipe: Recipe) -> None:
    found = metadata(written(recipe.replace(license="Example Society Terms (2024)")))
    assert found["license"] == "other"
    assert found["license_name"] == "example-society-terms-2024"


def test_what_is_unknown_is_left_out(recipe: Recipe) -> None:
    unknown = {"renderer": None, "mean_prompt_tokens": None, "references": None}
    card = written(recipe, **unknown, rejected={}, errors=0)
    assert not re.search(r"\bNone\b|N/A|needed|chat format|dropped|`rejected`", card)
    assert "No row has a reference" in card


@pytest.mark.parametrize("prompt", ["a ``` b", "````\n```", "`" * 9, "~~~", "{{ '{{' }} {% raw %}"])
def test_no_prompt_gets_out_of_its_fence(prompt: str, recipe: Recipe) -> None:
    if "raw" in prompt:
        prompt = "{{ '{{' }} and {{ '{% raw %}' }}"
    card = written(recipe.replace(prompt=prompt))
    fence = re.search(r"^(`{3,})text\n", card, flags=re.MULTILINE)
    assert fence is not None
    inside = card[fence.end() :].split(f"\n{fence[1]}\n")[0]
    assert inside == prompt
    assert fence[1] not in prompt


def test_the_example_is_json_that_reads_back(recipe: Recipe) -> None:
    block = re.search(r"^(`{3,})json\n(.*?)\n\1$", written(recipe), re.MULTILINE | re.DOTALL)
    assert block is not None
    assert json.loads(block[2]) == EXAMPLE
    assert EXAMPLE["query"] in block[2]


def test_a_pipe_in_a_reason_stays_in_its_cell(recipe: Recipe) -> None:
    card = written(recipe, rejected={"a | b\nc": 4})
    assert "| dropped: a \\| b c | 4 |" in card


def test_what_people_wrote_outside_the_markers_stays(recipe: Recipe) -> None:
    first = written(recipe)
    ours = first[first.index(BEGIN) : first.index(END) + len(END)]
    by_hand = first.replace(ours, f"Above.\n\n{ours}\n\nBelow, with --- in it.")
    again = dataset_card(
        {**MANIFEST, "version": "1.3.0"},
        recipe.replace(prompt=f"Say {END} now."),
        example=EXAMPLE,
        layout=LAYOUT,
        written=[(read_card(by_hand), {})],
    )
    third = dataset_card(
        MANIFEST, recipe, example=EXAMPLE, layout=LAYOUT, written=[(read_card(again), {})]
    )
    assert "version 1.3.0" in again
    assert third == by_hand


def test_a_card_without_markers_is_all_human(recipe: Recipe) -> None:
    card = dataset_card(
        MANIFEST,
        recipe,
        example=EXAMPLE,
        layout=LAYOUT,
        written=[(read_card("---\nlicense: mit\n---\nMine.\n"), {})],
    )
    assert card.endswith(f"{END}\n\nMine.\n")
    assert metadata(card)["license"] == "cc-by-4.0"


def test_the_report_has_every_system_with_its_intervals() -> None:
    text = report_markdown(REPORT)
    assert "| base | no | 0.200 [0.150, 0.250] | 11.5 /" in text
    assert "| teacher | yes | 0.950 [0.900, 1.000] | 612.2 /" in text
    assert "- `tinker:org/large`: teacher\n" in text
    assert "| 120.0 |" in text
    assert "| student-teacher | accuracy | -0.050 [-0.100, 0.000] |" in text
    assert "1,300 rows of the split `test`" in text


def test_a_metric_that_a_system_lacks_is_an_empty_cell() -> None:
    systems = {**REPORT["systems"], "base": {**REPORT["systems"]["base"], "metrics": {}}}
    text = report_markdown({**REPORT, "systems": systems})
    assert "| base | no |  | 11.5 /" in text


def test_a_report_needs_no_differences() -> None:
    text = report_markdown({key: REPORT[key] for key in ("systems", "split", "n")})
    assert "difference" not in text


def test_the_model_card_says_what_was_trained_on_what(recipe: Recipe) -> None:
    card = model_card(REPORT, TRAINING, recipe)
    data = ModelCard(card).data
    assert data["base_model"] == "org/small"
    assert data.license == "cc-by-4.0"  # that of the data is inherited
    assert report_markdown(REPORT).strip() in card
    assert "\n- Accuracy is over the 1,200 rows with a label.\n" in card
    assert "| settings.rank | 32 |" in card
    assert "| checkpoint.name | final |" in card
    assert "settings.renderer" not in card
    assert recipe.digest in card
    assert "b" * 64 in card
    assert recipe.prompt in card


def test_the_model_card_says_what_else_was_learned(recipe: Recipe) -> None:
    mix = [
        {"name": "general", "share": 0.1, "file": "general.jsonl", "license": "mit"},
        {"name": "other", "share": 0.1, "file": "other.txt", "model": "openai:base"},
    ]
    for name in ("general.jsonl", "other.txt"):
        (recipe.folder / name).write_text("one\n", encoding="utf-8")
    mixed = recipe.replace(mix=mix)
    said = "rows of something else: `general` (licence: mit), `other`. Ask it"
    assert said in model_card(REPORT, TRAINING, mixed)
    soft = {**TRAINING, "settings": {"objective": {"name": "soft"}}}
    assert said not in model_card(REPORT, soft, mixed)


def viewed(recipe: Recipe, **changes: Any) -> str:
    """How a reader shall ask the student."""
    card = model_card(REPORT, TRAINING, recipe.replace(**changes))
    (line,) = [line for line in card.splitlines() if "Ask it with" in line]
    return line[line.index("Ask it with") :]


def test_the_model_card_says_what_the_student_sees(recipe: Recipe) -> None:
    tool = {"name": "look", "parameters": {"type": "object"}}
    (recipe.folder / "tools.json").write_text(json.dumps([tool]), encoding="utf-8")
    equipped: Any = {"answer": {}, "tools": "tools.json"}
    assert viewed(recipe) == "Ask it with the query alone, as the user's message."
    assert viewed(recipe, student={"prompt": "[hi]"}) == (
        "Ask it with the query, as the user's message, behind its own short prompt as the "
        "system's: `[hi]`."
    )
    assert viewed(recipe, **equipped, student={"tools": "keep"}) == (
        "Ask it with the query, as the user's message; give it its tools."
    )
    assert viewed(recipe, **equipped, queries={"file": "queries.txt", "messages": "m"}) == (
        "Ask it with the conversation alone. It knows its tools without their catalogue."
    )
    behind = {"members": {"[a]": recipe, "[b]": recipe}, "prompts": {"[a]": "a", "[b]": "b"}}
    assert viewed(recipe, **behind, queries={}, answer={}, license=None) == (
        "Ask it with the conversation, behind the handle of one of its prompts as the system's "
        "message: `[a]`, `[b]`."
    )


def test_the_model_card_warns_when_the_rows_were_trained_on(recipe: Recipe) -> None:
    tutorial = recipe.replace(split={"same_rows": True})
    assert "Those rows were also trained on" in model_card(REPORT, TRAINING, tutorial)
    assert "Those rows were also trained on" not in model_card(REPORT, TRAINING, recipe)


def test_a_base_that_is_not_on_the_hub_is_not_linked(recipe: Recipe) -> None:
    systems = {**REPORT["systems"], "base": system("pocket", False, 0.2)}
    assert "base_model" not in metadata(model_card({**REPORT, "systems": systems}, {}, recipe))


def test_a_students_checks_are_in_its_table_and_its_results() -> None:
    systems = {
        role: {**one, "checks": {"brief": {**interval(0.5), "rows": 8}}}
        for role, one in REPORT["systems"].items()
    }
    checks = {
        "brief": {"demands": 'words: {"max": 2}', "covers": "Two | words"},
        "idle": {"demands": "ends: true", "covers": None},
    }
    apart = {"student-teacher": {"brief": interval(0.0)}}
    report = {**REPORT, "systems": systems, "checks": checks, "check_differences": apart}
    card = model_card(report, TRAINING, None)
    shown = "0.500 [0.450, 0.550]"
    assert f"| `brief` | 8 | {shown} | {shown} | {shown} | 0.000 [" in card
    assert "- `brief`: Two \\| words" in card
    assert "| `idle` | 0 |  |  |  |  |" in card
    assert "- `idle`: `ends: true`" in card
    (model,) = ModelCard(card).data.to_dict()["model-index"]
    found = {one["name"]: one for result in model["results"] for one in result["metrics"]}
    assert found["brief"]["value"] == 0.5
    assert found["brief"]["args"]["rows"] == 8
    assert found["brief"]["args"]["teacher"] == {"value": 0.5, "interval_95": [0.45, 0.55]}
