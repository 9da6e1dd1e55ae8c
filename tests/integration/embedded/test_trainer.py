"""The embedded server's losses and gradients, against the same written directly over torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from distill_datasets.embedded.trainer import MOST_ROWS, AdamParams, read_train_request
from distill_datasets.embedded.wire import MOST_VALUES, InvalidRequestError, pb
from tests.support.shared_server import shared

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")

# Two threads of a test wait for each other while other tests hold the cores.
torch.set_num_threads(1)
RATE = 1e-2
# Moments that forget at once: a step shows the gradient of its own batch.
ADAM = types.AdamParams(learning_rate=RATE, beta1=0.0, beta2=0.0, eps=1.0)
K = 4
Loss = Callable[[torch.Tensor, types.Datum], torch.Tensor]


@pytest.fixture
def model() -> Path:
    return shared().model


@pytest.fixture
def store() -> Path:
    return shared().store


@pytest.fixture
def client() -> tinker.TrainingClient:
    return shared().service.create_lora_training_client("tiny", rank=4, seed=1).result(60)


def datum(tokens: Sequence[int], **inputs: object) -> types.Datum:
    """Tensors as T3 and T2 send them: torch, numpy or lists."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens)),
        loss_fn_inputs=inputs,  # type: ignore[arg-type]
    )


def soft_batch(seed: int) -> list[types.Datum]:
    """Rows of several lengths, K targets each, some positions and some targets without weight."""
    random = np.random.default_rng(seed)
    rows = []
    for length in (3, 9, 17):
        weights = random.random((length, K)).astype(np.float32)
        weights[0] = 0
        weights[1:, -1] = 0
        targets = random.integers(5, 500, (length, K))
        rows.append(datum(random.integers(5, 500, length), target_tokens=targets, weights=weights))
    return rows


def sampled_batch(seed: int) -> list[types.Datum]:
    """Rows with advantages of both signs, some zero, and logprobs as if sampled elsewhere."""
    random = np.random.default_rng(seed)
    rows = []
    for length in (4, 11):
        advantages = random.normal(size=length).astype(np.float32)
        advantages[:2] = 0
        rows.append(
            datum(
                random.integers(5, 500, length),
                target_tokens=random.integers(5, 500, length),
                logprobs=random.normal(-6, 0.5, length).astype(np.float32),
                advantages=advantages,
            )
        )
    return rows


def tensor(row: types.Datum, name: str) -> torch.Tensor:
    return row.loss_fn_inputs[name].to_torch()


