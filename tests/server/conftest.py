"""One server for all tests that do not change it, and OpenAI's client of it."""

from collections.abc import Iterator

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


@pytest.fixture(scope="session")
def pipe() -> splitfuse.Pipeline:
    """What a client reads must be what this gives."""
    return splitfuse.pipeline()
