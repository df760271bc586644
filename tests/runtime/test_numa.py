"""Cores and memory of NUMA nodes: nodes as files describe them, since most machines that run tests have one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

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
        (range(8), None, [0, 1]),
        (range(4), None, [0]),
        ([1, 6], "0-1", [0, 1]),
        (range(8), "0-2", [0, 1]),
        (range(8), "1", [1]),
        (range(8), "no list", [0, 1]),
        ([9], None, []),
    ],
)
def test_memory_is_that_of_the_nodes_whose_cores_are_used(
    cores: list[int], has_memory: str | None, found: list[int], tmp_path: Path
) -> None:
    make_nodes(tmp_path, {"node0": "0-3", "node1": "4-7", "node2": ""}, has_memory=has_memory)
    assert nodes_with_memory(cores, tmp_path) == found


def allowed_nodes() -> set[int]:
    """The nodes whose memory this process may use, as Linux says."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return set(machine._numbers(fields["Mems_allowed_list"]))


POLICIES = """
from splitfuse.config.engine import EngineConfig
from splitfuse.runtime import numa

print(numa.spread_memory([0]), numa.memory_policy())
numa.nodes_with_memory = lambda cores: [0, 1]  # as on a machine of two sockets
print(numa.spread_engine(EngineConfig.from_settings({"tensor_parallel_size": 2})), numa.memory_policy())
print(numa.spread_engine(EngineConfig()), numa.memory_policy())
print(numa.spread_engine(EngineConfig()), numa.memory_policy())
"""


@pytest.mark.skipif(memory_policy() != (0, []), reason="no memory policies, or one is set")
@pytest.mark.skipif(sys.platform != "linux" or not {0, 1} & allowed_nodes(), reason="the first two nodes are forbidden")
def test_an_engine_is_spread_over_nodes_unless_a_policy_is_set() -> None:
    """The system leaves out nodes that are not there, as the second one on most machines, or that are not allowed."""
    lines = subprocess.run([sys.executable, "-c", POLICIES], check=True, capture_output=True, text=True).stdout
    nodes = sorted({0, 1} & allowed_nodes())
    unset = (0, [])
    spread = (3, nodes)
    assert lines.splitlines() == [f"False {unset}", f"False {unset}", f"True {spread}", f"False {spread}"]
