"""Rows of a mix in a run and its release: asked once, named, and made again for nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from distill_datasets.errors import DatasetError, PriceError
from distill_datasets.evaluation.systems import read_held_out
from distill_datasets.generation.dry_run import dry_run
from distill_datasets.generation.pricing import Meter, Prices
from distill_datasets.generation.run import Generated, generate
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.shards import Share
from distill_datasets.models.sampler import Echo
from distill_datasets.releases.diff import diff, published_rows
from distill_datasets.releases.manifest import read_manifest
from distill_datasets.releases.release import Release, publish
from distill_datasets.releases.show import print_rows, show
from distill_datasets.training.data import locate, open_splits
from distill_datasets.training.settings import TrainSettings
from tests.support.openai_server import OpenAIServer
from tests.unit.recipes.test_loading import write
from tests.unit.recipes.test_mix import FIND, GENERAL, chat, mixing, user

ASKED = {"name": "beyond", "share": 0.2, "file": "beyond.jsonl", "model": "openai:echo-large"}
TRAIN = {"split": {"train": 0.5, "validation": 0.25, "test": 0.25}}
PRICE = {"prompt": 1.0, "response": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty queries, of which a share is asked of another model than the teacher."""
    home = tmp_path / "desk"
    mixing(home, [chat(number) for number in range(30)], GENERAL, ASKED, **TRAIN)
    own = [{"query": f"own {number}"} for number in range(40)]
    (home / "queries.jsonl").write_text("\n".join(map(json.dumps, own)), encoding="utf-8")
    asked = [{"text": f"beyond {number}"} for number in range(30)]
    (home / "beyond.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    return home


def mixed(made: Generated, source: str) -> list[dict[str, Any]]:
    return [row for row in made.rows.to_list() if row["source"] == source]


def rows_of(release: Release) -> list[dict[str, Any]]:
    return [row for _, rows in published_rows(release.path) for row in rows.to_pylist()]


def own_train(made: Generated) -> int:
    return sum(row["split"] == "train" and not row["source"] for row in made.rows.to_list())


def test_the_untouched_model_is_asked_without_a_prompt_or_tools_and_paid_once(
    named_server: OpenAIServer, folder: Path, tmp_path: Path
) -> None:
    made = generate(folder, teacher=Echo(), out=tmp_path / "run")
    own, asked = own_train(made), mixed(made, "beyond")
    assert len(asked) == len(mixed(made, "general")) == round(own / 3)
    assert len(named_server.bodies) == len(asked)
    for body in named_server.bodies:
        assert body["messages"] == [user(body["messages"][0]["content"])]
        assert body["model"] == "echo-large" and body["temperature"] == 0
        assert "tools" not in body and body["max_tokens"] == 512
    assert {row["teacher"] for row in asked} == {"openai:echo-large"}
    assert all(row["response"] == row["raw"] == row["query"] for row in asked)
    assert [row["source"] for row in made.rows.to_list()[:40]] == [None] * 40
    for row in mixed(made, "general"):
        assert (row["teacher"], row["reference"], row["split"]) == (None, None, "train")
        assert row["response"] == row["query"].replace("chat", "said")
    for path in (tmp_path / "run").glob("answers/*.arrow"):
        path.unlink()  # as a run that ended early
    again = generate(folder, teacher=Echo(), out=tmp_path / "run")
    assert again.rows.to_list() == made.rows.to_list()
    assert len(named_server.bodies) == len(asked)


def test_rows_of_a_mix_wait_for_places_of_their_own(
    named_server: OpenAIServer, folder: Path, tmp_path: Path
) -> None:
    settings = GenerateSettings(concurrency=1)
    made = generate(folder, teacher=Echo(delay=0.001), out=tmp_path / "run", settings=settings)
    assert made.errors == 0 and len(mixed(made, "beyond")) == len(named_server.bodies) > 3


def test_a_release_names_and_counts_the_rows_and_makes_itself_again_for_nothing(
    named_server: OpenAIServer, folder: Path, tmp_path: Path
) -> None:
    made = generate(folder, teacher=Echo(), out=tmp_path / "run")
    release = publish(tmp_path / "run")
    bought, count = len(named_server.bodies), len(mixed(made, "general"))
    general = {"name": "general", "rows": count, "share": 0.2, "from": "general.jsonl"}
    beyond = {"name": "beyond", "rows": bought, "share": 0.2, "from": "beyond.jsonl"}
    assert read_manifest(release.path)["mix"] == [
        {**general, "model": None, "license": None},
        {**beyond, "model": "openai:echo-large", "license": None},
    ]
    card = (release.path / "README.md").read_text(encoding="utf-8")
    assert f"{count} of `general`, from `general.jsonl`; {bought} of `beyond`" in card
    assert "answered by `openai:echo-large` without any prompt." in card
    kept = load_dataset(str(release.path), cache_dir=str(tmp_path / "cache"))
    assert {*kept["train"]["source"]} == {None, "general", "beyond"}
    assert {*kept["validation"]["source"], *kept["test"]["source"]} == {None}
    teacher = Echo()
    (folder / "general.jsonl").unlink()
    generate(release.path, teacher=teacher, out=tmp_path / "again")
    second = publish(tmp_path / "again")
    assert (teacher.calls, len(named_server.bodies)) == (0, bought)
    assert second.digest == release.digest
    assert rows_of(second) == rows_of(release)
    assert diff(release.path, second.path).empty
    shown = show(release.path, limit=100)
    assert [row["raw"] for row in shown if row.get("source") == "beyond"] == [
        row["query"] for row in mixed(made, "beyond")
    ]
    print_rows(shown)


def test_what_was_cut_off_or_calls_a_tool_is_rejected_with_the_reason(
    named_server: OpenAIServer, folder: Path, tmp_path: Path
) -> None:
    asked = [{"text": text} for text in ("one two three four", "short", "<tool_call>\n{}")]
    (folder / "beyond.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    keys = (folder / "recipe.yaml").read_text(encoding="utf-8")
    (folder / "recipe.yaml").write_text(keys + "sampling: {max_tokens: 3}\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="'beyond' of the mix has 3 rows"):
        made = generate(folder, teacher=Echo(), out=tmp_path / "run")
    found = {row["query"]: row["rejection"] for row in mixed(made, "beyond")}
    assert found == {
        "one two three four": "truncated",
        "short": None,
        "<tool_call>\n{}": "unknown tool",
    }
    release = publish(tmp_path / "run")
    rejected = [row for row in rows_of(release) if row.get("rejection")]
    assert {row["source"] for row in rejected} == {"beyond"}
    with pytest.warns(UserWarning, match="'beyond' of the mix has 3 rows"):
        generate(release.path, teacher=Echo(), out=tmp_path / "again")
    assert publish(tmp_path / "again").digest == release.digest


def test_a_dry_run_counts_the_rows_to_ask_and_what_was_asked(
    named_server: OpenAIServer, folder: Path, tmp_path: Path
) -> None:
    prices = Prices(date="2026-11-01", currency="USD", models={"echo": PRICE})
    with pytest.raises(PriceError, match="openai:echo-large"):
        dry_run(folder, teacher=Echo(), prices=prices)
    with pytest.raises(PriceError, match="openai:echo-large"):
        generate(folder, teacher=Echo(), out=tmp_path / "run", meter=Meter(prices))
    before = dry_run(folder, teacher=Echo())
    assert not named_server.bodies
    loads = {load.model: load.requests for load in before.loads}
    made = generate(folder, teacher=Echo(), out=tmp_path / "run")
    asked = len(mixed(made, "beyond"))
    assert loads == {"echo": 40, "openai:echo-large (mix)": asked}
    assert before.requests == 40 + asked
    after = dry_run(folder, teacher=Echo(), out=tmp_path / "run")
    assert (after.known, after.loads) == (after.requests, ())


def test_the_cost_and_the_tokens_of_the_rows_are_counted(
    named_server: OpenAIServer, folder: Path, tmp_path: Path
) -> None:
    models = {"echo": {"prompt": 0, "response": 0}, "openai:echo-large": {**PRICE, "response": 0}}
    meter = Meter(Prices(date="2026-11-01", currency="USD", models=models))
    made = generate(folder, teacher=Echo(), out=tmp_path / "run", meter=meter)
    tokens = 2 * len(mixed(made, "beyond"))  # "beyond" and a number
    assert meter.spent == pytest.approx(tokens / 1e6)
    assert read_manifest(publish(tmp_path / "run").path)["cost"]["amount"] == meter.spent


def test_a_limited_run_has_its_share_and_no_row_of_the_other_queries(
    named_server: OpenAIServer, folder: Path, tmp_path: Path
) -> None:
    own = [{"query": f"own {number}"} for number in range(20)] + [
        {"query": f"chat {number}"} for number in range(20)
    ]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, own)), encoding="utf-8")
    limited = GenerateSettings(limit=20)
    made = generate(folder, teacher=Echo(), out=tmp_path / "run", settings=limited)
    found = {row["query"] for row in mixed(made, "general")}
    assert len(found) == len(mixed(made, "beyond")) == round(own_train(made) / 3)
    assert not found & {row["query"] for row in own}


