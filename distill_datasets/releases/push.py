"""A release goes to the Hub: everything in one commit, then a tag on exactly that commit."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import HubError, RepositoryError, VersionError
from distill_datasets.hub.client import ensure_repository, patiently, require_token, wait_after
from distill_datasets.hub.references import folder_of
from distill_datasets.hub.refusals import explained
from distill_datasets.hub.screening import require_clean, screen
from distill_datasets.releases.outgoing import Outgoing, load_outgoing
from distill_datasets.releases.pulls import open_pull
from distill_datasets.releases.repository import (
    README,
    Head,
    commit_of_release,
    look,
    tag,
    tagged_manifest,
)
from distill_datasets.releases.versions import (
    Change,
    check_version,
    difference,
    following,
    history,
    order,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd

_TRIES = 10  # looks at the repository; each may find that somebody else was faster


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


@dataclass(frozen=True)
class _Plan:
    """The version to commit next and the reason for it."""

    version: str
    why: str


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
    outgoing = load_outgoing(Path(release), repo, config, private)
    require_token()
    require_clean(screen(release), allow)
    ensure_repository(repo, kind="dataset", private=private)
    if create_pr and (found := open_pull(outgoing, version)):
        return Pushed(repo, found.version, found.commit, None, False, found.why, found.url)
    resumed, uploaded = False, None
    for tries in range(_TRIES):
        head = look(repo, config)
        if head.unfinished and not create_pr:
            head, resumed = _finish(head), True
        plan = _plan(head, outgoing, version)
        if plan is None:
            return _there(head, outgoing, version, resumed)
        if uploaded is None or uploaded.at != head.dataset.commit:
            uploaded = _upload(outgoing, head, create_pr)
        if info := _commit(outgoing, head, plan, uploaded, tries):
            name = None if create_pr else tag(repo, plan.version, info.oid, plan.why)
            url = info.pr_url if create_pr else None
            return Pushed(repo, plan.version, info.oid, name, True, plan.why, url)
    raise HubError(
        f"{repo!r} changed {_TRIES} times while this release was being committed. Run the same "
        "again when it is quieter: what was uploaded is not uploaded twice."
    )


@dataclass(frozen=True)
class _Uploaded:
    """The data files, sent and not yet committed; `create_pr` says to where.

    What the server said about them holds for the head `at` which it was asked.
    """

    at: str
    files: "list[CommitOperationAdd]"
    create_pr: bool


def _finish(head: Head) -> Head:
    """Tag the release that lies at the head without its tag."""
    assert head.manifest is not None and head.unfinished is not None
    commit = commit_of_release(head)
    tag(head.dataset.repo, head.unfinished, commit, head.manifest.get("why", ""))
    return replace(head, tags={**head.tags, head.unfinished: commit})


def _plan(head: Head, outgoing: Outgoing, version: str | None) -> _Plan | None:
    """What to commit; None where the content is there under its version."""
    if version in head.tags:
        assert version is not None
        _check_same(head, outgoing, version)
        return None
    old = head.manifest
    if old is None:
        change = _first_change(head, outgoing.config)
    else:
        change = difference(old, outgoing.manifest, lambda: _row_changes(head, outgoing))
        if change is None and version is None:
            if _is_of(head, str(old["version"]), old):
                return None
            change = Change("patch", [f"v{old['version']} is the tag of another commit"])
    why = change.why if change else f"the same content as {old and old['version']}"
    return _Plan(version or _next(head, outgoing, change), why)


def _first_change(head: Head, config: str) -> Change | None:
    if not head.tags:
        return Change("minor", ["the first release"])
    return Change("minor", [f"the configuration {config!r} is new"])


def _row_changes(head: Head, outgoing: Outgoing) -> Any:
    return head.fingerprints().changes(outgoing.fingerprints)


def _next(head: Head, outgoing: Outgoing, change: Change | None) -> str:
    """The version after the newest one; the release's own where that is higher still."""
    known = [*head.tags, *([str(head.manifest["version"])] if head.manifest else [])]
    own = str(outgoing.manifest["version"])
    if not known:
        return own
    after = following(max(known, key=order), change.level if change else "patch")
    return max(own, after, key=order)


