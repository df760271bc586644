"""Serves leaders on other machines, one at a time (`splitfuse rank`): each gets a process, which computes this
rank's part, and ends with the leader.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys

from splitfuse.config.server import RankConfig
from splitfuse.config.values import parse_address
from splitfuse.errors import ServerError
from splitfuse.interrupts import held_back
from splitfuse.runtime.parallel.leader import FOLLOWER
from splitfuse.runtime.parallel.link import LinkError, prove
from splitfuse.runtime.secret import read_secret

PATIENCE = 5.0
"""Seconds that a process may take to end after its leader; one that is stopped does not end by itself."""

_logger = logging.getLogger(__name__)


class RankServer:
    """Listens for leaders. Raises ConfigError for a key that cannot be used, ServerError if it cannot listen."""

    def __init__(self, config: RankConfig) -> None:
        assert config.listen is not None and config.key_file is not None
        self._key, self._model = read_secret(config.key_file).link_key, config.model
        try:
            self._listener = socket.create_server(parse_address("listen", config.listen))
        except OSError as error:
            raise ServerError(f"cannot listen on {config.listen}: {error.strerror or error}") from error
        host, port = self._listener.getsockname()[:2]
        self.address = f"{host}:{port}"

    def run(self) -> None:
        """Serve one leader after the other, until SIGTERM or Ctrl-C."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        _logger.info("splitfuse rank listens on %s", self.address)
        while True:
            connection, (host, *_) = self._listener.accept()
            with connection:
                try:
                    prove(connection, self._key, is_leader=False)
                except (LinkError, OSError) as error:
                    _logger.warning("refused %s: it %s", host, error)
                    continue
                _logger.info("computes with %s", host)
                self._serve(connection)
                _logger.info("%s has ended", host)

    def _serve(self, connection: socket.socket) -> None:
        fd = connection.fileno()
        command = [sys.executable, "-m", FOLLOWER, str(fd), *([] if self._model is None else [self._model])]
        with held_back():
            process = subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=2)
        try:
            ended = os.pidfd_open(process.pid)
            try:
                poller = select.poll()
                poller.register(fd, select.POLLRDHUP)
                poller.register(ended, select.POLLIN)
                poller.poll()
            finally:
                os.close(ended)
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            process.wait()
