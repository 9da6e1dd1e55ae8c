"""What is made of logits: prompts' scores against a direct computation, and samples held to a JSON
schema, by the compiler alone and of a local model as a teacher.
"""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from distill_datasets.embedded.logits import LONGEST_SCHEMA, Grammars
from distill_datasets.embedded.wire import InvalidRequestError
from distill_datasets.models.references import connect
from distill_datasets.models.sampler import Reply, Sampling
from distill_datasets.models.tinker import TinkerSampler
from tests.support.shared_server import shared

# Two threads of a test wait for each other while other tests hold the cores.
torch.set_num_threads(1)
PROMPT = [70, 71, 72, 73, 74, 75]
ONE_TOKEN = types.SamplingParams(max_tokens=1, temperature=0, stop=[])
UNSCORED = -99999.0


@pytest.fixture(scope="module")
def client() -> tinker.SamplingClient:
    return shared().service.create_sampling_client(base_model="tiny").result()


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(shared().model, dtype=torch.float32).eval()


def direct(network: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    """Logprobs over the vocabulary at each prompt position but the first."""
    with torch.no_grad():
        return torch.log_softmax(network(torch.tensor([prompt])).logits[0], dim=-1)[:-1]


def ask(
    client: tinker.SamplingClient, prompt: list[int], own: bool = True, **scoring: object
) -> tinker.APIFuture[types.SampleResponse]:
    return client.sample(types.ModelInput.from_ints(prompt), 1, ONE_TOKEN, own, **scoring)


def target(ids: list[list[int]]) -> types.TensorData:
    return types.TensorData.from_numpy(np.array(ids))


def test_the_likeliest_tokens_of_each_prompt_position(
    client: tinker.SamplingClient, network: torch.nn.Module
) -> None:
    response = ask(client, PROMPT, topk_prompt_logprobs=3).result(60)
    expected = direct(network, PROMPT).topk(3)
    found = response.topk_prompt_logprobs_np
    assert found is not None
    assert found.token_ids[0].tolist() == [0, 0, 0]
    assert found.logprobs[0].tolist() == [UNSCORED] * 3
    np.testing.assert_array_equal(found.token_ids[1:], expected.indices)
    np.testing.assert_allclose(found.logprobs[1:], expected.values, atol=1e-4)


def test_the_likeliest_of_the_last_positions_only(
    client: tinker.SamplingClient, network: torch.nn.Module
) -> None:
    prompt = PROMPT * 10
    response = ask(client, prompt, topk_prompt_logprobs=2, prompt_logprobs_last_n=4).result(60)
    assert response.topk_prompt_logprobs is not None
    assert response.topk_prompt_logprobs[:-4] == [None] * 56
    expected = direct(network, prompt)[-4:].topk(2)
    found = [[token for token, _ in row] for row in response.topk_prompt_logprobs[-4:]]
    assert found == expected.indices.tolist()
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[-5] is None


def test_top_logprobs_may_be_asked_without_the_prompts_own(client: tinker.SamplingClient) -> None:
    response = ask(client, PROMPT, own=False, topk_prompt_logprobs=1).result(60)
    assert response.prompt_logprobs is None
    assert len(response.topk_prompt_logprobs or []) == len(PROMPT)


def test_more_than_the_vocabulary_is_the_vocabulary(client: tinker.SamplingClient) -> None:
    response = ask(client, PROMPT, topk_prompt_logprobs=600).result(60)
    assert response.topk_prompt_logprobs_np is not None
    probabilities = np.exp(response.topk_prompt_logprobs_np.logprobs[1:].astype(np.float64))
    assert probabilities.shape == (5, 512)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)


