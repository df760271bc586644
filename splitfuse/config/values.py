"""Reads values that settings write as text: names and addresses, times and sizes, numbers and roles of engines."""

from __future__ import annotations

import enum
import math
import re

from splitfuse.config.fields import MAX_SIZE
from splitfuse.errors import ConfigError

ADAPTER_NAME = re.compile(r"[\w.:/@+-]{1,128}")
"""Names that a LoRA adapter can have as a model."""
UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0}
SIZES = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
PER_TOKEN = "/token"
MIN_TARGET, MAX_TARGET = 1e-6, 86400.0
"""Bounds of an SLO target, in seconds. No step is as short as the least: a target below it means the same, and the
scheduler multiplies targets and divides by them, which must not leave the range of floating point.
"""
MAX_ENGINES = 4096


class EngineRole(enum.StrEnum):
    """Says which part of a request an engine is given. It is routing alone: any engine can do all of it."""

    MIXED = "mixed"
    """All of a request."""
    PROMPT = "prompt"
    """Its prompt, up to the first token."""
    GENERATION = "generation"
    """What is generated after that."""


def parse_adapter(text: str) -> tuple[str, str]:
    """Return the name and the path of a LoRA adapter given as `name=path`. Raises ConfigError."""
    name, _, path = text.partition("=")
    if not ADAPTER_NAME.fullmatch(name) or not path:
        raise ConfigError(f"lora must be name=path, such as sql=adapters/sql, not {text!r}")
    return name, path


def parse_address(name: str, text: str) -> tuple[str, int]:
    """Return the host and the port of an address. Raises ConfigError, naming the setting.

    >>> parse_address("engine", "10.0.0.2:9000"), parse_address("engine", "[::1]:9000")
    (('10.0.0.2', 9000), ('::1', 9000))
    """
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^:\s/\[\]]+):(\d{1,5})", text, re.ASCII)
    if match is None or int(match[2]) > 65535:
        raise ConfigError(f"{name} must be an address and a port, such as 10.0.0.2:9000, not {text!r:.200}")
    return match[1].strip("[]"), int(match[2])


def parse_url(name: str, text: str) -> str:
    """Return the URL of a server without a slash at its end. Raises ConfigError, naming the setting.

    >>> parse_url("server", "http://10.0.0.2:8000/")
    'http://10.0.0.2:8000'
    """
    url = text.rstrip("/")
    found = re.fullmatch(r"https?://(?:\[[0-9a-fA-F:.]+\]|[\w-]{1,63}(?:\.[\w-]{1,63})*)(?::(\d{1,5}))?", url, re.ASCII)
    if found is None or not 1 <= int(found[1] or 1) <= 65535:
        raise ConfigError(f"{name} must be the URL of a server, such as http://10.0.0.2:8000, not {text!r:.200}")
    return url


def check_origin(name: str, text: str) -> None:
    """Raise ConfigError, naming the setting, for an origin that no browser sends: they write it in small letters,
    without a path, and without the port that the scheme has anyway.

    >>> check_origin("allow_origin", "https://page.example:8443")
    """
    found = re.fullmatch(
        r"\*|null|([a-z][a-z0-9+.-]*)://[a-z0-9._-]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?", text
    )
    if found is None or (found[1], found[2]) in (("http", ":80"), ("https", ":443")):
        raise ConfigError(
            f"{name} must be an origin as browsers write it, such as https://page.example or http://localhost:3000, or "
            f"* for any, not {text!r:.200}"
        )


def is_loopback(host: str) -> bool:
    """Return whether a host means the machine itself, on each machine another one."""
    return host in ("localhost", "::1") or host.startswith("127.")


