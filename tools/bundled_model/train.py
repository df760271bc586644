"""Train the bundled model from nothing: `python tools/bundled_model/train.py --out DIR` (an hour on two cores).

Short passages first, long ones later; each passage is followed by several questions and their answers, so that most
of what the network is graded on is reading. Deterministic for a seed and a thread count; stop it at any time and the
same command resumes from the last checkpoint (safetensors, in `DIR/checkpoint`). At the end `DIR` is a Hugging Face
folder.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from network import Llama
from safetensors.torch import load_file, save_file
from stories import ANSWERS, NAMES, Story, make_story
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

BOS, SYSTEM, USER, ASSISTANT, END, PAD = SPECIAL_TOKENS = (
    "<|bos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|pad|>",
)

CHAT_TEMPLATE = (
    "<|bos|>{% if tools %}"
    "{{ '<|system|>You may call these tools:\\n<tools>\\n' }}"
    "{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}"
    "{{ '</tools>\\nA call is written so:\\n<tool_call>\\n' }}"
    '{{ \'{"name": <name>, "arguments": <object>}\\n</tool_call><|end|>\' }}'
    "{% endif %}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('the roles of this model are system, user, assistant and tool, not ' + message['role']) }}"
    "{% endif %}{% if message['role'] == 'tool' %}"
    "{{ '<|user|><tool_response>\\n' + message['content'] + '\\n</tool_response><|end|>' }}"
    "{% elif message['tool_calls'] %}"
    "{{ '<|assistant|>' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] %}"
    "{{ '\\n' if message['content'] or not loop.first }}"
    "{{ '<tool_call>\\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "{{ '\\n</tool_call>' }}{% endfor %}<|end|>"
    "{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Template of conversations; tools and calls are written as Hermes models do."""
RECITE = "Tell me what you have read."
SYSTEM_PROMPTS = ("Answer from the story.", "You are a careful reader.", "Read the story and answer in one sentence.")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 3072,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Stage:
    """`steps` batches of `rows` documents of exactly `length` tokens, their passages of `shortest` to `longest` tokens.

    `recited` is the share of turns that repeat the passage's facts instead of asking: many facts a document, which is
    what makes the first steps of learning to look things up quick.
    """

    steps: int
    rows: int
    length: int
    shortest: int
    longest: int
    recited: float
    variety: float
    guidance: float


STAGES = (
    Stage(steps=350, rows=32, length=192, shortest=16, longest=64, recited=0.5, variety=0.0, guidance=1.0),
    Stage(steps=400, rows=32, length=192, shortest=16, longest=80, recited=0.2, variety=0.7, guidance=0.5),
    Stage(steps=400, rows=24, length=320, shortest=30, longest=180, recited=0.1, variety=1.0, guidance=0.2),
    Stage(steps=350, rows=16, length=576, shortest=40, longest=420, recited=0.1, variety=1.0, guidance=0.1),
    Stage(steps=550, rows=8, length=1280, shortest=50, longest=1080, recited=0.1, variety=1.0, guidance=0.1),
)
TOTAL_STEPS = sum(stage.steps for stage in STAGES)
GRADED_SHARE = 0.5  # of the positions of a batch: every answer, and as much of the rest as fits
BINDING_LAYER, LOOKING_LAYER = 0, 2  # whose first heads are guided
PERSONS = frozenset(NAMES)
VALUES = ANSWERS - PERSONS
TEXT_WEIGHT = 0.03  # of a token of the story against a token of an answer


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over generated stories; the token <|bos|> goes before every plain text, as with Llama."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> list[str]:
        stories = [make_story(Random(f"tokenizer-{i}"), 200, word_count) for i in range(6000)]
        return [
            text
            for s in stories
            for text in (s.passage, *(q.text for q in s.questions), *(q.answer for q in s.questions))
        ]

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def word_count(text: str) -> float:
    """Estimate the number of tokens of a sentence."""
    return 1.15 * len(text.split()) + 1.0


@dataclass(frozen=True)
class Document:
    """One conversation about one passage, cut at `length + 1` tokens. Each list has an entry a token.

    `graded` says whether a token can be known from what comes before. Reading takes two looks, each -1 where there is
    none: `binds_to[i]` is where token i finds the subject (a value of the passage its person; the token
    before the word that was asked for, the other word of the fact), and `looks_at[i]` is the value in the passage
    that decides what follows token i.
    """

    ids: list[int]
    graded: list[bool]
    binds_to: list[int]
    looks_at: list[int]


