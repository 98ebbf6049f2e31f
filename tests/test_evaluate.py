"""evaluate.py against plain loops and by hand: scores, biases, PAMR, windows, mirrors, what is in a
picture, probes, figures; and masks of one's own images, from files to folders and back."""

import math
import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import data
import evaluate
import reclip
from conftest import golden, json_lines, normal, picture, refuses, results, run, same, save
from data import VOID
from evaluate import Segmenter, confusion_matrix, most_likely, scores

CPU = torch.device("cpu")


def levels(*shape, seed=0):
    return (255 * normal(*shape, seed=seed).sigmoid()).to(torch.uint8)


def random_labels(*shape, C=4, void=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < void, VOID)


def plain_confusion(said, label, C=4):
    return torch.tensor([[((label == t) & (said == p)).sum() for p in range(C)] for t in range(C)])


@pytest.fixture(scope="module")
def segment(trained_demo):
    return Segmenter(trained_demo / "reclip.pt")


# ---- Scores and bias scores ----------------------------------------------------------------------

def test_confusion_matrices_count_pixels():
    said, label = random_labels(2, 20, 50, void=0), random_labels(2, 20, 50, seed=1)
    expected = plain_confusion(said, label)
    assert torch.equal(confusion_matrix(said, label, 4), expected)
    assert torch.equal(confusion_matrix(said.byte(), label.byte(), 4), expected)
    assert confusion_matrix(said, torch.full_like(label, VOID), 4).sum() == 0
    place = random_labels(2, 20, 50, C=3, void=0, seed=2)  # a matrix for each place
    for n, matrix in enumerate(confusion_matrix(said, label, 4, place.byte(), 3)):
        assert torch.equal(matrix, plain_confusion(said, label.where(place == n, VOID)))


def test_scores_by_hand_with_absent_classes_both_ways():
    # Class 2 occurs nowhere; class 3 is predicted but never true, so it counts with an IoU of 0.
    confusion = torch.tensor([[6, 2, 0, 0], [0, 5, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    for count_absent, counted in ((False, 3), (True, 4)):
        result = scores(confusion, count_absent)
        assert result["iou"] == [100 * 6 / 8, 100 * 5 / 8, None, 0.0]
        assert result["miou"] == pytest.approx(137.5 / counted)
        assert result["pixel_accuracy"] == pytest.approx(1100 / 14)
    # Rows as shares: 0.6 0.3 0.1 | 0.5 0.25 0.25 | absent | 0 0 0 1
    confusion = torch.tensor([[6, 3, 1, 0], [4, 2, 2, 0], [0, 0, 0, 0], [0, 0, 0, 7]])
    assert evaluate.class_preference(confusion) == pytest.approx((0.3 - 0.25 + 1) / 3)


def test_doubts_about_labels():
    names = list("abcdefgh")
    confusion = 50 * torch.eye(8, dtype=torch.int64) + 1
    [line] = evaluate.doubts(confusion.roll(1, 0), names)  # every class called by the next's name
    assert "below chance" in line and "order than a, b, c" in line
    confusion[1:7] = 0
    [line] = evaluate.doubts(confusion, names)
    assert "no label holds b, c, d, e, f, …" in line and "255" in line
    # Chance is what predictions get that have nothing to do with the truth.
    said, true = (torch.multinomial(torch.tensor([5.0, 3, 2]), 10**6, True) for _ in range(2))
    confusion, right = confusion_matrix(said, true, 3), 3000 * torch.eye(3, dtype=torch.int64)
    assert evaluate.doubts(confusion + right, names[:3]) == []
    assert evaluate.doubts(confusion - right, names[:3])


def test_precision_and_recall_of_hypotheses():
    val = data.open_dataset("shapes", split="val")
    val.ids, said = val.ids[:6], normal(6, 10) > 0
    true = torch.tensor([[(val.label(i) == k).any() for k in range(10)] for i in range(6)])
    hits = 100 * (said & true).sum().item()
    assert evaluate.hypothesis_quality(lambda rows: said[rows], val) == pytest.approx(
        (hits / said.sum().item(), hits / true.sum().item()))


def test_distance_of_a_centroid_by_hand():
    # 6×8 pixels: half the diagonal is 5. One object's centroid, (0.5, 1), is (2.5, 3) off centre.
    label, objects = torch.full((6, 8), VOID), torch.zeros(6, 8, dtype=torch.int64)
    label[0, :2], objects[0, :2] = 1, 3
    label[2:4, 3:5], objects[2:4, 3:5] = 0, 9  # in the very centre
    for bins in (1, 2, 5, 10, 100):
        nearest = evaluate.distance_bins(label, objects, bins)
        expected = int(math.hypot(2.5, 3) / 5 * bins)
        assert (nearest[0, :2] == expected).all() and (nearest[2:4, 3:5] == 0).all()
        assert (nearest == bins).sum() == 48 - 6
    objects[0, :5] = 3  # pixels without a class do not move the centroid, and are in no bin
    assert torch.equal(evaluate.distance_bins(label, objects, 100), nearest)


def test_curve_and_slope_by_hand():
    label = torch.tensor([[0, 0, 0, 1], [1, 1, VOID, 2]])
    said = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 0]])
    nearest = torch.tensor([[0, 0, 0, 0], [2, 2, 3, 2]])
    confusions = confusion_matrix(said, label, 3, nearest, 4)
    # Bin 0: class 0 has 2 of 3, class 1 has 1 of 2. Bin 2: class 1 has 1 of 2, class 2 has 0 of 1;
    # class 0 is predicted there, but no object of it lies there.
    curve, slope = evaluate.distance_curve(confusions[:-1]), evaluate.space_preference
    assert curve == pytest.approx([100 * (2 / 3 + 1 / 2) / 2, None, 25])
    assert slope(curve) == pytest.approx((1 / 4 - 7 / 12) / (5 / 6 - 1 / 6))
    assert slope([50, 40, 20, None, 30]) == pytest.approx((-0.5 - 1 + 0.25) / 3)
    assert slope([50, None]) is None


