"""GGUF files and adapters as model folders, against the folders that they were made of."""

import io
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_datasets.embedded import conversion
from distill_datasets.embedded.conversion import SPLITS
from distill_datasets.errors import ModelError
from distill_datasets.models.references import find_model
from distill_datasets.training.adapter import AdapterBase, Trained, find_base
from tests.support.tiny_model import CHAT, TEXT, make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
TEXTS = [*TEXT.splitlines(), "It's 1234.5!\n\n  naïve é <think>日本語</think><|im_end|> x\t", ""]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{one}_proj": f"attn_{one}" for one in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{one}_norm": f"attn_{one}_norm" for one in "qk"},
    **{f"mlp.{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("sources") / "tiny")


def write_gguf(
    file: Path, folder: Path, *, architecture: str = "qwen3", pre: str = "qwen2", **more: Any
) -> Path:
    """A model folder as a GGUF file, its weights as they are."""
    gguf = pytest.importorskip("gguf")
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    known = json.loads((folder / "tokenizer.json").read_text())
    added = {one["content"]: 3 if one["special"] else 4 for one in known["added_tokens"]}
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    blank = [f"[PAD{number}]" for number in range(len(tokens), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + blank)
    writer.add_token_types([added.get(one, 1) for one in tokens] + [5] * len(blank))
    writer.add_token_merges([" ".join(pair) for pair in known["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHAT)
    for name, value in more.items():
        writer.add_string(name.replace("__", "."), value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        path, kind = name.rsplit(".", 1)
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
        mapped = f"blk.{block[1]}.{NAMES[block[2]]}" if block else NAMES[path]
        writer.add_tensor(f"{mapped}.{kind}", tensor.float().numpy())
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return file


def logits(folder: Path) -> torch.Tensor:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return network(input_ids=torch.arange(5, 25).unsqueeze(0)).logits


def test_a_student_of_a_gguf_file_leaves_over_the_folder_that_is_made_of_it(
    tiny: Path, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny)
    trained = Trained(tmp_path, {"student": f"embedded:{file}"}, {})
    assert find_base(trained, "base/") == AdapterBase(None, find_model(str(file)))
    with pytest.raises(ModelError, match=r"tiny\.gguf', and others lack it.*--base-model"):
        find_base(trained, None)


def test_a_gguf_file_is_the_folder_that_it_was_made_of(tiny: Path, tmp_path: Path) -> None:
    found = find_model(str(write_gguf(tmp_path / "tiny.gguf", tiny)))
    assert torch.equal(logits(found), logits(tiny))
    own, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (found, tiny))
    for text in TEXTS:
        assert own(text).input_ids == theirs(text).input_ids
        assert own.decode(own(text).input_ids) == theirs.decode(theirs(text).input_ids)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "all_special_ids"):
        assert getattr(own, name) == getattr(theirs, name)
    turns = [{"role": "user", "content": "Hi"}]
    asked = {"add_generation_prompt": True, "return_dict": False}
    assert own.apply_chat_template(turns, **asked) == theirs.apply_chat_template(turns, **asked)


def test_a_llamas_rotating_pairs_are_put_where_the_folder_has_them(
    tiny: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    known = json.loads((tiny / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    sizes = {name: known[name] for name in (*kept, "num_attention_heads", "num_key_value_heads")}
    folder = tmp_path / "llama"
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    network = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    network.save_pretrained(folder)
    expected = logits(folder)
    for name, tensor in (weights := network.state_dict()).items():
        if "q_proj" in name or "k_proj" in name:
            halves = tensor.reshape(-1, 2, known["head_dim"] // 2, tensor.shape[-1])
            weights[name] = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors")
    file = write_gguf(tmp_path / "llama.gguf", folder, architecture="llama", pre="smollm")
    assert torch.equal(logits(find_model(str(file))), expected)


def test_numbers_are_cut_as_the_tokenizer_of_the_file_cuts_them(tiny: Path, tmp_path: Path) -> None:
    def cuts(pre: str) -> list[str]:
        file = write_gguf(tmp_path / f"{pre}.gguf", tiny, pre=pre)
        core = AutoTokenizer.from_pretrained(find_model(str(file))).backend_tokenizer
        return [text for text, _ in core.pre_tokenizer.pre_tokenize_str("a 12345")]

    assert {pre: cuts(pre) for pre in SPLITS} == {
        "gpt-2": ["a", "Ġ12345"],
        "smollm": ["a", "Ġ", "1", "2", "3", "4", "5"],
        "llama-bpe": ["a", "Ġ", "123", "45"],
        "qwen2": ["a", "Ġ", "1", "2", "3", "4", "5"],
    }


def test_a_file_is_converted_once_and_again_when_it_changes(tiny: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny)
    first = find_model(str(file))
    (first / "mark").touch()
    assert find_model(str(file)) == first
    assert (first / "mark").exists()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # in the weights, of the same size
    file.write_bytes(content)
    assert find_model(str(file)) != first


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architecture": "mamba"}, "the architecture 'mamba' (known: llama, qwen2, qwen3)"),
        ({"pre": "tekken"}, "a tokenizer of the kind 'gpt2', 'tekken'"),
        ({"qwen3__rope__scaling__type": "yarn"}, "scaled rotary positions"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(
    changed: dict[str, Any], said: str, tiny: Path, tmp_path: Path, cache: Path
) -> None:
    file = write_gguf(tmp_path / "odd.gguf", tiny, **changed)
    with pytest.raises(ModelError, match=re.escape(said)):
        find_model(str(file))
    assert not list((cache / "distill-datasets").rglob("config.json"))


@pytest.mark.parametrize("kept", [0, 3, 24, 400, -200])
def test_a_torn_file_is_named(kept: int, tiny: Path, tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf", tiny).read_bytes()
    (tmp_path / "torn.gguf").write_bytes(whole[:kept])
    with pytest.raises(ModelError, match=r"torn\.gguf' can't be read as a GGUF model"):
        find_model(str(tmp_path / "torn.gguf"))


def test_who_comes_second_waits_for_what_the_first_makes_and_uses_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, written = write_gguf(tmp_path / "twice.gguf", tiny), list[Path]()
    write, begun, told = conversion._write_gguf, Event(), Event()

    class Told(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith(f"Waiting for another process, which makes {str(file)!r}"):
                told.set()
            return len(text)

    def slow(folder: Path, *content: Any) -> None:
        written.append(folder)
        begun.set()
        assert told.wait(60)
        write(folder, *content)

    monkeypatch.setattr(conversion, "_write_gguf", slow)
    monkeypatch.setattr(sys, "stderr", Told())
    with ThreadPoolExecutor() as pool:
        first = pool.submit(find_model, str(file))
        assert begun.wait(60)
        second = pool.submit(find_model, str(file))
        assert first.result(60) == second.result(60)
    assert len(written) == 1


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    """An adapter of attention and output, as PEFT saves it; its logits are beside it."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    targets = ["q_proj", "down_proj", "lm_head"]
    network = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    folder = tmp_path / "adapter"
    network.save_pretrained(folder, save_embedding_layers=False)
    with torch.inference_mode():
        expected = network(input_ids=torch.arange(5, 25).unsqueeze(0)).logits
    save_file({"logits": expected}, tmp_path / "expected.safetensors")
    return folder


def test_an_adapter_is_served_on_its_base(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    found = find_model(str(adapter))
    expected = load_file(tmp_path / "expected.safetensors")["logits"]
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=1e-4)
    assert (logits(tiny) - expected).abs().max() > 0.1
    assert find_model(str(adapter)) == found
    own, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (found, tiny))
    assert own(TEXTS[0]).input_ids == theirs(TEXTS[0]).input_ids


def test_an_adapter_whose_base_has_another_template_is_made_anew(adapter: Path, tiny: Path) -> None:
    found, template = find_model(str(adapter)), tiny / "other.jinja"
    template.write_text("{{ messages }}")
    try:
        assert (find_model(str(adapter)) / template.name).is_file()
    finally:
        template.unlink()
    assert find_model(str(adapter)) == found


def configure(adapter: Path, **changed: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"use_dora": True}, r"\['use_dora'\], which can't be applied"),
        ({"bias": "all"}, "which can't be applied"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"r": 0}, "found r=0"),
        ({"lora_alpha": "6"}, "lora_alpha='6'"),
        ({"base_model_name_or_path": "nobody/none"}, "neither a folder here nor a model in"),
        ({"base_model_name_or_path": None}, "neither a folder here nor a model in"),
    ],
)
def test_what_cannot_be_applied_is_said(changed: dict[str, Any], said: str, adapter: Path) -> None:
    configure(adapter, **changed)
    with pytest.raises(ModelError, match=said):
        find_model(str(adapter))


def test_an_adapter_of_another_model_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "base_model.model.embed.weight": torch.ones(1)}, file)
    with pytest.raises(ModelError, match=r"found \['base_model.model.embed.weight'\]"):
        find_model(str(adapter))
    key = "base_model.model.lm_head.lora_B.weight"
    save_file({**weights, key: torch.ones(7, 4)}, file)
    with pytest.raises(ModelError, match="it was trained on another model"):
        find_model(str(adapter))
    save_file({key.replace("lm_head", "far"): one for key, one in weights.items()}, file)
    with pytest.raises(ModelError, match=r"lacks: \['far'\]"):
        find_model(str(adapter))
