"""Chooses the token budget of steps where the settings leave it open: the smallest with nearly the best throughput.

Every step waits once for the weights to come from memory, however few its tokens are; from some number of tokens on it
takes as long as its arithmetic, and more tokens only make it longer. So throughput rises with the budget and saturates,
and the inter-token latency of running decodes rises for ever. DeepSpeed-FastGen (arXiv 2401.08671, section 3) chose its
budget where its curve has become flat; so does this, from a cost model.

The first cost model is an estimate, or a calibration of the machine. While the engine serves, a few of the steps that
it runs are remembered, and the model is fitted to them. It reads no clock, and knows of no machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from splitfuse.config.engine import MAX_TOKEN_BUDGET, SchedulerConfig
from splitfuse.core.events import StepRecord
from splitfuse.core.slo.cost_model import MIN_SAMPLES, CostModel, Sample, StepFeatures, features_of, fit_in_parts

BUDGETS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, MAX_TOKEN_BUDGET)
"""Token budgets to choose among: two in each octave, so that each move is a clear one."""
FIRST_BUDGET = 256
"""Token budget while nothing is known of the machine."""
THROUGHPUT = 0.95
"""Fraction of the best throughput that the chosen budget has, at least."""
HYSTERESIS = 0.02
"""Fraction of the best throughput by which a budget must be beyond THROUGHPUT, by two fits in a row, before another
takes its place.
"""
SPARE_TOKENS = 32
"""Tokens for prompts that are left of the smallest budget when all of `max_num_seqs` requests decode."""
USUAL_STEP = StepFeatures(tokens=576, rows=65, pairs=164_000, kv_tokens=35_000, requests=65)
"""Step of a usual load, for the features that each of its tokens has on average: prompts of 512 tokens and answers of
64, as many decodes as keep up with the prompts.
"""
COLD_STEPS = 4
"""Number of steps at the start that are not remembered: memory is touched for the first time."""
FIRST_FIT, MOST_STEPS_BETWEEN = 32, 1024
"""Steps before the first fit, and most steps between two; the distance doubles."""
SAMPLES_PER_SIZE = 3
"""Number of the newest steps remembered of each size; there are four sizes in an octave."""
FORGOTTEN_AFTER = 4096
"""Number of steps after which one is forgotten: the machine may have changed."""
LEAST_SIZES, LEAST_RANGE = 3, 4.0
"""Number of different sizes of step that a fit needs, and the ratio of the largest to the smallest."""


def choose_budget(
    cost: CostModel, budgets: Sequence[int] = BUDGETS, *, step: StepFeatures = USUAL_STEP, share: float = THROUGHPUT
) -> int:
    """Return the smallest of `budgets`, which ascend, with at least a `share` of the best throughput of any. Their
    steps are made of tokens as those of `step` are on average.

        >>> choose_budget(CostModel(floor=0.1, per_token=0.0, knee=500, per_token_beyond=0.0002))
        512
    """
    throughputs = [_throughput(cost, budget, step) for budget in budgets]
    least = share * max(throughputs)
    return next(budget for budget, each in zip(budgets, throughputs, strict=True) if each >= least)


def _throughput(cost: CostModel, budget: int, step: StepFeatures) -> float:
    """Return tokens per second. A model that says a step takes no time says nothing: all budgets are equal."""
    times = budget / step.tokens
    tokens, rows, pairs, kv_tokens, requests = (round(times * count) for count in step)
    seconds = cost.seconds(StepFeatures(tokens, rows, pairs, kv_tokens, requests))
    return budget / seconds if seconds > 0.0 else 0.0


class StepBudget:
    """Holds the token budget of the next step. If it was left open, it follows the steps that it observes.

    >>> cost = CostModel(floor=0.1, per_token=0.001)
    >>> StepBudget.of(SchedulerConfig(), cost).tokens, StepBudget.of(SchedulerConfig(max_num_batched_tokens=7)).tokens
    (1024, 7)
    """

    def __init__(self, tokens: int, budgets: Sequence[int] = ()) -> None:
        """Without `budgets`, in ascending order, to choose among it stays as it is."""
        self.tokens = tokens
        """Token budget of a step that nothing else limits."""
        self.cost: CostModel | None = None
        """Newest cost model by which it was chosen."""
        self._budgets = tuple(budgets)
        self._num_steps = 0
        self._next_fit = FIRST_FIT
        self._last_found = tokens  # by the fit before
        self._fitting: Iterator[CostModel | None] | None = None
        self._usual_step = USUAL_STEP  # of those that are fitted
        self._samples: dict[int, deque[tuple[int, Sample]]] = {}  # by size of the step, with its number

    @classmethod
    def of(cls, config: SchedulerConfig, cost: CostModel | None = None, *, most: int = MAX_TOKEN_BUDGET) -> StepBudget:
        """Return the budget of these settings. One that they leave open is chosen, by the cost model if there is any
        yet, with room for `max_num_seqs` decodes and at most `most`.
        """
        if config.max_num_batched_tokens is not None:
            return cls(config.max_num_batched_tokens)
        budgets = budgets_between(config.max_num_seqs + SPARE_TOKENS, most)
        budget = cls(min(budgets, key=lambda budget: abs(budget - FIRST_BUDGET)), budgets)
        if cost is not None:
            budget.choose(cost)
        return budget

    @property
    def most(self) -> int:
        """Return the largest budget that it can come to."""
        return max((self.tokens, *self._budgets))

    @property
    def is_open(self) -> bool:
        """Return whether it is chosen here, and not given."""
        return bool(self._budgets)

    def choose(self, cost: CostModel) -> None:
        """Choose anew by a cost model, if it is open."""
        if self.is_open:
            self.cost = cost
            self.tokens = self._last_found = choose_budget(cost, self._budgets)

    def seconds(self, step: StepFeatures) -> float:
        """Predict how long a step takes, once a cost model is known."""
        assert self.cost is not None, "call choose() before"
        return self.cost.seconds(step)

    def observe(self, step: StepRecord) -> None:
        """Remember a step that was measured, and now and then choose anew."""
        if not self.is_open or any(chunk.error is not None or chunk.state_lost for chunk in step.result.values()):
            return
        self._num_steps += 1
        if self._num_steps <= COLD_STEPS or step.measured_seconds <= 0.0:
            return
        size = _size(step.plan.num_tokens)
        sample = Sample(features_of(step.plan), step.measured_seconds)  # and not the plan, which has prompts
        self._samples.setdefault(size, deque(maxlen=SAMPLES_PER_SIZE)).append((self._num_steps, sample))
        if self._fitting is None and self._num_steps >= self._next_fit:
            self._next_fit = self._num_steps + min(self._num_steps, MOST_STEPS_BETWEEN)
            self._begin_to_fit()
        if self._fitting is not None and (cost := next(self._fitting)) is not None:
            self._fitting, self.cost = None, cost
            self._follow(cost)

    def _begin_to_fit(self) -> None:
        """Begin to fit a cost model to what is remembered, if that says enough: a part with each step that follows,
        since no request waits for longer than a step then.
        """
        oldest = self._num_steps - FORGOTTEN_AFTER
        recent = {size: [each for n, each in some if n > oldest] for size, some in self._samples.items()}
        sizes = sorted(size for size, some in recent.items() if some)
        samples = [each for size in sizes for each in recent[size]]
        counts = [each.features.tokens for each in samples]
        if len(samples) < MIN_SAMPLES or len(sizes) < LEAST_SIZES or max(counts) < LEAST_RANGE * min(counts):
            return
        self._fitting, self._usual_step = fit_in_parts(samples, held_out=samples), _mean_step(samples)

    def _follow(self, cost: CostModel) -> None:
        """Move the budget if another is clearly better by a cost model that was fitted."""
        least, best, clear = (
            choose_budget(cost, self._budgets, step=self._usual_step, share=THROUGHPUT + change)
            for change in (-HYSTERESIS, 0.0, HYSTERESIS)
        )
        found = best if least > self.tokens else min(clear, self.tokens)
        if self._last_found < self.tokens > found:
            self.tokens = max(found, self._last_found)
        elif self._last_found > self.tokens < found:  # steps that long were never seen: one octave at a time
            most = min(found, self._last_found, 2 * self.tokens)
            self.tokens = max(each for each in self._budgets if each <= most)
        self._last_found = found


def budgets_between(least: int, most: int) -> tuple[int, ...]:
    """Return the budgets to choose among: those from `least` to `most`, or `most` alone."""
    return tuple(budget for budget in BUDGETS if least <= budget <= most) or (most,)


def _size(tokens: int) -> int:
    """Return a number that is equal for about as many tokens: four in an octave.

    >>> [_size(tokens) for tokens in (1, 2, 8, 9, 10, 250, 255, 256)]
    [4, 8, 16, 16, 17, 35, 35, 36]
    """
    octave = tokens.bit_length()
    return 4 * octave + ((tokens << 3) >> octave) % 4


def _mean_step(samples: Sequence[Sample]) -> StepFeatures:
    """Return the sum of the larger half of the steps: those which the budget is for."""
    larger = sorted((each.features for each in samples), key=lambda features: features.tokens)[len(samples) // 2 :]
    return StepFeatures(*map(sum, zip(*larger, strict=True)))
