"""Cores and memory of NUMA nodes: nodes as files describe them, since most machines that run tests have one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from backends import why_not

from splitfuse.engine.replicas import divide
from splitfuse.runtime import machine
from splitfuse.runtime.machine import cores_by_node, nodes_with_memory
from splitfuse.runtime.numa import memory_policy


def make_nodes(root: Path, nodes: Mapping[str, str], *, has_memory: str | None = None) -> None:
    """Describe nodes, with the cores of each, as Linux does."""
    for name, cores in nodes.items():
        folder = root / "sys/devices/system/node" / name
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cores}\n")
    if has_memory is not None:
        (root / "sys/devices/system/node/has_memory").write_text(f"{has_memory}\n")


@pytest.mark.parametrize(
    ("nodes", "divided"),
    [
        ({"node0": "0-3", "node1": "4-7"}, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (
            {"node0": "0-1,4-5", "node1": "2-3,6-7"},
            [(0, 1, 4, 5), (2, 3, 6, 7)],
        ),  # second threads of cores
        ({"node0": "0,2,4,6", "node1": "1,3,5,7"}, [(0, 2, 4, 6), (1, 3, 5, 7)]),
        ({"node0": "0-7", "node1": "", "node2": "no cores"}, [(0, 1, 2, 3), (4, 5, 6, 7)]),  # a node of memory alone
        ({}, [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ],
)
def test_replicas_have_cores_of_one_node(
    nodes: Mapping[str, str], divided: list[tuple[int, ...]], tmp_path: Path
) -> None:
    make_nodes(tmp_path, nodes)
    assert divide(cores_by_node(range(8), tmp_path), 2) == divided


def test_the_cores_of_this_machine_are_all_there() -> None:
    cores = os.sched_getaffinity(0)
    assert sorted(cores_by_node(cores)) == sorted(cores)


@pytest.mark.parametrize(
    ("cores", "has_memory", "found"),
    [
        (range(8), None, {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}),
        (range(4), None, {0: [0, 1, 2, 3]}),
        ([6, 1], "0-1", {0: [1], 1: [6]}),
        (range(8), "0-2", {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}),
        (range(8), "1", {1: [4, 5, 6, 7]}),
        (range(8), "no list", {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}),
        ([9], None, {}),
    ],
)
def test_memory_is_that_of_the_nodes_whose_cores_are_used(
    cores: list[int], has_memory: str | None, found: dict[int, list[int]], tmp_path: Path
) -> None:
    make_nodes(tmp_path, {"node0": "0-3", "node1": "4-7", "node2": ""}, has_memory=has_memory)
    assert nodes_with_memory(cores, tmp_path) == found


def allowed_nodes() -> set[int]:
    """The nodes whose memory this process may use, as Linux says."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return set(machine._numbers(fields["Mems_allowed_list"]))


POLICIES = """
import os
from splitfuse.config.engine import EngineConfig
from splitfuse.runtime import numa

print(numa.spread_memory([0]), numa.memory_policy())
nodes = {0: sorted(os.sched_getaffinity(0)), 1: sorted(os.sched_getaffinity(0))}
numa.nodes_with_memory = lambda cores: nodes  # as on a machine of two sockets
print(numa.spread_engine(EngineConfig.from_settings({"tensor_parallel_size": 2})) == {}, numa.memory_policy())
print(numa.spread_engine(EngineConfig()) == nodes, numa.memory_policy())
print(numa.spread_engine(EngineConfig()) == {}, numa.memory_policy())
"""
BINDINGS = """
import os
from splitfuse.config.engine import EngineConfig
from splitfuse.runtime import numa

cores = sorted(os.sched_getaffinity(0))
nodes = {0: cores, 1: cores}
numa.nodes_with_memory = lambda cores: nodes
os.environ["OMP_PROC_BIND"] = "false"
print(numa.spread_engine(EngineConfig()) == {}, numa.memory_policy())
numa.set_memory_policy(0, [])
del os.environ["OMP_PROC_BIND"]
nodes[1] = []
print(numa.spread_engine(EngineConfig()) == nodes, numa.memory_policy())
numa.set_memory_policy(0, [])
nodes[0] = cores[1:]
print(numa.spread_engine(EngineConfig()) == {}, numa.memory_policy())
"""
LOADED = """
import logging, os, sys
from splitfuse.config.engine import EngineConfig
from splitfuse.runtime.loading import load_model
from splitfuse.runtime.numa import memory_policy

logging.basicConfig(format="%(message)s", stream=sys.stdout)
cores = sorted(os.sched_getaffinity(0))
config = EngineConfig.from_settings({"quantization": "int8", "num_threads": 3, "num_blocks": 8})
model = load_model(config, nodes={0: cores, 1022: cores})
weight = model.decoder.weights.layers[0].mlp.gate_up.memory
print(model.plan.remarks[-1])
first, second = (memory_policy(weight.data_ptr() + len(weight) * sixth // 6) for sixth in (2, 5))
print(first == (1, [0]), second[0])
"""


@pytest.mark.skipif(memory_policy() != (0, []), reason="no memory policies, or one is set")
@pytest.mark.skipif(sys.platform != "linux" or not {0, 1} & allowed_nodes(), reason="the first two nodes are forbidden")
def test_an_engine_is_spread_over_nodes_unless_a_policy_is_set() -> None:
    """The system leaves out nodes that are not there, as the second one on most machines, or that are not allowed."""
    nodes = sorted({0, 1} & allowed_nodes())
    unset = (0, [])
    spread = (3, nodes)
    assert run(POLICIES) == [f"False {unset}", f"True {unset}", f"True {spread}", f"True {spread}"]


def run(script: str) -> list[str]:
    """What a script prints in a process of its own, whose memory it places."""
    return subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.splitlines()


@pytest.mark.skipif(memory_policy() != (0, []), reason="no memory policies, or one is set")
@pytest.mark.skipif(sys.platform != "linux" or not {0, 1} & allowed_nodes(), reason="the first two nodes are forbidden")
def test_threads_are_divided_where_all_cores_have_memory_and_nobody_has_placed_them() -> None:
    spread = (3, sorted({0, 1} & allowed_nodes()))
    assert run(BINDINGS) == [f"True {spread}"] * 3


@pytest.mark.skipif(memory_policy() != (0, []) or 0 not in allowed_nodes(), reason="no memory policies, or one is set")
@pytest.mark.skipif(why_not("avx2") is not None, reason=f"{why_not('avx2')}")
def test_weights_are_kept_on_nodes_as_they_are_loaded() -> None:
    """On the first node, which there is, and not on another, of which one line says so."""
    refused = "weights lie where the system has put them, as it does not keep them on NUMA nodes: Invalid argument"
    divided = "NUMA nodes 0 and 1022: 2 and 1 threads, each with its part of the weights"
    assert run(LOADED) == [refused, divided, "True 0"]
