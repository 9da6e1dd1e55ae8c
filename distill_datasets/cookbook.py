"""Our datasets in the Tinker Cookbook's own training loop.

`DistilledDatasetBuilder(dataset="me/language-id@v1.0.0", common_config=...)` is the
`dataset_builder` of a `tinker_cookbook.supervised.train.Config`. That loop drops nothing of what
this gives it, the last, smaller batch of an epoch included.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import chz
import tinker
from tinker_cookbook.renderers import Renderer, TrainOnWhat
from tinker_cookbook.supervised.data import conversation_to_datum
from tinker_cookbook.supervised.types import ChatDatasetBuilder, SupervisedDataset

from distill_datasets.errors import DatasetError
from distill_datasets.schema import conversation_reader
from distill_datasets.trainset import Source, locate

if TYPE_CHECKING:
    from datasets import Dataset

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
        if self.train_split not in splits:
            raise DatasetError(
                f"{self.dataset!r} has no split {self.train_split!r}; found "
                f"{sorted(map(str, splits))}. Name one of them as train_split."
            )
        train = self._rows(source, splits, self.train_split)
        if self.validation_split not in splits or not len(splits[self.validation_split]):
            return train, None
        return train, self._rows(source, splits, self.validation_split)

    def _rows(self, source: Source, splits: Mapping[str, "Dataset"], name: str) -> "Batches":
        rows = splits[name]
        where = f"The split {name!r} of {source.reference!r}"
        read = conversation_reader(rows.column_names, where)
        conversations = [read(row) for row in rows]
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
        return Batches(kept, renderer, self.common_config.batch_size)


class Batches(SupervisedDataset):
    """Conversations in batches; the last one may be smaller."""

    def __init__(self, conversations: Sequence[Any], renderer: Renderer, batch_size: int) -> None:
        """Use `DistilledDatasetBuilder`."""
        self._conversations, self._renderer = conversations, renderer
        self._batch_size = batch_size
        self._order: Sequence[int] = range(len(conversations))

    def __len__(self) -> int:
        """Batches an epoch."""
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
