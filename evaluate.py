"""Evaluate, explain and use what reclip.py and distill.py have learned.

    python evaluate.py                                        the newest checkpoint under runs/
    python evaluate.py --checkpoint runs/voc                  any other, on its own data set
    python evaluate.py --bias --figures --linear-probe        more about it
    python evaluate.py --figures --checkpoint A.pt B.pt C.pt  several side by side
    python evaluate.py --images my/photos one.jpg             masks of one's own images
    python evaluate.py --images my/photos --method maskclip --classes "cat, dog"    of CLIP alone

Prints mIoU, pixel accuracy and the IoU of every class, and adds them to results.json beside the
checkpoint. A rectification checkpoint of the authors' program (with --dataset) will do as well; its
results go to runs/authors-NAME/. Shapes: B images, C classes, h×w patches, H×W pixels.
"""

import argparse
import functools
import itertools
import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from data import (CLASSES, called, dataset_palette, draw_seed, open_dataset, parse_classes,
                  resize_to_scale)
from distill import load_student
from files import (PHOTOS, VOID, Parser, Progress, UserError, clean_exit, count, list_folder,
                   make_folder, natural, path as user_path, positive, printable, read_ahead,
                   read_image, save_picture, share, write_text)
from maps import (comparison, confusion_figure, distance_figure, heatmaps, label_map, pamr,
                  prompt_denoising, with_legend)
from reclip import (SURGERIES, RectifiedCLIP, authors_method, authors_state, from_authors,
                    hypotheses_folder, make_hypotheses, open_rectified, plain_maskclip,
                    query_features, recipe)
from run import (checkpoint_in, folder_lock, gather, leave_processes, load_checkpoint, load_clip,
                 pick_device, rank, to_device, use_amp, usual_surgery, world)

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
    triples = (nearest.long() * C + label) * C + prediction
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


class Segmenter:
    """Any network as a function from images to label maps, one per stage it knows.

    network: a RectifiedCLIP, a distill.Student, or the path of a checkpoint; source: where the
    checkpoint's CLIP is now, if not where it was. names: "maskclip" and "rectified", or
    "distilled". pd: prompt denoising of the rectified logits, "recipe" for the checkpoint's own;
    where that switches classes off, "rectified_no_pd" is there too. slide: None, or (window,
    stride) in pixels. pamr: None, or (steps, dilations) of PAMR, for one more map of each of the
    names, NAME_pamr.
    """

    def __init__(self, network, device="cpu", source=None, pd="recipe", slide=None, amp=False,
                 pamr=None):
        self.path, self.finished = None, True
        if isinstance(network, (str, Path)):
            self.path, checkpoint = Path(network), load_checkpoint(network)
            self.finished = checkpoint["finished"]
            network = (load_student(network, device) if checkpoint["kind"] == "distill" else
                       open_rectified(network, device, source))
        self.network, self.student = network, not isinstance(network, RectifiedCLIP)
        self.settings, self.classes = network.settings, network.classes
        self.both = pd == "recipe"  # with and without
        self.pd = self.settings.pd if self.both else pd
        self.slide, self.amp, self.pamr = slide, amp, pamr
        s = self.settings
        plain = not (getattr(s, "learn_query", False) or getattr(s, "tune_encoder", False))
        self.names = ["distilled"] if self.student else (
            ["maskclip"] * plain + ["rectified"] * (s.method != "maskclip"))

    @torch.no_grad()
    def stages(self, views):
        """{name: (features B×K×h×w, logits B×C×h×w)} of uint8 views B×3×H×W, and the (height,
        width) that they cover: the view by a student's grid, whole patches by a ViT's.

        Features are what a linear probe sees. CLIP is frozen, so Z is MaskCLIP's; "rectified" is Z
        beside the rectified logits, D+C channels; "distilled" is Ẑ, of unit length.
        """
        if self.student:
            Z_hat, logits = self.network(views, amp=self.amp)
            return {"distilled": (F.normalize(Z_hat, dim=1), logits)}, views.shape[2:]
        Z, p = self.network.inputs(self.network.encode(views, amp=self.amp))
        Mq, M = self.network.rectifier(Z, p, self.network.Wr)
        stages = dict(maskclip=(Z, Mq), rectified=(torch.cat([Z, M], 1), M))
        padded = tuple(side * self.network.patch for side in Z.shape[2:])
        return {name: stages[name] for name in self.names}, padded

    def whole_logits(self, views):
        """The logits of `stages` alone, and the area that they cover."""
        stages, padded = self.stages(views)
        return {name: logits for name, (_, logits) in stages.items()}, padded

    def sliding_logits(self, views):
        """Mean logits of overlapping windows, at the resolution of the views."""
        (window, stride), (H, W) = self.slide, views.shape[2:]
        starts = lambda side: sorted({min(i, max(side - window, 0))
                                      for i in range(0, side, stride)})
        sums, count = {}, torch.zeros(H, W, device=views.device)
        for top, left in itertools.product(starts(H), starts(W)):
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
    def logits(self, views):
        """As `whole_logits`, with sliding windows and prompt denoising where they are asked for."""
        if self.slide:
            outputs, padded = self.sliding_logits(views), views.shape[2:]
        else:
            outputs, padded = self.whole_logits(views)
        if "rectified" in outputs and self.pd is not None:
            without = outputs["rectified"]
            outputs["rectified"] = prompt_denoising(without, self.pd, self.settings.pd_temperature)
            outputs |= {"rectified_no_pd": without} if self.both else {}
        return outputs, padded

    @torch.no_grad()
    def __call__(self, views, size, only=None, sure=False):
        """{name: int64 B×H×W} for uint8 views B×3×h×w of images whose labels have `size` (H, W).

        only: one of the names; sure: the map comes in a pair with its `most_likely` probability.
        """
        (outputs, padded), view, maps = self.logits(views), views.shape[2:], {}
        refined = [f"{name}_pamr" for name in self.names if self.pamr]
        for name in [only] if only else [*outputs, *refined]:
            plain = name.removesuffix("_pamr")
            if name == plain and not sure:
                maps[name] = label_map(outputs[name], padded, view, size)
                continue
            refine = None if name == plain else lambda part: pamr(views, part, *self.pamr)
            pair = most_likely(outputs[plain], padded, view, size, self.temperature(plain), refine)
            maps[name] = pair if sure else pair[0]
        return maps

    def temperature(self, name):
        """That of a softmax over the classes: the one at which prompt denoising looks at such
        logits, 0.1 after a decoder and 0.01 for cosines; 1 for a head that DeepLab has learned."""
        if not self.student:
            return 0.01 if name == "maskclip" else self.settings.pd_temperature
        if self.settings.head == "learned":
            return 1.0
        return 0.01 if self.network.head.decoder is None else 0.1


