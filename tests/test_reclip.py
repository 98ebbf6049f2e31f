"""reclip.py's pieces against plain loops, formulas by hand and CLIP itself."""

import argparse
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as TF

import clip
import data
import reclip
from clip.model import QuickGELU
from conftest import BEFORE_A_NORM, normal, plain_text_features, random_clip, refuses, same
from reclip import (Rectifier, Reference, best_name, crop_votes, crop_windows, dense_features,
                    gumbel_noise, query_features)

NAMES = ["cat", "potted plant", "chest of drawers", "big old grey barn owl"]
SYNONYMS = ["person, man, woman", "cat", "sofa, couch"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return random_clip()


@pytest.fixture(scope="module")
def Wq(tiny_clip):
    """The Query of the demo."""
    return query_features(tiny_clip, list(data.SHAPES), ["a photo of a {}."])


def settings(**changes):
    """The recipe of the demo, as the command line has it."""
    s = dict(preset="release", seed=0, workers=0, amp=False, activation="quick_gelu", heads=None)
    return argparse.Namespace(**s | reclip.recipe("shapes") | changes)


# ---- Dense features ----------------------------------------------------------------------------

def test_attention_restored_is_stock_clip(model, monkeypatch):
    images, visual, x = normal(2, 3, 64, 64), model.visual, 1e-3 * normal(2, 64)
    assert_close(reclip.norm(torch.nn.LayerNorm(64), x), F.layer_norm(x, (64,), eps=1e-6))
    monkeypatch.setattr(reclip, "norm", lambda layer, x: layer(x))  # CLIP's own epsilon
    tokens, grid = reclip.tokens_before_last_block(visual, images)
    restored = visual.ln_post(visual.transformer.resblocks[-1](tokens)[:, 0]) @ visual.proj
    assert grid == (4, 4)
    assert_close(restored, model.encode_image(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("surgery", reclip.SURGERIES)
def test_last_blocks_in_bf16_and_backward(surgery, heads):
    visual, images = random_clip(vision_heads=heads).visual, normal(2, 3, 60, 100)
    exact = dense_features(visual, images, surgery)
    assert exact.shape == (2, 32, 4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = dense_features(visual, images, surgery)
    assert F.cosine_similarity(rounded.float(), exact, dim=1).min() > 0.995
    visual.requires_grad_(True)
    dense_features(visual, images, surgery).square().sum().backward()
    gradients = visual.transformer.resblocks[-1].attn.in_proj_weight.grad.chunk(3)
    used = {name for name, gradient in zip("qkv", gradients) if gradient.abs().sum() > 0}
    assert used == {*reclip.SURGERIES[surgery]["alike"], "v"}
    assert visual.conv1.weight.grad.isfinite().all()


def test_the_callers_clip_is_not_changed():
    model, images = random_clip(), normal(1, 3, 40, 52)
    exact = reclip.image_encoder(model, "paper")
    dense_features(exact, images)
    Rectifier(model, ["cat", "dog"], query_features(model, ["cat", "dog"], ["a {}."])).texts(model)
    assert same(model.state_dict(), random_clip().state_dict())
    assert all(isinstance(b.mlp.gelu, QuickGELU) for b in model.visual.transformer.resblocks)
    assert all(isinstance(b.mlp.gelu, torch.nn.GELU) for b in exact.transformer.resblocks)


def test_query_is_the_mean_of_unit_features(model):
    templates = ["a photo of a {}.", "{}.", "a rather long sentence in which there is one {}."]
    for name, query in zip(NAMES, query_features(model, NAMES, templates, batch=5), strict=True):
        features = [model.encode_text(clip.tokenize(t.format(name)))[0] for t in templates]
        mean = sum(f / f.norm() for f in features) / len(features)
        assert_close(query, mean / mean.norm(), atol=1e-5, rtol=0)


# ---- Reference ---------------------------------------------------------------------------------

@pytest.mark.parametrize("names", [NAMES, *([name] for name in NAMES)], ids=", ".join)
def test_shared_prefix_equals_all_77_positions_of_each_class(names):
    model = random_clip(transformer_width=128, transformer_heads=2, transformer_layers=3)
    reference = Reference(model, names)
    torch.nn.init.normal_(reference.prompt, std=0.3)
    longest = max(map(len, reference.endings))
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in reference.endings])

    def value_and_gradient(encode, endings):
        Wr = encode(model, torch.cat([reference.start, reference.prompt]), endings)
        return Wr, *torch.autograd.grad(Wr, reference.prompt, normal(len(names), 32))

    plain, plain_gradient = value_and_gradient(plain_text_features, padded)
    ours, gradient = value_and_gradient(reclip.encode_shared_prefix, reference.endings)
    assert ours.shape == (len(names), 32)
    assert len(reference.start) + len(reference.prompt) + longest <= 77
    assert (ours - plain).abs().max() < 3e-6 * max(1, plain.abs().max())
    assert (gradient - plain_gradient).norm() < 3e-6 * plain_gradient.norm()
    assert plain_gradient.abs().amin(0).max() > 0  # every learned word matters
    assert_close(reference(model), plain / plain.norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("longest, L", [(1, 73), (2, 73), (3, 72), (5, 70), (73, 2), (74, 1)])
def test_every_name_keeps_its_end_token(model, longest, L):
    reference = Reference(model, ["cat", " ".join(["owl"] * longest)])
    end = clip.tokenize("")[0, 1].item()
    assert reference.prompt.shape == (L, 64)
    assert [len(ids) for ids in reference.endings] == [2, longest + 1]
    assert [ids.index(end) + 1 for ids in reference.endings] == [2, longest + 1]
    assert torch.equal(reference.prompt, model.token_embedding.weight[0].expand(L, -1))


@pytest.mark.parametrize("tokens", [75, 200, 600])
def test_a_name_without_room_for_a_prompt(model, tokens):
    refuses("owl owl", Reference, model, ["cat", " ".join(["owl"] * tokens)])


@torch.no_grad()
@pytest.mark.parametrize("bias", ["independent", "joint", "reference", "none"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_rectified_logits_by_hand(model, bias, sign):
    torch.manual_seed(0)
    Z, p = F.normalize(torch.randn(2, 32, 2, 3), dim=1), torch.randn(1, 64, 2, 3)
    Wq, Wr = torch.randn(2, 3, 32)
    rectifier = Rectifier(model, ["a", "b", "c"], Wq, bias, False, sign).eval()
    Mq, M = rectifier(Z, p, Wr)
    for b, i, j, k in np.ndindex(2, 2, 3, 3):
        Mb = 0 if bias == "none" else Z[b, :, i, j] @ Wr[k]
        if bias == "independent":
            conv = rectifier.position
            Mb = (conv.weight[:, :, 0, 0] @ p[0, :, i, j] + conv.bias) @ Wr[k]
        elif bias == "joint":
            Mb += rectifier.position(p)[0, k, i, j]
        query = Z[b, :, i, j] @ Wq[k]
        assert Mq[b, k, i, j].item() == pytest.approx(query.item(), abs=1e-5)
        assert M[b, k, i, j].item() == pytest.approx(float(query + sign * Mb), abs=1e-5)


def test_hidden_widths_of_the_position_are_two_and_one_third_of_the_encoders():
    parts = ([*reclip.PositionLogits(width, 5)] for width in (768, 96))
    widths = [[conv.out_channels for conv in layers[::3]] for layers in parts]
    assert widths == [[512, 256, 5], [64, 32, 5]]


def test_gumbel_noise_depends_on_the_seed_alone():
    noise = gumbel_noise((3, 40, 50), [5, 2**62, 7])
    assert torch.equal(gumbel_noise((3, 40, 50), [2**62, 5]), noise[[1, 0]])
    assert not torch.equal(noise[0], noise[1])
    # The standard Gumbel distribution has mean 0.5772 and variance π²/6.
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.04)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.06)


@pytest.mark.parametrize("hypothesis", [
    [[1, 0, 1], [0, 1, 0], [0, 0, 0]],  # an image without a hypothesis counts in B all the same
    [[1, 1, 1], [0, 0, 1], [1, 1, 0]]])
def test_contrastive_loss_against_a_loop(hypothesis):
    S, tau, total = normal(3, 3, 3), 0.5, 0.0
    for similarities, row in zip(S, hypothesis):
        for k in range(3):
            exponentials = (similarities[k] / tau).exp()
            total -= row[k] * math.log(exponentials[k] / exponentials.sum()) / (sum(row) or 1)
    loss = reclip.contrastive_loss(S, torch.tensor(hypothesis).bool(), tau)
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)


def test_a_query_class_is_as_likely_as_its_best_name(model):
    Wq, names = normal(6, 32), ["person", "man", "woman", "cat", "sofa", "couch"]
    Z = F.normalize(normal(2, 32, 3, 4), dim=1)
    Mq, _ = Rectifier(model, SYNONYMS, Wq, *reclip.METHODS["maskclip"])(Z, None, None)
    each = torch.einsum("bdhw,cd->bchw", Z, Wq)
    for k, rows in enumerate((slice(0, 3), slice(3, 4), slice(4, 6))):
        assert torch.equal(Mq[:, k], each[:, rows].amax(1))
    assert torch.equal(*(query_features(model, n, ["a {}.", "the {}."]) for n in (SYNONYMS, names)))
    assert best_name(each, [1] * 6) is each
    with torch.no_grad():
        features = Reference(model, names).encode(model)
        expected = torch.stack([features[:3].mean(0), features[3], features[4:].mean(0)])
        assert_close(Reference(model, SYNONYMS)(model), expected / expected.norm())


# ---- Hypotheses --------------------------------------------------------------------------------

@pytest.mark.parametrize("r, steps", [(1 / 6, 11), (1 / 2, 3), (1, 1), (0.95, 2), (0.3, 6)])
@pytest.mark.parametrize("H, W", [(375, 500), (96, 96), (338, 501)])
def test_windows_overlap_by_half_and_cover_the_image(r, steps, H, W):
    windows = crop_windows(H, W, r)
    assert len(windows) == len(set(windows)) == steps**2
    assert {window[2:] for window in windows} == {(round(r * H), round(r * W))}
    for axis, side in enumerate((H, W)):
        starts = sorted({window[axis] for window in windows})
        assert len(starts) == steps and starts[0] == 0 and starts[-1] == side - round(r * side)
        distances = np.diff(starts)
        assert (distances <= r * side / 2 + 1).all()  # so no pixel is left out
        assert (distances >= r * side / 2 - 1).all() or not (1 / r).is_integer()


def test_hypotheses_by_hand():
    counts = torch.tensor([[8, 9, 104, 0], [121, 0, 0, 0]]).double()  # 8/121 < 7 % < 9/121
    assert reclip.crop_hypothesis(counts, 0.07).tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert reclip.crop_hypothesis(counts, 0.0).tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    scores = torch.tensor([[24.0, 22, 23, 10], [21, 22, 20, 22.5], [5, 4, 3, 2]])
    best_two = reclip.global_hypothesis(scores, 23, 2)
    assert best_two.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]]
    assert reclip.global_hypothesis(scores, 90, 9).all()  # more than there are classes


