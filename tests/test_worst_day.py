"""The worst day: killed at any moment, a full disk, two at once, Ctrl-C, a loss that explodes.

RECLIP_LONG=1 runs the long form: 20 kills in the middle of changing a file, instead of 3, 20 at
random moments, and the papers' tables as part of what is killed.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import distill
import evaluate
import reclip
import tables
from conftest import (LONG, REPOSITORY, SmallShapes, demo_command, few_tables, json_lines, learned,
                      raising, results, run, same, snapshot)
from run import Run, folder_lock, load_checkpoint

UNFINISHED = (".tmp", ".part", ".part0", ".done", ".lock")  # names that promise nothing


def pipeline(out, last=None):
    """All that writes files, one after the other; every step of training saves a checkpoint.

    last: the process kills itself in the middle of its `last`-th change of a file. Without, the
    number of changes is left in OUT.count.
    """
    torch.set_num_threads(1)
    changes = 0

    def counted(change, half):
        def wrapper(*args, **kwargs):
            nonlocal changes
            changes += 1
            if changes == last:
                half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)
        return wrapper

    def half_write(path, content, *_):
        with open(path, "wb") as file:
            file.write((content if isinstance(content, bytes) else content.encode())[:50])

    data.Shapes = SmallShapes
    Run.due = lambda run, epoch_ends: True
    os.replace = counted(os.replace, lambda *_: None)
    Path.unlink = counted(Path.unlink, lambda *_: None)
    for name in ("write_text", "write_bytes"):
        setattr(Path, name, counted(getattr(Path, name), half_write))
    torch.save = counted(torch.save, lambda _, path: half_write(path, b"PK" * 40))
    records = sys.modules["run"]  # written, and without their checksums
    records.checksums = counted(records.checksums, lambda *_: None)
    with open(os.devnull, "w") as sys.stdout:
        run(*demo_command(reclip, out), "--views", 2)
        run(*demo_command(distill, out))
        run(evaluate.main, "--checkpoint", out / "reclip.pt", "--bias")
        if LONG:
            few_tables(pytest.MonkeyPatch())
            run(tables.main, "--out", out / "tables", "--seeds", 0)
    if last is None:
        out.with_suffix(".count").open("w").write(str(changes))


def start(target, *arguments):
    """A process, forked from one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaluate", "tables", "conftest"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def finish(out):
    """Run the pipeline to its end; the seconds that takes."""
    began, process = time.monotonic(), start(pipeline, out)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, seconds) of an undisturbed run."""
    start(int).join()  # there is a process to fork from
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, finish(out)


def check_whole(out):
    """No file is half written under its final name."""
    for path in out.rglob("*"):
        if path.is_dir() or path.name.endswith(UNFINISHED):
            continue
        if path.suffix == ".pt":
            assert load_checkpoint(path)["state"]
        elif path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif path.suffix == ".jsonl":
            *lines, last = path.read_text("utf-8").split("\n")
            assert all(map(json.loads, lines))
            assert not last or path.name.startswith("log")  # it grows line by line
        elif path.suffix == ".npy":
            records = np.load(path)
            assert all(np.isfinite(records[name]).all() for name in records.dtype.names)
        elif path.suffix == ".md":
            assert path.read_text("utf-8").endswith("` |\n")  # the last command
        elif path.name not in ("log.txt", "command.txt"):
            assert path.suffix == ".png"
            data.read_image(path)


def result(out):
    """All that is made and does not tell the time or the place."""
    steps = [[row["step"] for row in json_lines(out / name)]
             for name in ("log.jsonl", "log-distill.jsonl")]
    names = ["results.json", "hypotheses.npy", "views.npy"]
    names += ["tables/tables.json", "tables/fig3.png"] * LONG
    checkpoints = [out / "reclip.pt", out / "distill.pt", *sorted(out.glob("tables/*/*.pt"))]
    return [steps, [(out / name).read_bytes() for name in names],
            [learned(path.parent, path.name) for path in checkpoints]]


def test_killed_in_the_middle_of_changing_a_file(whole, tmp_path):
    """A life ends in one change of those of an undisturbed run; the next one reaches the end."""
    count, out = int(whole[0].with_suffix(".count").read_text()), tmp_path / "run"
    assert count >= 40
    for last in random.Random(0).sample(range(1, count + 1), 20 if LONG else 3):
        shutil.rmtree(out, ignore_errors=True)
        process = start(pipeline, out, last)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        check_whole(out)
        finish(out)
        check_whole(out)
        assert same(result(out), result(whole[0])), last


@pytest.mark.skipif(not LONG, reason="long: runs with RECLIP_LONG=1")
def test_killed_at_random_moments(whole, tmp_path):
    draw, kills, rounds = random.Random(0), 0, 0
    while kills < 20:
        out = tmp_path / str(rounds)
        while True:  # lives until one reaches the end
            process = start(pipeline, out)
            process.join(whole[1] * draw.uniform(0.02, 0.7) if kills < 20 else None)
            process.kill()
            process.join()
            check_whole(out)
            if process.exitcode == 0:
                break
            kills += 1
        assert same(result(out), result(whole[0]))
        rounds += 1
    print(f"{kills} kills in {rounds} rounds, an undisturbed run takes {whole[1]:.1f} s")


@contextlib.contextmanager
def largest_file(size):
    """As if the disk were full: no file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


TRAIN = demo_command(reclip)
EVALUATE = (evaluate.main, "--checkpoint", "run/reclip.pt")


