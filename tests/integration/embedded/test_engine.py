"""The embedded server, asked by the real SDK: training, checkpoints and what survives a restart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from distill_datasets.embedded.process import Server, launch
from distill_datasets.embedded.scheduler import MOST_SNAPSHOTS
from tests.support.tiny_model import make_tiny_model

# Two threads of a test wait for each other while other tests hold the cores.
torch.set_num_threads(1)
ADAM = types.AdamParams(learning_rate=3e-3, beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.1)
PROMPT = types.ModelInput.from_ints([70, 71, 72])
GREEDY = types.SamplingParams(max_tokens=8, temperature=0, stop=[])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def server(model: Path, store: Path) -> Iterator[Server]:
    with launch(model, name="tiny", store=store) as server:
        yield server


def connect(server: Server) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=server.url, api_key=server.api_key)


@pytest.fixture(scope="module")
def service(server: Server) -> tinker.ServiceClient:
    return connect(server)


@pytest.fixture(scope="module")
def rest(server: Server) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=server.api_key)


def trainee(service: tinker.ServiceClient, **options: object) -> tinker.TrainingClient:
    settings = {"rank": 4, "seed": 1, **options}
    return service.create_lora_training_client("tiny", **settings).result(60)


def row(tokens: list[int], weights: list[float]) -> types.Datum:
    inputs = {"target_tokens": tokens[1:], "weights": weights}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def batch(seed: int) -> list[types.Datum]:
    """Rows of several lengths and fractional weights."""
    random = np.random.default_rng(seed)
    rows = []
    for length in random.integers(3, 24, 6).tolist():
        tokens = random.integers(5, 500, length + 1).tolist()
        rows.append(row(tokens, random.random(length).astype(np.float32).tolist()))
    return rows


def learn(client: tinker.TrainingClient, data: list[types.Datum]) -> float:
    output = client.forward_backward(data, "cross_entropy")
    client.optim_step(ADAM).result(60)
    return output.result(60).metrics["loss:sum"]


class Reference:
    """The same training, written directly over peft and torch, row by row."""

    def __init__(self, model: Path, adapter: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.network = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        weights = [one for one in self.network.parameters() if one.requires_grad]
        self.adam = torch.optim.AdamW(weights, lr=3e-3, betas=(0.9, 0.98), eps=1e-8)
        self.adam.param_groups[0]["weight_decay"] = 0.1

    def logprobs(self, datum: types.Datum) -> torch.Tensor:
        tokens = torch.tensor([datum.model_input.to_ints()])
        values = torch.log_softmax(self.network(input_ids=tokens).logits[0], dim=-1)
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()
        return values.gather(1, targets.unsqueeze(1)).squeeze(1)

    def learn(self, data: list[types.Datum], clip: float = 0.0) -> float:
        self.adam.zero_grad()
        loss = -sum(
            (self.logprobs(one) * one.loss_fn_inputs["weights"].to_torch()).sum() for one in data
        )
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), clip)
        self.adam.step()
        return float(loss.detach())


def adapter_of(store: Path, path: str) -> Path:
    run, kind, name = path.removeprefix("tinker://").split("/")
    return store / run.replace(":", "_") / kind / name


def both(
    service: tinker.ServiceClient, model: Path, store: Path
) -> tuple[tinker.TrainingClient, Reference]:
    """A new trainee of the server's, and a reference with the same weights."""
    client = trainee(service)
    start = client.save_weights_for_sampler("start").result(60)
    return client, Reference(model, adapter_of(store, start.path))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_three_steps_equal_peft_and_adamw(
    service: tinker.ServiceClient, model: Path, store: Path
) -> None:
    client, reference = both(service, model, store)
    losses = [learn(client, batch(seed)) for seed in range(3)]
    np.testing.assert_allclose(losses, [reference.learn(batch(seed)) for seed in range(3)], 1e-5)
    after = client.forward(batch(9), "cross_entropy").result(60)
    for output, datum in zip(after.loss_fn_outputs, batch(9), strict=True):
        expected = reference.logprobs(datum).detach().numpy()
        np.testing.assert_allclose(output["logprobs"].to_numpy(), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_gradients_add_up_and_are_clipped(
    service: tinker.ServiceClient, model: Path, store: Path
) -> None:
    client, reference = both(service, model, store)
    for seed in (0, 1):
        client.forward_backward(batch(seed), "cross_entropy")
    step = client.optim_step(ADAM.model_copy(update={"grad_clip_norm": 0.5})).result(60)
    assert step.metrics is not None
    assert step.metrics["grad_norm"] > 0.5
    reference.learn(batch(0) + batch(1), clip=0.5)
    found = client.forward(batch(2), "cross_entropy").result(60).metrics["loss:sum"]
    np.testing.assert_allclose(found, reference.learn(batch(2)), 1e-5)


def test_training_resumes_exactly_in_a_new_process(
    service: tinker.ServiceClient, model: Path, store: Path
) -> None:
    whole, client = trainee(service), trainee(service)
    expected = [learn(whole, batch(seed)) for seed in range(6)]
    losses = [learn(client, batch(seed)) for seed in range(3)]
    path = client.save_state("middle").result(60).path
    sampler = client.save_weights_for_sampler("middle").result(60).path
    old = service.create_sampling_client(model_path=sampler).result(60)
    before = old.sample(PROMPT, 1, GREEDY).result(60).sequences[0].tokens
    with launch(model, name="tiny", store=store) as second:
        service = connect(second)
        client = service.create_training_client_from_state_with_optimizer(path).result(60)
        losses += [learn(client, batch(seed)) for seed in range(3, 6)]
        new = service.create_sampling_client(model_path=sampler).result(60)
        after = new.sample(PROMPT, 1, GREEDY).result(60).sequences[0].tokens
        assert client.get_info().model_id not in path
    assert losses == expected
    assert list(before) == list(after)


def test_rows_without_weight_teach_nothing_and_are_scored(service: tinker.ServiceClient) -> None:
    client = trainee(service)
    idle = row([5, 6, 7], [0.0, 0.0])
    output = client.forward_backward([idle], "cross_entropy").result(60)
    assert output.metrics["loss:sum"] == 0
    assert (output.loss_fn_outputs[0]["logprobs"].to_numpy() < 0).all()
    step = client.optim_step(types.AdamParams(learning_rate=1e-2)).result(60)
    assert step.metrics == {"grad_norm": 0.0}


def test_without_its_optimizer_a_run_takes_other_steps(service: tinker.ServiceClient) -> None:
    client = trainee(service)
    learn(client, batch(0))
    path = client.save_state("one").result(60).path
    fresh = service.create_training_client_from_state(path).result(60)
    kept = service.create_training_client_from_state_with_optimizer(path).result(60)
    assert learn(fresh, batch(1)) == learn(kept, batch(1))
    assert learn(fresh, batch(2)) != learn(kept, batch(2))


def test_models_train_side_by_side(service: tinker.ServiceClient) -> None:
    alone = trainee(service)
    expected = [learn(alone, batch(seed)) for seed in range(3)]
    one, other = trainee(service), trainee(service, rank=2, seed=5, train_unembed=False)
    found = []
    for seed in range(3):
        found.append(learn(one, batch(seed)))
        learn(other, batch(seed + 7))
    assert found == expected


def test_a_sampler_keeps_its_weights_while_training_goes_on(
    service: tinker.ServiceClient,
) -> None:
    client = trainee(service)
    rows = [row([70, 71, 72, *[90] * 8], [0.0, 0.0, *[1.0] * 8])]
    before = client.save_weights_and_get_sampling_client().result(60)
    for _ in range(40):
        client.forward_backward(rows, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=2e-2))
    after = client.save_weights_and_get_sampling_client().result(60)
    assert after.sample(PROMPT, 1, GREEDY).result(60).sequences[0].tokens == [90] * 8
    base = service.create_sampling_client(base_model="tiny").result(60)
    untouched = base.sample(PROMPT, 1, GREEDY).result(60).sequences[0].tokens
    assert before.sample(PROMPT, 1, GREEDY).result(60).sequences[0].tokens == untouched


