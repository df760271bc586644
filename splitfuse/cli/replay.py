"""`splitfuse replay`: run a recording again, and say where it differs."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfuse.cli.flags import changed, with_flags

if TYPE_CHECKING:
    from splitfuse.recording.format import Recording
    from splitfuse.recording.replay import Contents, ReplayReport


@with_flags()
def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File of splitfuse serve --record.")],
    force: Annotated[bool, typer.Option(help="Replay with another model, version or format, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    **flags: Any,
) -> None:
    """Run the steps of a recording again, and compare tokens and log-probabilities bit for bit.

    Settings are those of the recording; flags change them. LoRA adapters are found by their digests: give them with
    --lora. The exit status is 0 if all is equal, and 1 if a step differs, which is named.
    """
    import msgspec
    from tqdm import tqdm

    from splitfuse.recording.format import Recording
    from splitfuse.recording.replay import Contents, compare_identity, config_of, load
    from splitfuse.recording.replay import replay as run

    recording = Recording.open(file)
    contents = Contents.of(recording)
    if not json:
        print(describe(recording, contents))
    loaded = load(recording, config_of(recording, changed(flags)))
    others = compare_identity(recording, loaded.model, force=force)
    for other in others:
        print(f"splitfuse: {other}", file=sys.stderr)
    with tqdm(total=contents.num_steps, unit="step", disable=quiet or not sys.stderr.isatty()) as bar:
        report = run(recording, loaded, on_step=bar.update)
    if json:
        print(msgspec.json.encode({**asdict(report), "other": others}).decode())
    else:
        print(describe_report(report))
    if report.difference is not None:
        raise typer.Exit(1)


def describe(recording: Recording, contents: Contents) -> str:
    """Return a line about what is in a recording."""
    start = next(iter(contents.engines.values()))
    when = datetime.fromtimestamp(recording.header.time, UTC).isoformat(timespec="seconds")
    return (
        f"{recording.path}: {start.model}, {when}, {contents.last_time - contents.first_time:.1f} s, "
        f"{contents.num_requests} requests, {contents.num_steps} steps of {len(contents.engines)} engine(s), "
        f"{start.identity.get('kernels', 'unknown kernels')} on {recording.header.machine.get('cpu', 'unknown CPU')}"
    )


def describe_report(report: ReplayReport) -> str:
    """Return what people need to know of a replay, in one line or two."""
    what = (
        f"{report.num_steps} steps, {report.num_tokens} tokens, {report.num_logprobs} log-probabilities and "
        f"{report.num_values} other numbers"
    )
    lines = [f"equal to the last bit: {what}"] if report.difference is None else [f"different: {report.difference}"]
    if report.difference is not None:
        lines.append(f"equal before it: {report.num_steps} steps")
    if report.num_computed_first:
        lines.append(f"computed first, since the file does not have it: {report.num_computed_first} tokens")
    if report.fault:
        lines.append(report.fault)
    return "\n".join([*lines, f"replayed in {report.seconds:.1f} s"])
