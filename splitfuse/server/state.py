"""Holds what all routes of a server share, and reads bodies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from splitfuse.config.server import ServerConfig
from splitfuse.engine.client import EngineState
from splitfuse.errors import EngineUnavailableError, brief
from splitfuse.server.access_log import RequestLog
from splitfuse.server.admission import Admission
from splitfuse.server.bodies import FREE_BYTES, decoded_size
from splitfuse.server.console.store import ConsoleStore
from splitfuse.server.context import RequestContext
from splitfuse.server.errors import RefusedError
from splitfuse.server.explain import Explanations
from splitfuse.server.metrics import Metrics
from splitfuse.server.store import AnswerStore
from splitfuse.server.trace_feed import TraceFeed
from splitfuse.server.traces import TraceHub
from splitfuse.server.validation import Body, SchemaBounds, decode
from splitfuse.text.service import TextService
from splitfuse.text.token_text import TokenPieces

LARGE_BODY = 65536
"""Bytes from which on a body is decoded and converted off the event loop, which it would hold up."""

_Body = TypeVar("_Body", bound=Body)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class AppState:
    """Holds what all routes of a server share."""

    service: TextService
    config: ServerConfig
    admission: Admission
    metrics: Metrics
    log: RequestLog
    started: int
    """Unix time."""
    store: AnswerStore
    traces: TraceHub
    console: ConsoleStore | None = None
    """Frames for consoles; None: the server has no console."""
    explanations: Explanations = field(default_factory=Explanations)

    def release(self, context: RequestContext) -> None:
        """Give back what a request held: the memory of its body, and its adapter."""
        if context.adapter:
            self.service.client.let_go_adapter(context.adapter)
        self.admission.bodies.release(context.held)
        if context.held > FREE_BYTES:
            self.service.give_back_memory()

    @property
    def model(self) -> str:
        """Return the name by which requests call the model. Raises EngineUnavailableError if that is an engine's,
        and none was ever ready.
        """
        return self.config.served_model_name or self.service.client.info.model

    def fingerprint(self, adapter: str) -> str:
        """Return a name of all that decides what a seed gives, with the adapter of a digest if there is one. Raises
        EngineUnavailableError as `model`.
        """
        name = f"fp_{self.service.client.info.fingerprint}"
        return f"{name}-{adapter[:12]}" if adapter else name

    @cached_property
    def pieces(self) -> TokenPieces:
        """Return the texts of single tokens."""
        return TokenPieces(self.service.tokenizer)

    @cached_property
    def trace_feed(self) -> TraceFeed:
        """Return the feed of all clients that read traces."""
        return TraceFeed(self.traces)

    @property
    def stage(self) -> tuple[str, float]:
        """Return `ready` if requests are accepted, else what the server waits for, and the fraction that is done."""
        client = self.service.client
        if self.admission.draining:
            return "draining", 0.0
        is_ready = client.state is EngineState.READY
        if is_ready and not self.service.is_starting:
            return "ready", 1.0
        stage = client.stage
        if stage.stage != "ready":  # of a replica that has not started yet, even if another has
            return stage.stage, stage.fraction
        return (EngineState.STARTING if is_ready else client.state).value, 0.0

    @property
    def schema_bounds(self) -> SchemaBounds:
        """Return the bounds for the OpenAPI document."""
        try:
            model, limits = self.model, self.service.client.info.limits
        except EngineUnavailableError:  # not ready yet
            return SchemaBounds(self.config.max_prompts)
        return SchemaBounds(self.config.max_prompts, model, limits.vocab_size, limits.max_model_len)

    def check_model(self, name: str, *, parameter: str | None = None) -> str:
        """Return the digest of the LoRA adapter that has the name, or nothing if it is that of the model. Raises
        RefusedError (404) if it is neither, EngineUnavailableError while the adapter is being loaded.
        """
        if name == self.model:
            return ""
        adapters = self.service.client.adapters
        if name not in adapters:
            self.service.client.check_not_loading(name)
            known = ", ".join(map(repr, (self.model, *adapters)))
            raise RefusedError(
                404,
                f"there is no model {name!r:.200} here; this server has {known:.2000}",
                code="model_not_found",
                parameter=parameter,
            )
        return adapters[name]

    async def read(self, context: RequestContext, kind: type[_Body]) -> _Body:
        """Return the request in a body. Raises RefusedError, ClientGoneError, and EngineUnavailableError if no engine
        is ready.
        """
        _check_content_type(context)
        limit = int(self.config.max_body_mib * 2**20)
        body = await context.body(limit, self.admission.bodies, timeout=self.config.client_timeout)
        if len(body) < LARGE_BODY:
            request = decode(kind, body)
        else:
            size = await self.service.off_loop(lambda: decoded_size(body))
            context.held = self.admission.bodies.hold(size, held=context.held)
            request = await self.service.off_loop(lambda: decode(kind, body))
        if self.service.client.state is not EngineState.READY or self.service.is_starting:
            raise EngineUnavailableError(f"no engine is ready: {self.stage[0]}; /ready says when one is")
        if (model := getattr(request, "model", None)) is not None:
            context.adapter = self.check_model(model, parameter="model")
            if context.adapter:
                self.service.client.hold_adapter(context.adapter)
        return request

    async def convert(self, context: RequestContext, work: Callable[[], _Result]) -> _Result:
        """Return the result of work on the body of a request, off the event loop if the body is a large one."""
        return await self.service.off_loop(work) if context.held else work()  # it holds what is above FREE_BYTES


def _check_content_type(context: RequestContext) -> None:
    """Refuse what a web page can send to any server without asking it first, all but bodies declared as JSON, and
    bodies that are compressed.
    """
    coding = context.headers.get(b"content-encoding", b"identity").decode("latin-1")
    if coding.lower() != "identity":
        message = f"the body has the Content-Encoding {brief(coding)}: send it plain, as identity"
        raise RefusedError(415, message, code="no_json")
    sent = context.headers.get(b"content-type")
    if sent is None and b"origin" not in context.headers:
        return
    if (sent or b"").partition(b";")[0].strip().lower() != b"application/json":
        raise RefusedError(415, "send JSON, with the header Content-Type: application/json", code="no_json")