def test_crops_vote_one_at_a_time_for_the_class_of_their_best_name(tiny_clip, Wq):
    image, votes = data.open_dataset("shapes").image(3), torch.zeros(10, dtype=torch.long)
    for top, left, height, width in crop_windows(96, 96, 1 / 3):
        crop = image[:, top : top + height, left : left + width][None]
        view = TF.resize(crop, 48, TF.InterpolationMode.BICUBIC, antialias=True)
        view = data.normalise(view, data.CLIP_MEAN, data.CLIP_STD)
        votes[(tiny_clip.encode_image(view) @ Wq.T).argmax()] += 1
    both = crop_votes(tiny_clip, [image, image.flip(-1)], Wq, 1 / 3)
    assert torch.equal(both[0], votes) and votes.sum() == 25 and (votes > 0).sum() > 2
    joined = crop_votes(tiny_clip, [image], Wq, 1 / 3, names=[2, *[1] * 8])[0]
    assert joined.tolist() == [votes[0] + votes[1], *votes[2:].tolist()]


def test_global_hypotheses_are_the_authors(tiny_clip, Wq, small_demo, tmp_path):
    """CLIP's own preprocessing and feature, and the loop of their program; images of any shape."""
    model, preprocess = clip.load("shapes-tiny", device="cpu")
    images = data.open_dataset("shapes")
    whole, counts = images.image, []
    images.image = lambda i: whole(i)[:, : 96 - i % 2 * (i % 37), : 96 - i % 2 * (i % 23)]
    s = settings(hypothesis="global", threshold=46, top=2)
    rows = reclip.make_hypotheses(images, tiny_clip, Wq, s, tmp_path, CPU)
    for i in range(len(images)):
        feature = model.encode_image(preprocess(TF.to_pil_image(images.image(i)))[None])
        cosines = (100 * F.normalize(feature, dim=1) @ Wq.T)[0].tolist()
        chosen = [k for k, cosine in enumerate(cosines) if cosine >= 46]
        chosen = chosen or sorted(range(len(cosines)), key=lambda k: -cosines[k])[:2]
        assert rows([i])[0].nonzero()[:, 0].tolist() == sorted(chosen), i
        counts.append(len(chosen))
    assert len(set(counts)) > 1


