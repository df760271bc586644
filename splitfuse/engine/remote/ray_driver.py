"""Runs the process that speaks with Ray: `python -m splitfuse.engine.remote.ray_driver FD ADDRESS`, see ray_cluster.py.

FD is a connected socket that it inherits, for orders and answers. It is a driver of Ray, whose actors end with it.
An engine is an actor in a placement group of one bundle: Ray prefers the node with most room for it, so that engines
are spread over nodes. Ray restarts none: a server asks for another place.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import traceback
from typing import Any

import msgspec

from splitfuse.config.values import parse_address
from splitfuse.engine.remote.ray_actor import EngineActor
from splitfuse.engine.remote.ray_cluster import (
    LOCAL,
    Answer,
    EngineSpec,
    NotPlaced,
    Place,
    Placed,
    Release,
    decode_order,
    encode,
)
from splitfuse.engine.remote.transport import frame, receive
from splitfuse.errors import EngineUnavailableError, SplitfuseError

CONNECT_SECONDS = 5.0
"""Longest time until the head of a cluster accepts a connection."""
INIT_SECONDS = 30.0
"""Longest time to connect to Ray, or to start a cluster on this machine, however busy it is."""
LEAVE_SECONDS = 1.0
"""Longest time to wait for the connection to Ray after the server has left."""
ACTOR_SECONDS = 60.0
"""Longest time until the process of an actor listens, once Ray has a place for it."""
GIB = 2**30


class Driver:
    """Obeys orders, each in a thread of its own: calls of Ray block. Belongs to the main thread, with which a cluster
    ends that was started here.
    """

    def __init__(self, connection: socket.socket, address: str) -> None:
        self._connection, self._address = connection, address
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._groups: dict[int, Any] = {}
        self._actors: dict[int, Any] = {}
        self._released: set[int] = set()
        self._connected, self._left = threading.Event(), threading.Event()
        self._refusal: SplitfuseError | None = None

    def run(self) -> None:
        """Obey until the server has left."""
        for work in (self._answer_all, self._receive_all):
            threading.Thread(target=work, daemon=True).start()
        self._connect()
        self._left.wait()

    def _receive_all(self) -> None:
        while (message := receive(self._connection)) is not None:
            order = decode_order(message)
            work = self._place if isinstance(order, Place) else self._release
            threading.Thread(target=work, args=(order,), daemon=True).start()
        self._left.set()
        if not self._connected.wait(LEAVE_SECONDS):
            os._exit(1)

    def _connect(self) -> None:
        try:
            connect(self._address)
        except SplitfuseError as error:
            self._refusal = error
        except BaseException as error:
            self._refusal = EngineUnavailableError(f"Ray at {self._address} cannot be used: {_first_line(error)}")
        self._connected.set()

    def _answer_all(self) -> None:
        while True:
            self._connection.sendall(frame(encode(self._answers.get())))

    def _place(self, order: Place) -> None:
        try:
            if not self._connected.wait(INIT_SECONDS):
                raise EngineUnavailableError(
                    f"Ray at {self._address} has not accepted this server within {INIT_SECONDS:g} s: check that it "
                    "runs, and that RAY_AUTH_TOKEN is its own"
                )
            if self._refusal is not None:
                raise self._refusal
            address, pid = self._start(order.number, order.spec)
            answer: Answer = Placed(order.number, address, pid)
        except SplitfuseError as error:
            answer = NotPlaced(order.number, str(error), type(error).__name__)
        except Exception as error:
            traceback.print_exc()
            answer = NotPlaced(order.number, f"Ray has failed: {_first_line(error)}", "EngineUnavailableError")
        if isinstance(answer, NotPlaced):
            self._release(Release(order.number))
        self._answers.put(answer)

    def _start(self, number: int, spec: EngineSpec) -> tuple[str, int]:
        """Start an engine where Ray has room, and return its address and the number of its process."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = {"CPU": float(spec.cpus)}
        bundle |= {"GPU": float(spec.gpus)} if spec.gpus else {}
        bundle |= {"memory": float(spec.memory)} if spec.memory else {}
        group = placement_group([bundle], strategy="SPREAD")
        self._keep(self._groups, number, group)
        if not group.wait(spec.seconds):
            raise EngineUnavailableError(
                f"Ray has no place for an engine within {spec.seconds:g} s: it needs {_amounts(bundle)} on one node; "
                f"{describe_nodes()}"
            )
        actor = (
            ray.remote(EngineActor)
            .options(
                num_cpus=spec.cpus,
                num_gpus=spec.gpus,
                memory=spec.memory or None,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            )
            .remote()
        )
        self._keep(self._actors, number, actor)
        asked = actor.listen.remote(
            msgspec.msgpack.encode(spec.config), spec.link_key, spec.name_key, spec.step_timeout
        )
        try:
            address, pid = ray.get(asked, timeout=ACTOR_SECONDS)
        except ray.exceptions.GetTimeoutError:
            message = f"the process that Ray has started for an engine says nothing for {ACTOR_SECONDS:g} s"
            raise EngineUnavailableError(message) from None
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, SplitfuseError) else EngineUnavailableError(_first_line(cause)) from None
        except ray.exceptions.RayActorError as error:
            raise EngineUnavailableError(f"the process that Ray has started for an engine died: {error}") from None
        return address, pid

    def _keep(self, kept: dict[int, Any], number: int, what: Any) -> None:
        """Remember what is to be released. Raises EngineUnavailableError if that was asked for already."""
        with self._lock:
            kept[number] = what
            is_released = number in self._released
        if is_released:
            self._release(Release(number))
            raise EngineUnavailableError("it is not needed any more")

    def _release(self, order: Release) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        with self._lock:
            self._released.add(order.number)
            actor, group = self._actors.pop(order.number, None), self._groups.pop(order.number, None)
        if actor is not None:
            ray.kill(actor, no_restart=True)
        if group is not None:
            remove_placement_group(group)


