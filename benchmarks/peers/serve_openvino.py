"""OpenVINO GenAI's continuous batching behind HTTP. Run by the interpreter of its own environment.

    python -m benchmarks.peers.serve_openvino '{"model": DIR, "settings": {...}, "threads": 2, "host": ...}'

Settings in small letters are fields of `SchedulerConfig`, those in capitals properties of OpenVINO's CPU plugin.
"""

from __future__ import annotations

import sys

if {"-h", "--help"} & set(sys.argv):  # before the imports of a peer that may not be installed
    raise SystemExit(print(__doc__))

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, GenerationStatus, SchedulerConfig

from benchmarks.peers.completions_server import Tokens, serve

LOOP_TURNS = 8
"""Turns of the event loop between two steps: a connection takes six from its arrival to the engine."""
SCHEDULER_FIELDS = (
    "max_num_batched_tokens",
    "dynamic_split_fuse",
    "max_num_seqs",
    "num_kv_blocks",
    "cache_size",
    "enable_prefix_caching",
)
PLUGIN_PROPERTIES = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
"""Properties that decide its precision."""


class OpenVinoEngine:
    """A pipeline that steps in the server's own thread: a step holds Python's lock, so threads gain nothing."""

    def __init__(self, model: Path, settings: Mapping[str, Any], threads: int) -> None:
        """Load an exported model. Raises ValueError for an unknown setting."""
        scheduler, properties = SchedulerConfig(), {"INFERENCE_NUM_THREADS": threads}
        for name, value in settings.items():
            if name.isupper():
                properties[name] = value
            elif name in SCHEDULER_FIELDS:
                setattr(scheduler, name, value)
            else:
                raise ValueError(f"{name!r} is none of {', '.join(SCHEDULER_FIELDS)}, and no property in capitals")
        self._pipeline = ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        self._answers: dict[int, tuple[Any, asyncio.Queue[Tokens | None]]] = {}
        self._numbers = count()
        self._work = asyncio.Event()
        self._eos_tokens = set(self._pipeline.get_config().stop_token_ids)
        self.facts = {
            "version": f"openvino-genai {openvino_genai.__version__}",
            **{name: getattr(scheduler, name) for name in SCHEDULER_FIELDS},
            **plugin_defaults(),
            **properties,
        }
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        self.room = int(config["max_position_embeddings"])

    async def generate(self, prompt: Tokens, max_tokens: int, *, ignore_eos: bool) -> AsyncGenerator[Tokens, None]:
        """Implement `TokenEngine`."""
        sampling = GenerationConfig(
            max_new_tokens=max_tokens, ignore_eos=ignore_eos, do_sample=False, stop_token_ids=self._eos_tokens
        )
        number = next(self._numbers)
        tensor = openvino.Tensor(np.array([prompt], dtype=np.int64))
        handle = self._pipeline.add_request(number, tensor, sampling)
        pieces: asyncio.Queue[Tokens | None] = asyncio.Queue()
        self._answers[number] = handle, pieces
        self._work.set()
        try:
            while (tokens := await pieces.get()) is not None:
                yield tokens
            if handle.get_status() != GenerationStatus.FINISHED:
                raise RuntimeError(f"OpenVINO ended the request as {handle.get_status().name}")
        finally:
            if self._answers.pop(number, None) is not None:
                handle.cancel()

    async def run(self) -> None:
        """Implement `TokenEngine`."""
        while True:
            await self._work.wait()
            for _ in range(LOOP_TURNS):
                await asyncio.sleep(0)
            if self._pipeline.has_non_finished_requests():
                self._pipeline.step()
                self._hand_out()
            else:
                self._work.clear()

    def _hand_out(self) -> None:
        for number, (handle, pieces) in list(self._answers.items()):
            while handle.can_read():
                (output,) = handle.read().values()
                pieces.put_nowait(list(output.generated_ids))
            if handle.get_status() != GenerationStatus.RUNNING:
                del self._answers[number]
                pieces.put_nowait(None)


def plugin_defaults() -> dict[str, str]:
    """Return the default precision of the CPU plugin on this processor."""
    core = openvino.Core()
    values = {name: core.get_property("CPU", name) for name in PLUGIN_PROPERTIES}
    return {
        name: value.get_type_name() if isinstance(value, openvino.Type) else str(value)
        for name, value in values.items()
    }


def main() -> None:
    arguments = json.loads(sys.argv[1])
    engine = OpenVinoEngine(Path(arguments["model"]), arguments["settings"], arguments["threads"])
    asyncio.run(serve(engine, arguments["host"], arguments["port"]))


if __name__ == "__main__":
    main()
