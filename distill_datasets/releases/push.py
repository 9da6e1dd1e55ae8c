"""A release goes to the Hub: everything in one commit, then a tag on exactly that commit."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DatasetError, HubError, RepositoryError, VersionError
from distill_datasets.hub.client import (
    HubDataset,
    ensure_repository,
    explained,
    overtaken,
    patiently,
    read_text,
    require_token,
    snapshot,
    wait_after,
)
from distill_datasets.hub.references import folder_of, inside
from distill_datasets.hub.screening import require_clean, screen
from distill_datasets.parquet import open_parquet, read_batches
from distill_datasets.progress import interruptible
from distill_datasets.recipes.loading import load_released_recipe
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.releases.cards import LAYOUT, Halves, dataset_card, markers, read_card
from distill_datasets.releases.contents import check_release
from distill_datasets.releases.diff import (
    FINGERPRINTS,
    Fingerprints,
    fingerprints_of,
    has_fingerprints,
)
from distill_datasets.releases.manifest import (
    MANIFEST,
    PARTS,
    REJECTED,
    Change,
    RowChanges,
    check_version,
    difference,
    following,
    history,
    layout,
    manifest_text,
    order,
    parse_manifest,
    read_manifest,
    version_of,
)
from distill_datasets.tables import aligned, html_card, html_facts

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd

README = "README.md"
_TRIES = 10  # looks at the repository; each may find that somebody else was faster
_NEWEST = 10  # pull requests that are looked at
_TAKEN_NAMES = (*PARTS, "recipe", "all")


@dataclass(frozen=True)
class Pushed:
    """What a push left on the Hub; a pull request's commit has no tag until it is merged.

    `changed` says whether this push altered anything, `why` what the version stands for.
    """

    repo: str
    version: str
    commit: str
    tag: str | None
    changed: bool
    why: str
    pull_request: str | None = None

    def _repr_html_(self) -> str:
        return html_card(f"Pushed {self.version} to {self.repo}", html_facts(asdict(self)))


@interruptible
def push_release(  # noqa: PLR0913 (where to, as what, who sees it, and what to let through)
    release: Path,
    repo: str,
    *,
    config: str = "default",
    version: str | None = None,
    private: bool = True,
    create_pr: bool = False,
    allow: Collection[str] = (),
) -> Pushed:
    """Push a release's folder to a dataset repository, which is made where there is none.

    `config` names the release among others in the same repository. Without a `version` it is the
    next one there: major if the columns, the prompt or the response format changed, minor if the
    rows did, patch if only the card did. Content that is there already is not pushed again;
    other content under a version's tag raises `VersionError` before anything is uploaded. After
    an interruption, pushing again goes on where it ended. Before anything is sent the folder is
    screened; `allow` takes what `require_clean` does. Raises `ScreeningError`, `HubError` or
    `RepositoryError`, each with what to do.
    """
    if version is not None:
        check_version(version)
    outgoing = _load(Path(release), repo, config, private)
    require_token()
    check_release(Path(release))
    require_clean(screen(release), allow)
    ensure_repository(repo, kind="dataset", private=private)
    if create_pr and (waiting := _waiting_pull(outgoing, version)):
        return waiting
    resumed, files, sent_at = False, [], None
    for tries in range(_TRIES):
        head = look(repo, config)
        if head.unfinished and not create_pr:
            head, resumed = _finish(head), True
        following_change = _plan(head, outgoing, version)
        if following_change is None:
            return _there(head, version, resumed)
        if sent_at != head.dataset.commit:
            files, sent_at = _upload(outgoing, head, create_pr), head.dataset.commit
        to, why = following_change
        manifest = {**outgoing.manifest, "version": to, "why": why}
        if info := _commit(outgoing, head, manifest, files, tries, create_pr):
            name = None if create_pr else tag(repo, to, info.oid, why)
            return Pushed(repo, to, info.oid, name, True, why, info.pr_url if create_pr else None)
    raise HubError(
        f"{repo!r} changed {_TRIES} times while this release was being committed. Run the same "
        "again when it is quieter: what was uploaded is not uploaded twice."
    )


def outgoing_text(
    release: Path, repo: str, *, config: str = "default", private: bool = True
) -> str:
    """What `push_release` would send where, and who sees it: every file with its rows and columns.

    Raises `DatasetError` as `push_release` does before it needs the network.
    """
    outgoing = _load(Path(release), repo, config, private)
    rows = [["file", "rows", "size", "columns"]]
    for name, path in outgoing.files.items():
        shape = ["", ""]
        if path.suffix == ".parquet":
            file = open_parquet(path)
            shape = [f"{file.metadata.num_rows:,}", ", ".join(file.schema_arrow.names)]
        rows.append([folder_of(config) + name, shape[0], _size(path.stat().st_size), shape[1]])
    total = sum(path.stat().st_size for path in outgoing.files.values())
    prompt = "with the teacher's prompt" if outgoing.manifest.get("prompt", True) else "no prompt"
    seen = "private: its owners see it" if private else "public: everybody sees it"
    return (
        f"{repo} ({seen}) gets {len(outgoing.files)} files of {_size(total)}, {prompt}, and "
        f"{MANIFEST} and {README}:\n{aligned(rows)}"
    )


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size / 1e3:,.1f} kB"


@dataclass(frozen=True)
class _Outgoing:
    """A release on its way to `repo`, where it will be called `config`.

    `files` are all but manifest, card and hidden files, by their names in the release.
    """

    release: Path
    repo: str
    config: str
    manifest: Mapping[str, Any]
    recipe: Recipe
    files: Mapping[str, Path]

    @property
    def title(self) -> str:
        """How the titles of its commits begin."""
        return f"Release {'' if self.config == 'default' else self.config + ' '}"

    def changes(self, head: Head) -> RowChanges:
        """Its rows against those of a release on the Hub."""
        return head.fingerprints().changes(fingerprints_of(self.release))

    def reads(self, path: str) -> bool:
        """Whether `load_dataset` would read a file of the repository as rows of this release."""
        configs = layout(self.release, self.manifest, self.config)["configs"]
        patterns = (one["path"] for config in configs for one in config["data_files"])
        return any(fnmatchcase(path, pattern) for pattern in patterns)

    def texts(
        self, manifest: Mapping[str, Any], card: str | None, old: Mapping[str, Any] | None
    ) -> dict[str, str]:
        """Manifest and card by their places; of the `card` there, what people wrote is kept."""
        facts = {**manifest, "config": self.config, "files": sorted(self.files)}
        # What people wrote beside the release, as if for this configuration and without its
        # layout, then what they wrote on the Hub, which wins.
        metadata, body = read_card((self.release / README).read_text(encoding="utf-8"))
        for ours, there in zip(markers("default"), markers(self.config), strict=True):
            body = body.replace(ours, there)
        metadata = {key: value for key, value in metadata.items() if key not in LAYOUT}
        written: list[tuple[Halves, Mapping[str, Any]]] = [
            ((metadata, body), self.manifest.get("card") or {})
        ]
        if card is not None:
            written.append((read_card(card), (old or {}).get("card") or {}))
        split = next(iter(self.manifest["splits"]))
        first = min(self.release.glob(f"data/{split}-*"))
        text = dataset_card(
            {**facts, "repo": self.repo},
            self.recipe,
            example=dict(next(read_batches(first)).slice(0, 1).to_pylist()[0]),
            layout=layout(self.release, manifest, self.config),
            written=written,
        )
        return {folder_of(self.config) + MANIFEST: manifest_text(facts), README: text}


def _load(release: Path, repo: str, config: str, private: bool) -> _Outgoing:
    """Check everything that needs no network; raises `DatasetError`."""
    manifest, recipe = read_manifest(release), load_released_recipe(release)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", config) or config in _TAKEN_NAMES:
        raise DatasetError(
            f"{config!r} can't name a configuration: expected letters, digits, '.', '_' and '-', "
            f"and none of {list(_TAKEN_NAMES)}."
        )
    if config.endswith(tuple(f"-{part}" for part in PARTS[1:])):
        raise DatasetError(f"{config!r} is the name of another configuration's part: choose one.")
    if not private and recipe.license is None:
        raise DatasetError(
            f"{str(release)!r} states no licence, so it can't be published for everybody: set "
            "`license:` in the recipe and publish again, or push it as private."
        )
    return _Outgoing(release, repo, config, manifest, recipe, _files(release))


def _files(release: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(path for path in release.rglob("*") if not path.is_dir()):
        name = path.relative_to(release)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and name.as_posix() not in (README, MANIFEST):
            found[name.as_posix()] = inside(release, name.as_posix())
    return found


def _waiting_pull(outgoing: _Outgoing, version: str | None) -> Pushed | None:
    """The open pull request that holds this very release, so that none is opened twice."""
    from huggingface_hub import HfApi

    api, repo = HfApi(), outgoing.repo
    with explained(repo):
        refs = patiently(api.list_repo_refs, repo, repo_type="dataset", include_pull_requests=True)
        numbered = {int(one.ref.split("/")[-1]): one for one in refs.pull_requests or []}
        for number in sorted(numbered, reverse=True)[:_NEWEST]:
            details = patiently(api.get_discussion_details, repo, number, repo_type="dataset")
            opened = details.status in ("open", "draft")
            if not opened or not details.title.startswith(outgoing.title):
                continue
            commit = numbered[number].target_commit
            at = HubDataset(repo, numbered[number].ref, commit)
            found = manifest_at(at, outgoing.config)
            same = found["content_digest"] == outgoing.manifest["content_digest"]
            if same and version in (None, found["version"]):
                why = found["why"]
                return Pushed(repo, found["version"], commit, None, False, why, details.url)
    return None


def _finish(head: Head) -> Head:
    """Tag the release that lies at the head without its tag: the commit that wrote its manifest."""
    from huggingface_hub import HfApi

    assert head.manifest is not None and head.unfinished is not None
    repo = head.dataset.repo
    with explained(repo):
        (found,) = patiently(
            HfApi().get_paths_info,
            repo,
            [head.folder + MANIFEST],
            expand=True,
            revision=head.dataset.commit,
            repo_type="dataset",
        )
    assert found.last_commit is not None
    commit = str(found.last_commit.oid)
    tag(repo, head.unfinished, commit, head.manifest.get("why", ""))
    return replace(head, tags={**head.tags, head.unfinished: commit})


def _plan(head: Head, outgoing: _Outgoing, version: str | None) -> tuple[str, str] | None:
    """The version to commit and why; None where the content is there under its version."""
    if version in head.tags:
        assert version is not None
        _check_same(head, outgoing, version)
        return None
    old = head.manifest
    if old is None:
        new = f"the configuration {outgoing.config!r} is new"
        change: Change | None = Change("minor", [new if head.tags else "the first release"])
    else:
        change = difference(old, outgoing.manifest, lambda: outgoing.changes(head))
        if change is None and version is None:
            if head.tagged(str(old["version"])) == old:
                return None
            change = Change("patch", [f"v{old['version']} is the tag of another commit"])
    why = change.why if change else f"the same content as {old and old['version']}"
    if version is None:
        # The one after the newest; the release's own where that is higher still.
        version = str(outgoing.manifest["version"])
        if known := {*head.tags, *([str(old["version"])] if old else [])}:
            after = following(max(known, key=order), change.level if change else "patch")
            version = max(version, after, key=order)
    return version, why


def _check_same(head: Head, outgoing: _Outgoing, version: str) -> None:
    """Raises `VersionError` where the tagged version holds something else."""
    taken = head.tagged(version)
    where = f"v{version} in {outgoing.repo!r}"
    if taken is None:
        raise VersionError(
            f"{where} is the tag of commit {head.tags[version]}, which holds no release of the "
            f"configuration {outgoing.config!r}. Choose another version."
        )
    at = replace(head, dataset=replace(head.dataset, commit=head.tags[version]))
    change = difference(taken, outgoing.manifest, lambda: outgoing.changes(at))
    if change:
        raise VersionError(
            f"{where} holds other content: {change.why}. Choose another version, or none to take "
            "the next one."
        )


def _there(head: Head, version: str | None, resumed: bool) -> Pushed:
    manifest = head.manifest or {}
    name = version or str(manifest["version"])
    why = str(manifest.get("why", "")) if resumed else "the same content is there already"
    return Pushed(head.dataset.repo, name, head.tags[name], f"v{name}", resumed, why)


def _upload(outgoing: _Outgoing, head: Head, create_pr: bool) -> list[CommitOperationAdd]:
    """Send the data files, which nobody sees before they are committed.

    What the server says about them holds for this head. Raises `RepositoryError` where files of
    others would be read as this release's rows.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    before = (head.manifest or {}).get("files", ())
    ours = {head.folder + name for name in (*outgoing.files, *before)}
    if foreign := sorted(path for path in head.files - ours if outgoing.reads(path)):
        raise RepositoryError(
            f"{outgoing.repo!r} has files that `load_dataset` would take for rows of this release: "
            f"{', '.join(foreign[:3])}. Publish with another configuration's name (config), or to "
            "another repository."
        )
    files = [
        CommitOperationAdd(folder_of(outgoing.config) + name, str(path))
        for name, path in outgoing.files.items()
    ]
    with explained(outgoing.repo):
        patiently(
            HfApi().preupload_lfs_files,
            outgoing.repo,
            files,
            repo_type="dataset",
            create_pr=create_pr,
            free_memory=False,
        )
    return files


