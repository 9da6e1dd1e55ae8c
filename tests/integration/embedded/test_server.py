"""The embedded server, asked by the real SDK: sampling, its limits, and its life as a process."""

from __future__ import annotations

import os
import queue
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from distill_datasets.embedded.engine import ComputeThread, Job, Payload
from distill_datasets.embedded.process import Server, launch
from distill_datasets.embedded.scheduler import Prefix, Prefixes
from distill_datasets.errors import ModelError
from tests.support.tiny_model import make_tiny_model

PROMPT = [70, 71, 72, 73, 74, 75]
ROOT = str(Path(__file__).parents[3])
# Two threads of a test wait for each other while other tests hold the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with launch(model, name="tiny") as server:
        yield server


@pytest.fixture(scope="module")
def service(server: Server) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=server.url, api_key=server.api_key)


@pytest.fixture(scope="module")
def client(service: tinker.ServiceClient) -> tinker.SamplingClient:
    return service.create_sampling_client(base_model="tiny").result()


@pytest.fixture(scope="module")
def network(model: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


Ask = Callable[..., types.SampleResponse]


@pytest.fixture
def ask(client: tinker.SamplingClient) -> Ask:
    def ask(
        prompt: list[int], num_samples: int = 1, score: int | None = None, **params: object
    ) -> types.SampleResponse:
        settings = types.SamplingParams(**{"max_tokens": 6, "stop": [], **params})
        return client.sample(
            types.ModelInput.from_ints(prompt),
            num_samples,
            settings,
            include_prompt_logprobs=score is not None,
            prompt_logprobs_last_n=score or None,
        ).result(60)

    return ask


def tokens(response: types.SampleResponse) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in response.sequences]


