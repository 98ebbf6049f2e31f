"""evaluate.py: bias scores by hand, figures, linear probe."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import reclip
from conftest import results, run
from data import VOID
from evaluate import (class_preference, class_shares, confusion_by_distance, confusion_matrix,
                      distance_bins, distance_curve, linear_probe, space_preference)

def test_class_preference_by_hand():
    # Rows as shares: 0.6 0.3 0.1 | 0.5 0.25 0.25 | absent | 0 0 0 1
    confusion = torch.tensor([[6, 3, 1, 0], [4, 2, 2, 0], [0, 0, 0, 0], [0, 0, 0, 7]])
    expected = ((0.6 - 0.3) + (0.25 - 0.5) + (1 - 0)) / 3
    assert class_preference(confusion) == pytest.approx(expected)
    assert class_preference(torch.tensor([[5]])) == 1
    assert class_preference(torch.tensor([[0, 5], [5, 0]])) == -1
    assert class_preference(torch.zeros(3, 3, dtype=torch.int64)) is None


def test_distance_of_a_centroid_by_hand():
    # 6×8 pixels: half the diagonal is 5. An object of the pixels (0, 0) and (0, 1) has its centroid
    # at (0.5, 1), which is (2.5, 3) from the centre (3, 4).
    label, objects = torch.full((6, 8), VOID), torch.zeros(6, 8, dtype=torch.int64)
    label[0, :2], objects[0, :2] = 1, 3
    label[2:4, 3:5], objects[2:4, 3:5] = 0, 9  # in the very centre
    expected = math.hypot(2.5, 3) / 5  # 0.78
    for bins in (1, 2, 5, 10, 100):
        nearest = distance_bins(label, objects, bins)
        assert (nearest[0, :2] == int(expected * bins)).all() and (nearest[2:4, 3:5] == 0).all()
        assert (nearest == bins).sum() == 48 - 6
    # Pixels without a class do not move the centroid, and are in no bin.
    objects[0, :5] = 3
    assert torch.equal(distance_bins(label, objects, 100), nearest)
    assert (distance_bins(label, torch.zeros_like(objects)) == evaluate.BINS).all()


def test_curve_and_slope_by_hand():
    label = torch.tensor([[0, 0, 0, 1], [1, 1, VOID, 2]])
    prediction = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 0]])
    nearest = torch.tensor([[0, 0, 0, 0], [2, 2, 3, 2]])
    confusions = confusion_by_distance(prediction, label, nearest, 3, bins=3)
    assert confusions.shape == (4, 3, 3)
    assert torch.equal(confusions.sum(0), confusion_matrix(prediction, label, 3))
    # Bin 0: class 0 has 2 of 3, class 1 has 1 of 2. Bin 2: class 1 has 1 of 2, class 2 has 0 of 1;
    # class 0 is predicted there, but no object of it lies there.
    curve = distance_curve(confusions[:-1])
    assert curve == pytest.approx([100 * (2 / 3 + 1 / 2) / 2, None, 25])
    assert space_preference(curve) == pytest.approx((1 / 4 - 7 / 12) / (5 / 6 - 1 / 6))
    assert space_preference([50, 40, 20, None, 30]) == pytest.approx((-0.5 - 1 + 0.25) / 3)
    assert space_preference([50, None]) is None


def test_bias_of_the_demo(small_demo, trained_demo, tmp_path, capsys):
    checkpoint = ("--checkpoint", trained_demo / "reclip.pt", "--out", tmp_path)
    plain = run(evaluate.main, *checkpoint)
    assert "class-preference" not in capsys.readouterr().out
    biased = run(evaluate.main, *checkpoint, "--bias")
    said = capsys.readouterr().out
    assert "class-preference" in said and "connected regions" in said
    for name, result in biased.items():
        assert plain[name].items() <= result.items()  # the same evaluation, and more
        curve = [part["miou"] for part in result["distance_curve"]]
        assert result["space_preference"] == pytest.approx(space_preference(curve))
        assert [p["distance"][0] for p in result["distance_curve"]] == [0, 0.2, 0.4, 0.6, 0.8]
        val = data.open_dataset("shapes", split="val")
        counted = sum((val.label(i) != VOID).sum().item() for i in range(len(val)))
        assert sum(p["pixels"] for p in result["distance_curve"]) == counted
    # Bias scores stay when the same is evaluated again, and go when something else is.
    run(evaluate.main, *checkpoint)
    assert results(tmp_path) == biased
    run(evaluate.main, *checkpoint, "--pd", 1)
    assert "class_preference" not in results(tmp_path)["rectified"]
    assert results(tmp_path)["maskclip"] == biased["maskclip"]


def test_bias_with_instance_masks(voc_root, clip_file, tmp_path):
    tree = voc_root / "VOCdevkit" / "VOC2012"
    (tree / "SegmentationObject").mkdir()
    for path in (tree / "SegmentationClass").iterdir():
        with Image.open(path) as label:  # all of the left half one object, all of the right another
            W, H = label.size
            mask = Image.new("L", (W, H), 1)
            mask.paste(2, (W // 2, 0, W, H))
            mask.save(tree / "SegmentationObject" / path.name)
    run(reclip.main, "--dataset", "voc", "--data-root", voc_root, "--clip", clip_file, "--method",
        "maskclip", "--out", tmp_path / "run", "--workers", 0)
    result = run(evaluate.main, "--checkpoint", tmp_path / "run" / "reclip.pt", "--bias")
    assert result["maskclip"]["objects"] == "instance masks"


def test_figures(small_demo, trained_demo, tmp_path):
    out = tmp_path / "figures"
    found = run(evaluate.main, "--checkpoint", trained_demo / "distill.pt", "--figures", "--out",
                out)
    assert list(found) == ["maskclip", "rectified", "distilled"]  # reclip.pt lies beside it
    sizes = {path.name: Image.open(path).size for path in out.glob("*.png")}
    assert sorted(sizes) == ["comparison.png", "confusion.png", "distance.png", "heatmaps.png"]
    assert all(850 <= width <= 1000 for width, _ in sizes.values())
    assert sizes["distance.png"] == (900, 480)
    assert sizes["heatmaps.png"] == (3 * (3 * 106 - 6 + 18) - 6, 4 * 142)
    assert sizes["comparison.png"][0] == 5 * (190 + 6) + 6
    for path in out.glob("*.png"):
        assert len(Image.open(path).convert("RGB").getcolors(1 << 20)) > 50  # something is drawn


def test_figures_of_one_checkpoint(small_demo, trained_demo, tmp_path, capsys):
    shutil.copy(trained_demo / "distill.pt", tmp_path)
    found = run(evaluate.main, "--checkpoint", tmp_path / "distill.pt", "--figures")
    assert list(found) == ["distilled"]
    assert not (tmp_path / "heatmaps.png").exists() and (tmp_path / "confusion.png").exists()
    assert "no heatmaps.png: it needs MaskCLIP's masks" in capsys.readouterr().out


def test_figures_of_few_classes_and_empty_bins():
    confusions = {"maskclip": torch.tensor([[3, 1], [0, 0]]), "rectified": torch.eye(2).long()}
    assert evaluate.confusion_figure(confusions, ["a", "traffic light"]).height > 200
    evaluate.distance_figure({"maskclip": [None] * 5, "rectified": [0, None, 100, None, None]})


def test_class_shares_of_cells():
    labels = torch.full((1, 5, 6), VOID)
    labels[0, :2, :2], labels[0, :4, 4:] = 1, 0
    shares = class_shares(labels, 2, (5, 6), (6, 6), (3, 3))  # cells of 2×2, one row of padding
    assert torch.equal(shares[0, 1], torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]))
    assert torch.equal(shares[0, 0], torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 0]]))
    large = F.interpolate(labels[None].float(), (15, 18))[0].long()
    assert torch.equal(class_shares(large, 2, (5, 6), (6, 6), (3, 3)), shares)


def test_a_probe_learns_from_the_training_labels(small_demo, trained_demo):
    train, val = (data.open_dataset("shapes", split=split) for split in ("train", "val"))
    for name, stages in (("reclip", ["maskclip", "rectified"]), ("distill", ["distilled"])):
        segment = evaluate.Segmenter(trained_demo / f"{name}.pt")
        miou = {}
        for steps in (1, 60):
            probe = linear_probe(segment, train, torch.device("cpu"), steps=steps)
            again = linear_probe(segment, train, torch.device("cpu"), steps=steps)
            found = evaluate.evaluate(probe, val, (96, 96), torch.device("cpu"))
            assert list(found) == [f"linear_probe_{stage}" for stage in stages]
            same = evaluate.evaluate(again, val, (96, 96), torch.device("cpu"))
            assert all(torch.equal(found[key], same[key]) for key in found)
            miou[steps] = [evaluate.scores(m)["miou"] for m in found.values()]
        # Ten classes: chance is some 5 %.
        assert all(learned > 1.3 * first for first, learned in zip(miou[1], miou[60]))
        assert name == "distill" or min(miou[60]) > 20


def test_linear_probe_of_the_command(small_demo, trained_demo, tmp_path, capsys, monkeypatch):
    probe = evaluate.linear_probe
    monkeypatch.setattr(evaluate, "linear_probe", lambda *a, **k: probe(*a, **k, steps=5))
    checkpoint = ("--checkpoint", trained_demo / "reclip.pt")
    run(evaluate.main, *checkpoint, "--linear-probe", "--out", tmp_path)
    assert "trained with ground truth" in capsys.readouterr().out
    found = results(tmp_path)
    assert list(found) == ["maskclip", "rectified", "linear_probe_maskclip",
                           "linear_probe_rectified"]
    for name, result in found.items():
        assert result.get("trained_with_ground_truth", False) == name.startswith("linear_probe")
