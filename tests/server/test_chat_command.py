"""`splitfuse chat`: at a terminal, through a pipe, with a server, with a model of its own."""

import codecs
import os
import pty
import select
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from running_server import PATIENCE, RunningServer

import splitfuse
from splitfuse.deploy import registry
from splitfuse.deploy.registry import Deployment

FIRST, SECOND = "Erik plays the cello. What does Erik play?", "Who plays the cello?"
HEED_CTRL_C = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from splitfuse.cli import main; main()"
)

SHORT = ["--max-new-tokens", "20"]


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The place of these tests' deployments: none of the user's own is seen."""
    path = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(path))
        yield path


@pytest.fixture
def chat(run: Run) -> Run:
    """Chat by a command, with a pipe for its input."""
    return partial(run, "chat", *SHORT)


def conversation(pipe: splitfuse.Pipeline, *turns: str, system: str | None = None, **keywords: Any) -> list[str]:
    """What is answered to each turn."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers: list[str] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answers.append(pipe(messages, chat=True, **{"max_new_tokens": 20, **keywords})[0].generated_text)
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


# Through a pipe ------------------------------------------------------------------------------------------------------


def test_a_line_is_a_turn_and_reset_clears_history(chat: Run, pipe: splitfuse.Pipeline, server: RunningServer) -> None:
    turns = conversation(pipe, FIRST, SECOND)
    afresh = conversation(pipe, SECOND)
    assert afresh[0] != turns[1], "these turns do not show whether anything is remembered"
    lines = f"{FIRST}\n\n{SECOND}\n/reset\n{SECOND}\n/exit\n{FIRST}\n"
    wanted = "\n".join([*turns, *afresh]) + "\n"
    assert chat("--url", server.url, stdin=lines) == (0, wanted, "")
    status, out, err = chat("--model", Path(splitfuse.__file__).parent / "assets" / "storyteller", stdin=lines)
    assert (status, out, err) == (0, wanted, "(loading the model)\n")


def test_a_backslash_continues_a_turn(chat: Run, pipe: splitfuse.Pipeline, server: RunningServer) -> None:
    turn = "Anna keeps a goose.\n\nWho keeps a goose?"
    lines = turn.replace("\n", "\\\n")
    wanted = "\n".join(conversation(pipe, turn, SECOND)) + "\n"
    assert chat("--url", server.url, stdin=f"{lines}\n{SECOND}\n") == (0, wanted, "")
    alone = conversation(pipe, turn)[0] + "\n"
    assert chat("--url", server.url, stdin=lines + "\\\n") == (0, alone, "")  # nothing follows


def test_sampling_flags_apply(chat: Run, pipe: splitfuse.Pipeline, server: RunningServer) -> None:
    flags = ["--temperature", 1, "--seed", 3, "--max-new-tokens", 5]
    wanted = conversation(pipe, FIRST, temperature=1.0, seed=3, max_new_tokens=5)
    assert chat("--url", server.url, *flags, stdin=FIRST) == (0, wanted[0] + "\n", "")


def test_chat_finds_a_deployment_by_name_or_default(chat: Run, pipe: splitfuse.Pipeline, server: RunningServer) -> None:
    port = int(server.url.rpartition(":")[2])
    for name, flags in (("mine", ["--name", "mine"]), ("splitfuse", [])):
        deployment = Deployment(
            name=name, host="127.0.0.1", port=port, scheme="http", model="storyteller", needs_key=False, drain_timeout=1
        )
        registry.register(deployment)
        try:
            status, out, err = chat(*flags, stdin=FIRST)
        finally:
            registry.unregister(deployment)
        assert (status, [out]) == (0, [answer + "\n" for answer in conversation(pipe, FIRST)])
        assert err == f"(chatting with storyteller at {server.url})\n"


def test_a_failed_turn_is_reported_and_the_chat_continues(
    chat: Run, pipe: splitfuse.Pipeline, server: RunningServer
) -> None:
    status, out, err = chat("--url", server.url, stdin=f"{'word ' * 3000}\n{FIRST}\n")
    assert (status, [out]) == (1, [answer + "\n" for answer in conversation(pipe, FIRST)])
    assert "the prompt has " in err and err.count("\n") == 1


