"""Sizes, statuses, keys, time-outs and proxies of an endpoint."""

import asyncio
import gzip
import json
import subprocess
import sys
import tracemalloc
from typing import Any

import pytest

from distill_datasets.errors import (
    AccessError,
    DistillError,
    ModelError,
    RequestError,
    RetryableError,
    ServiceError,
)
from distill_datasets.models.endpoint import MOST_BYTES
from distill_datasets.models.openai import OpenAISampler
from distill_datasets.models.references import open_sampler
from distill_datasets.models.sampler import Reply, Sampler, Sampling
from tests.support.openai_server import Fault, OpenAIServer, ask, serving


def large(size: int) -> bytes:
    body = {"choices": [{"message": {"content": "x" * size}, "finish_reason": "stop"}]}
    return json.dumps(body).encode()


def test_an_answer_that_is_too_large_is_its_rows_failure(server: OpenAIServer) -> None:
    server.faults.append(Fault("one", body=large(MOST_BYTES)))
    with pytest.raises(RequestError, match="at most 16 MiB, unpacked, found a larger") as raised:
        ask(server)
    assert raised.value.type == "too large"
    server.faults[:] = [Fault("one", body=large(MOST_BYTES - 1000))]
    assert len(ask(server).samples[0].text) == MOST_BYTES - 1000


def test_a_small_answer_that_unpacks_to_a_large_one_is_not_unpacked_whole(
    server: OpenAIServer,
) -> None:
    packed = gzip.compress(bytes(512 << 20), compresslevel=1)
    server.faults.append(Fault("one", body=packed, headers={"Content-Encoding": "gzip"}))
    sampler = OpenAISampler("echo-small", base_url=server.url)
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="at most 16 MiB"):
            asyncio.run(sampler.sample([{"role": "user", "content": "one"}], Sampling()))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_packed_answer_is_read(server: OpenAIServer) -> None:
    packed = gzip.compress(large(1000))
    server.faults.append(Fault("one", body=packed, headers={"Content-Encoding": "gzip"}))
    assert ask(server).samples[0].text == "x" * 1000


@pytest.mark.parametrize("status", [302, 401, 403, 404, 405, 418, 421, 424, 426, 451, 460, 499])
def test_no_status_of_one_row_among_answers_ends_the_run(status: int, server: OpenAIServer) -> None:
    """All are asked at once: the odd one is refused before any other is answered."""
    server.faults.append(Fault("odd", status=status, error={"message": "odd"}))
    sampler = OpenAISampler("echo-small", base_url=server.url)

    async def all_of_them() -> list[Any]:
        queries = ["odd", "good", "odd", "fine"]
        asked = (sampler.sample([{"role": "user", "content": one}], Sampling()) for one in queries)
        return await asyncio.gather(*asked, return_exceptions=True)

    first, good, second, fine = asyncio.run(all_of_them())
    assert [type(one) for one in (good, fine)] == [Reply, Reply]
    for refused in (first, second):
        assert isinstance(refused, RetryableError)
        assert "odd" in str(refused)


