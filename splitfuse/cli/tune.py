"""`splitfuse tune`: what load this machine can promise, with which settings, and why."""

from __future__ import annotations

import asyncio
import shlex
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfuse.cli.flags import changed, given, with_flags
from splitfuse.cli.loads import WorkloadFlags, check_writable, numbers, show
from splitfuse.cli.simulate import deployment, known_calibration
from splitfuse.config import EngineConfig
from splitfuse.errors import ConfigError, CostModelError

if TYPE_CHECKING:
    from splitfuse.bench.measure import MakeWorkload
    from splitfuse.runtime.calibration import Calibration
    from splitfuse.simulator.tune import Carried, CurvePoint, Tuning

BAR = 32  # characters
CHOSEN = ("max_num_batched_tokens", "max_num_seqs")
MEASUREMENTS, LESS = 4, 0.8
"""Loads that are driven at most, each as a share of the one before."""
SAME = 0.03
"""Loads that differ by less are called the same."""


@with_flags(also={"Load": WorkloadFlags})
def tune(
    context: typer.Context,
    on_time: Annotated[float, typer.Option(help="Share of the requests that is to be on time.")] = 0.99,
    headroom: Annotated[
        float, typer.Option(help="Steps are taken to be longer than they were timed, by this share.")
    ] = 0.1,
    budgets: Annotated[str | None, typer.Option(help="Token budgets to try; left out, 32 to 1024.")] = None,
    seats: Annotated[str | None, typer.Option(help="Values of max-num-seqs to try; left out, 8 to 64.")] = None,
    requests: Annotated[
        int, typer.Option(help="That count at each simulated load; at the last, four times as many.")
    ] = 200,
    model_of_cost: Annotated[
        Path | None, typer.Option(help="A cost model; left out, that of this machine, which is timed if need be.")
    ] = None,
    machine: Annotated[str | None, typer.Option(help="Or a published machine, such as a100-70b.")] = None,
    measure: Annotated[bool, typer.Option(help="Drive the engine with the load that was found, and tell.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write all that was tried there, as JSON.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    **flags: Any,
) -> None:
    """Find what load this machine can promise with --ttft and --itl, and the settings for it; say why.

    Steps are timed once (as `calibrate` does), loads are simulated. docs/slo.md has an example.
    """
    import msgspec
    from tqdm import tqdm

    from splitfuse.simulator.tune import BUDGETS, SEATS, curve
    from splitfuse.simulator.tune import tune as find

    load = WorkloadFlags.taken_from(flags)
    make_workload = load.workload_maker()
    settings = given(flags)
    for name in CHOSEN:
        if name in changed(settings) or getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
            other = "budgets" if name == CHOSEN[0] else "seats"
            raise ConfigError(f"--{name.replace('_', '-')} is what is looked for: --{other} says among which")
    if not 0 <= headroom < float("inf"):
        raise ConfigError(f"headroom must be a share from 0, such as 0.1, not {headroom}")
    if measure and (machine is not None or model_of_cost is not None):
        raise ConfigError("--measure drives the engine here: leave --machine and --model-of-cost out")
    tried = numbers("budgets", budgets, int) or BUDGETS
    tried_seats = numbers("seats", seats, int) or SEATS
    if out is not None:
        check_writable(out)
    config = EngineConfig.from_settings(settings)
    if not config.scheduler.has_targets:
        raise ConfigError("say what is to be promised: --ttft, such as 1s or 2ms/token, or --itl, such as 250ms")
    shown = not quiet and sys.stderr.isatty()
    if model_of_cost is None and machine is None:
        calibration = _kept_or_timed(config, progress=shown)
    else:
        calibration = known_calibration(config, model_of_cost, machine)
    measured = curve(calibration, tried)
    _print_curve(calibration, measured)
    slower = replace(calibration, cost=calibration.cost.slower(1.0 + headroom))
    with tqdm(desc="simulated loads", unit="load", disable=not shown) as bar:
        tuning = find(
            deployment(slower, config),
            make_workload,
            share=on_time,
            requests=requests,
            budgets=tried,
            seats=tried_seats,
            on_trial=lambda: bar.update() and None,
        )
    _print_tried(tuning)
    _print_chosen(tuning, calibration, settings, load, headroom)
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode({"curve": measured, "tuning": tuning}), indent=1))
        print(f"splitfuse: {out} has all that was tried", file=sys.stderr)
    if measure:
        _measure(tuning, settings, make_workload, progress=shown)


