"""`splitfuse replay`: run a recording again, step by step, or as a load of today's engines."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfuse.cli.flags import changed, with_flags
from splitfuse.config.engine import EngineConfig, change_settings
from splitfuse.errors import ConfigError, InvalidRequestError, RecordingError, printable

if TYPE_CHECKING:
    from rich.table import Table

    from splitfuse.bench.resend import Figures
    from splitfuse.recording.format import Recording
    from splitfuse.recording.replay import Contents, ReplayReport


@with_flags()
def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File of splitfuse serve --record.")],
    live: Annotated[
        bool, typer.Option("--live", help="Send its requests again, as they came, with the settings of the flags.")
    ] = False,
    replicas: Annotated[int | None, typer.Option(help="With --live: number of engines (default: as recorded).")] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Go on after a step that differs, and count what does.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Replay with another model, version or format, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    **flags: Any,
) -> None:
    """Run the steps of a recording again, and compare tokens and log-probabilities bit for bit.

    Settings are those of the recording; flags change them. LoRA adapters are found by their digests: give them with
    --lora. The exit status is 0 if all is equal, and 1 if a step differs, which is named; --keep-going runs those after
    it, too. With --live steps are composed anew, and a table says what has changed.
    """
    from splitfuse.recording.format import Recording
    from splitfuse.recording.replay import Contents

    if replicas is not None and not live:
        raise ConfigError("--replicas needs --live: otherwise each engine of the recording is replayed")
    if replicas is not None and replicas < 1:
        raise ConfigError(f"--replicas {replicas} must be at least 1")
    if force and live:
        raise ConfigError("--force is not for --live, which sends the requests to any model: leave it out")
    if keep_going and live:
        raise ConfigError("--keep-going is not for --live, which compares no steps: leave it out")
    recording = Recording.open(file)
    contents = Contents.of(recording)
    if not json:
        print(describe(recording, contents))
    _check_forms(recording, changed(flags))
    if live:
        _replay_live(recording, contents, changed(flags), replicas=replicas, json=json, quiet=quiet)
    else:
        how = {"keep_going": keep_going, "force": force}
        _replay_steps(recording, contents, changed(flags), **how, json=json, quiet=quiet)


def _check_forms(recording: Recording, changes: dict[str, Any]) -> None:
    """Raise RecordingError for a form of an answer which takes longer to compile than a server lets it: a file can have
    any, and the engine has no limit.
    """
    from splitfuse.core.structured_outputs import StructuredOutputs
    from splitfuse.recording.requests import read_requests
    from splitfuse.runtime.loading import open_source
    from splitfuse.text.sandbox import Sandbox, StoppedError
    from splitfuse.text.tokenizer import Tokenizer

    found = (each.detail.params.structured_outputs for each in read_requests(recording.frames()))
    forms: dict[str, StructuredOutputs] = {form.compiled: form for form in found if form is not None}
    if not forms:
        return
    config = EngineConfig.from_settings(change_settings(recording.header.settings, changes))
    sandbox = Sandbox(Tokenizer.from_source(open_source(config)))
    try:
        for form in forms.values():
            try:
                sandbox.compile(form)
            except InvalidRequestError as error:  # of others, the replay says what is wrong
                if isinstance(error.__cause__, StoppedError):
                    raise RecordingError(f"{recording.path} has a request whose {error}") from error
    finally:
        sandbox.close()


def _replay_steps(
    recording: Recording,
    contents: Contents,
    changes: dict[str, Any],
    *,
    keep_going: bool,
    force: bool,
    json: bool,
    quiet: bool,
) -> None:
    import msgspec
    from tqdm import tqdm

    from splitfuse.recording.replay import compare_identity, config_of, load
    from splitfuse.recording.replay import replay as run

    loaded = load(recording, config_of(recording, changes))
    others = compare_identity(recording, loaded.model, force=force)
    for other in others:
        print(f"splitfuse: {printable(other)}", file=sys.stderr)
    with tqdm(total=contents.num_steps, unit="step", disable=quiet or not sys.stderr.isatty()) as bar:
        report = run(recording, loaded, keep_going=keep_going, on_step=bar.update)
    if json:
        print(msgspec.json.encode({**asdict(report), "other": others}).decode())
    else:
        print(describe_report(report))
    if report.difference is not None:
        raise typer.Exit(1)


def _replay_live(
    recording: Recording,
    contents: Contents,
    changes: dict[str, Any],
    *,
    replicas: int | None,
    json: bool,
    quiet: bool,
) -> None:
    import msgspec
    from tqdm import tqdm

    from splitfuse.bench.resend import Figures, num_equal, send_again
    from splitfuse.cli.tables import console
    from splitfuse.recording.requests import read_requests

    requests = [each for each in read_requests(recording.frames()) if not each.was_running]
    if not requests:
        raise RecordingError(f"{recording.path} has no request that came while it was written")
    config = EngineConfig.from_settings(change_settings(recording.header.settings, changes))
    with tqdm(total=len(requests), unit="request", disable=quiet or not sys.stderr.isatty()) as bar:
        engines = len(contents.engines) if replicas is None else replicas
        again = asyncio.run(send_again(recording, requests, config, replicas=engines, on_end=bar.update))
    before, now = Figures.of(requests), Figures.of([each for each in again if each is not None])
    equal, both = num_equal(requests, again)
    if json:
        report = {"recorded": before, "now": now, "equal_tokens": equal, "compared": both}
        print(msgspec.json.encode(report).decode())
    else:
        console().print(live_table(before, now))
        print(f"equal tokens, as far as both have them: {equal} of {both} requests")


def live_table(before: Figures, now: Figures) -> Table:
    """Return what was recorded next to what is now, and the change."""
    from splitfuse.cli.tables import make_table

    rows = [
        _row("requests", before.requests, now.requests),
        *(
            _row(f"ended: {reason}", before.ended.get(reason, 0), now.ended.get(reason, 0))
            for reason in sorted({*before.ended, *now.ended})
        ),
        _row("tokens", before.tokens, now.tokens),
        _row("seconds", before.seconds, now.seconds),
        *([_row("goodput, requests/s that met their SLO", before.goodput, now.goodput)] if now.with_slo else []),
        *(_row(f"TTFT P{percent}, ms", 1e3 * before.ttft[percent], 1e3 * now.ttft[percent]) for percent in before.ttft),
        *(_row(f"ITL P{percent}, ms", 1e3 * before.itl[percent], 1e3 * now.itl[percent]) for percent in before.itl),
        _row("preemptions", before.preemptions, now.preemptions),
        _row("prompt tokens from the prefix cache", before.cached_tokens, now.cached_tokens),
    ]
    return make_table(None, ("", "recorded", "now", "change"), rows, left=("",))


def _row(name: str, before: float, now: float) -> tuple[str, str, str, str]:
    change = f"{now / before - 1:+.1%}" if before and before != now else ""
    shown = [str(each) if isinstance(each, int) else f"{each:.4g}" for each in (before, now)]
    return name, shown[0], shown[1], change


def describe(recording: Recording, contents: Contents) -> str:
    """Return a line about what is in a recording."""
    start = next(iter(contents.engines.values()))
    when = datetime.fromtimestamp(recording.header.time, UTC).isoformat(timespec="seconds")
    return printable(
        f"{recording.path}: {start.model}, {when}, {contents.last_time - contents.first_time:.1f} s, "
        f"{contents.num_requests} requests, {contents.num_steps} steps of {len(contents.engines)} engine(s), "
        f"{start.identity.get('kernels', 'unknown kernels')} on {recording.header.machine.get('cpu', 'unknown CPU')}"
    )


def describe_report(report: ReplayReport) -> str:
    """Return what people need to know of a replay, in one line or two."""
    if (first := report.difference) is None:
        lines = [
            f"equal to the last bit: {report.num_steps} steps, {report.num_tokens} tokens, {report.num_logprobs} "
            f"log-probabilities and {report.num_values} other numbers"
        ]
    elif report.num_different_steps == 1:
        lines = [printable(f"different: {first}"), f"equal before it: {report.num_steps} steps"]
    else:
        num_steps = report.num_steps + report.num_different_steps
        lines = [
            printable(f"the first that is different: {first}"),
            f"different: {report.num_different_steps} of {num_steps} steps, {report.num_different_tokens} of "
            f"{report.num_tokens} tokens, {report.num_different_logprobs} of {report.num_logprobs} log-probabilities "
            f"(by {report.logprob_error:.2g} at most)",
        ]
    if report.num_computed_first:
        lines.append(f"computed first, since the file does not have it: {report.num_computed_first} tokens")
    if report.fault:
        lines.append(report.fault)
    return "\n".join([*lines, f"replayed in {report.seconds:.1f} s"])