class Reference:
    """One adapter and plain gradient descent over it, row by row."""

    def __init__(self, model: Path, adapter: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.network = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        self.weights = [one for one in self.network.parameters() if one.requires_grad]

    def logprobs(self, row: types.Datum) -> torch.Tensor:
        logits = self.network(input_ids=torch.tensor([row.model_input.to_ints()])).logits[0]
        targets = tensor(row, "target_tokens")
        found = torch.log_softmax(logits, dim=-1).gather(1, targets.reshape(len(targets), -1))
        return found.reshape(targets.shape)

    def learn(self, rows: list[types.Datum], loss: Loss) -> float:
        total = sum((loss(self.logprobs(row), row) for row in rows), torch.tensor(0.0))
        gradients = torch.autograd.grad(total, self.weights)
        with torch.no_grad():
            for weight, gradient in zip(self.weights, gradients, strict=True):
                # Adam without a memory, as in ADAM.
                weight -= RATE * gradient / (gradient.abs() + 1.0)
        return float(total.detach())


def cross_entropy(logprobs: torch.Tensor, row: types.Datum) -> torch.Tensor:
    return -(logprobs * tensor(row, "weights")).sum()


def ratio(logprobs: torch.Tensor, row: types.Datum) -> torch.Tensor:
    return (logprobs - tensor(row, "logprobs")).exp()


def importance_sampling(logprobs: torch.Tensor, row: types.Datum) -> torch.Tensor:
    return -(ratio(logprobs, row) * tensor(row, "advantages")).sum()


LOSSES = [
    ("cross_entropy", cross_entropy, soft_batch),
    ("importance_sampling", importance_sampling, sampled_batch),
]


@pytest.mark.parametrize(("name", "loss", "batch"), LOSSES, ids=[one[0] for one in LOSSES])
def test_three_steps_equal_the_loss_written_over_torch(  # noqa: PLR0917
    client: tinker.TrainingClient,
    model: Path,
    store: Path,
    name: types.LossFnType,
    loss: Loss,
    batch: Callable[[int], list[types.Datum]],
) -> None:
    path = client.save_weights_for_sampler("start").result(60).path
    run, kind, saved = path.removeprefix("tinker://").split("/")
    reference = Reference(model, store / run.replace(":", "_") / kind / saved)
    first = reference.logprobs(batch(0)[0]).detach().numpy()
    for seed in range(3):
        expected_logprobs = [reference.logprobs(row).detach().numpy() for row in batch(seed)]
        output = client.forward_backward(batch(seed), name)
        client.optim_step(ADAM).result(60)
        found = output.result(60)
        expected = reference.learn(batch(seed), loss)
        np.testing.assert_allclose(found.metrics["loss:sum"], expected, rtol=1e-4, atol=1e-4)
        for row, one, logprobs in zip(
            batch(seed), found.loss_fn_outputs, expected_logprobs, strict=True
        ):
            own = one["logprobs"].to_numpy()
            assert own.shape == logprobs.shape
            # What stands before all weights is read by nobody, and is not computed.
            start = int(name == "cross_entropy" and not tensor(row, "weights")[0].any())
            assert not own[:start].any()
            np.testing.assert_allclose(own[start:], logprobs[start:], atol=1e-4)
    trained = client.forward(batch(0), name).result(60).loss_fn_outputs[0]["logprobs"]
    assert np.abs(trained.to_numpy() - first).max() > 1e-3


def test_a_soft_target_of_weight_one_is_a_hard_target(client: tinker.TrainingClient) -> None:
    tokens, targets, weights = [70, 71, 72], [80, 81, 82], [0.0, 1.0, 0.5]
    hard = datum(tokens, target_tokens=targets, weights=weights)
    soft = datum(
        tokens,
        target_tokens=[[80, 9], [81, 0], [82, 7]],
        weights=[[0.0, 0.0], [1.0, 0.0], [0.5, 0.0]],
    )
    found = client.forward([hard, soft], "cross_entropy").result(60).loss_fn_outputs
    np.testing.assert_allclose(
        found[1]["logprobs"].to_numpy()[:, 0], found[0]["logprobs"].to_numpy(), atol=1e-5
    )
    losses = [client.forward([one], "cross_entropy").result(60).metrics for one in (hard, soft)]
    np.testing.assert_allclose(losses[0]["loss:sum"], losses[1]["loss:sum"], atol=1e-5)


def test_sparse_targets_are_their_dense_matrix(client: tinker.TrainingClient) -> None:
    targets = torch.zeros(12, 8, dtype=torch.int64)
    weights = torch.zeros(12, 8)
    targets[8:, :2] = torch.tensor([[90, 0], [91, 7], [92, 8], [93, 9]])
    weights[8:, :2] = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.2, 0.8], [0.9, 0.1]])
    tokens = list(range(60, 72))
    sparse = datum(tokens, target_tokens=targets, weights=weights)
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None
    dense = datum(tokens, target_tokens=targets.numpy(), weights=weights.numpy())
    one, other = (client.forward([row], "cross_entropy").result(60) for row in (sparse, dense))
    assert one.metrics == other.metrics
    found = [each.loss_fn_outputs[0]["logprobs"].to_numpy() for each in (one, other)]
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0].shape == (12, 8)


def test_rows_with_one_two_and_three_targets_go_together(client: tinker.TrainingClient) -> None:
    rows = [datum([70, 71], target_tokens=[80, 81], weights=[1.0, 1.0])]
    rows += [
        datum([70, 71], target_tokens=np.full((2, k), 80), weights=np.ones((2, k), np.float32))
        for k in (2, 3, 2)
    ]
    found = client.forward(rows, "cross_entropy").result(60).loss_fn_outputs
    assert [one["logprobs"].shape for one in found] == [[2], [2, 2], [2, 3], [2, 2]]