def test_many_samplers_take_turns_in_memory(service: tinker.ServiceClient) -> None:
    client = trainee(service)
    samplers, expected = [], []
    for seed in range(10):
        learn(client, batch(seed))
        samplers.append(client.save_weights_and_get_sampling_client().result(60))
        expected.append(samplers[-1].compute_logprobs(PROMPT).result(60))
    assert [one.compute_logprobs(PROMPT).result(60) for one in samplers] == expected


def test_unnamed_weights_are_kept_for_a_while_only(service: tinker.ServiceClient) -> None:
    client = trainee(service, rank=1, train_mlp=False, train_attn=False)
    pending = [client.save_weights_and_get_sampling_client() for _ in range(MOST_SNAPSHOTS + 1)]
    samplers = [one.result(60) for one in pending]
    with pytest.raises(tinker.RequestFailedError, match=f"the last {MOST_SNAPSHOTS} are kept"):
        samplers[0].compute_logprobs(PROMPT).result(60)
    assert len(samplers[1].compute_logprobs(PROMPT).result(60)) == 3


@pytest.mark.parametrize("trained", ["train_attn", "train_mlp", "train_unembed"])
def test_only_the_layers_asked_for_are_adapted(
    service: tinker.ServiceClient, store: Path, trained: str
) -> None:
    flags = {flag: flag == trained for flag in ("train_attn", "train_mlp", "train_unembed")}
    client = trainee(service, **flags)
    path = client.save_weights_for_sampler("layers").result(60).path
    config = json.loads((adapter_of(store, path) / "adapter_config.json").read_text())
    expected = {
        "train_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "train_mlp": {"gate_proj", "up_proj", "down_proj"},
        "train_unembed": {"lm_head"},
    }
    assert set(config["target_modules"]) == expected[trained]
    assert learn(client, batch(0)) != learn(client, batch(0))


