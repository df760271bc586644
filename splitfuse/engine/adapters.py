"""Keeps the LoRA adapters of an engine: new requests choose one by its name, running ones have it until they end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set

from splitfuse.config.values import parse_adapter
from splitfuse.engine.guard import Guard, guarded
from splitfuse.errors import AdapterError, ModelNotFoundError
from splitfuse.kernels.lora import PackedAdapter

logger = logging.getLogger(__name__)


class Adapters(Mapping[str, str]):
    """Maps the names of the adapters that new requests can have to their digests.

    digest = engine.adapters.load("sql", "path/to/adapter")
    engine.add_request("a", [1, 2, 3], SamplingParams(), adapter=engine.adapters["sql"])
    """

    def __init__(
        self,
        settings: Sequence[str],
        loaded: dict[str, PackedAdapter],
        *,
        read: Callable[[str], tuple[str, PackedAdapter]],
        in_use: Callable[[], Set[str]],
        guard: Guard,
    ) -> None:
        """`loaded` is what requests can have as long as they run, by digest, `read` loads an adapter, `in_use` returns
        the digests that unfinished requests have, `guard` is the engine's.
        """
        self._of_settings = dict(map(parse_adapter, settings))
        self._loaded, self._read, self._in_use, self._guard = loaded, read, in_use, guard
        self._digests: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        return self._digests[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)

    def load_all(self) -> None:
        """Load the adapters of the settings. Raises AdapterError, ModelNotFoundError."""
        for name, path in self._of_settings.items():
            self.load(name, path)

    def load(self, name: str, path: str) -> str:
        """Load an adapter from a folder or the Hub, under a name that another one gives up, and return its digest:
        requests choose it by that. What runs with the other goes on with it.

        Raises AdapterError, ModelNotFoundError.
        """
        digest, adapter = self._read(path)
        self.install(name, digest, adapter)
        return digest

    @guarded
    def install(self, name: str, digest: str, adapter: PackedAdapter) -> None:
        """Give requests an adapter that `LoadedModel.load_adapter` has returned."""
        self._loaded.setdefault(digest, adapter)
        self._digests[name] = digest
        self._drop_unused()

    @guarded
    def unload(self, name: str) -> None:
        """Take an adapter from new requests. It stays until the last request that has it has ended."""
        self._digests.pop(name, None)
        self._drop_unused()

    @guarded
    def release(self, digest: str) -> None:
        """Take an adapter from new requests, as `unload`, under all names that it has."""
        self._digests = {name: each for name, each in self._digests.items() if each != digest}
        self._drop_unused()

    def reset(self) -> None:
        """Have the adapters of the settings again, and no others. One that can be read no more is lacking then, which
        the next server is told.
        """
        for name in self._digests.keys() - self._of_settings.keys():
            self.unload(name)
        for name, path in self._of_settings.items():
            if name not in self._digests:
                try:
                    self.load(name, path)
                except (AdapterError, ModelNotFoundError) as error:
                    logger.warning("the LoRA adapter %s is not loaded again: %s", name, error)

    def drop_released(self) -> None:
        """Forget the adapters without a name which the last of their requests has left."""
        if len(self._loaded) > len(set(self._digests.values())):
            self._drop_unused()

    def _drop_unused(self) -> None:
        """Forget the adapters that have neither a name nor a request."""
        for digest in self._loaded.keys() - self._digests.values() - self._in_use():
            del self._loaded[digest]
