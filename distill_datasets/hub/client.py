"""Reads and writes the Hub: datasets at one commit, retries, refusals as sentences."""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from distill_datasets.errors import DistillError, HubError, OutputError, RepositoryError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

Found = TypeVar("Found")
Kind = Literal["dataset", "model"]

BUSY = (408, 425, 429, 500, 502, 503, 504)
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
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    repo, _, revision = reference.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or (revision == "" and "@" in reference):
        raise RepositoryError(
            f"{reference!r} names no dataset on the Hub: expected 'org/name' or "
            "'org/name@revision', with a branch, a tag or a commit as revision."
        )
    if _COMMIT.fullmatch(revision):
        return HubDataset(repo, revision, revision)
    # The client's cache keeps the commit that a revision meant.
    folder = repo_folder_name(repo_id=repo, repo_type="dataset")
    refs = Path(constants.HF_HUB_CACHE).expanduser() / folder / "refs"
    known = refs / (revision or "main")
    try:
        with explained(repo, revision or None):
            commit = str(patiently(HfApi().dataset_info, repo, revision=revision or None).sha)
    except RepositoryError:
        raise
    except HubError:
        if not known.is_file():
            raise
        commit = known.read_text(encoding="utf-8").strip()
    else:
        with suppress(OSError):  # a cache that can't be written costs a request, not the answer
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(commit, encoding="utf-8")
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


def overtaken(error: Exception) -> bool:
    """Whether somebody else's commit came in between."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError) and error.response.status_code in (409, 412)


def ensure_repository(repo: str, *, kind: Kind, private: bool) -> None:
    """Make the repository unless it is there.

    An existing one keeps its visibility, which must be the one asked for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    with explained(repo):
        require_token()
        try:
            info = patiently(api.repo_info, repo, repo_type=kind, expand=["private"])
            if bool(info.private) == private:
                return
            is_, wanted = ("private", "public") if info.private else ("public", "private")
            raise RepositoryError(
                f"{repo!r} is {is_} on the Hub and the release is to be {wanted}: publish with "
                f"--{is_}, choose another repository, or change its visibility at {endpoint()} "
                "first."
            )
        except RepositoryNotFoundError:
            pass  # it is made
        other = "model" if kind == "dataset" else "dataset"
        if patiently(api.repo_exists, repo, repo_type=other):
            raise RepositoryError(
                f"{repo!r} is a {other} on the Hub, not a {kind}: choose another name."
            )
        # Made twice is made once: the answer to the first try may be lost.
        patiently(api.create_repo, repo, repo_type=kind, private=private, exist_ok=True)


def require_token() -> None:
    """Raises `RepositoryError` where no token is to be found."""
    from huggingface_hub import get_token

    if not get_token():
        raise RepositoryError(no_token())


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns the client's exceptions into ours, which say what to do and show no secret.

    A token that no request could carry is refused first.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    _check_token()
    try:
        yield
    except DistillError:
        raise
    except HfHubHTTPError as error:
        raise _refused(error, repo, revision) from error
    except HFValidationError as error:
        raise RepositoryError(f"{repo!r} can't name a repository: {error}") from error
    except RuntimeError as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refused(error.__cause__, repo, revision) from error
        raise _unreached(error.__cause__ or error, repo) from error
    except HTTPError as error:
        raise _unreached(error, repo) from error
    except OSError as error:
        raise _local(error, repo, revision) from error


def _check_token() -> None:
    from huggingface_hub import get_token

    if not re.fullmatch(r"[!-~]*", get_token() or ""):
        raise RepositoryError(
            "The Hub token holds signs that no token has, such as blanks or curly quotes: set "
            "HF_TOKEN again to the bare token, or run `hf auth login`."
        )


def endpoint() -> str:
    """The Hub's address to be shown: HF_ENDPOINT as it was when the client was imported."""
    from huggingface_hub import constants

    return _shown(constants.ENDPOINT)


def _shown(text: object) -> str:
    """A text without the token, and without the user in an address."""
    from huggingface_hub import get_token

    bare = re.sub(r"://[^\s/@]+@", "://", str(text))
    token = get_token()
    return bare.replace(token, "(the token)") if token else bare


