"""Distil a rectified CLIP into DeepLabV2, which needs no CLIP afterwards and segments better.

    python distill.py                                  the newest rectified checkpoint under runs/
    python distill.py --teacher runs/voc/reclip.pt     any other; a MaskCLIP one gives MaskCLIP+

Wang and Kang, ReCLIP++ (2024), Sec. III-E; tables and equations below are that paper's, those of
"ReCLIP" the CVPR 2024 paper's. Data set, classes and CLIP are those of the teacher's checkpoint.
Network, head, losses, teacher, recipe, one training step and the loop; then the command.

Shapes: B images, C classes, D joint channels of CLIP, h×w cells of a grid, H×W pixels. The
teacher's features are Z (one cell a patch), the student's Ẑ (one for 8×8 pixels; in code Z_hat).
"""

import argparse
import copy
import http.client
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from clip.weights import read_state_dict
from data import (IMAGENET_MEAN, IMAGENET_STD, VOID, Parser, TrainingViews, UserError, barrier,
                  cached_views, clean_exit, count, draw_seed, fingerprint, make_folder, name_counts,
                  natural, normalise, open_dataset, padding, positive, seed_number, share,
                  user_path, world)
from reclip import (PAPER, ROWS, Decoder, PositionLogits, Run, best_name, classify,
                    contrastive_loss, gumbel_masks, gumbel_noise, head_denoising, interpolation,
                    label_map, load_checkpoint, make_hypotheses, masked_pooling, network_facts,
                    open_rectified, parallel, passed_on, pick_device, plain, prompt_denoising,
                    resized_positions, to_device, use_amp, views_on)

# ---- III-E  The student's network: DeepLabV2 (Chen et al., 2018), a dilated ResNet and ASPP ------