def test_a_custom_loss_trains_on_soft_targets(client: tinker.TrainingClient) -> None:
    """The SDK computes it from our logprobs, and sends back its gradients as weights."""

    def loss(
        data: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        total = sum((one**2).sum() for one in logprobs)
        return total, {"squares": float(total.detach())}

    before = client.forward_backward_custom(soft_batch(0), loss).result(120).metrics["squares"]
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result(60)
    after = client.forward_backward_custom(soft_batch(0), loss).result(120).metrics["squares"]
    assert after < before


def refusal(client: tinker.TrainingClient, row: types.Datum, loss: str, **config: float) -> str:
    with pytest.raises(tinker.RequestFailedError) as caught:
        client.forward_backward([row], loss, config).result(60)  # type: ignore[arg-type]
    assert caught.value.category == types.RequestErrorCategory.User
    return str(caught.value)


def test_what_a_loss_lacks_is_named(client: tinker.TrainingClient) -> None:
    (sampled, _), (soft, *_) = sampled_batch(0), soft_batch(0)
    said = refusal(client, soft, "gspo")
    assert "cross_entropy, importance_sampling; found loss_fn='gspo'" in said
    assert "expects loss_fn_inputs target_tokens, advantages, logprobs" in refusal(
        client, soft, "importance_sampling"
    )
    flat = {name: value.to_numpy() for name, value in sampled.loss_fn_inputs.items()}
    two = {name: np.stack([value, value], 1) for name, value in flat.items()}
    tokens = sampled.model_input.to_ints()
    assert "one shape, (N,) for" in refusal(client, datum(tokens, **two), "importance_sampling")
    short = datum(tokens, **{**flat, "advantages": flat["advantages"][1:]})
    assert "found N=4" in refusal(client, short, "importance_sampling")
    masked = types.Datum(
        sampled.model_input,
        {**sampled.loss_fn_inputs, "mask": types.TensorData.from_numpy(flat["logprobs"])},
    )
    assert "and no others" in refusal(client, masked, "importance_sampling")
    assert "no settings" in refusal(client, sampled, "importance_sampling", beta=1.0)
    nan = datum(tokens, **{**flat, "logprobs": flat["logprobs"] * np.nan})
    assert "expected finite logprobs" in refusal(client, nan, "importance_sampling")


KINDS = {
    "f": (pb.DTYPE_FLOAT32, np.float32),
    "i": (pb.DTYPE_INT64, np.int64),
    "s": (pb.DTYPE_INT32, np.int32),
}


def message(rows: int = 1, loss: str = "cross_entropy", **inputs: tuple) -> object:
    """A request in protobuf: each input as its kind, its shape, and its values or None."""
    found = pb.ForwardBackwardRequest(loss_fn=loss)
    for _ in range(rows):
        datum = found.data.add()
        datum.model_input.add().encoded_text.tokens = np.array([5, 6], np.int32).tobytes()
        for name, (kind, shape, values) in inputs.items():
            part = datum.loss_fn_inputs[name]
            part.dtype, as_numpy = KINDS[kind]
            part.shape.extend(shape)
            if values is None:
                part.sparse_csr.crow_indices = np.zeros(len(shape) + 1, np.int64).tobytes()
            else:
                part.dense = np.array(values, as_numpy).tobytes()
    return found


TARGETS, WEIGHTS = ("i", [2], [7, 8]), ("f", [2], [1, 1])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (message(target_tokens=("f", [2], [7, 8]), weights=WEIGHTS), "target_tokens as int64"),
        (message(target_tokens=("i", [2], [7]), weights=WEIGHTS), "says; found 1"),
        (message(target_tokens=("i", [2, 0], []), weights=("f", [2, 0], [])), "of one shape"),
        (message(target_tokens=TARGETS, weights=("f", [2, 1], [1, 1])), "of one shape"),
        (message(0), f"at least one datum and at most {MOST_ROWS}; found 0"),
        (message(MOST_ROWS + 1), f"at most {MOST_ROWS}; found {MOST_ROWS + 1}"),
        # Each of these is small; together they are not.
        (
            message(9, target_tokens=("i", [2, 1 << 21], None), weights=("f", [2, 1 << 21], None)),
            f"at most {MOST_VALUES} targets in a request",
        ),
    ],
)
def test_rows_are_held_against_their_limits(asked: object, said: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_train_request(asked)
    assert said in str(caught.value)


def test_weights_may_be_whole_numbers_and_targets_of_32_bits() -> None:
    asked = message(target_tokens=("s", [2], [7, 8]), weights=("i", [2], [0, 1]))
    (row,) = read_train_request(asked).data
    assert row.targets.tolist() == [[7], [8]]
    assert row.inputs[0].tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0, 1e38, "fast", True, [1]])
def test_a_learning_rate_is_a_number_that_weights_survive(rate: object) -> None:
    with pytest.raises(InvalidRequestError, match="expected learning_rate in"):
        AdamParams.read({"learning_rate": rate})
    for beta in (1.0, -0.1):
        with pytest.raises(InvalidRequestError, match="expected beta1 in"):
            AdamParams.read({"beta1": beta})


def test_more_targets_than_the_vocabulary_has_are_refused(client: tinker.TrainingClient) -> None:
    targets, weights = np.full((2, 600), 7), np.ones((2, 600), np.float32)
    said = refusal(client, datum([5, 6], target_tokens=targets, weights=weights), "cross_entropy")
    assert "at most 512 targets a token, the vocabulary; found 600" in said