def _commit(  # noqa: PLR0913 (one try: what, onto what, and which)
    outgoing: _Outgoing,
    head: Head,
    manifest: Mapping[str, Any],
    files: list[CommitOperationAdd],
    tries: int,
    create_pr: bool,
) -> CommitInfo | None:
    """One try; None where it is worth looking at the repository again."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    operations = _operations(outgoing, head, manifest, files)
    try:
        with explained(outgoing.repo):
            try:
                return HfApi().create_commit(
                    outgoing.repo,
                    operations,
                    commit_message=outgoing.title + manifest["version"],
                    commit_description=manifest["why"],
                    repo_type="dataset",
                    parent_commit=head.dataset.commit,
                    create_pr=create_pr,
                )
            except (HTTPError, RuntimeError) as error:
                # The answer may be lost and the commit there: the next look will tell.
                if overtaken(error) or wait_after(error, tries):
                    return None
                raise
    except ValueError as error:
        raise RepositoryError(f"The Hub refused the card of {outgoing.repo!r}: {error}") from error


def _operations(
    outgoing: _Outgoing,
    head: Head,
    manifest: Mapping[str, Any],
    files: list[CommitOperationAdd],
) -> list[Any]:
    """Files, manifest and card; and the files of the release before that this one lacks."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    old = head.manifest
    manifest = {**manifest, "history": history(old, manifest)}
    texts = outgoing.texts(manifest, head.card if README in head.files else None, old)
    new = {file.path_in_repo for file in files} | set(texts)
    stale = {head.folder + name for name in (old or {}).get("files", ())} & head.files - new
    return [
        *files,
        *(CommitOperationAdd(path, text.encode()) for path, text in texts.items()),
        *(CommitOperationDelete(path) for path in sorted(stale)),
    ]


