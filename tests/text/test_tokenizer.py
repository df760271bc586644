"""Tokenizers and streams of text, against transformers and against decoding everything at once."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tiny_tokenizers import BOS, EOS, KINDS, random_text
from tokenizers import decoders
from transformers import AutoTokenizer

from splitfuse.errors import InvalidRequestError, TokenizerError
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.text.tokenizer import Detokenizer, Tokenizer

CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}


@pytest.fixture(scope="module", params=sorted(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    KINDS[request.param]().save(str(path / "tokenizer.json"))
    return write_config(path, CONFIG)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_source(ModelFolder(folder))


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer(KINDS["byte_level"]())


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    return Tokenizer(KINDS["byte_fallback"](), special_tokens={"bos_token": BOS, "eos_token": EOS})


def write_config(path: Path, config: dict[str, Any]) -> Path:
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def stream(detokenizer: Detokenizer, token_ids: Sequence[int], rng: random.Random) -> str:
    """All pieces together, the tokens pushed a few at a time."""
    pieces, start = [], 0
    while start < len(token_ids):
        size = rng.randint(1, 3)
        pieces.append(detokenizer.push(token_ids[start : start + size]))
        start += size
    return "".join([*pieces, detokenizer.finish()])


# --- whole texts ---------------------------------------------------------------------------------------------------


def test_encodes_and_decodes_as_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    oracle = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(1)
    for _ in range(300):
        text = random_text(rng) + rng.choice(["", EOS, f" {BOS}x"])
        special = rng.random() < 0.5
        token_ids = tokenizer.encode(text, add_special_tokens=special)
        assert list(token_ids) == oracle.encode(text, add_special_tokens=special)
        garbage = [*token_ids, *(rng.randrange(tokenizer.vocab_size) for _ in range(5))]
        for skip in (True, False):
            assert tokenizer.decode(garbage, skip_special_tokens=skip) == oracle.decode(
                garbage, skip_special_tokens=skip
            )


def test_vocabulary_and_special_tokens_as_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    oracle = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.vocab_size == len(oracle)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("has_post_processor", [True, False])
def test_tokenizer_json_alone_decides_on_the_begin_token(
    tmp_path: Path, add_bos_token: bool, has_post_processor: bool
) -> None:
    backend = json.loads(KINDS["byte_level"]().to_str())
    if not has_post_processor:
        backend["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    write_config(tmp_path, CONFIG | {"add_bos_token": add_bos_token})
    token_ids = Tokenizer.from_source(ModelFolder(tmp_path)).encode("hello")
    assert list(token_ids) == AutoTokenizer.from_pretrained(tmp_path).encode("hello")
    assert (token_ids[0] == 0) is has_post_processor


def test_special_tokens_as_objects_and_in_the_legacy_map(tmp_path: Path) -> None:
    KINDS["byte_level"]().save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, {"bos_token": {"content": BOS, "lstrip": False}, "pad_token": None, "add_bos_token": True})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS}))
    tokenizer = Tokenizer.from_source(ModelFolder(tmp_path))
    assert tokenizer.special_tokens == {"bos_token": BOS, "eos_token": EOS}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def added(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"added_tokens_decoder": {"1": added(EOS), "400": added("<x>"), "402": added("<y>", special=False)}}, {}),
        ({"added_tokens_decoder": {"500": added("<x>"), "60": added("<y>", special=False)}}, {}),
        ({"added_tokens_decoder": {"1": added(EOS, rstrip=True, special=False)}}, {}),
        ({"pad_token": "<pad>", "eos_token": "<end>"}, {}),
        ({"additional_special_tokens": ["<a>", "the"]}, {}),
        ({"extra_special_tokens": ["<a>", "<b>"], "image_token": "<img>"}, {}),
        ({"extra_special_tokens": {"image_token": "<img>"}}, {}),
        ({}, {"special_tokens_map.json": {"bos_token": "other", "eos_token": {"content": "<end>"}}}),
        ({"added_tokens_decoder": {"0": added(BOS)}}, {"special_tokens_map.json": {"bos_token": "other"}}),
        ({}, {"added_tokens.json": {"<y>": 401, "<x>": 400}}),
    ],
    ids=str,
)
def test_tokens_of_the_configuration_alone(tmp_path: Path, config: dict[str, Any], files: dict[str, Any]) -> None:
    KINDS["byte_level"]().save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, CONFIG | config)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    ours, oracle = Tokenizer.from_source(ModelFolder(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    text = f"a <x>  the <y> <pad><end> <a><b> <img> other {EOS} b"
    assert list(ours.encode(text)) == oracle.encode(text)
    assert ours.decode(ours.encode(text)) == oracle.decode(oracle.encode(text), skip_special_tokens=True)
    assert (ours.vocab_size, ours.eos_token_id) == (len(oracle), oracle.eos_token_id)


def test_a_named_eos_token_of_the_plain_vocabulary_is_special(tmp_path: Path) -> None:
    """Some checkpoints name an EOS token in the configuration alone; skipping special tokens must skip it."""
    KINDS["byte_level"]().save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, CONFIG | {"eos_token": "!"})
    tokenizer = Tokenizer.from_source(ModelFolder(tmp_path))
    token_ids = tokenizer.encode("a!")
    assert (
        tokenizer.decode(token_ids)
        == AutoTokenizer.from_pretrained(tmp_path).decode(token_ids, skip_special_tokens=True)
        == "a"
    )


def test_without_a_configuration_there_are_no_named_tokens(tmp_path: Path) -> None:
    KINDS["byte_level"]().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_source(ModelFolder(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template) == (None, None, None)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = KINDS["byte_level"]()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_source(ModelFolder(tmp_path))
    assert tokenizer.decode(tokenizer.encode("a long text, not cut")) == "a long text, not cut"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}], "yes"),
        ([{"name": "tool_use", "template": "no"}], None),
        (None, None),
    ],
)
def test_chat_template_of_the_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: Any, expected: str | None
) -> None:
    KINDS["byte_level"]().save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, {"chat_template": template})
    assert Tokenizer.from_source(ModelFolder(tmp_path)).chat_template == expected
    lacks_default = isinstance(template, list) and expected is None
    warning = f"{tmp_path} has chat templates (tool_use), but none named default: chats are refused"
    assert caplog.messages == [warning] * lacks_default


def test_chat_template_file_comes_first(tmp_path: Path) -> None:
    KINDS["byte_level"]().save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, {"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("new 世界", encoding="utf-8")
    assert Tokenizer.from_source(ModelFolder(tmp_path)).chat_template == "new 世界"


# --- bad files and bad texts ---------------------------------------------------------------------------------------


def test_missing_tokenizer_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json.*save_pretrained"):
        Tokenizer.from_source(ModelFolder(tmp_path))
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"only Mistral's tekken\.json.*convert_tekken_tokenizer\(file\)"):
        Tokenizer.from_source(ModelFolder(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(TokenizerError, match=r"only a SentencePiece tokenizer\.model.*save_pretrained"):
        Tokenizer.from_source(ModelFolder(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"\xff\xfe",
        b'{"version": "1.0", "model": {"type": "BPE"}}',
        b'{"version": "1.0", "model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}}',
        b'{"model":' * 10_000,
        b'{"version": "1.0", "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, '
        b'"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}',
    ],
    ids=["empty", "cut", "list", "no text", "no vocab", "unk", "negative id", "merge", "nested", "panics"],
)
def test_hostile_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        Tokenizer.from_source(ModelFolder(tmp_path))


LONG_TOKEN = {"version": "1.0", "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * 10**6, 0.5]]}}
LARGE_PATTERN = {
    "version": "1.0",
    "normalizer": {"type": "Replace", "pattern": {"Regex": r"\p{L}" * 10**5}, "content": ""},
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
}


@pytest.mark.parametrize("content", [LONG_TOKEN, LARGE_PATTERN], ids=["overflows the stack", "takes gigabytes"])
def test_tokenizer_json_that_would_end_the_process(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"takes more than 400 MiB of memory or 4 s .*, or crashes|fail to memory"):
        Tokenizer.from_source(ModelFolder(tmp_path))


@pytest.mark.parametrize("content", ["[]," * 1_200_000, '{"a":0},' * 300_000, "0," * 2_200_000], ids=len)
def test_tokenizer_json_of_too_many_values(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(f'{{"model": [{content}0]}}')
    with pytest.raises(TokenizerError, match=r"holds about .* values; at most 2200000 are read"):
        Tokenizer.from_source(ModelFolder(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "must hold a JSON object, not list"),
        (b'{"chat_template": 3}', "chat_template in .* must be text"),
        (b'{"chat_template": ["plain"]}', "chat_template in .* must be text or a list of named texts"),
        (b'{"eos_token": 3}', "eos_token must be a text, or an object with the text as content, not 3"),
        (b'{"pad_token": {"content": [3]}}', "pad_token must be a text, or an object"),
        (b'{"chat_template": [{"name": "default", "template": 3}]}', "chat_template in .* must be text"),
        (b'{"chat_template": [{"name": [1], "template": 3}, {"name": "default", "template": 3}]}', "must be text"),
        (b'{"chat_template": "{% for m in messages %}"}', r"the chat template is broken: .* \(line 1\)"),
        (b'{"chat_template": "' + b"x" * 250_001 + b'"}', "cannot be compiled: .* at most 250000 are read"),
        (b'{"added_tokens_decoder": {"one": {"content": "x"}}}', "the added tokens of .* cannot be read"),
        (b'{"added_tokens_decoder": {"1": {"text": "x"}}}', "the added tokens of .* cannot be read"),
        (b'{"added_tokens_decoder": [1]}', "the added tokens of .* cannot be read"),
        (b'{"eos_token": "' + b"x" * 2_000_001 + b'"}', "2000001 characters together; at most 2000000"),
    ],
)
def test_hostile_tokenizer_config(tmp_path: Path, content: bytes, message: str) -> None:
    KINDS["byte_level"]().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_source(ModelFolder(tmp_path))


def test_unreadable_chat_template_file(tmp_path: Path) -> None:
    KINDS["byte_level"]().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja cannot be read"):
        Tokenizer.from_source(ModelFolder(tmp_path))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([decoders.Replace("a", "aa")] * 7, "can make a text 128 times longer; at most 64 times is read"),
        ([decoders.Sequence([decoders.Replace("a", "aaaa")] * 2)] * 3, "can make a text 4096 times longer"),
        ([decoders.Replace("", "x" * 64)], "can make a text 65 times longer"),
        ([decoders.Replace(tokenizers.Regex("(a+)+$"), "x")], r"its decoder has a regular expression, \{'Regex'"),
    ],
)
def test_hostile_decoders(tmp_path: Path, steps: list[Any], message: str) -> None:
    made = KINDS["byte_level"]()
    made.decoder = decoders.Sequence([*steps, decoders.Fuse()])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_source(ModelFolder(tmp_path))


def test_replacements_of_decoders_in_use_are_read(tmp_path: Path) -> None:
    made = KINDS["byte_level"]()
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_source(ModelFolder(tmp_path)).vocab_size


def test_half_a_surrogate_pair_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="half a surrogate pair at character 2") as caught:
        byte_level.encode("ab\ud800")
    assert caught.value.parameter == "prompt"


def test_text_that_the_vocabulary_cannot_express(tmp_path: Path) -> None:
    content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "missing"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InvalidRequestError, match="cannot encode this text"):
        Tokenizer.from_source(ModelFolder(tmp_path)).encode("b")


def test_a_panic_of_the_decoder_fails_one_request(tmp_path: Path) -> None:
    content = {
        "version": "1.0",
        "decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 9},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "  ": 1}, "unk_token": "a"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    with pytest.raises(InvalidRequestError, match="cannot decode these tokens"):
        tokenizer.decode([0, 1, 0])
    with pytest.raises(InvalidRequestError, match="cannot decode these tokens one by one"):
        Detokenizer(tokenizer).push([0, 1, 0])


# --- streams -------------------------------------------------------------------------------------------------------


def test_pieces_of_random_texts_are_the_whole(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    for _ in range(300):
        token_ids = tokenizer.encode(random_text(rng))
        assert stream(Detokenizer(tokenizer), token_ids, rng) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("num_shown", [0, 1, 99])
def test_pieces_of_random_tokens_are_the_whole(tokenizer: Tokenizer, num_shown: int) -> None:
    """Garbage too: broken bytes, special tokens, and ids that a padded vocabulary has and no token."""
    rng = random.Random(3)
    every = sorted(tokenizer.hidden_ids(()))
    shown, hidden = every[:num_shown], every[num_shown:]
    for _ in range(500):
        token_ids = [rng.randrange(tokenizer.vocab_size + 20) for _ in range(rng.randrange(25))]
        detokenizer = Detokenizer(tokenizer, shown_tokens=[tokenizer.token(token) or "" for token in shown])
        whole = tokenizer.decode([each for each in token_ids if each not in hidden], skip_special_tokens=not shown)
        assert stream(detokenizer, token_ids, rng) == whole
        assert len(detokenizer.lengths) == len(token_ids)
        assert detokenizer.lengths == sorted(detokenizer.lengths)
        assert not token_ids or detokenizer.lengths[-1] == len(whole)


def test_pieces_after_a_prompt_continue_its_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(4)
    for _ in range(300):
        prompt = tokenizer.encode("Hello, " + random_text(rng) + "the")
        output = tokenizer.encode(random_text(rng), add_special_tokens=False)
        continued = stream(Detokenizer(tokenizer, prompt_token_ids=prompt), output, rng)
        assert tokenizer.decode(prompt) + continued == tokenizer.decode([*prompt, *output])


def test_prompts_without_text_prime_nothing(byte_fallback: Tokenizer) -> None:
    output = byte_fallback.encode("Hello", add_special_tokens=False)
    for prompt in ([], [byte_fallback.bos_token_id or 0], [byte_fallback.vocab_size + 7]):
        assert Detokenizer(byte_fallback, prompt_token_ids=prompt).push(output) == "Hello"


@pytest.mark.parametrize("text", ["Hello😀", "Hello\n"])
def test_a_prompt_ending_in_bytes_does_not_mix_with_output(byte_fallback: Tokenizer, text: str) -> None:
    """The prompt ends with a character spelled in bytes; the output begins with a byte that would spoil the run."""
    prompt = byte_fallback.encode(text)
    spoiler = byte_fallback.encode("😀")[-4:-3]
    output = [*spoiler, *byte_fallback.encode("the", add_special_tokens=False)]
    detokenizer = Detokenizer(byte_fallback, prompt_token_ids=prompt)
    assert detokenizer.push(output) + detokenizer.finish() == "\ufffd the"


def test_mii_fault_streams_lose_spaces(byte_fallback: Tokenizer) -> None:
    """Each token decoded alone loses its leading space; a stream must not (MII issues 281, 306)."""
    text = "the cat is a story  Hello"
    token_ids = byte_fallback.encode(text)
    detokenizer = Detokenizer(byte_fallback)
    pieces = [detokenizer.push([token_id]) for token_id in token_ids]
    assert "".join(pieces) == text
    assert " is" in pieces
    assert "".join(byte_fallback.decode([token_id]) for token_id in token_ids) != text


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_mii_fault_streams_break_characters(kind: str) -> None:
    """A character spelled by several tokens appears once, whole, with its last token."""
    tokenizer = Tokenizer(KINDS[kind]())
    for text in ("a😀b", "世界", "👨‍👩‍👧", "e\u0301", "שלום"):
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.push([token_id]) for token_id in tokenizer.encode(text, add_special_tokens=False)]
        whole = tokenizer.decode(tokenizer.encode(text))
        assert "".join([*pieces, detokenizer.finish()]) == whole
        assert not any("\ufffd" in piece for piece in pieces)


def test_mii_fault_stream_state_is_kept_by_thread(byte_level: Tokenizer) -> None:
    """Two streams interleaved on one thread, and one stream moved across threads, keep their own bytes."""
    smile, wave = byte_level.encode("😀", add_special_tokens=False), byte_level.encode("👋", add_special_tokens=False)
    first, second = Detokenizer(byte_level), Detokenizer(byte_level)
    pieces: tuple[list[str], list[str]] = ([], [])
    for a, b in zip(smile, wave, strict=True):
        mover = threading.Thread(target=lambda a=a: pieces[0].append(first.push([a])))
        mover.start()
        mover.join()
        pieces[1].append(second.push([b]))
    assert ("".join(pieces[0]), "".join(pieces[1])) == ("😀", "👋")


def test_incomplete_bytes_come_at_the_end_as_in_decode(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("a😀", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.push(token_ids) == "a"
    assert detokenizer.finish() == byte_level.decode(token_ids)[1:] == "\ufffd"


def test_a_run_of_byte_tokens_is_held_until_it_is_certain(byte_fallback: Tokenizer) -> None:
    smile = byte_fallback.encode("😀")[-4:]
    the = byte_fallback.encode("the", add_special_tokens=False)
    detokenizer = Detokenizer(byte_fallback)
    assert detokenizer.push(smile) == ""
    assert detokenizer.push([byte_fallback.vocab_size + 9]) == ""  # an unknown id does not end the run
    assert detokenizer.push(the) == "😀 the"
    spoiled = Detokenizer(byte_fallback)
    assert spoiled.push([*smile, smile[0], *the]) == "\ufffd" * 5 + " the"


def test_unknown_ids_decode_to_nothing(tokenizer: Tokenizer) -> None:
    unknown = [tokenizer.vocab_size, tokenizer.vocab_size + 1000]
    detokenizer = Detokenizer(tokenizer)
    assert tokenizer.decode(unknown) == detokenizer.push(unknown) == detokenizer.finish() == ""
    assert detokenizer.lengths == [0, 0]


def test_num_tokens_that_a_text_needs(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("qQ🦊z", add_special_tokens=False)
    assert len(token_ids) == 6  # q, Q, three for the fox, z
    detokenizer = Detokenizer(byte_level)
    detokenizer.push(token_ids)
    assert detokenizer.lengths == [1, 2, 2, 2, 3, 4]
    assert [detokenizer.num_tokens(length) for length in range(5)] == [0, 1, 2, 5, 6]