# ---- Prediction ----------------------------------------------------------------------------------

def test_pamr_is_that_of_its_authors():
    recorded = golden("encoders")["pamr"]
    image, logits, one = (recorded[name] for name in ("image", "logits", "one"))
    assert_close(evaluate.pamr(image, logits, 1, (1, 2)), one)
    found = evaluate.pamr(255 * image, logits, recorded["steps"], recorded["dilations"])
    assert_close(found, recorded["result"], atol=1e-5, rtol=1e-5)
    flat = evaluate.pamr(torch.full((1, 3, 5, 7), 128), normal(1, 90, 2, 3), 2, (2, 24))
    assert flat.isfinite().all() and flat.shape == (1, 90, 5, 7)
    image, logits = levels(1, 3, 600, 900), normal(1, 3, 2, 3)  # of which a class makes a part
    parts = [evaluate.pamr(image, part, 1, (1,)) for part in logits.split(1, 1)]
    assert same(evaluate.pamr(image, logits, 1, (1,)), torch.cat(parts, 1))


@pytest.mark.parametrize("C, size", [(3, (40, 56)), (70, (300, 420))])
def test_most_likely_is_argmax_and_softmax_after_upsampling(C, size):
    logits, extent = normal(1, C, 5, 7), ((40, 56), (38, 50), size)
    labels, sure = most_likely(logits, *extent, 0.1)
    full = F.interpolate(logits, (40, 56), mode="bilinear")[..., :38, :50]
    value, index = (F.interpolate(full, size, mode="bilinear") / 0.1).softmax(1).max(1)
    assert_close(sure, value)
    assert (labels == index).float().mean() > 0.9999
    for at in ((38, 50), size):
        seen = []
        found = most_likely(logits, *extent, 0.1, lambda x: seen.append(x.shape[2:]) or -x, at)
        assert set(seen) == {at} and not torch.equal(found[0], labels)
    refuses("finite", most_likely, logits / 0, *extent, 0.1)


