"""An engine whose steps are recorded to a file, without a server."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitfuse.config.engine import EngineConfig
from splitfuse.core.request_output import RequestOutput
from splitfuse.engine.engine import Engine
from splitfuse.engine.loop import EngineLoop
from splitfuse.engine.trace import TraceLevel
from splitfuse.engine.tracer import EngineTracer
from splitfuse.recording.recorder import Recorder


class RecordedEngine:
    """The engine, its recorder, and the steps of both."""

    def __init__(self, engine: Engine, recorder: Recorder, index: int = 0) -> None:
        self.engine, self.recorder, self._index = engine, recorder, index
        recorder.start_engine(index, EngineLoop(engine, lambda _: None).info)
        self._tracer = EngineTracer(engine)
        self._tracer.level = TraceLevel.PLANS

    def step(self) -> list[RequestOutput]:
        outputs = self.engine.step(isolate=True)
        self.recorder.take(self._index, self._tracer.take())
        return outputs

    def run(self) -> dict[str, list[int]]:
        """The tokens of all unfinished requests from now on."""
        tokens: dict[str, list[int]] = {}
        while self.engine.has_unfinished:
            for output in self.step():
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
        return tokens


SMALL = {"block_size": 4, "num_blocks": 64}
"""Settings of a small cache, for kernels that can have one."""


def config_of(folder: Path | None, **settings: Any) -> EngineConfig:
    model = {} if folder is None else {"model": str(folder)}
    return EngineConfig.from_settings({**model, **settings})


@contextmanager
def recorded(path: Path, config: EngineConfig, *, max_mib: float = 64.0, **how: Any) -> Iterator[RecordedEngine]:
    """An engine that is recorded while the context lasts."""
    recorder = Recorder(path, config, max_mib=max_mib, **how)
    try:
        yield RecordedEngine(Engine.load(config), recorder)
    finally:
        recorder.close("the test ended")
