"""The scripts as they are used: whole runs on photographs and on the demo, mistakes, --help."""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import distill
import evaluate
import reclip
from clip import pretrain
from clip.model import CLIP
from conftest import REPOSITORY, learned, random_clip, run, same

QUICK = ("--epochs", 2, "--workers", 0)


@pytest.fixture
def demo(small_demo, tmp_path, monkeypatch):
    """demo(*arguments, out=…) → the folder of a short run of the small demo, every step logged."""
    monkeypatch.setattr(reclip, "Log", functools.partial(reclip.Log, every=1))

    def demo(*arguments, out="run", epochs=2):
        run(reclip.main, "--out", tmp_path / out, "--epochs", epochs, *arguments)
        return tmp_path / out

    return demo


def log(out):
    """log.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "waited_s")} for row in rows]


def check_results(out, classes, stages):
    """The form of results.json: per stage mIoU, pixel accuracy and an IoU a class, in percent."""
    results = json.loads((out / "results.json").read_text())
    assert list(results) == stages
    for result in results.values():
        assert list(result["iou"]) == classes
        iou = [value for value in result["iou"].values() if value is not None]
        assert all(0 <= value <= 100 for value in (*iou, result["pixel_accuracy"]))
        assert result["miou"] == pytest.approx(sum(iou) / len(iou))
    return results


# ---- Whole runs on photographs -----------------------------------------------------------------


def test_voc_from_hypotheses_to_miou(voc_root, clip_file, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ("--dataset", "voc", "--data-root", voc_root, "--clip", clip_file, "--out", out)
    run(reclip.main, *arguments, *QUICK)
    rows = [json.loads(line) for line in (out / "hypotheses.jsonl").read_text().splitlines()[1:]]
    assert [row["id"] for row in rows] == ["2011_000003", "2011_000006"]
    assert [sum(row["scores"]) for row in rows] == [121, 121] and len(rows[0]["scores"]) == 20
    assert learned(out)["step"] == 4 and learned(out)["finished"]
    results = check_results(out, data.CLASSES["voc"], ["maskclip", "rectified"])
    assert results["rectified"]["pd"] == 1.0 and results["rectified"]["images"] == 1
    said = capsys.readouterr().out
    assert "mIoU" in said and "tv monitor" in said and "hypotheses:" in said
    # The same command again trains nothing and prints the same table.
    before = (out / "results.json").read_text(), log(out)
    run(reclip.main, *arguments, *QUICK)
    assert ((out / "results.json").read_text(), log(out)) == before
    assert said.count("\nmIoU") == capsys.readouterr().out.count("\nmIoU") == 1


def test_a_finished_run_is_repeated_when_things_have_moved(voc_root, clip_file, tmp_path):
    def command(root, clip):
        run(reclip.main, "--dataset", "voc", "--data-root", root, "--clip", clip, "--out",
            tmp_path / "run", *QUICK)

    here, there = tmp_path / "here.pt", tmp_path / "there.pt"
    shutil.copy(clip_file, here)
    command(voc_root, here)
    results = (tmp_path / "run/results.json").read_text()
    here.rename(there)
    voc_root.rename(tmp_path / "moved")
    command(tmp_path / "moved", there)
    assert (tmp_path / "run/results.json").read_text() == results


def test_cityscapes_in_both_encodings(cityscapes_root, clip_file, tmp_path):
    out = tmp_path / "run"
    arguments = ("--dataset", "cityscapes", "--data-root", cityscapes_root)
    run(reclip.main, *arguments, "--clip", clip_file, "--out", out, *QUICK)
    header, row = map(json.loads, (out / "hypotheses.jsonl").read_text().splitlines())
    assert row["id"] == "frankfurt/frankfurt_000000_000294" and sum(row["scores"]) == 121
    results = check_results(out, data.CLASSES["cityscapes"], ["maskclip", "rectified"])
    for path in cityscapes_root.rglob("*_labelTrainIds.png"):
        path.unlink()
    run(evaluate.main, "--checkpoint", out / "reclip.pt")
    again = check_results(out, data.CLASSES["cityscapes"], ["maskclip", "rectified"])
    for name, result in results.items():  # the two files differ in 77 pixels
        assert again[name] != result
        assert again[name]["miou"] == pytest.approx(result["miou"], abs=0.1)


def test_folder_trains_on_photographs_alone(photos, clip_file, tmp_path, capsys):
    out = tmp_path / "run"
    run(reclip.main, "--dataset", "folder", "--data-root", photos, "--classes", "cat, dog, sofa",
        "--clip", clip_file, "--out", out, *QUICK)
    assert learned(out)["step"] == 6 and len(learned(out)["state"]["Wq"]) == 3
    assert capsys.readouterr().out.splitlines()[-1] == (
        "folder has no labels to compare with; masks of images: python evaluate.py --checkpoint "
        f"{out}/reclip.pt --images …")
    assert not (out / "results.json").exists()
    run(evaluate.main, "--checkpoint", out / "reclip.pt")
    assert capsys.readouterr().out.startswith("folder has no labels to compare with; masks of")


def test_vit_b16(voc_root, cityscapes_root, tmp_path, monkeypatch):
    """The same path with the sizes of ViT-B/16; few templates and crops, for the sake of time."""
    torch.manual_seed(0)
    model = CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
    torch.save({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "clip.pt")
    del model
    few = functools.partial(reclip.query_features, templates=["a photo of a {}.", "the {}."])
    monkeypatch.setattr(reclip, "query_features", few)
    for name, root in ("voc", voc_root), ("cityscapes", cityscapes_root):
        out = tmp_path / f"{name}-run"
        run(reclip.main, "--dataset", name, "--data-root", root, "--clip", tmp_path / "clip.pt",
            "--out", out, "--crop-ratio", 1, "--epochs", 1, "--workers", 0, "--batch", 1,
            "--scale", 400, 96, "--crop", 96)
        state = learned(out)["state"]
        assert state["reference.prompt"].shape == (73, 512)
        assert state["position.weight"].shape == (512, 768, 1, 1)
        C = len(data.CLASSES[name])
        assert state["decoder.conv.weight"].shape == (C, 512 + C, 5, 5)
        check_results(out, data.CLASSES[name], ["maskclip", "rectified"])
    (tmp_path / "clip.pt").unlink()  # 300 MB, which pytest would keep


# ---- Training sees no ground truth -------------------------------------------------------------


def test_training_without_label_files_is_the_same_bit_for_bit(voc_root, clip_file, tmp_path):
    def train(out):
        run(reclip.main, "--dataset", "voc", "--data-root", voc_root, "--clip", clip_file, "--out",
            tmp_path / out, *QUICK)
        return tmp_path / out

    labelled = train("labelled")
    for path in voc_root.rglob("SegmentationClass/*.png"):
        path.unlink()
    unlabelled = train("unlabelled")
    assert (labelled / "results.json").exists() and not (unlabelled / "results.json").exists()
    assert same(learned(labelled), learned(unlabelled)) and log(labelled) == log(unlabelled)


def test_training_opens_no_label(voc_root, clip_file, tmp_path, monkeypatch):
    def refuse(path):
        raise AssertionError(f"opened the label {path}")

    compare = evaluate.main
    monkeypatch.setattr(data, "read_label", refuse)
    monkeypatch.setattr(evaluate, "main", lambda argv: None)
    run(reclip.main, "--dataset", "voc", "--data-root", voc_root, "--clip", clip_file, "--out",
        tmp_path / "run", *QUICK)
    assert learned(tmp_path / "run")["finished"]
    with pytest.raises(AssertionError, match="opened the label"):  # the guard works
        run(compare, "--checkpoint", tmp_path / "run" / "reclip.pt")


# ---- Training ----------------------------------------------------------------------------------


def test_loss_falls(demo):
    losses = [row["loss"] for row in log(demo(epochs=12))]
    assert len(losses) == 24  # 2 batches an epoch
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_every_batch_and_epoch_has_its_learning_rate(demo):
    rows = log(demo("--schedule", 8, epochs=3))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    expected = [0.03 * (1 - epoch / 8) ** 0.9 for epoch in (0, 0, 1, 1, 2, 2)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)


@pytest.mark.parametrize("where", ["after an epoch", "between checkpoints"])
def test_two_and_two_steps_are_four(demo, monkeypatch, where):
    whole = demo(out="whole")
    save = reclip.Run.save

    class Stopped(reclip.Log.func):
        def step(self, step, *args, **kwargs):
            super().step(step, *args, **kwargs)
            if step == 3:
                raise KeyboardInterrupt

    def save_and_stop(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "between checkpoints":
            patch.setattr(reclip, "Log", functools.partial(Stopped, every=1))
        else:
            patch.setattr(reclip.Run, "save", save_and_stop)
        # as if an epoch took longer than ten seconds
        patch.setattr(reclip.Run, "due", lambda run, epoch_ends: epoch_ends)
        with pytest.raises(SystemExit, match="130"):
            demo(out="parts")
    half = learned(whole.with_name("parts"))
    assert half["step"] == 2 and not half["finished"]
    parts = demo(out="parts")
    assert same(learned(parts), learned(whole)) and log(parts) == log(whole)
    assert not same(half["state"], learned(whole)["state"])  # the other two steps do matter


def test_workers_change_nothing(voc_root, clip_file, tmp_path):
    for workers in (0, 2):
        run(reclip.main, "--dataset", "voc", "--data-root", voc_root, "--clip", clip_file, "--out",
            tmp_path / str(workers), "--epochs", 2, "--workers", workers)
    assert same(learned(tmp_path / "0"), learned(tmp_path / "2"))
    results = [(tmp_path / w / "results.json").read_text() for w in "02"]
    assert results[0] == results[1]


def test_seeds_differ_and_repeat(demo):
    first, again = learned(demo(out="a")), learned(demo(out="b"))
    other = learned(demo("--seed", 1, out="c"))
    assert same(first, again) and not same(first["state"], other["state"])


# ---- Methods and presets -----------------------------------------------------------------------


@pytest.mark.parametrize("arguments, parts", [
    (("--method", "reclip"), {"reference", "position"}),
    (("--preset", "paper"), {"reference", "position", "decoder"}),
    (("--surgery", "program"), {"reference", "position", "decoder"}),
    (("--bias", "none"), {"decoder"}),
    (("--no-decoder", "--add"), {"reference", "position"}),
])
def test_methods_train_and_evaluate(demo, arguments, parts):
    out = demo(*arguments)
    state = learned(out)["state"]
    assert {key.split(".")[0] for key in state} == parts | {"Wq"}
    results = check_results(out, list(data.SHAPES), ["maskclip", "rectified"])
    assert results["maskclip"]["iou"] != results["rectified"]["iou"]
    again = run(evaluate.main, "--checkpoint", out / "reclip.pt")
    assert {name: r["iou"] for name, r in again.items()} == {
        name: r["iou"] for name, r in results.items()}


def test_bf16_is_close_to_float32(demo):
    whole = demo("--views", 0, out="whole")
    half = demo("--views", 0, "--amp", out="half")
    losses = [[row["loss"] for row in log(out)] for out in (whole, half)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    results = [json.loads((out / "results.json").read_text()) for out in (whole, half)]
    assert results[0]["maskclip"]["miou"] == pytest.approx(results[1]["maskclip"]["miou"], abs=1)
    run(distill.main, "--teacher", half / "reclip.pt", "--epochs", 1, "--amp")
    check_results(half, list(data.SHAPES), ["maskclip", "rectified", "distilled"])


def test_maskclip_needs_no_training(demo):
    out = demo("--method", "maskclip")
    assert not (out / "hypotheses.jsonl").exists() and not (out / "log.jsonl").exists()
    results = check_results(out, list(data.SHAPES), ["maskclip"])
    trained = json.loads((demo(out="other") / "results.json").read_text())
    assert results["maskclip"] == trained["maskclip"] and results["maskclip"]["miou"] > 25


def test_the_papers_preset_changes_the_encoder(demo):
    release, paper = demo("--method", "maskclip"), demo("--method", "maskclip", "--preset", "paper",
                                                        out="paper")
    iou = [json.loads((out / "results.json").read_text())["maskclip"]["iou"]
           for out in (release, paper)]
    assert iou[0] != iou[1]


def test_folders_are_named_after_what_is_not_default(small_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(reclip.main, "--method", "maskclip")
    run(reclip.main, "--method", "maskclip", "--preset", "paper", "--seed", 3)
    made = sorted(path.as_posix() for path in Path("runs").glob("*/reclip.pt"))
    assert made == ["runs/shapes-maskclip-paper-seed3/reclip.pt", "runs/shapes-maskclip/reclip.pt"]
    # evaluate.py takes the one written last.
    os.utime(made[1], (2e9, 2e9))
    before = Path(made[0]).with_name("results.json").stat().st_mtime_ns
    results = run(evaluate.main, "--count-absent")
    assert results["maskclip"]["count_absent"]
    assert json.loads(Path(made[1]).with_name("results.json").read_text()) == results
    assert Path(made[0]).with_name("results.json").stat().st_mtime_ns == before


def test_a_teacher_is_shown_as_its_recipe_evaluates_it(trained_demo, small_demo, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(trained_demo, out)

    def said():
        capsys.readouterr()
        distill.show_beside_teacher(out, out / "reclip.pt", "rectified", ["--device", "cpu"])
        return capsys.readouterr().out.splitlines()[-1]

    usual = said()
    assert re.fullmatch(r"mIoU: maskclip [\d.]+  rectified [\d.]+  distilled [\d.]+", usual)
    for other in (("--pd", 0.99), ("--split", "train")):
        run(evaluate.main, "--checkpoint", out / "reclip.pt", *other)
        assert said() == usual


# ---- Mistakes ----------------------------------------------------------------------------------


def error(capsys, main, *arguments):
    """The one line that a mistake is answered with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1 and said.endswith("\n"), said
    return said


