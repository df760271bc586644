"""Says what a machine can keep of an SLO, from its cost model: alone, how many at once, and how many per second.

Nothing is simulated (simulator/tune.py does that). Shares and numbers of decodes are what the cost model says of single
steps. The requests per second are an upper bound: every step is as long as the targets allow and made of prompts and
decodes as requests need them, and no request waits for another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

from splitfuse.core.slo.cost_model import CostModel, StepFeatures
from splitfuse.core.slo.targets import SloTargets

USUAL_PROMPT, USUAL_ANSWER = 512, 64
"""Tokens of the request that is spoken of: as in DeepSpeed-FastGen's chats, and the default of `splitfuse tune`."""
NEARLY = 0.8
"""Share of a target beyond which it is nearly out of reach: too little is left to wait for others."""


@dataclass(frozen=True, kw_only=True)
class Attainable:
    """Holds what of an SLO a machine can keep. `str()` says it in a sentence."""

    estimated: bool
    """Whether it is from an estimate of the machine, and not from a calibration or from steps that were measured."""
    prompt_tokens: int
    """Tokens of the usual prompt: USUAL_PROMPT, or what fits a shorter context."""
    answer_tokens: int
    gap_target: str = ""
    """Name of the target between tokens: ITL, TPOT, or both; empty without one."""
    ttft_share: float | None = None
    """Time of that prompt alone, as a fraction of its TTFT target; None without one."""
    longest_prompt: int = 0
    """Tokens of the longest prompt that is in time if it is alone; the usual one is late if this is less."""
    max_prompt: int = 0
    """Tokens of the longest prompt that a request can have."""
    gap_share: float | None = None
    """Time between tokens of a lone decode, as a fraction of its ITL or TPOT target; None without one."""
    max_decodes: int = 0
    """Running decodes that keep the ITL and TPOT targets while there are no prompts; `most_decodes` at most."""
    most_decodes: int = 0
    """Running decodes that there is room for: `max_num_seqs`, or what fits the KV cache."""
    requests_per_second: float = 0.0
    """Upper bound of the usual requests per second in time; 0 if not even a lone one is."""

    @property
    def largest_share(self) -> float:
        """Return the larger share of the two: a usual request misses the SLO even alone if it is above 1."""
        return max(self.ttft_share or 0.0, self.gap_share or 0.0)

    @property
    def is_concern(self) -> bool:
        """Return whether the SLO is out of reach, or nearly."""
        return self.largest_share > NEARLY

    def __str__(self) -> str:
        found = []
        if self.gap_share is not None and self.gap_share > NEARLY:
            found.append(f"each token of a lone decode takes {_of_target(self.gap_share, self.gap_target)}")
        if self.gap_share is not None and self.gap_share <= 1.0:
            room = self.max_decodes == self.most_decodes
            decodes = f"all {self.max_decodes} decodes that have room" if room else f"up to {self.max_decodes} decodes"
            found.append(f"{decodes} keep their {self.gap_target} at once")
        if self.ttft_share is not None:
            share = _of_target(self.ttft_share, "TTFT")
            found.append(f"a prompt of {self.prompt_tokens} tokens takes {share} alone")
            if 0 < self.longest_prompt < self.max_prompt:
                found.append(f"prompts of more than {self.longest_prompt} tokens are late even alone")
        if self.requests_per_second:
            size = f"{self.prompt_tokens} + {self.answer_tokens} tokens"
            found.append(f"at most {_short(self.requests_per_second)} requests/s of {size} can be in time")
        reach = "" if not self.is_concern else ", out of reach" if self.largest_share > 1.0 else ", nearly out of reach"
        how = " (estimated)" if self.estimated else ""
        return f"what this machine keeps of the SLO{how}{reach}: {'; '.join(found)}"

    def times(self, replicas: int) -> Attainable:
        """Return what so many machines can keep together."""
        return replace(
            self,
            max_decodes=replicas * self.max_decodes,
            most_decodes=replicas * self.most_decodes,
            requests_per_second=replicas * self.requests_per_second,
        )


