"""Reads API keys, compares them in constant time, and knows what their owners get.

An owner has a weight (of fair sharing), a priority and an SLO, and a salt, which keeps the cached prompts of one key
from being noticed by another.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from splitfuse.config.engine import TARGETS, SchedulerConfig
from splitfuse.config.files import check_private, read_text
from splitfuse.config.server import ServerConfig
from splitfuse.core.scheduling_options import MAX_WEIGHT, MIN_WEIGHT, Priority
from splitfuse.core.slo.targets import SLO_DISABLED, SloTargets
from splitfuse.deploy.registry import is_loopback
from splitfuse.errors import ConfigError, did_you_mean, unreadable
from splitfuse.server.errors import RefusedError

OPTIONS = ("name", "weight", "priority", *TARGETS, "admin")


@dataclass(frozen=True)
class Owner:
    """Describes the owner of a key. `name` is for the log; None where no key is required."""

    name: str | None = None
    weight: float = 1.0
    """Weight of its share of the machine."""
    priority: Priority = Priority.NORMAL
    """Highest priority of its requests, and that of requests without one."""
    targets: SloTargets | None = None
    """SLO of its requests; None: the server's."""
    cache_salt: str = ""
    is_admin: bool = False
    """Flag of a key that may change which adapters the server has, and see the requests of all keys."""


ANONYMOUS = Owner()
PROXY_HEADERS = (b"via", b"forwarded", b"x-forwarded", b"x-real-ip", b"x-client-ip", b"x-envoy-", b"cf-connecting-ip")
"""Beginnings of the names of headers that proxies add."""


