"""What lets a team check a student without this package: its held-out rows, and tests over them."""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from distill_datasets.conversations import linked, read_calls
from distill_datasets.files import cards_folder
from distill_datasets.hub.references import find_release
from distill_datasets.parquet import read_batches
from distill_datasets.recipes.checks import Said, check_all
from distill_datasets.recipes.loading import load_released_recipe
from distill_datasets.recipes.parsing import read_json
from distill_datasets.recipes.prompt import fields_of
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.schema import EARLIER

CHECK = "check"
_SPLIT = "test"
_MOST_ROWS = 1_000
_COLUMNS = ("id", "query", "response", "answer", "reference")
# What a few lines of Python and JavaScript tell as the package does.
_PORTABLE = (
    *("matches", "not_matches", "starts_with", "ends_with", "characters", "contains"),
    *("contains_any", "never", "calls", "never_calls"),
)


def write_check_files(
    dataset: str | Path,
    out: Path,
    *,
    config: str | None = None,
    said: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """Write `out/check/` for a student of a release, and say how many rows it has.

    Those are the release's held-out rows, at most a thousand; `said` is what the student said to
    each when it was measured, as a report's rows.jsonl has it, so that those that it answers
    wrongly are known. A dataset that is no release, or has no rows of the split test, has no such
    folder.
    """
    release = find_release(dataset, ("data", "recipe"), config)
    if release is None or not (release.path / "recipe" / "recipe.yaml").is_file():
        return 0
    recipe = load_released_recipe(release.path)
    held_out = islice(_read(release.path / "data", recipe), _MOST_ROWS)
    rows = [_row(row, recipe, (said or {}).get(row["id"])) for row in held_out]
    if not rows:
        return 0
    folder = out / CHECK
    shutil.copytree(cards_folder() / CHECK, folder, ignore=shutil.ignore_patterns("__*"))
    shutil.copyfile(cards_folder() / "gate.yaml", folder / "gate.yaml")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    most, tools = recipe.sampling.max_tokens, given_tools(recipe)
    text = json.dumps({"max_tokens": most, "tools": tools}, ensure_ascii=False, indent=1)
    (folder / "student.json").write_text(text + "\n", encoding="utf-8")
    asked = _promptfoo(recipe.name, most, tools.get(""))
    text = yaml.safe_dump(asked, sort_keys=False, allow_unicode=True, width=100)
    (folder / "promptfooconfig.yaml").write_text(text, encoding="utf-8")
    return len(rows)


def _read(data: Path, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """A row a query: of several samples the first."""
    seen = set[str]()
    for path in sorted(data.glob(f"{_SPLIT}-*.parquet")):
        for batch in read_batches(path, (*_COLUMNS, *recipe.answer_columns)):
            for row in batch.to_pylist():
                if row["id"] not in seen:
                    seen.add(row["id"])
                    yield row


def _row(row: Mapping[str, Any], recipe: Recipe, said: Mapping[str, Any] | None) -> dict[str, Any]:
    query, response = row["query"], row["response"]
    part, handle = recipe.part(query)[0], recipe.handle(query)
    taught = Said(response, "stop", row["answer"], row["reference"], part.tools is not None)
    passed = check_all(part.checks, taught)
    found = {
        "id": row["id"],
        "messages": linked(recipe.student_messages(query, row.get(EARLIER) or ())),
        **({"handle": handle} if handle else {}),
        "right": _right(part, row),
        # What says something of this row, which its expected answer passes, and can travel.
        "checks": {
            one.name: [one.kind, one.model_dump(mode="json")[one.kind]]
            for one in part.checks
            if one.kind in _PORTABLE and passed[one.name] is True
        },
        "teacher": response,
    }
    if said is not None and not _is_right(part, row, said, found["checks"]):
        found["wrong_at_release"] = True
    return found


def _is_right(
    part: Recipe, row: Mapping[str, Any], said: Mapping[str, Any], named: Collection[str]
) -> bool:
    """Whether what the student said is what the row asks for."""
    text, stop_reason = str(said["text"] or ""), said.get("stop_reason")
    if stop_reason == "length" or not text.strip():
        return False
    if part.has_form and said["answer"] != (row["reference"] or row["answer"]):
        return False
    told = Said(text, stop_reason, said["answer"], row["reference"], part.tools is not None)
    passed = check_all(part.checks, told)
    return not any(passed[name] is False for name in named)


def _right(part: Recipe, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the answer must be, where a task has one: the reference, or the teacher's answer."""
    if not part.has_form:
        return {}
    answer = row["reference"] or row["answer"]
    if part.tools:
        calls = read_calls(answer)
        return {"calls": [{"name": one.name, "arguments": one.arguments} for one in calls]}
    if "text" in fields_of(part.response):
        return _within(part, answer)
    text = part.write_response(answer, answer).strip()
    try:
        value = read_json(text)
    except (ValueError, RecursionError):
        return {"text": text}
    return {"json": value} if isinstance(value, dict | list) else {"text": text}


def _within(part: Recipe, answer: str) -> dict[str, Any]:
    """What is right of a student that says more than its answer: where that stands, and it."""
    if part.answer.pattern:
        return {"pattern": part.answer.pattern, "answer": answer}
    if part.answer.json_schema is None:
        return {"text": answer}
    if part.answer.field:
        return {"field": part.answer.field, "answer": answer}
    return {"json": read_json(answer)}


def given_tools(recipe: Recipe) -> dict[str, Any]:
    """The tools that the student is given, by the handle; of one prompt by an empty text."""
    parts = recipe.members or {"": recipe}
    return {
        handle: json.loads(part.student_tools)
        for handle, part in parts.items()
        if part.student_tools
    }


def _promptfoo(name: str, max_tokens: int, tools: Any) -> dict[str, Any]:
    config = {
        "apiBaseUrl": "{{ env.STUDENT_BASE_URL }}",
        "apiKeyEnvar": "STUDENT_API_KEY",
        "temperature": 0,
        "max_tokens": max_tokens,
        **({"tools": tools} if tools else {}),
    }
    return {
        "description": f"{name}: held-out rows",
        "prompts": ["{{ messages }}"],
        "providers": [{"id": "openai:chat:{{ env.STUDENT_MODEL }}", "config": config}],
        "defaultTest": {"assert": [{"type": "javascript", "value": "file://promptfoo.js:compare"}]},
        "tests": "file://promptfoo.js:tests",
    }
