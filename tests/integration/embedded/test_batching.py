"""Requests that run together on the compute thread, of one version of the weights or of many."""

from __future__ import annotations

import json
import queue
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from distill_datasets.embedded import batching, lora, scheduler
from distill_datasets.embedded.batching import RunningBatch
from distill_datasets.embedded.engine import ComputeThread, Engine, Job
from distill_datasets.embedded.lora import LoraSpec
from distill_datasets.embedded.model import ModelCard, load_model
from distill_datasets.embedded.prefix_attention import Slots
from distill_datasets.embedded.scheduler import BASE, Payload, SampleJob
from distill_datasets.embedded.store import Store
from distill_datasets.embedded.trainer import AdamParams, Datum, Trainee, TrainRequest
from distill_datasets.embedded.wire import SampleRequest, pb, read_sample_request
from tests.support.shared_server import shared

# Two threads of a test wait for each other while other tests hold the cores.
torch.set_num_threads(1)
PROMPT = [70, 71, 72, 73, 74, 75]


def sample_request(prompt: list[int], count: int = 1, **more: Any) -> SampleRequest:
    asked = {name: more.pop(name) for name in ("prompt_logprobs",) if name in more}
    params = {"max_tokens": 6, "temperature": 0.0, "stop": [], **more}
    chunks = [{"type": "encoded_text", "tokens": prompt}]
    body = {"prompt": {"chunks": chunks}, "num_samples": count, "sampling_params": params}
    return read_sample_request({**body, **asked})


@dataclass
class Computer:
    """An engine with its thread, asked without HTTP."""

    engine: Engine
    thread: ComputeThread
    answers: list[queue.SimpleQueue[Payload]] = field(default_factory=list)

    def send(
        self, prompt: list[int], count: int = 1, weights: str = BASE, **more: Any
    ) -> queue.SimpleQueue[Payload]:
        """Submit a request; its answer comes through the queue."""
        hooks = {name: more.pop(name) for name in ("watch", "constrain") if name in more}
        answer: queue.SimpleQueue[Payload] = queue.SimpleQueue()
        request = sample_request(prompt, count, **more)
        self.thread.submit(SampleJob(weights, request, answer.put, **hooks))
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
        made = Engine(ModelCard.read(shared().model, "tiny"), Store(Path(folder)))
        started = Computer(made, ComputeThread(made, made.load))
        started.ask(PROMPT)  # two threads that load a model at once spoil both
        yield started
        made.close()


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
def test_penalties_lower_the_logits_of_what_a_sample_has_of_its_own(
    computer: Computer, network: torch.nn.Module, temperature: float
) -> None:
    asked = [(0.0, 0.0), (0.7, 0.0), (0.0, 1.5), (0.4, -0.9), (2.0, 2.0)]
    drawing = {"max_tokens": 20, "temperature": temperature, "top_k": 1}
    answers = [
        computer.send(PROMPT, **drawing, frequency_penalty=one, presence_penalty=other)
        for one, other in asked
    ]
    for (frequency, presence), answer in zip(asked, answers, strict=True):
        tokens, logprobs = list(PROMPT), list[float]()
        for _ in range(20):
            with torch.no_grad():
                logits = network(torch.tensor([tokens])).logits[0, -1]
            counts = torch.bincount(torch.tensor(tokens[len(PROMPT) :], dtype=torch.long))
            counts = torch.nn.functional.pad(counts, (0, len(logits) - len(counts)))
            penalized = logits - counts * frequency - (counts > 0) * presence
            tokens.append(int(penalized.argmax()))
            logprobs.append(float(torch.log_softmax(logits, -1)[tokens[-1]]))
        found = answer.get(timeout=60)
        assert drawn(found) == [tokens[len(PROMPT) :]]
        sample = pb.SampleResponse.FromString(found).sequences[0]  # type: ignore[arg-type]
        np.testing.assert_allclose(np.frombuffer(sample.logprobs, np.float32), logprobs, atol=1e-4)


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


ADAPTED = {
    2: ["self_attn.q_proj", "self_attn.v_proj"],
    5: ["mlp.down_proj", "self_attn.o_proj", "lm_head"],
    3: ["mlp.gate_proj", "self_attn.k_proj"],
}


