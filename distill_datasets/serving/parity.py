"""Whether what was exported is what was trained: the same tokens through both, number by number.

The student's own server and what was exported give each token of some rows a log-probability. How
far the two may differ is measured too: so far do they for the base model, where no adapter is in
question, times how much farther rounding moves the student than its base. A student that differs
from its base by much more than that shows an adapter that is applied, and the right one.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from distill_datasets.conversations import Conversation
from distill_datasets.errors import DatasetError, HubError, ModelError, ServiceError
from distill_datasets.training.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INCLUDED,
    Trained,
    template_arguments,
    template_tokens,
)
from distill_datasets.training.data import locate, open_split

if TYPE_CHECKING:
    import httpx

    from distill_datasets.models.tinker import Connection

FILE = "parity.json"
ROWS = 8
_MOST_TOKENS = 512  # of a row; what is computed grows with them
_FINEST = 1e-5  # nats: less is rounding in any number format
# Noise of the floor's mean and an exponential tail is beyond the limit in one comparison of a
# thousand: so many standard errors of a mean, and the largest of all tokens.
_ERRORS, _RARE = 3.09, 1e-3
_OTHER_FORMAT = 0.2  # of the adapter's effect: what the format of an engine may make of it
_MOST_ASKED, _TOP = 64, 20  # places of a response at an address, and tokens in each
_SHOWN = 3
_KEY = re.compile(r"base_model\.model\..+\.lora_(A|B)\.weight")
_ANSWER_SECONDS = 120.0
# For a student whose dataset is gone.
_COMMON = tuple(
    Conversation([{"role": "user", "content": asked}, {"role": "assistant", "content": said}])
    for asked, said in (
        ("Hello, how are you?", "I'm fine, thank you."),
        ("Which city is the capital of France?", "Paris."),
        ("1 2 3 4", "5 6 7 8"),
        ("Write one sentence about rain.", "The rain began before anybody had an umbrella."),
    )
)
Scores = Sequence[NDArray[np.float64]]


class ParityError(ModelError):
    """What was exported, or is served, isn't the student that was trained."""

    exit_code = 1


@dataclass(frozen=True)
class RenderedRow:
    """The tokens of a conversation, of which the last `said` are asked for place by place."""

    tokens: Sequence[int]
    said: int


@dataclass(frozen=True)
class Gap:
    """How far two models' log-probabilities of the same tokens lie apart, in nats."""

    mean: float
    largest: float

    @classmethod
    def between(cls, first: Scores, second: Scores) -> Self:
        """Of two models' scores of the same rows."""
        apart = np.abs(np.concatenate(first) - np.concatenate(second))
        return cls(float(apart.mean()), float(apart.max()))

    def within(self, limit: "Gap") -> bool:
        """Whether both of its numbers are; those of a model that computes NaN never are."""
        return self.mean <= limit.mean and self.largest <= limit.largest

    def widened(self, other: "Gap", share: float = 1.0) -> "Gap":
        """At least this share of another."""
        return Gap(max(self.mean, share * other.mean), max(self.largest, share * other.largest))

    @property
    def written(self) -> "Gap":
        """To one digit and no less than 1e-5: what lies below differs from one run to the next,
        and a student that is pushed again should be the same.
        """
        return Gap(*(max(float(f"{one:.1g}"), _FINEST) for one in (self.mean, self.largest)))

    def __str__(self) -> str:
        """As it is written."""
        return f"mean {self.written.mean:g}, largest {self.written.largest:g} nats"