@dataclass(frozen=True)
class Head:
    """The main branch at one commit, seen for one configuration; `tags` by their version."""

    dataset: HubDataset
    config: str
    files: frozenset[str]
    tags: Mapping[str, str]

    @property
    def folder(self) -> str:
        """Where the configuration's release lies, with the slash behind it."""
        return folder_of(self.config)

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """Of the configuration's release, if there is one."""
        if self.folder + MANIFEST not in self.files:
            return None
        return manifest_at(self.dataset, self.config)

    @property
    def card(self) -> str:
        """The README as it is."""
        return read_text(self.dataset, README) if README in self.files else ""

    @property
    def unfinished(self) -> str | None:
        """The version that lies here without its tag: somebody was interrupted."""
        version = str(self.manifest["version"]) if self.manifest else None
        return None if version in self.tags else version

    def fingerprints(self) -> Fingerprints:
        """Of the release's rows."""
        if self.folder + FINGERPRINTS in self.files:
            path = snapshot(self.dataset, [self.folder + FINGERPRINTS]) / self.folder
            if has_fingerprints(path / FINGERPRINTS):
                return fingerprints_of(path)
        folders = [f"{self.folder}{part}/*" for part in ("data", REJECTED)]
        return fingerprints_of(snapshot(self.dataset, folders) / self.folder)

    def tagged(self, version: str) -> dict[str, Any] | None:
        """The manifest of the release that a version's tag names; None for a commit without one."""
        from huggingface_hub.errors import EntryNotFoundError

        commit = self.tags[version]
        if commit == self.dataset.commit:
            return self.manifest
        try:
            return manifest_at(HubDataset(self.dataset.repo, version, commit), self.config)
        except RepositoryError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return None
            raise


