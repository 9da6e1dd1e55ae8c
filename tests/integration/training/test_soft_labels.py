"""Soft labels, with a tiny random model as its own teacher on the real server; labels that share
tokens, as a tree; and where scores are kept.
"""

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from distill_datasets.conversations import to_text
from distill_datasets.errors import DatasetError, ModelError, OutputError
from distill_datasets.models.references import connect
from distill_datasets.models.scoring import Scorer, SoftLabels, require_same_tokenizer
from distill_datasets.releases.release import load_release, publish
from distill_datasets.training import objectives
from distill_datasets.training.objectives import (
    SoftExample,
    TrainingTask,
    chosen_rows,
    read_teacher,
    released_rows,
)
from distill_datasets.training.settings import ObjectiveSettings
from distill_datasets.training.soft_labels import (
    SCORES,
    LabelScorer,
    ScoreStore,
    SoftObjective,
    children,
    diverging,
    label_logprobs,
    label_targets,
    paths,
    spoken_tokens,
)
from distill_datasets.training.trainer import TrainSettings, train
from tests.support.soft_releases import PROMPT, SMALL, release, training_task
from tests.support.training_runs import LANGUAGES, metrics, write

pytestmark = pytest.mark.usefixtures("undrawn")
TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def tiny_release(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(tmp_path_factory.mktemp("release"), model)


def settings(**objective: Any) -> TrainSettings:
    return replace(SMALL, objective=ObjectiveSettings(**{"name": "soft", "top_k": 4, **objective}))


def soft_examples(task: TrainingTask) -> dict[int, SoftExample]:
    """Of all rows that are trained on, by their places."""
    places, _ = chosen_rows(task)
    with closing(SoftObjective(task)) as objective:
        return dict(zip(places, objective.examples(places), strict=True))


def teacher_logprobs(model: str, context: list[int], response: list[int]) -> Any:
    """By transformers: the logarithms of the whole vocabulary at each place of a response."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model.removeprefix("embedded:"))
    with torch.no_grad():
        logits = loaded(torch.tensor([[*context, *response]])).logits[0].float()
    found = torch.log_softmax(logits, dim=-1).numpy()
    return found[len(context) - 1 : len(context) + len(response) - 1]


def prompted(model: str, query: str) -> list[int]:
    messages: Any = [{"role": "system", "content": PROMPT}, {"role": "user", "content": query}]
    return list(connect(model).renderer.build_generation_prompt(messages).to_ints())


def responses(examples: dict[int, SoftExample], model: str) -> list[str]:
    tokenizer = connect(model).tokenizer
    return [tokenizer.decode(example.labels.tokens[:-1]) for example in examples.values()]


def test_where_stop_texts_cut_the_teacher_the_end_is_learned_as_it_is(
    model: str, tmp_path: Path
) -> None:
    """The rest of the answer is the teacher's distribution, as without stop texts."""
    found = {}
    for stop in ((), ("\n",)):
        folder = tmp_path / str(len(stop))
        cut = release(folder, model, sampling={"stop": stop})
        found[stop] = soft_examples(
            training_task(cut, model, folder / "task", settings(labels="scored"))
        )[3].labels
    whole, hard = found.values()
    end = connect(model).tokenizer.eos_token_id
    assert whole.tokens[-1] == hard.tokens[-1] == end
    assert hard.ids[-1].tolist() == [end] * 4
    assert np.exp(hard.logprobs[-1]).tolist() == [1, 0, 0, 0] != np.exp(whole.logprobs[-1]).tolist()
    assert hard.logprobs[:-1].tolist() == whole.logprobs[:-1].tolist()


def test_no_token_of_any_response_stands_for_a_stop_text(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the last responses neither, which are read a few at a time."""
    made = release(tmp_path, model, sampling={"stop": ("\n",)})
    task = training_task(made, model, tmp_path / "task", settings(labels="scored"))
    ends = []
    for rows in (512, 1):
        monkeypatch.setattr(objectives, "_AT_ONCE", rows)
        ends.append(read_teacher(task).cut_ends())
    whole, piecewise = ends
    assert whole and piecewise and whole.table.tolist() == piecewise.table.tolist()
    for row in released_rows(task, range(len(task.rows))):
        assert all(whole.table[token] == token for token in row.tokens[: -whole.length])


def test_a_label_that_begins_another_ends_where_the_teacher_is_cut_too(
    model: str, tmp_path: Path
) -> None:
    """ "en" or "enough": behind "en" a stop text is as good as the end."""
    found = []
    for stop in ((), ("a",)):
        folder = tmp_path / str(len(stop))
        choices = ("en", "enough", *list(LANGUAGES)[1:])
        made = release(
            folder,
            model,
            sampling={"stop": stop},
            answer={"pattern": r"Answer: (?P<answer>\w+)$", "choices": choices},
        )
        chosen = settings(labels="choices")
        found.append(soft_examples(training_task(made, model, folder / "task", chosen))[0].labels)
    own, cut = (labels.kept for labels in found)
    assert cut > own


def test_the_order_of_the_rows_decides_no_score(model: str, tmp_path: Path) -> None:
    """A sign that one text has is a sign in all of them, though a stop text begins with it."""
    made = release(
        tmp_path,
        model,
        sampling={"stop": ("! User:",)},
        answer={
            "pattern": r"Answer: (?P<answer>\w+)$",
            "choices": ("en", "enough", *list(LANGUAGES)[1:]),
        },
    )
    task = training_task(made, model, tmp_path / "task", settings(labels="choices"))
    rows = dict(zip(("Sure! Answer: en", "Answer: en"), released_rows(task, [0, 4]), strict=True))
    found = []
    for texts in (list(rows), list(rows)[::-1]):
        prompts, teacher = read_teacher(task), task.student.connection
        scorer = LabelScorer(prompts, teacher, texts)
        asked = [
            scorer.request(replace(rows[text], tokens=spoken_tokens(teacher, text)), text)
            for text in texts
        ]
        found.append({one.key: one.start()().kept for one in asked})
    assert len(found[0]) == 2
    assert found[0] == pytest.approx(found[1])


def test_a_response_is_scored_under_the_prompt_that_the_student_never_sees(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    examples = soft_examples(
        training_task(tiny_release, model, tmp_path, settings(labels="scored"))
    )
    assert len(examples) == 8
    tokenizer = connect(model).tokenizer
    for number in (0, 5):
        example, query = examples[number], f"{list(LANGUAGES.values())[number % 4]} {number}"
        assert "code of the language" not in tokenizer.decode(example.prompt)
        response = example.labels.tokens.tolist()
        exact = teacher_logprobs(model, prompted(model, query), response)
        best = np.argsort(-exact, axis=1)[:, :4]
        assert example.labels.ids.tolist() == best.tolist()
        found = np.take_along_axis(exact, best, axis=1)
        assert np.allclose(example.labels.logprobs, found, rtol=2**-11, atol=1e-4)
        assert example.labels.kept == pytest.approx(np.exp(found).sum(axis=1).mean(), abs=1e-4)


def test_a_call_is_scored_after_prompt_tools_and_the_whole_conversation(
    model: str, tmp_path: Path
) -> None:
    """The student reads its own short prompt before the conversation, and no tools."""
    before = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]

    def conversation(text: str) -> list[Any]:
        return [*before, {"role": "user", "content": text}]

    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "tools.json").write_text(json.dumps([TOOL]))
    rows = json.dumps({"messages": conversation("hello")})
    (tmp_path / "recipe" / "queries.jsonl").write_text(rows)
    dataset = release(
        tmp_path,
        model,
        written=lambda text: to_text(conversation(text)),
        says='<tool_call>\n{"name": "look", "arguments": {"code": "{}"}}\n</tool_call>',
        queries={"file": "queries.jsonl", "messages": "messages"},
        tools="tools.json",
        student={"prompt": "[codes]"},
        **dict.fromkeys(("answer", "response")),
    )
    task = training_task(dataset, model, tmp_path / "task", settings(labels="scored"))
    examples, renderer = soft_examples(task), connect(model).renderer
    seen = [{"role": "system", "content": "[codes]"}, *conversation("el cielo 3")]
    taught = [{"role": "system", "content": PROMPT}, *conversation("el cielo 3")]
    tools = json.dumps([{"type": "function", "function": TOOL}])
    context = renderer.build_generation_prompt(taught, tools=tools).to_ints()
    example = examples[3]
    assert example.prompt == renderer.build_generation_prompt(seen).to_ints()
    assert '{"name": "look", "arguments": {"code": "es"}}' in responses(examples, model)[3]
    exact = teacher_logprobs(model, context, example.labels.tokens.tolist())
    best = -np.sort(-exact, axis=1)[:, :4]
    assert np.allclose(example.labels.logprobs, best, rtol=2**-11, atol=1e-4)


def test_the_probability_of_a_choice_is_that_of_all_its_tokens(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    """The first differing place of "Final Answer: xx" against the same by transformers."""
    examples = soft_examples(training_task(tiny_release, model, tmp_path, settings()))
    tokenizer = connect(model).tokenizer
    labels = examples[0].labels
    context = prompted(model, "the weather 0")
    totals = {}
    for choice in LANGUAGES:
        said = [*tokenizer.encode(f"Final Answer: {choice}"), tokenizer.eos_token_id]
        places = teacher_logprobs(model, context, said)
        end = len(said) - 1  # what all end with is no part of a choice
        totals[choice] = sum(places[place, said[place]] for place in range(end))
    chances = np.exp(np.array(list(totals.values())) - max(totals.values()))
    wanted = dict(zip(totals, chances / chances.sum(), strict=True))
    spelled = {choice: tokenizer.encode(f"Final Answer: {choice}") for choice in LANGUAGES}
    for choice, ids in spelled.items():
        found = 1.0
        for place, token in enumerate(ids):
            if ids[:place] != labels.tokens[:place].tolist():
                break
            at = labels.ids[place].tolist().index(token)
            found *= float(np.exp(np.float64(labels.logprobs[place, at])))
            if token != labels.tokens[place]:
                alike = [
                    c for c, other in spelled.items() if other[: place + 1] == ids[: place + 1]
                ]
                assert found == pytest.approx(sum(wanted[c] for c in alike), rel=2e-3)
                break
        else:
            assert found == pytest.approx(wanted[choice], rel=2e-3)
    assert labels.kept < 1


def test_what_is_scored_once_is_never_asked_again(
    tiny_release: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("scored", "choices"):
        first = soft_examples(training_task(tiny_release, model, tmp_path, settings(labels=source)))
        with monkeypatch.context() as patch:
            patch.delattr(Scorer, "read")
            patch.delattr(Scorer, "following")
            again = soft_examples(
                training_task(tiny_release, model, tmp_path, settings(labels=source))
            )
        for place, example in first.items():
            assert np.array_equal(example.labels.logprobs, again[place].labels.logprobs)
            assert np.array_equal(example.labels.ids, again[place].labels.ids)


def test_only_the_rows_that_are_trained_on_are_scored(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    whole = training_task(tiny_release, model, tmp_path, settings(labels="scored"))
    few = replace(whole, settings=replace(whole.settings, max_rows=3))
    assert len(soft_examples(few)) == 3


def test_soft_training_brings_the_student_near_the_teachers_distribution(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    chosen = replace(settings(labels="scored"), epochs=6)
    training = train(tiny_release, student=model, out=tmp_path / "out", settings=chosen)
    apart = metrics(training, "kl")
    assert apart[12] < apart[1] / 2
    assert all(0 < kept <= 1 for kept in metrics(training, "kept").values())


def test_alpha_1_is_the_loss_of_the_hard_labels(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    hard = settings(top_k=20, alpha=1.0, labels="choices")
    soft = train(tiny_release, student=model, out=tmp_path / "soft", settings=hard)
    sft = train(tiny_release, student=model, out=tmp_path / "sft", settings=SMALL)
    for step, loss in metrics(sft).items():
        assert metrics(soft)[step] == pytest.approx(loss, abs=2e-4)
        assert metrics(soft, "kl")[step] == pytest.approx(loss, abs=2e-4)


def test_labels_that_generation_bought_are_released_and_learned_without_asking(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = release(tmp_path / "made", model, sampling={"top_logprobs": 2})
    assert json.loads((path / "manifest.json").read_text())["soft"] == {
        "rows": 12,
        "rewritten": 0,
        "without_ids": 0,
    }
    rows = datasets.load_dataset(str(path), "soft", split="soft")
    assert len(rows) == 12 and rows[0]["tokens"][-1] == connect(model).tokenizer.eos_token_id
    assert rows.features["top_logprobs"].feature.feature.dtype == "float16"
    monkeypatch.delattr(Scorer, "read")
    examples = soft_examples(
        training_task(path, model, tmp_path, settings(labels="stored", top_k=2))
    )
    assert responses(examples, model)[1] == "Final Answer: de"
    labels = examples[1].labels
    assert labels.ids.tolist() == [[token, (token + 1) % 500] for token in labels.tokens]
    assert np.array_equal(labels.logprobs, np.full((len(labels.tokens), 2), (-0.5, -1.25)))


def test_a_release_is_the_same_when_it_is_published_again_with_its_soft_labels(
    model: str, tmp_path: Path
) -> None:
    path = release(tmp_path, model, sampling={"top_logprobs": 2})
    before = (path / "manifest.json").stat().st_mtime_ns
    assert publish(tmp_path / "run") == load_release(path)
    assert (path / "manifest.json").stat().st_mtime_ns == before


def test_responses_that_were_written_anew_have_no_stored_labels(model: str, tmp_path: Path) -> None:
    path = release(tmp_path / "made", model, sampling={"top_logprobs": 2}, response="{{ answer }}")
    assert not (path / "soft").exists()
    with pytest.raises(DatasetError, match="0 of 8 rows.*labels='scored'"):
        soft_examples(training_task(path, model, tmp_path, settings(labels="stored", top_k=2)))


def test_more_tokens_than_are_stored_can_not_be_learned(model: str, tmp_path: Path) -> None:
    path = release(tmp_path / "made", model, sampling={"top_logprobs": 2})
    with pytest.raises(DatasetError, match="top_k=2"):
        soft_examples(training_task(path, model, tmp_path, settings(labels="stored")))


def test_choices_teach_a_student_that_answers_in_another_form(model: str, tmp_path: Path) -> None:
    path = release(tmp_path / "made", model, response="It is {{ answer }}.")
    examples = soft_examples(training_task(path, model, tmp_path, settings()))
    assert responses(examples, model)[:2] == ["It is en.", "It is de."]
    first = examples[0].labels
    parting = next(place for place, ids in enumerate(first.ids.tolist()) if any(ids[1:]))
    assert parting > 0  # "It is" is certain


def test_a_response_that_the_teacher_would_not_say_is_not_scored(
    model: str, tmp_path: Path
) -> None:
    path = release(tmp_path / "made", model, response="It is {{ answer }}.")
    for objective in ({"labels": "scored"}, {"name": "on_policy"}):
        with pytest.raises(DatasetError, match="8 of 8 responses.*'It is en.'"):
            train(path, student=model, out=tmp_path / "out", settings=settings(**objective))
        shutil.rmtree(tmp_path / "out")


def test_a_response_outside_the_choices_is_named(model: str, tmp_path: Path) -> None:
    """The recipe in the release knows one language less than its rows."""
    answer = {"pattern": r"Final Answer: (?P<answer>\w+)$", "choices": ["en", "de", "fr"]}
    path = release(tmp_path / "made", model, answer=answer)
    with pytest.raises(DatasetError, match="none of the recipe's choices.*'Final Answer: es'"):
        soft_examples(training_task(path, model, tmp_path, settings()))


@pytest.mark.parametrize("name", ["soft", "on_policy"])
def test_a_dataset_without_a_recipe_is_refused_before_anything_is_scored(
    name: Any, model: str, tmp_path: Path
) -> None:
    rows = [{"id": "a", "sample": 0, "query": "le ciel", "response": "fr"}]
    folder = write(tmp_path / "dataset", train=rows)
    with pytest.raises(DatasetError, match="how its teacher is asked.*'sft'"):
        train(folder, student=model, out=tmp_path / "out", settings=settings(name=name))


def test_a_dataset_without_a_releases_columns_is_refused(model: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "dataset", train=[{"query": "le ciel", "response": "fr"}])
    with pytest.raises(DatasetError, match=r"lacks \['id', 'sample'\]"):
        soft_examples(training_task(folder, model, tmp_path, settings()))


def test_a_teacher_of_another_tokenizer_is_refused_with_both_named(model: str) -> None:
    teacher, student = connect("pocket"), connect(model)
    with pytest.raises(DatasetError, match="other tokenizers: .* 4096 tokens and .* 406"):
        require_same_tokenizer(teacher, student)
    require_same_tokenizer(student, connect(model))


def test_a_teacher_that_gives_no_probabilities_is_refused(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="'openai:gpt' of .* can't be asked for probabilities"):
        soft_examples(training_task(tiny_release, model, tmp_path, settings(teacher="openai:gpt")))


def test_scores_are_in_the_trainings_own_folder(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    soft_examples(training_task(tiny_release, model, tmp_path, settings(labels="scored")))
    assert (tmp_path / SCORES).is_file()


@pytest.mark.parametrize(
    ("objective", "remedy"),
    [
        ({"labels": "scored"}, "Train with a larger top_k."),
        ({"labels": "stored", "top_k": 2}, "Generate with more `sampling.top_logprobs`"),
        ({"labels": "choices"}, "mend the prompt or the choices."),
    ],
)
def test_labels_that_hold_little_of_the_teachers_probability_are_warned_of(
    objective: dict[str, Any],
    remedy: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A random model spreads its probability; what is stored holds exp(-0.5) + exp(-1.25)."""
    path = release(tmp_path / "made", model, sampling={"top_logprobs": 2})
    examples = soft_examples(training_task(path, model, tmp_path, settings(**objective)))
    kept = np.mean([one.labels.kept for one in examples.values()])
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert f"hold {kept:.2f} of the teacher's probability on average" in warning
    assert remedy in warning


def test_labels_that_hold_most_of_it_are_not(
    tiny_release: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    most = settings(labels="scored", top_k=400)
    soft_examples(training_task(tiny_release, model, tmp_path, most))
    assert "warning" not in capsys.readouterr().err


def test_choices_need_the_teachers_own_words(model: str, tmp_path: Path) -> None:
    """Without the ledger nobody knows what it said where the student says something else."""
    path = release(tmp_path / "made", model, ledger=False, response="It is {{ answer }}.")
    with pytest.raises(DatasetError, match="doesn't hold what its teacher said.*labels='scored'"):
        soft_examples(training_task(path, model, tmp_path, settings()))


def test_a_response_in_the_teachers_own_words_needs_no_ledger(
    tiny_release: Path, model: str, tmp_path: Path
) -> None:
    bare = release(tmp_path / "bare", model, ledger=False)
    without = soft_examples(training_task(bare, model, tmp_path / "without", settings()))
    with_it = soft_examples(training_task(tiny_release, model, tmp_path / "with", settings()))
    for place, example in with_it.items():
        assert np.array_equal(example.labels.ids, without[place].labels.ids)
        assert np.allclose(example.labels.logprobs, without[place].labels.logprobs, atol=1e-2)


def test_a_damaged_file_of_scores_is_named(tiny_release: Path, model: str, tmp_path: Path) -> None:
    (tmp_path / SCORES).write_bytes(b"no database, but of some length" * 100)
    with pytest.raises(OutputError, match=r"scores.sqlite'.*delete it"):
        soft_examples(training_task(tiny_release, model, tmp_path, settings(labels="scored")))


def test_labels_are_compared_from_where_they_part_to_where_they_meet() -> None:
    assert diverging([(1, 2, 7, 9), (1, 2, 8, 9)]) == ((1, 2), [(7,), (8,)])


def test_a_label_that_begins_another_keeps_the_end_that_tells_them_apart() -> None:
    """ "en" and "english" as (5) and (5, 6), both ended by 9."""
    assert diverging([(1, 5, 9), (1, 5, 6, 9)]) == ((1, 5), [(9,), (6, 9)])


def test_one_reading_passes_every_place_of_labels_of_one_token() -> None:
    labels = [(3,), (4,), (5,)]
    assert paths(labels) == [()]
    assert children(labels) == {(): [3, 4, 5]}


def test_labels_that_share_a_beginning_share_its_reading() -> None:
    labels = [(3, 6), (3, 7), (4,)]
    assert paths(labels) == [(3,)]
    assert children(labels) == {(): [3, 4], (3,): [6, 7]}


def test_a_labels_probability_is_the_product_along_its_tokens() -> None:
    places = {(): {3: np.log(0.5), 4: np.log(0.3)}, (3,): {6: np.log(0.9), 7: np.log(0.1)}}
    found = np.exp(label_logprobs([(3, 6), (3, 7), (4,)], places))
    assert found.tolist() == pytest.approx([0.45, 0.05, 0.3])


def test_a_student_learns_each_token_among_the_labels_still_possible() -> None:
    """Labels (3, 6, 9), (3, 7, 9), (4, 9) of 0.45, 0.05, 0.3, of which the row says the first."""
    written = [(3, 6, 9), (3, 7, 9), (4, 9)]
    labels = label_targets((3, 6, 9), written, np.log([0.45, 0.05, 0.3]))
    chances = np.exp(labels.logprobs.astype(np.float64))
    assert labels.ids.tolist() == [[3, 4], [6, 7], [9, 0]]
    assert chances[0].tolist() == pytest.approx([0.5 / 0.8, 0.3 / 0.8], abs=1e-3)
    assert chances[1].tolist() == pytest.approx([0.9, 0.1], abs=1e-3)
    assert chances[2].tolist() == [1, 0]
    assert labels.kept == pytest.approx(0.8)


def test_a_label_that_the_teacher_all_but_rules_out_still_has_a_next_token() -> None:
    labels = label_targets((3, 9), [(3, 9), (4, 9)], np.array([-2000.0, -0.1]))
    assert labels.ids[1, 0] == 9
    assert labels.logprobs[1, 0] == 0


def test_what_was_scored_is_read_back_to_the_bit_by_another_process(tmp_path: Path) -> None:
    labels = SoftLabels.of([4, 5], np.array([[4, 7], [5, 8]]), np.log([[0.6, 0.2], [0.9, 0.1]]))
    first = ScoreStore(tmp_path / "scores.sqlite")
    first.put([("a", labels)])
    first.close()
    again = ScoreStore(tmp_path / "scores.sqlite")
    read = again.get("a")
    assert "a" in again and "b" not in again
    assert read.kept == labels.kept
    for name in ("tokens", "ids", "logprobs"):
        assert np.array_equal(getattr(read, name), getattr(labels, name))
        assert getattr(read, name).dtype == getattr(labels, name).dtype
    again.close()


def test_the_mean_of_what_is_kept_is_over_the_labels_that_were_asked_for(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores.sqlite")
    some = [SoftLabels.of([4], np.array([[4]]), np.log([[kept]])) for kept in (0.5, 0.7, 0.9)]
    store.put(zip("abc", some, strict=True))
    assert store.mean_kept(["a", "c", "c"]) == pytest.approx((0.5 + 0.9 + 0.9) / 3)
    many = ["a", "b"] * 900
    assert store.mean_kept(many) == pytest.approx(0.6)
    store.close()
