"""Access to the Hub: datasets at one commit, and patience with a busy server."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from distill_datasets.errors import HubError, RepositoryError
from distill_datasets.hub.refusals import BUSY, endpoint, no_token
from distill_datasets.hub.refusals import explained as explained

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

Found = TypeVar("Found")
Kind = Literal["dataset", "model"]

# Seconds before each further try, where the server names none.
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT = 300.0  # the Hub counts requests in windows of five minutes
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hub at one commit; `revision` is what was asked for, None for main."""

    repo: str
    revision: str | None
    commit: str


def resolve(reference: str) -> HubDataset:
    """The commit that `org/name` or `org/name@revision` means now: a branch, a tag or a commit.

    A Hub that can't be reached leaves the commit that the same revision meant the last time it
    was resolved on this machine. Raises `HubError` or `RepositoryError`.
    """
    repo, _, revision = reference.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or (revision == "" and "@" in reference):
        raise RepositoryError(
            f"{reference!r} names no dataset on the Hub: expected 'org/name' or "
            "'org/name@revision', with a branch, a tag or a commit as revision."
        )
    if _COMMIT.fullmatch(revision):
        return HubDataset(repo, revision, revision)
    known = _known_commit(repo, revision or "main")
    try:
        with explained(repo, revision or None):
            commit = str(patiently(_api().dataset_info, repo, revision=revision or None).sha)
    except RepositoryError:
        raise
    except HubError:
        if not known.is_file():
            raise
        commit = known.read_text(encoding="utf-8").strip()
    else:
        _remember(known, commit)
    return HubDataset(repo, revision or None, commit)


def snapshot(dataset: HubDataset, patterns: list[str] | None = None) -> Path:
    """A folder with the dataset's files at its commit, or those that match the patterns.

    Files that are there already are not fetched again; without a network they must all be.
    """
    from huggingface_hub import snapshot_download

    with explained(dataset.repo, dataset.revision or dataset.commit):
        folder = patiently(
            snapshot_download,
            dataset.repo,
            repo_type="dataset",
            revision=dataset.commit,
            allow_patterns=patterns,
        )
    return Path(folder)


def read_text(dataset: HubDataset, path: str) -> str:
    """A small text file at the dataset's commit, in two requests and without a cache."""
    from huggingface_hub import get_session, get_token, hf_hub_url, hf_raise_for_status

    url = hf_hub_url(dataset.repo, path, repo_type="dataset", revision=dataset.commit)
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}

    def fetch() -> str:
        answer = get_session().get(url, headers=headers, follow_redirects=True)
        hf_raise_for_status(answer)
        return answer.content.decode("utf-8")

    with explained(dataset.repo, dataset.revision):
        return patiently(fetch)


def patiently(call: Callable[..., Found], *args: Any, **kwargs: Any) -> Found:
    """Call, and again while the server is busy or the connection breaks: six times in all.

    Waits as long as the server's Retry-After says. For calls that may safely happen twice.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    for tries in range(len(_WAITS)):
        try:
            return call(*args, **kwargs)
        except (HTTPError, RuntimeError) as error:  # the client wraps failed uploads in the latter
            if not wait_after(error, tries):
                raise
    return call(*args, **kwargs)


def wait_after(error: Exception, tries: int) -> bool:
    """Wait before another try, or say that none will help; `tries` counts those that failed."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if tries >= len(_WAITS) or not isinstance(error, HTTPError):
        return False
    seconds = _WAITS[tries]
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in BUSY:
            return False
        seconds = _asked_wait(error, seconds)
    elif type(error).__name__ == "ConnectError" and tries:
        return False  # nobody is there, which waiting rarely changes
    if seconds > _LONGEST_WAIT:
        return False
    time.sleep(seconds)
    return True


def ensure_repository(repo: str, *, kind: Kind, private: bool) -> bool:
    """Make the repository unless it is there; says whether it was made.

    An existing one keeps its visibility, which must be the one asked for.
    """
    api = _api()
    with explained(repo):
        require_token()
        if found := _visibility(repo, kind):
            _check_visibility(repo, found, private)
            return False
        other = "model" if kind == "dataset" else "dataset"
        if patiently(api.repo_exists, repo, repo_type=other):
            raise RepositoryError(
                f"{repo!r} is a {other} on the Hub, not a {kind}: choose another name."
            )
        # Made twice is made once: the answer to the first try may be lost.
        patiently(api.create_repo, repo, repo_type=kind, private=private, exist_ok=True)
    return True


def require_token() -> None:
    """Raises `RepositoryError` where no token is to be found."""
    from huggingface_hub import get_token

    if not get_token():
        raise RepositoryError(no_token())


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi()


def _known_commit(repo: str, revision: str) -> Path:
    """Where the client's cache keeps the commit that a revision meant."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repo, repo_type="dataset")
    return Path(constants.HF_HUB_CACHE).expanduser() / folder / "refs" / revision


def _remember(known: Path, commit: str) -> None:
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(commit, encoding="utf-8")
    except OSError:
        pass  # a cache that can't be written costs a request, not the answer


def _asked_wait(error: "HfHubHTTPError", otherwise: float) -> float:
    """Seconds that the server asks for, by Retry-After or by its rate limit's header."""
    headers = error.response.headers
    asked = headers.get("Retry-After", "")
    if re.fullmatch(r"\d+(\.\d+)?", asked):
        return float(asked)
    if asked:
        try:
            return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
        except ValueError:
            return otherwise
    limit = re.search(r"r=0;t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) + 1 if limit else otherwise


def _visibility(repo: str, kind: Kind) -> str | None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = patiently(_api().repo_info, repo, repo_type=kind, expand=["private"])
    except RepositoryNotFoundError:
        return None
    return "private" if info.private else "public"


def _check_visibility(repo: str, found: str, private: bool) -> None:
    if (found == "private") == private:
        return
    flag = "--public" if found == "public" else "--private"
    raise RepositoryError(
        f"{repo!r} is {found} on the Hub and the release is to be "
        f"{'private' if private else 'public'}: publish with {flag}, choose another repository, "
        f"or change its visibility at {endpoint()} first."
    )
