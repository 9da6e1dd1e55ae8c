"""What a server's refusals and headers mean."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from distill_datasets.errors import (
    FATAL,
    AccessError,
    DistillError,
    ModelError,
    RejectedError,
    RetryableError,
    ServiceError,
)
from distill_datasets.models.retry import (
    Standing,
    explain,
    read_allowance,
    read_refusal,
    read_retry_after,
    read_seconds,
)
from distill_datasets.models.sampler import Allowance


def in_an_hour() -> datetime:
    return datetime.now(UTC) + timedelta(hours=1)


NAMES = {
    "IMF": "%a, %d %b %Y %H:%M:%S GMT",
    "RFC 850": "%A, %d-%b-%y %H:%M:%S GMT",
    "asctime": "%a %b %d %H:%M:%S %Y",
    "minus zero": "%a, %d %b %Y %H:%M:%S -0000",
    "no zone": "%a, %d %b %Y %H:%M:%S",
    "ISO": "%Y-%m-%dT%H:%M:%SZ",
    "ISO without a zone": "%Y-%m-%dT%H:%M:%S",
}


@pytest.mark.parametrize("form", NAMES.values(), ids=NAMES)
def test_a_date_in_any_form_is_read_as_utc(form: str) -> None:
    assert 3400 < (read_retry_after({"retry-after": in_an_hour().strftime(form)}) or 0) <= 3600


@pytest.mark.parametrize(
    "text",
    ["", "soon", "-1", "Mon, 01 Jan 99999 00:00:00 GMT", "Sat, 28 Nov 2026 99:99:99 GMT", "inf"],
)
def test_what_is_no_time_is_none(text: str) -> None:
    assert read_retry_after({"retry-after": text}) is None


def test_a_date_far_away_or_past_is_in_seconds_too() -> None:
    assert (read_seconds("Fri, 31 Dec 9999 23:59:59 GMT") or 0) > 1e11
    assert read_seconds("Fri, 31 Dec 1999 23:59:59 GMT") == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("86400", 86400),
        ("1e3", 1000),
        ("120, 120", 120),
        ("2s", 2),
        ("2 seconds", 2),
        ("1 min 30 sec", 90),
        ("7m12.5s", 432.5),
        ("86400000ms", 86400),
        ("250 milliseconds", 0.25),
        ("1d", 86400),
        ("3 apples", None),
        ("5 x 3s", None),
        ("1 " * 500_000, None),
    ],
)
def test_spans_are_read_in_any_unit(text: str, seconds: float | None) -> None:
    assert read_seconds(text) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("scale", [1, 1000, 1_000_000])
def test_a_huge_number_is_a_point_in_time(scale: int) -> None:
    headers = {
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": f"{int(in_an_hour().timestamp() * scale)}",
    }
    assert 3400 < (read_retry_after(headers) or 0) <= 3600


def test_the_reset_of_a_server_that_names_no_kind_is_read() -> None:
    assert read_retry_after({"x-ratelimit-reset": "30"}) == 30
    assert read_retry_after({"ratelimit-reset": "30", "ratelimit-remaining": "0"}) == 30
    assert read_retry_after({"ratelimit-reset": "30", "ratelimit-remaining": "7"}) is None


def test_a_reset_in_one_header_is_that_of_what_is_used_up() -> None:
    assert read_retry_after({"ratelimit": '"default";r=0;t=30'}) == 30
    assert read_retry_after({"ratelimit": '"a"; r=0; t=5, "day"; r=0; t=90, "b";r=3;t=400'}) == 90
    assert read_retry_after({"ratelimit": '"default";r=7;t=30'}) is None
    assert read_retry_after({"ratelimit": "r=0;t=soon, ;;=, r=0"}) is None


def test_allowances_are_read_as_proxies_join_them() -> None:
    headers = {"x-ratelimit-remaining-requests": "14, 99", "x-ratelimit-remaining-tokens": "0.0"}
    assert read_allowance(headers) == Allowance(14, None, 0, None)


@pytest.mark.parametrize(
    "status", [408, 409, 420, 421, 423, 424, 425, 429, 449, 460, 498, 499, 500, 520, 529, 599]
)
def test_a_status_that_passes_is_retried(status: int) -> None:
    error = explain(read_refusal(status, {"retry-after": "2"}, ""), "openai:m")
    assert isinstance(error, RetryableError)
    assert (error.status, error.retry_after, error.most_attempts) == (status, 2, None)


@pytest.mark.parametrize("status", [302, 401, 402, 403, 404, 405, 418, 426, 451])
def test_a_status_that_no_row_escapes_is_fatal(status: int) -> None:
    assert isinstance(explain(read_refusal(status, {}, ""), "openai:m"), FATAL)


def test_an_error_within_status_200_has_its_own() -> None:
    for code in ("429", 429):
        refusal = read_refusal(
            200, {}, f'{{"error": {{"message": "m", "code": {code!r}}}}}'.replace("'", '"')
        )
        assert refusal.status == 429
    assert read_refusal(200, {}, '{"error": "odd"}').status == 500


def test_what_a_server_said_is_whole_and_bounded() -> None:
    assert read_refusal(400, {}, '{"error": {"message": "bad \\ud83d"}}').message == "bad \ufffd"
    assert len(read_refusal(400, {}, '{"error": "' + "x" * 9000 + '"}').message) == 2000
    assert read_refusal(500, {}, "[" * 100_000).message == "[" * 500


def test_a_refused_parameter_is_a_rejection_where_others_are_answered() -> None:
    error = explain(read_refusal(400, {}, '{"error": {"param": "seed"}}'), "openai:m")
    assert isinstance(error, ModelError)
    assert isinstance(error.__cause__, RejectedError)
    assert isinstance(explain(read_refusal(418, {}, ""), "openai:m"), ServiceError)


REFUSED = AccessError("key refused")


def judged(standing: Standing, error: DistillError) -> DistillError:
    return asyncio.run(standing.judge(error))


def test_before_any_answer_a_fatal_refusal_is_fatal() -> None:
    assert judged(Standing(), REFUSED) is REFUSED


def test_after_an_answer_it_is_one_requests_matter() -> None:
    standing = Standing()
    standing.accept()
    found = judged(standing, ServiceError("status 418"))
    assert isinstance(found, RetryableError)
    assert (str(found), found.most_attempts) == ("status 418", 3)


def test_a_refusal_waits_for_the_requests_beside_it() -> None:
    standing = Standing()

    async def both() -> DistillError:
        with standing.request():
            verdict = asyncio.create_task(standing.judge(REFUSED))
            await asyncio.sleep(0)
            assert not verdict.done()
            standing.accept()
        return await verdict

    assert isinstance(asyncio.run(both()), RetryableError)


def test_when_the_requests_beside_it_fail_too_it_is_fatal() -> None:
    standing = Standing()

    async def both() -> DistillError:
        with standing.request():
            verdict = asyncio.create_task(standing.judge(REFUSED))
            await asyncio.sleep(0)
        return await verdict

    assert asyncio.run(both()) is REFUSED


def test_a_key_that_is_refused_again_and_again_ends_the_run() -> None:
    standing = Standing()
    standing.accept()
    kinds = [type(judged(standing, REFUSED)) for _ in range(10)]
    assert kinds == [RetryableError] * 9 + [AccessError]
    standing.accept()
    assert isinstance(judged(standing, REFUSED), RetryableError)


def test_other_failures_stay_what_they_are() -> None:
    rejected = RejectedError("too long", type="context length")
    standing = Standing()
    assert judged(standing, rejected) is rejected
    standing.accept()
    refused = ModelError("parameter")
    refused.__cause__ = rejected
    assert judged(standing, refused) is rejected
