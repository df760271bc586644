"""Serve one model with several engines and drive them in turns over HTTP: every point of each is measured next to the
same point of the others, which are stopped meanwhile.

    python -m benchmarks.peers.serving --model DIR --peers FOLDER --out FOLDER --clients 1,4,8 --prompt 512 \\
        splitfuse,quantization=int8 vllm,checkpoint=w8a8 vllm,checkpoint=w8a8,max_num_batched_tokens=256

Settings after a comma are each server's own (README.md). Writes results as `splitfuse bench run` does, a file for each
engine, and a report.html of all. After a run that was broken off the same command measures the points that these files
lack. splitfuse/bench does the measuring.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peers.contender import SERVED, Contender
from benchmarks.peers.drive_llama_server import DEFAULTS as LLAMA_DEFAULTS
from benchmarks.peers.install import llama_cpp_program, peer_python
from benchmarks.peers.processes import ProcessGroup, end_in_order_when_told
from splitfuse.bench.endpoint import Endpoint
from splitfuse.bench.measure import measure
from splitfuse.bench.report.page import write_report
from splitfuse.bench.results import Results, load, save
from splitfuse.bench.summary import rows
from splitfuse.bench.workload import Independent, Lengths, Loads
from splitfuse.runtime.environment import environment_info

HOST = "127.0.0.1"
COMMAND = shlex.join(["python", "-m", "benchmarks.peers.serving", *sys.argv[1:]])
VOCAB_SIZE = 32_000  # of the shapes in benchmarks/models.py
START_SECONDS = 600.0
END_SECONDS = 30.0
LOG_CHARACTERS = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="+", metavar="ENGINE[,NAME=VALUE...]")
    parser.add_argument("--model", type=Path, required=True, help="a folder that benchmarks.models wrote")
    parser.add_argument("--peers", type=Path, required=True, help="where benchmarks.peers.install put them")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results")
    parser.add_argument("--clients", default="1,4,8,16,32")
    parser.add_argument(
        "--requests", type=int, help="that count at each point; left out, 4 for each client and 32 more"
    )
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--prompt", type=float, default=512)
    parser.add_argument("--generate", type=float, default=64)
    parser.add_argument("--prompt-speed", type=float, default=512.0, help="prompt speed of the SLO, tokens/s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        contenders = [Contender.parse(text, SERVED) for text in arguments.contenders]
    except ValueError as error:
        parser.error(str(error))
    clients = tuple(int(count) for count in arguments.clients.split(","))
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = {contender.label: kept_results(arguments.out / f"{file_name(contender)}.json") for contender in contenders}
    end_in_order_when_told()
    with ExitStack() as stack:
        servers = []
        for contender in contenders:
            model, peers = arguments.model.resolve(), arguments.peers.resolve()
            servers.append(Server(contender, model, peers, kept[contender.label]))
            stack.callback(servers[-1].end)
            servers[-1].pause()
        for repetition in range(arguments.repeat):
            for count in clients:
                for server in servers if (repetition + clients.index(count)) % 2 == 0 else reversed(servers):
                    if is_measured(kept[server.contender.label], count, repetition):
                        continue
                    loads = Loads(
                        clients=(count,), requests=arguments.requests, repeat=1, prompt_speed=arguments.prompt_speed
                    )
                    seed = arguments.seed + repetition
                    server.drive(loads, Lengths(arguments.prompt, arguments.generate), seed, repetition)
                    save(server.measured(), arguments.out / f"{server.name}.json")
    results = [server.measured() for server in servers]
    write_report(results, arguments.out / "report.html", title=f"{arguments.model.name}, served by several engines")
    print(arguments.out / "report.html")


def file_name(contender: Contender) -> str:
    """Return the name of a contender's file of results, without its ending."""
    return contender.label.replace(",", "-").replace("=", "-").replace("/", "-")


def kept_results(path: Path) -> Results | None:
    """Return the points that this command has measured before; None if there are none. Ends the program if the file has
    those of another command.
    """
    if not path.exists():
        return None
    kept = load(path)
    if kept.about.get("command") != COMMAND:
        sys.exit(
            f"{path} has points of another command: choose another --out, or remove it. {kept.about.get('command')}"
        )
    return kept


def is_measured(kept: Results | None, clients: int, repetition: int) -> bool:
    """Return whether a point is among those that were measured before."""
    points = () if kept is None else kept.points
    return any((point.clients, point.repetition) == (clients, repetition) for point in points)