def test_mean_of_windows_and_mirrors(trained_demo):
    """48×48 windows, 32 apart, of a view of 64×100 pixels, each twice: a plain sum."""
    images = F.interpolate(levels(1, 3, 8, 12), (64, 100))
    segment = Segmenter(trained_demo / "reclip.pt", slide=(48, 32), flip=True)
    found, _ = segment.logits(images)
    for stage, name in enumerate(segment.names):
        total, times = torch.zeros(1, 10, 64, 100), torch.zeros(64, 100)
        for top, left in ((0, 0), (0, 32), (0, 52), (16, 0), (16, 32), (16, 52)):
            window = ..., slice(top, top + 48), slice(left, left + 48)
            for part, back in ((images[window], ()), (images[window].flip(3), (3,))):
                inputs = segment.network.inputs(segment.network.encode(part))
                logits = segment.network.rectifier(*inputs, segment.network.Wr)[stage]
                total[window] += F.interpolate(logits, (48, 48), mode="bilinear").flip(back)
                times[window[1:]] += 1
        assert_close(found[name], total / times)
    student, slid = (Segmenter(trained_demo / "distill.pt", slide=s) for s in (None, (100, 50)))
    assert same(student(images, images), slid(images, images))  # a window over the whole image
    student.flip = True
    one, other = (student(x, x)["distilled"] for x in (images, images.flip(3)))
    assert (one == other.flip(2)).float().mean() > 0.999


def test_masks_of_several_names_are_those_of_the_best(tiny_clip):
    names = ["ladybug, beetle", "star", "heart, cross"]
    s = Namespace(**reclip.recipe("shapes", method="maskclip"), method="maskclip", preset="release")
    rectifier = reclip.Rectifier(tiny_clip, names, reclip.query_features(tiny_clip, names), "none")
    segment = Segmenter(reclip.RectifiedCLIP(tiny_clip, rectifier, None, names, s), pamr=(1, (1,)))
    image = data.open_dataset("shapes", split="val").image(3)[None]
    Z, _ = segment.network.inputs(segment.network.encode(image))
    each = torch.einsum("bdhw,cd->bchw", Z, segment.network.rectifier.Wq)
    best = F.interpolate(each, (96, 96), mode="bilinear").argmax(1)
    expected = torch.tensor([0, 0, 1, 2, 2])[best]
    assert len(best.unique()) == 5 and torch.equal(segment(image, image)["maskclip"], expected)
    labels, sure = segment(image, image, "maskclip", True)  # of classes: names do not compete
    each = F.interpolate(each, (96, 96), mode="bilinear") / 0.01
    each = torch.stack([each[:, :2].amax(1), each[:, 2], each[:, 3:].amax(1)], 1)
    assert torch.equal(labels, expected) and (sure - each.softmax(1).amax(1)).abs().max() < 1e-4
    segment.presence = (1e-6, tiny_clip, segment.network.rectifier.Wq, 1 / 2)  # hardly any
    assert (segment(image, image)["maskclip"] == expected).float().mean() > 0.99


def test_what_is_in_a_picture(segment, tiny_clip, monkeypatch):
    """Two names of class 0, one of class 1; of each crop the better name counts."""
    image = data.open_dataset("shapes").image(0)
    Wq = F.normalize(normal(1, 64) + 0.05 * normal(3, 64, seed=1), dim=1)  # alike: p is far from 0
    crops = reclip.cut_crops(image, 0.3, tiny_clip.visual.input_resolution)
    cosines = F.normalize(reclip.clip_features(tiny_clip, crops), dim=1) @ Wq.T
    own = torch.stack([cosines[:, :2].amax(1), cosines[:, 2]], 1) / 0.01
    p = evaluate.presence_prior(image, tiny_clip, Wq, 0.3, ["a, b", "c"])
    assert_close(p, own.softmax(1).mean(0))
    assert 0.05 < p.min() < p.max() < 0.95
    # and its logarithm is added to logits / T, of which PAMR then takes means
    image, prior = image[None], torch.linspace(0.1, 1, 10)
    monkeypatch.setattr(evaluate, "presence_prior", lambda *rest: prior)
    monkeypatch.setattr(segment, "presence", (3.0, tiny_clip, None, 0.5))
    monkeypatch.setattr(segment, "pamr", (2, (1, 2)))
    (plain, padded), found = segment.logits(image), segment(image, image)
    for name, T in (("maskclip", 0.01), ("rectified", 0.1)):  # that of the head
        logits = plain[name] / T + 3 * prior.log()[:, None, None]
        logits = F.interpolate(logits, padded, mode="bilinear")
        assert (found[name] == logits.argmax(1)).float().mean() > 0.999
        refined = evaluate.pamr(image, logits, 2, (1, 2)).argmax(1)
        assert (found[f"{name}_pamr"] == refined).float().mean() > 0.999


