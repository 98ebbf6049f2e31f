"""The scripts as they are used: whole runs, interrupted ones, several processes, mistakes."""

import ast
import contextlib
import itertools
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import data
import distill
import evaluate
import papers
import reclip
from clip.clip import TINY_PATH
from conftest import (REAL, REPOSITORY, SmallShapes, json_lines, learned, picture, python,
                      raising, random_clip, results, run, same, save, save_clip, snapshot)

TRAIN = (reclip.main, "--out", "run", "--epochs", 3)  # the commands of conftest's trained_demo
TEACH = (distill.main, "--teacher", "run/reclip.pt", "--epochs", 2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored

# ---- Whole runs --------------------------------------------------------------------------------


def test_the_demo_from_another_folder(small_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(reclip.main, "--epochs", 6)
    run(distill.main, "--epochs", 1)  # of the newest teacher
    out = Path("runs/shapes")
    said = capsys.readouterr().out
    assert "mIoU" in said and "ladybug" in said and "distilled" in said
    before = learned(out), learned(out, "distill.pt"), results(out)
    assert all(0 < row["loss"] < 10 for row in json_lines(out / "log.jsonl"))
    run(reclip.main, "--epochs", 6)  # trains nothing, prints the same table
    assert capsys.readouterr().out.count("\nmIoU") == 1
    run(evaluate.main, "--checkpoint", out, "--figures", "--bias", "--linear-probe")
    found = results(out)
    assert {"maskclip", "rectified", "distilled"} <= found.keys()
    for name, result in before[2].items():
        iou = result["iou"]
        assert found[name]["iou"] == iou and list(iou) == list(data.SHAPES)
        assert result["miou"] == pytest.approx(sum(iou.values()) / 10)
    assert same(before[:2], (learned(out), learned(out, "distill.pt")))
    assert len(list(out.glob("*.png"))) >= 3
    run(data.main, "--out", "sheet.png")
    assert Path("sheet.png").exists()


def test_no_label_is_opened_to_train(voc_root, clip_file, tmp_path, monkeypatch):
    """With every label file deleted the same checkpoints come of both scripts."""
    def train(out):
        run(reclip.main, "--dataset", "voc", "--data-root", voc_root, "--clip", clip_file, "--out",
            out, "--workers", 0, "--epochs", 1, "--crop-ratio", 1, "--scale", 96, 96, "--crop", 64)
        run(distill.main, "--teacher", out, "--student", "small", "--backbone", "none", "--epochs",
            1, "--workers", 0)
        return learned(out), learned(out, "distill.pt")

    labelled = train(tmp_path / "labelled")
    assert results(tmp_path / "labelled").keys() == {"maskclip", "rectified", "rectified_no_pd",
                                                     "distilled"}
    for path in voc_root.rglob("SegmentationClass/*.png"):
        path.unlink()
    monkeypatch.setattr(data, "read_label", raising(AssertionError("a label is opened")))
    assert same(train(tmp_path / "unlabelled"), labelled)
    assert not (tmp_path / "unlabelled/results.json").exists()


def test_in_a_thread_without_arguments(small_demo, tmp_path, monkeypatch):
    """As a notebook or a web interface calls it: no signals, and another program's arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kernel.py", "-f", "kernel.json"])
    thread = threading.Thread(target=reclip.main)
    thread.start()
    thread.join()
    assert learned("runs/shapes")["finished"]


# ---- Interrupted ones --------------------------------------------------------------------------


def live(words, name, calls, *numbers):
    """A process's life: a command that gets signals in a call of one of its functions.
    words: the script's name, its arguments; name: the function's; calls: in which call. Every look
    at the clock is hours later, so that whatever is saved now and then is saved at once."""
    script, seconds, left = sys.modules[words[0]], itertools.count(0, 10_000), iter(range(calls))
    data.Shapes, time.monotonic = SmallShapes, lambda: next(seconds)
    function = getattr(script, name)

    def counted(*args, **kwargs):
        for number in numbers if next(left, None) == calls - 1 else ():
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(script, name, counted)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open("errors.txt", "a", buffering=1)
    run(script.main, *words[1:])


def process(*arguments):
    """The exit code of `live` in a process forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "evaluate", "torchvision.transforms.v2"])
    child = context.Process(target=live, args=arguments)
    child.start()
    child.join(120)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode


@pytest.mark.parametrize("command, name, calls, numbers, kept", [
    (TRAIN, "crop_votes", 1, "KILL", None),  # while hypotheses are made
    (TRAIN, "dense_features", 2, "KILL", None),  # while views are encoded
    (TRAIN, "rectification_loss", 4, "KILL", 3),
    (TRAIN, "rectification_loss", 4, "INT", 4),
    (TRAIN, "rectification_loss", 4, "TERM TERM", 4),  # the second does not end it either
    (TEACH, "teach", 2, "KILL", None),
    (TEACH, "distillation_losses", 3, "KILL", 2),
    (TEACH, "distillation_losses", 3, "INT", 3),
    (TEACH, "distillation_losses", 3, "TERM TERM", 3),
])
def test_interrupted_and_repeated_is_undisturbed(demo_copy, trained_demo, monkeypatch, command,
                                                 name, calls, numbers, kept):
    file = f"{command[0].__module__}.pt"
    for path in demo_copy.glob("*" if command is TRAIN else "*distill*"):
        path.unlink()
    numbers = [getattr(signal, f"SIG{number}") for number in numbers.split()]
    words = [command[0].__module__, *command[1:]]
    code = process(words, name, calls, *numbers)
    said = Path("errors.txt").read_text()
    assert code == (130 if signal.SIGKILL not in numbers else -signal.SIGKILL), said
    assert (demo_copy / file).exists() == (kept is not None)
    if kept is not None:
        half = learned(demo_copy, file)
        assert half["step"] == kept and not half["finished"]
    assert code != 130 or f"run/{file}" in said and said.strip().count("\n") <= 1
    assert process(words, name, 0) == 0, Path("errors.txt").read_text()
    assert same(learned(demo_copy, file), learned(trained_demo, file))
    log = "log.jsonl" if command is TRAIN else "log-distill.jsonl"
    steps = [row["step"] for row in json_lines(demo_copy / log)]
    assert steps == sorted(set(steps)) and steps[-1] == learned(demo_copy, file)["step"]
    assert not list(demo_copy.glob("*tmp*"))


@contextlib.contextmanager
def largest_file(size):
    """As if the disk were full: no file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def half_trained(path):
    """Make a finished checkpoint an unfinished one, of step 2."""
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | dict(step=2, finished=False), path)


@pytest.mark.parametrize("gone, size, command", [
    ("hypotheses* views* reclip.pt", 300, TRAIN),
    ("views* reclip.pt", 20_000, TRAIN),
    ("reclip.pt", 20_000, TRAIN),
    ("", 20_000, TRAIN),  # a checkpoint that is there, of an earlier step
    ("distill.pt", 20_000, TEACH),
])
def test_full_disk(demo_copy, trained_demo, mistake, gone, size, command):
    if not gone:
        half_trained(demo_copy / "reclip.pt")
    for path in [path for pattern in gone.split() for path in demo_copy.glob(pattern)]:
        path.unlink()
    before = snapshot("run")
    with largest_file(size):
        mistake(*command)
    after = snapshot("run")
    assert not [path for path in after if "tmp" in path]
    assert all("log" in path or after[path] == content for path, content in before.items())
    if gone:
        run(*command)  # with room again, it goes on
        for file in ("reclip.pt", "distill.pt"):
            assert same(learned(demo_copy, file), learned(trained_demo, file))


def test_a_loss_that_is_not_finite_stops(demo_copy, mistake, monkeypatch):
    half_trained(demo_copy / "reclip.pt")
    before = (demo_copy / "reclip.pt").read_bytes()
    monkeypatch.setattr(reclip, "contrastive_loss", lambda S, *_: S.sum() * torch.inf)
    assert "finite" in mistake(*TRAIN)
    assert (demo_copy / "reclip.pt").read_bytes() == before


# ---- Several processes -------------------------------------------------------------------------

PROGRAM = f"""
import os, sys
sys.path[:0] = [{str(REPOSITORY)!r}, {str(Path(__file__).parent)!r}]
import conftest, data, evaluate, reclip
data.Shapes, loss = conftest.SmallShapes, reclip.rectification_loss
def failing(*args, **kwargs):
    open(f"pid-{{os.getpid()}}", "w").close()
    if os.environ["RANK"] == "1":
        raise RuntimeError("as if a GPU had failed")
    return loss(*args, **kwargs)
if sys.argv[1] == "fails":
    reclip.rectification_loss = failing