def _kept_or_timed(config: EngineConfig, *, progress: bool) -> Calibration:
    """What is kept of this machine with the steps that were timed; else they are timed now, and kept."""
    from splitfuse.engine.engine import Engine
    from splitfuse.engine.profile import run_calibration
    from splitfuse.runtime.calibration import load_cost_model, place, save

    with suppress(CostModelError):
        kept = load_cost_model(config)
        if kept.timed:
            return kept
    print("splitfuse: steps are timed, for about 20 s", file=sys.stderr)
    calibration, _ = run_calibration(Engine, config, seconds=20.0, progress=progress)
    save(calibration, place(calibration.identity))
    return calibration


def _print_curve(calibration: Calibration, points: list[CurvePoint]) -> None:
    from rich.table import Table

    table = Table(title=f"a step of {calibration.name}", title_justify="left", header_style="bold")
    for name in ("tokens", "measured ms", "fit ms", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("")
    fastest = max(point.tokens_per_second for point in points)
    for point in points:
        table.add_row(
            str(point.tokens),
            "" if point.measured is None else f"{1e3 * point.measured:.3g}",
            f"{1e3 * point.predicted:.3g}",
            f"{point.tokens_per_second:.0f}",
            "█" * round(BAR * point.tokens_per_second / fastest),
        )
    show(table)
    if (error := calibration.cost.error) is not None:
        print(f"the fit misses steps that were not fitted by {error.median:.1%} in the median, {error.p95:.1%} at P95")


def _print_tried(tuning: Tuning) -> None:
    from rich.table import Table

    title = f"requests/s of which {100 * tuning.share:.4g} % are on time"
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("max-num-batched-tokens", "max-num-seqs", "by promise", "by age"):
        table.add_column(name, justify="right")
    chosen = tuning.chosen

    def row(each: Carried, age: str) -> None:
        setting = each.setting
        style = "bold" if setting == chosen else None
        table.add_row(
            str(setting.max_num_batched_tokens), str(setting.max_num_seqs), f"{each.rate:.3g}", age, style=style
        )

    for each in tuning.seats:
        row(each, "")
    table.add_section()
    for each, by_age in zip(tuning.budgets, tuning.budgets_by_age, strict=True):
        row(each, f"{by_age.rate:.3g}")
    show(table)


def _print_chosen(
    tuning: Tuning, calibration: Calibration, settings: dict[str, Any], load: WorkloadFlags, headroom: float
) -> None:
    for reason in reasons(tuning, calibration):
        print(reason)
    flags = _serve_flags(tuning, settings)
    print(f"\nsplitfuse serve {shlex.join(flags)}")
    again = ""
    if tuning.clients:
        again = f"or {tuning.clients} clients that ask again at once ({tuning.clients_rate:.3g} requests/s), "
    what, whose = ("conversations", "turns") if load.turns is not None else ("requests", "requests")
    print(
        f"can promise {tuning.rate:.3g} {what}/s at random, {again}with {_load(load)}:\n"
        f"{100 * tuning.share:.4g} % of the {whose} are on time, if steps take at most {100 * headroom:.3g} % longer "
        "than they were timed, and scatter as they did"
    )


def _load(load: WorkloadFlags) -> str:
    if load.trace is not None:
        return f"the prompts and answers of {load.trace.name}"
    beginning = "" if load.prefix is None else f"{load.prefix} tokens that others share and "
    new = "new text of about" if load.turns is not None else "prompts of about"
    return f"{beginning}{new} {load.prompt or 512:.6g} tokens and answers of {load.generate or 64:.6g}"


def reasons(tuning: Tuning, calibration: Calibration) -> list[str]:
    """Why these settings, in sentences: what smaller and larger ones would give."""
    from splitfuse.simulator.tune import step_seconds

    def speed(tokens: int) -> float:
        return tokens / step_seconds(calibration, tokens)

    chosen = tuning.chosen
    by_budget = {each.setting.max_num_batched_tokens: each.rate for each in tuning.budgets}
    budget = chosen.max_num_batched_tokens
    own = by_budget[budget]
    parts = []
    less = max((tokens for tokens in by_budget if tokens < budget), default=None)
    if less is not None:
        compared = _compared(speed(less), speed(budget))
        parts.append(f"steps of {less} compute {compared} and {_worth(by_budget[less], own)}")
    more = min((tokens for tokens in by_budget if tokens > budget), default=None)
    if more is not None:
        compared = _compared(speed(more), speed(budget))
        takes = f"take {1e3 * step_seconds(calibration, more):.3g} ms"
        promised = "" if tuning.itl is None else f" of the {tuning.itl} promised"
        worth = _worth(by_budget[more], own)
        parts.append(f"steps of {more} compute {compared}, {takes}{promised} and {worth}")
    said = [f"--max-num-batched-tokens {budget}: {'; '.join(parts) or 'no other was tried'}"]
    by_seats = {each.setting.max_num_seqs: each.rate for each in tuning.seats}
    count = chosen.max_num_seqs
    neighbours = (
        max((n for n in by_seats if n < count), default=0),
        min((n for n in by_seats if n > count), default=0),
    )
    parts = [f"{other} {_worth(by_seats[other], by_seats[count])}" for other in neighbours if other]
    said.append(f"--max-num-seqs {count}: {', '.join(parts) or 'no other was tried'}")
    best = max(tuning.budgets_by_age, key=lambda each: each.rate)
    said.append(
        f"by age, without promises, at most {best.rate:.3g} requests/s would be on time "
        f"(--max-num-batched-tokens {best.setting.max_num_batched_tokens})"
    )
    return said


def _compared(speed: float, own: float) -> str:
    """Of tokens a second."""
    percent = round(100 * (speed / own - 1.0))
    if not percent:
        return "as many tokens a second"
    return f"{abs(percent)} % {'more' if percent > 0 else 'fewer'} tokens a second"


def _worth(rate: float, own: float) -> str:
    """What a setting that was not chosen would carry."""
    return "carry as much" if abs(rate - own) <= SAME * own else f"carry {rate:.3g} requests/s, not {own:.3g}"


def _serve_flags(tuning: Tuning, settings: dict[str, Any]) -> list[str]:
    """The model, what was given, what was chosen."""
    own = changed(settings) | {name: getattr(tuning.chosen, name) for name in CHOSEN}
    flags = [str(model)] if (model := own.pop("model", None)) else []
    for name, value in own.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags


def _measure(tuning: Tuning, settings: dict[str, Any], make_workload: MakeWorkload, *, progress: bool) -> None:
    """Drive the engine itself with what it should be able to promise; with less, while that is too much."""
    from splitfuse.bench import metrics
    from splitfuse.bench.measure import Loads
    from splitfuse.bench.measure import measure as drive
    from splitfuse.bench.target import EngineTarget
    from splitfuse.core.slo.targets import SloTargets
    from splitfuse.runtime.environment import environment_info

    settings = {**settings, **{name: getattr(tuning.chosen, name) for name in CHOSEN}}
    promised = EngineConfig.from_settings(settings).scheduler
    targets = SloTargets.parse(promised.ttft, promised.itl)
    rate = tuning.rate
    for _ in range(MEASUREMENTS):
        results = asyncio.run(
            drive(
                EngineTarget(settings),
                make_workload,
                Loads(rates=(rate,), repeat=1),
                system="measured",
                about=environment_info(),
                progress=progress,
            )
        )
        (point,) = results.points
        records = metrics.counted(point)
        kept = sum(metrics.meets_slo(record, targets) for record in records)
        print(f"measured at {rate:.3g} requests/s: {kept} of {len(records)} on time", flush=True)
        if kept >= tuning.share * len(records):
            return
        rate *= LESS
    print("the machine is slower than its cost model, or has other users: calibrate and measure it alone")
    raise typer.Exit(1)
