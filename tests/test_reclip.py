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
from conftest import normal, plain_text_features, random_clip, refuses, same
from reclip import (Rectifier, Reference, crop_windows, dense_features, global_feature,
                    gumbel_noise, query_features)
from run import Batches, Run, clip_fingerprint

NAMES = ["cat", "potted plant", "chest of drawers", "big old grey barn owl"]


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
    s = dict(preset="release", seed=0, workers=0, amp=False, graph=False, activation="quick_gelu")
    return argparse.Namespace(**s | reclip.recipe("shapes") | changes)


# ---- Dense features ----------------------------------------------------------------------------

def test_attention_restored_is_stock_clip(model, monkeypatch):
    images = normal(2, 3, 64, 64)
    stock = F.normalize(model.encode_image(images), dim=-1)
    assert_close(global_feature(model.visual, images), stock, atol=1e-4, rtol=0)
    monkeypatch.setattr(reclip, "norm", lambda layer, x: layer(x))  # CLIP's own epsilon
    assert_close(global_feature(model.visual, images), stock, atol=1e-6, rtol=0)


def test_surgery_value_is_two_convolutions_and_program_is_more(model):
    images = normal(2, 3, 64, 48)
    tokens, grid = reclip.tokens_before_last_block(model.visual, images)
    block = model.visual.transformer.resblocks[-1]
    x = F.layer_norm(tokens[:, 1:], (64,), block.ln_1.weight, block.ln_1.bias, 1e-6)
    v = x @ block.attn.in_proj_weight[128:].T + block.attn.in_proj_bias[128:]
    v = v @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    expected = (model.visual.ln_post(v) @ model.visual.proj).mT.reshape(2, 32, 4, 3)
    value = dense_features(model.visual, images, "value")
    assert grid == (4, 3)
    assert_close(value, expected)
    assert (dense_features(model.visual, images, "program") - value).abs().mean() > 0.1


def test_images_are_padded_right_and_bottom_to_whole_patches(model):
    images = normal(2, 3, 40, 52)
    Z = dense_features(model.visual, images)
    assert Z.shape == (2, 32, 3, 4)
    assert_close(Z, dense_features(model.visual, F.pad(images, (0, 12, 0, 8))))


def test_the_callers_clip_is_not_changed():
    model, images = random_clip(), normal(1, 3, 40, 52)
    exact = reclip.image_encoder(model, "paper")
    dense_features(exact, images)
    global_feature(model.visual, images)
    Wq = query_features(model, ["cat", "dog"], ["a {}."])
    Rectifier(model, ["cat", "dog"], Wq).Wr(model)
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

    def value_and_gradient(encode):
        Wr = encode(model, torch.cat([reference.start, reference.prompt]), reference.suffix)
        return Wr, *torch.autograd.grad(Wr, reference.prompt, normal(len(names), 32))

    plain, plain_gradient = value_and_gradient(plain_text_features)
    ours, gradient = value_and_gradient(reclip.encode_shared_prefix)
    assert ours.shape == (len(names), 32)
    assert len(reference.start) + len(reference.prompt) + reference.suffix.shape[1] <= 77
    assert (ours - plain).abs().max() < 1e-5 * max(1, plain.abs().max())
    assert (gradient - plain_gradient).abs().max() < 1e-5 * plain_gradient.abs().max()
    assert plain_gradient.abs().amin(0).max() > 0  # every learned word matters
    assert_close(reference(model), plain / plain.norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("longest, L", [(1, 73), (2, 73), (3, 72), (5, 70), (73, 2), (74, 1)])
def test_every_name_keeps_its_end_token(model, longest, L):
    reference = Reference(model, ["cat", " ".join(["owl"] * longest)])
    end = clip.tokenize("")[0, 1]
    assert reference.prompt.shape == (L, 64)
    assert reference.suffix.shape == (2, longest + 1)
    assert reference.suffix[0, 1] == reference.suffix[1, longest] == end
    assert (reference.suffix == end).sum(1).tolist() == [1, 1]
    assert torch.equal(reference.prompt, model.token_embedding.weight[0].expand(L, -1))


@pytest.mark.parametrize("tokens", [75, 200, 600])
def test_a_name_without_room_for_a_prompt(model, tokens):
    names = ["cat", " ".join(["owl"] * tokens)]
    refuses("class name 'owl owl .* leaves no room for a prompt", Reference, model, names)


# ---- Bias, masks, loss -------------------------------------------------------------------------

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


def test_decoder_sees_features_and_logits_of_a_5x5_neighbourhood():
    decoder = reclip.Decoder(4, 3).eval()
    Z, M = normal(1, 4, 9, 9), normal(1, 3, 9, 9)
    expected = F.pad(torch.ones(5, 5), (2, 2, 2, 2)).bool()
    for source, channel in ((Z, 1), (M, 2)):
        before = decoder(Z, M)
        source[0, channel, 4, 4] += 1
        assert torch.equal((decoder(Z, M) != before).any(1)[0], expected)


def test_gumbel_masks_are_one_hot_with_the_gradient_of_a_softmax():
    logits = normal(2, 4, 5, 6).requires_grad_()
    noise, weights = gumbel_noise((4, 5, 6), [1, 2]), normal(2, 4, 5, 6, seed=1)
    masks, soft = reclip.gumbel_masks(logits, 0.5, noise), (logits / 0.5 + noise).softmax(1)
    assert torch.equal(masks, F.one_hot(soft.argmax(1), 4).permute(0, 3, 1, 2).float())
    gradient, expected = (torch.autograd.grad(x, logits, weights)[0] for x in (masks, soft))
    assert_close(gradient, expected)


def test_gumbel_noise_depends_on_the_seed_alone():
    noise = gumbel_noise((3, 40, 50), [5, 2**62, 7])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(gumbel_noise((3, 40, 50), [2**62, 5]), noise[[1, 0]])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(noise[0], noise[1])
    # The standard Gumbel distribution has mean 0.5772 and variance π²/6.
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.04)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.06)


