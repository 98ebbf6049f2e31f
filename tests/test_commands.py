"""The scripts as they are used: whole runs on photographs and on the demo, mistakes, --help."""

import functools
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import data
import distill
import evaluate
import reclip
from clip import pretrain
from clip.model import CLIP
from conftest import (REPOSITORY, demo_command, interrupt, learned, log, python, raising, results,
                      run, same)
from run import FixedViews, load_checkpoint

STAGES = ["maskclip", "rectified", "rectified_no_pd"]  # of a recipe with prompt denoising


@pytest.fixture
def rectify(demo, voc_root, clip_file):
    """rectify(*arguments, out=…) → the folder of a short run on the photographs of VOC's layout."""
    return functools.partial(demo, "--dataset", "voc", "--data-root", voc_root, "--clip", clip_file,
                             "--workers", 0)


def check_results(out, classes, stages):
    """The form of results.json: per stage mIoU, pixel accuracy and an IoU a class, in percent."""
    found = results(out)
    assert list(found) == stages
    for result in found.values():
        assert list(result["iou"]) == classes
        iou = [value for value in result["iou"].values() if value is not None]
        assert all(0 <= value <= 100 for value in (*iou, result["pixel_accuracy"]))
        assert result["miou"] == pytest.approx(sum(iou) / len(iou))
    return found


def test_voc_from_hypotheses_to_miou(rectify, voc_root, clip_file, tmp_path, capsys):
    here = shutil.copy(clip_file, tmp_path / "here.pt")
    out = rectify("--clip", here)
    votes = np.load(out / "hypotheses.npy")["scores"]
    assert votes.shape == (2, 20) and votes.sum(1).tolist() == [121, 121]
    assert learned(out)["step"] == 4 and learned(out)["finished"]
    rectified = check_results(out, data.CLASSES["voc"], STAGES)["rectified"]
    assert rectified["pd"] == 1.0 and rectified["images"] == 1
    said = capsys.readouterr().out
    assert "mIoU" in said and "tv monitor" in said and "hypotheses:" in said
    # The same command again trains nothing and prints the same table.
    before = results(out), log(out)
    assert (results(rectify("--clip", here)), log(out)) == before
    assert said.count("\nmIoU") == capsys.readouterr().out.count("\nmIoU") == 1
    # So it does when things have moved.
    there = here.rename(tmp_path / "there.pt")
    moved = voc_root.rename(tmp_path / "moved")
    assert results(rectify("--clip", there, "--data-root", moved)) == before[0]


def test_cityscapes_in_both_encodings(cityscapes_root, rectify):
    out = rectify("--dataset", "cityscapes", "--data-root", cityscapes_root)
    assert np.load(out / "hypotheses.npy")["scores"].sum(1).tolist() == [121]
    before = check_results(out, data.CLASSES["cityscapes"], STAGES)
    for path in cityscapes_root.rglob("*_labelTrainIds.png"):
        path.unlink()
    run(evaluate.main, "--checkpoint", out / "reclip.pt")
    again = check_results(out, data.CLASSES["cityscapes"], STAGES)
    for name, result in before.items():  # the two files differ in 77 pixels
        assert again[name] != result
        assert again[name]["miou"] == pytest.approx(result["miou"], abs=0.1)


def test_folder_trains_on_photographs_alone(photos, rectify, capsys):
    out = rectify("--dataset", "folder", "--data-root", photos, "--classes", "cat, dog, sofa")
    assert learned(out)["step"] == 6 and len(learned(out)["state"]["Wq"]) == 3
    assert capsys.readouterr().out.splitlines()[-1] == (
        "folder has no labels to compare with; masks of images: python evaluate.py --checkpoint "
        f"{out}/reclip.pt --images …")
    assert not (out / "results.json").exists()
    run(evaluate.main, "--checkpoint", out / "reclip.pt")
    assert capsys.readouterr().out.startswith("folder has no labels to compare with; masks of")