def test_parts_of_a_run_make_the_release_of_the_whole(
    named_server: OpenAIServer, folder: Path, tmp_path: Path
) -> None:
    whole = generate(folder, teacher=Echo(), out=tmp_path / "whole")
    for number in (2, 1, 3):
        share = Share(number, 3)
        part = generate(folder, teacher=Echo(), out=tmp_path / "parts", share=share)
        assert bool(mixed(part, "general")) == (number == 1)
    assert len({row["query"] for row in mixed(whole, "beyond")}) == len(mixed(whole, "beyond"))
    assert (
        publish(tmp_path / "parts", out=tmp_path / "a").digest
        == publish(tmp_path / "whole", out=tmp_path / "b").digest
    )


def test_batches_are_bought_of_the_untouched_model_too(
    named_server: OpenAIServer, folder: Path, tmp_path: Path
) -> None:
    keys = (folder / "recipe.yaml").read_text(encoding="utf-8")
    keys = keys.replace("teacher: echo\n", "teacher: openai:echo-small\n")
    (folder / "recipe.yaml").write_text(keys, encoding="utf-8")
    made = generate(folder, out=tmp_path / "run", settings=GenerateSettings(batch=True, poll=0))
    assert (made.errors, len(named_server.bodies)) == (0, 0)
    assert {row["response"] for row in mixed(made, "beyond")} == {
        row["query"] for row in mixed(made, "beyond")
    }


