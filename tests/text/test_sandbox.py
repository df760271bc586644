"""Templates and texts in a process with limits: the same results, and nothing that they do reaches anything else."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_tokenizers
from tokenizers import normalizers

from splitfuse.errors import EngineUnavailableError, InvalidRequestError, TokenizerError
from splitfuse.models.sources.hub import open_model
from splitfuse.text import sandbox as sandbox_module
from splitfuse.text.sandbox import Sandbox
from splitfuse.text.sandbox_worker import Encode, Setup, Worker
from splitfuse.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
TEXTS = ("Hello", " a  b\n", "na\u00efve \u4e2d\u6587 \U0001f41d <s>", "x" * 40_000)
EATS_MEMORY = "{% if messages[0].content == 'much' %}{{ 'x' * 2 ** 40 }}{% endif %}fine"
HOLDS = """{% if messages[0].content == 'hold' %}{% set n = namespace(x=3) %}{% for i in range(40) %}
{%- set n.x = n.x * n.x %}{% endfor %}{% endif %}fine"""


def sandbox_of(template: str | None, *, seconds: float = 5.0) -> Sandbox:
    backend = tiny_tokenizers.KINDS["byte_level"]()
    return Sandbox(Tokenizer(backend, chat_template=template), seconds=seconds, compile_seconds=seconds / 2)


@pytest.fixture(scope="module")
def bundled() -> Iterator[Sandbox]:
    sandbox = Sandbox(Tokenizer.from_source(open_model(None)))
    yield sandbox
    sandbox.close()


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
def test_tokens_are_those_of_the_tokenizer(kind: str) -> None:
    tokenizer = Tokenizer(tiny_tokenizers.KINDS[kind](), special_tokens={"bos_token": "<s>"})
    sandbox = Sandbox(tokenizer)
    for text in TEXTS if kind != "metaspace_unigram" else TEXTS[:1]:
        for adds in (True, False):
            assert sandbox.encode(text, add_special_tokens=adds) == tokenizer.encode(text, add_special_tokens=adds)
    sandbox.close()


def test_a_conversation_is_rendered_with_its_variables(bundled: Sandbox) -> None:
    assert bundled.render(HELLO) == "<|bos|><|user|>Hello<|end|><|assistant|>"
    assert bundled.render(HELLO, add_generation_prompt=False) == "<|bos|><|user|>Hello<|end|>"
    other = sandbox_of("{{ number + 1 }} {{ messages[0].content }}")
    assert other.render(HELLO, variables={"number": 2**70}) == f"{2**70 + 1} Hello"
    other.close()


def test_errors_are_those_of_template_and_tokenizer(bundled: Sandbox) -> None:
    with pytest.raises(InvalidRequestError, match="the roles of this model are") as refusal:
        bundled.render([{"role": "robot", "content": "Hi"}])
    assert refusal.value.parameter == "messages"
    with pytest.raises(InvalidRequestError, match="variables must be plain JSON data"):
        bundled.render(HELLO, variables={"x": object()})
    with pytest.raises(InvalidRequestError, match="half a surrogate pair at character 1"):
        bundled.encode("a\ud800")
    with pytest.raises(InvalidRequestError, match=r"messages must be plain JSON data: .* surrogates not allowed"):
        bundled.render([{"role": "user", "content": "\ud800"}])
    sandbox = sandbox_of(None)
    with pytest.raises(TokenizerError, match="no chat template"):
        sandbox.render(HELLO)
    assert sandbox.encode("Hello")
    sandbox.close()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "broken.*line 1"),
        ("{{ messages | nonsense }}", "broken.*No filter named 'nonsense'"),
        ("{{ 7 ** (9 ** 9) }}", r"cannot be compiled: it ran for more than 0\.01 s"),
    ],
)
def test_template_that_does_not_compile_is_found_at_start(template: str, message: str) -> None:
    sandbox = sandbox_of(template, seconds=0.02)
    with pytest.raises(TokenizerError, match=message):
        sandbox.start()
    assert sandbox.pid is None


@pytest.mark.parametrize("source", ["{{ 'a' * 2 ** 40 }}", "{{ 2 ** 40 * [1] }}", "{{ '%2000000000d' % 1 }}"])
def test_a_template_that_needs_much_memory_fails_alone(source: str) -> None:
    sandbox = sandbox_of("{% if messages[0].content == 'much' %}" + source + "{% endif %}fine")
    with pytest.raises(TokenizerError, match=r"templates may not: MemoryError|needed more than 1024 MiB"):
        sandbox.render([{"role": "user", "content": "much"}])
    sandbox.close()


def test_a_template_that_writes_without_end_is_refused() -> None:
    sandbox = sandbox_of("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}")
    with pytest.raises(TokenizerError, match="it wrote 99999000 characters; at most 16777216 are accepted"):
        sandbox.render(HELLO)
    sandbox.close()


def test_a_template_that_holds_the_interpreter_is_stopped_and_the_next_works() -> None:
    sandbox = sandbox_of(HOLDS, seconds=0.1)
    with pytest.raises(TokenizerError, match=r"the chat template was stopped: it ran for more than 0\.1 s"):
        sandbox.render([{"role": "user", "content": "hold"}])
    assert sandbox.pid is None and sandbox.num_ended == 1
    sandbox._seconds = 20.0
    assert sandbox.render(HELLO) == "fine"
    sandbox.close()
    assert sandbox.num_ended == 1


def test_a_text_that_takes_too_long_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "CHARACTERS_PER_SECOND", 10**12)
    sandbox = sandbox_of(None, seconds=1e-6)
    with pytest.raises(
        InvalidRequestError, match="the tokenizer was stopped, at a text of 4000000 characters"
    ) as error:
        sandbox.encode("word" * 1_000_000)
    assert error.value.parameter == "prompt"
    sandbox._seconds = 20.0
    assert sandbox.encode("word")
    sandbox.close()


def test_a_normalizer_that_makes_a_letter_a_book_fails_alone() -> None:
    backend = tiny_tokenizers.KINDS["byte_level"]()
    backend.normalizer = normalizers.Sequence([normalizers.Replace("a", "a" * 1000)] * 4)
    sandbox = Sandbox(Tokenizer(backend), seconds=1)
    with pytest.raises(InvalidRequestError, match=r"stopped, at a text of 1 characters: it (needed|ran)"):
        sandbox.encode("a")
    assert sandbox.encode("b") == sandbox.encode("b")
    sandbox.close()


def test_a_text_of_too_many_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(tiny_tokenizers.KINDS["byte_level"]())
    worker = Worker(Setup(tokenizer.to_json(), {}, None, 1.0))
    number = len(tokenizer.encode("Hello there"))
    monkeypatch.setattr("splitfuse.text.sandbox_worker.MAX_TOKENS", number - 1)
    with pytest.raises(InvalidRequestError, match=f"the text has {number} tokens; at most {number - 1} are accepted"):
        worker._encode(Encode("Hello there", True, 1.0))


@pytest.mark.parametrize(
    ("number", "expected", "message"),
    [
        (signal.SIGABRT, TokenizerError, "needed more than 1024 MiB of memory, or crashed"),
        (signal.SIGKILL, EngineUnavailableError, "the process for texts was killed; try again"),
    ],
)
def test_a_process_that_dies_fails_one_request(number: int, expected: type[Exception], message: str) -> None:
    sandbox = sandbox_of(HOLDS, seconds=20.0)
    sandbox.start()
    errors: list[Exception] = []

    def hold() -> None:
        with pytest.raises(expected, match=message) as caught:
            sandbox.render([{"role": "user", "content": "hold"}])
        errors.append(caught.value)

    asking, pid = threading.Thread(target=hold), sandbox.pid
    asking.start()
    assert pid is not None
    while pid_is_idle(pid):
        pass
    os.kill(pid, number)
    asking.join()
    assert errors and sandbox.render(HELLO) == "fine"
    sandbox.close()


def pid_is_idle(pid: int) -> bool:
    """Whether a process waits."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "S"


