"""Evaluate, explain and use what reclip.py and distill.py have learned.

    python evaluate.py                                        the newest checkpoint under runs/
    python evaluate.py --checkpoint runs/voc/reclip.pt        any other, on its own data set
    python evaluate.py --bias --figures --linear-probe        more about it
    python evaluate.py --images my/photos one.jpg             masks of one's own images
    python evaluate.py --images my/photos --method maskclip --classes "cat, dog"    of CLIP alone
    python evaluate.py --tables                               the papers' tables, on the demo

Prints mIoU, pixel accuracy and the IoU of every class, and adds them to results.json beside the
checkpoint. A rectification checkpoint of the authors' program (with --dataset) will do as well; its
results go to runs/authors-NAME/. Shapes: B images, C classes, h×w patches, H×W pixels.
"""

import argparse
import contextlib
import itertools
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.transforms.v2 import functional as TF

import reclip
from data import (CLASSES, PHOTOS, VOID, UserError, clean_exit, dataset_palette, draw_seed, evenly,
                  legend, list_folder, open_dataset, overlay, parse_classes, picture_sheet,
                  read_image, resize_to_scale, save_picture, write_text)
from reclip import (MACHINE, Progress, RectifiedCLIP, authors_method, authors_state, folder_lock,
                    from_authors, gather, hypotheses_file, leave_processes, load_checkpoint,
                    load_clip, make_folder, make_hypotheses, open_rectified, pick_device, plain,
                    plain_maskclip, query_features, rank, recipe, under_torchrun, use_amp, world)

# ------------------------------------------------------------------------------------------------
# Scores


def confusion_matrix(prediction, label, C):
    """Pixels by true class (rows) and predicted class (columns), int64 C×C.

    prediction, label: integer tensors of one shape; pixels whose label is not in 0…C-1 (void, 255)
    do not count.
    """
    pairs = label.long() * C + prediction
    return tally(pairs, (label >= 0) & (label < C), C * C).reshape(C, C)


def tally(index, valid, n):
    """How often each of 0…n-1 stands in `index` (int64) where `valid` (bool); int64 n.

    Selecting and bincount would wait for a GPU, and are five times slower on a CPU.
    """
    index = torch.where(valid, index, n).flatten()
    return index.new_zeros(n + 1).scatter_add_(0, index, torch.ones_like(index))[:n]


def scores(confusion, count_absent=False):
    """IoU of every class, their mean and pixel accuracy of a confusion matrix, in percent.

    A class without any pixel, true or predicted, is left out of the mean, as in mmsegmentation;
    count_absent counts it as 0, as the authors' program does. Its own IoU is None.
    """
    confusion = confusion.double()
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    iou = 100 * hits / union  # nan where a class is absent
    miou = iou.nan_to_num().mean() if count_absent else iou.nanmean()
    return dict(miou=miou.item(), pixel_accuracy=(100 * hits.sum() / confusion.sum()).item(),
                iou=[None if value != value else value for value in iou.tolist()])


# ------------------------------------------------------------------------------------------------
# Bias scores (ReCLIP++, Sec. IV-C and Table VII)

BINS = 5  # of the distance from the centre: 0–0.2, 0.2–0.4, … 0.8–1


def class_preference(confusion):
    """How far the right class is ahead of the most preferred wrong one, -1…1; higher is better.

    Of each row of the confusion matrix (int64 C×C, rows = truth), as shares of the row: the
    diagonal minus the largest other entry; the mean over the classes that have pixels, or None.
    """
    rows = confusion[confusion.sum(1) > 0].double()
    rows = rows / rows.sum(1, keepdim=True)
    right = torch.eye(len(confusion), dtype=torch.bool)[confusion.sum(1) > 0]
    ahead = rows[right] - rows.masked_fill(right, 0).amax(1)
    return ahead.mean().item() if len(rows) else None


def distance_bins(label, objects, bins=BINS):
    """The bin of each pixel's object, by how far the object is from the centre of the image.

    label, objects: int64 H×W, objects 0 where there is none. The distance is that from an object's
    centroid (over its pixels with a class) to the image's, relative to half the image's diagonal:
    0…1, in `bins` equal bins. Returns int64 H×W; `bins` for pixels of no object.
    """
    H, W = label.shape
    _, place = objects.masked_fill(label == VOID, 0).unique(return_inverse=True)
    count = place.flatten().bincount()
    y = (torch.arange(H) + 0.5 - H / 2)[:, None].expand(H, W).flatten().double()
    x = (torch.arange(W) + 0.5 - W / 2).expand(H, W).flatten().double()
    y, x = (place.flatten().bincount(side) / count for side in (y, x))
    distance = (y**2 + x**2).sqrt() / (math.hypot(H, W) / 2)
    nearest = (distance * bins).long().clamp(max=bins - 1)
    return nearest[place].masked_fill((objects == 0) | (label == VOID), bins)


def confusion_by_distance(prediction, label, nearest, C, bins=BINS):
    """A confusion matrix per bin of `distance_bins`, and one of pixels without object; summed up,
    they are the ordinary one. prediction, label, nearest: of one shape; int64 (bins+1)×C×C."""
    triples = (nearest * C + label) * C + prediction
    valid = (label >= 0) & (label < C)
    return tally(triples, valid, (bins + 1) * C * C).reshape(bins + 1, C, C)


def distance_curve(confusions):
    """mIoU per bin, in percent, over the classes whose objects lie there; None for an empty bin.

    confusions: int64 bins×C×C.
    """
    curve = []
    for confusion in confusions.double():
        hits, truth = confusion.diagonal(), confusion.sum(1)
        iou = 100 * hits / (truth + confusion.sum(0) - hits)
        curve.append(iou[truth > 0].mean().item() if truth.any() else None)
    return curve


def space_preference(curve):
    """Mean slope ΔmIoU / Δdistance of a distance curve between neighbouring non-empty bins.

    mIoU as a fraction here; higher is better, 0 would be no preference for the centre. None for
    fewer than two such bins. Between equal bins the mean of the slopes is the slope from the first
    to the last, so the score is as reliable as these two: hence few, wide bins.
    """
    points = [((i + 0.5) / len(curve), m / 100) for i, m in enumerate(curve) if m is not None]
    slopes = [(m - l) / (b - a) for (a, l), (b, m) in zip(points, points[1:])]
    return sum(slopes) / len(slopes) if slopes else None


# ------------------------------------------------------------------------------------------------
# Prediction


def prompt_denoising(logits, pd, temperature):
    """Switch off the classes that are nowhere likely (PD, MaskCLIP): their logits become -100.

    A class stays if its highest softmax(logits / temperature) over the image reaches pd; the most
    likely class always does. logits: B×C×h×w; pd: 0…1 or None for all. In float32: VOC's PD of 1.0
    keeps the classes whose float32 probability rounds to 1.
    """
    if pd is None:
        return logits
    confidence = (logits.float() / temperature).softmax(1).amax((2, 3))  # B×C
    off = (confidence < pd) & (confidence < confidence.amax(1, keepdim=True))
    return logits.masked_fill(off[:, :, None, None], -100.0)


