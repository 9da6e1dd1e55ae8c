"""A training step of the embedded server against plain `peft`: same rows, first weights and losses.

    python -m tests.benchmarks.plain_peft FOLDER [--steps 6]

FOLDER is a model's, as `save_pretrained` writes it. The server trains rows of `order` from a fresh
adapter; then a plain loop over `transformers` and `peft` loads that adapter and learns the same
batches in the same number format. Seconds are the CPU's, and on a GPU the clock's. Both have had a
step to warm up.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tinker import LoraConfig

from distill_datasets.models.references import connect
from distill_datasets.models.tinker import Connection
from distill_datasets.recipes.loading import load_recipe
from distill_datasets.recipes.queries import load_queries
from distill_datasets.schema import Message
from distill_datasets.training.data import Example, examples
from distill_datasets.training.student import Student, adam, supervised_batch

BATCH, RATE = 8, 1e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds_of(pid: int | None = None) -> float:
    """CPU seconds of this process and of another's, or what the clock says where a GPU computes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    if pid is None:
        return time.process_time()
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def batches(model: Connection, steps: int) -> list[list[Example]]:
    """Rows of `order`, each with its reference."""
    recipe = load_recipe("order")
    rows = load_queries(recipe).filter(lambda row: row["split"] == "train")
    found: list[Example] = []
    for row in rows.select(range(BATCH * (steps + 1))):
        said: Message = {"role": "assistant", "content": row["reference"]}
        messages = [*recipe.student_messages(row["query"]), said]
        found += examples((messages, None), model.renderer, "last", "order")
    return [found[start : start + BATCH] for start in range(0, len(found), BATCH)]


def timed(
    steps: Sequence[Any], learn: Callable[[Any], float], clock: Callable[[], float]
) -> tuple[float, list[float]]:
    """Seconds a step after the first, and every loss."""
    losses = [learn(steps[0])]
    began = clock()
    losses += [learn(step) for step in steps[1:]]
    return (clock() - began) / (len(steps) - 1), losses


def by_server(model: Connection, steps: Sequence[Sequence[Example]]) -> tuple[float, list[float]]:
    """The embedded server's, which saves its first adapter."""
    assert model.server is not None
    pid = model.server.pid
    student = Student.create(model, LoraConfig(rank=16, seed=0, train_unembed=False))
    student.save("first").result()
    rate = adam(RATE)
    return timed(
        steps,
        lambda step: student.learn(supervised_batch(step, "token"), rate).result().loss,
        lambda: seconds_of(pid),
    )


def by_peft(
    folder: Path, adapter: Path, dtype: torch.dtype, steps: Sequence[Sequence[Example]]
) -> tuple[float, list[float]]:
    """A plain loop's, with one forward and backward pass over a padded batch."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    network = PeftModel.from_pretrained(network, adapter, is_trainable=True).to(device)
    weights = [one for one in network.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(weights, RATE, (0.9, 0.95), 1e-8, weight_decay=0.0)

    def learn(step: Sequence[Example]) -> float:
        ids, targets, mask = _padded(step, device)
        logits = network(input_ids=ids[:, :-1], attention_mask=mask[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return timed(steps, learn, seconds_of)


def _padded(step: Sequence[Example], device: str) -> Iterator[torch.Tensor]:
    longest = max(len(one.tokens) for one in step)
    ids, targets, mask = (torch.full((len(step), longest), fill) for fill in (0, -100, 0))
    for row, one in enumerate(step):
        tokens = torch.tensor(one.tokens)
        learned = torch.tensor(one.weights) > 0
        ids[row, : len(tokens)] = tokens
        targets[row, : len(tokens)] = torch.where(learned, tokens, -100)
        mask[row, : len(tokens)] = 1
    return iter([one.to(device) for one in (ids, targets, mask)])


def compare(folder: Path, steps: int) -> None:
    """Print both, their ratio, and how far their losses are apart."""
    with tempfile.TemporaryDirectory() as store:
        model = connect(f"embedded:{folder}", store=Path(store))
        assert model.server is not None
        rows = batches(model, steps)
        ours, losses = by_server(model, rows)
        dtype = DTYPES[model.server.dtype]
        model.server.close()
        (adapter,) = {
            file.parent
            for file in islice(Path(store).rglob("sampler_weights/first/*.safetensors"), 2)
        }
        plain, theirs = by_peft(folder, adapter, dtype, rows)
    apart = max(abs(one - other) for one, other in zip(losses, theirs, strict=True))
    print(
        f"training, {BATCH} rows a step, {dtype}: server {ours:.2f} s a step, plain peft "
        f"{plain:.2f} s: {plain / ours:.2f} times; losses {losses[0]:.4f} to {losses[-1]:.4f}, at "
        f"most {apart:.4f} apart"
    )


def main() -> None:
    """Compare on one model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    compare(options.folder, options.steps)


if __name__ == "__main__":
    main()
