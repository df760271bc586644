"""What a front knows of the LoRA adapters of an engine."""

import asyncio

import pytest

from splitfuse.engine.client_adapters import NAMELESS, ClientAdapters
from splitfuse.engine.messages import AdapterLoaded, Command, LoadAdapter, UnloadAdapter
from splitfuse.errors import AdapterError, EngineUnavailableError


def test_an_adapter_stays_while_it_has_a_name_or_a_holder() -> None:
    async def test() -> None:
        sent: list[Command] = []
        adapters = ClientAdapters(sent.append)
        end = adapters.load("a", "folder")
        assert [*adapters.loading] == ["a"] and not adapters.has("one")
        adapters.take(AdapterLoaded("a", "one", ""))
        await end
        assert adapters.names == {"a": "one"} and adapters.has("one") and not adapters.loading
        adapters.hold("one")
        adapters.unload("a")
        assert sent == [LoadAdapter("a", "folder")] and adapters.has("one") and not adapters.names
        adapters.let_go("one")
        assert sent[1:] == [UnloadAdapter("one")] and not adapters.has("one")

    asyncio.run(test())


def test_an_engine_that_is_restarted_loads_adapters_again() -> None:
    async def test() -> None:
        sent: list[Command] = []
        adapters = ClientAdapters(sent.append)
        adapters.restore({"fixed": "zero", "gone": "nought"})
        for name, digest in (("a", "one"), ("held", "two")):
            adapters.load(name, f"folder of {name}")
            adapters.take(AdapterLoaded(name, digest, ""))
        adapters.hold("two")
        adapters.unload("held")
        adapters.unload("gone")
        del sent[:]
        adapters.forget("it was killed")
        assert not adapters.names and not adapters.has("zero")
        adapters.restore({"fixed": "zero", "gone": "nought"})
        assert adapters.names == {"fixed": "zero"}
        again = [LoadAdapter("a", "folder of a"), LoadAdapter(NAMELESS + "two", "folder of held")]
        assert sent == again  # "gone" is unloaded once these are there
        adapters.take(AdapterLoaded("a", "one", ""))
        adapters.take(AdapterLoaded(NAMELESS + "two", "two", ""))
        assert adapters.names == {"fixed": "zero", "a": "one"} and adapters.has("two")
        assert sent == [*again, UnloadAdapter("nought")]

    asyncio.run(test())


def test_loads_fail_with_the_engines_error_and_with_its_death() -> None:
    async def test() -> None:
        adapters = ClientAdapters(lambda _: None)
        refused, lost = adapters.load("a", "folder"), adapters.load("b", "other")
        adapters.take(AdapterLoaded("a", "", "there is no folder"))
        with pytest.raises(AdapterError, match="there is no folder"):
            await refused
        adapters.forget("it was killed")
        with pytest.raises(EngineUnavailableError, match="died while it loaded the adapter: it was killed"):
            await lost
        adapters.take(AdapterLoaded("b", "one", ""))  # too late
        assert not adapters.names and not adapters.loading

    asyncio.run(test())


def test_an_adapter_that_changed_in_its_folder_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        adapters = ClientAdapters(lambda _: None)
        adapters.restore({"fixed": "zero", "gone": "nought", "new": "nought"})
        adapters.unload("gone")
        for name, digest in (("a", "one"), ("a", "two"), ("new", "old")):  # an administrator's load is no surprise
            adapters.load(name, f"folder of {name}")
            adapters.take(AdapterLoaded(name, digest, ""))
        adapters.forget("it was killed")
        adapters.restore({"fixed": "zero", "gone": "other", "new": "other"})
        adapters.take(AdapterLoaded("a", "two", ""))
        adapters.take(AdapterLoaded("new", "old", ""))
        assert not caplog.messages
        adapters.forget("it was killed")
        adapters.restore({"fixed": "other"})
        adapters.take(AdapterLoaded("a", "three", ""))
        first, second = caplog.messages
        assert first.startswith("the adapter 'fixed' has changed in its folder since")
        assert second.startswith("the adapter 'a' has changed in folder of a since")

    asyncio.run(test())
