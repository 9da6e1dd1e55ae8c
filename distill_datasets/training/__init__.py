"""A dataset becomes a student: LoRA training that can be stopped and continued anywhere.

trainer.py       train(): the loop; settings.py: how; schedule.py: which rows when
data.py          a dataset, pinned and rendered: token ids, and loss weights on responses
student.py       what the server is asked to train, and how a batch is sent and read
objectives.py    what a step learns; soft_labels.py and on_policy.py: from probabilities
validation.py    what is measured on the way
checkpoints.py   the training folder, the best checkpoint, and when training stops
plots.py         the loss curve, and trackers such as TensorBoard
adapter.py       a trained student as a PEFT folder, and its card
sweeps.py        a training for each combination; cookbook.py: in the Cookbook's own loop
"""

import sys


def tell(*lines: str) -> None:
    """Say something of the training on standard error."""
    print("\n".join(f"train: {line}" for line in lines), file=sys.stderr)
