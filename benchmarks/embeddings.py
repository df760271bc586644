"""Embeddings of texts a second, in turns with transformers and sentence-transformers, and how near to fp32 they are.

    python -m benchmarks.embeddings FOLDER [--texts N] [--words N] [--turns N] [FLAGS]

FOLDER holds an encoder or a decoder. The others compute in the dtype that FLAGS name, or in that of the folder.
transformers gets token ids sorted by length and padded, 32 texts at a time, as sentence-transformers does it; the
latter, measured for encoders where it is installed, gets texts, as we do. Texts are made of words of
docs/architecture.md, N on average. The cosine is that with transformers in fp32, text by text. Engine FLAGS as
--name=value. Wants a quiet machine: time is that of the clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import median

import torch
from torch import Tensor
from transformers import AutoModel

import splitfuse
from splitfuse.models.encoder.spec import EncoderSpec

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--words", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5)
    arguments, flags = parser.parse_known_args()
    named = dict(flag.removeprefix("--").replace("-", "_").split("=", 1) for flag in flags)
    settings = {name: int(value) if value.isdigit() else value for name, value in named.items()}
    dtype = named.get("dtype", "auto")
    pipe = splitfuse.pipeline(arguments.folder, **settings)
    print(str(pipe.engine.model.plan).splitlines()[0])
    texts = make_texts(arguments.texts, arguments.words)
    ids = [pipe.tokenizer.encode(text) for text in texts]
    spec = pipe.engine.model.spec
    pooling = spec.pooling if isinstance(spec, EncoderSpec) else "last"
    peer = transformers(arguments.folder, ids, pooling, dtype=dtype)
    exact = transformers(arguments.folder, ids, pooling, batch=1, dtype=torch.float32)()
    print(f"{len(ids)} texts, {sum(map(len, ids))} tokens; cosine with fp32:")
    for whose, found in (("ours", torch.tensor(pipe.embed(ids))), ("transformers", peer())):
        cosines = torch.cosine_similarity(found, exact)
        print(f"{whose}: at least {cosines.min():.7f}, median {cosines.median():.7f}")
    works: dict[str, Callable[[], object]] = {"splitfuse": lambda: pipe.embed(texts), "transformers": peer}
    if isinstance(spec, EncoderSpec) and find_spec("sentence_transformers"):
        works["sentence-transformers"] = sentence_transformers(arguments.folder, texts, dtype)
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(arguments.turns + 1):  # the first turn warms up
        for name, work in works.items():
            rates[name].append(rate(work, len(ids)))
    print("\n| | texts/s | ratio |\n|---|---|---|")
    for name, each in rates.items():
        ratio = median(ours / theirs for ours, theirs in zip(rates["splitfuse"][1:], each[1:], strict=True))
        print(f"| {name} | {median(each[1:]):.0f} | {ratio:.2f} |")


def make_texts(count: int, words: int) -> list[str]:
    """Return texts of half to one and a half as many words."""
    rng = Random(1)
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    source = [word for word in page.split() if word.isalpha()]
    starts = [rng.randrange(len(source) - 2 * words) for _ in range(count)]
    return [" ".join(source[start : start + rng.randint(words // 2, words * 3 // 2)]) for start in starts]


def transformers(
    folder: Path, ids: Sequence[Sequence[int]], pooling: str, *, batch: int = BATCH, dtype: torch.dtype | str = "auto"
) -> Callable[[], Tensor]:
    """Return a function that gives the embeddings of the texts by transformers, `batch` texts at a time."""
    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))

    @torch.inference_mode()
    def embed() -> Tensor:
        found: list[Tensor] = [torch.empty(0)] * len(ids)
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            width = len(ids[part[0]])
            tokens, mask = torch.zeros(2, len(part), width, dtype=torch.long)
            for row, index in enumerate(part):
                length = len(ids[index])
                place = slice(width - length, width) if pooling == "last" else slice(0, length)
                tokens[row, place], mask[row, place] = torch.tensor(ids[index]), 1
            hidden = model(tokens, attention_mask=mask).last_hidden_state.float()
            match pooling:
                case "last":
                    rows = hidden[:, -1]
                case "cls":
                    rows = hidden[:, 0]
                case _:
                    rows = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
            for row, index in zip(rows, part, strict=True):
                found[index] = row
        return torch.stack(found)

    return embed


def sentence_transformers(folder: Path, texts: Sequence[str], dtype: str) -> Callable[[], object]:
    """Return a function that gives the embeddings of the texts by sentence-transformers."""
    model = import_module("sentence_transformers").SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"dtype": dtype}
    )
    return lambda: model.encode(texts, batch_size=BATCH)


def rate(work: Callable[[], object], count: int) -> float:
    """Return how many texts `work` computes in a second."""
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