@dataclass(frozen=True)
class Certificate:
    """What was compared and what came out; `problems` are empty where it is the same student.

    `floor` is the noise: the base on the training's server and as it is exported, times how much
    farther rounding moves the student (`sensitivity`). `effect` is the student and the base on
    that server, `exported` and `served` the student there and elsewhere.
    """

    checkpoint: str
    rows: int
    tokens: int
    floor: Gap
    effect: Gap
    exported: Gap
    sensitivity: float = 1.0
    served: Gap | None = None
    served_at: str | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    @property
    def limit(self) -> Gap:
        """What noise of this floor reaches in all but one of a thousand comparisons."""
        mean = self.floor.mean * (1 + _ERRORS * math.sqrt(2 / self.tokens))
        mean = max(mean, _FINEST)
        return Gap(mean, max(mean * math.log(self.tokens / _RARE), self.floor.largest))

    def lines(self) -> list[str]:
        """The certificate for people, a sentence or a number a line."""
        named = {
            "the noise floor": self.floor,
            "the student there and as exported": self.exported,
            f"the student there and at {self.served_at}": self.served,
            "the student and its base, for comparison": self.effect,
        }
        verdict = "the same student" if self.passed else "NOT the same student"
        return [
            f"parity over {self.tokens:,} tokens of {self.rows} rows: {verdict}",
            *(f"  {name:<40} {gap}" for name, gap in named.items() if gap),
            *(f"  {one}" for one in (*self.problems, *self.notes)),
        ]

    def write(self, folder: Path) -> None:
        """Keep it in the exported folder."""
        gaps = {"limit": self.limit, "floor": self.floor, "effect": self.effect}
        gaps |= {"exported": self.exported} | ({"served": self.served} if self.served else {})
        rounded = {name: asdict(gap.written) for name, gap in gaps.items()}
        said = {**asdict(self), "sensitivity": round(self.sensitivity, 1), **rounded}
        text = json.dumps({"passed": self.passed, **said}, ensure_ascii=False, indent=1) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")

    def require(self) -> None:
        """Raises `ParityError` that says what was found."""
        if not self.passed:
            raise ParityError("\n".join(self.lines()))


def certify(
    trained: Trained, folder: Path, *, served_at: str | None = None, served_as: str | None = None
) -> Certificate:
    """Compare a training's best checkpoint with what was exported of it to a folder.

    An adapter is loaded as `peft` does over `transformers`, merged weights as `transformers` does,
    and computed in fp32. `served_at` is the address of a server of OpenAI's protocol that has the
    student under the name `served_as`. Raises `ModelError` or `ServiceError` where one of them
    can't be asked.
    """
    conversations = _conversations(trained)
    with _connected(trained) as connection:
        rows = [_row(connection, one) for one in conversations]
        there = _on_server(connection, rows)
        base_there = _on_server(replace(connection, model_path=None), rows)
    with _quiet() as complaints:
        base, here = _plain(connection, folder, rows)
    noise, moved = Gap.between(base_there, base.exact), max(here.moved / base.moved, 1.0)
    if here.rounds_otherwise(base):
        noise = noise.widened(Gap.between(base_there, base.rounded))
    found = Certificate(
        checkpoint=str(trained.checkpoint["sampler"]),
        rows=len(rows),
        tokens=sum(map(len, there)),
        floor=Gap(moved * noise.mean, moved * noise.largest),
        sensitivity=moved,
        effect=Gap.between(there, base_there),
        exported=Gap.between(there, here.exact),
    )
    problems = [*_wrong_names(folder)] if (folder / ADAPTER_CONFIG).is_file() else []
    problems += _judge("what was exported", found.limit, found.exported, here.exact, base.exact)
    problems += _other_template(connection, folder, conversations)
    if served_at:
        with _AddressedModel.reached(served_at, served_as) as served:
            scores, least = served.scores(rows)
            told = list(served.other_template(connection, conversations))
        apart = Gap.between(_clipped(there, least), scores)
        wide = found.limit.widened(found.effect, _OTHER_FORMAT)
        found = replace(found, served=apart, served_at=served_at)
        own_base = _clipped(base_there, least)
        problems += _judge(f"what {served_at} has", wide, apart, scores, own_base)
        problems += told
    notes = [*_notes(found, connection), *(f"while it was loaded: {one}" for one in complaints)]
    return replace(found, problems=tuple(problems), notes=tuple(notes))


