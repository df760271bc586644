"""Threads and weights of NUMA nodes: nodes as plain data, on a machine that may have one."""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import pytest
import torch
from backends import CPU, variants
from random_networks import RandomWeights
from rank_networks import NETWORKS, logits, own_names

from splitfuse.kernels.cpu import nodes
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.library import Library
from splitfuse.kernels.cpu.memory import allocate
from splitfuse.kernels.cpu.nodes import MOST_NODES, NodeMemory, NodePlan, bind_memory, plan_nodes
from splitfuse.models.decoder import Decoder
from splitfuse.models.weights import load_decoder
from splitfuse.runtime.numa import memory_policy

HAS_POLICIES = memory_policy() == (0, [])
PREFERRED = 1


def cores_of(counts: Sequence[int]) -> dict[int, list[int]]:
    """Nodes with so many cores each, numbered in turns as on machines where neighbours are on other sockets."""
    return {node: [node + len(counts) * i for i in range(count)] for node, count in enumerate(counts)}


def test_threads_and_panels_are_divided_in_proportion() -> None:
    """Parts of any number of panels have all of them once, in order, each as many as its threads are worth, but one."""
    rng = random.Random(0)
    for _ in range(500):
        counts = [rng.randint(1, 12) for _ in range(rng.randint(2, 9))]
        cores, threads = cores_of(counts), rng.randint(1, sum(counts))
        plan = plan_nodes(cores, threads)
        if plan is None:  # which needs a node with half a thread more than all others have
            assert max(counts) * threads / sum(counts) > threads - len(counts) / 2
            continue
        assert plan.num_threads == threads and len(plan.nodes) >= 2 and set(plan.nodes) <= set(cores)
        assert plan.cores == tuple(tuple(cores[node]) for node in plan.nodes)
        worth = dict.fromkeys(cores, 0) | {
            node: end - begin for node, (begin, end) in zip(plan.nodes, pairwise(plan.first_thread), strict=True)
        }
        assert all(abs(worth[node] - threads * len(cores[node]) / sum(counts)) <= 1 for node in cores)
        panels = rng.randint(1, 400)
        parts = plan.parts(panels)
        assert [panel for part in parts for panel in part] == [*range(panels)]
        for node, part in zip(plan.nodes, parts, strict=True):
            assert abs(len(part) - panels * worth[node] / threads) <= 1


@pytest.mark.parametrize(
    ("cores", "threads", "first_thread"),
    [
        (cores_of([4, 4]), 8, (0, 4, 8)),
        (cores_of([4, 4]), 3, (0, 2, 3)),
        (cores_of([12, 1, 12]), 2, (0, 1, 2)),  # the second one's core is worth no thread
        (cores_of([4]), 4, None),
        (cores_of([4, 4]), 1, None),
        (cores_of([4, 0]), 4, None),
        ({}, 4, None),
        (cores_of([2] * MOST_NODES), 2 * MOST_NODES, tuple(range(0, 2 * MOST_NODES + 1, 2))),
        (cores_of([2] * (MOST_NODES + 1)), 40, None),
    ],
)
def test_nodes_without_a_thread_have_no_part(
    cores: Mapping[int, Sequence[int]], threads: int, first_thread: tuple[int, ...] | None
) -> None:
    plan = plan_nodes(cores, threads)
    assert (None if plan is None else plan.first_thread) == first_thread


def plan_here(*first_thread: int) -> NodePlan:
    """A plan of as many nodes, all of which have the cores of this process: so its threads go on to run on all."""
    numbers = tuple(range(len(first_thread) - 1))
    return NodePlan(numbers, tuple(tuple(sorted(os.sched_getaffinity(0))) for _ in numbers), first_thread)


@pytest.fixture
def library() -> Iterator[Library]:
    library = CpuBackend().library
    yield library
    library.set_nodes(None)


PLANS = [(0, 1, 2), (0, 2, 3), (0, 1, 3, 4), (0, 1, 2, 3, 4)]