def test_hypotheses_are_made_once_go_on_and_are_not_taken_for_others(
        small_demo, tiny_clip, Wq, tmp_path, monkeypatch):
    images, encoded, limit = data.open_dataset("shapes"), [], 17
    read = images.image

    def image(index):
        encoded.append(index)
        if len(encoded) > limit:
            raise KeyboardInterrupt
        return read(index)

    monkeypatch.setattr(images, "image", image)
    make = lambda **changes: reclip.make_hypotheses(
        images, tiny_clip, Wq, settings(crop_ratio=1 / 3, **changes), tmp_path, CPU)(range(24))
    refuses("^$", make, error=KeyboardInterrupt)
    encoded.clear()
    limit = 999
    first = make()  # 25 crops: ten images a group, and one group was done
    assert encoded == list(range(10, 24)) and first.shape == (24, 10) and 24 < first.sum() < 150
    assert torch.equal(make(), first) and not torch.equal(make(threshold=0.3), first)
    assert len(encoded) == 14
    images.ids = images.ids[::-1]
    del images.fingerprint  # another object would have its own
    make()
    assert len(encoded) == 14 + 24


# ---- Training ----------------------------------------------------------------------------------

@pytest.mark.parametrize("bias, decoder, parts", [
    ("independent", True, {"reference", "position", "decoder"}),
    ("joint", False, {"reference", "position"}),
    ("reference", False, {"reference"}),
    ("none", True, {"decoder"})])
