"""Our datasets in the Tinker Cookbook's own training loop.

`DistilledDatasetBuilder(dataset="me/language-id@v1.0.0", common_config=...)` is the
`dataset_builder` of a `tinker_cookbook.supervised.train.Config`. That loop drops nothing of what
this gives it, the last, smaller batch of an epoch included.
"""

import logging
import math
from collections.abc import Sequence

import chz
import tinker
from tinker_cookbook.supervised.common import datum_from_model_input_weights
from tinker_cookbook.supervised.types import ChatDatasetBuilder, SupervisedDataset

from distill_datasets.models.renderers import open_renderer
from distill_datasets.training.data import (
    DatasetSplit,
    Example,
    examples,
    locate,
    open_split,
    require_turns,
)
from distill_datasets.training.settings import Turns

_LOG = logging.getLogger(__name__)


@chz.chz
class DistilledDatasetBuilder(ChatDatasetBuilder):
    """A release, a folder, a file, or a Hub dataset `name@revision`, which is pinned to a commit.

    The last message of a conversation is learned, the response, or with `turns` "all" every
    message of the assistant; `common_config.train_on_what` is not asked. Rows longer than
    `common_config.max_length` are left out with a warning that counts them, where the cookbook
    would cut the response off. Without a validation split there is none to evaluate on. Raises
    `DatasetError` for what can't be trained on.
    """

    dataset: str
    config: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    turns: Turns = "last"

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        """The training rows, and the validation rows where there are any."""
        source = locate(self.dataset, self.config)
        require_turns(self.turns, source.turns, repr(source.reference))
        splits = source.load()
        train = self._rows(open_split(source, self.train_split, splits))
        if not splits.get(self.validation_split):
            return train, None
        held_out = open_split(source, self.validation_split, splits)
        return train, self._rows(held_out)

    def _rows(self, split: DatasetSplit) -> "DistilledDataset":
        where, longest = split.where, self.common_config.max_length or math.inf
        renderer = open_renderer(self.common_config.renderer_name, self.tokenizer)
        rows = [
            examples(one, renderer, self.turns, f"{where}, row {place}")
            for place, one in enumerate(split.conversations)
        ]
        kept = split.short_enough([max(len(e.tokens) for e in row) for row in rows], longest)
        if skipped := len(rows) - len(kept):
            _LOG.warning("%s: %d rows are longer than %s tokens", where, skipped, longest)
        return DistilledDataset([rows[place] for place in kept], self.common_config.batch_size)


class DistilledDataset(SupervisedDataset):
    """Rows in batches; the last one may be smaller."""

    def __init__(self, rows: Sequence[Sequence[Example]], batch_size: int) -> None:
        """Use `DistilledDatasetBuilder`."""
        self._rows, self._batch_size = rows, batch_size
        self._order: Sequence[int] = range(len(rows))

    def __len__(self) -> int:
        """Batches an epoch."""
        return math.ceil(len(self._rows) / self._batch_size)

    def get_batch(self, index: int) -> list[tinker.Datum]:
        """The batch at this place of the epoch's order; every example weighs alike.

        A row is one, or one a turn where the renderer writes past turns in another way.
        """
        import torch

        places = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        return [
            datum_from_model_input_weights(
                tinker.ModelInput.from_ints(list(one.tokens)),
                torch.tensor(one.weights),
                reduction="mean",
            )
            for place in places
            for one in self._rows[place]
        ]

    def set_epoch(self, seed: int = 0) -> None:
        """Another order, decided by the seed."""
        import numpy as np

        self._order = np.random.default_rng(seed).permutation(len(self._rows)).tolist()