def most_likely(logits, padded, view, size, temperature, refine=None):
    """Class of every pixel and its probability, softmax(logits / temperature), both B×H×W.

    As `label_map` with the softmax after upsampling; refine: what is done before, at the resolution
    of the view, to the logits of some classes, B×K×h×w. In chunks of classes, too.
    """
    chunk, best = max(1, min(32, 2**26 // (len(logits) * math.prod(size)))), None
    for first in range(0, logits.shape[1], chunk):
        part = F.interpolate(logits[:, first : first + chunk], padded, mode="bilinear")
        part = part[..., : view[0], : view[1]]
        part = part if refine is None else refine(part)
        part = F.interpolate(part, size, mode="bilinear") / temperature
        (value, index), mass = part.max(1), part.logsumexp(1)
        if best is None:
            best, labels, total = value, index, mass
        else:
            labels = torch.where(value > best, index + first, labels)
            best, total = torch.maximum(value, best), torch.logaddexp(total, mass)
    return labels, (best - total).exp()


# ------------------------------------------------------------------------------------------------
# Evaluation


class Labelled:
    """(view, label) of a SegmentationData, and the label's `distance_bins` if `bins` is above 0."""

    def __init__(self, data, scale, bins=0):
        self.data, self.scale, self.bins = data, scale, bins

    def __getitem__(self, i):
        view, label = resize_to_scale(self.data.image(i), self.scale), self.data.label(i)
        places = (distance_bins(label, self.data.objects(i), self.bins),) if self.bins else ()
        return tuple([view, *(part.to(torch.uint8) for part in (label, *places))])


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
    reader = read_ahead(items, own.tolist(), workers)
    C, totals, progress = len(data.classes), {}, Progress("evaluate", len(data))
    for views, labels, *nearest in grouped_by_size(reader, batch):
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


def hypothesis_quality(hypothesis, data):
    """Precision and recall, in per cent, of image-level hypotheses against the labels of `data`.

    hypothesis: a function from an image's index, in a list, to bool 1×C. Counts all (image, class)
    pairs alike.
    """
    hits = said = true = 0
    for i in range(len(data)):
        kept, present = hypothesis([i])[0], data.label(i).unique()
        present = present[present != VOID]
        hits, said = hits + kept[present].sum().item(), said + kept.sum().item()
        true += len(present)
    return 100 * hits / max(1, said), 100 * hits / max(1, true)


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


def table(results, classes):
    """A text table, a column per result: mIoU, pixel accuracy, bias scores, IoU of every class."""
    biased = next((r["distance_curve"] for r in results.values() if "distance_curve" in r), [])
    rows = [("mIoU", [r["miou"] for r in results.values()]),
            ("pixel accuracy", [r["pixel_accuracy"] for r in results.values()])]
    for key in ("class_preference", "space_preference") if biased else ():
        rows.append((key.replace("_", "-"), [r.get(key) for r in results.values()]))
    for n, part in enumerate(biased):
        low, high = part["distance"]
        rows.append((f"mIoU, distance {low:.1f}–{high:.1f}", [
            r["distance_curve"][n]["miou"] if "distance_curve" in r else None
            for r in results.values()]))
    rule = len(rows) + 1
    rows += [(name, [r["iou"][name] for r in results.values()]) for name in classes]
    heads = [name.replace("linear_probe_", "LP ") for name in results]
    wide, width = max(11, *map(len, heads)), max(18, *(len(name) for name, _ in rows))
    lines = [" " * width + "".join(f" {head:>{wide}}" for head in heads)]
    for name, values in rows:
        cells = ["–" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"{printable(name):{width}}" + "".join(f" {cell:>{wide}}" for cell in cells))
    lines.insert(rule, "-" * len(lines[0]))
    return "\n".join(lines)


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
# Linear probe: what the features hold, told by a classifier that is given ground truth


def class_shares(labels, C, view, padded, grid):
    """The share of each cell of a grid that each class covers; B×C×h×w.

    labels: int64 B×H×W, taken to the size `view`, the top left of the `padded` pixels of the grid.
    """
    labels = F.interpolate(labels[:, None].float(), view, mode="nearest-exact")[:, 0]
    labels = F.pad(labels, (0, padded[1] - view[1], 0, padded[0] - view[0]), value=VOID)
    classes = torch.arange(C, device=labels.device)[:, None, None]
    return torch.stack([F.adaptive_avg_pool2d((one == classes).float(), grid) for one in labels])


def linear_probe(segment, data, device, epochs=60, batch=16, workers=0, seed=0, memory=4):
    """One 1×1 classifier on each stage's frozen features, trained with the ground truth of `data`.

    segment: a Segmenter. Features are standardised first (BatchNorm without parameters, so the
    classifier stays linear); cross-entropy against the classes' shares of a cell; AdamW, 1e-2, down
    to 0 along a cosine over `epochs` of all images. CLIP and the student are frozen, so what they
    say is kept after the first epoch where it fits into `memory` GiB (on the device).

    Returns a function (views, size) → {"linear_probe_" + name: int64 B×H×W}.
    """
    C, probes, kept, left = len(data.classes), nn.ModuleDict(), [], memory * 2**30
    progress = Progress("linear probe", epochs * len(data))

    def shuffled(n, epoch):
        generator = torch.Generator().manual_seed(draw_seed(seed, epoch, "linear probe"))
        return torch.randperm(n, generator=generator).tolist()

    def batches(epoch):
        """Features by stage, {name: float16 B×K×h×w}, and class shares, B×C×h×w."""
        nonlocal left
        if kept:
            yield from [kept[i] for i in shuffled(len(kept), epoch)]
            return
        items = Labelled(data, segment.settings.scale)
        for views, labels in grouped_by_size(
                read_ahead(items, shuffled(len(data), epoch), workers), batch):
            stages, padded = segment.stages(views.to(device))
            features = {name: feature.half() for name, (feature, _) in stages.items()}
            grid = next(iter(features.values())).shape[2:]
            shares = class_shares(labels.to(device), C, views.shape[2:], padded, grid)
            kept.append((features, shares))
            yield kept[-1]
            left -= sum(part.nbytes for part in (*features.values(), shares))
            if left < 0:
                kept.clear()

    for features, shares in itertools.chain.from_iterable(map(batches, range(epochs))):
        if not probes:
            torch.manual_seed(seed)
            for name, feature in features.items():
                K = feature.shape[1]
                probes[name] = nn.Sequential(nn.BatchNorm2d(K, affine=False), nn.Conv2d(K, C, 1))
            optimizer = torch.optim.AdamW(probes.to(device).parameters())
        done = progress.done / progress.total
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * done)) / 2
        loss = 0.0
        for name, feature in features.items():
            log_p = probes[name](feature.float()).log_softmax(1)
            loss = loss - (shares * log_p).sum() / shares.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.advance(len(shares), lambda: f"  loss {loss.item():.3f}")
    progress.close()
    probes.eval()

    @torch.no_grad()
    def predict(views, size):
        stages, padded = segment.stages(views)
        return {f"linear_probe_{name}": label_map(probes[name](feature), padded, views.shape[2:],
                                                  size) for name, (feature, _) in stages.items()}

    return predict


