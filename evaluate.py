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
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from data import (CLASSES, PHOTOS, VOID, Parser, Progress, UserError, called, clean_exit, count,
                  dataset_palette, evenly, gather, list_folder, make_folder, name_counts, natural,
                  open_dataset, overlay, parse_classes, picture_sheet, positive, printable, rank,
                  read_ahead, read_image, resize_to_scale, save_picture, say_once, share,
                  user_path, world, write_text)
from distill import checkpoint_in, hypotheses_in, load_student
from reclip import (METHODS, SURGERIES, RectifiedCLIP, Rectifier, authors_state, best_name,
                    classify, clip_features, clip_fingerprint, cut_crops, from_authors, label_map,
                    load_checkpoint, load_clip, make_hypotheses, open_rectified, pick_device,
                    prompt_denoising, query_features, recipe, to_device, use_amp, usual_surgery)

# ---- Scores, and bias scores (ReCLIP++, Sec. IV-C and Table VII) ---------------------------------

BINS = 5  # of the distance from the centre: few, since the ends decide on the mean slope


def confusion_matrix(prediction, label, C, place=None, places=1):
    """Pixels by true class (rows) and predicted class (columns), int64 C×C.
    prediction, label: integer tensors of one shape; pixels whose label is not in 0…C-1 (void, 255)
    do not count. place: None, or of that shape, 0…places-1, for a matrix of each, places×C×C."""
    index = label.long() * C + prediction + (0 if place is None else C * C * place.long())
    # What does not count has an entry of its own: to select would be to wait for a GPU.
    n = places * C * C
    index = torch.where((label >= 0) & (label < C), index, n).flatten()
    counts = index.new_zeros(n + 1).scatter_add_(0, index, torch.ones_like(index))[:n]
    return counts.view((C, C) if place is None else (places, C, C))


def scores(confusion, count_absent=False):
    """IoU of every class, their mean and pixel accuracy of a confusion matrix, in per cent.
    A class without any pixel, true or predicted, is left out of the mean, as in mmsegmentation;
    count_absent counts it as 0, as the authors' program does. Its own IoU is None."""
    confusion = confusion.double()
    hits = confusion.diagonal()
    iou = 100 * hits / (confusion.sum(0) + confusion.sum(1) - hits)  # nan where a class is absent
    miou = iou.nan_to_num().mean() if count_absent else iou.nanmean()
    return dict(miou=miou.item(), pixel_accuracy=(100 * hits.sum() / confusion.sum()).item(),
                iou=[None if value != value else value for value in iou.tolist()])


def class_preference(confusion):
    """How far the right class is ahead of the most preferred wrong one, -1…1; higher is better.
    Of each row of the confusion matrix, int64 C×C, as shares of it: the diagonal minus the largest
    other entry; the mean over the classes that have pixels."""
    shares = confusion.double() / confusion.sum(1, keepdim=True)
    others = shares.clone().fill_diagonal_(0).amax(1)
    return (shares.diagonal() - others).nanmean().item()


def distance_bins(label, objects, bins=BINS):
    """The bin of each pixel's object, by how far the object is from the centre of the image.
    label, objects: int64 H×W, objects 0 where there is none. The distance is that from an object's
    centroid (over its pixels with a class) to the image's, relative to half the image's diagonal:
    0…1, in `bins` equal bins. Returns int64 H×W; `bins` for pixels of no object."""
    _, place = objects.masked_fill(label == VOID, 0).unique(return_inverse=True)
    sides = torch.meshgrid(*(torch.arange(n) + 0.5 - n / 2 for n in label.shape), indexing="ij")
    y, x = (place.flatten().bincount(side.flatten().double()) / place.flatten().bincount()
            for side in sides)
    distance = torch.hypot(y, x) / (math.hypot(*label.shape) / 2)
    nearest = (distance * bins).long().clamp(max=bins - 1)
    return nearest[place].masked_fill((objects == 0) | (label == VOID), bins)


def distance_curve(confusions):
    """mIoU per bin, in per cent, over the classes whose objects lie there; None for an empty bin.
    confusions: int64 bins×C×C, of `confusion_matrix` with `distance_bins` as places."""
    found = [(scores(m)["iou"], m.sum(1).nonzero()[:, 0].tolist()) for m in confusions]
    return [sum(iou[k] for k in there) / len(there) if there else None for iou, there in found]


def space_preference(curve):
    """Mean slope ΔmIoU / Δdistance of a distance curve between neighbouring non-empty bins, mIoU as
    a fraction; higher is better, 0 is no preference for the centre. None for fewer than two bins.
    """
    points = [((i + 0.5) / len(curve), m / 100) for i, m in enumerate(curve) if m is not None]
    slopes = [(m - l) / (b - a) for (a, l), (b, m) in zip(points, points[1:])]
    return sum(slopes) / len(slopes) if slopes else None


# ---- Prediction ----------------------------------------------------------------------------------

PAMR = {"shapes": (4, (1, 2, 4, 8))}  # steps and dilations, elsewhere NACLIP's:
NACLIP_PAMR = 10, (8, 16)


