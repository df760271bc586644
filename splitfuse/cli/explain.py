"""`splitfuse explain`: show the latency breakdown of a request, from the server that answered it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from splitfuse.cli.flags import ApiKeyFlag, NameFlag, UrlFlag, cli_errors, connect

BAR = 32
"""Length of the longest bar, in characters."""


@cli_errors()
def explain(
    request: Annotated[str, typer.Argument(metavar="ID", help="Id of the answer, or its header X-Request-Id.")],
    name: NameFlag = None,
    url: UrlFlag = None,
    api_key: ApiKeyFlag = None,
) -> None:
    """Show the latency breakdown of a request, in phases that add up to its latency.

    A server keeps the last 1,024 finished requests.
    """
    with connect(name, url, api_key) as server:
        print(format_breakdown(server.explain(request)))


def format_breakdown(explanation: dict[str, Any]) -> str:
    """Return a table with a bar for each phase, proportional to its time."""
    import msgspec

    from splitfuse.core.latency.phases import LatencyPhase
    from splitfuse.core.slo.targets import SloViolation
    from splitfuse.server.explain import describe_violation

    total, phases = explanation["seconds"], explanation["phases"]
    slo = {True: "SLO met", False: "SLO missed", None: "no SLO"}[explanation["slo_met"]]
    counts = explanation["finish_reasons"]
    ended = ", ".join(f"{count} {reason}" if count > 1 else reason for reason, count in counts.items())
    ended = ended or "nothing generated"
    lines = [
        f"{explanation['request_id']}  {explanation['route']}  status {explanation['status']}  {ended}  {slo}",
        f"{explanation['prompt_tokens']} prompt tokens, {explanation['cached_tokens']} of them from the prefix cache; "
        f"{explanation['generated_tokens']} generated; preemptions: {explanation['preemptions']}",
    ]
    if violation := explanation["slo_violation"]:
        lines.append(describe_violation(msgspec.convert(violation, SloViolation)))
    lines.append("")
    longest = max(phases.values(), default=0.0)
    for phase in LatencyPhase:
        if seconds := phases.get(phase.value):
            bar = "█" * round(BAR * seconds / longest) or "▏"
            lines.append(f"{1000 * seconds:11.1f} ms {seconds / total:6.1%}  {phase.meaning:36} {bar}")
    whole = "from its arrival to the end of its answer"
    lines.append(f"{1000 * total:11.1f} ms {sum(phases.values()) / total:6.1%}  {whole}")
    if others := explanation["co_scheduled"]:
        named = ", ".join(f"{each['id'] or 'another key'} ({each['tokens']} tokens)" for each in others)
        lines += ["", f"prompts computed in the same steps: {named}"]
    return "\n".join(lines)
