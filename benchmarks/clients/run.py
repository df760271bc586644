"""Try clients and frameworks against `splitfuse serve`, each in an environment of its own, and print what works.

    python -m benchmarks.clients.run FOLDER [--client openai ...] [--model M] [--out FILE.md]

FOLDER keeps the environments; pip and npm are used as this machine has them set up. `storyteller`, which is bundled,
is served if no model is named: its answers mean little, but their form is what a client sees.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
HERE = Path(__file__).parent
START_SECONDS = 300
CLIENT_SECONDS = 900


@dataclass(frozen=True)
class Client:
    """Describes a client: its script, and the packages that it needs."""

    script: str
    packages: tuple[str, ...]

    @property
    def is_node(self) -> bool:
        return self.script.endswith(".mjs")


CLIENTS: Mapping[str, Client] = {
    "openai-python": Client("drive_openai.py", ("openai",)),
    "openai-node": Client("drive_openai.mjs", ("openai", "zod")),
    "langchain-openai": Client("drive_langchain.py", ("langchain-openai",)),
    "instructor": Client("drive_instructor.py", ("instructor",)),
    "pydantic-ai": Client("drive_pydantic_ai.py", ("pydantic-ai-slim[openai]",)),
    "openai-agents": Client("drive_openai_agents.py", ("openai-agents",)),
    "litellm": Client("drive_litellm.py", ("litellm",)),
    "vercel-ai": Client("drive_vercel_ai.mjs", ("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod")),
    "llama-index": Client(
        "drive_llama_index.py", ("llama-index-llms-openai-like", "llama-index-embeddings-openai-like")
    ),
    "anthropic-python": Client("drive_anthropic.py", ("anthropic",)),
    "claude-code": Client("drive_claude_code.mjs", ("@anthropic-ai/claude-code",)),
    "lm-eval": Client("drive_lm_eval.py", ("lm-eval[api]",)),
    "guidellm": Client("drive_guidellm.py", ("guidellm",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the environments are, or will be")
    parser.add_argument("--client", action="append", choices=CLIENTS, help="may be repeated; left out, all")
    parser.add_argument("--model", help="what splitfuse serves; left out, the bundled model")
    parser.add_argument("--url", help="URL of a running server, in place of one that is started")
    parser.add_argument("--served-name", default="storyteller", help="name by which clients call the model")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    arguments = parser.parse_args()
    names = arguments.client or list(CLIENTS)
    results: dict[str, dict[str, str | None]] = {}
    versions: dict[str, str] = {}
    with served(arguments.url, arguments.model, arguments.served_name) as url:
        for name in names:
            say(f"{name}: installing")
            environment = installed(arguments.folder.resolve() / name, CLIENTS[name])
            versions[name] = version_of(environment, CLIENTS[name])
            say(f"{name}: {versions[name]}")
            results[name] = tried(environment, CLIENTS[name], url, arguments.served_name)
    page = table(results, versions)
    print(page)
    if arguments.out is not None:
        arguments.out.write_text(page, encoding="utf-8")


@contextmanager
def served(url: str | None, model: str | None, name: str) -> Iterator[str]:
    """Yield the URL of a server, which ends with the block if it was started here."""
    if url is not None:
        yield url
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model_flags = [] if model is None else ["--model", model]
    command = [sys.executable, "-m", "splitfuse.cli", "serve", *model_flags, "--port", str(port)]
    server = subprocess.Popen([*command, "--served-model-name", name], cwd=REPOSITORY, start_new_session=True)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return when the server is ready. Raises RuntimeError if it has ended or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the server did not start")


def installed(folder: Path, client: Client) -> Path:
    """Return a folder with the client installed in it."""
    done = folder / "installed"
    if done.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if client.is_node:
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", *client.packages]
        (folder / "package.json").write_text("{}", encoding="utf-8")
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
    else:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        constraints = ["--constraint", str(REPOSITORY / "constraints.txt")] if "lm-eval" in client.packages[0] else []
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *constraints, *client.packages]
        subprocess.run(pip, check=True, stdout=sys.stderr)
    done.touch()
    return folder


def version_of(environment: Path, client: Client) -> str:
    """Return the version of the client's first package."""
    package = client.packages[0].partition("[")[0]
    if client.is_node:
        found = json.loads((environment / "node_modules" / package / "package.json").read_text(encoding="utf-8"))
        return str(found["version"])
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    python = str(environment / "bin" / "python")
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def tried(environment: Path, client: Client, url: str, model: str) -> dict[str, str | None]:
    """Return each feature of a client with the error, or None if it works."""
    arguments = [url, model]
    if client.is_node:  # modules are looked up from where a script lies
        for name in ("features.mjs", client.script):
            shutil.copy(HERE / name, environment)
        command = ["node", str(environment / client.script), *arguments]
    else:
        module = f"benchmarks.clients.{client.script.removesuffix('.py')}"
        command = [str(environment / "bin" / "python"), "-m", module, *arguments]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1"}
    log = environment / "log.txt"
    with log.open("w") as errors:
        done = subprocess.run(
            command,
            env=environ,
            cwd=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=CLIENT_SECONDS,
        )
    results = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            results[found["feature"]] = found["error"]
            say(f"  {found['feature']}: {found['error'] or 'works'}")
    if not results:
        results["starts"] = f"the script ended with status {done.returncode}: see {log.name}"
    return results


def table(results: Mapping[str, Mapping[str, str | None]], versions: Mapping[str, str]) -> str:
    """Return a table of clients and features in Markdown, with the errors below it."""
    features = list(dict.fromkeys(feature for each in results.values() for feature in each))
    lines = [f"| client | version | {' | '.join(features)} |", f"|---|---|{'---|' * len(features)}"]
    for name, found in results.items():
        cells = ["" if each not in found else "no" if found[each] else "yes" for each in features]
        lines.append(f"| {name} | {versions[name]} | {' | '.join(cells)} |")
    errors = [f"- {name}, {each}: {error}" for name, found in results.items() for each, error in found.items() if error]
    return "\n".join([*lines, *([""] if errors else []), *errors]) + "\n"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
