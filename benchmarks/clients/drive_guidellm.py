"""Tries guidellm: a load of chats, with prompts that it makes by the tokenizer of the model's folder."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.clients.features import MODEL, URL, check, feature, run

TOKENIZER = Path(__file__).parents[2] / "splitfuse" / "assets" / "storyteller"


@feature("load")
def load() -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.json"
        program = str(Path(sys.executable).with_name("guidellm"))
        options = {"target": URL, "model": MODEL, "processor": TOKENIZER, "profile": "concurrent", "rate": 4}
        options |= {"max-requests": 24, "data": "prompt_tokens=64,output_tokens=16", "output-path": output}
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        subprocess.run([program, "benchmark", "run", *flags, "--disable-console"], check=True, timeout=300)
        (found,) = json.loads(output.read_text(encoding="utf-8"))["benchmarks"]
        totals = found["metrics"]["request_totals"]
        check(totals["successful"] == 24 and not totals["errored"], totals)


run()
