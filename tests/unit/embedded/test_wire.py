"""Requests on the wire: whatever they say of their size is bounded before memory is taken."""

import json
from typing import Any

import numpy as np
import pytest

from distill_datasets.embedded.wire import (
    LARGEST_JSON,
    MOST_SAMPLES,
    MOST_SCORES,
    MOST_STOPS,
    MOST_VALUES,
    InvalidRequestError,
    pb,
    read_json,
    read_sample_request,
    read_tensor,
    whole,
)

HUGE = 10**9


def body(**changes: Any) -> dict[str, Any]:
    """A request for one sample of a prompt of three tokens."""
    chunk = {"type": "encoded_text", "tokens": [5, 6, 7]}
    params = {"max_tokens": 4, **changes.pop("params", {})}
    return {"prompt": {"chunks": [chunk]}, "num_samples": 1, "sampling_params": params, **changes}


def targets(shape: list[Any], data: list[int], **sparse: list[int]) -> dict[str, Any]:
    return body(target_prompt_logprobs={"dtype": "int64", "shape": shape, "data": data, **sparse})


def prompt(tokens: Any) -> dict[str, Any]:
    return body(prompt={"chunks": [{"type": "encoded_text", "tokens": tokens}]})


def test_a_plain_request_is_read() -> None:
    request = read_sample_request(body(params={"seed": 0, "stop": [3]}))
    assert request.prompt.tolist() == [5, 6, 7]
    assert (request.seed, request.stop, request.max_tokens) == (0, (3,), 4)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (body(num_samples=HUGE), f"num_samples in 1..{MOST_SAMPLES}; found {HUGE}"),
        (body(num_samples=-1), "num_samples in 1.."),
        (body(num_samples="9"), "a whole number; found '9'"),
        (body(num_samples=True), "a whole number; found True"),
        (body(topk_sample_logprobs=10**12), f"topk_sample_logprobs in 0..{MOST_SCORES}"),
        (body(topk_prompt_logprobs=-1), "topk_prompt_logprobs in 0.."),
        (body(params={"max_tokens": -5}), "max_tokens in 1.."),
        (body(params={"max_tokens": 10**40}), "max_tokens in"),
        (body(params={"temperature": 1e-300}), "temperature of 0 or from"),
        (body(params={"temperature": 1e300}), "temperature in 0.0..1000000.0"),
        (body(params={"temperature": "hot"}), "temperature in 0.0..1000000.0, a number"),
        (body(params={"top_p": 0}), "top_p in (0, 1]"),
        (body(params={"top_p": 1.5}), "top_p in 0.0..1.0"),
        (body(params={"top_k": 0}), "top_k of -1 (off) or 1 and more"),
        (body(params={"seed": 2**200}), "seed in"),
        (body(params={"stop": ["a"] * (MOST_STOPS + 1)}), f"at most {MOST_STOPS} strings"),
        (body(params={"stop": ["a", 5]}), "not mixed"),
        (body(params={"stop": ["a" * 5000]}), "at most 4096 characters"),
        (body() | {"sampling_params": [1]}, "sampling_params as an object"),
        (prompt([]), "a prompt of at least one token"),
        (prompt([5, 2**70]), "numbers of 64 bits"),
        (prompt([5, 1.5]), "a list of whole numbers"),
        (prompt([[5], [6]]), "a list of whole numbers"),
        (prompt("567"), "a list of whole numbers"),
        (body(prompt={"chunks": [{"type": "image"}]}), "text chunks only"),
        (body(prompt={"chunks": "5"}), "prompt.chunks as a list"),
        (body(prompt_logprobs=True, prompt_logprobs_last_n=HUGE), "last_n in 1..2"),
        (targets([2, 4], [5], sparse_crow_indices=[0, 1, 1]), "not sparse"),
        (targets([2, -1], [5]), "of shape (N,) or (N, K)"),
        (targets([2, 10**30], [5]), "of at most"),
        (targets([2.0, 1], [5, 5]), "of shape (N,) or (N, K)"),
        (targets([2, 1, 1], [5, 5]), "of shape (N,) or (N, K)"),
        (targets([HUGE, 1], [5]), "of at most"),
        (targets([3, 1], [5, 5, 5]), "of 2 rows"),
        (targets([2, 1], [5]), "as many values as its shape (2, 1) says; found 1"),
        (targets([2, 0], []), "of 2 rows"),
    ],
)
def test_what_is_out_of_bounds_is_refused_in_a_sentence(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_sample_request(asked)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


def test_json_has_a_size_a_depth_and_finite_numbers() -> None:
    for content, said in (
        (b" " * (LARGEST_JSON + 1), f"at most {LARGEST_JSON} bytes"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": NaN}', "finite numbers; found NaN"),
        (b'{"a": -Infinity}', "finite numbers; found -Infinity"),
        (b"[1]", "a JSON object; found list"),
        (b"\xff\xfe\xff", "expected JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "expected JSON"),
    ):
        with pytest.raises(InvalidRequestError, match=said):
            read_json(content)
    # Too large for a float: JSON has no infinity, but Python reads one.
    with pytest.raises(InvalidRequestError, match="found inf"):
        read_sample_request(body(params=read_json(b'{"temperature": 1e400}')))


def test_a_huge_number_is_named_by_its_size() -> None:
    with pytest.raises(InvalidRequestError, match="found a number of 10001 bits"):
        whole({"n": 1 << 10_000}, "n", 0, 5)


def tensor(shape: list[int], **parts: Any) -> pb.Tensor:
    return pb.Tensor(dtype=pb.DTYPE_INT64, shape=shape, **parts)


def ints(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (tensor([2, HUGE], sparse_csr=pb.SparseCsr(crow_indices=ints(0, 0, 0))), "of at most"),
        (tensor([2, -1], dense=ints(1, 2)), "of shape (N,) or (N, K)"),
        (tensor([-1, -2], dense=ints(1, 2)), "of shape (N,) or (N, K)"),
        (tensor([1, 1, 2], dense=ints(1, 2)), "of shape (N,) or (N, K)"),
        (tensor([3], dense=ints(1, 2)), "as many values as its shape (3,) says; found 2"),
        (tensor([1], dense=b"12345"), "values of 8 bytes each; found 5 bytes"),
        (tensor([2], sparse_csr=pb.SparseCsr(crow_indices=ints(0, 0, 0))), "of shape (N, K)"),
        (tensor([1, 9], sparse_csr=pb.SparseCsr(crow_indices=ints(0, 5))), "in CSR"),
        (pb.Tensor(dtype=pb.DTYPE_BFLOAT16, shape=[1], dense=b"12"), "as float32 or int64"),
        (tensor([2**62], dense=ints(1)), "of at most"),
    ],
)
def test_a_tensor_takes_no_more_memory_than_it_may(found: pb.Tensor, said: str) -> None:
    assert MOST_VALUES < 2 * HUGE
    with pytest.raises(InvalidRequestError) as caught:
        read_tensor(found, "weights")
    assert said in str(caught.value)


def test_a_sparse_tensor_is_its_dense_matrix() -> None:
    part = pb.SparseCsr(values=ints(7, 8), crow_indices=ints(0, 1, 2), col_indices=ints(2, 0))
    assert read_tensor(tensor([2, 3], sparse_csr=part), "x").tolist() == [[0, 0, 7], [8, 0, 0]]
    assert json.dumps(whole({}, "absent", 0, 1, None)) == "null"
