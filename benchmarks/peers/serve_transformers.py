"""transformers' continuous batching behind HTTP. Run by the interpreter of its own environment.

    python -m benchmarks.peers.serve_transformers '{"model": DIR, "settings": {...}, "threads": 2, "host": ...}'

`transformers serve` would take text only, and stop at the EOS token. Settings are fields of `ContinuousBatchingConfig`,
and `attn_implementation`.
"""

from __future__ import annotations

import sys

if {"-h", "--help"} & set(sys.argv):  # before the imports of a peer that may not be installed
    raise SystemExit(print(__doc__))

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from benchmarks.peers.completions_server import Tokens, serve

PAGE_TOKENS = 256
DEFAULTS = {"page_size": PAGE_TOKENS, "num_blocks": 40_960 // PAGE_TOKENS, "allow_block_sharing": False}
"""Cache size as for llama.cpp (by default it takes 0.6 of the memory); no prefix cache, as for the others."""
TOLD = (
    "page_size",
    "num_blocks",
    "max_batch_tokens",
    "max_requests_per_batch",
    "scheduler_type",
    "allow_block_sharing",
)
NO_END = -1


class TransformersEngine:
    """A `ContinuousBatchingManager`, which runs in a thread of its own."""

    def __init__(self, model: str, settings: Mapping[str, Any], threads: int) -> None:
        """Load the model in bf16. Raises ValueError for an unknown setting."""
        torch.set_num_threads(threads)
        options = {**DEFAULTS, **settings}
        attention = options.pop("attn_implementation", "sdpa")
        known = {field.name for field in fields(ContinuousBatchingConfig)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(sorted(known | {'attn_implementation'}))}")
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation=attention)
        self._manager = network.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig(**options))
        self._manager.warmup()
        resolved = self._manager.continuous_batching_config
        self.facts = {
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "attn_implementation": network.config._attn_implementation,
            "dtype": str(network.dtype),
            "threads": torch.get_num_threads(),
            **{name: getattr(resolved, name) for name in TOLD},
        }
        self.room = int(network.config.max_position_embeddings)
        self._numbers = 0

    async def generate(self, prompt: Tokens, max_tokens: int, *, ignore_eos: bool) -> AsyncGenerator[Tokens, None]:
        """Implement `TokenEngine`."""
        name, self._numbers = str(self._numbers), self._numbers + 1
        outputs: asyncio.Queue[GenerationOutput] = asyncio.Queue()
        self._manager.register_result_handler(name, outputs.put_nowait)
        self._manager.add_request(
            prompt,
            request_id=name,
            max_new_tokens=max_tokens,
            streaming=True,
            eos_token_id=NO_END if ignore_eos else None,
        )
        num_seen, output = 0, None
        try:
            while output is None or not output.is_finished():
                output = await outputs.get()  # it has all tokens so far
                if output.error is not None:
                    raise RuntimeError(output.error)
                if tokens := output.generated_tokens[num_seen:]:
                    num_seen += len(tokens)
                    yield tokens
        finally:
            if output is None or not output.is_finished():
                self._manager.cancel_request(name)

    async def run(self) -> None:
        """Implement `TokenEngine`."""
        self._manager.start()
        while self._manager.is_running():
            await asyncio.sleep(1)
        raise RuntimeError("transformers' generation thread has ended")


def main() -> None:
    arguments = json.loads(sys.argv[1])
    engine = TransformersEngine(arguments["model"], arguments["settings"], arguments["threads"])
    asyncio.run(serve(engine, arguments["host"], arguments["port"]))


if __name__ == "__main__":
    main()