def look(repo: str, config: str) -> Head:
    """The repository as it is now."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with explained(repo):
        refs = patiently(HfApi().list_repo_refs, repo, repo_type="dataset")
        tags = {version_of(tag.name): tag.target_commit for tag in refs.tags}
        heads = {branch.name: branch.target_commit for branch in refs.branches}
        if "main" not in heads:
            raise RepositoryError(f"{repo!r} has no branch 'main' to publish to: create it first.")
        dataset = HubDataset(repo, "main", heads["main"])
        entries = patiently(
            lambda: list(
                HfApi().list_repo_tree(
                    repo, recursive=True, revision=dataset.commit, repo_type="dataset"
                )
            )
        )
    files = frozenset(entry.path for entry in entries if isinstance(entry, RepoFile))
    return Head(dataset, config, files, {name: at for name, at in tags.items() if name})


def manifest_at(dataset: HubDataset, config: str) -> dict[str, Any]:
    """A configuration's manifest at a commit that has one."""
    path = folder_of(config) + MANIFEST
    try:
        return parse_manifest(read_text(dataset, path), path)
    except DatasetError as error:
        raise RepositoryError(
            f"{dataset.repo!r} has a {path} that is no release's: publish with another "
            "configuration's name (config), or to another repository."
        ) from error


def tag(repo: str, version: str, commit: str, why: str) -> str:
    """Tag a commit as a version; a tag that is there must be of the same commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    name, api = f"v{version}", HfApi()
    with explained(repo):
        try:
            patiently(
                api.create_tag,
                repo,
                tag=name,
                revision=commit,
                tag_message=why,
                repo_type="dataset",
            )
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            refs = patiently(api.list_repo_refs, repo, repo_type="dataset")
            found = {one.name: one.target_commit for one in refs.tags}.get(name)
            if found != commit:
                raise VersionError(
                    f"{repo!r} got a tag {name} for another commit ({found}) meanwhile, so commit "
                    f"{commit} has none. Publish again: it takes the next version."
                ) from error
    return name
