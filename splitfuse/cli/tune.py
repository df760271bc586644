"""`splitfuse tune`: find the largest load that meets an SLO on this machine, and the settings for it."""

from __future__ import annotations

import asyncio
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfuse.cli.flags import changed, given, numbers, take, with_flags
from splitfuse.cli.loads import DiskSpeedFlag, MemorySpeedFlag, WorkloadFlags, check_writable, load_text, unit
from splitfuse.cli.simulate import known_calibration
from splitfuse.cli.tables import console, make_table
from splitfuse.config.engine import EngineConfig
from splitfuse.core.kv.fetching import FIRST_BANDWIDTH
from splitfuse.deploy import daemon
from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from splitfuse.bench.measure import MakeWorkload
    from splitfuse.runtime.calibration import Calibration
    from splitfuse.simulator.tune import CurvePoint, Sustained, Tuning

BAR = 32
"""Characters of the longest bar."""
CHOSEN = ("max_num_batched_tokens", "max_num_seqs")
"""Settings that are searched."""
MEASUREMENTS, LESS = 4, 0.8
"""Maximum number of loads that are measured, and each as a fraction of the one before."""


@with_flags(also=(WorkloadFlags,), without=CHOSEN)
def tune(
    slo_attainment: Annotated[float, typer.Option(help="Fraction of requests that must meet the targets.")] = 0.99,
    headroom: Annotated[float, typer.Option(help="Margin on the timed steps, as a fraction of their time.")] = 0.1,
    max_num_batched_tokens: Annotated[
        str | None, typer.Option(help="Candidates, such as 64,128 (default: 32 to 1024).")
    ] = None,
    max_num_seqs: Annotated[str | None, typer.Option(help="Candidates, such as 16,32 (default: 8 to 64).")] = None,
    requests: Annotated[
        int, typer.Option(help="Requests that count at each simulated load; four times as many at the last.")
    ] = 200,
    cost_model: Annotated[
        Path | None, typer.Option(help="Cost model file (default: this machine's, which is timed if necessary).")
    ] = None,
    machine: Annotated[str | None, typer.Option(help="Published machine instead, such as a100-70b.")] = None,
    measure: Annotated[bool, typer.Option(help="Measure the result on the engine, too.")] = False,
    place: Annotated[
        int | None,
        typer.Option(help="Find the placement of engines on so many machines instead: prompts apart, or not."),
    ] = None,
    tensor_parallel: Annotated[
        str, typer.Option(help="Numbers of machines that an engine of --place may be spread over, such as 1,2.")
    ] = "1",
    meeting_time: Annotated[
        float | None,
        typer.Option(help="Seconds of a step in which machines of one engine wait for each other (default: 0.001)."),
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(help="Bytes/s of a machine's connection, over which KV is handed over, such as 25e9."),
    ] = None,
    kv_bytes_per_token: Annotated[
        float | None, typer.Option(help="Size of the KV of a token (default: the cost model's).")
    ] = None,
    kv_memory_speed: MemorySpeedFlag = FIRST_BANDWIDTH,
    kv_disk_speed: DiskSpeedFlag = FIRST_BANDWIDTH,
    out: Annotated[Path | None, typer.Option(help="Write all results to this JSON file.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    **flags: Any,
) -> None:
    """Find the largest load that meets --ttft, --itl and --tpot on this machine, and the settings for it.

    Steps are timed once (as `calibrate` does), loads are simulated. docs/slo.md has an example.
    """
    from tqdm import tqdm

    from splitfuse.cli.place import find_placement, read_space
    from splitfuse.engine.calibrate import load_or_time
    from splitfuse.simulator.deployment import SimulationConfig, refuse_drafts, refuse_tiers
    from splitfuse.simulator.tune import BUDGETS, MAX_NUM_SEQS, NO_TARGETS, curve
    from splitfuse.simulator.tune import tune as find

    load = take(WorkloadFlags, flags)
    make_workload = load.maker()
    settings = given(flags)
    if not 0 <= headroom < float("inf"):
        raise ConfigError(f"--headroom {headroom} must be a fraction, at least 0, such as 0.1")
    if measure and (machine is not None or cost_model is not None):
        raise ConfigError("--measure runs on this machine: leave out --machine and --cost-model")
    budgets = numbers("max_num_batched_tokens", max_num_batched_tokens, int)
    seqs = numbers("max_num_seqs", max_num_seqs, int)
    space = None
    if place is not None:
        space = read_space(place, budgets, tensor_parallel, meeting_time, link)
        if measure or len(seqs) > 1:
            raise ConfigError("--place is simulated, with one --max-num-seqs: leave out --measure and other candidates")
    elif (link, tensor_parallel, meeting_time) != (None, "1", None):
        raise ConfigError("--link, --tensor-parallel and --meeting-time are for --place")
    check_writable(out)
    config = EngineConfig.from_settings(settings)
    if not config.scheduler.has_targets:
        raise ConfigError(NO_TARGETS)
    refuse_drafts(config.scheduler)  # before steps are timed
    if space is not None:
        refuse_tiers(config.cache)
    elif kv_bytes_per_token is not None and not config.cache.has_tiers:
        raise ConfigError("--kv-bytes-per-token is for --place, --kv-memory-tier and --kv-disk-tier")
    shown = not quiet and sys.stderr.isatty()
    if cost_model is None and machine is None:
        print("splitfuse: timing steps for about 20 s, unless a cost model is stored", file=sys.stderr)
        calibration = load_or_time(config, seconds=20.0, progress=shown)
    else:
        calibration = known_calibration(config, cost_model, machine)
    slower = replace(calibration, cost=calibration.cost.slower(1.0 + headroom))
    speeds = {"kv_memory_speed": kv_memory_speed, "kv_disk_speed": kv_disk_speed}
    if kv_bytes_per_token is not None:
        slower = replace(slower, kv_bytes_per_token=kv_bytes_per_token)
    if space is not None:
        if seqs:
            config = replace(config, scheduler=replace(config.scheduler, max_num_seqs=seqs[0]))
        engine = SimulationConfig.of(slower, config, **speeds)
        found = find_placement(engine, make_workload, space, load, slo_attainment, requests, progress=shown)
        if out is not None:
            _write(out, found)
        return
    budgets = budgets or BUDGETS
    measured = curve(calibration, budgets)
    _print_curve(calibration, measured)
    seqs = seqs or MAX_NUM_SEQS
    _print_attainable(calibration, config, max_num_seqs=max(1, *seqs), max_num_batched_tokens=max(1, *budgets))
    with tqdm(desc="simulated loads", unit="load", disable=not shown) as bar:
        tuning = find(
            SimulationConfig.of(slower, config, **speeds),
            make_workload,
            attainment=slo_attainment,
            requests=requests,
            budgets=budgets,
            max_num_seqs=seqs,
            on_trial=lambda: bar.update() and None,
        )
    _print_candidates(tuning, measured, load)
    _print_chosen(tuning, settings, load, headroom)
    if out is not None:
        _write(out, {"curve": measured, "tuning": tuning})
    if measure:
        _measure(tuning, settings, make_workload, progress=shown)


def _write(path: Path, results: Any) -> None:
    import msgspec

    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))
    print(f"splitfuse: results written to {path}", file=sys.stderr)