def parse_seconds(name: str, text: str) -> float:
    """Return a duration such as `1s` or `250ms` in seconds. Raises ConfigError, naming the setting, without a unit."""
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text.strip()[len(number) :].strip()
    try:
        seconds = float(number) * UNITS[unit]
    except (ValueError, KeyError) as error:
        forms = f"1s, 250ms or 2ms{PER_TOKEN}" if name == "ttft" else "1s or 250ms"
        raise ConfigError(f"{name} must be a time with its unit, such as {forms}, not {text!r}") from error
    if not MIN_TARGET <= seconds <= MAX_TARGET:
        raise ConfigError(
            f"{name} must be a time from {1e3 * MIN_TARGET:g}ms to {MAX_TARGET:.0f}s, such as 250ms, not {text!r}"
        )
    return seconds


def parse_bytes(name: str, text: str) -> int:
    """Return a size such as `4GiB` in bytes. Raises ConfigError, naming the setting.

    >>> parse_bytes("kv_memory_tier", "1.5MiB")
    1572864
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MiB|GiB|TiB)", text.strip())
    size = float(match[1]) * SIZES[match[2]] if match else 0.0
    if not 1 <= size <= MAX_SIZE * SIZES["GiB"]:
        raise ConfigError(f"{name} must be a size in MiB, GiB or TiB, such as 4GiB, not {text!r:.80}")
    return int(size)


def parse_disk_tier(text: str) -> tuple[str, int]:
    """Return the folder and the bytes of a disk tier given as `PATH:50GiB`. Raises ConfigError."""
    path, colon, size = text.rpartition(":")
    if not colon or not path:
        raise ConfigError(
            "kv_disk_tier must be a folder and a size in MiB, GiB or TiB, such as /var/cache/kv:50GiB, not "
            f"{text!r:.200}"
        )
    return path, parse_bytes("the size of kv_disk_tier", size)


def parse_autoscale(text: str) -> tuple[int, int]:
    """Return the least and the largest number of replicas, given as `1:4`. Raises ConfigError.

    >>> parse_autoscale("1:4")
    (1, 4)
    """
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= MAX_ENGINES:
        raise ConfigError(
            f"autoscale must be the least and the largest number of replicas, such as 1:4, not {text!r:.80}"
        )
    return int(match[1]), int(match[2])


def parse_roles(text: str, num_engines: int) -> tuple[EngineRole, ...]:
    """Return the role of each engine, given as `prompt:1,generation:1`. Raises ConfigError for roles that are unknown,
    or too many or too few, and where a part of each request has no engine.

    >>> [str(role) for role in parse_roles("prompt:1,generation:2", 3)]
    ['prompt', 'generation', 'generation']
    """
    roles: list[EngineRole] = []
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        if name not in list(EngineRole) or not number.isdecimal() or not 1 <= int(number) <= MAX_ENGINES:
            names = ", ".join(EngineRole)
            raise ConfigError(f"roles must be such as prompt:1,generation:1, of {names}, not {part.strip()!r:.80}")
        roles += [EngineRole(name)] * int(number)
    if len(roles) != num_engines:
        raise ConfigError(f"roles {text!r:.80} are of {len(roles)} engines, and there are {num_engines}: give each one")
    if EngineRole.MIXED not in roles and len(set(roles)) == 1:
        missing = EngineRole.GENERATION if roles[0] is EngineRole.PROMPT else EngineRole.PROMPT
        raise ConfigError(f"roles {text!r:.80} leave out {missing} engines: add one, or mixed ones")
    return tuple(roles)


def parse_itl(text: str) -> tuple[float, float | None]:
    """Return the seconds of an ITL target and its percentile, which is None for the moving average. Raises ConfigError.

    >>> parse_itl("250ms"), parse_itl("250ms/p99")
    ((0.25, None), (0.25, 99.0))
    """
    time, slash, percentile = text.partition("/")
    seconds = parse_seconds("itl", time)
    if not slash:
        return seconds, None
    number = percentile.strip().removeprefix("p")
    try:
        percent = float(number) if number != percentile.strip() else math.nan
    except ValueError:
        percent = math.nan
    if not 0 < percent < 100:
        raise ConfigError(
            f"itl {text!r} must end with a percentile above p0 and below p100, such as {time.strip()}/p99, or with "
            f"nothing, as {time.strip()}"
        )
    return seconds, percent
