"""examples/demo.py: the answers, the steps and the accuracy that it prints."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[1] / "examples" / "demo.py"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "NUM_HELD_OUT", 2)
    return module


def test_the_demo_prints_answers_steps_and_accuracy(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    demo.console.file = None  # what capsys reads, not the file that was standard output at the import
    demo.main(None)
    printed = capsys.readouterr().out
    assert "10 of 10 right." in printed
    numbers = [int(number) for number in re.findall(r"^ *(\d+) [A-Ja-j]+·* \d+/64", printed, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 30
    assert re.search(r"2 right with the passage \(\S+ s\), 0 without it", printed)
