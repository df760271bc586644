"""Kill and stop engines under load: how soon clients get an error, and how soon the server recovers.

    python -m tests.soak.engine_deaths [--replicas N] [SERVE FLAGS ...]

Streams run on all engines; then one engine process gets SIGKILL, later SIGSTOP. Times are from the signal: until the
engine's streams got an error, until /ready returned 503 (with one replica), until a new request was answered, and until
the engine was back.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
from server_load import children
from server_process import ServerProcess, server_process

STREAMS = 8  # of each replica
LIMIT = 120.0
LONG = {"prompt": "Anna has", "max_tokens": 2000, "ignore_eos": True, "stream": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1)
    arguments, flags = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    own = (f"--replicas={arguments.replicas}", "--num-blocks=2000", *flags)
    with server_process(folder, f"soak-{folder.name}", *own) as server, server.client() as client:
        for number in signal.SIGKILL, signal.SIGSTOP:
            _Drill(server, client.url, arguments.replicas).hold(number)
        print("log of the server:\n" + "\n".join(line for line in server.said.splitlines() if "engine" in line))


class _Drill:
    """A signal to one engine under load."""

    def __init__(self, server: ServerProcess, url: str, replicas: int) -> None:
        self._server, self._url, self._replicas = server, url, replicas
        self._ends: list[tuple[float, str]] = []  # of streams: when, and how
        self._begun = threading.Barrier(STREAMS * replicas + 1)

    def hold(self, number: signal.Signals) -> None:
        threads = [threading.Thread(target=self._stream, daemon=True) for _ in range(STREAMS * self._replicas)]
        for thread in threads:
            thread.start()
        self._begun.wait(LIMIT)
        target = children(self._server.process.pid)[0]
        sent = time.monotonic()
        os.kill(target, number)
        times: dict[str, float | str] = {}
        with httpx.Client(base_url=self._url, timeout=LIMIT, trust_env=False) as http:
            if self._replicas == 1:
                times["/ready returns 503"] = _until(lambda: http.get("/ready").status_code == 503) - sent
            else:
                times["next request, on the other"] = f"{_ask(http)} after {time.monotonic() - sent:.2f}"
            _until(lambda: any(how != "whole" for _, how in self._ends))
            times["/health"] = http.get("/health").status_code
            if self._replicas == 1:
                times["next request, at once"] = _ask(http)
            _until(lambda: len(self._back(target)) == self._replicas)
            times["new process"] = time.monotonic() - sent
            _until(lambda: http.get("/ready").status_code == 200)
            times["/ready returns 200"] = time.monotonic() - sent
            times["request then"] = _ask(http)
            for thread in threads:
                thread.join(LIMIT)
        broken = [when - sent for when, how in self._ends if how != "whole"]
        print(f"{number.name} to one of {self._replicas}: {len(self._ends)} of {len(threads)} streams ended,")
        print(f"  {len(broken)} with an error, after {min(broken):.2f} to {max(broken):.2f} s: {self._how()}")
        print("\n".join(f"  {what}: {_seconds(value)}" for what, value in times.items()), flush=True)

    def _how(self) -> str:
        return next(how for _, how in self._ends if how != "whole")

    def _back(self, target: int) -> list[int]:
        return [pid for pid in children(self._server.process.pid) if pid != target]

    def _stream(self) -> None:
        how, waits = "broken off", True
        with (
            suppress(httpx.HTTPError),
            httpx.Client(base_url=self._url, timeout=LIMIT, trust_env=False) as http,
            http.stream("POST", "/v1/completions", json=LONG) as answer,
        ):
            for line in answer.iter_lines():
                if waits:
                    waits = False
                    self._begun.wait(LIMIT)
                if line == "data: [DONE]":
                    how = "whole"
                elif '"error"' in line:
                    how = json.loads(line.removeprefix("data: "))["error"]["message"]
        self._ends.append((time.monotonic(), how))


def _ask(http: httpx.Client) -> str:
    began = time.monotonic()
    answer = http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2})
    said = "" if answer.status_code == 200 else f" {answer.json()['error']['message']}"
    return f"{answer.status_code}{said} in {time.monotonic() - began:.2f} s"


def _until(condition: Callable[[], bool]) -> float:
    limit = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError("timed out")
        time.sleep(0.01)
    return time.monotonic()


def _seconds(value: float | str) -> str:
    return f"{value:.2f} s" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