def test_closing_ends_what_runs() -> None:
    sandbox = sandbox_of(HOLDS, seconds=20.0)
    sandbox.start()
    pid = sandbox.pid
    assert pid is not None
    errors: list[Exception] = []

    def hold() -> None:
        with pytest.raises(EngineUnavailableError, match="shutting down") as caught:
            sandbox.render([{"role": "user", "content": "hold"}])
        errors.append(caught.value)

    asking = threading.Thread(target=hold)
    asking.start()
    while pid_is_idle(pid):
        pass
    sandbox.close()
    asking.join()
    assert errors and not Path(f"/proc/{pid}").exists()
    with pytest.raises(EngineUnavailableError):
        sandbox.encode("Hello")


def test_a_process_that_cannot_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = sandbox_of(None)
    with monkeypatch.context() as patch:
        patch.setattr(sandbox_module.sys, "executable", "/nowhere/python")
        with pytest.raises(EngineUnavailableError, match=r"the process for texts could not be started: .*; try again"):
            sandbox.encode("Hello")
    assert sandbox.encode("Hello")
    sandbox.close()


def test_a_process_ends_at_its_limit_of_computing_time() -> None:
    script = (
        "import time; from splitfuse.text.sandbox_worker import limit_time; limit_time(0.05);"
        "print(time.process_time(), flush=True)\nwhile True: pass"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        began = float(process.stdout.readline())
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == -signal.SIGPROF
    assert used.ru_utime + used.ru_stime - began < 0.5  # the system counts whole seconds for other limits
