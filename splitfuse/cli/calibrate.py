"""`splitfuse calibrate`: time steps of a model on this machine, and store the cost model that fits them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfuse.cli.flags import given, with_flags
from splitfuse.cli.loads import check_writable
from splitfuse.cli.tables import console, make_table
from splitfuse.config.engine import EngineConfig

if TYPE_CHECKING:
    from splitfuse.core.slo.cost_model import CostModel
    from splitfuse.engine.calibrate import Timed


@with_flags()
def calibrate(
    seconds: Annotated[float, typer.Option(help="Approximate duration of the timing.")] = 20.0,
    out: Annotated[Path | None, typer.Option(help="Write the cost model to this file, too.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    **flags: Any,
) -> None:
    """Time steps of a model on this machine, fit a cost model, and store it for `simulate`, `tune` and SLO scheduling.

    It is stored in the cache folder, by model, machine, and the settings that change the time of a step.
    """
    from splitfuse.engine.calibrate import run_calibration
    from splitfuse.runtime.calibration import cache_path, save

    check_writable(out)
    config = EngineConfig.from_settings(given(flags))
    shown = not quiet and sys.stderr.isatty()
    calibration, checked = run_calibration(config, seconds=seconds, progress=shown)
    _print_checked(calibration.cost, checked)
    for path in (cache_path(calibration.identity), *([] if out is None else [out])):
        save(calibration, path)
        print(f"splitfuse: cost model written to {path}", file=sys.stderr)


def _print_checked(cost: CostModel, checked: list[Timed]) -> None:
    """Print the held-out steps, measured and predicted, the coefficients and the error."""
    rows = [
        (
            timed.case.name,
            str(timed.sample.features.tokens),
            str(timed.sample.features.rows),
            str(timed.sample.features.kv_tokens),
            f"{1e3 * timed.sample.seconds:.2f}",
            f"{1e3 * (predicted := cost.seconds(timed.sample.features)):.2f}",
            f"{predicted / timed.sample.seconds - 1.0:+.1%}",
        )
        for timed in checked
    ]
    heads = ("step", "tokens", "rows", "positions read", "measured ms", "predicted ms", "error")
    console().print(make_table("held-out steps", heads, rows, left=["step"]))
    print(
        f"a step takes {1e3 * cost.floor:.3g} ms, {1e3 * cost.per_token:.3g} ms/token, "
        f"{1e3 * (cost.per_token + cost.per_token_beyond):.3g} ms/token beyond {cost.knee:.0f},\n"
        f"{1e6 * cost.per_row:.3g} µs/row of logits, {1e6 * cost.per_request:.3g} µs/request, "
        f"{1e6 * cost.per_kv_token:.3g} µs/position read, {1e9 * cost.per_pair:.3g} ns/pair of query and key"
    )
    if cost.error is not None:
        print(
            f"error over {cost.error.num_samples} held-out steps: "
            f"median {cost.error.median:.1%}, P95 {cost.error.p95:.1%}; noise of equal steps {cost.noise:.1%}"
        )