def test_incompatible_flags(chat: Run) -> None:
    for flags, message in (
        (["--name", "a", "--url", "http://b"], "--name and --url are mutually exclusive"),
        (["--name", "a", "--num-blocks", 5], "--num-blocks and --name are mutually exclusive"),
        (["--name", "nobody"], "there is no deployment named 'nobody'"),
        (["--url", "http://127.0.0.1:9"], "no server answers at"),
        (
            ["--temperature", -1, "--model", Path(splitfuse.__file__).parent / "assets" / "storyteller"],
            "temperature must",
        ),
    ):
        status, out, err = chat(*flags, stdin="hello\n")
        assert (status, out) == (1, "") and message in err and "Traceback" not in err


# At a terminal -------------------------------------------------------------------------------------------------------


class Terminal:
    """A person at a terminal."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-c", HEED_CTRL_C, "chat", *arguments])
        self._unread = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end within a character

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def read_until(self, text: str) -> str:
        """What is shown up to `text`."""
        while text not in self._unread:
            more = self._read()
            assert more is not None, f"it ended, showing {self._unread!r}"
            self._unread = (self._unread + more).replace("\r\n", "\n")  # which may have come in two pieces
        before, _, self._unread = self._unread.partition(text)
        return before

    def interrupt(self) -> None:
        """Press Ctrl-C at a prompt until there is a new one: Python misses what comes just before it waits for keys."""
        while "\n> " not in self._unread:
            self.type("\x03")
            while "\n> " not in self._unread and select.select([self._end], [], [], 1.0)[0]:
                more = self._read()
                assert more is not None, f"it ended, showing {self._unread!r}"
                self._unread = (self._unread + more).replace("\r\n", "\n")
        self._unread = ""

    def read_to_end(self) -> tuple[int, str]:
        """How it ends, and what it still shows."""
        while (more := self._read()) is not None:
            self._unread = (self._unread + more).replace("\r\n", "\n")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self._unread

    def _read(self) -> str | None:
        ready, _, _ = select.select([self._end], [], [], PATIENCE)
        assert ready, f"nothing comes any more after {self._unread!r}"
        try:
            return self._decoder.decode(os.read(self._end, 65536))
        except OSError:  # Linux says so when the other side is closed
            return None

    def close(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self._end)


def test_a_conversation_at_a_terminal(pipe: splitfuse.Pipeline, server: RunningServer) -> None:
    first, second = conversation(pipe, FIRST, SECOND)
    terminal = Terminal("--url", server.url, *SHORT)
    try:
        assert "/reset starts over" in terminal.read_until("> ")
        terminal.type(FIRST + "\n")
        terminal.read_until(FIRST + "\n")
        assert terminal.read_until("\n> ").strip() == first
        terminal.type(SECOND + "\n")
        terminal.read_until(SECOND + "\n")
        assert terminal.read_until("\n> ").strip() == second
        terminal.type("/reset\n")
        terminal.read_until("(starting over)\n")
        terminal.read_until("> ")
        terminal.type("/help\n")
        terminal.read_until("Ctrl-D ends")
        terminal.read_until("> ")
        terminal.type("never sent")
        terminal.read_until("never sent")
        terminal.interrupt()
        terminal.type(SECOND + "\n")
        terminal.read_until(SECOND + "\n")
        assert terminal.read_until("\n> ").strip() == conversation(pipe, SECOND)[0]
        terminal.type("\x04")
        status, rest = terminal.read_to_end()
        assert status == 0 and "Traceback" not in rest
    finally:
        terminal.close()


def test_ctrl_c_ends_an_answer_but_not_the_conversation(server: RunningServer) -> None:
    before = server.client.stats[0].num_generated_tokens
    terminal = Terminal("--url", server.url, "--ignore-eos", "--max-new-tokens", "1800")
    try:
        terminal.read_until("> ")
        with server.held(server.nothing_runs):
            terminal.type(FIRST + "\n")
            terminal.read_until(FIRST + "\n")
            terminal.read_until(" ")  # the answer has begun
            terminal.type("\x03")
            terminal.read_until("\n> ")
            server.assert_idle()
        assert 0 < server.client.stats[0].num_generated_tokens - before < 1800
        terminal.type("/exit\n")
        status, rest = terminal.read_to_end()
        assert status == 0 and "Traceback" not in rest
    finally:
        terminal.close()
