"""evaluate.py: scores against plain loops, prompt denoising by hand, whole images and windows."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import data
import evaluate
from conftest import results, run
from data import VOID
from evaluate import (Segmenter, confusion_matrix, grouped_by_size, label_map, prompt_denoising,
                      scores)


def random_labels(*shape, C=4, void=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < void, VOID)


def confusion_by_loop(prediction, label, C):
    confusion = torch.zeros(C, C, dtype=torch.int64)
    for p, t in zip(prediction.flatten().tolist(), label.flatten().tolist()):
        if t != VOID:
            confusion[t, p] += 1
    return confusion


def test_confusion_matrix_against_a_loop():
    prediction, label = random_labels(2, 7, 9, void=0), random_labels(2, 7, 9, seed=1)
    expected = confusion_by_loop(prediction, label, 4)
    assert torch.equal(confusion_matrix(prediction, label, 4), expected)
    assert torch.equal(confusion_matrix(prediction.byte(), label.byte(), 4), expected)
    assert confusion_matrix(prediction, torch.full_like(label, VOID), 4).sum() == 0


def test_scores_against_sets_of_pixels():
    prediction, label = random_labels(40, 50, void=0), random_labels(40, 50, seed=1)
    iou, right, counted = [], 0, 0
    for k in range(4):
        is_k, says_k = label == k, (prediction == k) & (label != VOID)
        iou.append(100 * (is_k & says_k).sum().item() / (is_k | says_k).sum().item())
        right, counted = right + (is_k & says_k).sum().item(), counted + is_k.sum().item()
    result = scores(confusion_matrix(prediction, label, 4))
    assert result["iou"] == pytest.approx(iou)
    assert result["miou"] == pytest.approx(sum(iou) / 4)
    assert result["pixel_accuracy"] == pytest.approx(100 * right / counted)


def test_absent_classes_both_ways():
    # Class 2 occurs nowhere; class 3 is predicted but never true, so it counts with an IoU of 0.
    confusion = torch.tensor([[6, 2, 0, 0], [0, 3, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    iou = [100 * 6 / 8, 100 * 3 / 6, None, 0.0]
    result = scores(confusion)
    assert result["iou"] == iou and result["miou"] == pytest.approx(125 / 3)
    assert result["pixel_accuracy"] == pytest.approx(100 * 9 / 12)
    counted = scores(confusion, count_absent=True)
    assert counted["iou"] == iou and counted["miou"] == pytest.approx(125 / 4)
    assert counted["pixel_accuracy"] == result["pixel_accuracy"]


@pytest.mark.parametrize("pd, kept", [(0.3, {0, 1, 2}), (0.4, {0, 1}), (0.6, {0}), (0.9, {0}),
                                      (0, {0, 1, 2}), (None, {0, 1, 2})])
def test_prompt_denoising_by_hand(pd, kept):
    # Two patches, three classes; softmax over the classes of logits / 0.1.
    probabilities = torch.tensor([[0.70, 0.25, 0.05], [0.10, 0.55, 0.35]])
    logits = (0.1 * probabilities.log()).T.reshape(1, 3, 1, 2)
    denoised = prompt_denoising(logits, pd, 0.1)
    for k in range(3):
        expected = logits[0, k] if k in kept else torch.full((1, 2), -100.0)
        assert torch.equal(denoised[0, k], expected), k


def test_prompt_denoising_is_for_each_image_and_keeps_its_best_class():
    logits = torch.stack([torch.eye(3)[k].reshape(3, 1, 1) for k in (2, 0)])
    denoised = prompt_denoising(logits, 0.99, 1.0)  # no softmax above 0.58
    assert denoised.flatten(1).tolist() == [[-100, -100, 1], [1, -100, -100]]


@pytest.mark.parametrize("ahead, kept", [(18.0, True), (15.0, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pd_of_one_keeps_what_rounds_to_one_in_float32(ahead, kept, dtype):
    # The best of two classes, 0.1·18 ahead: exp(-18) is lost beside 1 in float32, exp(-15) is not.
    logits = torch.zeros(1, 3, 1, 2, dtype=dtype)
    logits[0, 0, 0, 0] = 3.0  # class 0 is certain, so that it cannot be class 1 that stays
    logits[0, 1, 0, 1] = 0.1 * ahead
    denoised = prompt_denoising(logits, 1.0, 0.1)
    assert (denoised[0, 1, 0, 1] > 0) == kept and denoised[0, 2].max() == -100
    assert denoised[0, 0, 0, 0] == 3


@pytest.mark.parametrize("view, size", [((75, 100), (150, 211)), ((75, 100), (75, 100)),
                                        ((80, 112), (33, 41))])
def test_label_map_is_argmax_of_upsampled_logits(view, size):
    logits = torch.randn(2, 70, 5, 7, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(logits, (80, 112), mode="bilinear", align_corners=False)
    whole = F.interpolate(whole[..., : view[0], : view[1]], size, mode="bilinear",
                          align_corners=False)
    expected = whole.argmax(1)
    assert len(expected.unique()) > 60
    for chunk in (1, 32, 70, 500):
        actual = label_map(logits, (80, 112), view, size, chunk)
        assert actual.dtype == torch.int64 and torch.equal(actual, expected)


@pytest.fixture
def checkpoint(demo):
    return demo(epochs=1) / "reclip.pt"


def views(count, height, width):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (count, 3, height // 8, width // 8), generator=generator)
    return F.interpolate(coarse.float(), (height, width)).to(torch.uint8)


def test_a_window_over_the_whole_image_changes_nothing(checkpoint):
    images = views(2, 88, 100)
    whole = Segmenter(checkpoint, "cpu")(images, (120, 130))
    for window in (100, 400):
        slid = Segmenter(checkpoint, "cpu", slide=(window, 50))(images, (120, 130))
        assert list(slid) == list(whole) == ["maskclip", "rectified"]
        assert all(torch.equal(slid[name], whole[name]) for name in whole)
    other = Segmenter(checkpoint, "cpu", slide=(48, 24))(images, (120, 130))
    assert not torch.equal(other["rectified"], whole["rectified"])


def test_sliding_windows_average_what_covers_a_pixel(checkpoint):
    images = views(1, 64, 100)
    segment = Segmenter(checkpoint, "cpu", slide=(48, 32))
    slid = segment.sliding_logits(images)
    windows = [(top, left) for top in (0, 16) for left in (0, 32, 52)]
    for stage, name in enumerate(segment.names):
        total, count = torch.zeros(1, 10, 64, 100), torch.zeros(64, 100)
        for top, left in windows:
            part = segment.network.logits(images[:, :, top : top + 48, left : left + 48])[stage]
            part = F.interpolate(part, (48, 48), mode="bilinear")
            total[:, :, top : top + 48, left : left + 48] += part
            count[top : top + 48, left : left + 48] += 1
        assert count.min() == 1 and count.max() == 4
        assert_close(slid[name], total / count)


def test_prompt_denoising_touches_the_rectified_stage_alone(checkpoint):
    images = views(2, 96, 96)
    plain = Segmenter(checkpoint, "cpu", pd=None)(images, (96, 96))
    denoised = Segmenter(checkpoint, "cpu", pd=1.0)(images, (96, 96))
    assert torch.equal(plain["maskclip"], denoised["maskclip"])
    assert len(denoised["rectified"].unique()) < len(plain["rectified"].unique())


def test_options_of_the_command(checkpoint):
    every = ((), ("--pd", 0), ("--no-pd",), ("--pd", 1), ("--slide", 48, 24), ("--split", "train"))
    found = {options: run(evaluate.main, "--checkpoint", checkpoint, *options) for options in every}
    rectified = {options: r["rectified"] for options, r in found.items()}
    assert [r["pd"] for r in rectified.values()] == [None, 0, None, 1, None, None]
    plain = rectified[()]["iou"]
    assert rectified["--pd", 0]["iou"] == rectified["--no-pd",]["iou"] == plain
    assert rectified["--pd", 1]["iou"] != plain != rectified["--slide", 48, 24]["iou"]
    assert rectified["--split", "train"]["images"] == 24 and rectified[()]["images"] == 12
    assert results(checkpoint.parent) == found["--split", "train"]  # the last one


class Pictures:
    """Images and labels of different sizes; labels are of the images' size."""

    classes = ["a", "b", "c", "d"]
    sizes = [(30, 40), (40, 30), (30, 40), (30, 40), (21, 50), (40, 30), (30, 40)]

    def __len__(self):
        return len(self.sizes)

    def image(self, i):
        generator = torch.Generator().manual_seed(i)
        return torch.randint(256, (3, *self.sizes[i]), generator=generator).to(torch.uint8)

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
            expected[name] += confusion_by_loop(prediction, label, 4)
    actual = evaluate.evaluate(by_brightness, pictures, (60, 20), torch.device("cpu"), batch)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_groups_are_full_where_they_can_be():
    pictures = Pictures()
    pairs = [(pictures.image(i), pictures.label(i)) for i in range(len(pictures))]
    groups = list(grouped_by_size(pairs, 2))
    assert sorted(len(views) for views, _ in groups) == [1, 2, 2, 2]
    for images, labels in groups:
        assert images.shape[2:] == labels.shape[1:]


def test_a_demo_evaluated_one_by_one_is_the_same(checkpoint):
    together, single = (run(evaluate.main, "--checkpoint", checkpoint, "--batch", batch)
                        for batch in (12, 1))
    for name, result in together.items():
        assert result["miou"] == pytest.approx(single[name]["miou"], abs=0.01)


def test_table():
    results = {name: dict(miou=1.0, pixel_accuracy=2.5, iou={"cat": None, "tv monitor": miou})
               for name, miou in (("maskclip", 12.345), ("rectified", 100.0))}
    lines = evaluate.table(results, ["cat", "tv monitor"]).splitlines()
    assert [line.split() for line in lines] == [
        ["maskclip", "rectified"], ["mIoU", "1.00", "1.00"], ["pixel", "accuracy", "2.50", "2.50"],
        ["-" * len(lines[3])], ["cat", "–", "–"], ["tv", "monitor", "12.35", "100.00"]]
    assert len({len(line) for line in lines}) == 1
