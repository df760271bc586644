"""Work that never ends is ended."""

import threading
import weakref

import pytest
from threads import wait_for_threads

from splitfuse.text.timeouts import within


def spin(*_: object) -> None:
    while True:
        pass


def test_returns_the_result_and_raises_the_error_of_the_work() -> None:
    assert within(20.0, lambda: 7, "work") == 7
    with pytest.raises(KeyError, match="nothing"):
        within(20.0, lambda: {}["nothing"], "work")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the first exception, which is lost
def test_an_exception_swallowed_by_a_callback_is_raised_again() -> None:
    class Thing:
        pass

    def work() -> None:
        thing = Thing()
        watch = weakref.ref(thing, spin)  # Python drops what a weak reference's callback raises
        del thing
        assert watch() is None
        spin()

    with pytest.raises(TimeoutError, match=r"^stopped: it ran for more than 0\.05 s$"):
        within(0.05, work, "endless work")
    wait_for_threads("endless work")
    assert not any(thread.name.startswith("endless work") for thread in threading.enumerate())