def test_named_tokens_are_scored_where_they_are_named(
    client: tinker.SamplingClient, network: torch.nn.Module
) -> None:
    ids = [[-1, -1], [5, -1], [-1, -1], [6, 7], [-1, 8]]
    response = ask(client, PROMPT, target_prompt_logprobs=target(ids)).result(60)
    assert response.target_prompt_logprobs is not None
    found = response.target_prompt_logprobs.to_numpy()
    expected = direct(network, PROMPT)
    wanted = [
        [float(expected[row, one]) if one >= 0 else 0.0 for one in line]
        for row, line in enumerate(ids)
    ]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert response.prompt_logprobs is not None
    np.testing.assert_allclose(
        response.prompt_logprobs[1:],
        expected.gather(1, torch.tensor(PROMPT[1:]).unsqueeze(1)).squeeze(1),
        atol=1e-4,
    )


def test_targets_of_the_last_place_are_scored_behind_a_cached_prefix(
    client: tinker.SamplingClient, network: torch.nn.Module
) -> None:
    """As for a closed set of labels behind a prompt; the prefix is read from the cache."""
    prefix = np.random.default_rng(3).integers(5, 500, 90).tolist()
    expected = []
    for end in (5, 6, 7):
        prompt = [*prefix, end, 9]
        ids = torch.full((len(prompt) - 1, 13), -1)
        ids[-1] = torch.arange(0, 13)
        targets = types.TensorData.from_torch(ids)
        response = ask(client, prompt, own=False, target_prompt_logprobs=targets).result(60)
        found = response.target_prompt_logprobs
        assert found is not None
        expected = direct(network, prompt)[-1, :13]
        np.testing.assert_allclose(found.to_numpy()[-1], expected, atol=1e-4)
        assert not found.to_numpy()[:-1].any()
    assert response.prompt_cache_hit_tokens == 90


def test_targets_are_not_bound_to_the_last_scored_tokens(
    client: tinker.SamplingClient, network: torch.nn.Module
) -> None:
    ids = [[-1], [5], [-1], [-1], [-1]]
    response = ask(
        client, PROMPT, target_prompt_logprobs=target(ids), prompt_logprobs_last_n=1
    ).result(60)
    assert response.target_prompt_logprobs is not None
    found = response.target_prompt_logprobs.to_numpy()[1, 0]
    np.testing.assert_allclose(found, float(direct(network, PROMPT)[1, 5]), atol=1e-4)
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[:-1] == [None] * 5


def test_a_batch_of_scores_gives_what_each_request_gives_alone(
    client: tinker.SamplingClient,
) -> None:
    """Requests of all kinds at once, behind a shared prefix and with several samples."""
    random = np.random.default_rng(0)
    prefix = random.integers(5, 500, 60).tolist()
    prompts = [prefix + random.integers(5, 500, 4 + n % 9).tolist() for n in range(30)]
    kinds = [
        {"prompt_logprobs_last_n": 3, "topk_prompt_logprobs": 2},
        {"topk_prompt_logprobs": 2},
        {"prompt_logprobs_last_n": 1},
    ]

    def send(n: int) -> tinker.APIFuture[types.SampleResponse]:
        scoring = dict(kinds[n % 3])
        if n % 2:
            ids = np.full((len(prompts[n]) - 1, 1 + n % 3), -1)
            ids[-2:] = n
            scoring["target_prompt_logprobs"] = types.TensorData.from_numpy(ids)
        prompt = types.ModelInput.from_ints(prompts[n])
        return client.sample(prompt, 1 + n % 2, ONE_TOKEN, True, **scoring)

    together = [one.result(60) for one in [send(n) for n in range(30)]]
    for n, found in enumerate(together):
        alone = send(n).result(60)
        np.testing.assert_allclose(found.prompt_logprobs_np, alone.prompt_logprobs_np, atol=1e-4)
        if "topk_prompt_logprobs" in kinds[n % 3]:
            one, other = found.topk_prompt_logprobs_np, alone.topk_prompt_logprobs_np
            assert one is not None and other is not None
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        if n % 2:
            one, other = found.target_prompt_logprobs, alone.target_prompt_logprobs
            assert one is not None and other is not None
            np.testing.assert_allclose(one.to_numpy(), other.to_numpy(), atol=1e-4)


