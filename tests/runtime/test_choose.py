"""Choices under the form of an answer: the same as among nothing but allowed tokens, and the same distribution."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from llguidance.numpy import fill_next_token_bitmask

from splitfuse.core.plan import SamplingState
from splitfuse.core.reasoning import Reasoning
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.runtime.sampling import choose, grammar
from splitfuse.runtime.sampling.grammar import Grammars, Matcher
from splitfuse.runtime.sampling.sampler import sample
from splitfuse.text.grammar import compile_structured_outputs

VOCAB = 2400  # beyond the tokenizer's 2354: models pad theirs
END, OTHER_END = 4, 2
FORMS: tuple[dict[str, Any], ...] = (
    {"json": {"type": "array", "items": {"enum": ["a", "b", 3, None, "größe"]}, "minItems": 2}},
    {"json": {"type": "object"}},
    {"json": {"type": "array", "items": {"type": "string", "maxLength": 9}}},
    {"regex": r"(\w{1,12} ){3,9}"},
    {"regex": "([a-d]{2} ){0,6}!?"},
    {"regex": "[^a-z]{1,20}|é?[A-Z]+"},
    {"grammar": 'root ::= "(" root ")" | "x" | "y" root'},
    {"choice": ["a", "ab", "<|user|>", "yes and no"]},
    {"choice": ['Let me see.\n{"name": "weather"}']},
)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    text = (Path(BUNDLED_MODEL) / "tokenizer.json").read_text()
    return Grammars(lambda: text, VOCAB, [END, OTHER_END])


def compiled(form: dict[str, Any]) -> StructuredOutputs:
    return compile_structured_outputs(StructuredOutputs.of(form))


def row(params: SamplingParams, *, seed: int = 0, output: tuple[int, ...] = ()) -> SamplingState:
    return SamplingState("r", (11, 12), params, (END,), seed, 0, list(output), thought=params.thought())


def random_logits(rows: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    """Coarse values, so that equal ones are common."""
    return (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread * 4).round() / 4


class Walk:
    """An answer so far, known to a matcher, and to one of the library's own that gives full masks."""

    def __init__(self, grammars: Grammars, form: dict[str, Any], params: SamplingParams) -> None:
        self.state = row(params)
        self.matcher = grammars.matcher(compiled(form), self.state)
        self.oracle: LLMatcher = grammars.prepare(compiled(form)).result().deep_copy()

    def allowed(self) -> torch.Tensor:
        """Which of all tokens the library's mask allows, without ends that are not the request's unless there is no
        other.
        """
        mask = np.zeros((1, VOCAB // 32), dtype=np.int32)
        fill_next_token_bitmask(self.oracle, mask)
        allowed = torch.from_numpy(np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool))
        others = allowed.clone()
        others[OTHER_END] = False
        return others if others.any() else allowed

    def advance(self, token: int) -> bool:
        """Returns whether the answer is complete."""
        self.state.output_token_ids.append(token)
        assert self.oracle.consume_token(token)
        assert self.matcher.settle([token]) is self.oracle.is_stopped()
        return self.oracle.is_stopped()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: str(form)[:40])
def test_exactly_the_tokens_of_the_mask_are_taken(grammars: Grammars, form: dict[str, Any]) -> None:
    rng, walk = random.Random(1), Walk(grammars, form, SamplingParams())
    for _ in range(6):
        allowed = walk.allowed()
        if (forced := walk.matcher.forced()) is not None:
            assert forced.tolist() == allowed.nonzero().flatten().tolist()
        else:
            assert [walk.matcher.take(token) for token in range(VOCAB)] == allowed.tolist()
        (found,) = Matcher.allowed([walk.matcher])
        assert found.tolist() == allowed.nonzero().flatten().tolist()
        token = int(rng.choice(found))
        assert walk.matcher.take(token, nothing_else=True)
        if walk.advance(token):
            break


