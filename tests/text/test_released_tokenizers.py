"""Tokenizers of released models, against transformers: tokens, texts whole and streamed, and chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import packaged_tokenizers
import pytest
from transformers import PreTrainedTokenizerFast

from splitfuse.models.sources.folder import ModelFolder
from splitfuse.text.chat_template import ChatTemplate
from splitfuse.text.pooling import decisions, rerank
from splitfuse.text.pooling.labels import has_labels
from splitfuse.text.tokenizer import Detokenizer, Tokenizer

pytestmark = pytest.mark.extras

TEXTS = (
    "The Eiffel Tower was completed in 1889.\n\n  It is 330 metres tall!",
    "naïve café, 世界こんにちは, Здравствуй мир, 👩‍👩‍👧 and 🇫🇷",
    "def f(x):\n\treturn x ** 2  # 3.14159\r\n",
    " leading, doubled  and trailing spaces ",
)
TALK = [
    {"role": "system", "content": "Answer shortly."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3? 世界"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


@pytest.fixture(scope="module", params=packaged_tokenizers.PACKAGES)
def folder(request: pytest.FixtureRequest) -> Path:
    return packaged_tokenizers.folder(request.param)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_source(ModelFolder(folder))


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_tokens_and_texts(tokenizer: Tokenizer, oracle: Any) -> None:
    """Also with special tokens written out, and token by token."""
    special = list(tokenizer.special_tokens.values())[:3]
    for text in (*TEXTS, "".join(f"{token}hello" for token in special)):
        ids = tokenizer.encode(text)
        assert list(ids) == oracle(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == oracle.decode(ids, skip_special_tokens=False)
        streamed = Detokenizer(tokenizer)
        pieces = [streamed.push([token]) for token in ids]
        assert (
            "".join([*pieces, streamed.finish()])
            == tokenizer.decode(ids)
            == oracle.decode(ids, skip_special_tokens=True)
        )


def test_end_and_begin_tokens(tokenizer: Tokenizer, oracle: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert tokenizer.vocab_size == len(oracle)


def test_chat_template(tokenizer: Tokenizer, oracle: Any) -> None:
    """The prompt of a talk, with and without tools."""
    if oracle.chat_template is None:
        assert tokenizer.chat_template is None
        return
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    for tools in (None, TOOLS):
        ours = template.render(TALK, tools=tools) if tools else template.render(TALK)
        assert ours == oracle.apply_chat_template(TALK, tools=tools, add_generation_prompt=True, tokenize=False)


def test_a_judgement_is_what_the_template_of_qwen3_writes() -> None:
    tokenizer = Tokenizer.from_source(ModelFolder(packaged_tokenizers.folder("qwen3")))
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    asked = ("Where is Paris?", "Paris lies on the Seine.", rerank.INSTRUCTION)
    text = template.render(rerank.messages(*asked), variables={"enable_thinking": False})
    assert rerank.has_chatml(tokenizer) and text == rerank.chatml(*asked)
    assert has_labels(tokenizer, rerank.ANSWERS) and has_labels(tokenizer, (*decisions.LETTERS, *decisions.YES_NO))
