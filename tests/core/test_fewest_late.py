"""The rule of Moore and Hodgson with owners: against looking at all of them, and what it costs with many."""

import math
from random import Random

import pytest

from splitfuse.core.request import Request
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.fewest_late import FewestLate


def request(number: int, owner: int, *, prompt: int, key: float, on_time_only: bool = False) -> Request:
    scheduling = SchedulingOptions(owner=str(owner), on_time_only=on_time_only)
    made = Request(str(number), (1,) * prompt, SamplingParams(), 5, seed=0, scheduling=scheduling)
    made.sequence_number, made.fair_share_key = number, key
    return made


def first_to_drop(chosen: dict[Request, float], first_keys: dict[str, float]) -> Request:
    """By the definition: of the owner that would have had most, the longest; `on_time_only` ones last."""
    would_have = dict(first_keys)
    for each in chosen:
        would_have[each.owner] += each.num_tokens
    yields = {owner: any(r.owner == owner and not r.on_time_only for r in chosen) for owner in first_keys}
    return max(
        chosen, key=lambda r: (yields[r.owner], would_have[r.owner], not r.on_time_only, chosen[r], r.sequence_number)
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_owner_that_would_have_had_most_loses_its_longest(seed: int) -> None:
    rng = Random(seed)
    chosen: dict[Request, float] = {}
    first_keys: dict[str, float] = {}
    fewest = FewestLate()
    for number in range(200):
        made = request(
            *(number, rng.randrange(1 + seed)),
            prompt=rng.randint(1, 50),
            key=rng.uniform(0.0, 100.0),
            on_time_only=rng.random() < 0.2,
        )
        first_keys[made.owner] = min(first_keys.get(made.owner, math.inf), made.fair_share_key)
        chosen[made] = rng.uniform(1.0, 9.0)
        fewest.add(made, chosen[made])
        while chosen and rng.random() < 0.4:
            del chosen[first_to_drop(chosen, first_keys)]
            fewest.drop()
        assert fewest.requests == chosen.keys()
        assert fewest.work == pytest.approx(sum(chosen.values()), abs=1e-9)
        assert fewest.num_yielding == sum(not each.on_time_only for each in chosen)


class Counted(float):
    """A number that counts how often it is added to."""

    count = 0

    def __add__(self, other: float) -> float:
        Counted.count += 1
        return float(self) + other


@pytest.mark.interpreted
def test_dropping_looks_at_one_owner_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "count", 0)
    fewest = FewestLate()
    for number in range(200):
        fewest.add(request(number, number, prompt=10, key=Counted(number)), 1.0)
    for _ in range(100):
        fewest.drop()
    assert {each.sequence_number for each in fewest.requests} == set(range(100))
    assert 0 < Counted.count <= 200 + 100  # once for each change of an owner; to look at all for each drop are 15,050
