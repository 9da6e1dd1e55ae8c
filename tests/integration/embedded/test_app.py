"""The embedded server, asked by the real SDK: sampling, its limits, and its life as a process."""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tinker
import torch
from tinker import types

from distill_datasets.embedded import process
from distill_datasets.embedded.engine import ComputeThread, Engine, Job
from distill_datasets.embedded.model import ModelCard
from distill_datasets.embedded.process import Server, launch
from distill_datasets.embedded.scheduler import BASE, Payload, SampleJob
from distill_datasets.embedded.store import Store
from distill_datasets.embedded.wire import LARGEST_BODY, LARGEST_JSON, pb, read_sample_request
from distill_datasets.errors import ModelError, OutputError
from tests.support.tiny_model import make_tiny_model

PROMPT = [70, 71, 72, 73, 74, 75]
ROOT = str(Path(__file__).parents[3])
# Two threads of a test wait for each other while other tests hold the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """Begun as for users, and not as a fork."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "subprocess", subprocess)
        server = launch(model, name="tiny")
    with server:
        yield server


@pytest.fixture(scope="module")
def service(server: Server) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=server.url, api_key=server.api_key)


@pytest.fixture(scope="module")
def client(service: tinker.ServiceClient) -> tinker.SamplingClient:
    return service.create_sampling_client(base_model="tiny").result()


@pytest.fixture(scope="module")
def network(model: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


Ask = Callable[..., types.SampleResponse]


@pytest.fixture
def ask(client: tinker.SamplingClient) -> Ask:
    def ask(
        prompt: list[int],
        num_samples: int = 1,
        score: int | None = None,
        top: int = 0,
        **params: object,
    ) -> types.SampleResponse:
        settings = types.SamplingParams(**{"max_tokens": 6, "stop": [], **params})
        return client.sample(
            types.ModelInput.from_ints(prompt),
            num_samples,
            settings,
            include_prompt_logprobs=score is not None,
            prompt_logprobs_last_n=score or None,
            topk_sample_logprobs=top,
        ).result(60)

    return ask


def tokens(response: types.SampleResponse) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in response.sequences]