# ------------------------------------------------------------------------------------------------
# Your own images


def find_images(paths):
    """The image files among paths and in the folders among them, as a list of Path.

    Raises UserError, before anything is done, for a path that is not there and an empty folder.
    """
    files = []
    for path in paths:
        inside = [path / name for name in list_folder(path, PHOTOS)] if path.is_dir() else [path]
        if not path.exists():
            raise UserError(f"--images: no file or folder {path}")
        if not inside:
            raise UserError(f"--images: no images in {path}; expected {', '.join(PHOTOS)}")
        files += inside
    return files


class Photos:
    """(image, view) of image files, or, where a file cannot be read, the message that says so."""

    def __init__(self, files, scale):
        self.files, self.scale = files, scale

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


def predict(segment, stage, files, out, device, workers=0, confidence=False, unknown_below=0.0):
    """Masks of image files of any size, one after the other. Raises UserError for a folder of other
    classes and, after all are done, where some files could not be read.

    stage: one that the Segmenter has; files: list of Path; out: the folder, for
    masks/NAME.png       the class of every pixel, 0…C-1, as a palette picture of the image's size,
    overlays/NAME.png    the classes in colour on the image, 420 to 1000 pixels, with a legend,
    confidence/NAME.png  if asked for, the highest probability of every pixel, 0…255 in grey: of a
                         softmax over the classes, at `Segmenter.temperature`, of the logits that
                         the mask is taken from, upsampled (after prompt denoising and PAMR),
    classes.json         the C names,
    predictions.jsonl    a line for every file: what was made of it, the per cent of its pixels that
                         each class has, and its mean confidence; .part until all are done.
    Pixels whose probability is less than unknown_below are 255 in the mask, and of no class.
    """
    names, used, failed, waiting = [*map(called, segment.classes)], set(), [], None
    colours = dataset_palette(segment.settings.dataset, len(names))
    progress = Progress("predict", len(files))
    photos = read_ahead(Photos(files, segment.settings.scale), range(len(files)), workers)

    def note(written):
        lines.write(json.dumps(written.result()) + "\n")
        lines.flush()
        progress.advance()

    try:
        for folder in ["masks", "overlays"] + ["confidence"] * confidence:
            (out / folder).mkdir(parents=True, exist_ok=True)
        known = out / "classes.json"
        if known.exists() and known.read_bytes() != json.dumps(names).encode():
            raise UserError(f"{out} has the masks of other classes than {', '.join(names[:5])}; "
                            "choose another folder with --out")
        write_text(known, json.dumps(names))
        with (open(out / "predictions.jsonl.part", "w") as lines,
              ThreadPoolExecutor(1) as writer):  # files are written while the network is at work
            for path, loaded in zip(files, photos):
                if isinstance(loaded, str):
                    print(f"error: {printable(loaded)}", file=sys.stderr)
                    failed.append(path)
                    job = functools.partial(dict, image=str(path), error=loaded)
                else:
                    image, view = loaded
                    asked = segment(view[None].to(device), image.shape[1:], stage,
                                    sure=confidence or unknown_below > 0)[stage]
                    mask, sure = (x[0].cpu() for x in asked) if isinstance(asked, tuple) else (
                        asked[0].cpu(), None)
                    if unknown_below:
                        mask[sure < unknown_below] = VOID
                    job = functools.partial(
                        write_prediction, out, safe_name(path, used), image, mask, names, colours,
                        sure if confidence else None, dict(image=str(path), stage=stage))
                if waiting is not None:
                    note(waiting)
                waiting = writer.submit(job)
            note(waiting)
        progress.close()
        (out / "predictions.jsonl.part").replace(out / "predictions.jsonl")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error}") from None
    print(printable(f"{len(files) - len(failed)} images ({stage}) → {out}/"))
    if failed:
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise UserError(f"{len(failed)} of {len(files)} images could not be read: "
                        + ", ".join(map(str, failed[:5])) + more)