@pytest.mark.parametrize("what, gone, size, command", [
    ("hypotheses", ("hypotheses.npy", "views.npy", "reclip.pt"), 300, TRAIN),
    ("views", ("views.npy", "views.json", "reclip.pt"), 20_000, TRAIN),
    ("checkpoint", ("reclip.pt",), 20_000, TRAIN),
    ("log", ("reclip.pt", "log.jsonl"), 5, TRAIN),
    ("results", ("results.json",), 100, EVALUATE),
    ("results, there before", (), 100, (*EVALUATE, "--count-absent")),
    ("figures", (), 4_000, (*EVALUATE, "--figures")),
    ("pictures", (), 100, (*EVALUATE, "--images", "photos")),
    ("student", ("distill.pt",), 20_000, demo_command(distill)),
])
def test_full_disk(demo_copy, trained_demo, photos, mistake, what, gone, size, command):
    for name in gone:
        (demo_copy / name).unlink()
    before = snapshot("run")
    with largest_file(size):
        assert "cannot write" in mistake(*command)
    after = snapshot("run")
    may_change = ("log.jsonl", "log-distill.jsonl", *["results.json"] * (what == "figures"))
    for path, content in before.items():
        if not path.endswith((*UNFINISHED, *may_change)):
            assert after[path] == content, path
    check_whole(demo_copy)
    run(*command)  # with room again, it goes on
    assert same(learned(demo_copy), learned(trained_demo))
    assert same(learned(demo_copy, "distill.pt"), learned(trained_demo, "distill.pt"))


@pytest.fixture(params=[reclip, distill])
def job(request, demo_copy):
    """(script, command, checkpoint): a training whose checkpoint is missing in its folder."""
    path = demo_copy / f"{request.param.__name__}.pt"
    path.unlink()
    return request.param, demo_command(request.param), path


def test_a_second_process_is_refused(job, mistake):
    _, command, path = job
    hold = ("import fcntl, sys, time; file = open(sys.argv[1], 'w'); "
            "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", hold, path.with_name(".run.lock")],
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        try:
            before = snapshot(".")
            assert "another process is at work in run" in mistake(*command)
            assert snapshot(".") == before
        finally:
            other.kill()
    run(*command)


def test_two_evaluations_of_one_folder_lose_nothing(tmp_path):
    program = ("import sys; from pathlib import Path; import evaluate\n"
               "for n in range(50): evaluate.save_results(Path(sys.argv[1], 'results.json'), "
               "{f'{sys.argv[2]}{n}': {'miou': n}})")
    both = [subprocess.Popen([sys.executable, "-c", program, tmp_path, name], cwd=REPOSITORY,
                             stdout=subprocess.DEVNULL) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert results(tmp_path) == {f"{name}{n}": {"miou": n} for name in "ab" for n in range(50)}


def test_locks_are_for_folders_that_can_be_written(tmp_path, monkeypatch):
    lock = tmp_path / ".lock"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # root may write everywhere
        with folder_lock(lock):
            assert not lock.exists()
    # as on some network file systems
    monkeypatch.setattr(fcntl, "lockf", raising(OSError(95, "Operation not supported")))
    with folder_lock(lock):
        assert lock.exists()


def send_in_steps(patch, script, number):
    """This process gets a signal in the middle of every training step."""
    step = "rectification_loss" if script is reclip else "distillation_losses"
    loss = getattr(script, step)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), number)
        return loss(*args, **kwargs)

    patch.setattr(script, step, interrupted)


@contextlib.contextmanager
def handled(number, handler):
    """As if the shell had started this process with another handler for a signal."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_saves_and_the_same_command_goes_on(job, trained_demo, monkeypatch, capsys, number):
    script, command, path = job
    with monkeypatch.context() as patch, handled(number, signal.SIG_DFL):
        send_in_steps(patch, script, number)
        with pytest.raises(SystemExit, match="130"):
            run(*command)
    said = capsys.readouterr().err
    assert f"stopped after step 1 and saved {path}; the same command goes on" in said
    half = learned(path.parent, path.name)
    assert half["step"] == 1 and not half["finished"]
    run(*command)
    assert same(learned(path.parent, path.name), learned(trained_demo, path.name))
    assert results(path.parent) == results(trained_demo)


def test_nohup_is_heeded(job, monkeypatch):
    script, command, path = job
    send_in_steps(monkeypatch, script, signal.SIGHUP)
    with handled(signal.SIGHUP, signal.SIG_IGN):
        run(*command)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert learned(path.parent, path.name)["finished"]


def test_a_loss_that_is_not_finite_stops(job, monkeypatch, mistake):
    script, command, path = job
    function = "contrastive_loss" if script is reclip else "mask_loss"
    steps, loss = [], getattr(script, function)

    def exploding(*args, **kwargs):
        steps.append(1)
        return loss(*args, **kwargs) * (torch.inf if len(steps) > 2 else 1)

    monkeypatch.setattr(script, function, exploding)
    monkeypatch.setattr(Run, "due", lambda run, epoch_ends: True)
    said = mistake(*command, "--epochs", 4)
    assert "the loss is not finite at step 3 (images train-0" in said
    assert f"{path} still has step 2" in said
    kept = learned(path.parent, path.name)
    assert kept["step"] == 2 and all(v.isfinite().all() for v in kept["state"].values()
                                     if v.is_floating_point())