@contextmanager
def _connected(trained: Trained) -> Iterator["Connection"]:
    """The training's student on a server that is there for the certificate alone."""
    from distill_datasets.models.references import connect, disconnect

    # Noise of 16 bits would hide what is smaller than itself.
    dtype = None if os.environ.get("EMBEDDED_DTYPE") else "fp32"
    connection = connect(trained.folder, dtype=dtype)
    try:
        yield connection
    finally:
        if dtype and connection.server is not None:
            connection.service.holder.close()  # it would look for its server for ever
            disconnect(trained.folder / "checkpoints", dtype)


def _clipped(scores: Scores, least: Scores) -> Scores:
    """The last of each row's, so many as are told of it, and no less than what is told."""
    return [np.maximum(one[-len(end) :], end) for one, end in zip(scores, least, strict=True)]


def _notes(found: Certificate, connection: "Connection") -> Iterator[str]:
    if found.effect.within(found.limit):
        yield "the adapter changes too little to be told from its base"
    wide = found.limit.widened(found.effect, _OTHER_FORMAT)
    if found.served and not found.served.within(found.limit) and found.served.within(wide):
        yield (
            f"{found.served_at} computes otherwise, in another number format or by other steps: "
            "more than noise, and far less than what the adapter does"
        )
    if connection.server and connection.server.dtype != "fp32":
        yield (
            f"the training's server computes in {connection.server.dtype}: in fp32, without "
            "EMBEDDED_DTYPE, smaller differences are found"
        )


def _judge(what: str, limit: Gap, to_student: Gap, found: Scores, base: Scores) -> list[str]:
    if to_student.within(limit):
        return []
    to_base = Gap.between(base, found)
    if to_base.within(limit):
        return [f"{what} answers as the base does: the adapter isn't applied"]
    return [
        f"{what} is another model, or has another adapter: it differs from the student by "
        f"{to_student.mean:.2g} nats a token, at most {to_student.largest:.2g} (noise by "
        f"{limit.mean:.2g}, at most {limit.largest:.2g}), and from the base by {to_base.mean:.2g}"
    ]


def _conversations(trained: Trained) -> list[Conversation]:
    """Rows of what was trained on, those of its validation where there are any."""
    try:
        source = locate(trained.dataset, trained.dataset_config)
        names = trained.config["dataset"]["splits"]
        split = open_split(source, names.get("validation", names["train"]), source.load())
    except (DatasetError, HubError):
        return list(_COMMON)
    return list(split.at_most(ROWS).conversations)


def _row(connection: "Connection", conversation: Conversation) -> RenderedRow:
    from distill_datasets.models.scoring import split_conversation

    before, said = split_conversation(connection, conversation.messages, conversation.tools)
    tokens = [*before, *said][-_MOST_TOKENS:]
    return RenderedRow(tokens, min(len(said), len(tokens) - 1, _MOST_ASKED))


def _on_server(connection: "Connection", rows: Sequence[RenderedRow]) -> Scores:
    from distill_datasets.models.scoring import Scorer

    scorer = Scorer(connection)
    pending = [scorer.read(row.tokens[:1], row.tokens[1:]) for row in rows]
    return [one.result().logprobs for one in pending]


