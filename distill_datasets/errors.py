"""Everything this package raises on purpose.

    DistillError
    ├── RecipeError (ValueError)         a recipe, prompt or query source is wrong
    ├── DatasetError (ValueError)        a dataset lacks what its reader needs
    ├── ModelError (ValueError)          a model reference names nothing that can answer
    │   └── AccessError (PermissionError)   a key is missing, refused or out of credit
    ├── SettingsError (ValueError)       a training setting is out of its range
    ├── VersionError (FileExistsError)   a version is taken by other content
    ├── ScreeningError (ValueError)      a secret or personal data would leave this machine
    ├── OutputError (OSError)            an output folder can't be written
    ├── ServiceError (ConnectionError)   a server is gone or broke its protocol
    ├── HubError (ConnectionError)       the Hub can't be reached or fails
    │   └── RepositoryError (PermissionError)   the Hub refuses: token, name, kind or revision
    └── GenerationError (RuntimeError)   rows fail alike: going on would only cost money

`except DistillError` catches all of them; each also refines the standard exception in brackets.
"""


class DistillError(Exception):
    """Base of the errors that this package raises; the message says what to do."""

    exit_code = 2


class RecipeError(DistillError, ValueError):
    """A recipe, its prompt or its queries can't be used as written."""


class DatasetError(DistillError, ValueError):
    """A dataset lacks the columns, splits or rows that its reader needs."""


class ModelError(DistillError, ValueError):
    """A model reference names nothing that can answer or be trained."""


class AccessError(ModelError, PermissionError):
    """A model exists behind a key that is missing, refused or out of credit."""


class SettingsError(DistillError, ValueError):
    """A training setting is out of its range."""


class VersionError(DistillError, FileExistsError):
    """A version is already published with other content."""


class ScreeningError(DistillError, ValueError):
    """A folder to be pushed holds secrets or personal data, or can't be screened."""


class OutputError(DistillError, OSError):
    """An output folder can't be written: read-only, full, or not a folder."""


class ServiceError(DistillError, ConnectionError):
    """A server can't be reached, ended, or answered outside its protocol."""

    exit_code = 1


class HubError(DistillError, ConnectionError):
    """The Hub can't be reached, or fails again and again; what is there is whole."""

    exit_code = 1


class RepositoryError(HubError, PermissionError):
    """The Hub refuses what was asked: the token, the name, the kind or the revision is wrong."""

    exit_code = 2


class GenerationError(DistillError, RuntimeError):
    """The first rows all failed alike; paid answers are in the journal."""

    exit_code = 1
