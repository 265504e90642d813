"""The toy benchmark, as its user runs it."""

import json
import sys

from conftest import run

from toy.tasks import SIX_KINDS


def test_it_prints_a_table_and_writes_it(tmp_path):
    command = [sys.executable, "-m", "benchmarks.toy", "--limit", "2", "--steps", "4"]
    files = ["--json", str(tmp_path / "t.json"), "--out", str(tmp_path / "t.png")]
    done = run([*command, *files])
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "t.json").read_text())
    assert set(SIX_KINDS) < set(table["scores"]) and "six-kind overall" in table["scores"]
    assert all(kind in done.stdout for kind in table["scores"])
    assert (tmp_path / "t.png").exists()
