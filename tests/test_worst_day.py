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
from conftest import (LONG, REPOSITORY, SmallShapes, few_tables, learned, raising, results, run,
                      same, snapshot)
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
        run(reclip.main, "--out", out, "--epochs", 3, "--views", 2)
        run(distill.main, "--teacher", out / "reclip.pt", "--epochs", 1)
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
    steps = [[json.loads(line)["step"] for line in (out / name).read_text().splitlines()]
             for name in ("log.jsonl", "log-distill.jsonl")]
    made = [(out / "tables" / name).read_bytes() for name in ("tables.json", "fig3.png") if LONG]
    made += [learned(path.parent, path.name) for path in sorted(out.glob("tables/*/*.pt"))]
    return [made, learned(out), learned(out, "distill.pt"), (out / "results.json").read_text(),
            (out / "hypotheses.npy").read_bytes(), (out / "views.npy").read_bytes(), steps]


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


@pytest.mark.long
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


TRAIN = (reclip.main, "--epochs", 3)


@pytest.mark.parametrize("what, gone, size, command", [
    ("hypotheses", ("hypotheses.npy", "views.npy", "reclip.pt"), 300, TRAIN),
    ("views", ("views.npy", "views.json", "reclip.pt"), 20_000, TRAIN),
    ("checkpoint", ("reclip.pt",), 20_000, TRAIN),
    ("log", ("reclip.pt", "log.jsonl"), 5, TRAIN),
    ("results", ("results.json",), 100, (evaluate.main,)),
    ("results, there before", (), 100, (evaluate.main, "--count-absent")),
    ("figures", (), 4_000, (evaluate.main, "--figures")),
    ("pictures", (), 100, (evaluate.main, "--images", "photos")),
    ("student", ("distill.pt",), 20_000, (distill.main, "--epochs", 1)),
])
def test_full_disk(trained_demo, small_demo, photos, tmp_path, monkeypatch, mistake, what, gone,
                   size, command):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_demo, "run")
    for name in gone:
        Path("run", name).unlink()
    before, (main, *options) = snapshot("run"), command
    given = {reclip.main: ("--out", "run"), distill.main: ("--teacher", "run/reclip.pt"),
             evaluate.main: ("--checkpoint", "run/reclip.pt")}[main]
    with largest_file(size):
        assert "cannot write" in mistake(main, *given, *options)
    after = snapshot("run")
    may_change = ("log.jsonl", "log-distill.jsonl", *["results.json"] * (what == "figures"))
    for path, content in before.items():
        if not path.endswith((*UNFINISHED, *may_change)):
            assert after[path] == content, path
    check_whole(Path("run"))
    run(main, *given, *options)  # with room again, it goes on
    if main is reclip.main:
        assert same(learned(Path("run")), learned(trained_demo))
    elif main is distill.main:
        assert same(learned(Path("run"), "distill.pt"), learned(trained_demo, "distill.pt"))


@pytest.fixture(params=[reclip.main, distill.main], ids=["reclip", "distill"])
def job(request, trained_demo, small_demo, tmp_path, monkeypatch):
    """(main, arguments, checkpoint): a training whose checkpoint is missing in its folder."""
    monkeypatch.chdir(tmp_path)
    out = Path("run")
    shutil.copytree(trained_demo, out)
    arguments, path = {
        reclip.main: (("--epochs", 3, "--out", out), out / "reclip.pt"),
        distill.main: (("--epochs", 1, "--teacher", out / "reclip.pt"), out / "distill.pt"),
    }[request.param]
    path.unlink()
    return request.param, arguments, path


def test_a_second_process_is_refused(job, mistake):
    main, arguments, path = job
    hold = ("import fcntl, sys, time; file = open(sys.argv[1], 'w'); "
            "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", hold, path.with_name(".run.lock")],
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        try:
            before = snapshot(".")
            assert "another process is at work in run" in mistake(main, *arguments)
            assert snapshot(".") == before
        finally:
            other.kill()
    run(main, *arguments)


def test_two_evaluations_of_one_folder_lose_nothing(tmp_path):
    program = ("import sys; from pathlib import Path; import evaluate\n"
               "for n in range(50): evaluate.save_results(Path(sys.argv[1], 'results.json'), "
               "{f'{sys.argv[2]}{n}': {'miou': n}})")
    both = [subprocess.Popen([sys.executable, "-c", program, tmp_path, name], cwd=REPOSITORY,
                             stdout=subprocess.DEVNULL) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == {f"{name}{n}": {"miou": n} for name in "ab" for n in range(50)}


def test_locks_are_for_folders_that_can_be_written(tmp_path, monkeypatch):
    lock = tmp_path / ".lock"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # root may write everywhere
        with folder_lock(lock):
            assert not lock.exists()
    unknown = raising(OSError(95, "Operation not supported"))  # as on some network file systems
    monkeypatch.setattr(fcntl, "lockf", unknown)
    with folder_lock(lock):
        assert lock.exists()


def send_in_steps(patch, main, number):
    """This process gets a signal in the middle of every training step."""
    module = sys.modules[main.__module__]
    step = "rectification_loss" if main is reclip.main else "distillation_losses"
    loss = getattr(module, step)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), number)
        return loss(*args, **kwargs)

    patch.setattr(module, step, interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_saves_and_the_same_command_goes_on(job, trained_demo, monkeypatch, capsys, number):
    main, arguments, path = job
    with monkeypatch.context() as patch:
        send_in_steps(patch, main, number)
        with pytest.raises(SystemExit, match="130"):
            run(main, *arguments)
    said = capsys.readouterr().err
    assert f"stopped after step 1 and saved {path}; the same command goes on" in said
    half = learned(path.parent, path.name)
    assert half["step"] == 1 and not half["finished"]
    run(main, *arguments)
    assert same(learned(path.parent, path.name), learned(trained_demo, path.name))
    assert results(path.parent) == results(trained_demo)


def test_nohup_is_heeded(job, monkeypatch):
    main, arguments, path = job
    send_in_steps(monkeypatch, main, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(main, *arguments)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert learned(path.parent, path.name)["finished"]


def test_a_loss_that_is_not_finite_stops(job, monkeypatch, mistake):
    main, arguments, path = job
    module = sys.modules[main.__module__]
    function = "contrastive_loss" if main is reclip.main else "mask_loss"
    steps, loss = [], getattr(module, function)

    def exploding(*args, **kwargs):
        steps.append(1)
        return loss(*args, **kwargs) * (torch.inf if len(steps) > 2 else 1)

    monkeypatch.setattr(module, function, exploding)
    monkeypatch.setattr(Run, "due", lambda run, epoch_ends: True)
    said = mistake(main, *arguments, "--epochs", 4)
    assert "the loss is not finite at step 3 (images train-0" in said
    assert f"{path} still has step 2" in said
    kept = learned(path.parent, path.name)
    assert kept["step"] == 2 and all(v.isfinite().all() for v in kept["state"].values()
                                     if v.is_floating_point())