def _check_same(head: Head, outgoing: Outgoing, version: str) -> None:
    """Raises `VersionError` where the tagged version holds something else."""
    taken = tagged_manifest(head, version)
    where = f"v{version} in {outgoing.repo!r}"
    if taken is None:
        raise VersionError(
            f"{where} is the tag of commit {head.tags[version]}, which holds no release of the "
            f"configuration {outgoing.config!r}. Choose another version."
        )
    at = replace(head, dataset=replace(head.dataset, commit=head.tags[version]))
    change = difference(taken, outgoing.manifest, lambda: _row_changes(at, outgoing))
    if change:
        raise VersionError(
            f"{where} holds other content: {change.why}. Choose another version, or none to take "
            "the next one."
        )


def _is_of(head: Head, version: str, manifest: Mapping[str, Any]) -> bool:
    """Whether a version's tag names the release of this manifest."""
    return tagged_manifest(head, version) == manifest


def _there(head: Head, outgoing: Outgoing, version: str | None, resumed: bool) -> Pushed:
    manifest = head.manifest or {}
    name = version or str(manifest["version"])
    why = str(manifest.get("why", "")) if resumed else "the same content is there already"
    return Pushed(outgoing.repo, name, head.tags[name], f"v{name}", resumed, why)


def _upload(outgoing: Outgoing, head: Head, create_pr: bool) -> _Uploaded:
    """Send the data files, which nobody sees before they are committed."""
    from huggingface_hub import CommitOperationAdd, HfApi

    _check_places(outgoing, head)
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
    return _Uploaded(head.dataset.commit, files, create_pr)


def _check_places(outgoing: Outgoing, head: Head) -> None:
    """Raises `RepositoryError` where files of others would be read as this release's rows."""
    ours = {
        head.folder + name for name in (*outgoing.files, *(head.manifest or {}).get("files", ()))
    }
    foreign = sorted(path for path in head.files - ours if outgoing.reads(path))
    if foreign:
        raise RepositoryError(
            f"{outgoing.repo!r} has files that `load_dataset` would take for rows of this release: "
            f"{', '.join(foreign[:3])}. Publish with another configuration's name (config), or to "
            "another repository."
        )


def _commit(
    outgoing: Outgoing, head: Head, plan: _Plan, uploaded: _Uploaded, tries: int
) -> "CommitInfo | None":
    """One try; None where it is worth looking at the repository again."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    operations = _operations(outgoing, head, plan, uploaded)
    try:
        with explained(outgoing.repo):
            try:
                return HfApi().create_commit(
                    outgoing.repo,
                    operations,
                    commit_message=outgoing.title(plan.version),
                    commit_description=plan.why,
                    repo_type="dataset",
                    parent_commit=head.dataset.commit,
                    create_pr=uploaded.create_pr,
                )
            except (HTTPError, RuntimeError) as error:
                # The answer may be lost and the commit there: the next look will tell.
                if _overtaken(error) or wait_after(error, tries):
                    return None
                raise
    except ValueError as error:
        raise RepositoryError(f"The Hub refused the card of {outgoing.repo!r}: {error}") from error


def _operations(outgoing: Outgoing, head: Head, plan: _Plan, uploaded: _Uploaded) -> list[Any]:
    """Files, manifest and card; and the files of the release before that this one lacks."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    old = head.manifest
    manifest = {**outgoing.manifest, "version": plan.version, "why": plan.why}
    manifest["history"] = history(old, manifest)
    texts = outgoing.texts(manifest, head.card if README in head.files else None, old)
    new = {file.path_in_repo for file in uploaded.files} | set(texts)
    stale = {head.folder + name for name in (old or {}).get("files", ())} & head.files - new
    return [
        *uploaded.files,
        *(CommitOperationAdd(path, text.encode()) for path, text in texts.items()),
        *(CommitOperationDelete(path) for path in sorted(stale)),
    ]


def _overtaken(error: Exception) -> bool:
    """Whether somebody else's commit came in between."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError) and error.response.status_code in (409, 412)
