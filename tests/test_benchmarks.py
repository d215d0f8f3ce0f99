"""The benchmarks run, and their report says what they measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def run(*command) -> str:
    command = [sys.executable, *map(str, command)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("op", sorted(path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py")))
def test_benchmark_runs_and_reports(op, tmp_path):
    run("-m", "pytest", f"benchmarks/bench_{op}.py", "--quick", f"--benchmark-json={tmp_path}/saved.json")
    printed = run("benchmarks/report.py", tmp_path / "saved.json", tmp_path)
    found = json.loads((tmp_path / f"{op}.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"saved.json", f"{op}.json", f"{op}.md", f"{op}.png"}
    for case in found["cases"]:
        for low, median, high in case["seconds"].values():
            assert 0 < low <= median <= high
        for name, (low, median, high) in case["ratio"].items():
            assert low <= median <= high
            assert case["seconds"][name][0] / case["seconds"]["sslfast"][2] <= high * 1.01
    assert "| sslfast |" in printed
    assert found["cpu"] in printed


def test_times_of_a_device_are_printed():
    """On the CPU, where there is no other device: what `make test-cuda` runs last."""
    printed = run("benchmarks/cuda_times.py", "--device", "cpu", "--quick")
    assert "| batch | dim | dtype | sslfast | kernels | lightly | F.cross_entropy |" in printed
    assert "| size | images | sslfast | kernels | kornia |" in printed
    source = (ROOT / "benchmarks/cuda_times.py").read_text()
    assert all(f"\ndef {path.stem}(" in source for path in (ROOT / "csrc/ops").glob("*.h"))
    for title in ("MoCo's loss", "CLIP's loss", "SigLIP's loss", "Diffusion", "Group normalisation", "Four rotations"):
        assert title in printed


def test_a_case_where_ours_loses_is_marked(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import report
    finally:
        sys.path.pop(0)
    case = {"case": {"batch": 8}, "headline": True, "extra_bytes": {}, "seconds": {}, "ratio": {}}
    case["seconds"] = {"sslfast": [2e-3] * 3, "peer": [1e-3] * 3}
    case["ratio"] = {"peer": [0.5] * 3}
    assert "| 8 | 2 ms | 1 ms, **slower:** 0.5× (0.5–0.5) |" in report.table({"cases": [case]})
