"""Rectify the bias of CLIP for unsupervised semantic segmentation: ReCLIP and ReCLIP++.

    python reclip.py                                      the built-in demo, on any machine
    python reclip.py --dataset voc --data-root ~/data     a benchmark, by its published recipe

Wang and Kang, "Learn to Rectify the Bias of CLIP for Unsupervised Semantic Segmentation", CVPR
2024, and its extension ReCLIP++, 2024; sections and equations below are those of ReCLIP++.

Shapes: B images, C classes, D joint channels of CLIP, h×w patches, H×W pixels, L prompt length.
Maps are channels-first (Z: B×D×h×w; logits: B×C×h×w), text features are rows (Wq, Wr: C×D).
"""

import argparse
import atexit
import contextlib
import copy
import datetime
import functools
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import clip
from clip.model import merge_heads
from clip.weights import read_weights
from data import (CLIP_MEAN, CLIP_STD, DATASETS, IMAGENET_MEAN, IMAGENET_STD, TEMPLATES, Parser,
                  Progress, TrainingViews, UserError, ask_once, barrier, cached_views,
                  check_dataset, clean_exit, count, draw_seed, evenly, fingerprint, gather,
                  make_folder, name_counts, names_of, natural, normalise, open_dataset,
                  parse_classes, photometric_distortion, positive, rank, read_ahead, replacing,
                  seed_number, share, user_path, world, write_text)

# ---- III-A  Dense features and the Query: what CLIP says of every patch --------------------------

def resized_positions(visual, h, w):
    """CLIP's positional embedding for a grid of h×w patches, without the class token.
    visual: a clip VisionTransformer. Returns p, 1×width×h×w (bicubic, align_corners=False)."""
    grid = math.isqrt(len(visual.positional_embedding) - 1)
    p = visual.positional_embedding[1:].float().T.reshape(1, -1, grid, grid)
    return p if (h, w) == (grid, grid) else F.interpolate(p, (h, w), mode="bicubic")


def tokens_before_last_block(visual, images):
    """Everything of the image encoder but its last block, for images of any size.
    visual: a clip VisionTransformer; images: B×3×H×W, normalised; padded right and bottom with
    zeros to whole patches. Returns B×(1+h·w)×width, the class token first, and the grid (h, w)."""
    patch = visual.conv1.weight.shape[-1]
    images = F.pad(images, (0, -images.shape[3] % patch, 0, -images.shape[2] % patch))
    x = visual.conv1(images)
    h, w = x.shape[2:]
    x = x.flatten(2).mT + resized_positions(visual, h, w).flatten(2).mT
    first = (visual.class_embedding + visual.positional_embedding[0]).expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat([first, x], 1))
    for block in visual.transformer.resblocks[:-1]:
        x = x + block.attn(norm(block.ln_1, x))
        x = x + block.mlp(norm(block.ln_2, x))
    return x, (h, w)


def norm(layer, x):
    """Layer norm with MaskCLIP's epsilon of 1e-6 (CLIP's own is 1e-5), which the authors share."""
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, 1e-6)


# What a token attends to in the last block: itself alone (""), or all tokens whose queries (q) or
# keys (k) are like its own, or the sum of both; and whether residual and MLP follow.
SURGERIES = {
    "program": dict(alike="", rest=True),  # MaskCLIP's and the authors' programs; their numbers
    "value": dict(alike="", rest=False),  # the text's two 1×1 convolutions and no more
    "clearclip": dict(alike="q", rest=False),  # Lan et al., 2024
    "sclip": dict(alike="qk", rest=True),  # Wang et al., 2024
    "naclip": dict(alike="k", rest=False),  # Hajimiri et al., 2025, which prefers near patches
}


def dense_features(visual, images, surgery="program", sigma=5.0):
    """Patch features in the space of the text features, before the L2 norm (Sec. III-A, MaskCLIP).
    surgery: what becomes of the last block, a key of SURGERIES; sigma: for "naclip", in patches.
    images: B×3×H×W, normalised. Returns B×D×h×w; `F.normalize(…, dim=1)` of it is Z."""
    x, grid = tokens_before_last_block(visual, images)
    block, patches, width = visual.transformer.resblocks[-1], x[:, 1:], x.shape[-1]
    attn, alike = block.attn, SURGERIES[surgery]["alike"]
    if alike:  # the class token may be attended to, and is then dropped
        q, k, v = attn.project(norm(block.ln_1, x))
        near = neighbourhood(*grid, sigma, q) if surgery == "naclip" else None
        y = merge_heads(sum(F.scaled_dot_product_attention(a[:, :, 1:], a, v, attn_mask=near)
                            for a in (dict(q=q, k=k)[name] for name in alike)))
    else:
        weight, bias = attn.in_proj_weight[2 * width:], attn.in_proj_bias[2 * width:]
        y = F.linear(norm(block.ln_1, patches), weight, bias)
    y = attn.out_proj(y)
    if SURGERIES[surgery]["rest"]:
        y = y + patches
        y = y + block.mlp(norm(block.ln_2, y))
    return (visual.ln_post(y) @ visual.proj).mT.unflatten(2, grid)


def neighbourhood(h, w, sigma, like):
    """NACLIP's addition to the logits of attention, exp(-‖i-j‖²/2σ²) of patches i and j:
    h·w×(1+h·w), of the type and on the device of `like`; 0 for the class token."""
    place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).to(like.device).float()
    return F.pad(torch.exp(-torch.cdist(place, place) ** 2 / (2 * sigma**2)), (1, 0)).to(like.dtype)


@torch.no_grad()
def query_features(model, classes, templates=TEMPLATES, batch=512):
    """Wq, C×D: unit-length mean of each class's unit-length features over all templates.
    model: a CLIP; classes: list of C names, of which one like "person, man, woman" is a class of
    three names and has three rows (data.names_of); templates: strings with one {}."""
    names = [name for one in classes for name in names_of(one)]
    tokens = clip.tokenize([t.format(name) for name in names for t in templates], truncate=True)
    # Attention is causal: what follows the end token changes nothing and need not be computed.
    tokens = tokens[:, : int(tokens.argmax(1).max()) + 1].to(model.text_projection.device)
    progress, features = Progress("query", len(tokens)), []
    for part in tokens.split(batch):
        features.append(F.normalize(model.encode_text(part).float(), dim=-1))
        progress.advance(len(part))
    progress.close()
    return F.normalize(torch.cat(features).unflatten(0, (len(names), -1)).mean(1), dim=-1)


def classify(Z, W):
    """Logits of a feature map under text features: B×D×h×w, C×D → B×C×h×w (Mq = Z·Wqᵀ)."""
    return torch.einsum("bdhw,cd->bchw", Z, W)


def best_name(logits, names=None):
    """Logits of names, B×K×…, of which each class has so many → of classes, B×C×…: the best's."""
    if names is None or max(names) == 1:
        return logits
    return torch.stack([part.amax(1) for part in logits.split(names, 1)], 1)


