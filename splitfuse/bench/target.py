"""What is driven: anything that takes a request and says when each token of its answer came. And our own engine so.

Knows nothing of loads. The other one, an endpoint over HTTP, is in endpoint.py.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitfuse.bench.workload import UNLIMITED, LoadRequest, Prompt, TokenIds, Vocabulary
from splitfuse.config import EngineConfig
from splitfuse.core.baselines import scheduler_class
from splitfuse.core.request import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduler import Scheduler
from splitfuse.engine.client import AsyncEngine, EngineClient, EngineState
from splitfuse.engine.messages import Add
from splitfuse.errors import ConfigError, ServerError, SplitfuseError
from splitfuse.runtime.environment import resident_bytes


@dataclass(frozen=True)
class Answer:
    """What one request gave. Times are those of the event loop: of `time.monotonic`, unless it is a virtual one."""

    num_prompt_tokens: int
    token_times: tuple[float, ...] = ()
    tokens: Prompt = ()
    """The answer itself, as it may stand in a later prompt."""
    error: str | None = None


class Target(ABC):
    """Something that answers. Open it with `start`, close it with `close`, in one event loop."""

    vocabulary: Vocabulary
    """What prompts are made of."""
    answer_vocabulary: Vocabulary
    """The same for prompts that hold answers to earlier ones: of the kind that answers come in."""
    room: int = UNLIMITED
    """Tokens of prompt and answer together that it takes, as far as it says."""
    about: dict[str, Any]
    """What is known of it once it has started, for the record: startup_seconds and settings among it."""

    @abstractmethod
    async def start(self) -> None:
        """Be ready to answer. Raises a SplitfuseError that says why it cannot be."""

    @abstractmethod
    async def ask(self, request: LoadRequest) -> Answer:
        """Greedily `request.max_tokens` tokens. Fewer are an error, unless ends of texts are heeded; an error of this
        request is in the answer. Raises ServerError if there is nobody left to ask.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let go of it."""

    def resident_bytes(self) -> int | None:
        """Memory of its processes now, shared pages counted once; None if they are not known."""
        return None


class EngineTarget(Target):
    """Our engine: in a thread of this process, or with several replicas each in a process of its own.

    `settings` are those of EngineConfig by name; `policy` says how steps are composed (core/baselines.py).
    """

    def __init__(
        self, settings: Mapping[str, Any], *, policy: str = "splitfuse", replicas: int = 1, ignore_eos: bool = True
    ) -> None:
        config = EngineConfig.from_settings(settings)
        self._policy, self._scheduler = policy, scheduler_class(policy, config.scheduler)
        if replicas > 1 and self._scheduler is not Scheduler:
            raise ConfigError(f"the policy {policy} is for one engine in this process, not for {replicas} replicas")
        if replicas < 1:
            raise ConfigError(f"there must be at least one replica, not {replicas}")
        self._settings, self._replicas, self._ignore_eos = dict(settings), replicas, ignore_eos
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
            "engine": self._settings,
            "policy": self._policy,
            "memory_plan": info.memory_plan,
            "token_times": "the engine's outputs",
        }

    def _make_client(self) -> EngineClient:
        if self._replicas > 1:
            from splitfuse.engine.replicas import make_replicas

            return make_replicas(self._settings, replicas=self._replicas)
        from splitfuse.engine.engine import Engine

        return AsyncEngine(Engine.load(EngineConfig.from_settings(self._settings), scheduler=self._scheduler))

    async def ask(self, request: LoadRequest) -> Answer:
        assert self._client is not None
        if isinstance(request.prompt, str):
            raise ConfigError(
                "the trace has prompts as text, and the engine alone takes token ids: serve it, and give --url"
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
                        error = output.error or "it was ended"
        except SplitfuseError as failure:
            if self._client.state is EngineState.DEAD:
                raise ServerError(f"the engine is gone: {failure}") from failure
            error = str(failure)
        return Answer(len(request.prompt), tuple(times), tuple(tokens), error)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    def resident_bytes(self) -> int | None:
        return resident_bytes()