def label_map(logits, padded, view, size, chunk=None):
    """Class of every pixel: logits upsampled (bilinear) to the network's input, then to the label.

    logits: B×C×h×w, covering `padded` (height, width) pixels, of which the top left `view` are the
    image, whose label has `size`. Returns int64 B×H×W. Goes through the classes in chunks (at most
    32, and 256 MB), so that memory does not grow with their number.
    """
    chunk, best = chunk or max(1, min(32, 2**26 // (len(logits) * math.prod(size)))), None
    for first in range(0, logits.shape[1], chunk):
        part = F.interpolate(logits[:, first : first + chunk], padded, mode="bilinear")
        part = part[..., : view[0], : view[1]]
        if tuple(view) != tuple(size):
            part = F.interpolate(part, size, mode="bilinear")
        value, index = part.max(1)
        if best is None:
            best, labels = value, index
        else:
            labels = torch.where(value > best, index + first, labels)
            best = torch.maximum(value, best)
    return labels


class Segmenter:
    """Any network as a function from images to label maps, one per stage it knows.

    network: a RectifiedCLIP, a distill.Student, or the path of a checkpoint; source: where the
    checkpoint's CLIP is now, if not where it was. names: "maskclip" and "rectified", or
    "distilled". pd: prompt denoising for the rectified logits, the recipe's by default. slide:
    None, or (window, stride) in pixels.
    """

    def __init__(self, network, device="cpu", source=None, pd="recipe", slide=None, amp=False):
        self.finished = True
        if isinstance(network, (str, Path)):
            checkpoint = load_checkpoint(network)
            self.finished = checkpoint["finished"]
            if checkpoint["kind"] == "distill":
                from distill import load_student  # which needs this module
                network = load_student(network, device)
            else:
                network = open_rectified(network, device, source)
        self.network, self.student = network, not isinstance(network, RectifiedCLIP)
        self.settings, self.classes = network.settings, network.classes
        self.pd = self.settings.pd if pd == "recipe" else pd
        self.slide, self.amp = slide, amp
        s = self.settings
        plain = not (getattr(s, "learn_query", False) or getattr(s, "tune_encoder", False))
        self.names = ["distilled"] if self.student else (
            ["maskclip"] * plain + ["rectified"] * (s.method != "maskclip"))

    def logits(self, views):
        """{name: logits} of uint8 views B×3×H×W, and the (height, width) that they cover."""
        if self.slide:
            return self.sliding_logits(views), views.shape[2:]
        return self.whole_logits(views)

    def whole_logits(self, views):
        """The same without windows. A student's grid covers the view, a ViT's whole patches."""
        if self.student:
            return {"distilled": self.network.logits(views, self.amp)}, views.shape[2:]
        Mq, M = self.network.logits(views, self.amp)
        stages, (h, w) = dict(maskclip=Mq, rectified=M), Mq.shape[2:]
        outputs = {name: stages[name] for name in self.names}
        return outputs, (h * self.network.patch, w * self.network.patch)

    @torch.no_grad()
    def features(self, views):
        """{name: B×K×h×w}, what a linear probe of each stage sees, and the area as in `logits`.

        CLIP is frozen, so Z is MaskCLIP's; "rectified" is Z beside the rectified logits, D+C
        channels; "distilled" is Ẑ, of unit length.
        """
        if self.student:
            Z_hat, _ = self.network(views, amp=self.amp)
            return {"distilled": F.normalize(Z_hat, dim=1)}, views.shape[2:]
        Z, p = self.network.features(views, self.amp)
        _, logits = self.network.rectifier(Z, p, self.network.Wr)
        stages = dict(maskclip=Z, rectified=torch.cat([Z, logits], 1))
        padded = tuple(side * self.network.patch for side in Z.shape[2:])
        return {name: stages[name] for name in self.names}, padded

    def sliding_logits(self, views):
        """Mean logits of overlapping windows, at the resolution of the views."""
        (window, stride), (H, W) = self.slide, views.shape[2:]
        starts = lambda side: sorted({min(i, max(side - window, 0))
                                      for i in range(0, side, stride)})
        sums, count = {}, torch.zeros(H, W, device=views.device)
        for top in starts(H):
            for left in starts(W):
                part = views[:, :, top : top + window, left : left + window]
                h, w = part.shape[2:]
                outputs, padded = self.whole_logits(part)
                for name, logits in outputs.items():
                    logits = F.interpolate(logits, padded, mode="bilinear")[..., :h, :w]
                    total = sums.setdefault(name, logits.new_zeros(*logits.shape[:2], H, W))
                    total[:, :, top : top + h, left : left + w] += logits
                count[top : top + h, left : left + w] += 1
        return {name: total / count for name, total in sums.items()}

    @torch.no_grad()
    def __call__(self, views, size):
        """{name: int64 B×H×W} for uint8 views B×3×h×w of images whose labels have `size` (H, W)."""
        outputs, padded = self.logits(views)
        if "rectified" in outputs:
            outputs["rectified"] = prompt_denoising(outputs["rectified"], self.pd,
                                                    self.settings.pd_temperature)
        return {name: label_map(logits, padded, views.shape[2:], size)
                for name, logits in outputs.items()}


# ------------------------------------------------------------------------------------------------
# Evaluation


class Labelled(torch.utils.data.Dataset):
    """(view, label) of a SegmentationData, for decoding in worker processes.

    bins: if more than 0, the label's `distance_bins` come third.
    """

    def __init__(self, data, scale, bins=0):
        self.data, self.scale, self.bins = data, scale, bins

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        view, label = resize_to_scale(self.data.image(i), self.scale), self.data.label(i)
        if not self.bins:
            return view, label.to(torch.uint8)
        return view, label, distance_bins(label, self.data.objects(i), self.bins)


def grouped_by_size(items, batch):
    """Collect tuples of tensors (view, label, …) into batches of which each part is of one size.

    At most 4·batch items wait for others of their size: beyond, the largest group goes as it is.
    """
    groups, waiting = {}, 0
    for item in items:
        group = groups.setdefault(tuple(part.shape for part in item), [])
        group.append(item)
        waiting += 1
        if len(group) == batch or waiting == 4 * batch:
            full = groups.pop(max(groups, key=lambda size: len(groups[size])))
            waiting -= len(full)
            yield [torch.stack(part) for part in zip(*full)]
    yield from ([torch.stack(part) for part in zip(*group)] for group in groups.values())


def evaluate(segment, data, scale, device, batch=16, workers=0, bins=0):
    """{name: confusion matrix} over all labelled images of `data`, each counted once.

    Of several processes each takes every world-th block of images; all get the whole result.
    segment: a Segmenter, or any function (views, size) → {name: int64 B×H×W}. bins: if more than 0,
    the matrices are those of `confusion_by_distance`.
    """
    items = Labelled(data, scale, bins)
    own = torch.cat(torch.arange(len(data)).split(batch)[rank()::world()] or [torch.arange(0)])
    loader = torch.utils.data.DataLoader(items, sampler=own.tolist(), batch_size=None,
                                         num_workers=workers)
    C, totals, progress = len(data.classes), {}, Progress("evaluate", len(data))
    for views, labels, *nearest in grouped_by_size(loader, batch):
        views, labels, *nearest = (to_device(part, device) for part in (views, labels, *nearest))
        for name, prediction in segment(views, labels.shape[1:]).items():
            matrix = (confusion_by_distance(prediction, labels, *nearest, C, bins) if bins else
                      confusion_matrix(prediction, labels, C))
            totals[name] = totals[name] + matrix if name in totals else matrix
        progress.advance(len(views) * world())
    progress.close()
    parts = gather({name: total.cpu() for name, total in totals.items()})
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part[name] for part in parts if name in part) for name in names}


def to_device(x, device):
    """A CPU tensor on a device, without waiting for what a GPU is at."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def hypothesis_quality(hypothesis, data):
    """Precision and recall, in per cent, of image-level hypotheses against the labels of `data`.

    hypothesis: bool len(data)×C. Counts all (image, class) pairs alike.
    """
    truth = torch.zeros_like(hypothesis)
    for i in range(len(data)):
        present = data.label(i).unique()
        truth[i, present[present != VOID]] = True
    hits = (hypothesis & truth).sum().item()
    return 100 * hits / max(1, hypothesis.sum().item()), 100 * hits / max(1, truth.sum().item())


def bias_scores(confusions, objects):
    """What --bias adds to a stage's results, from its confusion matrices by distance.

    objects: what an object is, in words.
    """
    curve, bins = distance_curve(confusions[:-1]), len(confusions) - 1
    return dict(
        class_preference=class_preference(confusions.sum(0)),
        space_preference=space_preference(curve), objects=objects,
        distance_curve=[dict(distance=[i / bins, (i + 1) / bins], miou=miou, pixels=int(m.sum()))
                        for i, (miou, m) in enumerate(zip(curve, confusions))])


def columns(heads, rows, width):
    """A text table; rows: (name, values), a value is a number, or None for a dash."""
    cell = lambda value: "–" if value is None else f"{value:.2f}"
    lines = [" " * width + "".join(f" {head:>11}" for head in heads)]
    for name, values in rows:
        lines.append(f"{name:{width}}" + "".join(f" {cell(value):>11}" for value in values))
    return lines


def table(results, classes):
    """A text table: mIoU and pixel accuracy, then the IoU of every class; one column per result."""
    width = max(18, *(len(name) for name in classes))
    rows = [("mIoU", [r["miou"] for r in results.values()]),
            ("pixel accuracy", [r["pixel_accuracy"] for r in results.values()])]
    rows += [(name, [r["iou"][name] for r in results.values()]) for name in classes]
    lines = columns([name.replace("linear_probe_", "LP ") for name in results], rows, width)
    lines.insert(3, "-" * len(lines[0]))
    return "\n".join(lines)


def bias_table(results):
    """A text table of what `bias_scores` gives, one column per result."""
    score = lambda key: [r[key] for r in results.values()]
    rows = [(key.replace("_", "-"), score(key)) for key in ("class_preference", "space_preference")]
    for part in zip(*score("distance_curve")):
        low, high = part[0]["distance"]
        rows.append((f"mIoU, distance {low:.1f}–{high:.1f}", [p["miou"] for p in part]))
    lines = columns(results, rows, 24)
    return "\n".join(lines + [f"(objects: {score('objects')[0]}; distance of their centroids from "
                              "the centre, relative to half the diagonal)"])


def save_results(path, results):
    """Add results to a run's results.json: {"maskclip": {"miou": …}, "rectified": …}, in percent.

    What an evaluation with the same outcome has added before, such as bias scores, stays.
    """
    with folder_lock(path.parent / ".results.lock", wait=True):
        try:
            old = json.loads(path.read_text("utf-8")) if path.exists() else {}
            if not all(isinstance(result, dict) for result in old.values()):
                raise ValueError
        except (ValueError, AttributeError):
            raise UserError(f"{path} is damaged; delete it and evaluate again") from None
        for name, result in results.items():
            result = json.loads(json.dumps(result))
            before = old.get(name, {})
            both = result.keys() & before.keys()
            same = "iou" in both and all(result[key] == before[key] for key in both)
            old[name] = before | result if same else result
        write_text(path, json.dumps(old, indent=1, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------
# Figures

TITLES = {"maskclip": "MaskCLIP", "rectified": "rectified", "distilled": "distilled"}
COLOURS = {"maskclip": (44, 140, 80), "rectified": (31, 90, 190), "distilled": (214, 100, 20)}
SCALE = torch.tensor([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37.0)])


def font(size):
    """Pillow's own font, `size` pixels high."""
    return ImageFont.load_default(size)