class Piece(NamedTuple):
    """A run of text: whether it can be known, and if so the fact that it is about and the word of it that was asked
    for.
    """

    text: str
    graded: bool = False
    fact: tuple[str, str] | None = None
    key: str = ""


def make_document(tokenizer: Tokenizer, rng: Random, stage: Stage) -> Document:
    longest = rng.randint(stage.shortest, stage.longest)
    story = make_story(rng, longest, word_count, variety=stage.variety)
    pieces = [Piece(BOS)]
    if rng.random() < 0.1:
        pieces.append(Piece(SYSTEM + rng.choice(SYSTEM_PROMPTS) + END))
    passage_piece = len(pieces)
    pieces.append(Piece(USER + story.passage + "\n\n"))
    while sum(word_count(piece.text) for piece in pieces) < 1.5 * stage.length:
        pieces += list(recitation(rng, story) if rng.random() < stage.recited else conversation(rng, story))
    document = Document([], [], [], [])
    values_at: dict[tuple[str, str], int] = {}
    spelled: list[str] = []
    encodings = tokenizer.encode_batch([piece.text for piece in pieces], add_special_tokens=False)
    for number, (encoding, piece) in enumerate(zip(encodings, pieces, strict=True)):
        words = [token.removeprefix("Ġ") for token in encoding.tokens]
        spelled += words
        first = len(document.ids)
        document.ids.extend(encoding.ids)
        document.graded.extend([piece.graded] * len(words))
        document.looks_at.extend([-1] * len(words))
        document.binds_to.extend([-1] * len(words))
        if number == passage_piece:
            person_at = -1
            for i, word in enumerate(words, start=first):
                if word in PERSONS:
                    person_at = i
                elif word in VALUES and person_at >= 0:
                    document.binds_to[i] = person_at
                    values_at[words[person_at - first], word] = i
        elif piece.fact is not None and piece.key in words:
            asking = first + words.index(piece.key) - 1
            document.looks_at[asking] = values_at.get(piece.fact, -1)
            document.binds_to[asking] = max(i for i in range(asking + 1) if spelled[i] in piece.fact)
    assert len(document.ids) > stage.length
    return Document(*(getattr(document, name)[: stage.length + 1] for name in Document.__dataclass_fields__))


def conversation(rng: Random, story: Story) -> Iterator[Piece]:
    """Return questions and answers; the first question completes the turn with the passage."""
    for question in rng.sample(story.questions, len(story.questions)):
        yield Piece(question.text + END + ASSISTANT)
        yield Piece(question.answer + END, True, question.fact, question.key)
        yield Piece(USER)


def recitation(rng: Random, story: Story) -> Iterator[Piece]:
    """Return every fact once more, in any order: given subject and verb, the rest of the sentence can be known."""
    yield Piece(RECITE + END + ASSISTANT)
    for question in rng.sample(story.questions, len(story.questions)):
        if question.key == question.fact[1]:
            person, verb, rest = question.answer.split(" ", 2)
            yield Piece(f"{person} {verb}")
            yield Piece(f" {rest} ", True, question.fact, question.key)
    yield Piece(END + USER)


class Batch(NamedTuple):
    """Documents as tensors [rows, length + 1]."""

    ids: Tensor
    graded: Tensor
    binds_to: Tensor
    looks_at: Tensor


def make_batch(tokenizer: Tokenizer, stage: Stage, name: str) -> Batch:
    """Return the batch of that name."""
    documents = [make_document(tokenizer, Random(f"{name}-{row}"), stage) for row in range(stage.rows)]
    return Batch(*(torch.tensor([getattr(d, field) for d in documents]) for field in Batch._fields))


