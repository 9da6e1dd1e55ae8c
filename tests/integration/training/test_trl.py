"""TRL's own trainer on a dataset in a release's form, as it is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_model import TOOLS_CHAT, make_tiny_model

pytest.importorskip("trl", reason="TRL is in the development extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and what it loads

ARGUMENTS = [{"id": "A-1"}, {"city": "Bonn", "days": 3, "note": None}]
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}


def conversation(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    return [
        {"role": "system", "content": "[support]"},
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", **call}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
        {"role": "assistant", "content": "It is here."},
    ]


def released(folder: Path, *, tools: bool) -> Path:
    """A folder of Parquet with the columns of a release."""
    from datasets import Dataset, Features, Json, List, Value

    rows = [
        {
            "id": str(number),
            "query": "Where is it?",
            "response": "It is here.",
            "messages": conversation(arguments),
            "answer": "[]",
            "reference": None,
            "handle": "[support]",
            **({"tools": json.dumps([TOOL])} if tools else {}),
        }
        for number, arguments in enumerate(ARGUMENTS * 2)
    ]
    columns = {name: Value("string") for name in rows[0]}
    features = Features({**columns, "messages": List(Json())})
    file = folder / "data" / "train-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    Dataset.from_list(rows, features=features).to_parquet(file)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), TOOLS_CHAT)


@pytest.mark.parametrize("tools", [True, False])
def test_its_trainer_learns_a_release(tiny: Path, tools: bool, tmp_path: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    dataset = released(tmp_path / "release", tools=tools)
    rows = load_dataset(str(dataset), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[1]["messages"] == conversation(ARGUMENTS[1])
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        SFTConfig(
            str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            assistant_only_loss=True,
            logging_steps=1,
            **{"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"},
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    first = trainer.train_dataset[1]
    text = tokenizer.decode(first["input_ids"])
    assert text.startswith(f"<|im_start|>system\n{json.dumps(TOOL)}\n") == tools
    assert "<|im_start|>tool\n3<|im_end|>" in text
    learned = [token for token in first["labels"] if token != -100]
    call = {"name": "look", "arguments": ARGUMENTS[1]}
    said = f"<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>It is here.<|im_end|>"
    assert tokenizer.decode(learned) == said
    trainer.train()
    first, second, _ = trainer.state.log_history
    assert second["loss"] < first["loss"]
