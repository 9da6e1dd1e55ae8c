"""Prompt distillation: a long prompt becomes a dataset, the dataset a model without the prompt.

Beside the folders lies what all of them use:

errors.py          all that is raised on purpose
schema.py          the columns of answers and releases
conversations.py   chats as text, and the calls of tools in an answer
files.py           files and folders that change all at once; parquet.py: those of rows
settings.py        a setting: its default, range and help in one place
statistics.py      intervals, tests and sample sizes
progress.py        the live line of long work
tables.py          tables and numbers as text and HTML; drawing.py: as SVG
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 11):  # noqa: UP036 (a clone on the path needs no installer)
    raise ImportError(
        f"distill-datasets needs Python 3.11 or newer; found {sys.version.split()[0]}"
    )

if TYPE_CHECKING:
    from distill_datasets.errors import DistillError as DistillError
    from distill_datasets.evaluation.report import measure as measure
    from distill_datasets.evaluation.settings import MeasureSettings as MeasureSettings
    from distill_datasets.generation.run import generate as generate
    from distill_datasets.generation.settings import GenerateSettings as GenerateSettings
    from distill_datasets.models.references import open_sampler as open_sampler
    from distill_datasets.models.sampler import Echo as Echo
    from distill_datasets.models.sampler import Sampler as Sampler
    from distill_datasets.models.sampler import Sampling as Sampling
    from distill_datasets.recipes.loading import load_recipe as load_recipe
    from distill_datasets.recipes.recipe import Recipe as Recipe
    from distill_datasets.releases.release import publish as publish
    from distill_datasets.training.cookbook import (
        DistilledDatasetBuilder as DistilledDatasetBuilder,
    )
    from distill_datasets.training.settings import TrainSettings as TrainSettings
    from distill_datasets.training.trainer import train as train

__version__ = "0.1.0"

_HOMES = {
    "DistillError": "errors",
    "DistilledDatasetBuilder": "training.cookbook",
    "Echo": "models.sampler",
    "GenerateSettings": "generation.settings",
    "MeasureSettings": "evaluation.settings",
    "Recipe": "recipes.recipe",
    "Sampler": "models.sampler",
    "Sampling": "models.sampler",
    "TrainSettings": "training.settings",
    "generate": "generation.run",
    "load_recipe": "recipes.loading",
    "measure": "evaluation.report",
    "open_sampler": "models.references",
    "publish": "releases.release",
    "train": "training.trainer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: `import distill_datasets` costs milliseconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
