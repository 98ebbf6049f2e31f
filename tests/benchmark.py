"""How long the stages take, ours against plain: python tests/benchmark.py [--quick] [--device cuda]

Every stage is compared with a plain implementation of the same computation, on random weights of
ViT-B/16's sizes; both are run in turn in one process, and every number is a median.
"""

import argparse
import contextlib
import copy
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import distill  # noqa: E402
import reclip  # noqa: E402
from conftest import REAL, plain_text_features, random_clip  # noqa: E402
from data import (CLASSES, CLIP_MEAN, CLIP_STD, TrainingViews, normalise,  # noqa: E402
                  open_dataset, read_ahead, read_image)

PHOTO = sorted((REAL / "VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"))[0]
SETS = {"voc": 336, "context": 480, "ade": 512}  # and the side of the training crop
VIT_B16 = dict(embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768,
               transformer_width=512, transformer_heads=8, transformer_layers=12)
WAYS = ("plain", "fresh", "cached")  # of making a step
ROW = "{:42}{:10.3f} s{:8.3f} s{:8.2f}"  # what, plain, ours, ratio


def alternate(functions, args, repeats=5):
    """[(median seconds, last result)] of functions that are called in turn, `repeats` times.
    Each is called once before, for what a process does only the first time."""
    repeats = 1 if args.quick else min(repeats, args.repeats)
    finish = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    seconds, results = [[] for _ in functions], [None] * len(functions)
    for _ in range(repeats + (repeats > 1)):
        for i, function in enumerate(functions):
            finish()
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):  # without its progress
                results[i] = function()
            finish()
            seconds[i].append(time.perf_counter() - start)
    return [(statistics.median(s[repeats > 1 :]), result) for s, result in zip(seconds, results)]


def compare(name, plain, ours, args, agree, repeats=3):
    """Print the seconds of two ways to one result. AssertionError unless agree(ours, plain)."""
    (slow, expected), (fast, actual) = alternate([plain, ours], args, repeats)
    assert agree(actual, expected), f"{name}: the two ways differ"
    print(ROW.format(name, slow, fast, slow / fast), flush=True)


def near(tolerance):
    """Whether tensors are equal, relative to the largest number of each if that is over 1."""
    return lambda ours, plain: all((a - b).abs().max() <= tolerance * max(1, b.abs().max())
                                   for a, b in zip(ours, plain, strict=True))


def plain_texts(model, reference):
    """Wr with nothing shared: all positions of each class; not normalised."""
    endings = [torch.tensor(ids, device=reference.prompt.device) for ids in reference.endings]
    suffix = nn.utils.rnn.pad_sequence(endings, batch_first=True)
    return plain_text_features(model, torch.cat([reference.start, reference.prompt]), suffix)


# ---- The rectification step ----------------------------------------------------------------------


def text(model, device, args):
    """Reference features and their gradient: all positions of each class, or a shared prefix."""
    for name in SETS:
        reference = reclip.Reference(model, CLASSES[name]).to(device)
        nn.init.normal_(reference.prompt, std=0.1)

        def step(Wr):
            return Wr.detach(), torch.autograd.grad(Wr.square().sum(), reference.prompt)[0]

        compare(f"Reference features, {len(CLASSES[name])} classes",
                lambda: step(plain_texts(model, reference)),
                lambda: step(reference.encode(model)), args, near(1e-4))


def steps(name, first, loss_of, args):
    """Time training steps, each way on a copy of the module `first`; the first losses must agree.
    loss_of: a function, way and module → loss. plain: as it is written down; fresh and cached:
    ours, with what the frozen network says computed in every step, or kept in float16."""
    modules = {way: copy.deepcopy(first) for way in WAYS}
    optimizers = {way: torch.optim.SGD(
        [value for value in module.parameters() if value.requires_grad], 0.01, 0.9,
        weight_decay=5e-4, fused=way != "plain") for way, module in modules.items()}

    def step(way):
        loss = loss_of(way, modules[way])
        optimizers[way].zero_grad()
        loss.backward()
        optimizers[way].step()
        return loss.detach()[None]

    losses = {way: step(way) for way in WAYS}  # all at the same parameters
    assert near(1e-3)(losses["fresh"], losses["plain"]), f"{name}: the losses differ: {losses}"
    (plain, _), *ours = alternate([lambda way=way: step(way) for way in WAYS], args)
    for way, (seconds, _) in zip(WAYS[1:], ours):
        print(ROW.format(f"{name}, {way}", plain, seconds, plain / seconds), flush=True)