def greedy(network: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """Without a cache, without a batch."""
    found: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            logits = network(torch.tensor([prompt + found])).logits[0, -1]
            found.append(int(logits.argmax()))
    return found


def logprobs(network: torch.nn.Module, sequence: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = network(torch.tensor([sequence])).logits[0]
    values = torch.log_softmax(logits[:-1], dim=-1)
    return values.gather(1, torch.tensor(sequence[1:]).unsqueeze(1)).squeeze(1)


def random_prompts(count: int, prefix: list[int], *, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [prefix + random.integers(5, 500, random.integers(3, 20)).tolist() for _ in range(count)]


def test_temperature_zero_is_the_most_likely_token(ask: Ask, network: torch.nn.Module) -> None:
    assert tokens(ask(PROMPT, temperature=0)) == [greedy(network, PROMPT, 6)]


def test_logprobs_are_those_of_a_direct_computation(ask: Ask, network: torch.nn.Module) -> None:
    response = ask(PROMPT, score=0, temperature=1.0, seed=3)
    drawn = response.sequences[0]
    expected = logprobs(network, PROMPT + list(drawn.tokens))
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[0] is None
    found = [*response.prompt_logprobs[1:], *drawn.logprobs]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_only_the_last_prompt_tokens_are_scored_when_asked(
    ask: Ask, network: torch.nn.Module
) -> None:
    response = ask(PROMPT * 10, score=4, temperature=0)
    expected = logprobs(network, PROMPT * 10)[-4:]
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[:-4] == [None] * 56
    np.testing.assert_allclose(response.prompt_logprobs[-4:], expected.numpy(), atol=1e-4)


def test_top_logprobs_come_with_each_drawn_token(client: tinker.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=3, temperature=0, stop=[])
    prompt = types.ModelInput.from_ints(PROMPT)
    response = client.sample(prompt, 1, params, topk_sample_logprobs=4).result(60)
    sequence = response.sequences[0]
    assert sequence.topk_logprobs is not None
    assert [row[0][0] for row in sequence.topk_logprobs] == list(sequence.tokens)
    assert [len(row) for row in sequence.topk_logprobs] == [4, 4, 4]


def test_a_seed_repeats_and_each_sample_of_it_differs(ask: Ask) -> None:
    first = tokens(ask(PROMPT, 4, seed=7, max_tokens=8))
    assert first == tokens(ask(PROMPT, 4, seed=7, max_tokens=8))
    assert len({tuple(sample) for sample in first}) == 4
    assert first != tokens(ask(PROMPT, 4, seed=8, max_tokens=8))


def test_without_a_seed_samples_differ(ask: Ask) -> None:
    assert tokens(ask(PROMPT, max_tokens=16)) != tokens(ask(PROMPT, max_tokens=16))


def test_a_batch_gives_what_each_request_gives_alone(client: tinker.SamplingClient) -> None:
    prompts = random_prompts(40, [])
    params = [
        types.SamplingParams(
            max_tokens=1 + n % 7, seed=n, temperature=n % 3 / 2, top_p=0.9, stop=[]
        )
        for n in range(len(prompts))
    ]

    def send(n: int) -> tinker.APIFuture[types.SampleResponse]:
        return client.sample(types.ModelInput.from_ints(prompts[n]), 1, params[n])

    together = [tokens(future.result(60)) for future in [send(n) for n in range(len(prompts))]]
    assert together == [tokens(send(n).result(60)) for n in range(len(prompts))]


def test_a_shared_prefix_changes_no_token(
    client: tinker.SamplingClient, network: torch.nn.Module
) -> None:
    prefix = np.random.default_rng(5).integers(5, 500, 150).tolist()
    prompts = random_prompts(30, prefix)
    params = types.SamplingParams(max_tokens=5, temperature=0, stop=[])
    futures = [client.sample(types.ModelInput.from_ints(one), 1, params) for one in prompts]
    responses = [future.result(60) for future in futures]
    assert [tokens(one)[0] for one in responses] == [greedy(network, one, 5) for one in prompts]
    assert responses[-1].prompt_cache_hit_tokens >= 150


def test_cache_hits_are_counted_from_the_second_prompt_on(ask: Ask) -> None:
    prefix = np.random.default_rng(6).integers(5, 500, 100).tolist()
    hits = [ask([*prefix, n], temperature=0).prompt_cache_hit_tokens for n in (5, 6, 7)]
    assert hits == [0, 100, 100]


def test_samples_of_one_prompt_share_its_prefill(ask: Ask) -> None:
    prompt = np.random.default_rng(7).integers(5, 500, 80).tolist()
    assert ask(prompt, 8, temperature=0).prompt_cache_hit_tokens == 79


def test_top_k_of_one_is_greedy_and_a_tiny_top_p_too(ask: Ask) -> None:
    best = tokens(ask(PROMPT, temperature=0))
    assert tokens(ask(PROMPT, temperature=1.5, top_k=1)) == best
    assert tokens(ask(PROMPT, temperature=1.5, top_p=1e-6)) == best


def test_top_k_draws_from_the_k_likeliest_only(ask: Ask, network: torch.nn.Module) -> None:
    with torch.no_grad():
        allowed = network(torch.tensor([PROMPT])).logits[0, -1].topk(3).indices.tolist()
    drawn = {one[0] for one in tokens(ask(PROMPT, 64, max_tokens=1, temperature=5.0, top_k=3))}
    assert drawn == set(allowed)


def test_a_stop_token_ends_the_sample_and_is_part_of_it(ask: Ask) -> None:
    full = tokens(ask(PROMPT, temperature=0))[0]
    end = full[2]
    response = ask(PROMPT, temperature=0, stop=[end])
    assert tokens(response)[0] == full[: full.index(end) + 1]
    assert response.sequences[0].stop_reason == "stop"
    assert ask(PROMPT, temperature=0).sequences[0].stop_reason == "length"


def test_a_stop_text_ends_the_sample_where_it_appears(ask: Ask, model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    response = ask(PROMPT, 8, seed=1, temperature=1.0, max_tokens=60, stop=["e", "a"])
    for sequence in response.sequences:
        text = tokenizer.decode(sequence.tokens[:-1])
        assert "e" not in text
        assert "a" not in text
        if sequence.stop_reason == "stop":
            assert set(tokenizer.decode(sequence.tokens)) & {"e", "a"}


def test_a_prompt_beyond_the_context_is_refused_with_its_numbers(ask: Ask) -> None:
    with pytest.raises(tinker.RequestFailedError, match="512 tokens; found 500 prompt.*together"):
        ask([5] * 500, max_tokens=13)
    assert len(tokens(ask([5] * 500, max_tokens=12))[0]) == 12


def test_a_token_outside_the_vocabulary_is_refused(ask: Ask) -> None:
    with pytest.raises(tinker.RequestFailedError, match=r"0\.\.511; found 5\.\.600"):
        ask([5, 600])


def test_a_refused_request_is_a_user_error(ask: Ask) -> None:
    with pytest.raises(tinker.RequestFailedError, match=r"max_tokens in 1\.\.") as caught:
        ask(PROMPT, max_tokens=0)
    assert caught.value.category == types.RequestErrorCategory.User


def test_an_unsupported_question_is_refused_by_name(client: tinker.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=1)
    prompt = types.ModelInput.from_ints(PROMPT)
    with pytest.raises(tinker.RequestFailedError, match="does not compute prompt_alt_tokens_k"):
        client.sample(prompt, 1, params, prompt_alt_tokens_k=2).result(60)


def test_an_unknown_model_is_refused_with_the_one_there_is(service: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.BadRequestError, match="one model, 'tiny'"):
        service.create_sampling_client(base_model="huge").result(60)
    with pytest.raises(tinker.NotFoundError, match="found no checkpoint at"):
        service.create_sampling_client(model_path="tinker://run/sampler_weights/x").result(60)


def test_the_model_answers_to_its_folder_and_states_its_context(
    service: tinker.ServiceClient, server: Server, model: Path
) -> None:
    client = service.create_sampling_client(base_model=str(model)).result(60)
    assert client.get_base_model() == str(model)
    rest = tinker.RestClient(base_url=server.url, api_key=server.api_key)
    found = rest.get_server_capabilities().result(60).supported_models
    assert [(one.model_name, one.max_context_length) for one in found] == [
        ("tiny", 512),
        (str(model), 512),
    ]


def test_a_wrong_key_is_refused_and_says_what_to_set(server: Server) -> None:
    with pytest.raises(tinker.AuthenticationError, match="set TINKER_API_KEY"):
        rest = tinker.RestClient(base_url=server.url, api_key="tml-wrong")
        rest.get_server_capabilities().result(60)


def test_a_folder_without_a_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found no config.json"):
        launch(tmp_path, name="empty")


class NoSamples:
    """A sampler that nobody asks."""

    busy = False

    def add(self, job: SampleJob) -> None:
        raise AssertionError("nobody asked for samples")

    def step(self) -> None:
        raise AssertionError("nobody asked for samples")

    def fail(self, payload: Payload) -> None:
        raise AssertionError("nobody asked for samples")


def test_a_model_that_fails_to_load_is_every_requests_answer() -> None:
    answers: queue.SimpleQueue[Payload] = queue.SimpleQueue()

    def load() -> None:
        raise OSError("weights are torn")

    worker = ComputeThread(NoSamples(), load)
    for _ in range(2):
        worker.submit(Job(lambda: b"never", answers.put))
        assert answers.get(timeout=60) == {
            "error": "the model could not be loaded: OSError: weights are torn",
            "category": "user",
        }


@pytest.mark.parametrize(
    ("error", "said", "category"),
    [
        (MemoryError(), "out of memory: send fewer or shorter rows", "server"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory", "server"),
        (OutputError("Can't write: No space left"), "Can't write: No space left", "user"),
    ],
)
def test_a_request_that_exhausts_the_machine_is_told_so(
    error: Exception, said: str, category: str
) -> None:
    answers: queue.SimpleQueue[Payload] = queue.SimpleQueue()

    def run() -> bytes:
        raise error

    ComputeThread(NoSamples(), lambda: None).submit(Job(run, answers.put))
    answer = answers.get(timeout=60)
    assert isinstance(answer, dict)
    assert said in answer["error"]
    assert answer["category"] == category


def test_closing_ends_the_child_and_may_be_repeated(model: Path) -> None:
    server = launch(model, name="tiny")
    assert server.alive
    server.close()
    server.close()
    assert not server.alive


def test_the_child_ends_when_its_parent_is_killed(model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from distill_datasets.embedded.process import "
        "launch; server = launch(Path(sys.argv[1]), name='tiny'); "
        "print(server.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as parent:
        assert parent.stdout is not None
        handle = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.send_signal(signal.SIGKILL)
            assert select.select([handle], [], [], 30)[0], "the child outlived its parent"
        finally:
            os.close(handle)


def post(server: Server, path: str, content: bytes, **headers: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}/api/v1/{path}",
        content=content,
        headers={"X-API-Key": server.api_key, **headers},
        timeout=120,
    )


@pytest.mark.parametrize("path", ["asample", "create_session", "optim_step", "load_weights"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"session_id": NaN}', "finite numbers"),
        (b"[]", "expected a JSON object"),
        (b"\xff", "expected JSON"),
        (b" " * (LARGEST_JSON + 1), f"at most {LARGEST_JSON} bytes of JSON"),
        (b" " * (LARGEST_BODY + 1), f"at most {LARGEST_BODY} bytes in a request"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(
    server: Server, path: str, content: bytes, said: str
) -> None:
    answer = post(server, path, content)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("asample", {}, "expected sampling_session_id as a text"),
        ("asample", {"sampling_session_id": "x", "seq_id": "1"}, "seq_id in"),
        ("asample", {"sampling_session_id": "x", "seq_id": -1}, "seq_id in"),
        ("asample", {"sampling_session_id": ["x"], "seq_id": 1}, "sampling_session_id as a text"),
        ("create_model", {"session_id": "x" * 5000}, "at most 4096 characters"),
        ("create_model", {"session_id": 5}, "session_id as a text"),
        ("create_sampling_session", {"session_id": "gone"}, "found no session"),
        ("optim_step", {"model_id": "x", "seq_id": 10**30}, "seq_id in"),
        ("get_info", {"model_id": "../../etc"}, "expected a name of letters"),
        ("weights_info", {"tinker_path": "tinker://../weights/x"}, "expected a name of letters"),
        ("retrieve_future", {"request_id": 7}, "request_id as a text"),
    ],
)
def test_a_field_of_another_kind_is_named(
    server: Server, path: str, body: dict[str, object], said: str
) -> None:
    answer = post(server, path, json.dumps(body).encode())
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_a_compressed_body_is_bounded_by_what_it_becomes(server: Server) -> None:
    pump = zlib.compressobj()
    content = b"".join(pump.compress(b" " * (1 << 20)) for _ in range(70)) + pump.flush()
    assert len(content) < 1 << 20
    answer = post(server, "asample", content, **{"Content-Encoding": "deflate"})
    assert (answer.status_code, f"{LARGEST_BODY} bytes" in answer.text) == (400, True)
    torn = post(server, "asample", b"no zlib", **{"Content-Encoding": "deflate"})
    assert torn.status_code == 400


def test_a_listing_has_no_negative_page(server: Server) -> None:
    for query in ("offset=-1", "limit=-3", "limit=many", "limit=1e9"):
        answer = httpx.get(
            f"{server.url}/api/v1/checkpoints?{query}", headers={"X-API-Key": server.api_key}
        )
        assert answer.status_code == 400, query
        assert "expected" in answer.json()["error"]


def peak_memory(server: Server) -> int:
    """The most bytes that the child ever had in memory."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def test_a_few_bytes_that_name_a_huge_tensor_take_no_memory(
    service: tinker.ServiceClient, server: Server
) -> None:
    model_id = service.create_lora_training_client("tiny", rank=1).result(60).get_info().model_id
    before = peak_memory(server)
    for number, shape in enumerate(([2, 10**9], [2, 2**62], [-2, -(10**9)])):
        message = pb.ForwardBackwardRequest(model_id=model_id, loss_fn="cross_entropy")
        message.seq_id = number + 1
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.array([5, 6], np.int32).tobytes()
        for name, kind in (("target_tokens", pb.DTYPE_INT64), ("weights", pb.DTYPE_FLOAT32)):
            part = datum.loss_fn_inputs[name]
            part.dtype = kind
            part.shape.extend(shape)
            part.sparse_csr.crow_indices = np.zeros(3, np.int64).tobytes()
        content = message.SerializeToString()
        assert len(content) < 250
        promised = post(server, "forward_backward", content).json()
        found = post(server, "retrieve_future", json.dumps(promised).encode()).json()
        assert "of at most" in found["error"] or "of shape (N,) or (N, K)" in found["error"]
    assert peak_memory(server) - before < 200 << 20
    assert server.alive


def test_samples_that_memory_cannot_hold_are_refused(ask: Ask) -> None:
    with pytest.raises(tinker.RequestFailedError, match=r"num_samples in 1\.\.1024; found 1000000"):
        ask(PROMPT, 10**6)
    with pytest.raises(tinker.RequestFailedError, match="likeliest tokens in a response"):
        ask(PROMPT, 1000, max_tokens=500, top=200)


def foreign(folder: Path, model: Path, **config: object) -> Path:
    """A model whose author wrote Python that leaves a mark when it runs."""
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    code = f"open({str(folder / 'ran')!r}, 'w')\nclass Thing:\n    pass\n"
    (folder / "thing.py").write_text(code)
    written = json.loads((folder / "config.json").read_text())
    classes = {name: "thing.Thing" for name in ("AutoConfig", "AutoModelForCausalLM")}
    written |= {"auto_map": classes, **config}
    (folder / "config.json").write_text(json.dumps(written))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["thing.Thing", None]}, "tokenizer_class": "Thing"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def sampled(folder: Path) -> Payload:
    """What a request for three tokens of a model in this process is answered."""
    engine = Engine(ModelCard.read(folder, "foreign"), Store(folder / "store"))
    answers: queue.SimpleQueue[Payload] = queue.SimpleQueue()
    chunk = {"type": "encoded_text", "tokens": PROMPT}
    params = {"max_tokens": 3, "temperature": 0.0, "stop": ["zzz"]}
    request = read_sample_request({"prompt": {"chunks": [chunk]}, "sampling_params": params})
    ComputeThread(engine, engine.load).submit(SampleJob(BASE, request, answers.put))
    return answers.get(timeout=60)


def test_a_model_of_a_known_kind_runs_without_its_authors_code(
    tmp_path: Path, model: Path, network: torch.nn.Module
) -> None:
    answer = sampled(foreign(tmp_path, model))
    assert isinstance(answer, bytes), answer
    found = pb.SampleResponse.FromString(answer).sequences[0]
    assert np.frombuffer(found.tokens, np.int32).tolist() == greedy(network, PROMPT, 3)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_needs_its_authors_code_is_refused(tmp_path: Path, model: Path) -> None:
    answer = sampled(foreign(tmp_path, model, model_type="thing"))
    assert isinstance(answer, dict)
    assert "could not be loaded" in answer["error"]
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_no_weights(tmp_path: Path, model: Path) -> None:
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"found no \*.safetensors"):
        launch(tmp_path, name="pickled")
