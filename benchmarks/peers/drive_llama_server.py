"""Start llama.cpp's server, drive it over HTTP with token ids, and stop it. Standard library only.

The offline workload of the others, with one connection for each prompt: llama.cpp batches nowhere but in its server.
"""

from __future__ import annotations

import sys

if {"-h", "--help"} & set(sys.argv):  # before the imports of a peer that may not be installed
    raise SystemExit(print(__doc__))

import atexit
import json
import socket
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

from benchmarks.peers.workload import Figures, Run, Tokens, Workload, figures, take_orders

HOST = "127.0.0.1"
START_SECONDS = 120
DEFAULTS = {"parallel": 32, "ctx-size": 40960, "batch-size": 2048, "ubatch-size": 512}


def load(arguments: Mapping[str, Any]) -> tuple[Run, Mapping[str, Any]]:
    """Start a server that ends with this process; settings are its long options."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    options = {**DEFAULTS, "threads": arguments["threads"], "threads-batch": arguments["threads"]}
    options |= arguments["settings"]
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    server = subprocess.Popen(
        [arguments["program"], "--model", arguments["model"], "--host", HOST, "--port", str(port), "--no-webui", *flags]
    )
    atexit.register(stop, server)
    wait_until_ready(server, port)

    def run(workload: Workload, round_number: int) -> Figures:
        prompts = workload.prompts(round_number)
        with ThreadPoolExecutor(len(prompts)) as pool:
            start = time.perf_counter()
            answers = list(pool.map(lambda prompt: complete(port, prompt, workload.output_tokens), prompts))
            seconds = time.perf_counter() - start
        timings = [answer["timings"] for answer in answers]
        for timing in timings:
            if timing["prompt_n"] != workload.prompt_tokens:
                raise RuntimeError(f"the server read {timing['prompt_n']} tokens of {workload.prompt_tokens}")
        num_tokens = sum(timing["predicted_n"] for timing in timings)
        # Its own clock: a stream over HTTP holds back tokens that end within a character.
        after_first = timings[0]["predicted_ms"] / 1e3
        return figures(workload, seconds=seconds, first_token_seconds=seconds - after_first, num_tokens=num_tokens)

    return run, {"version": version(arguments["program"])}


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """Return when the model is loaded. Raises RuntimeError if the server has ended or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if request(port, "GET", "/health")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError("llama-server did not start")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and wait for it."""
    server.terminate()
    server.wait()


def complete(port: int, prompt: Tokens, output_tokens: int) -> Any:
    """Send one prompt; return the whole answer."""
    body = {
        "prompt": prompt,
        "n_predict": output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": False,
    }
    status, answer = request(port, "POST", "/completion", body)
    if status != 200:
        raise RuntimeError(f"llama-server answered {status}: {answer}")
    return answer


def request(port: int, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
    """Send a request on a connection of its own: the server's keep-alive races."""
    connection = HTTPConnection(HOST, port)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def version(program: str) -> str:
    """Return the version that the program prints."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return "llama.cpp " + (said.stdout + said.stderr).strip().splitlines()[0]


if __name__ == "__main__":
    take_orders(load)
