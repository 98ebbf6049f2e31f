"""evaluate.py: refined masks, confidence, prompt denoising beside none, several checkpoints."""

import inspect
import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import maps
import reclip
from conftest import SmallShapes, normal, predictions, results, run, save
from evaluate import Segmenter, most_likely
from run import load_checkpoint


@pytest.fixture
def photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("a.png"), data.open_dataset("shapes", split="val").image(3).movedim(0, -1))
    return Path("a.png")


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """A folder with reclip.pt of ReCLIP, hardly trained; results are written there."""
    out = tmp_path_factory.mktemp("demo") / "joint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "Shapes", SmallShapes)
        run(reclip.main, "--method", "reclip", "--out", out, "--epochs", 1)
    return out


def pixels(file):
    return np.array(Image.open(file))


@pytest.mark.parametrize("C, size", [(3, (40, 56)), (70, (33, 41)), (70, (300, 420))])
def test_most_likely_is_argmax_and_softmax_after_upsampling(C, size):
    logits = normal(1, C, 5, 7)
    labels, sure = most_likely(logits, (40, 56), (38, 50), size, 0.1)
    full = F.interpolate(logits, (40, 56), mode="bilinear")[..., :38, :50]
    value, index = (F.interpolate(full, size, mode="bilinear") / 0.1).softmax(1).max(1)
    torch.testing.assert_close(sure, value)
    assert (labels == index).float().mean() > 0.9999
    doubled = most_likely(logits, (40, 56), (38, 50), size, 0.1, lambda part: 2 * part)
    assert torch.equal(doubled[0], labels) and (doubled[1] >= sure - 1e-6).all()


def test_temperature_follows_the_head(trained_demo):
    rectified, student = (Segmenter(trained_demo / name) for name in ("reclip.pt", "distill.pt"))
    assert rectified.temperature("maskclip") == 0.01
    assert rectified.temperature("rectified") == 0.1 == student.temperature("distilled")
    student.network.head.decoder = None
    assert student.temperature("distilled") == 0.01
    student.settings.head = "learned"
    assert student.temperature("distilled") == 1


def test_confidence_and_unknown(trained_demo, photo):
    command = ("--checkpoint", trained_demo, "--images", photo)  # of a folder: its student
    run(evaluate.main, *command, "--out", "plain")
    run(evaluate.main, *command, "--out", "out", "--confidence")
    run(evaluate.main, *command, "--out", "strict", "--unknown-below", 200.5 / 255)
    [row] = predictions()
    assert row["stage"] == "distilled"
    plain, strict = pixels("plain/masks/a.png"), pixels("strict/masks/a.png")
    sure = pixels("out/confidence/a.png")
    assert sure.dtype == np.uint8 and sure.shape == plain.shape and 0 < sure.std()
    for name, mean in row["confidence"].items():
        k = list(data.SHAPES).index(name)
        assert mean == pytest.approx(sure[plain == k].mean() / 255, abs=0.003)
    assert np.array_equal(strict == 255, sure < 200.5) and 0 < (strict == 255).mean() < 1
    assert np.array_equal(strict[strict != 255], plain[strict != 255])
    assert sum(predictions("strict")[0]["areas"].values()) == pytest.approx(
        100 * (strict != 255).mean(), abs=0.01)
    assert not Path("plain/confidence").exists() and not Path("strict/confidence").exists()


