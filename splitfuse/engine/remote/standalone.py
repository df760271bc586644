"""Runs an engine by itself, which servers on other machines use: `splitfuse engine`.

The model is loaded once. A server comes, has its requests computed, and goes; what it has left behind is ended, and the
engine waits for the next one. One that hangs, or whose loop fails, ends with its process: systemd, or whatever has
started it, starts it again, and its server's requests go on elsewhere meanwhile.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import queue
import signal
import ssl
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ListenConfig
from splitfuse.engine import garbage
from splitfuse.engine.messages import Failed, InFlight, Leaving, Loading, Stop
from splitfuse.engine.remote.handshake import NO_CERTIFICATE
from splitfuse.engine.remote.listener import FrontSession, Listener, load_certificate
from splitfuse.engine.tier_files import open_tiers
from splitfuse.errors import ConfigError, SplitfuseError
from splitfuse.runtime.numa import spread_engine
from splitfuse.runtime.secret import Secret, read_secret

if TYPE_CHECKING:
    from splitfuse.engine.engine import Engine
    from splitfuse.engine.loop import EngineLoop

WATCH_SECONDS = 1.0
"""Seconds between two looks at how long a step has taken."""
DRAIN_SECONDS = 60.0
"""Longest time that the server may take to let requests go on elsewhere after SIGTERM; systemd waits for 90 s."""

_logger = logging.getLogger(__name__)


class StandaloneEngine:
    """Runs an engine for servers on other machines, one after the other."""

    def __init__(
        self,
        config: EngineConfig,
        address: str,
        secret: Secret,
        *,
        step_timeout: float,
        tls: ssl.SSLContext | None = None,
        certificate: bytes = NO_CERTIFICATE,
    ) -> None:
        """`certificate` is the digest of that of `tls`. Raises ConfigError if a setting cannot be used."""
        if config.cache.kv_loans:
            raise ConfigError(
                "kv_loans needs another engine on the same machine and of the same server: leave it out, or serve with "
                "replicas"
            )
        self._config, self._secret, self._step_timeout = config, secret, step_timeout
        self._listener = Listener(address, secret.link_key, config, tls=tls, certificate=certificate)
        self._loop: EngineLoop | None = None
        self._session: FrontSession | None = None
        self._ending = False

    @classmethod
    def of(cls, config: EngineConfig, listen: ListenConfig) -> StandaloneEngine:
        """Make the engine of `splitfuse engine`. Raises ConfigError if key, certificate or a setting cannot be used."""
        assert listen.listen is not None and listen.key_file is not None, "ListenConfig has checked it"
        secret = read_secret(listen.key_file)
        tls, certificate = None, NO_CERTIFICATE
        if listen.tls_certificate is not None and listen.tls_key is not None:
            tls, certificate = load_certificate(listen.tls_certificate, listen.tls_key)
        return cls(config, listen.listen, secret, step_timeout=listen.step_timeout, tls=tls, certificate=certificate)

    def run(self) -> None:
        """Load the model and serve, in the main thread. Returns after SIGTERM, once its server has drained it, or
        SIGINT; starts the program anew if a server asks for it. Raises what prevents loading, and what the engine
        fails of.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        _logger.info("splitfuse engine listens on %s", self.listen())
        with suppress(_Ended):
            if self.serve():
                os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    def listen(self) -> str:
        """Begin to listen, and return the address. Raises ConfigError if that is not possible."""
        self._listener.start()
        return self._listener.address

    def serve(self, *, most_fronts: float = math.inf, patience: float | None = None) -> bool:
        """Load the model and serve: so many servers, and until none comes for `patience` seconds. Returns whether one
        asks for a restart. Raises what prevents loading, and what the engine fails of.
        """
        try:
            engine = self._load()
        except SplitfuseError as error:  # the server that waits should know
            self._listener.fail(Failed(str(error), type(error).__name__, is_planned=True))
            raise
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        num_fronts = 0
        try:
            while not self._ending and num_fronts < most_fronts:
                num_fronts += 1
                if self._serve(engine, self._listener.next_front(patience)):
                    return True
        except queue.Empty:
            _logger.info("no server has come for %g s", patience)
        finally:
            engine.close()
        return False

    def _load(self) -> Engine:
        nodes = spread_engine(self._config)  # before there are threads that compute
        self._listener.show(Loading("importing"))
        with garbage.paused():
            from splitfuse.engine.engine import Engine
        self._listener.show(Loading("loading"))
        tiers, _ = open_tiers(self._config.cache, for_moves=True)
        planned = ""

        def announce(plan: object) -> None:
            nonlocal planned
            planned = str(plan)
            _logger.info("%s", planned)
            self._listener.show(Loading("loading", memory_plan=planned))

        engine = Engine.load(
            self._config,
            announce=announce,
            on_progress=lambda fraction: self._listener.show(Loading("loading", fraction, planned)),
            name_key=self._secret.name_key,
            tier_files=tiers,
            nodes=nodes,
        )
        engine.use_peers(self._secret.link_key)
        if engine.tiers is not None:
            self._listener.read_block = engine.tiers.give
        garbage.freeze()
        return engine

    def _serve(self, engine: Engine, session: FrontSession) -> bool:
        """Run the engine for a front until that leaves. Returns whether it asks for a restart."""
        from splitfuse.engine.loop import EngineLoop, follow_steps

        last: Sequence[str] = ()

        def note(ids: Sequence[str]) -> None:
            nonlocal last
            if ids != last:
                last = ids
                session.report(InFlight(tuple(ids)))

        loop = EngineLoop(engine, session.report, commands=session.commands)
        unfollow = follow_steps(engine, note)
        try:
            session.alive = loop.alive
            self._loop, self._session = loop, session
            if self._ending:
                raise _Ended
            session.report(loop.info)
            loop.run()
            if self._ending:
                session.report(Failed("it was stopped", is_planned=True))
            loop.close()
        except Exception as error:
            session.report(Failed(repr(error)))
            raise
        finally:
            self._loop = None
            unfollow()
            self._listener.end(session)
        return session.asks_restart and not self._ending

    def _end(self, number: int, _: object) -> None:
        """End at a signal: at SIGTERM once the server has let its requests go on elsewhere, at SIGINT or a second one
        after the step in flight, and at once if none runs.
        """
        loop, session, is_first, self._ending = self._loop, self._session, not self._ending, True
        if loop is None:
            raise _Ended
        if number == signal.SIGTERM and is_first and session is not None:
            session.report(Leaving())
            timer = threading.Timer(DRAIN_SECONDS, loop.commands.put, (Stop(),))
            timer.daemon = True
            timer.start()
        else:
            loop.commands.put(Stop())

    def _watch(self) -> None:
        """End the process if a step does not end, and write where it is."""
        while True:
            time.sleep(WATCH_SECONDS)
            loop = self._loop
            if loop is not None and (seconds := loop.alive().seconds_in_step) > self._step_timeout:
                _logger.error("the engine hangs: a step has taken %.0f s; its stacks follow", seconds)
                time.sleep(WATCH_SECONDS / 2)  # for the line to be written
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)


class _Ended(BaseException):
    """Ends what waits or loads, at a signal."""
