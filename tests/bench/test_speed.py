"""The list of commands that measure a machine: what it keeps, and where it goes on."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks.peers import serving
from benchmarks.speed import Stage, run_all, stages
from splitfuse.bench.results import Point, Results, save


def test_stages_are_run_until_each_has_its_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there"
    needs = f"import pathlib; print('again'); pathlib.Path({str(there)!r}).read_text()"
    todo = [Stage("prints", 1, ["-m", "platform"]), Stage("needs", 2, ["-c", needs]), Stage("long", 90, ["-c", ""])]
    assert not run_all(todo, tmp_path, minutes=60)
    printed = (tmp_path / "prints.txt").read_text()
    assert "commit" in printed and "Linux" in printed and "ended with 0 after" in printed
    assert "FileNotFoundError" in (tmp_path / "needs.failed").read_text() and not (tmp_path / "needs.txt").exists()
    assert "to be run again, 92 minutes at most: needs, long" in capfd.readouterr().err

    there.write_text("")
    assert run_all(todo, tmp_path, minutes=200)
    assert (tmp_path / "prints.txt").read_text() == printed  # which was not run again
    assert "again" in (tmp_path / "needs.txt").read_text() and not (tmp_path / "needs.failed").exists()


def test_stages_have_modules_that_are_there(tmp_path: Path) -> None:
    listed = stages(tmp_path)
    assert len({stage.name for stage in listed}) == len(listed)
    for stage in listed:
        assert stage.arguments[0] == "-m" and importlib.util.find_spec(stage.arguments[1]) is not None, stage


def test_serving_goes_on_with_its_own_points_alone(tmp_path: Path) -> None:
    path = tmp_path / "splitfuse.json"
    assert serving.kept_results(path) is None
    about = {"command": serving.COMMAND}
    results = Results("splitfuse", {}, (Point(4, None, (0.0, 1.0), (), repetition=1),), about=about)
    save(results, path)
    assert serving.kept_results(path) == results
    assert serving.is_measured(results, 4, 1)
    assert not serving.is_measured(results, 4, 0) and not serving.is_measured(results, 8, 1)
    save(Results("splitfuse", {}, (), about={"command": "another"}), path)
    with pytest.raises(SystemExit, match="another"):
        serving.kept_results(path)
    assert not serving.is_measured(None, 4, 1)