def _print_curve(calibration: Calibration, points: list[CurvePoint]) -> None:
    fastest = max(point.tokens_per_second for point in points)
    rows = [
        (
            str(point.tokens),
            "" if point.measured is None else f"{1e3 * point.measured:.3g}",
            f"{1e3 * point.predicted:.3g}",
            f"{point.tokens_per_second:.0f}",
            "█" * round(BAR * point.tokens_per_second / fastest),
        )
        for point in points
    ]
    heads = ("tokens", "measured ms", "fit ms", "tokens/s", "")
    console().print(make_table(f"a step of {calibration.name}", heads, rows, left=[""]))
    if (error := calibration.cost.error) is not None:
        print(f"error of the fit over held-out steps: median {error.median:.1%}, P95 {error.p95:.1%}")


def _print_attainable(
    calibration: Calibration, config: EngineConfig, *, max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    """Print what the machine can keep of the SLO with the largest settings, before loads are simulated."""
    from splitfuse.core.slo.attainable import attainable
    from splitfuse.core.slo.targets import SloTargets

    found = attainable(
        calibration.cost,
        SloTargets.parse(**config.scheduler.targets),
        max_num_seqs=max_num_seqs,
        max_model_len=config.model.max_model_len or calibration.max_model_len,
        kv_tokens=(config.cache.num_blocks or calibration.num_blocks) * calibration.block_size,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    assert found is not None, "there are targets"
    print(found, flush=True)


def _print_candidates(tuning: Tuning, points: list[CurvePoint], load: WorkloadFlags) -> None:
    """Print what each candidate sustains, and the step that its token budget allows."""
    steps = {point.tokens: point for point in points}

    def row(each: Sustained, fcfs: str = "") -> tuple[str, ...]:
        setting = each.setting
        step = steps[setting.token_budget]
        marked = f"{each.rate:.3g}{' *' if setting == tuning.chosen else ''}"
        speed = f"{step.tokens_per_second:.0f}"
        return str(step.tokens), f"{1e3 * step.seconds:.3g}", speed, str(setting.max_num_seqs), marked, fcfs

    rows = [row(each) for each in tuning.max_num_seqs]
    rows += [row(each, f"{fcfs.rate:.3g}") for each, fcfs in zip(tuning.budgets, tuning.budgets_fcfs, strict=True)]
    heads = ("max-num-batched-tokens", "step ms", "tokens/s", "max-num-seqs", "SLO scheduling", "FCFS")
    title = f"{unit(load)}/s at {100 * tuning.attainment:.4g} % SLO attainment (* is chosen)"
    console().print(make_table(title, heads, rows))


def _print_chosen(tuning: Tuning, settings: dict[str, Any], load: WorkloadFlags, headroom: float) -> None:
    own = changed(settings) | {name: getattr(tuning.chosen, name) for name in CHOSEN}
    model = own.pop("model", None)
    print(f"\nsplitfuse serve {shlex.join([*([str(model)] if model else []), *daemon.flags_of(own)])}")
    closed = ""
    if tuning.clients:
        closed = f"or {tuning.clients} clients in a closed loop ({tuning.clients_rate:.3g} requests/s), "
    print(
        f"sustains {tuning.rate:.3g} {unit(load)}/s (Poisson), {closed}with {load_text(load)}\n"
        f"at {100 * tuning.attainment:.4g} % SLO attainment (of four times as many requests as in the table), "
        f"if steps take at most {100 * headroom:.3g} % longer than they were timed, with the same noise"
    )


def _measure(tuning: Tuning, settings: dict[str, Any], make_workload: MakeWorkload, *, progress: bool) -> None:
    """Measure the engine with the load that was found; with smaller ones while SLO attainment is too low."""
    from splitfuse.bench import metrics
    from splitfuse.bench.measure import measure as drive
    from splitfuse.bench.target import EngineTarget
    from splitfuse.bench.workload import Loads
    from splitfuse.core.slo.targets import SloTargets
    from splitfuse.runtime.environment import environment_info

    chosen = {name: getattr(tuning.chosen, name) for name in CHOSEN}
    config = EngineConfig.from_settings({**settings, **chosen})
    targets = SloTargets.parse(**config.scheduler.targets)
    rate = tuning.rate
    for _ in range(MEASUREMENTS):
        loads, about = Loads(rate=(rate,), repeat=1), environment_info()
        target = EngineTarget(config)
        results = asyncio.run(drive(target, make_workload, loads, system="measured", about=about, progress=progress))
        (point,) = results.points
        records = metrics.counted(point)
        met = sum(metrics.meets_slo(record, targets) for record in records)
        print(f"measured at {rate:.3g} requests/s: {met} of {len(records)} met the SLO", flush=True)
        if met >= tuning.attainment * len(records):
            return
        rate *= LESS
    print("the machine is slower than its cost model, or busy: calibrate and measure it while idle")
    raise typer.Exit(1)
