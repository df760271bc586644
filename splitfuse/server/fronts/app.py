"""Makes the application of a front: it generates text by itself, and passes all other requests on.

What generates most of a server's work is the text of answers: reading requests, and writing a little for each token.
That is done here, with the engines, limits and records of the server's process.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from splitfuse.config.server import ServerConfig
from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.errors import InvalidRequestError, TokenizerError
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.sources.gguf.model import GgufModel
from splitfuse.models.sources.source import ModelSource
from splitfuse.server.access_log import RequestLog, RequestRecord
from splitfuse.server.admission import Admission
from splitfuse.server.anthropic import endpoints as anthropic
from splitfuse.server.app import app_of
from splitfuse.server.auth import ApiKeys
from splitfuse.server.context import RequestContext
from splitfuse.server.errors import RefusedError
from splitfuse.server.explain import Explanations, breakdown_of
from splitfuse.server.fronts.engines import ServerEngines
from splitfuse.server.fronts.messages import (
    LARGEST,
    Admit,
    Admitted,
    Began,
    Channel,
    Ended,
    Found,
    FromFront,
    Generate,
    Keep,
    Kept,
    Look,
    Release,
    ToFront,
    TokenizerFiles,
)
from splitfuse.server.listen import App, Receive, Scope, Send
from splitfuse.server.metrics import Metrics
from splitfuse.server.openai import endpoints as openai
from splitfuse.server.responses import endpoints as responses
from splitfuse.server.state import AppState
from splitfuse.server.store import AnswerStore, StoredAnswer
from splitfuse.server.traces import TraceHub
from splitfuse.text.service import TextService
from splitfuse.text.tokenizer import Tokenizer

ROUTES = tuple(
    route
    for route in (*openai.ROUTES, *anthropic.ROUTES, *responses.ROUTES)
    if route.handler in (openai.completions, anthropic.messages, responses.respond)
)
"""Routes that a front serves by itself."""
_PATHS = frozenset(route.path for route in ROUTES)

_logger = logging.getLogger(__name__)


class FrontApp:
    """Implements the ASGI application of a front: what it does not serve by itself, or not yet, `relay` passes on."""

    def __init__(self, channel: Channel[ToFront, FromFront], relay: App) -> None:
        self._channel, self._relay = channel, relay
        self._own: App | None = None
        self.engines = ServerEngines(channel)
        self.admission: ServerAdmission | None = None
        self.store: ServerStore | None = None
        self._service: TextService | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        is_own = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in _PATHS
        if self._own is None or not is_own:
            await self._relay(scope, receive, send)
            return
        assert self.store is not None
        await self._own(scope, receive, self.store.sender(send))

    @property
    def num_text_restarts(self) -> int:
        """Return how many processes for texts were ended at a limit, or killed by others."""
        return 0 if self._service is None else self._service.num_ended_processes

    async def begin(self, config: ServerConfig, generate: Generate, tokenizer: Tokenizer) -> None:
        """Generate text from now on. Raises TokenizerError for a chat template that does not compile."""
        self._service = TextService(self.engines, tokenizer)
        self.admission, self.store = ServerAdmission(config, self._channel), ServerStore(config, self._channel)
        state = AppState(
            self._service,
            config,
            self.admission,
            Metrics(self.engines, model_name=config.served_model_name),  # which no route here shows
            RequestLog(lambda _: None, log_prompts=False),
            generate.started,
            self.store,
            TraceHub(),
            explanations=_ServerExplanations(self._channel),
        )
        keys = ApiKeys.restored(generate.secret, generate.owners)
        note = partial(_note_end, self._channel, log_prompts=config.log_prompts)
        own = app_of(state, keys, routes=ROUTES, note_end=note)
        await self._service.start()
        self._own = own

    def close(self) -> None:
        """End the processes for texts."""
        if self._service is not None:
            self._service.close()

    def take(self, message: Admitted | Kept | Found) -> None:
        """Take in an answer of the server's process."""
        if isinstance(message, Admitted) and self.admission is not None:
            self.admission.take(message)
        elif isinstance(message, Kept | Found) and self.store is not None:
            self.store.take(message)


def load_tokenizer(files: TokenizerFiles) -> Tokenizer:
    """Return the tokenizer that the server's process has. Takes a second. Raises TokenizerError if its files say
    something else than they did when the server started.
    """
    path = Path(files.path)
    source: ModelSource = GgufModel(path) if path.is_file() else ModelFolder(path)
    if source.digest(weights=False) != files.digest:
        raise TokenizerError(f"{path} is gone, or its tokenizer is another one than when the server started")
    return Tokenizer.from_source(source)


class ServerAdmission(Admission):
    """Asks the server's process for admission; only the memory of bodies is counted here."""

    def __init__(self, config: ServerConfig, channel: Channel[ToFront, FromFront]) -> None:
        super().__init__(config)
        self._channel = channel
        self._asked: dict[int, asyncio.Future[Admitted]] = {}
        self._num_asked = 0

    async def reserve(self, num_tokens: int, num_requests: int = 1, *, num_logprobs: int = 0) -> Callable[[], None]:
        """See Admission."""
        self._num_asked += 1
        number = self._num_asked
        self._asked[number] = asyncio.get_running_loop().create_future()
        self._channel.send(Admit(number, num_tokens, num_requests, num_logprobs))
        try:
            answer = await self._asked[number]
        except asyncio.CancelledError:
            self._channel.send(Release(number))
            raise
        finally:
            del self._asked[number]
        if answer.failure is not None:
            raise answer.failure.error
        return partial(self._channel.send, Release(number))

    def take(self, message: Admitted) -> None:
        """Take in an answer."""
        asked = self._asked.get(message.number)
        if asked is not None and not asked.done():
            asked.set_result(message)