def make_adapter(folder: Path, rank: int) -> Path:
    """An adapter as PEFT saves it, whose rank decides which layers it changes, and how."""
    random, tensors = torch.Generator().manual_seed(rank), {}
    sizes = {name: size for name, size in matrices().items() if name.endswith(tuple(ADAPTED[rank]))}
    for name, (out, into) in sizes.items():
        for part, shape in (("A", (rank, into)), ("B", (out, rank))):
            values = torch.randn(shape, generator=random) * 0.3
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rsplit(".", 1)[-1] for name in sizes})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank + 1, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def load_plain() -> Any:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(
        shared().model, dtype=torch.float32, tie_word_embeddings=False
    ).eval()
    network.lm_head.weight = torch.nn.Parameter(network.model.embed_tokens.weight.detach().clone())
    network.generation_config.eos_token_id = None
    return network


@cache
def matrices() -> dict[str, torch.Size]:
    """The shapes of the tiny model's linear layers."""
    found = load_plain().named_modules()
    return {name: one.weight.shape for name, one in found if isinstance(one, torch.nn.Linear)}


@dataclass
class Version:
    """Weights of an engine, and the same ones merged into a network of transformers' own."""

    key: str
    network: Any

    def check(self, answer: Payload, prompt: list[int], count: int) -> None:
        """Hold an answer to what these weights draw alone."""
        assert isinstance(answer, bytes), answer
        message = pb.SampleResponse.FromString(answer)
        tokens = np.frombuffer(message.sequences[0].tokens, np.int32).tolist()
        assert tokens == greedy(self.network, prompt, count)
        with torch.no_grad():
            logits = self.network(torch.tensor([prompt + tokens])).logits[0, :-1]
        known = torch.log_softmax(logits, -1)
        known = known.gather(1, torch.tensor(prompt + tokens)[1:, None])[:, 0].numpy()
        found = np.frombuffer(message.sequences[0].logprobs, np.float32)
        np.testing.assert_allclose(found, known[len(prompt) - 1 :], atol=1e-4)
        if message.prompt_logprobs:
            found = np.frombuffer(message.prompt_logprobs, np.float32)[1:]
            np.testing.assert_allclose(found, known[: len(prompt) - 1], atol=1e-4)


