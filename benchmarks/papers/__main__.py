"""Simulate the figures of papers: `python -m benchmarks.papers`, or that with `splitwise`, `distserve`, `pensieve` or
`infinite-llm` for one of them.

With --keep FILE a run that is stopped goes on where it was. Results are in benchmarks/results/papers.md, sources and
licences of the figures in README.md of this folder.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.papers import distserve, infinite_llm, pensieve, splitwise
from benchmarks.papers.kept import Kept
from benchmarks.papers.tables import Table
from splitfuse.errors import SplitfuseError


def main() -> None:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--keep", type=Path, metavar="FILE", help="where figures are kept, and found again")
    parser = argparse.ArgumentParser(
        parents=[shared], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    papers = parser.add_subparsers(dest="paper")
    first = papers.add_parser("splitwise", parents=[shared], help="machines for the Azure code trace")
    first.add_argument("--machines", default=",".join(splitwise.PAPER), help="kinds of machines")
    first.add_argument("--cases", default=",".join(splitwise.CASES), help="models, each with its load")
    first.add_argument("--systems", default=",".join(splitwise.SYSTEMS), help="rows of the table")
    first.add_argument("--explain", action="store_true", help="instead: why the baseline's count is another")
    first.add_argument("--seconds", type=float, default=splitwise.SECONDS, help="length of the window")
    second = papers.add_parser("distserve", parents=[shared], help="requests/s for each GPU")
    second.add_argument("--workloads", default=",".join(distserve.WORKLOADS), help="rows of the table")
    second.add_argument("--requests", type=int, default=distserve.REQUESTS, help="requests that count at each load")
    second.add_argument(
        "--explain", action="store_true", help="instead: the rates with longer TTFT targets, and with more KV memory"
    )
    third = papers.add_parser("infinite-llm", parents=[shared], help="tokens/s with loans")
    third.add_argument("--networks", default=",".join(infinite_llm.SHAPES), help="a table for each")
    third.add_argument("--longest", default=",".join(map(str, infinite_llm.LONGEST)), help="rows of the table")
    third.add_argument("--requests", type=int, default=infinite_llm.REQUESTS, help="fewest requests")
    fourth = papers.add_parser("pensieve", parents=[shared], help="conversations/s, with KV kept and without")
    fourth.add_argument("--models", default=";".join(pensieve.models()), help="separated by semicolons")
    fourth.add_argument("--systems", default=",".join(pensieve.SYSTEMS), help="rows of the table")
    fourth.add_argument("--conversations", type=int, default=pensieve.CONVERSATIONS, help="that count at each load")
    arguments = parser.parse_args()
    began = time.process_time()
    try:
        tables = simulated(arguments.paper, arguments) if arguments.paper else all_papers(parser, arguments.keep)
    except SplitfuseError as error:
        parser.error(str(error))
    print()
    for table in tables:
        print(table, end="\n\n")
    print(f"simulated in {time.process_time() - began:.0f} s of one core")


def all_papers(parser: argparse.ArgumentParser, keep: Path | None) -> list[Table]:
    """Return the tables of all papers."""
    kept = [] if keep is None else ["--keep", str(keep)]
    return [
        table
        for paper in ("distserve", "infinite-llm", "splitwise", "pensieve")
        for table in simulated(paper, parser.parse_args([paper, *kept]))
    ]


def simulated(paper: str, arguments: argparse.Namespace) -> list[Table]:
    """Return the tables of a paper."""
    kept = Kept(arguments.keep)
    if paper == "splitwise":
        kinds, cases = arguments.machines.split(","), arguments.cases.split(",")
        if arguments.explain:
            return [
                splitwise.explain(kind, splitwise.CASES[case], splitwise.PAPER[kind][0], seconds=arguments.seconds)
                for case in cases
                for kind in kinds
            ]
        return [splitwise.run(kinds, cases, arguments.systems.split(","), seconds=arguments.seconds, kept=kept)]
    if paper == "infinite-llm":
        lengths = [int(each) for each in arguments.longest.split(",")]
        return infinite_llm.run(arguments.networks.split(","), lengths, requests=arguments.requests, kept=kept)
    if paper == "pensieve":
        names, systems = arguments.models.split(";"), arguments.systems.split(",")
        return [pensieve.run(names, systems, conversations=arguments.conversations, kept=kept)]
    search = distserve.Search(arguments.requests, kept)
    if arguments.explain:
        return [
            table
            for name in arguments.workloads.split(",")
            for table in (distserve.explain(name, search), distserve.explain_memory(name, search))
        ]
    return distserve.run(arguments.workloads.split(","), search)


if __name__ == "__main__":
    main()
