"""Samples held to a JSON schema: by the compiler alone, and of a local model as a teacher."""

import asyncio
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from distill_datasets.embedded.logits import LONGEST_SCHEMA, Grammars
from distill_datasets.embedded.wire import InvalidRequestError
from distill_datasets.models.references import connect
from distill_datasets.models.sampler import Reply, Sampling
from distill_datasets.models.tinker import TinkerSampler
from tests.support.shared_server import shared

ASKED: Any = [{"role": "user", "content": "What language is this?"}]
SCHEMA = {
    "type": "object",
    "properties": {"code": {"enum": ["en", "de"]}, "sure": {"type": "boolean"}},
    "required": ["code", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(model: str) -> Grammars:
    return Grammars((shared().model / "tokenizer.json").read_text(), 512, [2])


def test_every_way_through_a_constraint_ends_in_what_the_schema_allows(
    grammars: Grammars, model: str
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared().model / "tokenizer.json"))
    make = grammars.compile(SCHEMA)
    for first in (False, True):
        constraint, tokens = make(), list[int]()
        while True:
            allowed = constraint.allowed().nonzero()[0].tolist()
            token = allowed[0] if first else allowed[-1]
            constraint.accept(token)
            if token == 2:
                break
            tokens.append(token)
            assert len(tokens) < 200
        assert set(json.loads(tokenizer.decode(tokens))) == {"code", "sure"}
        assert constraint.allowed().nonzero()[0].tolist() == [2]


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
        ({"const": "a" * LONGEST_SCHEMA}, "at most 131072 characters"),
    ],
)
def test_a_schema_that_cant_be_held_says_why(grammars: Grammars, schema: Any, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        grammars.compile(schema)


def test_without_llguidance_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequestError, match=r"pip install 'distill-datasets\[serve\]'"):
        Grammars("{}", 4, [1])


def ask(sampler: TinkerSampler, schema: Any, *, requests: int = 1) -> list[Reply]:
    sampling = Sampling(max_tokens=300, seed=1, n=4, json_schema=json.dumps(schema))

    async def all_at_once() -> list[Reply]:
        return await asyncio.gather(*(sampler.sample(ASKED, sampling) for _ in range(requests)))

    return asyncio.run(all_at_once())


def test_a_local_teacher_is_held_to_the_schema_of_its_answers(model: str) -> None:
    sampler = TinkerSampler(connect(model))
    for _ in range(2):  # on two event loops
        for reply in ask(sampler, SCHEMA, requests=2):
            for sample in reply.samples:
                assert sample.stop_reason == "stop"
                assert set(json.loads(sample.text)) == {"code", "sure"}
    free = asyncio.run(sampler.sample(ASKED, Sampling(max_tokens=20, seed=1)))
    assert not free.samples[0].text.startswith("{")


def test_a_local_teacher_answers_all_the_same_where_its_schema_cant_be_held(model: str) -> None:
    sampler = TinkerSampler(connect(model))
    # Not pytest's own: connections that the SDK leaves open are reported whenever they like.
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        (reply,) = ask(sampler, {"type": "string", "pattern": "(?=a)"})
    said = " ".join(str(one.message) for one in told)
    assert "is not held to the schema" in said and "look-ahead" in said
    assert len(reply.samples) == 4


def test_a_student_is_not_held_by_its_teachers_session(model: str, tmp_path: Path) -> None:
    first, second = TinkerSampler(connect(model)), TinkerSampler(connect(model))
    ask(first, SCHEMA)
    found = asyncio.run(second.sample(ASKED, Sampling(max_tokens=8, temperature=0)))
    again = asyncio.run(first.sample(ASKED, Sampling(max_tokens=8, temperature=0)))
    assert found.samples == again.samples
