"""Who may ask: API keys, from settings and a file, compared in constant time.

It decides whose request a key makes it, and what keeps the cached prompts of one key from being felt by another. It
must not know of routes.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from splitfuse.config import ServerConfig
from splitfuse.errors import ConfigError
from splitfuse.server.errors import RefusedError


class Keys:
    """The keys of a server. Without any, everybody may ask."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError for a file that cannot be read or has no key in it."""
        keys = [key.strip() for key in config.api_key]
        if config.api_key_file is not None:
            keys += _read(config.api_key_file)
        self._secret = secrets.token_bytes(32)
        self._digests = [self._digest(key.encode()) for key in dict.fromkeys(keys)]

    def identify(self, authorization: bytes | None) -> tuple[str | None, str]:
        """The name of the key in an Authorization header, and the salt of its cached prompts; (None, "") if no keys are
        wanted. Raises RefusedError (401).
        """
        if not self._digests:
            return None, ""
        scheme, _, key = (authorization or b"").partition(b" ")
        presented = self._digest(key.strip() if scheme.lower() == b"bearer" else b"")
        matches = [hmac.compare_digest(presented, digest) for digest in self._digests]
        if not any(matches):
            what = "this API key is not valid" if key else "an API key is needed: send Authorization: Bearer KEY"
            raise RefusedError(
                401, what, code="invalid_api_key", type="authentication_error", headers={"www-authenticate": "Bearer"}
            )
        return f"key {matches.index(True) + 1}", presented.hex()

    def _digest(self, key: bytes) -> bytes:
        """Under a secret of this process: of no use to whoever should come to see it."""
        return hashlib.blake2b(key, key=self._secret, digest_size=32).digest()


def _read(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ConfigError(f"api_key_file {path} has no key in it: write one in each line")
    return keys