def write_prediction(out, name, image, mask, names, colours, sure, line):
    """The files of one image, as `predict` says; returns its line with what is in them.

    image: uint8 3×H×W; mask: int64 H×W; sure: H×W, the confidence, or None.
    """
    C, pixels = len(names), mask.flatten()
    count = pixels.bincount(minlength=256)[:C]
    area = 100 * count / len(pixels)
    order = [k for k in area.argsort(descending=True).tolist() if count[k] > 0]
    picture = Image.fromarray(mask.to(torch.uint8).numpy())
    # With all 256 colours: Pillow would store fewer in fewer bits, which have no 255.
    picture.putpalette(F.pad(colours, (0, 0, 0, 256 - C)).flatten().tolist())
    save_picture(picture, out / "masks" / f"{name}.png")
    entries = [(f"{names[k]} {area[k]:.1f} %", colours[k]) for k in order]
    save_picture(with_legend(image, mask, colours, entries), out / "overlays" / f"{name}.png")
    line |= dict(mask=f"masks/{name}.png", overlay=f"overlays/{name}.png", width=image.shape[2],
                 height=image.shape[1], areas={names[k]: round(area[k].item(), 4) for k in order})
    if sure is not None:
        picture = Image.fromarray((255 * sure).round().to(torch.uint8).numpy())
        save_picture(picture, out / "confidence" / f"{name}.png")
        mean = pixels.bincount(sure.flatten().double(), minlength=256)[:C] / count
        line["confidence"] = {names[k]: round(mean[k].item(), 4) for k in order}
    return line


