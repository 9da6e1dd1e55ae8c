"""What the demo's student owes to its teacher, and to the pocket model under it.

    python -m tests.benchmarks.controls [--run runs/demo]

Trains two controls exactly as the run's student was trained, and prints them beside it: one on the
same rows with their responses shuffled, one over random weights of the pocket model's shape.
"""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from distill_datasets import TrainSettings, measure, train
from distill_datasets.files import pocket_folder
from distill_datasets.training.settings import ObjectiveSettings


def shuffled(release: Path, folder: Path) -> Path:
    """The release's train split with every response moved to another row; no messages."""
    rows = load_dataset(str(release), split="train")
    responses = rows["response"][:]
    random.Random(0).shuffle(responses)
    folder.mkdir()
    Dataset.from_dict({"query": rows["query"][:], "response": responses}).to_parquet(
        folder / "train.parquet"
    )
    return folder


def random_weights(folder: Path) -> Path:
    """The pocket model's folder with freshly drawn weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    names = shutil.ignore_patterns("*.py", "__pycache__", "corpus", "model.safetensors")
    shutil.copytree(pocket_folder(), folder, ignore=names)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def accuracy(report: dict[str, Any], system: str) -> str:
    """A system's accuracy with its interval, as text."""
    found = report["systems"][system]["metrics"]["accuracy"]
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def main() -> None:
    """Train the controls, measure them on the run's test split, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    run = parser.parse_args().run
    config = json.loads((run / "train/config.json").read_text())
    settings = {**config["settings"], "learning_rate": config["learning_rate"]}
    settings["renderer"] = config["renderer"]
    settings["objective"] = ObjectiveSettings(**settings.get("objective", {}))
    same = TrainSettings(**settings)
    lines = {
        system: accuracy(json.loads((run / "report.json").read_text()), system)
        for system in ("base", "teacher", "student")
    }
    with tempfile.TemporaryDirectory() as scratch:
        controls = {
            "shuffled labels": (shuffled(run / "release", Path(scratch) / "rows"), "pocket"),
            "random weights": (
                run / "release",
                f"embedded:{random_weights(Path(scratch) / 'model')}",
            ),
        }
        for name, (rows, model) in controls.items():
            folder = Path(scratch) / name
            train(rows, student=model, out=folder / "train", settings=same)
            measured = measure(run / "release", student=folder / "train", out=folder)
            lines[name] = accuracy(dict(measured.data), "student")
    print(f"{'system':<18}accuracy on the test split")
    for name, line in lines.items():
        print(f"{name:<18}{line}")


if __name__ == "__main__":
    main()
