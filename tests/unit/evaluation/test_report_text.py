from typing import Any

from distill_datasets.evaluation.report_text import table

SYSTEMS = ("teacher", "base", "student")


def test_long_answers_among_few_rows_leave_lines_that_can_be_read() -> None:
    long: dict[str, str | None] = dict.fromkeys(("expected", *SYSTEMS, "query"), "word " * 400)
    short: dict[str, str | None] = {
        "expected": None,
        "query": "Hello",
        **dict.fromkeys(SYSTEMS, "en"),
    }
    *_, header, long_line, short_line = table(_report([long, short])).splitlines()
    assert header.split() == ["expected", *SYSTEMS, "query"]
    assert long_line.count("…") == 5
    assert len(long_line) < 600
    assert short_line.split() == ["-", "en", "en", "en", "Hello"]


def test_a_student_that_reads_more_than_the_teacher_saves_nothing() -> None:
    report = _report([]) | {"prompt_tokens_saved": {"per_query": -300.0, "ratio": 0.25}}
    tokens = {"teacher": 100.0, "base": 400.0, "student": 400.0}
    report["systems"] = {
        name: {**system, "tokens": {"prompt_mean": tokens[name], "response_mean": None}}
        for name, system in report["systems"].items()
    }
    assert "student 400.0, teacher 100.0: none saved." in table(report)
    assert "fewer" not in table(report)


def _report(rows: list[dict[str, str | None]]) -> dict[str, Any]:
    system = {
        "prompt": None,
        "metrics": {},
        "tokens": {"prompt_mean": None, "response_mean": None},
        "answers": {"distinct": 2, "commonest": "en", "commonest_share": 0.5},
        "latency_ms": {"p50": 1.0},
        "latency_uncached_ms": {"p50": 1.0},
    }
    return {
        "n": len(rows),
        "systems": dict.fromkeys(SYSTEMS, system),
        "differences": {},
        "latency_ratio": {"teacher": 1.0, "teacher_uncached": 1.0},
        "prompt_tokens_saved": None,
        "rows": rows,
    }
