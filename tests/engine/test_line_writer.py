"""Lines reach a stream in order, and one that is full, slow or closed holds up nothing."""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest
from patience import PATIENCE

from splitfuse.engine.line_writer import MAX_QUEUED_BYTES, LineWriter

LINE = "x" * 1023 + "\n"
NEVER = 0.0  # seconds to wait for what does not come


@contextmanager
def pipe(*, encoding: str = "utf-8") -> Iterator[tuple[int, TextIO]]:
    """The end to read, and the stream to write."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding=encoding) as stream:
        try:
            yield reader, stream
        finally:
            os.close(reader)


def read_all(fd: int, into: list[bytes]) -> threading.Thread:
    def read() -> None:
        while data := os.read(fd, 65536):
            into.append(data)

    thread = threading.Thread(target=read)
    thread.start()
    return thread


@pytest.mark.parametrize("blocking", [True, False])
def test_a_pipe_that_nothing_reads_drops_lines_and_counts(blocking: bool) -> None:
    with pipe() as (reader, stream):
        os.set_blocking(stream.fileno(), blocking)
        writer = LineWriter(stream)
        for _ in range(2 * MAX_QUEUED_BYTES // len(LINE)):
            writer.write(LINE)
        writer.close(NEVER)  # returns though the thread waits
        assert 0 < (dropped := writer.num_dropped) <= MAX_QUEUED_BYTES // len(LINE)
        received: list[bytes] = []
        thread = read_all(reader, received)
        writer.close(60.0)
        stream.close()
        thread.join()
        lines = b"".join(received).decode().splitlines()
        notes = [line for line in lines if line.startswith("warning: ")]
        assert sum(int(note.split()[1]) for note in notes) == writer.num_dropped == dropped
        assert lines.count(LINE.rstrip()) == len(lines) - len(notes) == 2 * MAX_QUEUED_BYTES // len(LINE) - dropped


def test_lines_come_whole_and_in_order_from_threads(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream, LineWriter(stream) as writer:
        threads = [
            threading.Thread(target=lambda n=n: [writer.write(f"{n} {i}\n") for i in range(500)]) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 2000
    for n in range(4):
        assert [line for line in lines if line.startswith(f"{n} ")] == [f"{n} {i}" for i in range(500)]


def test_a_huge_line_is_written() -> None:
    with pipe() as (reader, stream):
        received: list[bytes] = []
        thread = read_all(reader, received)
        with LineWriter(stream) as writer:
            writer.write("y" * (2 * MAX_QUEUED_BYTES) + "\n")
            writer.close(60.0)
        stream.close()
        thread.join()
        assert sum(map(len, received)) == 2 * MAX_QUEUED_BYTES + 1 and writer.num_dropped == 0


class Failing(io.StringIO):
    """A stream on a disk that is full, until `works` is set."""

    works = False

    def write(self, text: str) -> int:
        if not self.works:
            raise OSError(28, "no space left on device")
        return super().write(text)


def test_a_full_disk_loses_lines_and_says_so_later() -> None:
    stream = Failing()
    writer = LineWriter(stream)
    writer.write("lost\n")
    while not writer.num_dropped:
        threading.Event().wait(0.001)
    stream.works = True
    writer.write("kept\n")
    writer.close(60.0)
    assert stream.getvalue().splitlines()[0] == "kept" and "1 lines were dropped" in stream.getvalue()


def test_a_reader_that_has_gone_and_a_closed_stream_raise_nothing() -> None:
    with pipe() as (reader, stream):
        os.dup2(os.open(os.devnull, os.O_RDONLY), reader)
        with LineWriter(stream) as writer:
            writer.write("lost\n")
        assert writer.num_dropped == 1
    closed = io.StringIO()
    closed.close()
    with LineWriter(closed) as writer:
        writer.write("lost\n")
    assert writer.num_dropped == 1


def test_characters_beyond_the_encoding_are_escaped() -> None:
    with pipe(encoding="latin-1") as (reader, stream):
        with LineWriter(stream) as writer:
            writer.write("é 中 \ud800\n")
        assert os.read(reader, 100) == b"\xe9 \\u4e2d \\ud800\n"


def test_a_process_ends_while_its_log_is_stuck() -> None:
    code = """
import sys
from splitfuse.engine.line_writer import LineWriter
with LineWriter(sys.stdout) as out:
    for _ in range(300):
        out.write("x" * 1023 + chr(10))
    out.close(0.0)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.wait(PATIENCE) == 0