@pytest.fixture
def place(tmp_path, photos, voc_root, monkeypatch):
    """A working directory with things that are not what they should be."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty.txt").write_text("# no names\n\n")
    Path("twice.txt").write_text("cat\ndog\nCat\n")
    Path("damaged.pt").write_bytes(b"PK\x03\x04 no archive")
    Path("zero.pt").write_bytes(b"")
    resnet = random_clip(vision_layers=[1, 1, 1, 1], vision_width=8, vision_patch_size=None,
                         image_resolution=32, vocab_size=9)
    torch.save(resnet.state_dict(), "resnet.pt")
    for name in ("cut", "zero"):
        shutil.copytree(photos, name)
        broken = Path(name, "2011_000006.jpg")
        broken.write_bytes(broken.read_bytes()[: 9000 if name == "cut" else 0])
    return tmp_path


FOLDER = ["--dataset", "folder", "--data-root"]


@pytest.mark.parametrize("main", [reclip.main, data.main])
@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "voc"], "--dataset voc needs --data-root"),
    (["--dataset", "voc", "--data-root", "nowhere"], "no folder nowhere"),
    (["--dataset", "voc", "--data-root", "empty"], "no voc in empty: expected empty/VOCdevkit"),
    (["--dataset", "ade", "--data-root", "voc"], "no ade in voc: expected voc/ADEChallengeData"),
    (["--dataset", "coco", "--data-root", "voc"], 'no data set "coco"; there are shapes, voc'),
    (["--dataset", "voc", "--data-root", "voc", "--classes", "cat"], "--classes goes with"),
    ([*FOLDER, "empty", "--classes", "cat"], "no images of folder train in empty"),
    ([*FOLDER, "photos"], "--dataset folder needs --classes"),
    ([*FOLDER, "photos", "--classes", ""], "no class names in --classes"),
    ([*FOLDER, "photos", "--classes", "cat,, dog"], "class name 2 is empty"),
    ([*FOLDER, "photos", "--classes", "cat, dog, cat"], 'class name "cat" is repeated'),
    ([*FOLDER, "photos", "--classes", "empty.txt"], "no class names in the file empty.txt"),
    ([*FOLDER, "photos", "--classes", "twice.txt"], 'class name "Cat" is repeated'),
    ([*FOLDER, "photos", "--classes", "gone.txt"], "no file gone.txt"),
    ([*FOLDER, "cut", "--classes", "cat"], "cannot read image cut/2011_000006.jpg"),
    ([*FOLDER, "zero", "--classes", "cat"], "cannot read image zero/2011_000006.jpg"),
])
def test_wrong_data(place, capsys, main, arguments, message):
    if main is reclip.main:
        arguments = [*arguments, "--clip", "shapes-tiny", "--workers", "0"]
    said = error(capsys, main, *arguments)
    assert message in said.replace(" val ", " train ")  # data.py opens the other split of a folder


def test_a_broken_image_in_a_worker_process(place, capsys):
    said = error(capsys, reclip.main, *FOLDER, "cut", "--classes", "cat", "--clip", "shapes-tiny",
                 "--workers", 1)
    assert "cannot read image cut/2011_000006.jpg" in said


@pytest.mark.parametrize("arguments, message", [
    (["--clip", "nowhere.pt"], "'nowhere.pt' is neither a file nor a model; models: RN50"),
    (["--clip", "ViT-B/17"], "'ViT-B/17' is neither a file nor a model"),
    (["--clip", "damaged.pt"], "damaged.pt: not a readable file of PyTorch weights"),
    (["--clip", "zero.pt"], "zero.pt: not a readable file of PyTorch weights"),
    (["--clip", "resnet.pt"], "resnet.pt has a ResNet image encoder; the surgery"),
    (["--device", "nonsense"], "--device nonsense"),
    ([*FOLDER, "photos", "--classes", "cat, " + "owl " * 90, "--clip", "shapes-tiny"],
     "leaves no room for a prompt"),
    (["--download"], "there is nothing to download for --dataset shapes"),
])
def test_wrong_clip_device_and_names(place, capsys, arguments, message):
    assert message in error(capsys, reclip.main, *arguments)


@pytest.mark.parametrize("option, value", [
    ("--batch", 0), ("--epochs", 0), ("--crop", 0), ("--crop-ratio", 0), ("--crop-ratio", 1.5),
    ("--scale", "0 9"), ("--tau", 0), ("--mask-temperature", 0), ("--workers", -1), ("--lr", -1),
    ("--schedule", 1), ("--top", 0),
])
def test_values_out_of_range(small_demo, tmp_path, capsys, option, value):
    said = error(capsys, reclip.main, "--out", tmp_path / "run", "--epochs", 2, "--hypothesis",
                 "global", option, *str(value).split())
    assert said.startswith(f"error: {option} is ") and "expected" in said
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_same_folder(demo, place, clip_file, capsys):
    out = demo()
    before = (out / "reclip.pt").read_bytes()
    short = ("--out", out, "--epochs", 2)
    for arguments, message in [
        ((*short, "--lr", 0.02), "made with other settings (lr 0.03 → 0.02)"),
        ((*short, "--schedule", 40), "made with other settings (schedule 10 → 40)"),
        ((*short, "--seed", 1), "was made with other settings"),
        ((*short, "--clip", clip_file), "with another CLIP"),
        ((*short, "--crop-ratio", 0.25), "was made with other settings"),
        ((*short, *FOLDER, "photos", "--classes", "cat", "--clip", clip_file),
         "was made with other classes"),
        ((*short, "--method", "maskclip"), "was made with other settings"),
    ]:
        assert message in error(capsys, reclip.main, *arguments, "--device", "cpu")
    assert (out / "reclip.pt").read_bytes() == before
    own = ("--out", "own", "--method", "maskclip", *FOLDER, "photos", "--classes", "cat", "--clip",
           clip_file, "--workers", 0)
    run(reclip.main, *own)
    shutil.copy("photos/2011_000003.jpg", "photos/2011_000006.jpg")
    assert "own/reclip.pt was made with other images" in error(capsys, reclip.main, *own)
    scores = (out / "hypotheses.jsonl").read_text()
    (out / "hypotheses.jsonl").unlink()
    assert "was made with another CLIP" in error(capsys, reclip.main, *short, "--clip", clip_file)
    assert (out / "reclip.pt").read_bytes() == before
    (out / "hypotheses.jsonl").write_text(scores)
    (out / "reclip.pt").write_bytes(before[:5000])
    assert "reclip.pt is not a checkpoint" in error(capsys, reclip.main, *short)
    (out / "reclip.pt").write_bytes(before)
    for damaged in ("", "{nonsense\n", scores[:-30] + "\n"):
        (out / "hypotheses.jsonl").write_text(damaged)
        assert "hypotheses.jsonl is damaged; delete it" in error(capsys, reclip.main, *short)


def test_evaluating_the_wrong_thing(demo, place, clip_file, capsys):
    checkpoint = ("--checkpoint", demo() / "reclip.pt")
    for arguments, message in [
        ((), "no checkpoint under runs/; run python reclip.py first"),
        (("--checkpoint", "gone.pt"), "no checkpoint gone.pt"),
        (("--checkpoint", "damaged.pt"), "damaged.pt is not a checkpoint of reclip.py"),
        (("--checkpoint", "zero.pt"), "zero.pt is not a checkpoint of reclip.py"),
        (("--checkpoint", clip_file), "is not a checkpoint of reclip.py"),
        ((*checkpoint, "--dataset", "voc", "--data-root", "voc"),
         "was made for other classes (ladybug, flag, chessboard, leaf, moon, …) than voc's"),
        ((*checkpoint, "--dataset", "voc"), "--dataset voc needs --data-root"),
        ((*checkpoint, "--dataset", "coco"), 'no data set "coco"'),
        ((*checkpoint, "--clip", clip_file), "was made with another CLIP than"),
        ((*checkpoint, "--clip", "nowhere"), "'nowhere' is neither a file nor a model"),
        ((*checkpoint, "--clip", "resnet.pt"), "has a ResNet image encoder"),
        ((*checkpoint, "--slide", 96, 0), "--slide is 0; expected 1 or more"),
        ((*checkpoint, "--batch", -2), "--batch is -2; expected 1 or more"),
    ]:
        assert message in error(capsys, evaluate.main, *arguments, "--device", "cpu")


def test_wrong_labels(place, clip_file, capsys):
    arguments = ("--dataset", "voc", "--data-root", "voc", "--clip", clip_file, "--out", "run",
                 "--method", "maskclip", "--workers", 0)
    tree = Path("voc/VOCdevkit/VOC2012")
    label, image = tree / "SegmentationClass/2011_000025.png", tree / "JPEGImages/2011_000025.jpg"
    with Image.open(label) as whole:
        whole.crop((0, 0, 480, 375)).save("small.png")
        whole.point(lambda value: 77).save("ids.png")
    for broken, message in [
        ("small.png", f"label {label} is 480×375 pixels, its image 500×375"),
        ("ids.png", f"label {label} holds the id 77, which voc (20 classes) does not have"),
        ("zero.pt", f"cannot read label {label}"),
        ("photos/2011_000003.jpg", f"label {label} is a RGB picture; expected one channel"),
    ]:
        shutil.copy(broken, label)
        assert message in error(capsys, reclip.main, *arguments)
    label.unlink()
    run(reclip.main, *arguments)
    assert capsys.readouterr().out.endswith(
        "voc has no labels to compare with; masks of images: python evaluate.py --checkpoint "
        "run/reclip.pt --images …\n")
    image.unlink()
    assert "1 of the 1 images" in error(capsys, reclip.main, *arguments)


# ---- The scripts themselves --------------------------------------------------------------------


@pytest.mark.parametrize("main", [reclip.main, evaluate.main, data.main, pretrain.main],
                         ids=lambda main: main.__module__)
def test_help_works_offline(main, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("opened a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr()
    assert end.value.code == 0 and said.out.startswith("usage: ") and not said.err
    assert main is pretrain.main or "--dataset" in said.out


def python(folder, *arguments):
    """Run the interpreter in an empty folder, which is its home as well."""
    environment = {**os.environ, "HOME": str(folder), "PYTHONPATH": str(REPOSITORY),
                   "PYTHONDONTWRITEBYTECODE": "1", "TORCH_HOME": str(folder)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, text=True,
                          capture_output=True, timeout=120)


def test_imports_have_no_side_effects(tmp_path):
    names = sorted(path.stem for path in REPOSITORY.glob("*.py"))
    assert {"data", "evaluate", "reclip"} <= set(names)
    program = f"""
import random, socket, sys
import torch, torchvision  # may do what they like
def refuse(*args): raise AssertionError("opened a connection")
socket.socket.connect = refuse
state, threads, default = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
import clip, clip.pretrain, {", ".join(names)}
assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
assert torch.is_grad_enabled() == default and torch.get_default_dtype() == torch.float32
assert clip.clip.default_tokenizer.cache_info().currsize == 0, "the vocabulary was read"
"""
    done = python(tmp_path, "-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_a_script_ends_with_one_line_and_code_2(tmp_path):
    done = python(tmp_path, str(REPOSITORY / "evaluate.py"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no checkpoint under runs/")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