# ---- The command ---------------------------------------------------------------------------------

def test_every_image_counts_once(segment):
    pictures, expected = data.open_dataset("shapes", split="val"), dict.fromkeys(segment.names, 0)
    pictures.ids, image, label = pictures.ids[:5], pictures.image, pictures.label
    pictures.image, pictures.label = (lambda i: image(i)[:, 7 * i :]), (lambda i: label(i)[7 * i :])
    for i in range(5):
        view = data.resize_to_scale(pictures.image(i), (60, 80))[None]
        for name, mask in segment(view, pictures.image(i)[None]).items():
            expected[name] += plain_confusion(mask[0], pictures.label(i), 10)
    assert same(evaluate.evaluate(segment, pictures, (60, 80), CPU), expected)
    by_place = evaluate.evaluate(segment, pictures, (60, 80), CPU, workers=2, bins=3)
    assert same({name: m.sum(0) for name, m in by_place.items()}, expected)


def test_options_of_the_command(small_demo, trained_demo, tmp_path, capsys):
    checkpoint = reclip.load_checkpoint(trained_demo / "reclip.pt")
    checkpoint["settings"]["pd"] = 0.99
    torch.save(checkpoint, tmp_path / "reclip.pt")
    every = ("", "--pd 0", "--slide 48 24", "--flip", "--presence 2", "--presence 2 --crop-ratio 1",
             "--pamr --pamr-size image", "--pamr", "--bias", "--split train", "--count-absent")
    evaluated = lambda words: run(evaluate.main, "--checkpoint", tmp_path, *words.split())
    found = {words: evaluated(words) for words in every}
    for words, result in found.items():
        usual = words in ("", "--bias", "--pamr", "--pamr --pamr-size image")
        assert result["maskclip"]["standard"] == (usual or words == "--pd 0"), words
        assert result["rectified"]["standard"] == usual
        assert result["rectified"]["images"] == (24 if words == "--split train" else 12)
        assert ("rectified_no_pd" in result) == (words != "--pd 0")
    assert found[""]["rectified"]["pd"] == 0.99
    assert found["--pd 0"]["rectified"]["iou"] == found[""]["rectified_no_pd"]["iou"]
    assert len({str(found[words]["rectified"]["iou"]) for words in every[:6]}) == 6
    assert [found[words]["maskclip"]["crop_ratio"] for words in every[3:6]] == [None, 0.5, 1]
    large, refined = (found[words]["rectified_pamr"] for words in every[6:8])
    assert not large["standard"] and refined["standard"] and refined["pamr"] == (4, (1, 2, 4, 8))
    assert results(tmp_path)["rectified"] == found["--count-absent"]["rectified"]  # the last one
    assert "class-preference" in capsys.readouterr().out
    biased, val = found["--bias"]["rectified"], data.open_dataset("shapes", split="val")
    counted = sum((val.label(i) != VOID).sum() for i in range(len(val)))
    assert sum(part["pixels"] for part in biased["distance_curve"]) == counted
    evaluated("--bias"), evaluated("")
    assert results(tmp_path)["rectified"] == biased  # which stays with the same outcome


