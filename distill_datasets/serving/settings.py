"""How a student is served and put in front of traffic: every setting with default and range."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill_datasets.errors import SettingsError
from distill_datasets.settings import check, setting


@dataclass(frozen=True)
class ServeSettings:
    """What is served beside the base, where, and how it computes.

    What a model was distilled from is put before what it is asked under its name with `+prompt`:
    the prompt of the release that a student was trained on, or else that of `recipe`.
    """

    students: tuple[str, ...] = setting(
        (),
        "[NAME=]PATH, a folder of a training or a PEFT adapter, or a tinker:// path of --store; "
        "several times for several",
        flag="student",
    )
    recipe: str | None = setting(
        None,
        "the recipe whose prompt a name with +prompt has",
        unset="for a student that of its release",
    )
    renderer: str | None = setting(
        None, "the base's chat format", unset="that of its chat template"
    )
    store: Path | None = setting(
        None, "the folder of the checkpoints", unset="one that ends with the server"
    )
    host: str = setting("127.0.0.1", "the address to listen at")
    port: int = setting(8000, "the port", at_least=0, at_most=65535)
    api_key: str | None = setting(
        None,
        "what clients have to send; Tinker's takes keys that begin with tml-",
        unset="DISTILL_API_KEY, or a fresh one",
    )
    dtype: Literal["auto", "fp32", "bf16"] | None = setting(
        None,
        "the number format of the weights",
        unset="EMBEDDED_DTYPE, or auto: bf16 where it is measured to be faster",
    )
    threads: int | None = setting(
        None,
        "threads that compute",
        unset="OMP_NUM_THREADS, or as many as are measured to help",
        at_least=1,
        at_most=1024,
    )

    def __post_init__(self) -> None:
        """Raises `SettingsError` for what is out of range."""
        check(self)


@dataclass(frozen=True)
class RolloutSettings:
    """Where the proxy listens, where both models answer, and what it may do by itself.

    Without other addresses the student is asked at `serve`'s own, under the name of its run, and
    so is a teacher that is a local model; one that the release calls `openai:<model>` is asked at
    OPENAI_BASE_URL. Keys are STUDENT_API_KEY and TEACHER_API_KEY, or else DISTILL_API_KEY for what
    `serve` serves and OPENAI_API_KEY for a teacher of the latter kind. A teacher at the student's
    address takes its key; no other server is sent it.
    """

    host: str = setting("127.0.0.1", "the address to listen at", group="addresses")
    port: int = setting(8080, "the port", group="addresses", at_least=0, at_most=65535)
    api_key: str | None = setting(
        None, "what clients have to send", group="addresses", unset="nothing on loopback"
    )
    student_url: str = setting(
        "http://127.0.0.1:8000/v1", "where the student answers", group="addresses"
    )
    student_model: str | None = setting(
        None, "the student's name there", group="addresses", unset="that of the run's folder"
    )
    teacher_url: str | None = setting(
        None,
        "where the teacher answers",
        group="addresses",
        unset="OPENAI_BASE_URL for openai:<model>, the student's for a local model",
    )
    teacher_model: str | None = setting(
        None, "the teacher's name there", group="addresses", unset="as the release says"
    )
    rules: Path | None = setting(
        None, "a gate's YAML file of limits", group="stages", unset="those of gate --template"
    )
    stages: tuple[str, ...] = setting(
        (),
        "NAME=SHARE:SHADOW, a stage with the student's share of the users, and of its answers "
        "those that the teacher gives too; several times for several (default: those of the "
        "rollout so far, or alpha=0.01:1, beta=0.1:0.5, rollout=0.5:0.1, production=1:0.02)",
        group="stages",
        flag="stage",
    )
    epsilon: float | None = setting(
        None,
        "serve only answers of the student that it is sure of, so that at most this share of them "
        "differs from the teacher's; one of those that calibrate was run with",
        group="stages",
        above=0,
        at_most=1,
    )
    blend: float = setting(
        0.0,
        "with --epsilon, the share of the users whose other queries go to the student with the "
        "prompt, not to the teacher",
        group="stages",
        at_least=0,
        at_most=1,
    )
    manual: bool = setting(
        False,
        "promote by hand only; what breaks a rule is taken off all the same",
        group="stages",
    )
    keep_texts: bool = setting(
        False,
        "keep queries on which the two disagree, for --harvest; else no text is kept",
        group="stages",
    )
    prices: Path | None = setting(None, "a file with a date and prices of models", group="money")
    budget: float | None = setting(
        None,
        "with --prices, shadow nothing more once so much is spent on it",
        group="money",
        above=0,
    )

    def __post_init__(self) -> None:
        """Raises `SettingsError` for what is out of range or can't go together."""
        check(self)
        if self.budget is not None and self.prices is None:
            raise SettingsError("A budget is counted with prices: name a price file (--prices).")
        if self.blend and self.epsilon is None:
            raise SettingsError("--blend is a share of what --epsilon keeps from the student.")
        if self.host not in ("127.0.0.1", "localhost", "::1") and not self.api_key:
            raise SettingsError(
                f"Whoever reaches {self.host} could ask both models: set --api-key, or listen on "
                "127.0.0.1."
            )