def test_pamr_of_every_stage(small_demo, trained_demo, tmp_path, photo):
    checkpoints = ("--checkpoint", trained_demo / "reclip.pt", trained_demo / "distill.pt")
    both = run(evaluate.main, *checkpoints, "--pamr", "--out", tmp_path)
    assert list(both) == ["maskclip", "rectified", "maskclip_pamr", "rectified_pamr", "distilled",
                          "distilled_pamr"]
    plain = run(evaluate.main, *checkpoints, "--out", tmp_path / "plain")
    for name, result in plain.items():
        assert result == both[name]
        refined = both[f"{name}_pamr"]
        assert refined["pamr"] == (4, (1, 2, 4, 8)) and refined["standard"]
    other = run(evaluate.main, *checkpoints, "--pamr", 1, "--dilations", 3, "--out", tmp_path)
    assert other["rectified_pamr"]["pamr"] == (1, (3,))
    assert not other["rectified_pamr"]["standard"] and other["rectified"]["standard"]

    segment, slid = (Segmenter(trained_demo / "reclip.pt", pamr=(3, (2, 5)), **options)
                     for options in ({}, {"slide": (96, 96)}))
    view = data.read_image(photo)[None]
    logits, padded = segment.logits(view)
    logits = F.interpolate(logits["rectified"], padded, mode="bilinear")
    expected = maps.pamr(view, logits, 3, (2, 5)).argmax(1)
    assert torch.equal(segment(view, (96, 96))["rectified_pamr"], expected)
    assert torch.equal(slid(view, (96, 96))["rectified_pamr"], expected)
    run(evaluate.main, *checkpoints[:2], "--images", photo, "--pamr", 3, "--dilations", 2, 5,
        "--out", "out", "--method", "maskclip")
    assert predictions()[0]["stage"] == "maskclip_pamr"
    assert np.array_equal(pixels("out/masks/a.png"), segment(view, (96, 96))["maskclip_pamr"][0])


def test_twice_as_many_epochs_do_not_change_a_probe(tiny_clip):
    s = Namespace(**reclip.recipe("shapes", method="maskclip"), dataset="shapes", method="maskclip",
                  preset="release", seed=100)
    segment = Segmenter(reclip.plain_maskclip(tiny_clip, list(data.SHAPES), s))
    train, val = (data.open_dataset("shapes", split=split, seed=100) for split in ("train", "val"))
    epochs = inspect.signature(evaluate.linear_probe).parameters["epochs"].default
    device, miou = torch.device("cpu"), []
    for n in (epochs, 2 * epochs):
        probe = evaluate.linear_probe(segment, train, device, n, batch=32)
        found = evaluate.evaluate(probe, val, s.scale, device)["linear_probe_maskclip"]
        miou.append(evaluate.scores(found)["miou"])
    assert abs(miou[1] - miou[0]) < 0.3 and miou[0] > 60


def test_with_and_without_prompt_denoising(small_demo, trained_demo, tmp_path):
    """Of a recipe with PD both are kept, from the same logits."""
    checkpoint = load_checkpoint(trained_demo / "reclip.pt")
    checkpoint["settings"]["pd"] = 0.99
    torch.save(checkpoint, tmp_path / "reclip.pt")
    both = run(evaluate.main, "--checkpoint", tmp_path)
    assert list(both) == ["maskclip", "rectified", "rectified_no_pd"]
    assert [result["pd"] for result in both.values()] == [None, 0.99, None]
    assert all(result["standard"] for result in both.values())
    assert results(tmp_path) == both
    without = run(evaluate.main, "--checkpoint", tmp_path, "--no-pd", "--out", tmp_path / "no")
    assert list(without) == ["maskclip", "rectified"]
    assert both["rectified_no_pd"]["iou"] == without["rectified"]["iou"] != both["rectified"]["iou"]


def test_several_checkpoints_side_by_side(small_demo, trained_demo, joint, tmp_path):
    found = run(evaluate.main, "--checkpoint", trained_demo / "reclip.pt", joint, "--figures",
                "--out", tmp_path)
    first, second = (f"{folder.name} rectified" for folder in (trained_demo, joint))
    assert list(found) == ["maskclip", first, second]  # MaskCLIP is the same in both
    assert list(results(tmp_path)) == ["maskclip", first, second]
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {"comparison", "heatmaps", "heatmaps-joint", "confusion", "distance"}
    assert Image.open(tmp_path / "comparison.png").width == 5 * (190 + 6) + 6
    # Without --out each one's results lie beside it, under their own names.
    run(evaluate.main, "--checkpoint", joint, joint / "reclip.pt")
    assert list(results(joint)) == ["maskclip", "rectified"]


@pytest.mark.parametrize("folder, heads", [
    ("trained_demo", ["bias Wp·Wr", "rectified", "decoded"]),
    ("joint", ["position Mp", "rectified"])])
