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
        options = {
            "backend": f"kind=openai_http,target={URL},model={MODEL}",
            "profile": "kind=concurrent,streams=4",
            "constraint": "kind=max_requests,count=24",
            "data": "kind=synthetic_text,prompt_tokens=64,output_tokens=16",
            "tokenizer": f"kind=huggingface_auto,model={TOKENIZER}",
            "output": f"kind=json,path={output}",
        }
        flags = [text for name, value in options.items() for text in (f"--{name}", value)]
        subprocess.run([program, "run", *flags], check=True, timeout=300)
        (found,) = json.loads(output.read_text(encoding="utf-8"))["benchmarks"]
        totals = found["metrics"]["request_totals"]
        check(totals["successful"] == 24 and not totals["errored"], totals)


run()
