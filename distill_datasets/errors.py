"""Everything this package raises on purpose.

    DistillError
    ├── RecipeError (ValueError)         a recipe, prompt or query source is wrong
    ├── DatasetError (ValueError)        a dataset lacks what its reader needs
    ├── ModelError (ValueError)          a model reference names nothing that can answer
    │   └── AccessError (PermissionError)   a key is missing, refused or out of credit
    ├── SettingsError (ValueError)       a setting is out of its range
    ├── VersionError (FileExistsError)   a version is taken by other content
    ├── ScreeningError (ValueError)      a secret or personal data would leave this machine
    ├── OutputError (OSError)            an output folder can't be written
    │   └── OtherTrainingError              a training's folder holds another training
    ├── ServiceError (ConnectionError)   a server is gone or broke its protocol
    ├── HubError (ConnectionError)       the Hub can't be reached or fails
    │   └── RepositoryError (PermissionError)   the Hub refuses: token, name, kind or revision
    ├── RequestError (RuntimeError)      one request failed; others may succeed
    │   ├── RetryableError (TimeoutError)   and so may this one, later
    │   └── RejectedError (ValueError)      and this one never will
    ├── PriceError (ValueError)          a price file is wrong, or nobody says what a model costs
    ├── BudgetReached (InterruptedError) what may be spent is spent; what was bought is kept
    ├── PendingError (InterruptedError)  a provider takes its time: run again later
    ├── GenerationError (RuntimeError)   rows fail alike: going on would only cost money
    └── GateError (RuntimeError)         a student breaks the rules of its gate

`except DistillError` catches all of them; each also refines the standard exception in brackets.
"""

from difflib import get_close_matches


class DistillError(Exception):
    """Base of the errors that this package raises; the message says what to do."""

    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the sentence, without the lines of this package that raised it."""
        return [f"{type(self).__name__}: {self}", *getattr(self, "__notes__", ())]


class RecipeError(DistillError, ValueError):
    """A recipe, its prompt or its queries can't be used as written."""


class DatasetError(DistillError, ValueError):
    """A dataset lacks the columns, splits or rows that its reader needs."""


class ModelError(DistillError, ValueError):
    """A model reference names nothing that can answer or be trained."""


class AccessError(ModelError, PermissionError):
    """A model exists behind a key that is missing, refused or out of credit."""


class SettingsError(DistillError, ValueError):
    """A setting is out of its range."""


class VersionError(DistillError, FileExistsError):
    """A version is already published with other content."""


class ScreeningError(DistillError, ValueError):
    """A folder to be pushed holds secrets or personal data, or can't be screened."""


class OutputError(DistillError, OSError):
    """An output folder can't be written: read-only, full, or not a folder."""


class OtherTrainingError(OutputError):
    """A training's folder holds a training of another dataset, student or settings."""


class ServiceError(DistillError, ConnectionError):
    """A server can't be reached, ended, or answered outside its protocol."""

    exit_code = 1


class HubError(DistillError, ConnectionError):
    """The Hub can't be reached, or fails again and again; what is there is whole."""

    exit_code = 1


class RepositoryError(HubError, PermissionError):
    """The Hub refuses what was asked: the token, the name, the kind or the revision is wrong."""

    exit_code = 2


class PriceError(DistillError, ValueError):
    """A price file can't be used, or nobody says what a model costs."""


class BudgetReached(DistillError, InterruptedError):
    """What may be spent is spent; everything that was bought is kept for a later run."""

    exit_code = 1


class PendingError(DistillError, InterruptedError):
    """A provider takes its time: its batches, or a limit that ends much later. Run again then."""

    exit_code = 75  # what `sysexits.h` calls a temporary failure


class GenerationError(DistillError, RuntimeError):
    """The first rows all failed alike; paid answers are in the journal."""

    exit_code = 1


class GateError(DistillError, RuntimeError):
    """A student doesn't keep the rules of its gate; the message says which, and by how much."""

    exit_code = 1


class RequestError(DistillError, RuntimeError):
    """One request failed.

    `type` is a short name that rows carry ("rate limit", "time-out", "connection", "server error",
    "content policy", "context length", "bad request"), `status` the HTTP status where there was
    one. `attempts` counts how often it was asked.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, type: str, status: int | None = None, attempts: int = 1
    ) -> None:
        """`message` is what the server said, or what happened."""
        super().__init__(message)
        self.type, self.status, self.attempts = type, status, attempts


class RetryableError(RequestError, TimeoutError):
    """The same request may succeed later.

    `retry_after` is in seconds, as the server asked. `most_attempts` is how often a request may be
    asked in all where the server answers like this, None where nothing limits it: an answer that
    can't be read is paid each time, and mostly comes again.
    """

    retry_after: float | None = None
    most_attempts: int | None = None


class RejectedError(RequestError, ValueError):
    """The server will never answer this request: too long, malformed, or against its policy."""


# What no later request of the same run would escape.
FATAL = (
    AccessError,
    BudgetReached,
    ModelError,
    OutputError,
    PendingError,
    PriceError,
    ServiceError,
)


def nearest(found: str, valid: list[str], cutoff: float = 0.5) -> str:
    """A question that names the closest valid word, where one is close (1 is equal)."""
    close = get_close_matches(found, valid, n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""