@torch.no_grad()
def pamr(image, logits, steps=10, dilations=(8, 16)):
    """Refine logits by the image (PAMR, Araslanov and Roth, 2020): smooth, but not across edges.

    Every pixel's logits become a weighted mean of those of its 8 neighbours at each dilation,
    `steps` times; an image ends in copies of its border. The weights are a softmax over all
    neighbours of -mean over RGB of |difference| / 0.1σ, with σ the standard deviation of the
    neighbourhood, the pixel itself included once per dilation. image: B×3×H×W, in any unit; logits:
    B×C×h×w, taken to the image's size first (bilinear, aligned corners). Returns float32 B×C×H×W.
    """
    image, (H, W), far = image.float(), image.shape[2:], max(dilations)

    def neighbours(x):
        padded = F.pad(x, [far] * 4, mode="replicate")
        for d, dy, dx in itertools.product(dilations, (-1, 0, 1), (-1, 0, 1)):
            if dy or dx:
                yield padded[:, :, far + d * dy :, far + d * dx :][:, :, :H, :W]

    n = 9 * len(dilations)
    mean = (sum(neighbours(image)) + len(dilations) * image) / n
    squares = sum((other - mean) ** 2 for other in neighbours(image))
    sigma = ((squares + len(dilations) * (image - mean) ** 2) / (n - 1)).sqrt()
    weights = torch.stack([-((other - image).abs() / (0.1 * sigma + 1e-8)).mean(1, keepdim=True)
                           for other in neighbours(image)]).softmax(0)  # 8·len(dilations)×B×1×H×W
    parts = [*logits.split(max(1, 2**20 // (len(image) * H * W)), 1)]  # what a cache holds
    for n, x in enumerate(parts):
        x = F.interpolate(x.float(), (H, W), mode="bilinear", align_corners=True)
        for _ in range(steps):
            mixed = torch.zeros_like(x)
            for weight, other in zip(weights, neighbours(x)):
                mixed.addcmul_(weight, other)
            x = mixed
        parts[n] = x
    return torch.cat(parts, 1)


class Segmenter:
    """Any network as a function from images to label maps, one per stage it knows.

    network: a RectifiedCLIP, a distill.Student, or the path of a checkpoint; source: where its CLIP
    is now, if not where it was. names: "maskclip" and "rectified", or "distilled". pd: prompt
    denoising of the rectified logits, "recipe" for the checkpoint's own, of which "rectified_no_pd"
    is there too. slide: None, or (window, stride) in pixels; flip: mean of the logits of a view and
    its mirror image. pamr: None, or PAMR's (steps, dilations), for one more map of each of the
    names, NAME_pamr, made on the view or, with pamr_size "image", at the image's own size.
    presence: None, or (A, model, Wq, r): A·log `presence_prior` is added to logits / `temperature`.
    """

    def __init__(self, network, device="cpu", source=None, pd="recipe", slide=None, flip=False,
                 amp=False, pamr=None, pamr_size="view"):
        self.finished, self.clip = True, None
        if isinstance(network, (str, Path)):
            path, checkpoint = network, load_checkpoint(network)
            self.finished, self.clip = checkpoint["finished"], checkpoint["clip"]
            network = (load_student(path, device) if checkpoint["kind"] == "distill" else
                       open_rectified(path, device, source))
        self.network, self.student = network, not isinstance(network, RectifiedCLIP)
        s, self.settings, self.classes = network.settings, network.settings, network.classes
        self.both = pd == "recipe"  # with and without
        self.pd = None if self.student else s.pd if pd == "recipe" else pd
        self.slide, self.flip, self.amp = slide, flip, amp
        self.pamr, self.pamr_size, self.presence = pamr, pamr_size, None
        plain = ["maskclip"] * (not (s.learn_query or s.tune_encoder))
        self.names = ["distilled"] if self.student else (
            plain + ["rectified"] * (s.method != "maskclip"))
        # MaskCLIP's logits are of names, of which the best decides last of all, as in NACLIP.
        counts = torch.tensor(name_counts(self.classes))
        self.class_of = torch.repeat_interleave(counts).to(device)

    @torch.no_grad()
    def stages(self, views):
        """{name: (features B×K×h×w, logits B×C×h×w)} of uint8 views B×3×H×W, and the (height,
        width) that they cover: the view by a student's grid, whole patches by a ViT's.

        Features are for a linear probe: Z, "rectified" with the logits beside it, D+C channels, or
        Ẑ of unit length. MaskCLIP has logits of names, of which a class may have several."""
        network = self.network
        if self.student:
            Z_hat, logits = network(views, amp=self.amp)
            return {"distilled": (F.normalize(Z_hat, dim=1), logits)}, views.shape[2:]
        Z, p = network.inputs(network.encode(views, amp=self.amp))
        M = network.rectifier(Z, p, network.Wr)[1]
        stages = dict(maskclip=(Z, classify(Z, network.rectifier.Wq)),
                      rectified=(torch.cat([Z, M], 1), M))
        padded = tuple(side * network.patch for side in Z.shape[2:])
        return {name: stages[name] for name in self.names}, padded

    def mean_logits(self, views):
        """Mean logits of overlapping windows, and of their mirror images, at the views' size."""
        H, W = views.shape[2:]
        window, stride = self.slide or [max(H, W)] * 2
        starts = lambda n: sorted({min(i, max(n - window, 0)) for i in range(0, n, stride)})
        sums, times = {}, torch.zeros(H, W, device=views.device)
        for top, left, mirrored in itertools.product(starts(H), starts(W), {False, self.flip}):
            part = views[:, :, top : top + window, left : left + window]
            h, w = part.shape[2:]
            stages, padded = self.stages(part.flip([3] * mirrored))
            for name, (_, logits) in stages.items():
                x = F.interpolate(logits, padded, mode="bilinear")[..., :h, :w].flip([3] * mirrored)
                total = sums.setdefault(name, x.new_zeros(*x.shape[:2], H, W))
                total[:, :, top : top + h, left : left + w] += x
            times[top : top + h, left : left + w] += 1
        return {name: total / times for name, total in sums.items()}

    @torch.no_grad()
    def logits(self, views):
        """{name: logits} of all stages, denoised too, and the (height, width) that they cover."""
        if self.slide or self.flip:
            outputs, padded = self.mean_logits(views), views.shape[2:]
        else:
            stages, padded = self.stages(views)
            outputs = {name: logits for name, (_, logits) in stages.items()}
        if "rectified" in outputs and self.pd is not None:
            without = outputs["rectified"]
            outputs["rectified"] = prompt_denoising(without, self.pd, self.settings.pd_temperature)
            outputs |= {"rectified_no_pd": without} if self.both else {}
        return outputs, padded

    @torch.no_grad()
    def __call__(self, views, images, only=None, sure=False):
        """{name: int64 B×H×W} for uint8 views B×3×h×w of images B×3×H×W; or, for `only` one of the
        names, a pair: its map and, if one is to be `sure`, the `most_likely` probability."""
        outputs, padded = self.logits(views)
        view, size, maps = views.shape[2:], images.shape[2:], {}
        if self.presence:
            A, *witness = self.presence
            p = [presence_prior(image, *witness, self.classes, self.amp) for image in images]
            for name, logits in outputs.items():
                prior = A * self.temperature(name) * torch.stack(p).log()[:, :, None, None]
                outputs[name] = logits + (prior[:, self.class_of] if name == "maskclip" else prior)
        at, guide = (size, images) if self.pamr_size == "image" else (view, views)
        for name in [only] if only else [*outputs, *(f"{n}_pamr" for n in self.names if self.pamr)]:
            plain, probability = name.removesuffix("_pamr"), None
            if name == plain and not sure:
                labels = label_map(outputs[name], padded, view, size)
                labels = self.class_of[labels] if name == "maskclip" else labels
            else:
                refine = None if name == plain else lambda part: pamr(guide, part, *self.pamr)
                names = name_counts(self.classes) if plain == "maskclip" else None
                labels, probability = most_likely(outputs[plain], padded, view, size,
                                                  self.temperature(plain), refine, at, names)
            maps[name] = labels
        return (maps[only], probability) if only else maps

    def temperature(self, name):
        """That of a softmax over the classes: the one at which prompt denoising looks at such
        logits, 0.1 after a decoder and 0.01 for cosines; 1 for a head that DeepLab has learned."""
        if not self.student:
            return 0.01 if name == "maskclip" else self.settings.pd_temperature
        if self.settings.head == "learned":
            return 1.0
        return 0.01 if self.network.head.decoder is None else 0.1


def most_likely(logits, padded, view, size, temperature, refine=None, at=None, names=None):
    """Class of every pixel and its probability, softmax(logits / temperature), both B×H×W.
    As `label_map` with the softmax after upsampling; refine: what is done before to the logits of
    some classes, B×K×h×w, at the resolution `at`: by default the view's; names: as in `best_name`,
    which comes between upsampling and softmax. In chunks of classes."""
    if not logits.isfinite().all():
        raise UserError("the logits are not all finite; are the weights damaged?")
    names = names or [1] * logits.shape[1]
    chunk = max(1, min(32, 2**26 // (len(logits) * math.prod(size))))
    best = total = logits.new_full((len(logits), *size), -math.inf)
    labels = torch.zeros_like(best, dtype=torch.int64)
    for first in range(0, len(names), chunk):
        some, start = names[first : first + chunk], sum(names[:first])
        part = F.interpolate(logits[:, start : start + sum(some)], padded, mode="bilinear")
        part = part[..., : view[0], : view[1]]
        part = part if refine is None else refine(F.interpolate(part, at or view, mode="bilinear"))
        part = best_name(F.interpolate(part, size, mode="bilinear"), some) / temperature
        value, index = part.max(1)
        labels = torch.where(value > best, index + first, labels)
        best, total = torch.maximum(value, best), torch.logaddexp(total, part.logsumexp(1))
    return labels, (best - total).exp()


@torch.no_grad()
def presence_prior(image, model, Wq, r, classes, amp=False):
    """How likely each class is in a picture at all, by CLIP's view of its crops; C, sum 1.
    The mean over the crops of softmax(cosine / 0.01). Not in the papers, which ask about crops
    (Sec. III-D, Eq. 6) in training alone. image: uint8 3×H×W; model: a CLIP; Wq: a row for each
    name of the classes; r: side of a crop relative to the image's; amp: encode in bf16."""
    crops = cut_crops(image, r, model.visual.input_resolution)
    cosines = F.normalize(clip_features(model, crops, amp), dim=1) @ Wq.T
    p = (best_name(cosines, name_counts(classes)) / 0.01).softmax(1).mean(0)
    return p.clamp(min=1e-30)  # so that its logarithm is finite


def witness(segment, path, device, source=None):
    """The CLIP that `presence_prior` asks, and its Wq; for a student its teacher's. path: of the
    checkpoint; source: where that CLIP is now, if not where it was. Raises UserError."""
    s = segment.settings
    if not segment.student:
        model, Wq = segment.network.model, segment.network.rectifier.Wq
        return model, query_features(model, segment.classes) if s.learn_query else Wq
    try:
        model = load_clip(source or s.clip, s.activation, device, s.heads)
    except UserError as error:
        raise UserError(f"--presence asks the teacher's CLIP: {error}; say with --clip where it is")
    if clip_fingerprint(model) != segment.clip:
        raise UserError(f"{path} was distilled from another CLIP than {source or s.clip}")
    return model, query_features(model, segment.classes)


# ---- Evaluation ----------------------------------------------------------------------------------

def evaluate(segment, data, scale, device, workers=0, bins=0):
    """{name: confusion matrix} over all images of `data`, shared among the processes.

    segment: a Segmenter, or any function of views B×3×h×w and images B×3×H×W, both uint8, to {name:
    int64 B×H×W}. bins: if more than 0, the matrices are (bins+1)×C×C, by `distance_bins`."""
    def read(i):
        image, label = data.image(i), data.label(i)
        place = distance_bins(label, data.objects(i), bins) if bins else label
        return resize_to_scale(image, scale), image, label.to(torch.uint8), place.to(torch.uint8)

    C, totals, progress = len(data.classes), {}, Progress("evaluate", len(data))
    for item in read_ahead(read, range(rank(), len(data), world()), workers):
        view, image, label, place = (to_device(part[None], device) for part in item)
        for name, prediction in segment(view, image).items():
            matrix = confusion_matrix(prediction, label, C, *(place, bins + 1) * bool(bins))
            totals[name] = totals[name] + matrix if name in totals else matrix
        progress.advance(world())
    progress.close()
    parts = gather({name: total.cpu() for name, total in totals.items()})
    return {name: sum(part[name] for part in parts if part) for name in parts[0]}


def hypothesis_quality(hypothesis, data):
    """Precision and recall, in per cent, of image-level hypotheses against the labels of `data`:
    a function from an image's index, in a list, to bool 1×C. All (image, class) pairs count alike.
    """
    hits = said = true = 0
    for i in range(len(data)):
        kept, label = hypothesis([i])[0], data.label(i)
        present = label[label != VOID].unique()
        hits, said = hits + kept[present].sum().item(), said + kept.sum().item()
        true += len(present)
    return 100 * hits / max(1, said), 100 * hits / max(1, true)


def doubts(confusion, classes):
    """Lines on what may be wrong with labels: classes that none of them holds, and a mIoU below
    chance. confusion: int64 C×C; classes: C names. Raises UserError where all labels are void."""
    absent = [name for name, pixels in zip(classes, confusion.sum(1)) if not pixels]
    if len(absent) == len(classes):
        raise UserError("no pixel of any label has a class: all are void (255)")
    some = ", ".join(absent[:5]) + ", …" * (len(absent) > 5)
    lines = [f"no label holds {some} (255 is void)"] * bool(absent)
    # Chance: each class at as many pixels as here, true and predicted, but strewn at random.
    strewn = torch.outer(confusion.double().sum(1), confusion.double().sum(0)) / confusion.sum()
    miou, by_chance = scores(confusion)["miou"], scores(strewn)["miou"]
    if miou < by_chance - 0.005:  # more than rounding
        lines.append(f"mIoU {miou:.2f} is below chance ({by_chance:.2f}): most likely the labels "
                     f"have the classes in another order than {', '.join(classes[:3])}, …")
    return lines


def table(results, classes):
    """A text table, a column per result: mIoU, pixel accuracy, bias scores, IoU of every class."""
    column = lambda key: [result.get(key) for result in results.values()]
    curves = column("distance_curve")
    rows = [("mIoU", column("miou")), ("pixel accuracy", column("pixel_accuracy"))]
    for key in ["class", "space"] * any(curve is not None for curve in curves):
        rows.append((f"{key}-preference", column(f"{key}_preference")))
    for n, part in enumerate(next(filter(None, curves), [])):
        rows.append(("mIoU, distance {:.1f}–{:.1f}".format(*part["distance"]),
                     [curve and curve[n]["miou"] for curve in curves]))
    rows += [(name, [result["iou"][name] for result in results.values()]) for name in classes]
    heads = [name.replace("linear_probe_", "LP ") for name in results]
    wide, width = max(11, *map(len, heads)), max(18, *(len(name) for name, _ in rows))
    lines = [" " * width + "".join(f" {head:>{wide}}" for head in heads)]
    for name, values in rows:
        cells = ["–" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"{printable(name):{width}}" + "".join(f" {cell:>{wide}}" for cell in cells))
    lines.insert(-len(classes), "-" * len(lines[0]))
    return "\n".join(lines)


def save_results(path, results):
    """Add results to a results.json, {"maskclip": {"miou": …}, …}. What an evaluation with the same
    outcome has added before, such as bias scores, stays. Raises UserError for a damaged file."""
    try:
        old = json.loads(path.read_text("utf-8")) if path.exists() else {}
        for name, result in json.loads(json.dumps(results)).items():
            before = old.get(name, {})
            same = before and all(result[key] == before[key] for key in result.keys() & before)
            old[name] = before | result if same else result
    except (ValueError, AttributeError):
        raise UserError(f"{path} is damaged; delete it and evaluate again") from None
    write_text(path, json.dumps(old, indent=1, ensure_ascii=False) + "\n")


def linear_probe(segment, data, device, epochs=60, workers=0, seed=0, batch=2048, memory=4):
    """One 1×1 classifier on each stage's frozen features, trained with the ground truth of `data`.

    segment: a Segmenter. Features are standardised; cross-entropy against the share of a patch that
    each class covers; AdamW, 1e-2, down to 0 along a cosine over `epochs`, `batch` patches at a
    time. Of an image at most so many take part, drawn at random, that all fit into `memory` GiB.
    Returns a function for `evaluate`, to {"linear_probe_" + name: int64 B×H×W}.
    """
    C, generator, asked = len(data.classes), torch.Generator().manual_seed(seed), []
    read = lambda i: (resize_to_scale(data.image(i), segment.settings.scale), data.label(i))
    progress = Progress("features", len(data))
    for view, label in read_ahead(read, range(len(data)), workers):
        (h, w), (stages, padded) = view.shape[1:], segment.stages(view[None].to(device))
        features = [x[0].flatten(1).T.half() for x, _ in stages.values()]
        label = F.interpolate(label[None, None].float(), (h, w), mode="nearest-exact")[0]
        label = F.pad(label, (0, padded[1] - w, 0, padded[0] - h), value=VOID)
        shares = F.adaptive_avg_pool2d((label == torch.arange(C)[:, None, None]).float(),
                                       next(iter(stages.values()))[0].shape[2:]).flatten(1).T
        most = memory * 2**30 // (2 * len(data) * sum(x.shape[1] for x in features))
        chosen = shares.sum(1).nonzero()[:, 0]
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:most]].to(device)
        asked.append((shares.to(device)[chosen], *(x[chosen] for x in features)))
        progress.advance()
    progress.close()
    shares, *features = map(torch.cat, zip(*asked))
    torch.manual_seed(seed)
    probes = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(x.shape[1], affine=False),
                                         nn.Conv2d(x.shape[1], C, 1)) for x in features).to(device)
    optimizer = torch.optim.AdamW(probes.parameters())
    progress = Progress("linear probe", epochs * len(shares))
    for _ in range(epochs):
        for rows in torch.randperm(len(shares), generator=generator).to(device).split(batch):
            done = progress.done / progress.total
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * done)) / 2
            log_p = [probe(x[rows].float()[..., None, None]).log_softmax(1)[..., 0, 0]
                     for probe, x in zip(probes, features)]
            loss = -sum((shares[rows] * one).sum() for one in log_p) / shares[rows].sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.advance(len(rows), lambda: f"  loss {loss.item():.3f}")
    progress.close()
    probes.eval()

    @torch.no_grad()
    def predict(views, images):
        stages, *extent = *segment.stages(views), views.shape[2:], images.shape[2:]
        return {f"linear_probe_{name}": label_map(probe(x), *extent)
                for probe, (name, (x, _)) in zip(probes, stages.items())}

    return predict


