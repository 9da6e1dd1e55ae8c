"""The Tinker SDK: its hosted service, waiting for what it is asked, its errors as sentences."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from typing import Any

import tinker

# The SDK's transport imports this from its threads at its first failure, where the import lock of
# CPython 3.11 can break.
with suppress(ImportError):
    import pyqwest._errors  # noqa: F401

from distill_datasets.errors import AccessError, ModelError, ServiceError

GLANCE = 2.0  # seconds between looks at whether a server of this machine still runs
_NO_KEY = (
    "{reference!r} needs a key: set TINKER_API_KEY (from the Tinker console), and "
    "TINKER_BASE_URL for another server. To try everything without a key, use 'pocket'."
)


def rest_client() -> tinker.RestClient:
    """Named by address and key: left out, the SDK keeps one client for the whole process."""
    return tinker.RestClient(
        base_url=os.environ.get("TINKER_BASE_URL"), api_key=os.environ["TINKER_API_KEY"]
    )


def require_key(reference: str) -> None:
    """Raises `AccessError` where the hosted service could not be asked."""
    if not os.environ.get("TINKER_API_KEY"):
        raise AccessError(_NO_KEY.format(reference=reference))


def require_service(reference: str) -> None:
    """Raises `ServiceError` where nobody answers: a plain request knows at once what the SDK
    would find out in minutes.
    """
    import httpx

    url = os.environ.get("TINKER_BASE_URL", "https://tinker.thinkingmachines.dev")
    try:
        httpx.get(url, timeout=20)
    except httpx.HTTPError as error:
        raise ServiceError(
            f"Can't reach {url} for {reference!r}: {error}. Check the network and TINKER_BASE_URL."
        ) from error


def wait(request: Any, ended: Callable[[], ServiceError | None]) -> Any:
    """A request's result, or what `ended` says of its server.

    The SDK tries a dead address again for five minutes; a server of this machine that has ended
    is noticed within seconds.
    """
    result = request.future()
    while True:
        with suppress(FutureTimeout):
            return result.result(GLANCE)
        if result.done():
            return result.result()
        if error := ended():
            raise error


@contextmanager
def explained(reference: str) -> Iterator[None]:
    """Turns the SDK's refusals that no later call can cure into errors that say what to set."""
    try:
        yield
    except (tinker.AuthenticationError, tinker.PermissionDeniedError) as error:
        raise AccessError(
            f"{reference!r}: the server refused the key ({error}). Check TINKER_API_KEY."
        ) from error
    except tinker.BillingError as error:
        raise AccessError(f"{reference!r}: the account is out of credit ({error}).") from error
    except tinker.NotFoundError as error:
        raise ModelError(f"{reference!r} is unknown to the server: {error}") from error


@contextmanager
def all_explained(reference: str, *, refused: str, kept: str) -> Iterator[None]:
    """Turns every error of the SDK into one of ours, for requests that nobody sends again.

    `refused` is what a server did that would not, `kept` what to do where it is gone.
    """
    try:
        with explained(reference):
            yield
    except (tinker.APIConnectionError, tinker.InternalServerError) as error:
        raise ServiceError(f"{reference!r}: the server is gone ({error}). {kept}") from error
    except (tinker.RequestFailedError, tinker.APIStatusError) as error:
        raise ModelError(f"{reference!r}: the server {refused}: {error}") from error
