"""Connects to engines on other machines, for requests or for KV blocks, and says in a sentence what prevents it."""

from __future__ import annotations

import asyncio
import ssl

import msgspec

from splitfuse.config.values import parse_address
from splitfuse.engine.messages import Welcome
from splitfuse.engine.remote.handshake import HandshakeError, Purpose, greet_server
from splitfuse.engine.remote.transport import HANDSHAKE_SECONDS, READ_AHEAD, read_message
from splitfuse.errors import ConfigError, EngineUnavailableError
from splitfuse.version import __version__

CONNECT_SECONDS = 5.0
"""Longest time until a connection is there."""
MOST_VERSION, MOST_WELCOME = 256, 2**20
"""Most bytes of the first two messages of an engine."""


async def connect(
    address: str, key: bytes, purpose: Purpose, *, tls: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return a connection to an engine that has let us in.

    Raises EngineUnavailableError if it cannot be reached now, ConfigError if it is none, or has another key.
    """
    host, port = parse_address("engine", address)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(host, port, ssl=tls, limit=READ_AHEAD)
    except ssl.SSLError as error:
        raise ConfigError(
            "it speaks no TLS, or none that we do: start it with tls_certificate and tls_key, or leave out engine_tls "
            f"({error.reason or error})"
        ) from error
    except ConnectionRefusedError as error:
        raise EngineUnavailableError("nothing listens there: start it with splitfuse engine") from error
    except TimeoutError as error:
        raise EngineUnavailableError(f"no connection within {CONNECT_SECONDS:g} s") from error
    except OSError as error:
        raise EngineUnavailableError(f"it cannot be reached: {error.strerror or error}") from error
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            await greet_server(reader, writer, key, purpose)
    except HandshakeError as error:
        writer.close()
        raise ConfigError(f"it {error}") from error
    except TimeoutError as error:
        writer.close()
        hint = "" if tls is not None else "; if it speaks TLS, set engine_tls"
        raise EngineUnavailableError(
            f"it accepts connections, but has said nothing for {HANDSHAKE_SECONDS:g} s{hint}"
        ) from error
    except (asyncio.IncompleteReadError, OSError) as error:
        writer.close()
        hint = " (too many others may connect at once)"
        hint += "" if tls is not None else "; if it speaks TLS, set engine_tls"
        raise EngineUnavailableError(f"it has closed the connection within the handshake{hint}") from error
    except BaseException:
        writer.close()
        raise
    return reader, writer


async def read_welcome(reader: asyncio.StreamReader) -> Welcome:
    """Return what an engine says of itself. Raises ConfigError if it is of another version."""
    try:
        version = (await read_message(reader, most=MOST_VERSION)).decode("ascii", "replace")
        if version != __version__:
            raise ConfigError(f"it is splitfuse {version}, and this is {__version__}: use the same version")
        return msgspec.msgpack.decode(await read_message(reader, most=MOST_WELCOME), type=Welcome)
    except (ValueError, msgspec.DecodeError) as error:
        raise ConfigError(f"what it says is malformed: {error}") from error
