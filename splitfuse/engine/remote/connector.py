"""Connects a server to engines that run elsewhere (standalone.py), and looks whether they belong together."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from splitfuse.config.engine import EngineConfig
from splitfuse.config.values import parse_adapter
from splitfuse.core.slo.targets import SloTargets
from splitfuse.engine.messages import Alive, Command, EngineInfo, Heartbeat, InFlight, Report, Welcome, encode
from splitfuse.engine.remote.clock import ClockDifference, shift_command, shift_report
from splitfuse.engine.remote.dial import connect, read_welcome
from splitfuse.engine.remote.handshake import Purpose, client_context
from splitfuse.engine.remote.launcher import Launcher, Link
from splitfuse.engine.remote.transport import BEAT_SECONDS, HANDSHAKE_SECONDS, frame
from splitfuse.errors import ConfigError, EngineUnavailableError

LEAVING_SECONDS = 1.0
"""Seconds that an engine may take to notice that the server before has left."""
STOPPED_SECONDS = 3.0
"""Seconds without a beat of ours after which we are taken to have been stopped, or hindered."""
BLAMELESS_SECONDS = 10.0
"""Seconds after that in which the end of a connection is put down to it, and to no request."""
_ANYWHERE = ("model", "revision", "gguf_file", "lora")
"""Settings that say where files are, which are compared by what they say."""


class Agreement:
    """Holds what all engines of a server must have in common, since requests go from one to another: those of the
    first one that was ready.
    """

    def __init__(self, config: EngineConfig, *, has_local: bool, given: Collection[str] = ()) -> None:
        """`config` are the settings of the server, for its engines on this machine, if it has any. `given` are the
        names of those that it was given, with the values of the defaults too.
        """
        self._config, self._has_local, self._given = config, has_local, given
        self._first: EngineInfo | None = None
        self.model_files: str | None = None
        """Digest of the model's small files on this machine, where texts are tokenized; None: not known yet."""

    def note(self, info: EngineInfo) -> None:
        """Take in what an engine of this machine says of itself."""
        self._first = self._first or info

    def check_settings(self, theirs: EngineConfig) -> None:
        """Raise ConfigError if settings that were given to the server would have no effect at an engine elsewhere."""
        if self._has_local:
            return
        known, own = EngineConfig.setting_fields(), theirs.settings
        for name, value in self._config.settings.items():
            is_given = name in self._given or value != known[name][1].default
            if name not in _ANYWHERE and is_given and value != own.get(name):
                raise ConfigError(
                    f"it was started with {_say(name, own.get(name))}, and this server with {_say(name, value)}: give "
                    "both the same, or leave it out here"
                )

    def check(self, info: EngineInfo) -> None:
        """Raise ConfigError if an engine elsewhere does not answer as the others, or as the server expects."""
        if self.model_files is not None and info.model_files != self.model_files:
            raise ConfigError(
                f"it has another model or tokenizer, in {info.model}: start it with the files that the server has"
            )
        scheduler = self._config.scheduler
        if (info.slo_enabled, info.targets) != (scheduler.slo_enabled, SloTargets.parse(**scheduler.targets)):
            raise ConfigError("it has another SLO than this server: give both the same ttft, itl, tpot and enable_slo")
        if lacking := {parse_adapter(each)[0] for each in self._config.model.lora} - info.adapters.keys():
            raise ConfigError(f"it lacks the LoRA adapter {min(lacking)}: start it with lora too")
        first = self._first or info
        for name, text in _in_common(first.identity).items():
            if info.identity.get(name) != text:
                raise ConfigError(
                    f"its answers may differ from those of other engines: {name} is {info.identity.get(name)!r:.200}, "
                    f"not {text!r:.200}; start it as the others"
                )
        if info.kv_fingerprint != first.kv_fingerprint:
            raise ConfigError("its KV blocks differ from those of other engines: give all the same block_size")
        self._first = first


