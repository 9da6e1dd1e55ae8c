"""The Tinker sampler: prompts token for token, failures by kind, logprobs."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
import tinker
from transformers import AutoTokenizer

from distill_datasets.errors import (
    AccessError,
    DistillError,
    ModelError,
    RejectedError,
    RequestError,
    RetryableError,
    ServiceError,
)
from distill_datasets.files import pocket_folder
from distill_datasets.models import tinker as sdk
from distill_datasets.models.references import connect
from distill_datasets.models.renderers import Prompts, open_renderer
from distill_datasets.models.sampler import Logprobs, Reply, Sample, Sampling
from distill_datasets.models.tinker import Connection, TinkerSampler
from distill_datasets.schema import Message
from tests.support import tinker_endpoint

RENDERERS = ["qwen3_instruct", "qwen3", "role_colon", "distill_datasets/chat_template"]
PROMPT = "Say which language the sentence is in.\n\nLabels:\n- en: English\n- de: German\n\n" * 3
TEXTS = ["I am here", "Ich bin da", "a\nb\n\nc", "  blanks ", "", "\n", "的 中文", "1 2", "it's"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(pocket_folder())


class Counted:
    """A renderer that counts how often it renders."""

    def __init__(self, renderer: Any) -> None:
        self.renderer, self.tokenizer, self.calls = renderer, renderer.tokenizer, 0

    def build_generation_prompt(
        self, messages: Sequence[Any], *, tools: str | None = None
    ) -> tinker.ModelInput:
        self.calls += 1
        return self.renderer.build_generation_prompt(messages, tools=tools)


def renderer(name: str, tokenizer: Any) -> Counted:
    return Counted(open_renderer(name, tokenizer))


def expected(counted: Counted, messages: list[Message], tools: str | None = None) -> list[int]:
    return list(counted.renderer.build_generation_prompt(messages, tools=tools).to_ints())


def system(query: str) -> list[Message]:
    return [{"role": "system", "content": PROMPT}, {"role": "user", "content": query}]


def behind(query: str) -> list[Message]:
    return [{"role": "user", "content": f"{PROMPT}Sentence: {query}\nAnswer with the label."}]


def on_its_own_line(query: str) -> list[Message]:
    return [{"role": "user", "content": f"{PROMPT}{query}"}]


@pytest.mark.parametrize("name", RENDERERS)
@pytest.mark.parametrize("messages", [system, behind, on_its_own_line])
def test_prompts_are_the_renderers_own_token_for_token(
    tokenizer: Any, name: str, messages: Any
) -> None:
    counted = renderer(name, tokenizer)
    prompts, draw = Prompts(counted), random.Random(0)
    queries = [f"sentence {n}" for n in range(20)]
    queries += [f"{draw.choice(TEXTS)}{draw.choice(TEXTS)}" for _ in range(60)]
    queries += ["<|im_end|>", "a<|im_start|>b", "<think>", "</think> x", "e\u0301", "\u0301x"]
    for query in queries:
        assert prompts.tokens(messages(query)) == expected(counted, messages(query)), query


@pytest.mark.parametrize("messages", [system, behind])
@pytest.mark.parametrize("name", ["qwen3_instruct", "distill_datasets/chat_template"])
def test_a_common_prompt_is_tokenized_once(tokenizer: Any, name: str, messages: Any) -> None:
    counted = renderer(name, tokenizer)
    prompts = Prompts(counted)
    for n in range(50):
        prompts.tokens(messages(f"sentence {n}"))
    assert counted.calls < 15


def test_a_renderer_that_looks_at_the_text_is_asked_every_time(tokenizer: Any) -> None:
    class Shouting(Counted):
        def build_generation_prompt(self, messages: Sequence[Any], **named: Any) -> Any:
            loud = "5" in messages[-1]["content"]
            said = [{**one, "content": one["content"].upper()} for one in messages]
            return super().build_generation_prompt(said if loud else messages, **named)

    counted = Shouting(open_renderer("qwen3_instruct", tokenizer))
    prompts = Prompts(counted)
    found = [prompts.tokens(system(f"sentence {n}")) for n in range(20)]
    assert counted.calls == 20
    assert tokenizer.decode(found[15]).endswith("SENTENCE 15<|im_end|>\n<|im_start|>assistant\n")


def test_a_tokenizer_without_rust_is_used_as_it_is(tokenizer: Any) -> None:
    class Slow:
        encode, decode = tokenizer.encode, tokenizer.decode

    counted = renderer("qwen3_instruct", tokenizer)
    counted.tokenizer = Slow()
    prompts = Prompts(counted)
    for n in range(12):
        assert prompts.tokens(system(f"{n}")) == expected(counted, system(f"{n}"))
    assert counted.calls == 12


ASKED: list[Message] = [{"role": "user", "content": "Und?"}]


@pytest.fixture(scope="module")
def answer(tokenizer: Any) -> list[int]:
    return list(tokenizer.encode("<think>hm</think>ja<|im_end|>", add_special_tokens=False))


@pytest.fixture(scope="module")
def canned(answer: list[int]) -> Iterator[TinkerSampler]:
    with tinker_endpoint.running(answer) as url:
        service = tinker.ServiceClient(base_url=url, api_key=tinker_endpoint.KEY)
        tokenizer = str(pocket_folder())
        connection = Connection("tinker:canned", service, "canned", tokenizer, "qwen3_instruct")
        yield TinkerSampler(connection)


def ask(sampler: TinkerSampler, **settings: Any) -> Reply:
    return asyncio.run(sampler.sample(ASKED, Sampling(**settings)))


def test_logprobs_are_kept_by_token_id_where_they_are_asked_for(
    canned: TinkerSampler, answer: list[int]
) -> None:
    (sample,) = ask(canned, top_logprobs=2).samples
    assert (sample.text, sample.reasoning, sample.stop_reason) == ("ja", "hm", "stop")
    expected = [(token,) for token in answer]
    halves = (-0.5,) * len(answer)
    assert sample.logprobs == Logprobs(
        tuple(answer), halves, tuple(expected), tuple((half,) for half in halves)
    )
    assert ask(canned).samples[0].logprobs is None


@pytest.mark.parametrize(
    ("most", "kind", "type", "status"),
    [
        (1000, RejectedError, "bad request", None),
        (1001, RetryableError, "server error", None),
        (400, RejectedError, "bad request", 400),
        (422, RejectedError, "bad request", 422),
    ],
)
def test_a_failure_says_whether_asking_again_may_help(
    canned: TinkerSampler, most: int, kind: type[RequestError], type: str, status: int | None
) -> None:
    with pytest.raises(kind, match="canned") as caught:
        ask(canned, max_tokens=most)
    assert (caught.value.type, caught.value.status) == (type, status)


@pytest.mark.parametrize(("most", "kind"), [(401, AccessError), (404, ModelError)])
def test_what_no_request_survives_is_no_requests_failure(
    canned: TinkerSampler, most: int, kind: type[DistillError]
) -> None:
    fresh = TinkerSampler(canned.connection)
    with pytest.raises(kind) as caught:
        ask(fresh, max_tokens=most)
    assert not isinstance(caught.value, RequestError)
    ask(fresh)
    with pytest.raises(RetryableError) as later:  # others are answered: it is this request's
        ask(fresh, max_tokens=most)
    assert later.value.most_attempts == 3


def status_error(kind: type[tinker.APIStatusError], status: int) -> tinker.APIStatusError:
    request = httpx.Request("POST", "http://canned")
    response = httpx.Response(status, request=request, headers={"retry-after": "3"})
    return kind("said so", response=response, body=None)


GIVEN_UP = [
    (status_error(tinker.RateLimitError, 429), "rate limit", 429),
    (status_error(tinker.InternalServerError, 503), "server error", 503),
    (status_error(tinker.APIStatusError, 418), "server error", 418),
    (tinker.APITimeoutError(httpx.Request("POST", "http://canned")), "time-out", None),
    (
        tinker.APIConnectionError(message="no route", request=httpx.Request("GET", "http://x")),
        "connection",
        None,
    ),
]


@pytest.mark.parametrize(
    ("error", "type", "status"), GIVEN_UP, ids=[str(one[0]) for one in GIVEN_UP]
)
def test_what_the_sdk_gave_up_on_may_be_asked_again(
    error: Exception, type: str, status: int | None
) -> None:
    with pytest.raises(RetryableError) as caught, sdk.classified():
        raise error
    assert (caught.value.type, caught.value.status) == (type, status)
    assert caught.value.retry_after == (None if status is None else 3.0)


@dataclass
class Ended:
    """A server of this machine that was killed."""

    alive: bool = False
    stderr: str = "Killed"


def test_a_local_server_that_ended_is_noticed_while_the_sdk_still_tries(
    canned: TinkerSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk, "GLANCE", 0.0)
    never: Future[object] = Future()
    local = replace(canned.connection, server=Ended())  # type: ignore[arg-type]
    with pytest.raises(ServiceError, match="ended, .*last words: 'Killed'"):
        asyncio.run(sdk.answered(never, local.ended))
    assert never.cancelled()


def test_settings_that_the_protocol_lacks_are_refused(canned: TinkerSampler) -> None:
    with pytest.raises(ModelError, match="without `sampling.extra`, found"):
        ask(canned, extra='{"top_a": 1}')


def test_an_answer_that_takes_too_long_may_be_asked_for_again(answer: list[int]) -> None:
    with tinker_endpoint.running(answer, delay=600) as url:
        service = tinker.ServiceClient(base_url=url, api_key=tinker_endpoint.KEY)
        folder = str(pocket_folder())
        connection = Connection("tinker:canned", service, "canned", folder, "qwen3_instruct")
        with pytest.raises(RetryableError) as raised:
            ask(TinkerSampler(connection, timeout=0.1))
    assert raised.value.type == "time-out"


def test_a_local_server_ends_a_sample_at_a_stop_text_and_at_the_turns_end(model: str) -> None:
    sampler, messages = TinkerSampler(connect(model)), system("I am here")

    def ask(**more: Any) -> Sample:
        sampling = Sampling(temperature=1.0, max_tokens=200, seed=4, **more)
        return asyncio.run(sampler.sample(messages, sampling)).samples[0]

    whole = ask()
    assert whole.stop_reason == "stop"
    middle = whole.text[len(whole.text) // 2]
    cut = ask(stop=(middle,))
    assert cut.stop_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(middle)]
    assert cut.tokens is not None
    assert whole.tokens is not None
    assert cut.tokens < whole.tokens
    ended = ask(stop=("never said",))
    assert (ended.tokens, ended.stop_reason) == (whole.tokens, whole.stop_reason)
