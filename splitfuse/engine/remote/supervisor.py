"""Runs an engine in a process of its own.

When it dies, it is started again, and its requests go on (engine/recovery.py). When it hangs, it is made to write its
stacks, and killed. The front and its event loop continue meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from splitfuse import errors
from splitfuse.config import EngineConfig, ServerConfig
from splitfuse.core.kv.names import new_key
from splitfuse.core.request_output import FinishReason
from splitfuse.engine.client import EngineState, LocalClient
from splitfuse.engine.messages import (
    Add,
    Alive,
    Command,
    EngineInfo,
    Failed,
    Loading,
    Report,
    StepReport,
    Stop,
    decode_report,
    encode,
)
from splitfuse.engine.quarantine import Quarantine, find_suspects
from splitfuse.engine.remote.in_flight import InFlightRecord
from splitfuse.engine.remote.launcher import WorkerSpec, launch
from splitfuse.engine.remote.transport import HEADER_BYTES, frame, message_length
from splitfuse.engine.stream import Stream
from splitfuse.engine.tier_files import TierFiles
from splitfuse.errors import EngineUnavailableError, SplitfuseError
from splitfuse.kernels.sharing import WeightSharing

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a restart; doubled each time
STABLE_SECONDS = 10.0  # for which an engine has been ready if its death is the first of a series again
TIME_TO_DUMP = 1.0  # seconds that a hung process has to write its stacks
TIME_TO_STOP = 5.0
RESTART_SECONDS = 600.0
LONG_SILENCE = 1.0  # seconds: of several heartbeats

_logger = logging.getLogger(__name__)


class SubprocessEngine(LocalClient):
    """Runs one engine in a process of its own, and starts it again when it dies.

    An engine hangs if a step takes longer than `step_timeout` seconds, or if its process says nothing for
    `silence_timeout` seconds. It runs on `cores`, if they are given, and shares `weights`, `quarantine` and the key of
    the names of KV blocks with other engines.
    """

    restarts = True

    def __init__(
        self,
        config: EngineConfig,
        *,
        step_timeout: float = ServerConfig.step_timeout,
        silence_timeout: float = 10.0,
        cores: tuple[int, ...] | None = None,
        weights: WeightSharing | None = None,
        quarantine: Quarantine | None = None,
        name_key: bytes | None = None,
        tiers: TierFiles | None = None,
    ) -> None:
        """`tiers` are closed with the engine."""
        super().__init__()
        self._name_key = name_key or new_key()
        self._config = config
        self._step_timeout, self._silence_timeout = step_timeout, silence_timeout
        self._cores, self._weights, self._tiers = cores, weights, tiers
        self._quarantine = quarantine or Quarantine()
        self._in_flight: InFlightRecord | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._failure: Failed | None = None
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
        """Return the id of the current process."""
        return None if self._process is None else self._process.pid

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
        if self._closing:
            raise EngineUnavailableError("the server was closed while an engine was restarted")

    def _has_restarted(self) -> bool:
        return self._closing or (self.state is EngineState.READY and not self._restarting)

    def absolve(self, request: Add) -> None:
        self._quarantine.absolve(request)

    async def start(self) -> None:
        self._started = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._supervise())]
        await asyncio.wait({self._started})  # cancelling the wait does not end the start
        self._started.result()

    async def close(self) -> None:
        self._closing = True
        if self._writer is not None and self.state is EngineState.READY:
            self._send(Stop())
        process = self._process
        if process is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), TIME_TO_STOP if self.state is EngineState.READY else 0.0)
            _signal(process, signal.SIGKILL)
            await process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._disconnect()
        self._die("it was closed")
        if self._in_flight is not None:
            self._in_flight.close()
            self._in_flight = None
        if self._tiers is not None:
            self._tiers.close()
            self._tiers = None

    def _send(self, command: Command) -> None:
        assert self._writer is not None
        self._writer.write(frame(encode(command)))

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
        if self.state is not EngineState.READY or self._in_flight is None or self._closing:
            return ()
        known = (*self._streams.values(), *self._moving.values(), *self._ending.values())
        suspects, causes = find_suspects(known, self._in_flight.read())
        self._quarantine.engine_died(stream.request for stream in causes)
        return suspects

    async def _supervise(self) -> None:
        """Start the process again and again until the client is closed. If the very first one does not come up, `start`
        raises and there is no second one: a wrong setting stays wrong.
        """
        pause = FIRST_PAUSE
        while not self._closing:
            try:
                why = await self._live()
            except OSError as error:  # no descriptors, memory or processes now: there may be later
                why = f"its process could not be started: {error.strerror}"
            except Exception as error:
                _logger.exception("an engine could not be followed")
                why = f"its reports could not be taken in: {error!r}"
            self._die(why)
            if self._restarting:
                self._restarting = False  # while it is DEAD, so that the old process is not taken for the new one
                _logger.info("a drained engine is restarted")
                continue
            assert self._started is not None
            if not self._started.done():
                self._started.set_exception(_as_error(self._failure, why))
                self._started.exception()  # the waiting caller may be gone: else asyncio would complain
                return
            if self._closing:
                return
            if self._died_at is None:  # else it died again before it was ready
                self._died_at = time.monotonic()
            if self._ready_at is not None and time.monotonic() - self._ready_at >= STABLE_SECONDS:
                pause = FIRST_PAUSE
            _logger.error("the engine died: %s; starting it again in %g s", why, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _live(self) -> str:
        """Run the process once; return why it ended."""
        self._failure, self._seconds_in_step, self._ready_at = None, 0.0, None
        self.stage = Loading("starting")
        self._enter(EngineState.STARTING)
        if self._in_flight is None:
            self._in_flight = InFlightRecord()
        self._in_flight.clear()  # of what the process before has died of
        process, connection = await launch(
            WorkerSpec(self._config, self._name_key, self._in_flight.fd, self._cores, self._weights, self._tiers)
        )
        self._process = process
        reader, self._writer = await asyncio.open_unix_connection(sock=connection, limit=2**22)
        self._last_heard = time.monotonic()
        watch = asyncio.create_task(self._watch(process))
        try:
            why = await self._listen(reader)
            if self._failure is not None:
                why = self._failure.error
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), TIME_TO_STOP)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            _signal(process, signal.SIGKILL)
            await process.wait()
            self._disconnect()  # last: while the state is READY there is something to send to
        return why or f"its process ended with {_exit(process.returncode)}"

    async def _listen(self, reader: asyncio.StreamReader) -> str:
        """Process reports until there are no more; return the reason if it is known."""
        try:
            while True:
                report = decode_report(await reader.readexactly(message_length(await reader.readexactly(HEADER_BYTES))))
                self._last_heard = time.monotonic()
                match report:
                    case Alive():
                        self._seconds_in_step = report.seconds_in_step
                    case Failed():
                        self._failure = report
                        self._die(report.error)
                    case _:
                        self._take(report)
                if isinstance(report, EngineInfo):
                    self._ready_at = time.monotonic()
                    if self._weights is not None:
                        self._weights.filled = True
                    if self._started is not None and not self._started.done():
                        self._started.set_result(None)
                    if self._died_at is not None:
                        _logger.info("the engine is ready again after %.1f s", time.monotonic() - self._died_at)
                        self._died_at = None
        except (asyncio.IncompleteReadError, ConnectionError):
            return ""
        except (ValueError, msgspec.DecodeError, SplitfuseError) as error:
            return f"malformed message from the engine process: {error}"

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill a process that hangs: one that is silent, or one whose step does not end."""
        pause = min(self._silence_timeout, self._step_timeout, 2.0) / 4
        while True:
            slept = time.monotonic()
            await asyncio.sleep(pause)
            if time.monotonic() - slept > pause + LONG_SILENCE:  # we were stopped ourselves, so silence means nothing
                self._last_heard = time.monotonic()
            silent = time.monotonic() - self._last_heard
            if silent > self._silence_timeout:
                why = f"its process has been silent for {silent:.0f} s"
            elif self._seconds_in_step > self._step_timeout:
                why = f"a step has taken {self._seconds_in_step:.0f} s"
            else:
                continue
            _logger.error("the engine hangs: %s; its stacks follow", why)
            self._failure = Failed(f"it hung: {why}")
            self._die(self._failure.error)
            _signal(process, signal.SIGUSR1)
            _signal(process, signal.SIGCONT)  # it can only write when it runs
            await asyncio.sleep(TIME_TO_DUMP)
            _signal(process, signal.SIGKILL)
            return

    def _disconnect(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"status {code}"


def _as_error(failure: Failed | None, why: str) -> SplitfuseError:
    """Return the error that the engine died of, of the class that it had there."""
    kind = getattr(errors, failure.kind, None) if failure is not None and failure.kind else None
    if isinstance(kind, type) and issubclass(kind, SplitfuseError):
        return kind(why)
    return EngineUnavailableError(f"the engine could not be started: {why}")
