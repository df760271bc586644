"""Predicts the seconds of a step from its plan. Fitted to timed steps; reads no clock.

    seconds = floor + per_token T + per_token_beyond max(0, T - knee)
            + per_row R + per_pair A + per_kv_token K + per_request N

T tokens go through the layers, R rows through the output head. Up to the knee a step waits for the weights to come from
memory (`floor`), beyond it for arithmetic. A is how many pairs of a query and a key attention multiplies, K how many
positions' keys and values it reads, N how many requests there are. Nothing is negative, so more of anything never takes
less, and the time is convex in the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from operator import mul
from statistics import median
from typing import NamedTuple

from splitfuse.core.plan import StepPlan
from splitfuse.errors import CostModelError

HUBER = 1.345
"""Number of standard deviations beyond which residuals count by their size, not their square (Huber, 1964)."""
ITERATIONS = 6
"""Number of reweighted least-squares fits for each knee."""
MOST_KNEES = 24
"""Number of knees which are tried at most."""
MAX_COEFFICIENT = 1e9
"""Largest coefficient of a cost model: those of a machine are far below, and sums of them stay finite."""
MIN_SAMPLES = 24
"""Number of timed steps that a fit needs: three for each coefficient."""


def num_pairs(start: int, count: int) -> int:
    """Return how many pairs of a query and a key `count` tokens from position `start` have, each with those up to it.

    >>> num_pairs(2, 3)  # tokens 2, 3 and 4: three, four and five keys
    12
    """
    return count * start + count * (count + 1) // 2


class StepFeatures(NamedTuple):
    """Counts what the time of a step depends on."""

    tokens: int = 0
    rows: int = 0
    """Number of tokens whose logits are computed."""
    pairs: int = 0
    """Number of pairs of a query and a key that it attends to."""
    kv_tokens: int = 0
    """Number of positions whose keys and values are read, once for each chunk."""
    requests: int = 0

    def plus(self, *, start: int, count: int, rows: int) -> StepFeatures:
        """Return these with a chunk of `count` tokens from position `start` added, `rows` of which have logits."""
        return StepFeatures(
            self.tokens + count,
            self.rows + rows,
            self.pairs + num_pairs(start, count),
            self.kv_tokens + start + count,
            self.requests + 1,
        )

    def longer(self, *, end: int, count: int) -> StepFeatures:
        """Return these with a chunk that ended at position `end` continued by `count` tokens, all with logits."""
        return StepFeatures(
            self.tokens + count,
            self.rows + count,
            self.pairs + num_pairs(end, count),
            self.kv_tokens + count,
            self.requests,
        )


class StepCounts:
    """Counts the features of a step while it is built, chunk by chunk."""

    __slots__ = ("kv_tokens", "pairs", "requests", "tokens")

    def __init__(self) -> None:
        self.tokens = self.pairs = self.kv_tokens = self.requests = 0

    def add(self, start: int, count: int) -> None:
        """Add a chunk of `count` tokens from position `start`, one of which has logits."""
        self.tokens += count
        self.pairs += num_pairs(start, count)
        self.kv_tokens += start + count
        self.requests += 1

    @property
    def features(self) -> StepFeatures:
        return StepFeatures(self.tokens, self.requests, self.pairs, self.kv_tokens, self.requests)


def features_of(plan: StepPlan) -> StepFeatures:
    """Return the features of a whole step."""
    rows = pairs = kv_tokens = 0
    for chunk in plan.chunks:
        count = len(chunk.token_ids)
        rows += chunk.num_logits
        pairs += num_pairs(chunk.start, count)
        kv_tokens += chunk.start + count
    return StepFeatures(plan.num_tokens, rows, pairs, kv_tokens, len(plan.chunks))


@dataclass(frozen=True)
class FitError:
    """Says how far predictions are from steps that were not fitted, as fractions of the measured time."""

    median: float
    p95: float
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Holds the coefficients, all in seconds but `knee`, which is in tokens. `noise` is the standard deviation of the
    logarithm of the times of equal steps. Raises CostModelError unless all are numbers from 0 to MAX_COEFFICIENT.
    """

    floor: float
    per_token: float
    knee: float = 0.0
    per_token_beyond: float = 0.0
    per_row: float = 0.0
    per_pair: float = 0.0
    per_kv_token: float = 0.0
    per_request: float = 0.0
    noise: float = 0.0
    error: FitError | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "error" and not (isinstance(value, int | float) and 0 <= value <= MAX_COEFFICIENT):
                raise CostModelError(
                    f"{field.name} of a cost model must be a number from 0 to {MAX_COEFFICIENT:g}, not {value!r:.80}"
                )

    def seconds(self, step: StepFeatures) -> float:
        """Return the predicted time of a step."""
        tokens, rows, pairs, kv_tokens, requests = step
        return self.seconds_of(tokens, rows, pairs, kv_tokens, requests)

    def seconds_of(self, tokens: int, rows: int, pairs: int, kv_tokens: int, requests: int) -> float:
        """Return the predicted time of a step with these features."""
        seconds = (
            self.floor
            + self.per_token * tokens
            + self.per_row * rows
            + self.per_pair * pairs
            + self.per_kv_token * kv_tokens
            + self.per_request * requests
        )
        return seconds + self.per_token_beyond * (tokens - self.knee) if tokens > self.knee else seconds

    def tokens_within(self, seconds: float, step: StepCounts, start: int, most: int) -> int:
        """Return how many tokens of one more request, from its position `start` and `most` at most, keep a step within
        `seconds`; 0 if none does. One of them has logits.
        """
        requests = step.requests + 1
        low, high = 0, most  # `low` tokens fit, more than `high` do not
        count = most
        while low < high:
            pairs = step.pairs + num_pairs(start, count)
            kv_tokens = step.kv_tokens + start + count
            if self.seconds_of(step.tokens + count, requests, pairs, kv_tokens, requests) <= seconds:
                low = count
            else:
                high = count - 1
            count = (low + high + 1) // 2
        return low

    def slower(self, times: float) -> CostModel:
        """Return the model of a machine on which every step takes `times` as long."""
        return self.scaled(lambda: times)

    def scaled(self, times: Callable[[], float]) -> CostModel:
        """Return the model with each coefficient in seconds `times()` as large, called anew for each."""
        names = (field.name for field in fields(self) if field.name not in ("knee", "noise", "error"))
        return replace(self, **{name: times() * getattr(self, name) for name in names})

    def measure(self, samples: Sequence[Sample]) -> FitError:
        """Return how far it is from timed steps. Raises CostModelError without any."""
        if not samples:
            raise CostModelError("the error of a cost model needs at least one timed step")
        misses = sorted(abs(self.seconds(s.features) / s.seconds - 1.0) for s in samples)
        return FitError(median(misses), misses[math.ceil(0.95 * len(misses)) - 1], len(misses))