# ---- III-B  Bias extraction: what CLIP prefers, whatever the image -------------------------------

class Reference(nn.Module):
    """Class-preference bias: learned words, shared by all classes, before each class name (Eq. 1).
    The sequence is [start] v_1 … v_L name [end], L 73 or what longer names leave of it, so that
    none loses its end. forward(model) → Wr, C×D, divided by the norm of the whole matrix; of a
    class with several names the mean of their features. text: words to start from, and of its
    length, to learn the Query (Table IV). Raises UserError for a name that leaves no room."""

    def __init__(self, model, classes, text=None):
        super().__init__()
        self.names = name_counts(classes)
        words = [name for one in classes for name in names_of(one)]
        tokens = [clip.tokenize(name, 512, truncate=True)[0].tolist() for name in words]
        self.endings = tuple(tuple(ids[1 : ids.index(max(ids)) + 1]) for ids in tokens)
        longest, context = max(map(len, self.endings)), len(model.positional_embedding)
        L = min(context - 4, context - 1 - longest)
        if L < 1:
            name = max(zip(map(len, self.endings), words))[1]
            raise UserError(f"class name {name[:40]!r}… leaves no room for a prompt: it may have "
                            f"{context - 3} tokens, and has {longest - 1}")
        # Every word starts as the embedding of token 0, as in the authors' program.
        first = [0] * L if text is None else [i for i in clip.tokenize(text)[0].tolist() if i][1:-1]
        table = model.token_embedding.weight.detach()
        self.register_buffer("start", table[tokens[0][:1]].float())
        self.prompt = nn.Parameter(table[first].float())

    def encode(self, model):
        """The text features of [start] prompt name [end], one row a name, not normalised."""
        prefix = torch.cat([self.start, self.prompt])
        return encode_shared_prefix(model, prefix, self.endings).float()

    def forward(self, model):
        Wr = self.encode(model)
        if max(self.names) > 1:
            Wr = torch.stack([part.mean(0) for part in Wr.split(self.names)])
        return Wr / Wr.norm()


def encode_shared_prefix(model, prefix, endings):
    """CLIP's text features of C texts that begin alike, exactly, for little more than one's price.
    Attention is causal, so one sequence does for all: the beginning once, then the endings, each
    token with the position of its own text, looking back at the beginning and its own ending alone.
    model: a CLIP; prefix: P×width, embeddings of the common beginning, start token included;
    endings: a tuple of C tuples of token ids, the end token last. Returns C×D, not normalised."""
    tokens, place, seen, ends = shared_layout(len(prefix), endings, prefix.device)
    x = torch.cat([prefix, model.token_embedding(tokens)]) + model.positional_embedding[place]
    for block in model.transformer.resblocks:
        q, k, v = block.attn.project(block.ln_1(x)[None])
        if block is model.transformer.resblocks[-1]:  # only its outputs at the end tokens matter
            q, x, seen = q[:, :, ends], x[ends], seen[ends]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + block.attn.out_proj(merge_heads(mixed)[0])
        x = x + block.mlp(block.ln_2(x))
    return model.ln_final(x) @ model.text_projection


@functools.lru_cache(8)
def shared_layout(P, endings, device):
    """Of P common tokens and the N of all endings: the endings' ids, N; every token's position in
    its own text, P+N; bool (P+N)×(P+N), which token looks at which; where the C end tokens are."""
    tokens = [i for ids in endings for i in ids]
    place = [*range(P), *(P + i for ids in endings for i in range(len(ids)))]
    text = [-1] * P + [c for c, ids in enumerate(endings) for _ in ids]
    tokens, place, text = (torch.tensor(x, device=device) for x in (tokens, place, text))
    seen = ((text[:, None] == text) | (text == -1)) & (place[:, None] >= place)
    ends = torch.tensor([len(ids) for ids in endings], device=device).cumsum(0) + P - 1
    return tokens, place, seen, ends


