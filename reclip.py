"""Rectify the bias of CLIP for unsupervised semantic segmentation: ReCLIP and ReCLIP++.

    python reclip.py                                      the built-in demo, on any machine
    python reclip.py --dataset voc --data-root ~/data     a benchmark, by its published recipe

Wang and Kang, "Learn to Rectify the Bias of CLIP for Unsupervised Semantic Segmentation", CVPR
2024, and its extension ReCLIP++, 2024; sections and equations below are those of ReCLIP++.

Shapes: B images, C classes, D joint channels of CLIP, h×w patches, H×W pixels, L prompt length.
Maps are channels-first (Z: B×D×h×w; logits: B×C×h×w), text features are rows (Wq, Wr: C×D).
"""

import argparse
import contextlib
import copy
import datetime
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as TF

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import clip
from clip.model import MLP, Attention, merge_heads
from data import (CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, TEMPLATES, TrainingViews,
                  UserError, check_dataset, check_seed, clean_exit, download, draw_seed, normalise,
                  open_dataset, parse_classes, resize_to_scale, write_text)

# ------------------------------------------------------------------------------------------------
# III-A  Dense features and the Query: what CLIP says of every patch


def resized_positions(visual, h, w):
    """CLIP's positional embedding for a grid of h×w patches, without the class token.

    visual: a clip VisionTransformer. Returns p, 1×width×h×w (bicubic, align_corners=False).
    """
    grid = math.isqrt(len(visual.positional_embedding) - 1)
    p = visual.positional_embedding[1:].float().T.reshape(1, -1, grid, grid)
    return p if (h, w) == (grid, grid) else F.interpolate(p, (h, w), mode="bicubic")


def tokens_before_last_block(visual, images):
    """Everything of the image encoder but its last block, for images of any size.

    visual: a clip VisionTransformer, which is read and not changed.
    images: B×3×H×W, normalised; padded right and bottom with zeros to whole patches.
    Returns tokens, B×(1+h·w)×width with the class token first, and the grid (h, w).
    """
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


def dense_features(visual, images, surgery="program"):
    """Patch features in the space of the text features, before the L2 norm (Sec. III-A, MaskCLIP).

    In the last block every patch attends to itself alone, so its value vector passes unmixed.
    surgery "program" keeps that block's residual and MLP, as MaskCLIP's and the authors' programs
    do and all reported numbers were made; "value" is the text's two 1×1 convolutions and no more.
    images: B×3×H×W, normalised. Returns B×D×h×w; `F.normalize(…, dim=1)` of it is Z.
    """
    x, (h, w) = tokens_before_last_block(visual, images)
    features = value_features(visual, x[:, 1:], surgery) @ visual.proj
    return features.mT.unflatten(2, (h, w))


def value_features(visual, x, surgery):
    """The last block on patch tokens x, B×n×width, each on its own; B×n×width, after ln_post."""
    block = visual.transformer.resblocks[-1]
    width = x.shape[-1]
    weight, bias = block.attn.in_proj_weight[2 * width:], block.attn.in_proj_bias[2 * width:]
    v = block.attn.out_proj(F.linear(norm(block.ln_1, x), weight, bias))
    if surgery == "program":
        v = v + x
        v = v + block.mlp(norm(block.ln_2, v))
    return visual.ln_post(v)


def global_feature(visual, images):
    """CLIP's feature of the whole image, at any image size: B×3×H×W, normalised → B×D, unit length.

    At the resolution CLIP was trained on, and but for epsilon, this is its own `encode_image`.
    """
    x, _ = tokens_before_last_block(visual, images)
    block = visual.transformer.resblocks[-1]
    x = (x + block.attn(norm(block.ln_1, x)))[:, 0]
    x = x + block.mlp(norm(block.ln_2, x))
    return F.normalize((visual.ln_post(x) @ visual.proj).float(), dim=-1)


@torch.no_grad()
def query_features(model, classes, templates=TEMPLATES, batch=512):
    """Wq, C×D: unit-length mean of each class's unit-length features over all templates.

    model: a CLIP; classes: list of C names; templates: strings with one {}.
    """
    tokens = clip.tokenize([t.format(name) for name in classes for t in templates], truncate=True)
    # Attention is causal: what follows the end token changes nothing and need not be computed.
    length, order = tokens.argmax(1), tokens.argmax(1).argsort()
    features = torch.empty(len(tokens), model.text_projection.shape[1])
    progress = Progress("query", len(tokens))
    for rows in order.split(batch):
        part = tokens[rows, : int(length[rows].max()) + 1].to(model.text_projection.device)
        features[rows] = F.normalize(model.encode_text(part).float(), dim=-1).cpu()
        progress.advance(len(rows))
    progress.close()
    Wq = F.normalize(features.unflatten(0, (len(classes), -1)).mean(1), dim=-1)
    return Wq.to(model.text_projection.device)


def classify(Z, W):
    """Logits of a feature map under text features: B×D×h×w, C×D → B×C×h×w (Mq = Z·Wqᵀ)."""
    return torch.einsum("bdhw,cd->bchw", Z, W)


# ------------------------------------------------------------------------------------------------
# III-B  Bias extraction: what CLIP prefers, whatever the image


class Reference(nn.Module):
    """Class-preference bias: learned words, shared by all classes, before each class name (Eq. 1).

    The sequence is [start] v_1 … v_L name [end]. L is 73 where names have up to two tokens, and
    gives way to longer names so that none loses its end token. forward(model) → Wr, C×D, divided
    by the norm of the whole matrix.
    Raises UserError where a name leaves no room for a prompt.
    """

    def __init__(self, model, classes):
        super().__init__()
        names = [clip.tokenize(name, 512, truncate=True)[0] for name in classes]
        lengths = [int(name.argmax()) - 1 for name in names]
        context = len(model.positional_embedding)
        L = min(context - 4, context - 2 - max(lengths))
        if L < 1:
            longest = classes[lengths.index(max(lengths))]
            raise UserError(f"class name {longest[:40]!r}… has {max(lengths)} tokens and leaves no "
                            f"room for a prompt; at most {context - 3} tokens fit")
        self.register_buffer("suffix", torch.stack([n[1 : max(lengths) + 2] for n in names]).long())
        start = model.token_embedding.weight[names[0][0]].detach().float()
        self.register_buffer("start", start.clone()[None])
        # Every word starts as the embedding of token 0, as in the authors' program.
        self.prompt = nn.Parameter(model.token_embedding.weight[0].detach().float().repeat(L, 1))
        self.layout = None

    def encode(self, model):
        """The text features of [start] prompt name [end], C×D, not normalised."""
        prefix = torch.cat([self.start, self.prompt])
        if self.layout is None or self.layout[0].device != prefix.device:
            self.layout = shared_layout(len(prefix), self.suffix)
        return encode_shared_prefix(model, prefix, self.suffix, self.layout)

    def forward(self, model):
        Wr = self.encode(model)
        return Wr / Wr.norm()


def encode_shared_prefix(model, prefix, suffix, layout=None):
    """CLIP's text features of C texts that begin alike, exactly, for little more than one's price.

    Attention is causal, so the positions of a common beginning are the same for every text. One
    sequence does for all: the beginning once, then the endings one after another, each token with
    the position it has in its own text, and looking back at the beginning and at its own ending
    alone. Equal to the full encoding up to rounding, in value and gradient.

    model: a CLIP; prefix: P×width, embeddings of the common beginning, start token included;
    suffix: int64 C×S, token ids of the endings, P+S within the context length; each text is read
    out at the largest id of its ending, which is the end token; layout: `shared_layout(P, suffix)`,
    if it is known from before. Returns C×D, not normalised.
    """
    tokens, place, seen, ends = layout or shared_layout(len(prefix), suffix)
    x = torch.cat([prefix, model.token_embedding(tokens)]) + model.positional_embedding[place]
    for block in model.transformer.resblocks:
        q, k, v = block.attn.project(block.ln_1(x)[None])
        if block is model.transformer.resblocks[-1]:  # only its outputs at the end tokens matter
            q, x, seen = q[:, :, ends], x[ends], seen[ends]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + block.attn.out_proj(merge_heads(mixed)[0])
        x = x + block.mlp(block.ln_2(x))
    return model.ln_final(x) @ model.text_projection


