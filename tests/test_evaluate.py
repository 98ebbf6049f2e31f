"""evaluate.py against plain loops and by hand: scores, whole images and windows, biases, probes."""

import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import data
import evaluate
import maps
import reclip
from conftest import normal, refuses, results, run, same
from data import VOID, connected_regions
from evaluate import class_preference, class_shares, confusion_matrix, scores, space_preference

CPU = torch.device("cpu")


def pixels(*shape, seed=0):
    return (255 * normal(*shape, seed=seed).sigmoid()).to(torch.uint8)


def random_labels(*shape, C=4, void=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < void, VOID)


def plain_confusion(said, label):
    return torch.tensor([[((label == t) & (said == p)).sum() for p in range(4)] for t in range(4)])


def test_confusion_matrix_and_scores_against_sets_of_pixels():
    prediction, label = random_labels(2, 20, 50, void=0), random_labels(2, 20, 50, seed=1)
    expected, iou = plain_confusion(prediction, label), []
    assert torch.equal(confusion_matrix(prediction, label, 4), expected)
    assert torch.equal(confusion_matrix(prediction.byte(), label.byte(), 4), expected)
    assert confusion_matrix(prediction, torch.full_like(label, VOID), 4).sum() == 0
    for k in range(4):
        is_k, says_k = label == k, (prediction == k) & (label != VOID)
        iou.append(100 * (is_k & says_k).sum().item() / (is_k | says_k).sum().item())
    result = scores(expected)
    assert result["iou"] == pytest.approx(iou)
    assert result["miou"] == pytest.approx(sum(iou) / 4)
    right = (prediction == label)[label != VOID].double()
    assert result["pixel_accuracy"] == pytest.approx(100 * right.mean().item())


