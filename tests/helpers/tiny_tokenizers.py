"""Small tokenizers of the kinds that models have, trained in a moment, and texts to try them on."""

from __future__ import annotations

import random
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS, UNK = "<s>", "</s>", "<unk>"

CORPUS = (
    [
        "Hello, world! This is how a story begins, as all stories do.",
        "The cat sat on the mat; the dog slept.",
        "  two  spaces ",
    ]
    * 4
    + [
        "naïve café über straße",
        "你好,世界。今天天气很好。",
        "こんにちは世界",
        "שלום עולם",
        "مرحبا بالعالم",
        "Привет, мир",
    ]
    * 3
    + ["emoji 😀 👍🏽 👨‍👩‍👧 🇫🇷", "e\u0301 combining a\u0308", "tabs\tand\nnewlines\n\n"] * 3
)


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: every byte is a letter; nothing is added to a text's beginning but BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_bos(tokenizer)


def byte_fallback() -> Tokenizer:
    """As Llama 2: spaces are letters, one is put first, and what has no letter is spelled in bytes."""
    space = "\u2581"
    letters = sorted(
        {letter for text in CORPUS for letter in text if letter.isascii() and letter.isprintable()} - {" "}
    )
    words = [f"{space}{word}" for word in ("Hello", "the", "cat", "story", "a", "is")] + ["ing", "llo", space * 2]
    pieces = [UNK, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), space, *letters, "é", "世"]
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                merges.append((word[: end - 1], word[end - 1]))
                pieces.append(word[:end])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([UNK, BOS, EOS])
    return _with_bos(tokenizer)


def metaspace_unigram() -> Tokenizer:
    """As T5 and other SentencePiece models: words begin with a visible space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=[UNK, BOS, EOS], unk_token=UNK, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_bos(tokenizer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace_unigram": metaspace_unigram,
}

ALPHABETS = (
    "abc Hello,.  ",
    "你好世界天",
    "שלוםمرحبا",
    "😀👍🏽👨‍👩‍👧🇫🇷",
    "e\u0301a\u0308\u0300",
    "\n\t ß\u2581\ufffd\u200b",
)


def random_text(rng: random.Random, length: int = 24) -> str:
    """Words, scripts, emoji, combining marks and white space, mixed."""
    return "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randrange(length)))


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer
