"""Our datasets in the Tinker Cookbook's own training loop.

`DistilledDatasetBuilder(dataset="me/language-id@v1.0.0", common_config=...)` is the
`dataset_builder` of a `tinker_cookbook.supervised.train.Config`. That loop drops nothing of what
this gives it, the last, smaller batch of an epoch included.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import chz
import tinker
from tinker_cookbook.renderers import Renderer, TrainOnWhat
from tinker_cookbook.supervised.data import conversation_to_datum
from tinker_cookbook.supervised.types import ChatDatasetBuilder, SupervisedDataset

from distill_datasets.errors import DatasetError
from distill_datasets.training.data import DatasetSplit, locate, open_split

_LOG = logging.getLogger(__name__)


@chz.chz
class DistilledDatasetBuilder(ChatDatasetBuilder):
    """A release, a folder, a file, or a Hub dataset `name@revision`, which is pinned to a commit.

    Only the last message of a conversation is learned, the response. Rows longer than
    `common_config.max_length` are left out with a warning that counts them, where the cookbook
    would cut the response off. Without a validation split there is none to evaluate on. Raises
    `DatasetError` for what can't be trained on.
    """

    dataset: str
    config: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        """The training rows, and the validation rows where there are any."""
        source = locate(self.dataset, self.config)
        splits = source.load(self.config)
        train = self._rows(open_split(source, self.config, self.train_split, splits))
        if not splits.get(self.validation_split):
            return train, None
        held_out = open_split(source, self.config, self.validation_split, splits)
        return train, self._rows(held_out)

    def _rows(self, split: DatasetSplit) -> "DistilledDataset":
        conversations, where = list(split.conversations), split.where
        renderer, longest = self.renderer, self.common_config.max_length
        kept = [
            one for one in conversations if longest is None or _length(one, renderer) <= longest
        ]
        if skipped := len(conversations) - len(kept):
            _LOG.warning("%s: %d rows are longer than %s tokens", where, skipped, longest)
        if not kept:
            raise DatasetError(
                f"{where} has no row of at most {longest} tokens, of {len(conversations)}. Raise "
                "max_length, or pick a model with a longer context."
            )
        return DistilledDataset(kept, renderer, self.common_config.batch_size)


class DistilledDataset(SupervisedDataset):
    """Conversations in batches; the last one may be smaller."""

    def __init__(self, conversations: Sequence[Any], renderer: Renderer, batch_size: int) -> None:
        """Use `DistilledDatasetBuilder`."""
        self._conversations, self._renderer = conversations, renderer
        self._batch_size = batch_size
        self._order: Sequence[int] = range(len(conversations))

    def __len__(self) -> int:
        """DistilledDataset an epoch."""
        return math.ceil(len(self._conversations) / self._batch_size)

    def get_batch(self, index: int) -> list[tinker.Datum]:
        """The batch at this place of the epoch's order; every response weighs alike."""
        places = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        return [
            conversation_to_datum(
                self._conversations[place],
                self._renderer,
                None,
                TrainOnWhat.LAST_ASSISTANT_MESSAGE,
            )
            for place in places
        ]

    def set_epoch(self, seed: int = 0) -> None:
        """Another order, decided by the seed."""
        import numpy as np

        self._order = np.random.default_rng(seed).permutation(len(self._conversations)).tolist()


def _length(conversation: Any, renderer: Renderer) -> int:
    tokens, _ = renderer.build_supervised_example(conversation, TrainOnWhat.LAST_ASSISTANT_MESSAGE)
    return int(tokens.length)
