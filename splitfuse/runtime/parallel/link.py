"""Connects a leader to ranks on other machines. Both prove that they have the same key before anything else is read.

    rank -> leader, leader -> rank    MAGIC, a nonce
    leader -> rank                    the MAC of a leader
    rank -> leader                    the MAC of a rank, if that was right

A MAC is that of its side and both nonces. What follows is neither encrypted nor signed, nor is what gloo sends.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from typing import Final

from splitfuse.config.values import parse_address
from splitfuse.errors import ConfigError, EngineUnavailableError

MAGIC = b"splitfuse rank 1"
NONCE_BYTES = MAC_BYTES = 32
CONNECT_SECONDS = 5.0
"""Longest time in seconds to connect, and of a handshake."""
SILENCE: Final = 10
"""Seconds after which a machine that does not answer is taken to be gone."""


class LinkError(Exception):
    """Says why the other end is refused, in words that follow "it"."""


def connect(address: str, key: bytes) -> socket.socket:
    """Return a connection to a rank that has let us in. Raises EngineUnavailableError if it cannot be reached now,
    ConfigError if it is none, or has another key.
    """
    try:
        connection = socket.create_connection(parse_address("rank", address), timeout=CONNECT_SECONDS)
    except ConnectionRefusedError as error:
        raise EngineUnavailableError(
            f"nothing listens at rank {address}, or it has another leader: start it with splitfuse rank"
        ) from error
    except OSError as error:
        raise EngineUnavailableError(f"rank {address} cannot be reached: {error.strerror or error}") from error
    try:
        prove(connection, key, is_leader=True)
    except LinkError as error:
        connection.close()
        raise ConfigError(f"rank {address} {error}") from error
    except OSError as error:
        connection.close()
        raise EngineUnavailableError(f"rank {address} has another leader, or does not answer: {error}") from error
    return connection


def prove(connection: socket.socket, key: bytes, *, is_leader: bool) -> None:
    """Do the handshake, and leave a blocking socket that notices if the other machine is gone. Raises LinkError, or
    OSError if it ends or takes too long.
    """
    connection.settimeout(CONNECT_SECONDS)
    ours = secrets.token_bytes(NONCE_BYTES)
    connection.sendall(MAGIC + ours)
    if _receive(connection, len(MAGIC)) != MAGIC:
        raise LinkError("is no rank of splitfuse, or one of another version")
    theirs = _receive(connection, NONCE_BYTES)
    nonces = ours + theirs if is_leader else theirs + ours
    macs = {side: hmac.digest(key, side + nonces, "sha256") for side in (b"leader", b"rank")}
    if is_leader:
        connection.sendall(macs[b"leader"])
    wanted = macs[b"rank" if is_leader else b"leader"]
    given = _receive(connection, MAC_BYTES)
    if not is_leader:
        connection.sendall(macs[b"rank"] if hmac.compare_digest(given, wanted) else bytes(MAC_BYTES))
    if not hmac.compare_digest(given, wanted):
        raise LinkError("has another key: give both the same secret")
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE // 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE // 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE)


def _receive(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        if not (part := connection.recv(count - len(received))):
            raise ConnectionResetError("it has closed the connection")
        received += part
    return received
