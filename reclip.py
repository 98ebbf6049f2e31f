"""Rectify the bias of CLIP for unsupervised semantic segmentation: ReCLIP and ReCLIP++.

    python reclip.py                                      the built-in demo, on any machine
    python reclip.py --dataset voc --data-root ~/data     a benchmark, by its published recipe

Wang and Kang, "Learn to Rectify the Bias of CLIP for Unsupervised Semantic Segmentation", CVPR
2024, and its extension ReCLIP++, 2024; sections and equations below are those of ReCLIP++.

The method comes first, III-A to III-D, then its recipe, one training step and the loop, and
inference; opening files and the command follow. What keeps a run alive is in run.py.

Shapes: B images, C classes, D joint channels of CLIP, h×w patches, H×W pixels, L prompt length.
Maps are channels-first (Z: B×D×h×w; logits: B×C×h×w), text features are rows (Wq, Wr: C×D).
"""

import argparse
import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import clip
from clip.model import merge_heads
from clip.weights import read_weights
from data import (CLIP_MEAN, CLIP_STD, DATASETS, IMAGENET_MEAN, IMAGENET_STD, TEMPLATES,
                  TrainingViews, check_dataset, download, draw_seed, evenly, name_counts, names_of,
                  normalise, open_dataset, parse_classes, resize_to_scale)
from files import (Parser, Progress, UserError, clean_exit, cores_each, count, make_folder, natural,
                   path as user_path, positive, read_ahead, seed as seed_number, share)
from run import (Batches, Run, as_checkpoint, ask_once, barrier, clip_fingerprint, folder_lock,
                 image_encoder, leave_processes, load_checkpoint, load_clip, make_views,
                 network_facts, parallel, passed_on, pick_device, plain, rank, to_device, use_amp,
                 usual_surgery, views_on, world)

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
    images: B×3×H×W, normalised. Returns B×D×h×w; `F.normalize(…, dim=1)` of it is Z.
    """
    x, grid = tokens_before_last_block(visual, images)
    features = last_block(visual, x, grid, surgery, sigma) @ visual.proj
    return features.mT.unflatten(2, grid)


def last_block(visual, x, grid, surgery="program", sigma=5.0):
    """The last block with its attention changed: B×(1+h·w)×width → B×h·w×width, after ln_post.

    x: all tokens, the class token first, which the others may attend to and which is then dropped.
    grid: (h, w); surgery, sigma: as in `dense_features`.
    """
    block, patches = visual.transformer.resblocks[-1], x[:, 1:]
    attn, width, alike = block.attn, x.shape[-1], SURGERIES[surgery]["alike"]
    if alike:
        q, k, v = attn.project(norm(block.ln_1, x))
        near = neighbourhood(*grid, sigma, q) if surgery == "naclip" else None
        y = sum(F.scaled_dot_product_attention(a[:, :, 1:], a, v, attn_mask=near)
                for a in (dict(q=q, k=k)[name] for name in alike))
        y = merge_heads(y)
    else:
        weight, bias = attn.in_proj_weight[2 * width:], attn.in_proj_bias[2 * width:]
        y = F.linear(norm(block.ln_1, patches), weight, bias)
    y = attn.out_proj(y)
    if SURGERIES[surgery]["rest"]:
        y = y + patches
        y = y + block.mlp(norm(block.ln_2, y))
    return visual.ln_post(y)


def neighbourhood(h, w, sigma, like):
    """NACLIP's addition to the logits of attention: exp(-‖i-j‖²/2σ²) of patches i and j.

    Returns h·w×(1+h·w), of the type and on the device of `like`; 0 for the class token.
    """
    rows, columns = (torch.arange(side, device=like.device).float() for side in (h, w))
    of_rows, of_columns = (torch.exp(-(i[:, None] - i) ** 2 / (2 * sigma**2))
                           for i in (rows, columns))
    return F.pad(torch.kron(of_rows, of_columns), (1, 0)).to(like.dtype)


def global_feature(visual, images):
    """CLIP's feature of the whole image, at any image size: B×3×H×W, normalised → B×D, unit length.

    At the resolution CLIP was trained on, and but for epsilon, this is its own `encode_image`.
    """
    x, _ = tokens_before_last_block(visual, images)
    return F.normalize(class_feature(visual, x).float(), dim=-1)


def class_feature(visual, x):
    """The last block and what follows it for the class token alone: tokens B×n×width → B×D."""
    block = visual.transformer.resblocks[-1]
    q, k, v = block.attn.project(block.ln_1(x))
    mixed = merge_heads(F.scaled_dot_product_attention(q[:, :, :1], k, v))[:, 0]
    x = x[:, 0] + block.attn.out_proj(mixed)
    x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x) @ visual.proj


@torch.no_grad()
def query_features(model, classes, templates=TEMPLATES, batch=512):
    """Wq, C×D: unit-length mean of each class's unit-length features over all templates.

    model: a CLIP; classes: list of C names, of which one like "person, man, woman" is a class of
    three names and has three rows (data.names_of); templates: strings with one {}.
    """
    names = [name for one in classes for name in names_of(one)]
    tokens = clip.tokenize([t.format(name) for name in names for t in templates], truncate=True)
    # Attention is causal: what follows the end token changes nothing and need not be computed.
    length, order = tokens.argmax(1), tokens.argmax(1).argsort()
    features = torch.empty(len(tokens), model.text_projection.shape[1])
    progress = Progress("query", len(tokens))
    for rows in order.split(batch):
        part = tokens[rows, : int(length[rows].max()) + 1].to(model.text_projection.device)
        features[rows] = F.normalize(model.encode_text(part).float(), dim=-1).cpu()
        progress.advance(len(rows))
    progress.close()
    Wq = F.normalize(features.unflatten(0, (len(names), -1)).mean(1), dim=-1)
    return Wq.to(model.text_projection.device)


def classify(Z, W):
    """Logits of a feature map under text features: B×D×h×w, C×D → B×C×h×w (Mq = Z·Wqᵀ)."""
    return torch.einsum("bdhw,cd->bchw", Z, W)


def best_name(logits, names):
    """Logits of names, B×K×…, of which each class has so many → of classes, B×C×…: the best's."""
    if max(names) == 1:
        return logits
    return torch.stack([part.amax(1) for part in logits.split(names, 1)], 1)