# ------------------------------------------------------------------------------------------------
# The command

PAMR = {"shapes": (4, (1, 2, 4, 8))}  # steps and dilations, elsewhere NACLIP's:
NACLIP_PAMR = 10, (8, 16)


def newest_checkpoint(folder=Path("runs")):
    """The checkpoint under a folder that was written last. Raises UserError if there is none."""
    found = [path for name in ("reclip.pt", "distill.pt") for path in folder.glob(f"*/{name}")]
    if not found:
        raise UserError(f"no checkpoint under {folder}/; run python reclip.py first, or name one "
                        "with --checkpoint")
    return max(found, key=lambda path: path.stat().st_mtime)


def open_segmenter(args, path, device):
    """The Segmenter of a checkpoint, ours or the authors', or, without a path, of --classes.

    Its `folder` is where results go by default. Raises UserError.
    """
    options = dict(device=device, source=args.clip, slide=args.slide, amp=use_amp(args.amp, device),
                   pd=None if args.no_pd else "recipe" if args.pd is None else args.pd)
    state = None if path is None else authors_state(path)
    if path is not None and state is None:
        given = [f"--{name}" for name in ("surgery", "sigma", "activation", "heads", "preset")
                 if getattr(args, name) is not None]
        if given:
            raise UserError(f"{' and '.join(given)}: what {path} was trained with cannot be "
                            "changed afterwards")
        segment = Segmenter(path, **options)
        segment.folder = path.parent
    else:
        segment = Segmenter(open_foreign(args, path, state, device), **options)
        segment.folder = Path("runs", f"authors-{path.stem}" if path else "maskclip")
    segment.path = path
    if args.pamr is not None:
        steps, dilations = PAMR.get(segment.settings.dataset, NACLIP_PAMR)
        segment.pamr = args.pamr or steps, tuple(args.dilations or dilations)
    if not segment.finished:
        print(printable(f"{path} is not finished: the command that made it goes on"))
    return segment


def open_foreign(args, path, state, device):
    """RectifiedCLIP of a file of the authors, `state` being what is in it, or of --classes."""
    dataset = args.dataset or ("shapes" if args.clip == "shapes-tiny" else "folder")
    if path is not None and dataset not in CLASSES:
        raise UserError(f"{path} is a checkpoint of the authors' program; say with --dataset which "
                        f"data set it is of: {', '.join(CLASSES)}")
    method, preset = ("maskclip", "release") if path is None else authors_method(state)
    if method == "reclip" and args.preset is None:
        print(printable(f"{path} does not say its preset; taken for one of 2024, --preset paper"))
    preset, given = args.preset or preset, {
        name: getattr(args, name) for name in ("clip", "surgery", "sigma")
        if getattr(args, name) is not None}
    s = argparse.Namespace(**recipe(dataset, preset, method, **given), dataset=dataset, seed=0,
                           preset=preset, method=method, data_root=args.data_root, workers=0)
    classes = CLASSES[dataset] if path else parse_classes(args.classes)
    model = load_clip(s.clip, args.activation or "quick_gelu", device, args.heads)
    if path is None:
        s.surgery = args.surgery or usual_surgery(model, s.surgery)
        return plain_maskclip(model, classes, s)
    return from_authors(state, model, classes, query_features(model, classes), s)


