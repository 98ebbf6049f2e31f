"""torchrun with two processes gives what one gives: hypotheses, views, training, evaluation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def launch(processes, *argv):
    """Run a script of ROOT on the demo in one or two processes; its output."""
    run = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
        "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*run, *map(str, argv)], cwd=ROOT, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(method, processes): folder} after ten steps of global batches of 61, uneven on purpose.

    Halves of a batch add up in another order. That stays at 1e-7 until it tips a choice, the
    class of a patch in a hard mask (Eq. 5) or a ReLU, which is a difference of 1e-4 at once; at a
    tenth of the demo's rate ten steps do not get that far.
    """
    folders = {}
    for method in ("reclip", "reclip++"):
        for processes in (1, 2):
            folder = tmp_path_factory.mktemp("runs") / f"{method}-{processes}"
            out = launch(processes, "reclip.py", "--method", method, "--out", folder,
                         "--batch", 61, "--epochs", 1, "--lr", 0.003)
            assert out.count("mIoU") == 1  # one process speaks
            folders[method, processes] = folder
    return folders


@pytest.mark.parametrize("method", ["reclip", "reclip++"])
def test_two_processes_make_the_same_files(runs, method):
    one, two = runs[method, 1], runs[method, 2]
    assert (one / "hypotheses.jsonl").read_bytes() == (two / "hypotheses.jsonl").read_bytes()
    assert np.array_equal(np.load(one / "views.npy"), np.load(two / "views.npy"))
    assert sorted(path.name for path in one.iterdir()) == sorted(p.name for p in two.iterdir())
    rows = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (one, two)]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] == [10]


def test_ten_steps_of_reclip_are_those_of_one_process(runs):
    one, two = (torch.load(runs["reclip", n] / "reclip.pt", weights_only=True) for n in (1, 2))
    assert one["step"] == two["step"] == 10
    steps = [part["momentum_buffer"] for part in one["optimizer"]["state"].values()]
    assert max(0.003 * part.abs().max() for part in steps) > 1e-4  # wrong gradients would show
    for name, value in one["state"].items():
        torch.testing.assert_close(two["state"][name], value, atol=1e-5, rtol=1e-5)
    losses = [json.loads((runs["reclip", n] / "log.jsonl").read_text())["loss"] for n in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_evaluation_in_two_processes_counts_each_image_once(runs, tmp_path):
    checkpoint = runs["reclip++", 1] / "reclip.pt"
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launch(processes, "evaluate.py", "--checkpoint", checkpoint, "--out", out, "--bias")
        results.append(json.loads((out / "results.json").read_text()))
    assert results[0] == results[1] and results[0]["rectified"]["images"] == 250


def test_a_student_is_taught_by_two_processes(runs, tmp_path):
    teacher = runs["reclip++", 1] / "reclip.pt"
    out = launch(2, "distill.py", "--teacher", teacher, "--out", tmp_path, "--batch", 61,
                 "--epochs", 1)
    assert out.count("mIoU: maskclip") == 1  # one process speaks
    checkpoint = torch.load(tmp_path / "distill.pt", weights_only=True)
    assert checkpoint["finished"] and checkpoint["step"] == 10
    assert not any(name.startswith("module.") for name in checkpoint["state"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["distilled"]["images"] == 250
