"""Lists a server, or a gateway, among the running deployments while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from splitfuse.config.server import ServerConfig
from splitfuse.deploy import registry
from splitfuse.deploy.registry import Deployment
from splitfuse.errors import RegistryError

_logger = logging.getLogger(__name__)


def deployment_of(config: ServerConfig, port: int, *, model: str, needs_key: bool) -> Deployment:
    """Return the entry of this process, which listens on `port`."""
    certificate = config.tls_certificate
    return Deployment(
        name=config.name,
        host=config.host,
        port=port,
        scheme="http" if certificate is None else "https",
        model=model,
        needs_key=needs_key,
        drain_timeout=config.drain_timeout,
        tls_certificate=None if certificate is None else str(Path(certificate).resolve()),
    )


@contextmanager
def registered(deployment: Deployment) -> Iterator[Callable[[], None]]:
    """List a deployment while the context lasts, and give a function that notes that it is ready. Where no folder can
    be written it runs unlisted, which is logged. Raises ServerError if its name belongs to a running server.
    """
    is_listed = True
    try:
        registry.register(deployment)
    except RegistryError as error:
        is_listed = False
        _logger.warning("%s. Until then splitfuse ps, stop and client(%r) do not find it", error, deployment.name)

    def mark_ready() -> None:
        with suppress(RegistryError):  # the folder has gone since
            registry.mark_ready(deployment)

    try:
        yield mark_ready if is_listed else lambda: None
    finally:
        if is_listed:
            with suppress(RegistryError):  # others remove the entry of a process that has ended
                registry.unregister(deployment)
