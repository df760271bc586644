"""Simulate the figures of papers: `python -m benchmarks.papers splitwise`, `distserve`, `infinite-llm` or `pensieve`.

Results are in benchmarks/results/papers.md, sources and licences of the figures in README.md of this folder.
"""

from __future__ import annotations

import argparse
import time

from benchmarks.papers import distserve, infinite_llm, pensieve, splitwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    papers = parser.add_subparsers(dest="paper", required=True)
    first = papers.add_parser("splitwise", help="machines for the Azure code trace")
    first.add_argument("--machines", default=",".join(splitwise.PAPER), help="kinds of machines")
    first.add_argument("--systems", default=",".join(splitwise.SYSTEMS), help="rows of the table")
    first.add_argument("--rate", type=float, default=splitwise.RATE, help="requests/s")
    first.add_argument("--reading", default="ours", choices=splitwise.READINGS, help="as we read it, or they do")
    first.add_argument("--explain", action="store_true", help="instead: why the baseline's count is another")
    first.add_argument("--seconds", type=float, default=splitwise.SECONDS, help="length of the window")
    second = papers.add_parser("distserve", help="requests/s for each GPU")
    second.add_argument("--workloads", default=",".join(distserve.WORKLOADS), help="rows of the table")
    second.add_argument("--requests", type=int, default=distserve.REQUESTS, help="requests that count at each load")
    second.add_argument("--explain", action="store_true", help="instead: the rates with longer TTFT targets")
    third = papers.add_parser("infinite-llm", help="tokens/s with loans")
    third.add_argument("--longest", default=",".join(map(str, infinite_llm.LONGEST)), help="rows of the table")
    third.add_argument("--requests", type=int, default=infinite_llm.REQUESTS, help="requests that count")
    fourth = papers.add_parser("pensieve", help="conversations/s, with KV kept and without")
    fourth.add_argument("--models", default=";".join(pensieve.models()), help="separated by semicolons")
    fourth.add_argument("--limits", default=",".join(map(str, pensieve.LIMITS)), help="mean seconds for a token")
    fourth.add_argument("--conversations", type=int, default=pensieve.CONVERSATIONS, help="that count at each load")
    arguments = parser.parse_args()
    began = time.process_time()
    if arguments.paper == "splitwise":
        names = arguments.machines.split(","), arguments.systems.split(",")
        load = {"rate": arguments.rate, "seconds": arguments.seconds}
        if arguments.explain:
            for name in names[0]:
                print(splitwise.explain(name, splitwise.PAPER[name][0], **load))
        else:
            print(splitwise.run(*names, **load, reading=splitwise.READINGS[arguments.reading]))
    elif arguments.paper == "infinite-llm":
        lengths = [int(each) for each in arguments.longest.split(",")]
        print(infinite_llm.run(lengths, requests=arguments.requests), end="\n\n")
    elif arguments.paper == "pensieve":
        limits = [float(each) for each in arguments.limits.split(",")]
        print(pensieve.run(arguments.models.split(";"), limits, conversations=arguments.conversations))
    elif arguments.explain:
        for name in arguments.workloads.split(","):
            print(distserve.explain(name, requests=arguments.requests), end="\n\n")
    else:
        for table in distserve.run(arguments.workloads.split(","), requests=arguments.requests):
            print(table, end="\n\n")
    print(f"simulated in {time.process_time() - began:.0f} s of one core")


if __name__ == "__main__":
    main()