@pytest.mark.parametrize("count_absent, counted", [(False, 3), (True, 4)])
def test_absent_classes_both_ways(count_absent, counted):
    # Class 2 occurs nowhere; class 3 is predicted but never true, so it counts with an IoU of 0.
    confusion = torch.tensor([[6, 2, 0, 0], [0, 3, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    result = scores(confusion, count_absent)
    assert result["iou"] == [100 * 6 / 8, 100 * 3 / 6, None, 0.0]
    assert result["miou"] == pytest.approx(125 / counted)
    assert result["pixel_accuracy"] == pytest.approx(100 * 9 / 12)


@pytest.mark.parametrize("pd, kept", [(0.3, {0, 1, 2}), (0.4, {0, 1}), (0.6, {0}), (0.9, {0}),
                                      (0, {0, 1, 2}), (None, {0, 1, 2})])
def test_prompt_denoising_by_hand(pd, kept):
    # Two patches, three classes; softmax over the classes of logits / 0.1.
    probabilities = torch.tensor([[0.70, 0.25, 0.05], [0.10, 0.55, 0.35]])
    logits = (0.1 * probabilities.log()).T.reshape(1, 3, 1, 2)
    dropped = torch.tensor([k not in kept for k in range(3)])
    expected = logits.masked_fill(dropped[:, None, None], -100)
    assert torch.equal(maps.prompt_denoising(logits, pd, 0.1), expected)


def test_prompt_denoising_is_for_each_image_and_keeps_its_best_class():
    logits = torch.stack([torch.eye(3)[k].reshape(3, 1, 1) for k in (2, 0)])
    denoised = maps.prompt_denoising(logits, 0.99, 1.0)  # no softmax above 0.58
    assert denoised.flatten(1).tolist() == [[-100, -100, 1], [1, -100, -100]]


@pytest.mark.parametrize("ahead, kept", [(18.0, True), (15.0, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pd_of_one_keeps_what_rounds_to_one_in_float32(ahead, kept, dtype):
    # The best of two classes, 0.1·18 ahead: exp(-18) is lost beside 1 in float32, exp(-15) is not.
    logits = torch.zeros(1, 3, 1, 2, dtype=dtype)
    logits[0, 0, 0, 0] = 3.0  # class 0 is certain, so that it cannot be class 1 that stays
    logits[0, 1, 0, 1] = 0.1 * ahead
    denoised = maps.prompt_denoising(logits, 1.0, 0.1)
    assert (denoised[0, 1, 0, 1] > 0) == kept and denoised[0, 2].max() == -100
    assert denoised[0, 0, 0, 0] == 3


@pytest.mark.parametrize("view, size", [((75, 100), (150, 211)), ((75, 100), (75, 100)),
                                        ((80, 112), (33, 41))])
def test_label_map_is_argmax_of_upsampled_logits(view, size):
    logits = normal(2, 70, 5, 7)
    whole = F.interpolate(logits, (80, 112), mode="bilinear")[..., : view[0], : view[1]]
    expected = F.interpolate(whole, size, mode="bilinear").argmax(1)
    assert len(expected.unique()) > 60
    for chunk in (1, 32, 70, 500):
        actual = maps.label_map(logits, (80, 112), view, size, chunk)
        assert actual.dtype == torch.int64 and torch.equal(actual, expected)


def test_a_window_over_the_whole_image_changes_nothing(trained_demo):
    def predictions(slide=None):
        return evaluate.Segmenter(trained_demo / "reclip.pt", slide=slide)(images, (120, 130))

    images = F.interpolate(pixels(2, 3, 11, 12), (88, 100))
    whole = predictions()
    for window in (100, 400):
        slid = predictions((window, 50))
        assert list(slid) == list(whole) == ["maskclip", "rectified"]
        assert same(slid, whole)
    assert not torch.equal(predictions((48, 24))["rectified"], whole["rectified"])


def test_sliding_windows_average_what_covers_a_pixel(trained_demo):
    images = F.interpolate(pixels(1, 3, 8, 12), (64, 100))
    segment = evaluate.Segmenter(trained_demo / "reclip.pt", slide=(48, 32))
    slid = segment.sliding_logits(images)
    for stage, name in enumerate(segment.names):
        total, count = torch.zeros(1, 10, 64, 100), torch.zeros(64, 100)
        for top, left in ((0, 0), (0, 32), (0, 52), (16, 0), (16, 32), (16, 52)):
            window = ..., slice(top, top + 48), slice(left, left + 48)
            part = segment.network.logits(segment.network.encode(images[window]))[stage]
            total[window] += F.interpolate(part, (48, 48), mode="bilinear")
            count[window] += 1
        assert count.min() == 1 and count.max() == 4
        assert_close(slid[name], total / count)


def test_options_of_the_command(small_demo, trained_demo, tmp_path):
    every = ((), ("--pd", 0), ("--no-pd",), ("--pd", 1), ("--slide", 48, 24), ("--split", "train"))
    checkpoint = ("--checkpoint", shutil.copy(trained_demo / "reclip.pt", tmp_path))
    found = {options: run(evaluate.main, *checkpoint, *options) for options in every}
    rectified = {options: r["rectified"] for options, r in found.items()}
    assert [r["pd"] for r in rectified.values()] == [None, 0, None, 1, None, None]
    plain = rectified[()]["iou"]
    assert rectified["--pd", 0]["iou"] == rectified["--no-pd",]["iou"] == plain
    assert rectified["--pd", 1]["iou"] != plain != rectified["--slide", 48, 24]["iou"]
    assert rectified["--split", "train"]["images"] == 24 and rectified[()]["images"] == 12
    assert results(tmp_path) == found["--split", "train"]  # the last one


class Pictures:
    """Images and labels of different sizes; labels are of the images' size."""

    classes = "abcd"
    sizes = [(30, 40), (40, 30), (30, 40), (30, 40), (21, 50), (40, 30), (30, 40)]

    def __len__(self):
        return len(self.sizes)

    def image(self, i):
        return pixels(3, *self.sizes[i], seed=i)

    def label(self, i):
        return random_labels(*self.sizes[i], seed=i)


def by_brightness(images, size):
    """A stand-in for a network: four classes by the brightness of the image's upsampled view."""
    grey = F.interpolate(images.float().mean(1, keepdim=True), size, mode="bilinear")[:, 0]
    return {"one": (grey / 64).long(), "zero": torch.zeros(grey.shape, dtype=torch.int64)}


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_every_image_counts_once_whatever_the_sizes(batch):
    pictures = Pictures()
    expected = {name: torch.zeros(4, 4, dtype=torch.int64) for name in ("one", "zero")}
    for i in range(len(pictures)):
        label = pictures.label(i)
        view = data.resize_to_scale(pictures.image(i), (60, 20))[None]
        for name, prediction in by_brightness(view, label.shape).items():
            expected[name] += plain_confusion(prediction, label)
    actual = evaluate.evaluate(by_brightness, pictures, (60, 20), CPU, batch)
    assert same(actual, expected)


def test_groups_are_full_where_they_can_be():
    pictures = Pictures()
    pairs = ((pictures.image(i), pictures.label(i)) for i in range(len(pictures)))
    groups = list(evaluate.grouped_by_size(pairs, 2))
    assert sorted(len(views) for views, _ in groups) == [1, 2, 2, 2]
    assert all(images.shape[2:] == labels.shape[1:] for images, labels in groups)


def test_table():
    results = {name: dict(miou=1.0, pixel_accuracy=2.5, iou={"cat": None, "tv monitor": miou})
               for name, miou in (("maskclip", 12.345), ("rectified", 100.0))}
    lines = evaluate.table(results, ["cat", "tv monitor"]).splitlines()
    assert [line.split() for line in lines] == [
        ["maskclip", "rectified"], ["mIoU", "1.00", "1.00"], ["pixel", "accuracy", "2.50", "2.50"],
        ["-" * len(lines[3])], ["cat", "–", "–"], ["tv", "monitor", "12.35", "100.00"]]
    assert len({len(line) for line in lines}) == 1


# ---- Biases, figures, probes ---------------------------------------------------------------------

def flood_fill(label):
    """Regions of equal label, one after the other, pixel by pixel."""
    objects, count = torch.zeros_like(label), 0
    left = {place: k for place, k in np.ndenumerate(label.numpy()) if k != VOID}
    while left:
        first, k = next(iter(left.items()))
        todo, count = [first], count + 1
        while todo:
            y, x = todo.pop()
            if left.get((y, x)) == k:
                del left[y, x]
                objects[y, x] = count
                todo += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return objects


@pytest.mark.parametrize("H, W, C", [(1, 1, 2), (1, 17, 2), (17, 1, 2), (30, 40, 2), (41, 29, 3),
                                     (60, 60, 9)])
def test_connected_regions_are_those_of_a_flood_fill(H, W, C):
    for seed in range(4):
        label = random_labels(H, W, C=C, void=0.15 * seed, seed=seed)
        assert torch.equal(connected_regions(label), flood_fill(label))


def test_connected_regions_that_wind():
    snake = torch.full((33, 33), VOID)
    snake[::2] = 5
    snake[1::4, -1], snake[3::4, 0] = 5, 5
    comb = torch.zeros(20, 20, dtype=torch.int64)
    comb[1:, ::2], comb[19, :] = 3, 3  # teeth that meet nowhere, and then do
    for label in (snake, snake.T, snake.flip(0), snake.masked_fill(snake == VOID, 7), comb):
        assert torch.equal(connected_regions(label), flood_fill(label))
    assert connected_regions(torch.full((4, 5), VOID)).sum() == 0


def test_voc_has_instance_masks(voc_root, clip_file, tmp_path):
    objects_of = lambda: data.open_dataset("voc", voc_root, "val").objects(0)
    val = data.open_dataset("voc", voc_root, "val")
    assert torch.equal(objects_of(), connected_regions(val.label(0)))  # there are none yet
    mask = Image.new("L", (500, 375))
    for value, left, right in ((1, 0, 100), (2, 100, 200), (255, 98, 102)):
        mask.paste(value, (left, 0, right, 375))
    file = voc_root / f"VOCdevkit/VOC2012/SegmentationObject/{val.ids[0]}.png"
    file.parent.mkdir()
    mask.save(file)
    objects = objects_of()
    assert objects.unique().tolist() == [0, 1, 2] and objects.dtype == torch.int64
    assert (objects == 1).sum() == (objects == 2).sum() == 98 * 375
    run(reclip.main, "--dataset", "voc", "--data-root", voc_root, "--clip", clip_file, "--method",
        "maskclip", "--out", tmp_path / "run", "--workers", 0)
    result = run(evaluate.main, "--checkpoint", tmp_path / "run" / "reclip.pt", "--bias")
    assert result["maskclip"]["objects"] == "instance masks"
    mask.crop((0, 0, 50, 375)).save(file)
    refuses("instance mask .* is 50×375 pixels, its image 500×375", objects_of)
    file.unlink()
    refuses("no label .*SegmentationObject", objects_of)


def test_class_preference_by_hand():
    # Rows as shares: 0.6 0.3 0.1 | 0.5 0.25 0.25 | absent | 0 0 0 1
    confusion = torch.tensor([[6, 3, 1, 0], [4, 2, 2, 0], [0, 0, 0, 0], [0, 0, 0, 7]])
    assert class_preference(confusion) == pytest.approx(((0.6 - 0.3) + (0.25 - 0.5) + (1 - 0)) / 3)
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
        nearest = evaluate.distance_bins(label, objects, bins)
        assert (nearest[0, :2] == int(expected * bins)).all() and (nearest[2:4, 3:5] == 0).all()
        assert (nearest == bins).sum() == 48 - 6
    # Pixels without a class do not move the centroid, and are in no bin.
    objects[0, :5] = 3
    assert torch.equal(evaluate.distance_bins(label, objects, 100), nearest)
    assert (evaluate.distance_bins(label, torch.zeros_like(objects)) == evaluate.BINS).all()


def test_curve_and_slope_by_hand():
    label = torch.tensor([[0, 0, 0, 1], [1, 1, VOID, 2]])
    prediction = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 0]])
    nearest = torch.tensor([[0, 0, 0, 0], [2, 2, 3, 2]])
    confusions = evaluate.confusion_by_distance(prediction, label, nearest, 3, bins=3)
    assert confusions.shape == (4, 3, 3)
    assert torch.equal(confusions.sum(0), confusion_matrix(prediction, label, 3))
    # Bin 0: class 0 has 2 of 3, class 1 has 1 of 2. Bin 2: class 1 has 1 of 2, class 2 has 0 of 1;
    # class 0 is predicted there, but no object of it lies there.
    curve = evaluate.distance_curve(confusions[:-1])
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
    val = data.open_dataset("shapes", split="val")
    counted = sum((val.label(i) != VOID).sum() for i in range(len(val)))
    for name, result in biased.items():
        assert plain[name].items() <= result.items()  # the same evaluation, and more
        curve = [part["miou"] for part in result["distance_curve"]]
        assert result["space_preference"] == pytest.approx(space_preference(curve))
        assert [p["distance"][0] for p in result["distance_curve"]] == [0, 0.2, 0.4, 0.6, 0.8]
        assert sum(p["pixels"] for p in result["distance_curve"]) == counted
    # Bias scores stay when the same is evaluated again, and go when something else is.
    run(evaluate.main, *checkpoint)
    assert results(tmp_path) == biased
    run(evaluate.main, *checkpoint, "--pd", 1)
    assert "class_preference" not in results(tmp_path)["rectified"]
    assert results(tmp_path)["maskclip"] == biased["maskclip"]


def test_figures(small_demo, trained_demo, tmp_path):
    checkpoint = ("--checkpoint", trained_demo / "distill.pt")
    found = run(evaluate.main, *checkpoint, "--figures", "--out", tmp_path)
    assert list(found) == ["maskclip", "rectified", "distilled"]  # reclip.pt lies beside it
    figures = {path.stem: Image.open(path).convert("RGB") for path in tmp_path.glob("*.png")}
    assert sorted(figures) == ["comparison", "confusion", "distance", "heatmaps"]
    for figure in figures.values():
        assert 850 <= figure.width <= 1000
        assert len(figure.getcolors(1 << 20)) > 50  # something is drawn
    assert figures["distance"].size == (900, 480)
    assert figures["heatmaps"].width == 6 * 142 + 6  # six columns
    assert figures["heatmaps"].height > 9 * 142  # three rows an image, above a legend
    assert figures["comparison"].width == 5 * (190 + 6) + 6


def test_figures_of_one_checkpoint(small_demo, trained_demo, tmp_path, capsys):
    shutil.copy(trained_demo / "distill.pt", tmp_path)
    found = run(evaluate.main, "--checkpoint", tmp_path / "distill.pt", "--figures")
    assert list(found) == ["distilled"]
    assert not (tmp_path / "heatmaps.png").exists() and (tmp_path / "confusion.png").exists()
    assert "no heatmaps.png: it needs MaskCLIP's masks" in capsys.readouterr().out


def test_figures_of_few_classes_and_empty_bins():
    confusions = {"maskclip": torch.tensor([[3, 1], [0, 0]]), "rectified": torch.eye(2).long()}
    assert maps.confusion_figure(confusions, ["a", "traffic light"]).height > 200
    maps.distance_figure({"maskclip": [None] * 5, "rectified": [0, None, 100, None, None]})


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
        for epochs in (1, 30):
            probes = (evaluate.linear_probe(segment, train, CPU, epochs) for _ in range(2))
            found, again = (evaluate.evaluate(probe, val, (96, 96), CPU) for probe in probes)
            assert list(found) == [f"linear_probe_{stage}" for stage in stages]
            assert same(found, again)
            miou[epochs] = [scores(m)["miou"] for m in found.values()]
        # Ten classes: chance is some 5 %.
        assert all(learned > 1.3 * first for first, learned in zip(miou[1], miou[30]))
        assert name == "distill" or min(miou[30]) > 20


def test_linear_probe_of_the_command(small_demo, trained_demo, tmp_path, capsys):
    run(evaluate.main, "--checkpoint", trained_demo / "reclip.pt", "--linear-probe",
        "--probe-epochs", 2, "--out", tmp_path)
    assert "trained with ground truth" in capsys.readouterr().out
    found = results(tmp_path)
    honest, probed = ["maskclip", "rectified"], ["linear_probe_maskclip", "linear_probe_rectified"]
    assert list(found) == [*honest, *probed]
    assert all(found[name]["trained_with_ground_truth"] for name in probed)
    assert not any("trained_with_ground_truth" in found[name] for name in honest)