class PositionLogits(nn.Sequential):
    """Space-preference bias of ReCLIP: three 3×3 convolutions of the positional embedding.
    forward(p): 1×width×h×w → Mp, 1×C×h×w, a channel a class as in the authors' program (the text
    of ReCLIP has one); hidden widths 2/3 and 1/3 of the encoder's, 512 and 256 for ViT-B."""

    def __init__(self, width, C, hidden=None):
        widths = [width, *(hidden or (2 * width // 3, width // 3)), C]
        layers = []
        for a, b in zip(widths, widths[1:]):
            conv = nn.Conv2d(a, b, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(b), nn.ReLU()]
        super().__init__(*layers)


# ---- III-C  Rectified masks ----------------------------------------------------------------------

class Decoder(nn.Module):
    """Mo (Eq. 4): rectified logits in the context of their neighbourhood, a 5×5 convolution and BN.
    forward(Z, M): B×D×h×w, B×C×h×w → B×C×h×w."""

    def __init__(self, D, C):
        super().__init__()
        self.conv = nn.Conv2d(D + C, C, 5, padding=2)
        self.norm = nn.BatchNorm2d(C)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, Z, M):
        # The convolution of [Z, M], in two parts: Z needs no gradient, and then none is computed.
        of_Z, of_M = self.conv.weight.split([Z.shape[1], M.shape[1]], 1)
        x = F.conv2d(Z, of_Z, self.conv.bias, padding=2) + F.conv2d(M, of_M, padding=2)
        return self.norm(x)


# What each method learns: (bias, decoder)
METHODS = {"reclip++": ("independent", True), "reclip": ("joint", False),
           "maskclip": ("none", False)}


class Rectifier(nn.Module):
    """All that ReCLIP learns on top of a frozen CLIP, which it is given and does not contain.
    model: a CLIP with a ViT image encoder; classes: C names; Wq: C×D (a row for each name).
    bias: how Mb is extracted: "independent" (ReCLIP++), "joint" (ReCLIP), "reference" (ReCLIP
    without its positional part) or "none". decoder: whether M passes through one.
    Ablations: sign +1 adds the bias (Table V) instead of subtracting it (Eq. 3); learn_query learns
    the Query's prompt too (Table IV); visual: None, or an image encoder to fine-tune (Table VI)."""

    def __init__(self, model, classes, Wq, bias="independent", decoder=True, sign=-1,
                 learn_query=False, visual=None):
        super().__init__()
        C, D, width = len(classes), Wq.shape[1], model.visual.proj.shape[0]
        self.kind, self.sign, self.names = bias, sign, name_counts(classes)
        self.register_buffer("Wq", Wq.clone())
        if bias != "none":
            self.reference = Reference(model, classes)
        if bias == "independent":
            self.position = nn.Conv2d(width, D, 1)  # p, 1×width×h×w → Wp, 1×D×h×w
        if bias == "joint":
            self.position = PositionLogits(width, C)
        if decoder:
            self.decoder = Decoder(D, C)
        self.query = Reference(model, classes, "a photo of a") if learn_query else None
        self.visual = visual and copy.deepcopy(visual).requires_grad_(True)

    def bias(self, Z, p, Wr):
        """Mb, the bias logit map (Eq. 2): Z B×D×h×w, p 1×width×h×w, Wr C×D → 1×C×h×w or B×C×h×w.
        ReCLIP++ encodes the two biases apart: Mb = Wp·Wrᵀ, the same for every image.
        ReCLIP lets the image in: Mb = Mr + Mp with Mr = Z·Wrᵀ."""
        if self.kind == "independent":
            return classify(self.position(p), Wr)
        Mr = classify(Z, Wr)
        return Mr + self.position(p) if self.kind == "joint" else Mr

    def forward(self, Z, p, Wr, Wq=None):
        """Query logits and rectified logits (Eqs. 3 and 4), both B×C×h×w. Z: B×D×h×w, of unit
        length over D; p: 1×width×h×w; Wr: C×D or None; Wq: C×D, by default the fixed one."""
        Mq = M = best_name(classify(Z, self.Wq if Wq is None else Wq), self.names)
        if self.kind != "none":
            M = Mq + self.sign * self.bias(Z, p, Wr)
        return Mq, self.decoder(Z, M) if hasattr(self, "decoder") else M

    def texts(self, model):
        """Wq and Wr (None without a bias) as they are now, with gradients where learned."""
        Wq = self.Wq
        if self.query is not None:
            Wq = F.normalize(self.query.encode(model), dim=1)
            self.Wq = Wq.detach()
        return Wq, None if self.kind == "none" else self.reference(model)


def gumbel_masks(logits, temperature, noise=0.0):
    """One-hot masks over the classes with the gradient of a softmax (Eq. 5).
    logits: B×C×h×w; temperature: τ1; noise: standard Gumbel noise of the same shape, or 0.
    Returns B×C×h×w: exactly 0 and 1 forward, softmax(logits / τ1 + noise) backward."""
    scaled = logits / temperature + noise
    # What is less than e⁻⁵⁰ of the likeliest class is raised to that, which no float32 sum notices:
    # subnormal probabilities and gradients would make the backward pass ten times slower on a CPU.
    highest, winner = scaled.detach().max(1, keepdim=True)
    soft = torch.maximum(scaled, highest - 50).softmax(1)
    hard = torch.zeros_like(soft).scatter_(1, winner, 1.0)
    return hard + (soft - soft.detach())


def gumbel_noise(shape, seeds, device="cpu"):
    """Standard Gumbel noise, len(seeds)×shape; each image's is drawn from its own seed."""
    noise = torch.empty(len(seeds), *shape, device=device)
    for row, seed in zip(noise, seeds):
        row.exponential_(generator=torch.Generator(device).manual_seed(seed))
    return -noise.log()


# ---- III-D  Contrastive loss, and the image-level multi-label hypotheses that it learns from -----

def masked_pooling(masks, features):
    """Mean of mask·feature over all n patches: B×C×h×w, B×K×h×w → B×C×K.
    Divided by n and not by the mask's area, as in the authors' program: a larger mask gives larger
    logits, and without that signal training collapses. Pooling is linear, so pooling Mq instead of
    Z gives the similarities Z_g·Wqᵀ at C/D of the cost (where each class has one name)."""
    return torch.einsum("bchw,bkhw->bck", masks, features) / masks[0, 0].numel()


def contrastive_loss(similarities, hypothesis, tau=0.01):
    """Eq. 7: each class of an image's hypothesis should recognise itself in its masked feature.
    similarities: B×C×C, S[k, j] of the feature under the mask of class k to the text of class j;
    hypothesis: bool B×C. Mean over an image's classes, then over all B images, also empty ones."""
    log_p = (similarities / tau).log_softmax(-1).diagonal(dim1=1, dim2=2)  # B×C
    present = hypothesis.sum(1).clamp(min=1)
    return -((log_p * hypothesis).sum(1) / present).mean()


def crop_windows(H, W, r):
    """Windows (top, left, height, width) of r times the image's sides, half a window apart: 11×11
    for r = 1/6. Where 2/r is no whole number they overlap a little more."""
    height, width = max(1, round(r * H)), max(1, round(r * W))
    steps = math.ceil(2 / r - 1e-9) - 1
    tops, lefts = ([round(i * rest / max(1, steps - 1)) for i in range(steps)]
                   for rest in (H - height, W - width))
    return [(top, left, height, width) for top in tops for left in lefts]


def cut_crops(image, r, side):
    """The crops of crop_windows as CLIP sees an image: shorter side to `side`, centre, square.
    image: uint8 3×H×W. Returns uint8 (number of windows)×3×side×side."""
    windows = crop_windows(*image.shape[1:], r)
    return clip_view(torch.stack([image[:, t : t + h, l : l + w] for t, l, h, w in windows]), side)


def clip_view(images, side):
    """CLIP's preprocessing short of normalisation: uint8 …×3×H×W → uint8 …×3×side×side."""
    from torchvision.transforms.v2 import functional as TF
    images = TF.resize(images, side, TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(images, [side, side])


def clip_features(model, views, amp=False, batch=512):
    """CLIP's own features of B views of its size, uint8 B×3×R×R → float32 B×D, of any length."""
    if views.device.type == "cpu":  # there a batch that stays in its cache
        batch = max(1, 2000 // len(model.visual.positional_embedding))
    with torch.autocast(views.device.type, torch.bfloat16, enabled=amp):
        return torch.cat([model.encode_image(normalise(part, CLIP_MEAN, CLIP_STD)).float()
                          for part in views.split(batch)])


def crop_votes(model, images, Wq, r, amp=False, names=None):
    """How many crops of each image every class wins (Sec. III-D), int64 len(images)×C.
    model: a CLIP; images: list of uint8 3×H×W, of any sizes; Wq: C×D; r: side of a crop relative to
    the image's; amp: encode in bf16; names: as in `best_name`."""
    crops = torch.cat([cut_crops(image, r, model.visual.input_resolution) for image in images])
    # argmax needs no unit length: it is the same for every class
    scores = best_name(clip_features(model, crops, amp) @ Wq.T, names)
    winner = scores.argmax(1).unflatten(0, (len(images), -1))
    return F.one_hot(winner, scores.shape[1]).sum(1)


def crop_hypothesis(counts, t):
    """Eq. 6: the classes detected in more than the share t of the crops. counts: B×C → bool B×C."""
    return counts / counts.sum(1, keepdim=True) > t


def global_scores(model, images, Wq, amp=False, names=None):
    """100·cosine of images, as CLIP sees them (their centre), to each class (ReCLIP), float32
    len(images)×C. Arguments as of `crop_votes`."""
    views = torch.stack([clip_view(image, model.visual.input_resolution) for image in images])
    features = F.normalize(clip_features(model, views, amp), dim=-1)
    return best_name(100 * (features @ Wq.T), names)


def global_hypothesis(scores, threshold, top):
    """ReCLIP: classes that reach a threshold on 100·cosine, else the best `top`; B×C → bool B×C."""
    chosen = scores >= threshold
    best = scores >= scores.topk(min(top, scores.shape[1]), 1).values[:, -1:]
    return torch.where(chosen.any(1, keepdim=True), chosen, best)


@torch.no_grad()
def make_hypotheses(data, model, Wq, s, folder, device):
    """The hypotheses of the images of `data`, as a function: indices of B images → bool B×C.
    What they are decided from (crops that each class won, or 100·cosine) is kept in `folder`, so
    thresholds can be changed without encoding again. s: settings, as of `train`."""
    crops, names = s.hypothesis == "crops", name_counts(data.classes)
    Wq = query_features(model, data.classes) if s.learn_query else Wq  # the fixed Query's
    facts = dict(hypothesis=s.hypothesis, data=data.name, images=data.fingerprint,
                 classes=data.classes, clip=clip_fingerprint(model), activation=s.activation,
                 heads=s.heads, r=s.crop_ratio if crops else None)
    # Blocks are the same for any number of processes, and so is the rounding in a batch.
    size = max(1, 256 // len(crop_windows(64, 64, s.crop_ratio))) if crops else 1
    blocks = [rows.tolist() for rows in torch.arange(len(data)).split(size)]

    def ask(images):
        images = [to_device(image, device) for image in images]
        return dict(scores=crop_votes(model, images, Wq, s.crop_ratio, s.amp, names) if crops else
                    global_scores(model, images, Wq, s.amp, names))

    def hypothesis(indices):
        scores = records.rows(torch.as_tensor(indices).tolist())["scores"].astype(np.float64)
        return (crop_hypothesis(torch.from_numpy(scores), s.threshold) if crops else
                global_hypothesis(torch.from_numpy(scores), s.threshold, s.top))

    fields = dict(scores=(np.int16 if crops else np.float32, (len(names),)))
    records = ask_once(folder, "hypotheses", facts, fields, blocks,
                       lambda block: [data.image(i) for i in block], ask, s.workers)
    return hypothesis


# ---- IV-A  The recipe of the papers, one training step, and the loop -----------------------------

ALWAYS = dict(
    clip="ViT-B/16", surgery="program", sigma=5.0, ratio=(0.5, 2.0), distort=True,  # views
    tau=0.01, momentum=0.9, weight_decay=5e-4, power=0.9,  # loss and SGD
    crop_ratio=1 / 6, views=0,  # r; fresh augmentation in every epoch
    learn_query=False, tune_encoder=False,  # ablations
)
RELEASE = {  # the authors' settings of July 2025; training stops after `epochs` of the schedule
    #             scale       crop  schedule  epochs  batch  lr    PD
    "voc":        ((2048, 336), 336, 200,  50,  1, 0.01, 1.0),
    "context":    ((2048, 448), 480, 400,  50,  1, 0.01, 0.85),
    "ade":        ((2048, 512), 512, 600, 100,  1, 0.01, 0.5),
    "cityscapes": ((2048, 448), 512, 300,  50, 16, 0.16, 0.5),
    "stuff":      ((2048, 512), 512, 800, 100,  1, 0.01, 0.95),
}
PAPER = {  # the authors' settings of August 2024, when the papers' numbers were published
    "voc":        ((2048, 512), 512, 200, 200, 16, 0.01, 0.99992),
    "context":    ((520, 520),  480, 150, 150, 16, 0.01, 0.75),
    "ade":        ((2048, 512), 512, 150, 150, 16, 0.01, None),
    "cityscapes": ((1024, 512), 512, 150, 150, 16, 0.01, 0.74),
    "stuff":      ((2048, 512), 512,  30,  30, 16, 0.01, 0.9),
}
DEMO = ((96, 96), 96, 10, 10, 16, 0.03, None)
DEMO_ONLY = dict(clip="shapes-tiny", surgery="value", ratio=(1.0, 1.0), distort=False,
                 crop_ratio=1 / 2, views=2)
# ReCLIP's global hypothesis: threshold on 100·cosine, and how many classes if none passes
GLOBAL = {"voc": (23, 2), "context": (20, 6), "ade": (21, 5), "cityscapes": (21.5, 2),
          "stuff": (20, 8), "shapes": (48, 2)}
CROPS = {"voc": 0.07, "cityscapes": 0.07, "shapes": 0.12}  # t, elsewhere 0
ROWS = {"folder": "voc", "stuff171": "stuff"}  # data sets without a row of their own


def recipe(dataset, preset="release", method="reclip++", **given):
    """The published settings of a data set as a dict; `folder` uses VOC's. Raises UserError.
    given: single values in their place, from which others, such as the threshold, follow."""
    check_dataset(dataset)
    row = ROWS.get(dataset, dataset)
    demo, columns = row == "shapes", ("scale", "crop", "schedule", "epochs", "batch", "lr", "pd")
    values = DEMO if demo else {"release": RELEASE, "paper": PAPER}[preset][row]
    s = ALWAYS | dict(zip(columns, values)) | (DEMO_ONLY if demo else {})
    s["bias"], s["decoder"], s["sign"] = *METHODS[method], -1
    s["hypothesis"] = {"reclip++": "crops", "maskclip": "none"}.get(
        method, "crops" if demo else "global")  # which serve ReCLIP better on the demo
    s |= given
    # τ1. The demo's decoder needs softer masks: sharp ones make a class die now and then. Without
    # one, τ1 is below the distance of a patch's best two cosines, there 0.06 to 0.09.
    s["mask_temperature"] = (1.0 if demo else 0.01) if s["decoder"] else (0.01 if demo else 0.001)
    if demo and s["bias"] == "joint" and not s["decoder"]:
        # Mp starts with BatchNorm's spread of 1, and shrinks with learning rate times steps.
        s |= dict(lr=0.3, epochs=20, schedule=20)
    s["threshold"], s["top"] = (GLOBAL[row] if s["hypothesis"] == "global" else
                                (CROPS.get(row, 0.0), 0))
    s["pd"], s["pd_temperature"] = head_denoising(row, s["bias"], s["decoder"], s["pd"])
    return s | given


def head_denoising(dataset, bias, decoder, pd):
    """Prompt denoising and its temperature belong to what the logits are: (PD, temperature).
    pd: ReCLIP++'s, which is for logits that a decoder's BatchNorm has widened. Without a decoder
    ReCLIP's; none for MaskCLIP, whose logits are cosines, and on the demo."""
    if decoder:
        return pd, 0.1
    if bias == "none" or dataset == "shapes":
        return None, 0.01
    return {"context": 0.6}.get(dataset, 0.5), 0.01  # the authors' settings of ReCLIP


def rectification_loss(network, features, p, Wq, Wr, hypothesis, noise, tau, mask_temperature):
    """One training step: from features, B×D×h×w, not normalised, to the loss, a 0-dim tensor.
    network: a Rectifier; p: 1×width×h×w; Wq, Wr: C×D; hypothesis: bool B×C; noise: B×C×h×w, Gumbel;
    tau, mask_temperature: τ and τ1."""
    Z = F.normalize(features, dim=1)  # III-A
    Mq, logits = network(Z, p, Wr, Wq)  # III-B and III-C
    masks = gumbel_masks(logits, mask_temperature, noise)
    return contrastive_loss(masked_pooling(masks, Mq), hypothesis, tau)  # III-D


def train(s, data, model, rectifier, hypothesis, run, device):
    """Learn the bias of CLIP on `data` (Sec. IV-A).
    s: settings, as `recipe` and the command line give them; data: SegmentationData, of which only
    images are opened; hypothesis: a function, indices of B images → bool B×C; run: the Run."""
    optimizer = torch.optim.SGD(rectifier.parameters(), lr=s.lr, momentum=s.momentum,
                                weight_decay=s.weight_decay, fused=True)
    visual = rectifier.visual or image_encoder(model, s.preset)
    views = TrainingViews(data, s.scale, s.crop, s.ratio, s.distort, s.seed)
    grid = -(-s.crop // visual.conv1.stride[0])

    def encode(batch):
        view, size = views_on(device, batch)
        with torch.set_grad_enabled(s.tune_encoder):
            return encode_views(visual, view, s.preset, s.surgery, s.sigma, s.amp, size)

    if s.views:  # CLIP is frozen: what it says of a view need be asked only once
        fields = dict(features=(np.float16, (rectifier.Wq.shape[1], grid, grid)))
        views = cached_views(views, s.views, s.cache, "views", network_facts(model, s), fields,
                             lambda batch: dict(features=encode(batch).half()), s.workers)
    network = parallel(rectifier.train(), device)
    for epoch, batch in run.steps(optimizer, views.batch, s.batch, s.epochs, s.seed, s.workers):
        optimizer.param_groups[0]["lr"] = s.lr * (1 - epoch / s.schedule) ** s.power
        features = to_device(batch["features"], device).float() if s.views else encode(batch)
        p = resized_positions(visual, grid, grid)
        present = to_device(hypothesis(batch["index"]), device)
        seeds = [draw_seed(s.seed, epoch, data.ids[i], "gumbel") for i in batch["index"].tolist()]
        noise = gumbel_noise((len(data.classes), grid, grid), seeds, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
            Wq, Wr = rectifier.texts(model)
        loss = rectification_loss(network, features, p, Wq, Wr, present, noise, s.tau,
                                  s.mask_temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.after(loss)


# ---- Inference -----------------------------------------------------------------------------------

def encode_views(visual, views, preset, surgery, sigma=5.0, amp=False, sizes=None):
    """Dense features, float32 B×D×h×w, not normalised, of uint8 views B×3×H×W.
    visual, preset: as `image_encoder` has them; surgery, sigma: as in `dense_features`; amp: in
    bf16; sizes: B×2, (h, w) of what is not padding, or None."""
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if preset == "paper" else (CLIP_MEAN, CLIP_STD)
    images = normalise(views, mean, std, sizes)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        return dense_features(visual, images, surgery, sigma).float()


class RectifiedCLIP:
    """A Rectifier with its CLIP: images in, Query and rectified logits out. Wr: C×D, or None;
    settings: a namespace with preset, surgery, sigma, method and the values of evaluation."""

    def __init__(self, model, rectifier, Wr, classes, settings):
        self.model, self.classes, self.settings = model, list(classes), settings
        self.visual = rectifier.visual or image_encoder(model, settings.preset)
        self.patch = model.visual.conv1.stride[0]
        self.rectifier = rectifier.to(model.visual.proj.device).eval().requires_grad_(False)
        self.Wr = Wr if Wr is None else Wr.to(rectifier.Wq)

    @torch.no_grad()
    def encode(self, views, sizes=None, amp=False):
        """`encode_views` with the settings of the run: float32 B×D×h×w, not normalised."""
        s = self.settings
        return encode_views(self.visual, views, s.preset, s.surgery, s.sigma, amp, sizes)

    def inputs(self, features):
        """Z, of unit length, and p, 1×width×h×w: what a Rectifier sees of encoded features."""
        return F.normalize(features, dim=1), resized_positions(self.visual, *features.shape[2:])


def prompt_denoising(logits, pd, temperature):
    """Switch off the classes that are nowhere likely (PD, MaskCLIP): their logits become -100.
    A class stays if its highest softmax(logits / temperature) over the image reaches pd; the most
    likely class always does. logits: B×C×h×w; pd: 0…1 or None for all. In float32: VOC's PD of 1.0
    keeps the classes whose float32 probability rounds to 1."""
    if pd is None:
        return logits
    confidence = (logits.float() / temperature).softmax(1).amax((2, 3))  # B×C
    off = (confidence < pd) & (confidence < confidence.amax(1, keepdim=True))
    return logits.masked_fill(off[:, :, None, None], -100.0)


@functools.lru_cache(64)
def interpolation(n, padded, view, size, device):
    """size×n, linear upsampling along a side as a matrix: n cells to `padded` pixels, of which the
    first `view` are kept, and these to `size`."""
    weights = F.interpolate(torch.eye(n, device=device)[None], padded, mode="linear")[..., :view]
    return F.interpolate(weights, size, mode="linear")[0].T


@functools.lru_cache(64)
def interpolation_blocks(*side):
    """Of every block of a side of `interpolation` the cells it needs, their weights, its ends."""
    def block(w):
        used = w.amax(0).nonzero()
        cells = slice(int(used[0]), int(used[-1]) + 1)
        w = w[:, cells]
        return cells, w, torch.cat((w[:1], torch.eye(w.shape[1]).to(w)[1:-1], w[-1:]))
    return [*map(block, interpolation(*side).split(104 if side[-1].type == "cpu" else 1024))]


def label_map(logits, padded, view, size):
    """Class of every pixel: logits upsampled (bilinear) to the network's input, then to the label.
    logits: B×C×h×w, covering `padded` (height, width) pixels, of which the top left `view` are the
    image, whose label has `size`. Returns int64 B×H×W. A block's pixels are weighted means of its
    ends and of the cells inside: a class that is below another in all of these wins no pixel there,
    and is not upsampled. Raises UserError for logits that are not finite."""
    if not logits.isfinite().all():
        raise UserError("the logits are not all finite; are the weights damaged?")
    down, across = (interpolation_blocks(*side, logits.device)
                    for side in zip(logits.shape[2:], padded, view, size))
    labels = torch.empty(len(logits), *size, dtype=torch.int64, device=logits.device)
    for one, label in zip(logits, labels):
        for (a, rows, top), strip in zip(down, label.split(len(down[0][1]))):
            for (b, columns, left), part in zip(across, strip.split(len(across[0][1]), 1)):
                cells = one[:, a, b]
                ends = (top @ cells @ left.T).flatten(1)
                safe = ends[ends.amin(1).argmax()]  # the class whose least is greatest
                possible = (ends >= safe).any(1).nonzero()[:, 0]
                part.copy_(possible[(rows @ cells[possible] @ columns.T).max(0)[1]])
    return labels


# ---- Running: what keeps a run alive, checkpoints, networks, devices -----------------------------

# What may change when resuming: machine and places; weights are told apart by fingerprints.
MACHINE = {"device", "workers", "amp", "data_root", "out", "cache", "clip", "teacher", "labels",
           "labels_offset"}
FORMAT = 2  # of checkpoints; those of earlier versions are refused


class Run:
    """A training run that may be interrupted at any time: its checkpoint, and a log of how it went.
    path: of the checkpoint; s: settings; data: a SegmentationData; learner: what is trained. Beside
    it a checkpoint has `optimizer` and `step` to go on from, Wr to predict without a text encoder,
    and what it was made of. Raises UserError where the folder holds a run of other settings."""

    def __init__(self, path, s, data, model, learner=None, log="log.jsonl", title="rectify"):
        self.path, self.ids, self.model, self.learner = path, data.ids, model, learner
        self.log, self.title = path.with_name(log), title
        made_of = dict(classes=list(data.classes), clip=clip_fingerprint(model),
                       images=data.fingerprint)
        self.facts = dict(format=FORMAT, kind=path.stem, settings=plain(s), **made_of)
        self.previous = load_checkpoint(path) if path.exists() else self.facts | dict(step=0)
        self.finished = self.previous.get("finished", False)
        old, new = ({key: value for key, value in one["settings"].items() if key not in MACHINE}
                    | {key: one[key] for key in made_of} for one in (self.previous, self.facts))
        changes = [f"{key} {old.get(key)!s:.40} → {new.get(key)!s:.40}"
                   for key in sorted(old | new) if old.get(key) != new.get(key)]
        if changes:
            raise UserError(f"{path} was made with other settings ({', '.join(changes)}); repeat "
                            "them, or choose another folder with --out")

    def steps(self, optimizer, read, batch, epochs, seed, workers):
        """Yields (epoch, what `read` gives) for every step that is left, read ahead by threads.
        read: a function of a list of (epoch, index). The order of an epoch depends on (seed, epoch)
        alone; of several processes each gets its share of every batch, filled up where it cannot be
        divided. Ctrl-C and SIGTERM end training after the step under way (of several processes:
        within ten), a second Ctrl-C at once."""
        self.optimizer, self.per_epoch = optimizer, -(-len(self.ids) // batch)
        self.total, self.stopping, self.sums, self.shown = epochs * self.per_epoch, False, {}, ""
        self.step = first = self.previous["step"]
        if first:
            self.learner.load_state_dict(self.previous["state"])
            optimizer.load_state_dict(self.previous["optimizer"])
            print(f"going on from step {first}")
        if rank() == 0:  # steps after the checkpoint are repeated, and so are their lines
            lines = self.log.read_text("utf-8").splitlines(True) if self.log.exists() else []
            found = [re.match(r'{"step": (\d+),.*}\n$', line) for line in lines]
            write_text(self.log, "".join(m[0] for m in found if m and int(m[1]) <= first))

        def keys():
            for epoch in range(first // self.per_epoch, epochs):
                generator = torch.Generator().manual_seed(draw_seed(seed, epoch, "order"))
                for images in torch.randperm(len(self.ids), generator=generator).split(batch):
                    filled = images.repeat(world())[: -(-len(images) // world()) * world()]
                    yield [(epoch, i) for i in filled[rank()::world()].tolist()]

        left, handlers = itertools.islice(keys(), first % self.per_epoch, None), {}
        self.progress, self.saved = Progress(self.title, self.total, first), time.monotonic()
        if threading.current_thread() is threading.main_thread():  # no other can set handlers
            handlers = {number: signal.signal(number, self.stop)
                        for number in (signal.SIGINT, signal.SIGTERM)
                        if signal.getsignal(number) != signal.SIG_IGN}
        try:
            for content in read_ahead(read, left, workers):
                yield self.step // self.per_epoch, content
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.progress.close()

    def stop(self, number, frame):
        """What signals do while training, unless they were ignored before."""
        if self.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopping = True

    def after(self, loss, **parts):
        """To be called when a step is done: counts, logs, saves when it is due, and stops.
        loss, parts: 0-dim tensors, not waited for until a line is due. Raises UserError, before
        anything is written, where the loss is nan or infinite."""
        self.step += 1
        for name, value in dict(loss=loss, **parts).items():
            self.sums.setdefault(name, []).append(value.detach())
        finished = self.step == self.total
        # Of several processes none may stop while others wait for it in the next step.
        stopping = self.stopping if world() == 1 else (
            self.step % 10 == 0 and any(gather(self.stopping)))
        due = finished or stopping or time.monotonic() - self.saved > 120
        if due or self.step % 50 == 0:  # a line of the log: means since the last
            row = dict(step=self.step, lr=self.optimizer.param_groups[0]["lr"])
            row |= {name: round(torch.stack(values).mean().item(), 6)
                    for name, values in self.sums.items()}
            if not math.isfinite(row["loss"]):
                raise UserError(f"the loss is not finite at step {self.step} or shortly before; "
                                f"{self.path} stays as it was; a smaller --lr may help")
            if rank() == 0:
                with open(self.log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            self.shown = "".join(f"  {name} {row[name]:.3f}" for name in self.sums)
            self.sums.clear()
        self.progress.advance(1, lambda: self.shown)
        if due:
            self.save(self.step, self.optimizer, finished)
        if stopping and not finished:
            barrier()  # it is saved: where one process ends, torchrun ends the others
            if rank() == 0:
                print(f"\nstopped after step {self.step} and saved {self.path}; the same command "
                      "goes on", file=sys.stderr)
            raise SystemExit(130)

    def save(self, step, optimizer=None, finished=False):
        """Write the checkpoint to a temporary file, and rename it; only the first process does."""
        self.saved = time.monotonic()
        if rank() > 0:
            return
        with torch.no_grad():
            Wr = self.learner.texts(self.model)[1] if hasattr(self.learner, "texts") else None
        content = io.BytesIO()  # of a full disk torch.save would make a RuntimeError
        torch.save(self.facts | dict(
            state=self.learner.state_dict(), Wr=Wr, step=step, finished=finished,
            optimizer=optimizer and optimizer.state_dict()), content)
        with replacing(self.path) as temporary:
            temporary.write_bytes(content.getbuffer())


def load_checkpoint(path):
    """A checkpoint of reclip.py or distill.py as a dict. Raises UserError if it is none."""
    try:
        checkpoint = read_weights(path)
    except (ValueError, OSError) as error:
        raise UserError(error) from None
    if checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of these reclip.py and distill.py")
    return checkpoint


def plain(s):
    """Settings as plain values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(s).items()}


def passed_on(s):
    """Settings that the evaluation after a training is given too, as a command line."""
    names = ("device", "workers", "clip", "data_root", "labels", "labels_offset")
    return ["--amp" if s.amp else "--no-amp"] + [
        f"--{name.replace('_', '-')}={getattr(s, name)}"
        for name in names if getattr(s, name, None) is not None]


def load_clip(source, activation=None, device="cpu", heads=None):
    """A frozen float32 CLIP with a ViT image encoder; arguments as of `clip.load`. UserError."""
    try:
        model, _ = clip.load(source, device="cpu", activation=activation, heads=heads)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(error) from None
    if not hasattr(model.visual, "proj"):
        raise UserError(f"{source} has a ResNet image encoder; expected a ViT, as in ViT-B/16")
    if (model.vocab_size, model.context_length) != (49408, 77):
        raise UserError(f"{source} has a vocabulary and a context of {model.vocab_size} and "
                        f"{model.context_length} tokens; expected OpenAI's 49408 and 77")
    return model.float().to(device).eval().requires_grad_(False)


def clip_fingerprint(model):
    """A short name for a CLIP's weights, from its projections: other weights, another name."""
    return fingerprint(model.visual.proj, model.text_projection, model.positional_embedding)


def network_facts(model, s):
    """What the features of a frozen CLIP depend on beside the images, as plain values."""
    return dict(clip=clip_fingerprint(model), preset=s.preset, surgery=s.surgery,
                activation=s.activation, heads=s.heads,
                sigma=s.sigma if s.surgery == "naclip" else None)


def image_encoder(model, preset):
    """The encoder of dense features: CLIP's own, for the paper's preset with exact GELU."""
    if preset != "paper":
        return model.visual
    visual = copy.deepcopy(model.visual)
    for block in visual.transformer.resblocks:
        block.mlp.gelu = nn.GELU()
    return visual


def usual_surgery(model, surgery="program"):
    """`surgery`, but "value" for a larger CLIP, with which "program" collapses (ClearCLIP)."""
    return "value" if surgery == "program" and len(model.visual.proj) > 768 else surgery


def open_rectified(path, device="cpu", source=None):
    """RectifiedCLIP of a checkpoint of reclip.py; source: where its CLIP is, if not where it was.
    Raises UserError for a file that is no such checkpoint, and for another CLIP."""
    checkpoint = load_checkpoint(path)
    s, classes = argparse.Namespace(**checkpoint["settings"]), checkpoint["classes"]
    model = load_clip(source or s.clip, s.activation, device, s.heads)
    if clip_fingerprint(model) != checkpoint["clip"]:
        raise UserError(f"{path} is of another CLIP than {source or s.clip}; see --clip")
    rectifier = make_rectifier(model, classes, checkpoint["state"]["Wq"], s)
    rectifier.load_state_dict(checkpoint["state"])
    return RectifiedCLIP(model, rectifier, checkpoint["Wr"], classes, s)


def make_rectifier(model, classes, Wq, s):
    """The Rectifier that settings ask for."""
    visual = image_encoder(model, s.preset) if s.tune_encoder else None
    return Rectifier(model, classes, Wq, s.bias, s.decoder, s.sign, s.learn_query, visual)


def pick_device(name=None):
    """CUDA, else MPS, else the CPU, unless named; UserError if that is not there. With torchrun it
    joins the other processes, of which each has a GPU of its own and only the first prints."""
    together = dist.is_torchelastic_launched()
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else
                                       "mps" if torch.backends.mps.is_available() else "cpu"))
        if together and device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error)[:80]}") from None
    if together and not dist.is_initialized():
        # Plain values go by way of the CPU. A day's patience: one may still be downloading.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))
        atexit.register(dist.destroy_process_group)
        if rank():
            sys.stdout = open(os.devnull, "w")
    return device


def parallel(module, device):
    """The module, for several processes in DistributedDataParallel. BatchNorm's statistics are then
    of the whole batch on CUDA; on the CPU, where PyTorch cannot, of each process's own share."""
    if world() == 1:
        return module
    if device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return nn.parallel.DistributedDataParallel(module)


def to_device(x, device):
    """A CPU tensor on a device, without waiting for what a GPU is at."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def views_on(device, batch):
    """Coloured views of a batch of TrainingViews, B×3×H×W, and their sizes, B×2, on the device."""
    view, size = (to_device(batch[key], device) for key in ("view", "size"))
    return photometric_distortion(view, batch["colours"]) if "colours" in batch else view, size


def use_amp(given, device):
    """Whether networks run in bf16: as --amp says, else on a GPU that has instructions for it."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return able if given is None else given


# Of the authors' checkpoints: what is learned, and its name here; the rest is a copy of CLIP.
AUTHORS_NAMES = {"text_encoder.prompt_token": "reference.prompt", "pe_proj": "position",
                 "proj_net": "position", "decoder_conv2": "decoder.conv",
                 "decoder_norm2": "decoder.norm"}


def renamed(state):
    """What is learned of a state dict, or of gradients, from the authors' names to ours."""
    ours = {new + key[len(old):]: value.float() for key, value in state.items()
            for old, new in AUTHORS_NAMES.items() if f"{key}.".startswith(f"{old}.")}
    return ours | {"reference.prompt": ours["reference.prompt"][0]}


def authors_state(path):
    """The state dict of a rectification checkpoint of the authors' program, else None."""
    with contextlib.suppress(ValueError, OSError, AttributeError):  # load_checkpoint will say more
        state = {key.removeprefix("module."): value for key, value in read_weights(path).items()}
        return state if "text_encoder.prompt_token" in state else None


def from_authors(state, model, classes, Wq, settings):
    """RectifiedCLIP of an `authors_state`; classes: C names in their order; Wq: C×D. Their prompt
    leaves a name three tokens with its end: a longer one loses it. Raises UserError."""
    state, C = renamed(state), len(classes)
    rectifier = Rectifier(model, classes, Wq, *METHODS[settings.method])
    reference = rectifier.reference
    reference.endings = tuple(ids[:3] for ids in reference.endings)
    reference.prompt = nn.Parameter(torch.empty_like(state["reference.prompt"]))
    if settings.method == "reclip":
        hidden = [len(state[f"position.{i}.weight"]) for i in (0, 3)]
        rectifier.position = PositionLogits(model.visual.proj.shape[0], C, hidden)
    try:
        rectifier.load_state_dict({"Wq": Wq, "reference.start": reference.start} | state)
    except RuntimeError as error:
        raise UserError(f"the authors' checkpoint does not fit {C} classes "
                        f"({', '.join(classes[:3])}, …) and this CLIP: {error}") from None
    Wr = rectifier.to(model.visual.proj.device).texts(model)[1].detach()
    return RectifiedCLIP(model, rectifier, Wr, classes, settings)


# ---- The command ---------------------------------------------------------------------------------

def parse_arguments(argv):
    """The command line as a namespace; what is not given is None."""
    parser = Parser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--dataset", default="shapes", help=", ".join(DATASETS) + " (default: shapes, the demo)")
    flag("--data-root", type=user_path, help="its folder (README, Data sets)")
    flag("--train-split", choices=("train", "trainaug"), default="train", help="of voc")
    flag("--classes", help='for folder: "cat, dog, sofa", or a text file, one class a line')
    flag("--labels", type=user_path, help="for folder: ground truth, to evaluate with alone")
    flag("--labels-offset", type=int, choices=(0, 1), default=0, help="1: 0 is background")
    flag("--method", choices=tuple(METHODS), default="reclip++")
    flag("--preset", choices=("release", "paper"), default="release", help="which published recipe")
    flag("--out", type=user_path, help="the run's folder (default: runs/NAME)")
    flag("--cache", type=user_path, help="for hypotheses and views (default: --out)")
    flag("--seed", type=seed_number, default=0)
    flag("--device", help="default: cuda, else mps, else cpu")
    flag("--amp", action=argparse.BooleanOptionalAction, help="bf16 encoders (default: on a GPU)")
    flag("--workers", type=natural, help="threads that read images (default: one a core)")
    flag = parser.add_argument_group("values of the recipe (default: as published)").add_argument
    flag("--clip", help="a name (ViT-B/16), a file, or a folder of Hugging Face's")
    flag("--activation", choices=("quick_gelu", "gelu"), help="of --clip, where its files are mute")
    flag("--heads", type=count, help="of --clip's image encoder, where its files are mute")
    flag("--surgery", choices=tuple(SURGERIES), help="what becomes of CLIP's last block")
    flag("--sigma", type=positive, help="of naclip: how near is near, in patches")
    flag("--hypothesis", choices=("crops", "global"))
    flag("--crop-ratio", type=share, help="r: side of a window relative to the image's")
    flag("--threshold", type=float, help="t, or for global on 100·cosine")
    flag("--epochs", type=count)
    flag("--batch", type=count)
    flag("--lr", type=positive)
    flag("--scale", type=count, nargs=2, help="longest and shortest side at most")
    flag("--crop", type=count)
    flag("--mask-temperature", type=positive, help="τ1 of the Gumbel-Softmax")
    flag("--pd", type=share, help="prompt denoising at test time: switch off classes below it")
    flag("--views", type=natural, metavar="K", help="of an image, encoded once; 0: fresh ones")
    flag = parser.add_argument_group("ablations: one part of the method changed").add_argument
    flag("--bias", choices=("independent", "joint", "reference", "none"), help="how extracted")
    flag("--decoder", action=argparse.BooleanOptionalAction)
    flag("--add", dest="sign", action="store_const", const=1, help="add the bias, not subtract it")
    flag("--learn-query", action="store_const", const=True, help="learn the Query's prompt too")
    flag("--tune-encoder", action="store_const", const=True, help="fine-tune CLIP's image encoder")
    return parser.parse_args(argv)


def settings_of(args):
    """Recipe and command line as a namespace. Raises UserError for what cannot work together."""
    given = {key: value for key, value in vars(args).items() if value is not None}
    s = argparse.Namespace(**vars(args) | recipe(**given))
    s.scale, s.schedule = tuple(s.scale), max(s.schedule, s.epochs)
    if s.workers is None:
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        s.workers = 0 if s.dataset == "shapes" else max(1, cores)
    if s.batch < world() and "batch" not in given:
        # As the authors' recipe for Cityscapes does: 16 times the batch, 16 times the rate.
        s.lr, s.batch = s.lr if "lr" in given else s.lr * world() / s.batch, world()
    learned = s.bias != "none" or s.decoder or s.learn_query or s.tune_encoder
    for wrong, message in (
            (s.batch < world(), f"--batch {s.batch}: {world()} processes need an image each"),
            (s.crop_ratio < 0.02, f"--crop-ratio {s.crop_ratio}: expected 0.02 to 1"),
            (not 0 <= s.threshold < (1 if s.hypothesis == "crops" else 100), "--threshold "
             f"{s.threshold}: expected a share of the crops, or for global less than 100"),
            (s.tune_encoder and (s.views or world() > 1), "--tune-encoder: --views 0, one process"),
            (learned == (s.method == "maskclip"), "--method maskclip learns nothing, others do")):
        if wrong:
            raise UserError(message)
    name = [s.dataset] + [x for x in (s.method, s.preset) if x not in ("reclip++", "release")]
    s.out = s.out or Path("runs") / "-".join(name + [f"seed{s.seed}"] * bool(s.seed))
    s.cache = s.cache or s.out
    return s


@clean_exit
def main(argv=None):
    args = parse_arguments(argv)
    device = pick_device(args.device)
    s = settings_of(args)
    s.amp, s.device = use_amp(args.amp, device), str(device)
    classes = None if args.classes is None else parse_classes(args.classes)
    data = open_dataset(s.dataset, s.data_root, s.train_split, classes, s.seed, s.labels,
                        s.labels_offset)
    model = load_clip(s.clip, s.activation, device, s.heads)
    s.activation, s.surgery = model.activation, args.surgery or usual_surgery(model, s.surgery)
    if s.crop <= model.visual.conv1.stride[0]:
        raise UserError(f"--crop {s.crop}: expected more pixels than a patch of this CLIP has")
    print("  ".join(f"{key}={value}" for key, value in plain(s).items() if key != "classes"))
    print(f"{data.name}: {len(data)} training images, {len(data.classes)} classes → {s.out}/")

    make_folder(s.out)
    run = Run(s.out / "reclip.pt", s, data, model)  # first of all: is it this run's folder?
    torch.manual_seed(s.seed)
    if not run.finished:
        Wq = query_features(model, data.classes)
        run.learner = rectifier = make_rectifier(model, data.classes, Wq, s).to(device)
        if s.method == "maskclip":  # which has nothing to learn
            run.save(0, finished=True)
        else:
            hypothesis = make_hypotheses(data, model, Wq, s, s.cache, device)
            some = hypothesis(evenly(len(data), 4096))
            print(f"hypotheses: {some.sum().item() / len(some):.2f} classes per image")
            train(s, data, model, rectifier, hypothesis, run, device)
    barrier()  # the checkpoint is there
    import evaluate  # which needs this module; it sees the checkpoint only
    evaluate.main(["--checkpoint", str(run.path), *passed_on(s)])


if __name__ == "__main__":
    main()
