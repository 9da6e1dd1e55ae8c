"""The Tinker SDK: its hosted service, waiting for what it is asked, its errors as sentences."""

import asyncio
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

from distill_datasets.errors import (
    AccessError,
    ModelError,
    RejectedError,
    RetryableError,
    ServiceError,
)
from distill_datasets.models.endpoint import Endpoint, read_address, read_key
from distill_datasets.models.openai.errors import read_retry_after

GLANCE = 2.0  # seconds between looks at whether a server of this machine still runs
_HOSTED = "https://tinker.thinkingmachines.dev"
_FATAL = (
    tinker.AuthenticationError,
    tinker.PermissionDeniedError,
    tinker.BillingError,
    tinker.NotFoundError,
)
_KEY, _ADDRESS = "TINKER_API_KEY", "TINKER_BASE_URL"


def hosted_key(reference: str) -> str:
    """The hosted service's key; raises `AccessError` where it could not be asked."""
    key = read_key(os.environ.get(_KEY), _KEY)
    if key is None:
        raise AccessError(
            f"{reference!r} needs a key: set {_KEY} (from the Tinker console), and {_ADDRESS} for "
            "another server. To try everything without a key, use 'pocket'."
        )
    if not key.startswith(("tml-", "eyJ")):
        raise AccessError(
            f"{_KEY}: expected a key that begins with 'tml-', found another. Copy it again from "
            "the Tinker console."
        )
    return key


def _address() -> str | None:
    address = os.environ.get(_ADDRESS)
    return str(read_address(address, _ADDRESS)) if address else None


def hosted_service(reference: str) -> tinker.ServiceClient:
    """A session of the hosted service, or of the server that TINKER_BASE_URL names."""
    return tinker.ServiceClient(base_url=_address(), api_key=hosted_key(reference))


def rest_client(reference: str) -> tinker.RestClient:
    """Named by address and key: left out, the SDK keeps one client for the whole process."""
    return tinker.RestClient(base_url=_address(), api_key=hosted_key(reference))


def require_service(reference: str) -> None:
    """Raises `ServiceError` where nobody answers: a plain request knows at once what the SDK
    would find out in minutes.
    """
    Endpoint(read_address(_address() or _HOSTED, _ADDRESS), None, _ADDRESS).look("", reference)


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


async def answered(request: Any, ended: Callable[[], ServiceError | None]) -> Any:
    """The same as `wait` on an event loop, for a `concurrent.futures.Future`."""
    waiting = asyncio.wrap_future(request)
    try:
        while True:
            done, _ = await asyncio.wait([waiting], timeout=GLANCE)
            if done:
                return waiting.result()
            if error := ended():
                raise error
    finally:
        waiting.cancel()


@contextmanager
def explained(reference: str) -> Iterator[None]:
    """Turns the SDK's refusals that no later call can cure into errors that say what to set."""
    try:
        yield
    except (tinker.AuthenticationError, tinker.PermissionDeniedError) as error:
        raise AccessError(
            f"{reference!r}: the server refused the key ({error}). Check {_KEY}."
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


@contextmanager
def classified() -> Iterator[None]:
    """Tells requests that may succeed later from those that never will."""
    try:
        yield
    except tinker.RequestFailedError as error:
        if error.category == tinker.types.RequestErrorCategory.User:
            raise RejectedError(error.message, type=_kind(error.message)) from error
        raise RetryableError(error.message, type="server error") from error
    except (tinker.BadRequestError, tinker.UnprocessableEntityError) as error:
        raise RejectedError(str(error), type=_kind(str(error)), status=error.status_code) from error
    except tinker.APIStatusError as error:
        if isinstance(error, _FATAL):
            raise  # `explained` says what to set
        limited = isinstance(error, tinker.RateLimitError)
        kind = "rate limit" if limited else "server error"
        later = RetryableError(str(error), type=kind, status=error.status_code)
        later.retry_after = read_retry_after(error.response.headers)
        raise later from error
    except (tinker.APITimeoutError, TimeoutError) as error:
        raise RetryableError(str(error) or "no answer in time", type="time-out") from error
    except tinker.APIConnectionError as error:
        raise RetryableError(str(error), type="connection") from error


def _kind(message: str) -> str:
    return "context length" if "context" in message.lower() else "bad request"