@dataclass(frozen=True)
class StepTimes:
    """Says by what steps are predicted at one moment."""

    cost: CostModel
    factors: tuple[float, float] = (1.0, 1.0)
    """How many times longer than the cost model says the floor of a step takes, and the rest of it."""
    safety_factor: float = 1.0
    """Fraction of the time until a deadline which a step may be predicted to take."""


@dataclass(frozen=True)
class Sample:
    """Holds a step and its measured time. Raises CostModelError unless that is a positive number."""

    features: StepFeatures
    seconds: float

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise CostModelError(f"a step takes a positive number of seconds, not {self.seconds!r}")


def fit(samples: Sequence[Sample], *, held_out: Sequence[Sample]) -> CostModel:
    """Return the model whose relative error over `samples` is least, with its error over `held_out`, other steps.

    For each knee that the samples can tell, non-negative least squares, reweighted so that a few disturbed timings do
    not bend it. Raises CostModelError for fewer than MIN_SAMPLES.
    """
    return next(model for model in fit_in_parts(samples, held_out=held_out) if model is not None)


def fit_in_parts(samples: Sequence[Sample], *, held_out: Sequence[Sample]) -> Iterator[CostModel | None]:
    """Yield None after each part of the work of `fit`, then the model. A part takes about a millisecond, all of it a
    tenth of a second. Raises as `fit` does.
    """
    if len(samples) < MIN_SAMPLES:
        raise CostModelError(
            f"{len(samples)} timed steps are too few to fit a cost model: at least {MIN_SAMPLES} are needed"
        )
    best, least = None, math.inf
    for knee in _knees(samples):
        for model in _fit(samples, knee):
            yield None
            if model is not None:
                error = sum([abs(model.seconds(each.features) / each.seconds - 1.0) for each in samples])
                if best is None or error < least:
                    best, least = model, error
    assert best is not None, "no knee at all is one of them"
    yield replace(best, error=best.measure(held_out))