@pytest.fixture(scope="module")
def versions(
    computer: Computer, network: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> list[Version]:
    """The base, and adapters of several ranks and layers over it."""
    found = [Version(BASE, network)]
    for rank in ADAPTED:
        folder = make_adapter(tmp_path_factory.mktemp("adapters") / str(rank), rank)
        merged, tensors = load_plain(), load_file(folder / "adapter_model.safetensors")
        key = "base_model.model.{}.lora_{}.weight".format
        for name, module in merged.named_modules():
            if key(name, "A") in tensors:
                change = tensors[key(name, "B")] @ tensors[key(name, "A")]
                module.weight.data += (rank + 1) / rank * change
        found.append(Version(computer.engine.weights_in(folder), merged))
    return found


def test_rows_with_different_adapters_step_together_and_draw_what_each_draws_alone(
    computer: Computer, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, together, random = RunningBatch._forward, [], np.random.default_rng(5)
    sent: list[tuple[Version, list[int], int, queue.SimpleQueue[Payload]]] = []

    def counted(batch: RunningBatch, one: Any) -> torch.Tensor:
        together.append(len({key for key, _ in one.reading}))
        return forward(batch, one)

    def send(n: int, **hooks: Any) -> None:
        """Some share a start, which each version computes for itself."""
        version, start = versions[n % len(versions)], [9] * (40 * (n % 3 == 0))
        prompt, count = start + random.integers(5, 500, 3 + 5 * (n % 4)).tolist(), 8 + 30 * (n % 3)
        answer = computer.send(
            prompt, weights=version.key, max_tokens=count, prompt_logprobs=n % 5 == 0, **hooks
        )
        sent.append((version, prompt, count, answer))

    def watch(_: int, token: int, logprob: float) -> bool:
        if len(sent) < 24:  # more join while it runs
            send(len(sent))
        return True

    monkeypatch.setattr(RunningBatch, "_forward", counted)
    send(2, watch=watch)
    for n in range(12):
        send(n)
    answers = [answer.get(timeout=120) for *_, answer in list(sent)]
    while len(sent) > len(answers):
        answers.append(sent[len(answers)][-1].get(timeout=120))
    for (version, prompt, count, _), answer in zip(sent, answers, strict=True):
        version.check(answer, prompt, count)
    assert max(together) == len(versions)
    assert sum(one > 1 for one in together) > len(together) / 2


def test_more_adapters_than_are_in_memory_at_once_are_all_answered(
    computer: Computer, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MOST_SAMPLERS", 1)
    sent = [(one, computer.send(PROMPT * 8, 2, weights=one.key)) for one in versions * 2]
    for version, answer in sent:
        version.check(answer.get(timeout=60), PROMPT * 8, 6)


def test_an_adapter_that_is_gone_fails_its_own_requests_and_no_others(
    computer: Computer, versions: list[Version], tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "gone", 2)
    key = computer.engine.weights_in(folder)
    shutil.rmtree(folder)
    running = computer.send(PROMPT, weights=versions[1].key, max_tokens=40)
    failing = [computer.send(PROMPT, weights=key) for _ in range(3)]
    others = [(one, computer.send(PROMPT, weights=one.key)) for one in versions]
    for answer in failing:
        found = answer.get(timeout=60)
        assert isinstance(found, dict)
        assert "the weights of this client were deleted" in found["error"]
    versions[1].check(running.get(timeout=60), PROMPT, 40)
    for version, other in others:
        version.check(other.get(timeout=60), PROMPT, 6)


def test_many_requests_with_one_adapter_do_not_keep_those_with_another_waiting(
    computer: Computer, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "MOST_ROWS", 4)
    ended: list[str] = []

    def watch(key: str) -> Any:
        return lambda *_: ended.append(key) is None

    first, second = (one.key for one in versions[1:3])
    sent = [
        computer.send([n, n], weights=key, watch=watch(key), max_tokens=12)
        for key, numbers in ((first, range(5, 45)), (second, range(5, 9)))
        for n in numbers
    ]
    for answer in sent:
        assert isinstance(answer.get(timeout=60), bytes)
    last = max(place for place, key in enumerate(ended) if key == second)
    assert last < len(ended) / 2


def test_weights_that_are_always_asked_for_make_place_for_others(
    computer: Computer, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MOST_SAMPLERS", 1)
    first, second = versions[1:3]
    busy: list[queue.SimpleQueue[Payload]] = []
    waiting: list[queue.SimpleQueue[Payload]] = []

    def watch(_: int, token: int, logprob: float) -> bool:
        if not waiting:
            waiting.append(computer.send(PROMPT, weights=second.key))
        if waiting[0].empty() and len(busy) < 200 and sum(one.empty() for one in busy) < 3:
            busy.append(computer.send(PROMPT, weights=first.key, watch=watch))
        return True

    first.check(computer.send(PROMPT, weights=first.key, watch=watch).get(timeout=60), PROMPT, 6)
    second.check(waiting[0].get(timeout=60), PROMPT, 6)
    assert len(busy) < 200
    expected = greedy(first.network, PROMPT, 6)
    assert all(drawn(answer.get(timeout=60)) == [expected] for answer in busy)


def test_weights_that_were_to_make_place_are_sampled_together_again_once_nobody_waits(
    computer: Computer, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MOST_SAMPLERS", 2)
    monkeypatch.setattr(scheduler, "PROMISED_TOKENS", 0)
    monkeypatch.setattr(batching, "MOST_ROWS", 3)
    base, ended = load_model(ModelCard.read(shared().model, "tiny")), list[str]()
    batch = RunningBatch(base, scheduler.SampledWeights(base, computer.engine._saved))
    first, second, third = (one.key for one in versions[1:])

    def add(key: str, name: str, count: int) -> None:
        request = sample_request(PROMPT, max_tokens=count)
        batch.add(SampleJob(key, request, lambda _: ended.append(name)))
        batch.step()

    add(first, "first", 12)
    batch.step()
    for name, count in (("second", 30), ("second", 8), ("waiting", 40)):
        add(second, name, count)
    add(third, "third", 6)
    while "third" not in ended:
        batch.step()
    assert len(batch._rows) == 2, "nobody waits for place any more"
    add(second, "short", 4)
    while batch.busy:
        batch.step()
    assert ended.index("short") < ended.index("waiting"), ended


def test_slots_are_as_large_as_they_say_where_memory_ends_amid_them() -> None:
    base = load_model(ModelCard.read(shared().model, "tiny"))

    class Full(Slots):
        left = 100

        def _allocate(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
            self.left -= 1
            if self.left < 0:
                raise MemoryError
            return super()._allocate(rows)

    slots = Full(batching.cache_shape(base), 64, 3)
    for rows in (5, 2):
        slots.left = 1
        with pytest.raises(MemoryError):
            slots.resize(rows, 2)
        assert slots.rows == min(len(keys) for keys, _ in slots.layers)
    slots.left = 100
    slots.resize(4, 2)
    assert slots.rows == 4 == max(len(keys) for keys, _ in slots.layers)


def test_adapters_that_are_gone_leave_no_more_layers_than_may_be_in_memory(
    versions: list[Version], computer: Computer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MOST_SAMPLERS", 1)
    monkeypatch.setattr(lora, "MOST_FREE", 1, raising=False)
    base, answers = load_model(ModelCard.read(shared().model, "tiny")), list[Payload]()
    sampled = scheduler.SampledWeights(base, computer.engine._saved)
    batch = RunningBatch(base, sampled)
    for version in versions * 2:
        batch.add(SampleJob(version.key, sample_request(PROMPT), answers.append))
        while batch.busy:
            batch.step()
        version.check(answers[-1], PROMPT, 6)
    kept = {
        name
        for module in base.network.modules()
        if isinstance(module, LoraLayer)
        for name in module.lora_A
    }
    assert len(kept) == 2 < len(versions) - 1


def test_a_run_learns_the_same_while_adapters_are_sampled_come_and_go(
    versions: list[Version], computer: Computer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MOST_SAMPLERS", 1)
    monkeypatch.setattr(lora, "MOST_FREE", 1)
    base, answers = load_model(ModelCard.read(shared().model, "tiny")), list[Payload]()
    sampled = scheduler.SampledWeights(base, computer.engine._saved)
    batch, tokens = RunningBatch(base, sampled), np.arange(10, 20)
    row = Datum(tokens, tokens[:, None] + 1, (np.ones((10, 1), np.float32),), hard=True)

    def sample() -> None:
        for version in versions:
            batch.add(SampleJob(version.key, sample_request(PROMPT), answers.append))
            while batch.busy:
                batch.step()
            version.check(answers[-1], PROMPT, 6)

    def learn(between: Callable[[], None]) -> list[float]:
        between()
        run, found = Trainee(base, sampled.adapters, LoraSpec(4, seed=1)), []
        for _ in range(3):
            rows, _ = run.forward_backward(TrainRequest([row], "cross_entropy", False))
            found.append(float(rows[0].sum()))
            between()
            run.step(AdamParams(learning_rate=1e-2))
        return found

    first, undisturbed = learn(sample), learn(lambda: None)
    assert first == undisturbed and first[-1] > first[0]


def test_keys_and_values_take_no_more_memory_than_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows come, outgrow their slots and leave; prefixes of some are computed meanwhile."""
    base = load_model(ModelCard.read(shared().model, "tiny"))
    logits = batching.LOGIT_BYTES * batching.most_rows(base) * base.vocabulary
    small = replace(base, memory=4 * (logits + 1500 * base.token.kept) // 3 + 1)
    batch = RunningBatch(small, scheduler.SampledWeights(small, {}))
    most, seen, alive = batching.held_bytes(small), list[int](), WeakSet[Slots]()

    class Counted(Slots):
        def resize(self, rows: int, kept: int) -> None:
            super().resize(rows, kept)
            alive.add(self)
            seen.append(sum(part.nbytes for one in alive for pair in one.layers for part in pair))

    monkeypatch.setattr(batching, "Slots", Counted)
    random, answers = np.random.default_rng(0), list[Payload]()
    # One of many short rows stays, and so do their slots; longer rows come, and one that grows.
    for rows, length, count in ((1, 4, 60), (20, 4, 4), (8, 80, 40), (1, 4, 150), (8, 80, 40)):
        for _ in range(rows):
            prompt = random.integers(5, 500, length).tolist()
            batch.add(SampleJob(BASE, sample_request(prompt, max_tokens=count), answers.append))
        for _ in range(8):
            batch.step()
    while batch.busy:
        batch.step()
    assert most / 2 < max(seen) <= most
    assert sorted(len(drawn(answer)[0]) for answer in answers) == [4] * 20 + [40] * 16 + [60, 150]


class Endless:
    """A sampler that always has something to do, until it is told to end."""

    def __init__(self) -> None:
        self.busy, self.steps, self.now = True, 0, 0.0

    def add(self, job: SampleJob) -> None:
        raise AssertionError("nobody asked for samples")

    def step(self) -> None:
        self.steps += 1
        self.now += 1

    def fail(self, payload: Payload) -> None:
        raise AssertionError(payload)


def test_training_and_samples_that_never_end_both_go_on() -> None:
    sampler, answers = Endless(), queue.SimpleQueue[Payload]()
    thread, seen = ComputeThread(sampler, lambda: None, lambda: sampler.now), list[int]()

    def train() -> bytes:
        seen.append(sampler.steps)
        sampler.now += 1
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
    # Both take as long: between two jobs there is one step.
    assert seen == [*range(seen[0], seen[0] + 200)]
