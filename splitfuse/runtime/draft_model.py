"""Runs a draft model: a second, smaller model with the same vocabulary, which guesses tokens for requests of the first.

It guesses the token that the first model's sampler would choose if the scores were its own: with the request's
parameters, form and seed, by the same numbers. So where both models score alike, sampled tokens are guessed right too.
Which requests it guesses for is decided in core/speculation/model_drafts.py.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from splitfuse.config.engine import EngineConfig
from splitfuse.core.plan import Chunk
from splitfuse.core.speculation.model_drafts import Guess, Guesses, most_tokens
from splitfuse.errors import ConfigError, ModelError, WeightsError
from splitfuse.kernels.drawing import GREEDY
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.layers import AttentionSpec
from splitfuse.models.decoder import Decoder
from splitfuse.models.encoder.spec import is_encoder
from splitfuse.models.families.registry import load_spec
from splitfuse.models.kv_cache import KVCache, block_bytes
from splitfuse.models.sources.dummy import DummyWeights
from splitfuse.models.sources.files import MAX_TOKENIZER_BYTES
from splitfuse.models.sources.hub import open_model
from splitfuse.models.sources.source import ModelSource, WeightSource
from splitfuse.models.spec import ModelSpec
from splitfuse.models.storage import may_be_quantized
from splitfuse.models.weights import check_weights, load_decoder, resolve_dtype, weight_bytes
from splitfuse.runtime.backend_choice import choose_backend
from splitfuse.runtime.batch import BatchBuilder
from splitfuse.runtime.memory_plan import DraftSizes
from splitfuse.runtime.sampling.request import RequestSampling
from splitfuse.runtime.sampling.sampler import sample
from splitfuse.runtime.step_memory import step_bytes

LARGEST_DIFFERENCE = 0.01
"""Largest fraction of token ids that may stand for another text in the vocabulary of a draft model: such tokens are
guessed wrong, and special ones differ between models of a family.
"""


@dataclass(frozen=True)
class OpenedDraft:
    """Holds a draft model whose settings are checked, and which is not loaded."""

    spec: ModelSpec
    sizes: DraftSizes
    _weights: WeightSource | None
    _backend: Backend
    _dtype: torch.dtype
    _device: torch.device

    def load(self, max_model_len: int) -> Decoder:
        """Load it, for requests of at most so many tokens. Raises ModelError."""
        assert self._weights is not None, "it was not fetched"
        spec = replace(self.spec, max_position=min(self.spec.max_position, max_model_len))
        decoder = load_decoder(self._weights, spec, dtype=self._dtype, device=self._device, backend=self._backend)
        self._backend.finish_loading()
        return decoder


def open_draft(
    config: EngineConfig, source: ModelSource, spec: ModelSpec, *, device: torch.device, fetched: bool = True
) -> OpenedDraft | None:
    """Open the draft model that the settings name, for a model of these files; None if they name none. Unless it is
    `fetched`, its weights may be lacking, and it cannot be loaded.

    Raises ConfigError if it cannot draft for that model, ModelError if it cannot be loaded.
    """
    if (name := config.model.draft_model) is None:
        return None
    if any(layer.mixer is not None and not isinstance(layer.mixer, AttentionSpec) for layer in spec.layers):
        raise ConfigError(
            f"draft_model {name} would draft tokens that may be taken back, and {source.location} has layers with a "
            "recurrent state, which cannot be: leave draft_model out"
        )
    draft = open_model(name, weights=fetched)
    if is_encoder(draft):
        raise ConfigError(f"draft_model {name} is an encoder, which generates nothing: name a model that does")
    theirs = load_spec(draft)
    if any(layer.mixer is not None and not isinstance(layer.mixer, AttentionSpec) for layer in theirs.layers):
        raise ConfigError(
            f"draft_model {name} has layers with a recurrent state, which cannot be taken back when a draft is wrong: "
            "name a model with attention alone"
        )
    _check_vocabulary(config, source, spec, draft, theirs)
    dtype = resolve_dtype(config.model.dtype, theirs)
    weights: WeightSource | None = None
    if config.model.load_format == "dummy":
        weights = DummyWeights(dtype, device)
    else:
        with suppress(*(() if fetched else (WeightsError,))):
            weights = draft.weights()
    if weights is not None:
        theirs = check_weights(weights, theirs)
    model = replace(config.model, model=name, revision=None, gguf_file=None, draft_model=None)
    quantization = model.quantization
    if quantization is not None and weights is not None and not may_be_quantized(weights, quantization):
        model = replace(model, quantization=None, quantization_group_size=None)  # it is already
    backend = choose_backend(replace(config, model=model), dtype)
    size, num_tokens = config.cache.block_size, most_tokens(config.scheduler.max_num_seqs)
    backend.check_block_size(size)
    sizes = DraftSizes(
        name=draft.name,
        weights=weight_bytes(theirs, dtype, backend, weights),
        activations=step_bytes(theirs, dtype, num_tokens, backend, weights),
        block=block_bytes(theirs, block_size=size, dtype=dtype, backend=backend),
    )
    return OpenedDraft(theirs, sizes, weights, backend, dtype, device)


class DraftRunner:
    """Computes the steps of a draft model over a KV cache of its own. `requests` are those of the executor of the model
    that it drafts for, whose vocabulary has `vocab_size` tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        requests: Mapping[str, RequestSampling],
        *,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
    ) -> None:
        """Raises MemoryPlanError if there is no memory for the cache."""
        self.decoder = decoder
        self._kv_cache = KVCache(
            decoder.spec,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=decoder.dtype,
            device=decoder.device,
            backend=decoder.backend,
        )
        self._requests = requests
        self.vocab_size = vocab_size
        self._batches = BatchBuilder(block_size, decoder.device)

    def guess(self, chunks: Sequence[Chunk], drafts: Sequence[Sequence[int]]) -> Guesses:
        """See `DraftModel`."""
        began = time.perf_counter()
        guesses: list[Guess | None] = [None] * len(chunks)
        with torch.inference_mode(), self.decoder.on_device():
            hidden = self.decoder.forward(self._batches.build(chunks), self._kv_cache)
            wanted = [number for number, chunk in enumerate(chunks) if chunk.num_logits]
            requests = [self._requests[chunks[number].request_id] for number in wanted]
            step = self.decoder.backend.capabilities.head_rows
            for start in range(0, len(wanted), step):
                part = slice(start, start + step)
                found = self._choose(hidden[part], requests[part], [drafts[number] for number in wanted[part]])
                for number, guess in zip(wanted[part], found, strict=True):
                    guesses[number] = guess
        return Guesses(guesses, time.perf_counter() - began)

    def _choose(
        self, hidden: Tensor, requests: Sequence[RequestSampling], drafts: Sequence[Sequence[int]]
    ) -> list[Guess | None]:
        """Return what the sampler chooses behind the drafts of each request, by this model's logits."""
        logits = self.decoder.logits(hidden)
        if (surplus := logits.shape[1] - self.vocab_size) > 0:
            logits = logits[:, : self.vocab_size].contiguous()
        elif surplus < 0:
            logits = F.pad(logits, (0, -surplus), value=-math.inf)
        backend = self.decoder.backend
        best, peaks = backend.topk(logits, 2)
        sure = [_confidence(largest, *others) for largest, *others in peaks]
        if all(request.is_plain and request.filter is GREEDY for request in requests):
            return [Guess(token, each) for (token, *_), each in zip(best, sure, strict=True)]
        guesses: list[Guess | None] = [None] * len(requests)
        followed = [request.after(number, drafts[number]) for number, request in enumerate(requests)]
        rows = [row for row in followed if row is not None]
        if rows:
            numbers, states, matchers = zip(*rows, strict=True)
            scores = logits if len(rows) == len(logits) else logits[list(numbers)]
            results = sample(scores, states, topk=backend.topk, draw=backend.draw, matchers=matchers)
            for number, result in zip(numbers, results, strict=True):
                if result.error is None:
                    guesses[number] = Guess(result.token_ids[0], sure[number])
        return guesses


