"""OpenAI's own client of a running server."""

from typing import Any

import openai
from running_server import RunningServer


def connect(server: RunningServer, **settings: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", **{"api_key": "none", "max_retries": 0, **settings})
