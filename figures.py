"""The figures of evaluate.py and tests/tables.py: predictions side by side, heat maps, charts.

Everything here takes tensors, Segmenters (evaluate.py) and data sets, and returns PIL images.
"Fig." is ReCLIP++'s where nothing else is said. Shapes: C classes, h×w patches, H×W pixels.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as TF

from data import VOID, evenly, legend, overlay, picture_sheet, resize_to_scale, visible
from reclip import classify, label_map

COLOURS = (44, 140, 80), (31, 90, 190), (214, 100, 20), (130, 60, 160), (190, 40, 60)
font = ImageFont.load_default  # Pillow's own, font(height in pixels)
SCALE = torch.tensor([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37.0)])


def in_colour(values):
    """Numbers from 0 (dark blue) to 1 (yellow) as colours: H×W → uint8 3×H×W."""
    place = values.clamp(0, 1) * (len(SCALE) - 1)
    low = place.long().clamp(max=len(SCALE) - 2)
    colours = torch.lerp(SCALE[low], SCALE[low + 1], (place - low)[..., None])
    return colours.round().to(torch.uint8).movedim(-1, 0)


def comparison(segmenters, data, device, count=5):
    """Image, truth and predictions for `count` images, evenly spaced (Fig. 5); a PIL image.

    segmenters: pairs of a Segmenter and {stage of it: heading}. Predictions are shown where the
    truth has a class: elsewhere they are not scored either.
    """
    rows, present = [], set()
    for i in evenly(len(data), count):
        image, label = data.image(i), data.label(i)
        maps = [label]
        for segment, headings in segmenters:
            view = resize_to_scale(image, segment.settings.scale)[None].to(device)
            masks = segment(view, label.shape)
            maps += [masks[stage][0].cpu().where(label != VOID, VOID) for stage in headings]
        present |= set(torch.stack(maps).unique().tolist()) - {VOID}
        rows.append([image] + [overlay(image, m, data.palette) for m in maps])
    headings = ["image", "truth"] + [h for _, stages in segmenters for h in stages.values()]
    return picture_sheet(rows, headings, present, data.classes, data.palette,
                         cell=max(120, min(190, 960 // len(headings))))


@torch.no_grad()
def heatmaps(segment, data, device, count=3, looked_at=24, cell=136):
    """Logits of two classes, and masks, in each of `count` images, from Query to the last; PIL.

    segment: a Segmenter of a checkpoint with a bias. Of evenly spaced images those are shown where
    MaskCLIP takes the most pixels of one class for another. Three rows an image: the masks so far;
    a heat map of the one class, below the truth, outlined in that class's colour; one of the other,
    below MaskCLIP's mask, with the same outline in the other's. Both have one colour scale, from
    the lowest of their logits to the highest.
    """
    found, rows, present, C = [], [], set(), len(data.classes)
    for i in evenly(len(data), looked_at):
        label = data.label(i)
        view = resize_to_scale(data.image(i), segment.settings.scale)[None].to(device)
        mask = segment(view, label.shape)["maskclip"][0].cpu()
        valid = label != VOID
        pairs = (label * C + mask)[valid & (label != mask)].bincount(minlength=C * C)
        found.append((pairs.max().item() / max(1, valid.sum().item()), i,
                      divmod(int(pairs.argmax()), C)))
    for _, i, pair in sorted(sorted(found)[-count:], key=lambda one: one[1]):
        image, label = data.image(i), data.label(i)
        view = resize_to_scale(image, segment.settings.scale)[None].to(device)
        maps, padded = bias_maps(segment, view)
        inside = F.interpolate((label == pair[0]).float()[None, None], view.shape[2:])[0] > 0
        outline = (F.max_pool2d(inside.float(), 3, 1, 1)[0] > 0) & ~inside[0]
        columns = []
        for logits, masked in maps.values():
            heat = F.interpolate(logits[:, pair], padded, mode="bilinear")[0].cpu()
            heat = heat[:, : view.shape[2], : view.shape[3]]
            heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
            mask = label_map(masked, padded, view.shape[2:], label.shape)[0].cpu()
            columns.append([mask.where(label != VOID, VOID), *(
                in_colour(values).where(~outline, visible(data.palette[k])[:, None, None])
                for values, k in zip(heat, pair))])
        masks, *heat = zip(*columns)
        present |= set(torch.stack([label, *masks]).unique().tolist()) - {VOID}
        truth, *masks = [overlay(image, mask, data.palette) for mask in (label, *masks)]
        rows += [[image, *masks], [truth, *heat[0]], [masks[0], *heat[1]]]
    return picture_sheet(rows, ["", *maps], present, data.classes, data.palette, cell)


def bias_maps(segment, view):
    """{heading: (logits, logits of the mask so far)}, both 1×C×h×w, and what the grid covers.

    The two parts of the bias stand apart (Fig. 4; ReCLIP, Fig. 3 b and c). "Reference": Z·Wrᵀ, the
    class preference that the Reference sees in the image. Of ReCLIP the position follows, Mp, and
    of ReCLIP++ the bias Wp·Wrᵀ, where the Reference meets the position and no longer the image.
    """
    network = segment.network
    rectifier, Wr, sign = network.rectifier, network.Wr, network.rectifier.sign
    Z, p = network.features(view, segment.amp)
    Mq, Mo = rectifier(Z, p, Wr)
    Mr, Mb = classify(Z, Wr), rectifier.bias(Z, p, Wr).expand_as(Mq)
    M, Reference = Mq + sign * Mb, "Reference Z·Wr"
    maps = {"Query": (Mq, Mq)} | {
        "independent": {Reference: (Mr, Mq), "bias Wp·Wr": (Mb, M)},
        "joint": {Reference: (Mr, Mq + sign * Mr), "position Mp": (Mb - Mr, M)},
        "reference": {Reference: (Mr, M)}}[rectifier.kind] | {"rectified": (M, M)}
    maps |= {"decoded": (Mo, Mo)} if segment.settings.decoder else {}
    return maps, [side * network.patch for side in Z.shape[2:]]


def confusion_figure(confusions, classes, count=6, cell=44):
    """Confusion matrices side by side, for the classes that the first one confuses most (Fig. 1 b).

    confusions: {title: int64 C×C}. The classes are those of its largest entries off the diagonal,
    in turn, until there are `count`. Numbers are per cent of a true class's pixels, so a row that
    does not add up to 100 has gone to classes that are not shown. A PIL image.
    """
    shares = [m.double() / m.sum(1, keepdim=True).clamp(min=1) for m in confusions.values()]
    order = shares[0].clone().fill_diagonal_(-1).flatten().argsort(descending=True)[: count**2]
    pairs = [divmod(pair, len(classes)) for pair in order.tolist()]
    chosen = sorted([*dict.fromkeys(itertools.chain(*pairs))][:count])
    names = [f"{classes[k]}  {n}" for n, k in enumerate(chosen, 1)]
    side, left = cell * len(chosen), 20 + max(int(font(15).getlength(name)) for name in names)
    width = max(left + len(shares) * (side + 22), 860)
    sheet = Image.new("RGB", (width, 56 + side + 58), "white")
    draw = ImageDraw.Draw(sheet)
    text = functools.partial(draw.text, font=font(15), anchor="mm")
    for r, name in enumerate(names):
        text((left - 8, 56 + (r + 0.5) * cell), name, "black", anchor="rm")
    for n, (title, share) in enumerate(zip(confusions, shares)):
        x0 = left + n * (side + 22)
        text((x0 + side // 2, 14), title, "black")
        for (r, true), (c, k) in itertools.product(enumerate(chosen), repeat=2):
            value, x, y = share[true, k].item(), x0 + c * cell, 56 + r * cell
            fill = tuple(round(255 + value**0.7 * (end - 255)) for end in (20, 70, 150))
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=fill)
            text((x + cell // 2, y + cell // 2), f"{100 * value:.0f}",
                 "white" if value > 0.4 else "black")
        for c in range(len(chosen)):
            text((x0 + (c + 0.5) * cell, 42), str(c + 1), "black")
    text((12, side + 84), "rows: truth, columns: prediction, in the same order, in per cent of the "
         "true class's pixels (of all classes);\nin brackets: the class-preference score, over all "
         "classes", "black", anchor="lm")
    return sheet


def distance_figure(curves):
    """mIoU by an object's distance from the centre, one line per stage (Fig. 1 a); a PIL image.

    curves: {title: mIoU in each of the bins of the distance, which is 0…1, or None}.
    """
    bins = max(map(len, curves.values()))
    lines = {title: [((i + 0.5) / bins, miou, 0) for i, miou in enumerate(curve)
                     if miou is not None] for title, curve in curves.items()}
    return chart(lines, [i / bins for i in range(bins + 1)],
                 "distance of an object from the centre of the image (1: a corner)")


def chart(lines, ticks, title, width=900, height=480):
    """mIoU against a quantity: lines between points, with error bars; a PIL image.

    lines: {name: points}, a point is (x, mIoU, half the length of its error bar); ticks: the values
    of x that are marked, in ascending order; title: what x is.
    """
    ends = [miou + end for points in lines.values() for _, miou, sd in points
            for end in (-sd, sd)] or [0]
    step = next(step for step in (1, 2, 5, 10, 20) if max(ends) - min(ends) < 6 * step)
    low, high = step * math.floor(min(ends) / step), step * math.floor(max(ends) / step + 1)
    left, top, right, bottom = 120, 40 + 52 * len(lines), 2 * width - 50, 2 * height - 120
    across = lambda x: left + (x - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)
    up = lambda miou: bottom - (miou - low) / (high - low) * (bottom - top)

    sheet = Image.new("RGB", (2 * width, 2 * height), "white")  # at twice its size, then smoothed
    draw = ImageDraw.Draw(sheet)
    text = functools.partial(draw.text, font=font(32), anchor="mm")
    for miou in range(low, high + 1, step):
        draw.line((left, up(miou), right, up(miou)), (215, 215, 215), 2)
        text((left - 16, up(miou)), str(miou), "black", anchor="rm")
    for tick in ticks:
        draw.line((across(tick), bottom, across(tick), bottom + 12), "black", 2)
        text((across(tick), bottom + 36), f"{tick:.2g}", "black")
    text((width, 2 * height - 32), f"mIoU in per cent; {title}", "black")
    for n, ((name, points), colour) in enumerate(zip(lines.items(), itertools.cycle(COLOURS))):
        draw.line([(across(x), up(miou)) for x, miou, _ in points], colour, 6)
        for x, miou, sd in points:
            draw.line((across(x), up(miou - sd), across(x), up(miou + sd)), colour, 3)
            draw.circle((across(x), up(miou)), 10, colour)
        text((left, 30 + 52 * n), name, colour, anchor="lm")
    return sheet.resize((width, height), Image.Resampling.LANCZOS)


def beside(pictures, gap=18):
    """PIL images of one size in a row, as one."""
    step = pictures[0].width + gap
    sheet = Image.new("RGB", (12 - gap + len(pictures) * step, pictures[0].height), "white")
    for n, picture in enumerate(pictures):
        sheet.paste(picture, (6 + n * step, 0))
    return sheet


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
