"""An engine with a model in a process of its own: started, driven, stopped during the turns of others, ended.

Decides what command and environment each kind of engine gets. Knows no figure's meaning.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.convert import BF16, FP16, GGUF_TYPES, IR_PRECISIONS, W8A8, converted
from benchmarks.peers.install import llama_cpp_program, peer_python, vllm_preloads
from benchmarks.peers.processes import ProcessGroup
from benchmarks.peers.workload import Figures, Workload

REPOSITORY = Path(__file__).parent.parent.parent
DRIVEN = ("splitfuse", "vllm", "llama-server", "llama-bench")
"""Kinds that a `drive_...` module drives through a workload."""
SERVED = ("splitfuse", "vllm", "llama-server", "openvino", "transformers")
"""Kinds that can be served."""
FORM_SETTING = {
    "splitfuse": "type",
    "vllm": "checkpoint",
    "llama-server": "type",
    "llama-bench": "type",
    "openvino": "precision",
}
FORMS_READ = {
    "splitfuse": GGUF_TYPES,
    "vllm": (BF16, W8A8),
    "llama-server": GGUF_TYPES,
    "llama-bench": GGUF_TYPES,
    "openvino": IR_PRECISIONS,
}
VLLM_ENVIRONMENT = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1"}
END_SECONDS = 20
LOG_LINES_SHOWN = 30


@dataclass(frozen=True)
class Contender:
    """An engine and its settings, as written on the command line: `vllm,checkpoint=w8a8,max_num_batched_tokens=256`."""

    label: str
    kind: str
    settings: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str, kinds: Sequence[str]) -> Contender:
        """Parse a contender. Raises ValueError for an unknown kind, or a setting without a value."""
        kind, *pairs = text.split(",")
        if kind not in kinds:
            raise ValueError(f"{kind!r} is none of {', '.join(kinds)}")
        settings = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"{pair!r} should be name=value")
            settings[name] = json_or_text(value)
        contender = cls(text, kind, settings)
        if kind in FORMS_READ and contender.form not in FORMS_READ[kind]:
            raise ValueError(f"{kind} reads {', '.join(FORMS_READ[kind])}, not {contender.form!r}")
        return contender

    @property
    def form(self) -> str:
        """Form of the model that it reads."""
        if self.kind not in FORM_SETTING:
            return BF16
        return str(self.settings.get(FORM_SETTING[self.kind], FP16 if self.kind == "openvino" else BF16))

    @property
    def options(self) -> dict[str, Any]:
        """Its settings, except for the form of the model."""
        return {name: value for name, value in self.settings.items() if name != FORM_SETTING.get(self.kind)}

    def model(self, model: Path, peers: Path) -> Path:
        """Return the model in the form that this engine reads, converting it if necessary. A file is as it is."""
        reads_folder = self.kind == "transformers" or (self.kind in ("splitfuse", "vllm") and self.form == BF16)
        return model if reads_folder or model.is_file() else converted(model, self.form, peers)

    def command(self, model: Path, peers: Path, threads: int) -> list[str]:
        """Return the command of the driver."""
        arguments: dict[str, Any] = {"model": str(model), "settings": self.options, "threads": threads}
        if self.kind.startswith("llama"):
            arguments["program"] = str(llama_cpp_program(peers, self.kind))
        python = str(peer_python(peers, "vllm")) if self.kind == "vllm" else sys.executable
        return [python, "-m", f"benchmarks.peers.drive_{self.kind.replace('-', '_')}", json.dumps(arguments)]

    def environment(self, peers: Path, threads: int) -> dict[str, str]:
        """Return the environment of the driver."""
        values = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        if self.kind == "vllm":
            cpus = sorted(os.sched_getaffinity(0))[:threads]
            values |= VLLM_ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus))}
            values["LD_PRELOAD"] = ":".join(map(str, vllm_preloads(peers)))
            values["PATH"] = f"{peer_python(peers, 'vllm').parent}:{os.environ['PATH']}"
        return {**os.environ, **values}


class Running:
    """A contender's process and its children."""

    def __init__(self, contender: Contender, model: Path, peers: Path, threads: int) -> None:
        """Start it and wait until it has loaded. Raises RuntimeError with the end of its log if that fails."""
        self.contender = contender
        path = contender.model(model, peers)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `end` closes it
        start = time.perf_counter()
        self._process = subprocess.Popen(
            contender.command(path, peers, threads),
            env=contender.environment(peers, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self._group = ProcessGroup(self._process)
        try:
            self.facts: Mapping[str, Any] = self._answer()
        except BaseException:
            self.end()
            raise
        self.start_seconds = time.perf_counter() - start

    def measure(self, workload: Workload, round_number: int) -> Figures:
        """Continue it, run the workload, and stop it again. Raises RuntimeError if that fails."""
        assert self._process.stdin is not None
        self._group.resume()
        with suppress(BrokenPipeError):  # `_answer` says why
            self._process.stdin.write(json.dumps({"workload": workload.name, "round": round_number}) + "\n")
        figures: Figures = self._answer()
        self.pause()
        return figures

    def pause(self) -> None:
        """Stop it with SIGSTOP."""
        self._group.pause()

    def resident_bytes(self) -> int:
        """Return the memory of all its processes, shared pages counted once (PSS)."""
        return self._group.resident_bytes()

    def end(self) -> None:
        """End all its processes."""
        assert self._process.stdin is not None
        self._group.resume()
        self._process.stdin.close()
        self._group.end(patience=END_SECONDS)
        self._log.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._log.seek(0)
        tail = "".join(self._log.readlines()[-LOG_LINES_SHOWN:])
        raise RuntimeError(f"{self.contender.label} has ended:\n{tail}")


def json_or_text(value: str) -> Any:
    """Return a number or boolean if the text is one, else the text."""
    try:
        return json.loads(value)
    except ValueError:
        return value