def test_vit_b16(rectify, voc_root, cityscapes_root, tmp_path, monkeypatch):
    """The same path with the sizes of ViT-B/16; few templates and crops, for the sake of time."""
    torch.manual_seed(0)
    model = CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
    torch.save({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "clip.pt")
    del model
    few = functools.partial(reclip.query_features, templates=["a photo of a {}.", "the {}."])
    monkeypatch.setattr(reclip, "query_features", few)
    for name, root in ("voc", voc_root), ("cityscapes", cityscapes_root):
        out = rectify("--dataset", name, "--data-root", root, "--clip", tmp_path / "clip.pt",
                      "--crop-ratio", 1, "--epochs", 1, "--batch", 1, "--scale", 400, 96,
                      "--crop", 96, out=f"{name}-run")
        state = learned(out)["state"]
        assert state["reference.prompt"].shape == (73, 512)
        assert state["position.weight"].shape == (512, 768, 1, 1)
        C = len(data.CLASSES[name])
        assert state["decoder.conv.weight"].shape == (C, 512 + C, 5, 5)
        check_results(out, data.CLASSES[name], STAGES)
    (tmp_path / "clip.pt").unlink()  # 300 MB, which pytest would keep


def test_neither_workers_nor_label_files_change_training(rectify, voc_root):
    labelled, workers = rectify(out="labelled"), rectify("--workers", 2, out="workers")
    assert same(learned(labelled), learned(workers)) and results(labelled) == results(workers)
    for path in voc_root.rglob("SegmentationClass/*.png"):
        path.unlink()
    unlabelled = rectify(out="unlabelled")
    assert (labelled / "results.json").exists() and not (unlabelled / "results.json").exists()
    assert same(learned(labelled), learned(unlabelled)) and log(labelled) == log(unlabelled)


def test_every_epoch_has_its_learning_rate_and_the_loss_falls(demo):
    rows = log(demo("--schedule", 32, epochs=12))
    assert [row["step"] for row in rows] == [*range(1, 25)]  # 2 batches an epoch
    expected = [0.03 * (1 - n // 2 / 32) ** 0.9 for n in range(24)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)
    losses = [row["loss"] for row in rows]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.parametrize("step, method", [(2, "save"), (3, "after")])  # at checkpoints, between
def test_two_and_two_steps_are_four(demo, monkeypatch, step, method):
    whole = demo(out="whole")
    with monkeypatch.context() as patch:
        interrupt(patch, step, method)
        with pytest.raises(SystemExit, match="130"):
            demo(out="parts")
    half = learned(whole.with_name("parts"))
    assert half["step"] == 2 and not half["finished"]
    parts = demo(out="parts")
    assert same(learned(parts), learned(whole)) and log(parts) == log(whole)
    assert not same(half["state"], learned(whole)["state"])  # the other two steps do matter


@pytest.mark.parametrize("options", [(), ("--learn-query", "--amp"), ("--method", "reclip")])
def test_a_compiled_step_changes_nothing(demo, monkeypatch, options):
    """Traced as for a CUDA graph, in one piece, and run without a GPU as it was traced."""
    train, torch_compile, modes = reclip.train, torch.compile, []

    def compile_on_the_cpu(step, mode, dynamic):
        modes.append((mode, dynamic))
        return torch_compile(step, backend="aot_eager", dynamic=dynamic, fullgraph=True)

    def train_with_graph(s, *rest):
        s.graph = True
        train(s, *rest)

    plain = learned(demo(*options, out="plain"))
    monkeypatch.setattr(torch, "compile", compile_on_the_cpu)
    monkeypatch.setattr(reclip, "train", train_with_graph)
    assert same(learned(demo(*options, out="graph")), plain)
    assert modes == [("reduce-overhead", False)]


def test_seeds_differ_and_repeat(demo):
    first, again = learned(demo(out="a")), learned(demo(out="b"))
    other = learned(demo("--seed", 1, out="c"))
    assert same(first, again) and not same(first["state"], other["state"])


BOTH = ["maskclip", "rectified"]
ALL_PARTS = {"reference", "position", "decoder"}


@pytest.mark.parametrize("arguments, parts, stages", [
    (("--method", "reclip"), {"reference", "position"}, BOTH),
    (("--preset", "paper"), ALL_PARTS, BOTH),
    (("--surgery", "program"), ALL_PARTS, BOTH),
    (("--hypothesis", "global"), ALL_PARTS, BOTH),
    (("--bias", "none"), {"decoder"}, BOTH),
    (("--bias", "reference"), {"reference", "decoder"}, BOTH),
    (("--no-decoder",), {"reference", "position"}, BOTH),
    (("--add",), ALL_PARTS, BOTH),
    (("--wr-norm", "class"), ALL_PARTS, BOTH),
    (("--pooling", "cosine"), ALL_PARTS, BOTH),
    # what is not CLIP's any more is not called MaskCLIP
    (("--learn-query",), ALL_PARTS | {"query"}, ["rectified"]),
    (("--tune-encoder", "--views", 0), ALL_PARTS | {"visual"}, ["rectified"]),
])
def test_methods_and_ablations(demo, trained_demo, arguments, parts, stages):
    out = demo(*arguments, epochs=3)
    state, plain = learned(out)["state"], learned(trained_demo)["state"]
    assert {key.split(".")[0] for key in state} == parts | {"Wq"}
    shared = [key for key in state.keys() & plain.keys() if key.endswith(("prompt", "weight"))]
    assert shared and not any(torch.equal(state[key], plain[key]) for key in shared)
    before = check_results(out, list(data.SHAPES), stages)
    assert stages != BOTH or before["maskclip"]["iou"] != before["rectified"]["iou"]
    again = run(evaluate.main, "--checkpoint", out / "reclip.pt")
    assert all(again[name]["iou"] == result["iou"] for name, result in before.items())


def test_bf16_is_close_to_float32(demo, monkeypatch):
    whole = demo("--views", 0, out="whole")
    texts, in_bf16 = reclip.encode_shared_prefix, []

    def encode_shared_prefix(*args):
        in_bf16.append(torch.is_autocast_enabled("cpu"))
        return texts(*args)

    monkeypatch.setattr(reclip, "encode_shared_prefix", encode_shared_prefix)
    half = demo("--views", 0, "--amp", out="half")
    assert in_bf16 == [True] * 4 + [False]  # four steps, and the checkpoint
    losses = [[row["loss"] for row in log(out)] for out in (whole, half)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    miou = [results(out)["maskclip"]["miou"] for out in (whole, half)]
    assert miou[0] == pytest.approx(miou[1], abs=1)
    run(distill.main, "--teacher", half / "reclip.pt", "--epochs", 1, "--amp")
    check_results(half, list(data.SHAPES), [*BOTH, "distilled"])


def test_maskclip_needs_no_training_and_has_a_preset(demo):
    out = demo("--method", "maskclip")
    assert not (out / "hypotheses.npy").exists() and not (out / "log.jsonl").exists()
    maskclip = check_results(out, list(data.SHAPES), ["maskclip"])["maskclip"]
    assert maskclip == results(demo(out="trained"))["maskclip"] and maskclip["miou"] > 25
    paper = demo("--method", "maskclip", "--preset", "paper", out="paper")
    assert results(paper)["maskclip"]["iou"] != maskclip["iou"]


def test_folders_are_named_after_what_is_not_default(small_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(reclip.main, "--method", "maskclip")
    run(reclip.main, "--method", "maskclip", "--preset", "paper", "--seed", 3)
    release, paper = made = sorted(path.parent for path in Path("runs").glob("*/reclip.pt"))
    assert list(map(str, made)) == ["runs/shapes-maskclip", "runs/shapes-maskclip-paper-seed3"]
    # evaluate.py takes the one written last.
    os.utime(release / "reclip.pt", (2e9, 2e9))
    before = (paper / "results.json").stat().st_mtime_ns
    found = run(evaluate.main, "--count-absent")
    assert found["maskclip"]["count_absent"] and results(release) == found
    assert (paper / "results.json").stat().st_mtime_ns == before


def test_a_teacher_is_shown_as_its_recipe_evaluates_it(demo_copy, capsys):
    def said():
        capsys.readouterr()
        run(*demo_command(distill))
        return capsys.readouterr().out.splitlines()[-1]

    usual = said()
    assert re.fullmatch(r"mIoU: maskclip [\d.]+  rectified [\d.]+  distilled [\d.]+", usual)
    for other in (("--pd", 0.99), ("--split", "train")):
        run(evaluate.main, "--checkpoint", "run/reclip.pt", *other)
        assert said() == usual


@pytest.fixture
def encoded(monkeypatch):
    """Counts the images that the dense encoder sees, and can stop after some."""
    original = reclip.dense_features

    def encode(visual, images, *surgery):
        encode.images += len(images)
        if encode.images > encode.limit:
            raise KeyboardInterrupt
        return original(visual, images, *surgery)

    encode.images, encode.limit = 0, 10**6
    monkeypatch.setattr(reclip, "dense_features", encode)
    return encode


def test_as_many_views_as_epochs_are_fresh_views(demo):
    fresh, fixed, two = (demo("--views", views, out=str(views), epochs=3) for views in (0, 3, 2))
    assert not (fresh / "views.npy").exists()
    features = np.load(fixed / "views.npy")["features"]
    assert features.shape == (3 * 24, 64, 12, 12) and features.dtype == np.float16
    for name, value in learned(fresh)["state"].items():  # apart by float16 alone
        assert_close(learned(fixed)["state"][name], value, atol=2e-3, rtol=2e-2)
    assert np.array_equal(np.load(two / "views.npy")["features"], features[: 2 * 24])
    assert not same(learned(two)["state"], learned(fixed)["state"])


def test_epochs_after_the_last_view_begin_again():
    records = np.zeros(2 * 4, [("features", np.float16, (1, 1, 1))])
    records["features"] = np.arange(2 * 4).reshape(8, 1, 1, 1)
    views = FixedViews(records, 4)
    for epoch in range(5):
        batch = views.__getitems__([(epoch, 3), (epoch, 1)])
        assert batch["index"].tolist() == [3, 1]
        assert batch["features"].flatten().tolist() == [epoch % 2 * 4 + 3, epoch % 2 * 4 + 1]


def test_views_are_computed_once_and_shared(demo, encoded, tmp_path, capsys):
    demo("--cache", tmp_path / "cache", out="one")
    once = encoded.images
    assert once >= 48 and "0.00 GB" in capsys.readouterr().out
    whole = demo("--cache", tmp_path / "cache", "--add", out="two")
    assert "views:" not in capsys.readouterr().out
    assert encoded.images - once == 12  # the evaluation
    assert not (whole / "views.npy").exists() and (whole / "reclip.pt").exists()


def test_an_interrupted_cache_goes_on(demo, encoded, tmp_path):
    whole = demo(out="whole")
    total, encoded.images, encoded.limit = encoded.images, 0, 16
    with pytest.raises(SystemExit, match="130"):
        demo(out="parts")
    assert (np.load(tmp_path / "parts" / "views.npy")["checksum"] != 0).sum() == 16
    encoded.images, encoded.limit = 0, 10**6
    parts = demo(out="parts")
    assert encoded.images == total - 16
    assert np.array_equal(np.load(parts / "views.npy"), np.load(whole / "views.npy"))
    assert sorted(p.name for p in parts.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert same(learned(parts), learned(whole))


def test_a_small_disk_is_noticed_before_any_view(tmp_path, small_demo, mistake, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    said = mistake(*demo_command(reclip, tmp_path / "run"))
    assert "0.00 GB, and 0.00 GB are free" in said and "--views 0" in said
    assert not list((tmp_path / "run").glob("views.npy*"))


def test_a_learned_query_moves_and_is_what_is_evaluated(demo, tiny_clip):
    checkpoint = load_checkpoint(demo("--learn-query") / "reclip.pt")
    classes, Wq = checkpoint["classes"], checkpoint["state"]["Wq"]
    start = reclip.Reference(tiny_clip, classes, "a photo of a")
    unit = lambda: torch.nn.functional.normalize(start.encode(tiny_clip), dim=1)
    with torch.no_grad():
        # at first it is the plain prompt "a photo of a NAME"
        prompts = reclip.query_features(tiny_clip, classes, ["a photo of a {}"])
        assert_close(unit(), prompts, atol=1e-5, rtol=0)
        assert (Wq - prompts).abs().max() > 1e-3
        start.load_state_dict({k.removeprefix("query."): v for k, v in checkpoint["state"].items()
                               if k.startswith("query.")})
        assert_close(unit(), Wq, atol=1e-6, rtol=0)


def test_wr_by_row_or_by_matrix(demo):
    rows = {norm: learned(demo("--wr-norm", norm, out=norm))["Wr"].norm(dim=1)
            for norm in ("matrix", "class")}
    assert rows["matrix"].square().sum().item() == pytest.approx(1)
    assert rows["class"].tolist() == pytest.approx([1] * 10)


def test_cosine_pooling_by_hand():
    masks = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # B×C×h×w = 1×2×1×2
    Z = torch.tensor([[[[0.6, 0.0]], [[0.8, 1.0]]]])
    expected = torch.tensor([[[0.6, 0.8], [0.0, 1.0]]])
    assert_close(reclip.cosine_pooling(masks, Z, torch.eye(2)), expected)


@pytest.mark.parametrize("length, workers", [(9000, 0), (9000, 1), (0, 0)])
def test_a_broken_image_is_named(photos, tmp_path, mistake, length, workers):
    path = photos / "2011_000006.jpg"
    path.write_bytes(path.read_bytes()[:length])
    said = mistake(reclip.main, "--dataset", "folder", "--data-root", photos, "--classes", "cat",
                   "--clip", "shapes-tiny", "--out", tmp_path / "run", "--workers", workers)
    assert f"cannot read image {path}" in said


@pytest.mark.parametrize("main", [reclip.main, evaluate.main, data.main, pretrain.main],
                         ids=lambda main: main.__module__)
def test_help_works_offline(main, capsys, monkeypatch):
    monkeypatch.setattr(socket, "socket", raising(AssertionError("opened a connection")))
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr()
    assert end.value.code == 0 and said.out.startswith("usage: ") and not said.err
    assert main is pretrain.main or "--dataset" in said.out


def without_traces(home, *arguments):
    """Python's exit code and output; it leaves nothing in the empty folder that is its home."""
    done = python(*arguments, cwd=home, HOME=str(home), TORCH_HOME=str(home),
                  PYTHONDONTWRITEBYTECODE="1")
    assert not list(home.iterdir())
    return done.returncode, done.stdout, done.stderr


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
assert not torch.cuda.is_initialized()
"""
    assert without_traces(tmp_path, "-c", program) == (0, "", "")


def test_a_script_ends_with_one_line_and_code_2(tmp_path):
    code, out, err = without_traces(tmp_path, REPOSITORY / "evaluate.py")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: no checkpoint under runs/")
