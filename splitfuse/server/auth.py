"""Who may ask, and on which terms: API keys, from settings and a file, compared in constant time.

It decides whose request a key makes it, what its owner is promised and which share of the machine is his, and what
keeps the cached prompts of one key from being felt by another. It must not know of routes.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from splitfuse.config import SchedulerConfig, ServerConfig
from splitfuse.core.request import Priority
from splitfuse.core.slo.targets import SloTargets
from splitfuse.errors import ConfigError, did_you_mean
from splitfuse.server.errors import RefusedError

OPTIONS = ("name", "weight", "priority", "ttft", "itl")
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1000
"""Beyond, one request would count for more than all that others will ever ask."""


@dataclass(frozen=True)
class Owner:
    """Of a key. `name` is for the log and metrics; None where no keys are wanted."""

    name: str | None = None
    weight: float = 1.0
    """Of its share of the machine."""
    priority: Priority = Priority.NORMAL
    """The highest class that its requests can have, and theirs if they ask for none."""
    targets: SloTargets | None = None
    """None: what everybody is promised."""
    cache_salt: str = ""


ANONYMOUS = Owner()


class ApiKeys:
    """The keys of a server. Without any, everybody may ask."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError for a file that cannot be read, has no key in it, or a line that is no key."""
        self._secret = secrets.token_bytes(32)
        owners = {key.strip(): Owner(f"key {number}") for number, key in enumerate(config.api_key, 1)}
        if config.api_key_file is not None:
            _read(config.api_key_file, owners)
        self._owners = [(self._digest(key.encode()), owner) for key, owner in owners.items()]

    def check(self, scheduler: SchedulerConfig) -> None:
        """Raise ConfigError if a key is promised what engines of that config would not keep."""
        promised = next((owner for _, owner in self._owners if owner.targets is not None), None)
        if promised is not None and not scheduler.slo_enabled:
            raise ConfigError(
                f"api_key_file promises something to {promised.name!r}, and this server keeps no promises: start it "
                "with --keep-promises, --ttft or --itl"
            )

    def identify(self, authorization: bytes | None) -> Owner:
        """Whose key an Authorization header brings. Raises RefusedError (401)."""
        if not self._owners:
            return ANONYMOUS
        scheme, _, key = (authorization or b"").partition(b" ")
        presented = self._digest(key.strip() if scheme.lower() == b"bearer" else b"")
        matches = [hmac.compare_digest(presented, digest) for digest, _ in self._owners]
        if not any(matches):
            what = "this API key is not valid" if key else "an API key is needed: send Authorization: Bearer KEY"
            raise RefusedError(
                401, what, code="invalid_api_key", type="authentication_error", headers={"www-authenticate": "Bearer"}
            )
        return replace(self._owners[matches.index(True)][1], cache_salt=presented.hex())

    def _digest(self, key: bytes) -> bytes:
        """Under a secret of this process: of no use to whoever should come to see it."""
        return hashlib.blake2b(key, key=self._secret, digest_size=32).digest()


def _read(path: str, owners: dict[str, Owner]) -> None:
    """Add the keys in a file, a line each, with what comes behind them; those without a name are numbered."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {error}") from error
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
    """From `weight=2 priority=high ttft=1s`. Raises ConfigError."""
    given: dict[str, str] = {}
    for option in options:
        word, equals, value = option.partition("=")
        if word not in OPTIONS:
            raise ConfigError(f"{option!r} after a key is no option{did_you_mean(word, OPTIONS)}; write NAME=VALUE")
        if not equals or not value:
            raise ConfigError(f"{option!r} after a key has no value: write {word}=VALUE, without spaces")
        if word in given:
            raise ConfigError(f"{word} is given twice")
        given[word] = value
    has_targets = "ttft" in given or "itl" in given
    return Owner(
        name=given.get("name", name),
        weight=_weight(given.get("weight", "1")),
        priority=_priority(given.get("priority", "normal")),
        targets=SloTargets.parse(given.get("ttft"), given.get("itl")) if has_targets else None,
    )


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
        raise ConfigError(f"weight must be a number from {LEAST_WEIGHT} to {MOST_WEIGHT}, not {text!r}")
    return weight


def _priority(text: str) -> Priority:
    try:
        return Priority[text.upper()]
    except KeyError:
        raise ConfigError(f"priority must be high, normal or low, not {text!r}") from None
