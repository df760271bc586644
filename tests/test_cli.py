"""The command line: inputs, outputs and error messages of `generate` and `plan-memory`."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from backends import why_not
from command_line import Ended, Run
from readable_answers import PROMPT
from typer.testing import CliRunner

import splitfuse
from splitfuse import interrupts
from splitfuse.cli.commands import app
from splitfuse.cli.flags import SAMPLING_FLAGS
from splitfuse.config.engine import EngineConfig
from splitfuse.models.sources.hub import BUNDLED_MODEL

COMMAND = [sys.executable, "-m", "splitfuse.cli"]
COMMAND_THAT_HEEDS_CTRL_C = [  # wherever the tests run: in the background, a shell has its children ignore it
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from splitfuse.cli import main; main()",
]
READABLE = ["--dtype", "float32", "--temperature", "1", "--seed", "5", "--ignore-eos", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def pipe() -> splitfuse.Pipeline:
    return splitfuse.pipeline(dtype="float32")


def expected(pipe: splitfuse.Pipeline, prompts: list[Any], **changes: Any) -> list[str]:
    keywords = {"temperature": 1.0, "seed": 5, "ignore_eos": True, "max_new_tokens": 6, **changes}
    return [response.generated_text for response in pipe(prompts, **keywords)]


def texts(ended: Ended) -> list[str]:
    return [answer["text"] for answer in ended.answers]


# Prompts in, answers out ---------------------------------------------------------------------------------------------


def test_prompts_as_arguments_print_json_lines(run: Run, pipe: splitfuse.Pipeline) -> None:
    ended = run("generate", PROMPT, "Once", *READABLE, "--logprobs", 1)
    assert (ended.status, ended.err) == (0, "")
    assert texts(ended) == expected(pipe, [PROMPT, "Once"])
    first = ended.answers[0]
    assert (first["index"], first["choice"], first["finish_reason"], first["generated_tokens"]) == (0, 0, "length", 6)
    assert first["prompt_tokens"] == len(pipe.tokenizer.encode(PROMPT)) and len(first["token_ids"]) == 6
    assert [entry["token_id"] for entry in first["logprobs"]] == first["token_ids"]
    assert 0 < first["seconds_to_first_token"] <= first["seconds"]


def test_every_sampling_flag_is_a_keyword(run: Run, pipe: splitfuse.Pipeline) -> None:
    flags = ["--n", 2, "--top-p", 0.9, "--top-k", 50, "--min-p", 0.01, "--presence-penalty", 0.1, "--stop", "\0"]
    more = ["--frequency-penalty", 0.1, "--repetition-penalty", 1.1, "--min-new-tokens", 2, "--return-full-text"]
    ended = run("generate", PROMPT, *READABLE, *flags, "--stop", "a", *more, "--chat")
    keywords = {"n": 2, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "presence_penalty": 0.1, "stop": ["\0", "a"]}
    more_keywords = {"frequency_penalty": 0.1, "repetition_penalty": 1.1, "min_new_tokens": 2}
    wanted = expected(pipe, [PROMPT], **keywords, **more_keywords, return_full_text=True, chat=True)
    assert [a["text"] for a in sorted(ended.answers, key=lambda a: a["choice"])] == wanted


def test_text_file_is_one_prompt_or_a_prompt_per_line(run: Run, pipe: splitfuse.Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Once upon\u2028a time\n\nErik plays\n", encoding="utf-8")
    assert texts(run("generate", "--input", file, *READABLE)) == expected(pipe, ["Once upon\u2028a time\n\nErik plays"])
    assert texts(run("generate", "--input", file, "--lines", *READABLE)) == expected(
        pipe, ["Once upon\u2028a time", "Erik plays"]
    )


def test_standard_input_is_the_default(run: Run, pipe: splitfuse.Pipeline) -> None:
    assert texts(run("generate", *READABLE, stdin=f"{PROMPT}\n")) == expected(pipe, [PROMPT])
    assert texts(run("generate", "--input", "-", "--lines", *READABLE, stdin="{a\nb\n")) == expected(pipe, ["{a", "b"])


def test_answers_have_the_form_of_a_flag_or_a_line(run: Run, tmp_path: Path) -> None:
    schema, lines = tmp_path / "schema.json", tmp_path / "requests.jsonl"
    schema.write_text('{"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 3}')
    lines.write_text(json.dumps({"prompt": PROMPT, "structured_outputs": {"choice": ["left", "right"]}}))
    flags = ["--temperature", 1, "--seed", 5, "--max-new-tokens", 200]
    (text,) = texts(run("generate", PROMPT, "--json-schema", schema, *flags))
    assert 2 <= len(json.loads(text)) <= 3
    assert re.fullmatch("[ab]{4}", *texts(run("generate", PROMPT, "--regex", "[ab]{4}", *flags)))
    assert texts(run("generate", "--input", lines))[0] in ("left", "right")
    assert re.fullmatch("[ab]{4}\n", run("chat", "--dtype", "float32", "--regex", "[ab]{4}", stdin="Hello\n").out)
    run("generate", PROMPT, "--json-schema", tmp_path).assert_mistake("--json-schema", "cannot be read")
    both = run("generate", PROMPT, "--json-schema", schema, "--regex", "a")
    assert both.status == 1 and "json and regex together" in both.answers[0]["error"]


def test_jsonl_line_has_its_own_keywords(run: Run, pipe: splitfuse.Pipeline, tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "Who\u2028plays?"}]
    requests: list[dict[str, Any]] = [
        {"prompt": PROMPT},
        {"prompt": list(pipe.tokenizer.encode(PROMPT)), "max_new_tokens": 3},
        {"messages": turn},
        {"prompt": "Who plays?", "chat": True, "stop": None},
        {"prompt": "Once", "logit_bias": {"1000": 100}},
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n\n".join(json.dumps(request, ensure_ascii=False) for request in requests), encoding="utf-8")
    ended = run("generate", "--input", file, *READABLE)
    assert ended.status == 0
    assert texts(ended) == [
        *expected(pipe, [PROMPT]),
        *expected(pipe, [PROMPT], max_new_tokens=3),
        *expected(pipe, [turn], chat=True),
        *expected(pipe, ["Who plays?"], chat=True),
        *expected(pipe, ["Once"], logit_bias={1000: 100}),
    ]
    assert texts(run("generate", *READABLE, stdin=file.read_text(encoding="utf-8"))) == texts(ended)


def test_jsonl_messages_may_have_tools(run: Run) -> None:
    chat = {"messages": [{"role": "user", "content": "When?"}], "tools": [{"name": "now"}], "tool_choice": "now"}
    ended = run("generate", *READABLE, stdin=json.dumps({**chat, "parallel_tool_calls": False, "max_new_tokens": 60}))
    (answer,) = ended.answers
    (call,) = answer["tool_calls"]
    assert (
        answer["text"] == "" and call["function"]["name"] == "now" and json.loads(call["function"]["arguments"]) == {}
    )


BAD_LINES = {
    "{oops": "line 1 is not JSON: ",
    "[" * 100_000: "line 2 is not JSON: ",
    "5": 'line 3 must be an object with either "prompt" or "messages"',
    "{}": 'line 4 must be an object with either "prompt" or "messages"',
    '{"prompt": "a", "messages": []}': 'line 5 must be an object with either "prompt" or "messages"',
    '{"prompt": "a", "top": 1}': "line 6: unknown keyword 'top'; did you mean 'stop'?",
    '{"prompt": "a", "stream": true}': "line 7: unknown keyword 'stream'",
    '{"prompt": "a", "logit_bias": {"x": 1}}': "line 8: the keys of logit_bias must be token ids",
    '{"prompt": "a", "logit_bias": [1]}': "logit_bias must be a mapping",
    '{"prompt": "a", "max_new_tokens": -1}': "max_new_tokens must be a whole number from 1",
    '{"prompt": "a", "temperature": NaN}': "temperature must be a number from 0 to 100, not nan",
    '{"prompt": "a", "temperature": null, "n": null}': "n must be a whole number",
    '{"prompt": ["a", "b"]}': "a prompt must be a text or a list of token ids",
    '{"prompt": ""}': "the prompt is empty",
    '{"prompt": [99999]}': "token id 99999",
    '{"prompt": "\\ud800"}': "not valid Unicode",
    '{"messages": [{"role": "cat", "content": "meow"}]}': "the roles of this model are",
}


def test_bad_lines_fail_alone(run: Run, pipe: splitfuse.Pipeline) -> None:
    lines = [*BAD_LINES, json.dumps({"prompt": PROMPT})]
    ended = run("generate", "--input", "-", *READABLE, stdin="\n".join(lines))
    assert (ended.status, ended.err) == (1, "")
    assert [answer["index"] for answer in ended.answers] == list(range(len(lines)))
    for answer, reason in zip(ended.answers, BAD_LINES.values(), strict=False):
        assert reason in answer["error"] and "text" not in answer
    assert [ended.answers[-1]["text"]] == expected(pipe, [PROMPT])


# Mistakes ------------------------------------------------------------------------------------------------------------


def test_help_lists_all_settings_and_sampling_flags(run: Run) -> None:
    shown = run("generate", "--help")
    assert shown.status == 0
    for name in [*EngineConfig.setting_fields(), *SAMPLING_FLAGS]:
        assert f"--{name.replace('_', '-')} " in shown.out
    shown = run("plan-memory", "--help")
    for name in EngineConfig.setting_fields():
        assert f"--{name.replace('_', '-')} " in shown.out
    assert "--temperature" not in shown.out
    for name in ("generate", "plan-memory"):
        assert name in run("--help").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--max-new-token", "3", "hi"], "--max-new-tokens"),
        (["generate", "--max-new-tokens", "three", "hi"], "Invalid value for '--max-new-tokens'"),
        (["generate", "hi", "--nonsense"], "--nonsense"),
        (["generates"], "generates"),
    ],
    ids=["misspelt", "no-number", "unknown", "no-command"],
)
def test_unknown_flag_ends_with_status_2(run: Run, arguments: list[str], message: str) -> None:
    ended = run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert message in ended.err and "Usage: " in ended.err and "Traceback" not in ended.err


def test_missing_double_and_unreadable_prompts(run: Run, tmp_path: Path) -> None:
    run("generate").assert_mistake("no prompt: standard input is empty")
    run("generate", "hi", "--input", "x.txt").assert_mistake("prompts as arguments and --input are mutually exclusive")
    run("generate", "--input", tmp_path / "no.txt").assert_mistake("no.txt cannot be read: No such file or directory")
    run("generate", "--input", tmp_path).assert_mistake("cannot be read: ")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    run("generate", "--input", tmp_path / "latin").assert_mistake("latin cannot be read: ")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    run("generate", "--input", tmp_path / "empty.jsonl").assert_mistake("empty.jsonl is empty")


class Terminal(io.StringIO):
    """A terminal as standard input, which must not be read."""

    def isatty(self) -> bool:
        return True

    def read(self, *_: object) -> str:
        raise AssertionError("the terminal was read")


def test_terminal_input_without_a_prompt_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    run("generate", stdin=None).assert_mistake("no prompt: give one as an argument")


def model_folder(path: Path, kind: str) -> None:
    """A model folder with something wrong, named by `kind`."""
    for file in BUNDLED_MODEL.iterdir():
        (path / file.name).symlink_to(file)
    weights, config = path / "model.safetensors", path / "config.json"
    if kind == "architecture":
        config.unlink()
        config.write_text('{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}')
        (path / "tokenizer.json").unlink()  # which would not help
    elif kind == "no-config":
        config.unlink()
    elif kind == "pickle":
        weights.unlink()
        (path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    elif kind == "truncated":
        whole = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(whole[: len(whole) // 2])
    elif kind == "no-tokenizer":
        (path / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("architecture", "MambaForCausalLM"),
        ("no-config", "has no config.json: it is neither a model folder"),
        ("pickle", "only pickled weights (pytorch_model.bin)"),
        ("truncated", "is not a whole safetensors file, perhaps cut short"),
        ("no-tokenizer", "has no tokenizer.json"),
    ],
)
def test_broken_model_is_reported_in_one_line(run: Run, tmp_path: Path, kind: str, sentence: str) -> None:
    model_folder(tmp_path, kind)
    ended = run("generate", "hi", "--model", tmp_path)
    ended.assert_mistake(sentence)
    assert ended.err.count("\n") == 1
    if kind == "architecture":
        assert "LlamaForCausalLM" in ended.err, "the architectures that would do are not listed"


def test_unsupported_settings_are_rejected(run: Run) -> None:
    run("generate", "hi", "--max-num-seqs", 0).assert_mistake("max_num_seqs must be at least 1, not 0")
    run("generate", "hi", "--dtype", "int3").assert_mistake("dtype must be one of auto, bfloat16")
    run("generate", "hi", "--device", "abacus").assert_mistake("device 'abacus' cannot be used")
    run("generate", "hi", "--num-blocks", 10**9).assert_mistake("does not fit", "need", "have", "num_blocks=")


def test_plan_memory_prints_need_and_have_without_loading(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(BUNDLED_MODEL / "config.json")
    ended = run("plan-memory", "--model", tmp_path, "--num-blocks", 100)
    assert (ended.status, ended.err) == (0, "")
    assert [line.split()[0] for line in ended.out.splitlines()][4:6] == ["need", "have"]
    assert "100 blocks of 32: 3200 tokens" in ended.out
    draft = ("--draft-model", tmp_path, "--num-speculative-tokens", 3)
    assert "draft model  " in run("plan-memory", "--model", tmp_path, "--num-blocks", 100, *draft).out
    run("plan-memory", "--device", "abacus").assert_mistake("device 'abacus' cannot be used")
    run("plan-memory", "--device", "meta").assert_mistake("device 'meta' cannot be used")
    run("plan-memory", "--model", "/no/such/folder").assert_mistake("there is no folder /no/such/folder")


def test_models_check_says_what_a_model_is(run: Run, tmp_path: Path) -> None:
    lines = run("models", "--check", BUNDLED_MODEL).out.splitlines()
    assert lines[0].startswith(f"{BUNDLED_MODEL}: LlamaForCausalLM (Llama 2, ")
    assert lines[1].startswith("weights: 9.0 MiB in 1 file,") and "29 tensors in BF16: as bfloat16, exact" in lines[2]
    assert lines[-2:] == ["tokenizer: 2354 tokens, a chat template", "it can be loaded"]
    run("models", "--check", tmp_path).assert_mistake("has no config.json")
    (tmp_path / "config.json").write_text((BUNDLED_MODEL / "config.json").read_text())
    ended = run("models", "--check", tmp_path)
    assert (ended.status, len(ended.out.splitlines())) == (1, 1) and "has no weights" in ended.err


def test_quantization_and_kernels_are_flags(run: Run) -> None:
    prompt = '{"prompt": "Once upon a time", "max_new_tokens": 3}'
    wrong = "--quantization", "int8", "--dtype", "float32"
    run("generate", "hi", *wrong).assert_mistake("quantization=int8 needs the C++ kernels", "set dtype=bfloat16")
    run("plan-memory", *wrong).assert_mistake("quantization=int8 needs the C++ kernels")
    run("plan-memory", "--kernels", "torch", "--kv-cache-dtype", "int8").assert_mistake("kv_cache_dtype=int8 needs")
    if why := why_not("avx2"):
        pytest.skip(why)
    for flags in (["--quantization", "int4"], ["--kv-cache-dtype", "int8", "--num-threads", 1], ["--kernels", "avx2"]):
        ended = run("generate", *flags, stdin=prompt)
        assert ended.status == 0 and len(ended.answers[0]["token_ids"]) == 3
    planned = run("plan-memory", "--quantization", "int8", "--kv-cache-dtype", "int8", "--num-blocks", 9)
    assert planned.out.splitlines()[0].endswith("weights int8, KV cache int8")


def test_dummy_weights_need_a_config_alone(run: Run, tmp_path: Path) -> None:
    tiny_models.save("llama-gqa", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    flags = ["--load-format", "dummy", "--tokenizer", BUNDLED_MODEL, "--dtype", "float32"]
    ended = run("generate", "--model", tmp_path, *flags, stdin='{"prompt": [1, 2], "max_new_tokens": 3}')
    assert ended.status == 0 and len(ended.answers[0]["token_ids"]) == 3


# In a process of its own ---------------------------------------------------------------------------------------------


def start(
    *arguments: str, stdin: str = "", stdout: int = subprocess.PIPE, command: Sequence[str] = COMMAND
) -> subprocess.Popen[str]:
    """The command, begun, with all of its input."""
    process = subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stdin is not None
    process.stdin.write(stdin)
    process.stdin.close()
    process.stdin = None  # so that `communicate` leaves it alone
    return process


def jsonl(lengths: list[int]) -> str:
    return "\n".join(json.dumps({"prompt": PROMPT, "max_new_tokens": n, "ignore_eos": True}) for n in lengths)


def on_terminal(*arguments: str, stdin: str = "") -> Ended:
    """Run the command with a terminal for its output."""
    terminal, end = os.openpty()
    process = start(*arguments, stdin=stdin, stdout=end)
    os.close(end)
    shown = b""
    try:
        while piece := os.read(terminal, 1000):
            shown += piece
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(terminal)
    _, err = process.communicate()
    return Ended(process.returncode, shown.decode().replace("\r\n", "\n"), err)


def test_one_answer_streams_to_a_terminal(pipe: splitfuse.Pipeline) -> None:
    ended = on_terminal("generate", PROMPT, *READABLE)
    assert (ended.status, ended.err) == (0, "")
    assert [ended.out.removesuffix("\n")] == expected(pipe, [PROMPT])


def test_several_answers_on_a_terminal_are_numbered(pipe: splitfuse.Pipeline) -> None:
    lines = [{"prompt": ""}, {"prompt": PROMPT, "n": 2}]
    ended = on_terminal("generate", *READABLE, stdin="\n".join(map(json.dumps, lines)))
    assert (ended.status, ended.err) == (
        1,
        "splitfuse: request 1: the prompt is empty: it must have at least one character\n",
    )
    first, second = expected(pipe, [PROMPT], n=2)
    assert ended.out == f"[2] {first}\n[2] {second}\n"


def test_ctrl_c_ends_with_status_130() -> None:
    process = start("generate", stdin=jsonl([1] + [1900] * 16), command=COMMAND_THAT_HEEDS_CTRL_C)
    assert process.stdout is not None and json.loads(process.stdout.readline())["generated_tokens"] == 1
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, err) == (130, "splitfuse: interrupted\n")
    assert all(json.loads(line) for line in out.splitlines())


@pytest.mark.parametrize("module", ["typer", "splitfuse.server.lifecycle"])
def test_ctrl_c_while_modules_are_imported(module: str) -> None:
    code = (
        "import os, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from splitfuse.cli import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code, "serve"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "splitfuse: interrupted\n")


def test_signals_wait_until_a_process_ignores_them() -> None:
    code = (
        "import os, signal\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    os.kill(os.getpid(), number)\n"
        "from splitfuse import interrupts; interrupts.ignore(); print('lives')"
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with interrupts.held_back():
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "lives\n")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_closed_pipe_ends_quietly() -> None:
    process = start("generate", stdin=jsonl([1, *range(20, 40)]))
    assert process.stdout is not None and process.stderr is not None
    assert json.loads(process.stdout.readline())["generated_tokens"] == 1
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_ends_with_a_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        process = start("ps", stdout=full.fileno())
    _, err = process.communicate()
    assert (process.returncode, err) == (1, "splitfuse: the output cannot be written: No space left on device\n")


def test_output_in_another_encoding_is_still_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    process = start("generate", "é 中", "--return-full-text", "--max-new-tokens", "1", *READABLE)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["text"].startswith("é 中")


def test_error_in_a_subprocess_has_no_traceback() -> None:
    process = start("generate", "hi", "--model", "/no/such/folder")
    out, err = process.communicate()
    Ended(process.returncode, out, err).assert_mistake("there is no folder /no/such/folder")
    assert err.count("\n") == 1


def test_serve_says_which_settings_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Collection[str]] = []

    async def run_server(*_: object, given: Collection[str], **__: object) -> None:
        found.append(given)

    monkeypatch.setattr("splitfuse.server.lifecycle.run_server", run_server)
    for flags in [], ["--block-size=32", "--dtype=auto"]:  # the defaults
        assert CliRunner().invoke(app, ["serve", *flags]).exit_code == 0
    assert found == [[], ["dtype", "block_size"]]
