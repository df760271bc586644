"""Follows the LoRA adapters of one engine from the front: which it has, which it loads, which it is to have again after
a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Self

from splitfuse.engine.messages import AdapterLoaded, Command, LoadAdapter, UnloadAdapter
from splitfuse.errors import AdapterError, EngineUnavailableError

NAMELESS = " "
"""Beginning of what stands for the name of an adapter that has lost its own; no name begins with it."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Loaded:
    path: str
    digest: str


@dataclass(frozen=True)
class _Load:
    path: str
    end: asyncio.Future[None]
    former_digest: str  # of an adapter that is loaded again after a restart; else empty


class ClientAdapters:
    """Holds what a front knows of an engine's adapters. An adapter stays in the engine while it has a name, for new
    requests, or a request holds it.

    >>> adapters = ClientAdapters(engine.send)
    >>> await adapters.load("sql", "path/to/adapter")
    >>> adapters.names["sql"]  # digest, which requests carry
    """

    def __init__(self, send: Callable[[Command], None]) -> None:
        """`send` sends the engine a command if it is ready."""
        self._send = send
        self._names: dict[str, str] = {}
        self._of_start: dict[str, str] = {}  # those of the engine's settings
        self._changed: dict[str, _Loaded | None] = {}  # those loaded since the start; None: unloaded
        self._loading: dict[str, _Load] = {}  # by name
        self._present: set[str] = set()  # digests of the adapters that the engine has
        self._paths: dict[str, str] = {}  # of those loaded since the start, by digest
        self._holds: Counter[str] = Counter()  # digests -> requests that hold them

    @property
    def names(self) -> Mapping[str, str]:
        """Return the digests of the adapters that new requests can have, by name."""
        return self._names

    @property
    def loading(self) -> Collection[str]:
        """Return the names of the adapters that are being loaded."""
        return self._loading.keys()

    def has(self, digest: str) -> bool:
        """Return whether the engine has the adapter of a digest."""
        return digest in self._present

    def load(self, name: str, path: str, *, former_digest: str = "") -> asyncio.Future[None]:
        """Let the engine load an adapter. The future is done once it has, or raises AdapterError or
        EngineUnavailableError.
        """
        load = _Load(path, asyncio.get_running_loop().create_future(), former_digest)
        self._loading[name] = load
        self._send(LoadAdapter(name, path))
        return load.end

    def unload(self, name: str) -> None:
        """Take an adapter from new requests."""
        self._names.pop(name, None)
        self._changed[name] = None
        self._unload_unused()

    def hold(self, digest: str) -> None:
        """Keep an adapter for a request that will be opened, even if it loses its name; until `let_go`."""
        self._holds[digest] += 1

    def let_go(self, digest: str) -> None:
        """End what one `hold` began."""
        self._holds[digest] -= 1
        if not self._holds[digest]:
            del self._holds[digest]
            self._unload_unused()

    def take(self, report: AdapterLoaded) -> None:
        """Process what the engine says of an adapter that it was told to load."""
        load = self._loading.pop(report.name, None)
        if load is None:  # the engine has died since
            return
        if report.error:
            load.end.set_exception(AdapterError(report.error))
        else:
            if not report.name.startswith(NAMELESS):
                _warn_if_changed(report.name, load.path, load.former_digest, report.digest)
                self._names[report.name] = report.digest
                self._changed[report.name] = _Loaded(load.path, report.digest)
            self._present.add(report.digest)
            self._paths[report.digest] = load.path
            load.end.set_result(None)
        self._unload_unused()

    def adopt(self, other: Self) -> None:
        """Load what was loaded at another engine since it started, as soon as this one is ready."""
        self._changed, self._paths, self._holds = dict(other._changed), dict(other._paths), other._holds.copy()

    def restore(self, of_start: Mapping[str, str]) -> None:
        """Have an engine that is ready with the adapters of its settings, by name, load those that were loaded since an
        earlier start, and those that requests hold.
        """
        for name in sorted(of_start.keys() - self._changed.keys()):
            _warn_if_changed(name, "its folder", self._of_start.get(name, ""), of_start[name])
        self._of_start = dict(of_start)
        self._names = dict(of_start)
        self._present = set(of_start.values())
        for name, loaded in self._changed.items():
            self._names.pop(name, None)
            if loaded is not None:
                self._load_again(name, loaded.path, name, loaded.digest)
        self._paths = {digest: path for digest, path in self._paths.items() if digest in self._holds}
        paths = [load.path for load in self._loading.values()]
        for digest, path in self._paths.items():
            if digest not in self._present and path not in paths:  # it is held, and has lost its name
                self._load_again(NAMELESS + digest, path, f"at {path}", "")
        self._unload_unused()

    def forget(self, why: str) -> None:
        """Note that the engine has ended, with its adapters; those that it was loading fail, which `why` explains."""
        loading, self._loading, self._names, self._present = self._loading, {}, {}, set()
        for load in loading.values():
            load.end.set_exception(EngineUnavailableError(f"the engine died while it loaded the adapter: {why}"))

    def _load_again(self, name: str, path: str, what: str, former_digest: str) -> None:
        def log_failure(end: asyncio.Future[None]) -> None:
            if not end.cancelled() and (error := end.exception()) is not None:
                _logger.error("the adapter %s could not be loaded again: %s", what, error)

        self.load(name, path, former_digest=former_digest).add_done_callback(log_failure)

    def _unload_unused(self) -> None:
        """Unload the adapters that have neither a name nor a request; not while one is loaded, which may be the same as
        one of them.
        """
        if not self._loading:
            for digest in self._present - set(self._names.values()) - self._holds.keys():
                self._present.remove(digest)
                self._paths.pop(digest, None)
                self._send(UnloadAdapter(digest))


def _warn_if_changed(name: str, path: str, before: str, now: str) -> None:
    """Warn if an engine that was restarted has another adapter than before, which other engines may still have."""
    if before not in ("", now):
        _logger.warning(
            "the adapter %r has changed in %s since it was loaded: an engine that was restarted has the new one, "
            "others may have the old one; load it again",
            *(name, path),
        )