def open_split(args, segment, split):
    """A split of the data set that a Segmenter is evaluated on, by default of its own."""
    s = segment.settings
    dataset, folder = args.dataset or s.dataset, {}
    if dataset == "folder":
        # by default as they were given to reclip.py
        labels = getattr(s, "labels", None) if args.labels is None else args.labels
        offset = args.labels_offset
        offset = getattr(s, "labels_offset", 0) if offset is None else offset
        folder = dict(classes=segment.classes, labels=labels, offset=offset)
    elif args.labels is not None:
        raise UserError(f"--labels goes with --dataset folder; {dataset} has its own")
    return open_dataset(dataset, args.data_root or s.data_root, split, seed=s.seed, **folder)


def parse_arguments(argv):
    """The command line as a namespace; what is not given is None."""
    if "--tables" in (sys.argv[1:] if argv is None else argv):
        raise UserError("the papers' tables have a program of their own: python tests/tables.py")
    parser = Parser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--checkpoint", type=user_path, nargs="+", help="one or several files, or folders of "
         "runs: distill.pt in them, else reclip.pt (default: the newest under runs/)")
    flag("--dataset", help="default: the one it was trained on")
    flag("--data-root", type=user_path, help="default: where it was trained")
    flag("--labels", type=user_path, help="for folder: the labels of its images, ID.png")
    flag("--labels-offset", type=int, choices=(0, 1), help="1: label 0 is none of the classes")
    flag("--split", choices=("val", "train", "trainaug"), default="val")
    flag("--clip", help="where the checkpoint's CLIP is, if not where it was; without a checkpoint "
         "of ours, a name or a file (default: ViT-B/16)")
    flag("--pd", type=share, help="prompt denoising of the rectified logits (default: recipe's)")
    flag("--no-pd", action="store_true", help="no prompt denoising")
    flag("--pamr", type=count, nargs="?", const=0, metavar="STEPS", help="masks refined by the "
         "image, too (default: 10 steps, on the demo 4)")
    flag("--dilations", type=count, nargs="+", help="of PAMR (default: 8 16, on the demo 1 2 4 8)")
    flag("--slide", type=count, nargs=2, metavar=("WINDOW", "STRIDE"), help="sliding windows "
         "instead of whole images, in pixels of the resized image")
    flag("--count-absent", action="store_true", help="a class without a pixel counts as IoU 0, as "
         "in the authors' program, instead of not counting")
    flag("--hypotheses", action="store_true", help="precision and recall of the run's image-level "
         "hypotheses on the true classes of the training images")
    flag("--bias", action="store_true", help="class-preference and space-preference scores")
    flag("--figures", action="store_true", help="write comparison.png, heatmaps.png, confusion.png "
         "and distance.png, of the checkpoints given, or of both in a folder")
    flag("--linear-probe", action="store_true", help="NOT unsupervised: train a linear classifier "
         "of the frozen features with the ground truth of the training images")
    flag("--probe-epochs", type=count, default=60, help="of its training (default: 60)")
    flag("--out", type=user_path, help="folder for results and figures (default: the "
         "checkpoint's), or for --images (default: predictions/ in it)")
    flag("--batch", type=count, default=16, help="images of one size that go through at once")
    flag("--workers", type=natural)
    flag("--device")
    flag("--amp", action=argparse.BooleanOptionalAction)
    group = parser.add_argument_group("your own images")
    flag = group.add_argument
    flag("--images", type=user_path, nargs="+", metavar="PATH", help="files and folders: masks, "
         "overlays and class areas of these, instead of an evaluation. One that cannot be read is "
         "named on stderr, the others are done all the same, and the exit code is 2")
    flag("--confidence", action="store_true", help="the probability of every pixel's class as well")
    flag("--unknown-below", type=share, metavar="P", help="255, no class, where it is less than P")
    flag("--method", choices=("maskclip",), help="show the Query's masks, without rectification")
    flag("--classes", help='with --method maskclip, without a checkpoint: "cat, dog, sofa", or a '
         "text file, one class a line, further names of it after commas")
    group = parser.add_argument_group("what no checkpoint of ours tells")
    flag = group.add_argument
    flag("--surgery", choices=tuple(SURGERIES), help="with --classes: CLIP's last block")
    flag("--sigma", type=positive, help="of naclip, in patches")
    flag("--activation", choices=("quick_gelu", "gelu"), help="that --clip was trained with "
         "(default: quick_gelu)")
    flag("--heads", type=count, help="of its image encoder, where its sizes do not tell")
    flag("--preset", choices=("release", "paper"), help="that a file of the authors belongs to "
         "(default: release, for ReCLIP paper)")
    args = parser.parse_args(argv)
    evaluates = [f"--{name.replace('_', '-')}" for name in (
        "bias", "figures", "linear_probe", "hypotheses", "count_absent") if getattr(args, name)]
    for wrong, message in (
        (args.slide and args.slide[1] > args.slide[0],
         f"--slide {args.slide}: a stride larger than the window leaves gaps"),
        (args.no_pd and args.pd is not None, "--pd and --no-pd contradict each other"),
        (args.dilations and args.pamr is None, "--dilations goes with --pamr"),
        (args.images and evaluates,
         f"--images predicts, {''.join(evaluates[:1])} evaluates: one of the two at a time"),
        (len(args.checkpoint or []) > 1 and (args.images or args.hypotheses),
         "--images and --hypotheses take one --checkpoint"),
        (args.method and not args.images,
         "--method goes with --images; an evaluation shows every stage"),
        ((args.confidence or args.unknown_below is not None) and not args.images,
         "--confidence and --unknown-below go with --images"),
        (args.classes is not None and (args.method is None or args.checkpoint is not None),
         "--classes goes with --images and --method maskclip, without a checkpoint, which has its "
         "own class names"),
    ):
        if wrong:
            raise UserError(message)
    return args


