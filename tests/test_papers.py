"""As the papers say: prompt denoising by head, global hypotheses, where an image ends, names."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import distill
import maps
import reclip
from conftest import normal, random_clip, results, run, save
from reclip import Reference, Rectifier, best_name, crop_votes, query_features

ABLATIONS = ["", "--no-decoder", "--bias none", "--bias joint", "--bias reference", "--add",
             "--learn-query", "--tune-encoder --views 0", "--wr-norm class", "--pooling cosine",
             "--hypothesis global", "--no-decoder --bias joint", "--no-decoder --bias reference",
             "--no-decoder --learn-query", "--method reclip", "--method reclip --decoder",
             "--method reclip --bias reference", "--method reclip --bias independent",
             "--method reclip --hypothesis crops", "--method maskclip"]


def image_logits(C, decoder):
    """1×C×4×6, as a decoder's BatchNorm makes them (mean 0, variance about 1, wide), or cosines
    (0.2, narrow). The classes 0, 1 and 2 are clearly ahead in two columns each."""
    noise = normal(1, C, 4, 6, seed=C)
    logits = 0.5 * noise if decoder else 0.2 + 0.005 * noise
    for k in range(3):
        logits[0, k, :, 2 * k : 2 * k + 2] += 5 if decoder else 0.12
    return logits


def classes_left(logits, pd, temperature):
    return maps.prompt_denoising(logits, pd, temperature).argmax(1).unique().tolist()


@pytest.mark.parametrize("preset", ["release", "paper"])
@pytest.mark.parametrize("dataset", list(data.DATASETS))
def test_no_ablation_leaves_a_single_class(dataset, preset):
    C = len(data.CLASSES.get(dataset, "abcdefghij"))
    for flags in ABLATIONS:
        words = ["--dataset", dataset, "--preset", preset, *flags.split()]
        s = reclip.settings_of(reclip.parse_arguments(words))
        logits, student = image_logits(C, s.decoder), distill.recipe(dataset, s.bias, s.decoder)
        assert classes_left(logits, None, 1) == [0, 1, 2]
        for pd, temperature in ((s.pd, s.pd_temperature),
                                (student["pd"], student["pd_temperature"])):
            assert classes_left(logits, pd, temperature) == [0, 1, 2], (flags, pd, temperature)
        if s.decoder:  # or the ones of a decoder would not leave a single class of cosines
            continue
        if dataset != "shapes" and s.bias != "none":
            assert (s.pd, s.pd_temperature) == (0.6 if dataset == "context" else 0.5, 0.01)
        else:
            assert s.pd is None


def test_the_decoders_denoising_would_leave_a_single_class_of_cosines():
    s = reclip.recipe("voc")
    logits = image_logits(20, decoder=False)
    assert len(classes_left(logits, s["pd"], s["pd_temperature"])) == 1
    assert reclip.recipe("voc", pd=0.3, decoder=False)["pd"] == 0.3  # what is given is given


def test_global_hypotheses_are_the_authors(tiny_clip, tmp_path):
    """Of 600 demo images, every other one cut to another shape: CLIP's own preprocessing, CLIP's
    own feature, and the loop of their program."""
    model, preprocess = clip.load("shapes-tiny", device="cpu")
    images = data.open_dataset("shapes")
    Wq = query_features(tiny_clip, images.classes)
    whole = images.image
    images.image = lambda i: whole(i)[:, : 96 - i % 2 * (i % 37), : 96 - i % 2 * (i % 23)]
    s = argparse.Namespace(**reclip.recipe("shapes", method="reclip", hypothesis="global"),
                           activation="quick_gelu", amp=False, workers=0)
    rows = reclip.make_hypotheses(images, tiny_clip, Wq, s, tmp_path, torch.device("cpu"))
    threshold, top = reclip.GLOBAL["shapes"]
    counts = []
    for i in range(len(images)):
        picture = Image.fromarray(images.image(i).movedim(0, -1).numpy())
        with torch.no_grad():
            feature = model.encode_image(preprocess(picture)[None])
        cosines = (100 * F.normalize(feature, dim=1) @ Wq.T)[0].tolist()
        chosen = [k for k, cosine in enumerate(cosines) if cosine >= threshold]
        chosen = chosen or sorted(range(len(cosines)), key=lambda k: -cosines[k])[:top]
        assert rows([i])[0].nonzero()[:, 0].tolist() == sorted(chosen), i
        counts.append(len(chosen))
    assert len(images) == 600 and len(set(counts)) > 2


H, W, GRID = 375, 500, (47, 63)  # of 16-pixel patches 24×32 cover 384×512
HEAD = distill.InheritedHead({"Wq": torch.zeros(2, 3)}, patch=16)


def test_the_students_bias_map_ends_where_the_image_ends():
    """Told by its own pixel coordinates: each of the student's cells sees its centre's."""
    y, x = (16 * torch.arange(n) + 8.0 for n in (24, 32))
    coordinates = torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]

    def through(positions):
        assert positions.shape[2:] == (24, 32)
        return coordinates

    found = HEAD.resized(torch.zeros(1, 2, 3, 3), (H, W), GRID, through)[0]
    y, x = ((torch.arange(n) + 0.5) * side / n for n, side in zip(GRID, (H, W)))
    expected = torch.stack(torch.meshgrid(y.clamp(min=8), x.clamp(min=8), indexing="ij"))
    assert (found - expected).abs().max() < 1e-3  # stretched, as it was: 8.5 pixels
    stretched = F.interpolate(coordinates, GRID, mode="bilinear")[0]
    assert 8 < (stretched - expected).abs().max() < 13


def test_the_students_bias_map_is_the_upsampled_and_cut_one():
    p = normal(1, 2, 14, 14)
    found = HEAD.resized(p, (H, W), GRID)
    fine = 8 * torch.tensor([384, 512])  # eight times the pixels, so that interpolating is exact
    upsampled = F.interpolate(F.interpolate(p, (24, 32), mode="bicubic"), fine.tolist(),
                              mode="bilinear")[..., : 8 * H, : 8 * W]
    y, x = ((2 * torch.arange(n) + 1) / n - 1 for n in GRID)
    centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
    expected = F.grid_sample(upsampled, centres, padding_mode="border", align_corners=False)
    assert (found - expected).abs().max() < 0.02


CLASSES = ["person, man, woman", "cat", "sofa, couch"]
NAMES = ["person", "man", "woman", "cat", "sofa", "couch"]


def test_a_query_class_is_as_likely_as_its_best_name():
    model, Wq = random_clip(), normal(6, 32)
    Z = F.normalize(torch.randn(2, 32, 3, 4), dim=1)
    Mq, _ = Rectifier(model, CLASSES, Wq, *reclip.METHODS["maskclip"])(Z, None, None)
    each = torch.einsum("bdhw,cd->bchw", Z, Wq)
    for k, names in enumerate((slice(0, 3), slice(3, 4), slice(4, 6))):
        assert torch.equal(Mq[:, k], each[:, names].amax(1))
    both = (query_features(model, names, ["a {}.", "the {}."]) for names in (CLASSES, NAMES))
    assert torch.equal(*both)
    assert best_name(each, [1] * 6) is each


def test_a_reference_is_the_mean_of_its_names():
    model = random_clip()
    reference, each = Reference(model, CLASSES), Reference(model, NAMES)
    with torch.no_grad():
        features = each.encode(model)
        expected = torch.stack([features[:3].mean(0), features[3], features[4:].mean(0)])
        torch.testing.assert_close(reference(model), expected / expected.norm())


def test_a_crop_votes_for_the_class_of_its_best_name(tiny_clip):
    names = ["ladybug", "star", "flag", "moon"]
    image, Wq = data.open_dataset("shapes").image(3), query_features(tiny_clip, names)
    each = crop_votes(tiny_clip, [image], Wq, 1 / 4)[0]
    votes = crop_votes(tiny_clip, [image], Wq, 1 / 4, names=[2, 1, 1])[0]
    assert votes.tolist() == [each[0] + each[1], each[2], each[3]] and votes.sum() == 49
    assert (each > 0).sum() > 2


def test_a_class_of_several_names_is_learned_and_distilled(small_demo, tmp_path):
    """Its Query's rows are not the classes': nothing may take the one for the other."""
    names, demo = ["ladybug, beetle", *list(data.SHAPES)[1:4]], data.Shapes("train", 0)
    for i in range(6):
        save(tmp_path / "photos" / f"{i}.png", demo.image(i).movedim(0, -1))
        label = demo.label(i)
        save(tmp_path / "labels" / f"{i}.png", torch.where(label < 4, label, data.VOID))
    (tmp_path / "names.txt").write_text("\n".join(names))
    run(reclip.main, "--dataset", "folder", "--data-root", tmp_path / "photos", "--classes",
        tmp_path / "names.txt", "--labels", tmp_path / "labels", "--clip", "shapes-tiny",
        "--out", tmp_path / "run", "--workers", 0, "--epochs", 1, "--scale", 96, 96, "--crop", 96)
    votes = np.load(tmp_path / "run" / "hypotheses.npy")["scores"]
    assert votes.shape == (6, 4) and (votes.sum(1) == 121).all()
    run(distill.main, "--teacher", tmp_path / "run", "--student", "small", "--backbone", "none",
        "--epochs", 1, "--batch", 3)
    found = results(tmp_path / "run")
    assert list(found["distilled"]["iou"]) == ["ladybug", *names[1:]]
    assert {"maskclip", "rectified"} <= found.keys()