class ConnectLauncher(Launcher):
    """Connects to an engine that runs elsewhere, and has been started there by hand or by systemd."""

    ends, begins = "is gone", "connecting"

    def __init__(
        self, address: str, key: bytes, agreement: Agreement, *, tls: bool = False, is_source: bool = True
    ) -> None:
        """If it is a source, other engines reach it at this address, too, and fetch blocks there."""
        self._is_source = is_source
        self.address, self.name = address, f"the engine {address}"
        self._key, self._agreement = key, agreement
        self._tls = client_context() if tls else None

    async def launch(self) -> Link:
        return await self._connect()

    async def _connect(
        self, *, release: Callable[[], object] = lambda: None, is_lost: Callable[[], bool] = lambda: False
    ) -> Link:
        """Connect to the engine. `release` is called once the link has ended; `is_lost` says whether the engine has
        been ended from outside, which no request has caused.
        """
        until = time.monotonic() + LEAVING_SECONDS
        while True:
            reader, writer = await connect(self.address, self._key, Purpose.FRONT, tls=self._tls)
            try:
                welcome = await self._read_welcome(reader)
                if not welcome.front:
                    self._agreement.check_settings(welcome.config)
                    scheme = "tcp" if self._tls is None else "tls"
                    source = f"{scheme}://{self.address}" if self._is_source else None
                    return _SocketLink(reader, writer, source, release, is_lost)
                if time.monotonic() > until:
                    message = f"the server at {welcome.front} has it: end that, or use another engine"
                    raise EngineUnavailableError(message)
            except BaseException:
                writer.close()
                raise
            writer.close()
            await asyncio.sleep(LEAVING_SECONDS / 10)

    async def _read_welcome(self, reader: asyncio.StreamReader) -> Welcome:
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                return await read_welcome(reader)
        except TimeoutError:
            raise EngineUnavailableError(f"it has said nothing for {HANDSHAKE_SECONDS:g} s") from None
        except (asyncio.IncompleteReadError, OSError) as error:
            raise EngineUnavailableError("it has closed the connection") from error

    def accept(self, info: EngineInfo) -> None:
        self._agreement.check(info)

    def close(self) -> None:
        pass


class _SocketLink(Link):
    """Connects us to an engine elsewhere, whose clock differs from ours."""

    is_local = False

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        source: str | None,
        release: Callable[[], object],
        is_lost: Callable[[], bool],
    ) -> None:
        """`source` is where others can fetch blocks from it, if they can; for the others see ConnectLauncher."""
        super().__init__(reader, writer)
        self._source, self._release, self._is_lost = source, release, is_lost
        self._clocks = ClockDifference()
        self._in_flight: Collection[str] = ()
        self._beat_sent, self._stopped = time.monotonic(), -math.inf
        self._beating = asyncio.create_task(self._send_beats())

    def send(self, command: Command) -> None:
        super().send(shift_command(command, self._clocks.seconds))

    async def receive(self) -> Report | None:
        while True:
            match report := await super().receive():
                case None:  # what it said last may be lost to what we wrote meanwhile
                    self.is_blameless = self.is_blameless or self._was_stopped() or self._is_lost()
                    return None
                case InFlight(request_ids=ids):
                    self._in_flight = ids
                case Alive(beat=beat):
                    if beat is not None:
                        received = report.now - report.beat_age
                        self._clocks.note(sent=beat.sent, received=received, answered=report.now, back=time.monotonic())
                    return report
                case EngineInfo() if (
                    report.block_sources and self._source is not None
                ):  # it does not know how others reach it
                    sources = (*report.block_sources, self._source)
                    return msgspec.structs.replace(report, block_sources=sources)
                case _:
                    return shift_report(report, -self._clocks.seconds)

    def in_flight(self) -> Collection[str]:
        return self._in_flight

    def leave(self) -> None:
        pass  # it waits for the next server

    async def end(self, seconds: float) -> str:
        self._beating.cancel()
        self._writer.close()
        try:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(min(seconds, 1.0)):
                    await self._writer.wait_closed()
        finally:
            self._release()
        return "the connection has ended"

    async def end_hung(self) -> None:
        self._writer.transport.abort()

    async def _send_beats(self) -> None:
        while True:
            self._was_stopped()
            self._beat_sent = time.monotonic()
            self._writer.write(frame(encode(Heartbeat(self._beat_sent))))
            await asyncio.sleep(BEAT_SECONDS)

    def _was_stopped(self) -> bool:
        """Return whether we were stopped a short time ago, so that the engine may have taken us to be gone."""
        now = time.monotonic()
        if now - self._beat_sent > STOPPED_SECONDS:
            self._stopped = now
        return now - self._stopped < BLAMELESS_SECONDS


def _in_common(identity: Mapping[str, str]) -> dict[str, str]:
    """Return the parts of an identity that all engines share. Memory may limit the model's length at one."""
    return {name: text for name, text in identity.items() if name != "max_model_len"}


def _say(name: str, value: Any) -> str:
    return f"no {name}" if value is None else f"{name} {value}"
