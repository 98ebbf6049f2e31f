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
import functools
import http.client
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from clip.weights import read_state_dict
from data import (IMAGENET_MEAN, IMAGENET_STD, TrainingViews, draw_seed, name_counts, normalise,
                  open_dataset, padding)
from files import (VOID, Parser, UserError, clean_exit, count, fingerprint, make_folder, natural,
                   path as user_path, positive, read_ahead, seed as seed_number, share)
from maps import label_map, prompt_denoising, resample, to_cells, upsample
from reclip import (PAPER, ROWS, Decoder, PositionLogits, best_name, classify, contrastive_loss,
                    gumbel_masks, gumbel_noise, head_denoising, hypotheses_folder,
                    make_hypotheses, masked_pooling, open_rectified, resized_positions)
from run import (Batches, Run, as_checkpoint, barrier, checkpoint_in, folder_lock,
                 leave_processes, load_backbone, load_checkpoint, make_views,
                 mean_over_processes, network_facts, one_first, parallel, passed_on, pick_device,
                 plain, to_device, use_amp, views_on, world)

# ------------------------------------------------------------------------------------------------
# III-E  The student's network: DeepLabV2 (Chen et al., 2018) = dilated ResNet + summed ASPP


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution beside a shortcut (He et al., 2016); the stride is in the 3×3.

    forward: B×in_channels×h×w → B×(4·width)×⌈h/stride⌉×⌈w/stride⌉. A block with `downsample`
    brings the shortcut to that shape.
    """

    def __init__(self, in_channels, width, stride=1, dilation=1, downsample=False):
        super().__init__()
        out = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(in_channels, out, 1, stride, bias=False),
                                        nn.BatchNorm2d(out)) if downsample else nn.Identity()

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Sequential):
    """ResNet with dilated last stages: output stride 8 instead of 32.

    blocks: how many in each stage; width: channels of the stem, and of the first stage's 3×3
    convolutions. stem "deep": three 3×3 convolutions (v1c), with the state-dict keys of Open-MMLab;
    "plain": one of 7×7, with torchvision's keys. The first block of a dilated stage has half the
    stage's dilation, as in Open-MMLab's DeepLab.
    forward: B×3×H×W → B×channels×⌈H/8⌉×⌈W/8⌉.
    """

    def __init__(self, blocks=(3, 4, 6, 3), stem="deep", width=64):
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
        channels = width
        for i, (count, stride, dilation) in enumerate(zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4))):
            inner = width * 2**i
            stage = [Bottleneck(channels, inner, stride, max(1, dilation // 2), downsample=True)]
            channels = 4 * inner
            stage += [Bottleneck(channels, inner, 1, dilation) for _ in range(count - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.channels = channels


class Branch(nn.Module):
    """One branch of ASPP: dilated 3×3 convolution, BatchNorm, ReLU. B×a×h×w → B×b×h×w."""

    def __init__(self, a, b, dilation):
        super().__init__()
        self.conv = nn.Conv2d(a, b, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(b)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class DeepLabV2(nn.Module):
    """ResNet and ASPP, whose branches are summed: B×3×H×W, normalised → Ẑ, B×D×⌈H/8⌉×⌈W/8⌉."""

    def __init__(self, D, blocks=(3, 4, 6, 3), stem="deep", width=64, dilations=(6, 12, 18, 24)):
        super().__init__()
        self.backbone = ResNet(blocks, stem, width)
        self.aspp = nn.ModuleList(Branch(self.backbone.channels, D, d) for d in dilations)
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
            name = student.replace("resnet", "ResNet") + "_Weights"
            weights = getattr(torchvision.models, name).IMAGENET1K_V1
            state = weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
        else:
            state = read_state_dict(source)
    except FileNotFoundError:
        raise UserError(f"no file {source}; --backbone is imagenet, none, or the path of a "
                        "ResNet's weights") from None
    except ValueError as error:
        raise UserError(f"{error} (--backbone takes the weights of a ResNet)") from None
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        if source != "imagenet":
            raise
        raise UserError(f"cannot download {weights.url} ({error}); try again, fetch it by hand "
                        "and give its path to --backbone, or use --backbone none") from None
    state = {key.removeprefix("backbone."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    return state, "deep" if "stem.0.weight" in state else "plain"


# ------------------------------------------------------------------------------------------------
# III-E  The head: inherited from the teacher, and frozen (Table IX; ReCLIP's Table 6)


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
        if any(key.startswith("decoder.") for key in parts):
            self.decoder = Decoder(D, C)
        if "position.0.weight" in parts:
            hidden = [len(parts[f"position.{i}.weight"]) for i in (0, 3)]
            self.position = PositionLogits(self.p.shape[1], C, hidden)
        self.load_state_dict(parts)
        self.requires_grad_(False)

    def resized(self, positions, size, grid, through=nn.Identity()):
        """What depends on position alone, on the student's grid, by way of the teacher's.

        positions: 1×K×g×g on CLIP's own grid; size: (H, W) of the images; grid: the student's.
        The teacher's grid comes bicubically, as everywhere in ReCLIP; 1×1 convolutions commute with
        that, so Wp may be kept instead of p. `through` follows on the teacher's grid, whose whole
        patches may cover more than the image: that is cut off.
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
    rectifier = teacher.rectifier
    if kind == "query+bias" and rectifier.kind == "none":
        raise UserError("--head query+bias needs a teacher with a bias to subtract")
    parts, modules = {"Wq": rectifier.Wq}, []
    side = teacher.model.visual.input_resolution // teacher.patch
    p = resized_positions(teacher.visual, side, side)  # CLIP's own grid: not resized at all
    if kind != "query" and rectifier.kind != "none":
        parts["Wr"] = teacher.Wr
    if kind != "query" and rectifier.kind == "independent":
        parts["Wp"] = rectifier.position(p)
    if kind == "query+bias" and rectifier.kind == "joint":
        parts["p"], modules = p, ["position"]
    if kind == "inherit" and hasattr(rectifier, "decoder"):
        modules = ["decoder"]
    for name in modules:
        state = getattr(rectifier, name).state_dict()
        parts |= {f"{name}.{key}": value for key, value in state.items()}
    return parts


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
    with as_checkpoint(path):
        s, state = argparse.Namespace(**checkpoint["settings"]), checkpoint["state"]
        parts = {key.removeprefix("head."): v for key, v in state.items() if key[:5] == "head."}
        D, names = len(state["network.aspp.0.conv.weight"]), name_counts(checkpoint["classes"])
        head = (LearnedHead(len(names), D) if s.head == "learned" else
                InheritedHead(parts, s.patch, s.sign, names))
        student = Student(DeepLabV2(D, stem=s.stem, **STUDENTS[s.student]), head)
        student.load_state_dict(state)
        student.settings, student.classes = s, checkpoint["classes"]
    return student.to(device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# III-E  The three losses


def mask_loss(logits, labels, count=None):
    """Eq. 8: cross-entropy of the student's upsampled logits against the teacher's labels.

    logits: B×C×h×w; labels: int64 B×H×W, VOID (255) where a pixel is ignored. Mean over the pixels
    that are not ignored; 0 if there is none. count: divide by this instead of their number.
    """
    loss = F.cross_entropy(upsample(logits, labels.shape[1:]), labels, ignore_index=VOID,
                           reduction="sum")
    return loss / ((labels != VOID).sum().clamp(min=1) if count is None else count)


def feature_loss(Z, Z_hat, valid, count=None):
    """Eq. 9: L1 distance of the teacher's and the student's features, both upsampled to pixels.

    Z: B×D×h'×w' and Z_hat: B×D×h×w, neither of unit length; valid: bool B×H×W, the pixels that
    count. Mean over those pixels and the channels. count: as in `mask_loss`.

    As |x| = sign(x)·x and upsampling is linear, Σ|Ẑ − Z| over pixels is Σ Ẑ·T(s) − Σ Z·T(s) over
    cells, with s the sign at each pixel, a constant, and T the transpose of upsampling. So the loss
    and its gradient are exact, and at most one image's features are ever as large as its pixels.
    """
    maps = [Z_hat - Z] if Z_hat.shape == Z.shape else [Z_hat, -Z]
    with torch.no_grad():
        plain = [part.contiguous() for part in maps]
        weights = [torch.empty_like(part) for part in plain]  # T(s)
        # On a CPU a megabyte of channels at a time, which its cache holds.
        channels = max(1, 2**18 // valid[0].numel()) if valid.device.type == "cpu" else Z.shape[1]
        for *parts, counts in zip(*plain, *weights, valid):
            for rows in zip(*(part.split(channels) for part in parts)):
                xs, Ts = rows[: len(maps)], rows[len(maps):]
                sign = upsample(xs[0], counts.shape)
                for x in xs[1:]:
                    sign += upsample(x, counts.shape)
                sign.sign_().mul_(counts)
                for T in Ts:
                    T.copy_(to_cells(sign, T.shape[1:]))
    total = sum((part * T).sum() for part, T in zip(maps, weights))
    return total / ((valid.sum().clamp(min=1) if count is None else count) * Z.shape[1])


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
    B×C×h×w, by `label_masks` or `gumbel_masks`; Wq: C×D; hypothesis: bool B×C; names: how many
    each class has.
    """
    Mq = best_name(classify(Z_hat, Wq), names or [1] * len(Wq))
    similarities = masked_pooling(masks, Mq)
    return contrastive_loss(similarities, hypothesis, tau)


# ------------------------------------------------------------------------------------------------
# The teacher, and what it says of a view


@torch.no_grad()
def teach(teacher, views, sizes, pd=None, pd_temperature=0.1, ignore_below=None, amp=False):
    """The teacher's features and labels of training views.

    teacher: RectifiedCLIP; views: uint8 B×3×H×W; sizes: int64 B×2, (h, w) of what is not padding.
    pd: prompt denoising of the labels, at pd_temperature. ignore_below: also ignore pixels where
    the greatest softmax(logits / pd_temperature), upsampled, is below it. Returns Z, float32
    B×D×h×w, not of unit length, and labels, int64 B×H×W with VOID for padding and what is ignored.
    """
    features, size = teacher.encode(views, sizes, amp), views.shape[2:]
    padded = [side * teacher.patch for side in features.shape[2:]]
    logits = prompt_denoising(teacher.logits(features)[1], pd, pd_temperature)
    outside = padding(sizes, *size)
    if ignore_below is not None:
        confidence = (logits / pd_temperature).softmax(1).amax(1)
        outside |= upsample(confidence, padded)[:, : size[0], : size[1]] < ignore_below
    labels = label_map(logits, padded, size, size).masked_fill(outside, VOID)
    return resample(features, teacher.patch, size, features.shape[2:]), labels


def void_image(data, index):
    """The void pixels of an image's ground truth, white on black: uint8 3×H×W."""
    return (data.label(index) == VOID).to(torch.uint8).mul(255).expand(3, -1, -1)


class ViewsWithGroundTruthVoid(TrainingViews):
    """TrainingViews whose items also tell `void`, bool crop×crop: what the labels leave out.

    This opens labels. The same seed makes the same random view of both.
    """

    def __init__(self, data, scale, crop, ratio, distort, seed):
        super().__init__(data, scale, crop, ratio, distort, seed)
        void = copy.copy(data)
        void.image = functools.partial(void_image, data)
        self.void = TrainingViews(void, scale, crop, ratio, False, seed)

    def __getitem__(self, key):
        return super().__getitem__(key) | {"void": self.void[key]["view"][0] > 127}


# ------------------------------------------------------------------------------------------------
# The recipe (IV-A and README, Results)

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


# ------------------------------------------------------------------------------------------------
# Training: one step, and the loop


def distillation_losses(logits, Z_hat, Z, labels, Wq, names, hypothesis=None, noise=None,
                        losses=LOSSES, tau=0.01, mask_temperature=0.01, share=1.0):
    """One training step: what student and teacher say of B views → {loss: 0-dim tensor}.

    logits: B×C×h×w and Z_hat: B×D×h×w, the student's; Z: B×D×h'×w' and labels: B×H×W, the
    teacher's; Wq: C×D; names: as in `best_name`; hypothesis: bool B×C, or None for the classes in
    the labels of a view; noise: Gumbel noise B×C×h×w for masks of the student's own, or None for
    the teacher's (--text-masks); losses: which; share: of a global batch, relative to the mean.
    """
    found, valid = {}, labels != VOID
    # Divided by the processes' mean count, DDP's mean gradient is that of the mean of all pixels.
    pixels = mean_over_processes(valid.sum().float()).clamp(min=1)
    if "mask" in losses:
        found["mask"] = mask_loss(logits, labels, pixels)
    if "feature" in losses:
        found["feature"] = feature_loss(Z, Z_hat, valid, pixels)
    if "text" in losses:
        masks = label_masks(labels, len(names), Z_hat.shape[2:])
        present = masks.flatten(2).any(2) if hypothesis is None else hypothesis
        if noise is not None:  # and none where the teacher's labels ignore pixels
            masks = gumbel_masks(logits, mask_temperature, noise) * masks.sum(1, keepdim=True)
        Z_unit = F.normalize(Z_hat, dim=1)
        found["text"] = share * text_loss(Z_unit, masks, Wq, present, tau, names)
    return found


def train(s, data, teacher, student, hypothesis, run, device):
    """Teach `student` what `teacher` sees in `data` (Sec. III-E).

    s, data, run: as in reclip.train; of data only images are opened, unless
    s.use_ground_truth_void; hypothesis: as there, the teacher's own, or None for a teacher without:
    then the classes in its labels of a view.
    """
    learned = [parameter for parameter in student.parameters() if parameter.requires_grad]
    options = dict(lr=s.lr, weight_decay=s.weight_decay, fused=True)
    optimizer = (torch.optim.SGD(learned, momentum=s.momentum, **options) if s.optimizer == "sgd"
                 else torch.optim.AdamW(learned, **options))
    batches = run.start(optimizer, Batches(len(data), s.batch, s.epochs, s.student_seed))
    Views = ViewsWithGroundTruthVoid if s.use_ground_truth_void else TrainingViews
    views = Views(data, s.scale, s.crop, s.ratio, s.distort, s.student_seed)

    def taught(batch):
        """A batch of views on the device, with the teacher's Z and labels, in small types."""
        view, size = views_on(device, batch)
        Z, labels = teach(teacher, view, size, s.pd, s.pd_temperature, s.ignore_below, s.amp)
        if s.use_ground_truth_void:
            labels = labels.masked_fill(to_device(batch["void"], device), VOID)
        return dict(view=view, size=size.short(),
                    Z=Z.half() if s.views else Z, labels=labels.to(torch.uint8))

    Wq, names = teacher.rectifier.Wq, teacher.rectifier.names
    if s.views and len(batches):  # what a frozen teacher says of a view need be asked only once
        facts = {key: getattr(s, key) for key in ("teacher_weights", "pd", "pd_temperature",
                                                  "ignore_below", "use_ground_truth_void")}
        facts |= network_facts(teacher.model, teacher.settings)
        cells = -(-s.crop // teacher.patch)
        fields = dict(view=(np.uint8, (3, s.crop, s.crop)), size=(np.int16, (2,)),
                      Z=(np.float16, (Wq.shape[1], cells, cells)),
                      labels=(np.uint8, (s.crop, s.crop)))
        views = make_views(views, s, "views-distill", facts, fields, taught)
    network = parallel(student.train(), device)
    with run:
        for step, batch in run.steps(read_ahead(views, batches, s.workers)):
            epoch, indices = step // batches.per_epoch, batch["index"]
            for group in optimizer.param_groups:
                group["lr"] = max(s.floor, s.lr * (1 - epoch / s.epochs) ** s.power)
            batch = ({key: to_device(value, device) for key, value in batch.items()} if s.views else
                     taught(batch))
            labels, present, noise = batch["labels"].long(), None, None
            if not batches.weight(step):  # of several processes one that has no image left
                labels.fill_(VOID)
            Z_hat, logits = network(batch["view"], batch["size"], s.amp)
            if hypothesis is not None:
                present = to_device(hypothesis(indices), device)
            if s.text_masks == "student" and "text" in s.losses:
                seeds = [draw_seed(s.student_seed, epoch, data.ids[i], "gumbel")
                         for i in indices.tolist()]
                noise = gumbel_noise(logits.shape[1:], seeds, device)
            losses = distillation_losses(logits, Z_hat, batch["Z"].float(), labels, Wq, names,
                                         present, noise, s.losses, s.tau, s.mask_temperature,
                                         batches.weight(step))
            loss = sum(s.weights[name] * value for name, value in losses.items())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.after(step + 1, optimizer, len(labels), loss, **losses)


# ------------------------------------------------------------------------------------------------
# The command


def find_teacher(path, device="cpu", source=None):
    """RectifiedCLIP of a finished checkpoint of reclip.py, and the checkpoint's path.

    path: of the file or its folder, or None for the newest rectified one under runs/; source: where
    its CLIP is, if not where it was. Raises UserError for an unfinished one and another file.
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
    state, s.stem = (None, "plain" if s.student == "small" else "deep")
    if s.backbone != "none":
        with one_first():
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
    flag("--workers", type=natural, help="processes that read images (default: as the teacher's)")
    flag = parser.add_argument_group("values of the recipe (default: as published)").add_argument
    flag("--student", choices=tuple(STUDENTS), help="MaskCLIP+'s own was resnet101")
    flag("--backbone", help="ImageNet weights: imagenet (torchvision's, downloaded), a file "
         "(torchvision's or Open-MMLab's v1c layout), or none")
    flag("--losses", help="some of mask,feature,text (default: all; for a MaskCLIP teacher mask)")
    flag("--head", choices=("inherit", "query", "query+bias", "learned"), default="inherit")
    flag("--text-masks", choices=("student", "teacher"), default="student", help="of the text "
         "loss: the student's, as in the papers, or the teacher's, as in the authors' program")
    flag("--ignore-below", type=share, metavar="P", help="leave out pixels where the teacher's "
         "greatest softmax of the logits is less (0: none)")
    flag("--use-ground-truth-void", action="store_true", help="NOT unsupervised: open the training "
         "labels and leave out what they call void or background, as the authors' program does")
    flag("--pd", type=share, help="prompt denoising of the teacher (0: none)")
    flag("--views", type=natural, metavar="K", help="ask the teacher about K augmented views of "
         "each image once; 0: fresh views in every epoch")
    flag("--epochs", type=count)
    flag("--batch", type=count)
    flag("--lr", type=positive)
    return parser.parse_args(argv)


def settings_of(args, teacher):
    """The teacher's facts, recipe and command line together, as a namespace of plain values.

    s.seed stays the teacher's, from which the demo's images are drawn. Raises UserError.
    """
    t = teacher.settings
    # These are found again by --clip, and by the checkpoint itself.
    given = {key: value for key, value in vars(args).items() if value is not None and key != "clip"}
    if args.losses is not None:
        given["losses"] = [name.strip() for name in args.losses.split(",")]
    learned = sorted(teacher.rectifier.state_dict().items())
    own = ("dataset", "data_root", "method", "preset", "seed", "workers", "mask_temperature",
           "sign", "train_split", "labels", "labels_offset")
    inherited = {key: getattr(t, key) for key in own if hasattr(t, key)}
    inherited |= dict(patch=teacher.patch, student_seed=t.seed, ignore_below=None,
                      teacher_weights=fingerprint(*(part for pair in learned for part in pair)))
    s = argparse.Namespace(**inherited | recipe(t.dataset, t.bias, t.decoder) | given)
    if not s.losses or not set(s.losses) <= set(LOSSES):
        raise UserError(f"--losses {args.losses}: expected some of {','.join(LOSSES)}")
    s.losses = [name for name in LOSSES if name in s.losses]
    if s.head == "learned" and "mask" not in s.losses:
        raise UserError("--head learned can only learn from the mask loss; add mask to --losses")
    if s.student == "small" and s.backbone != "none":
        raise UserError("--student small has no ImageNet weights; use --backbone none")
    if s.batch < world():
        raise UserError(f"--batch is {s.batch}, for {world()} processes; expected one image each "
                        "at least")
    return s


@clean_exit
def main(argv=None):
    args = parse_arguments(argv)
    device = pick_device(args.device)
    teacher, path = find_teacher(args.teacher, device, args.clip)
    t, s = teacher.settings, settings_of(args, teacher)
    s.teacher, s.out, s.device = path, args.out or path.parent, str(device)
    s.cache, s.amp = args.cache or s.out, use_amp(args.amp, device)
    data = open_dataset(s.dataset, s.data_root, getattr(s, "train_split", "train"),
                        teacher.classes if s.dataset == "folder" else None, s.seed,
                        getattr(s, "labels", None), getattr(s, "labels_offset", 0))
    if data.classes != teacher.classes:
        raise UserError(f"{path} was made for other classes than {s.dataset}'s")
    if s.use_ground_truth_void and not data.has_labels:
        raise UserError(f"--use-ground-truth-void: {s.dataset} has no training labels")
    student = make_student(s, teacher, device)
    print("  ".join(f"{key}={value}" for key, value in plain(s).items()))
    learned = sum(value.numel() for value in student.parameters() if value.requires_grad)
    print(f"{data.name}: {len(data)} training images, {len(data.classes)} classes, student of "
          f"{learned / 1e6:.1f} M parameters → {s.out}/")
    make_folder(s.out)
    make_folder(s.cache)
    with folder_lock(s.out / ".run.lock"):
        run = Run(s.out / "distill.pt", s, data, teacher.model, student, "log-distill.jsonl",
                  "distill")
        hypothesis = None
        if "text" in s.losses and t.hypothesis != "none" and not run.finished:
            t.amp, t.workers = s.amp, s.workers
            hypothesis = make_hypotheses(data, teacher.model, teacher.rectifier.Wq, t,
                                         hypotheses_folder(path, t), device)
        train(s, data, teacher, student, hypothesis, run, device)
    barrier()  # the checkpoint is there

    import evaluate  # which needs this module; it sees the checkpoints only
    options = passed_on(s)
    results = evaluate.main(["--checkpoint", str(s.out / "distill.pt"), *options])
    if results:  # else there are no labels to compare with
        stage = "maskclip" if t.method == "maskclip" else "rectified"
        kept = path.with_name("results.json")
        try:
            before = dict(json.loads(kept.read_text("utf-8")))
        except (ValueError, TypeError, OSError):  # not evaluated yet, or damaged
            before = {}
        if not before.get(stage, {}).get("standard"):
            options += ["--clip", args.clip] if args.clip else []
            before = evaluate.main(["--checkpoint", str(path), "--out", str(s.out), *options])
        shown = {name: (before | results).get(name) for name in ("maskclip", stage, "distilled")}
        print("mIoU: " + "  ".join(f"{name} {result['miou']:.2f}"
                                   for name, result in shown.items() if result))


if __name__ == "__main__":
    main()
    leave_processes()