_Unsent = deque[tuple[str | None, str, StoredAnswer]]
_unsent: ContextVar[_Unsent] = ContextVar("answers that the current request keeps, which were not sent yet")


class ServerStore(AnswerStore):
    """Lets the server's process keep answers: they are there for all fronts before their clients can ask for them."""

    def __init__(self, config: ServerConfig, channel: Channel[ToFront, FromFront]) -> None:
        super().__init__(max_answers=config.max_stored_responses, max_bytes=int(config.max_stored_mib * 2**20))
        self._channel = channel
        self._kept: dict[int, asyncio.Future[None]] = {}
        self._looks: dict[int, asyncio.Future[Found]] = {}
        self._num_sent = 0
        self._loop = asyncio.get_running_loop()

    def put(self, owner: str | None, answer_id: str, answer: StoredAnswer) -> None:
        """See AnswerStore. Any thread may call it that works for a request."""
        if self.has_room_for(answer) and answer.size < LARGEST:
            _unsent.get().append((owner, answer_id, answer))

    def find(
        self, owner: str | None, answer_id: str, *, parameter: str | None = None, kind: str = "response"
    ) -> StoredAnswer:
        """See AnswerStore. A thread calls it, not the event loop's."""
        return self._look(owner, answer_id, kind, with_previous=False, parameter=parameter)[0]

    def chain(self, owner: str | None, answer_id: str, *, parameter: str) -> list[StoredAnswer]:
        """See AnswerStore. A thread calls it, not the event loop's. Raises InvalidRequestError if the answers together
        are too large for the channel.
        """
        return self._look(owner, answer_id, "response", with_previous=True, parameter=parameter)

    def _look(
        self, owner: str | None, answer_id: str, kind: str, *, with_previous: bool, parameter: str | None
    ) -> list[StoredAnswer]:
        async def ask() -> Found:
            self._num_sent += 1
            number = self._num_sent
            found: asyncio.Future[Found] = self._loop.create_future()
            self._looks[number] = found
            self._channel.send(Look(number, owner, answer_id, kind, with_previous))
            return await found

        answer = asyncio.run_coroutine_threadsafe(ask(), self._loop).result()
        if answer.failure is not None:
            if answer.failure.kind == InvalidRequestError.__name__:
                raise InvalidRequestError(answer.failure.message, parameter=parameter)
            raise RefusedError(404, answer.failure.message, code="answer_not_found", parameter=parameter)
        return answer.answers

    def sender(self, send: Send) -> Send:
        """Return what sends the parts of an answer to the request that the current task serves: each after what that
        request keeps has been kept.
        """
        unsent: _Unsent = deque()
        _unsent.set(unsent)
        return partial(self._send_after, unsent, send)

    async def _send_after(self, unsent: _Unsent, send: Send, message: MutableMapping[str, Any]) -> None:
        kept: list[asyncio.Future[None]] = []
        while unsent:
            self._num_sent += 1
            kept.append(self._loop.create_future())
            self._kept[self._num_sent] = kept[-1]
            self._channel.send(Keep(self._num_sent, *unsent.popleft()))
        if kept:
            await asyncio.wait(kept)
        await send(message)

    def take(self, message: Kept | Found) -> None:
        """Take in an answer."""
        if isinstance(message, Found):
            self._looks.pop(message.number).set_result(message)
        else:
            self._kept.pop(message.number).set_result(None)


class _ServerExplanations(Explanations):
    """Tells the server's process of requests that go to the engines."""

    def __init__(self, channel: Channel[ToFront, FromFront]) -> None:
        super().__init__()
        self._channel = channel

    def begin(self, context: RequestContext) -> None:
        """See Explanations."""
        route = context.scope["path"]
        self._channel.send(Began(context.unique_id, context.request_id, route, context.owner.name, context.arrival))


def _note_end(
    channel: Channel[ToFront, FromFront],
    context: RequestContext,
    record: RequestRecord,
    ended: float,
    *,
    refused: str,
    is_logged: bool,
    log_prompts: bool,
) -> None:
    """Report an end to the server's process, once the engine has told where the time went."""
    assert is_logged, "what generates is logged"
    texts = json.dumps({"prompt": context.prompt, "text": context.text}, default=repr) if log_prompts else ""

    def report(breakdown: LatencyBreakdown | None) -> None:
        try:
            channel.send(Ended(context.unique_id, record, breakdown, ended, refused, texts))
        except InvalidRequestError as error:
            _logger.warning("the log lacks the texts of request %s: %s", context.unique_id, error)
            channel.send(Ended(context.unique_id, record, breakdown, ended, refused, ""))

    if (last := context.last) is None:
        report(None)
    else:
        last.breakdown.add_done_callback(lambda engine: report(breakdown_of(context, engine.result(), ended=ended)))
