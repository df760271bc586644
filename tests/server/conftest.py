"""One server for all tests that do not change it, and OpenAI's client of it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai_clients import connect
from running_server import RunningServer, running_server

import splitfuse


@pytest.fixture(scope="session")
def shared() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(shared: RunningServer) -> Iterator[RunningServer]:
    """The shared server; every test must leave it as it found it."""
    yield shared
    shared.assert_idle()


@pytest.fixture
def ai(server: RunningServer) -> Iterator[openai.OpenAI]:
    with connect(server) as client:
        yield client


CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")  # an event loop runs as long as it is open
def browser() -> Iterator[Any]:
    """A Chromium, for the tests of pages."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-extras installs it")
    with api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        path = str(own) if own.exists() else next(filter(None, map(shutil.which, CHROMIUM)), None)
        if path is None:
            pytest.skip("there is no Chromium: playwright install chromium, or the system's package")
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def pipe() -> splitfuse.Pipeline:
    """What a client reads must be what this gives."""
    return splitfuse.pipeline()
