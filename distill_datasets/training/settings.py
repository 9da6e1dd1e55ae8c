"""How to train: every setting with its default, checked before anything is spent."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from distill_datasets.errors import SettingsError
from distill_datasets.training.objective_settings import ObjectiveSettings

_AT_LEAST_ONE = (
    "epochs",
    "batch_size",
    "batch_tokens",
    "rank",
    "evaluate_every",
    "patience",
    "save_every",
    "rolling_every",
    "max_length",
    "max_rows",
    "max_steps",
)
_NOT_NEGATIVE = (
    "warmup_steps",
    "weight_decay",
    "grad_clip",
    "ahead",
    "min_improvement",
    "price_per_million",
)
_CHOICES = {
    "schedule": ("linear", "cosine", "constant"),
    "normalization": ("token", "example"),
    "preset": (None, "poc", "debug", "production"),
    "track": (None, "wandb", "trackio", "tensorboard"),
}
_LEAST_TTL = 3600  # seconds: Tinker takes no less
# What may change between two runs of one training: no weight depends on it.
_FREE = ("ahead", "track", "price_per_million", "ttl_seconds", "rolling_every", "internalisation")


@dataclass(frozen=True)
class _Size:
    rows: int | None
    steps: int | None


_PRESETS = {
    "poc": _Size(rows=8, steps=100),
    "debug": _Size(rows=10, steps=50),
    "production": _Size(rows=None, steps=None),
}


@dataclass(frozen=True)
class TrainSettings:
    """How to train; None leaves it to the model or to the length of the run.

    Size. Without `epochs` there are two, or as many as make 60 steps: few rows need many passes.
    `preset` "poc" is 8 rows and 100 steps, "debug" 10 rows and 50 steps, "production" all rows;
    `max_rows`, `epochs` and `max_steps` win over it. `batch_tokens` fills batches up to so many
    tokens, rows of similar length together, instead of `batch_size` rows. `max_length` is in
    tokens: longer rows are left out and counted, never cut.

    Learning. The rate rises over `warmup_steps`, then follows `schedule`. `weight_decay` and
    `grad_clip` (the gradient's greatest norm) are 0 for none. `normalization` "token" weighs every
    response token of a batch alike, "example" every response. `seed` decides the order of the
    rows, and without `lora_seed` the first LoRA weights.

    Stopping and keeping. Every `evaluate_every` steps (by default ten times a run) the validation
    rows are measured, with `internalisation` also against base and teacher, where the dataset is a
    release whose teacher can score; `select` names the number that the best checkpoint has
    (validation_loss, accuracy, internalisation), the lowest where it ends in "loss", else the
    highest. Training stops after `patience` measurements without an improvement of
    `min_improvement`. A full checkpoint is kept every `save_every` steps, and between those the
    newest state every `rolling_every`. A server deletes both after `ttl_seconds` (0 for never; by
    default a week on a hosted server, and never on this machine), the best and the final one it
    keeps.

    `ahead` batches are queued behind the one that is being learned; 0 waits for each.
    `price_per_million` training tokens is in your currency. `config` is a configuration of the
    dataset.
    """

    preset: Literal["poc", "debug", "production"] | None = None
    epochs: int | None = None
    batch_size: int = 32
    batch_tokens: int | None = None
    max_length: int | None = None
    max_rows: int | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    grad_clip: float = 0.0
    normalization: Literal["token", "example"] = "token"
    seed: int = 0
    rank: int = 32
    lora_seed: int | None = None
    train_attention: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    evaluate_every: int | None = None
    select: str = "validation_loss"
    internalisation: bool = True
    patience: int | None = None
    min_improvement: float = 0.0
    save_every: int = 100
    rolling_every: int = 20
    ttl_seconds: int | None = None
    ahead: int = 2
    track: Literal["wandb", "trackio", "tensorboard"] | None = None
    price_per_million: float | None = None
    renderer: str | None = None
    config: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)

    def __post_init__(self) -> None:
        """Refuse what can't be trained, before anything is spent."""
        self._require_ranges()
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise SettingsError(
                    f"{name} must be one of {known}; found {getattr(self, name)!r}."
                )
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise SettingsError(f"learning_rate must be above 0; found {self.learning_rate!r}.")
        if self.ttl_seconds and self.ttl_seconds < _LEAST_TTL:
            raise SettingsError(
                f"ttl_seconds must be 0 or at least {_LEAST_TTL}, an hour; found "
                f"{self.ttl_seconds!r}."
            )
        if not (self.train_attention or self.train_mlp or self.train_unembed):
            raise SettingsError("Nothing to train: turn on attention, mlp or unembed.")

    def _require_ranges(self) -> None:
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be at least 1; found {value!r}.")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise SettingsError(f"{name} can't be below 0; found {value!r}.")

    @property
    def rows(self) -> int | None:
        """The most rows to train on, None for all."""
        return self.max_rows or (_PRESETS[self.preset].rows if self.preset else None)

    @property
    def steps(self) -> int | None:
        """The steps that the preset sets, where nothing else sets them."""
        explicit = self.epochs or self.max_steps
        return None if explicit or not self.preset else _PRESETS[self.preset].steps


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that decide the weights and the choice among them; a missing one has its default."""
    return {
        name: settings.get(name, value)
        for name, value in asdict(TrainSettings()).items()
        if name not in _FREE
    }


def unlike_default(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The decisive ones that are not the defaults: short enough for a server to keep."""
    default = decisive({})
    return {name: v for name, v in decisive(settings).items() if v != default[name]}