def test_figures_and_probe_of_several_checkpoints(demo_copy, capsys):
    other = Path(shutil.copytree("run", "other"))
    (other / "distill.pt").unlink()
    checkpoint = reclip.load_checkpoint(other / "reclip.pt")
    checkpoint["state"]["decoder.norm.bias"] += torch.arange(10.0)
    checkpoint["settings"]["cache"] = "gone"
    torch.save(checkpoint, other / "reclip.pt")
    run(evaluate.main, "--checkpoint", "run/reclip.pt", other, "--figures", "--out", "out",
        "--linear-probe")
    found = results("out")
    assert found["run maskclip"]["iou"] == found["other maskclip"]["iou"]
    assert found["run rectified"]["iou"] != found["other rectified"]["iou"]
    probes = [name for name, result in found.items() if result.get("trained_with_ground_truth")]
    assert len(probes) == 4 and all("linear_probe" in name for name in probes)
    assert min(found[name]["miou"] for name in probes) > 20  # ten classes: chance is some 5
    assert not any(found[name]["scored_on_its_training_images"] for name in probes)
    assert "trained with ground truth" in capsys.readouterr().out
    assert {path.stem for path in Path("out").glob("*.png")} == {
        "comparison", "heatmaps", "heatmaps-other", "confusion", "distance"}
    run(evaluate.main, "--checkpoint", other, "--hypotheses")  # which lie beside it
    assert not Path("gone").exists()
    run(reclip.main, "--method", "maskclip", "--out", "plain")
    found = run(evaluate.main, "--checkpoint", "plain", "run/reclip.pt")
    assert found.keys() == {"plain maskclip", "run maskclip", "run rectified"}
    run(evaluate.main, "--checkpoint", "run", "--figures")  # of both in the folder
    assert {"maskclip", "rectified", "distilled"} <= results("run").keys()
    Path("run/reclip.pt").unlink()
    run(evaluate.main, "--checkpoint", "run", "--figures", "--out", "alone")
    assert "no heatmaps.png" in capsys.readouterr().out


def test_a_student_asks_its_teachers_clip(demo_copy, clip_file, mistake, monkeypatch):
    command = (evaluate.main, "--checkpoint", "run/distill.pt", "--presence", 3)
    found = run(*command)["distilled"]
    assert found["presence"] == 3 and found["crop_ratio"] == 0.5 and not found["standard"]
    assert found["iou"] != run(*command[:3])["distilled"]["iou"]
    monkeypatch.setenv("HOME", str(Path(clip_file).parent))
    assert "another CLIP" in mistake(*command, "--clip", f"~/{Path(clip_file).name}")
    assert "--pd" in mistake(*command, "--pd", 0.5)
    assert "--clip" in mistake(*command, "--clip", "gone.pt")
    student = Segmenter("run/distill.pt")
    assert student.temperature("distilled") == 0.1
    student.network.head.decoder = None
    assert student.temperature("distilled") == 0.01
    student.settings.head = "learned"
    assert student.temperature("distilled") == 1


@pytest.mark.parametrize("words, named", [
    ("--confidence", "--images"), ("--unknown-below 0.5", "--images"), ("--dilations 2", "--pamr"),
    ("--unknown-below 2 --images a.png", "--unknown-below 2"), ("--pamr 0", "--pamr 0"),
    ("--crop-ratio 0.5", "--presence"), ("--presence 1 --crop-ratio 0.01", "--crop-ratio 0.01"),
    ("--presence 0", "--presence"), ("--preset paper --heads 2", "--heads and --preset"),
    ("--surgery value", "--surgery"), ("--images a.png --figures", "--figures"),
    ("--checkpoint b c --images a.png", "one --checkpoint"), ("--method maskclip", "--images"),
    ("--images gone.png", "gone.png"), ("--labels run", "--labels"),
    ("--images a.png --labels b", "--labels and --images")])
def test_mistakes(trained_demo, mistake, words, named):
    said = mistake(evaluate.main, "--checkpoint", trained_demo, *words.split())
    assert named.split()[0] in said and named.split()[-1] in said


# ---- One's own images ----------------------------------------------------------------------------

def pixels(file):
    return np.array(Image.open(file))