def choose_positions(graded: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flat positions [graded share of all] to compute the loss at, and their weights: answers first, then others at
    random.
    """
    flat = graded[:, 1:].flatten().float()
    order = (flat + torch.rand(flat.shape, generator=generator)).argsort(descending=True)
    positions = order[: int(GRADED_SHARE * flat.numel())]
    return positions, TEXT_WEIGHT + (1 - TEXT_WEIGHT) * flat[positions]


def make_loss(model: Llama):
    def loss_of(batch: Batch, positions: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ids = batch.ids
        with torch.autocast("cpu", torch.bfloat16):
            hidden, scores = model.hidden(ids[:, :-1])
            logits = model.head(hidden.flatten(0, 1)[positions])
        losses = F.cross_entropy(logits.float(), ids[:, 1:].flatten()[positions], reduction="none")
        guidance = astray(scores[BINDING_LAYER], batch.binds_to) + astray(scores[LOOKING_LAYER], batch.looks_at)
        return (losses * weights).sum() / weights.sum(), guidance

    return torch.compile(loss_of)


def astray(scores: Tensor, targets: Tensor) -> Tensor:
    """How far a head's attention is from where the reader should look: mean cross-entropy over the targets (supervised
    attention: Liu et al., arXiv 1609.04186). Without it, the two heads that reading takes wait for each other.

    scores [rows, length, length], targets [rows, length + 1], -1 for none.
    """
    length = scores.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    log_attention = scores.float().masked_fill(future, -torch.inf).log_softmax(-1)
    targets = targets[:, :length]
    losses = -log_attention.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    wanted = targets >= 0
    return torch.where(wanted, losses, 0.0).sum() / wanted.sum().clamp(min=1)


@torch.no_grad()
def answered_right(model: Llama, tokenizer: Tokenizer, stage: Stage, batches: int = 4) -> float:
    """Return the fraction of held-out answers whose requested word would be chosen greedily."""
    right = total = 0
    for number in range(batches):
        batch = make_batch(tokenizer, stage, f"held-out-{number}")
        with torch.autocast("cpu", torch.bfloat16):
            hits = model(batch.ids[:, :-1]).argmax(-1) == batch.ids[:, 1:]
        asked = batch.looks_at[:, :-1] >= 0
        right, total = right + int(hits[asked].sum()), total + int(asked.sum())
    return right / max(1, total)


def learning_rate(step: int) -> float:
    """Return the learning rate factor: linear warm-up, flat, then linear to zero over the last 45 %."""
    return min(1.0, (step + 1) / 50, (TOTAL_STEPS - step) / (0.45 * TOTAL_STEPS))


def train(out: Path, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_file = out / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer().save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    torch.manual_seed(seed)
    model = Llama(CONFIG)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "embed" in name]
    optimizers = (
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
    )
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first_step = resume(out, model, optimizers)
    loss_of = make_loss(model)
    started = time.perf_counter()
    stages = [stage for stage in STAGES for _ in range(stage.steps)]
    for step in range(first_step, TOTAL_STEPS):
        stage = stages[step]
        batch = make_batch(tokenizer, stage, f"train-{seed}-{step}")
        positions, weights = choose_positions(batch.graded, torch.Generator().manual_seed(step))
        loss, guidance = loss_of(batch, positions, weights)
        (loss + stage.guidance * guidance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, base in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss is {loss.item()} at step {step}")
        if step % 20 == 0:
            seconds = time.perf_counter() - started
            line = f"step {step}/{TOTAL_STEPS}  loss {loss.item():.3f}  guidance {guidance.item():.3f}  {seconds:.0f} s"
            if step % 100 == 0:
                line += f"  held-out answers right {answered_right(model, tokenizer, stage):.3f}"
            print(line, flush=True)
        if (step + 1) % 200 == 0:
            save_checkpoint(out, model, optimizers, step + 1)
    for stage in STAGES:
        share = answered_right(model, tokenizer, stage, 12)
        print(f"passages of {stage.shortest}-{stage.longest} tokens: right {share:.4f}")
    export(out, model)


def save_checkpoint(out: Path, model: Llama, optimizers: tuple[torch.optim.Optimizer, ...], step: int) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value).clone()
    partial = out / "checkpoint.partial"
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.rename(out / "checkpoint")


def resume(out: Path, model: Llama, optimizers: tuple[torch.optim.Optimizer, ...]) -> int:
    """Load the last checkpoint, if there is one; return the next step."""
    path = out / "checkpoint"
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    for number, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".")
                whole["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(whole)
    print(f"resuming at step {step}")
    return step


def export(out: Path, model: Llama) -> None:
    """Write the Hugging Face folder: weights in bf16, config, generation config, tokenizer with its chat template."""
    ids = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    weights = {f"model.{name}": value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    special = {"bos_token_id": ids[BOS], "eos_token_id": ids[END], "pad_token_id": ids[PAD]}
    files = {
        "config.json": {**CONFIG, **special},
        "generation_config.json": {**special, "eos_token_id": [ids[END], ids[PAD]]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": END,
            "pad_token": PAD,
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.out, arguments.seed)
