"""Runs the process of one engine: `python -m splitfuse.engine.remote.worker FD`, started by launcher.py.

FD is a connected socket that it inherits: no other process can reach it, and the engine ends when the other end closes.
The first message on it is a WorkerSpec, commands follow. Four threads: the engine's loop, one that receives commands,
one that sends reports, and one whose heartbeat tells an engine that computes from one that hangs.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from splitfuse import interrupts
from splitfuse.engine import garbage
from splitfuse.engine.line_writer import LineWriter
from splitfuse.engine.messages import Alive, Failed, Leaving, Loading, Report, decode_command, encode
from splitfuse.engine.remote.in_flight import InFlightRecord
from splitfuse.engine.remote.launcher import WorkerSpec
from splitfuse.engine.remote.lifeline import Lifeline
from splitfuse.engine.remote.transport import frame, receive
from splitfuse.errors import SplitfuseError
from splitfuse.runtime.numa import spread_engine

if TYPE_CHECKING:
    from splitfuse.engine.loop import EngineLoop

HEARTBEAT = 0.25  # seconds


def main() -> None:
    """Serve until the other side closes the connection or sends Stop."""
    interrupts.ignore()  # SIGTERM only until there are requests
    logging.basicConfig(format="%(message)s", stream=LineWriter(sys.stderr))  # which nothing may read
    logging.captureWarnings(True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # how the front asks a hung engine where it is
    connection = socket.socket(fileno=int(sys.argv[1]))
    if (message := receive(connection)) is None:  # the front has ended meanwhile
        return
    spec = msgspec.msgpack.decode(message, type=WorkerSpec)
    if spec.lifeline is not None:
        Lifeline(spec.lifeline).hold()
    if spec.cores is not None:  # before PyTorch counts them
        os.sched_setaffinity(0, spec.cores)
    nodes = spread_engine(spec.config)  # before there are threads that compute
    Worker(connection).run(spec, nodes)


class Worker:
    """Connects an EngineLoop to a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._loop: EngineLoop | None = None

    def run(self, spec: WorkerSpec, nodes: Mapping[int, Sequence[int]]) -> None:
        """Load the model and serve its engine until Stop or an error, then end the process, whose memory is spread over
        these NUMA nodes.
        """
        sender = threading.Thread(target=self._send_all, daemon=True)
        sender.start()
        threading.Thread(target=self._beat, daemon=True).start()
        failed = True
        try:
            self._reports.put(Loading("importing"))
            with garbage.paused():
                from splitfuse.engine.engine import Engine
                from splitfuse.engine.loop import EngineLoop, follow_steps

            self._reports.put(Loading("loading"))
            engine = Engine.load(
                spec.config,
                announce=lambda plan: self._reports.put(Loading("loading", memory_plan=str(plan))),
                on_progress=lambda fraction: self._reports.put(Loading("loading", fraction)),
                weight_sharing=spec.weights,
                name_key=spec.name_key,
                tier_files=spec.tiers,
                nodes=nodes,
                is_restart=spec.is_restart,
            )
            if spec.link_key is not None:
                engine.use_peers(spec.link_key)
                if spec.listen is not None and engine.tiers is not None:
                    from splitfuse.engine.remote.listener import let_blocks_be_fetched

                    let_blocks_be_fetched(engine.tiers, spec.listen, spec.link_key, spec.config)
            follow_steps(engine, InFlightRecord(spec.in_flight).write)
            self._loop = EngineLoop(engine, self._reports.put)
            garbage.freeze()
            threading.Thread(target=self._receive_all, daemon=True).start()
            self._reports.put(self._loop.info)
            signal.signal(signal.SIGTERM, lambda *_: self._reports.put(Leaving()))
            self._loop.run()
            engine.close()
            failed = False
        except SplitfuseError as error:
            self._reports.put(Failed(str(error), type(error).__name__))
        except BaseException as error:
            self._reports.put(Failed(repr(error)))
            traceback.print_exc()
        self._reports.put(None)
        sender.join(timeout=5.0)
        os._exit(failed)  # without waiting for the other threads, which may be blocked in a read

    def _send_all(self) -> None:
        while (report := self._reports.get()) is not None:
            try:
                self._connection.sendall(frame(encode(report)))
            except OSError:
                os._exit(1)

    def _receive_all(self) -> None:
        assert self._loop is not None
        try:
            while (message := receive(self._connection)) is not None:
                self._loop.commands.put(decode_command(message))
        except Exception:  # an engine that hears nothing more would keep its requests for ever
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # the front is gone, and with it the use of what we compute

    def _beat(self) -> None:
        while True:
            self._reports.put(self._loop.alive() if self._loop is not None else Alive(0.0))
            time.sleep(HEARTBEAT)


if __name__ == "__main__":
    main()