def test_masked_pooling_divides_by_all_patches():
    masks, features = normal(2, 3, 4, 5), normal(2, 6, 4, 5, seed=1)
    pooled = reclip.masked_pooling(masks, features)
    assert pooled.shape == (2, 3, 6)
    for b, c, k in np.ndindex(2, 3, 6):
        total = (masks[b, c] * features[b, k]).sum().item()
        assert pooled[b, c, k].item() == pytest.approx(total / 20, abs=1e-6)


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


@pytest.mark.parametrize("preset", ["release", "paper"])
@pytest.mark.parametrize("surgery", ["program", "value"])
def test_bf16_matrices_change_nothing_under_autocast(preset, surgery):
    model, images = random_clip(), normal(2, 3, 64, 80)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded, kept = (dense_features(reclip.image_encoder(model, preset, half), images, surgery)
                         for half in (False, True))
    assert torch.equal(rounded, kept) and rounded.std() > 0
    assert model.visual.conv1.weight.dtype == torch.float32


def test_reference_in_bf16_is_nearly_the_same(tiny_clip):
    reference = Reference(tiny_clip, NAMES)
    reference.prompt.data = normal(*reference.prompt.shape)
    outcomes = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            Wr = reference(tiny_clip)
        gradient = torch.autograd.grad((Wr * normal(*Wr.shape)).sum(), reference.prompt)[0]
        outcomes.append((Wr, gradient))
    (exact, exact_gradient), (Wr, gradient) = outcomes
    assert Wr.dtype == torch.float32 and not torch.equal(Wr, exact)
    assert F.cosine_similarity(Wr, exact).min() > 0.9999
    assert F.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), dim=0) > 0.999


# ---- Hypotheses --------------------------------------------------------------------------------

@pytest.mark.parametrize("r, steps", [(1 / 6, 11), (1 / 2, 3), (1, 1), (0.95, 2), (0.8, 2),
                                      (0.3, 6), (0.22, 9)])
@pytest.mark.parametrize("H, W", [(375, 500), (96, 96), (338, 501), (400, 500)])
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


def test_crops_are_clips_view_of_the_windows():
    image = (normal(3, 60, 90).sigmoid() * 255).to(torch.uint8)
    crops = reclip.cut_crops(image, 1 / 2, 24)
    assert crops.shape == (9, 3, 24, 24) and crops.dtype == torch.uint8
    part = image[:, 15:45, 22:67]  # the middle one, 30×45; round(22.5) is 22
    expected = F.interpolate(part[None].float(), (24, 36), mode="bicubic", antialias=True)
    difference = crops[4].float() - expected[0, :, :, 6:30].clamp(0, 255)
    assert difference.abs().max() <= 1.5


