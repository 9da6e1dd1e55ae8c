"""Rows of a recipe's mix: drawn, and asked of the untouched model where they have no answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.conversations import has_calls
from distill_datasets.generation.batch_api import buy_in_batches
from distill_datasets.generation.cache import Journal
from distill_datasets.generation.client import CachedClient
from distill_datasets.generation.pricing import Meter
from distill_datasets.generation.rows import MIX_FILES, ask
from distill_datasets.generation.settings import GenerateSettings
from distill_datasets.generation.shards import Share
from distill_datasets.generation.teachers import PromptedModel, Teachers
from distill_datasets.generation.voting import Client
from distill_datasets.models.sampler import Sampling
from distill_datasets.recipes.mix import draw_mix, mixed_messages
from distill_datasets.recipes.parsing import EMPTY, TRUNCATED, UNKNOWN_TOOL, Reading
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.recipes.sections import MixPart
from distill_datasets.schema import answer_features

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class UntouchedModel(PromptedModel):
    """A model that answers without a prompt and without tools, and whose text is taken as it is."""

    added: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the recipe's own rows."""
        return self.added

    async def answer(
        self, query: str, client: Client, reference: str | None = None
    ) -> list[dict[str, Any]]:
        """One row, which says what was asked for it: no recipe tells."""
        rows = await super().answer(query, client, reference)
        return [{**row, "requests": [self.request_key(query)]} for row in rows]


@dataclass(frozen=True)
class MixedRows:
    """The rows of one part of a mix, as `draw_mix` gives them; `model` answers them, if any."""

    part: MixPart
    rows: "Dataset"
    model: UntouchedModel | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What `generation.json` says of them."""
        identity = {"identity": self.model.identity} if self.model else {}
        part = self.part
        return {"name": part.name, "share": part.share, "rows": len(self.rows), **identity}


def open_untouched(recipe: Recipe, settings: GenerateSettings) -> dict[str, UntouchedModel]:
    """The models that answer rows of a recipe's mix, by the parts' names; asks nobody."""
    from distill_datasets.models.references import open_sampler

    sampling = Sampling(temperature=0.0, max_tokens=recipe.sampling.max_tokens)
    return {
        part.name: UntouchedModel(
            open_sampler(part.model, lazily=True, timeout=settings.timeout),
            sampling,
            mixed_messages,
            _as_it_is,
            ["as it is"],
            lambda query, sampling: sampling,
            added=recipe.answer_columns,
        )
        for part in recipe.mix
        if part.model
    }


def draw_rows(
    recipe: Recipe,
    untouched: Mapping[str, UntouchedModel],
    every: "Dataset",
    asked: "Dataset",
    share: Share | None,
) -> list[MixedRows]:
    """The rows of each part beside the queries that are `asked`, none of which is among `every`.

    A run in several shares has them in the first.
    """
    if not recipe.mix or (share and share.number > 1):
        return []
    samples = recipe.sampling.n if recipe.choose == "route" else 1
    own = samples * sum(split == "train" for split in asked["split"])
    drawn = zip(recipe.mix, draw_mix(recipe, every, own), strict=True)
    return [MixedRows(part, rows, untouched.get(part.name)) for part, rows in drawn]


def answer_mix(  # noqa: PLR0913 (what `generate` has)
    mixed: Sequence[MixedRows],
    teachers: Teachers,
    journal: Journal,
    settings: GenerateSettings,
    meter: Meter | None,
    folder: Path,
) -> "list[Dataset]":
    """The answered rows of each part that has some, each in a file of the folder."""
    from datasets import Dataset

    found = []
    for number, one in enumerate(mixed):
        if not len(one.rows):
            continue
        file = folder / MIX_FILES.replace("*", f"{number:05d}")
        if one.model is None:
            _write_answered(one.rows, teachers.columns, file)
            found.append(Dataset.from_file(str(file)))
            continue
        if settings.batch and getattr(one.model.sampler, "batches", None) is not None:
            buy_in_batches(one.rows, one.model, journal, settings=settings, meter=meter)
        again = settings.ask_again
        client = CachedClient(
            journal, limits=settings.limits, meter=meter, ask_rejected_again=again
        )
        found.append(ask(one.rows, one.model, client, title="generate mix", file=file))
    return found


def _as_it_is(query: str, reference: str | None, text: str, stop_reason: str) -> Reading:
    """A text that is the response; calls of tools that nobody offered are none."""
    if stop_reason == "length":
        return Reading(rejection=TRUNCATED)
    if not text.strip():
        return Reading(rejection=EMPTY)
    return Reading(rejection=UNKNOWN_TOOL) if has_calls(text) else Reading(response=text)


def _write_answered(rows: "Dataset", columns: Sequence[str], file: Path) -> None:
    """Write rows that have their response as rows of answers, which nobody was asked for."""
    import pyarrow as pa

    schema = answer_features(columns).arrow_schema
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in rows.with_format("arrow").iter(batch_size=1_000):
            lines = [{**row, "sample": 0} for row in batch.to_pylist()]
            writer.write_table(pa.Table.from_pylist(lines, schema=schema))
