"""Requests that run together on the compute thread: how they join, leave, fail and take turns."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from distill_datasets.embedded.decoding import RunningBatch
from distill_datasets.embedded.engine import BASE, ComputeThread, Engine, Job, Payload, SampleJob
from distill_datasets.embedded.model import ModelCard
from distill_datasets.embedded.store import Store
from distill_datasets.embedded.wire import pb, read_sample_request
from tests.support.shared_server import shared

# Two threads of a test wait for each other while other tests hold the cores.
torch.set_num_threads(1)
PROMPT = [70, 71, 72, 73, 74, 75]


@dataclass
class Computer:
    """An engine with its thread, asked without HTTP."""

    thread: ComputeThread
    answers: list[queue.SimpleQueue[Payload]] = field(default_factory=list)

    def send(self, prompt: list[int], count: int = 1, **more: Any) -> queue.SimpleQueue[Payload]:
        """Submit a request; its answer comes through the queue."""
        hooks = {name: more.pop(name) for name in ("watch", "constrain") if name in more}
        params = {"max_tokens": 6, "temperature": 0.0, "stop": [], **more}
        chunks = [{"type": "encoded_text", "tokens": prompt}]
        body = {"prompt": {"chunks": chunks}, "num_samples": count, "sampling_params": params}
        answer: queue.SimpleQueue[Payload] = queue.SimpleQueue()
        self.thread.submit(SampleJob(BASE, read_sample_request(body), answer.put, **hooks))
        return answer

    def ask(self, prompt: list[int], count: int = 1, **more: Any) -> list[list[int]]:
        """The tokens of each sample."""
        return drawn(self.send(prompt, count, **more).get(timeout=60))


def drawn(answer: Payload) -> list[list[int]]:
    """The tokens of each sample in an answer."""
    assert isinstance(answer, bytes), answer
    message = pb.SampleResponse()
    message.ParseFromString(answer)
    return [np.frombuffer(one.tokens, np.int32).tolist() for one in message.sequences]


@pytest.fixture(scope="module")
def computer() -> Iterator[Computer]:
    with TemporaryDirectory() as folder:
        engine = Engine(ModelCard.read(shared().model, "tiny"), Store(Path(folder)))
        yield Computer(ComputeThread(engine, engine.load))
        engine.close()


def test_each_token_is_seen_as_it_is_drawn(computer: Computer) -> None:
    seen: list[tuple[int, int, float]] = []

    def watch(sample: int, token: int, logprob: float) -> bool:
        seen.append((sample, token, logprob))
        return True

    found = computer.ask(PROMPT, 2, temperature=1.0, seed=1, watch=watch)
    for sample in (0, 1):
        assert [token for index, token, _ in seen if index == sample] == found[sample]
    assert all(logprob < 0 for *_, logprob in seen)


def test_a_sample_that_nobody_wants_any_more_ends_and_the_others_go_on(computer: Computer) -> None:
    whole = computer.ask(PROMPT, 2, temperature=1.0, seed=1)

    def watch(sample: int, token: int, _: float) -> bool:
        return (sample, token) != (0, whole[0][2])

    found = computer.ask(PROMPT, 2, temperature=1.0, seed=1, watch=watch)
    assert found == [whole[0][: whole[0].index(whole[0][2]) + 1], whole[1]]


class EvenThenOdd:
    """Allows even tokens and odd ones by turns."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> np.ndarray:
        return np.arange(512) % 2 == len(self.accepted) % 2

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_of_its_own_binds_each_sample(computer: Computer, temperature: float) -> None:
    made: list[EvenThenOdd] = []

    def constrain() -> EvenThenOdd:
        made.append(EvenThenOdd())
        return made[-1]

    found = computer.ask(PROMPT, 2, temperature=temperature, seed=2, constrain=constrain)
    assert [[token % 2 for token in sample] for sample in found] == [[0, 1] * 3] * 2
    assert sorted(one.accepted for one in made) == sorted(found)


def test_a_constraint_that_allows_nothing_is_an_error_and_other_requests_are_answered(
    computer: Computer,
) -> None:
    class Nothing(EvenThenOdd):
        def allowed(self) -> np.ndarray:
            return np.zeros(512, bool)

    failed, good = computer.send(PROMPT, constrain=Nothing), computer.send(PROMPT)
    answer = failed.get(timeout=60)
    assert isinstance(answer, dict)
    assert "a constraint that allows a token" in answer["error"]
    assert len(drawn(good.get(timeout=60))[0]) == 6


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(shared().model, dtype=torch.float32).eval()
    network.generation_config.eos_token_id = None
    return network


