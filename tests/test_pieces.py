"""Other last blocks, PAMR, label maps, many classes and crops: each against its plain way."""

import pytest
import torch
import torch.nn.functional as F

import maps
import reclip
from conftest import assert_close, golden, normal, plain_text_features, random_clip

# ---- Last blocks ---------------------------------------------------------------------------------

@pytest.mark.parametrize("surgery, sigma, name", [
    ("value", 5, "maskclip_no_residual"), ("clearclip", 5, "clearclip"), ("sclip", 5, "sclip"),
    ("naclip", 5, "naclip"), ("naclip", 2, "naclip_std2")])
def test_last_blocks(surgery, sigma, name):
    recorded = golden("encoders")
    visual = random_clip(image_resolution=48, vision_patch_size=8, vision_width=128).visual
    visual.load_state_dict({key.removeprefix("visual."): value.float()
                            for key, value in recorded["state"].items()})
    for kind, images in recorded["images"].items():
        features = reclip.dense_features(visual, images, surgery, sigma).flatten(2).mT
        error = (features - recorded["features"][kind][name]).abs().max().item()
        assert error <= 2e-5, kind


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("surgery", reclip.SURGERIES)
def test_last_blocks_in_bf16_and_backward(surgery, heads):
    visual, images = random_clip(vision_heads=heads).visual, normal(2, 3, 60, 100)
    exact = reclip.dense_features(visual, images, surgery)
    assert exact.shape == (2, 32, 4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = reclip.dense_features(visual, images, surgery)
    assert F.cosine_similarity(rounded.float(), exact, dim=1).min() > 0.995
    visual.requires_grad_(True)
    reclip.dense_features(visual, images, surgery).square().sum().backward()
    gradients = visual.transformer.resblocks[-1].attn.in_proj_weight.grad.chunk(3)
    used = {name for name, gradient in zip("qkv", gradients) if gradient.abs().sum() > 0}
    assert used == {*reclip.SURGERIES[surgery]["alike"], "v"}
    assert visual.conv1.weight.grad.isfinite().all()


# ---- PAMR ----------------------------------------------------------------------------------------

def test_pamr():
    recorded = golden("encoders")["pamr"]
    image, logits, one = (recorded[name] for name in ("image", "logits", "one"))
    result = maps.pamr(image, logits, recorded["steps"], recorded["dilations"])
    assert_close(result, recorded["result"], 1e-6)
    assert_close(maps.pamr(image, logits, 1, (1, 2)), one, 1e-6)
    # a unit of the image changes nothing, nor do other classes and images in the same call
    assert_close(maps.pamr(255 * image, logits, 1, (1, 2)), one, 1e-5)
    many = maps.pamr(image[:1], logits[:1].repeat(1, 200, 1, 1), 1, (1, 2))
    assert_close(many, one[:1].repeat(1, 200, 1, 1), 1e-6)


def test_pamr_of_a_flat_image_and_of_one_smaller_than_its_dilation():
    logits = normal(1, 3, 2, 3)
    result = maps.pamr(torch.full((1, 3, 5, 7), 128, dtype=torch.uint8), logits, 3, (1, 24))
    assert result.shape == (1, 3, 5, 7) and result.isfinite().all()
    assert result.max() <= logits.max() and result.min() >= logits.min()


# ---- Label maps ----------------------------------------------------------------------------------

def fields(kind, C, h, w, B=2):
    """Logits B×C×h×w: of noise alone, or smooth with classes that are rarer than others."""
    noise, coarse = normal(B, C, h, w), normal(B, C, h // 4 + 1, w // 4 + 1, seed=1)
    smooth = F.interpolate(coarse, (h, w), mode="bicubic") + 0.7 * normal(B, C, 1, 1, seed=2)
    return noise if kind == "noise" else smooth + 0.2 * noise


@pytest.mark.parametrize("kind", ["noise", "smooth"])
@pytest.mark.parametrize("C, grid, patch, view, size", [
    (20, (21, 28), 16, (336, 448), (336, 448)), (20, (21, 31), 16, (333, 491), (500, 737)),
    (150, (15, 15), 16, (240, 230), (420, 420)), (150, (8, 11), 16, (125, 171), (360, 500)),
    (30, (43, 60), 8, (340, 477), (500, 700)), (5, (20, 20), 32, (640, 610), (400, 401)),
    (1, (3, 3), 16, (48, 48), (400, 400)), (7, (1, 2), 16, (16, 20), (380, 500)),
    (40, (2, 1), 16, (30, 9), (480, 500)), (3, (9, 9), 16, (107, 90), (2, 70000))])
def test_large_label_maps_are_the_plain_ones_but_for_ties(kind, C, grid, patch, view, size):
    logits = fields(kind, C, *grid)
    padded = tuple(side * patch for side in grid)
    plain = maps.label_map(logits, padded, view, size, chunk=8)
    labels = maps.label_map(logits, padded, view, size)
    assert labels.shape == (2, *size) and labels.dtype == torch.int64
    different = labels != plain
    assert different.float().mean() <= 1e-5
    if different.any():
        x = F.interpolate(logits, padded, mode="bilinear")[..., : view[0], : view[1]]
        x = F.interpolate(x, size, mode="bilinear")
        reached, best = (x.gather(1, y[:, None]) for y in (labels, plain))
        assert (best - reached).abs().max() <= 1e-5


def test_large_label_maps_with_classes_switched_off_and_equal_ones():
    logits = fields("smooth", 12, 21, 21)
    logits[:, 3:7] = -100
    logits[:, 9] = logits[:, 1]
    sizes = (336, 336), (336, 336), (500, 500)
    plain, labels = maps.label_map(logits, *sizes, chunk=12), maps.label_map(logits, *sizes)
    assert (labels != plain).sum() <= 2
    assert not torch.isin(labels, torch.tensor([3, 4, 5, 6, 9])).any()
    logits[:, :, 5, 5] = float("nan")  # as before: no error
    maps.label_map(logits, *sizes)


# ---- Many classes --------------------------------------------------------------------------------

@pytest.mark.parametrize("C", [1, 10, 300])
def test_many_classes_in_groups(C):
    model = random_clip()
    prefix = normal(60, 64).mul(0.3).requires_grad_(True)
    length, suffix = torch.randint(1, 16, (C, 1)), torch.randint(1, 49405, (C, 16))
    suffix = torch.where(torch.arange(16) < length, suffix, 0).scatter(1, length, 49407)
    features = reclip.encode_shared_prefix(model, prefix, suffix)
    plain = plain_text_features(model, prefix, suffix)
    assert (features - plain).abs().max() <= 3e-6 * max(1, plain.abs().max().item())
    weights = normal(*features.shape)
    ours, expected = (torch.autograd.grad(x, prefix, weights)[0] for x in (features, plain))
    assert (ours - expected).norm() <= 1e-6 * expected.norm()
    _, _, seen, ends = reclip.shared_layout(60, suffix)
    assert sum(map(len, ends)) == C and (len(seen) > 1) == (C > 10)


# ---- Crops ---------------------------------------------------------------------------------------

def test_crops_are_encoded_as_clip_does():
    visual, images = random_clip(vision_layers=3).visual, normal(5, 3, 64, 64)
    expected = visual(images)
    torch.testing.assert_close(reclip.encode_crops(visual, images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = reclip.encode_crops(visual, images)
    assert F.cosine_similarity(rounded.float(), expected).min() > 0.995


def test_crop_votes_in_groups(tiny_clip):
    images = [(255 * normal(3, 96, side).sigmoid()).to(torch.uint8) for side in (96, 120)]
    Wq = normal(5, tiny_clip.text_projection.shape[1])
    votes = reclip.crop_votes(tiny_clip, images, Wq, 1 / 3)
    assert votes.sum(1).tolist() == [25, 25]
    for image, row in zip(images, votes):  # 25 crops in another grouping
        assert torch.equal(reclip.crop_votes(tiny_clip, [image], Wq, 1 / 3)[0], row)
