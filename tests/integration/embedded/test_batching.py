"""Requests that run together on the compute thread: what is watched, and what is constrained."""

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

from distill_datasets.embedded.engine import BASE, ComputeThread, Engine, Payload, SampleJob
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
