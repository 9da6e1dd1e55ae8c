"""One sampler over several processes: the same answers, whatever happens to the workers."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import tinker
from transformers import AutoTokenizer

from distill_datasets.errors import RejectedError, RetryableError, ServiceError, SettingsError
from distill_datasets.files import pocket_folder
from distill_datasets.models.processes import ProcessSampler
from distill_datasets.models.sampler import Reply, Sampling
from distill_datasets.models.tinker import Connection, TinkerSampler
from distill_datasets.schema import Message
from tests.support import tinker_endpoint

ROOT = Path(__file__).parents[3]
ASKED: list[Message] = [{"role": "user", "content": "Und?"}]


@pytest.fixture(scope="module")
def answer() -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(pocket_folder())
    return list(tokenizer.encode("ja<|im_end|>", add_special_tokens=False))


def connect(url: str, key: str, model: str) -> TinkerSampler:
    service = tinker.ServiceClient(base_url=url, api_key=key)
    tokenizer = str(pocket_folder())
    return TinkerSampler(Connection(f"tinker:{model}", service, model, tokenizer, "qwen3_instruct"))


@pytest.fixture(scope="module")
def canned(answer: list[int]) -> Iterator[TinkerSampler]:
    with tinker_endpoint.running(answer, delay=0.2) as url:
        yield connect(url, tinker_endpoint.KEY, "canned")


@pytest.fixture(scope="module")
def two(canned: TinkerSampler) -> Iterator[ProcessSampler]:
    with closing(ProcessSampler(canned, 2)) as sampler:
        yield sampler


def ask(sampler: ProcessSampler, count: int, **settings: object) -> list[Reply]:
    async def all_of_them() -> list[Reply]:
        sampling = Sampling(**settings)  # type: ignore[arg-type]
        return await asyncio.gather(*(sampler.sample(ASKED, sampling) for _ in range(count)))

    return asyncio.run(all_of_them())


@pytest.mark.slow
def test_both_processes_answer_as_one_would(two: ProcessSampler, canned: TinkerSampler) -> None:
    (expected,) = asyncio.run(_alone(canned))
    assert ask(two, 20, top_logprobs=2) == [expected] * 20
    assert (two.model, two.identity) == (canned.model, canned.identity)


async def _alone(sampler: TinkerSampler) -> list[Reply]:
    return [await sampler.sample(ASKED, Sampling(top_logprobs=2))]


def test_tools_and_calls_cross_to_a_worker(two: ProcessSampler, canned: TinkerSampler) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "count", "arguments": '{"a": 1}'}}
    asked: list[Message] = [
        ASKED[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "c"},
    ]
    tools = json.dumps([{"type": "function", "function": {"name": "count"}}])
    for sampling in (Sampling(), Sampling(tools=tools)):
        found = asyncio.run(two.sample(asked, sampling)).usage.prompt_tokens
        rendered = canned.connection.renderer.build_generation_prompt(asked, tools=sampling.tools)
        assert found == rendered.length


def test_a_failure_arrives_as_what_it_was(two: ProcessSampler) -> None:
    with pytest.raises(RejectedError, match="canned") as caught:
        ask(two, 1, max_tokens=400)
    assert (caught.value.type, caught.value.status) == ("bad request", 400)
    with pytest.raises(RetryableError, match="canned"):
        ask(two, 1, max_tokens=1001)


def test_what_was_not_raised_on_purpose_arrives_by_its_name(two: ProcessSampler) -> None:
    with pytest.raises(RuntimeError, match=r"KeyError: 'content'"):
        asyncio.run(two.sample([{"role": "user"}], Sampling()))  # type: ignore[typeddict-item]


def test_the_key_is_on_no_command_line_and_in_no_environment(two: ProcessSampler) -> None:
    assert two.pids
    for pid in two.pids:
        for name in ("cmdline", "environ"):
            assert tinker_endpoint.KEY.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()


def test_fewer_than_one_process_is_refused(canned: TinkerSampler) -> None:
    with pytest.raises(SettingsError, match="found 0"):
        ProcessSampler(canned, 0)


def test_closing_ends_the_workers_and_may_be_repeated(canned: TinkerSampler) -> None:
    sampler = ProcessSampler(canned, 1)
    (pid,) = sampler.pids
    handle = os.pidfd_open(pid)
    sampler.close()
    sampler.close()
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(handle, 0)
    os.close(handle)
    assert sampler.pids == []
    with pytest.raises(ServiceError, match="it was closed"):
        ask(sampler, 1)


def test_requests_of_a_killed_worker_are_asked_of_another(two: ProcessSampler) -> None:
    """The last test of the two workers: the server answers after the first was killed, and then
    nobody is left.
    """

    async def lose_one() -> list[Reply]:
        asked = [asyncio.create_task(two.sample(ASKED, Sampling())) for _ in range(6)]
        await asyncio.sleep(0)
        os.kill(two.pids[0], signal.SIGKILL)
        return await asyncio.gather(*asked)

    replies = asyncio.run(lose_one())
    assert [reply.samples[0].text for reply in replies] == ["ja"] * 6
    (left,) = two.pids
    os.kill(left, signal.SIGKILL)
    with pytest.raises(ServiceError, match="All 2 worker processes .*Run again"):
        ask(two, 1)