def _confidence(largest: float, second: float = -math.inf) -> float:
    """Return how much of the probability of the two likeliest tokens the first one has; 0 if they are no numbers."""
    return 1.0 / (1.0 + math.exp(min(second - largest, 0.0))) if math.isfinite(largest) else 0.0


def _check_vocabulary(
    config: EngineConfig, source: ModelSource, spec: ModelSpec, draft: ModelSource, theirs: ModelSpec
) -> None:
    """Raise ConfigError unless the token ids of both models stand for the same texts, but for few."""
    name = config.model.draft_model
    other = config.model.tokenizer
    own = _texts(source if other is None else open_model(other, config.model.revision, weights=False))
    texts = _texts(draft)
    if own is None or texts is None:
        if spec.vocab_size != theirs.vocab_size:
            raise ConfigError(
                f"draft_model {name} has a vocabulary of {theirs.vocab_size} tokens, and {source.location} one of "
                f"{spec.vocab_size}: name a smaller model of the same family"
            )
        return
    num_different = sum(texts.get(token) != text for token, text in own.items())
    if num_different > LARGEST_DIFFERENCE * len(own):
        raise ConfigError(
            f"draft_model {name} has another vocabulary: {num_different} of the {len(own)} token ids of "
            f"{source.location} stand for something else there; name a smaller model of the same family"
        )


def _texts(source: ModelSource) -> dict[int, str] | None:
    """Return the text of each token id of a model's tokenizer.json; None if it has no such file. Raises ModelError."""
    if (content := source.read("tokenizer.json", MAX_TOKENIZER_BYTES)) is None:
        return None
    try:
        tokenizer: dict[str, Any] = json.loads(content)
        vocab = tokenizer["model"]["vocab"]
        if isinstance(vocab, dict):
            texts = {number: text for text, number in vocab.items()}
        else:
            texts = {number: text for number, (text, _) in enumerate(vocab)}
        return texts | {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or ()}
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{source.location} has a tokenizer.json without a vocabulary: {error!r:.200}") from error