def test_gradients_reach_only_what_is_learned(small_demo, Wq, tmp_path, bias, decoder, parts):
    model, images = reclip.load_clip("shapes-tiny"), data.open_dataset("shapes")
    torch.manual_seed(0)
    rectifier = Rectifier(model, images.classes, Wq, bias, decoder)
    before, start = (copy.deepcopy(module.state_dict()) for module in (model, rectifier))
    s, present = settings(epochs=1, weight_decay=0.0, cache=tmp_path), torch.rand(24, 10) < 0.3
    run = reclip.Run(tmp_path / "reclip.pt", s, images, model, rectifier)
    reclip.train(s, images, model, rectifier, lambda indices: present[indices], run, CPU)
    learned, now = dict(rectifier.named_parameters()), rectifier.state_dict()
    assert {name.split(".")[0] for name in learned} == parts
    for name in learned.keys() - BEFORE_A_NORM:
        assert learned[name].grad.abs().max() > 1e-6, name
        assert not torch.equal(start[name], now[name]), name
    for buffer in {"Wq", "reference.start"} & start.keys():
        assert torch.equal(start[buffer], now[buffer])
    assert all(p.grad is None for p in model.parameters())
    assert same(model.state_dict(), before)


def order_of(tmp_path, monkeypatch, n=7, batch=3, epochs=4, seed=5, rank=0, world=1, first=0):
    """The keys that a run gives to its reader, from step `first` on."""
    monkeypatch.setattr(reclip, "rank", lambda: rank)
    monkeypatch.setattr(reclip, "world", lambda: world)
    images = argparse.Namespace(ids=range(n), classes=["a"], fingerprint="x")
    layer = torch.nn.Linear(1, 1)
    run = reclip.Run(tmp_path / "none.pt", argparse.Namespace(), images, random_clip(), layer)
    run.previous["step"] = first
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    run.previous |= dict(state=layer.state_dict(), optimizer=optimizer.state_dict())
    return [keys for _, keys in run.steps(optimizer, lambda keys: keys, batch, epochs, seed, 0)]


