"""Texts a second of CPU time of embeddings, in turns with transformers on the same texts, and how near the two are.

    OMP_NUM_THREADS=1 python -m benchmarks.embeddings FOLDER [--texts N] [--words N] [--turns N] [FLAGS]

FOLDER holds an encoder or a decoder. transformers gets the texts sorted by length and padded, 32 at a time, as
sentence-transformers does it, in the dtype of the folder. Texts are made of words of docs/architecture.md, N on
average. Time is that of the CPU, to which other work on the machine does not count: with one thread, that of one core.
The cosine is that with transformers in fp32, text by text. Engine FLAGS as --name=value.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
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
    settings = dict(flag.removeprefix("--").replace("-", "_").split("=", 1) for flag in flags)
    pipe = splitfuse.pipeline(arguments.folder, **settings)
    print(str(pipe.engine.model.plan).splitlines()[0])
    texts = make_texts(arguments.texts, arguments.words)
    ids = [pipe.tokenizer.encode(text) for text in texts]
    spec = pipe.engine.model.spec
    pooling = spec.pooling if isinstance(spec, EncoderSpec) else "last"
    peer = transformers(arguments.folder, ids, pooling)
    exact = transformers(arguments.folder, ids, pooling, batch=1, dtype=torch.float32)()
    near = [float(torch.cosine_similarity(each, exact).min()) for each in (torch.tensor(pipe.embed(ids)), peer())]
    print(f"{len(ids)} texts, {sum(map(len, ids))} tokens")
    print(f"cosine with fp32 at least {near[0]:.7f}, of transformers in the folder's dtype {near[1]:.7f}")
    rates = [(rate(lambda: pipe.embed(ids), len(ids)), rate(peer, len(ids))) for _ in range(arguments.turns)]
    print("\n| texts/s | transformers | ratio |\n|---|---|---|")
    ratio = median(ours / theirs for ours, theirs in rates)
    print(f"| {max(r[0] for r in rates):.0f} | {max(r[1] for r in rates):.0f} | {ratio:.2f} |")


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


def rate(work: Callable[[], object], count: int) -> float:
    """Return how many texts `work` computes in a second of CPU time."""
    began = time.process_time()
    work()
    return count / (time.process_time() - began)


if __name__ == "__main__":
    main()