@pytest.mark.parametrize("first_thread", PLANS)
@pytest.mark.parametrize("variant", variants())
def test_each_unit_is_taken_once_and_those_of_the_own_node_first(
    variant: str, first_thread: tuple[int, ...], library: Library
) -> None:
    plan, rng = plan_here(*first_thread), random.Random(0)
    library.set_nodes(plan)
    team = Library(variant, plan.num_threads)
    node_of = [node for node, (begin, end) in enumerate(pairwise(first_thread)) for _ in range(begin, end)]
    for _ in range(200):
        rows, places, each = rng.randint(1, 5), rng.randint(1, 40), rng.randint(1, 3)
        takers, turns = (array(kind, [-1] * (rows * places * each)) for kind in "iq")
        team.take_units(rows, places, each, takers.buffer_info()[0], turns.buffer_info()[0])
        home = [node for node, part in enumerate(plan.parts(places)) for _ in part]
        for thread in range(plan.num_threads):
            mine = sorted((turns[unit], unit) for unit, taker in enumerate(takers) if taker == thread)
            assert [turn for turn, _ in mine] == [*range(len(mine))]
            foreign = [home[unit // each % places] != node_of[thread] for _, unit in mine]
            assert foreign == sorted(foreign)  # none of its own once it has taken another's
        assert -1 not in takers and -1 not in turns


@pytest.mark.parametrize("threads", [2, 3, 5, MOST_NODES + 4])
@pytest.mark.parametrize("variant", variants())
def test_without_nodes_each_thread_takes_its_own_part_first(variant: str, threads: int) -> None:
    team, rng = Library(variant, threads), random.Random(0)
    parts = min(threads, MOST_NODES)
    starts = [-(-part * threads // parts) for part in range(parts + 1)]
    for _ in range(50):
        units = rng.randint(1, 90)
        takers, turns = (array(kind, [-1] * units) for kind in "iq")
        team.take_units(1, units, 1, takers.buffer_info()[0], turns.buffer_info()[0])
        home = [
            part
            for part, (a, b) in enumerate(pairwise(starts))
            for _ in range(units * a // threads, units * b // threads)
        ]
        for thread in range(threads):
            mine = sorted((turns[unit], unit) for unit, taker in enumerate(takers) if taker == thread)
            foreign = [home[unit] != thread * parts // threads for _, unit in mine]
            assert foreign == sorted(foreign)
        assert -1 not in takers and -1 not in turns


@pytest.mark.parametrize("name", ["plain", "experts"])
@pytest.mark.parametrize(
    ("variant", "quantization", "group_size"),
    [
        case
        for each in ((None, None), ("int8", None), ("int4", 64))
        for case in variants(*each, id="-".join(map(str, each)))
    ],
)
def test_bits_do_not_depend_on_nodes(
    variant: str, quantization: str | None, group_size: int | None, name: str, library: Library
) -> None:
    spec = NETWORKS[name]

    def load(threads: int, plan: NodePlan | None) -> Decoder:
        library.set_nodes(plan)
        backend = CpuBackend(variant=variant, num_threads=threads, quantization=quantization, group_size=group_size)
        if plan is not None:
            backend.use_nodes(dict(zip(plan.nodes, plan.cores, strict=True)))
        return load_decoder(RandomWeights(), spec, dtype=torch.bfloat16, device=CPU, backend=backend)

    with own_names():
        alone = logits(load(1, None), spec.vocab_size)
        for plan in map(plan_here, *zip(*((0, 1, 2), (0, 2, 3)), strict=True)):
            found = logits(load(plan.num_threads, plan), spec.vocab_size)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, alone, strict=True))


@pytest.mark.skipif(not HAS_POLICIES, reason="no memory policies, or one is set")
def test_parts_of_a_weight_are_kept_on_their_nodes() -> None:
    """Of this machine's nodes, of which every machine has the first; a page with panels of two is left out."""
    page = os.sysconf("SC_PAGE_SIZE")
    memory = allocate(20 * page)
    memory.fill_(7)  # written before: what is there stays
    NodeMemory(NodePlan((0, 0), ((0,), (0,)), (0, 1, 2))).keep(memory[page // 2 : -page // 2], 1 + 2)
    kept = [memory_policy(memory.data_ptr() + place * page) == (PREFERRED, [0]) for place in range(20)]
    middle = (page // 2 + 19 * page // 3) // page  # the first of three panels is the first part
    assert kept == [0 < place < 19 and place != middle for place in range(20)]
    assert bool((memory == 7).all())


@pytest.mark.skipif(not HAS_POLICIES, reason="no memory policies, or one is set")
def test_what_cannot_be_kept_on_a_node_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, page = allocate(4 * os.sysconf("SC_PAGE_SIZE")), os.sysconf("SC_PAGE_SIZE")
    absent = NodeMemory(NodePlan((1021, 1022), ((0,), (0,)), (0, 1, 2)))
    assert absent.remark is None
    for _ in range(3):
        absent.keep(memory, 2)
    assert absent.remark is not None and "does not keep them on NUMA nodes: Invalid argument" in absent.remark
    assert not bind_memory(memory.data_ptr(), page, 1021)
    full = NodeMemory(NodePlan((0, 0), ((0,), (0,)), (0, 1, 2)))
    monkeypatch.setattr(nodes, "MOST_PARTS", 6)
    for _ in range(3):
        full.keep(memory, 2)
    assert full.remark is None
    full.keep(memory, 2)
    assert full.remark is not None and "more than 6 parts" in full.remark