def rectification(model, device, args):
    """At batch 1. plain: all positions of every class, Gumbel-Softmax as it is written, Z pooled
    and then compared with Wq, as in the authors' program."""
    for name, side in SETS.items():
        side, C = 64 if args.quick else side, len(CLASSES[name])
        torch.manual_seed(0)
        Wq = F.normalize(torch.randn(C, model.visual.proj.shape[1]), dim=-1)
        first = reclip.Rectifier(model, CLASSES[name], Wq).to(device)
        nn.init.normal_(first.reference.prompt, std=0.1)
        image = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, device=device)
        p = reclip.resized_positions(model.visual, side // 16, side // 16)
        present = torch.arange(C, device=device)[None] < 3

        @torch.no_grad()
        def encode():
            return reclip.encode_views(model.visual, image, "release", "program",
                                       amp=device.type == "cuda")

        def plain_loss(rectifier, features, noise):
            Z, Wr = F.normalize(features, dim=1), plain_texts(model, rectifier.reference)
            soft = (rectifier(Z, p, Wr / Wr.norm())[1] / 0.01 + noise).softmax(1)
            hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
            pooled = torch.einsum("bchw,bdhw->bcd", hard + (soft - soft.detach()), Z)
            return reclip.contrastive_loss(pooled / Z[0, 0].numel() @ rectifier.Wq.T, present)

        kept = encode().half().cpu()

        def loss_of(way, rectifier):
            features = kept.to(device).float() if way == "cached" else encode()
            noise = reclip.gumbel_noise((C, *p.shape[2:]), [0], device)
            if way == "plain":
                return plain_loss(rectifier, features, noise)
            return reclip.rectification_loss(rectifier, features, p, *rectifier.texts(model),
                                             present, noise, 0.01, 0.01)

        steps(f"rectification step, {name}", first, loss_of, args)


@torch.no_grad()
def hypotheses(model, device, args):
    """Votes of a photograph's 121 crops, encoded one at a time by CLIP itself, or ours."""
    image = read_image(PHOTO).to(device)
    Wq = F.normalize(torch.randn(20, model.text_projection.shape[1], device=device), dim=-1)

    def plain():
        crops = reclip.cut_crops(image, 1 / 6, model.visual.input_resolution)
        features = torch.cat([model.encode_image(normalise(crop[None], CLIP_MEAN, CLIP_STD))
                              for crop in crops])
        return F.one_hot((features @ Wq.T).argmax(1), len(Wq)).sum(0)

    compare("hypotheses, 121 crops", plain, lambda: reclip.crop_votes(model, [image], Wq, 1 / 6)[0],
            args, lambda ours, plain: (ours - plain).abs().sum() <= 4)  # a crop or two may tie


# ---- Distillation, prediction, reading -----------------------------------------------------------


def distillation(model, device, args):
    """From a ReCLIP++ teacher, two views at a time. plain: logits, features and masks of pixels, as
    Eqs. 8 and 9 and Sec. III-E have them."""
    side, student = (64, "small") if args.quick else (512, "resnet50")
    amp, classes, D = device.type == "cuda", CLASSES["voc"], model.visual.proj.shape[1]
    torch.manual_seed(0)
    rectifier = reclip.Rectifier(model, classes, F.normalize(torch.randn(len(classes), D), dim=-1))
    rectifier = rectifier.to(device).requires_grad_(False)
    Wq, Wr = rectifier.texts(model)
    recipe = argparse.Namespace(**reclip.recipe("voc"), method="reclip++", preset="release",
                                dataset="voc", activation="quick_gelu", heads=None)
    teacher = reclip.RectifiedCLIP(model, rectifier, Wr, classes, recipe)
    views = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, device=device)
    sizes = torch.tensor([[side, side]] * 2, device=device)
    head = distill.InheritedHead(distill.inherited_parts(teacher), teacher.patch)
    network = distill.DeepLabV2(D, **distill.STUDENTS[student])
    Z, labels = distill.teach(teacher, views, sizes, amp=amp)
    kept = Z.half(), labels.to(torch.uint8)
    present = F.one_hot(labels.long(), len(Wq)).amax((1, 2)).bool()

    def pixels(x):
        return F.interpolate(x, (side, side), mode="bilinear")

    def plain_loss(Z, labels, Z_hat, logits):
        masks = F.one_hot(labels, len(Wq)).movedim(3, 1).float()
        pooled = torch.einsum("bchw,bdhw->bcd", masks, pixels(F.normalize(Z_hat, dim=1)))
        text = reclip.contrastive_loss(pooled / labels[0].numel() @ Wq.T, present)
        feature = (pixels(Z_hat) - pixels(Z)).abs().mean()
        return F.cross_entropy(pixels(logits), labels) + 0.5 * feature + 0.5 * text

    def loss_of(way, student):
        Z, labels = kept if way == "cached" else distill.teach(teacher, views, sizes, amp=amp)
        Z, labels = Z.float(), labels.long()
        Z_hat, logits = student(views, sizes, amp)
        if way == "plain":
            return plain_loss(Z, labels, Z_hat, logits)
        parts = distill.distillation_losses(logits, Z_hat, Z, labels, Wq, [1] * len(Wq), present)
        return parts["mask"] + 0.5 * parts["feature"] + 0.5 * parts["text"]

    student = distill.Student(network, head).to(device).train()
    steps(f"distillation step, 2 × {side}×{side}", student, loss_of, args)