def test_hypotheses_by_hand():
    counts = torch.tensor([[8, 9, 104, 0], [121, 0, 0, 0]]).double()  # 8/121 < 7 % < 9/121
    assert reclip.crop_hypothesis(counts, 0.07).tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert reclip.crop_hypothesis(counts, 0.0).tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    scores = torch.tensor([[24.0, 22, 23, 10], [21, 22, 20, 22.5], [5, 4, 3, 2]])
    best_two = reclip.global_hypothesis(scores, 23, 2)
    assert best_two.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]]
    assert reclip.global_hypothesis(scores, 90, 9).all()  # more than there are classes


@pytest.fixture
def make(small_demo, tiny_clip, Wq, tmp_path, monkeypatch):
    """make(**changed settings) → hypotheses of the small demo; make.encoded: ids so far."""
    images = data.open_dataset("shapes")
    read = images.image

    def make(**changes):
        rows = reclip.make_hypotheses(images, tiny_clip, Wq, settings(**changes), tmp_path, CPU)
        return rows(range(len(images)))

    def image(index):
        make.encoded.append(images.ids[index])
        if len(make.encoded) > make.limit:
            raise KeyboardInterrupt
        return read(index)

    monkeypatch.setattr(images, "image", image)
    make.images, make.path = images, tmp_path / "hypotheses.npy"
    make.encoded, make.limit = [], 999
    return make


def test_hypotheses_are_made_once_and_not_taken_for_those_of_other_images(make):
    first = make()
    assert first.shape == (24, 10) and 24 < first.sum() < 120  # 1 to 4 objects an image
    assert make.encoded == make.images.ids
    assert torch.equal(make(), first) and len(make.encoded) == 24
    counts = torch.from_numpy(np.load(make.path)["scores"])
    assert counts.dtype == torch.int16 and counts.sum(1).tolist() == [9] * 24  # r = 1/2
    assert torch.equal(make(threshold=0.3), counts > 2.7)
    assert len(make.encoded) == 24 and not torch.equal(make(threshold=0.3), first)
    for ids in (make.images.ids[::-1], make.images.ids[5:8]):
        make.images.ids = ids
        del make.images.fingerprint  # another object would have its own
        refuses(r"hypotheses.json was made with other .* \(images ", make)
    make.path.unlink()
    assert len(make()) == 3 and len(make.encoded) == 27


def test_interrupted_hypotheses_go_on(make):
    thirds = dict(crop_ratio=1 / 3)  # 25 crops: ten images a group
    expected = make(**thirds)
    whole = make.path.read_bytes()
    make.path.unlink()
    make.encoded, make.limit = [], 17
    refuses("^$", make, **thirds, error=KeyboardInterrupt)
    assert (np.load(make.path)["checksum"] != 0).tolist() == [True] * 10 + [False] * 14
    make.encoded, make.limit = [], 999
    assert torch.equal(make(**thirds), expected)
    assert make.encoded == make.images.ids[10:]
    assert make.path.read_bytes() == whole


def test_global_scores_are_cosines_and_crops_vote_one_at_a_time(tiny_clip, Wq):
    image = data.open_dataset("shapes").image(3)
    normalise = lambda view: data.normalise(view, data.CLIP_MEAN, data.CLIP_STD)
    whole = global_feature(tiny_clip.visual, normalise(data.resize_to_scale(image, (96, 96))[None]))
    scores = reclip.global_scores(tiny_clip, image, Wq, (96, 96))
    assert_close(scores, 100 * torch.cosine_similarity(whole, Wq), atol=1e-3, rtol=0)
    votes = torch.zeros(10, dtype=torch.long)
    for top, left, height, width in crop_windows(96, 96, 1 / 3):
        crop = image[:, top : top + height, left : left + width][None]
        view = TF.resize(crop, 48, TF.InterpolationMode.BICUBIC, antialias=True)
        votes[(tiny_clip.encode_image(normalise(view)) @ Wq.T).argmax()] += 1
    assert torch.equal(reclip.crop_votes(tiny_clip, [image], Wq, 1 / 3)[0], votes)
    assert votes.sum() == 25


