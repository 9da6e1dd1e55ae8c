"""Our datasets in the Tinker Cookbook's own loop."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tinker_cookbook.renderers import TrainOnWhat
from tinker_cookbook.supervised import train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilder, ChatDatasetBuilderCommonConfig

from distill_datasets.errors import DatasetError
from distill_datasets.training.cookbook import DistilledDatasetBuilder
from tests.support.shared_server import shared


@pytest.fixture(scope="module")
def model() -> Path:
    return shared().model


def rows(folder: Path, **splits: int) -> Path:
    folder.mkdir()
    for split, count in splits.items():
        lines = [
            json.dumps({"query": f"What language is this? {split} {n}", "response": "Final Answer"})
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def common(model: Path, max_length: int = 128, **how: Any) -> ChatDatasetBuilderCommonConfig:
    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=str(model),
        renderer_name="qwen3_instruct",
        max_length=max_length,
        batch_size=4,
        **how,
    )


def builder(model: Path, dataset: Path, **options: Any) -> DistilledDatasetBuilder:
    shared_config = common(model, options.pop("max_length", 128))
    return DistilledDatasetBuilder(common_config=shared_config, dataset=str(dataset), **options)


def test_every_row_of_an_epoch_is_in_exactly_one_batch(model: Path, tmp_path: Path) -> None:
    made, held_out = builder(model, rows(tmp_path / "data", train=10, validation=3))()
    assert held_out is not None and len(held_out) == 1
    orders = []
    for epoch in range(2):
        made.set_epoch(epoch)
        batches = [made.get_batch(index) for index in range(len(made))]
        assert [len(batch) for batch in batches] == [4, 4, 2]
        orders.append([tuple(d.model_input.to_ints()) for batch in batches for d in batch])
    assert len(set(orders[0])) == 10
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_only_the_response_is_learned(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made, _ = builder(model, rows(tmp_path / "data", train=1))()
    (datum,) = made.get_batch(0)
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(targets[weights > 0]) == "Final Answer<|im_end|>"


def test_every_turn_of_the_assistant_is_learned_where_that_is_asked_for(
    model: Path, tmp_path: Path
) -> None:
    """A call as well as words; the tools are read."""
    from transformers import AutoTokenizer

    call = {"type": "function", "function": {"name": "look", "arguments": {"id": "A-1"}}}
    messages = [
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Here."},
    ]
    row = {"messages": messages, "tools": [{"name": "look", "parameters": {"type": "object"}}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    made, _ = builder(model, tmp_path / "train.jsonl", turns="all", max_length=2048)()
    tokenizer, learned = AutoTokenizer.from_pretrained(model), ""
    for datum in made.get_batch(0):
        weights = datum.loss_fn_inputs["weights"].to_numpy()
        assert weights.sum() == pytest.approx(1.0)
        assert '"name": "look"' in tokenizer.decode(datum.model_input.to_ints())
        learned += tokenizer.decode(datum.loss_fn_inputs["target_tokens"].to_numpy()[weights > 0])
    said = '<tool_call>\n{"name": "look", "arguments": {"id": "A-1"}}\n</tool_call>'
    assert learned == f"{said}<|im_end|>Here.<|im_end|>"


def test_without_a_validation_split_there_is_none(model: Path, tmp_path: Path) -> None:
    assert builder(model, rows(tmp_path / "data", train=2))()[1] is None


def test_rows_that_are_too_long_are_left_out_and_counted(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = rows(tmp_path / "data", train=3)
    long = json.dumps({"query": "blau " * 300, "response": "Final Answer"})
    (folder / "train.jsonl").write_text((folder / "train.jsonl").read_text() + "\n" + long)
    made, _ = builder(model, folder)()
    assert sum(len(made.get_batch(index)) for index in range(len(made))) == 3
    assert "1 rows are longer than 128 tokens" in caplog.text
    with pytest.raises(DatasetError, match="has no row of at most 5 tokens: the shortest of 4 has"):
        builder(model, folder, max_length=5)()


def test_a_split_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no split 'test'; found \\['train'\\]"):
        builder(model, rows(tmp_path / "data", train=2), train_split="test")()


def losses_of(log: Path, learned: ChatDatasetBuilder, **settings: Any) -> list[float]:
    """Of each step of the cookbook's own loop."""
    config = train.Config(
        log_path=str(log),
        model_name=str(shared().model),
        recipe_name="test",
        renderer_name="qwen3_instruct",
        dataset_builder=learned,
        learning_rate=5e-3,
        lora_rank=8,
        base_url=shared().server.url,
        eval_every=0,
        infrequent_eval_every=0,
        **settings,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_API_KEY", shared().server.api_key)
        asyncio.run(train.main(config))
    metrics = [json.loads(line) for line in (log / "metrics.jsonl").open()]
    return [line["train_mean_nll"] for line in metrics if "train_mean_nll" in line]


@pytest.mark.filterwarnings("ignore")
def test_the_cookbooks_loop_trains_on_it(model: Path, tmp_path: Path) -> None:
    learned = builder(model, rows(tmp_path / "data", train=10, validation=2))
    losses = losses_of(tmp_path / "log", learned, num_epochs=3, save_every=0)
    assert len(losses) == 9
    assert losses[-1] < losses[0] / 2


@pytest.mark.filterwarnings("ignore")
def test_the_cookbooks_own_training_runs_unchanged(model: Path, tmp_path: Path) -> None:
    """On rows that it reads itself, and with checkpoints."""
    turns = [{"role": "user", "content": "What language is this?"}]
    answer = {"role": "assistant", "content": "Final Answer: en"}
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join([json.dumps({"messages": [*turns, answer]})] * 8))
    learned = FromConversationFileBuilder(
        common_config=common(model, train_on_what=TrainOnWhat.LAST_ASSISTANT_MESSAGE),
        file_path=str(data),
    )
    losses = losses_of(tmp_path / "log", learned, num_epochs=4, save_every=4)
    assert losses[-1] < losses[0] / 2
    saved = [json.loads(line) for line in (tmp_path / "log/checkpoints.jsonl").open()]
    assert saved[-1]["sampler_path"].startswith("tinker://")
