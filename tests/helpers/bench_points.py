"""Results with known figures, for the tests of tables and reports."""

from splitfuse.bench.results import MeasuredRequest, Point, Results


def point(clients: int, seconds: float, *, repetition: int = 0) -> Point:
    """Clients that are answered every `seconds`, with two tokens."""
    records = tuple(
        MeasuredRequest(client, i * seconds, 512, (i * seconds + seconds / 4, (i + 0.99) * seconds))
        for client in range(clients)
        for i in range(10)
    )
    return Point(clients, None, (2 * seconds, 8 * seconds), records, repetition)


RESULTS = Results(
    "splitfuse int8",
    {"kind": "independent", "prompt": 512.0, "generate": 64.0, "deviation": 0.3, "seed": 0},
    (point(8, 2.0), point(2, 1.0), point(8, 4.0, repetition=1), point(2, 1.0, repetition=1)),
    about={"command": "splitfuse bench run", "startup_seconds": 2.0, "resident_bytes": 10**9},
)
