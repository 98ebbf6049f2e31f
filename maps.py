"""From logits to maps of an image's pixels, and to pictures of them.

1 logits to label maps: prompt denoising, upsampling, refinement by the image, 2 the figures of
evaluate.py and tests/tables.py: predictions side by side, heat maps, charts. What draws takes
tensors, Segmenters (evaluate.py) and data sets, and returns PIL images. "Fig." is ReCLIP++'s where
nothing else is said. Shapes: B images, C classes, h×w patches, H×W pixels.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import VOID, evenly, legend, overlay, picture_sheet, resize_to_scale, visible

# ------------------------------------------------------------------------------------------------
# 1. Logits to label maps


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
    image, whose label has `size`. Returns int64 B×H×W. A large map is made tile by tile, one that
    is small or hardly upsampled goes through the classes in chunks (at most 32, and 256 MB): the
    same but for ties and rounding, and memory does not grow with C times the pixels.
    """
    pixels = math.prod(size)
    if chunk is None and pixels >= max(2**17, 32 * math.prod(logits.shape[2:])):
        return torch.stack([tiled_label_map(each, padded, view, size) for each in logits])
    chunk, best = chunk or max(1, min(32, 2**26 // (len(logits) * pixels))), None
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


def tiled_label_map(logits, padded, view, size):
    """`label_map` of one image, C×h×w → int64 H×W, with each tile's unlikely classes left out.

    Upsampling is linear along each side: a pixel is a mean of few logits, weighted by its row and
    by its column. So within a tile a class lies between its least and its greatest value at the
    tile's corners (`tiles_of_side` says which these are), and one that is below another's least
    value at all of them wins no pixel. Mostly one class is left, elsewhere a few are compared.
    """
    tile = 16 if math.prod(size) < 2**21 else 32
    (row_knots, rows, row_corners), (column_knots, columns, column_corners) = (
        tiles_of_side(*side, tile, logits.device)
        for side in zip(logits.shape[1:], padded, view, size))
    corners = weighted_sum(row_corners[..., None], logits[:, row_knots].movedim(2, 0)[:, :, None])
    corners = weighted_sum(column_corners, corners[..., column_knots].movedim(-1, 0)[..., None, :])
    least, greatest = corners.amin((1, 3)), corners.amax((1, 3))
    possible = ~(greatest < least.amax(0)).movedim(0, 2)  # t×u×C for t×u tiles
    count, first = possible.sum(2), possible.int().argmax(2)
    labels = first[:, None, :, None].repeat(1, tile, 1, tile)
    by_row = logits.transpose(0, 1)  # h×C×w
    for k in range(2, int(count.max()) + 1):
        for part in (count == k).nonzero().split(max(1, 2**20 // (k * tile**2))):
            i, j = part.T
            classes = possible[i, j].nonzero()[:, 1].view(-1, k)
            near = by_row[row_knots[i][:, :, None, None], classes[:, None, :, None],
                          column_knots[j][:, None, None]]  # tiles×s×k×s
            x = weighted_sum(rows[:, i, :, None, None], near.movedim(1, 0)[:, :, None])
            x = weighted_sum(columns[:, j, None, None], x.movedim(3, 0)[..., None])
            winner = x.max(2)[1]  # of tiles×tile×k×tile; argmax would be ten times slower
            labels[i, :, j] = classes.gather(1, winner.flatten(1)).view_as(winner)
    return labels.flatten(2, 3).flatten(0, 1)[: size[0], : size[1]]


def tiles_of_side(n, padded, view, size, tile, device="cpu"):
    """What `label_map` does along one side, from n logits to `size` pixels, cut into t tiles.

    Returns, with s logits at most to a tile: which they are, int64 t×s; their weights for each
    pixel, s×t×tile, the last pixel repeated to fill its tile; and their weights at the m places
    between which all pixels of a tile lie, s×m×t: its ends, and every logit that is passed between.
    """
    weights = F.interpolate(torch.eye(n, device=device)[None], padded, mode="linear")[..., :view]
    weights = F.interpolate(weights, size, mode="linear")[0].T  # size×n; changes nothing if same
    pixel = torch.arange(-(-size // tile) * tile, device=device).clamp(max=size - 1)
    weights = weights[pixel].unflatten(0, (-1, tile))  # t×tile×n
    used = weights.amax(1) > 0  # t×n
    lowest, highest = used.int().argmax(1), n - 1 - used.int().flip(1).argmax(1)
    s = int((highest - lowest).max()) + 1
    knots = lowest.clamp(max=n - s)[:, None] + torch.arange(s, device=device)
    weights = weights.gather(2, knots[:, None].expand(-1, tile, -1))  # t×tile×s
    passed = (lowest[:, None] < knots) & (knots < highest[:, None])
    places = torch.where(passed[..., None], torch.eye(s, device=device), weights[:, :1])
    corners = torch.cat([weights[:, [0, -1]], places[:, 1:-1]], 1)
    return knots, weights.permute(2, 0, 1).contiguous(), corners.permute(2, 1, 0).contiguous()


def weighted_sum(weights, parts):
    """Σ weights[i]·parts[i], each broadcast. A matrix product would be TF32 on some GPUs."""
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:]):
        total.addcmul_(weight, part)
    return total


@functools.lru_cache(64)
def interpolation_matrix(n, m, device):
    """m×n: linear interpolation of n samples to m (align_corners=False) as a matrix."""
    return F.interpolate(torch.eye(n, device=device)[:, None], m, mode="linear")[:, 0].T


def upsample(x, size):
    """F.interpolate(x, size, mode="bilinear") by two matrix products: …×h×w → …×H×W.

    Faster forward and backward, and the same bits on every run of a GPU.
    """
    (h, w), (H, W) = x.shape[-2:], size
    rows, columns = (interpolation_matrix(n, m, x.device) for n, m in ((h, H), (w, W)))
    return rows @ (x @ columns.T)


def to_cells(x, grid):
    """The transpose of `upsample`: …×H×W → …×h×w.

    Σ upsample(a)·b over pixels is Σ a·to_cells(b) over cells, so large a need not be upsampled.
    """
    (H, W), (h, w) = x.shape[-2:], grid
    rows, columns = (interpolation_matrix(n, m, x.device) for n, m in ((h, H), (w, W)))
    return (rows.T @ x) @ columns


def resample(x, patch, size, grid):
    """What covers whole patches, …×h'×w', cut to the image and on another grid: …×h×w (bilinear).

    patch: in pixels; size: (H, W) of the image, which the first rows and columns of patches cover.
    """
    rows, columns = (sampling_matrix(n, patch, side, m, x.device)
                     for n, side, m in zip(x.shape[-2:], size, grid))
    return rows @ x @ columns.T


@functools.lru_cache(64)
def sampling_matrix(n, patch, side, m, device):
    """m×n: linear interpolation of n patches at the centres of the m cells of an image's side.

    patch, side: in pixels; the n patches may reach beyond the side's end.
    """
    centres = (torch.arange(m, device=device) + 0.5) * side / m  # in pixels
    place = (centres / patch - 0.5).clamp(0, n - 1)
    return (1 - (place[:, None] - torch.arange(n, device=device)).abs()).clamp(min=0)


@torch.no_grad()
def pamr(image, logits, steps=10, dilations=(8, 16)):
    """Refine logits by the image (PAMR, Araslanov and Roth, 2020): smooth, but not across edges.

    Every pixel's logits become a weighted mean of those of its 8 neighbours at each dilation,
    `steps` times; an image ends in copies of its border. The weights are a softmax over all
    neighbours of -mean over RGB of |difference| / 0.1σ, with σ the standard deviation of the
    neighbourhood, the pixel itself included once per dilation.
    image: B×3×H×W, in any unit; logits: B×C×h×w, taken to the image's size first (bilinear, with
    aligned corners). Returns float32 B×C×H×W. Goes through the classes in chunks that stay in the
    cache, and the neighbours one by one, so beside the result it needs 16·len(dilations) maps.
    """
    image, (H, W), far = image.float(), image.shape[2:], max(dilations)

    def neighbours(x):
        padded = F.pad(x, [far] * 4, mode="replicate")
        for d in dilations:
            places = [(far + dy, far + dx) for dy in (-d, 0, d) for dx in (-d, 0, d) if dy or dx]
            for top, left in places:
                yield padded[:, :, top : top + H, left : left + W]

    n = 9 * len(dilations)
    mean = (sum(neighbours(image)) + len(dilations) * image) / n
    squares = sum((other - mean) ** 2 for other in neighbours(image))
    sigma = ((squares + len(dilations) * (image - mean) ** 2) / (n - 1)).sqrt()
    weights = torch.stack([-((other - image).abs() / (0.1 * sigma + 1e-8)).mean(1, keepdim=True)
                           for other in neighbours(image)]).softmax(0)  # 8·len(dilations)×B×1×H×W
    result = image.new_empty(*logits.shape[:2], H, W)
    chunk = max(1, 2**20 // (len(image) * H * W))
    for given, refined in zip(logits.split(chunk, 1), result.split(chunk, 1)):
        x = F.interpolate(given.float(), (H, W), mode="bilinear", align_corners=True)
        for _ in range(steps):
            mixed = torch.zeros_like(x)
            for weight, other in zip(weights, neighbours(x)):
                mixed.addcmul_(weight, other)
            x = mixed
        refined.copy_(x)
    return result


# ------------------------------------------------------------------------------------------------
# 2. Figures

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
    Z, p = network.inputs(network.encode(view, amp=segment.amp))
    Mq, Mo = rectifier(Z, p, Wr)
    Mr, Mb = torch.einsum("bdhw,cd->bchw", Z, Wr), rectifier.bias(Z, p, Wr).expand_as(Mq)
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
    from torchvision.transforms.v2 import functional as TF  # takes seconds to import
    factor = min(longest / max(image.shape[1:]), max(1, least / image.shape[2]))
    size = [max(1, round(side * factor)) for side in image.shape[1:]]
    mask = TF.resize(mask[None], size, TF.InterpolationMode.NEAREST_EXACT)[0]
    picture = TF.to_pil_image(overlay(TF.resize(image, size, antialias=True), mask, colours))
    names = legend(entries, max(least, picture.width))
    sheet = Image.new("RGB", (names.width, picture.height + 8 + names.height), "white")
    sheet.paste(picture, (0, 0))
    sheet.paste(names, (0, picture.height + 8))
    return sheet
