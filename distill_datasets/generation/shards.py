"""A run on several machines: each answers its share of the groups, and the parts make one whole."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from distill_datasets.errors import DatasetError, RecipeError
from distill_datasets.generation.rows import read_summary

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

_COUNTS = ("rows", "kept", "rejected", "errors", "tokens")
_SHARE = "share.json"
_PLACES = "places.npy"
_FOLDER = re.compile(r"part-(\d{5,})-of-(\d{5,})")


@dataclass(frozen=True)
class Share:
    """The `number`-th of `count` shares, counted from one.

    A row's share follows from a hash of its group that says nothing about its split, so every
    share has rows of every split, and rows of one group are asked by one machine.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        """Raises `RecipeError` for a share that there can't be."""
        if not 1 <= self.number <= self.count:
            raise RecipeError(
                f"There is no share {self.number}/{self.count}: expected one from "
                f"1/{self.count} to {self.count}/{self.count}."
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """A share as it is written: `3/64`."""
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if not found or not int(found[2]):
            raise RecipeError(f"{text!r} is no share: expected NUMBER/COUNT, such as 3/64.")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def folder(self, out: Path | str) -> Path:
        """The part's own folder in a run's."""
        return Path(out) / f"part-{self.number:05d}-of-{self.count:05d}"

    def holds(self, group: str) -> bool:
        """Whether rows of this group are in the share."""
        content = b"share\n" + group.encode()
        return int(sha256(content).hexdigest()[:15], 16) % self.count == self.number - 1

    def of(self, queries: "Dataset") -> "Dataset":
        """The share's rows in their order, with their `place` among all as one more column.

        There may be none, where there are few groups.
        """
        import numpy as np

        groups = (group for batch in queries.iter(batch_size=1_000) for group in batch["group"])
        held = np.fromiter((self.holds(group) for group in groups), bool, len(queries))
        placed = queries.add_column("place", np.arange(len(queries)))
        return placed.select(np.flatnonzero(held))

    def record(self, queries: "Dataset", answers: Path, *, whole: int, more: int = 0) -> None:
        """Write beside a part's answers which rows of the whole they answer; see `of`.

        So many `more` rows stand behind all of the `whole`.
        """
        import numpy as np

        own = np.asarray(queries["place"][:], np.int64)
        np.save(answers / _PLACES, np.concatenate([own, np.arange(whole, whole + more)]))
        text = json.dumps({"number": self.number, "count": self.count})
        (answers / _SHARE).write_text(text + "\n", encoding="utf-8")


def find_parts(runs: Sequence[Path]) -> list[Path]:
    """The run folders that hold answers: those given, or the parts in them, in their order.

    Raises `DatasetError` for a folder with neither, for damaged answers, and where the parts are
    not every share of one whole, once each.
    """
    found = [part for run in runs for part in _parts_in(run)]
    for part in found:
        if read_summary(part) is None:
            raise _damaged(part)
    if len(found) == 1 and not (found[0] / "answers" / _SHARE).is_file():
        return found
    by_share: dict[Share, Path] = {}
    for part in found:
        share = _share_of(part)
        other = next(iter(by_share), share)
        if share.count != other.count:
            raise DatasetError(
                f"{str(part)!r} is share {share}, but {str(by_share[other])!r} is {other}: "
                "expected parts of one whole. Name those of one run."
            )
        if share in by_share:
            raise DatasetError(
                f"Share {share} is there twice: {str(by_share[share])!r} and {str(part)!r}. Name "
                "one."
            )
        by_share[share] = part
    count = next(iter(by_share)).count
    missing = [share for n in range(1, count + 1) if (share := Share(n, count)) not in by_share]
    if missing:
        names = ", ".join(map(str, missing[:20])) + (", …" if len(missing) > 20 else "")
        raise DatasetError(
            f"{len(missing)} of {count} parts are missing: {names}. Run `generate --shard` for "
            "each, or name the folders that hold them."
        )
    return [by_share[Share(n, count)] for n in range(1, count + 1)]


def join_parts(parts: Sequence[Path], rows: Sequence["Dataset"]) -> "Dataset":
    """The rows of all parts in the order of the queries; the files stay where they are.

    Raises `DatasetError` for a whole that has gaps.
    """
    import numpy as np
    from datasets import concatenate_datasets

    whole = np.concatenate([_places(part, one) for part, one in zip(parts, rows, strict=True)])
    seen = np.unique(whole)
    if len(seen) and seen[-1] != len(seen) - 1:
        raise DatasetError(
            f"The parts answer {len(seen)} of {seen[-1] + 1} queries: they were made from other "
            "queries or with another --limit. Run `generate --shard` again for each."
        )
    return concatenate_datasets(list(rows)).select(np.argsort(whole, kind="stable"))


def join_summaries(parts: Sequence[Path], summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `generation.json` would say of the whole.

    Raises `DatasetError` where the parts were not made alike.
    """
    first = summaries[0]
    for part, summary in zip(parts, summaries, strict=True):
        for key in ("recipe_digest", "teacher", "identity", "renderer", "sampling", "panel"):
            if summary.get(key) != first.get(key):
                raise DatasetError(
                    f"{str(part)!r} is not of the same run as {str(parts[0])!r}: its {key!r} is "
                    f"{summary.get(key)!r}, expected {first.get(key)!r}. Generate it again with "
                    "the same recipe and teacher."
                )
    latest = max(summaries, key=lambda summary: str(summary["created"]))
    added = {key: _sum([one[key] for one in summaries]) for key in _COUNTS}
    added["cost"] = _sum_costs([summary.get("cost") for summary in summaries])
    if taken := [summary["from_ledger"] for summary in summaries if "from_ledger" in summary]:
        added["from_ledger"] = {
            "source": ", ".join(sorted({one["source"] for one in taken})),
            "revision": ", ".join(sorted({one["revision"] for one in taken})),
            **{name: sum(one[name] for one in taken) for name in ("answers", "bought")},
        }
    return {**latest, **added}


def _parts_in(run: Path) -> list[Path]:
    if (run / "answers" / "generation.json").is_file():
        return [run]
    inside = [path for path in run.glob("part-*-of-*") if _FOLDER.fullmatch(path.name)]
    if not inside:
        raise DatasetError(
            f"{str(run)!r} has no answers: expected {run / 'answers' / 'generation.json'}, or "
            "parts such as part-00001-of-00064. Run `generate` first, or name the folder that it "
            "wrote."
        )
    finished = [part for part in inside if (part / "answers" / "generation.json").is_file()]
    if not finished:
        raise DatasetError(
            f"None of the {len(inside)} parts in {str(run)!r} is finished: run `generate --shard` "
            "again for each."
        )
    return sorted(finished)


def _share_of(part: Path) -> Share:
    path = part / "answers" / _SHARE
    if not path.is_file():
        raise DatasetError(
            f"{str(part)!r} is a whole run, not a part of one: publish it by itself."
        )
    try:
        return Share(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise _damaged(part) from error


def _damaged(part: Path) -> DatasetError:
    return DatasetError(
        f"{str(part / 'answers')!r} is damaged: its files are not as its generation.json says. "
        "Run `generate` again: it writes them anew, and asks for nothing that is in the journal."
    )


def _places(part: Path, rows: "Dataset") -> "np.ndarray[Any, Any]":
    """For each row its query's place; the samples of one query stand together."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        places = np.load(part / "answers" / _PLACES)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(part) from error
    ids = rows.select_columns(["id"]).with_format("arrow")[:]["id"].combine_chunks()
    ends = pc.run_end_encode(ids, run_end_type=pa.int64()).run_ends.to_numpy()
    if len(ends) != len(places):
        raise DatasetError(
            f"{str(part / 'answers')!r} holds {len(ends)} queries, but says that it answers "
            f"{len(places)}. Run `generate --shard` for it again."
        )
    return np.repeat(places, np.diff(ends, prepend=0))


def _sum(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        keys = {key: None for value in values for key in value}
        return {key: sum(value.get(key, 0) for value in values) for key in keys}
    return sum(values)


def _sum_costs(costs: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """None where a part wasn't priced, or in another currency: there is no sum then."""
    known = [cost for cost in costs if cost]
    if len(known) < len(costs) or len({cost["currency"] for cost in known}) != 1:
        return None
    days = sorted({cost["priced_at"] for cost in known if cost["priced_at"]})
    return {
        "amount": sum(cost["amount"] for cost in known),
        "currency": known[0]["currency"],
        "priced_at": ", ".join(days) or None,
    }
