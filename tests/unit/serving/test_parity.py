import math

import numpy as np

from distill_datasets.serving.parity import Certificate, Gap


def gap(*apart: float) -> Gap:
    return Gap.between([np.zeros(len(apart))], [np.asarray(apart)])


def test_a_gap_is_of_all_tokens_and_the_same_from_run_to_run() -> None:
    assert gap(0.1, -0.3) == Gap(0.2, 0.3)
    assert gap(0.0721, 0.0722) == gap(0.0731, 0.0732) == Gap(0.07, 0.07)
    assert gap(2e-7, -9e-7) == Gap(1e-5, 1e-5)


def test_what_computes_no_number_is_never_the_student() -> None:
    broken = gap(0.1, math.nan)
    assert not broken.within(Gap(math.inf, math.inf))


def test_the_limit_is_a_multiple_of_the_noise_and_never_nothing() -> None:
    def limit(floor: Gap) -> Gap:
        return Certificate("path", 1, 1, floor, floor, floor).limit

    assert limit(Gap(0.07, 0.5)) == Gap(0.28, 2.0)
    assert limit(Gap(1e-5, 1e-5)) == Gap(1e-4, 2e-3)


def test_a_certificate_says_what_was_found() -> None:
    fine = Certificate("path", 8, 200, gap(0.0), gap(2.0), gap(0.0))
    assert fine.passed and fine.lines()[0].endswith("of 8 rows: the same student")
    spoiled = Certificate("path", 8, 200, gap(0.0), gap(2.0), gap(2.0), problems=("wrong",))
    assert spoiled.lines()[0].endswith("NOT the same student") and "  wrong" in spoiled.lines()
