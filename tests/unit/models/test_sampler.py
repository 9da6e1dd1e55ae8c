"""Samples, replies and digests."""

import asyncio

import pytest

from distill_datasets.models.sampler import (
    Echo,
    Logprobs,
    Reply,
    Sample,
    Sampling,
    Usage,
    request_digest,
    split_thoughts,
    total,
)


def test_a_request_has_the_digest_that_it_always_had() -> None:
    """Pinned: paid answers are found again by it."""
    messages = [{"role": "system", "content": "Sei nett. é"}, {"role": "user", "content": "ja?"}]
    plain = request_digest("openai:m", messages, Sampling())  # type: ignore[arg-type]
    assert plain == "78519c54a6afb96f31803ddcf2230422a5f1589b045fada30fcb0faba6d8eaec"
    full = Sampling(0.5, 7, 0.9, 5, 3, ("\n",), 2, 0, '{"a": 1}', '{"b": 2}')
    assert (
        request_digest("openai:m", messages, full)
        == "c4905794c57e032ebce126141c127d64103319f00f1e270c95c39527a1c578fd"
    )  # type: ignore[arg-type]


def test_a_query_with_half_a_surrogate_pair_has_a_digest_too() -> None:
    halves = {
        request_digest("m", [{"role": "user", "content": text}], Sampling())
        for text in ("\ud83d", "\ud83e", "\ufffd")
    }
    assert len(halves) == 3


def test_a_reply_is_read_back_as_it_was_written() -> None:
    logprobs = Logprobs((1, "a"), (-0.5, -1.0), ((1, 2), ("a", "b")), ((-0.5, -2.0), (-1.0, -3.0)))
    samples = (Sample("x\U0001f600", "length", None, "hm", logprobs), Sample("", "stop", 3))
    reply = Reply(samples, Usage(None, 0, 4, 0.25), 1.5)
    assert Reply.from_json(reply.to_json()) == reply


def test_a_sum_with_an_unknown_part_is_unknown() -> None:
    assert total([1, 2]) == 3
    assert total([]) == 0
    assert total([1, None]) is None


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("yes", (None, "yes")),
        ("<think>\nso\n</think>\n\nyes", ("so", "yes")),
        (" \n<think>so</think>yes", ("so", "yes")),
        ("<think> \n</think>\n\nyes", (None, "yes")),
        ("<think>so", ("so", "")),
        ("so\n</think>\nyes", ("so", "yes")),
        ("so</think>", ("so", "")),
        ("say </think> then", (None, "say </think> then")),
        ("yes <think>so</think>\nno", (None, "yes <think>so</think>\nno")),
    ],
)
def test_thoughts_are_told_from_the_answer(text: str, split: tuple[str | None, str]) -> None:
    assert split_thoughts(text) == split


def test_the_echo_repeats_the_last_message() -> None:
    echo = Echo(template="say {text}")
    reply = asyncio.run(echo.sample([{"role": "user", "content": "a b"}], Sampling(n=2)))
    assert [sample.text for sample in reply.samples] == ["say a b"] * 2
    assert (reply.usage, reply.response_tokens, echo.calls) == (Usage(2, 0), 8, 1)