def plain_label_map(logits, padded, view, size):
    """All classes at every pixel, as many at a time as make 2²⁶ numbers."""
    best, chunk = None, max(1, 2**26 // (size[0] * size[1]))
    for k in range(0, logits.shape[1], chunk):
        part = F.interpolate(logits[:, k : k + chunk], padded, mode="bilinear")
        part = F.interpolate(part[..., : view[0], : view[1]], size, mode="bilinear")
        value, index = part.max(1)
        best, label = (value, index) if best is None else (
            torch.maximum(best, value), torch.where(value > best, index + k, label))
    return label


@torch.no_grad()
def labelmap(model, device, args):
    size = (500, 700) if args.quick else (3000, 4000)
    for C in (20, 150):
        logits = F.interpolate(torch.randn(1, C, 9, 12, device=device), (32, 43), mode="bicubic")
        extent = logits + 0.2 * torch.randn_like(logits), (512, 688), (510, 680), size
        compare(f"label map, {size[0]}×{size[1]}, {C} classes",
                lambda: plain_label_map(*extent), lambda: reclip.label_map(*extent), args,
                lambda ours, plain: (ours != plain).float().mean() <= 1e-5)


def reading(model, device, args):
    """Training views of JPEGs of 500×375: a DataLoader's processes, and our threads."""
    photo, n = Image.open(PHOTO).convert("RGB").resize((600, 450)), 8 if args.quick else 200
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            box = (i % 100, i % 75, i % 100 + 500, i % 75 + 375)
            photo.crop(box).save(Path(folder, f"{i}.jpg"), quality=90)
        data = open_dataset("folder", folder, classes=["cat"])
        views = TrainingViews(data, (2048, 336), 336)
        for workers in (0, 1, 2, 4):
            processes = torch.utils.data.DataLoader(
                range(n), None, num_workers=workers, collate_fn=lambda i: {
                    key: value.numpy() for key, value in views.batch([(0, i)]).items()})
            keys = [[(0, i)] for i in range(n)]
            compare(f"reading {n} JPEGs, {workers} readers",
                    lambda: [torch.as_tensor(batch["size"]) for batch in processes],
                    lambda: [batch["size"] for batch in read_ahead(views.batch, keys, workers)],
                    args, near(0))


STAGES = dict(text=text, rectification=rectification, hypotheses=hypotheses,
              distillation=distillation, labelmap=labelmap, reading=reading)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--quick", action="store_true", help="tiny sizes, each stage once: does it run?")
    flag("--device", default="cpu", help="default: cpu")
    flag("--repeats", type=int, default=5, help="behind each median, at most (default: 5)")
    flag("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
          f"{'plain':>52}{'ours':>10}{'ratio':>10}", flush=True)
    model = random_clip(**{} if args.quick else VIT_B16).to(device)
    for stage in args.stages:
        STAGES[stage](model, device, args)


if __name__ == "__main__":
    main()
