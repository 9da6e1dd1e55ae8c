"""What the Hub refuses, as sentences that say what to do."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distill_datasets.errors import DistillError, HubError, OutputError, RepositoryError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

BUSY = (408, 425, 429, 500, 502, 503, 504)


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns the client's exceptions into ours, which say what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

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


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT as it was when the client was imported."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def no_token() -> str:
    """What to do without a token."""
    return (
        "There is no Hub token: run `hf auth login`, or set HF_TOKEN to a token with the role "
        f"'write' from {endpoint()}/settings/tokens."
    )


def _refused(error: "HfHubHTTPError", repo: str, revision: str | None) -> HubError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RevisionNotFoundError,
    )

    said = error.server_message or f"status {error.response.status_code}"
    if isinstance(error, GatedRepoError):
        return RepositoryError(
            f"{repo!r} is gated: accept its terms at {endpoint()}, then try again."
        )
    if isinstance(error, RevisionNotFoundError):
        return RepositoryError(
            f"{repo!r} has no revision {revision!r}: name one of its branches, tags or commits."
        )
    if isinstance(error, EntryNotFoundError):
        return RepositoryError(f"{repo!r} lacks a file at {revision or 'main'}: {said}.")
    return _by_status(error, repo, said)


def _by_status(error: "HfHubHTTPError", repo: str, said: str) -> HubError:
    from huggingface_hub import get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    status = error.response.status_code
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
    if status in BUSY:
        return HubError(
            f"{endpoint()} answered {status} for {repo!r} again and again ({said}). Run the same "
            "again later: what was uploaded is not uploaded twice."
        )
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
        return HubError(_xet(error, repo))
    return HubError(
        f"Can't reach {endpoint()} for {repo!r}: {error}. Check the network and HF_ENDPOINT, "
        "then run the same again: what was uploaded is not uploaded twice."
    )


def _xet(error: BaseException, repo: str) -> str:
    return (
        f"The upload to {repo!r} through Xet failed: {error}. Run again with "
        "HF_HUB_DISABLE_XET=1, which uploads through LFS."
    )


def _local(error: OSError, repo: str, revision: str | None) -> HubError | OutputError:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        where = os.environ.get("HF_HOME", "~/.cache/huggingface")
        return OutputError(
            f"Can't write the Hub's cache: {error}. Free some space, or set HF_HOME (now {where}) "
            "to a folder with more."
        )
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        at = f" at {revision}" if revision else ""
        return HubError(
            f"{repo!r}{at} is not on this machine and the Hub can't be reached: get it once with "
            "a network, and with HF_HUB_OFFLINE unset."
        )
    return _unreached(error, repo)
