"""How long the stages take, ours against plain: python tests/benchmark.py [--quick] [--device cuda]

Every stage is compared with a plain implementation of the same computation, on random weights of
ViT-B/16's sizes. What is compared is run in turn in one process, so that all of it meets the same
machine; every number is a median. --quick runs each stage once, at a small size, to see that it
works. `--rectify` times a complete rectification of VOC's size instead.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import distill  # noqa: E402
import maps  # noqa: E402
import reclip  # noqa: E402
from clip.model import CLIP, MLP  # noqa: E402
from conftest import REAL, plain_text_features, random_clip  # noqa: E402
from data import (CLASSES, CLIP_MEAN, CLIP_STD, draw_seed, normalise,  # noqa: E402
                  open_dataset, palette, read_image, save_picture)
from evaluate import Segmenter, evaluate, with_legend  # noqa: E402
from files import clock  # noqa: E402
from reclip import Rectifier, classify, contrastive_loss, dense_features  # noqa: E402

PHOTO = sorted((REAL / "VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"))[0]
# Classes and the side of the training crop
SETS = {"voc": (CLASSES["voc"], 336), "context": (CLASSES["context"], 480),
        "ade": (CLASSES["ade"], 512)}
WAYS = ("plain", "fresh", "cached")  # of making a step: see Step


def vit_b16(quick=False):
    """A frozen CLIP of random weights and ViT-B/16's sizes; a tiny one to be quick."""
    if quick:
        return random_clip()
    torch.manual_seed(0)
    model = CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
    nn.init.normal_(model.token_embedding.weight, std=0.1)
    nn.init.normal_(model.positional_embedding, std=0.1)
    return model.eval().requires_grad_(False)


# ---- Measuring -----------------------------------------------------------------------------------


def alternate(functions, repeats, device):
    """[(median seconds, last result)] of functions that are called in turn, `repeats` times.

    Each is called once before, for what a process does only the first time.
    """
    seconds, results = [[] for _ in functions], [None] * len(functions)
    for repeat in range(repeats + (repeats > 1)):
        for i, function in enumerate(functions):
            wait(device)
            start = time.perf_counter()
            results[i] = function()
            wait(device)
            if repeat or repeats == 1:
                seconds[i].append(time.perf_counter() - start)
    return [(statistics.median(s), result) for s, result in zip(seconds, results)]


HEADING = f"{'':52}{'plain':>9}{'ours':>11}{'ratio':>8}"


def compare(name, plain, ours, args, agree, repeats=3):
    """Print the seconds of two ways to one result. AssertionError unless agree(ours, plain)."""
    repeats, device = min(repeats, args.repeats), torch.device(args.device)
    (slow, expected), (fast, actual) = alternate([plain, ours], repeats, device)
    assert agree(actual, expected), f"{name}: the two ways differ"
    print(f"{name:50}{slow:9.3f} s{fast:9.3f} s{slow / fast:8.1f}", flush=True)


def wait(device):
    """Until the device has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """GB that this process has used at most so far: on a GPU, of its memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def has_bf16(device):
    """Whether the processor has instructions for bf16 products; without, bf16 is only slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return platform.machine() == "arm64"
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def processor(device):
    """Its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def autocast(device, enabled=True):
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


# ---- The frozen encoder --------------------------------------------------------------------------


def encoder_work(visual, n):
    """Floating-point operations of dense_features on one image of n tokens, class token included:
    patch embedding, linear layers, and both products of attention."""
    (width, D), blocks = visual.proj.shape, len(visual.transformer.resblocks)
    patches = n - 1
    block = 12 * width**2 * n + 2 * n**2 * width
    last = 10 * width**2 * patches  # values and output projection, MLP
    ends = visual.conv1.weight[0].numel() * width * patches + width * D * patches
    return 2 * ((blocks - 1) * block + last + ends)


def linear_products(visual, n, dtype):
    """A function that multiplies matrices of the sizes in a block, and its operations."""
    width, device = visual.proj.shape[0], visual.proj.device
    sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    pairs = [(torch.randn(n, a, device=device, dtype=dtype),
              torch.randn(b, a, device=device, dtype=dtype)) for a, b in sizes]

    def multiply():
        for _ in range(len(visual.transformer.resblocks)):
            for x, weight in pairs:
                x @ weight.T

    return multiply, 24 * n * width**2 * len(visual.transformer.resblocks)


