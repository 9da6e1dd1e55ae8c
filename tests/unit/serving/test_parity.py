import math

import numpy as np
import pytest

from distill_datasets.serving.parity import Certificate, Computed, Gap, _clipped

NOTHING = Gap(0.0, 0.0)


def gap(*apart: float) -> Gap:
    return Gap.between([np.zeros(len(apart))], [np.asarray(apart)])


def of_noise(floor: Gap, tokens: int = 500) -> Gap:
    return Certificate("path", 8, tokens, floor, NOTHING, NOTHING).limit


def test_a_gap_is_of_all_tokens_and_is_written_the_same_from_run_to_run() -> None:
    apart = gap(0.1, -0.3)
    assert (apart.mean, apart.largest) == pytest.approx((0.2, 0.3))
    assert gap(0.0721, 0.0722).written == gap(0.0731, 0.0732).written == Gap(0.07, 0.07)
    assert gap(2e-7, -9e-7).written == Gap(1e-5, 1e-5)


def test_a_token_that_no_server_tells_of_is_no_likelier_than_the_last_that_is_told() -> None:
    there, least = [np.asarray([9.0, -1.0, -30.0])], [np.asarray([-8.0, -7.0])]
    assert _clipped(there, least)[0].tolist() == [-1.0, -7.0]


def test_what_computes_no_number_is_never_the_student() -> None:
    broken = gap(0.1, math.nan)
    assert not broken.within(Gap(math.inf, math.inf))


@pytest.mark.parametrize("tokens", [30, 500, 4000])
def test_noise_of_the_floor_is_within_the_limit_and_twice_the_noise_is_not(tokens: int) -> None:
    random = np.random.default_rng(0)

    def drawn(scale: float) -> Gap:
        return gap(*random.laplace(scale=scale, size=tokens))

    within = [drawn(0.05).within(of_noise(drawn(0.05), tokens)) for _ in range(500)]
    assert np.mean(within) > 0.98
    if tokens >= 100:
        assert not any(drawn(0.1).within(of_noise(drawn(0.05), tokens)) for _ in range(200))


def test_one_token_that_is_far_off_is_no_noise() -> None:
    assert not gap(*[0.05] * 499, 3.0).within(of_noise(Gap(0.06, 0.4)))


def test_rounding_below_a_hundred_thousandth_of_a_nat_is_noise() -> None:
    assert Gap(9e-6, 9e-5).within(of_noise(Gap(3e-7, 2e-6)))


def test_a_certificate_says_what_was_found() -> None:
    fine = Certificate("path", 8, 200, gap(0.0), gap(2.0), gap(0.0))
    assert fine.passed and fine.lines()[0].endswith("of 8 rows: the same student")
    spoiled = Certificate("path", 8, 200, gap(0.0), gap(2.0), gap(2.0), problems=("wrong",))
    assert spoiled.lines()[0].endswith("NOT the same student") and "  wrong" in spoiled.lines()


@pytest.mark.parametrize(
    ("base", "merged", "told"),
    [
        ("float32", "bfloat16", True),
        ("float16", "bfloat16", True),
        ("bfloat16", "bfloat16", False),
        ("float16", "float32", False),
    ],
)
def test_merged_weights_of_another_16_bits_than_the_bases_are_rounded(
    base: str, merged: str, told: bool
) -> None:
    untouched, here = (Computed([], [], f"torch.{one}") for one in (base, merged))
    assert here.rounds_otherwise(untouched) is told
