"""Which requests may see those of all keys."""

import pytest

from splitfuse.server.auth import ANONYMOUS, Owner, check_observer
from splitfuse.server.errors import RefusedError

LOCAL = ("127.0.0.1", 5000)


def sees(owner: Owner, client: tuple[str, int] | None, **headers: str) -> bool:
    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    try:
        check_observer(owner, {"client": client, "headers": sent}, "traces are shown")
    except RefusedError as error:
        assert (error.status, error.code) == (403, "no_administrator")
        assert "admin=yes" in str(error)
        assert str(error).startswith(("traces are shown with an", "traces are shown at the request of clients on this"))
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:8000"])
def test_without_keys_this_machine_sees_all(host: str) -> None:
    assert sees(ANONYMOUS, LOCAL, host=host)
    assert sees(ANONYMOUS, ("::1", 5000), host=host)


def test_without_keys_no_other_machine_sees_any() -> None:
    assert not sees(ANONYMOUS, ("192.0.2.1", 5000), host="127.0.0.1:8000")
    assert not sees(ANONYMOUS, None, host="127.0.0.1:8000")
    assert not sees(ANONYMOUS, LOCAL)


def test_page_whose_name_leads_here_sees_none() -> None:
    assert not sees(ANONYMOUS, LOCAL, host="attacker.example:8000")


@pytest.mark.parametrize("origin", ["http://elsewhere.example", "null", "http://localhost:9000"])
def test_page_of_another_origin_sees_none(origin: str) -> None:
    assert not sees(ANONYMOUS, LOCAL, host="localhost:8000", origin=origin)
    assert sees(ANONYMOUS, LOCAL, host="localhost:8000", origin="http://localhost:8000")


@pytest.mark.parametrize("header", ["forwarded", "x_forwarded_for", "x_real_ip"])
def test_client_of_a_proxy_is_not_on_this_machine(header: str) -> None:
    assert not sees(ANONYMOUS, LOCAL, host="localhost", **{header: "192.0.2.1"})


def test_of_the_keys_only_an_administrators_sees_all() -> None:
    elsewhere = ("192.0.2.1", 5000)
    assert sees(Owner("root", is_admin=True), elsewhere, host="example.org")
    assert not sees(Owner("user"), LOCAL, host="localhost")