class ApiKeys:
    """Holds the keys of a server. Without any, no request needs one."""

    def __init__(self, config: ServerConfig, *, name_key: bytes | None = None) -> None:
        """Read the keys. `name_key` is the key by which KV blocks are named: where it outlives the server, so do salts,
        which are in the names. Left out, salts are new.

        Raises ConfigError for a file that cannot be read or has no key, and for a malformed line.
        """
        self.secret = hashlib.blake2b(name_key or secrets.token_bytes(32), digest_size=32, person=b"api keys").digest()
        owners = {key.strip(): Owner(f"key {number}") for number, key in enumerate(config.api_key, 1)}
        if config.api_key_file is not None:
            _read(config.api_key_file, owners)
        self.owners = [(self._digest(key.encode()), owner) for key, owner in owners.items()]

    @classmethod
    def restored(cls, secret: bytes, owners: Sequence[tuple[bytes, Owner]]) -> Self:
        """Return the keys of another process, from their `secret` and `owners`: the digests and their owners."""
        keys = cls(ServerConfig())
        keys.secret, keys.owners = secret, [*owners]
        return keys

    def check(self, scheduler: SchedulerConfig) -> None:
        """Raise ConfigError if a key has an SLO that engines of that config would ignore."""
        owner = next((owner for _, owner in self.owners if owner.targets is not None), None)
        if owner is not None and not scheduler.slo_enabled:
            raise ConfigError(f"api_key_file gives {owner.name!r} an SLO, but {SLO_DISABLED}")

    @property
    def are_required(self) -> bool:
        """Return whether requests need a key."""
        return bool(self.owners)

    def identify(self, key: bytes) -> Owner:
        """Return the owner of a key. Raises RefusedError (401) if it has none."""
        presented = self._digest(key)
        matches = [hmac.compare_digest(presented, digest) for digest, _ in self.owners]
        if not any(matches):
            what = (
                "this API key is not valid"
                if key
                else "an API key is required: send Authorization: Bearer KEY or X-Api-Key: KEY"
            )
            raise RefusedError(401, what, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return replace(self.owners[matches.index(True)][1], cache_salt=presented.hex())

    def _digest(self, key: bytes) -> bytes:
        """Return a digest under a secret of the deployment, without which no key can be guessed from it."""
        return hashlib.blake2b(key, key=self.secret, digest_size=32).digest()


def check_admin(owner: Owner, what: str) -> None:
    """Raise RefusedError (403) unless a request has an administrator's key, with which only `what` is done."""
    if not owner.is_admin:
        message = (
            f"{what} with an administrator's key: start the server with --api-key-file, and write admin=yes after a "
            "key in it"
        )
        raise RefusedError(403, message, code="no_administrator")


def check_observer(owner: Owner, scope: Mapping[str, Any], what: str, *, may_follow_link: bool = False) -> None:
    """Raise RefusedError (403) unless a request may do for all keys what `what` says: it has an
    administrator's key or, where no key is required, comes from this machine. `scope` is its ASGI scope.

    One that names another host, that a page of another origin sends, or that a proxy says it has passed on, does not
    come from here: a page whose name was made to lead to this machine could read what it answers, or one that CORS
    allows, and any page could hold a stream open. With `may_follow_link`, a link on another page may lead here.
    """
    if owner is not ANONYMOUS:
        check_admin(owner, what)
        return
    client = scope.get("client")
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    origin = headers.get(b"origin")
    is_foreign = any(name.startswith(PROXY_HEADERS) for name in headers)
    is_foreign |= origin is not None and origin.decode("latin-1").partition("://")[2] != host
    is_link = may_follow_link and headers.get(b"sec-fetch-dest") == b"document"
    is_foreign |= headers.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none") and not is_link
    if client is None or is_foreign or not (is_loopback(client[0]) and is_loopback(_without_port(host))):
        message = (
            f"{what} at the request of clients on this machine only, at http://127.0.0.1:PORT, as this server requires "
            "no key: call it from there (through ssh -L from elsewhere), or start it with --api-key-file and a key "
            "with admin=yes"
        )
        raise RefusedError(403, message, code="no_administrator")


def _without_port(host: str) -> str:
    """Return the name or address in a Host header."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _read(path: str, owners: dict[str, Owner]) -> None:
    """Add the keys in a file, one a line with its options; keys without a name are numbered."""
    check_private("api_key_file", path)
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {unreadable(error)}") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        key, *options = line.split() or [""]
        if not key or key.startswith("#"):
            continue
        try:
            if key in owners:
                where = f"in line {seen[key]}" if key in seen else "among those of api_key"
                raise ConfigError(f"this key is already {where}: give each once")
            owners[key] = _owner(options, name=f"key {1 + len(owners)}")
        except ConfigError as error:
            raise ConfigError(f"api_key_file {path}, line {number}: {error}") from error
        seen[key] = number
    if not seen:
        raise ConfigError(f"api_key_file {path} has no key in it: write one in each line")


def _owner(options: list[str], *, name: str) -> Owner:
    """Return the owner that options such as `weight=2 priority=high ttft=1s` describe. Raises ConfigError."""
    given: dict[str, str] = {}
    for option in options:
        word, equals, value = option.partition("=")
        if word not in OPTIONS:
            raise ConfigError(
                f"unknown option {option!r} after a key{did_you_mean(word, OPTIONS)}; write for example name=alice"
            )
        if not equals or not value:
            raise ConfigError(f"{option!r} after a key has no value: write {word}=VALUE, without spaces")
        if word in given:
            raise ConfigError(f"{word} is given twice")
        given[word] = value
    targets = {name: given[name] for name in TARGETS if name in given}
    return Owner(
        name=given.get("name", name),
        weight=_weight(given.get("weight", "1")),
        priority=_priority(given.get("priority", "normal")),
        targets=SloTargets.parse(**targets) if targets else None,
        is_admin=_yes("admin", given.get("admin", "no")),
    )


def _yes(option: str, text: str) -> bool:
    if text not in ("yes", "no"):
        raise ConfigError(f"{option} must be yes or no, not {text!r}")
    return text == "yes"


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise ConfigError(f"weight must be a number from {MIN_WEIGHT} to {MAX_WEIGHT}, not {text!r}")
    return weight


def _priority(text: str) -> Priority:
    try:
        return Priority[text.upper()]
    except KeyError:
        raise ConfigError(f"priority must be high, normal or low, not {text!r}") from None
