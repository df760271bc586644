"""Lets the two ends of a connection prove to each other that they have the same key, before anything else is read.

    server -> client    MAGIC, a nonce
    client -> server    MAGIC, a purpose, a nonce, and the MAC of a client
    server -> client    a verdict, and the MAC of a server

A MAC is that of its side, the purpose, both nonces and the server's certificate, if the connection has one: this
prevents replay, reflection and, with TLS, a man in the middle, also where certificates are self-signed. All of it has a
fixed length; nothing is decoded. A client that is rejected learns that splitfuse listens, and nothing else.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import hmac
import secrets
import ssl
from pathlib import Path

from splitfuse.config.files import bounded_path

MAGIC = b"splitfuse link 1"
NONCE_BYTES = MAC_BYTES = 32
_ACCEPTED, _REFUSED = b"\1", b"\0"
NO_CERTIFICATE = bytes(32)
"""Digest that stands for a connection without TLS."""


class Purpose(bytes, enum.Enum):
    """Says what a client wants of an engine."""

    FRONT = b"F"
    """To send it requests."""
    BLOCKS = b"B"
    """To fetch KV blocks."""


class HandshakeError(Exception):
    """Says, as what follows "it", why the other end is not spoken to."""


async def greet_client(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes, certificate: bytes = NO_CERTIFICATE
) -> Purpose:
    """Let a client in that has the key, and return what it wants. Raises HandshakeError for any other, and
    asyncio.IncompleteReadError or OSError if it leaves.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    writer.write(MAGIC + nonce)
    await writer.drain()
    if await reader.readexactly(len(MAGIC)) != MAGIC:
        raise HandshakeError("is no splitfuse, or another version")
    purpose, theirs = await reader.readexactly(1), await reader.readexactly(NONCE_BYTES)
    signed = purpose + nonce + theirs + certificate
    given = await reader.readexactly(MAC_BYTES)
    if not hmac.compare_digest(given, _mac(key, b"client", signed)):
        writer.write(_REFUSED + bytes(MAC_BYTES))
        await writer.drain()
        raise HandshakeError("has another key")
    writer.write(_ACCEPTED + _mac(key, b"server", signed))
    await writer.drain()
    try:
        return Purpose(purpose)
    except ValueError:
        raise HandshakeError("wants what this version does not know") from None


async def greet_server(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes, purpose: Purpose
) -> None:
    """Authenticate to a server that has the key. Raises HandshakeError if it has another or refuses the connection,
    asyncio.IncompleteReadError or OSError if it closes that.
    """
    certificate = NO_CERTIFICATE
    if (tls := writer.get_extra_info("ssl_object")) is not None:
        certificate = certificate_digest(tls.getpeercert(binary_form=True) or b"")
    if await reader.readexactly(len(MAGIC)) != MAGIC:
        raise HandshakeError("is no splitfuse engine, or one of another version")
    theirs, nonce = await reader.readexactly(NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
    signed = purpose.value + theirs + nonce + certificate
    writer.write(MAGIC + purpose.value + nonce + _mac(key, b"client", signed))
    await writer.drain()
    verdict, given = await reader.readexactly(1), await reader.readexactly(MAC_BYTES)
    if verdict != _ACCEPTED or not hmac.compare_digest(given, _mac(key, b"server", signed)):
        raise HandshakeError("has another key: give both the same key_file")


def certificate_digest(certificate: bytes) -> bytes:
    """Return the digest that stands for a certificate, given in DER."""
    return hashlib.sha256(certificate).digest()


def server_context(certificate: str, key: str) -> tuple[ssl.SSLContext, bytes]:
    """Return the TLS of a server, and the digest of its certificate. Raises OSError, which ssl.SSLError is too, or
    ValueError for what is no PEM.
    """
    with bounded_path(certificate) as certificate_file, bounded_path(key) as key_file:
        return _server_context(certificate_file, key_file)


def _server_context(certificate: str, key: str) -> tuple[ssl.SSLContext, bytes]:
    pem = Path(certificate).read_text(encoding="ascii")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    first = pem[pem.index(begin) : pem.index(end) + len(end)]  # that of the server comes first
    digest = certificate_digest(ssl.PEM_cert_to_DER_cert(first))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key, password=lambda: "")  # else it would ask for one
    return context, digest


def client_context() -> ssl.SSLContext:
    """Return the TLS of a client. Its server is known by the key, with which it signs its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _mac(key: bytes, side: bytes, signed: bytes) -> bytes:
    return hmac.digest(key, side + signed, "sha256")