def no_token() -> str:
    """What to do without a token."""
    return (
        "There is no Hub token: run `hf auth login`, or set HF_TOKEN to a token with the role "
        f"'write' from {endpoint()}/settings/tokens."
    )


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


def _refused(error: "HfHubHTTPError", repo: str, revision: str | None) -> HubError:
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code
    said = _shown(error.server_message or f"status {status}")
    named = {
        GatedRepoError: f"is gated: accept its terms at {endpoint()}, then try again",
        RevisionNotFoundError: f"has no revision {revision!r}: name one of its branches, tags or "
        "commits",
        EntryNotFoundError: f"lacks a file at {revision or 'main'}: {said}",
    }
    for kind, problem in named.items():
        if isinstance(error, kind):
            return RepositoryError(f"{repo!r} {problem}.")
    if status in BUSY:
        return HubError(
            f"{endpoint()} answered {status} for {repo!r} again and again ({said}). Run the same "
            "again later: what was uploaded is not uploaded twice."
        )
    if status == 401 and not get_token():
        return RepositoryError(f"{repo!r} is missing or private. {no_token()}")
    if isinstance(error, RepositoryNotFoundError):
        return RepositoryError(_missing(repo))
    if status == 401:
        return RepositoryError(
            f"The Hub refused the token ({said}): it is wrong or has expired. Run "
            "`hf auth login`, or set HF_TOKEN to a valid one."
        )
    if status in (403, 404):
        return RepositoryError(_forbidden(repo, said))
    return RepositoryError(f"The Hub refused the request for {repo!r} ({status}): {said}")


def _missing(repo: str) -> str:
    """Why there is no such dataset, as far as the Hub tells."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        if HfApi().repo_exists(repo, repo_type="model"):
            return f"{repo!r} is a model on the Hub, not a dataset: name a dataset."
    except (HTTPError, OSError):
        pass  # the first answer says enough
    return (
        f"There is no dataset {repo!r} on the Hub, or this token may not see it: check the name, "
        "and that `hf auth whoami` is a member of its organisation."
    )


def _forbidden(repo: str, said: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        who = HfApi().whoami()
    except (HTTPError, OSError):
        return f"This token may not write to {repo!r} ({said}). Use one with the role 'write'."
    name, role = who["name"], who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        return (
            f"The token of {name!r} is read-only: set HF_TOKEN to one with the role 'write' from "
            f"{endpoint()}/settings/tokens."
        )
    places = [name, *(organisation["name"] for organisation in who.get("orgs", []))]
    if repo.partition("/")[0] not in places:
        return (
            f"{name!r} may not publish under {repo.partition('/')[0]!r}, which is missing or not "
            f"theirs: expected one of {places}. Choose one, or create the organisation first."
        )
    return f"The token of {name!r} may not write to {repo!r} ({said}): give it the role 'write'."


def _unreached(error: BaseException, repo: str) -> HubError:
    if str(error).endswith("Hub is not supported") or "xet" in str(error).lower():
        return HubError(
            f"The upload to {repo!r} through Xet failed: {_shown(error)}. Run again with "
            "HF_HUB_DISABLE_XET=1, which uploads through LFS."
        )
    return HubError(
        f"Can't reach {endpoint()} for {repo!r}: {_shown(error)}. Check the network and "
        "HF_ENDPOINT, then run the same again: what was uploaded is not uploaded twice."
    )


def _local(error: OSError, repo: str, revision: str | None) -> HubError | OutputError:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        where = os.environ.get("HF_HOME", "~/.cache/huggingface")
        return OutputError(
            f"Can't write the Hub's cache: {_shown(error)}. Free some space, or set HF_HOME "
            f"(now {where}) to a folder with more."
        )
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        at = f" at {revision}" if revision else ""
        return HubError(
            f"{repo!r}{at} is not on this machine and the Hub can't be reached: get it once with "
            "a network, and with HF_HUB_OFFLINE unset."
        )
    return _unreached(error, repo)