def _knees(samples: Sequence[Sample]) -> list[float]:
    """Return token counts with samples on both sides: MOST_KNEES of them, evenly chosen, and none at all."""
    counts = sorted({s.features.tokens for s in samples})[1:-1]
    step = max(len(counts) / MOST_KNEES, 1.0)
    return [0.0, *(float(counts[int(i * step)]) for i in range(int(len(counts) / step)))]


def _fit(samples: Sequence[Sample], knee: float) -> Iterator[CostModel | None]:
    """Fit one knee by iteratively reweighted least squares: yield None after each of them, then the model. Every row is
    divided by its time, so that errors are relative and all targets are 1.
    """
    rows = []
    for sample in samples:
        tokens, *others = sample.features
        terms = (1.0, tokens, max(tokens - knee, 0.0) if knee else 0.0, *others)
        rows.append([term / sample.seconds for term in terms])
    scales = [math.sqrt(sum(row[j] ** 2 for row in rows)) or 1.0 for j in range(len(rows[0]))]
    rows = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
    weights = [1.0] * len(rows)
    for _ in range(ITERATIONS):
        solution = _least_squares(rows, weights)
        misses = [abs(sum(v * x for v, x in zip(row, solution, strict=True)) - 1.0) for row in rows]
        bound = HUBER * max(1.4826 * median(misses), 1e-6)
        weights = [1.0 if miss <= bound else bound / miss for miss in misses]
        yield None
    floor, per_token, beyond, per_row, per_pair, per_kv_token, per_request = (
        value / scale for value, scale in zip(solution, scales, strict=True)
    )
    yield CostModel(
        floor=floor,
        per_token=per_token,
        knee=knee,
        per_token_beyond=beyond,
        per_row=per_row,
        per_pair=per_pair,
        per_kv_token=per_kv_token,
        per_request=per_request,
    )


def _least_squares(rows: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """Return the x >= 0 that brings every row's product with it nearest to 1, by Lawson and Hanson's active set
    (Solving Least Squares Problems, 1974, chapter 23), on the normal equations.
    """
    columns = list(zip(*rows, strict=True))
    weighted = [[w * v for w, v in zip(weights, column, strict=True)] for column in columns]
    gram = [[sum(map(mul, left, right)) for right in columns] for left in weighted]
    moment = [sum(column) for column in weighted]
    size = len(columns)
    x, free = [0.0] * size, set[int]()
    for _ in range(10 * size):
        slopes = {i: moment[i] - sum(gram[i][j] * x[j] for j in free) for i in range(size) if i not in free}
        steepest = max(slopes, key=slopes.__getitem__, default=None)
        if steepest is None or slopes[steepest] <= 1e-10 * len(rows):
            break
        free.add(steepest)
        trial = _solve(gram, moment, free)
        while negative := [i for i in free if trial[i] <= 0.0]:
            reach = min(x[i] / (x[i] - trial[i]) if x[i] > 0.0 else 0.0 for i in negative)
            x = [x[i] + reach * (trial[i] - x[i]) if i in free else 0.0 for i in range(size)]
            free -= {i for i in negative if x[i] <= 1e-12}
            trial = _solve(gram, moment, free)
        x = [trial.get(i, 0.0) for i in range(size)]
    return x


def _solve(gram: Sequence[Sequence[float]], moment: Sequence[float], free: set[int]) -> dict[int, float]:
    """Return the unconstrained minimum over the `free` variables, the others being 0, by Gauss-Jordan elimination. The
    matrix is positive, and a trace of damping keeps it so where two features never differ in the samples.
    """
    order = sorted(free)
    rows = [[gram[i][j] * (1.0 + 1e-12 * (i == j)) for j in order] + [moment[i]] for i in order]
    for k, pivot_row in enumerate(rows):
        pivot_row[:] = [value / pivot_row[k] for value in pivot_row]
        for row in rows:
            if row is not pivot_row:
                factor = row[k]
                row[:] = [value - factor * pivot for value, pivot in zip(row, pivot_row, strict=True)]
    return {i: row[-1] for i, row in zip(order, rows, strict=True)}