def _wrong_names(folder: Path) -> Iterator[str]:
    """What `peft` or vLLM, by its documented layout, would not read of an adapter."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="np") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{str(folder / ADAPTER_WEIGHTS)!r} can't be read: {error}") from error
    if wrong := [name for name in names if not _KEY.fullmatch(name)]:
        yield (
            f"{len(wrong)} of {len(names)} tensors have names that nobody looks for, as "
            f"{wrong[0]!r}: expected 'base_model.model.<module>.lora_A.weight' or lora_B"
        )
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    for name, wanted in (("bias", "none"), ("modules_to_save", None), ("use_dora", False)):
        if config.get(name, wanted) != wanted:
            yield f"vLLM reads no adapter with {name}={config[name]!r}: expected {wanted!r}"


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Gathers the warnings of a block, the first line of each once."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    told = [one for one in caught if issubclass(one.category, UserWarning)]
    lines = [str(one.message).strip().split("\n")[0][:300] for one in told]
    said += list(dict.fromkeys(lines))[:_SHOWN]


@dataclass(frozen=True)
class Computed:
    """A model's scores in fp32, and in bf16; `dtype` is the number format of its weights."""

    exact: Scores
    rounded: Scores
    dtype: str

    @classmethod
    def of(cls, model: Any, rows: Sequence[RenderedRow]) -> Self:
        """Computes both; the model is in bf16 then."""
        dtype = str(model.dtype)
        return cls(_forward(model.float(), rows), _forward(model.bfloat16(), rows), dtype)

    def rounds_otherwise(self, base: Self) -> bool:
        """Whether its weights were rounded to 16 bits that the base's weights don't have."""
        return self.dtype.endswith("16") and self.dtype != base.dtype

    @property
    def moved(self) -> float:
        """How far rounding moves it."""
        return max(Gap.between(self.exact, self.rounded).mean, _FINEST)


def _plain(
    connection: "Connection", folder: Path, rows: Sequence[RenderedRow]
) -> tuple[Computed, Computed]:
    """The base, and what was exported, by `transformers` and `peft` alone."""
    from peft import PeftModel

    # The untouched one: what spoils the base in the folder is no noise.
    base = Computed.of(load_plain(connection.tokenizer_source, None), rows)
    if not (folder / ADAPTER_CONFIG).is_file():
        return base, Computed.of(load_plain(folder, None), rows)
    source = folder / INCLUDED if (folder / INCLUDED).is_dir() else connection.tokenizer_source
    try:
        adapted = PeftModel.from_pretrained(load_plain(source, None), str(folder))
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"peft can't load the adapter in {str(folder)!r}: {error}") from error
    return base, Computed.of(adapted, rows)


def load_plain(source: Path | str, dtype: str | None) -> Any:
    """A causal LM as `transformers` loads it; no code that comes with it is run."""
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype) if dtype else "auto"
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(source), dtype=kind, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The weights in {str(source)!r} can't be loaded here: {error} To leave out the "
            "comparison with the training's server, say --no-parity."
        ) from error


def _forward(model: Any, rows: Sequence[RenderedRow]) -> Scores:
    import torch

    model.eval()
    scores = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([list(row.tokens)])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            chosen = logprobs.gather(1, ids[0, 1:, None])[:, 0]
            scores.append(chosen.numpy().astype(np.float64))
    return scores


def _other_template(
    connection: "Connection", folder: Path, conversations: Sequence[Conversation]
) -> Iterator[str]:
    """Whether the exported tokenizer makes other tokens of a conversation than the training."""
    from jinja2 import TemplateError

    from distill_datasets.models.renderers import load_tokenizer

    own = folder if (folder / "tokenizer_config.json").is_file() else folder / INCLUDED
    if not own.is_dir():
        return  # the base's, which lies where the base does
    tokenizer = load_tokenizer(str(own))
    for one in conversations:
        prompt, wanted = _prompt(connection, one)
        arguments = template_arguments(connection.tokenizer, wanted, prompt, one.tools)
        if arguments is None:
            continue  # no template makes it: the card says which renderer does
        try:
            made = template_tokens(tokenizer, prompt, one.tools, arguments)
        except TemplateError:
            made = []
        if made != wanted:
            yield (
                "the chat template that was exported makes other tokens of a conversation than "
                f"the training saw: {prompt[-1]['content'][:80]!r}"
            )
            return


def _prompt(connection: "Connection", one: Conversation) -> tuple[list[Any], list[int]]:
    messages: list[Any] = [dict(message) for message in one.messages[:-1]]
    asked = connection.renderer.build_generation_prompt(messages, tools=one.tools)
    return messages, asked.to_ints()