def shared_layout(P, suffix):
    """How `encode_shared_prefix` lays out texts of P common tokens and the endings `suffix`, C×S.

    Returns, for the N tokens of all endings one after another: their ids, N; the position in its
    own text of each of the P+N tokens; bool (P+N)×(P+N), which token (row) looks at which; and
    where the C end tokens are. Counting N waits for a GPU, so a training loop does it once.
    """
    used = torch.arange(suffix.shape[1], device=suffix.device) <= suffix.argmax(1, keepdim=True)
    text, place = used.nonzero().T  # what follows an end token is left out
    tokens = suffix[text, place]
    text = torch.cat([text.new_full((P,), -1), text])
    place = torch.cat([torch.arange(P, device=suffix.device), P + place])
    seen = (text[:, None] == text) | (text == -1)
    seen &= place[:, None] >= place
    return tokens, place, seen, P - 1 + used.sum(1).cumsum(0)


class PositionProjection(nn.Conv2d):
    """Space-preference bias of ReCLIP++: Wp = a 1×1 convolution of the positional embedding.

    forward(p): 1×width×h×w → Wp, 1×D×h×w.
    """

    def __init__(self, width, D):
        super().__init__(width, D, 1)


class PositionLogits(nn.Sequential):
    """Space-preference bias of ReCLIP: three 3×3 convolutions of the positional embedding.

    forward(p): 1×width×h×w → Mp, 1×C×h×w. (The CVPR paper's text has one channel for all classes;
    the authors' program, and so ours, one for each.)
    """

    def __init__(self, width, C, hidden=(512, 256)):
        widths = [width, *hidden, C]
        layers = []
        for a, b in zip(widths, widths[1:]):
            conv = nn.Conv2d(a, b, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(b), nn.ReLU()]
        super().__init__(*layers)


# ------------------------------------------------------------------------------------------------
# III-C  Rectified masks


class Decoder(nn.Module):
    """Mo (Eq. 4): rectified logits in the context of their neighbourhood, a 5×5 convolution and BN.

    forward(Z, M): B×D×h×w, B×C×h×w → B×C×h×w.
    """

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


METHODS = {  # what each method learns: (bias, decoder)
    "reclip++": ("independent", True), "reclip": ("joint", False), "maskclip": ("none", False),
}


class Rectifier(nn.Module):
    """All that ReCLIP learns on top of a frozen CLIP, which it is given and does not contain.

    model: a CLIP with a ViT image encoder; classes: C names; Wq: C×D.
    bias: how Mb is extracted: "independent" (ReCLIP++), "joint" (ReCLIP), "reference" (ReCLIP
    without its positional part) or "none". decoder: whether M passes through one. sign: -1
    subtracts the bias (Eq. 3), +1 adds it (Table V).
    """

    def __init__(self, model, classes, Wq, bias="independent", decoder=True, sign=-1):
        super().__init__()
        (C, D), width = Wq.shape, model.visual.proj.shape[0]
        self.kind, self.sign = bias, sign
        self.register_buffer("Wq", Wq.clone())
        if bias != "none":
            self.reference = Reference(model, classes)
        if bias == "independent":
            self.position = PositionProjection(width, D)
        if bias == "joint":
            self.position = PositionLogits(width, C)
        if decoder:
            self.decoder = Decoder(D, C)

    def bias(self, Z, p, Wr):
        """Mb, the bias logit map (Eq. 2): Z B×D×h×w, p 1×width×h×w, Wr C×D → 1×C×h×w or B×C×h×w.

        ReCLIP++ encodes the two biases apart: Mb = Wp·Wrᵀ, the same for every image.
        ReCLIP lets the image in: Mb = Mr + Mp with Mr = Z·Wrᵀ.
        """
        if self.kind == "independent":
            return classify(self.position(p), Wr)
        Mr = classify(Z, Wr)
        return Mr + self.position(p) if self.kind == "joint" else Mr

    def forward(self, Z, p, Wr, Wq=None):
        """Query logits and rectified logits (Eqs. 3 and 4), both B×C×h×w.

        Z: B×D×h×w, unit length over D; p: 1×width×h×w; Wr: C×D, or None without a bias; Wq: C×D,
        the fixed one by default.
        """
        Mq = M = classify(Z, self.Wq if Wq is None else Wq)
        if self.kind != "none":
            M = Mq + self.sign * self.bias(Z, p, Wr)
        return Mq, self.decoder(Z, M) if hasattr(self, "decoder") else M

    def Wr(self, model):
        """The Reference features, C×D, or None without a bias."""
        return self.reference(model) if self.kind != "none" else None


def gumbel_masks(logits, temperature, noise=0.0):
    """One-hot masks over the classes with the gradient of a softmax (Eq. 5).

    logits: B×C×h×w; temperature: τ1; noise: standard Gumbel noise of the same shape, or 0.
    Returns B×C×h×w: exactly 0 and 1 forward, softmax(logits / τ1 + noise) backward.
    """
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


# ------------------------------------------------------------------------------------------------
# III-D  Contrastive loss


def masked_pooling(masks, features):
    """Mean of mask·feature over all n patches: B×C×h×w, B×K×h×w → B×C×K.

    Divided by n and not by the mask's area, as in the authors' program: a larger mask gives larger
    logits, and without that signal training collapses. Pooling is linear, so pooling Mq instead of
    Z gives the similarities Z_g·Wqᵀ at C/D of the cost.
    """
    return torch.einsum("bchw,bkhw->bck", masks, features) / masks[0, 0].numel()


def contrastive_loss(similarities, hypothesis, tau=0.01):
    """Eq. 7: each class of an image's hypothesis should recognise itself in its masked feature.

    similarities: B×C×C, S[k, j] of the feature under the mask of class k to the text of class j;
    hypothesis: bool B×C. Mean over the classes of an image, then over all B images; an image
    without a hypothesis adds nothing.
    """
    log_p = (similarities / tau).log_softmax(-1).diagonal(dim1=1, dim2=2)  # B×C
    count = hypothesis.sum(1).clamp(min=1)
    return -((log_p * hypothesis).sum(1) / count).mean()


# ------------------------------------------------------------------------------------------------
# III-D  Image-level multi-label hypotheses


def crop_windows(H, W, r):
    """Windows (top, left, height, width) of r times the image's sides, half a window apart.

    r = 1/6 gives 11×11. Where 2/r is no whole number they overlap a little more.
    """
    height, width = max(1, round(r * H)), max(1, round(r * W))
    steps = math.ceil(2 / r - 1e-9) - 1

    def starts(side, window):
        return [round(i * (side - window) / max(1, steps - 1)) for i in range(steps)]

    return [(top, left, height, width) for top in starts(H, height) for left in starts(W, width)]


def cut_crops(image, r, side):
    """The crops of crop_windows as CLIP sees an image: shorter side to `side`, centre, square.

    image: uint8 3×H×W. Returns uint8 (number of windows)×3×side×side.
    """
    H, W = image.shape[1:]
    windows = crop_windows(H, W, r)
    height, width = windows[0][2:]
    crops = torch.stack([image[:, t : t + height, l : l + width] for t, l, *_ in windows])
    return clip_view(crops, side)