# ------------------------------------------------------------------------------------------------
# III-B  Bias extraction: what CLIP prefers, whatever the image


class Reference(nn.Module):
    """Class-preference bias: learned words, shared by all classes, before each class name (Eq. 1).

    The sequence is [start] v_1 … v_L name [end]. L is 73 where names have up to two tokens, and
    gives way to longer names so that none loses its end token. forward(model) → Wr, C×D, divided
    by the norm of the whole matrix; of a class with several names the mean of their features.
    text: words to start from, and of its length, as the ablation does that learns the Query.
    Raises UserError where a name leaves no room for a prompt.
    """

    def __init__(self, model, classes, text=None):
        super().__init__()
        self.names = name_counts(classes)
        words = [name for one in classes for name in names_of(one)]
        names = [clip.tokenize(name, 512, truncate=True)[0] for name in words]
        lengths = [int(name.argmax()) - 1 for name in names]
        context = len(model.positional_embedding)
        L = min(context - 4, context - 2 - max(lengths))
        if L < 1:
            longest = words[lengths.index(max(lengths))]
            raise UserError(f"class name {longest[:40]!r}… has {max(lengths)} tokens and leaves no "
                            f"room for a prompt; at most {context - 3} tokens fit")
        self.register_buffer("suffix", torch.stack([n[1 : max(lengths) + 2] for n in names]).long())
        start = model.token_embedding.weight[names[0][0]].detach().float()
        self.register_buffer("start", start.clone()[None])
        # Every word starts as the embedding of token 0, as in the authors' program.
        first = [0] * L if text is None else [i for i in clip.tokenize(text)[0].tolist() if i][1:-1]
        self.prompt = nn.Parameter(model.token_embedding.weight[first].detach().float())
        self.layout = None

    def encode(self, model):
        """The text features of [start] prompt name [end], one row a name, not normalised."""
        prefix = torch.cat([self.start, self.prompt])
        if self.layout is None or self.layout[0].device != prefix.device:
            self.layout = shared_layout(len(prefix), self.suffix)
        return encode_shared_prefix(model, prefix, self.suffix, self.layout).float()

    def forward(self, model):
        Wr = self.encode(model)
        if max(self.names) > 1:
            Wr = torch.stack([part.mean(0) for part in Wr.split(self.names)])
        return Wr / Wr.norm()


def encode_shared_prefix(model, prefix, suffix, layout=None):
    """CLIP's text features of C texts that begin alike, exactly, for little more than one's price.

    Attention is causal, so the positions of a common beginning are the same for every text. One
    sequence does for all: the beginning once, then the endings one after another, each token with
    the position it has in its own text, and looking back at the beginning and at its own ending
    alone, in groups of endings that do not meet: the cost is linear in C. Equal to the full
    encoding up to rounding, in value and gradient.

    model: a CLIP; prefix: P×width, embeddings of the common beginning, start token included;
    suffix: int64 C×S, token ids of the endings, P+S within the context length; each text is read
    out at the largest id of its ending, which is the end token; layout: `shared_layout(P, suffix)`,
    if it is known from before. Returns C×D, not normalised.
    """
    tokens, place, seen, ends = layout or shared_layout(len(prefix), suffix)
    P, sizes = len(prefix), [len(rows) for rows in seen]
    x = torch.cat([prefix, model.token_embedding(tokens)]) + model.positional_embedding[place]
    for block in model.transformer.resblocks:
        q, k, v = (part.split(sizes, 2) for part in block.attn.project(block.ln_1(x)[None]))
        if block is model.transformer.resblocks[-1]:  # only its outputs at the end tokens matter
            q = [part[:, :, rows] for part, rows in zip(q, ends)]
            x = torch.cat([part[rows] for part, rows in zip(x.split(sizes), ends)])
            seen = [part[rows] for part, rows in zip(seen, ends)]
        groups = zip(q, after_beginning(k, P, 2), after_beginning(v, P, 2), seen)
        mixed = torch.cat([F.scaled_dot_product_attention(*group) for group in groups], 2)
        x = x + block.attn.out_proj(merge_heads(mixed)[0])
        x = x + block.mlp(block.ln_2(x))
    return model.ln_final(x) @ model.text_projection