def assess(segment, data, args, device, bins):
    """({stage: confusion matrix}, {stage: what results.json holds of it}) of one Segmenter.

    With `bins` the matrices are those by distance. "standard" is what was evaluated, its training
    finished, on the validation images of its own data set in the way of its recipe.
    """
    s, workers = segment.settings, args.workers
    confusions = evaluate(segment, data, s.scale, device, args.batch, workers, bins)
    probed, results = {}, {}
    if args.linear_probe:
        truth = open_split(args, segment, getattr(s, "train_split", "train"))
        if not truth.has_labels:
            raise UserError(f"--linear-probe: {data.name} has no training labels")
        print("The linear probe is trained with ground truth: supervised, by definition.")
        probe = linear_probe(segment, truth, device, args.probe_epochs, args.batch, workers)
        probed = evaluate(probe, data, s.scale, device, args.batch, workers)
    standard = segment.finished and (
        data.name, data.split, segment.slide, args.count_absent) == (s.dataset, "val", None, False)
    for stage, confusion in (confusions | probed).items():
        result = scores(confusion.sum(0) if confusion.dim() == 3 else confusion, args.count_absent)
        result["iou"] = dict(zip(map(called, data.classes), result["iou"]))
        pd = segment.pd if stage in ("rectified", "rectified_pamr") else None
        result |= dict(dataset=data.name, split=data.split, images=len(data),
                       slide=None if stage in probed else args.slide, pd=pd,
                       count_absent=args.count_absent,
                       standard=standard and (pd == s.pd or not stage.startswith("rectified")
                                              or stage.endswith("no_pd")))
        if stage.endswith("_pamr"):
            result["pamr"] = segment.pamr
            result["standard"] &= segment.pamr == PAMR.get(s.dataset, NACLIP_PAMR)
        if getattr(s, "use_ground_truth_void", False):  # not trained unsupervised
            result["trained_with_ground_truth_void"] = True
        if stage in probed:
            result["trained_with_ground_truth"] = True
        elif bins:
            objects = "instance masks" if data.instances else "connected regions of a class"
            result |= bias_scores(confusion, objects)
        results[stage] = result
    return confusions, results


def draw_figures(shown, data, confusions, device, out):
    """Write comparison.png, heatmaps.png, confusion.png and distance.png into a folder.

    shown: pairs of a Segmenter and {stage: name}; confusions: {name: matrices by distance}.
    """
    title = lambda name: "MaskCLIP" if name == "maskclip" else name
    figures = dict(comparison=comparison([
        (segment, {stage: title(name) for stage, name in names.items()})
        for segment, names in shown], data, device))
    for segment, _ in shown:
        if "maskclip" in segment.names and segment.settings.bias != "none":
            name = "heatmaps" + f"-{segment.folder.name}" * ("heatmaps" in figures)
            figures[name] = heatmaps(segment, data, device)
    if "heatmaps" not in figures:
        print("no heatmaps.png: it needs MaskCLIP's masks and a bias logit map")
    totals, curves = {}, {}
    for name, confusion in confusions.items():
        total, curve = confusion.sum(0), distance_curve(confusion[:-1])
        slope = space_preference(curve)
        totals[f"{title(name)} ({class_preference(total):.2f})"] = total
        curves[title(name) + ("" if slope is None else f" (mean slope {slope:.2f})")] = curve
    figures["confusion"] = confusion_figure(totals, [*map(called, data.classes)])
    figures["distance"] = distance_figure(curves)
    for name, figure in figures.items():
        save_picture(figure, out / f"{name}.png")
        print(printable(f"→ {out / name}.png"))


