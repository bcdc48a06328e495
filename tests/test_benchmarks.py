"""The benchmark command at a tiny size: what it writes, and what it counts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
FIGURES = {"seconds", "peak_bytes", "flops", "live_bytes", "held_bytes"}


def python(script: str, *arguments: str) -> str:
    """Run a script of the benchmarks on the CPU, on one thread; what it prints."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def bench(folder: Path, *arguments: str) -> dict[str, Any]:
    python("compare.py", "--models", "notebook", "--repeats", "1", "--output", str(folder), *arguments)
    return json.loads((folder / "bench.json").read_text())


@pytest.mark.slow
def test_a_streamed_case_is_counted() -> None:
    case = {"model": "notebook", "size": 96, "mode": "training", "way": "fxstream", "tile": 32}
    counted = json.loads(python("measure.py", "counted", json.dumps(case)))
    assert all(counted[key] > 0 for key in ("flops", "live_bytes", "held_bytes"))


@pytest.mark.slow
def test_training(tmp_path: Path) -> None:
    found = bench(tmp_path, "--sizes", "160", "--tiles", "32", "--ways", "conventional", "fxstream", "budgeted")
    assert found["environment"]["threads"] == 1
    assert found["environment"]["variables"]["OMP_NUM_THREADS"] == "1"
    assert {"torch", "lightstream"} <= set(found["environment"]["versions"])
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    plain, streamed, budgeted = found["cases"]
    labels = ["conventional", "fxstream, tile 32", "budgeted, tile 32"]
    assert [case["label"] for case in found["cases"]] == labels
    for case in found["cases"]:
        assert case["status"] == "ok", case["note"]
        assert all(case[key] > 0 for key in FIGURES)
        assert case["ratios"] == {key: case[key] / plain[key] for key in FIGURES}
    assert streamed["compared"]["error"] < 1e-10
    assert streamed["compared"]["untrained"] == 0
    assert budgeted["flops"] == plain["flops"]
    case = {"model": "notebook", "size": 160, "mode": "inference", "way": "conventional"}
    forward = json.loads(python("measure.py", "counted", json.dumps(case)))
    assert forward["held_bytes"] is None
    assert plain["flops"] < streamed["flops"] <= plain["flops"] + forward["flops"]
    assert streamed["held_bytes"] < 0.2 * plain["held_bytes"]
    assert streamed["live_bytes"] < 0.5 * plain["live_bytes"]


@pytest.mark.slow
def test_a_case_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    if importlib.util.find_spec("lightstream") is None:
        pytest.skip("lightstream is not installed")
    arguments = ["--sizes", "160", "--tiles", "32", "128", "--ways", "lightstream", "conventional"]
    small, large, plain = bench(tmp_path, *arguments)["cases"]
    assert small["status"] == "failed"
    assert "smaller than the receptive field, 36" in small["note"]
    assert small["seconds"] is None
    assert [large["status"], plain["status"]] == ["ok", "ok"], large["note"]
    assert large["compared"]["error"] < 1e-10
    assert large["ratios"]["flops"] > 1


@pytest.mark.slow
def test_one_process_measures_with_and_without_autocast_and_survives_a_failure(tmp_path: Path) -> None:
    arguments = ["--shared", "--unchecked", "--steps", "2", "--count-up-to", "0", "--image-on", "host"]
    arguments += ["--autocast", "none", "bfloat16", "--ways", "conventional", "fxstream", "--timeout", "60"]
    # The notebook's network has no padding, so the first size is too small for it.
    cases = bench(tmp_path, "--sizes", "30", "160", "--tiles", "24", *arguments)["cases"]
    assert [case["autocast"] for case in cases] == [None, None, "bfloat16", "bfloat16"] * 2
    for case in cases:
        assert case["image_on"] == "host"
        assert case["compared"] == {}
        assert case["status"] == ("failed" if case["size"] == 30 else "ok"), case["note"]
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line.get("seconds") for line in lines] == [case["seconds"] for case in cases]


@pytest.mark.slow
def test_the_overhead_of_a_tile(tmp_path: Path) -> None:
    arguments = ["--models", "unet", "--size", "64", "--repeats", "1", "--output", str(tmp_path)]
    assert "count as no kernel: alias" in python("overhead.py", *arguments)
    for row in json.loads((tmp_path / "overhead.json").read_text())["rows"]:
        assert row["tiles"] >= 4
        assert all(row[f"{kind}milliseconds"] > 0 for kind in ("", "first_", "plain_"))
        # Of 18 convolutions and 4 transposed ones, a tile runs each at most once; in training, at most twice.
        runs = 2 if row["mode"] == "training" else 1
        assert 0 < row["calls"]["convolution"] <= 22 * runs == row["plain_calls"]["convolution"]


@pytest.mark.slow
def test_the_work_that_a_memory_budget_saves(tmp_path: Path) -> None:
    """It falls from a whole forward pass to nothing, and what is kept stays within the budget."""
    arguments = ["--models", "notebook", "--size", "160", "--tile", "32", "--shares", "0.1", "0.3", "2"]
    assert "160 x 160 in tiles of 32" in python("budget.py", *arguments, "--output", str(tmp_path))
    (row,) = json.loads((tmp_path / "budget.json").read_text())["rows"]
    plain, steps = row["conventional"], row["streamed"]
    assert [*steps] == ["0", "0.1", "0.3", "2.0"]
    ratios = [step["flops"] / plain["flops"] for step in steps.values()]
    assert 1.3 < ratios[0] < 1.6
    assert sorted(set(ratios), reverse=True) == ratios
    assert ratios[-1] == pytest.approx(1, abs=0.02)
    for share, step in steps.items():
        assert step["held"] - steps["0"]["held"] <= float(share) * plain["held"]


@pytest.mark.slow
def test_the_table_of_models_says_by_which_door_they_get_in_and_where_streaming_ends() -> None:
    """One model streams up to its head, one is captured only by torch.compile, and one is refused."""
    pytest.importorskip("timm")
    pytest.importorskip("monai")
    options = ["--packages", "monai", "timm", "--only", "DynUNet, deep supervision, 2-D", "tnt:", "vgg:"]
    lines = [line.split(" | ") for line in python("models.py", *options).splitlines()]
    found = {line[0]: line[2:] for line in lines[:-1]}
    assert found["DynUNet, deep supervision, 2-D"][0::2] == ["compile", "100.0%"]
    assert found["vgg: vgg11"][0] == "convert"
    assert "pools over the whole image" in found["vgg: vgg11"][-1]
    assert found["tnt: tnt_s_patch16_224"][:3] == ["none", "nothing", "0%"]
    assert lines[-1] == ["2 of these 3 models get in by one of the doors"]
    checked = python("models.py", "--check", *options)
    assert checked.count(": exact by convert") == checked.count(": exact by compile") == 1