(evaluate if sys.argv[1] == "evaluate" else reclip).main([*sys.argv[2:], "--device", "cpu"])
"""


def launch(processes, folder, *words):
    """What comes of a command on the small demo in so many processes of torchrun, or one."""
    (folder / "program.py").write_text(PROGRAM)
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", processes, "--rdzv_backend",
                "c10d", "--rdzv_endpoint", "localhost:0") if processes > 1 else ()
    return python(*torchrun, folder / "program.py", *words, cwd=folder, OMP_NUM_THREADS="1")


def test_two_processes_are_one(tmp_path):
    """Of ReCLIP, whose BatchNorm sees the positions alone; soft masks, so that no choice tips."""
    for n in (1, 2):
        done = launch(n, tmp_path, "reclip", "--method", "reclip", "--out", f"run{n}", "--batch", 8,
                      "--epochs", 2, "--lr", 0.003, "--mask-temperature", 1)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\nmIoU") == 1  # one process speaks
    one, two = learned(tmp_path / "run1"), learned(tmp_path / "run2")
    assert one["step"] == two["step"] == 6
    for name, value in one["state"].items():
        torch.testing.assert_close(two["state"][name], value, atol=1e-5, rtol=1e-5)
    moved = [part["momentum_buffer"].abs().max() for part in one["optimizer"]["state"].values()]
    assert 0.003 * max(moved) > 1e-4  # wrong gradients would show
    done = launch(2, tmp_path, "evaluate", "--checkpoint", "run1", "--out", "again")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "again") == results(tmp_path / "run1")


def test_none_is_left_when_one_fails(tmp_path):
    done = launch(3, tmp_path, "fails", "--out", "run", "--batch", 12, "--epochs", 1)
    assert done.returncode != 0 and "as if a GPU had failed" in done.stderr
    pids = [path.name[4:] for path in tmp_path.glob("pid-*")]
    assert len(pids) == 3 and not [pid for pid in pids if Path("/proc", pid).exists()]


# ---- Mistakes: one line on stderr, exit code 2, nothing changed on disk -------------------------


@pytest.fixture(scope="session")
def sound(trained_demo, tmp_path_factory):
    """A folder with sound things, photographs, VOC's tree, a CLIP, a run, and with damaged ones."""
    root = tmp_path_factory.mktemp("sound")
    shutil.copytree(REAL, root / "voc")
    shutil.copytree(REAL / "VOCdevkit/VOC2012/JPEGImages", root / "good")
    shutil.copytree(trained_demo, root / "run")
    save_clip(random_clip().half(), root / "clip.pt")
    resnet = random_clip(vision_layers=[1, 1, 1, 1], vision_width=8, vision_patch_size=None,
                         image_resolution=32, vocab_size=9).state_dict()
    half_trained(shutil.copy(root / "run/reclip.pt", root / "half.pt"))
    for name, value in dict(objects=Path("x"), nested={"a": 1}, resnet=resnet).items():
        torch.save(value, root / f"{name}.pt")
    for name, content in {"file": b"no folder", "twice.txt": b"cat\ndog\nCat\n",
                          "many.txt": "\n".join(f"thing {n}" for n in range(256)).encode(),
                          "cut.pt": (root / "run/reclip.pt").read_bytes()[:20_000],
                          "cut.pt.gz": TINY_PATH.read_bytes()[:100_000]}.items():
        (root / name).write_bytes(content)
    for name in ("cut", "other", "wrong"):
        picture(root / name / "a.png")
    (root / "cut/a.png").write_bytes((root / "cut/a.png").read_bytes()[:100])
    save(root / "wrong/labels/a.png", torch.full((40, 60), 77))
    save(root / "other/labels/a.png", torch.zeros(40, 50))
    (root / "empty").mkdir()
    return root