def clip_view(images, side):
    """CLIP's preprocessing short of normalisation: uint8 B×3×H×W → uint8 B×3×side×side."""
    images = TF.resize(images, side, TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(images, [side, side])


def crop_hypothesis(counts, t):
    """Eq. 6: the classes detected in more than the share t of the crops. counts: B×C → bool B×C."""
    return counts / counts.sum(1, keepdim=True) > t


def global_hypothesis(scores, threshold, top):
    """ReCLIP: classes whose 100·cosine to the whole image reaches a threshold, else the best `top`.

    scores: B×C → bool B×C.
    """
    chosen = scores >= threshold
    best = scores >= scores.topk(min(top, scores.shape[1]), 1).values[:, -1:]
    return torch.where(chosen.any(1, keepdim=True), chosen, best)


class Images(torch.utils.data.Dataset):
    """The images of a SegmentationData, for decoding in worker processes."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, i):
        return self.data.image(i)


@torch.no_grad()
def make_hypotheses(data, model, Wq, s, path, device):
    """The hypotheses of all images of `data`, bool len(data)×C, made once and kept in a file.

    The file holds, by image id, what the hypotheses are decided from (how many crops each class
    won, or 100·cosine to each class), so the thresholds can be changed without encoding again.
    Its first line tells the settings that made it. Each process makes every world-th group of
    images, in a file of its own (.part), from which an interrupted run goes on. s: settings
    hypothesis, crop_ratio or scale, threshold, top, amp, workers, seed. Raises UserError for a file
    made with other settings.
    """
    crops, part = s.hypothesis == "crops", Path(f"{path}.part{rank()}")
    header = dict(hypothesis=s.hypothesis, data=data.name, classes=data.classes,
                  seed=s.seed if data.name == "shapes" else 0, clip=fingerprint(model),
                  activation=s.activation, view=s.crop_ratio if crops else list(s.scale))
    if data.name == "folder":  # an id of a benchmark is the same image everywhere
        header["images"] = data.fingerprint
    line = lambda row: json.dumps(row) + "\n"  # escaped: a file's name may be no UTF-8
    with folder_lock(path.parent / ".cache.lock", wait=True):
        barrier()
        known = {}
        for file in (path, *sorted(path.parent.glob(f"{path.name}.part*[0-9]"))):
            if file.exists():
                known |= read_scores(file, header)
        barrier()  # before any process adds to what the others read
        # Groups are the same for any number of processes, and so is the rounding in a batch.
        size = max(1, 256 // len(crop_windows(64, 64, s.crop_ratio))) if crops else 1
        groups = torch.arange(len(data)).split(size)
        missing = [group.tolist() for group in groups
                   if any(data.ids[i] not in known for i in group)]
        if missing or not path.exists():
            own = missing[rank()::world()]
            loader = torch.utils.data.DataLoader(Images(data), batch_sampler=own, collate_fn=list,
                                                 num_workers=s.workers)
            progress = Progress("hypotheses", len(data), len(data) - sum(map(len, missing)))
            lines = [line(header)] + [line(dict(id=name, scores=known[name])) for name in known]
            write_text(part, "".join(lines))
            with open(part, "a", encoding="utf-8") as file:
                for group, images in zip(own, loader):
                    images = [image.to(device) for image in images]
                    scores = (crop_votes(model, images, Wq, s.crop_ratio, s.amp) if crops else
                              global_scores(model, images[0], Wq, s.scale, s.amp)[None])
                    for i, row in zip(group, scores.tolist()):
                        known[data.ids[i]] = row
                        file.write(line(dict(id=data.ids[i], scores=row)))
                    file.flush()
                    progress.advance(len(group) * world())
            progress.close()
            barrier()
            parts = sorted(path.parent.glob(f"{path.name}.part*[0-9]"))
            for file in parts:
                known |= read_scores(file, header)
            if rank() == 0:
                rows = [dict(id=name, scores=known[name]) for name in data.ids]
                write_text(path, "".join(map(line, [header, *rows])))
            barrier()
            for file in parts if rank() == 0 else ():
                file.unlink()
    scores = torch.tensor([known[name] for name in data.ids], dtype=torch.float64)
    if crops:
        return crop_hypothesis(scores, s.threshold)
    return global_hypothesis(scores, s.threshold, s.top)


def hypotheses_file(checkpoint, s):
    """Where the hypotheses of a checkpoint's run are: beside it, or only in its cache."""
    beside, cached = checkpoint.with_name("hypotheses.jsonl"), Path(s.cache, "hypotheses.jsonl")
    return cached if cached.exists() and not beside.exists() else beside


def read_scores(file, header):
    """{id: scores} of a file of make_hypotheses. Raises UserError unless its header is this one."""
    try:
        lines = file.read_text("utf-8").split("\n")[:-1]  # without a line that was cut short
        first, *rows = map(json.loads, lines)
        if first == header:
            known = {row["id"]: row["scores"] for row in rows}
            torch.tensor([[0.0] * len(header["classes"]), *known.values()])  # C numbers in each row
            return known
    except (ValueError, TypeError, KeyError):  # empty or damaged
        first = None
    raise UserError(f"{file} {unlike(first, header)}; delete it or choose another folder with "
                    "--out")


def crop_votes(model, images, Wq, r, amp=False, batch=512):
    """How many crops of each image every class wins (Sec. III-D).

    model: a CLIP; images: list of uint8 3×H×W, of any sizes; Wq: C×D; r: side of a crop relative to
    the image's; amp: encode in bf16; batch: crops encoded at once. Returns int64 len(images)×C.
    """
    crops = torch.cat([cut_crops(image, r, model.visual.input_resolution) for image in images])
    with torch.autocast(crops.device.type, torch.bfloat16, enabled=amp):
        features = torch.cat([model.encode_image(normalise(part, CLIP_MEAN, CLIP_STD))
                              for part in crops.split(batch)])
    # Compared in float32: in bf16 close classes would be equal. argmax needs no unit length: it is
    # the same for every class.
    winner = (features.float() @ Wq.T).argmax(1).unflatten(0, (len(images), -1))
    return F.one_hot(winner, len(Wq)).sum(1)


def global_scores(model, image, Wq, scale, amp=False):
    """100·cosine of an image to each class (ReCLIP): uint8 3×H×W → C.

    scale: as in `recipe`; amp: encode in bf16.
    """
    view = normalise(resize_to_scale(image, scale)[None], CLIP_MEAN, CLIP_STD)
    with torch.autocast(view.device.type, torch.bfloat16, enabled=amp):
        feature = global_feature(model.visual, view)
    return 100 * (feature @ Wq.T)[0]


# ------------------------------------------------------------------------------------------------
# IV-A  The published settings

ALWAYS = dict(
    clip="ViT-B/16", surgery="program", ratio=(0.5, 2.0), distort=True,  # views
    tau=0.01, momentum=0.9, weight_decay=5e-4, power=0.9,  # loss and SGD
    crop_ratio=1 / 6,  # r
    views=0,  # fresh augmentation in every epoch
    wr_norm="matrix", pooling="area", learn_query=False, tune_encoder=False,  # see Ablations
)
RELEASE = {  # the authors' settings of July 2025
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


def recipe(dataset, preset="release", method="reclip++", hypothesis=None):
    """The published settings of a data set as a dict; `folder` uses VOC's. Raises UserError."""
    check_dataset(dataset)
    row = "voc" if dataset == "folder" else dataset
    columns = ("scale", "crop", "schedule", "epochs", "batch", "lr", "pd")
    values = DEMO if row == "shapes" else {"release": RELEASE, "paper": PAPER}[preset][row]
    s = ALWAYS | dict(zip(columns, values)) | (DEMO_ONLY if row == "shapes" else {})
    s["bias"], s["decoder"], s["sign"] = *METHODS[method], -1
    s["hypothesis"] = hypothesis or {"reclip++": "crops", "reclip": "global"}.get(method, "none")
    s["threshold"], s["top"] = GLOBAL[row] if s["hypothesis"] == "global" else (
        {"voc": 0.07, "cityscapes": 0.07, "shapes": 0.12}.get(row, 0.0), 0)
    # τ1. The demo's is softer: with 0.01 its masks are so sharp that a class now and then dies.
    s["mask_temperature"] = {"reclip": 0.001}.get(method, 0.01) * (100 if row == "shapes" else 1)
    s["pd_temperature"] = {"reclip": 0.01}.get(method, 0.1)
    if method != "reclip++" and row != "shapes":
        s["pd"] = {"maskclip": None, "reclip": 0.6 if row == "context" else 0.5}[method]
    return s


# ------------------------------------------------------------------------------------------------
# Training


def train(s, data, model, rectifier, hypothesis, run, device):
    """Learn the bias of CLIP on `data` (Sec. IV-A).

    s: settings, as `recipe` and the command line give them; data: SegmentationData, of which only
    images are opened; hypothesis: bool len(data)×C; run: the Run that keeps what is learned, and
    from whose checkpoint training goes on.
    """
    optimizer = torch.optim.SGD(rectifier.parameters(), lr=s.lr, momentum=s.momentum,
                                weight_decay=s.weight_decay, fused=True)
    first = run.resume(optimizer)
    visual = (rectifier.visual if s.tune_encoder else  # Table VI
              image_encoder(model, s.preset, s.amp))
    views = TrainingViews(data, s.scale, s.crop, s.ratio, s.distort, s.seed)
    grid = -(-s.crop // visual.conv1.stride[0])
    p = resized_positions(visual, grid, grid)

    def encode(batch):
        """Dense features, B×D×h×w, float32, of a batch of training views."""
        images = normalise(batch["view"].to(device, non_blocking=True),
                           *preset_statistics(s.preset),
                           batch["size"].to(device, non_blocking=True))
        with torch.set_grad_enabled(s.tune_encoder):
            with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
                return dense_features(visual, images, s.surgery).float()

    batches = Batches(len(data), s.batch, s.epochs, s.seed, first)
    if s.views and len(batches):  # CLIP is frozen: what it says of a view need be asked only once
        facts = {key: getattr(s, key) for key in ("preset", "surgery", "activation")}
        views = make_views(views, s, "views", facts | dict(clip=fingerprint(model)),
                           lambda batch: dict(features=encode(batch).half()), device)
    loader = batches.loader(views, s.workers, device)
    hypothesis = hypothesis.to(device)
    rectifier.train()
    # "value" leaves the MLP of the encoder's last block out.
    network = parallel(rectifier, device, s.tune_encoder and s.surgery == "value")
    log = Log(run.path.with_name("log.jsonl"), "rectify", batches.total, first)
    with run:
        for step, batch in enumerate(log.timed(loader), first):
            epoch = step // batches.per_epoch
            for group in optimizer.param_groups:
                group["lr"] = s.lr * (1 - epoch / s.schedule) ** s.power
            if s.views:
                features = batch["features"].to(device, non_blocking=True).float()
            else:
                features = encode(batch)
            if s.tune_encoder:
                p = resized_positions(visual, grid, grid)
            Z = F.normalize(features, dim=1)
            Mq, logits = network(Z, p, rectifier.Wr(model))
            names = [data.ids[i] for i in batch["index"].tolist()]
            seeds = [draw_seed(s.seed, epoch, name, "gumbel") for name in names]
            noise = gumbel_noise(logits.shape[1:], seeds, device)
            masks = gumbel_masks(logits, s.mask_temperature, noise)
            similarities = (masked_pooling(masks, Mq) if s.pooling == "area" else
                            cosine_pooling(masks, Z, rectifier.Wq))
            present = hypothesis[batch["index"].to(device, non_blocking=True)]
            loss = contrastive_loss(similarities, present, s.tau) * batches.weight(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log.step(step + 1, len(seeds), lr=optimizer.param_groups[0]["lr"],
                     loss=mean_over_processes(loss.detach()))
            run.after(step + 1, optimizer, batches, log)
    log.close()


class Batches:
    """The batches of all epochs as lists of (epoch, index), from a given step on.

    The order of an epoch depends on (seed, epoch) alone, so any step can be the first. Of several
    processes each gets its share of every batch; where there is none left for it, a copy of the
    batch's first image, with the weight 0.
    """

    def __init__(self, n, batch, epochs, seed, first=0):
        self.n, self.batch, self.seed, self.first = n, batch, seed, first
        self.per_epoch = -(-n // batch)
        self.total = epochs * self.per_epoch
        self.epoch, self.order = None, None  # the last that was asked for

    def __len__(self):
        return max(0, self.total - self.first)

    def __iter__(self):
        for step in range(self.first, self.total):
            images = self.images(step)
            yield [(self.epoch, i) for i in images[rank()::world()] or images[:1]]

    def images(self, step):
        """The indices of a whole batch."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(draw_seed(self.seed, epoch, "order"))
            self.epoch, self.order = epoch, torch.randperm(self.n, generator=generator).tolist()
        return self.order[place * self.batch : (place + 1) * self.batch]

    def weight(self, step):
        """This process's share of a batch, relative to the mean share: 1 for a single process."""
        size = min(self.batch, self.n - step % self.per_epoch * self.batch)
        return len(range(rank(), size, world())) * world() / size

    def loader(self, views, workers, device):
        """A DataLoader of these batches; views: TrainingViews or FixedViews."""
        whole = isinstance(views, FixedViews)  # which gives batches, not items
        options = dict(sampler=self, batch_size=None) if whole else dict(batch_sampler=self)
        return torch.utils.data.DataLoader(views, num_workers=workers, **options,
                                           pin_memory=device.type == "cuda")


# ---- What CLIP says of the views, computed once (--views) ----------------------------------------


BLOCK = 16  # views that are encoded at once, and done or to be done again


class FixedViews(torch.utils.data.Dataset):
    """What a frozen network says of K views of each image, from a file; epoch e has view e mod K.

    They are the views that fresh augmentation gives in the first K epochs. records: K×n, an array
    with a named field for each thing that is kept of a view; it may lie on disk.
    """

    def __init__(self, records):
        self.records = records

    def __getstate__(self):  # a worker that is not forked maps the file itself
        return self.records.filename, self.records.shape

    def __setstate__(self, state):
        self.records = open_array(*state)

    def __getitem__(self, batch):
        """A list of (epoch, index) of one epoch → index, int64 B, and B×… of each field by name."""
        index = [i for _, i in batch]
        rows = self.records[batch[0][0] % len(self.records)][index]
        fields = {name: torch.from_numpy(np.ascontiguousarray(rows[name]))
                  for name in rows.dtype.names}
        return dict(index=torch.tensor(index), **fields)


@torch.no_grad()
def make_views(views, s, name, facts, encode, device):
    """FixedViews of s.views views per image, made once and kept in a memory-mapped file.

    views: TrainingViews; s: settings cache, views, amp, workers; name: of the file; facts: plain
    values, on which what `encode` gives depends; encode: a batch of `views` → {name: tensor B×…} of
    what is to be kept, in the types to be kept. While it grows the file is called NAME.npy.part,
    and NAME.done tells which of its blocks are there, so that an interrupted run goes on; several
    processes share the work. Raises UserError for a file made with other settings, a damaged one,
    and too small a disk.
    """
    data, K, n = views.data, s.views, len(views)
    path, part, done_path = (s.cache / f"{name}{end}" for end in (".npy", ".npy.part", ".done"))
    blocks = [(k, rows) for k in range(K) for rows in torch.arange(n).split(BLOCK)]
    header = dict(data=data.name, images=data.fingerprint, views=K, seed=views.seed,
                  scale=list(views.scale), crop=views.crop, ratio=list(views.ratio),
                  distort=views.distort, **facts)
    with folder_lock(s.cache / ".cache.lock", wait=True):
        barrier()
        check_header(s.cache / f"{name}.json", header, path.exists() or done_path.exists())
        if not path.exists():
            sample = encode(torch.utils.data.default_collate([views[0, 0]]))
            kind = np.dtype([(key, value[0].cpu().numpy().dtype, tuple(value.shape[1:]))
                             for key, value in sample.items()])
            gigabytes = K * n * kind.itemsize / 1e9
            print(f"views: {K} of each image, {gigabytes:.2f} GB → {path}", flush=True)
            if rank() == 0 and not (part.exists() and done_path.exists()):
                done_path.unlink(missing_ok=True)
                allocate(part, (K, n), kind)
                done_path.write_bytes(bytes(len(blocks)))
            barrier()
            records = open_array(part, (K, n), "r+", kind)
            done = np.memmap(done_path, np.uint8, "r+", shape=len(blocks))
            left = [i for i in range(len(blocks)) if not done[i]]
            barrier()  # before any process adds to what the others read
            own = left[rank()::world()]
            sampler = [[(blocks[i][0], int(row)) for row in blocks[i][1]] for i in own]
            loader = torch.utils.data.DataLoader(views, batch_sampler=sampler,
                                                 num_workers=s.workers,
                                                 pin_memory=device.type == "cuda")
            progress = Progress("views", K * n, K * n - sum(len(blocks[i][1]) for i in left))
            for i, batch in zip(own, loader):
                k, rows = blocks[i]
                for key, value in encode(batch).items():
                    records[key][k, rows[0] : rows[-1] + 1] = value.cpu().numpy()
                done[i] = 1
                progress.advance(len(rows) * world())
            progress.close()
            records.flush()
            del records, done  # Windows renames no file that is mapped
            barrier()
            if rank() == 0:
                os.replace(part, path)
                done_path.unlink()
            barrier()
    return FixedViews(open_array(path, (K, n)))


def check_header(path, header, kept):
    """Write what a file is made from beside it, or raise UserError where it was something else.

    kept: whether there is anything of that file; what was only planned is forgotten.
    """
    try:
        old = json.loads(path.read_text("utf-8")) if kept else None
    except (ValueError, FileNotFoundError):
        old = "damaged"
    if old is None and rank() == 0:
        write_text(path, json.dumps(header, indent=1) + "\n")
    if old not in (None, header):
        raise UserError(f"{path} {unlike(old, header)}; delete {path.stem}.* there, or choose "
                        "another folder with --cache or --out")


def allocate(path, shape, kind):
    """Make an .npy file of zeros whose bytes are there: a write to it cannot fail later."""
    path.unlink(missing_ok=True)
    size, free = kind.itemsize * math.prod(shape), shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(f"{path} needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; "
                        "choose another folder with --cache, fewer --views, or --views 0")
    np.lib.format.open_memmap(path, "w+", kind, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))


def open_array(path, shape, mode="r", kind=None):
    """The .npy file of `allocate`, memory-mapped. Raises UserError for another one."""
    try:
        array = np.lib.format.open_memmap(path, mode)
    except (OSError, ValueError):
        array = None
    if array is None or array.shape != shape or kind not in (None, array.dtype):
        raise UserError(f"{path} is damaged; delete it, and it will be made again")
    return array


# ---- Ablations: what the papers compare with; nothing of the method needs it ---------------------


class LearnedQuery(Reference):
    """Query features from learned words, "a photo of a" at first (Table IV; ReCLIP's Table 3).

    forward(model) → Wq, C×D, of unit length.
    """

    def __init__(self, model, classes):
        super().__init__(model, classes)
        words = clip.tokenize("a photo of a")[0, 1:5].long()
        with torch.no_grad():
            self.prompt = nn.Parameter(model.token_embedding.weight[words].detach().float())

    def forward(self, model):
        return F.normalize(self.encode(model), dim=1)


class Ablated(Rectifier):
    """A Rectifier with a part changed.

    wr_norm "class": each row of Wr is divided by its own norm, instead of Wr by that of the matrix;
    learn_query: as in `LearnedQuery`; visual: None, or an image encoder to fine-tune (Table VI).
    """

    def __init__(self, model, classes, Wq, bias, decoder, sign, wr_norm="matrix",
                 learn_query=False, visual=None):
        super().__init__(model, classes, Wq, bias, decoder, sign)
        self.wr_norm = wr_norm
        self.query = LearnedQuery(model, classes) if learn_query else None
        self.visual = visual and copy.deepcopy(visual).requires_grad_(True)

    def Wr(self, model):
        """The Reference features; a learned Query takes the place of Wq first."""
        if self.query is not None:
            self.live = self.query(model)
            self.Wq = self.live.detach()
        Wr = super().Wr(model)
        return F.normalize(Wr, dim=1) if self.wr_norm == "class" and Wr is not None else Wr

    def forward(self, Z, p, Wr):
        """As a Rectifier's; while training the Query has a gradient."""
        learned = self.training and self.query is not None
        return super().forward(Z, p, Wr, self.live if learned else None)


def make_rectifier(model, classes, Wq, s):
    """The Rectifier that settings ask for."""
    parts = model, classes, Wq, s.bias, s.decoder, s.sign
    if (s.wr_norm, s.learn_query, s.tune_encoder) == ("matrix", False, False):
        return Rectifier(*parts)
    visual = image_encoder(model, s.preset) if s.tune_encoder else None
    return Ablated(*parts, s.wr_norm, s.learn_query, visual)


def cosine_pooling(masks, Z, Wq):
    """Similarities as the papers' text has them, with unit-length pooled features; B×C×C.

    masks: B×C×h×w; Z: B×D×h×w; Wq: C×D. See `masked_pooling` for what they lose.
    """
    return F.normalize(masked_pooling(masks, Z), dim=2) @ Wq.T


# ------------------------------------------------------------------------------------------------
# What a run keeps, and how it says where it is


class Run:
    """The checkpoint of a training run: what was learned, the settings, and where it stands.

    Kept beside the learned parameters: `optimizer` and `step` to go on from, Wr to predict without
    the text encoder, and what tells whether another CLIP or other classes are used with it.
    Raises UserError where the folder holds the checkpoint of other settings.
    """

    def __init__(self, path, s, data, model, learner=None):
        self.path, self.ids, self.model, self.learner = path, data.ids, model, learner
        self.facts = dict(kind=path.stem, settings=plain(s), classes=list(data.classes),
                          images=data.fingerprint, clip=fingerprint(model))
        self.saved, self.kept, self.stopping = time.monotonic(), 0, False
        self.previous = load_checkpoint(path) if path.exists() else None  # until it is resumed
        if self.previous:
            with as_checkpoint(path):
                check_same_run(self.previous, self.facts, path)

    def __enter__(self):
        """Within, Ctrl-C ends training after the step that is under way; pressed twice, at once."""
        def stop(number, frame):
            self.stopping = True
            signal.signal(signal.SIGINT, self.old_handler)

        self.old_handler = signal.signal(signal.SIGINT, stop)
        return self

    def __exit__(self, *exception):
        signal.signal(signal.SIGINT, self.old_handler)

    def after(self, step, optimizer, batches, log):
        """To be called when `step` steps are done: saves at the end, on Ctrl-C and when it is due.

        Raises UserError, before anything is written, where the loss has become nan or infinite.
        """
        finished = step == batches.total
        # Of several processes none may stop while the others wait for it in the next step.
        stopping = self.stopping if world() == 1 else (
            step % 10 == 0 and any(gather(self.stopping)))
        due = finished or stopping or self.due(step % batches.per_epoch == 0)
        if due or log.line_due(step):
            self.check(log.first_bad(), batches)
        if due:
            self.save(step, optimizer, finished)
        if stopping and not finished:
            barrier()  # it is saved: where one process ends, torchrun ends the others
            if rank() == 0:
                print(f"\nstopped after step {step} and saved {self.path}; the same command goes "
                      "on", file=sys.stderr)
            raise SystemExit(130)

    def due(self, epoch_ends):
        """Whether to save: two minutes after the last time, at the end of an epoch after ten
        seconds. Where a run is saved changes nothing in its result.
        """
        return time.monotonic() - self.saved > (10 if epoch_ends else 120)

    def check(self, bad, batches):
        """Raises UserError if there was a bad step, one whose loss is not finite."""
        if bad:
            names = [self.ids[i] for i in batches.images(bad - 1)]
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            left = (f"{self.path} still has step {self.kept}" if self.kept else
                    "there is no checkpoint yet")
            raise UserError(f"the loss is not finite at step {bad} (images {', '.join(names[:8])}"
                            f"{more}); {left}; a smaller --lr may help")

    def save(self, step, optimizer=None, finished=False):
        """Write the checkpoint; of several processes only the first does."""
        with torch.no_grad():
            Wr = self.learner.Wr(self.model) if hasattr(self.learner, "Wr") else None
        if rank() == 0:
            save_checkpoint(self.path, self.facts | dict(
                state=self.learner.state_dict(), Wr=Wr, step=step, finished=finished,
                optimizer=optimizer and optimizer.state_dict()))
        self.saved, self.kept = time.monotonic(), step

    def resume(self, optimizer):
        """Load the checkpoint, if there is one, and return the step to go on from."""
        checkpoint, self.previous = self.previous, None
        if checkpoint is None:
            return 0
        with as_checkpoint(self.path):
            self.learner.load_state_dict(checkpoint["state"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            self.kept = checkpoint["step"]
        if not checkpoint["finished"]:
            print(f"going on from step {self.kept}")
        return self.kept


def save_checkpoint(path, checkpoint):
    """torch.save to a temporary file, then rename. Everything in it passes weights_only=True."""
    temporary = Path(f"{path}.tmp")
    try:
        torch.save(checkpoint, temporary)
    except (OSError, RuntimeError) as error:  # the latter is what torch makes of a full disk
        temporary.unlink(missing_ok=True)
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"cannot write {path} ({reason}); what was there before is as it was, and "
                        "the same command goes on from it") from None
    os.replace(temporary, path)


def load_checkpoint(path):
    """A checkpoint of reclip.py or distill.py as a dict. Raises UserError if it is none."""
    with as_checkpoint(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("settings", "classes", "clip", "state", "Wr", "step", "finished", "kind"):
            checkpoint[key]
    return checkpoint


@contextlib.contextmanager
def as_checkpoint(path):
    """What goes wrong inside is a UserError: there are many ways to be damaged or foreign."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is not a checkpoint of reclip.py or distill.py, or is damaged "
                        f"({type(error).__name__}: {reason})") from None


def check_same_run(checkpoint, facts, path):
    """Raises UserError where a run's folder holds the results of other settings."""
    def same(what, message):
        if checkpoint[what] != facts[what]:
            raise UserError(f"{path} was made with {message}; choose another folder with --out")

    same("classes", "other classes")
    same("clip", "another CLIP")
    old, new = ({key: value for key, value in settings.items() if key not in MACHINE}
                for settings in (checkpoint["settings"], facts["settings"]))
    if changes(old, new):
        raise UserError(f"{path} {unlike(old, new)}; repeat them, delete the folder, or choose "
                        "another one with --out")
    same("images", "other images")


def changes(old, new):
    """What differs between two dicts of plain values, in words; "" for nothing."""
    return ", ".join(f"{key} {old.get(key)!s:.40} → {new.get(key)!s:.40}"
                     for key in sorted(old | new) if old.get(key) != new.get(key))


def unlike(old, new):
    """What is the matter with a file that was made from the facts `old` and not from `new`."""
    return (f"was made with other settings ({changes(old, new)})" if isinstance(old, dict) else
            "is damaged")


# What may change when resuming: the machine, and where things are. Weights are told apart by
# their fingerprints.
MACHINE = {"device", "workers", "amp", "data_root", "out", "cache", "download", "clip", "teacher"}


def plain(s):
    """Settings as plain values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(s).items()}


def make_folder(path):
    """Make a run's folder. Raises UserError where it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None


@contextlib.contextmanager
def folder_lock(path, wait=False):
    """Hold a lock file, so that two processes do not write the same things at a time.

    It is free again when this process ends, however it ends. Where another has it: wait, or raise
    UserError. Nothing is held where nothing can be written, and where the system (Windows) or the
    file system knows no such locks.
    """
    if rank() or fcntl is None or not os.access(path.parent, os.W_OK):
        yield
        return
    with open(path, "w") as file:
        try:
            # Not flock: a process that reads images would inherit that, and outlive this one.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if not wait:
                raise UserError(f"another process is at work in {path.parent}; wait for it, or "
                                "choose another folder with --out") from None
            print(f"waiting for another process that is at work in {path.parent}", flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def fingerprint(model):
    """A short name for a CLIP's weights, from its projections: other weights, another name."""
    digest = hashlib.sha256()
    for tensor in (model.visual.proj, model.text_projection, model.positional_embedding):
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Progress:
    """One line that tells how far something is and how long it will take.

    Rewritten in place on a terminal, every few seconds a new line elsewhere.
    """

    def __init__(self, title, total, done=0):
        self.title, self.total, self.done, self.first = title, total, done, done
        self.start = self.shown = time.monotonic()
        self.live = sys.stdout.isatty()

    def advance(self, n=1, text=None):
        """n more are done; text(): what else to show, asked for only when the line is shown."""
        self.done = min(self.total, self.done + n)  # n is a guess with several processes
        now = time.monotonic()
        if now - self.shown > (0.3 if self.live else 5):
            self.shown = now
            left = (now - self.start) / (self.done - self.first) * (self.total - self.done)
            said = text() if text else ""
            print(f"{self.title} {self.done}/{self.total}{said}  {clock(left)} left",
                  end="\x1b[K\r" if self.live else "\n", flush=True)

    def close(self):
        rest = f"{self.title} {self.done}/{self.total}  {clock(time.monotonic() - self.start)}"
        if self.done > self.first:
            print(rest, end="\x1b[K\n" if self.live else "\n", flush=True)


def clock(seconds):
    """Seconds as 4 s, 1:05 or 2:03:04."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours = seconds // 60 % 60, seconds // 3600
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


class Log:
    """log.jsonl, one line every 50 steps, and the progress line of a training loop."""

    def __init__(self, path, title, total, first=0, every=50):
        self.path, self.every = path, every
        self.progress = Progress(title, total, first)
        self.sums, self.steps, self.images, self.waited = {}, 0, 0, 0.0
        self.start, self.shown, self.bad = time.monotonic(), "", None
        # A run that was interrupted after its last checkpoint repeats those steps, and their lines.
        # A line without its end was being written when the run was stopped.
        if rank() == 0:
            try:
                old = path.read_text().splitlines(keepends=True) if path.exists() else []
                whole = [line for line in old if line.endswith("\n")]
                kept = [line for line in whole if json.loads(line)["step"] <= first]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path} is damaged; delete it and repeat the command") from None
            write_text(path, "".join(kept))

    def timed(self, loader):
        """Iterate, counting the seconds spent waiting for data."""
        iterator = iter(loader)
        while True:
            start = time.monotonic()
            batch = next(iterator, None)
            self.waited += time.monotonic() - start
            if batch is None:
                return
            yield batch

    def step(self, step, images, lr, **losses):
        """Add up what a step gave; tensors are not waited for until a line is due."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        bad = torch.where(losses["loss"].isfinite(), torch.inf, step)
        self.bad = bad if self.bad is None else torch.minimum(self.bad, bad)
        self.steps, self.images = self.steps + 1, self.images + images * world()
        if self.line_due(step):
            means = gather({name: float(v) / self.steps for name, v in self.sums.items()})
            seconds = time.monotonic() - self.start
            row = dict(step=step, lr=lr, images_per_s=round(self.images / seconds, 2),
                       waited_s=round(self.waited, 2))
            row |= {name: round(sum(m[name] for m in means) / world(), 6) for name in self.sums}
            if rank() == 0:
                with open(self.path, "a") as file:
                    file.write(json.dumps(row) + "\n")
            self.shown = "".join(f"  {name} {row[name]:.3f}" for name in self.sums)
            self.shown += (f"  lr {lr:.4f}  {row['images_per_s']:.0f} images/s"
                           f"  waited {self.waited:.0f} s")
            self.sums, self.steps, self.images = {}, 0, 0
            self.start, self.waited = time.monotonic(), 0.0
        self.progress.advance(1, lambda: self.shown)

    def line_due(self, step):
        """Whether a line is written after a step."""
        return step % self.every == 0 or step == self.progress.total

    def first_bad(self):
        """The first step whose loss was not finite, or None; this waits for the device."""
        bad = math.inf if self.bad is None else float(self.bad)
        return None if bad == math.inf else int(bad)

    def close(self):
        self.progress.close()


# ------------------------------------------------------------------------------------------------
# Several processes: torchrun --nproc_per_node N reclip.py …, on one machine or on several that
# share the run's folder

PATIENCE = datetime.timedelta(days=1)  # of a process for the others, while one downloads or waits


def under_torchrun():
    """Whether torchrun has started this process, or something else that tells it as much."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def join_processes(device):
    """Under torchrun join the other processes; returns this one's own device. Only one prints."""
    if not under_torchrun():
        return device
    cuda = device.type == "cuda"
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=PATIENCE)
        if rank():
            sys.stdout = open(os.devnull, "w")
    return device


def leave_processes():
    """The last thing that a script does."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """This process's number, 0 for the one that writes and for a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait until all processes are here."""
    if world() > 1:
        dist.barrier()


@contextlib.contextmanager
def one_first():
    """Of the processes of a machine one is inside before the others: it downloads for all."""
    later = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if later:
        barrier()
    yield
    if not later:
        barrier()


def gather(value):
    """What each process has, as a list, in each of them; plain values and CPU tensors."""
    everyone = [value] * world()
    if world() > 1:
        dist.all_gather_object(everyone, value, cpu_group())
    return everyone


@functools.cache
def cpu_group():
    """All processes, talking by way of the CPU: no GPU has to finish what it is at."""
    return dist.new_group(timeout=PATIENCE, backend="gloo")


def mean_over_processes(value):
    """The mean of a 0-dim float tensor over all processes, in each of them."""
    if world() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value = value / world()
    return value


def parallel(module, device, unused=False):
    """The module itself, or, for several processes, in DistributedDataParallel.

    Gradients are then means over the processes. BatchNorm takes its statistics over all of them on
    CUDA; on the CPU, where PyTorch cannot, over each process's own share of the batch. unused:
    whether some parameters never get a gradient.
    """
    if world() == 1:
        return module
    if device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return DistributedDataParallel(module, [device] if device.type == "cuda" else None,
                                   find_unused_parameters=unused)


# ------------------------------------------------------------------------------------------------
# Inference with a checkpoint


class RectifiedCLIP:
    """A Rectifier with its CLIP: images in, Query and rectified logits out.

    rectifier: on the CPU or where the CLIP is; Wr: C×D, or None without a bias; settings: a
    namespace with preset, surgery, method and the values of evaluation (`recipe`).
    """

    def __init__(self, model, rectifier, Wr, classes, settings):
        device = model.visual.proj.device
        self.model, self.classes, self.settings = model, list(classes), settings
        fine_tuned = getattr(rectifier, "visual", None)  # Table VI
        self.visual = fine_tuned or image_encoder(model, settings.preset)
        self.patch = model.visual.conv1.stride[0]
        self.mean, self.std = preset_statistics(settings.preset)
        self.rectifier = rectifier.to(device).eval().requires_grad_(False)
        self.Wr = Wr if Wr is None else Wr.to(device)

    @torch.no_grad()
    def features(self, images, amp=False):
        """Z, B×D×h×w, float32, of unit length, and p, 1×width×h×w, of uint8 images B×3×H×W."""
        images = normalise(images, self.mean, self.std)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            features = dense_features(self.visual, images, self.settings.surgery)
        Z = F.normalize(features.float(), dim=1)
        return Z, resized_positions(self.visual, *Z.shape[2:])

    @torch.no_grad()
    def logits(self, images, amp=False):
        """Mq and M (ReCLIP) or Mo (ReCLIP++) of uint8 images B×3×H×W; both B×C×h×w, float32."""
        return self.rectifier(*self.features(images, amp), self.Wr)


def open_rectified(path, device="cpu", source=None):
    """RectifiedCLIP of a checkpoint of reclip.py. source: where its CLIP is, if not where it was.

    Raises UserError for a file that is no such checkpoint, and for another CLIP.
    """
    checkpoint = load_checkpoint(path)
    with as_checkpoint(path):
        s = argparse.Namespace(**checkpoint["settings"])
        s.dataset, s.method, s.preset, s.surgery, s.scale, s.pd, s.seed  # not missing later on
        try:
            model = load_clip(source or s.clip, s.activation, device)
        except UserError as error:
            raise UserError(f"the CLIP of {path}: {error}; say with --clip where it is now"
                            ) from None
        if fingerprint(model) != checkpoint["clip"]:
            raise UserError(f"{path} was made with another CLIP than {source or s.clip}")
        state, Wr, classes = checkpoint["state"], checkpoint["Wr"], checkpoint["classes"]
        rectifier = make_rectifier(model, classes, state["Wq"], s)
        rectifier.load_state_dict(state)
        if Wr is not None and Wr.shape != state["Wq"].shape:
            raise ValueError(f"Wr is {tuple(Wr.shape)}, not {tuple(state['Wq'].shape)}")
        return RectifiedCLIP(model, rectifier, Wr, classes, s)


def plain_maskclip(model, classes, settings):
    """RectifiedCLIP that rectifies nothing: MaskCLIP with C class names, without a checkpoint."""
    Wq = query_features(model, classes)
    rectifier = Rectifier(model, classes, Wq, *METHODS["maskclip"])
    return RectifiedCLIP(model, rectifier, None, classes, settings)


# The authors' own checkpoints: what of theirs is learned, and what it is called here. The rest of
# such a file is a copy of CLIP and what follows from it.
AUTHORS_NAMES = {"text_encoder.prompt_token": "reference.prompt", "pe_proj": "position",
                 "proj_net": "position", "decoder_conv2": "decoder.conv",
                 "decoder_norm2": "decoder.norm"}


def renamed(state):
    """What is learned of a state dict, or of gradients, from the authors' names to ours."""
    ours = {}
    for key, value in state.items():
        old = next((old for old in AUTHORS_NAMES if f"{key}.".startswith(f"{old}.")), None)
        if old is not None:
            ours[AUTHORS_NAMES[old] + key[len(old):]] = value.float()
    ours["reference.prompt"] = ours["reference.prompt"][0]
    return ours


def authors_state(path):
    """The state dict of a rectification checkpoint of the authors' program, else None."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {key.removeprefix("module."): value for key, value in state.items()}
    except Exception:  # damaged or of another kind: for load_checkpoint to complain about
        return None
    learned = any(key in state for key in ("pe_proj.weight", "proj_net.0.weight"))
    return state if learned and "text_encoder.prompt_token" in state else None


def authors_method(state):
    """(method, preset) of a file of the authors: the encoder of ReCLIP's is that of the paper."""
    return ("reclip++", "release") if "pe_proj.weight" in state else ("reclip", "paper")


def from_authors(state, model, classes, Wq, settings):
    """RectifiedCLIP of the authors' parameters.

    state: as `authors_state` gives it; model: a CLIP; classes: C names in the authors' order; Wq:
    C×D; settings: the recipe that belongs to `authors_method`. The prompt has the authors' length,
    so a class name keeps three tokens with its end: one of three or more loses its end token.
    Raises UserError where the file is of another data set or another CLIP.
    """
    state, (method, _) = renamed(state), authors_method(state)
    rectifier = Rectifier(model, classes, Wq, *METHODS[method])
    reference = rectifier.reference
    reference.prompt = nn.Parameter(torch.empty_like(state["reference.prompt"]))
    reference.suffix = clip.tokenize(classes, truncate=True)[:, 1:4].long()
    if method == "reclip":
        hidden = [len(state[f"position.{i}.weight"]) for i in (0, 3)]
        width = model.visual.proj.shape[0]
        rectifier.position = PositionLogits(width, len(classes), hidden)
    try:
        missing, _ = rectifier.load_state_dict(state, strict=False)
        missing = set(missing) - {"Wq", "reference.suffix", "reference.start"}
        if missing:
            raise RuntimeError(f"it lacks {', '.join(sorted(missing))}")
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the authors' checkpoint does not fit {len(classes)} classes "
                        f"({', '.join(classes[:3])}, …) and this CLIP: {reason}") from None
    rectifier.to(model.visual.proj.device)
    with torch.no_grad():
        return RectifiedCLIP(model, rectifier, rectifier.Wr(model), classes, settings)


# ------------------------------------------------------------------------------------------------
# The command


def load_clip(source, activation="quick_gelu", device="cpu"):
    """A frozen float32 CLIP with a ViT image encoder, from a name or a file. Raises UserError."""
    try:
        with one_first():
            model, _ = clip.load(source, device="cpu", activation=activation)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from None
    if not hasattr(model.visual, "proj"):
        raise UserError(f"{source} has a ResNet image encoder; the surgery (MaskCLIP's) needs a "
                        "ViT, for example ViT-B/16")
    if model.vocab_size != 49408 or model.context_length != 77:
        raise UserError(f"{source} has a vocabulary of {model.vocab_size} and a context of "
                        f"{model.context_length} tokens; expected OpenAI's 49408 and 77")
    return model.float().to(device).eval().requires_grad_(False)


def image_encoder(model, preset, half=False):
    """The encoder of dense features: CLIP's own, for the paper's preset with exact GELU.

    half: for autocast alone, with matrices that are bf16 already; the outcome is the same, but
    autocast would round those of a frozen encoder anew in every call.
    """
    if preset != "paper" and not half:
        return model.visual
    visual = copy.deepcopy(model.visual)
    for module in visual.modules():
        if preset == "paper" and isinstance(module, MLP):
            module.gelu = nn.GELU()
        if half and isinstance(module, (nn.Linear, nn.Conv2d, Attention)):
            module.bfloat16()
    return visual


def preset_statistics(preset):
    """(mean, std) that dense features are computed with: ImageNet's in the paper's preset."""
    return (IMAGENET_MEAN, IMAGENET_STD) if preset == "paper" else (CLIP_MEAN, CLIP_STD)


def pick_device(name=None):
    """CUDA, else MPS, else the CPU, unless named; under torchrun one device each.

    Raises UserError for one that is not there.
    """
    if name is None:
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = join_processes(torch.device(name))
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def use_amp(given, device):
    """Whether networks run in bf16: as --amp says, else on a GPU that has instructions for it."""
    if given is not None:
        return given
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def parse_arguments(argv):
    """The command line as a namespace; what is not given is None."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--dataset", default="shapes", help="voc, context, ade, cityscapes, stuff, folder, or "
         "shapes, the built-in demo (default)")
    flag("--data-root", type=Path, help="the folder that holds the data set (README, Data sets)")
    flag("--classes", help='for folder: "cat, dog, sofa", or a text file with one name a line')
    flag("--download", action="store_true", help="fetch voc or ade into --data-root first")
    flag("--method", choices=("reclip++", "reclip", "maskclip"), default="reclip++")
    flag("--preset", choices=("release", "paper"), default="release", help="which published recipe")
    flag("--out", type=Path, help="the run's folder (default: runs/NAME)")
    flag("--cache", type=Path, help="folder for hypotheses and views, which runs of the same data "
         "can share (default: the run's folder)")
    flag("--seed", type=int, default=0)
    flag("--device", help="default: cuda, else mps, else cpu")
    flag("--amp", action=argparse.BooleanOptionalAction, help="bf16 encoders (default: on a GPU "
         "that has it; worth it on a CPU that has instructions for it, too)")
    flag("--workers", type=int, help="processes that read images (default: one a core, at most 8)")
    group = parser.add_argument_group("single values of the recipe (default: as published)")
    flag = group.add_argument
    flag("--clip", help="a name (ViT-B/16) or a file")
    flag("--activation", choices=("quick_gelu", "gelu"), default="quick_gelu",
         help="that --clip was trained with; a state dict does not tell")
    flag("--surgery", choices=("program", "value"), help="keep residual and MLP of the last block, "
         "or not")
    flag("--hypothesis", choices=("crops", "global"))
    flag("--crop-ratio", type=float, help="r: side of a window relative to the image's")
    flag("--threshold", type=float, help="t, or for global on 100·cosine")
    flag("--top", type=int, help="for global: how many classes if none passes")
    flag("--epochs", type=int, help="stop after")
    flag("--schedule", type=int, help="epochs of the learning rate's schedule")
    flag("--batch", type=int)
    flag("--lr", type=float)
    flag("--scale", type=int, nargs=2, help="longest and shortest side at most")
    flag("--crop", type=int)
    flag("--tau", type=float, help="temperature of the contrastive loss")
    flag("--mask-temperature", type=float, help="τ1 of the Gumbel-Softmax")
    flag("--pd", type=float, help="prompt denoising at test time: switch off classes below it")
    flag("--views", type=int, metavar="K", help="compute CLIP's features of K augmented views of "
         "each image once, and train on these; 0: fresh views in every epoch")
    group = parser.add_argument_group("ablations: one part of the method changed")
    flag = group.add_argument
    flag("--bias", choices=("independent", "joint", "reference", "none"), help="how extracted: "
         "as in ReCLIP++, as in ReCLIP, as in ReCLIP without position, not at all")
    flag("--decoder", action=argparse.BooleanOptionalAction)
    flag("--add", dest="sign", action="store_const", const=1, help="add the bias, not subtract it")
    flag("--wr-norm", choices=("matrix", "class"), help="what Wr is divided by: the norm of the "
         "matrix, or of each class's row")
    flag("--pooling", choices=("area", "cosine"), help="of the masked features: larger masks give "
         "larger logits, or unit length")
    flag("--learn-query", action="store_const", const=True, help="learn the Query's prompt too")
    flag("--tune-encoder", action="store_const", const=True, help="fine-tune CLIP's image encoder")
    return parser.parse_args(argv)


def settings_of(args):
    """Recipe and command line together, as a namespace of plain values."""
    given = {key: value for key, value in vars(args).items() if value is not None}
    published = recipe(args.dataset, args.preset, args.method, args.hypothesis)
    s = argparse.Namespace(**vars(args) | published | given)
    if "epochs" in given and "schedule" not in given:
        s.schedule = max(s.schedule, s.epochs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    each = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    s.workers = given.get("workers", 0 if s.dataset == "shapes" else min(8, each))
    if s.batch < world():
        if "batch" in given:
            raise UserError(f"--batch is {s.batch}, for {world()} processes; expected one image "
                            "each at least")
        # As the authors' recipe for Cityscapes does: 16 times the batch, 16 times the rate.
        s.lr, s.batch = s.lr if "lr" in given else s.lr * world() / s.batch, world()
    s.scale = tuple(s.scale)
    check_values(s)
    name = [s.dataset] + [v for v, d in ((s.method, "reclip++"), (s.preset, "release")) if v != d]
    s.out = given.get("out", Path("runs") / "-".join(name + [f"seed{s.seed}"] * bool(s.seed)))
    s.cache = given.get("cache", s.out)
    return s


def check_values(s):
    """Raises UserError for a number that cannot work."""
    least = dict(batch=1, epochs=1, schedule=s.epochs, crop=1, workers=0, scale=1, views=0,
                 top=int(s.hypothesis == "global"))
    for key, low in least.items():
        value = getattr(s, key)
        if (min(value) if key == "scale" else value) < low:
            raise UserError(f"--{key} is {value}; expected {low} or more")
    check_seed(s.seed)
    for key in ("tau", "mask_temperature", "lr"):
        if not 0 < getattr(s, key) < math.inf:
            raise UserError(f"--{key.replace('_', '-')} is {getattr(s, key)}; expected more than 0")
    for key, low, high in (("crop_ratio", 0.02, 1), ("pd", 0, 1),
                           ("threshold", 0, 1 if s.hypothesis == "crops" else 100)):
        value = getattr(s, key)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{key.replace('_', '-')} is {value}; expected {low} to {high}")
    if s.views and s.tune_encoder:
        raise UserError("--tune-encoder changes the features in every step; it needs --views 0")
    if s.method == "maskclip" and (s.bias != "none" or s.decoder or s.learn_query or
                                   s.tune_encoder):
        raise UserError("--method maskclip learns nothing; for parts of the method start from "
                        "another --method")
    if (s.learn_query or s.tune_encoder) and s.bias == "none" and not s.decoder:
        raise UserError("--learn-query and --tune-encoder need a bias or a decoder beside them")
    if s.learn_query and s.pooling == "cosine":
        raise UserError("--learn-query and --pooling cosine change two things; take one at a time")


@clean_exit
def main(argv=None):
    args = parse_arguments(argv)
    device = pick_device(args.device)
    s = settings_of(args)
    s.amp, s.device = use_amp(args.amp, device), str(device)
    classes = None if args.classes is None else parse_classes(args.classes)
    if s.download and rank() == 0:
        download(s.dataset, s.data_root)
    barrier()
    data = open_dataset(s.dataset, s.data_root, "train", classes, s.seed)
    s.classes = data.classes
    model = load_clip(s.clip, s.activation, device)
    if s.crop <= model.visual.conv1.stride[0]:
        raise UserError(f"--crop {s.crop} is a single patch; expected more than "
                        f"{model.visual.conv1.stride[0]}")
    print("  ".join(f"{key}={value}" for key, value in plain(s).items() if key != "classes"))
    print(f"{data.name}: {len(data)} training images, {len(data.classes)} classes → {s.out}/")

    make_folder(s.out)
    make_folder(s.cache)
    with folder_lock(s.out / ".run.lock"):
        run = Run(s.out / "reclip.pt", s, data, model)  # first of all: is it this run's folder?
        torch.manual_seed(s.seed)
        Wq = query_features(model, data.classes)
        run.learner = rectifier = make_rectifier(model, data.classes, Wq, s).to(device)
        if s.bias == "none" and not s.decoder:  # MaskCLIP has nothing to learn
            run.save(0, finished=True)
        else:
            hypothesis = make_hypotheses(data, model, Wq, s, s.cache / "hypotheses.jsonl", device)
            per_image = hypothesis.sum(1).float().mean().item()
            print(f"hypotheses: {per_image:.2f} classes per image")
            train(s, data, model, rectifier, hypothesis, run, device)
    barrier()  # the checkpoint is there
    import evaluate  # which needs this module; it sees the checkpoint only
    options = ["--device", s.device, "--workers", str(s.workers), "--clip", s.clip,
               "--amp" if s.amp else "--no-amp"]
    options += ["--data-root", str(s.data_root)] if s.data_root else []
    evaluate.main(["--checkpoint", str(run.path), *options])


if __name__ == "__main__":
    main()
    leave_processes()