def test_a_refusal_that_all_rows_get_ends_the_run_however_many_are_asked(
    server: OpenAIServer,
) -> None:
    server.faults.append(Fault("", status=404, error={"message": "no such path"}))
    sampler = OpenAISampler("echo-small", base_url=server.url)

    async def all_of_them() -> list[Any]:
        asked = (sampler.sample([{"role": "user", "content": "x"}], Sampling()) for _ in range(5))
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [type(one) for one in asyncio.run(all_of_them())] == [ModelError] * 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_key_that_the_server_repeats_is_in_no_error(
    stream: bool, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "team-7f3a9c21-gateway"
    said = {"message": f"Incorrect API key provided: {key}"}
    sampler = OpenAISampler("echo-small", base_url=server.url, api_key=f" {key}\r\n", stream=stream)
    for fault in (
        Fault("one", status=401, error=said),
        Fault("one", status=400, error=said),
        Fault("one", status=500, error=said),
        Fault("one", body=f"<html>{key}</html>"),
        Fault("one", body=json.dumps({"error": said})),
        Fault("one", body=f"data: {json.dumps({'error': said})}\n\n"),
    ):
        server.faults[:] = [fault]
        with pytest.raises(DistillError) as raised:
            asyncio.run(sampler.sample([{"role": "user", "content": "one"}], Sampling()))
        assert key not in str(raised.value)
        assert "[hidden]" in str(raised.value)
    assert server.keys[-1] == f"Bearer {key}"


def test_a_time_out_may_be_set_and_changed_between_requests(server: OpenAIServer) -> None:
    server.faults.append(Fault("hang", hang=True))
    sampler = open_openai(server, timeout=0.05)

    async def one_after_the_other() -> tuple[RetryableError, Reply]:
        with pytest.raises(RetryableError, match=r"within 0\.05 s") as raised:
            await sampler.sample([{"role": "user", "content": "hang"}], Sampling())
        sampler.endpoint.timeout = 30
        return raised.value, await sampler.sample([{"role": "user", "content": "go"}], Sampling())

    error, reply = asyncio.run(one_after_the_other())
    assert (error.type, reply.samples[0].text) == ("time-out", "go")


def open_openai(server: OpenAIServer, timeout: float) -> OpenAISampler:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", server.url)
        found = open_sampler("openai:echo-small", timeout=timeout)
    assert isinstance(found, OpenAISampler)
    return found


def test_the_query_of_a_base_url_goes_with_every_request(server: OpenAIServer) -> None:
    for url in ("?api-version=1", "/?api-version=1", "/chat/completions?api-version=1"):
        sampler = OpenAISampler("echo-small", base_url=f" {server.url}{url} ")
        sampler.reach()
        asyncio.run(sampler.sample([{"role": "user", "content": "hi"}], Sampling()))
        assert sampler.identity == OpenAISampler("echo-small", base_url=server.url).identity
    assert server.queries == ["api-version=1"] * 6


def test_a_proxy_that_is_dead_is_named_and_a_living_one_is_used(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as gone:
        dead = gone.url.removesuffix("/v1").replace("http://", "http://me:secret@")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://llm.internal/v1")
    monkeypatch.setenv("ALL_PROXY", dead)
    sampler = OpenAISampler("echo-small")
    asked = [{"role": "user", "content": "hi"}]
    with pytest.raises(
        ServiceError, match=r"through the proxy http://127\.0\.0\.1:\d+.* \(ALL_P"
    ) as at_once:
        sampler.reach()
    with pytest.raises(
        RetryableError, match=r"proxy http://127\.0\.0\.1:\d+.* \(ALL_PROXY\)"
    ) as later:
        asyncio.run(sampler.sample(asked, Sampling()))
    assert "secret" not in f"{at_once.value} {later.value}"
    monkeypatch.setenv("ALL_PROXY", server.url.removesuffix("/v1"))  # it answers for any host
    OpenAISampler("echo-small").reach()
    reply = asyncio.run(OpenAISampler("echo-small").sample(asked, Sampling()))
    assert reply.samples[0].text == "hi"
    monkeypatch.setenv("ALL_PROXY", dead)
    monkeypatch.setenv("NO_PROXY", "127.0.0.0/8")
    OpenAISampler("echo-small", base_url=server.url).reach()


def test_a_key_is_needed_away_from_this_machine_and_its_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for url in (None, "https://api.example.com/v1"):
        with pytest.raises(AccessError, match="set OPENAI_API_KEY"):
            OpenAISampler("m", base_url=url)
    for host in ("localhost", "127.0.0.1", "[::1]", "10.1.2.3", "vllm", "gpu.local"):
        OpenAISampler("m", base_url=f"http://{host}:8000/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    assert OpenAISampler("m").endpoint.url.host == "api.openai.com"


@pytest.mark.parametrize(
    "text", ["localhost:8000", "ftp://x/v1", "http://", "http://[x", "http://me:secret@x/v1"]
)
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="OPENAI_BASE_URL") as raised:
        OpenAISampler("m", base_url=text, api_key="k")
    assert "secret" not in str(raised.value)


def test_the_identity_tells_endpoints_apart_and_never_the_key() -> None:
    def identity(url: str | None, key: str = "sk-secret") -> str:
        return OpenAISampler("org/m", base_url=url, api_key=key).identity

    assert identity(None) == "openai:org/m"
    assert identity("https://api.openai.com/v1/") == "openai:org/m"
    assert identity("http://10.0.0.1:8000/v1") == "openai:org/m@10.0.0.1:8000"
    assert identity("https://gate.example/openai/v1") == "openai:org/m@gate.example/openai"
    assert identity("https://gate.example/v1", "a") == identity("https://gate.example/v1", "b")


def test_the_key_is_sent_and_a_refused_one_is_noticed_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(key="sk-good") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-bad")
        with pytest.raises(AccessError, match="refused the key"):
            open_sampler("openai:echo-small")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-good")
        sampler = open_sampler("openai:echo-small")
        reply = asyncio.run(sampler.sample([{"role": "user", "content": "hi"}], Sampling()))
        assert reply.samples[0].text == "hi"


def test_a_sampler_that_is_opened_lazily_needs_a_key_only_to_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def ask_twice(sampler: Sampler) -> list[object]:
        both = (sampler.sample([{"role": "user", "content": "hi"}], Sampling()) for _ in range(2))
        return await asyncio.gather(*both, return_exceptions=True)

    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    sampler = open_sampler("openai:m", lazily=True)
    assert sampler.identity == "openai:m"
    assert [type(found) for found in asyncio.run(ask_twice(sampler))] == [AccessError] * 2
    with serving(key="sk-good") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-good")
        sampler = open_sampler("openai:echo-small", lazily=True)
        assert server.keys == []
        assert all(isinstance(found, Reply) for found in asyncio.run(ask_twice(sampler)))
        assert len(server.keys) == 3  # one look for both


def test_a_key_goes_to_its_own_address_alone(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    with serving() as other:
        server.moved_to = f"{other.url}/models"
        OpenAISampler("echo-small", base_url=server.url).reach()
        assert (server.keys, other.keys) == (["Bearer sk-mine"], [None])


def test_a_server_that_is_not_there_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        url = server.url
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(ServiceError, match="Can't reach"):
        open_sampler("openai:echo-small")


def test_one_sampler_serves_many_event_loops_and_leaves_nothing_open(
    server: OpenAIServer,
) -> None:
    script = f"""
import asyncio
from distill_datasets.models.sampler import Sampling
from distill_datasets.models.openai import OpenAISampler
sampler = OpenAISampler("echo-small", base_url={server.url!r})
async def ask():
    for query in "ab":
        reply = await sampler.sample([{{"role": "user", "content": query}}], Sampling())
        assert reply.samples[0].text == query
async def close():
    await ask()
    await sampler.close()
    await ask()
for run in (ask, ask, close):
    asyncio.run(run())
"""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