def greedy(network: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers makes of a prompt alone."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
    found = network.generate(inputs=ids, attention_mask=torch.ones_like(ids), **settings)
    return found[0, len(prompt) :].tolist()


def test_a_long_answer_does_not_hold_up_those_that_are_asked_for_meanwhile(
    computer: Computer,
) -> None:
    ended: list[str] = []

    def watch(name: str) -> Any:
        def see(_: int, token: int, logprob: float) -> bool:
            if name == "long" and len(others) < 8:
                others.append(computer.send([80 + len(others)] * 5, watch=watch("short")))
            ended.append(name)
            return True

        return see

    others: list[queue.SimpleQueue[Payload]] = []
    long = computer.send(PROMPT, max_tokens=300, watch=watch("long"))
    assert len(drawn(long.get(timeout=120))[0]) == 300
    for other in others:
        assert len(drawn(other.get(timeout=60))[0]) == 6
    assert ended[-1] == "long"
    assert ended.count("short") == 8 * 6


def test_rows_of_all_lengths_and_prefixes_in_one_batch_draw_what_each_draws_alone(
    computer: Computer, network: torch.nn.Module
) -> None:
    random = np.random.default_rng(11)
    starts: list[list[int]] = [[], *(random.integers(5, 500, n).tolist() for n in (40, 130))]
    prompts = [starts[n % 3] + random.integers(5, 500, 2 + 7 * (n % 5)).tolist() for n in range(12)]
    # One outgrows the slots that it begins in.
    lengths = [140 if n == 3 else 2 + 11 * (n % 4) for n in range(12)]
    sent = [
        computer.send(one, max_tokens=count) for one, count in zip(prompts, lengths, strict=True)
    ]
    for answer, prompt, count in zip(sent, prompts, lengths, strict=True):
        assert drawn(answer.get(timeout=120)) == [greedy(network, prompt, count)]


def test_more_samples_than_rows_are_drawn_as_rows_get_free(computer: Computer) -> None:
    found = computer.ask(PROMPT * 6, 150, temperature=1.0, seed=3, max_tokens=4)
    assert len(found) == 150
    assert found[:40] == computer.ask(PROMPT * 6, 40, temperature=1.0, seed=3, max_tokens=4)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory")])
def test_a_request_for_which_memory_ends_is_told_so_and_the_others_are_answered(
    computer: Computer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    forward, large = RunningBatch._forward, [499, 498, 497]

    def exhausted(batch: RunningBatch, one: Any) -> torch.Tensor:
        if any(ids.tolist() == large for ids in one.ids):
            raise error
        return forward(batch, one)

    monkeypatch.setattr(RunningBatch, "_forward", exhausted)
    expected = computer.ask(PROMPT, max_tokens=30)
    running = computer.send(PROMPT, max_tokens=30)
    failing = [computer.send(large), computer.send(large)]
    others = [computer.send([n, n, n]) for n in range(60, 64)]
    for answer in failing:
        found = answer.get(timeout=60)
        assert isinstance(found, dict)
        assert "out of memory: send fewer or shorter" in found["error"]
    assert drawn(running.get(timeout=60)) == expected
    for answer in others:
        assert len(drawn(answer.get(timeout=60))[0]) == 6


class Endless:
    """A sampler that always has something to do, until it is told to end."""

    def __init__(self) -> None:
        self.busy, self.steps = True, 0

    def add(self, job: SampleJob) -> None:
        raise AssertionError("nobody asked for samples")

    def step(self) -> None:
        self.steps += 1
        np.linalg.norm(np.ones((100, 100)))

    def fail(self, payload: Payload) -> None:
        raise AssertionError(payload)


def test_training_and_samples_that_never_end_both_go_on() -> None:
    sampler, answers = Endless(), queue.SimpleQueue[Payload]()
    thread, seen = ComputeThread(sampler, lambda: None), list[int]()

    def train() -> bytes:
        seen.append(sampler.steps)
        np.linalg.norm(np.ones((100, 100)))
        if len(seen) < 200:
            thread.submit(Job(train, lambda _: None))
            # One waits at all times.
            thread.submit(Job(lambda: b"", lambda _: None))
        else:
            answers.put(b"trained")
        return b""

    thread.submit(Job(train, lambda _: None))
    assert answers.get(timeout=60) == b"trained"
    sampler.busy = False
    assert len(set(seen)) > 20
