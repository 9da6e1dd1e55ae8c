"""How to train: every setting with its default and range, checked before anything is spent."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from distill_datasets.errors import SettingsError
from distill_datasets.settings import check, setting

Turns = Literal["last", "all"]
VALIDATION_LOSS = "validation_loss"
_LEAST_TTL = 3600  # seconds: Tinker takes no less
# What may change between two runs of one training: no weight depends on it.
_FREE = (
    *("ahead", "track", "price_per_million", "ttl_seconds", "rolling_every", "internalisation"),
    "answered_rows",
)
# Settings that version 0.1 wrote down, with the one value that means the same today.
_CONSTANT = {"temperature": 1.0, "samples": 1}
# Settings that version 0.1 lacks: what is said of a training names them only where they are used.
_LATER = ("turns", "validation_rows")
_WARM = 20  # steps: a new student's own samples say little of the prompt
_PRESETS = {"poc": (8, 100), "debug": (10, 50)}  # rows, steps


@dataclass(frozen=True)
class ObjectiveSettings:
    """How a prompt is distilled.

    "sft" learns the responses; "soft" the teacher's probabilities at each of their tokens;
    "on_policy" has the student answer without the prompt, and the teacher, who sees it, judge every
    token. A scoring teacher must have the student's tokenizer, but for the labels "choices".
    """

    name: Literal["sft", "soft", "on_policy"] = setting(
        "sft",
        "what is learned: responses, the teacher's probabilities, or its corrections",
        group="objective",
        flag="objective",
    )
    teacher: str | None = setting(
        None,
        "the model that scores tokens for the objectives soft and on_policy",
        group="objective",
        flag="scorer",
        unset="the release's teacher",
    )
    top_k: int = setting(
        20,
        "likeliest tokens that are compared at each place; 0 on policy: the sampled one alone",
        group="objective",
        at_least=0,
    )
    alpha: float = setting(
        0.0, "share of hard labels among soft ones", at_least=0, at_most=1, flag=False
    )
    labels: Literal["auto", "choices", "stored", "scored"] = setting(
        "auto",
        "source of soft labels: exact ones of a closed answer set (choices), those that generation "
        "kept (stored), the teacher reading each response (scored), or the first of these that the "
        "release allows",
        group="objective",
    )
    kl: Literal["reverse", "forward"] = setting(
        "reverse", "the divergence that on-policy training lowers", group="objective"
    )
    max_tokens: int | None = setting(
        None, "tokens of a sampled answer", at_least=1, flag=False, unset="the recipe's"
    )
    stale: int = setting(
        1, "age of the sampling weights in steps", at_least=0, at_most=1, flag=False
    )
    warm_start: int | None = setting(
        None,
        "steps that learn the release's responses before a new student samples, on policy",
        group="objective",
        at_least=0,
        unset="a third of the steps, at most 20",
    )

    def __post_init__(self) -> None:
        """Refuse what can't be trained, before anything is spent."""
        try:
            check(self)
        except SettingsError as error:
            raise SettingsError(f"objective.{error}") from None
        shifts = self.name == "on_policy" and self.kl == "reverse"
        if not self.policy_gradient and self.top_k <= shifts:
            least = (
                "2, between which the reverse KL shifts probability, or 0 for the sampled token "
                "alone"
                if shifts
                else "1"
            )
            raise SettingsError(f"objective.top_k must be at least {least}; found {self.top_k!r}.")

    def warm_steps(self, total: int) -> int:
        """How many of a new student's `total` steps learn the release's responses, on policy."""
        most = min(total // 3, _WARM)
        return most if self.warm_start is None else self.warm_start

    @property
    def policy_gradient(self) -> bool:
        """Whether the sampled tokens alone are corrected, which has a loss of its own."""
        return (self.name, self.kl, self.top_k) == ("on_policy", "reverse", 0)


@dataclass(frozen=True)
class TrainSettings:
    """How to train; None leaves it to the model or to the length of the run.

    `max_rows`, `epochs` and `max_steps` win over a `preset`, `batch_tokens` over `batch_size`. Rows
    are never cut, and the last batch of an epoch may be smaller. The best checkpoint is the one
    with the lowest `select` where that ends in "loss", else with the highest; it and the final one
    stay on the server.

        TrainSettings(rank=16, learning_rate=1e-4, patience=3)
    """

    preset: Literal["poc", "debug"] | None = setting(
        None, "a small trial: poc is 8 rows and 100 steps, debug 10 rows and 50", group="size"
    )
    epochs: int | None = setting(
        None,
        "passes over the rows",
        group="size",
        at_least=1,
        unset="two, or as many as make 60 steps",
    )
    batch_size: int = setting(32, "rows a step", group="size", at_least=1)
    batch_tokens: int | None = setting(
        None, "tokens a step, in rows of similar length", at_least=1, flag=False
    )
    max_length: int | None = setting(
        None,
        "tokens a row; longer rows are left out and counted",
        group="size",
        at_least=1,
        unset="the model's context, at most 4096",
    )
    max_rows: int | None = setting(
        None, "rows to train on, chosen by the seed", group="size", at_least=1, unset="all"
    )
    max_steps: int | None = setting(
        None, "steps after which training ends", group="size", at_least=1, unset="all epochs"
    )
    learning_rate: float | None = setting(
        None, "the highest learning rate", group="learning", above=0, unset="the model's"
    )
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "linear", "how the learning rate falls", group="learning"
    )
    warmup_steps: int = setting(0, "linear warm-up steps", group="learning", at_least=0)
    weight_decay: float = setting(0.0, "Adam's weight decay", group="learning", at_least=0)
    grad_clip: float = setting(
        0.0, "the gradient's greatest norm, 0 for any", at_least=0, flag=False
    )
    normalization: Literal["token", "example"] = setting(
        "token", "what weighs alike in a batch: every response token, or every response", flag=False
    )
    seed: int = setting(0, "seed of the rows' order and the first weights", group="learning")
    rank: int = setting(32, "rank of the LoRA adapter", group="learning", at_least=1)
    lora_seed: int | None = setting(None, "seed of the first weights", flag=False, unset="seed")
    train_attention: bool = setting(True, "adapt the attention layers", flag=False)
    train_mlp: bool = setting(True, "adapt the MLP layers", flag=False)
    train_unembed: bool = setting(True, "adapt the output embeddings", flag=False)
    evaluate_every: int | None = setting(
        None,
        "steps between measurements of the validation rows",
        group="stopping",
        at_least=1,
        unset="at most ten times, and for a tenth of the training's tokens",
    )
    select: Literal["validation_loss", "accuracy", "internalisation"] = setting(
        "validation_loss", "the number by which the best checkpoint is chosen", group="stopping"
    )
    internalisation: bool = setting(
        True,
        "don't ask base and teacher how likely they find the validation answers",
        group="stopping",
    )
    patience: int | None = setting(
        None,
        "stop early after N measurements without an improvement",
        group="stopping",
        at_least=1,
        unset="train to the end",
    )
    min_improvement: float = setting(
        0.0, "the least improvement that counts for patience", at_least=0, flag=False
    )
    save_every: int = setting(100, "steps between checkpoints that stay", at_least=1, flag=False)
    rolling_every: int = setting(
        20, "steps between states that replace each other", at_least=1, flag=False
    )
    ttl_seconds: int | None = setting(
        None,
        "seconds after which a server deletes checkpoints, 0 for never",
        at_least=0,
        flag=False,
        unset="a week on a hosted server, never on this machine",
    )
    ahead: int = setting(2, "batches queued behind the one that is learned", at_least=0, flag=False)
    track: Literal["wandb", "trackio", "tensorboard"] | None = setting(
        None, "an experiment tracker that gets the numbers too", group="reporting"
    )
    price_per_million: float | None = setting(
        None,
        "price of a million training tokens, to log what is spent",
        group="reporting",
        at_least=0,
        unset="that of --prices, if any",
    )
    renderer: str | None = setting(
        None,
        "the cookbook renderer that turns conversations into tokens",
        group="dataset",
        unset="the model's",
    )
    config: str | None = setting(
        None, "a configuration of the dataset", group="dataset", unset="the dataset's own"
    )
    turns: Turns = setting(
        "last",
        "the assistant's turns of a conversation that are learned: the last, or all",
        group="dataset",
    )
    train_split: str = setting("train", "the split to train on", group="dataset")
    validation_split: str = setting("validation", "the split to measure on", group="dataset")
    validation_rows: int = setting(
        512,
        "most validation rows that are measured; a larger split gives a fixed choice of them",
        group="stopping",
        at_least=1,
    )
    answered_rows: int = setting(
        16,
        "validation queries that the student answers at each measurement, so that training stops "
        "where its answers collapse; 0 for none",
        group="stopping",
        at_least=0,
    )
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)

    def __post_init__(self) -> None:
        """Refuse what can't be trained, before anything is spent."""
        check(self)
        if self.turns == "all" and self.objective.name != "sft":
            raise SettingsError(
                f"The objective {self.objective.name!r} learns one response a row: expected "
                "turns='last', or the objective 'sft'."
            )
        if self.turns == "all" and self.select == "internalisation":
            raise SettingsError(
                "select can't be internalisation with turns='all': it is a score of "
                "one response a row."
            )
        if self.ttl_seconds and self.ttl_seconds < _LEAST_TTL:
            raise SettingsError(
                f"ttl_seconds must be 0 or at least {_LEAST_TTL}, an hour; found "
                f"{self.ttl_seconds!r}."
            )
        if not (self.train_attention or self.train_mlp or self.train_unembed):
            raise SettingsError(
                "Nothing to train: turn on train_attention, train_mlp or train_unembed."
            )

    @property
    def rows(self) -> int | None:
        """The most rows to train on, None for all."""
        return self.max_rows or (_PRESETS[self.preset][0] if self.preset else None)

    @property
    def steps(self) -> int | None:
        """The steps that the preset sets, where nothing else sets them."""
        explicit = self.epochs or self.max_steps
        return None if explicit or not self.preset else _PRESETS[self.preset][1]


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that decide the weights and the choice among them; a missing one has its default.

    They are in what every checkpoint says of its training, so their form outlives a version.
    """
    found = {
        name: settings.get(name, value)
        for name, value in asdict(TrainSettings()).items()
        if name not in _FREE
    }
    if found["preset"] == "production":  # in version 0.1: all rows
        found["preset"] = None
    found["objective"] = {**_CONSTANT, **found["objective"]}
    if found["objective"].get("warm_start") is None or found["objective"]["name"] != "on_policy":
        found["objective"].pop("warm_start", None)
    unused = {name for name in _LATER if found[name] == getattr(TrainSettings, name)}
    return {name: value for name, value in found.items() if name not in unused}


def unlike_default(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The decisive ones that are not the defaults: short enough for a server to keep."""
    default = decisive({})
    return {name: v for name, v in decisive(settings).items() if v != default.get(name)}