def connect(address: str) -> None:
    """Connect to a cluster, or start one. Raises ConfigError or EngineUnavailableError if that is not possible."""
    options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    if address not in (LOCAL, "auto"):
        host, port = parse_address("ray", address)
        if host.startswith("127."):  # a cluster on this machine: Ray would take its own address to be another one
            options["_node_ip_address"] = host
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
        except OSError as error:
            raise EngineUnavailableError(
                f"no Ray cluster answers at {address}: {error.strerror or error}; start its head with ray start --head"
            ) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")  # what has no place is our own error
    import ray

    try:
        if address != LOCAL:
            _check_token(address)
        ray.init(address=address, configure_logging=False, **options)
    except ray.exceptions.AuthenticationError as error:
        raise EngineUnavailableError(
            f"the Ray cluster at {address} refuses this server: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to "
            "the cluster's token, or RAY_AUTH_TOKEN_PATH to its file"
        ) from error
    except ConnectionError as error:
        raise EngineUnavailableError(f"no Ray cluster answers at {address}: {_first_line(error)}") from error


def _check_token(address: str) -> None:
    """Raise AuthenticationError if the cluster has another token: ray.init would try it for 20 s.

    What this uses is no public interface. Where it is another one, ray.init finds out.
    """
    try:
        from ray._private.services import canonicalize_bootstrap_address_or_die
        from ray._raylet import GcsClient

        client = GcsClient(address=canonicalize_bootstrap_address_or_die(address))
        exists = client.internal_kv_exists
    except (ImportError, AttributeError):
        return
    exists(b"splitfuse", timeout=CONNECT_SECONDS)


def describe_nodes() -> str:
    """Return what each living node has."""
    import ray

    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeManagerAddress"]))
    free = _free_resources()
    told = []
    for node in nodes:
        text = f"node {node['NodeManagerAddress']} has {_amounts(node['Resources'])}"
        told.append(text + (f" ({_amounts(free[node['NodeID']])} free)" if node["NodeID"] in free else ""))
    return "; ".join(told) or "there is no node"


def _free_resources() -> dict[str, dict[str, float]]:
    """Return what is free on each node, by its id. It is no public interface: there may be nothing."""
    try:
        from ray._private.state import available_resources_per_node

        found: dict[str, dict[str, float]] = available_resources_per_node()
        return found
    except (ImportError, AttributeError):
        return {}


def _amounts(resources: dict[str, float]) -> str:
    """Return resources in words.

    >>> _amounts({"CPU": 2.0, "memory": 2.0**31})
    '2 CPU and 2.0 GiB of memory'
    """
    parts = [f"{resources.get('CPU', 0.0):g} CPU"]
    parts += [f"{resources['GPU']:g} GPU"] if resources.get("GPU") else []
    parts += [f"{resources['memory'] / GIB:.1f} GiB of memory"] if resources.get("memory") else []
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def main() -> None:
    """Obey orders until the server has left, and then end all that was started."""
    try:
        Driver(socket.socket(fileno=int(sys.argv[1])), sys.argv[2]).run()
    finally:
        if (ray := sys.modules.get("ray")) is not None:
            ray.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
