"""torchrun with two processes gives what one gives: hypotheses, views, training, evaluation."""

import pytest
import torch

from conftest import log, python, results


def launch(processes, *argv):
    """Run a script on the demo in one or two processes; its output."""
    torchrun = () if processes == 1 else (
        "-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", 0,
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")
    done = python(*torchrun, *argv, OMP_NUM_THREADS="1")
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
    for name in ("hypotheses.npy", "views.npy"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert [row["step"] for row in log(one)] == [row["step"] for row in log(two)] == [10]


def test_ten_steps_of_reclip_are_those_of_one_process(runs):
    one, two = (torch.load(runs["reclip", n] / "reclip.pt", weights_only=True) for n in (1, 2))
    assert one["step"] == two["step"] == 10
    steps = [part["momentum_buffer"] for part in one["optimizer"]["state"].values()]
    assert max(0.003 * part.abs().max() for part in steps) > 1e-4  # wrong gradients would show
    for name, value in one["state"].items():
        torch.testing.assert_close(two["state"][name], value, atol=1e-5, rtol=1e-5)
    losses = [log(runs["reclip", n])[0]["loss"] for n in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_evaluation_in_two_processes_counts_each_image_once(runs, tmp_path):
    checkpoint = runs["reclip++", 1] / "reclip.pt"
    one, two = tmp_path / "1", tmp_path / "2"
    for out in (one, two):
        launch(int(out.name), "evaluate.py", "--checkpoint", checkpoint, "--out", out, "--bias")
    assert results(one) == results(two) and results(one)["rectified"]["images"] == 250


def test_a_student_is_taught_by_two_processes(runs, tmp_path):
    teacher = runs["reclip++", 1] / "reclip.pt"
    out = launch(2, "distill.py", "--teacher", teacher, "--out", tmp_path, "--batch", 61,
                 "--epochs", 1)
    assert out.count("mIoU: maskclip") == 1  # one process speaks
    checkpoint = torch.load(tmp_path / "distill.pt", weights_only=True)
    assert checkpoint["finished"] and checkpoint["step"] == 10
    assert not any(name.startswith("module.") for name in checkpoint["state"])
    assert results(tmp_path)["distilled"]["images"] == 250