@pytest.mark.parametrize("is_loose", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"repetition_penalty": 1.5, "logit_bias": {40: 9.0, END: 5.0}, "min_tokens": 5, "logprobs": 2}],
    ids=["plain", "adjusted"],
)
def test_greedy_takes_the_best_allowed_token(grammars: Grammars, settings: dict[str, Any], is_loose: bool) -> None:
    """As if all other tokens had no logit: over many forms, in one batch, whatever was known of the form."""
    params = SamplingParams(**settings)
    walks = [Walk(grammars, form, params) for form in FORMS for _ in range(2)]
    for step in range(12):
        logits = random_logits(len(walks), step, spread=0.5 if step % 3 == 0 else 3.0)
        allowed = torch.stack([walk.allowed() for walk in walks])
        states = [walk.state for walk in walks]
        for walk in walks:
            walk.matcher.is_loose = is_loose
        results = sample(logits, states, matchers=[walk.matcher for walk in walks])
        wanted = sample(torch.where(allowed, logits, -math.inf), states)
        assert [each.token_ids for each in results] == [each.token_ids for each in wanted]
        assert [bool(each.logprobs) for each in results] == [
            params.logprobs is not None and not each.error for each in results
        ]
        walks = [
            walk
            for walk, each in zip(walks, results, strict=True)
            if each.token_ids and not walk.advance(*each.token_ids)
        ]