# ---- Figures, as PIL images ("Fig." is ReCLIP++'s) -----------------------------------------------

def comparison(segmenters, data, device, count=5):
    """Image, truth and predictions, where they are scored, of `count` images (Fig. 5). segmenters:
    pairs of a Segmenter and {stage of it: heading}."""
    rows, present = [], set()
    for i in evenly(len(data), count):
        image, label = data.image(i), data.label(i)
        maps = [label]
        for segment, headings in segmenters:
            view = resize_to_scale(image, segment.settings.scale)[None].to(device)
            masks = segment(view, image[None].to(device))
            maps += [masks[stage][0].cpu().where(label != VOID, VOID) for stage in headings]
        present |= set(torch.stack(maps).unique().tolist()) - {VOID}
        rows.append([image] + [overlay(image, m, data.palette) for m in maps])
    headings = ["image", "truth"] + [h for _, stages in segmenters for h in stages.values()]
    return picture_sheet(rows, headings, present, data.classes, data.palette, cell=170)


@torch.no_grad()
def heatmaps(segment, data, device, count=3, cell=136):
    """The parts of the bias (Fig. 4; ReCLIP, Fig. 3) in `count` images, evenly spaced.

    segment: a Segmenter of a checkpoint with a bias. Logits, from blue (low) to yellow (high), of
    the class of which MaskCLIP misses the most, whose true region is outlined: of Query and
    Reference, Z·Wqᵀ and Z·Wrᵀ, the bias Mb, rectified and decoded, M and Mo.
    """
    network, rectifier, Wr = segment.network, segment.network.rectifier, segment.network.Wr
    rows, present = [], set()
    for i in evenly(len(data), count):
        image, label = data.image(i), data.label(i)
        view = resize_to_scale(image, segment.settings.scale)[None].to(device)
        (h, w), (Z, p) = view.shape[2:], network.inputs(network.encode(view, amp=segment.amp))
        Mq, Mo = rectifier(Z, p, Wr)
        Mb = rectifier.bias(Z, p, Wr).expand_as(Mq)
        maps = {"Query": Mq, "Reference": classify(Z, Wr), "bias": Mb,
                "rectified": Mq + rectifier.sign * Mb}
        maps |= {"decoded": Mo} if segment.settings.decoder else {}
        padded = [side * network.patch for side in Z.shape[2:]]
        said = label_map(Mq, padded, (h, w), label.shape)[0].cpu()
        k = int(label[(label != VOID) & (label != said)].bincount(minlength=1).argmax())
        inside = (label == k).float()[None]
        outline = F.max_pool2d(inside, 5, 1, 2) > inside
        rows.append([image, overlay(image, label, data.palette)])
        present |= set(label.unique().tolist()) - {VOID}
        for x in maps.values():
            x = F.interpolate(x[:, k : k + 1], padded, mode="bilinear")[..., :h, :w]
            x = F.interpolate(x, label.shape, mode="bilinear")[0, 0].cpu()
            x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12)
            x = torch.stack([x, x**2, 1 - x]).masked_fill(outline, 1)
            rows[-1].append((255 * x).to(torch.uint8))
    return picture_sheet(rows, ["image", "truth", *maps], present, data.classes, data.palette, cell)


