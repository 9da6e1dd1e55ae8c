"""A student leaves the embedded server as a PEFT adapter, and comes back from a Hub."""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tinker
import yaml

from distill_datasets.errors import AccessError, ModelError, OutputError, RepositoryError
from distill_datasets.models.references import connect
from distill_datasets.serving.export import push_student
from distill_datasets.training.adapter import Trained, export_adapter
from distill_datasets.training.trainer import TrainSettings, train
from tests.integration.releases.test_check_files import make_release, rows_of
from tests.support.hub_fixture import Hub
from tests.support.tiny_model import TOOLS_CHAT, make_tiny_model

# PEFT warns that an adapter beside tied embeddings can't be merged, which nobody does here.
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")

QUERIES = ["the sky is blue", "what language is this", "one two three", "Le ciel est bleu"]
PROMPT = "You are a helpful assistant. Reply with the code of the language and nothing else."


TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
VIEW = "tools: tools.json\nstudent: {prompt: '[codes]', tools: keep}\n"


def dataset(
    folder: Path,
    *,
    licence: str = "license: cc-by-4.0\n",
    prompt: str = PROMPT,
    view: str = "",
) -> Path:
    """What training and the card need of a release."""
    (folder / "data").mkdir(parents=True)
    rows = [{"query": query, "response": f"code {n}"} for n, query in enumerate(QUERIES * 4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / "train.jsonl").write_text(lines)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: data/train.jsonl\n---\n"
    )
    (folder / "recipe").mkdir()
    (folder / "recipe" / "queries.jsonl").write_text('{"query": "hello"}\n')
    (folder / "recipe" / "prompt.md").write_text(prompt)
    (folder / "recipe" / "recipe.yaml").write_text(
        "name: codes\ndescription: Which code?\nteacher: pocket\n"
        f"queries: {{file: queries.jsonl}}\n{licence}languages: [en]\n{view}"
    )
    (folder / "recipe" / "tools.json").write_text(json.dumps([TOOL]))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("private-models") / "tiny", TOOLS_CHAT)


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(
        dataset(folder / "release"),
        student=f"embedded:{base}",
        out=folder / "train",
        settings=TrainSettings(epochs=3, batch_size=4, learning_rate=3e-2, rank=4),
    )
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to change; its dataset stays where it is."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def asked(train_folder: Path) -> list[list[int]]:
    """What the checkpoint answers to each query on its server, as tokens."""
    connection = connect(train_folder)
    with connection.service:
        opened = connection.service.create_sampling_client(model_path=connection.model_path)
        client = opened.future().result()
        prompts = [
            connection.renderer.build_generation_prompt([{"role": "user", "content": query}])
            for query in QUERIES
        ]
        greedy = tinker.SamplingParams(temperature=0.0, max_tokens=16, seed=0)
        pending = [client.sample(prompt, 1, greedy) for prompt in prompts]
        return [list(one.future().result().sequences[0].tokens) for one in pending]


