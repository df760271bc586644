"""`splitfuse simulate`: predict what a load would give, from a cost model of the machine."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfuse.cli.flags import changed, given, with_flags
from splitfuse.cli.loads import LoadFlags, check_writable, parse_slas, print_table, save_results, show
from splitfuse.config import EngineConfig
from splitfuse.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from splitfuse.bench.results import Results
    from splitfuse.runtime.calibration import Calibration
    from splitfuse.simulator.simulate import Deployment


@with_flags(also={"Load": LoadFlags})
def simulate(
    model_of_cost: Annotated[
        Path | None, typer.Option(help="A cost model; left out, what `calibrate` has kept for the engine flags.")
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="Or a published machine: a100-70b is Llama-2 70B on four A100-80GB.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Measured results: predict the same loads, and tell the errors.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="How steps are composed: splitfuse, prefill-first, orca or static.")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Engines that share the load.")] = None,
    repeat: Annotated[int, typer.Option(help="Times that each load is simulated, with other requests.")] = 1,
    step_overhead: Annotated[float, typer.Option(help="Seconds between steps beyond the cost model's.")] = 0.0,
    client_overhead: Annotated[float, typer.Option(help="Seconds until a request has reached the engine.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Write everything there, as JSON, as `bench run` does.")] = None,
    label: Annotated[str | None, typer.Option(help="What to call it in legends.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    **flags: Any,
) -> None:
    """Predict what a load would give: our scheduler and routing on a virtual clock, with a cost model.

    The table and the results are those of `bench run`. docs/simulator.md says what is simulated and what is not.
    """
    from splitfuse.bench.results import load as load_results
    from splitfuse.runtime.environment import environment_info
    from splitfuse.simulator.simulate import simulate as run
    from splitfuse.simulator.validate import compare, predict

    load = LoadFlags.taken_from(flags)
    slas = parse_slas(load.sla)
    if out is not None:
        check_writable(out)
    measured = None if against is None else load_results(against)
    settings = given(flags)
    if measured is not None:
        settings = {**_measured_settings(measured), **changed(settings)}
    config = EngineConfig.from_settings(settings)
    simulated = deployment(
        known_calibration(config, model_of_cost, machine),
        config,
        policy=policy or _measured_policy(measured),
        replicas=replicas or (1 if measured is None else measured.replicas),
        step_overhead=step_overhead,
        client_overhead=client_overhead,
    )
    if measured is not None:
        if (load.clients, load.rate, load.trace) != (None, None, None):
            raise ConfigError("--against says which loads: leave --clients, --rate and --trace out")
        results = predict(simulated, measured, about=environment_info())
        print_table(results, slas)
        _print_comparisons(compare(measured, results))
    else:
        results = run(
            simulated,
            load.workload_maker(),
            load.loads(repeat=repeat),
            system=label or _label(simulated),
            about=environment_info(),
            progress=not quiet and sys.stderr.isatty(),
        )
        print_table(results, slas)
    if out is not None:
        save_results(results, out)
        print(f"splitfuse: {out} has every request's timings", file=sys.stderr)


def known_calibration(config: EngineConfig, file: Path | None, machine: str | None) -> Calibration:
    """Of a file, a published machine, or the one that is kept for the engine. Raises ConfigError or CostModelError."""
    from splitfuse.runtime.calibration import load, load_cost_model
    from splitfuse.simulator.machines import MACHINES

    if file is not None and machine is not None:
        raise ConfigError("--model-of-cost and --machine are two cost models: give one")
    if file is not None:
        return load(file)
    if machine is None:
        kept = load_cost_model(config)
        print(f"splitfuse: {_provenance(kept)}", file=sys.stderr)
        return kept
    if machine not in MACHINES:
        raise ConfigError(f"there is no published machine {machine!r}{did_you_mean(machine, MACHINES)}")
    return MACHINES[machine]


def _provenance(calibration: Calibration) -> str:
    """When steps were timed and how well they fit: what else is predicted stands on that."""
    about, error = calibration.about, calibration.cost.error
    fit = "" if error is None else f", off by {error.median:.1%} in the median and {error.p95:.1%} at P95"
    return f"with the cost model of {about.get('date', 'some day')}{fit}; `splitfuse calibrate` times passes again"


def deployment(
    calibration: Calibration,
    config: EngineConfig,
    *,
    policy: str = "splitfuse",
    replicas: int = 1,
    step_overhead: float = 0.0,
    client_overhead: float = 0.0,
) -> Deployment:
    """What the engine flags change of the calibrated engine."""
    from splitfuse.simulator.simulate import Deployment

    calibration = replace(
        calibration,
        num_blocks=config.cache.num_blocks or calibration.num_blocks,
        max_model_len=config.model.max_model_len or calibration.max_model_len,
    )
    return Deployment(
        calibration=calibration,
        scheduler=config.scheduler,
        policy=policy,
        replicas=replicas,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        step_overhead=step_overhead,
        client_overhead=client_overhead,
    )


def _measured_settings(measured: Results) -> dict[str, Any]:
    """The engine's, if it was ours in one process with the load."""
    settings = measured.about.get("engine", {})
    known = EngineConfig.setting_fields()
    return {name: value for name, value in settings.items() if name in known}


def _measured_policy(measured: Results | None) -> str:
    return "splitfuse" if measured is None else str(measured.about.get("policy", "splitfuse"))


def _label(deployment: Deployment) -> str:
    parts = [f"{deployment.policy} on {deployment.calibration.name}, simulated"]
    parts.append(f"budget {deployment.scheduler.max_num_batched_tokens}")
    if deployment.replicas > 1:
        parts.append(f"{deployment.replicas} replicas")
    return ", ".join(parts)


def _print_comparisons(comparisons: list[Any]) -> None:
    from rich.table import Table

    from splitfuse.simulator.validate import mean_error

    table = Table(title="measured and predicted", title_justify="left", header_style="bold")
    for name in ("load", "requests/s", "predicted", "error", "token P95 ms", "predicted", "error"):
        table.add_column(name, justify="right")
    for each in comparisons:
        table.add_row(
            each.measured.load,
            f"{each.measured.throughput.mean:.3g}",
            f"{each.predicted.throughput.mean:.3g}",
            f"{each.throughput_error:+.1%}",
            f"{1e3 * each.measured.gaps[95]:.3g}",
            f"{1e3 * each.predicted.gaps[95]:.3g}",
            f"{each.gap_error:+.1%}",
        )
    show(table)
    print(
        f"mean error over {len(comparisons)} loads: "
        f"throughput {mean_error([each.throughput_error for each in comparisons]):.1%}, "
        f"P95 token latency {mean_error([each.gap_error for each in comparisons]):.1%}"
    )