PHOTOS = "--dataset folder --classes 'cat, dog' --data-root"
FOLDER = f"--clip clip.pt {PHOTOS}"
SHORT = "reclip --epochs 3 --out run"  # the command that made the run
CHECKPOINT = "evaluate --checkpoint run/reclip.pt"
MISTAKES = f"""
reclip --dataset voc --data-root empty                    | empty VOCdevkit
reclip --dataset voc --data-root voc --classes cat        | --classes
reclip --dataset folder --classes cat                     | folder --data-root
reclip {FOLDER} empty                                     | empty
reclip --dataset folder --data-root good                  | --classes
reclip --dataset folder --data-root good --classes gone.txt | gone.txt
reclip --dataset folder --data-root good --classes twice.txt | cat twice.txt
reclip --dataset folder --data-root good --classes many.txt | 256
reclip {FOLDER} good --labels empty                       | empty
reclip --seed {1 << 70}                                   | --seed
reclip --crop 8                                           | --crop 8
reclip --unknown 3                                        | --unknown
reclip --tune-encoder --views 2                           | --tune-encoder --views
reclip --device nonsense                                  | nonsense
reclip --out file/run                                     | file/run
reclip --clip ViT-B/17                                    | ViT-B/17 RN50
reclip --clip resnet.pt                                   | resnet.pt ResNet
reclip --clip objects.pt                                  | objects.pt
reclip --clip cut.pt.gz                                   | cut.pt.gz
reclip --clip run/reclip.pt                               | run/reclip.pt
{SHORT} --lr 0.02                                         | run/reclip.pt lr 0.03 → 0.02
{SHORT} --seed 1                                          | run/reclip.pt seed 0 → 1
{SHORT} --clip clip.pt                                    | run/reclip.pt clip
evaluate                                                  | reclip.py
{CHECKPOINT} --clip clip.pt                               | clip.pt
{CHECKPOINT} --dataset voc                                | voc --data-root
{CHECKPOINT} --slide 10 20                                | --slide
{CHECKPOINT} --images good --bias                         | --bias
evaluate --checkpoint cut.pt                              | cut.pt
distill --teacher half.pt                                 | half.pt finished
distill --teacher run --epochs 2 --lr 0.001               | run/distill.pt lr 0.003 → 0.001
distill --teacher run --head learned --losses text        | mask
distill --teacher run --student resnet50 --backbone clip.pt | clip.pt
data --dataset stuff --download                           | --download
data {PHOTOS} cut                                         | cut/a.png
data {PHOTOS} wrong --labels wrong/labels                 | a.png 77
data {PHOTOS} other --labels other/labels                 | a.png 50
"""


@pytest.mark.parametrize("command, named", [
    [part.strip() for part in line.split(" | ")] for line in MISTAKES.strip().splitlines()])
def test_one_line_and_nothing_changed(sound, tmp_path, monkeypatch, small_demo, mistake, command,
                                      named):
    shutil.copytree(sound, tmp_path / "place", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "place")
    script, *words = shlex.split(command)
    before = snapshot(".")
    said = mistake(sys.modules[script].main, *words)
    assert snapshot(".") == before
    for name in named.split():
        assert name in said, said


# ---- Files: what importing them does, and whom they import --------------------------------------