@torch.no_grad()
def encoder(model, device, args):
    """How near the encoder comes to the rate at which the machine multiplies such matrices."""
    print("\nfrozen encoder: rates in 10⁹ operations a second; share: of the rate of plain "
          "products of its matrices' sizes")
    print("tokens  type      images/s    rate   products   share   of float32's speed   cosine")
    bf16 = has_bf16(device)
    sides, repeats = (64,) if args.quick else (336, 512), args.repeats
    encoders = [reclip.image_encoder(model, "release", half) for half in (False, True)]
    for side in sides:
        images, n = torch.randn(1, 3, side, side, device=device), (side // 16) ** 2 + 1

        def encode(half):
            with autocast(device, half):
                return dense_features(encoders[half], images)

        types = [torch.float32] + [torch.bfloat16] * bf16
        products = [linear_products(model.visual, n, dtype) for dtype in types]
        functions = [lambda half=dtype == torch.bfloat16: encode(half) for dtype in types]
        results = alternate(functions + [multiply for multiply, _ in products], repeats, device)
        exact = results[0]
        for dtype, (seconds, Z), (products_seconds, _), (_, work) in zip(
                types, results, results[len(types):], products):
            rate, best = encoder_work(model.visual, n) / seconds, work / products_seconds
            cosine = F.cosine_similarity(Z.float(), exact[1], dim=1).min()
            print(f"{n:6}  {str(dtype)[6:]:8}{1 / seconds:10.2f}{rate / 1e9:8.0f}"
                  f"{best / 1e9:11.0f}{rate / best:8.0%}{exact[0] / seconds:21.2f}{cosine:9.5f}",
                  flush=True)
    if not bf16:
        print("no bf16: this processor has no instructions for it")
    # What other last blocks cost, at the last of the sizes
    functions = [lambda surgery=surgery: dense_features(model.visual, images, surgery)
                 for surgery in reclip.SURGERIES]
    results = alternate(functions, repeats, device)
    print("last blocks: " + ", ".join(f"{surgery} {seconds:.2f} s ({seconds / results[0][0]:.2f})"
                                      for surgery, (seconds, _) in zip(reclip.SURGERIES, results)))


# ---- The Reference encoding ----------------------------------------------------------------------


def text_step(model, classes, device):
    """A function of an encoding, as `reclip.encode_shared_prefix`: its features and gradient."""
    reference = reclip.Reference(model, classes).to(device)
    nn.init.normal_(reference.prompt, std=0.1)
    weights = torch.randn(len(classes), model.text_projection.shape[1], device=device)

    def step(encode):
        Wr = encode(model, torch.cat([reference.start, reference.prompt]), reference.suffix)
        gradient = torch.autograd.grad((Wr * weights).sum(), reference.prompt)[0]
        return Wr.detach().float(), gradient

    return step


def agree_to(tolerance):
    """Whether values and gradients are equal, relative to the largest of each if that is over 1."""
    return lambda ours, plain: all((a - b).abs().max() <= tolerance * max(1, b.abs().max())
                                   for a, b in zip(ours, plain))


def one_sequence(model, prefix, suffix):
    """The shared prefix with all endings in a single group: what groups replace."""
    layout = reclip.shared_layout(len(prefix), suffix, group=10**9)
    return reclip.encode_shared_prefix(model, prefix, suffix, layout)


def half_precision(*args):
    with autocast(args[1].device):
        return reclip.encode_shared_prefix(*args)


def many_names(count):
    """Names of two and more words, as in vocabularies of that size."""
    kinds = ("", "small ", "wooden ", "garden ", "old ", "glass ", "toy ", "metal ", "paper ")
    return [kind + name for kind in kinds for name in CLASSES["ade"]][:count]


def text(model, device, args):
    print(f"\nReference features, forward and backward\n{HEADING}")
    ours = reclip.encode_shared_prefix
    rows = [(f"{len(names)} classes: 77 positions each, shared prefix", names, plain_text_features,
             ours, agree_to(1e-5)) for names, _ in SETS.values()]
    rows += [(f"{count} classes: one sequence, groups", many_names(count), one_sequence, ours,
              agree_to(3e-6)) for count in ((300,) if args.quick else (847, 1203))]
    if has_bf16(device):
        rows.append(("59 classes: float32, bf16", CLASSES["context"], ours, half_precision,
                     lambda a, b: F.cosine_similarity(a[0], b[0]).min() > 0.9999))
    for name, classes, slow, fast, agree in rows:
        step = text_step(model, classes, device)
        compare(name, lambda: step(slow), lambda: step(fast), args, agree,
                3 if len(classes) < 200 else 1)


# ---- The rectification step ----------------------------------------------------------------------


@contextlib.contextmanager
def as_written():
    """Within, CLIP's MLPs are three modules one after the other, without our moved factors."""
    ours = MLP.forward
    MLP.forward = nn.Sequential.forward
    try:
        yield
    finally:
        MLP.forward = ours


class Step:
    """Steps of rectification training at batch 1, each way on parameters of its own.

    plain: fresh features, all positions of every class, QuickGELU and Gumbel-Softmax as they are
    written down, Z pooled and then compared with Wq, as in the authors' program; fresh and cached:
    ours, with features of the image, or kept in float16 as in a file of views.
    """

    def __init__(self, model, name, device, quick=False):
        self.model, self.device = model, device
        classes, side = SETS[name]
        side = 64 if quick else side
        torch.manual_seed(0)
        D, grid = model.visual.proj.shape[1], side // 16
        Wq = F.normalize(torch.randn(len(classes), D), dim=-1)
        self.image = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
        self.p = reclip.resized_positions(model.visual, grid, grid)
        first = Rectifier(model, classes, Wq)
        nn.init.normal_(first.reference.prompt, std=0.1)
        self.rectifiers = {way: copy.deepcopy(first).to(device)
                           for way in (*WAYS, "plain on cached")}
        self.optimizers = {
            way: torch.optim.SGD(rectifier.parameters(), 0.01, 0.9, weight_decay=5e-4)
            for way, rectifier in self.rectifiers.items()}
        self.present = torch.zeros(1, len(classes), dtype=torch.bool, device=device)
        self.present[0, :3] = True
        self.kept = self.encode().half().cpu()

    @torch.no_grad()
    def encode(self):
        image = normalise(self.image.to(self.device), CLIP_MEAN, CLIP_STD)
        with autocast(self.device, self.device.type == "cuda"):
            return dense_features(self.model.visual, image).float()

    def plain_loss(self, rectifier, features):
        Z, reference = F.normalize(features, dim=1), rectifier.reference
        Wr = plain_text_features(self.model, torch.cat([reference.start, reference.prompt]),
                                 reference.suffix)
        M = classify(Z, rectifier.Wq) - classify(rectifier.position(self.p), Wr / Wr.norm())
        logits = rectifier.decoder.norm(rectifier.decoder.conv(torch.cat([Z, M], 1)))
        soft = (logits / 0.01 + self.noise(logits.shape[1:])).softmax(1)
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
        masks = hard + (soft - soft.detach())
        pooled = torch.einsum("bchw,bdhw->bcd", masks, Z) / Z[0, 0].numel()
        return contrastive_loss(pooled @ rectifier.Wq.T, self.present)

    def our_loss(self, rectifier, features):
        noise = self.noise((len(rectifier.Wq), *features.shape[2:]))
        return reclip.rectification_loss(rectifier, features, self.p, rectifier.Wq,
                                         rectifier.Wr(self.model), self.present, noise, 0.01, 0.01)

    def noise(self, shape):
        return reclip.gumbel_noise(shape, [draw_seed(0, 0, "image", "gumbel")], self.device)

    def __call__(self, way):
        """One step; returns its loss."""
        rectifier, optimizer = self.rectifiers[way], self.optimizers[way]
        with as_written() if "plain" in way else contextlib.nullcontext():
            features = (self.kept.to(self.device).float() if "cached" in way else
                        self.encode())
            loss = (self.plain_loss if "plain" in way else self.our_loss)(rectifier, features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()


def rectification(model, device, args):
    """Seconds a step: plain, fresh views, cached views. AssertionError unless the losses agree."""
    print("\nrectification step, batch 1 (losses equal to 1e-4; float16: what rounding the cached "
          "features does to the loss)")
    print("           plain    fresh  ratio  images/s    cached  ratio  images/s   float16")
    for name in SETS:
        step = Step(model, name, device, args.quick)
        losses = {way: step(way) for way in step.rectifiers}  # all at the same parameters
        for ours, plain in (("fresh", "plain"), ("cached", "plain on cached")):
            error = abs(losses[ours] - losses[plain]) / abs(losses[plain])
            assert error <= 1e-4, f"{name}: {ours} loss {losses[ours]}, plain {losses[plain]}"
        half = abs(losses["cached"] - losses["plain"]) / abs(losses["plain"])
        ways = [lambda way=way: step(way) for way in WAYS]
        (plain, _), (fresh, _), (cached, _) = alternate(ways, min(3, args.repeats), device)
        print(f"{name:8}{plain:6.2f} s{fresh:7.2f} s{plain / fresh:7.1f}{1 / fresh:10.2f}"
              f"{cached:8.2f} s{plain / cached:7.1f}{1 / cached:10.2f}{half:10.1e}", flush=True)


def memory(args):
    """What two ADE20K steps take, each way in a process of its own."""
    print("\npeak memory of a process that makes two ADE20K steps; what the steps add to "
          "libraries, CLIP and parameters")
    plain = None
    for way in WAYS:
        command = [sys.executable, __file__, "--memory", way, "--device", args.device]
        command += ["--quick"] * args.quick
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        before, peak = json.loads(printed)
        plain = plain or (peak, peak - before)
        print(f"{way:8}{peak:6.2f} GB{peak / plain[0]:6.0%} of plain{peak - before:12.2f} GB"
              f"{(peak - before) / plain[1]:6.0%} of plain", flush=True)


def measure_memory(way, args):
    """What that process does: print two numbers, the first with CLIP and the parameters loaded."""
    device = torch.device(args.device)
    model = vit_b16(args.quick).to(device)
    step = Step(model, "ade", device, args.quick)
    before = peak_memory(device)
    for _ in range(2):
        step(way)
    print([before, peak_memory(device)])


# ---- Hypotheses ----------------------------------------------------------------------------------


@torch.no_grad()
def plain_votes(model, image, Wq, r, batch, half=False):
    """Votes of an image's crops, encoded `batch` at once by CLIP itself: int64 C."""
    crops = reclip.cut_crops(image, r, model.visual.input_resolution)
    with autocast(image.device, half):
        features = torch.cat([model.encode_image(normalise(part, CLIP_MEAN, CLIP_STD))
                              for part in crops.split(batch)]).float()
    return F.one_hot((features @ Wq.T).argmax(1), len(Wq)).sum(0)


def hypotheses(model, device, args):
    """121 crops of a photograph, one at a time and all at once against ours."""
    print(f"\nhypotheses\n{HEADING}")
    image = read_image(PHOTO).to(device)
    Wq = F.normalize(torch.randn(20, model.text_projection.shape[1], device=device), dim=-1)

    def agree(ours, plain):  # but for a crop or two whose best classes are all but equal
        return (ours.sum(), plain.sum()) == (121, 121) and (ours - plain).abs().sum() <= 4

    for batch, half in [(1, False), (121, False)] + [(121, True)] * has_bf16(device):
        compare(f"121 crops: {batch} at once, {'bf16' if half else 'float32'}",
                lambda: plain_votes(model, image, Wq, 1 / 6, batch, half),
                lambda: reclip.crop_votes(model, [image], Wq, 1 / 6, half)[0], args, agree)
    agreement(device, 8 if args.quick else 600)


@torch.no_grad()
def agreement(device, images):
    """On how many of the demo's images crops keep the classes that they have one by one."""
    model, data = reclip.load_clip("shapes-tiny", device=device), open_dataset("shapes")
    with contextlib.redirect_stdout(io.StringIO()):
        Wq = reclip.query_features(model, data.classes)
    s = reclip.recipe("shapes")
    pictures = [data.image(i).to(device) for i in range(images)]
    plain = torch.stack([plain_votes(model, picture, Wq, s["crop_ratio"], 1).cpu()
                         for picture in pictures])
    kept = reclip.crop_hypothesis(plain, s["threshold"])
    for kind, half in (("float32", False), ("bf16", True)):
        votes = reclip.crop_votes(model, pictures, Wq, s["crop_ratio"], half).cpu()
        same = (reclip.crop_hypothesis(votes, s["threshold"]) == kept).all(1).sum()
        print(f"kept classes on the demo, {kind}: the same on {same} of {images} images")


# ---- Evaluation ----------------------------------------------------------------------------------


class RandomImages:
    """Labelled images of two sizes and random pixels, like a SegmentationData."""

    name, classes = "random", CLASSES["voc"]

    def __init__(self, n, sides):
        self.ids, self.sides = [str(i) for i in range(n)], sides

    def __len__(self):
        return len(self.ids)

    def draw(self, i, most, *channels):
        size = self.sides[::1 if i % 2 else -1]
        draw = torch.Generator().manual_seed(i)
        return torch.randint(0, most, (*channels, *size), generator=draw)

    def image(self, i):
        return self.draw(i, 256, 3).to(torch.uint8)

    def label(self, i):
        return self.draw(i, 20)


def evaluation(model, device, args):
    """Images one at a time and batched by size; then `label_maps` and `files`."""
    print(f"\nevaluation\n{HEADING}")
    data = RandomImages(16, (48, 64) if args.quick else (336, 448))
    with contextlib.redirect_stdout(io.StringIO()):
        network = reclip.plain_maskclip(model, data.classes, argparse.Namespace(
            preset="release", surgery="program", method="maskclip", pd=None))
    segment = Segmenter(network, device, amp=device.type == "cuda")

    def run(batch):
        with contextlib.redirect_stdout(io.StringIO()):  # without its progress
            return evaluate(segment, data, (2048, 336), device, batch)["maskclip"]

    compare("16 images of 336×448: one at a time, eight", lambda: run(1), lambda: run(8), args,
            lambda ours, plain: (ours - plain).abs().sum() <= 2e-3 * plain.sum())
    label_maps(device, args)
    files(args)


def label_maps(device, args):
    """Label maps of photographs and of evaluation, against all classes at every pixel."""
    def agree(ours, plain):
        return (ours != plain).float().mean() <= 1e-5

    for megapixels, C, size in ((12, 20, (3000, 4000)), (12, 150, (3000, 4000)),
                                (0.75, 20, (750, 1000)), (0.75, 150, (750, 1000))):
        size = (500, 700) if args.quick else size
        logits = F.interpolate(torch.randn(1, C, 9, 12, device=device), (32, 43), mode="bicubic")
        logits += 0.2 * torch.randn(logits.shape, device=device)
        extent = logits, (512, 688), (510, 680), size
        chunk = max(1, min(32, 2**26 // (size[0] * size[1])))
        compare(f"label map, {megapixels} megapixels, {C} classes",
                lambda: maps.label_map(*extent, chunk), lambda: maps.label_map(*extent),
                args, agree, 3 if megapixels < 1 else 1)


def files(args):
    """Photographs read by Pillow alone, and predictions drawn with its usual compression."""
    photo = Image.open(PHOTO).convert("RGB").resize((200, 150) if args.quick else (2000, 1500))
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("jpg", "png"):
            path = Path(folder, f"photo.{suffix}")
            photo.save(path)
            compare(f"reading a {suffix} of 3 megapixels", lambda: torch.from_numpy(np.asarray(
                Image.open(path).convert("RGB")).transpose(2, 0, 1).copy()),
                lambda: read_image(path), args, torch.equal)
        image, colours = read_image(path), palette(20)
        mask = (torch.arange(image[0].numel()).view_as(image[0]) // 5000 % 20).long()
        entries = [(name, colour) for name, colour in zip(CLASSES["voc"], colours)]

        def draw(path, save):
            save(with_legend(image, mask, colours, entries), path)
            return path

        compare("overlay of a prediction",
                lambda: draw(Path(folder, "plain.png"), Image.Image.save),
                lambda: draw(Path(folder, "ours.png"), save_picture), args,
                lambda ours, plain: torch.equal(read_image(ours), read_image(plain)))


# ---- Distillation --------------------------------------------------------------------------------


class DistillationStep:
    """Steps of distillation from a ReCLIP++ teacher, two views at a time, each way on a student
    of its own.

    plain: logits, features and masks of pixels as Eqs. 8 and 9 and Sec. III-E have them, the
    student in PyTorch's default memory format; fresh and cached: ours, with the teacher asked in
    every step, or once.
    """

    def __init__(self, model, device, quick):
        self.device, self.amp, D = device, device.type == "cuda", model.visual.proj.shape[1]
        side, student = (64, "small") if quick else (512, "resnet50")
        torch.manual_seed(0)
        classes = CLASSES["voc"]
        Wq = F.normalize(torch.randn(len(classes), D), dim=-1)
        rectifier = Rectifier(model, classes, Wq).to(device)
        with torch.no_grad():
            Wr = rectifier.Wr(model)
        self.teacher = reclip.RectifiedCLIP(model, rectifier, Wr, classes, argparse.Namespace(
            preset="release", surgery="program"))
        self.views = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, device=device)
        self.sizes = torch.tensor([[side, side]] * 2, device=device)
        head = distill.InheritedHead(distill.inherited_parts(self.teacher), self.teacher.patch)
        network = distill.DeepLabV2(D, **distill.STUDENTS[student])
        first = distill.Student(network, head).to(device).train()
        self.students = {way: copy.deepcopy(first) for way in WAYS}
        self.students["plain"].network.to(memory_format=torch.contiguous_format)
        self.optimizers = {way: torch.optim.SGD(student.network.parameters(), 0.01, 0.9,
                                                weight_decay=5e-4, fused=way != "plain")
                           for way, student in self.students.items()}
        Z, labels = self.teach()
        self.kept = Z.half(), labels.to(torch.uint8)

    def teach(self):
        return distill.teach(self.teacher, self.views, self.sizes, amp=self.amp)

    def plain_loss(self, Z, labels, Z_hat, logits, present, Wq):
        def pixels(x):
            return F.interpolate(x, labels.shape[1:], mode="bilinear")

        masks = F.one_hot(labels, len(Wq)).movedim(3, 1).float()
        pooled = torch.einsum("bchw,bdhw->bcd", masks, pixels(F.normalize(Z_hat, dim=1)))
        text = contrastive_loss(pooled / labels[0].numel() @ Wq.T, present)
        feature = (pixels(Z_hat) - pixels(Z)).abs().mean()
        return F.cross_entropy(pixels(logits), labels) + 0.5 * feature + 0.5 * text

    def our_loss(self, Z, labels, Z_hat, logits, present, Wq):
        losses = distill.distillation_losses(logits, Z_hat, Z, labels, Wq, [1] * len(Wq), present)
        return losses["mask"] + 0.5 * losses["feature"] + 0.5 * losses["text"]

    def __call__(self, way):
        """One step; returns its loss."""
        Z, labels = self.kept if way == "cached" else self.teach()
        Z, labels, Wq = Z.float(), labels.long(), self.teacher.rectifier.Wq
        Z_hat, logits = self.students[way](self.views, self.sizes, self.amp)
        present = F.one_hot(labels, len(Wq)).amax((1, 2)).bool()
        function = self.plain_loss if way == "plain" else self.our_loss
        loss = function(Z, labels, Z_hat, logits, present, Wq)
        self.optimizers[way].zero_grad()
        loss.backward()
        self.optimizers[way].step()
        return loss.item()


def distillation(model, device, args):
    """Seconds a step: plain, the teacher asked each time, once. AssertionError unless the losses
    agree."""
    step = DistillationStep(model, device, args.quick)
    losses = {way: step(way) for way in WAYS}  # all at the same parameters
    for way, most in (("fresh", 1e-4), ("cached", 1e-3)):  # the latter's features are rounded
        error = abs(losses[way] - losses["plain"]) / abs(losses["plain"])
        assert error <= most, f"distillation: {way} loss {losses[way]}, plain {losses['plain']}"
    ways = [lambda way=way: step(way) for way in WAYS]
    (plain, _), (fresh, _), (cached, _) = alternate(ways, min(3, args.repeats), device)
    print("\ndistillation step, ResNet-50, two views of 512×512 (losses equal to 1e-4): plain "
          f"{plain:.2f} s, teacher asked in every step {fresh:.2f} s, ratio {plain / fresh:.1f}, "
          f"once {cached:.2f} s, ratio {plain / cached:.1f}, {2 / cached:.2f} images/s", flush=True)


# ---- A whole training, by its command ------------------------------------------------------------


def whole_rectification(model, device, quick, views=4):
    """Seconds of `reclip.py` on 1,464 images of noise, 50 epochs, cached views; random weights."""
    n, epochs = (8, 2) if quick else (1464, 50)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), f"{folder}/clip.pt")
        Path(folder, "images").mkdir()
        for i in range(n):
            pixels = torch.randint(0, 256, (375, 500, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(f"{folder}/images/{i}.jpg")
        command = [sys.executable, "reclip.py", "--dataset", "folder", "--data-root",
                   f"{folder}/images", "--classes", ", ".join(CLASSES["voc"]), "--clip",
                   f"{folder}/clip.pt", "--out", f"{folder}/run", "--views", str(views),
                   "--epochs", str(epochs), "--device", str(device)]
        command += ["--crop", "64", "--scale", "64", "64", "--crop-ratio", "1"] * quick
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True)
        return time.perf_counter() - start


def child(*arguments):
    """(seconds, CPU seconds, MB at most) of a Python process in the repository's folder."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    return (time.perf_counter() - start, usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def start(args):
    """What a command takes before it does anything, beside PyTorch itself."""
    print("\nstarting a process                 seconds   of the CPU       MB")
    for name, arguments in (("import torch", ["-c", "import torch"]),
                            ("import reclip", ["-c", "import reclip"]),
                            ("reclip.py --help", ["reclip.py", "--help"]),
                            ("reclip.py --wrong", ["reclip.py", "--wrong"])):
        runs = [child(*arguments) for _ in range(1 if args.quick else 3)]
        seconds, cpu, megabytes = map(statistics.median, zip(*runs))
        print(f"{name:33}{seconds:8.2f} s{cpu:11.2f} s{megabytes:9.0f}", flush=True)


def demo(args):
    """The demo's two commands, all of them."""
    with tempfile.TemporaryDirectory() as folder:
        for script, options in (("reclip.py", ["--out", f"{folder}/run"]),
                                ("distill.py", ["--teacher", f"{folder}/run/reclip.pt"])):
            seconds, cpu, _ = child(script, *options, *["--help"] * args.quick)
            print(f"{'demo, ' + script:33}{seconds:8.2f} s{cpu:11.2f} s", flush=True)


# ---- The command ---------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--quick", action="store_true", help="tiny sizes, each stage once: does it run?")
    flag("--device", default="cpu", help="default: cpu")
    flag("--threads", type=int, help="default: as torch chooses")
    flag("--repeats", type=int, help="measurements behind each median (default: 5; quick: 1)")
    flag("--stages", nargs="+", metavar="STAGE", choices=STAGES, default=list(STAGES),
         help=f"default: all of {', '.join(STAGES)}")
    flag("--rectify", action="store_true", help="a complete rectification of VOC's size instead")
    flag("--memory", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (1 if args.quick else 5)
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes that this one starts
    if args.memory:
        return measure_memory(args.memory, args)
    print(f"{processor(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{'a tiny CLIP' if args.quick else 'ViT-B/16'}, random weights", flush=True)
    if args.rectify:
        seconds = whole_rectification(vit_b16(args.quick), device, args.quick)
        print(f"rectification of VOC's size, all of it: {clock(seconds)}")
        return
    # First of all: a process hands its own peak of memory on to those that it starts.
    for name in [name for name in PROCESSES if name in args.stages]:
        PROCESSES[name](args)
    model = vit_b16(args.quick).to(device)
    for name in [name for name in STAGES if name in args.stages and name not in PROCESSES]:
        STAGES[name](model, device, args)
        if device.type == "cuda":
            print(f"at most {peak_memory(device):.1f} GB of the GPU's memory so far")


PROCESSES = dict(start=start, memory=memory, demo=demo)  # stages that start processes of their own
STAGES = dict(PROCESSES, encoder=encoder, text=text, rectification=rectification,
              hypotheses=hypotheses, evaluation=evaluation, distillation=distillation)


if __name__ == "__main__":
    main()
