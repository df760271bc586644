"""Keeps one engine running, wherever it is: a launcher brings it up, and says how its end is noticed (launcher.py).

When it dies, it is brought up again, and its requests go on (engine/recovery.py). When it hangs, it is ended. The front
and its event loop continue meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from splitfuse import errors
from splitfuse.config.server import ServerConfig
from splitfuse.core.request_output import FinishReason
from splitfuse.engine.client import EngineState, LocalClient
from splitfuse.engine.messages import Add, Alive, Command, EngineInfo, Failed, Loading, Report, StepReport, Stop
from splitfuse.engine.quarantine import Quarantine, find_suspects
from splitfuse.engine.remote.launcher import Launcher, Link
from splitfuse.engine.restart_pauses import RestartPauses
from splitfuse.engine.stream import Stream
from splitfuse.errors import EngineUnavailableError, SplitfuseError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a restart
STABLE_SECONDS = 10.0  # for which an engine has been ready if its death is the first of a series again
TIME_TO_STOP = 5.0
RESTART_SECONDS = 600.0
LONG_SILENCE = 1.0  # seconds: of several heartbeats
HAS_ENDED = "its process has ended"
"""Reason for the end of an engine that has said none, until it is known how it ended."""

_logger = logging.getLogger(__name__)


class SupervisedEngine(LocalClient):
    """Runs the engine that a launcher brings up, and lets it be brought up again when it dies.

    An engine hangs if a step takes longer than `step_timeout` seconds, or if it says nothing for `silence_timeout`
    seconds. It shares `quarantine` with other engines.
    """

    restarts = True

    def __init__(
        self,
        launcher: Launcher,
        *,
        step_timeout: float = ServerConfig.step_timeout,
        silence_timeout: float = 10.0,
        quarantine: Quarantine | None = None,
    ) -> None:
        """The launcher is closed with the engine."""
        super().__init__()
        self._launcher = launcher
        self.address, self.keeps_trying = launcher.address, launcher.keeps_trying
        self._step_timeout, self._silence_timeout = step_timeout, silence_timeout
        self._quarantine = quarantine or Quarantine()
        self._link: Link | None = None
        self._failure: Failed | None = None
        self._launched_at = 0.0
        self._ready_at: float | None = None
        self._died_at: float | None = None
        self._last_heard = 0.0
        self._seconds_in_step = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._started: asyncio.Future[None] | None = None
        self._closing = self._restarting = False

    @property
    def silent(self) -> bool:
        return time.monotonic() - self._last_heard > LONG_SILENCE

    @property
    def pid(self) -> int | None:
        """Return the id of the current process; None if there is none on this machine."""
        return None if self._link is None else self._link.pid

    async def restart(self) -> None:
        assert self.is_drained and not self.num_open, "its requests would be lost"
        if self.state is EngineState.READY:
            self._restarting = True
            self._send(Stop())
        try:
            async with asyncio.timeout(RESTART_SECONDS):
                await self.wait_until(self._has_restarted)
        except TimeoutError:
            message = f"a drained engine is not ready again after {RESTART_SECONDS:g} s"
            raise EngineUnavailableError(message) from None
        if self._has_ended():
            raise EngineUnavailableError("an engine was ended while it was restarted")

    def _has_restarted(self) -> bool:
        return self._has_ended() or (self.state is EngineState.READY and not self._restarting)

    def _has_ended(self) -> bool:
        return self._closing or self.state is EngineState.STOPPED

    def absolve(self, request: Add) -> None:
        self._quarantine.absolve(request)

    async def start(self) -> None:
        if self._closing:
            raise EngineUnavailableError("the engine was closed")
        self._started = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._supervise())]
        await asyncio.wait({self._started})  # cancelling the wait does not end the start
        self._started.result()

    async def stop(self) -> None:
        assert not self.num_open, "its requests would be lost"
        await self._end("it was stopped")
        self._closing, self._restarting, self._died_at = False, False, None
        self._note_stopped()

    async def close(self) -> None:
        await self._end("it was closed")
        self._launcher.close()

    async def _end(self, why: str) -> None:
        """End the engine for good, or until it is started again."""
        self._closing = True
        if (link := self._link) is not None:
            if is_ready := self.state is EngineState.READY:
                link.leave()
            await link.end(TIME_TO_STOP if is_ready else 0.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._started is not None and not self._started.done():  # it cannot be any more
            self._started.set_exception(EngineUnavailableError(f"the engine did not start: {why}"))
            self._started.exception()  # the waiting caller may be gone: else asyncio would complain
        self._die(why)
        self._link = None

    def _send(self, command: Command) -> None:
        assert self._link is not None
        self._link.send(command)

    def _take(self, report: Report) -> None:
        if isinstance(report, StepReport):
            for output in report.outputs:
                if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and (
                    stream := self._ending.get(output.request_id) or self._streams.get(output.request_id)
                ):
                    self._quarantine.completed(stream.request)
        super()._take(report)

    def _check(self, request: Add) -> None:
        """See LocalClient. Raises RequestQuarantinedError for a request that was in flight at two deaths."""
        self._quarantine.check(request)
        super()._check(request)

    def _suspects(self) -> Sequence[Stream]:
        """See LocalClient. A death counts for the quarantine where it can be put down to its requests."""
        link = self._link
        if self.state is not EngineState.READY or link is None or link.is_blameless or self._closing:
            return ()
        known = (*self._streams.values(), *self._moving.values(), *self._ending.values())
        suspects, causes = find_suspects(known, link.in_flight())
        self._quarantine.engine_died(stream.request for stream in causes)
        return suspects

    async def _supervise(self) -> None:
        """Bring the engine up again and again until the client is closed. If it does not come up the very first time,
        `start` raises, and there is no second one: a wrong setting stays wrong. An engine that cannot be reached may be
        later.
        """
        pauses = RestartPauses(FIRST_PAUSE, LONGEST_PAUSE, stable=STABLE_SECONDS)
        while not self._closing:
            try:
                why = await self._live()
            except SplitfuseError as error:
                self._failure, why = Failed(str(error), type(error).__name__), str(error)
            except Exception as error:
                _logger.exception("%s could not be followed", self._launcher.name)
                why = f"its reports could not be taken in: {error!r}"
            self._die(why)
            self._link = None  # not before: while the state is READY there is something to send to
            if self._restarting:
                self._restarting = False  # while it is DEAD, so that the old process is not taken for the new one
                _logger.info("a drained engine is restarted")
                continue
            assert self._started is not None
            if not self._started.done():
                prevented = self._as_error(why)
                self._started.set_exception(prevented)
                self._started.exception()  # the waiting caller may be gone: else asyncio would complain
                if not (self.keeps_trying and isinstance(prevented, EngineUnavailableError)):
                    return
                await asyncio.sleep(FIRST_PAUSE)  # what waits for the start logs why, or ends it
                continue
            if self._closing:
                return
            if self._died_at is None:  # else it died again before it was ready
                self._died_at = time.monotonic()
            pause = pauses.next(None if self._ready_at is None else time.monotonic() - self._ready_at)
            made = self._launcher
            _logger.error("%s %s: %s; %s again in %g s", made.name, made.ends, why, made.begins, pause)
            await asyncio.sleep(pause)

    async def _live(self) -> str:
        """Let the engine live once; return why it ended."""
        self._failure, self._seconds_in_step, self._ready_at = None, 0.0, None
        self.stage = Loading("starting")
        self._enter(EngineState.STARTING)
        self._launched_at = time.monotonic()
        link = self._link = await self._launcher.launch()
        self.address = self._launcher.address  # which a launcher may choose
        self._last_heard = time.monotonic()
        watch = asyncio.create_task(self._watch(link))
        patience = 0.0
        try:
            why = await self._listen(link)
            if self._failure is not None:
                why = self._failure.error
            elif not self._closing:
                self._die(why or HAS_ENDED)  # its requests wait for nothing of what follows
            patience = TIME_TO_STOP
        finally:
            how = await link.end(patience)
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        return why or how

    async def _listen(self, link: Link) -> str:
        """Process reports until there are no more; return the reason if it is known."""
        while True:
            try:
                report = await link.receive()
            except ValueError as error:
                return f"malformed message from the engine: {error}"
            if report is None:
                return ""
            self._last_heard = time.monotonic()
            match report:
                case Alive():
                    self._seconds_in_step = report.seconds_in_step
                case Failed():
                    self._failure, link.is_blameless = report, report.is_planned
                    self._die(report.error)
                case EngineInfo():
                    self._launcher.accept(report)
                    self._take(report)
                    self._note_ready()
                    link.follow_end()
                case _:
                    self._take(report)

    def _note_ready(self) -> None:
        self._ready_at = time.monotonic()
        self.start_seconds = self._ready_at - self._launched_at
        if self._started is not None and not self._started.done():
            self._started.set_result(None)
        if self._died_at is not None:
            _logger.info("%s is ready again after %.1f s", self._launcher.name, time.monotonic() - self._died_at)
            self._died_at = None

    async def _watch(self, link: Link) -> None:
        """End an engine that hangs: one that is silent, or one whose step does not end."""
        pause = min(self._silence_timeout, self._step_timeout, 2.0) / 4
        while True:
            slept = time.monotonic()
            await asyncio.sleep(pause)
            if time.monotonic() - slept > pause + LONG_SILENCE:  # we were stopped ourselves, so silence means nothing
                self._last_heard = time.monotonic()
            silent = time.monotonic() - self._last_heard
            if silent > self._silence_timeout:
                why = f"it has been silent for {silent:.0f} s"
                link.is_blameless = not link.is_local
            elif self._seconds_in_step > self._step_timeout:
                why = f"a step has taken {self._seconds_in_step:.0f} s"
            else:
                continue
            _logger.error("%s hangs: %s", self._launcher.name, why)
            self._failure = Failed(f"it hung: {why}")
            self._die(self._failure.error)
            await link.end_hung()
            return

    def _as_error(self, why: str) -> SplitfuseError:
        """Return the error that the engine died of before it was ready, of the class that it had there."""
        if self.address:
            why = f"{self._launcher.name} cannot be used: {why}"
        failure = self._failure
        kind = getattr(errors, failure.kind, None) if failure is not None and failure.kind else None
        if isinstance(kind, type) and issubclass(kind, SplitfuseError):
            return kind(why)
        return EngineUnavailableError(why if self.address else f"the engine could not be started: {why}")