def test_imports_point_downwards():
    levels = ["clip", "data", "reclip", "distill", "evaluate"]
    packages = {"torch", "torchvision", "numpy", "PIL", "ftfy", "regex", *sys.stdlib_module_names}
    assert sorted(path.stem for path in REPOSITORY.glob("*.py")) == sorted(levels[1:])
    for path in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("clip/*.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        below = levels[: levels.index("clip" if path.parent.name == "clip" else path.stem)]
        for node in ast.walk(tree):
            names = [node.module or "clip"] if isinstance(node, ast.ImportFrom) else (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            for name in (name.split(".")[0] for name in names if not getattr(node, "level", 0)):
                inside = {"torchvision", "evaluate"} if node not in tree.body else set()
                allowed = (packages - {"torchvision"}).union(below, {"clip"}, inside)
                assert name in allowed, f"{path.name} imports {name}"


def test_importing_does_nothing(tmp_path):
    done = python("-c", """
import socket, sys, torch
socket.socket.connect = None
state, threads = torch.get_rng_state(), torch.get_num_threads()
import clip, data, reclip, distill, evaluate
assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
assert torch.is_grad_enabled() and "torchvision" not in sys.modules
""", cwd=tmp_path, HOME=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ---- The published settings, in full: not a number changes --------------------------------------

COLUMNS = "scale crop schedule epochs batch lr pd"
RECIPES = {  # longest and shortest side, crop, schedule, stopped after, batch, rate, PD of ReCLIP++
    ("voc", "release"): ((2048, 336), 336, 200, 50, 1, 0.01, 1.0),
    ("context", "release"): ((2048, 448), 480, 400, 50, 1, 0.01, 0.85),
    ("ade", "release"): ((2048, 512), 512, 600, 100, 1, 0.01, 0.5),
    ("cityscapes", "release"): ((2048, 448), 512, 300, 50, 16, 0.16, 0.5),
    ("stuff", "release"): ((2048, 512), 512, 800, 100, 1, 0.01, 0.95),
    ("voc", "paper"): ((2048, 512), 512, 200, 200, 16, 0.01, 0.99992),
    ("context", "paper"): ((520, 520), 480, 150, 150, 16, 0.01, 0.75),
    ("ade", "paper"): ((2048, 512), 512, 150, 150, 16, 0.01, None),
    ("cityscapes", "paper"): ((1024, 512), 512, 150, 150, 16, 0.01, 0.74),
    ("stuff", "paper"): ((2048, 512), 512, 30, 30, 16, 0.01, 0.9),
}
# t of crops; for ReCLIP 100·cosine, classes at least, PD; epochs of distillation, PD of its teacher
OTHERS = {"voc": (0.07, 23, 2, 0.5, 100, 0.95), "context": (0.0, 20, 6, 0.6, 150, None),
          "ade": (0.0, 21, 5, 0.5, 150, None), "cityscapes": (0.07, 21.5, 2, 0.5, 100, None),
          "stuff": (0.0, 20, 8, 0.5, 50, 0.95)}
BOTH = dict(ratio=(0.5, 2.0), distort=True, tau=0.01, momentum=0.9, weight_decay=5e-4, power=0.9,
            views=0)
ALWAYS = BOTH | dict(clip="ViT-B/16", surgery="program", sigma=5.0, crop_ratio=1 / 6, sign=-1,
                     learn_query=False, tune_encoder=False)


@pytest.mark.parametrize("name, preset", RECIPES)
def test_recipes_of_benchmarks(name, preset):
    t, threshold, top, pd, epochs, student_pd = OTHERS[name]
    row = dict(zip(COLUMNS.split(), RECIPES[name, preset])) | ALWAYS
    ours = reclip.recipe(name, preset)
    assert ours == row | dict(bias="independent", decoder=True, hypothesis="crops", threshold=t,
                              top=0, mask_temperature=0.01, pd_temperature=0.1)
    theirs = reclip.recipe(name, preset, "reclip")
    assert theirs == row | dict(bias="joint", decoder=False, hypothesis="global", top=top,
                                threshold=threshold, mask_temperature=0.001, pd=pd,
                                pd_temperature=0.01)
    scale, crop = RECIPES[name, "paper"][:2]
    student = distill.recipe(name)
    assert student | dict(losses=tuple(student["losses"])) == BOTH | dict(
        student="resnet50", backbone="imagenet", batch=16, optimizer="sgd", lr=0.01, floor=1e-4,
        weights=dict(mask=1.0, feature=0.5, text=0.5), losses=("mask", "feature", "text"),
        scale=scale, crop=crop, epochs=epochs, pd=student_pd, pd_temperature=0.1)
    if name in ("voc", "stuff"):  # what goes by their rows
        other = {"voc": "folder", "stuff": "stuff171"}[name]
        assert reclip.recipe(other, preset) == ours and distill.recipe(other) == student


@pytest.mark.parametrize("name, preset", [*RECIPES, ("shapes", "release")])
def test_prompt_denoising_of_every_ablation(name, preset):
    """ReCLIP++'s with a decoder, else ReCLIP's; none of MaskCLIP and on the demo."""
    for row, flags in papers.RECTIFIED.items():
        s = reclip.settings_of(reclip.parse_arguments(
            ["--dataset", name, "--preset", preset, *flags.split()]))
        decoder = "--decoder" in flags or not ("--method" in flags or "--no-decoder" in flags)
        pd = RECIPES.get((name, preset), [None])[-1] if decoder else (
            None if row == "maskclip" or name == "shapes" else OTHERS[name][3])
        assert (s.pd, s.pd_temperature) == (pd, 0.1 if decoder else 0.01), row


def test_the_demos_recipe():
    ours, first = reclip.recipe("shapes"), reclip.recipe("shapes", method="reclip")
    assert [ours[key] for key in COLUMNS.split()] == [(96, 96), 96, 10, 10, 16, 0.03, None]
    assert (ours["mask_temperature"], ours["views"], ours["surgery"]) == (1.0, 2, "value")
    assert (first["lr"], first["epochs"], first["mask_temperature"]) == (0.3, 20, 0.01)
    bare = reclip.recipe("shapes", decoder=False)
    assert (bare["mask_temperature"], bare["lr"], bare["epochs"]) == (0.01, 0.03, 10)
