"""`splitfuse explain`: where the time of a request went, asked of the server that answered it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from splitfuse.cli.flags import cli_errors
from splitfuse.errors import ConfigError

BAR = 32
"""Characters of the longest bar."""


@cli_errors()
def explain(
    request: Annotated[str, typer.Argument(metavar="ID", help="Of an answer, or its header X-Request-Id.")],
    name: Annotated[str | None, typer.Option(help="Of the deployment that answered it; left out, splitfuse.")] = None,
    url: Annotated[str | None, typer.Option(help="Of the server instead, such as http://127.0.0.1:8000.")] = None,
) -> None:
    """Tell where the time of a request went: every part, adding up to all of it.

    A server remembers the last 1,024 requests that have ended. Its key is looked for in SPLITFUSE_API_KEY.
    """
    if name is not None and url is not None:
        raise ConfigError("--name and --url are two ways to name a server: give one")
    from splitfuse.clients.sync import client

    with client(url or name or "splitfuse") as server:
        print(drawn(server.explain(request)))


def drawn(explanation: dict[str, Any]) -> str:
    """A table with a bar for each part, which is as long as its share."""
    import msgspec

    from splitfuse.core.slo.targets import SloViolation
    from splitfuse.server.explain import MEANINGS, told

    total, parts = explanation["seconds"], explanation["phases"]
    promise = {True: "as promised", False: "late", None: "nothing promised"}[explanation["slo_met"]]
    ended = ", ".join(explanation["finish_reasons"]) or "nothing generated"
    lines = [
        f"{explanation['request_id']}  {explanation['route']}  status {explanation['status']}  {ended}  {promise}",
        f"{explanation['prompt_tokens']} prompt tokens, {explanation['cached_tokens']} of them from the prefix cache; "
        f"{explanation['generated_tokens']} generated; preemptions: {explanation['preemptions']}",
        *([told(msgspec.convert(missed, SloViolation))] if (missed := explanation["slo_violation"]) else []),
        "",
    ]
    longest = max(parts.values(), default=0.0)
    for part, meaning in MEANINGS.items():
        if seconds := parts.get(part.value):
            bar = "█" * round(BAR * seconds / longest) or "▏"
            lines.append(f"{1000 * seconds:11.1f} ms {seconds / total:6.1%}  {meaning:34} {bar}")
    whole = "from its arrival to the end of its answer"
    lines.append(f"{1000 * total:11.1f} ms {sum(parts.values()) / total:6.1%}  {whole}")
    if beside := explanation["co_scheduled"]:
        named = ", ".join(f"{each['id'] or 'another key'} ({each['tokens']} tokens)" for each in beside)
        lines += ["", f"beside it, prompts of {named}"]
    return "\n".join(lines)