class Server:
    """An engine behind HTTP, in processes of its own, which are stopped until they are driven."""

    def __init__(self, contender: Contender, model: Path, peers: Path, kept: Results | None = None) -> None:
        """Start it and wait until it answers; `kept` are its points of a run before. Raises RuntimeError with the end
        of its log if that fails.
        """
        self.contender = contender
        self.name = file_name(contender)
        self._results = kept
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self._port: int = probe.getsockname()[1]
        self._model = contender.model(model, peers)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `end` closes it
        began = time.perf_counter()
        self._command = self._compose(peers)
        self._process = subprocess.Popen(
            self._command,
            env=contender.environment(peers, len(os.sched_getaffinity(0))),
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            text=True,
        )
        self._group = ProcessGroup(self._process)
        try:
            facts = self._wait_until_ready()
        except BaseException:
            self.end()
            raise
        start_seconds = time.perf_counter() - began
        print(f"{contender.label}: ready after {start_seconds:.1f} s", file=sys.stderr, flush=True)
        self._about = {"server": shlex.join(self._command), "startup_seconds": start_seconds, "given": facts or None}

    def _compose(self, peers: Path) -> list[str]:
        threads = len(os.sched_getaffinity(0))
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self.contender.options.items()]
        address = [f"--host={HOST}", f"--port={self._port}"]
        match self.contender.kind:
            case "splitfuse":
                command = [sys.executable, "-m", "splitfuse.cli", "serve", str(self._model)]
                return [*command, "--no-enable-prefix-caching", f"--name=serving-{self._port}", *address, *flags]
            case "vllm":
                command = [str(peer_python(peers, "vllm")), "-m", "vllm.entrypoints.openai.api_server"]
                command += [
                    f"--model={self._model}",
                    "--dtype=bfloat16",
                    "--max-model-len=4096",
                    "--no-enable-prefix-caching",
                ]
                return [*command, "--served-model-name=model", *address, *flags]
            case "llama-server":
                options = {**LLAMA_DEFAULTS, "threads": threads}
                options |= {"host": HOST, "port": self._port, **self.contender.options}
                command = [str(llama_cpp_program(peers, "llama-server")), "--model", str(self._model), "--no-webui"]
                return [*command, *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
            case "openvino" | "transformers":
                arguments = {"model": str(self._model), "settings": self.contender.options, "threads": threads}
                arguments |= {"host": HOST, "port": self._port}
                python = str(peer_python(peers, self.contender.kind))
                return [python, "-m", f"benchmarks.peers.serve_{self.contender.kind}", json.dumps(arguments)]
        raise ValueError(f"{self.contender.kind} has no server")

    def drive(self, loads: Loads, lengths: Lengths, seed: int, repetition: int) -> None:
        """Continue it, measure the points, and stop it again."""
        self._group.resume()
        target = Endpoint(
            f"http://{HOST}:{self._port}",
            model=None,
            api_key=None,
            ignore_eos=True,
            vocab_size=VOCAB_SIZE,
            timeout=600.0,
            pid=self._process.pid,
        )
        results = asyncio.run(
            measure(
                target,
                lambda asked: Independent(replace(lengths, room=asked.room), asked.vocabulary, seed=seed),
                loads,
                system=self.contender.label,
                about={**environment_info(), "command": COMMAND, **self._about},
            )
        )
        self.pause()
        points = tuple(replace(point, repetition=repetition) for point in results.points)
        if self._results is not None:
            points = (*self._results.points, *points)
        self._results = replace(results, points=points)
        self._tell()

    def measured(self) -> Results:
        """Return all points so far."""
        assert self._results is not None
        return self._results

    def pause(self) -> None:
        """Stop it with SIGSTOP."""
        self._group.pause()

    def end(self) -> None:
        """End all its processes."""
        self._group.resume()
        self._process.terminate()
        self._group.end(patience=END_SECONDS)
        self._log.close()

    def _tell(self) -> None:
        row = next(r for r in rows(self.measured()) if r.clients == self.measured().points[-1].clients)
        goodput = ", ".join(f"{spread} at {speed:g}" for speed, spread in row.goodput.items())
        size = self._group.resident_bytes() / 1e9
        print(
            f"{self.contender.label}, {row.load} clients: {row.throughput} requests/s, goodput {goodput}; TTFT P50 "
            f"{row.ttft[50]:.2f} P95 {row.ttft[95]:.2f} s; ITL P50 {1e3 * row.itl[50]:.0f} P95 "
            f"{1e3 * row.itl[95]:.0f} P99 {1e3 * row.itl[99]:.0f} ms; {row.num_failed} failed; {size:.2f} GB",
            file=sys.stderr,
            flush=True,
        )

    def _wait_until_ready(self) -> dict[str, Any]:
        """Wait for the server; return its facts, if completions_server.py serves it."""
        deadline = time.monotonic() + START_SECONDS
        path = "/ready" if self.contender.kind == "splitfuse" else "/health"
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{self._port}{path}", timeout=5) as answer:
                if answer.status == 200:
                    return dict(json.load(answer)) if self.contender.kind in ("openvino", "transformers") else {}
            time.sleep(0.2)
        self._log.seek(0)
        raise RuntimeError(f"{self.contender.label} did not start:\n{self._log.read()[-LOG_CHARACTERS:]}")


if __name__ == "__main__":
    main()