def shared_layout(P, suffix, group=256):
    """How `encode_shared_prefix` lays out texts of P common tokens and the endings `suffix`, C×S.

    Returns, for the N tokens of all endings one after another: their ids, N; the position in its
    own text of each of the P+N tokens; and for each group of endings bool n×m, which of its n
    tokens (those of the beginning included in the first) looks at which of the beginning's and its
    own, and which of the n are end tokens. group: at most so many tokens and one ending make one.
    Counting waits for a GPU, so a training loop does it once.
    """
    used = torch.arange(suffix.shape[1], device=suffix.device) <= suffix.argmax(1, keepdim=True)
    text, place = used.nonzero().T  # what follows an end token is left out
    tokens, last = suffix[text, place], place == suffix.argmax(1)[text]
    before = used.sum(1).cumsum(0) - used.sum(1)
    first, *others = (before // group)[text].bincount().tolist()
    sizes = [P + first, *others]
    text = torch.cat([text.new_full((P,), -1), text])
    place = torch.cat([torch.arange(P, device=suffix.device), P + place])
    last = torch.cat([last.new_zeros(P), last])
    texts, places = text.split(sizes), place.split(sizes)
    seen = [((a[:, None] == b) | (b == -1)) & (i[:, None] >= j)
            for a, b, i, j in zip(texts, after_beginning(texts, P, 0),
                                  places, after_beginning(places, P, 0))]
    return tokens, place, seen, [part.nonzero()[:, 0] for part in last.split(sizes)]


def after_beginning(groups, P, dim):
    """Each group of tokens after the P of the beginning, which the first group begins with."""
    first, *others = groups
    return [first] + [torch.cat([first.narrow(dim, 0, P), group], dim) for group in others]


class PositionLogits(nn.Sequential):
    """Space-preference bias of ReCLIP: three 3×3 convolutions of the positional embedding.

    forward(p): 1×width×h×w → Mp, 1×C×h×w. (The CVPR paper's text has one channel for all classes;
    that would change no argmax. The authors' program, and so ours, has one for each.)
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


# What each method learns: (bias, decoder)
METHODS = {"reclip++": ("independent", True), "reclip": ("joint", False),
           "maskclip": ("none", False)}


class Rectifier(nn.Module):
    """All that ReCLIP learns on top of a frozen CLIP, which it is given and does not contain.

    model: a CLIP with a ViT image encoder; classes: C names; Wq: C×D (a row for each name).
    bias: how Mb is extracted: "independent" (ReCLIP++), "joint" (ReCLIP), "reference" (ReCLIP
    without its positional part) or "none". decoder: whether M passes through one.
    Ablations: sign +1 adds the bias (Table V) instead of subtracting it (Eq. 3); wr_norm "class"
    divides each row of Wr by its own norm; learn_query learns the Query's prompt too (Table IV);
    visual: None, or an image encoder to fine-tune (Table VI).
    """

    def __init__(self, model, classes, Wq, bias="independent", decoder=True, sign=-1,
                 wr_norm="matrix", learn_query=False, visual=None):
        super().__init__()
        C, D, width = len(classes), Wq.shape[1], model.visual.proj.shape[0]
        self.kind, self.sign, self.wr_norm = bias, sign, wr_norm
        self.names = name_counts(classes)
        if len(Wq) != sum(self.names):
            raise ValueError(f"{len(Wq)} rows of Wq for {sum(self.names)} names")
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
        Mq = M = best_name(classify(Z, self.Wq if Wq is None else Wq), self.names)
        if self.kind != "none":
            M = Mq + self.sign * self.bias(Z, p, Wr)
        return Mq, self.decoder(Z, M) if hasattr(self, "decoder") else M

    def Wr(self, model):
        """The Reference features, C×D, or None without a bias."""
        if self.kind == "none":
            return None
        Wr = self.reference(model)
        return F.normalize(Wr, dim=1) if self.wr_norm == "class" else Wr

    def texts(self, model):
        """Wq and Wr as they are now, both with a gradient where they are learned."""
        Wq = self.Wq
        if self.query is not None:
            Wq = F.normalize(self.query.encode(model), dim=1)
            self.Wq = Wq.detach()
        return Wq, self.Wr(model)


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
    Z gives the similarities Z_g·Wqᵀ at C/D of the cost (where each class has one name).
    """
    return torch.einsum("bchw,bkhw->bck", masks, features) / masks[0, 0].numel()


def cosine_pooling(masks, Z, Wq):
    """An ablation: similarities B×C×C of pooled features of unit length, as in the papers' text."""
    return F.normalize(masked_pooling(masks, Z), dim=2) @ Wq.T


def contrastive_loss(similarities, hypothesis, tau=0.01):
    """Eq. 7: each class of an image's hypothesis should recognise itself in its masked feature.

    similarities: B×C×C, S[k, j] of the feature under the mask of class k to the text of class j;
    hypothesis: bool B×C. Mean over the classes of an image, then over all B images; an image
    without a hypothesis adds nothing.
    """
    log_p = (similarities / tau).log_softmax(-1).diagonal(dim1=1, dim2=2)  # B×C
    present = hypothesis.sum(1).clamp(min=1)
    return -((log_p * hypothesis).sum(1) / present).mean()


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
    """CLIP's preprocessing short of normalisation: uint8 …×3×H×W → uint8 …×3×side×side."""
    from torchvision.transforms.v2 import functional as TF
    images = TF.resize(images, side, TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(images, [side, side])


def encode_crops(visual, images):
    """CLIP's own image feature, up to rounding: B×3×R×R, normalised → B×D; R its resolution."""
    x = visual.conv1(images).flatten(2).mT
    first = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + visual.positional_embedding.to(x.dtype)
    return class_feature(visual, visual.transformer.resblocks[:-1](visual.ln_pre(x)))


def crop_votes(model, images, Wq, r, amp=False, names=None):
    """How many crops of each image every class wins (Sec. III-D).

    model: a CLIP; images: list of uint8 3×H×W, of any sizes; Wq: C×D; r: side of a crop relative to
    the image's; amp: encode in bf16; names: as in `best_name`. Returns int64 len(images)×C.
    """
    crops = torch.cat([cut_crops(image, r, model.visual.input_resolution) for image in images])
    tokens = len(model.visual.positional_embedding)  # on a CPU a batch that stays in its cache
    batch = max(1, 2000 // tokens) if crops.device.type == "cpu" else 512
    with torch.autocast(crops.device.type, torch.bfloat16, enabled=amp):
        features = torch.cat([encode_crops(model.visual, normalise(part, CLIP_MEAN, CLIP_STD))
                              for part in crops.split(batch)])
    # Compared in float32: in bf16 close classes would be equal. argmax needs no unit length: it is
    # the same for every class.
    scores = best_name(features.float() @ Wq.T, names or [1] * len(Wq))
    winner = scores.argmax(1).unflatten(0, (len(images), -1))
    return F.one_hot(winner, scores.shape[1]).sum(1)


def crop_hypothesis(counts, t):
    """Eq. 6: the classes detected in more than the share t of the crops. counts: B×C → bool B×C."""
    return counts / counts.sum(1, keepdim=True) > t


def global_scores(model, image, Wq, scale=None, amp=False):
    """100·cosine of an image to each class (ReCLIP): uint8 3×H×W → C.

    scale: None for the image as CLIP sees it, its centre, to which the published thresholds
    belong; or, as in `recipe`, the size at which the whole image is encoded. amp: in bf16.
    """
    whole, side = scale is not None, model.visual.input_resolution
    view = resize_to_scale(image, scale) if whole else clip_view(image, side)
    view = normalise(view[None].to(Wq.device), CLIP_MEAN, CLIP_STD)
    with torch.autocast(view.device.type, torch.bfloat16, enabled=amp):
        feature = (global_feature if whole else encode_crops)(model.visual, view)
    return 100 * (F.normalize(feature.float(), dim=-1) @ Wq.T)[0]


def global_hypothesis(scores, threshold, top):
    """ReCLIP: classes whose 100·cosine to the whole image reaches a threshold, else the best `top`.

    scores: B×C → bool B×C.
    """
    chosen = scores >= threshold
    best = scores >= scores.topk(min(top, scores.shape[1]), 1).values[:, -1:]
    return torch.where(chosen.any(1, keepdim=True), chosen, best)


# ------------------------------------------------------------------------------------------------
# IV-A  The recipe: the published settings

ALWAYS = dict(
    clip="ViT-B/16", surgery="program", sigma=5.0, ratio=(0.5, 2.0), distort=True,  # views
    tau=0.01, momentum=0.9, weight_decay=5e-4, power=0.9,  # loss and SGD
    crop_ratio=1 / 6,  # r
    views=0,  # fresh augmentation in every epoch
    wr_norm="matrix", pooling="area", learn_query=False, tune_encoder=False,  # ablations
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

    given: single values in their place; what follows from them (the threshold of another kind of
    hypothesis, the prompt denoising of another head) follows.
    """
    check_dataset(dataset)
    row = ROWS.get(dataset, dataset)
    columns = ("scale", "crop", "schedule", "epochs", "batch", "lr", "pd")
    values = DEMO if row == "shapes" else {"release": RELEASE, "paper": PAPER}[preset][row]
    s = ALWAYS | dict(zip(columns, values)) | (DEMO_ONLY if row == "shapes" else {})
    s["bias"], s["decoder"], s["sign"] = *METHODS[method], -1
    # On the demo the whole image serves ReCLIP better than CLIP's view of it.
    s["hypothesis"] = {"reclip++": "crops", "maskclip": "none"}.get(
        method, "global-full" if row == "shapes" else "global")
    # τ1. The demo's is softer: with 0.01 its masks are so sharp that a class now and then dies.
    s["mask_temperature"] = {"reclip": 0.001}.get(method, 0.01) * (100 if row == "shapes" else 1)
    s |= given
    s["threshold"], s["top"] = (GLOBAL[row] if s["hypothesis"].startswith("global") else
                                (CROPS.get(row, 0.0), 0))
    s["pd"], s["pd_temperature"] = head_denoising(row, s["bias"], s["decoder"], s["pd"])
    return s | given


def head_denoising(dataset, bias, decoder, pd):
    """Prompt denoising and its temperature belong to what the logits are: (PD, temperature).

    pd: ReCLIP++'s, which is for logits that a decoder's BatchNorm has widened. Without a decoder
    ReCLIP's; none for MaskCLIP, whose logits are cosines, and on the demo.
    """
    if decoder:
        return pd, 0.1
    if bias == "none" or dataset == "shapes":
        return None, 0.01
    return {"context": 0.6}.get(dataset, 0.5), 0.01  # the authors' settings of ReCLIP


# ------------------------------------------------------------------------------------------------
# Training: one step, and the loop


def rectification_loss(network, features, p, Wq, Wr, hypothesis, noise, tau, mask_temperature,
                       pooling="area"):
    """One training step: from what CLIP says of B views, and their hypotheses, to the loss.

    network: a Rectifier; features: B×D×h×w, not normalised; p: 1×width×h×w; Wq, Wr: C×D;
    hypothesis: bool B×C; noise: B×C×h×w, Gumbel; tau, mask_temperature: τ and τ1; pooling: "area",
    or the ablation "cosine". Returns a 0-dim tensor.
    """
    Z = F.normalize(features, dim=1)  # III-A
    Mq, logits = network(Z, p, Wr, Wq)  # III-B and III-C
    masks = gumbel_masks(logits, mask_temperature, noise)
    similarities = (masked_pooling(masks, Mq) if pooling == "area" else
                    cosine_pooling(masks, Z, Wq))
    return contrastive_loss(similarities, hypothesis, tau)  # III-D


def train(s, data, model, rectifier, hypothesis, run, device):
    """Learn the bias of CLIP on `data` (Sec. IV-A).

    s: settings, as `recipe` and the command line give them; data: SegmentationData, of which only
    images are opened; hypothesis: a function, indices of B images → bool B×C; run: the Run.
    """
    optimizer = torch.optim.SGD(rectifier.parameters(), lr=s.lr, momentum=s.momentum,
                                weight_decay=s.weight_decay, fused=True)
    batches = run.start(optimizer, Batches(len(data), s.batch, s.epochs, s.seed))
    visual = rectifier.visual or image_encoder(model, s.preset, s.amp)
    views = TrainingViews(data, s.scale, s.crop, s.ratio, s.distort, s.seed)
    grid = -(-s.crop // visual.conv1.stride[0])
    p = resized_positions(visual, grid, grid)

    def encode(batch):
        view, size = views_on(device, batch)
        with torch.set_grad_enabled(s.tune_encoder):
            return encode_views(visual, view, s.preset, s.surgery, s.sigma, s.amp, size)

    if s.views and len(batches):  # CLIP is frozen: what it says of a view need be asked only once
        fields = dict(features=(np.float16, (rectifier.Wq.shape[1], grid, grid)))
        views = make_views(views, s, "views", network_facts(model, s), fields,
                           lambda batch: dict(features=encode(batch).half()))
    # A surgery without the MLP of the encoder's last block leaves its parameters without gradient.
    idle = s.tune_encoder and not SURGERIES[s.surgery]["rest"]
    network = parallel(rectifier.train(), device, idle)

    def loss_of(features, p, present, noise):
        with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
            Wq, Wr = rectifier.texts(model)
        return rectification_loss(network, features, p, Wq, Wr, present, noise, s.tau,
                                  s.mask_temperature, s.pooling)

    if s.graph:  # a GPU is faster with a step's kernels than Python is with their launches
        rectifier.texts(model)  # counts the tokens, which no graph can, and keeps their layout
        loss_of = torch.compile(loss_of, mode="reduce-overhead", dynamic=False)
    with run:
        for step, batch in run.steps(read_ahead(views, batches, s.workers)):
            epoch = step // batches.per_epoch
            for group in optimizer.param_groups:
                group["lr"] = s.lr * (1 - epoch / s.schedule) ** s.power
            features = to_device(batch["features"], device).float() if s.views else encode(batch)
            if s.tune_encoder:
                p = resized_positions(visual, grid, grid)
            present = to_device(hypothesis(batch["index"]), device)
            seeds = [draw_seed(s.seed, epoch, data.ids[i], "gumbel")
                     for i in batch["index"].tolist()]
            noise = gumbel_noise((len(data.classes), grid, grid), seeds, device)
            optimizer.zero_grad()
            loss = loss_of(features, p, present, noise) * batches.weight(step)
            loss.backward()
            optimizer.step()
            run.after(step + 1, optimizer, len(seeds), loss)


# ------------------------------------------------------------------------------------------------
# Inference


def encode_views(visual, views, preset, surgery, sigma=5.0, amp=False, sizes=None):
    """Dense features, float32 B×D×h×w, not normalised, of uint8 views B×3×H×W.

    visual, preset: as `image_encoder` has them; surgery, sigma: as in `dense_features`; amp: in
    bf16; sizes: B×2, (h, w) of what is not padding, or None.
    """
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if preset == "paper" else (CLIP_MEAN, CLIP_STD)
    images = normalise(views, mean, std, sizes)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        return dense_features(visual, images, surgery, sigma).float()


class RectifiedCLIP:
    """A Rectifier with its CLIP: images in, Query and rectified logits out.

    rectifier: on the CPU or where the CLIP is; Wr: C×D, or None without a bias; settings: a
    namespace with preset, surgery, method and the values of evaluation (`recipe`).
    """

    def __init__(self, model, rectifier, Wr, classes, settings):
        device = model.visual.proj.device
        self.model, self.classes = model, list(classes)
        self.settings = argparse.Namespace(**dict(sigma=5.0) | vars(settings))
        self.visual = rectifier.visual or image_encoder(model, settings.preset)
        self.patch = model.visual.conv1.stride[0]
        self.rectifier = rectifier.to(device).eval().requires_grad_(False)
        self.Wr = Wr if Wr is None else Wr.to(device)

    @torch.no_grad()
    def encode(self, views, sizes=None, amp=False):
        """`encode_views` with the settings of the run: float32 B×D×h×w, not normalised."""
        s = self.settings
        return encode_views(self.visual, views, s.preset, s.surgery, s.sigma, amp, sizes)

    def logits(self, features):
        """Mq and M (ReCLIP) or Mo (ReCLIP++), B×C×h×w, of features as `encode` gives them."""
        return self.rectifier(*self.inputs(features), self.Wr)

    def inputs(self, features):
        """Z, of unit length, and p, 1×width×h×w: what a Rectifier sees of features."""
        return F.normalize(features, dim=1), resized_positions(self.visual, *features.shape[2:])


# ------------------------------------------------------------------------------------------------
# Hypotheses of a whole data set, and checkpoints


@torch.no_grad()
def make_hypotheses(data, model, Wq, s, folder, device):
    """The hypotheses of the images of `data`, as a function: indices of B images → bool B×C.

    hypotheses.npy in `folder` holds what they are decided from (how many crops each class won, or
    100·cosine to each class), so the thresholds can be changed without encoding again. s: settings
    hypothesis, crop_ratio or scale, threshold, top, activation, amp, workers.
    """
    crops, C = s.hypothesis == "crops", len(data.classes)
    names = name_counts(data.classes)
    scale = list(s.scale) if s.hypothesis == "global-full" else None
    if s.learn_query:  # hypotheses are the fixed Query's
        Wq = query_features(model, data.classes)
    facts = dict(hypothesis=s.hypothesis, data=data.name, images=data.fingerprint,
                 classes=data.classes, clip=clip_fingerprint(model), activation=s.activation,
                 heads=getattr(s, "heads", None), view=s.crop_ratio if crops else scale)
    # Blocks are the same for any number of processes, and so is the rounding in a batch.
    size = max(1, 256 // len(crop_windows(64, 64, s.crop_ratio))) if crops else 1
    blocks = [rows.tolist() for rows in torch.arange(len(data)).split(size)]

    def ask(images):
        if crops:
            images = [to_device(image, device) for image in images]
            return dict(scores=crop_votes(model, images, Wq, s.crop_ratio, s.amp, names=names))
        cosines = [global_scores(model, image, Wq, scale, s.amp) for image in images]
        return dict(scores=best_name(torch.stack(cosines), names))

    fields = dict(scores=(np.int16 if crops else np.float32, (C,)))
    records = ask_once(folder / "hypotheses.npy", facts, fields, data, blocks, ask, s.workers, list)

    def hypothesis(indices):
        scores = torch.from_numpy(records["scores"][np.asarray(indices)]).double()
        return (crop_hypothesis(scores, s.threshold) if crops else
                global_hypothesis(scores, s.threshold, s.top))

    return hypothesis


def hypotheses_folder(checkpoint, s):
    """Where the hypotheses of a checkpoint's run are: beside it, or only in its cache."""
    beside, cache = (Path(folder, "hypotheses.npy") for folder in (checkpoint.parent, s.cache))
    return cache.parent if cache.exists() and not beside.exists() else beside.parent


def make_rectifier(model, classes, Wq, s):
    """The Rectifier that settings ask for."""
    visual = image_encoder(model, s.preset) if s.tune_encoder else None
    return Rectifier(model, classes, Wq, s.bias, s.decoder, s.sign, s.wr_norm, s.learn_query,
                     visual)


def open_rectified(path, device="cpu", source=None):
    """RectifiedCLIP of a checkpoint of reclip.py. source: where its CLIP is, if not where it was.

    Raises UserError for a file that is no such checkpoint, and for another CLIP.
    """
    checkpoint = load_checkpoint(path)
    with as_checkpoint(path):
        s = argparse.Namespace(**checkpoint["settings"])
        s.dataset, s.method, s.preset, s.surgery, s.scale, s.pd, s.seed  # not missing later on
        try:
            model = load_clip(source or s.clip, s.activation, device, getattr(s, "heads", None))
        except UserError as error:
            raise UserError(f"the CLIP of {path}: {error}; say with --clip where it is now"
                            ) from None
        if clip_fingerprint(model) != checkpoint["clip"]:
            raise UserError(f"{path} was made with another CLIP than {source or s.clip}")
        state, Wr, classes = checkpoint["state"], checkpoint["Wr"], checkpoint["classes"]
        rectifier = make_rectifier(model, classes, state["Wq"], s)
        rectifier.load_state_dict(state)
        if Wr is not None and Wr.shape != (len(classes), state["Wq"].shape[1]):
            raise ValueError(f"Wr is {tuple(Wr.shape)}, for {len(classes)} classes")
        return RectifiedCLIP(model, rectifier, Wr, classes, s)


def plain_maskclip(model, classes, settings):
    """RectifiedCLIP that rectifies nothing: MaskCLIP with C class names, without a checkpoint."""
    rectifier = Rectifier(model, classes, query_features(model, classes), *METHODS["maskclip"])
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
        state = {key.removeprefix("module."): value for key, value in read_weights(path).items()}
    except (ValueError, OSError, AttributeError):
        return None  # load_checkpoint will say what is wrong
    learned = any(key in state for key in ("pe_proj.weight", "proj_net.0.weight"))
    return state if learned and "text_encoder.prompt_token" in state else None


def authors_method(state):
    """(method, preset) of a file of the authors; ReCLIP's may be of either preset."""
    return ("reclip++", "release") if "pe_proj.weight" in state else ("reclip", "paper")


def from_authors(state, model, classes, Wq, settings):
    """RectifiedCLIP of the authors' parameters.

    state: as `authors_state` gives it; model: a CLIP; classes: C names in the authors' order; Wq:
    C×D; settings: the recipe that belongs to `authors_method`. The prompt has the authors' length,
    so a class name keeps three tokens with its end: one of three or more loses its end token.
    Raises UserError where the file is of another data set or another CLIP.
    """
    method, state = authors_method(state)[0], renamed(state)
    rectifier = Rectifier(model, classes, Wq, *METHODS[method])
    rectifier.reference.prompt = nn.Parameter(torch.empty_like(state["reference.prompt"]))
    rectifier.reference.suffix = clip.tokenize(classes, truncate=True)[:, 1:4].long()
    if method == "reclip":
        hidden = [len(state[f"position.{i}.weight"]) for i in (0, 3)]
        rectifier.position = PositionLogits(model.visual.proj.shape[0], len(classes), hidden)
    try:
        missing = set(rectifier.load_state_dict(state, strict=False).missing_keys)
        missing -= {"Wq", "reference.suffix", "reference.start"}
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


def parse_arguments(argv):
    """The command line as a namespace; what is not given is None."""
    parser = Parser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--dataset", default="shapes", help=", ".join(DATASETS) + " (default: shapes, the demo)")
    flag("--data-root", type=user_path, help="its folder (README, Data sets)")
    flag("--train-split", choices=("train", "trainaug"), default="train", help="of voc")
    flag("--classes", help='for folder: "cat, dog, sofa", or a text file, one class a line, with '
         "several names where they are separated by commas")
    flag("--labels", type=user_path, help="for folder: ground truth, to evaluate with alone")
    flag("--labels-offset", type=int, choices=(0, 1), default=0, help="1: 0 is background")
    flag("--download", action="store_true", help="fetch voc or ade into --data-root first")
    flag("--method", choices=("reclip++", "reclip", "maskclip"), default="reclip++")
    flag("--preset", choices=("release", "paper"), default="release", help="which published recipe")
    flag("--out", type=user_path, help="the run's folder (default: runs/NAME)")
    flag("--cache", type=user_path, help="for hypotheses and views (default: --out)")
    flag("--seed", type=seed_number, default=0)
    flag("--device", help="default: cuda, else mps, else cpu")
    flag("--amp", action=argparse.BooleanOptionalAction, help="bf16 encoders (default: on a GPU)")
    flag("--graph", action="store_true", help="texts, loss and gradients as CUDA graphs")
    flag("--workers", type=natural, help="processes that read images (default: one a core)")
    flag = parser.add_argument_group("values of the recipe (default: as published)").add_argument
    flag("--clip", help="a name (ViT-B/16) or a file")
    flag("--activation", choices=("quick_gelu", "gelu"), default="quick_gelu",
         help="that --clip was trained with; a state dict does not tell")
    flag("--heads", type=count, help="of the image encoder of --clip, where its sizes do not tell")
    flag("--surgery", choices=tuple(SURGERIES), help="what becomes of CLIP's last block")
    flag("--sigma", type=positive, help="of naclip: how near is near, in patches")
    flag("--hypothesis", choices=("crops", "global", "global-full"))
    flag("--crop-ratio", type=float, help="r: side of a window relative to the image's")
    flag("--threshold", type=float, help="t, or for global on 100·cosine")
    flag("--top", type=natural, help="for global: how many classes if none passes")
    flag("--epochs", type=count, help="stop after")
    flag("--schedule", type=count, help="epochs of the learning rate's schedule")
    flag("--batch", type=count)
    flag("--lr", type=positive)
    flag("--scale", type=count, nargs=2, help="longest and shortest side at most")
    flag("--crop", type=count)
    flag("--tau", type=positive, help="temperature of the contrastive loss")
    flag("--mask-temperature", type=positive, help="τ1 of the Gumbel-Softmax")
    flag("--pd", type=share, help="prompt denoising at test time: switch off classes below it")
    flag("--views", type=natural, metavar="K", help="encode K augmented views of each image once "
         "and train on these; 0: fresh views in every epoch")
    flag = parser.add_argument_group("ablations: one part of the method changed").add_argument
    flag("--bias", choices=("independent", "joint", "reference", "none"), help="how extracted: "
         "as in ReCLIP++, as in ReCLIP, as in ReCLIP without position, not at all")
    flag("--decoder", action=argparse.BooleanOptionalAction)
    flag("--add", dest="sign", action="store_const", const=1, help="add the bias, not subtract it")
    flag("--wr-norm", choices=("matrix", "class"), help="whose norm Wr is divided by")
    flag("--pooling", choices=("area", "cosine"), help="of masked features")
    flag("--learn-query", action="store_const", const=True, help="learn the Query's prompt too")
    flag("--tune-encoder", action="store_const", const=True, help="fine-tune CLIP's image encoder")
    return parser.parse_args(argv)


def settings_of(args):
    """Recipe and command line together, as a namespace of plain values. Raises UserError."""
    given = {key: value for key, value in vars(args).items() if value is not None}
    s = argparse.Namespace(**vars(args) | recipe(**given))
    if "epochs" in given and "schedule" not in given:
        s.schedule = max(s.schedule, s.epochs)
    s.workers = given.get("workers", 0 if s.dataset == "shapes" else cores_each())
    if s.batch < world():
        if "batch" in given:
            raise UserError(f"--batch is {s.batch}, for {world()} processes; expected one image "
                            "each at least")
        # As the authors' recipe for Cityscapes does: 16 times the batch, 16 times the rate.
        s.lr, s.batch = s.lr if "lr" in given else s.lr * world() / s.batch, world()
    s.scale = tuple(s.scale)
    check_settings(s)
    name = [s.dataset] + [v for v, d in ((s.method, "reclip++"), (s.preset, "release")) if v != d]
    s.out = given.get("out", Path("runs") / "-".join(name + [f"seed{s.seed}"] * bool(s.seed)))
    s.cache = given.get("cache", s.out)
    return s


def check_settings(s):
    """Raises UserError for what cannot work together."""
    most = 1 if s.hypothesis == "crops" else 100
    for flag, value, low, high in (
            ("--schedule", s.schedule, s.epochs, math.inf), ("--crop-ratio", s.crop_ratio, 0.02, 1),
            ("--threshold", s.threshold, 0, most),
            ("--top", s.top, int(s.hypothesis.startswith("global")), math.inf)):
        if not low <= value <= high:
            wanted = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise UserError(f"{flag} is {value}; expected {wanted}")
    changed = s.learn_query or s.tune_encoder
    for wrong, message in (
            (s.views and s.tune_encoder, "--tune-encoder changes the features in every step; it "
             "needs --views 0"),
            (s.method == "maskclip" and (s.bias != "none" or s.decoder or changed), "--method "
             "maskclip learns nothing; for parts of the method start from another --method"),
            (changed and s.bias == "none" and not s.decoder, "--learn-query and --tune-encoder "
             "need a bias or a decoder beside them"),
            (s.learn_query and s.pooling == "cosine", "--learn-query and --pooling cosine change "
             "two things; take one at a time")):
        if wrong:
            raise UserError(message)


@clean_exit
def main(argv=None):
    args = parse_arguments(argv)
    device = pick_device(args.device)
    s = settings_of(args)
    s.amp, s.device = use_amp(args.amp, device), str(device)
    if s.graph and (device.type != "cuda" or world() > 1):
        raise UserError("--graph needs a CUDA device, and a single process")
    classes = None if args.classes is None else parse_classes(args.classes)
    if s.download and rank() == 0:
        download(s.dataset, s.data_root)
    barrier()
    data = open_dataset(s.dataset, s.data_root, s.train_split, classes, s.seed, s.labels,
                        s.labels_offset)
    s.classes = data.classes
    if s.pooling == "cosine" and max(name_counts(s.classes)) > 1:
        raise UserError("--pooling cosine is for classes of one name each")
    model = load_clip(s.clip, s.activation, device, s.heads)
    s.surgery = args.surgery or usual_surgery(model, s.surgery)
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
        if not run.finished:
            Wq = query_features(model, data.classes)
            run.learner = rectifier = make_rectifier(model, data.classes, Wq, s).to(device)
            if s.bias == "none" and not s.decoder:  # MaskCLIP has nothing to learn
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
    leave_processes()
