"""Admission: which requests are accepted, when refused ones may come back, and that every count returns to zero."""

import asyncio
import math
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE

from splitfuse.config.server import ServerConfig
from splitfuse.errors import DrainingError, InvalidRequestError, OverloadedError
from splitfuse.server.admission import MAX_WAIT, MEMORY_SECONDS, Admission


class Clock:
    """Goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(requests: int = 4, tokens: int = 1000, *, replicas: int = 1) -> tuple[Admission, Clock]:
    clock = Clock()
    config = ServerConfig(max_queued_requests=requests, max_queued_tokens=tokens, replicas=replicas)
    return Admission(config, clock), clock


def refused(admission: Admission, num_tokens: int, num_requests: int = 1) -> OverloadedError:
    with pytest.raises(OverloadedError) as caught, admission.admit(num_tokens, num_requests):
        pass
    return caught.value


# Bounds --------------------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(0, 60), st.integers(1, 5)),
        st.tuples(st.just("release"), st.integers(0, 99), st.booleans()),
        st.tuples(st.just("pass"), st.integers(0, 10**6), st.floats(0, 1e300)),
        st.tuples(st.just("idle"), st.floats(0, 1e6), st.none()),
    ),
    max_size=60,
)


@given(STEPS, st.integers(1, 8), st.integers(1, 100))
def test_bounds_hold_and_each_ticket_returns_once(
    steps: list[tuple[str, float, float]], most_requests: int, most_tokens: int
) -> None:
    admission, clock = make(most_requests, most_tokens)
    tickets: list[tuple[ExitStack, int, int]] = []
    for what, first, second in steps:
        if what == "admit":
            tokens, requests = int(first), int(second)
            held = (sum(ticket[1] for ticket in tickets), sum(ticket[2] for ticket in tickets))
            stack = ExitStack()
            try:
                stack.enter_context(admission.admit(tokens, requests))
            except InvalidRequestError:
                assert tokens > most_tokens or requests > most_requests
            except OverloadedError as error:
                assert held[0] + tokens > most_tokens or held[1] + requests > most_requests
                assert 1 <= error.retry_after <= MAX_WAIT
            else:
                tickets.append((stack, tokens, requests))
        elif what == "release" and tickets:
            stack = tickets.pop(int(first) % len(tickets))[0]
            if second:  # the request failed
                with pytest.raises(KeyError), stack:
                    raise KeyError
            stack.close()
            stack.close()
        elif what == "pass":
            admission.progressed(int(first), second)
        elif what == "idle":
            clock.now += first
        assert admission.num_tokens == sum(ticket[1] for ticket in tickets) <= most_tokens
        assert admission.num_requests == sum(ticket[2] for ticket in tickets) <= most_requests
    for stack, _, _ in tickets:
        stack.close()
    assert admission.num_requests == admission.num_tokens == 0


def test_the_last_request_and_token_that_fit_are_admitted() -> None:
    admission, _ = make(2, 100)
    with admission.admit(60), admission.admit(40):
        assert "at capacity (2 requests)" in str(refused(admission, 0))
    with admission.admit(61):
        assert "at capacity (61 tokens)" in str(refused(admission, 40))
        with admission.admit(39):
            pass
    assert admission.num_requests == 0


def test_a_request_that_can_never_fit_is_invalid() -> None:
    admission, _ = make(4, 100)
    with pytest.raises(InvalidRequestError, match=r"come to 101 tokens, .* at most 100 at once") as tokens:
        admission.admit(101).__enter__()
    assert tokens.value.parameter == "max_tokens"
    with pytest.raises(InvalidRequestError, match=r"= 5 requests, .* at most 4 at once") as requests:
        admission.admit(5, 5).__enter__()
    assert requests.value.parameter == "n"
    with admission.admit(100, 4):
        pass


def test_a_refused_request_is_not_counted() -> None:
    admission, _ = make(2, 100)
    with admission.admit(80):
        refused(admission, 21)
        assert (admission.num_requests, admission.num_tokens) == (1, 80)
        with admission.admit(20):
            pass


@pytest.mark.parametrize(("tokens", "requests"), [(-1, 1), (1, -1)])
def test_negative_sizes_are_a_value_error(tokens: int, requests: int) -> None:
    admission, _ = make()
    with pytest.raises(ValueError, match="numbers must be at least 0"):
        admission.admit(tokens, requests).__enter__()


def test_requests_are_admitted_before_their_tokens_are_known() -> None:
    admission, _ = make(2, 100)
    with admission.admit(0, 2):
        with admission.admit(100, 0):
            assert (admission.num_requests, admission.num_tokens) == (2, 100)
            admission.drain()
        with admission.admit(1, 0):  # a request that is open continues
            pass
        with pytest.raises(DrainingError):
            admission.admit(0).__enter__()
    assert (admission.num_requests, admission.num_tokens) == (0, 0)


def test_logprobs_are_bounded_as_tokens_are() -> None:
    admission, _ = make(4, 100)
    with pytest.raises(
        InvalidRequestError, match=r"come to 101 log-probabilities, .* lower max_tokens, logprobs"
    ) as refusal:
        admission.admit(1, num_logprobs=101).__enter__()
    assert refusal.value.parameter == "logprobs"
    with admission.admit(1, num_logprobs=60):
        with pytest.raises(OverloadedError, match=r"at capacity \(60 log-probabilities\)"):
            admission.admit(1, num_logprobs=41).__enter__()
        with admission.admit(1, num_logprobs=40):
            pass
    assert admission.num_logprobs == 0


# When to come back ---------------------------------------------------------------------------------------------------


def test_the_wait_is_a_second_before_any_step() -> None:
    admission, _ = make(1, 10**6)
    with admission.admit(10**6):
        assert refused(admission, 10**6).retry_after == 1.0
        admission.progressed(0, 0.0)  # a report that was no step
        assert admission.tokens_per_second is None
        assert refused(admission, 10**6).retry_after == 1.0


@given(
    held=st.integers(1, 10**6),
    asked=st.integers(1, 10**6),
    step_tokens=st.integers(1, 8192),
    step_seconds=st.floats(1e-4, 60),
    replicas=st.integers(1, 8),
)
def test_the_wait_is_the_excess_tokens_over_the_rate(
    held: int, asked: int, step_tokens: int, step_seconds: float, replicas: int
) -> None:
    most = max(held, asked, held + asked - 1)
    admission, clock = make(10, most, replicas=replicas)
    for _ in range(20):
        clock.now += step_seconds
        admission.progressed(step_tokens, step_seconds)
    rate = replicas * step_tokens / step_seconds
    assert admission.tokens_per_second == pytest.approx(rate)
    over = held + asked - most
    with admission.admit(held):
        if over > 0:
            expected = min(max(over / rate, 1.0), MAX_WAIT)
            assert refused(admission, asked).retry_after == pytest.approx(expected)


@pytest.mark.parametrize("seconds", [1e6, 1e300])
def test_the_wait_is_bounded(seconds: float) -> None:
    admission, _ = make(2, 10**6)
    admission.progressed(1, seconds)
    with admission.admit(10**6):
        assert refused(admission, 10**6).retry_after == MAX_WAIT


def test_the_wait_for_a_request_assumes_the_mean_size() -> None:
    admission, clock = make(3, 10**6)
    clock.now += 1
    admission.progressed(100, 1.0)
    with admission.admit(3000), admission.admit(1000), admission.admit(500):
        assert refused(admission, 1).retry_after == pytest.approx(1500 / 100)
        assert refused(admission, 1, 2).retry_after == pytest.approx(3000 / 100)


def test_the_rate_decays_over_ten_busy_seconds() -> None:
    admission, clock = make()
    for _ in range(100):
        clock.now += 1
        admission.progressed(1000, 1.0)
    assert admission.tokens_per_second == pytest.approx(1000)
    clock.now += 10**5
    assert admission.tokens_per_second == pytest.approx(1000)
    clock.now -= 10**5
    for _ in range(int(MEMORY_SECONDS)):
        clock.now += 1
        admission.progressed(100, 1.0)
    assert admission.tokens_per_second == pytest.approx(100 + 900 * math.exp(-1), rel=1e-3)
    for _ in range(4 * int(MEMORY_SECONDS)):
        clock.now += 1
        admission.progressed(100, 1.0)
    assert admission.tokens_per_second == pytest.approx(100, rel=0.1)
    clock.now += 10**6  # so long that nothing of it is left
    admission.progressed(7, 1.0)
    assert admission.tokens_per_second == pytest.approx(7)


def test_a_clock_that_goes_backwards_is_harmless() -> None:
    admission, clock = make(1, 100)
    admission.progressed(10, 1.0)
    clock.now -= 1e9
    admission.progressed(30, 1.0)
    assert admission.tokens_per_second == pytest.approx(20)


# The end -------------------------------------------------------------------------------------------------------------


def test_draining_refuses_requests_and_reports_when_empty() -> None:
    admission, _ = make()

    async def run() -> None:
        await admission.wait_empty()  # at once: there was nothing
        first, second = ExitStack(), ExitStack()
        first.enter_context(admission.admit(10))
        second.enter_context(admission.admit(10, 2))
        admission.drain()
        with pytest.raises(DrainingError, match="accepts no new requests") as caught, admission.admit(1):
            pass
        assert caught.value.status == 503
        waiting = asyncio.create_task(admission.wait_empty())
        first.close()
        await asyncio.sleep(0)
        assert not waiting.done()
        second.close()
        await asyncio.wait_for(waiting, PATIENCE)

    asyncio.run(run())
    assert admission.draining