class ResNet(nn.Sequential):
    """ResNet (He et al., 2016) with dilated last stages: output stride 8 instead of 32.

    blocks: how many in each stage; width: channels of the stem, and of the first stage's 3×3
    convolutions. stem "deep": three 3×3 convolutions (v1c), with the state-dict keys of Open-MMLab;
    "plain": one of 7×7, with torchvision's keys. Blocks are torchvision's, with the stride in the
    3×3; the first of a dilated stage has half its dilation, as in Open-MMLab's DeepLab.
    forward: B×3×H×W → B×channels×⌈H/8⌉×⌈W/8⌉.
    """

    def __init__(self, blocks=(3, 4, 6, 3), stem="deep", width=64):
        from torchvision.models.resnet import Bottleneck  # takes seconds to import
        super().__init__()
        relu = nn.ReLU(inplace=True)
        if stem == "deep":
            half, layers = width // 2, []
            for a, b, stride in ((3, half, 2), (half, half, 1), (half, width, 1)):
                layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), relu]
            self.stem = nn.Sequential(*layers)
        else:
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.relu = relu
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        a = width
        for i, (n, stride, dilation) in enumerate(zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4))):
            inner = width * 2**i
            b = 4 * inner
            shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))
            stage = [Bottleneck(a, inner, stride, shortcut, dilation=max(1, dilation // 2))]
            stage += [Bottleneck(b, inner, dilation=dilation) for _ in range(n - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            a = b
        self.channels = a


class DeepLabV2(nn.Module):
    """ResNet and ASPP, whose branches (dilated convolution, BatchNorm, ReLU) are summed.

    forward: B×3×H×W, normalised → Ẑ, B×D×⌈H/8⌉×⌈W/8⌉.
    """

    def __init__(self, D, blocks=(3, 4, 6, 3), stem="deep", width=64, dilations=(6, 12, 18, 24)):
        super().__init__()
        self.backbone, self.aspp = ResNet(blocks, stem, width), nn.ModuleList()
        for d in dilations:
            conv = nn.Conv2d(self.backbone.channels, D, 3, padding=d, dilation=d, bias=False)
            parts = dict(conv=conv, bn=nn.BatchNorm2d(D), relu=nn.ReLU())
            self.aspp.append(nn.Sequential(OrderedDict(parts)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):
        x = self.backbone(images)
        return sum(branch(x) for branch in self.aspp)


STUDENTS = {
    "resnet50": dict(blocks=(3, 4, 6, 3)),
    "resnet101": dict(blocks=(3, 4, 23, 3)),
    "small": dict(blocks=(1, 2), width=16, dilations=(1, 3)),  # of the demo
}


def pretrained_backbone(source, student="resnet50"):
    """ImageNet weights for a student: the state dict of a ResNet, and which stem it has.

    source: "imagenet" (torchvision's, downloaded once) or the path of a file with the weights of
    torchvision's ResNet or of Open-MMLab's resnet50_v1c / resnet101_v1c. student: "resnet50" or
    "resnet101". Raises UserError for anything else, and for a failed download.
    """
    try:
        if source == "imagenet":
            import torchvision
            weights = torchvision.models.get_model_weights(student).IMAGENET1K_V1
            state = weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
        else:
            state = read_state_dict(user_path(source))
    except (ValueError, OSError, RuntimeError, http.client.HTTPException) as error:
        what = f"cannot download {weights.url}: " if source == "imagenet" else ""
        raise UserError(f"{what}{error}; --backbone is imagenet, none, or the path of a ResNet's "
                        "weights") from None
    state = {key.removeprefix("backbone."): v for key, v in state.items() if "fc." not in key}
    return state, "deep" if "stem.0.weight" in state else "plain"


def load_backbone(backbone, state, source):
    """Put a state dict into a ResNet; UserError, naming `source`, unless keys and shapes fit."""
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights in {source} are not those of this ResNet; --student "
                        f"(resnet50, resnet101) has to agree with the file: {reason}") from None


# ---- III-E  The head: inherited from the teacher, and frozen (Table IX; ReCLIP's Table 6) --------

def resample(x, patch, size, grid):
    """What covers whole patches, …×h'×w', cut to the image and on another grid: …×h×w (bilinear).

    patch: in pixels; size: (H, W) of the image, which the first rows and columns of patches cover.
    """
    def matrix(n, side, m):  # m×n; made anew, so that an exported student takes any size
        centres = (torch.arange(m, device=x.device) + 0.5) * side / m  # of the cells, in pixels
        place = (centres / patch - 0.5).clamp(0, n - 1)
        return (1 - (place[:, None] - torch.arange(n, device=x.device)).abs()).clamp(min=0)

    rows, columns = map(matrix, x.shape[-2:], size, grid)
    return rows @ x @ columns.T


class InheritedHead(nn.Module):
    """The teacher's Query, bias and decoder on the student's features; nothing of it is learned.

    parts: tensors by name, as `inherited_parts` takes them from a teacher, or a state dict of this
    class. Wq alone is the Query head. With Wr and Wp (on CLIP's own grid) ReCLIP++'s bias is
    subtracted, with Wr alone ReCLIP's Reference logits, with p and position.* its positional
    logits too; decoder.* follows. patch: the teacher's, in pixels; sign: -1, or +1 to add the bias;
    names: how many names each of the C classes has.
    """

    def __init__(self, parts, patch, sign=-1, names=None):
        super().__init__()
        self.patch, self.sign = patch, sign
        for name in ("Wq", "Wr", "Wp", "p"):
            self.register_buffer(name, parts.get(name))
        self.names, self.decoder, self.position = names or [1] * len(self.Wq), None, None
        C, D = len(self.names), self.Wq.shape[1]
        if "decoder.conv.weight" in parts:
            self.decoder = Decoder(D, C)
        if "position.0.weight" in parts:
            hidden = [len(parts[f"position.{i}.weight"]) for i in (0, 3)]
            self.position = PositionLogits(self.p.shape[1], C, hidden)
        self.load_state_dict(parts)
        self.requires_grad_(False)

    def resized(self, positions, size, grid, through=nn.Identity()):
        """What depends on position alone, 1×K×g×g on CLIP's own grid, on the student's grid.

        By way of the teacher's for images of size (H, W), bicubic as everywhere in ReCLIP (1×1
        convolutions commute with that, so Wp may stand for p), where `through` follows.
        """
        teachers = [-(-side // self.patch) for side in size]
        positions = through(F.interpolate(positions, teachers, mode="bicubic"))
        return resample(positions, self.patch, size, grid)

    def forward(self, Z_hat, size):
        """Logits B×C×h×w of features B×D×h×w, of any length, of images of size (H, W)."""
        Z, grid = F.normalize(Z_hat, dim=1), Z_hat.shape[2:]
        M = best_name(classify(Z, self.Wq), self.names)
        if self.Wp is not None:  # ReCLIP++, Eqs. 2 and 3
            M = M + self.sign * classify(self.resized(self.Wp, size, grid), self.Wr)
        elif self.Wr is not None:  # ReCLIP
            M = M + self.sign * classify(Z, self.Wr)
        if self.position is not None:
            M = M + self.sign * self.resized(self.p, size, grid, self.position)
        return M if self.decoder is None else self.decoder(Z, M)  # Eq. 4


class LearnedHead(nn.Conv2d):
    """The head that DeepLab learns for itself: a 1×1 convolution, the first row of Table IX."""

    def __init__(self, C, D):
        super().__init__(D, C, 1)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def forward(self, Z_hat, size):
        return super().forward(Z_hat)


@torch.no_grad()
def inherited_parts(teacher, kind="inherit"):
    """What a head of one kind takes over from a RectifiedCLIP, as the parts of an InheritedHead.

    "query": the Query alone. "query+bias": with the bias, and of ReCLIP's the positional part too.
    "inherit": as in the papers Query, bias and decoder, but of ReCLIP's bias the Reference alone.
    Raises UserError for query+bias of a teacher that extracts no bias (MaskCLIP).
    """
    rectifier, side = teacher.rectifier, teacher.model.visual.input_resolution // teacher.patch
    bias = "none" if kind == "query" else rectifier.kind
    if kind == "query+bias" and bias == "none":
        raise UserError("--head query+bias needs a teacher with a bias to subtract")
    parts, module = {"Wq": rectifier.Wq}, "decoder" if kind == "inherit" else None
    p = resized_positions(teacher.visual, side, side)  # CLIP's own grid: not resized at all
    if bias != "none":
        parts["Wr"] = teacher.Wr
    if bias == "independent":
        parts["Wp"] = rectifier.position(p)
    if bias == "joint" and kind == "query+bias":
        parts["p"], module = p, "position"
    return parts | {key: value for key, value in rectifier.state_dict().items()
                    if key.split(".")[0] == module}


class Student(nn.Module):
    """DeepLabV2 with a head; sees images in ImageNet's normalisation and needs no CLIP."""

    def __init__(self, network, head):
        super().__init__()
        # Convolutions are faster where a pixel's channels lie together, on CPUs and GPUs.
        self.network, self.head = network.to(memory_format=torch.channels_last), head

    def forward(self, images, sizes=None, amp=False):
        """Ẑ B×D×h×w and logits B×C×h×w, float32, of uint8 images B×3×H×W.

        sizes: int B×2, what is padding (see data.normalise), or None. The grid is ⌈H/8⌉×⌈W/8⌉ and
        covers the whole image; upsample it to (H, W).
        """
        images = normalise(images, IMAGENET_MEAN, IMAGENET_STD, sizes)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            Z_hat = self.network(images)
        Z_hat = Z_hat.float()
        return Z_hat, self.head(Z_hat, images.shape[2:])

    def train(self, mode=True):
        """Training mode is for the network: the decoder keeps to the statistics it came with."""
        super().train(mode)
        self.head.eval()
        return self


def load_student(path, device="cpu"):
    """A Student in eval mode, with `settings` and `classes`, of a checkpoint. Raises UserError."""
    checkpoint = load_checkpoint(path)
    if checkpoint["kind"] != "distill":
        raise UserError(f"{path} is not a student's checkpoint (distill.pt)")
    s, state = argparse.Namespace(**checkpoint["settings"]), checkpoint["state"]
    parts = {key.removeprefix("head."): v for key, v in state.items() if key.startswith("head.")}
    D, names = len(state["network.aspp.0.conv.weight"]), name_counts(checkpoint["classes"])
    head = (LearnedHead(len(names), D) if s.head == "learned" else
            InheritedHead(parts, s.patch, s.sign, names))
    student = Student(DeepLabV2(D, stem=s.stem, **STUDENTS[s.student]), head)
    student.load_state_dict(state)
    student.settings, student.classes = s, checkpoint["classes"]
    return student.to(device).eval().requires_grad_(False)


# ---- III-E  The three losses ---------------------------------------------------------------------

def upsample(x, size):
    """F.interpolate(x, size, mode="bilinear"), …×h×w → …×H×W, by two matrix products: faster, and
    the same bits on every run of a GPU.
    """
    rows, columns = (interpolation(n, m, m, m, x.device) for n, m in zip(x.shape[-2:], size))
    return rows @ (x @ columns.T)


def to_cells(x, grid):
    """The transpose of `upsample`, …×H×W → …×h×w: Σ upsample(a)·b over pixels is Σ a·to_cells(b)
    over cells, so large a need not be upsampled.
    """
    rows, columns = (interpolation(n, m, m, m, x.device) for n, m in zip(grid, x.shape[-2:]))
    return (rows.T @ x) @ columns


def mask_loss(logits, labels):
    """Eq. 8: cross-entropy of the student's upsampled logits against the teacher's labels.

    logits: B×C×h×w; labels: int64 B×H×W, VOID (255) where a pixel is ignored. Mean over the pixels
    that are not ignored; 0 if there is none.
    """
    loss = F.cross_entropy(upsample(logits, labels.shape[1:]), labels, ignore_index=VOID,
                           reduction="sum")
    return loss / (labels != VOID).sum().clamp(min=1)


def feature_loss(Z, Z_hat, valid):
    """Eq. 9: L1 distance of the teacher's and the student's features, both upsampled to pixels.

    Z: B×D×h'×w' and Z_hat: B×D×h×w, neither of unit length; valid: bool B×H×W, the pixels that
    count. Mean over those pixels and the channels.

    As |x| = sign(x)·x and upsampling is linear, Σ|Ẑ − Z| over pixels is Σ Ẑ·T(s) − Σ Z·T(s) over
    cells, with s the sign at each pixel, a constant, and T the transpose of upsampling. So the loss
    and its gradient are exact, and at most one image's features are ever as large as its pixels.
    """
    maps = [Z_hat - Z] if Z_hat.shape == Z.shape else [Z_hat, -Z]
    with torch.no_grad():
        plain = [part.contiguous() for part in maps]
        weights = [torch.empty_like(part) for part in plain]  # T(s)
        # On a CPU a megabyte of channels at a time, which its cache holds.
        chunk = max(1, 2**18 // valid[0].numel()) if valid.device.type == "cpu" else Z.shape[1]
        for b, counts in enumerate(valid):
            for first in range(0, Z.shape[1], chunk):
                part = (b, slice(first, first + chunk))
                sign = upsample(plain[0][part], counts.shape)
                for x in plain[1:]:
                    sign += upsample(x[part], counts.shape)
                sign.sign_().mul_(counts)
                for T in weights:
                    T[part] = to_cells(sign, T.shape[2:])
    total = sum((part * T).sum() for part, T in zip(maps, weights))
    return total / (valid.sum().clamp(min=1) * Z.shape[1])


def label_masks(labels, C, grid):
    """Labels B×H×W as masks of C classes on a grid, B×C×h×w; ignored pixels are in none.

    Pooling features with them is pooling the upsampled features with the masks of the pixels.
    """
    scale = grid[0] * grid[1] / labels[0].numel()  # 1 where a mask covers the whole neighbourhood
    classes = torch.arange(C, device=labels.device)[:, None, None]
    return torch.stack([to_cells((label == classes).float(), grid) for label in labels]) * scale


def text_loss(Z_hat, masks, Wq, hypothesis, tau=0.01, names=None):
    """Sec. III-E: the contrastive loss of rectification (Eq. 7) on the student's features.

    Z_hat: B×D×h×w, of unit length as in the head (otherwise τ = 0.01 makes it explode); masks:
    B×C×h×w; Wq: C×D; hypothesis: bool B×C; names: how many each class has.
    """
    Mq = best_name(classify(Z_hat, Wq), names or [1] * len(Wq))
    return contrastive_loss(masked_pooling(masks, Mq), hypothesis, tau)


# ---- The teacher, and what it says of a view -----------------------------------------------------

@torch.no_grad()
def teach(teacher, views, sizes, pd=None, pd_temperature=0.1, amp=False):
    """The teacher's features and labels of training views.

    teacher: RectifiedCLIP; views: uint8 B×3×H×W; sizes: int64 B×2, (h, w) of what is not padding.
    pd: prompt denoising of the labels, at pd_temperature. Returns Z, float32 B×D×h×w, not of unit
    length, and labels, int64 B×H×W with VOID for padding.
    """
    features, size = teacher.encode(views, sizes, amp), views.shape[2:]
    padded = [side * teacher.patch for side in features.shape[2:]]
    logits = teacher.rectifier(*teacher.inputs(features), teacher.Wr)[1]
    logits = prompt_denoising(logits, pd, pd_temperature)
    labels = label_map(logits, padded, size, size).masked_fill(padding(sizes, *size), VOID)
    return resample(features, teacher.patch, size, features.shape[2:]), labels


class ViewsWithGroundTruthVoid(TrainingViews):
    """TrainingViews whose batches also tell `void`, bool B×crop×crop: what the labels leave out.

    This opens labels. The same seed makes the same random view of both.
    """

    def batch(self, keys):
        void = copy.copy(self.data)  # its images: the void pixels, white on black
        void.image = lambda i: 255 * (self.data.label(i) == VOID).to(torch.uint8).expand(3, -1, -1)
        views = TrainingViews(void, self.scale, self.crop, self.ratio, False, self.seed)
        return super().batch(keys) | dict(void=views.batch(keys)["view"][:, 0] > 127)


# ---- Training: the recipe (IV-A), one step, and the loop -----------------------------------------

ALWAYS = dict(
    student="resnet50", backbone="imagenet", ratio=(0.5, 2.0), distort=True,
    batch=16, optimizer="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, power=0.9, floor=1e-4,
    weights=dict(mask=1.0, feature=0.5, text=0.5), tau=0.01,  # 1, α, β
    views=0,  # fresh augmentation in every epoch
)
EPOCHS = {"voc": 100, "context": 150, "ade": 150, "cityscapes": 100, "stuff": 50}
DEMO = dict(student="small", backbone="none", ratio=(1.0, 1.0), distort=False, scale=(96, 96),
            crop=96, views=2, epochs=20, optimizer="adamw", lr=3e-3, weight_decay=0.05)
LOSSES = ("mask", "feature", "text")


def recipe(dataset, bias="independent", decoder=True):
    """The published settings for a data set and a teacher as a dict; `folder` uses VOC's.

    bias, decoder: the teacher's, whose labels are denoised as its logits ask for.
    """
    row = ROWS.get(dataset, dataset)
    s = ALWAYS | dict(losses=LOSSES if decoder or bias != "none" else ("mask",))  # MaskCLIP+
    s["pd"], s["pd_temperature"] = head_denoising(row, bias, decoder,
                                                  0.95 if row in ("voc", "stuff") else None)
    if row == "shapes":
        return s | DEMO
    scale, crop = PAPER[row][:2]
    return s | dict(scale=scale, crop=crop, epochs=EPOCHS[row])


def distillation_losses(logits, Z_hat, Z, labels, Wq, names, hypothesis=None, noise=None,
                        losses=LOSSES, tau=0.01, mask_temperature=0.01):
    """One training step: what student and teacher say of B views → {loss: 0-dim tensor}.

    logits: B×C×h×w and Z_hat: B×D×h×w, the student's; Z: B×D×h'×w' and labels: B×H×W, the
    teacher's; Wq: C×D; names: as in `best_name`; hypothesis: bool B×C, or None for the classes in
    the labels; noise: Gumbel noise B×C×h×w for the student's masks, or None for the teacher's.
    """
    found, valid, weight = {}, labels != VOID, 1.0
    if world() > 1:  # by its share of the pixels: so DDP's mean is that of all pixels
        pixels = valid.sum().float()
        dist.all_reduce(everyone := pixels.clone())
        weight = pixels * world() / everyone.clamp(min=1)
    if "mask" in losses:
        found["mask"] = weight * mask_loss(logits, labels)
    if "feature" in losses:
        found["feature"] = weight * feature_loss(Z, Z_hat, valid)
    if "text" in losses:
        masks = label_masks(labels, len(names), Z_hat.shape[2:])
        present = masks.flatten(2).any(2) if hypothesis is None else hypothesis
        if noise is not None:  # and none where the teacher's labels ignore pixels
            masks = gumbel_masks(logits, mask_temperature, noise) * masks.sum(1, keepdim=True)
        found["text"] = text_loss(F.normalize(Z_hat, dim=1), masks, Wq, present, tau, names)
    return found


def train(s, data, teacher, student, hypothesis, run, device):
    """Teach `student` what `teacher` sees in `data` (Sec. III-E).

    s, data, run: as in reclip.train; of data only images are opened, unless
    s.use_ground_truth_void; hypothesis: as there, or None for the classes in the teacher's labels.
    """
    learned = [parameter for parameter in student.parameters() if parameter.requires_grad]
    options = dict(lr=s.lr, weight_decay=s.weight_decay, fused=True)
    optimizer = (torch.optim.SGD(learned, momentum=s.momentum, **options) if s.optimizer == "sgd"
                 else torch.optim.AdamW(learned, **options))
    Views = ViewsWithGroundTruthVoid if s.use_ground_truth_void else TrainingViews
    views = Views(data, s.scale, s.crop, s.ratio, s.distort, s.student_seed)

    def taught(batch):
        """A batch of views on the device, with the teacher's Z and labels, in small types."""
        view, size = views_on(device, batch)
        Z, labels = teach(teacher, view, size, s.pd, s.pd_temperature, s.amp)
        if s.use_ground_truth_void:
            labels = labels.masked_fill(to_device(batch["void"], device), VOID)
        return dict(view=view, size=size.short(),
                    Z=Z.half() if s.views else Z, labels=labels.to(torch.uint8))

    Wq, names = teacher.rectifier.Wq, teacher.rectifier.names
    if s.views:  # what a frozen teacher says of a view need be asked only once
        facts = network_facts(teacher.model, s) | dict(
            teacher=s.teacher_weights, pd=s.pd, pd_temperature=s.pd_temperature,
            ground_truth_void=s.use_ground_truth_void)
        cells = -(-s.crop // teacher.patch)
        fields = dict(view=(np.uint8, (3, s.crop, s.crop)), size=(np.int16, (2,)),
                      Z=(np.float16, (Wq.shape[1], cells, cells)),
                      labels=(np.uint8, (s.crop, s.crop)))
        views = cached_views(views, s.views, s.cache, "views-distill", facts, fields, taught,
                             s.workers)
    network = parallel(student.train(), device)
    for epoch, batch in run.steps(optimizer, views.batch, s.batch, s.epochs, s.student_seed,
                                  s.workers):
        for group in optimizer.param_groups:
            group["lr"] = max(s.floor, s.lr * (1 - epoch / s.epochs) ** s.power)
        seeds = [draw_seed(s.student_seed, epoch, data.ids[i], "gumbel")
                 for i in batch["index"].tolist()]
        present, noise = hypothesis and to_device(hypothesis(batch["index"]), device), None
        batch = ({key: to_device(value, device) for key, value in batch.items()} if s.views else
                 taught(batch))
        Z_hat, logits = network(batch["view"], batch["size"], s.amp)
        if s.text_masks == "student":
            noise = gumbel_noise(logits.shape[1:], seeds, device)
        losses = distillation_losses(logits, Z_hat, batch["Z"].float(), batch["labels"].long(), Wq,
                                     names, present, noise, s.losses, s.tau, s.mask_temperature)
        loss = sum(s.weights[name] * value for name, value in losses.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.after(loss, **losses)


# ---- The command ---------------------------------------------------------------------------------

def checkpoint_in(path, *names):
    """The path of a checkpoint, or the first of `names` in the folder of a run; else UserError."""
    found = [path / name for name in names if (path / name).is_file()] if path.is_dir() else [path]
    if not found:
        raise UserError(f"{path} is a folder without {' or '.join(names)}")
    return found[0]


def hypotheses_in(*folders):
    """The first of the folders that holds hypotheses, else the last."""
    return next((one for one in folders if any(one.glob("hypotheses-*.npy"))), folders[-1])


def find_teacher(path, device="cpu", source=None):
    """RectifiedCLIP of a finished checkpoint of reclip.py, and the checkpoint's path.

    path: of the file or its folder, None for the newest rectified one under runs/; source: where
    its CLIP is, if not where it was. Raises UserError.
    """
    newest = sorted(Path("runs").glob("*/reclip.pt"), key=lambda file: -file.stat().st_mtime)
    path = path or next((file for file in newest if
                         load_checkpoint(file)["settings"]["method"] != "maskclip"), None)
    if path is None:
        raise UserError("no rectified checkpoint under runs/; run python reclip.py first, or name "
                        "a teacher with --teacher")
    path = checkpoint_in(path, "reclip.pt")
    checkpoint = load_checkpoint(path)
    if checkpoint["kind"] == "distill":
        raise UserError(f"{path} is a student; a teacher is a checkpoint of reclip.py (reclip.pt)")
    if not checkpoint["finished"]:
        raise UserError(f"the training of {path} is not finished; repeat its reclip.py command, "
                        "which goes on where it stopped")
    return open_rectified(path, device, source), path


def make_student(s, teacher, device):
    """A Student as the settings want it, with ImageNet weights if any; sets s.stem."""
    torch.manual_seed(s.student_seed)
    state, s.stem = None, "plain" if s.student == "small" else "deep"
    if s.backbone != "none":
        state, s.stem = pretrained_backbone(s.backbone, s.student)
    D, names = teacher.rectifier.Wq.shape[1], teacher.rectifier.names
    network = DeepLabV2(D, stem=s.stem, **STUDENTS[s.student])
    if state is not None:
        load_backbone(network.backbone, state, s.backbone)
    head = (LearnedHead(len(names), D) if s.head == "learned" else
            InheritedHead(inherited_parts(teacher, s.head), s.patch, s.sign, names))
    return Student(network, head).to(device)


def parse_arguments(argv):
    """The command line as a namespace; what is not given is None."""
    parser = Parser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--teacher", type=user_path, help="a checkpoint of reclip.py (default: the newest)")
    flag("--data-root", type=user_path, help="where the teacher's data set is, if not where it was")
    flag("--clip", help="where the teacher's CLIP is, if not where it was")
    flag("--out", type=user_path, help="the student's folder (default: the teacher's)")
    flag("--cache", type=user_path, help="folder for views (default: the student's)")
    flag("--seed", dest="student_seed", type=seed_number, help="default: the teacher's")
    flag("--device", help="default: cuda, else mps, else cpu")
    flag("--amp", action=argparse.BooleanOptionalAction, help="bf16 networks (default: on a GPU)")
    flag("--workers", type=natural, help="threads that read images (default: as the teacher's)")
    flag = parser.add_argument_group("values of the recipe (default: as published)").add_argument
    flag("--student", choices=tuple(STUDENTS), help="MaskCLIP+'s own was resnet101")
    flag("--backbone", help="ImageNet weights: imagenet (torchvision's, downloaded), none, or a "
         "file in torchvision's or Open-MMLab's v1c layout")
    flag("--losses", help="some of mask,feature,text (default: all; for a MaskCLIP teacher mask)")
    flag("--head", choices=("inherit", "query", "query+bias", "learned"), default="inherit")
    flag("--text-masks", choices=("student", "teacher"), default="student", help="of the text loss")
    flag("--use-ground-truth-void", action="store_true", help="NOT unsupervised: open the training "
         "labels and leave out what they call void or background, as the authors' program does")
    flag("--pd", type=share, help="prompt denoising of the teacher (0: none)")
    flag("--views", type=natural, metavar="K", help="of an image, asked about once; 0: fresh ones")
    flag("--epochs", type=count)
    flag("--batch", type=count)
    flag("--lr", type=positive)
    return parser.parse_args(argv)


def settings_of(args, teacher):
    """The teacher's settings, recipe and command line together, as a namespace of plain values.

    s.seed stays the teacher's, from which the demo's images are drawn. Raises UserError.
    """
    given = {key: value for key, value in vars(args).items() if value is not None}
    if args.losses is not None:
        given["losses"] = [name.strip() for name in args.losses.split(",")]
    t, learned = teacher.settings, sorted(teacher.rectifier.state_dict().items())
    own = dict(patch=teacher.patch, student_seed=t.seed,
               teacher_weights=fingerprint(*(part for pair in learned for part in pair)))
    s = argparse.Namespace(**vars(t) | recipe(t.dataset, t.bias, t.decoder) | own | given)
    if not set(s.losses) <= set(LOSSES):
        raise UserError(f"--losses {args.losses}: expected some of {','.join(LOSSES)}")
    s.losses = [name for name in LOSSES if name in s.losses]
    if s.head == "learned" and "mask" not in s.losses:
        raise UserError("--head learned can only learn from the mask loss; add mask to --losses")
    if s.student == "small" and s.backbone != "none":
        raise UserError("--student small has no ImageNet weights; use --backbone none")
    return s


@clean_exit
def main(argv=None):
    args = parse_arguments(argv)
    device = pick_device(args.device)
    teacher, path = find_teacher(args.teacher, device, args.clip)
    s = settings_of(args, teacher)
    s.teacher, s.out, s.device = path, args.out or path.parent, str(device)
    s.cache, s.amp = args.cache or s.out, use_amp(args.amp, device)
    data = open_dataset(s.dataset, s.data_root, s.train_split,
                        teacher.classes if s.dataset == "folder" else None, s.seed, s.labels,
                        s.labels_offset)
    if s.use_ground_truth_void and not data.has_labels:
        raise UserError(f"--use-ground-truth-void: {s.dataset} has no training labels")
    student = make_student(s, teacher, device)
    print("  ".join(f"{key}={value}" for key, value in plain(s).items() if key != "classes"))
    print(f"{data.name}: {len(data)} training images, {len(data.classes)} classes → {s.out}/")
    make_folder(s.out)
    run = Run(s.out / "distill.pt", s, data, teacher.model, student, "log-distill.jsonl", "distill")
    if not run.finished:
        hypothesis = None
        if "text" in s.losses and s.hypothesis != "none":
            folder = hypotheses_in(path.parent, Path(teacher.settings.cache), s.cache)
            hypothesis = make_hypotheses(data, teacher.model, teacher.rectifier.Wq, s, folder,
                                         device)
        train(s, data, teacher, student, hypothesis, run, device)
    barrier()  # the checkpoint is there
    import evaluate  # which needs this module; it sees the checkpoints only
    evaluate.main(["--checkpoint", str(run.path), *passed_on(s)])


if __name__ == "__main__":
    main()