def test_what_cannot_be_scored_is_refused(client: tinker.SamplingClient) -> None:
    for ids, said in (
        ([[5]] * 4, "5 rows, one for each prompt token but the first"),
        ([[-1]] * 5, "at least one id"),
        ([[600]] * 5, r"target token ids in 0\.\.511"),
    ):
        with pytest.raises(tinker.RequestFailedError, match=said):
            ask(client, PROMPT, target_prompt_logprobs=target(ids)).result(60)
    torn = types.TensorData([5], "int64", [5, 1], [0, 0, 0, 0, 0, 1], [3])
    with pytest.raises(tinker.RequestFailedError, match="not sparse"):
        ask(client, PROMPT, target_prompt_logprobs=torn).result(60)
    with pytest.raises(tinker.RequestFailedError, match=r"last_n in 1\.\.5"):
        ask(client, PROMPT, prompt_logprobs_last_n=6).result(60)


ASKED: Any = [{"role": "user", "content": "What language is this?"}]
SCHEMA = {
    "type": "object",
    "properties": {"code": {"enum": ["en", "de"]}, "sure": {"type": "boolean"}},
    "required": ["code", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(model: str) -> Grammars:
    return Grammars((shared().model / "tokenizer.json").read_text(), 512, [2])


def test_every_way_through_a_constraint_ends_in_what_the_schema_allows(
    grammars: Grammars, model: str
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared().model / "tokenizer.json"))
    make = grammars.compile(SCHEMA)
    for first in (False, True):
        constraint, tokens = make(), list[int]()
        while True:
            allowed = constraint.allowed().nonzero()[0].tolist()
            token = allowed[0] if first else allowed[-1]
            constraint.accept(token)
            if token == 2:
                break
            tokens.append(token)
            assert len(tokens) < 200
        assert set(json.loads(tokenizer.decode(tokens))) == {"code", "sure"}
        assert constraint.allowed().nonzero()[0].tolist() == [2]


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
        ({"const": "a" * LONGEST_SCHEMA}, "at most 131072 characters"),
    ],
)
def test_a_schema_that_cant_be_held_says_why(grammars: Grammars, schema: Any, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        grammars.compile(schema)


def test_without_llguidance_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequestError, match=r"pip install 'distill-datasets\[serve\]'"):
        Grammars("{}", 4, [1])


def held(sampler: TinkerSampler, schema: Any, *, requests: int = 1) -> list[Reply]:
    sampling = Sampling(max_tokens=300, seed=1, n=4, json_schema=json.dumps(schema))

    async def all_at_once() -> list[Reply]:
        return await asyncio.gather(*(sampler.sample(ASKED, sampling) for _ in range(requests)))

    return asyncio.run(all_at_once())


def test_a_local_teacher_is_held_to_the_schema_of_its_answers(model: str) -> None:
    sampler = TinkerSampler(connect(model))
    for _ in range(2):  # on two event loops
        for reply in held(sampler, SCHEMA, requests=2):
            for sample in reply.samples:
                assert sample.stop_reason == "stop"
                assert set(json.loads(sample.text)) == {"code", "sure"}
    free = asyncio.run(sampler.sample(ASKED, Sampling(max_tokens=20, seed=1)))
    assert not free.samples[0].text.startswith("{")


def test_a_local_teacher_answers_all_the_same_where_its_schema_cant_be_held(model: str) -> None:
    sampler = TinkerSampler(connect(model))
    # Not pytest's own: connections that the SDK leaves open are reported whenever they like.
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        (reply,) = held(sampler, {"type": "string", "pattern": "(?=a)"})
    said = " ".join(str(one.message) for one in told)
    assert "is not held to the schema" in said and "look-ahead" in said
    assert len(reply.samples) == 4


def test_a_student_is_not_held_by_its_teachers_session(model: str, tmp_path: Path) -> None:
    first, second = TinkerSampler(connect(model)), TinkerSampler(connect(model))
    held(first, SCHEMA)
    found = asyncio.run(second.sample(ASKED, Sampling(max_tokens=8, temperature=0)))
    again = asyncio.run(first.sample(ASKED, Sampling(max_tokens=8, temperature=0)))
    assert found.samples == again.samples
