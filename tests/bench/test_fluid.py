"""Replicas simulated as fluids, among which the router's code chooses."""

from __future__ import annotations

import pytest

from benchmarks import routing_at_scale as scale
from splitfuse.simulator.fluid import CellsFront, Clock, FluidReplica, Front, RouterFront, run


def fluid(replicas: int, per_replica: int, kind: str) -> tuple[float, float, float]:
    """Return the share of cached tokens, the mean time to a first token, and the most loaded to the mean."""
    clock = Clock()
    members = [FluidReplica(scale.engine(), clock) for _ in range(replicas)]
    gateways = {"cells": 1, "gateways": 4}
    front: Front = scale.make_front(kind, members)
    if kind in gateways:
        front = CellsFront(members, size=20, gateways=gateways[kind])
    sent = run(scale.fluid_requests(replicas, replicas * per_replica), members, front, clock)
    cached = sum(each.num_cached for each in sent) / sum(each.num_prompt for each in sent)
    loads = [each.num_tokens for each in members]
    return cached, sum(each.ttft for each in sent) / len(sent), max(loads) * len(loads) / sum(loads)


def test_a_lone_request_takes_what_the_cost_model_says() -> None:
    clock = Clock()
    replica = FluidReplica(scale.engine(), clock)
    request = scale.new_request("a", (0,) * 1280, 0.0)
    expected = replica.first_token(request, 0)
    assert replica.first_token(request, 1024) < 0.5 * expected
    (sent,) = run([(0.0, request, [b"a", b"b"])], [replica], RouterFront([replica]), clock)
    assert sent.ttft == pytest.approx(expected, rel=0.1) and sent.job.ended_at > sent.job.first_token_at
    assert replica.memory.cached_tokens([b"a", b"b", b"c"]) == 2 * scale.BLOCK


def test_a_dozen_candidates_are_as_good_as_all() -> None:
    exact, one, cells, gateways, blind = (
        fluid(60, 20, kind) for kind in ("exact", "one", "cells", "gateways", "random")
    )
    assert one[0] > 0.95 * exact[0] and min(cells[0], gateways[0]) > 0.9 * exact[0]
    assert one[0] > blind[0] + 0.1
    assert one[2] < 1.3 and one[1] < 1.1 * exact[1]
