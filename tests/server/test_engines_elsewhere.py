"""A server and an engine on two machines, as far as one machine has two: in network namespaces."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_process import engine_process, make_key
from patience import PATIENCE
from server_process import server_process, wait_until
from two_machines import FIRST, SECOND, SECOND_ADDRESS, ip, two_machines, within

DRIVER = Path(__file__).with_name("stream_all.py")
ENGINE = f"{SECOND_ADDRESS}:9000"


@pytest.fixture(name="two_machines")
def machines() -> Iterator[None]:
    with two_machines():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("two_machines")
@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_streams_go_on_when_the_other_machine_is_lost(how: str, tmp_path: Path) -> None:
    key = make_key(tmp_path)
    flags = ("--replicas", "1", "--num-threads", "1", "--engine", ENGINE, "--key-file", key)
    with (
        engine_process(
            tmp_path / "engine", "--key-file", key, "--num-blocks=400", listen=ENGINE, prefix=within(SECOND)
        ) as engine,
        server_process(tmp_path, "elsewhere", *flags, prefix=within(FIRST)) as server,
    ):
        server.wait_for("splitfuse serves ")
        url = server.said.rpartition(" on ")[2].split()[0]

        def streams() -> subprocess.Popen[str]:
            command = [*within(FIRST), sys.executable, str(DRIVER), url, "8", "250"]
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

        def answers(process: subprocess.Popen[str]) -> list[list[object]]:
            return json.loads(process.communicate(timeout=PATIENCE)[0].splitlines()[-1])  # type: ignore[no-any-return]

        whole = answers(streams())
        assert [resumed for _, resumed in whole] == [0] * 8
        process = streams()
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        if how == "killed":
            engine.send(signal.SIGKILL)
        else:
            ip("-n", SECOND, "link", "set", "sf0", "down")
        after = answers(process)
        assert [text for text, _ in after] == [text for text, _ in whole]
        assert any(resumed for _, resumed in after)
        command = [sys.executable, "-m", "splitfuse.cli", "ps"]
        listed = subprocess.run([*within(FIRST), *command], capture_output=True, text=True, check=True)
        assert "elsewhere/0  here" in listed.stdout and f"elsewhere/1  {ENGINE}" in listed.stdout
        wait_until(lambda: f"the engine {ENGINE} is gone" in server.said)
        if how == "cut off":
            ip("-n", SECOND, "link", "set", "sf0", "up")
            server.wait_for(f"the engine {ENGINE} is ready again")
            assert [text for text, _ in answers(streams())] == [text for text, _ in whole]