def test_masks_go_round(demo_copy, capsys):
    """Of photographs of any name, in folders; taken for labels of the same they give 100 %."""
    names = ["a.jpg", "a.png", "x/a.jpg", "x/y/b c&$(1).png", "z/" + "ä" * 100 + ".bmp",
             "x/.._.._escape.webp", "x/[0].tif", "two.dots.png"]
    for seed, name in enumerate(names):
        picture(f"in/{name}", (60 + seed, 50), seed=seed)
    run(evaluate.main, "--checkpoint", "run", "--images", "in", "--out", "out", "--confidence")
    rows = json_lines("out/predictions.jsonl")
    visible = [name for name in names if not name.startswith("x/.")]  # hidden files are left out
    assert sorted(os.path.relpath(row["image"], "in") for row in rows) == sorted(visible)
    for row in rows:
        mask = Image.open(Path("out", row["mask"]))
        assert mask.size == Image.open(row["image"]).size == (row["width"], row["height"])
        assert mask.getpalette()[:30] == data.SHAPES_PALETTE.flatten().tolist()
        sure, values = pixels(Path("out/confidence", row["mask"][6:])), np.array(mask)
        assert len(row["areas"]) == len(np.unique(values))
        for name, share in row["areas"].items():
            is_k = values == list(data.SHAPES).index(name)
            assert share == pytest.approx(100 * is_k.mean(), abs=1e-3)
            assert row["confidence"][name] == pytest.approx(sure[is_k].mean() / 255, abs=0.003)
        assert 420 <= Image.open(Path("out", row["overlay"])).width <= 1020
    assert Path("out/masks/x/y/b c&$(1).png").exists() and Path("out/masks/a.png.png").exists()
    checkpoint = reclip.load_checkpoint("run/distill.pt")
    checkpoint["settings"] |= dict(dataset="folder", data_root="in", labels="out/masks")
    torch.save(checkpoint, "distill.pt")
    found = run(evaluate.main, "--checkpoint", "distill.pt", "--linear-probe")
    assert found["distilled"]["miou"] == found["distilled"]["pixel_accuracy"] == 100
    assert found["linear_probe_distilled"]["scored_on_its_training_images"]
    assert "the very images" in capsys.readouterr().out


def test_unknown_folders_of_other_classes_and_broken_files(demo_copy, clip_file, mistake, capsys):
    save(Path("in/a.png"), data.open_dataset("shapes", split="val").image(3).movedim(0, -1))
    command = (evaluate.main, "--checkpoint", "run", "--images", "in", "--out")
    run(*command, "out", "--confidence", "--pamr", 1)
    run(*command, "strict", "--pamr", 1, "--unknown-below", 200.5 / 255)
    run(*command, "plain")
    mask, strict, sure = (pixels(f"{name}/a.png") for name in (
        "out/masks", "strict/masks", "out/confidence"))
    assert np.array_equal(strict == 255, sure < 200.5) and 0 < (strict == 255).mean() < 1
    assert np.array_equal(strict[strict != 255], mask[strict != 255])
    assert json_lines("out/predictions.jsonl")[0]["stage"] == "distilled_pamr"
    segment, image = Segmenter("run/distill.pt"), data.read_image("in/a.png")[None]
    assert np.array_equal(pixels("plain/masks/a.png"), segment(image, image)["distilled"][0])

    foreign = (evaluate.main, "--images", "in/a.png", "--method", "maskclip", "--clip", clip_file,
               "--heads", 1, "--classes", "a, b", "--out")
    assert "out has the masks of other classes" in mistake(*foreign, "out")
    run(*foreign, "mine", "--presence", 2, "--flip")
    Path("in/cut\x1b[2J.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(SystemExit, match="2"):
        run(*command, "out")
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "\x1b" not in err and "1 of 2 images" in err
    assert ["error" in row for row in json_lines("out/predictions.jsonl")] == [False, True]


def test_labels_of_a_folder(voc_root, clip_file, tmp_path, capsys, mistake):
    """0…C-1 or 1…C in the files; a class that no label holds, and no class at all."""
    tree, names = voc_root / "VOCdevkit" / "VOC2012", tmp_path / "names.txt"
    names.write_text("\n".join(data.CLASSES["voc"]))
    run(reclip.main, "--dataset", "folder", "--data-root", tree / "JPEGImages", "--clip", clip_file,
        "--method", "maskclip", "--classes", names, "--workers", 0, "--out", tmp_path / "run")
    assert "folder has no labels to compare with" in capsys.readouterr().out
    own = ("--checkpoint", tmp_path / "run", "--labels", tree / "SegmentationClass")
    shifted = run(evaluate.main, *own, "--labels-offset", 1)["maskclip"]
    assert "no label holds airplane" in capsys.readouterr().out
    voc = run(evaluate.main, *own[:2], "--dataset", "voc", "--data-root", voc_root)["maskclip"]
    assert shifted["images"] == 3 and voc["images"] == 1 and shifted["miou"] != voc["miou"]
    for file in (tree / "SegmentationClass").glob("*.png"):
        Image.new("L", Image.open(file).size, 255).save(file)
    assert "all are void" in mistake(evaluate.main, *own)
    assert results(tmp_path / "run")["maskclip"]["miou"] == voc["miou"]