def in_colour(values):
    """Numbers from 0 (dark blue) to 1 (yellow) as colours: H×W → uint8 3×H×W."""
    place = values.clamp(0, 1) * (len(SCALE) - 1)
    low = place.long().clamp(max=len(SCALE) - 2)
    colours = torch.lerp(SCALE[low], SCALE[low + 1], (place - low)[..., None])
    return colours.round().to(torch.uint8).movedim(-1, 0)


def fitted(picture, cell):
    """A picture, uint8 3×H×W, scaled to fit a square of `cell` pixels, as a PIL image."""
    picture = TF.to_pil_image(picture)
    factor = cell / max(picture.size)
    size = [max(1, round(side * factor)) for side in picture.size]
    return picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX)


@torch.no_grad()
def comparison(segmenters, data, device, count=5):
    """Image, truth and each prediction for `count` images, evenly spaced (Fig. 5); a PIL image.

    segmenters: of several checkpoints. Predictions are shown where the truth has a class: elsewhere
    they are not scored either.
    """
    rows, present = [], set()
    for i in evenly(len(data), count):
        image, label = data.image(i), data.label(i)
        maps = [label]
        for segment in segmenters:
            view = resize_to_scale(image, segment.settings.scale)[None].to(device)
            predictions = segment(view, label.shape).values()
            maps += [p[0].cpu().where(label != VOID, VOID) for p in predictions]
        present |= set(torch.stack(maps).unique().tolist()) - {VOID}
        rows.append([image] + [overlay(image, m, data.palette) for m in maps])
    headings = ["image", "truth"] + [TITLES[name] for s in segmenters for name in s.names]
    return picture_sheet(rows, headings, present, data.classes, data.palette,
                         cell=min(190, 960 // len(headings)))


@torch.no_grad()
def heatmaps(segment, data, device, count=3, looked_at=24, cell=100):
    """Query, bias and rectified logits of two classes, in each of `count` images (Fig. 4); PIL.

    segment: a Segmenter of a checkpoint with a bias. Of evenly spaced images those are shown where
    MaskCLIP takes the most pixels of one class for another; the heat maps are of these two, with an
    outline of the former. Both maps of a row have one colour scale, from the lowest to the highest
    of their logits.
    """
    found = []
    for i in evenly(len(data), looked_at):
        label = data.label(i)
        view = resize_to_scale(data.image(i), segment.settings.scale)[None].to(device)
        mask = segment(view, label.shape)["maskclip"][0].cpu()
        confusion = confusion_matrix(mask, label, len(data.classes)).double()
        wrong = (confusion / confusion.sum().clamp(min=1)).fill_diagonal_(0)
        found.append((wrong.max().item(), i, divmod(int(wrong.argmax()), len(data.classes))))
    found = sorted(sorted(found)[-count:], key=lambda one: one[1])
    return beside([heatmap_block(segment, data, i, pair, device, cell) for _, i, pair in found])


def heatmap_block(segment, data, i, pair, device, cell):
    """One image's part of `heatmaps`: pictures in the first column, two classes beside them."""
    image, label, network = data.image(i), data.label(i), segment.network
    view = resize_to_scale(image, segment.settings.scale)[None].to(device)
    Z, p = network.features(view, segment.amp)
    Mq, final = network.rectifier(Z, p, network.Wr)
    Mb = network.rectifier.bias(Z, p, network.Wr).expand_as(Mq)
    rows = dict(Query=Mq, bias=Mb, rectified=Mq + network.rectifier.sign * Mb)
    if segment.settings.decoder:
        rows["decoded"] = final
    pictures = dict(image=image, truth=overlay(image, label, data.palette))
    for name, mask in segment(view, label.shape).items():
        mask = mask[0].cpu().where(label != VOID, VOID)
        pictures[TITLES[name]] = overlay(image, mask, data.palette)
    area = (label == pair[0]).float()[None, None]
    inside = F.interpolate(area, view.shape[2:]) > 0
    outline = (F.max_pool2d(inside.float(), 3, 1, 1) > 0) & ~inside
    padded = [side * network.patch for side in Z.shape[2:]]
    step, high = cell + 6, cell + 42
    block = Image.new("RGB", (3 * step - 6, len(rows) * high), "white")
    draw = ImageDraw.Draw(block)
    titles = list(pictures)[-len(rows):]
    for y, title, (name, logits) in zip(range(0, block.height, high), titles, rows.items()):
        maps = F.interpolate(logits[:, pair], padded, mode="bilinear")[0].cpu()
        maps = maps[:, : view.shape[2], : view.shape[3]]
        low, top = maps.min().item(), maps.max().item()
        heat = [in_colour((values - low) / max(top - low, 1e-12)) for values in maps]
        heat = [picture.where(~outline[0], 255) for picture in heat]
        cells = zip([title] + [data.classes[k][:15] for k in pair], [pictures[title]] + heat)
        for x, (text, picture) in zip(range(0, block.width, step), cells):
            draw.text((x, y + 4), text, "black", font(14))
            block.paste(fitted(picture, cell), (x, y + 22))
        bar, y = in_colour(torch.linspace(0, 1, 60).expand(9, -1)), y + cell + 25
        draw.text((step, y), f"{name}  {low:.2f}", "black", font(12))
        block.paste(TF.to_pil_image(bar), (block.width - 96, y + 4))
        draw.text((block.width - 31, y), f"{top:.2f}", "black", font(12))
    return block


def confusion_figure(confusions, classes, count=6, cell=44, top=128):
    """Confusion matrices side by side, for the classes that the first one confuses most (Fig. 1 b).

    confusions: {stage: int64 C×C}. The classes are those of its largest entries off the diagonal,
    in turn, until there are `count`. Numbers are per cent of a true class's pixels, so a row that
    does not add up to 100 has gone to classes that are not shown. A PIL image.
    """
    shares = [m.double() / m.sum(1, keepdim=True).clamp(min=1) for m in confusions.values()]
    chosen = []
    for pair in shares[0].clone().fill_diagonal_(-1).flatten().argsort(descending=True).tolist():
        chosen += [k for k in divmod(pair, len(classes)) if k not in chosen]
        if len(chosen) >= count:
            break
    chosen = sorted(chosen[:count])
    side, left = cell * len(chosen), 12 + max(int(font(15).getlength(classes[k])) for k in chosen)
    width = max(left + len(shares) * (side + 22), 660)
    sheet = Image.new("RGB", (width, top + side + 52), "white")
    draw = ImageDraw.Draw(sheet)
    for y, k in zip(range(top, top + side, cell), chosen):
        draw.text((left - 8, y + cell // 2), classes[k], "black", font(15), anchor="rm")
    for n, (name, share) in enumerate(zip(confusions, shares)):
        x = left + n * (side + 22)
        title = f"{TITLES[name]} ({class_preference(confusions[name]):.2f})"
        draw.text((x + side // 2, 14), title, "black", font(17), anchor="mm")
        for c, k in enumerate(chosen):
            upright(sheet, (x + c * cell + cell // 2 - 10, 28), classes[k], (top - 30, 20), 15)
            for r, true in enumerate(chosen):
                value, x0, y0 = share[true, k].item(), x + c * cell, top + r * cell
                colour = tuple(round(255 + value**0.7 * (end - 255)) for end in (20, 70, 150))
                draw.rectangle((x0, y0, x0 + cell - 2, y0 + cell - 2), fill=colour)
                draw.text((x0 + cell // 2 - 1, y0 + cell // 2 - 1), f"{100 * value:.0f}",
                          "white" if value > 0.4 else "black", font(15), anchor="mm")
    draw.text((12, top + side + 8), "rows: truth, columns: prediction, in per cent of the true "
              "class's pixels (of all classes)\nin brackets: the class-preference score, over all "
              "classes", "black", font(14))
    return sheet


def distance_figure(curves):
    """mIoU by an object's distance from the centre, one line per stage (Fig. 1 a); a PIL image.

    curves: {stage: list as distance_curve's}.
    """
    bins, lines = max(map(len, curves.values())), []
    for name, curve in curves.items():
        slope = space_preference(curve)
        lines.append((TITLES[name] + ("" if slope is None else f" (mean slope {slope:.2f})"),
                      COLOURS[name], [((i + 0.5) / bins, miou, 0) for i, miou in enumerate(curve)]))
    return chart(lines, [i / bins for i in range(bins + 1)],
                 "distance of an object from the centre of the image (1: a corner)")


def chart(lines, ticks, title, width=1800, height=960):
    """mIoU against a quantity: lines between points; a PIL image of half the size it is drawn at.

    lines: (name, colour, points), a point is (x, mIoU or None, half the length of its error bar);
    ticks: the values of x that are marked, in ascending order; title: what x is.
    """
    left, top, right, bottom = 150, 40 + 52 * len(lines), width - 50, height - 120
    ends = [m + s for *_, points in lines for _, miou, sd in points if miou is not None
            for m, s in ((miou, sd), (miou, -sd))] or [0]
    step = next(step for step in (1, 2, 5, 10, 20) if max(ends) - min(ends) < 6 * step)
    low, high = step * math.floor(min(ends) / step), step * math.floor(max(ends) / step + 1)

    def place(x, miou):
        return (left + (x - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left),
                bottom - (miou - low) / (high - low) * (bottom - top))

    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for m in range(low, high + 1, step):
        draw.line([place(ticks[0], m), place(ticks[-1], m)], (215, 215, 215), 2)
        draw.text((left - 16, place(ticks[0], m)[1]), str(m), "black", font(32), anchor="rm")
    for tick in ticks:
        x, y = place(tick, low)
        draw.line([(x, y), (x, y + 12)], "black", 2)
        draw.text((x, y + 36), f"{tick:.2g}", "black", font(32), anchor="mm")
    draw.line([(left, top), (left, bottom), (right, bottom)], "black", 2)
    draw.text(((left + right) / 2, height - 32), title, "black", font(34), anchor="mm")
    upright(sheet, (20, (top + bottom) // 2 - 200), "mIoU, per cent", (400, 48), 34, "mm")
    for n, (name, colour, points) in enumerate(lines):
        points = [(*place(x, m), place(x, m + s)[1]) for x, m, s in points if m is not None]
        draw.line([point[:2] for point in points], colour, 6)
        for x, y, end in points:
            draw.ellipse((x - 10, y - 10, x + 10, y + 10), colour)
            draw.line([(x, end), (x, 2 * y - end)], colour, 3)
        y = 30 + 52 * n
        draw.line([(left, y), (left + 72, y)], colour, 6)
        draw.text((left + 92, y), name, "black", font(32), anchor="lm")
    return sheet.resize((width // 2, height // 2), Image.Resampling.LANCZOS)


def upright(sheet, corner, text, size, high, anchor="lm"):
    """Write on a PIL image from bottom to top; size: (length, height) of the line."""
    line = Image.new("RGB", size, "white")
    x = size[0] // 2 if anchor == "mm" else 0
    ImageDraw.Draw(line).text((x, size[1] // 2), text, "black", font(high), anchor=anchor)
    sheet.paste(line.rotate(90, expand=True), corner)


def beside(pictures, gap=18):
    """PIL images of one size in a row, as one."""
    step = pictures[0].width + gap
    sheet = Image.new("RGB", (12 - gap + len(pictures) * step, pictures[0].height), "white")
    for n, picture in enumerate(pictures):
        sheet.paste(picture, (6 + n * step, 0))
    return sheet


# ------------------------------------------------------------------------------------------------
# Linear probe: what the features hold, told by a classifier that is given ground truth


def class_shares(labels, C, view, padded, grid):
    """The share of each cell of a grid that each class covers; B×C×h×w.

    labels: int64 B×H×W, taken to the size `view`, the top left of the `padded` pixels of the grid.
    """
    labels = F.interpolate(labels[:, None].float(), view, mode="nearest-exact")[:, 0]
    labels = F.pad(labels, (0, padded[1] - view[1], 0, padded[0] - view[0]), value=VOID)
    classes = torch.arange(C, device=labels.device)[:, None, None]
    return torch.stack([F.adaptive_avg_pool2d((one == classes).float(), grid) for one in labels])


def linear_probe(segment, data, device, steps=1000, batch=16, workers=0, seed=0, memory=4):
    """One 1×1 classifier on each stage's frozen features, trained with the ground truth of `data`.

    segment: a Segmenter. Features are standardised first (BatchNorm without parameters, so the
    classifier stays linear); cross-entropy against the classes' shares of a cell; AdamW, 3e-3, down
    to 0 along a cosine. The features are kept after the first epoch where they fit into `memory`
    GiB (on the device), and computed anew in each otherwise.

    Returns a function (views, size) → {"linear_probe_" + name: int64 B×H×W}.
    """
    C, probes, progress = len(data.classes), nn.ModuleDict(), Progress("linear probe", steps)
    kept, left = [], memory * 2**30  # CLIP and the student are frozen: what they say can be kept

    def shuffled(n, epoch):
        generator = torch.Generator().manual_seed(draw_seed(seed, epoch, "linear probe"))
        return torch.randperm(n, generator=generator).tolist()

    def encoded(epoch):
        """Batches of features by stage, {name: float16 B×K×h×w}, and of class shares B×C×h×w."""
        loader = torch.utils.data.DataLoader(Labelled(data, segment.settings.scale),
                                             sampler=shuffled(len(data), epoch), batch_size=None,
                                             num_workers=workers)
        for views, labels in grouped_by_size(loader, batch):
            features, padded = segment.features(views.to(device))
            grid = next(iter(features.values())).shape[2:]
            shares = class_shares(labels.to(device), C, views.shape[2:], padded, grid)
            yield {name: feature.half() for name, feature in features.items()}, shares

    def batches():
        nonlocal left
        for item in encoded(0):
            left -= sum(part.nbytes for part in (*item[0].values(), item[1]))
            kept.append(item)
            if left < 0:
                kept.clear()
            yield item
        for epoch in itertools.count(1):
            if left < 0:
                yield from encoded(epoch)
            else:
                yield from (kept[i] for i in shuffled(len(kept), epoch))

    for features, shares in itertools.islice(batches(), steps):
        if not probes:
            torch.manual_seed(seed)
            for name, feature in features.items():
                K = feature.shape[1]
                probes[name] = nn.Sequential(nn.BatchNorm2d(K, affine=False), nn.Conv2d(K, C, 1))
            optimizer = torch.optim.AdamW(probes.to(device).parameters(), 3e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        loss = 0.0
        for name, feature in features.items():
            log_p = probes[name](feature.float()).log_softmax(1)
            loss = loss - (shares * log_p).sum() / shares.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.advance(1, lambda: f"  loss {loss.item():.3f}")
    progress.close()
    probes.eval()

    @torch.no_grad()
    def predict(views, size):
        features, padded = segment.features(views)
        logits = {f"linear_probe_{name}": probes[name](features[name]) for name in features}
        return {name: label_map(l, padded, views.shape[2:], size) for name, l in logits.items()}

    return predict


# ------------------------------------------------------------------------------------------------
# Your own images


def find_images(paths):
    """The image files among paths and in the folders among them, as a list of Path.

    Raises UserError, before anything is done, for a path that is not there and an empty folder.
    """
    files = []
    for path in map(Path, paths):
        inside = [path / name for name in list_folder(path, PHOTOS)] if path.is_dir() else [path]
        if not path.exists():
            raise UserError(f"--images: no file or folder {path}")
        if not inside:
            raise UserError(f"--images: no images in {path}; expected {', '.join(PHOTOS)}")
        files += inside
    return files


class Photos(torch.utils.data.Dataset):
    """(image, view) of image files, or, where a file cannot be read, the message that says so."""

    def __init__(self, files, scale):
        self.files, self.scale = files, scale

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            image = read_image(self.files[i])
        except UserError as error:
            return str(error)
        return image, resize_to_scale(image, self.scale)


def safe_name(path, used):
    """A name for what is made of an image: its own, of harmless characters, unlike those in `used`.

    used: a set of names without regard to case, which the new one joins. The second photo.jpg, or
    photo.png beside photo.jpg, becomes photo-2.
    """
    stem = re.sub(r"[^\w.-]+", "_", path.stem).strip(".")[:50] or "image"
    names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
    name = next(name for name in names if name.lower() not in used)
    used.add(name.lower())
    return name


def predict(segment, stage, files, out, device, workers=0):
    """Masks of image files of any size, one after the other; returns the files that failed.

    stage: one of segment.names; files: list of Path; out: the folder, for
    masks/NAME.png      the class of every pixel, 0…C-1, as a palette picture of the image's size,
    overlays/NAME.png   the classes in colour on the image, 420 to 1000 pixels, with a legend,
    predictions.jsonl   a line for every file: what was made of it, and the per cent of its pixels
                        that each class has; under the name .part until all are done.
    """
    colours = dataset_palette(segment.settings.dataset, len(segment.classes))
    for folder in ("masks", "overlays"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    part, used, failed = out / "predictions.jsonl.part", set(), []
    loader = torch.utils.data.DataLoader(Photos(files, segment.settings.scale), batch_size=None,
                                         num_workers=workers)
    progress = Progress("predict", len(files))
    with open(part, "w") as lines:
        for path, loaded in zip(files, loader):
            line = dict(image=str(path))
            if isinstance(loaded, str):
                print(f"error: {loaded}", file=sys.stderr)
                failed.append(path)
                line["error"] = loaded
            else:
                image, view = loaded
                mask = segment(view[None].to(device), image.shape[1:])[stage][0].cpu()
                name = safe_name(path, used)
                share = mask.flatten().bincount(minlength=len(colours)) / mask.numel() * 100
                order = [k for k in share.argsort(descending=True).tolist() if share[k] > 0]
                areas = {segment.classes[k]: round(share[k].item(), 4) for k in order}
                picture = Image.fromarray(mask.to(torch.uint8).numpy())
                picture.putpalette(colours.flatten().tolist())
                save_picture(picture, out / "masks" / f"{name}.png")
                entries = [(f"{segment.classes[k]} {share[k]:.1f} %", colours[k]) for k in order]
                sheet = with_legend(image, mask, colours, entries)
                save_picture(sheet, out / "overlays" / f"{name}.png")
                line |= dict(mask=f"masks/{name}.png", overlay=f"overlays/{name}.png", stage=stage,
                             width=image.shape[2], height=image.shape[1], areas=areas)
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            progress.advance()
    progress.close()
    part.replace(out / "predictions.jsonl")
    return failed


def with_legend(image, mask, colours, entries, longest=1000, least=420):
    """The overlay of a mask on its image above a legend, `least` to `longest` pixels wide; PIL."""
    factor = min(longest / max(image.shape[1:]), max(1, least / image.shape[2]))
    size = [max(1, round(side * factor)) for side in image.shape[1:]]
    mask = TF.resize(mask[None], size, TF.InterpolationMode.NEAREST_EXACT)[0]
    picture = TF.to_pil_image(overlay(TF.resize(image, size, antialias=True), mask, colours))
    names = legend(entries, max(least, picture.width))
    sheet = Image.new("RGB", (names.width, picture.height + 8 + names.height), "white")
    sheet.paste(picture, (0, 0))
    sheet.paste(names, (0, picture.height + 8))
    return sheet


# ------------------------------------------------------------------------------------------------
# Every table of the two papers, and Fig. 3 of ReCLIP++

# Runs of reclip.py: what they change of plain ReCLIP++. A model without decoder wants the τ1 of
# ReCLIP (sharp), one with a decoder, whose BatchNorm widens the logits, that of ReCLIP++ (soft).
RECTIFIED = {
    "maskclip": "--method maskclip",
    "reclip": "--method reclip",
    "reclip++": "",
    "reclip-decoder": "--method reclip --decoder --mask-temperature {soft}",
    "reclip-decoder-crops":
        "--method reclip --decoder --mask-temperature {soft} --hypothesis crops",
    "reclip-reference": "--method reclip --bias reference",
    "reclip-reference-query": "--method reclip --bias reference --learn-query",
    "reclip-add": "--method reclip --add",
    "query": "--learn-query",
    "add": "--add",
    "tune-encoder": "--tune-encoder --views 0",
    "global": "--hypothesis global",
    "no-bias": "--bias none",
    "no-decoder": "--no-decoder --mask-temperature {sharp}",
    "cosine": "--pooling cosine",
    "class-norm": "--wr-norm class",
}
# Runs of distill.py: their teacher, and what they change of the recipe.
DISTILLED = {"maskclip+": ("maskclip", "")} | {
    f"{teacher}-{name}": (teacher, flags) for teacher in ("reclip", "reclip++")
    for name, flags in (("distilled", ""), ("mask", "--losses mask"),
                        ("mask-feature", "--losses mask,feature"), ("learned", "--head learned"),
                        ("query", "--head query"), ("query-bias", "--head query+bias"))}
# Title; data sets of the papers' numbers; the row that the others are compared with; rows: what it
# is, run and, unless mIoU, measure, the papers' numbers.
TABLES = (
    ("Tables I and II: results", "VOC Context ADE Cityscapes Stuff", 0, (
        ("MaskCLIP", "maskclip", "49.5 21.7 9.5 19.8 13.6"),
        ("MaskCLIP+", "maskclip+", "70.0 31.1 12.2 25.2 19.5"),
        ("ReCLIP, rectified", "reclip", "58.5 25.8 11.1 16.2 14.6"),
        ("ReCLIP, distilled", "reclip-distilled", "75.8 33.8 14.3 19.9 20.3"),
        ("ReCLIP++, rectified", "reclip++", "73.5 34.0 13.5 21.7 20.9"),
        ("ReCLIP++, distilled", "reclip++-distilled", "79.2 34.5 14.5 26.9 23.2"))),
    ("Table I: linear probes, which are trained with ground truth", "VOC Cityscapes Stuff", 3, (
        ("MaskCLIP", "maskclip linear_probe", "– – –"),
        ("MaskCLIP+", "maskclip+ linear_probe", "– – –"),
        ("ReCLIP, rectified", "reclip linear_probe", "– – –"),
        ("ReCLIP, distilled", "reclip-distilled linear_probe", "76.1 49.3 26.2"),
        ("ReCLIP++, rectified", "reclip++ linear_probe", "– – –"),
        ("ReCLIP++, distilled", "reclip++-distilled linear_probe", "80.3 54.1 29.5"))),
    ("Table III: from ReCLIP to ReCLIP++, rectified", "VOC Context", 0, (
        ("ReCLIP", "reclip", "58.5 25.8"),
        ("+ decoder", "reclip-decoder", "68.6 27.8"),
        ("+ hypotheses of crops", "reclip-decoder-crops", "70.4 33.1"),
        ("+ independent biases (ReCLIP++)", "reclip++", "73.5 34.0"))),
    ("Table IV: should the Query be learned?", "VOC Context", -1, (
        ("learned", "query", "71.6 32.1"),
        ("fixed (ReCLIP++)", "reclip++", "73.5 34.0"))),
    ("Table V: subtract or add the bias", "VOC Context", -1, (
        ("add", "add", "72.4 32.9"),
        ("subtract (ReCLIP++)", "reclip++", "73.5 34.0"))),
    ("Table VI: fine-tuning CLIP's image encoder", "VOC Context", -1, (
        ("fine-tuned", "tune-encoder", "1.2 0.4"),
        ("frozen (ReCLIP++)", "reclip++", "73.5 34.0"))),
    ("Table VII: class-preference score", "Context", 0, (
        ("MaskCLIP", "maskclip class_preference", "0.29"),
        ("MaskCLIP+", "maskclip+ class_preference", "0.31"),
        ("ReCLIP, rectified", "reclip class_preference", "0.33"),
        ("ReCLIP++, rectified", "reclip++ class_preference", "0.37"))),
    ("Table VII: space-preference score", "VOC", 0, (
        ("MaskCLIP", "maskclip space_preference", "-0.50"),
        ("MaskCLIP+", "maskclip+ space_preference", "-0.48"),
        ("ReCLIP, rectified", "reclip space_preference", "-0.41"),
        ("ReCLIP++, rectified", "reclip++ space_preference", "-0.29"))),
    ("Table VIII: losses of distillation, ReCLIP++", "VOC", -1, (
        ("mask", "reclip++-mask", "77.7"),
        ("mask, feature", "reclip++-mask-feature", "78.9"),
        ("mask, feature, text", "reclip++-distilled", "79.2"))),
    ("Table IX: the student's head, ReCLIP++", "VOC", -1, (
        ("DeepLab's own, learned", "reclip++-learned", "76.2"),
        ("Query", "reclip++-query", "48.3"),
        ("Query, bias", "reclip++-query-bias", "50.6"),
        ("Query, bias, decoder", "reclip++-distilled", "79.2"))),
    ("Conference paper, Table 3: should the Query be learned?", "VOC Context ADE", -1, (
        ("learned", "reclip-reference-query", "56.7 23.7 9.4"),
        ("fixed (ReCLIP without position)", "reclip-reference", "56.7 24.4 10.5"))),
    ("Conference paper, Table 4: parts of the bias", "VOC Context ADE", 0, (
        ("Query (MaskCLIP)", "maskclip", "49.5 21.7 9.5"),
        ("Query, Reference", "reclip-reference", "56.7 24.4 10.5"),
        ("Query, Reference, position (ReCLIP)", "reclip", "58.5 25.8 11.1"))),
    ("Conference paper, Table 5: subtract or add the bias", "VOC Context", -1, (
        ("neither (MaskCLIP)", "maskclip", "49.5 21.7"),
        ("add", "reclip-add", "57.8 24.9"),
        ("subtract (ReCLIP)", "reclip", "58.5 25.8"))),
    ("Conference paper, Table 6: the student's head, ReCLIP", "VOC", 2, (
        ("DeepLab's own, learned", "reclip-learned", "73.8"),
        ("Query", "reclip-query", "74.1"),
        ("Query, Reference", "reclip-distilled", "75.4"),
        ("Query, Reference, position", "reclip-query-bias", "75.0"))),
    ("Conference paper, Table 7: losses of distillation, ReCLIP", "VOC", -1, (
        ("mask", "reclip-mask", "73.0"),
        ("mask, feature", "reclip-mask-feature", "74.1"),
        ("mask, feature, text", "reclip-distilled", "75.4"))),
    ("Not in the papers' tables, rectified", "–", None, (
        ("ReCLIP++", "reclip++", "–"),
        ("cosine pooling", "cosine", "–"),
        ("Wr normalised per class", "class-norm", "–"),
        ("no bias subtracted", "no-bias", "–"),
        ("no decoder", "no-decoder", "–"))),
)
SWEEPS = {  # of Fig. 3, beside the recipe's own values
    "shapes": dict(threshold=(0.0, 0.24, 0.36, 0.48), crop_ratio=(1 / 4, 1 / 3, 2 / 3, 1.0)),
    "others": dict(threshold=(0.0, 0.035, 0.07, 0.14), crop_ratio=(1 / 12, 1 / 8, 1 / 4, 1 / 3)),
}


def all_runs(dataset):
    """RECTIFIED and TABLES with τ1 and Fig. 3 filled in: {run: flags}, and a list of
    dict(title, data_sets, reference, rows), each row a dict(label, run, measure, papers)."""
    own, sweeps = recipe(dataset), SWEEPS.get(dataset, SWEEPS["others"])
    sharp, soft = (recipe(dataset, method=m)["mask_temperature"] for m in ("reclip", "reclip++"))
    runs = {name: flags.format(sharp=sharp, soft=soft) for name, flags in RECTIFIED.items()}
    tables = list(TABLES)
    for letter, key, title in (("t", "threshold", "Fig. 3 a: threshold t of the hypotheses"),
                               ("r", "crop_ratio", "Fig. 3 b: relative size r of the crops")):
        rows = []
        for value in sorted({own[key], *sweeps[key]}):
            run = "reclip++" if value == own[key] else f"{letter}-{value:.3g}"
            runs.setdefault(run, f"--{key.replace('_', '-')} {value}")
            rows.append((f"{letter} = {value:.3g}", run, "–"))
        rows.append(("global hypotheses", "global", "–"))
        tables.append((f"{title}, rectified", "–", None, rows))
    number = lambda text: None if text == "–" else float(text)
    return runs, [dict(title=title, data_sets=names.split(), reference=reference, rows=[
        dict(label=label, run=run.split()[0], measure=(run.split() + ["miou"])[1],
             papers=[*map(number, papers.split())]) for label, run, papers in rows])
        for title, names, reference, rows in tables]


def command_options(args):
    """What of this script's arguments is passed on to the others, as a list of words."""
    given = {flag: getattr(args, flag) for flag in ("data_root", "clip", "device", "workers")}
    words = [] if args.amp is None else ["--amp" if args.amp else "--no-amp"]
    return words + [str(word) for flag, value in given.items() if value is not None
                    for word in (f"--{flag.replace('_', '-')}", value)]


def command(run, seed, runs, args):
    """How to make a run: "reclip" or "distill", and its arguments as a list of words.

    runs: as `all_runs` gives them; args: of this script.
    """
    words = ["--out", f"{args.out}/{run}-{seed}", *command_options(args)]
    if run in DISTILLED:
        teacher, flags = DISTILLED[run]
        teacher = f"{args.out}/{teacher}-{seed}/reclip.pt"
        return "distill", ["--teacher", teacher, *flags.split(), *words]
    words = ["--dataset", args.dataset, "--seed", str(seed), *runs[run].split(), *words]
    s = reclip.settings_of(reclip.parse_arguments(words))
    kind = s.hypothesis + (f"-{s.crop_ratio:.3g}" if s.hypothesis == "crops" else "")
    return "reclip", [*words, "--cache", f"{args.out}/cache-{kind}-{seed}"]


def measured(folder, run):
    """{measure: value} of a run's results.json: of its own stage, and its linear probe's mIoU."""
    path = Path(folder) / "results.json"
    stage = "distilled" if run in DISTILLED else "maskclip" if run == "maskclip" else "rectified"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    results = {name: result for name, result in results.items() if result.get("standard")}
    probe = results.get(f"linear_probe_{stage}")
    return results.get(stage, {}) | ({"linear_probe": probe["miou"]} if probe else {})


def missing(script, run, words, needed):
    """Which of the measures that are `needed` of a run are still to be made, as a set.

    All of them until its training is finished with just these arguments.
    """
    args = script.parse_arguments(words)
    path = args.out / f"{script.__name__}.pt"
    checkpoint = load_checkpoint(path) if path.exists() else dict(finished=False)
    given = {key: value for key, value in plain(args).items()
             if value is not None and key not in MACHINE}
    if "losses" in given:
        given["losses"] = given["losses"].split(",")
    kept = checkpoint.get("settings", {})
    if not checkpoint["finished"] or any(kept.get(key) != value for key, value in given.items()):
        return needed
    return needed - measured(args.out, run).keys()


class Quiet:
    """In place of sys.stdout: a run's output goes to a file, now and then a line to the user."""

    def __init__(self, file, run):
        self.file, self.run, self.stdout, self.shown = file, run, sys.stdout, time.monotonic()
        self.flush, self.isatty = file.flush, lambda: False

    def write(self, text):
        self.file.write(text)
        live = self.stdout.isatty()
        if text.strip() and time.monotonic() - self.shown > (0.3 if live else 5):
            self.shown = time.monotonic()
            print(f"{self.run}: {text.strip()[:100]}", end="\x1b[K\r" if live else "\n",
                  file=self.stdout, flush=True)


def make_runs(runs, tables, args):
    """Train and evaluate whatever the tables need and is not there yet.

    runs, tables: as `all_runs` gives them. What a run prints goes to log.txt in its folder.
    """
    import distill  # which needs this module
    needed = {run: set() for run in (*runs, *DISTILLED)}  # teachers before students
    for row in (row for table in tables for row in table["rows"]):
        needed[row["run"]].add(row["measure"])
    scripts, todo, total = dict(reclip=reclip, distill=distill), [], len(args.seeds) * len(needed)
    for seed, run in itertools.product(args.seeds, needed):
        name, words = command(run, seed, runs, args)
        if missing(scripts[name], run, words, needed[run]):
            todo.append((seed, run, scripts[name], words))
    print(f"{total} runs, {len(todo)} of them still to be made → {args.out}/", flush=True)
    progress = Progress("tables", total, total - len(todo))
    for seed, run, script, words in todo:
        folder = args.out / f"{run}-{seed}"
        make_folder(folder)
        with open(folder / "log.txt", "a", encoding="utf-8") as file:
            with contextlib.redirect_stdout(Quiet(file, folder.name)):
                if missing(script, run, words, {"miou"}):
                    script.main(words)
                left = missing(script, run, words, needed[run])
                flags = ["--linear-probe"] * ("linear_probe" in left)
                flags += ["--bias"] * bool(left - {"linear_probe"})
                if flags:
                    main(["--checkpoint", f"{folder}/{script.__name__}.pt", *flags,
                          *command_options(args)])
        progress.advance(1)
    progress.close()


def direction(ours, reference, theirs, their_reference):
    """Whether a row is on the same side of its table's reference row as in the paper.

    ours, reference: a value a seed; theirs, their_reference: a number, or None, for each of their
    data sets, over which the mean counts. "same" or "opposite" where our mean difference is more
    than one standard deviation (over the seeds) of the difference, else "within s.d."; None if
    that cannot be told.
    """
    gaps = [a - b for a, b in zip(theirs, their_reference) if None not in (a, b)]
    if not any(gaps) or None in (*ours, *reference) or len(ours) < 2:
        return None
    differences = [a - b for a, b in zip(ours, reference)]
    mean = statistics.mean(differences)
    if abs(mean) <= statistics.stdev(differences):
        return "within s.d."
    return "same" if mean * sum(gaps) > 0 else "opposite"


def collect(tables, args):
    """Add to each row of the tables of `all_runs`, for tables.json: our values, a value a seed, n,
    mean and sd (None where there is none), and direction."""
    for table in tables:
        for row in table["rows"]:
            values = [measured(args.out / f"{row['run']}-{seed}", row["run"])[row["measure"]]
                      for seed in args.seeds]
            known = None not in values
            row |= dict(seeds=args.seeds, values=values, n=len(values), direction=None,
                        mean=statistics.mean(values) if known else None,
                        sd=statistics.stdev(values) if known and len(values) > 1 else None)
        for row in table["rows"] if table["reference"] is not None else ():
            other = table["rows"][table["reference"]]
            row["direction"] = "reference" if row is other else direction(
                row["values"], other["values"], row["papers"], other["papers"])


NOTE = """Ours: mean ± standard deviation over n = {n} seeds ({seeds}), on the validation images of
{dataset}. *Theirs*: the number of the papers for the same row, on the data set named, which is
not ours; none of it was measured here. mIoU in per cent unless the title says otherwise.

Direction compares each row with its table's reference row: is it on the same side of it as in the
papers (in the mean over their data sets)? **opposite**: it is not, by more than one standard
deviation of our difference over the seeds. "within s.d.": our difference is smaller than that.
With a single seed nothing is said.

A model without decoder is trained with the τ1 of ReCLIP's recipe, one with a decoder with that of
ReCLIP++'s; a command has --mask-temperature where this is not its own method's.
"""


def markdown(tables, runs, args):
    """Tables with our numbers as text in Markdown, with the command of every run at the end."""
    line = lambda cells: "| " + " | ".join(cells) + " |"
    lines = [NOTE.format(n=len(args.seeds), seeds=", ".join(map(str, args.seeds)),
                         dataset=args.dataset)]
    for table in tables:
        theirs = [f"*theirs, {name}*".replace(", –", "") for name in table["data_sets"]]
        heads = ["", f"ours, {args.dataset}", *theirs, "direction", "run"]
        lines += [f"### {table['title']}\n", line(heads), "|---" * len(heads) + "|"]
        for row in table["rows"]:
            digits = 2 if row["measure"].endswith("preference") else 1
            show = lambda value: "–" if value is None else f"{value:.{digits}f}"
            ours = show(row["mean"]) + ("" if row["sd"] is None else f" ± {show(row['sd'])}")
            theirs = ["–" if value is None else f"*{show(value)}*" for value in row["papers"]]
            mark = {None: "–", "opposite": "**opposite**"}.get(row["direction"], row["direction"])
            lines.append(line([row["label"], ours, *theirs, mark, row["run"]]))
        lines.append("")
    lines += [f"### Runs, with seed {args.seeds[0]}\n", "| run | command |", "|---|---|"]
    for run in (*runs, *DISTILLED):
        script, words = command(run, args.seeds[0], runs, args)
        lines.append(line([run, f"`python {script}.py {' '.join(words)}`"]))
    return "\n".join(lines) + "\n"


def sensitivity_figure(tables):
    """Fig. 3: mIoU against t and r beside that of the global hypotheses; a PIL image.

    tables: those of Fig. 3 with our numbers.
    """
    panels, point = [], lambda x, row: (x, row["mean"], row["sd"] or 0)
    for *rows, last in (table["rows"] for table in tables):
        xs = [float(row["label"].split()[-1]) for row in rows]
        lines = [("hypotheses of crops", COLOURS["rectified"], [*map(point, xs, rows)]),
                 (last["label"], COLOURS["distilled"], [point(xs[i], last) for i in (0, -1)])]
        panels.append(chart(lines, xs, rows[0]["label"].split()[0], width=940, height=800))
    return beside(panels)


def make_tables(args):
    """--tables. Returns what tables.json holds. Raises UserError where there is no ground truth."""
    for split in "train", "val":
        if not open_dataset(args.dataset, args.data_root, split).has_labels:
            raise UserError(f"--tables needs labels to measure with; {args.dataset} has none in "
                            f"its {split} split")
    runs, tables = all_runs(args.dataset)
    make_runs(runs, tables, args)
    collect(tables, args)
    write_text(args.out / "tables.json", json.dumps(tables, indent=1, ensure_ascii=False) + "\n")
    write_text(args.out / "tables.md", markdown(tables, runs, args))
    save_picture(sensitivity_figure(tables[-2:]), args.out / "fig3.png")
    print(f"→ {args.out}/tables.md, tables.json, fig3.png")
    return tables


# ------------------------------------------------------------------------------------------------
# The command


def newest_checkpoint(folder=Path("runs")):
    """The checkpoint under a folder that was written last. Raises UserError if there is none."""
    found = [path for name in ("reclip.pt", "distill.pt") for path in folder.glob(f"*/{name}")]
    if not found:
        raise UserError(f"no checkpoint under {folder}/; run python reclip.py first, or name one "
                        "with --checkpoint")
    return max(found, key=lambda path: path.stat().st_mtime)


def open_network(args, path, device):
    """What --checkpoint names, if not our own, or --classes: a RectifiedCLIP, or None.

    path: of the checkpoint, or None for MaskCLIP with args.classes. Raises UserError.
    """
    state = None if path is None else authors_state(path)
    if path is not None and state is None:
        if args.surgery or args.activation:
            raise UserError(f"--surgery and --activation are what {path} was trained with; they "
                            "cannot be changed afterwards")
        return None
    dataset = args.dataset or ("shapes" if args.clip == "shapes-tiny" else "folder")
    if path is not None and dataset not in CLASSES:
        raise UserError(f"{path} is a checkpoint of the authors' program; say with --dataset which "
                        f"data set it is of: {', '.join(CLASSES)}")
    method, preset = ("maskclip", "release") if path is None else authors_method(state)
    s = argparse.Namespace(**recipe(dataset, preset, method), dataset=dataset, preset=preset,
                           method=method, data_root=args.data_root, seed=0, workers=0)
    s.clip, s.surgery = args.clip or s.clip, args.surgery or s.surgery
    classes = parse_classes(args.classes) if path is None else CLASSES[dataset]
    model = load_clip(s.clip, args.activation or "quick_gelu", device)
    if path is None:
        return plain_maskclip(model, classes, s)
    Wq = query_features(model, classes)
    return from_authors(state, model, classes, Wq, s)


def parse_arguments(argv):
    """The command line as a namespace; what is not given is None."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--checkpoint", type=Path, help="default: the newest under runs/")
    flag("--dataset", help="default: the one it was trained on")
    flag("--data-root", type=Path, help="default: where it was trained")
    flag("--split", choices=("val", "train"), default="val")
    flag("--clip", help="where the checkpoint's CLIP is, if not where it was; without a checkpoint "
         "of ours, a name or a file (default: ViT-B/16)")
    flag("--pd", type=float, help="prompt denoising of the rectified logits (default: the "
         "recipe's)")
    flag("--no-pd", action="store_true", help="no prompt denoising")
    flag("--slide", type=int, nargs=2, metavar=("WINDOW", "STRIDE"), help="sliding windows instead "
         "of whole images, in pixels of the resized image")
    flag("--count-absent", action="store_true", help="a class without a pixel counts as IoU 0, as "
         "in the authors' program, instead of not counting")
    flag("--hypotheses", action="store_true", help="precision and recall of the run's image-level "
         "hypotheses on the true classes of the training images")
    flag("--bias", action="store_true", help="class-preference and space-preference scores")
    flag("--figures", action="store_true", help="write comparison.png, heatmaps.png, confusion.png "
         "and distance.png, of both checkpoints of a folder")
    flag("--linear-probe", action="store_true", help="NOT unsupervised: train a linear classifier "
         "of the frozen features with the ground truth of the training images")
    flag("--tables", action="store_true", help="make every table of the papers, by dozens of runs "
         "of reclip.py and distill.py on --dataset (default: the demo): tables.md, tables.json and "
         "fig3.png, ours beside theirs. Goes on where it was interrupted; several may run at once, "
         "each with other --seeds")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --tables")
    flag("--out", type=Path, help="folder for results and figures (default: the checkpoint's), for "
         "--images (default: predictions/ in it), or for --tables (default: runs/tables)")
    flag("--batch", type=int, default=16, help="images of one size that go through at once")
    flag("--workers", type=int)
    flag("--device")
    flag("--amp", action=argparse.BooleanOptionalAction)
    group = parser.add_argument_group("your own images")
    flag = group.add_argument
    flag("--images", nargs="+", metavar="PATH", help="files and folders: masks, overlays and class "
         "areas of these, instead of an evaluation. One that cannot be read is named on stderr, "
         "the others are done all the same, and the exit code is 2")
    flag("--method", choices=("maskclip",), help="show the Query's masks, without rectification")
    flag("--classes", help='with --method maskclip, without a checkpoint: "cat, dog, sofa", or a '
         "text file with one name a line")
    flag("--surgery", choices=("program", "value"), help="with --classes: keep residual and MLP of "
         "CLIP's last block, or not")
    flag("--activation", choices=("quick_gelu", "gelu"), help="that --clip was trained with, where "
         "no checkpoint of ours tells (default: quick_gelu)")
    return parser.parse_args(argv)


def check_arguments(args):
    """Raises UserError for options that do not go together, and numbers that cannot work."""
    for option, values in (("batch", [args.batch]), ("slide", args.slide or [1])):
        if min(values) < 1:
            raise UserError(f"--{option} is {min(values)}; expected 1 or more")
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers is {args.workers}; expected 0 or more")
    if args.slide and args.slide[1] > args.slide[0]:
        raise UserError(f"--slide: a stride of {args.slide[1]} leaves gaps between windows of "
                        f"{args.slide[0]}; expected at most that")
    if args.pd is not None and not 0 <= args.pd <= 1:
        raise UserError(f"--pd is {args.pd}; expected 0 to 1")
    if args.no_pd and args.pd is not None:
        raise UserError("--pd and --no-pd contradict each other")
    def given(*names):
        return [f"--{name.replace('_', '-')}" for name in names
                if getattr(args, name) is not None and getattr(args, name) is not False]

    evaluates = given("bias", "figures", "linear_probe", "hypotheses", "count_absent")
    if args.images and evaluates:
        raise UserError(f"--images predicts, {evaluates[0]} evaluates: one of the two at a time")
    others = given("checkpoint", "images", "slide", "pd", "no_pd") + evaluates
    others += ["--split"] * (args.split != "val")
    if args.tables and others:
        raise UserError(f"--tables trains what it evaluates, by the recipe; {', '.join(others)} "
                        "cannot go with it")
    if args.tables and args.dataset == "folder":
        raise UserError("--tables needs labels to measure with; --dataset folder has none")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: one is repeated")
    if args.method and not args.images:
        raise UserError("--method goes with --images; an evaluation shows every stage")
    if args.classes is not None and (args.method is None or args.checkpoint is not None):
        raise UserError("--classes goes with --images and --method maskclip, without a checkpoint, "
                        "which has its own class names")


def stage_results(confusions, segment, data, args):
    """What results.json holds of each stage: scores, and how they were made.

    confusions: as `evaluate` gives them, with or without bins. "standard" is what was evaluated,
    its training finished, on the validation images of its own data set in the way of its recipe.
    """
    results, s = {}, segment.settings
    standard = segment.finished and (
        data.name, data.split, segment.slide, args.count_absent) == (s.dataset, "val", None, False)
    for name, confusion in confusions.items():
        bins = confusion.dim() == 3
        result = scores(confusion.sum(0) if bins else confusion, args.count_absent)
        result["iou"] = dict(zip(data.classes, result["iou"]))
        result |= dict(dataset=data.name, split=data.split, images=len(data), slide=args.slide,
                       pd=segment.pd if name == "rectified" else None,
                       count_absent=args.count_absent,
                       standard=standard and (name != "rectified" or segment.pd == s.pd))
        if getattr(s, "use_ground_truth_void", False):  # not trained unsupervised
            result["trained_with_ground_truth_void"] = True
        if bins:
            objects = "instance masks" if data.instances else "connected regions of a class"
            result |= bias_scores(confusion, objects)
        results[name] = result
    return results


def draw_figures(segmenters, data, confusions, device, out):
    """Write comparison.png, heatmaps.png, confusion.png and distance.png into a folder."""
    figures = dict(comparison=comparison(segmenters, data, device))
    first = segmenters[0]
    if "maskclip" in first.names and first.settings.bias != "none":
        figures["heatmaps"] = heatmaps(first, data, device)
    else:
        print("no heatmaps.png: it needs MaskCLIP's masks and a bias logit map")
    totals = {name: confusion.sum(0) for name, confusion in confusions.items()}
    figures["confusion"] = confusion_figure(totals, data.classes)
    curves = {name: distance_curve(confusion[:-1]) for name, confusion in confusions.items()}
    figures["distance"] = distance_figure(curves)
    for name, figure in figures.items():
        save_picture(figure, out / f"{name}.png")
        print(f"→ {out / name}.png")


def predict_images(args, segment, out, device, workers):
    """--images. Raises UserError, after all are done, where some could not be read."""
    stage = args.method or segment.names[-1]
    if stage not in segment.names:
        raise UserError(f"--method {stage}: this checkpoint has only {', '.join(segment.names)}")
    files = find_images(args.images)
    try:
        failed = predict(segment, stage, files, out, device, workers)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error}") from None
    print(f"{len(files) - len(failed)} images ({stage}) → {out}/")
    if failed:
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise UserError(f"{len(failed)} of {len(files)} images could not be read: "
                        + ", ".join(map(str, failed[:5])) + more)


@clean_exit
def main(argv=None):
    args = parse_arguments(argv)
    check_arguments(args)
    if args.tables:
        if under_torchrun():
            raise UserError("--tables runs in one process, without torchrun; several may run at "
                            "once, each with other --seeds")
        args.dataset, args.out = args.dataset or "shapes", args.out or Path("runs/tables")
        return make_tables(args)
    device = pick_device(args.device)
    pd = None if args.no_pd else "recipe" if args.pd is None else args.pd
    path = None if args.classes is not None else args.checkpoint or newest_checkpoint()
    foreign = open_network(args, path, device)
    options = dict(device=device, source=args.clip, pd=pd, slide=args.slide,
                   amp=use_amp(args.amp, device))
    segment = Segmenter(foreign or path, **options)
    if not segment.finished:
        print(f"{path} is not finished: the command that made it goes on")
    s = segment.settings
    folder = path.parent if path and not foreign else Path("runs") / (
        f"authors-{path.stem}" if path else "maskclip")
    workers = s.workers if args.workers is None else args.workers
    if world() > 1 and (args.images or args.linear_probe):
        raise UserError("--images and --linear-probe run in one process, without torchrun")
    if args.images:
        print(f"masks of {path or 'CLIP alone'}")
        return predict_images(args, segment, args.out or folder / "predictions", device, workers)

    dataset, out = args.dataset or s.dataset, args.out or folder
    root, names = args.data_root or s.data_root, segment.classes if dataset == "folder" else None
    data = open_dataset(dataset, root, args.split, names, s.seed)
    if data.classes != segment.classes:
        raise UserError(f"{path} was made for other classes ({', '.join(segment.classes[:5])}, …) "
                        f"than {dataset}'s")
    if not data.has_labels:
        print(f"{dataset} has no labels to compare with; masks of images: python evaluate.py "
              f"--checkpoint {path} --images …")
        return
    make_folder(out)
    segmenters = [segment]
    if args.figures and not foreign:  # with the other checkpoint of the folder, if there is one
        paths = [path.with_name(name) for name in ("reclip.pt", "distill.pt")]
        if path in paths:
            segmenters = [segment if other == path else Segmenter(other, **options)
                          for other in paths if other.exists()]
    bins, confusions, results = BINS if args.bias or args.figures else 0, {}, {}
    for each in segmenters:
        found = evaluate(each, data, each.settings.scale, device, args.batch, workers, bins)
        results |= stage_results(found, each, data, args)
        confusions |= found
    biases = dict(results) if bins else {}
    if args.linear_probe:
        truth = open_dataset(dataset, root, "train", names, s.seed)
        if not truth.has_labels:
            raise UserError(f"--linear-probe: {dataset} has no training labels")
        print("The linear probe is trained with ground truth: supervised, by definition.")
        probe = linear_probe(segment, truth, device, batch=args.batch, workers=workers)
        found = evaluate(probe, data, s.scale, device, args.batch, workers)
        for name, result in stage_results(found, segment, data, args).items():
            results[name] = result | dict(slide=None, trained_with_ground_truth=True)
    print(table(results, segment.classes))
    if biases:
        print("\n" + bias_table(biases))
    if rank() == 0:
        save_results(out / "results.json", results)
    if args.hypotheses:
        if foreign or segment.student or s.hypothesis == "none":
            raise UserError(f"--hypotheses: {path} was not trained with hypotheses of its own")
        images, network = open_dataset(dataset, root, "train", names, s.seed), segment.network
        hypothesis = make_hypotheses(images, network.model, network.rectifier.Wq, s,
                                     hypotheses_file(path, s), device)
        precision, recall = hypothesis_quality(hypothesis, images)
        print(f"hypotheses of {len(images)} training images: precision {precision:.1f} %, recall "
              f"{recall:.1f} %")
    if args.figures and rank() == 0:
        draw_figures(segmenters, data, confusions, device, out)
    print(f"{path}: {len(data)} images of {dataset} {args.split} → {out / 'results.json'}")
    return results


if __name__ == "__main__":
    main()
    leave_processes()