def expected(logits: torch.Tensor, allowed: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities of the allowed tokens among those that the filters keep, or if there are none, of those that they
    keep of the allowed ones.
    """
    kept = filtered(logits, params)
    kept = kept if (kept > 0)[allowed].any() else filtered(torch.where(allowed, logits, -math.inf), params)
    kept = torch.where(allowed, kept, 0.0)
    return kept / kept.sum()


def filtered(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities by the definitions of the filters, for logits of which no two are equal."""
    weights, order = (logits.double() / params.temperature).softmax(-1).sort(descending=True)
    keep = torch.arange(len(weights)) < (params.top_k or len(weights))
    cumulative = (weights * keep).cumsum(-1) / (weights * keep).sum()
    keep &= (cumulative - weights / (weights * keep).sum()) < params.top_p
    keep &= weights >= params.min_p * weights[0]
    return torch.zeros_like(weights).scatter(0, order, weights * keep)


TOP_P = {"top_p": 0.9, "min_p": 0.01}


@pytest.mark.parametrize(
    ("settings", "spread", "tries"),
    [
        ({}, 2.0, 16),
        ({}, 2.0, 1),
        ({"top_k": 60}, 2.0, 16),
        (TOP_P, 2.0, 16),
        (TOP_P, 2.0, 1),
        ({"top_k": 2, "temperature": 0.7}, 0.05, 16),
    ],
    ids=["plain", "plain-mask", "top_k", "top_p", "top_p-mask", "none-kept"],
)
def test_frequencies_are_those_of_allowed_tokens(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], spread: float, tries: int
) -> None:
    """Chi-square over 1,200 seeds, at the 99.9 % quantile: by tokens drawn until one is allowed, and by the mask."""
    for module in (choose, grammar):
        monkeypatch.setattr(module, "TRIES", tries)
    form, count = compiled({"regex": "[a-d]{1,3}!*"}), 1200
    params = SamplingParams(**{"temperature": 1.0, **settings})
    logits = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3)) * (spread / VOCAB)
    (allowed,) = Matcher.allowed([grammars.matcher(form, row(params))])
    logits[allowed[: len(allowed) // 3]] += 8 * spread  # so that what is allowed is likely, and not likely
    found: Counter[int] = Counter()
    for start in range(0, count, 400):
        states = [row(params, seed=seed) for seed in range(start, start + 400)]
        results = sample(
            logits.expand(400, VOCAB), states, matchers=[grammars.matcher(form, state) for state in states]
        )
        found.update(token for each in results for token in each.token_ids)
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    mask[allowed] = True
    wanted = expected(logits, mask, params) * count
    assert sum(found.values()) == count and all(wanted[token] > 0 for token in found)
    bins = [(n, found[token]) for token, n in enumerate(wanted.tolist()) if n >= 5]
    rest = [(n, found[token]) for token, n in enumerate(wanted.tolist()) if 0 < n < 5]
    bins += [(sum(n for n, _ in rest), sum(seen for _, seen in rest))] if rest else []
    degrees = max(1, len(bins) - 1)
    quantile = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3  # Wilson and Hilferty
    assert sum((seen - n) ** 2 / n for n, seen in bins) < quantile + 3


@pytest.mark.parametrize("settings", [{}, {"top_k": 20, "top_p": 0.9}, {"presence_penalty": 1.0, "min_p": 0.2}])
def test_a_draw_is_the_same_alone_and_in_company(grammars: Grammars, settings: dict[str, Any]) -> None:
    logits = random_logits(2 * len(FORMS), 5)
    rows = [
        row(SamplingParams(temperature=0.8 + 0.1 * n, **settings), seed=n, output=(40,)) for n in range(len(logits))
    ]
    forms = [compiled(form) for form in FORMS] * 2

    def tokens(members: list[int], *, is_loose: bool) -> list[tuple[int, ...]]:
        matchers = [grammars.matcher(forms[i], rows[i]) if i % 5 else None for i in members]
        for matcher in matchers:
            if matcher is not None:
                matcher.is_loose = is_loose
        return [each.token_ids for each in sample(logits[members], [rows[i] for i in members], matchers=matchers)]

    alone = [tokens([i], is_loose=False)[0] for i in range(len(rows))]
    assert tokens([*range(len(rows))], is_loose=True) == alone
    assert tokens([*range(7, -1, -1)], is_loose=False) == alone[7::-1]


def test_a_choice_that_is_not_settled_is_undone(grammars: Grammars) -> None:
    """A step that fails after its tokens were chosen is computed again."""
    walk = Walk(grammars, {"regex": "ab?c*"}, SamplingParams())
    for _ in range(3):
        logits = random_logits(1, 6)
        first, again = (sample(logits, [walk.state], matchers=[walk.matcher])[0].token_ids for _ in range(2))
        assert first == again
        if walk.advance(*first):
            break


def test_an_eos_token_is_taken_only_if_it_ends_the_request(grammars: Grammars) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, OTHER_END] = 9.0
    walk = Walk(grammars, {"regex": "(a|b)*"}, SamplingParams())
    (result,) = sample(logits, [walk.state], matchers=[walk.matcher])
    assert result.token_ids != (OTHER_END,)
    walk = Walk(grammars, {"regex": "(a|b)*"}, SamplingParams())
    logits[0, END] = 8.0
    (result,) = sample(logits, [walk.state], matchers=[walk.matcher])
    assert result.token_ids == (END,) and walk.matcher.settle([END])


def test_a_thought_may_open_where_the_form_would_not_allow_it(grammars: Grammars) -> None:
    reasoning = Reasoning(start_token_ids=(1,), end_token_ids=(3,))
    for temperature in (0.0, 1.0):
        form = compiled({"regex": "ab"})
        state = row(SamplingParams(temperature=temperature, reasoning=reasoning, structured_outputs=form))
        matcher = grammars.matcher(form, state)
        logits = torch.zeros(1, VOCAB)
        logits[0, 1] = 40.0
        assert sample(logits, [state], matchers=[matcher])[0].token_ids == (1,)
        logits[0, 1] = -40.0
        (token,) = sample(logits, [state], matchers=[matcher])[0].token_ids
        assert token != 1 and matcher.take(token)
        (allowed,) = Matcher.allowed([matcher])
        assert 1 in allowed and token in allowed


def test_a_row_without_an_allowed_score_fails_alone(grammars: Grammars) -> None:
    form = compiled({"regex": "[a-c]+"})
    rows = [row(SamplingParams(temperature=temperature)) for temperature in (0.0, 0.0, 1.0)]
    matchers = [None, *(grammars.matcher(form, each) for each in rows[1:])]
    (allowed,) = Matcher.allowed([grammars.matcher(form, rows[0])])
    logits = random_logits(3, 0)
    logits[:, allowed] = -math.inf
    free, *others = sample(logits, rows, matchers=matchers)
    assert free.error is None
    assert all(each.error == "structured_outputs leave nothing to choose: every one is -inf" for each in others)