def greedy(network: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """Without a cache, without a batch."""
    found: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            logits = network(torch.tensor([prompt + found])).logits[0, -1]
            found.append(int(logits.argmax()))
    return found


def logprobs(network: torch.nn.Module, sequence: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = network(torch.tensor([sequence])).logits[0]
    values = torch.log_softmax(logits[:-1], dim=-1)
    return values.gather(1, torch.tensor(sequence[1:]).unsqueeze(1)).squeeze(1)


def random_prompts(count: int, prefix: list[int], *, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [prefix + random.integers(5, 500, random.integers(3, 20)).tolist() for _ in range(count)]


def test_temperature_zero_is_the_most_likely_token(ask: Ask, network: torch.nn.Module) -> None:
    assert tokens(ask(PROMPT, temperature=0)) == [greedy(network, PROMPT, 6)]


def test_logprobs_are_those_of_a_direct_computation(ask: Ask, network: torch.nn.Module) -> None:
    response = ask(PROMPT, score=0, temperature=1.0, seed=3)
    drawn = response.sequences[0]
    expected = logprobs(network, PROMPT + list(drawn.tokens))
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[0] is None
    found = [*response.prompt_logprobs[1:], *drawn.logprobs]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_only_the_last_prompt_tokens_are_scored_when_asked(
    ask: Ask, network: torch.nn.Module
) -> None:
    response = ask(PROMPT * 10, score=4, temperature=0)
    expected = logprobs(network, PROMPT * 10)[-4:]
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[:-4] == [None] * 56
    np.testing.assert_allclose(response.prompt_logprobs[-4:], expected.numpy(), atol=1e-4)


def test_top_logprobs_come_with_each_drawn_token(client: tinker.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=3, temperature=0, stop=[])
    prompt = types.ModelInput.from_ints(PROMPT)
    response = client.sample(prompt, 1, params, topk_sample_logprobs=4).result(60)
    sequence = response.sequences[0]
    assert sequence.topk_logprobs is not None
    assert [row[0][0] for row in sequence.topk_logprobs] == list(sequence.tokens)
    assert [len(row) for row in sequence.topk_logprobs] == [4, 4, 4]


def test_a_seed_repeats_and_each_sample_of_it_differs(ask: Ask) -> None:
    first = tokens(ask(PROMPT, 4, seed=7, max_tokens=8))
    assert first == tokens(ask(PROMPT, 4, seed=7, max_tokens=8))
    assert len({tuple(sample) for sample in first}) == 4
    assert first != tokens(ask(PROMPT, 4, seed=8, max_tokens=8))


def test_without_a_seed_samples_differ(ask: Ask) -> None:
    assert tokens(ask(PROMPT, max_tokens=16)) != tokens(ask(PROMPT, max_tokens=16))


def test_a_batch_gives_what_each_request_gives_alone(client: tinker.SamplingClient) -> None:
    prompts = random_prompts(40, [])
    params = [
        types.SamplingParams(
            max_tokens=1 + n % 7, seed=n, temperature=n % 3 / 2, top_p=0.9, stop=[]
        )
        for n in range(len(prompts))
    ]

    def send(n: int) -> tinker.APIFuture[types.SampleResponse]:
        return client.sample(types.ModelInput.from_ints(prompts[n]), 1, params[n])

    together = [tokens(future.result(60)) for future in [send(n) for n in range(len(prompts))]]
    assert together == [tokens(send(n).result(60)) for n in range(len(prompts))]


def test_a_shared_prefix_changes_no_token(
    client: tinker.SamplingClient, network: torch.nn.Module
) -> None:
    prefix = np.random.default_rng(5).integers(5, 500, 150).tolist()
    prompts = random_prompts(30, prefix)
    params = types.SamplingParams(max_tokens=5, temperature=0, stop=[])
    futures = [client.sample(types.ModelInput.from_ints(one), 1, params) for one in prompts]
    responses = [future.result(60) for future in futures]
    assert [tokens(one)[0] for one in responses] == [greedy(network, one, 5) for one in prompts]
    assert responses[-1].prompt_cache_hit_tokens >= 150


def test_cache_hits_are_counted_from_the_second_prompt_on(ask: Ask) -> None:
    prefix = np.random.default_rng(6).integers(5, 500, 100).tolist()
    hits = [ask([*prefix, n], temperature=0).prompt_cache_hit_tokens for n in (5, 6, 7)]
    assert hits == [0, 100, 100]


def test_a_waiting_prompt_is_not_taken_for_its_own_repetition() -> None:
    prefixes, prompt = Prefixes(), np.arange(100)

    def build(tokens: np.ndarray) -> Prefix:
        raise AssertionError(f"nothing repeats, yet {len(tokens)} tokens were computed")

    for _ in range(2):
        prefixes.learn("base", prompt, [], build)


def test_samples_of_one_prompt_share_its_prefill(ask: Ask) -> None:
    prompt = np.random.default_rng(7).integers(5, 500, 80).tolist()
    assert ask(prompt, 8, temperature=0).prompt_cache_hit_tokens == 79


def test_top_k_of_one_is_greedy_and_a_tiny_top_p_too(ask: Ask) -> None:
    best = tokens(ask(PROMPT, temperature=0))
    assert tokens(ask(PROMPT, temperature=1.5, top_k=1)) == best
    assert tokens(ask(PROMPT, temperature=1.5, top_p=1e-6)) == best


def test_top_k_draws_from_the_k_likeliest_only(ask: Ask, network: torch.nn.Module) -> None:
    with torch.no_grad():
        allowed = network(torch.tensor([PROMPT])).logits[0, -1].topk(3).indices.tolist()
    drawn = {one[0] for one in tokens(ask(PROMPT, 64, max_tokens=1, temperature=5.0, top_k=3))}
    assert drawn == set(allowed)


def test_a_stop_token_ends_the_sample_and_is_part_of_it(ask: Ask) -> None:
    full = tokens(ask(PROMPT, temperature=0))[0]
    end = full[2]
    response = ask(PROMPT, temperature=0, stop=[end])
    assert tokens(response)[0] == full[: full.index(end) + 1]
    assert response.sequences[0].stop_reason == "stop"
    assert ask(PROMPT, temperature=0).sequences[0].stop_reason == "length"


def test_a_stop_text_ends_the_sample_where_it_appears(ask: Ask, model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    response = ask(PROMPT, 8, seed=1, temperature=1.0, max_tokens=60, stop=["e", "a"])
    for sequence in response.sequences:
        text = tokenizer.decode(sequence.tokens[:-1])
        assert "e" not in text
        assert "a" not in text
        if sequence.stop_reason == "stop":
            assert set(tokenizer.decode(sequence.tokens)) & {"e", "a"}


def test_a_prompt_beyond_the_context_is_refused_with_its_numbers(ask: Ask) -> None:
    with pytest.raises(tinker.RequestFailedError, match="512 tokens; found 500 prompt.*together"):
        ask([5] * 500, max_tokens=13)
    assert len(tokens(ask([5] * 500, max_tokens=12))[0]) == 12


def test_a_token_outside_the_vocabulary_is_refused(ask: Ask) -> None:
    with pytest.raises(tinker.RequestFailedError, match=r"0\.\.511; found 5\.\.600"):
        ask([5, 600])


def test_a_refused_request_is_a_user_error(ask: Ask) -> None:
    with pytest.raises(tinker.RequestFailedError, match="max_tokens of 1 or more") as caught:
        ask(PROMPT, max_tokens=0)
    assert caught.value.category == types.RequestErrorCategory.User


def test_an_unsupported_question_is_refused_by_name(client: tinker.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=1)
    prompt = types.ModelInput.from_ints(PROMPT)
    with pytest.raises(tinker.RequestFailedError, match="does not compute prompt_alt_tokens_k"):
        client.sample(prompt, 1, params, prompt_alt_tokens_k=2).result(60)


def test_an_unknown_model_is_refused_with_the_one_there_is(service: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.BadRequestError, match="one model, 'tiny'"):
        service.create_sampling_client(base_model="huge").result(60)
    with pytest.raises(tinker.NotFoundError, match="found no checkpoint at"):
        service.create_sampling_client(model_path="tinker://run/sampler_weights/x").result(60)


def test_the_model_answers_to_its_folder_and_states_its_context(
    service: tinker.ServiceClient, server: Server, model: Path
) -> None:
    client = service.create_sampling_client(base_model=str(model)).result(60)
    assert client.get_base_model() == str(model)
    rest = tinker.RestClient(base_url=server.url, api_key=server.api_key)
    found = rest.get_server_capabilities().result(60).supported_models
    assert [(one.model_name, one.max_context_length) for one in found] == [("tiny", 512)]


def test_a_wrong_key_is_refused_and_says_what_to_set(server: Server) -> None:
    with pytest.raises(tinker.AuthenticationError, match="set TINKER_API_KEY"):
        rest = tinker.RestClient(base_url=server.url, api_key="tml-wrong")
        rest.get_server_capabilities().result(60)


def test_a_folder_without_a_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found no config.json"):
        launch(tmp_path, name="empty")


def test_a_model_that_fails_to_load_is_every_requests_answer() -> None:
    answers: queue.SimpleQueue[Payload] = queue.SimpleQueue()

    def load() -> None:
        raise OSError("weights are torn")

    worker = ComputeThread(lambda samplings: samplings, load)
    for _ in range(2):
        worker.submit(Job(lambda: b"never", answers.put))
        assert answers.get(timeout=60) == {
            "error": "the model could not be loaded: weights are torn",
            "category": "user",
        }


def test_closing_ends_the_child_and_may_be_repeated(model: Path) -> None:
    server = launch(model, name="tiny")
    assert server.alive
    server.close()
    server.close()
    assert not server.alive


def test_the_child_ends_when_its_parent_is_killed(model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from distill_datasets.embedded.process import "
        "launch; server = launch(Path(sys.argv[1]), name='tiny'); "
        "print(server.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as parent:
        assert parent.stdout is not None
        handle = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.send_signal(signal.SIGKILL)
            assert select.select([handle], [], [], 30)[0], "the child outlived its parent"
        finally:
            os.close(handle)
