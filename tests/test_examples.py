"""The training examples end with the same weights: in a plain loop, with Lightning, and in two processes."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("torchvision")

EXAMPLES = Path(__file__).parent.parent / "examples"
Weights = dict[str, torch.Tensor]


def python(*arguments: str | Path, seconds: float = 300) -> None:
    """Run Python on the CPU, on one thread a process; fail with all that it wrote if it fails or takes too long."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    path = [str(EXAMPLES.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        written, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers, too
        written, _ = process.communicate()
        pytest.fail(f"{arguments} took more than {seconds} s:\n{written}")
    assert process.returncode == 0, written


OPTIONS = ("--steps", "2", "--size", "64", "--tile", "27")
"""Of the examples; the tile divides nothing."""


def train(folder: Path, script: str, *launcher: str) -> Weights:
    """What the example saves after two steps, as a command."""
    file = folder / "weights.pt"
    python(*launcher, EXAMPLES / script, *OPTIONS, "--save", file)
    weights: Weights = torch.load(file)
    return weights


def train_here(folder: Path, script: str, patch: pytest.MonkeyPatch) -> Weights:
    """The same in this process, which saves the time to start one."""
    file = folder / "weights.pt"
    patch.syspath_prepend(EXAMPLES)
    patch.setattr(sys, "argv", [script, *OPTIONS, "--save", str(file)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    weights: Weights = torch.load(file)
    return weights


def distance(one: Weights, other: Weights) -> float:
    assert list(one) == list(other)
    return torch.stack([(one[name].double() - other[name].double()).norm() for name in one]).norm().item()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return train(tmp_path_factory.mktemp("plain"), "train_plain.py")


@pytest.fixture(scope="module")
def covered(plain: Weights) -> float:
    """How far training has moved the weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        from textures import network
    untrained = network().state_dict()
    changed = {name for name, tensor in untrained.items() if not torch.equal(tensor, plain[name])}
    assert {"conv1.weight", "bn1.bias", "layer4.1.bn2.weight", "fc.weight"} <= changed
    assert not [name for name in changed if "running" in name]
    return distance(untrained, plain)


def test_lightning_trains_as_the_plain_loop_does(
    tmp_path: Path, plain: Weights, covered: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lightning")
    assert distance(train_here(tmp_path, "train_lightning.py", monkeypatch), plain) < 1e-6 * covered


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path, plain: Weights, covered: float) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    # float32, and Adam divides by gradients that are close to nothing.
    assert distance(train(tmp_path, "train_ddp.py", *torchrun), plain) < 1e-4 * covered