def test_parts_of_the_bias_add_up(small_demo, request, folder, heads):
    view = data.open_dataset("shapes", split="val").image(0)[None]
    segment = Segmenter(request.getfixturevalue(folder) / "reclip.pt")
    found, padded = maps.bias_maps(segment, view)
    assert list(found) == ["Query", "Reference Z·Wr", *heads] and padded == [96, 96]
    logits = {name: pair[0] for name, pair in found.items()}
    Mq, M = segment.network.logits(segment.network.encode(view))
    assert torch.equal(logits["Query"], Mq) and torch.equal(logits[heads[-1]], M)
    bias = logits[heads[0]] + (logits["Reference Z·Wr"] if "position Mp" in heads else 0)
    torch.testing.assert_close(logits["Query"] - bias, logits["rectified"])
    assert all(torch.equal(*found[name]) for name in ("Query", "rectified", heads[-1]))


def test_a_folder_holds_masks_of_one_list_of_classes(trained_demo, photo, clip_file, mistake):
    run(evaluate.main, "--checkpoint", trained_demo, "--images", photo, "--out", "out")
    assert json.loads(Path("out/classes.json").read_text("utf-8")) == list(data.SHAPES)
    other = ("--images", photo, "--method", "maskclip", "--clip", clip_file, "--heads", 1,
             "--classes", "a, b")
    said = mistake(evaluate.main, *other, "--out", "out")
    assert "--out" in said
    assert "out has the masks of other classes than a, b" in said
    run(evaluate.main, *other, "--out", "elsewhere")
    run(evaluate.main, *other, "--out", "elsewhere", "--surgery", "naclip", "--sigma", 2)


@pytest.mark.skipif(os.name == "nt", reason="names are bytes")
def test_names_come_back_as_they_are_and_are_printed_escaped(trained_demo, photo, capfd):
    sound = photo.read_bytes()
    files = {b"in/line\nerror: no.png": sound, b"in/\x1b[2Jclear.png": sound,
             b"in/no-utf8-\xff.png": sound, b"in/broken\n\x1b[2J.png": b""}
    Path("in").mkdir()
    for name, content in files.items():
        Path(os.fsdecode(name)).write_bytes(content)
    with pytest.raises(SystemExit):
        run(evaluate.main, "--checkpoint", trained_demo, "--images", "in", "--out", "out")
    out, err = capfd.readouterr()
    assert "\x1b[2J" not in out + err and err.count("\n") == 2
    assert {os.fsencode(row["image"]) for row in predictions()} == files.keys()


@pytest.mark.parametrize("words, message", [
    ("--confidence", "--confidence and --unknown-below go with --images"),
    ("--unknown-below 0.5", "go with --images"),
    ("--unknown-below 2 --images a.png", "--unknown-below is 2.0; expected 0 to 1"),
    ("--dilations 2", "--dilations goes with --pamr"),
    ("--pamr 0", "--pamr is 0; expected 1 or more"),
    ("--preset paper --heads 2", "--heads and --preset: what"),
    ("--sigma 2", "cannot be changed afterwards"),
    ("--checkpoint b c --images a.png", "take one --checkpoint"),
])
def test_mistakes(trained_demo, photo, mistake, words, message):
    assert message in mistake(evaluate.main, "--checkpoint", trained_demo, *words.split())


def test_a_folder_with_labels_of_its_own(voc_root, clip_file, tmp_path, capsys):
    """--labels: what evaluates works on one's own photographs, with 0…C-1 or 1…C in the files."""
    tree = voc_root / "VOCdevkit" / "VOC2012"
    names = tmp_path / "names.txt"
    names.write_text("\n".join(data.CLASSES["voc"]))
    run(reclip.main, "--dataset", "folder", "--data-root", tree / "JPEGImages", "--clip", clip_file,
        "--heads", 1, "--method", "maskclip", "--classes", names, "--workers", 0, "--out",
        tmp_path / "run")
    assert "folder has no labels to compare with" in capsys.readouterr().out
    own = ("--checkpoint", tmp_path / "run", "--labels", tree / "SegmentationClass")
    shifted = run(evaluate.main, *own, "--labels-offset", 1, "--bias", "--figures")["maskclip"]
    voc = run(evaluate.main, *own[:2], "--dataset", "voc", "--data-root", voc_root)["maskclip"]
    assert shifted["images"] == 3 and voc["images"] == 1 and shifted["miou"] != voc["miou"]
    assert (tmp_path / "run" / "confusion.png").exists()
