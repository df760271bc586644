"""Try thousands of broken and hostile model folders: `python -m tests.soak.folder_mutations [--count N] [--seed N]`.

Each must load with transformers' own tokens, or be refused in a sentence within 5 s of computing time and 500 MB.
Prints each one that does neither, with its seed, and a summary; `--only SEED` tries one and says what became of it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from folder_mutations import Bases, Verdict, check, mutate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="of the first one; the others count on")
    parser.add_argument("--only", type=int, help="try this seed alone")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="mutations-"))
    bases = Bases(root / "bases")
    first, count = (arguments.seed, arguments.count) if arguments.only is None else (arguments.only, 1)
    verdicts: list[Verdict] = []
    for seed in range(first, first + count):
        what = mutate(bases, root / "model", seed)
        verdict = check(root / "model")
        shutil.rmtree(root / "model")
        verdicts.append(verdict)
        if verdict.fault is not None or arguments.only is not None:
            print(
                f"seed {seed}: {what}\n  {verdict.fault}: {verdict.kind}, {verdict.oracle}, {verdict.seconds:.1f} s, "
                f"{verdict.mebibytes:.0f} MiB: {verdict.words}",
                flush=True,
            )
        if len(verdicts) % 250 == 0:
            print(_summary(verdicts), flush=True)
    print(_summary(verdicts))
    shutil.rmtree(root)
    sys.exit(any(verdict.fault is not None for verdict in verdicts))


def _summary(verdicts: list[Verdict]) -> str:
    counts = Counter((verdict.kind, verdict.oracle) for verdict in verdicts)
    refused = [verdict for verdict in verdicts if verdict.kind == "refused"]
    lines = [f"{len(verdicts)} folders, {sum(verdict.fault is not None for verdict in verdicts)} at fault"]
    lines += [f"  {number:6} {kind}, transformers: {oracle}" for (kind, oracle), number in sorted(counts.items())]
    if refused:
        seconds, memory = (max(getattr(each, name) for each in refused) for name in ("seconds", "mebibytes"))
        lines.append(f"  refused within {seconds:.2f} s of computing time and {memory:.0f} MiB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
