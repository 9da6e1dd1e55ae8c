"""What lies in a dataset repository on the Hub: its head, its tags, a configuration's release."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from distill_datasets.errors import DatasetError, RepositoryError, VersionError
from distill_datasets.hub.client import HubDataset, explained, patiently, read_text, snapshot
from distill_datasets.hub.references import folder_of
from distill_datasets.releases.diff import (
    FINGERPRINTS,
    Fingerprints,
    fingerprints_of,
    has_fingerprints,
)
from distill_datasets.releases.manifest import MANIFEST, REJECTED, parse_manifest
from distill_datasets.releases.versions import version_of

README = "README.md"


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


def tagged_manifest(head: Head, version: str) -> dict[str, Any] | None:
    """The manifest of the release that a version's tag names; None for a commit without one."""
    from huggingface_hub.errors import EntryNotFoundError

    commit = head.tags[version]
    if commit == head.dataset.commit:
        return head.manifest
    try:
        return manifest_at(HubDataset(head.dataset.repo, version, commit), head.config)
    except RepositoryError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return None
        raise


def commit_of_release(head: Head) -> str:
    """The commit that wrote the manifest of the head."""
    from huggingface_hub import HfApi

    with explained(head.dataset.repo):
        (found,) = patiently(
            HfApi().get_paths_info,
            head.dataset.repo,
            [head.folder + MANIFEST],
            expand=True,
            revision=head.dataset.commit,
            repo_type="dataset",
        )
    assert found.last_commit is not None
    return str(found.last_commit.oid)


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