def test_a_row_of_a_mix_has_neither_short_prompt_nor_handle_but_its_calls(tmp_path: Path) -> None:
    home = write(tmp_path / "two", None, prompts={"[a]": "a", "[b]": "b"}, mix=[GENERAL])
    own = "".join(json.dumps({"query": f"own {number}"}) + "\n" for number in range(20))
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    write(home / "a", "Be brief.", own)
    write(home / "b", "Be kind.", own)
    spoken = {"role": "assistant", "content": "", "tool_calls": [{"function": FIND}]}
    rows = [{"messages": [user(f"Find {number}"), spoken], "tools": tools} for number in range(20)]
    (home / "general.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    generate(home, teacher=Echo(), out=tmp_path / "run")
    release = publish(tmp_path / "run")
    kept = load_dataset(str(release.path), cache_dir=str(tmp_path / "cache"))["train"].to_list()
    for row in kept:
        first, *others = row["messages"]
        if row["source"] is None:
            assert (first["content"], row["tools"]) == (row["handle"], None)
            continue
        assert (first["role"], row["handle"]) == ("user", None)
        assert others[0]["tool_calls"][0]["function"] == FIND
        assert json.loads(row["tools"]) == tools
    assert {row["handle"] for row in kept} == {"[a]", "[b]", None}
    teacher = Echo()
    generate(release.path, teacher=teacher, out=tmp_path / "again")
    assert teacher.calls == 0
    assert publish(tmp_path / "again").digest == release.digest


def test_a_row_of_a_mix_that_holds_the_prompt_is_refused(tmp_path: Path) -> None:
    told = {"role": "system", "content": "Be brief.\nAnd more."}
    rows = [{"messages": [told, *chat(number)["messages"]]} for number in range(9)]
    mixing(tmp_path / "r", rows, {**GENERAL, "share": 0.1})
    generate(tmp_path / "r", teacher=Echo(), out=tmp_path / "run")
    with pytest.raises(DatasetError, match="holds the teacher's prompt"):
        publish(tmp_path / "run")


@pytest.mark.parametrize("same_rows", [False, True])
def test_nobody_is_measured_on_a_row_of_a_mix(tmp_path: Path, same_rows: bool) -> None:
    recipe = mixing(tmp_path / "r", split={"same_rows": same_rows})
    made = generate(recipe, teacher=Echo(), out=tmp_path / "run")
    release = publish(tmp_path / "run")
    assert mixed(made, "general")
    for split in ("train", "test") if same_rows else ("train",):
        held_out = read_held_out(release.path, split=split)
        assert {row["query"] for row in held_out.rows} <= {f"q{number}" for number in range(10)}
    if same_rows:
        assert release.splits == {"train": 10 + len(mixed(made, "general")), "test": 10}


def test_an_objective_that_asks_the_teacher_leaves_the_rows_out(tmp_path: Path) -> None:
    generate(mixing(tmp_path / "r"), teacher=Echo(), out=tmp_path / "run")
    source = locate(publish(tmp_path / "run").path)
    split = open_splits(source, TrainSettings())["train"]
    own = split.own_rows()
    assert {*own.rows.with_format(None)["source"]} == {None}
    assert 0 < len(own.rows) < len(split.rows)
    assert len(own.own_rows().rows) == len(own.rows)
    lines = '{"source": "wiki", "query": "a", "response": "b"}\n'
    (tmp_path / "other.jsonl").write_text(lines, encoding="utf-8")
    other = open_splits(locate(tmp_path / "other.jsonl"), TrainSettings())["train"]
    assert other.own_rows() is other


def test_a_mix_stands_beside_conversations_of_which_every_turn_is_answered(tmp_path: Path) -> None:
    """And beside examples, a student's prompt and kept tools."""
    home = tmp_path / "chats"
    turns = [[user(f"a {number}"), user(f"b {number}")] for number in range(20)]
    lines = "".join(json.dumps({"messages": one}) + "\n" for one in turns)
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    queries = {"file": "queries.jsonl", "messages": "messages"}
    keys = {"turns": "all", "tools": "tools.json", "student": {"prompt": "[c]", "tools": "keep"}}
    write(home, "Be brief.", lines, queries=queries, mix=[GENERAL], **keys)
    (home / "tools.json").write_text(json.dumps(tools), encoding="utf-8")
    rows = [chat(number) for number in range(20)]
    (home / "general.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    generate(home, teacher=Echo(), out=tmp_path / "run")
    release = publish(tmp_path / "run")
    kept = load_dataset(str(release.path), cache_dir=str(tmp_path / "cache"))["train"].to_list()
    for row in kept:
        roles = [message["role"] for message in row["messages"]]
        if row["source"]:
            assert (roles, row["tools"]) == (["user", "assistant"], None)
            assert row["query"].startswith('[{"role": "user"')
        else:
            assert roles == ["system", *["user", "assistant"] * 2]
            assert json.loads(row["tools"])[0]["function"]["name"] == "find"
    assert {row["source"] for row in kept} == {"general", None}
    teacher = Echo()
    generate(release.path, teacher=teacher, out=tmp_path / "again")
    assert teacher.calls == 0
    assert publish(tmp_path / "again").digest == release.digest