def answered(adapter: Path, base: Path, *, trained: bool = True) -> list[list[int]]:
    """The same with transformers and PEFT alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if trained:
        model = PeftModel.from_pretrained(model, adapter)
    answers = []
    for query in QUERIES:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": query}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        mask = torch.ones_like(prompt)
        made = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=16)
        answers.append(made[0, prompt.shape[1] :].tolist())
    return answers


def metadata(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "README.md").read_text().split("---\n")[1]))


def report(run: Path) -> dict[str, Any]:
    best = json.loads((run / "train" / "checkpoints.jsonl").read_text().splitlines()[-1])

    def system(model: str, value: float) -> dict[str, Any]:
        interval = {"value": value, "low": value - 0.1, "high": value + 0.05}
        return {
            "model": model,
            "prompt": False,
            "metrics": {"macro_f1": interval},
            "tokens": {"prompt_mean": 9, "response_mean": 2},
            "latency_ms": None,
        }

    return {
        "recipe": "codes",
        "dataset": {"path": str(run / "release"), "revision": "d" * 64, "rows": 16},
        "split": "test",
        "n": 40,
        "systems": {
            "base": system(f"embedded:{run}/tiny", 0.2),
            "teacher": system(f"pocket + embedded:{run}/large", 0.9),
            "student": system(best["sampler"], 0.8),
        },
    }


def test_the_adapter_answers_as_the_checkpoint_does(
    finished: Path, base: Path, tmp_path: Path
) -> None:
    adapter = export_adapter(finished / "train", tmp_path / "out", base_model="base/")
    tokens = answered(adapter, adapter / "base")
    assert tokens == asked(finished / "train")
    assert tokens != answered(adapter, base, trained=False)


def test_a_runs_folder_stands_for_its_training(finished: Path, tmp_path: Path) -> None:
    adapter = export_adapter(finished, tmp_path / "out", base_model="me/tiny")
    files = {path.name for path in adapter.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/tiny"
    assert metadata(adapter)["base_model"] == "me/tiny"
    assert metadata(adapter)["base_model_relation"] == "adapter"


def test_a_base_that_others_lack_must_be_named_or_sent_along(
    finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="--base-model org/name"):
        export_adapter(finished, tmp_path / "out")
    adapter = export_adapter(finished, tmp_path / "out", base_model="base/")
    assert "base_model" not in metadata(adapter)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (adapter / "base").iterdir()
    }


def test_the_card_names_no_folder_of_this_machine(run: Path, tmp_path: Path) -> None:
    (run / "report.json").write_text(json.dumps(report(run)))
    adapter = export_adapter(run, tmp_path / "out", base_model="base/")
    text = (adapter / "README.md").read_text()
    assert "`embedded:tiny`" in text
    assert "/private-models" not in text
    assert str(tmp_path) not in text
    assert "pytest" not in text
    assert PROMPT in text
    assert "The training data: cc-by-4.0." in text


def test_the_results_carry_their_intervals_and_the_other_systems(run: Path, tmp_path: Path) -> None:
    (run / "report.json").write_text(json.dumps(report(run)))
    found = metadata(export_adapter(run, tmp_path / "out", base_model="me/tiny"))
    assert found["license"] == "cc-by-4.0"
    (result,) = found["model-index"][0]["results"]
    assert result["dataset"]["revision"] == "d" * 64
    (metric,) = result["metrics"]
    assert (metric["type"], metric["name"], metric["value"]) == ("f1", "macro_f1", 0.8)
    assert metric["args"]["interval_95"] == [0.7, 0.85]
    assert metric["args"]["teacher"] == {"value": 0.9, "interval_95": [0.8, 0.95]}
    assert metric["args"]["base"]["value"] == 0.2


def test_a_dataset_of_the_hub_is_linked_at_its_commit(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "train" / "config.json").read_text())
    config["dataset"] |= {"path": "me/codes@v1.0.0", "revision": "0123456789" * 4}
    (run / "train" / "config.json").write_text(json.dumps(config))
    (run / "report.json").write_text(json.dumps(report(run)))
    from distill_datasets.releases.cards import model_card

    text = model_card(report(run), config, None)
    found = yaml.safe_load(text.split("---\n")[1])
    assert found["datasets"] == ["me/codes"]
    assert found["model-index"][0]["results"][0]["dataset"] == {
        "name": "codes",
        "type": "me/codes",
        "split": "test",
        "revision": "0123456789" * 4,
    }


def test_a_report_of_another_checkpoint_is_not_used(run: Path, tmp_path: Path) -> None:
    other = report(run)
    other["systems"]["student"]["model"] = "tinker://other/sampler_weights/final"
    (run / "report.json").write_text(json.dumps(other))
    adapter = export_adapter(run, tmp_path / "out", base_model="me/tiny")
    assert "model-index" not in metadata(adapter)
    assert "It was not measured." in (adapter / "README.md").read_text()
    with pytest.raises(ModelError, match="not about this training's best checkpoint"):
        export_adapter(run, tmp_path / "two", report=run / "report.json", base_model="me/tiny")


def test_what_can_not_be_exported_says_why(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no finished training"):
        export_adapter(tmp_path, tmp_path / "out")
    with pytest.raises(OutputError, match="isn't empty"):
        export_adapter(run, run, base_model="me/tiny")
    with pytest.raises(ModelError, match="no report"):
        export_adapter(run, tmp_path / "out", report=tmp_path / "no.json", base_model="me/tiny")
    shutil.rmtree(run / "train" / "checkpoints")
    with pytest.raises(ModelError, match="weights of this training are gone"):
        export_adapter(run, tmp_path / "out", base_model="me/tiny")
    assert not (tmp_path / "out").exists()


def test_a_student_of_a_release_takes_its_held_out_rows_along(run: Path, tmp_path: Path) -> None:
    things = {"rose": "red", "sky": "blue"}
    (tmp_path / "made").mkdir()
    release = make_release(
        tmp_path / "made", {one: f"colour: {right}" for one, right in things.items()}
    )
    config = json.loads((run / "train" / "config.json").read_text())
    config["dataset"]["path"] = str(release)
    (run / "train" / "config.json").write_text(json.dumps(config))
    plain = export_adapter(run, tmp_path / "plain", base_model="me/tiny", check=False)
    assert not (plain / "check").exists()
    first = export_adapter(run, tmp_path / "first", base_model="me/tiny")
    rows = {row["messages"][0]["content"]: row for row in rows_of(first).values()}
    assert {name: row["right"] for name, row in rows.items()} == {
        "rose": {"text": "It is red."},
        "sky": {"text": "It is blue."},
    }
    assert (first / "check" / "test_student.py").is_file()
    assert "`check/` has 2 held-out rows" in (first / "README.md").read_text()
    assert "check/" not in (plain / "README.md").read_text()
    said = {"text": "It is red.", "answer": "red", "stop_reason": "stop"}
    lines = [{"id": row["id"], "systems": {"student": said}} for row in rows.values()]
    (run / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "report.json").write_text(json.dumps(report(run)))
    measured = rows_of(export_adapter(run, tmp_path / "measured", base_model="me/tiny"))
    assert [name for name, row in measured.items() if "wrong_at_release" in row] == ["sky"]


def test_the_recipe_is_that_of_the_configuration_that_was_trained_on(
    recipe_folder: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(recipe_folder, both / "short" / "recipe")
    (both / "short" / "manifest.json").write_text("{}", encoding="utf-8")
    config = {"dataset": {"path": str(both)}, "settings": {"config": "short"}}
    recipe = Trained(tmp_path, config, {}).recipe
    assert recipe and recipe.name == "colours"
    assert Trained(tmp_path, {**config, "settings": {}}, {}).recipe is None


def test_weights_on_tinker_need_a_key(run: Path, tmp_path: Path, base: Path) -> None:
    config = json.loads((run / "train" / "config.json").read_text())
    config |= {"student": f"tinker:{base}", "base_model": str(base)}
    (run / "train" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AccessError, match="TINKER_API_KEY"):
        export_adapter(run, tmp_path / "out")


def test_a_public_student_needs_the_licence_of_its_data(run: Path) -> None:
    config = json.loads((run / "train" / "config.json").read_text())
    config["dataset"]["path"] = str(dataset(run / "unlicensed", licence=""))
    (run / "train" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RepositoryError, match="licence of its training data"):
        push_student(run, "me/student", private=False, base_model="me/tiny")


def python(hub: Hub, call: str) -> str:
    """What a call of this module returns in a process that knows the Hub, or its refusal."""
    code = (
        "from pathlib import Path\n"
        "from distill_datasets.serving.export import push_folder, push_student\n"
        "from distill_datasets.errors import DistillError\n"
        f"try: done = {call}\n"
        "except DistillError as error: print(type(error).__name__, error)\n"
        "else: print(done.commit, done.changed)"
    )
    # The scanner compiles its rules once for a home, and each Hub of a test has its own.
    done = hub.run(code, env={"KF_RULE_CACHE_DIR": str(Path(tempfile.gettempdir()) / "kf-rules")})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def push(hub: Hub, run: Path, arguments: str = "base_model='base/'") -> str:
    return python(hub, f"push_student({str(run)!r}, 'me/student', {arguments})")


def push_exported(hub: Hub, folder: Path) -> str:
    if ("models", "me/student") not in hub.server.store.repositories:
        hub.create("me/student", kind="models")
    return python(hub, f"push_folder(Path({str(folder)!r}), 'me/student')")


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "adapter"
    return export_adapter(finished, folder, base_model="me/tiny")


def commits(hub: Hub) -> int:
    return len(hub.log("/commit/", method="POST"))


def printed_by_the_card(hub: Hub, adapter: Path, more: str = "") -> str:
    """What its code and `more` print for the first query, where the adapter is on the Hub."""
    assert push_exported(hub, adapter).endswith("True")
    files = hub.files("me/student", kind="models")
    assert {"README.md", "adapter_config.json", "base/model.safetensors"} <= set(files)
    code = re.search(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    assert code is not None
    query = "Hello, how are you?"
    text = code[1].replace(query, QUERIES[0]).replace("max_new_tokens=256", "max_new_tokens=16")
    done = hub.run(text + more)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_code_on_the_card_gives_the_checkpoints_answer(
    finished: Path, hub: Hub, tmp_path: Path
) -> None:
    adapter = export_adapter(finished, tmp_path / "out", base_model="base/")
    tokenizer = connect(finished / "train").tokenizer
    expected = tokenizer.decode(asked(finished / "train")[0], skip_special_tokens=True)
    assert printed_by_the_card(hub, adapter) == expected.strip()


def test_the_code_on_the_card_shows_the_student_its_prompt_and_tools(
    run: Path, hub: Hub, tmp_path: Path
) -> None:
    config = json.loads((run / "train" / "config.json").read_text())
    config["dataset"]["path"] = str(dataset(run / "equipped", view=VIEW))
    (run / "train" / "config.json").write_text(json.dumps(config))
    adapter = export_adapter(run, tmp_path / "out", base_model="base/")
    tools = [{"type": "function", "function": TOOL}]
    assert json.loads((adapter / "tools.json").read_text()) == tools
    text = (adapter / "README.md").read_text()
    assert "behind its own short prompt as the system's: `[codes]`; give it its tools." in text
    messages = [{"role": "system", "content": "[codes]"}, {"role": "user", "content": QUERIES[0]}]
    renderer = connect(run / "train").renderer
    shown = renderer.build_generation_prompt(messages, tools=json.dumps(tools)).to_ints()
    printed = printed_by_the_card(hub, adapter, "print(prompt[0].tolist())")
    assert json.loads(printed.splitlines()[-1]) == shown


def test_pushed_again_nothing_changes_and_what_people_wrote_stays(
    exported: Path, hub: Hub, tmp_path: Path
) -> None:
    first, _ = push_exported(hub, exported).split()
    assert push_exported(hub, exported) == f"{first} False"
    card = hub.files("me/student", kind="models")["README.md"].decode()
    by_hand = card.replace("- lora\n", "- lora\n- mine\n") + "\nWritten by hand.\n"
    hub.change("me/student", {"README.md": by_hand.encode(), "notes.txt": b"x"}, kind="models")
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    (other / "README.md").write_text(card.replace("me/tiny", "me/other"))
    push_exported(hub, other)
    files = hub.files("me/student", kind="models")
    card = files["README.md"].decode()
    assert "Written by hand." in card
    assert "- mine\n" in card
    assert "base_model: me/other" in card
    assert "notes.txt" in files


@pytest.mark.slow
def test_a_secret_in_the_prompt_stays_here(run: Path, hub: Hub) -> None:
    config = json.loads((run / "train" / "config.json").read_text())
    prompt = f"{PROMPT} Key: {'tml-' + 'aB3' * 12}"
    config["dataset"]["path"] = str(dataset(run / "leaky", prompt=prompt))
    (run / "train" / "config.json").write_text(json.dumps(config))
    said = push(hub, run, "base_model='me/tiny'")
    assert said.startswith("ScreeningError")
    assert "aB3aB3" not in said
    assert not hub.log()
    (key,) = set(re.findall(r"--allow ([0-9a-f]{12})", said))
    assert push(hub, run, f"base_model='me/tiny', allow=[{key!r}]").endswith("True")
    assert hub.repository("me/student", kind="models").private
    assert commits(hub) == 1


FAULTS: dict[str, dict[str, Any]] = {
    "busy": {"status": 503, "headers": {"Retry-After": "0"}},
    "never arrived": {"drop": "before"},
    "answer lost": {"drop": "after"},
    "somebody else was faster": {"foreign": {"notes.txt": b"theirs"}},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_happens_to_the_commit_there_is_one(fault: str, exported: Path, hub: Hub) -> None:
    hub.fault(r"/commit/", **FAULTS[fault])
    push_exported(hub, exported)
    files = hub.files("me/student", kind="models")
    assert "adapter_model.safetensors" in files
    assert ("notes.txt" in files) == ("foreign" in FAULTS[fault])
    history = hub.repository("me/student", kind="models").history()
    assert [one.title for one in history].count("Student's adapter") == 1
