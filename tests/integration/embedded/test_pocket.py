"""The pocket model: what it was trained on, how it speaks, and that the shipped weights do."""

import importlib.util

import pytest
import torch
from tinker_cookbook.renderers import get_renderer

from distill_datasets.files import pocket_folder
from tests.pocket.corpus import (
    collect,
    overlapping,
    read_own_sentences,
    recipe_queries,
    without_queries,
)
from tests.pocket.evaluate import (
    PocketModel,
    answer,
    load_pocket,
    recipe_gold,
)
from tests.pocket.network import Network, Shape, Tokens
from tests.pocket.prompts import (
    CODES,
    FORMATS,
    LABELS,
    edited,
    recipe_prompt,
    system_frame,
    user_frame,
)

# Written for this test; no corpus has them.
HELD_OUT = {
    "de": "Nach dem Frühstück gingen wir noch eine Stunde am Fluss entlang.",
    "en": "We walked along the river for another hour after breakfast.",
    "es": "Después del desayuno caminamos otra hora junto al río.",
    "fr": "Après le petit déjeuner, nous avons marché encore une heure près de la rivière.",
    "tr": "Kahvaltıdan sonra nehir boyunca bir saat daha yürüdük.",
    "vi": "Sau bữa sáng, chúng tôi đi bộ thêm một giờ dọc bờ sông.",
    "el": "Μετά το πρωινό περπατήσαμε άλλη μια ώρα δίπλα στο ποτάμι.",
    "ru": "После завтрака мы ещё час гуляли вдоль реки.",
    "ar": "بعد الإفطار مشينا ساعة أخرى على ضفة النهر.",
    "ur": "ناشتے کے بعد ہم دریا کے کنارے ایک گھنٹہ اور چلتے رہے۔",
    "hi": "नाश्ते के बाद हम नदी के किनारे एक घंटा और चले।",
    "zh": "吃完早饭，我们又沿着河边走了一个小时。",
    "ot": "Baada ya kifungua kinywa tulitembea tena saa moja kando ya mto.",
}
QUERIES = list(HELD_OUT.values())


@pytest.fixture(scope="module")
def pocket() -> PocketModel:
    torch.set_num_threads(1)
    return load_pocket(pocket_folder())


def replies_in(pocket: PocketModel, pattern: str, prompt: str) -> int:
    replies = answer(pocket, system_frame(prompt), QUERIES, max_tokens=16)
    expected = [f"{pattern.replace('xx', label)}<|im_end|>" for label in HELD_OUT]
    return sum(reply == right for reply, right in zip(replies, expected, strict=True))


def test_no_query_of_the_recipes_is_in_our_own_sentences() -> None:
    lines = [line for texts in read_own_sentences().values() for line in texts]
    assert len(lines) > 5_000
    assert overlapping(lines, recipe_queries()) == set()


@pytest.mark.skipif(
    not (importlib.util.find_spec("django") and importlib.util.find_spec("babel")),
    reason="the texts of Django and CLDR come with the pocket extra",
)
def test_no_query_of_the_recipes_is_in_the_collected_text() -> None:
    kept = without_queries(collect(), recipe_queries())
    lines = [line for texts in kept.values() for line in texts]
    assert len(lines) > 10_000
    assert overlapping(lines, recipe_queries()) == set()


def test_overlap_is_equality_or_containment_of_at_least_twenty_characters() -> None:
    queries = ["Hola", "The cat sat on the mat all day long."]
    lines = [
        "hola ",
        "Hola amigo",
        "the CAT sat on  the mat all",
        "the cat sat",
        "He said: the cat sat on the mat all day long. Then he left.",
    ]
    assert overlapping(lines, queries) == {lines[0], lines[2], lines[4]}


def test_every_recipe_query_has_a_gold_label() -> None:
    gold = recipe_gold()
    assert len(gold) == len(recipe_queries())
    assert set(gold) == set(LABELS)


def test_the_chat_template_renders_like_the_cookbooks_instruct_renderer(
    pocket: PocketModel,
) -> None:
    messages = [
        {"role": "system", "content": recipe_prompt("language_id")},
        {"role": "user", "content": QUERIES[0]},
    ]
    renderer = get_renderer("qwen3_instruct", pocket.tokenizer)
    expected = renderer.build_generation_prompt(messages).to_ints()
    ours = pocket.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert list(ours) == list(expected)
    framed = system_frame(messages[0]["content"])
    assert pocket.encode(framed.prefix) + pocket.encode(framed.around(QUERIES[0])) == list(ours)


def test_thinking_tokens_are_added_but_not_special(pocket: PocketModel) -> None:
    ids = pocket.encode("<think></think>")
    assert len(ids) == 2
    assert pocket.tokenizer.decode(ids, skip_special_tokens=True) == "<think></think>"


def test_the_training_twin_computes_what_transformers_computes() -> None:
    from tests.pocket.build import as_transformers

    class Ends:
        eos_token_id, pad_token_id = 1, 0

    torch.manual_seed(0)
    network = Network(Shape(vocabulary=64, layers=2))
    model = as_transformers(network, Ends()).float()
    prefix, suffix = torch.randint(2, 64, (1, 9)), torch.randint(2, 64, (1, 6))
    with torch.inference_mode():
        ours = network.logits(network(Tokens(prefix, torch.tensor([9]), suffix)))
        theirs = model(torch.cat((prefix, suffix), 1)).logits[:, 9:]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["language_id", "language_id_tutorial"])
def test_it_answers_in_the_format_of_the_recipes_prompts(pocket: PocketModel, recipe: str) -> None:
    assert replies_in(pocket, "Final Answer: xx", recipe_prompt(recipe)) >= len(QUERIES) - 1


def test_prompt_and_query_may_share_one_message(pocket: PocketModel) -> None:
    frame = user_frame(recipe_prompt("language_id"), "\n\nText:\n", "")
    replies = answer(pocket, frame, QUERIES)
    right = [f"Final Answer: {label}<|im_end|>" for label in HELD_OUT]
    assert sum(a == b for a, b in zip(replies, right, strict=True)) >= len(QUERIES) - 1


@pytest.mark.parametrize("pattern", ["xx", '{"language": "xx"}', "Language: xx"])
def test_an_edited_format_is_followed(pocket: PocketModel, pattern: str) -> None:
    section = (
        f"How to answer:\n- Write exactly one line: {pattern}\n"
        f"- xx is one of {CODES}. Write nothing else."
    )
    prompt = edited(recipe_prompt("language_id"), section)
    assert replies_in(pocket, pattern, prompt) >= len(QUERIES) - 2


@pytest.mark.parametrize("prompt", ["", "You are a helpful assistant."])
def test_nobody_asked_for_a_label_so_none_is_given(pocket: PocketModel, prompt: str) -> None:
    replies = answer(pocket, system_frame(prompt), QUERIES, max_tokens=16)
    labels = {format.answer(label) for format in FORMATS for label in LABELS}
    assert not [reply for reply in replies if reply.removesuffix("<|im_end|>").strip() in labels]
