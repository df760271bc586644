"""`splitfuse simulate`: predict the results of a load from a cost model of the machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfuse.bench.workload import Loads
from splitfuse.cli.flags import changed, given, take, with_flags
from splitfuse.cli.loads import (
    SPEEDS,
    DiskSpeedFlag,
    MemorySpeedFlag,
    SloFlag,
    WorkloadFlags,
    check_writable,
    parse_speeds,
    take_loads,
)
from splitfuse.cli.tables import console, make_table, print_results
from splitfuse.config.engine import EngineConfig, change_settings
from splitfuse.core.kv.fetching import FIRST_BANDWIDTH
from splitfuse.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from splitfuse.bench.results import Results
    from splitfuse.recording.format import Recording
    from splitfuse.runtime.calibration import Calibration
    from splitfuse.simulator.deployment import SimulationConfig


@with_flags(also=(WorkloadFlags, Loads))
def simulate(
    cost_model: Annotated[
        Path | None,
        typer.Option(help="Cost model file (default: the one `calibrate` stored for the engine flags)."),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(help="Published machine instead, such as a100-70b (docs/simulator.md lists them)."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Results of `bench run`: simulate the same loads and report the errors.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Scheduling policy: splitfuse, prefill-first, orca or static.")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Number of engines that share the load.")] = None,
    repeat: Annotated[int, typer.Option(help="Repetitions of each load, with other requests.")] = 1,
    step_overhead: Annotated[float, typer.Option(help="Seconds between steps, in addition to the cost model.")] = 0.0,
    client_overhead: Annotated[float, typer.Option(help="Seconds from a client to the engine.")] = 0.0,
    kv_memory_speed: MemorySpeedFlag = FIRST_BANDWIDTH,
    kv_disk_speed: DiskSpeedFlag = FIRST_BANDWIDTH,
    out: Annotated[Path | None, typer.Option(help="Write all results to this JSON file, as `bench run` does.")] = None,
    label: Annotated[str | None, typer.Option(help="Name in legends.")] = None,
    slo: SloFlag = SPEEDS,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    **flags: Any,
) -> None:
    """Predict the results of a load: the scheduler and routing on a virtual clock, with a cost model.

    Table and results have the format of `bench run`. docs/simulator.md describes what is simulated and what is not.
    """
    from splitfuse.bench.recorded import recorded_results, step_ratios
    from splitfuse.bench.results import load as load_results
    from splitfuse.bench.results import save
    from splitfuse.recording.format import Recording, is_recording
    from splitfuse.runtime.environment import environment_info
    from splitfuse.simulator.deployment import Deployment, SimulationConfig
    from splitfuse.simulator.simulate import simulate as run
    from splitfuse.simulator.validate import compare, predict

    workload, speeds = take(WorkloadFlags, flags), parse_speeds(slo)
    if against is not None and (flags["clients"], flags["rate"], workload.trace) != (None, None, None):
        raise ConfigError("--against takes its loads from the results: leave out --clients, --rate and --trace")
    recording = None if workload.trace is None or not is_recording(workload.trace) else Recording.open(workload.trace)
    loads = take_loads(flags, workload.trace if recording is None else recording, repeat=repeat)
    check_writable(out)
    measured = None if against is None else load_results(against)
    settings = given(flags)
    if recording is not None:
        replayed, num_engines = _recorded_settings(recording)
        settings, replicas = change_settings(replayed, changed(settings)), num_engines if replicas is None else replicas
    if measured is not None:
        settings = change_settings(_measured_settings(measured), changed(settings))
        policy = policy or str(measured.about.get("policy", "splitfuse"))
        replicas = measured.replicas if replicas is None else replicas
    config = EngineConfig.from_settings(settings)
    targets = config.scheduler.targets
    simulation = SimulationConfig.of(
        known_calibration(config, cost_model, machine),
        config,
        policy=policy or "splitfuse",
        step_overhead=step_overhead,
        client_overhead=client_overhead,
        kv_memory_speed=kv_memory_speed,
        kv_disk_speed=kv_disk_speed,
    )
    deployment = Deployment.of(simulation, replicas=1 if replicas is None else replicas)
    about = environment_info()
    if measured is None:
        shown = not quiet and sys.stderr.isatty()
        system = label or _label(simulation, len(deployment.machines))
        results = run(deployment, workload.maker(recording), loads, system=system, about=about, progress=shown)
        if recording is not None:
            print_results(recorded_results(recording, prompt_speed=loads.prompt_speed), speeds, targets)
            _print_step_ratio(step_ratios(recording, simulation.calibration.cost))
    else:
        results = predict(deployment, measured, about=about)
    print_results(results, speeds, targets)
    _print_needed(results, simulation)
    if measured is not None:
        _print_comparisons(compare(measured, results))
    if out is not None:
        save(results, out)
        print(f"splitfuse: results written to {out}", file=sys.stderr)


def known_calibration(config: EngineConfig, file: Path | None, machine: str | None) -> Calibration:
    """Return the cost model of a file, a published machine, or the one stored for the engine.

    Raises ConfigError or CostModelError.
    """
    from splitfuse.runtime.calibration import load, load_cost_model
    from splitfuse.simulator.machines import MACHINES

    if file is not None and machine is not None:
        raise ConfigError("--cost-model and --machine are mutually exclusive")
    if file is not None:
        return load(file)
    if machine is None:
        kept = load_cost_model(config)
        print(f"splitfuse: {_provenance(kept)}", file=sys.stderr)
        return kept
    if machine not in MACHINES:
        known = did_you_mean(machine, MACHINES) or f"; use {' or '.join(MACHINES)}"
        raise ConfigError(f"unknown machine {machine!r}{known}")
    return MACHINES[machine]


def _provenance(calibration: Calibration) -> str:
    """Return when steps were timed and how well they fit, which all predictions depend on."""
    about, error = calibration.about, calibration.cost.error
    fit = "" if error is None else f", with errors of {error.median:.1%} (median) and {error.p95:.1%} (P95)"
    return f"cost model of {about.get('date', 'an unknown date')}{fit}; `splitfuse calibrate` times steps again"


def _measured_settings(measured: Results) -> dict[str, Any]:
    """Return the engine settings, if it was our engine in the process of the load."""
    settings = measured.about.get("engine", {})
    known = EngineConfig.setting_fields()
    return {name: value for name, value in settings.items() if name in known}


def _recorded_settings(recording: Recording) -> tuple[dict[str, Any], int]:
    """Return the settings of the engines of a recording with the size of their cache, and how many there were."""
    from splitfuse.recording.replay import Contents

    engines = Contents.of(recording).engines
    limits = next(iter(engines.values())).limits
    resolved = {"num_blocks": limits.num_blocks, "max_model_len": limits.max_model_len}
    settings = {**recording.header.settings, **resolved}
    settings.pop("kv_cache_memory_gib", None)  # resolved, too
    return settings, len(engines)


def _print_step_ratio(ratios: list[float]) -> None:
    """Say how well the cost model fits the steps of a recording, which a simulation of its requests depends on."""
    from splitfuse.bench.metrics import percentile

    if ratios:
        what = "the recorded steps took {:.2f} times as long as the cost model predicts (median; P95 {:.2f})"
        print(f"splitfuse: {what.format(percentile(ratios, 50), percentile(ratios, 95))}", file=sys.stderr)


def _label(simulation: SimulationConfig, replicas: int) -> str:
    parts = [f"{simulation.policy} on {simulation.calibration.name}, simulated"]
    parts.append(f"budget {simulation.budget.tokens}")
    if replicas > 1:
        parts.append(f"{replicas} replicas")
    return ", ".join(parts)


def _print_needed(results: Results, simulation: SimulationConfig) -> None:
    """Say how many replicas the arrivals of each open loop with an SLO need."""
    from splitfuse.simulator.simulate import needed

    for point in results.points:
        if point.rate is not None and (count := needed(point, simulation)) is not None:
            print(f"{point.rate:g} requests/s need {count} replica{'s' * (count > 1)} to be in time", file=sys.stderr)


def _print_comparisons(comparisons: list[Any]) -> None:
    from splitfuse.simulator.validate import mean_error

    rows = [
        (
            each.measured.load,
            f"{each.measured.throughput.mean:.3g}",
            f"{each.predicted.throughput.mean:.3g}",
            f"{each.throughput_error:+.1%}",
            f"{1e3 * each.measured.itl[95]:.3g}",
            f"{1e3 * each.predicted.itl[95]:.3g}",
            f"{each.itl_error:+.1%}",
        )
        for each in comparisons
    ]
    heads = ("load", "requests/s", "predicted", "error", "ITL P95 ms", "predicted", "error")
    console().print(make_table("measured and predicted", heads, rows))
    print(
        f"mean error over {len(comparisons)} loads: "
        f"throughput {mean_error([each.throughput_error for each in comparisons]):.1%}, "
        f"P95 ITL {mean_error([each.itl_error for each in comparisons]):.1%}"
    )
