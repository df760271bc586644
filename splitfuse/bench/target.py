"""Defines the targets of a load: the interface, and our own engine as a target. endpoint.py has the one over HTTP.

A target answers a request with the time at which each token arrived; it knows nothing of loads.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from splitfuse.bench.baselines import make_baseline
from splitfuse.bench.workload import UNLIMITED, LoadRequest, Prompt, TokenIds, Vocabulary
from splitfuse.config.engine import EngineConfig
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.client import EngineClient, EngineState
from splitfuse.engine.messages import Add
from splitfuse.errors import ConfigError, ServerError, SplitfuseError
from splitfuse.runtime.machine import resident_bytes


@dataclass(frozen=True)
class Answer:
    """Holds one answer. Times are those of the event loop: `time.monotonic`, unless its clock is virtual."""

    num_prompt_tokens: int
    token_times: tuple[float, ...] = ()
    tokens: Prompt = ()
    """Generated text or token ids, as a later prompt of the conversation contains them."""
    error: str | None = None


class Target(ABC):
    """Answers requests under load. Call `start`, `ask` and `close` in one event loop."""

    vocabulary: Vocabulary
    """Vocabulary of prompts."""
    answer_vocabulary: Vocabulary
    """Vocabulary of prompts which contain earlier answers: of the kind in which answers arrive."""
    room: int = UNLIMITED
    """Maximum number of tokens of prompt and answer together, if known."""
    about: dict[str, Any]
    """Facts for the record, once it has started: startup_seconds, settings and more."""

    @abstractmethod
    async def start(self) -> None:
        """Make it ready to answer. Raises a SplitfuseError if that fails."""

    @abstractmethod
    async def ask(self, request: LoadRequest) -> Answer:
        """Generate `request.max_tokens` tokens, greedily. Fewer are an error, unless EOS tokens are honoured.

        A failure of this request alone is in the answer. Raises ServerError if the target is gone.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release it."""

    def resident_bytes(self) -> int | None:
        """Return the memory of its processes now, shared pages counted once; None if they are unknown."""
        return None


class EngineTarget(Target):
    """Runs our engine: in a thread of this process, or several replicas, each in a process of its own.

    `policy` is the name of a scheduling policy (bench/baselines.py).
    """

    def __init__(
        self, config: EngineConfig, *, policy: str = "splitfuse", replicas: int = 1, ignore_eos: bool = True
    ) -> None:
        self._policy = policy
        if make_baseline(policy, config.scheduler) is not None and replicas > 1:
            raise ConfigError(f"policy {policy} runs on one engine in this process, not on {replicas} replicas")
        if replicas < 1:
            raise ConfigError(f"--replicas {replicas} must be at least 1")
        self._config, self._replicas, self._ignore_eos = config, replicas, ignore_eos
        self._client: EngineClient | None = None
        self._numbers = itertools.count()
        self.vocabulary = self.answer_vocabulary = TokenIds(0)
        self.about = {}

    async def start(self) -> None:
        began = time.monotonic()
        self._client = self._make_client()
        await self._client.start()
        info = self._client.info
        self.vocabulary = self.answer_vocabulary = TokenIds(info.limits.vocab_size)
        self.room = min(info.limits.max_model_len, info.limits.num_blocks * info.limits.block_size)
        self.about = {
            "startup_seconds": time.monotonic() - began,
            "model": info.model,
            "engine": self._config.settings,
            "policy": self._policy,
            "memory_plan": info.memory_plan,
            "token_times": "the engine's outputs",
        }

    def _make_client(self) -> EngineClient:
        if self._replicas > 1:
            from splitfuse.engine.replicas import make_replicas

            return make_replicas(self._config, replicas=self._replicas)
        from splitfuse.engine.engine import Engine
        from splitfuse.engine.thread import AsyncEngine

        return AsyncEngine(Engine.load(self._config, policy=make_baseline(self._policy, self._config.scheduler)))

    async def ask(self, request: LoadRequest) -> Answer:
        assert self._client is not None
        if isinstance(request.prompt, str):
            raise ConfigError(
                "the trace contains text, but an engine without a server takes token ids: serve it and give --url"
            )
        params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=self._ignore_eos)
        times: list[float] = []
        tokens: list[int] = []
        error = None
        try:
            async with self._client.open(Add(f"load-{next(self._numbers)}", request.prompt, params)) as stream:
                async for output in stream:
                    tokens += output.token_ids
                    times += [time.monotonic()] * len(output.token_ids)
                    if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                        error = output.error or "the request was aborted"
        except SplitfuseError as failure:
            if self._client.state is EngineState.DEAD:
                raise ServerError(f"the engine has died: {failure}") from failure
            error = str(failure)
        return Answer(len(request.prompt), tuple(times), tuple(tokens), error)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    def resident_bytes(self) -> int | None:
        return resident_bytes()