def test_every_image_once_an_epoch_from_any_step_on(tmp_path, monkeypatch):
    batches = order_of(tmp_path, monkeypatch)
    assert [len(b) for b in batches] == [3, 3, 1] * 4
    for epoch in range(4):
        assert sorted(sum(batches[3 * epoch :][:3], [])) == [(epoch, i) for i in range(7)]
    assert [i for _, i in sum(batches[:3], [])] != [i for _, i in sum(batches[3:6], [])]
    assert order_of(tmp_path, monkeypatch, seed=6) != batches
    for first in (1, 3, 5, 12):
        assert order_of(tmp_path, monkeypatch, first=first) == batches[first:]


def test_processes_share_every_batch(tmp_path, monkeypatch):
    whole = order_of(tmp_path, monkeypatch)
    shares = [order_of(tmp_path, monkeypatch, rank=rank, world=2) for rank in (0, 1)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert len(parts[0]) == len(parts[1]) == -(-len(batch) // 2)  # filled up
        assert {*parts[0], *parts[1]} == {*batch}


def fields(kind, C, h, w, B=2):
    """Logits B×C×h×w: of noise alone, or smooth with classes that are rarer than others."""
    noise, coarse = normal(B, C, h, w), normal(B, C, h // 4 + 1, w // 4 + 1, seed=1)
    smooth = F.interpolate(coarse, (h, w), mode="bicubic") + 0.7 * normal(B, C, 1, 1, seed=2)
    return noise if kind == "noise" else smooth + 0.2 * noise


def upsampled(logits, padded, view, size):
    x = F.interpolate(logits, padded, mode="bilinear")[..., : view[0], : view[1]]
    return F.interpolate(x, size, mode="bilinear")


@pytest.mark.parametrize("kind", ["noise", "smooth"])
@pytest.mark.parametrize("C, grid, patch, view, size", [
    (20, (21, 28), 16, (336, 448), (336, 448)), (20, (21, 31), 16, (333, 491), (500, 737)),
    (150, (15, 15), 16, (240, 230), (420, 420)), (30, (43, 60), 8, (340, 477), (500, 700)),
    (5, (20, 20), 32, (640, 610), (400, 401)), (10, (12, 12), 8, (96, 96), (96, 96)),
    (1, (3, 3), 16, (48, 48), (400, 400)), (7, (1, 2), 16, (16, 20), (380, 500)),
    (3, (9, 9), 16, (107, 90), (2, 7000))])
def test_label_maps_are_the_plain_ones_but_for_ties(kind, C, grid, patch, view, size):
    logits, padded = fields(kind, C, *grid), tuple(side * patch for side in grid)
    labels, x = reclip.label_map(logits, padded, view, size), upsampled(logits, padded, view, size)
    assert labels.shape == (2, *size) and labels.dtype == torch.int64
    different = labels != x.argmax(1)
    assert different.float().mean() <= 1e-5
    assert (x.amax(1) - x.gather(1, labels[:, None])[:, 0]).max() <= 1e-5


def test_label_maps_with_classes_switched_off_equal_ones_and_what_is_no_number():
    logits, sizes = fields("smooth", 12, 21, 21), ((336, 336), (336, 336), (500, 500))
    logits[:, 3:7] = -100
    logits[:, 9] = logits[:, 1]
    labels = reclip.label_map(logits, *sizes)
    assert (labels != upsampled(logits, *sizes).argmax(1)).sum() <= 2
    assert not torch.isin(labels, torch.tensor([3, 4, 5, 6, 9])).any()
    for value in (math.nan, math.inf, -math.inf):
        logits[0, 2, 5, 5] = value
        refuses("finite", reclip.label_map, logits, *sizes)


def test_prompt_denoising_keeps_what_is_likely_somewhere_and_the_best_class():
    logits = torch.tensor([[3.0, 0], [0, 1.0], [-1, -1]])[None, :, None]  # 1×3×1×2
    confidence = logits.softmax(1).amax((2, 3))[0].tolist()
    kept = lambda pd: (reclip.prompt_denoising(logits, pd, 1.0) > -100).all((2, 3))[0].tolist()
    assert kept(None) == [True] * 3
    assert kept(confidence[1] - 0.01) == [True, True, False]
    assert kept(confidence[1] + 0.01) == kept(1.0) == [True, False, False]
