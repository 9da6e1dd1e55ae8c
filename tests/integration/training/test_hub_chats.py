"""A chat dataset as there are many on the Hub, trained on as it is, on the pocket model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.embedded.process import launch
from distill_datasets.files import pocket_folder
from distill_datasets.models import references
from distill_datasets.training.trainer import TrainSettings, train
from tests.support.training_runs import metrics

pytestmark = pytest.mark.usefixtures("undrawn")

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "Says the weather.", "parameters": PARAMETERS}
CALL = {
    "id": "call_9",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Bonn"}'},
    "index": 0,
}
OPENAI = [
    {"role": "system", "content": "Be brief.", "name": None},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "dry?"}],
    },
    {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_9", "name": "weather", "content": '{"rain": 0}'},
    {"role": "assistant", "content": "It is dry.", "tool_calls": None, "annotations": []},
    {"role": "user", "content": "Thanks!", "tool_calls": []},
    {"role": "assistant", "content": "You are welcome.", "weight": 1},
]
SHAREGPT = [
    {"from": "human", "value": "Is it dry?"},
    {"from": "gpt", "value": "Where?"},
    {"from": "human", "value": "In Bonn."},
    {"from": "gpt", "value": "It is dry."},
]


@pytest.fixture(scope="module", autouse=True)
def _one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For every training here, which would each start its own."""
    store = tmp_path_factory.mktemp("store")
    server = launch(pocket_folder(), name="pocket", store=store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "_server", lambda name, folder, store, dtype: server)
        yield
    server.close()


def as_parquet(folder: Path) -> Path:
    """Its columns have fixed keys, which Arrow fills in with null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for number in range(6):
        system, _, *rest = OPENAI
        asked = {"role": "user", "content": f"Is it dry? {number}"}
        tools = [{"type": "function", "function": TOOL}]
        plain = {"messages": [asked, {"role": "assistant", "content": "Where?"}], "tools": None}
        equipped = {"messages": [system, asked, *rest], "tools": tools}
        rows.append({"id": number, "lang": "en", **(equipped if number % 2 else plain)})
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def as_json(folder: Path) -> Path:
    """Each row has the keys that it needs, and tools as text."""
    tools = json.dumps([TOOL])
    rows = [
        {"messages": OPENAI, "tools": tools, "score": 0.5},
        {"messages": OPENAI[:2] + OPENAI[-1:]},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    return folder


def as_sharegpt(folder: Path) -> Path:
    (folder / "train.json").write_text(json.dumps([{"conversations": SHAREGPT}] * 6))
    return folder


@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize("write", [as_parquet, as_json, as_sharegpt])
def test_a_chat_dataset_is_trained_on_as_it_is(write: Any, turns: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    settings = TrainSettings(max_steps=2, batch_size=6, rank=4, turns=turns)
    dataset = write(tmp_path / "data")
    training = train(dataset, student="pocket", out=tmp_path / "out", settings=settings)
    assert (training.rows, training.skipped) == (6, 0)
    losses = metrics(training)
    assert losses[2] < losses[1]
