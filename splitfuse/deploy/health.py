"""Tells whether the servers on this machine answer: `python -m splitfuse.deploy.health`, as in the Dockerfile.

Ends with status 0 if /health of each running deployment of this user is 200, and with 1 if one is not or there is none.
Follows their ports and TLS, and takes no proxy. It imports little, since it runs every few seconds.
"""

from __future__ import annotations

import http.client
import ssl
import sys
from urllib.parse import urlsplit

from splitfuse.deploy import registry
from splitfuse.deploy.registry import Deployment
from splitfuse.errors import ServerError

SECONDS = 10.0
"""Time for an answer."""


def is_healthy(deployment: Deployment) -> bool:
    """Return whether /health of a deployment is 200."""
    address = urlsplit(deployment.url)
    assert address.hostname is not None
    if address.scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is sent nothing, on this machine
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            address.hostname, address.port, timeout=SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def main() -> None:
    """End the process with the status of all deployments."""
    try:
        running = registry.deployments()
    except ServerError as error:
        sys.exit(str(error))
    if not running:
        sys.exit("no deployment is running")
    if sick := [deployment.name for deployment in running if not is_healthy(deployment)]:
        sys.exit(f"no answer from {', '.join(sick)}")


if __name__ == "__main__":
    main()
