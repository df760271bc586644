"""Defines the settings of what serves on a port: servers, gateways, and engines and ranks for servers elsewhere.

    config = ServerConfig.from_settings({"port": 0, "replicas": 2})

Nothing here changes what is generated.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitfuse.config.fields import check_at_least, check_size, check_timeout, parse_settings, refuse_unknown, setting
from splitfuse.config.values import (
    MAX_ENGINES,
    EngineRole,
    check_origin,
    is_loopback,
    parse_address,
    parse_autoscale,
    parse_bytes,
    parse_roles,
    parse_url,
)
from splitfuse.errors import ConfigError

MAX_FRONTS = 64
"""Largest number of processes that speak HTTP for a server."""
MOST_ON_RAY = 256
"""Number of replicas up to which a server on Ray can be scaled, unless max_replicas says another."""
MIN_RECORD_MIB = 4.0
"""Least size of a recording in MiB: its four files have some seconds of a busy server each."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Says how a server meets its clients."""

    host: str = setting("127.0.0.1", "Address to listen on; the default accepts connections from this machine only.")
    port: int = setting(8000, "Port to listen on; 0 picks a free one.")
    name: str = setting("splitfuse", "Name of the deployment, for client(), ps and stop.")
    fronts: int = setting(
        1, "Number of processes that speak HTTP on this port, for when one core of HTTP is not enough (Linux)."
    )
    replicas: int | None = setting(
        None, "Number of engine processes, which divide the cores of this machine (default: 1, with engine 0)."
    )
    max_replicas: int | None = setting(
        None,
        "Largest number of replicas that splitfuse scale can start: cores and memory of this machine are divided among "
        "so many (default: replicas; 256 with ray).",
    )
    autoscale: str | None = setting(
        None,
        "Least and largest number of replicas, such as 1:4: every 10 s there are as many as the arrivals of the last "
        "five minutes, and those expected while one starts, need to meet their SLOs; needs an SLO (default: the number "
        "changes by splitfuse scale alone).",
    )
    engine: tuple[str, ...] = setting(
        (), "Engine to use that runs elsewhere (splitfuse engine), as host:port; may be repeated."
    )
    key_file: str | None = setting(
        None, "File with the secret that engines elsewhere have too, readable by its owner only; needed with engine."
    )
    roles: str | None = setting(
        None,
        "Roles of the engines in their order, such as prompt:1,generation:1,mixed:2: prompt engines hand requests over "
        "after the first token (default: all are mixed).",
    )
    ray: str | None = setting(
        None,
        "Ray cluster that places the replicas: host:port of its head, auto for the one that this machine is in, or "
        "local to start one here; needs splitfuse[ray] and num_threads, for which Ray is asked as CPUs.",
    )
    ray_memory: str | None = setting(
        None, "Memory that Ray keeps for each replica, such as 16GiB (default: none is asked for)."
    )
    ray_timeout: float = setting(
        2.0, "Seconds until Ray must have a place for a replica; longer where it starts machines for that."
    )
    engine_tls: bool = setting(False, "Speak TLS with engines elsewhere, which need a certificate for that.")
    engine_listen: str | None = setting(
        None,
        "Address of this machine at which engines elsewhere fetch KV blocks from its engines, such as 10.0.0.1:9100; "
        "each of them takes one more port (default: they do not).",
    )
    api_key: tuple[str, ...] = setting((), "API key that requests must send; may be repeated.")
    api_key_file: str | None = setting(
        None,
        "File with an API key per line, optionally followed by settings such as name=alice weight=2 priority=low "
        "ttft=1s itl=100ms tpot=50ms.",
    )
    allow_origin: tuple[str, ...] = setting((), "Web origin allowed by CORS; * allows any. May be repeated.")
    tls_certificate: str | None = setting(None, "PEM certificate file; with tls_key, enables HTTPS.")
    tls_key: str | None = setting(None, "PEM key file.")
    served_model_name: str | None = setting(None, "Name of the model in the API.")
    max_queued_requests: int = setting(
        1024, "Maximum number of running and waiting requests; further requests get HTTP 429."
    )
    max_queued_tokens: int = setting(
        4_194_304,
        "Maximum sum of prompt tokens and max_tokens over open requests, and of their log-probabilities; further "
        "requests get HTTP 429.",
    )
    max_body_mib: float = setting(16.0, "Maximum size of a request body in MiB.")
    max_prompts: int = setting(256, "Maximum number of prompts in a request.")
    max_stored_responses: int = setting(
        1024, "Maximum number of answers kept for store: true and previous_response_id; 0 keeps none."
    )
    max_stored_mib: float = setting(64.0, "Maximum size of these answers and what they were asked, together, in MiB.")
    step_timeout: float = setting(60.0, "Seconds after which an engine stuck in a step is restarted.")
    drain_timeout: float = setting(60.0, "Seconds that running requests may take to finish after SIGTERM.")
    client_timeout: float = setting(
        60.0,
        "Seconds that a client may take to send a head or a body (plus a second for each 16 KiB), or to read; then it "
        "is disconnected.",
    )
    keep_alive_timeout: float = setting(
        120.0, "Seconds after which an idle connection is closed; load balancers close theirs after 60 to 90."
    )
    log_prompts: bool = setting(False, "Include prompts and answers in the log.")
    otel: bool = setting(
        False,
        "Send a span of each request to an OpenTelemetry collector, which OTEL_EXPORTER_OTLP_ENDPOINT names; needs "
        "splitfuse[otel].",
    )
    record: str | None = setting(
        None, "File to record requests and steps to, for splitfuse replay; token ids of prompts and answers are in it."
    )
    record_max_mib: float = setting(
        1024.0, "Maximum size of a recording in MiB: FILE and those before it, FILE.1 to FILE.3."
    )
    console: bool = setting(False, "Serve a live view of the engines at /console.")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}")
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name.startswith("."):
            raise ConfigError(f"name must be made of letters, digits, '-', '_' and '.', not {self.name!r}")
        self._check_fronts()
        for name in ("max_queued_requests", "max_queued_tokens", "max_prompts"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("max_stored_responses", self.max_stored_responses, 0)
        check_size("max_body_mib", self.max_body_mib)
        check_size("max_stored_mib", self.max_stored_mib)
        self._check_engines()
        self._check_recording()
        for name in ("step_timeout", "drain_timeout", "client_timeout", "keep_alive_timeout"):
            check_timeout(name, getattr(self, name))
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("tls_certificate and tls_key go together: give both or none")
        if any(not key.strip() for key in self.api_key):
            raise ConfigError("api_key must not be empty")
        if not all(key.isprintable() for key in self.api_key):
            raise ConfigError("api_key must have no line end, nor any other control character, in it")
        for origin in self.allow_origin:
            check_origin("allow_origin", origin)

    def _check_fronts(self) -> None:
        if not 1 <= self.fronts <= MAX_FRONTS:
            raise ConfigError(f"fronts must be from 1 to {MAX_FRONTS}, not {self.fronts}")
        if self.fronts > 1 and sys.platform != "linux":
            raise ConfigError(
                f"fronts must be 1 on {sys.platform}, not {self.fronts}: only Linux divides connections among the "
                "sockets of one port"
            )
        if self.fronts > 1 and self.otel:
            raise ConfigError(
                "fronts and otel are mutually exclusive: a span needs the headers of its request, which stay in a "
                "front: leave one of them out"
            )

    def _check_engines(self) -> None:
        check_at_least("replicas", self.replicas, 0 if self.engine else 1)
        if self.max_replicas is not None and not max(self.num_replicas, 1) <= self.max_replicas <= MAX_ENGINES:
            raise ConfigError(
                f"max_replicas must be at least replicas, which is {self.num_replicas}, and at most {MAX_ENGINES}, not "
                f"{self.max_replicas}"
            )
        if self.autoscale is not None:
            self._check_autoscale(*parse_autoscale(self.autoscale))
        if self.max_replicas is not None and not self.num_replicas:
            raise ConfigError("max_replicas needs replicas of at least 1 beside the engines elsewhere")
        if self.max_replicas is not None and self.roles is not None:
            raise ConfigError("max_replicas and roles are mutually exclusive: leave one of them out")
        for name, text in (("engine", each) for each in self.engine):
            if parse_address(name, text)[1] == 0:
                raise ConfigError(f"engine {text} must have the port that the engine listens on, such as 9000")
        if twice := next((each for each in self.engine if self.engine.count(each) > 1), None):
            raise ConfigError(f"engine {twice} is given twice: give each once")
        if self.ray is not None:
            self._check_ray(self.ray)
        elif self.ray_memory is not None:
            raise ConfigError("ray_memory is for replicas on Ray: set ray, or leave it out")
        elif self.ray_timeout != ServerConfig.ray_timeout:
            raise ConfigError("ray_timeout is for replicas on Ray: set ray, or leave it out")
        if self.roles is not None:
            parse_roles(self.roles, self.num_engines)
        if self.engine and self.key_file is None:
            raise ConfigError("engine needs key_file: the secret that its engine was started with")
        if not self.engine and (self.key_file is not None or self.engine_tls):
            name = "engine_tls" if self.key_file is None else "key_file"
            raise ConfigError(f"{name} is for engines elsewhere: name one with engine, or leave it out")
        if self.engine_listen is not None:
            self._check_engine_listen(self.engine_listen)

    def _check_recording(self) -> None:
        check_size("record_max_mib", self.record_max_mib)
        if self.record_max_mib < MIN_RECORD_MIB:
            raise ConfigError(f"record_max_mib must be at least {MIN_RECORD_MIB:g}, not {self.record_max_mib}")
        if self.record is not None and not self.record.strip():
            raise ConfigError(f"record {self.record!r} must be the path of a file, such as server.rec")
        if self.record is None and self.record_max_mib != ServerConfig.record_max_mib:
            raise ConfigError("record_max_mib is for a recording: set record, or leave it out")

    def _check_engine_listen(self, text: str) -> None:
        host, port = parse_address("engine_listen", text)
        if not (self.engine and self.num_replicas):
            raise ConfigError(
                "engine_listen is for engines of this machine beside others elsewhere: set engine and replicas, or "
                "leave it out"
            )
        most = self.most_replicas
        if not 0 < port <= 65536 - most:
            raise ConfigError(f"engine_listen {text} must have a port with {most - 1} more behind it, such as 9100")
        if host in ("0.0.0.0", "::"):
            raise ConfigError(f"engine_listen {text} must be an address at which engines elsewhere reach this machine")
        if is_loopback(host) and not all(is_loopback(parse_address("engine", each)[0]) for each in self.engine):
            raise ConfigError(
                f"engine_listen {text} cannot be reached from other machines: give this one's address there"
            )
        if self.engine_tls and self.tls_certificate is None:
            raise ConfigError("engine_listen with engine_tls needs tls_certificate and tls_key, which it uses too")

    def _check_autoscale(self, least: int, most: int) -> None:
        for name in ("max_replicas", "roles"):
            if getattr(self, name) is not None:
                raise ConfigError(f"autoscale and {name} are mutually exclusive: leave one of them out")
        if not least <= self.num_replicas <= most:
            raise ConfigError(
                f"replicas {self.replicas} must be from {least} to {most}, as autoscale says, or be left out"
            )

    def _check_ray(self, address: str) -> None:
        if address not in ("local", "auto"):
            if address.startswith("ray://"):
                raise ConfigError(f"ray {address} is of Ray's client, which places nothing: give host:port of the head")
            parse_address("ray", address)
        if self.ray_memory is not None:
            parse_bytes("ray_memory", self.ray_memory)
        check_timeout("ray_timeout", self.ray_timeout)
        if self.replicas == 0:
            raise ConfigError("ray needs replicas of at least 1: leave one of them out")
        if self.engine_listen is not None:
            raise ConfigError("engine_listen is for engines of this machine, and with ray there are none: leave it out")

    @property
    def num_replicas(self) -> int:
        """Return the number of engines that belong to the server: on this machine, or on Ray."""
        if self.replicas is None and self.autoscale is not None:
            return parse_autoscale(self.autoscale)[0]
        return self.replicas if self.replicas is not None else int(not self.engine or self.ray is not None)

    @property
    def engine_roles(self) -> tuple[EngineRole, ...]:
        """Return the role of each engine: first those on this machine, then the others."""
        return (
            (EngineRole.MIXED,) * self.num_engines if self.roles is None else parse_roles(self.roles, self.num_engines)
        )

    @property
    def num_engines(self) -> int:
        """Return the number of all its engines, at the start."""
        return self.num_replicas + len(self.engine)

    @property
    def max_engines(self) -> int:
        """Return the most engines that it can come to have."""
        return self.most_replicas + len(self.engine)

    @property
    def most_replicas(self) -> int:
        """Return the most replicas that it can come to have."""
        if self.max_replicas is not None:
            return self.max_replicas
        if self.autoscale is not None:
            return parse_autoscale(self.autoscale)[1]
        can_grow = self.ray is not None and self.roles is None
        return max(self.num_replicas, MOST_ON_RAY if can_grow else 0)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ServerConfig:
        """Return the configuration from flat settings. Raises ConfigError for an unknown name or a wrong type."""
        refuse_unknown(settings, [each.name for each in dataclasses.fields(cls)])
        return parse_settings(cls, settings)


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Says which servers a gateway passes requests on to, and how it meets its clients (splitfuse gateway)."""

    server: tuple[str, ...] = setting(
        (), "URL of a server to pass requests on to, a cell, such as http://10.0.0.2:8000; repeated for each."
    )
    server_key_file: str | None = setting(
        None,
        "File with an API key of the servers, with which their /metrics are read, readable by its owner only; needed "
        "where they have keys.",
    )
    server_certificate: str | None = setting(
        None, "PEM file with the certificates that servers at https may have (default: the system's authorities)."
    )
    host: str = setting("127.0.0.1", "Address to listen on; the default accepts connections from this machine only.")
    port: int = setting(8080, "Port to listen on; 0 picks a free one.")
    name: str = setting("gateway", "Name of the deployment, for ps and stop.")
    tls_certificate: str | None = setting(None, "PEM certificate file; with tls_key, enables HTTPS.")
    tls_key: str | None = setting(None, "PEM key file.")
    max_open_requests: int = setting(4096, "Maximum number of open requests; further requests get HTTP 429.")
    max_body_mib: float = setting(16.0, "Maximum size of a request body in MiB.")
    drain_timeout: float = setting(60.0, "Seconds that open requests may take to finish after SIGTERM.")
    client_timeout: float = setting(
        60.0,
        "Seconds that a client may take to send a head or a body (plus a second for each 16 KiB), or to read; then it "
        "is disconnected.",
    )
    keep_alive_timeout: float = setting(120.0, "Seconds after which an idle connection is closed.")

    def __post_init__(self) -> None:
        if not self.server:
            raise ConfigError("server is missing: give the URL of each server, such as --server http://10.0.0.2:8000")
        urls = [parse_url("server", each) for each in self.server]
        if twice := next((each for each in urls if urls.count(each) > 1), None):
            raise ConfigError(f"server {twice} is given twice: give each once")
        if self.server_certificate is not None and not any(each.startswith("https:") for each in urls):
            raise ConfigError("server_certificate is for servers at https: leave it out")
        check_at_least("max_open_requests", self.max_open_requests, 1)
        assert self.front is not None  # which checks the rest

    @property
    def front(self) -> ServerConfig:
        """Return the settings of its HTTP server."""
        return ServerConfig(
            host=self.host,
            port=self.port,
            name=self.name,
            tls_certificate=self.tls_certificate,
            tls_key=self.tls_key,
            max_queued_requests=self.max_open_requests,
            max_body_mib=self.max_body_mib,
            drain_timeout=self.drain_timeout,
            client_timeout=self.client_timeout,
            keep_alive_timeout=self.keep_alive_timeout,
        )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> GatewayConfig:
        """Return the configuration from flat settings. Raises ConfigError for an unknown name or a wrong type."""
        refuse_unknown(settings, [each.name for each in dataclasses.fields(cls)])
        return parse_settings(cls, settings)


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Says how a rank is reached that computes a model with a server on another machine (splitfuse rank)."""

    model: str | None = setting(None, "Model folder, GGUF file or Hub name here (default: the server's).")
    listen: str | None = setting(None, "Address and port to listen on, such as 10.0.0.2:9100; 0.0.0.0 for any address.")
    key_file: str | None = setting(
        None, "File with the secret that the server has as rank_key_file, readable by its owner only."
    )

    def __post_init__(self) -> None:
        if self.listen is None:
            raise ConfigError("listen is missing: give the address to listen on, such as --listen 10.0.0.2:9100")
        parse_address("listen", self.listen)
        if self.key_file is None:
            raise ConfigError(
                "key_file is missing: give a file with a secret, which (umask 077; openssl rand -hex 32 > FILE) makes"
            )


@dataclass(frozen=True, kw_only=True)
class ListenConfig:
    """Says how an engine is reached that serves servers on other machines (splitfuse engine)."""

    listen: str | None = setting(None, "Address and port to listen on, such as 10.0.0.2:9000; 0.0.0.0 for any address.")
    key_file: str | None = setting(
        None, "File with the secret that servers and other engines have too, readable by its owner only."
    )
    tls_certificate: str | None = setting(None, "PEM certificate file; with tls_key, all connections are TLS.")
    tls_key: str | None = setting(None, "PEM key file.")
    step_timeout: float = setting(60.0, "Seconds after which an engine that is stuck in a step ends itself.")

    def __post_init__(self) -> None:
        if self.listen is None:
            raise ConfigError("listen is missing: give the address to listen on, such as --listen 10.0.0.2:9000")
        parse_address("listen", self.listen)
        if self.key_file is None:
            raise ConfigError(
                "key_file is missing: give a file with a secret, which (umask 077; openssl rand -hex 32 > FILE) makes"
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("tls_certificate and tls_key go together: give both or none")
        check_timeout("step_timeout", self.step_timeout)