def confusion_figure(confusions, classes, colours):
    """Confusion matrices side by side (Fig. 1 b): rows, true classes, as shares of their pixels,
    white to blue. confusions: {title: int64 C×C}; colours: uint8 C×3, beside rows and columns."""
    pictures = []
    for confusion in confusions.values():
        share = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
        picture = torch.full((len(classes) + 1, len(classes) + 1, 3), 255.0).double()
        picture[1:, 0] = picture[0, 1:] = colours.double()
        picture[1:, 1:] += share[..., None]**0.6 * torch.tensor([-235, -185, -105])
        pictures.append(picture.to(torch.uint8).movedim(-1, 0))
    return picture_sheet([pictures], [*confusions], range(len(classes)), classes, colours,
                         cell=max(240, 900 // len(pictures)))


def chart(lines, ticks, title, width=900, height=480):
    """mIoU against a quantity. lines: {name: points}, a point is (x, mIoU, half the length of its
    error bar); ticks: values of x to mark, in ascending order; title: what x is."""
    ends = [end for points in lines.values() for _, miou, sd in points
            for end in (miou - sd, miou + sd)] or [0]
    step = next(step for step in (1, 2, 5, 10, 20) if max(ends) - min(ends) < 6 * step)
    low, high = step * math.floor(min(ends) / step), step * math.floor(max(ends) / step + 1)
    left, top, right, bottom = 60, 20 + 26 * len(lines), width - 25, height - 60
    across = lambda x: left + (x - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)
    up = lambda miou: bottom - (miou - low) / (high - low) * (bottom - top)

    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    text = functools.partial(draw.text, font=ImageFont.load_default(16), fill="black", anchor="mm")
    for miou in range(low, high + 1, step):
        draw.line((left, up(miou), right, up(miou)), (215, 215, 215))
        text((left - 8, up(miou)), str(miou), anchor="rm")
    for tick in ticks:
        draw.line((across(tick), bottom, across(tick), bottom + 6), "black")
        text((across(tick), bottom + 18), f"{tick:.2g}")
    text((width / 2, height - 16), f"mIoU in per cent; {title}")
    colours = itertools.cycle([(44, 140, 80), (31, 90, 190), (214, 100, 20), (130, 60, 160)])
    for n, ((name, points), colour) in enumerate(zip(lines.items(), colours)):
        draw.line([(across(x), up(miou)) for x, miou, _ in points], colour, 3)
        for x, miou, sd in points:
            draw.line((across(x), up(miou - sd), across(x), up(miou + sd)), colour, 2)
            draw.ellipse((across(x) - 5, up(miou) - 5, across(x) + 5, up(miou) + 5), colour)
        text((left, 15 + 26 * n), name, fill=colour, anchor="lm")
    return sheet


# ---- Your own images -----------------------------------------------------------------------------

def find_images(paths):
    """[(file, name)]: the image files among paths, and in the folders among them, as Paths.
    name: of what is made of it: its path in the folder without ending; where another has that
    (photo.png beside photo.jpg) with it, or a number. Raises UserError where there is no image.
    """
    images = {}
    for path in paths:
        inside = list_folder(path, PHOTOS) if path.is_dir() else [path.name] * path.exists()
        if not inside:
            raise UserError(f"--images: no file {path}, or no images in it ({', '.join(PHOTOS)})")
        for i in inside:
            ways = itertools.chain([os.path.splitext(i)[0]],
                                   (i + f"-{n}" * (n > 1) for n in itertools.count(1)))
            name = next(way for way in ways if way not in images)
            images[name] = path / i if path.is_dir() else path
    return [(file, name) for name, file in images.items()]


def predict(segment, stage, images, out, device, workers=0, confidence=False, unknown_below=0.0):
    """Masks of image files of any size. Raises UserError for a folder of other classes and, after
    all are done, where some files could not be read.

    stage: one that the Segmenter has; images: as `find_images` gives them; out: the folder, for
    masks/NAME.png       the class of every pixel, 0…C-1, as a palette picture of the image's size;
                         255, no class, where its probability is less than unknown_below,
    overlays/NAME.png    the classes in colour on the image, 420 to 1000 pixels, with a legend,
    confidence/NAME.png  if asked for, the `most_likely` probability of every pixel, 0…255 in grey,
    classes.json         their names, C,
    predictions.jsonl    a line a file: per cent of the pixels, mean confidence of each class.
    """
    names, failed = [*map(called, segment.classes)], []
    known, progress = out / "classes.json", Progress("predict", len(images))
    make_folder(out)
    if known.exists() and known.read_text("utf-8") != json.dumps(names):
        raise UserError(f"{out} has the masks of other classes; choose another folder with --out")
    write_text(known, json.dumps(names))
    lines = open(out / "predictions.jsonl", "w", encoding="utf-8", buffering=1)  # line by line

    def read(image):
        try:
            pixels = read_image(image[0])
            return *image, pixels, resize_to_scale(pixels, segment.settings.scale)
        except UserError as error:
            return *image, None, str(error)

    for path, name, image, view in read_ahead(read, images, workers):
        line = dict(image=str(path))
        if image is None:
            print(f"error: {printable(view)}", file=sys.stderr)
            failed.append(str(path))
            line["error"] = view
        else:
            mask, sure = segment(view[None].to(device), image[None].to(device), stage,
                                 confidence or unknown_below > 0)
            if unknown_below:
                mask[sure < unknown_below] = VOID
            line |= dict(stage=stage) | write_prediction(
                segment, out, name, image, mask[0].cpu(), sure[0].cpu() if confidence else None)
        lines.write(json.dumps(line) + "\n")
        progress.advance()
    progress.close()
    lines.close()
    print(printable(f"{len(images) - len(failed)} images ({stage}) → {out}/"))
    if failed:
        raise UserError(f"{len(failed)} of {len(images)} images could not be read: "
                        + ", ".join(failed[:5]) + ", …" * (len(failed) > 5))


def write_prediction(segment, out, name, image, mask, sure):
    """The files of one image, as `predict` says; returns what its line says of them.
    image: uint8 3×H×W; mask: int64 H×W; sure: H×W, the confidence, or None."""
    def save(folder, picture):
        path = out / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(picture, path)
        return f"{folder}/{name}.png"

    names, C, pixels = [*map(called, segment.classes)], len(segment.classes), mask.flatten()
    colours = dataset_palette(segment.settings.dataset, C)
    counts = pixels.bincount(minlength=256)[:C]
    area = 100 * counts / len(pixels)
    order = [k for k in area.argsort(descending=True).tolist() if counts[k] > 0]
    picture = Image.fromarray(mask.to(torch.uint8).numpy())
    # With all 256 colours: Pillow would store fewer in fewer bits, which have no 255.
    picture.putpalette(F.pad(colours, (0, 0, 0, 256 - C)).flatten().tolist())
    side = min(1000, max(420, *image.shape[1:]))
    small = resize_to_scale(image, (side, side))
    shown = F.interpolate(mask[None, None].float(), small.shape[1:], mode="nearest-exact")[0, 0]
    sheet = picture_sheet([[overlay(small, shown.long(), colours)]], [], order, [
        f"{name} {share:.1f} %" for name, share in zip(names, area)], colours, side)
    line = dict(mask=save("masks", picture), overlay=save("overlays", sheet),
                width=image.shape[2], height=image.shape[1],
                areas={names[k]: round(area[k].item(), 4) for k in order})
    if sure is not None:
        save("confidence", Image.fromarray((255 * sure).round().to(torch.uint8).numpy()))
        mean = pixels.bincount(sure.flatten().double(), minlength=256)[:C] / counts
        line["confidence"] = {names[k]: round(mean[k].item(), 4) for k in order}
    return line


# ---- The command ---------------------------------------------------------------------------------

def open_segmenter(args, path, device):
    """The Segmenter of a checkpoint, ours or the authors', or, without a path, of --classes, with
    its `path` and the `folder` where results go by default. Raises UserError."""
    state, network, folder = path and authors_state(path), path, path and path.parent
    given = [f"--{name}" for name in ("surgery", "sigma", "activation", "heads", "preset")
             if getattr(args, name) is not None]
    if path is None or state:
        network = open_foreign(args, path, state, device)
        folder = Path("runs", f"authors-{path.stem}" if path else "maskclip")
    elif given:
        raise UserError(f"{' and '.join(given)}: what {path} was trained with cannot be changed "
                        "afterwards")
    segment = Segmenter(network, device, args.clip, {None: "recipe", 0: None}.get(args.pd, args.pd),
                        args.slide, args.flip, use_amp(args.amp, device))
    s, segment.path, segment.folder = segment.settings, path, folder
    if args.pamr is not None:
        steps, dilations = PAMR.get(s.dataset, NACLIP_PAMR)
        segment.pamr = args.pamr or steps, tuple(args.dilations or dilations)
        segment.pamr_size = args.pamr_size or "view"
    if args.presence:
        asked = witness(segment, path, device, args.clip)
        segment.presence = args.presence, *asked, args.crop_ratio or s.crop_ratio
    if not segment.finished:
        print(printable(f"{path} is not finished: the command that made it goes on"))
    return segment


def open_foreign(args, path, state, device):
    """RectifiedCLIP of a file of the authors, `state` being what is in it, or of --classes."""
    dataset = args.dataset or ("shapes" if args.clip == "shapes-tiny" else "folder")
    if path and dataset not in CLASSES:
        raise UserError(f"{path} is a checkpoint of the authors' program; say with --dataset which "
                        f"data set it is of: {', '.join(CLASSES)}")
    method, preset = authors_method(state) if path else ("maskclip", "release")
    if method == "reclip" and args.preset is None:
        print(printable(f"{path} does not say its preset; taken for one of 2024, --preset paper"))
    given = {name: getattr(args, name) for name in ("clip", "surgery", "sigma")
             if getattr(args, name) is not None}
    s = argparse.Namespace(**recipe(dataset, args.preset or preset, method, **given), seed=0,
                           dataset=dataset, preset=args.preset or preset, method=method, workers=0,
                           data_root=None, labels=None, labels_offset=0, train_split="train")
    classes = CLASSES[dataset] if path else parse_classes(args.classes)
    model = load_clip(s.clip, args.activation, device, args.heads)
    if path:
        return from_authors(state, model, classes, query_features(model, classes), s)
    s.surgery = args.surgery or usual_surgery(model, s.surgery)
    rectifier = Rectifier(model, classes, query_features(model, classes), *METHODS["maskclip"])
    return RectifiedCLIP(model, rectifier, None, classes, s)


def authors_method(state):
    """(method, preset) of a file of the authors; ReCLIP's may be of either preset."""
    return ("reclip++", "release") if "pe_proj.weight" in state else ("reclip", "paper")


def open_split(args, segment, split):
    """A split of the data set that a Segmenter is evaluated on, by default of its own."""
    s, own = segment.settings, dict(labels=args.labels)
    dataset = args.dataset or s.dataset
    if dataset == "folder":  # by default as it was given to reclip.py
        offset = s.labels_offset if args.labels_offset is None else args.labels_offset
        own = dict(classes=segment.classes, labels=args.labels or s.labels, offset=offset)
    return open_dataset(dataset, args.data_root or s.data_root, split, seed=s.seed, **own)


def parse_arguments(argv):
    """The command line as a namespace; what is not given is None."""
    parser = Parser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--checkpoint", type=user_path, nargs="+", help="or folders of runs (default: newest)")
    flag("--dataset", help="default: the one it was trained on")
    flag("--data-root", type=user_path, help="default: where it was trained")
    flag("--labels", type=user_path, help="for folder: the labels of its images, ID.png")
    flag("--labels-offset", type=int, choices=(0, 1), help="1: label 0 is none of the classes")
    flag("--split", choices=("val", "train", "trainaug"), default="val")
    flag("--clip", help="where the checkpoint's CLIP is now; without a checkpoint of ours, which")
    flag("--pd", type=share, help="prompt denoising (default: the recipe's; 0: none)")
    flag("--slide", type=count, nargs=2, metavar=("WINDOW", "STRIDE"), help="in windows, in pixels")
    flag("--flip", action="store_true", help="mean of the logits of a view and its mirror image")
    flag("--presence", type=positive, metavar="A", help="weight of what CLIP sees in crops")
    flag("--crop-ratio", type=share, help="side of these crops (default: the recipe's r)")
    flag("--pamr", type=count, nargs="?", const=0, metavar="STEPS", help="masks refined by the "
         "image, too (default: 10 steps, dilations 8 16; on the demo 4 and 1 2 4 8)")
    flag("--dilations", type=count, nargs="+", help="of PAMR, in pixels")
    flag("--pamr-size", choices=("view", "image"), help="where PAMR works (default: view)")
    flag("--count-absent", action="store_true", help="classes without a pixel count as IoU 0")
    flag("--hypotheses", action="store_true", help="precision and recall of those in training")
    flag("--bias", action="store_true", help="class-preference and space-preference scores")
    flag("--figures", action="store_true", help="of the checkpoints given, or both in a folder")
    flag("--linear-probe", action="store_true", help="NOT unsupervised: it learns from labels")
    flag("--out", type=user_path, help="default: the checkpoint's; of --images predictions/ there")
    flag("--workers", type=natural, help="threads that read images (default: as in training)")
    flag("--device", help="default: cuda, else mps, else cpu")
    flag("--amp", action=argparse.BooleanOptionalAction, help="bf16 encoders (default: on a GPU)")
    flag("--images", type=user_path, nargs="+", metavar="PATH", help="files and folders to predict "
         "masks of. One that cannot be read is named on stderr, and the exit code is 2")
    flag("--confidence", action="store_true", help="the probability of every pixel's class as well")
    flag("--unknown-below", type=share, metavar="P", help="255, no class, where it is less than P")
    flag("--method", choices=("maskclip",), help="show the Query's masks, without rectification")
    flag("--classes", help='with --method maskclip and no checkpoint: "cat, dog", or a text file')
    flag = parser.add_argument_group("where no checkpoint of ours tells").add_argument
    flag("--surgery", choices=tuple(SURGERIES), help="with --classes: CLIP's last block")
    flag("--sigma", type=positive, help="of naclip, in patches")
    flag("--activation", choices=("quick_gelu", "gelu"), help="that --clip was trained with")
    flag("--heads", type=count, help="of its image encoder, where its sizes do not tell")
    flag("--preset", choices=("release", "paper"), help="that a file of the authors belongs to")
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    for one, other in dict(dilations="pamr", pamr_size="pamr", crop_ratio="presence",
                           confidence="images", unknown_below="images", method="images",
                           classes="method").items():
        if one in given and other not in given:
            raise UserError(f"--{one} goes with --{other}".replace("_", "-"))
    for one, other in (("classes", "checkpoint"), *(("images", name) for name in (
            "bias", "figures", "linear_probe", "hypotheses", "count_absent", "labels"))):
        if one in given and other in given:
            raise UserError(f"--{one} and --{other} do not go together".replace("_", "-"))
    if args.checkpoint and args.checkpoint[1:] and (args.images or args.hypotheses):
        raise UserError("--images and --hypotheses take one --checkpoint")
    if args.slide and args.slide[1] > args.slide[0]:
        raise UserError(f"--slide {args.slide}: a stride larger than the window leaves gaps")
    if args.crop_ratio is not None and args.crop_ratio < 0.02:
        raise UserError(f"--crop-ratio {args.crop_ratio}: expected 0.02 to 1")
    return args


def assess(segment, data, args, device, bins):
    """({stage: confusion matrix}, {stage: what results.json holds of it}) of one Segmenter.
    With `bins` the matrices are those by distance. "standard" is what was evaluated, its training
    finished, on the validation images of its own data set in the way of its recipe.
    """
    s, probed, results = segment.settings, {}, {}
    confusions = evaluate(segment, data, s.scale, device, args.workers, bins)
    if args.linear_probe:
        truth = open_split(args, segment, s.train_split)
        if not truth.has_labels:
            raise UserError(f"--linear-probe: {data.name} has no training labels")
        same = set(truth.ids) == set(data.ids)
        print("The linear probe is trained with ground truth: supervised, by definition"
              + ", and here on the very images that it is scored on" * same + ".")
        probe = linear_probe(segment, truth, device, workers=args.workers)
        probed = evaluate(probe, data, s.scale, device, args.workers)
    ways = dict(slide=args.slide, flip=args.flip, presence=args.presence,
                crop_ratio=segment.presence and segment.presence[-1])
    for stage, confusion in (confusions | probed).items():
        result = scores(confusion.view(-1, *confusion.shape[-2:]).sum(0), args.count_absent)
        result["iou"] = dict(zip(map(called, data.classes), result["iou"]))
        result |= dict(dataset=data.name, split=data.split, images=len(data),
                       pd=segment.pd if stage in ("rectified", "rectified_pamr") else None,
                       count_absent=args.count_absent)
        result |= ways if stage in confusions else dict(
            trained_with_ground_truth=True, scored_on_its_training_images=same)
        usual = not any(result.get(way) for way in ("count_absent", "slide", "flip", "presence"))
        usual &= result["pd"] == s.pd if stage in ("rectified", "rectified_pamr") else True
        if stage.endswith("_pamr"):
            result |= dict(pamr=segment.pamr, pamr_size=segment.pamr_size)
            usual &= (segment.pamr, segment.pamr_size) == (PAMR.get(s.dataset, NACLIP_PAMR), "view")
        result["standard"] = bool(usual and segment.finished and
                                  (data.name, data.split) == (s.dataset, "val"))
        if getattr(s, "use_ground_truth_void", False):  # not trained unsupervised
            result["trained_with_ground_truth_void"] = True
        if bins and stage in confusions:
            curve = distance_curve(confusion[:-1])
            result |= dict(
                class_preference=class_preference(confusion.sum(0)),
                space_preference=space_preference(curve), distance_curve=[
                    dict(distance=[i / bins, (i + 1) / bins], miou=miou, pixels=int(m.sum()))
                    for i, (miou, m) in enumerate(zip(curve, confusion))],
                objects="instance masks" if data.instances else "connected regions of a class")
        results[stage] = result
    return confusions, results


def draw_figures(shown, data, results, confusions, device, out):
    """Write comparison.png, heatmaps.png, confusion.png and distance.png into a folder.
    shown: pairs of a Segmenter and {stage: name}; results, confusions: by name."""
    figures, totals, lines = dict(comparison=comparison(shown, data, device)), {}, {}
    biased = [one for one, _ in shown if "maskclip" in one.names and one.settings.bias != "none"]
    for n, one in enumerate(biased):
        figures["heatmaps" + f"-{one.folder.name}" * (n > 0)] = heatmaps(one, data, device)
    if not biased:
        print("no heatmaps.png: it needs MaskCLIP's masks and a bias logit map")
    for name, confusion in confusions.items():
        totals[f"{name} ({results[name]['class_preference']:.2f})"] = confusion.sum(0)
        slope = results[name]["space_preference"]
        lines[name if slope is None else f"{name} (mean slope {slope:.2f})"] = [
            (sum(part["distance"]) / 2, part["miou"], 0)
            for part in results[name]["distance_curve"] if part["miou"] is not None]
    figures["confusion"] = confusion_figure(totals, data.classes, data.palette)
    figures["distance"] = chart(lines, [i / BINS for i in range(BINS + 1)], "distance of an object "
                                "from the centre of the image (1: a corner)")  # Fig. 1 a
    for name, figure in figures.items():
        save_picture(figure, out / f"{name}.png")
        print(printable(f"→ {out / name}.png"))


@clean_exit
def main(argv=None):
    args = parse_arguments(argv)
    images, device = args.images and find_images(args.images), pick_device(args.device)
    if world() > 1 and (args.images or args.linear_probe):
        raise UserError("--images and --linear-probe run in one process, without torchrun")
    newest = sorted(Path("runs").glob("*/*.pt"), key=lambda path: path.stat().st_mtime)
    paths = [None] if args.classes is not None else [
        checkpoint_in(path, "distill.pt", "reclip.pt") for path in args.checkpoint or newest[-1:]]
    if not paths:
        raise UserError("no checkpoint under runs/; run reclip.py first, or name one: --checkpoint")
    if args.figures and len(paths) == 1:
        both = [paths[0].with_name(name) for name in ("reclip.pt", "distill.pt")]
        paths = [path for path in both if path.exists()] if paths[0] in both else paths
    segmenters = [open_segmenter(args, path, device) for path in paths]
    first = segmenters[0]
    if args.pd is not None and not any("rectified" in segment.names for segment in segmenters):
        raise UserError("--pd is for rectified masks alone")
    s, out = first.settings, args.out or first.folder
    args.workers = s.workers if args.workers is None else args.workers
    if args.images:
        stage = args.method or first.names[-1]
        if stage not in first.names:
            raise UserError(f"--method {stage}: this checkpoint has only {', '.join(first.names)}")
        print(printable(f"masks of {first.path or f'CLIP alone, --surgery {s.surgery}'}"))
        return predict(first, stage + "_pamr" * bool(first.pamr), images,
                       args.out or out / "predictions", device, args.workers, args.confidence,
                       args.unknown_below or 0.0)

    data = open_split(args, first, args.split)
    for segment in segmenters:
        pictures = s.seed if data.name == "shapes" else segment.settings.seed
        if (data.classes, pictures) != (segment.classes, segment.settings.seed):
            raise UserError(f"{segment.path} was made for other classes or pictures than these")
    if not data.has_labels:
        print(printable(f"{data.name} has no labels to compare with; masks of images: python "
                        f"evaluate.py --checkpoint {first.path} --images …"))
        return
    if args.hypotheses and (first.student or s.hypothesis == "none" or not hasattr(s, "cache")):
        raise UserError(f"--hypotheses: {first.path} was not trained with hypotheses of its own")
    make_folder(out)
    bins, shown, confusions, results = BINS if args.bias or args.figures else 0, [], {}, {}
    stages = [stage for segment in segmenters for stage in segment.names]
    several = len(set(stages)) < len(stages)
    titles = [segment.folder.name for segment in segmenters]
    titles = titles if len(set(titles)) == len(titles) else list(map(str, paths))
    for segment, title in zip(segmenters, titles):
        found, own = assess(segment, data, args, device, bins)
        name = lambda stage: f"{title} {stage}" if several else stage
        shown.append((segment, {stage: name(stage) for stage in segment.names}))
        confusions |= {name(stage): found[stage] for stage in segment.names}
        named = {name(stage): result for stage, result in own.items()}
        results |= named
        best = max(segment.names, key=lambda stage: own[stage]["miou"])
        total = found[best].view(-1, *found[best].shape[-2:]).sum(0)
        for line in doubts(total, [*map(called, data.classes)]):
            say_once(printable(line))
        if rank() == 0:
            save_results((args.out or segment.folder) / "results.json", named if args.out else own)
    print(table(results, [*map(called, first.classes)]))
    if bins:
        print(f"(objects: {next(iter(results.values()))['objects']}; distance of their centroids "
              "from the centre, relative to half the diagonal)")
    if args.hypotheses:
        images, clip = open_split(args, first, s.train_split), first.network
        hypothesis = make_hypotheses(images, clip.model, clip.rectifier.Wq, s,
                                     hypotheses_in(first.folder, Path(s.cache)), device)
        print("hypotheses of {} training images: precision {:.1f} %, recall {:.1f} %".format(
            len(images), *hypothesis_quality(hypothesis, images)))
    if args.figures and rank() == 0:
        draw_figures(shown, data, results, confusions, device, out)
    print(printable(f"{', '.join(map(str, paths))}: {len(data)} images of {data.name} {args.split} "
                    f"→ {out / 'results.json'}"))
    return results


if __name__ == "__main__":
    main()
