"""Builds the pocket model from nothing: python -m tests.pocket.build --out DIR.

Needs the `pocket` extra, for the texts of Django and CLDR.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from distill_datasets.files import write_file

from .corpus import Corpus, LabelledQuery, QuerySource, load_corpus, recipe_queries, split_corpus
from .evaluate import evaluate
from .network import Network, Shape, Tokens
from .prompts import (
    CONTROL_TOKENS,
    END_OF_TEXT,
    FORMATS,
    GENERIC,
    LABELS,
    TURN_END,
    ChatFrame,
    PromptSize,
    draw_frame,
    draw_generic,
    draw_prompt,
    system_frame,
)

VOCABULARY = 4096
# Not special, as in Qwen3: decoding keeps them, so that a reader can strip the reasoning.
THINKING_TOKENS = ("<think>", "</think>")
# Qwen's own expression and normaliser: loaders that rebuild a Qwen tokenizer change no token.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Few drawn prompts: the more of them the vocabulary has seen, the fewer tokens a prompt costs,
# and the smaller the saving that distilling the prompt can show.
DRAWN_PROMPTS = 200
CHARACTERS_PER_LABEL, CHARACTERS_PER_OTHER = 120_000, 25_000


def train_tokenizer(corpus: Corpus, *, seed: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `VOCABULARY` entries on the corpus, some prompts and all answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL_TOKENS) - len(THINKING_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus, random.Random(seed)), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in THINKING_TOKENS])
    wrapped: Any = PreTrainedTokenizerFast
    finished: PreTrainedTokenizerFast = wrapped(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    return finished


def _texts(corpus: Corpus, rng: random.Random) -> Iterator[str]:
    for language in corpus.languages():
        budget = CHARACTERS_PER_LABEL if language in LABELS else CHARACTERS_PER_OTHER
        texts = list(corpus.texts(language))
        rng.shuffle(texts)
        # Own sentences twice: they read like the queries, software messages do not.
        for text in [*corpus.own.get(language, []), *texts]:
            budget -= len(text)
            if budget < 0:
                break
            yield text
    for size in rng.choices(list(PromptSize), [0.35, 0.4, 0.25], k=DRAWN_PROMPTS):
        yield draw_prompt(rng, size=size).text
    for _ in range(40):
        yield from GENERIC
        for format in FORMATS:
            for label in LABELS:
                yield format.answer(label)


ANSWER_WEIGHT, CONTINUATION_WEIGHT = 1.0, 0.3
# Predicting the query itself teaches the network the languages; labels alone are few bits.
QUERY_WEIGHT = 0.25
# Only a part of the query's tokens is scored, because scoring 4,096 words costs a lot.
QUERY_SHARE = 0.15
# Queries are batched by length, which keeps the padding small: tokens of the longest, and rows.
ROWS_BY_LENGTH = {16: 32, 24: 28, 32: 24, 40: 20, 56: 16, 80: 12, 112: 9, 160: 7, 240: 5}
LONG_QUERIES = 0.04
# Prompts per batch, and by how much to scale its rows: a long prompt should serve many.
PROMPTS = {PromptSize.BRIEF: 8, PromptSize.MEDIUM: 5, PromptSize.LONG: 3}
CONVERSATIONS = {PromptSize.BRIEF: 2, PromptSize.MEDIUM: 1, PromptSize.LONG: 0}
ROW_SCALE = {PromptSize.BRIEF: 0.8, PromptSize.MEDIUM: 1.0, PromptSize.LONG: 1.4}


@dataclass(frozen=True)
class Exercise:
    """Token ids of a query with what surrounds it, and of the answer."""

    context: list[int]
    answer: list[int]


@dataclass(frozen=True)
class ExerciseGroup:
    """Rows that share a prefix, and how much their tokens count in the loss."""

    kind: str
    prefix: list[int]
    rows: list[Exercise]
    answer_weight: float
    context_weight: float


@dataclass(frozen=True)
class GroupedBatch:
    """Tensors of one training step; `group_N` numbers the group of each suffix."""

    tokens: Tokens
    weight_NS: Tensor
    kinds: list[str]


class BatchSource:
    """Draws training batches."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, queries: QuerySource, *, seed: int
    ) -> None:
        # The fast backend knows nothing of torch.
        self.backend = tokenizer.backend_tokenizer
        self.vocabulary = len(tokenizer)
        self.queries = queries
        self.rng = random.Random(seed)
        self.waiting: dict[int, list[LabelledQuery]] = {length: [] for length in ROWS_BY_LENGTH}

    def draw(self, sizes: dict[PromptSize, float], *, copying: float) -> GroupedBatch:
        """Draw a batch: one size of prompt, by weight, and queries of about one length.

        `copying` is the chance that a group is an exercise in copying instead.
        """
        rng = self.rng
        size = rng.choices(list(sizes), list(sizes.values()))[0]
        length, queries = self._alike(size)
        rows = len(queries) // PROMPTS[size]
        groups = []
        for index in range(PROMPTS[size]):
            # Groups without prompt would be padded to the prompt's length: not beside long ones.
            if index < CONVERSATIONS[size]:
                groups.append(self._conversation(rows, length))
            elif size is not PromptSize.LONG and rng.random() < copying:
                groups.append(self._copies(rows))
            else:
                own = queries[index * rows : (index + 1) * rows]
                groups.append(self._labels(own, length, size))
        return collate(groups, rng)

    def _alike(self, size: PromptSize) -> tuple[int, list[LabelledQuery]]:
        """Return a length, and queries of about that length for a batch."""
        while True:
            query = self.queries.draw(long=self.rng.random() < LONG_QUERIES)
            tokens = len(self.encode([query.text])[0])
            length = next((limit for limit in ROWS_BY_LENGTH if tokens <= limit), 240)
            self.waiting[length].append(query)
            needed = int(ROWS_BY_LENGTH[length] * ROW_SCALE[size]) * PROMPTS[size]
            if len(self.waiting[length]) >= needed:
                queries = self.waiting[length][:needed]
                del self.waiting[length][:needed]
                self.rng.shuffle(queries)
                return length, queries

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _labels(self, queries: list[LabelledQuery], length: int, size: PromptSize) -> ExerciseGroup:
        """Draw a prompt and label some queries as it asks."""
        prompt = draw_prompt(self.rng, size=size)
        frame = draw_frame(prompt.text, self.rng)
        answers = [prompt.format.answer(query.label) for query in queries]
        rows = self._rows(frame, [query.text for query in queries], answers, length)
        prefix = self.encode([frame.prefix])[0]
        return ExerciseGroup(prompt.format.name, prefix, rows, ANSWER_WEIGHT, QUERY_WEIGHT)

    def _conversation(self, rows: int, length: int) -> ExerciseGroup:
        """Continue texts without a prompt, or with one that asks for nothing in particular."""
        generic = draw_generic(self.rng, self.queries.draw().text)
        frame = system_frame(generic if self.rng.random() < 0.6 else "")
        exchanges = [self.queries.exchange() for _ in range(rows)]
        users = [exchange.user for exchange in exchanges]
        replies = [exchange.reply for exchange in exchanges]
        prefix = self.encode([frame.prefix])[0]
        framed = self._rows(frame, users, replies, length)
        return ExerciseGroup("conversation", prefix, framed, CONTINUATION_WEIGHT, QUERY_WEIGHT)

    def _copies(self, rows: int) -> ExerciseGroup:
        """Repeat runs of tokens: the skill from which obeying an output format grows."""
        rng = self.rng
        copies = []
        for _ in range(rows):
            length = rng.randint(4, 12)
            run = [rng.randrange(self.vocabulary - 5) for _ in range(length)]
            if rng.random() < 0.5:
                run = (self.encode([self.queries.draw().text])[0] * length)[:length]
            gap = [rng.randrange(self.vocabulary - 5) for _ in range(rng.randint(0, 12))]
            copies.append(Exercise(run + gap + run[:2], run[2:] + run + run))
        return ExerciseGroup("copy", [], copies, ANSWER_WEIGHT, 0.0)

    def _rows(
        self, frame: ChatFrame, texts: list[str], answers: list[str], length: int
    ) -> list[Exercise]:
        """Encode framed texts and answers; texts and answers are cut at about `length` tokens."""
        around = len(self.encode([frame.around("")])[0])
        contexts = self._contexts(frame, texts, length + around + 2)
        replies = self.encode([answer + TURN_END for answer in answers])
        room = max(12, length // 2)
        return [
            Exercise(context, reply[:room])
            for context, reply in zip(contexts, replies, strict=True)
        ]

    def _contexts(self, frame: ChatFrame, texts: list[str], room: int) -> list[list[int]]:
        """Encode the framed texts, each shortened until it fits."""
        contexts = self.encode([frame.around(text) for text in texts])
        for index, text in enumerate(texts):
            while text and (excess := len(contexts[index]) - room) > 0:
                text = text[: len(text) - max(1, excess)].rstrip()
                contexts[index] = self.encode([frame.around(text)])[0]
        return contexts


def collate(groups: list[ExerciseGroup], rng: random.Random) -> GroupedBatch:
    """Pad groups into one batch; sizes are rounded up so that few shapes occur.

    Every new shape makes oneDNN compile and keep another primitive.
    """
    rows = [row for group in groups for row in group.rows]
    longest_prefix = max(len(group.prefix) for group in groups)
    prefix = torch.zeros(len(groups), _rounded(longest_prefix, 64), dtype=torch.long)
    longest_suffix = max(len(row.context) + len(row.answer) for row in rows)
    suffix = torch.zeros(len(rows), _rounded(longest_suffix, 8), dtype=torch.long)
    weight = torch.zeros(suffix.shape)
    number = 0
    for index, group in enumerate(groups):
        prefix[index, : len(group.prefix)] = torch.tensor(group.prefix, dtype=torch.long)
        for row in group.rows:
            start, end = len(row.context), len(row.context) + len(row.answer)
            suffix[number, :end] = torch.tensor(row.context + row.answer)
            scored = torch.tensor([rng.random() < QUERY_SHARE for _ in range(1, start)])
            weight[number, 1:start] = group.context_weight * scored
            weight[number, start:end] = group.answer_weight
            number += 1
    lengths = torch.tensor([len(group.prefix) for group in groups])
    return GroupedBatch(Tokens(prefix, lengths, suffix), weight, [group.kind for group in groups])


def _rounded(size: int, step: int) -> int:
    return max(step, -(-size // step) * step)


LEARNING_RATE = 4e-3
WARM_UP_STEPS = 40
STABLE_SHARE = 0.5
FINAL_RATE = 0.02
# Languages are learned under brief prompts, at a third of the cost; long prompts come later.
FIRST_SIZES = {PromptSize.BRIEF: 0.75, PromptSize.MEDIUM: 0.15, PromptSize.LONG: 0.1}
LATER_SIZES = {PromptSize.BRIEF: 0.2, PromptSize.MEDIUM: 0.4, PromptSize.LONG: 0.4}
BRIEF_SHARE = 0.25
# Copying is exercised densely at first and then only kept alive.
COPY_SHARES = ((0.25, 0.25), (0.5, 0.1), (1.0, 0.04))
REPORT_EVERY = 50


def learning_rate(share: float, step: int) -> float:
    """Return the rate at a share of the budget: warm-up, a plateau, then a line downwards."""
    decay = max(FINAL_RATE, (1 - share) / (1 - STABLE_SHARE)) if share > STABLE_SHARE else 1.0
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * decay


def train(
    network: Network, source: BatchSource, *, cpu_seconds: float, report: Callable[[str], None]
) -> int:
    """Train until the process has used `cpu_seconds` more; the number of steps."""
    matrices, others = _parameters(network)
    muon = torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    means: dict[str, float] = {}
    start, step = time.process_time(), 0
    while (share := (time.process_time() - start) / cpu_seconds) < 1:
        copying = next(copy for end, copy in COPY_SHARES if share < end)
        batch = source.draw(FIRST_SIZES if share < BRIEF_SHARE else LATER_SIZES, copying=copying)
        losses = _backward(network, batch)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in (adam, muon):
            optimizer.param_groups[0]["lr"] = learning_rate(share, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        for kind, loss in zip(batch.kinds, losses, strict=True):
            means[kind] = 0.97 * means.get(kind, loss) + 0.03 * loss
        if step % REPORT_EVERY == 0:
            told = "  ".join(f"{kind} {loss:.3f}" for kind, loss in sorted(means.items()))
            report(f"step {step}  {share:.0%} of the time  {told}")
    return step


def _parameters(network: Network) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the hidden matrices, which Muon updates, and everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        hidden = parameter.dim() == 2 and "embed" not in name
        (matrices if hidden else others).append(parameter)
    return matrices, others


def _backward(network: Network, batch: GroupedBatch) -> list[float]:
    """Run one batch forward and backward; return the answer loss of each group."""
    weight = batch.weight_NS[:, 1:]
    chosen = weight > 0
    # The count of scored tokens is rounded up for the reason given at `collate`.
    places = chosen.flatten().nonzero()[:, 0]
    count = len(places)
    places = functional.pad(places, (0, -count % 256))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = network(batch.tokens)[:, :-1]
        logits = network.logits(hidden.reshape(-1, hidden.shape[-1])[places])
    targets = batch.tokens.suffix_NS[:, 1:].flatten()[places]
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    weights = weight.flatten()[places].clone()
    weights[count:] = 0
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward() untyped
    return _answer_losses(batch, losses.detach()[:count], chosen)


def _answer_losses(batch: GroupedBatch, losses: Tensor, chosen: Tensor) -> list[float]:
    dense = torch.zeros(chosen.shape)
    dense[chosen] = losses
    answers = (batch.weight_NS[:, 1:] > QUERY_WEIGHT).float()
    groups = len(batch.kinds)
    sums = (dense * answers).view(groups, -1).sum(1)
    result: list[float] = (sums / answers.view(groups, -1).sum(1).clamp(min=1)).tolist()
    return result


DEFAULT_CPU_MINUTES = 17.0
# Without a bound, oneDNN keeps a compiled primitive for every shape of batch it ever saw.
PRIMITIVE_CACHE = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def build(out: Path, *, cpu_minutes: float, seed: int) -> None:
    """Train tokenizer and model within a budget of processor time, and write them to `out`."""
    os.environ.setdefault(*PRIMITIVE_CACHE)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    corpus = load_corpus()
    tokenizer = train_tokenizer(corpus, seed=seed)
    training_corpus, _ = split_corpus(corpus)
    queries = QuerySource(training_corpus, forbidden=recipe_queries(), seed=seed + 1)
    network = Network(Shape(vocabulary=len(tokenizer)))
    _report(f"{len(list(corpus.lines()))} texts, {len(tokenizer)} tokens; training starts")
    steps = train(
        network,
        BatchSource(tokenizer, queries, seed=seed + 2),
        cpu_seconds=cpu_minutes * 60 - time.process_time(),
        report=_report,
    )
    _report(f"trained {steps} steps in {time.process_time() / 60:.1f} CPU minutes in all")
    save(network, tokenizer, out)


def save(network: Network, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a model folder that transformers loads; each file appears complete or not at all."""
    model = as_transformers(network, tokenizer).half()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            write_file(out / path.name, path.read_bytes())


def as_transformers(network: Network, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return the same model as transformers' own class."""
    shape = network.shape
    settings: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "dtype": "float16",
    }
    untyped: Any = Qwen3ForCausalLM
    model = untyped(Qwen3Config(**settings))
    outcome = model.load_state_dict(network.state_dict(), strict=False)
    if outcome.unexpected_keys or set(outcome.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"expected the parameter names of Qwen3, found {outcome}: rename ours")
    model.tie_weights()
    return model.eval()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="train, write the model here, then evaluate it")
    target.add_argument("--evaluate", type=Path, help="only evaluate the model in this folder")
    parser.add_argument("--cpu-minutes", type=float, default=DEFAULT_CPU_MINUTES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--student", action="store_true", help="also distil a LoRA student")
    parser.add_argument("--json", type=Path, help="write the evaluation's numbers here")
    arguments = parser.parse_args()
    if arguments.out:
        build(arguments.out, cpu_minutes=arguments.cpu_minutes, seed=arguments.seed)
    torch.set_num_threads(1)
    results = evaluate(arguments.out or arguments.evaluate, student=arguments.student)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def _report(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


if __name__ == "__main__":
    main()
