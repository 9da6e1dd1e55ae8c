"""Answers become a release: a folder that `datasets` reads and the Hub can hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DatasetError, OutputError, VersionError
from distill_datasets.files import recover, replacing
from distill_datasets.generation.ledger import LEDGER, ledger_features, raw_answers
from distill_datasets.releases.cards import card_metadata, dataset_card
from distill_datasets.releases.contents import REJECTED, answered_contents, fingerprints_of
from distill_datasets.releases.fingerprints import FINGERPRINTS, RowChanges
from distill_datasets.releases.manifest import (
    MANIFEST,
    Part,
    columns,
    layout,
    manifest_text,
    read_manifest,
)
from distill_datasets.releases.parquet import Shards
from distill_datasets.releases.run_answers import RunAnswers, load_answers
from distill_datasets.releases.soft_labels import SOFT, SoftConfig, soft_features, write_soft
from distill_datasets.releases.versions import (
    FIRST,
    Change,
    check_version,
    difference,
    following,
    history,
)
from distill_datasets.schema import rejected_features, release_features

if TYPE_CHECKING:
    from distill_datasets.releases.push import Pushed


@dataclass(frozen=True)
class Release:
    """A published folder; `digest` names its rows and its recipe, not its files."""

    path: Path
    version: str
    digest: str
    splits: Mapping[str, int]
    rejected: int
    why: str = ""

    def push_to_hub(self, repo: str, **options: Any) -> "Pushed":
        """Push to a dataset repository: one commit, then a tag; see `pushing.push_release`."""
        from distill_datasets.releases.push import push_release

        return push_release(self.path, repo, **options)


def publish(
    run: Path | str | Sequence[Path | str],
    *,
    out: Path | str | None = None,
    version: str | None = None,
    ledger: bool = True,
) -> Release:
    """Write a run's answers as a release (default: `run/release`).

    A run in parts is the folder of its parts, or all the folders that hold some: every part must
    be there, and the release is the one that the run would have made in one piece.
    `version` is x.y.z. Without one it follows the version that lies in `out` already: major if
    the columns, the prompt or the response format changed, minor if the rows did, patch if only
    the card did; the first is 1.0.0. The new release takes the old one's place in `out`. Nothing
    is written for the same content; other content under the same version raises `VersionError`
    that says what differs. Raises `DatasetError` for answers that are missing, before anything is
    written. A row that failed is published with its error in the config `rejected`: run
    `generate` again first to ask for it. The raw answers go into the config `ledger`, for others
    to run the recipe without paying again, and where the recipe asks for `top_logprobs`, the
    teacher's probabilities into the config `soft`; `ledger=False` leaves both out.
    """
    runs = [Path(run)] if isinstance(run, (str, Path)) else [Path(one) for one in run]
    folder = _release_folder(runs, out)
    published = _published(folder)
    if version is not None:
        check_version(version)
    answers = load_answers(runs, ledger=ledger)
    old = read_manifest(folder) if published else None
    facts = _facts(answers, old)
    change = difference(old, facts, lambda: _row_changes(folder, answers)) if old else None
    if published and old:
        if change is None and version in (None, published.version):
            return published
        version = version or following(published.version, change.level if change else "patch")
        if change and change.level != "patch" and version == published.version:
            raise _taken(published, change)
    facts["version"] = version or FIRST
    facts["why"] = _why(old, change)
    readme = folder / "README.md"
    written_before = readme.read_text(encoding="utf-8") if readme.is_file() else None
    with replacing(folder) as building:
        _write(building, answers, facts, old, written_before)
    return load_release(folder)


def load_release(path: Path | str) -> Release:
    """What the manifest in a release's folder says; reads no rows."""
    facts = read_manifest(Path(path))
    try:
        return Release(
            Path(path),
            facts["version"],
            facts["content_digest"],
            facts["splits"],
            sum(facts["rejected"].values()) + facts["errors"],
            facts.get("why", ""),
        )
    except (AttributeError, TypeError) as error:
        raise DatasetError(
            f"{str(path)!r} has a manifest that `publish` didn't write ({error!r}). Delete the "
            "folder and publish again."
        ) from error


def _release_folder(runs: Sequence[Path], out: Path | str | None) -> Path:
    if out is None and len(runs) != 1:
        raise OutputError("A release of several folders needs a place: name it with `out`.")
    return Path(out) if out is not None else runs[0] / "release"


