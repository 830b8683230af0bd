"""Every loop of `examples/loops` is short enough to be read at once, runs, and trains."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOOPS = sorted((ROOT / "examples" / "loops").glob("*.py"))
MAX_LINES = 60

every_loop = pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)


def test_there_are_loops():
    assert len(LOOPS) >= 8


@every_loop
def test_a_loop_is_short_and_linked(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert f"(examples/loops/{path.name})" in (ROOT / "README.md").read_text()


@every_loop
def test_a_loop_trains(path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(path), "--smoke"])
    runpy.run_path(str(path), run_name="__main__")
    accuracy = re.search(r"test accuracy (\d\.\d+)", capsys.readouterr().out)
    assert float(accuracy[1]) > 0.85