def test_a_name_is_taken_until_it_is_deleted_or_overwritten(
    service: tinker.ServiceClient, rest: tinker.RestClient
) -> None:
    client = trainee(service)
    path = client.save_state("best").result(60).path
    with pytest.raises(tinker.RequestFailedError, match="exists: save under another name"):
        client.save_state("best").result(60)
    learn(client, batch(0))
    assert client.save_state("best", overwrite=True).result(60).path == path
    rest.delete_checkpoint_from_tinker_path(path).result(60)
    with pytest.raises(tinker.NotFoundError, match="found no checkpoint at"):
        service.create_training_client_from_state(path).result(60).get_info()


def test_what_was_said_of_a_checkpoint_is_kept(
    service: tinker.ServiceClient, rest: tinker.RestClient
) -> None:
    client = trainee(service, user_metadata={"recipe": "colours"})
    path = client.save_state("kept", ttl_seconds=7200, user_metadata={"step": "3"}).result(60).path
    run = rest.get_training_run_by_tinker_path(path).result(60)
    assert (run.base_model, run.lora_rank) == ("tiny", 4)
    assert run.user_metadata == {"recipe": "colours"}
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.user_metadata == {"step": "3"}
    assert run.last_checkpoint.expires_at is not None
    listed = rest.list_checkpoints(run.training_run_id).result(60).checkpoints
    assert [one.tinker_path for one in listed] == [path]
    everywhere = rest.list_user_checkpoints().result(60).checkpoints
    assert path in [one.tinker_path for one in everywhere]
    info = rest.get_weights_info_by_tinker_path(path).result(60)
    assert (info.base_model, info.lora_rank, info.train_unembed) == ("tiny", 4, True)
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result(60)
    listed = rest.list_checkpoints(run.training_run_id).result(60).checkpoints
    assert listed[0].expires_at is None


def refusal(client: tinker.TrainingClient, data: list[types.Datum], loss: str) -> str:
    with pytest.raises(tinker.RequestFailedError) as caught:
        client.forward_backward(data, loss).result(60)
    assert caught.value.category == types.RequestErrorCategory.User
    return str(caught.value)


def test_what_cannot_be_trained_is_refused_and_training_goes_on(
    service: tinker.ServiceClient,
) -> None:
    client = trainee(service)
    torn = row([5, 6, 7], [1.0, float("nan")])
    assert "expected finite weights" in refusal(client, [torn], "cross_entropy")
    assert "found loss_fn='dro'" in refusal(client, batch(0), "dro")
    assert "0..511" in refusal(client, [row([5, 900, 6], [1.0, 1.0])], "cross_entropy")
    long = row([5] * 514, [1.0] * 513)
    assert "at most 512 tokens" in refusal(client, [long], "cross_entropy")
    with pytest.raises(tinker.RequestFailedError, match="expected a forward_backward before"):
        client.optim_step(ADAM).result(60)
    with pytest.raises(tinker.RequestFailedError, match="expected learning_rate in"):
        client.optim_step(types.AdamParams(learning_rate=-1.0)).result(60)
    fresh = trainee(service)
    assert learn(client, batch(0)) == learn(fresh, batch(0))


def test_a_training_checkpoint_is_not_sampled_nor_the_other_way_round(
    service: tinker.ServiceClient,
) -> None:
    client = trainee(service)
    state = client.save_state("state").result(60).path
    sampler = client.save_weights_for_sampler("sampler").result(60).path
    with pytest.raises(tinker.BadRequestError, match="expected a path under sampler_weights/"):
        service.create_sampling_client(model_path=state).result(60)
    with pytest.raises(tinker.RequestFailedError, match="expected a path under weights/"):
        service.create_training_client_from_state(sampler).result(60)
