"""TRL's own trainer on a release of conversations and calls, as `datasets` loads it."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill_datasets import generate, load_recipe, publish
from distill_datasets.conversations import read_messages, to_text
from tests.support.conversations import TOOLS, Talker, said, talks, user
from tests.support.tiny_model import TOOLS_CHAT, make_tiny_model

pytest.importorskip("trl", reason="TRL is in the development extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and what it loads

BEFORE: list[Any] = [
    user("Look up A-7."),
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "find_order", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": "lost"},
    said("It is lost."),
]
CONVERSATIONS = [[*BEFORE, user("A-1")], [user("hello")], [user("A-2")], [user("so long")]]


def released(folder: Path, *, tools: str) -> Path:
    recipe = talks(folder / "desk", CONVERSATIONS, tools=True, student={"tools": tools})
    generate(load_recipe(recipe), teacher=Talker(), out=folder / "run")
    return publish(folder / "run").path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), TOOLS_CHAT)


@pytest.mark.parametrize("tools", ["keep", "drop"])
def test_its_trainer_learns_a_release(tiny: Path, tools: str, tmp_path: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    dataset = released(tmp_path, tools=tools)
    rows = load_dataset(str(dataset), split="train", cache_dir=str(tmp_path / "cache"))
    assert ("tools" in rows.column_names) == (tools == "keep")
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
    place = rows["query"][:].index(to_text(read_messages(CONVERSATIONS[0])))
    first = trainer.train_dataset[place]
    text = tokenizer.decode(first["input_ids"])
    assert text.startswith(f"<|im_start|>system\n{json.dumps(TOOLS[0])}\n") == (tools == "keep")
    assert "<|im_start|>tool\nlost<|im_end|>" in text
    learned = [token for token in first["labels"] if token != -100]
    assert tokenizer.decode(learned) == (
        '<tool_call>\n{"name": "find_order", "arguments": {}}\n</tool_call><|im_end|>'
        "It is lost.<|im_end|>"
        'Let me look.<tool_call>\n{"name": "find_order", "arguments": {"id": "A-1"}}\n</tool_call>'
        "<|im_end|>"
    )
    trainer.train()
    first, second, _ = trainer.state.log_history
    assert second["loss"] < first["loss"]