def _published(folder: Path) -> Release | None:
    recover(folder)
    if (folder / "manifest.json").is_file():
        return load_release(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(
            f"{str(folder)!r} holds something else than a release, which publishing would "
            "replace. Choose a new or an empty folder with `out`."
        )
    return None


def _row_changes(published: Path, answers: RunAnswers) -> RowChanges:
    return fingerprints_of(published).changes(answers.survey.fingerprints)


def _taken(published: Release, change: Change) -> VersionError:
    return VersionError(
        f"Version {published.version} in {str(published.path)!r} holds other content: "
        f"{change.why}. Publish with another version, such as "
        f"version={following(published.version, change.level)!r}, or to another folder."
    )


def _why(old: Mapping[str, Any] | None, change: Change | None) -> str:
    if change:
        return change.why
    return f"the same content as {old['version']}" if old else "the first release"


def _write(
    building: Path,
    answers: RunAnswers,
    facts: Mapping[str, Any],
    old: Mapping[str, Any] | None,
    written_before: str | None,
) -> None:
    parts, soft = _write_rows(building, answers)
    answers.survey.fingerprints.write(building / FINGERPRINTS)
    manifest = {**facts, "history": history(old, facts)}
    if answers.sources:
        manifest["ledger"] = parts[LEDGER].sizes[LEDGER].rows if LEDGER in parts else 0
    if soft:
        manifest[SOFT] = soft
    answers.recipe.dump(building / "recipe")
    (building / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
    card = dataset_card(
        manifest,
        answers.recipe,
        example=answers.survey.example or {},
        layout=layout(parts, manifest),
        written_before=written_before,
        previous=old.get("card") if old else None,
    )
    (building / "README.md").write_text(card, encoding="utf-8")


def _write_rows(
    building: Path, answers: RunAnswers
) -> tuple[dict[str, Part], Mapping[str, int] | None]:
    """The parts by their configurations, and what the soft one counted, where there is one."""
    evidence = answers.recipe.evidence
    released, rejected = release_features(evidence), rejected_features(evidence)
    splits = answers.survey.splits
    shards = {name: Shards(building / "data", name, released.arrow_schema) for name in splits}
    if answers.survey.rows[REJECTED]:
        shards[REJECTED] = Shards(building / REJECTED, REJECTED, rejected.arrow_schema)
    for parts, rows in answered_contents(answers.rows, answers.recipe):
        for part in parts:
            shards[part].add(rows)
    sizes = {name: shard.close() for name, shard in shards.items()}
    written = {"default": Part("data", released, {name: sizes[name] for name in splits})}
    if REJECTED in sizes:
        written[REJECTED] = Part(REJECTED, rejected, {REJECTED: sizes[REJECTED]})
    if answers.sources:
        written |= _write_ledger(building, answers)
    soft = _write_soft(building, answers)
    if soft and soft.sizes:
        written[SOFT] = Part(SOFT, soft_features(), soft.sizes)
    return written, soft.facts if soft else None


def _write_ledger(building: Path, answers: RunAnswers) -> dict[str, Part]:
    """Write what the journals hold of the rows, in their order; nothing where they hold none."""
    entries = raw_answers(answers.sources, answers.recipe, answers.generation)
    if (first := next(entries, None)) is None:
        return {}
    shards = Shards(building / LEDGER, LEDGER, ledger_features().arrow_schema)
    shards.add(first)
    for more in entries:
        shards.add(more)
    return {LEDGER: Part(LEDGER, ledger_features(), {LEDGER: shards.close()})}


def _write_soft(building: Path, answers: RunAnswers) -> SoftConfig | None:
    recipe = answers.recipe
    asked = any(recipe.sampling_of(teacher).top_logprobs for teacher in recipe.all_teachers)
    if not answers.sources or not asked or recipe.evidence:
        return None
    return write_soft(building, answers.sources, recipe, answers.generation)


def _facts(answers: RunAnswers, old: Mapping[str, Any] | None) -> dict[str, Any]:
    """The manifest, but for what writing the release decides."""
    found, generation, recipe = answers.survey, answers.generation, answers.recipe
    known = old.get("ledger") if old else None
    return {
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "content_digest": answers.digest,
        **{key: generation[key] for key in ("teacher", "identity", "renderer", "sampling")},
        **({"panel": generation["panel"]} if generation.get("panel") else {}),
        "prompt_sha256": sha256(recipe.prompt.encode()).hexdigest(),
        "columns": columns(release_features(recipe.evidence)),
        "splits": found.splits,
        "kept": found.kept,
        "rejected": dict(sorted(found.rejected.items())),
        "errors": found.errors,
        "ledger": (known or 0) if answers.sources else None,
        **({SOFT: old[SOFT]} if old and SOFT in old else {}),
        "references": found.references,
        "tokens": generation["tokens"],
        "cost": generation.get("cost"),
        "mean_prompt_tokens": found.mean_prompt_tokens,
        "created": generation["created"],
        "versions": generation["versions"],
        "recipe_fields": recipe.model_dump(mode="json"),
        "card": card_metadata(found.splits, recipe),
    }