def test_votes_of_bf16_features_are_compared_in_float32(monkeypatch):
    visual = argparse.Namespace(input_resolution=8, positional_embedding=torch.zeros(2, 2))
    ones = lambda visual, crops: torch.ones(len(crops), 2) @ torch.eye(2)
    monkeypatch.setattr(reclip, "encode_crops", ones)
    Wq = torch.tensor([[1.0, 0.0], [1.001, 0.0], [0.5, 0.5]])  # in bf16 the first two are equal
    images, model = [torch.zeros(3, 9, 9).byte()], argparse.Namespace(visual=visual)
    assert reclip.crop_votes(model, images, Wq, 1 / 2, amp=True).tolist() == [[0, 9, 0]]


# ---- Recipes and training ----------------------------------------------------------------------

def test_recipes():
    """Rows of the published tables, typed in a second time."""
    columns = "scale", "crop", "schedule", "epochs", "batch", "lr", "pd"
    row = lambda *key: [reclip.recipe(*key)[column] for column in columns]
    assert row("voc") == [(2048, 336), 336, 200, 50, 1, 0.01, 1.0] == row("folder")
    assert row("cityscapes") == [(2048, 448), 512, 300, 50, 16, 0.16, 0.5]
    assert row("context", "paper") == [(520, 520), 480, 150, 150, 16, 0.01, 0.75]
    assert row("stuff", "paper") == [(2048, 512), 512, 30, 30, 16, 0.01, 0.9]
    assert reclip.recipe("voc")["threshold"] == reclip.recipe("cityscapes")["threshold"] == 0.07
    assert reclip.recipe("context")["threshold"] == 0
    old = reclip.recipe("cityscapes", "release", "reclip")
    assert (old["threshold"], old["top"], old["pd"]) == (21.5, 2, 0.5)
    assert old["mask_temperature"] == 0.001 and reclip.recipe("voc")["mask_temperature"] == 0.01
    assert reclip.recipe("context", "release", "reclip")["pd"] == 0.6
    assert reclip.recipe("ade", "paper")["pd"] is reclip.recipe("voc", "paper", "maskclip")["pd"]


# Biases that the batch norm after them takes away again: their gradients are rounding errors.
BEFORE_A_NORM = {"decoder.conv.bias", "position.0.bias", "position.3.bias", "position.6.bias"}


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
    run = Run(tmp_path / "reclip.pt", s, images, model, rectifier)
    reclip.train(s, images, model, rectifier, lambda indices: present[indices], run, CPU)
    learned, now = dict(rectifier.named_parameters()), rectifier.state_dict()
    assert {name.split(".")[0] for name in learned} == parts
    for name in learned.keys() - BEFORE_A_NORM:
        assert learned[name].grad.abs().max() > 1e-6, name
        assert not torch.equal(start[name], now[name]), name
    for buffer in {"Wq", "reference.start", "reference.suffix"} & start.keys():
        assert torch.equal(start[buffer], now[buffer])
    assert all(p.grad is None for p in model.parameters())
    assert same(model.state_dict(), before)


def test_batches_take_every_image_once_an_epoch_and_start_anywhere():
    batches = list(Batches(7, 3, 4, seed=5))
    assert [len(b) for b in batches] == [3, 3, 1] * 4
    for epoch in range(4):
        assert sorted(sum(batches[3 * epoch :][:3], [])) == [(epoch, i) for i in range(7)]
    assert [i for _, i in sum(batches[:3], [])] != [i for _, i in sum(batches[3:6], [])]
    for first in range(13):
        rest = Batches(7, 3, 4, seed=5, first=first)
        assert list(rest) == batches[first:] and len(rest) == 12 - first
    assert list(Batches(7, 3, 4, seed=6)) != batches


def test_fingerprint_tells_clips_apart():
    first, again, other = (clip_fingerprint(random_clip(seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_processes_share_every_batch(monkeypatch):
    whole = list(Batches(7, 3, 2, seed=5))
    monkeypatch.setattr("run.world", lambda: 2)
    shares, weights = [], []
    for rank in (0, 1):
        monkeypatch.setattr("run.rank", lambda: rank)
        batches = Batches(7, 3, 2, seed=5)
        shares.append(list(batches))
        weights.append([batches.weight(step) for step in range(6)])
    for batch, *parts, a, b in zip(whole, *shares, *weights):
        # a process for which no image is left gets a copy that counts for nothing
        assert sorted(batch) == sorted(parts[0] + parts[1] * (b > 0))
        assert a * 1 == pytest.approx(2 * len(parts[0]) / len(batch)) and a + b == pytest.approx(2)
    assert weights[1][2] == 0 and shares[1][2] == whole[2]
