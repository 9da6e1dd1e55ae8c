"""What an adapter's card says of its base, as far as files of JSON tell."""

import json
from pathlib import Path

import pytest

from distill_datasets.training.adapter import (
    ADAPTER_CONFIG,
    INCLUDED,
    AdapterBase,
    tied_and_adapted,
)


def _write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_an_adapter_of_one_of_two_tied_embeddings_is_told_wherever_its_base_lies(
    where: str, tmp_path: Path
) -> None:
    """Merged as it is, such an adapter changes the other embedding too."""
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    known = AdapterBase("org/base", base)
    _write(adapter / ADAPTER_CONFIG, {"target_modules": ["q_proj", "lm_head"]})
    config = (base if where == "base" else adapter / INCLUDED) / "config.json"
    _write(config, {"tie_word_embeddings": True})
    assert tied_and_adapted(adapter, known)
    _write(config, {"tie_word_embeddings": False})
    assert not tied_and_adapted(adapter, known)
    _write(config, {"tie_word_embeddings": True})
    _write(adapter / ADAPTER_CONFIG, {"target_modules": ["q_proj"]})
    assert not tied_and_adapted(adapter, known)
