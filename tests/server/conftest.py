"""One server for all tests that do not change it."""

from collections.abc import Iterator

import pytest
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


@pytest.fixture(scope="session")
def pipe() -> splitfuse.Pipeline:
    """What a client reads must be what this gives."""
    return splitfuse.pipeline()