@dataclass(frozen=True)
class _AddressedModel:
    """A model at an address of OpenAI's protocol."""

    url: str
    model: str
    client: "httpx.Client"

    @classmethod
    @contextmanager
    def reached(cls, url: str, model: str | None) -> Iterator[Self]:
        """The model of this name, or the only one that is there."""
        import httpx

        from distill_datasets.models.endpoint import read_address

        url = str(read_address(url, "--served-at")).rstrip("/")
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(timeout=_ANSWER_SECONDS, headers=headers) as client:
            found = cls(url, model or "", client)
            if model:
                yield found
                return
            listed = found._ask("models").get("data")
            models = listed if isinstance(listed, list) else []
            names = [str(one.get("id")) for one in models if isinstance(one, Mapping)]
            if len(names) != 1:
                raise ModelError(
                    f"{url} has {len(names)} models, {names[:20]}: name the student among them "
                    "with --served-as."
                )
            yield replace(found, model=names[0])

    def scores(self, rows: Sequence[RenderedRow]) -> tuple[Scores, Scores]:
        """Of the tokens of the rows' responses, and the least that was told in the place of each.

        Asked place by place: llama.cpp's server tells nothing of a prompt's own tokens, and vLLM
        0.32 ends when it is asked for those of an adapter on the output embedding. A token that
        isn't among the likeliest has the least.
        """
        found: list[NDArray[np.float64]] = []
        least: list[NDArray[np.float64]] = []
        for row in rows:
            places = range(len(row.tokens) - row.said, len(row.tokens))
            told = [self._likeliest(row.tokens[:place]) for place in places]
            least.append(np.array([min(one.values()) for one in told]))
            pairs = zip(places, told, least[-1], strict=True)
            found.append(np.array([one.get(row.tokens[at], end) for at, one, end in pairs]))
        return found, least

    def _likeliest(self, prompt: Sequence[int]) -> dict[int, float]:
        body = {"prompt": list(prompt), "max_tokens": 1, "logprobs": _TOP, "temperature": 0}
        answer = self._ask("completions", {**body, "return_tokens_as_token_ids": True})
        try:
            told = answer["choices"][0]["logprobs"]
            if "content" in told:  # as llama.cpp says it
                pairs = [(one["id"], one["logprob"]) for one in told["content"][0]["top_logprobs"]]
            else:
                top = told["top_logprobs"][0]
                pairs = [(name.removeprefix("token_id:"), value) for name, value in top.items()]
            if likely := {int(token): float(value) for token, value in pairs}:
                return likely
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            pass  # said below
        raise ServiceError(
            f"{self.url}: expected the {_TOP} likeliest tokens after a prompt by their ids from "
            "/completions, as vLLM, llama.cpp and `distill-datasets serve` tell them; found "
            f"{str(answer)[:200]!r}."
        )

    def other_template(
        self, connection: "Connection", conversations: Sequence[Conversation]
    ) -> Iterator[str]:
        """Whether a chat there has another number of tokens than the training saw."""
        for one in conversations:
            prompt, wanted = _prompt(connection, one)
            body: dict[str, Any] = {"messages": prompt, "max_tokens": 1}
            if one.tools:
                body["tools"] = json.loads(one.tools)
            usage = self._ask("chat/completions", body).get("usage") or {}
            if (count := usage.get("prompt_tokens")) != len(wanted):
                yield (
                    f"{self.url} makes {count} tokens of a conversation where the training saw "
                    f"{len(wanted)}: another chat template, or another prompt before it"
                )
                return

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        import httpx

        url, method = f"{self.url}/{path}", "GET" if body is None else "POST"
        sent = None if body is None else {"model": self.model, **body}
        try:
            found = self.client.request(method, url, json=sent).raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise ServiceError(f"{url} can't be asked: {error}") from error
        if not isinstance(found, dict):
            raise ServiceError(f"{url}: expected an object, found {str(found)[:200]!r}.")
        return found
