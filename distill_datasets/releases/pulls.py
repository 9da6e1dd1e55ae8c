"""Releases that wait in pull requests."""

from dataclasses import dataclass

from distill_datasets.hub.client import HubDataset, patiently
from distill_datasets.hub.refusals import explained
from distill_datasets.releases.outgoing import Outgoing
from distill_datasets.releases.repository import manifest_at

_NEWEST = 10  # pull requests that are looked at


@dataclass(frozen=True)
class Pull:
    """An open pull request with a release in it."""

    version: str
    commit: str
    why: str
    url: str


def open_pull(outgoing: Outgoing, version: str | None) -> Pull | None:
    """The pull request that holds this very release, so that none is opened twice."""
    from huggingface_hub import HfApi

    api, repo = HfApi(), outgoing.repo
    with explained(repo):
        refs = patiently(api.list_repo_refs, repo, repo_type="dataset", include_pull_requests=True)
        pulls = sorted(refs.pull_requests or [], key=lambda one: -int(one.ref.split("/")[-1]))
        for pull in pulls[:_NEWEST]:
            number = int(pull.ref.split("/")[-1])
            details = patiently(api.get_discussion_details, repo, number, repo_type="dataset")
            title = outgoing.title("")
            if details.status not in ("open", "draft") or not details.title.startswith(title):
                continue
            found = manifest_at(HubDataset(repo, pull.ref, pull.target_commit), outgoing.config)
            same = found["content_digest"] == outgoing.manifest["content_digest"]
            if same and version in (None, found["version"]):
                return Pull(found["version"], pull.target_commit, found["why"], details.url)
    return None