def attainable(
    cost: CostModel,
    targets: SloTargets,
    *,
    max_num_seqs: int,
    max_model_len: int,
    kv_tokens: int,
    max_num_batched_tokens: int,
    estimated: bool = False,
) -> Attainable | None:
    """Return what a machine with that cost model and these sizes can keep of an SLO; None without targets.

    >>> cost = CostModel(floor=0.02, per_token=0.0, knee=20, per_token_beyond=0.001)
    >>> sizes = dict(max_num_seqs=64, max_model_len=2048, kv_tokens=10**5, max_num_batched_tokens=2048)
    >>> print(attainable(cost, SloTargets(ttft=1.0, itl=0.05), **sizes))
    what this machine keeps of the SLO: up to 50 decodes keep their ITL at once; a prompt of 512 tokens takes 0.51 of \
its TTFT target alone; prompts of more than 1000 tokens are late even alone; at most 1.7 requests/s of 512 + 64 tokens \
can be in time
    """
    gap = _gap_target(cost, targets)
    has_ttft = targets.ttft_target(1) < math.inf
    if gap is None and not has_ttft:
        return None
    answer = min(USUAL_ANSWER, max_model_len // 2)
    prompt = min(USUAL_PROMPT, max_model_len - answer)
    context = prompt + answer
    ttft_share = longest = None
    if has_ttft:

        def share(count: int) -> float:
            seconds = prompt_seconds(cost, count, max_num_batched_tokens=max_num_batched_tokens)
            return seconds / targets.ttft_target(count)

        ttft_share = share(prompt)
        longest = _largest(lambda count: share(count) <= 1.0, prompt, max_model_len - 1)
    most_decodes = max(min(max_num_seqs, kv_tokens // context), 1)
    gap_share, max_decodes = None, most_decodes
    if gap is not None:
        gap_share = _decodes(cost, 1, context) / gap
        max_decodes = _largest(lambda count: _decodes(cost, count, context) <= gap, 1, most_decodes)
    found = Attainable(
        estimated=estimated,
        gap_target=" and ".join(name for name, each in (("ITL", targets.itl), ("TPOT", targets.tpot)) if each),
        prompt_tokens=prompt,
        answer_tokens=answer,
        ttft_share=ttft_share,
        longest_prompt=max_model_len - 1 if longest is None else longest,
        max_prompt=max_model_len - 1,
        gap_share=gap_share,
        max_decodes=max_decodes,
        most_decodes=most_decodes,
    )
    if found.largest_share > 1.0:
        return found
    return replace(
        found,
        requests_per_second=_requests_per_second(
            cost,
            targets,
            prompt=prompt,
            answer=answer,
            max_decodes=most_decodes,
            max_num_batched_tokens=max_num_batched_tokens,
        ),
    )


def prompt_seconds(cost: CostModel, count: int, *, max_num_batched_tokens: int) -> float:
    """Return the seconds of a lone prompt of `count` tokens, in steps as long as the token budget."""
    full, last = divmod(count - 1, max_num_batched_tokens)
    ends = cost.seconds(StepFeatures().plus(start=count - 1 - last, count=last + 1, rows=1))
    middle = (full - 1) * max_num_batched_tokens // 2  # where a full step begins, on average
    return ends + full * cost.seconds(StepFeatures().plus(start=max(middle, 0), count=max_num_batched_tokens, rows=0))


def _gap_target(cost: CostModel, targets: SloTargets) -> float | None:
    """Return the seconds that the steps of a steady decode may take, before noise."""
    gaps = []
    if targets.itl is not None:
        percentile = targets.itl_percentile
        margin = 0.0 if percentile is None else max(NormalDist().inv_cdf(percentile / 100.0), 0.0) * cost.noise
        gaps.append(targets.itl / math.exp(margin))
    if targets.tpot is not None:
        gaps.append(targets.tpot)
    return min(gaps, default=None)


def _decodes(cost: CostModel, count: int, context: int) -> float:
    """Return the seconds of a step of `count` decodes whose contexts have that length with the token."""
    return cost.seconds(StepFeatures(count, count, count * context, count * context, count))


def _requests_per_second(
    cost: CostModel, targets: SloTargets, *, prompt: int, answer: int, max_decodes: int, max_num_batched_tokens: int
) -> float:
    """Return the most requests/s of which every step has the same number, of their prompts and answers alike.

    A step is no longer than the TTFT target. Where gaps have a mean or a moving average, no longer than that; where a
    percentage of them may be longer, that percentage of the steps is.
    """
    gaps = max(answer - 1, 0)
    reads = sum(range(prompt + 1, prompt + answer))
    whole = StepFeatures().plus(start=0, count=prompt, rows=1)
    whole = StepFeatures(prompt + gaps, 1 + gaps, whole.pairs + reads, prompt + reads, 1 + gaps)

    def seconds(requests: float) -> float:
        return cost.seconds(StepFeatures(*(requests * each for each in whole)))  # type: ignore[arg-type]

    most = min(max_decodes / max(gaps, 1), max_num_batched_tokens / whole.tokens)
    ttft = targets.ttft_target(prompt)
    longest = _requests_within(seconds, ttft, most)
    short = longest if targets.itl is None else _requests_within(seconds, min(targets.itl, ttft), most)
    if targets.tpot is not None:
        limit = _requests_within(seconds, targets.tpot, most)
        longest, short = min(longest, limit), min(short, limit)
    share = 1.0 if targets.itl_percentile is None else targets.itl_percentile / 100.0
    at_knee = min(cost.knee / whole.tokens, short)  # further tokens take longer on some machines
    rates = []
    for low, high in ((short, longest), (at_knee, at_knee)):
        total = share * seconds(low) + (1.0 - share) * seconds(high)
        rates.append((share * low + (1.0 - share) * high) / total if total > 0.0 else 0.0)
    return max(rates)


def _requests_within(seconds: Callable[[float], float], limit: float, most: float) -> float:
    """Return how many requests a step has that takes `limit` seconds; `most` at most."""
    if seconds(most) <= limit:
        return most
    low, high = 0.0, most
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(middle) <= limit else (low, middle)
    return low


def _largest(holds: Callable[[int], bool], start: int, most: int) -> int:
    """Return the largest number up to `most` that something holds for, if it holds from `start` on up to that; else the
    largest below `start`, where it holds from 1 on. 0 if for none.
    """
    low, high = (start, most) if holds(start) else (0, start - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _of_target(share: float, name: str) -> str:
    return f"{_short(share)} {'times' if share > 1.0 else 'of'} its {name} target"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100.0 else f"{number:.2g}"
