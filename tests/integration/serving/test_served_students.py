"""Students under the verb `serve`: by folder and by path, each with and without its prompt."""

import io
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import tinker
import torch
from tinker import types

from distill_datasets.cli.main import main
from distill_datasets.errors import DistillError, ModelError, SettingsError
from distill_datasets.models.renderers import load_tokenizer, open_renderer
from distill_datasets.serving.server import read_names
from tests.support.releases import release_of
from tests.support.serving import KEY, serving
from tests.support.tiny_model import make_tiny_model

torch.set_num_threads(1)
ASKED = [{"role": "user", "content": "What language is this?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A training's folder, and the path of its checkpoint."""
    run = tmp_path_factory.mktemp("runs") / "greetings"
    folder = run / "train"
    folder.mkdir(parents=True)
    release = release_of(run / "made", range(12))
    with serving(model, store=folder / "checkpoints") as server:
        service = tinker.ServiceClient(base_url=server.url, api_key=KEY)
        client = service.create_lora_training_client("tiny", rank=4, seed=0).result(60)
        row = types.Datum(
            model_input=types.ModelInput.from_ints([1, 80, 81, 82, 83]),
            loss_fn_inputs={"target_tokens": [80, 81, 82, 83, 84], "weights": [1.0] * 5},
        )
        for _ in range(4):
            client.forward_backward([row], "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=5e-2)).result(60)
        path = client.save_weights_for_sampler("best").result(60).path
    dataset = {"path": str(release.path)}
    config = {"student": "embedded:tiny", "renderer": "distill_datasets/chat_template"}
    (folder / "config.json").write_text(json.dumps({**config, "dataset": dataset}))
    line = {"step": 4, "sampler": path, "best": True}
    (folder / "checkpoints.jsonl").write_text(json.dumps(line) + "\n")
    return folder, path


@pytest.fixture(scope="module")
def client(model: Path, trained: tuple[Path, str]) -> Iterator[openai.OpenAI]:
    folder, path = trained
    run, kind, name = path.removeprefix("tinker://").split("/")
    adapter = folder / "checkpoints" / run.replace(":", "_") / kind / name
    assert (adapter / "adapter_config.json").is_file()
    students = {"greetings": str(folder), "other": path, "peft": str(adapter)}
    with (
        serving(model, store=folder / "checkpoints", students=students) as server,
        openai.OpenAI(base_url=server.openai, api_key=KEY, max_retries=0) as client,
    ):
        yield client


def said(client: openai.OpenAI, model: str) -> str:
    found = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=12, temperature=0
    )
    return str(found.choices[0].message.content)


def test_students_answer_by_their_names_beside_the_base(
    client: openai.OpenAI, model: Path, trained: tuple[Path, str]
) -> None:
    names = [one.id for one in client.models.list()]
    assert names == ["tiny", "greetings", "other", "peft", "greetings+prompt"]
    base, student = said(client, "tiny"), said(client, "greetings")
    assert student != base
    assert said(client, "other") == said(client, "peft") == student
    assert said(client, trained[1]) == student, "a checkpoint goes by its path too"
    address = str(client.base_url).removesuffix("/v1/")
    service = tinker.ServiceClient(base_url=address, api_key=KEY)
    sampler = service.create_sampling_client(model_path=trained[1]).result(60)
    renderer = open_renderer("distill_datasets/chat_template", load_tokenizer(str(model)))
    drawn = sampler.sample(
        renderer.build_generation_prompt(ASKED),
        1,
        types.SamplingParams(max_tokens=12, temperature=0, stop=renderer.get_stop_sequences()),
    ).result(60)
    assert renderer.read_response(drawn.sequences[0].tokens)[0] == student


def test_a_students_prompt_is_that_of_its_release(client: openai.OpenAI) -> None:
    counts = {
        name: client.chat.completions.create(model=name, messages=ASKED, max_tokens=1).usage
        for name in ("greetings", "greetings+prompt")
    }
    plain, prompted = (one.prompt_tokens for one in counts.values() if one)
    assert plain + 5 < prompted


@pytest.mark.parametrize(
    ("reference", "error", "says"),
    [
        ("nowhere", ModelError, "expected a training's folder, a PEFT adapter's"),
        ("tinker://a/sampler_weights/b", DistillError, "found no checkpoint"),
    ],
)
def test_what_is_no_student_of_this_base_is_refused_before_anything_is_served(
    model: Path, reference: str, error: type[DistillError], says: str
) -> None:
    with pytest.raises(error, match=says), serving(model, students={"one": reference}):
        pass


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 10**6}, "a rank r in 1..512"),
        ({}, "adapter_model.safetensors in .*; found none"),
    ],
)
def test_an_adapter_that_cant_be_served_as_it_is_says_why(
    model: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with (
        pytest.raises(DistillError, match=says),
        serving(model, students={"one": str(tmp_path)}),
    ):
        pass


def test_a_student_of_another_base_is_refused(trained: tuple[Path, str], tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", context=256)
    with (
        pytest.raises(DistillError, match="serve that model instead"),
        serving(other, students={"one": str(trained[0])}),
    ):
        pass


def test_the_verb_serves_until_it_is_interrupted(
    model: Path, trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, answers = queue.Queue[str](), list[str]()

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            lines.put(text)
            return len(text)

    def ask() -> None:
        try:
            told = dict(
                line.removeprefix("export ").split("=", 1)
                for line in lines.get(timeout=60).splitlines()
                if line.startswith("export ")
            )
            address = told["OPENAI_BASE_URL"]
            assert address == told["TINKER_BASE_URL"] + "/v1"
            assert told["OPENAI_API_KEY"] == told["TINKER_API_KEY"] == KEY
            with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0) as client:
                answers.append(said(client, "mine"))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sys, "stdout", Output())
    asking = threading.Thread(target=ask)
    asking.start()
    given = ["serve", f"embedded:{model}", "--student", f"mine={trained[0]}"]
    assert main([*given, "--port", "0", "--api-key", KEY]) == 0
    asking.join()
    assert len(answers) == 1


def test_students_are_named_by_their_runs_or_as_they_are_told() -> None:
    assert read_names(["runs/demo/train", "a=runs/b", "tinker://x/sampler_weights/y", "c=d"]) == {
        "demo": "runs/demo/train",
        "a": "runs/b",
        "tinker://x/sampler_weights/y": "tinker://x/sampler_weights/y",
        "c": "d",
    }
    with pytest.raises(SettingsError, match="Two students are called 'demo'"):
        read_names(["runs/demo", "demo=x"])
