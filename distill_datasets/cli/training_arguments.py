"""The settings of a training on the command line: one flag each."""

import argparse
from collections.abc import Collection
from typing import Any

from distill_datasets.training.objective_settings import ObjectiveSettings
from distill_datasets.training.settings import TrainSettings

# What a flag takes and says, by the setting's name; a tuple is the choices.
_GROUPS: dict[str, dict[str, tuple[Any, str]]] = {
    "size": {
        "preset": (("poc", "debug", "production"), "8 rows and 100 steps, 10 and 50, or all rows"),
        "epochs": (int, "passes over the rows (default: two, or as many as make 60 steps)"),
        "batch_size": (int, "rows a step (default: 32)"),
        "batch_tokens": (int, "tokens a step, rows of similar length together"),
        "max_length": (int, "tokens a row; longer rows are left out and counted"),
        "max_rows": (int, "at most so many rows, chosen by the seed"),
        "max_steps": (int, "at most so many steps"),
    },
    "learning": {
        "learning_rate": (float, "(default: the model's)"),
        "schedule": (("linear", "cosine", "constant"), "how it falls (default: linear)"),
        "warmup_steps": (int, "over which it rises first"),
        "weight_decay": (float, "(default: none)"),
        "grad_clip": (float, "the gradient's greatest norm (default: any)"),
        "normalization": (("token", "example"), "what weighs alike in the loss (default: token)"),
        "seed": (int, "of the rows' order and the first weights"),
        "rank": (int, "of the LoRA adapter (default: 32)"),
        "lora_seed": (int, "of the first weights alone"),
    },
    "stopping and keeping": {
        "evaluate_every": (int, "steps between measurements (default: ten a run)"),
        "select": (str, "what the best checkpoint is best in (default: validation_loss)"),
        "patience": (int, "stop after so many measurements without an improvement"),
        "min_improvement": (float, "the least that counts as one"),
        "save_every": (int, "steps between checkpoints that are kept (default: 100)"),
        "rolling_every": (int, "steps between states that replace each other (default: 20)"),
        "ttl_seconds": (int, "after which a server deletes them, 0 for never"),
    },
    "speed and reporting": {
        "ahead": (int, "batches queued behind the one that is learned (default: 2)"),
        "track": (("wandb", "trackio", "tensorboard"), "where else the numbers go"),
        "price_per_million": (float, "of training tokens, to log what is spent"),
    },
    "the dataset": {
        "renderer": (str, "of the conversations (default: the model's)"),
        "config": (str, "a configuration of the dataset"),
        "train_split": (str, "(default: train)"),
        "validation_split": (str, "(default: validation)"),
    },
}
_ADAPTED = ("attention", "mlp", "unembed")


def add_training_arguments(
    parser: argparse.ArgumentParser, *, several: Collection[str] = ()
) -> None:
    """A flag for each setting; what isn't given is not in the way of a preset.

    The settings named by `several` take more than one value, for a grid.
    """
    for title, flags in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name, (kind, text) in flags.items():
            takes: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            if name in several:
                takes["nargs"] = "+"
            group.add_argument(f"--{name.replace('_', '-')}", help=text, **takes)
        if title == "learning":
            for part in _ADAPTED:
                group.add_argument(
                    f"--no-{part}",
                    dest=f"train_{part}",
                    action="store_const",
                    const=False,
                    help="leave it as it is",
                )
        if title == "stopping and keeping":
            group.add_argument(
                "--no-internalisation",
                dest="internalisation",
                action="store_const",
                const=False,
                help="don't ask base and teacher how likely they find the validation answers",
            )


def read_settings(
    options: argparse.Namespace, objective: ObjectiveSettings | None = None
) -> TrainSettings:
    """The settings that were given; the rest is left to the defaults."""
    names = [name for flags in _GROUPS.values() for name in flags]
    given = {
        name: getattr(options, name)
        for name in [*names, *(f"train_{part}" for part in _ADAPTED), "internalisation"]
        if getattr(options, name) is not None
    }
    return TrainSettings(**given, objective=objective or ObjectiveSettings())