@clean_exit
def main(argv=None):
    args = parse_arguments(argv)
    device = pick_device(args.device)
    if world() > 1 and (args.images or args.linear_probe):
        raise UserError("--images and --linear-probe run in one process, without torchrun")
    paths = [None] if args.classes is not None else [
        checkpoint_in(path, "distill.pt", "reclip.pt")
        for path in args.checkpoint or [newest_checkpoint()]]
    if args.figures and len(paths) == 1 and paths[0].name in ("reclip.pt", "distill.pt"):
        both = [paths[0].with_name(name) for name in ("reclip.pt", "distill.pt")]
        paths = [path for path in both if path in paths or path.exists()]
    segmenters = [open_segmenter(args, path, device) for path in paths]
    first = segmenters[0]
    s, out = first.settings, args.out or first.folder
    args.workers = s.workers if args.workers is None else args.workers
    if args.images:
        stage = (args.method or first.names[-1]) + "_pamr" * (args.pamr is not None)
        if args.method and args.method not in first.names:
            raise UserError(f"--method {args.method}: this checkpoint has only "
                            f"{', '.join(first.names)}")
        print(printable(f"masks of {first.path or 'CLIP alone'}"))
        return predict(first, stage, find_images(args.images), args.out or out / "predictions",
                       device, args.workers, args.confidence, args.unknown_below or 0.0)

    data = open_split(args, first, args.split)
    for segment in segmenters:
        if data.classes != segment.classes:
            raise UserError(f"{segment.path} was made for other classes "
                            f"({', '.join(segment.classes[:5])}, …) than {data.name}'s")
    if not data.has_labels:
        print(printable(f"{data.name} has no labels to compare with; masks of images: python "
                        f"evaluate.py --checkpoint {first.path} --images …"))
        return
    make_folder(out)
    several = len({segment.folder for segment in segmenters}) > 1
    bins, shown, confusions, results = BINS if args.bias or args.figures else 0, [], {}, {}
    for segment in segmenters:
        found, own = assess(segment, data, args, device, bins)
        names = {}  # of its stages, unlike those of other checkpoints; MaskCLIP's is often the same
        for stage in own:
            same = confusions.get(stage, torch.empty(0)).equal(found.get(stage, torch.ones(1)))
            ways = (stage, f"{segment.folder.name} {stage}", f"{segment.path} {stage}")
            ways = ways[several and stage != "maskclip":]
            names[stage] = stage if same else next(way for way in ways if way not in results)
        named = {names[stage]: result for stage, result in own.items()}
        if rank() == 0:
            save_results((args.out or segment.folder) / "results.json", named if args.out else own)
        drawn = {stage: name for stage, name in names.items()
                 if stage in segment.names and name not in confusions}
        shown.append((segment, drawn))
        confusions |= {name: found[stage] for stage, name in drawn.items()}
        results |= named
    print(table(results, [*map(called, first.classes)]))
    if bins:
        objects = next(result["objects"] for result in results.values() if "objects" in result)
        print(f"(objects: {objects}; distance of their centroids from the centre, relative to half "
              "the diagonal)")
    if args.hypotheses:
        if first.student or s.hypothesis == "none" or first.folder != first.path.parent:
            raise UserError(f"--hypotheses: {first.path} was not trained with hypotheses of its "
                            "own")
        images, clip = open_split(args, first, getattr(s, "train_split", "train")), first.network
        hypothesis = make_hypotheses(images, clip.model, clip.rectifier.Wq, s,
                                     hypotheses_folder(first.path, s), device)
        precision, recall = hypothesis_quality(hypothesis, images)
        print(f"hypotheses of {len(images)} training images: precision {precision:.1f} %, recall "
              f"{recall:.1f} %")
    if args.figures and rank() == 0:
        draw_figures(shown, data, confusions, device, out)
    print(printable(f"{', '.join(map(str, paths))}: {len(data)} images of {data.name} {args.split} "
                    f"→ {out / 'results.json'}"))
    return results


if __name__ == "__main__":
    main()
    leave_processes()
