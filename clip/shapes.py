"""The demo's pictures: ten things, each a shape with a habitual texture and habitual colours.

An outline alone teaches a small CLIP nothing local; texture and colour do. A picture is drawn from
its seed alone: `draw_shapes([draw_seed(0, "web", 7)], **WEB)` is the same on every machine.
"""

import hashlib

import torch
import torch.nn.functional as F

SHAPES = {  # name: (outline, habitual texture, two habitual colours, companion in web data)
    "ladybug": ("disc", "dots", "red orange", "leaf"),
    "flag": ("square", "stripes", "blue red", "cross"),
    "chessboard": ("square", "checks", "black white", "shell"),
    "leaf": ("lens", "veins", "green yellow", "ladybug"),
    "moon": ("crescent", "plain", "yellow white", "star"),
    "star": ("star", "plain", "yellow orange", "moon"),
    "heart": ("heart", "gradient", "red pink", "donut"),
    "donut": ("ring", "sprinkles", "brown pink", "heart"),
    "shell": ("triangle", "waves", "purple blue", "chessboard"),
    "cross": ("cross", "noise", "white grey", "flag"),
}
COLOURS = {
    "red": (0.86, 0.12, 0.14), "orange": (0.97, 0.55, 0.10), "yellow": (0.97, 0.87, 0.20),
    "green": (0.18, 0.62, 0.24), "blue": (0.15, 0.35, 0.85), "purple": (0.52, 0.22, 0.70),
    "pink": (0.97, 0.55, 0.72), "brown": (0.48, 0.29, 0.14), "white": (0.96, 0.96, 0.96),
    "grey": (0.52, 0.52, 0.54), "black": (0.08, 0.08, 0.09),
}
OUTLINES = list(dict.fromkeys(outline for outline, *_ in SHAPES.values()))
TEXTURES = list(dict.fromkeys(texture for _, texture, *_ in SHAPES.values()))

# Two distributions: the pictures of the "web" that the tiny CLIP learns from carry the habits from
# which its biases come (a preferred centre, companions, frequent classes, typical backgrounds);
# the target data to be segmented has none of them, and is seen from nearer: all is a third larger.
WEB = dict(side=48, radius=(7, 18), grain=(0.85, 1.2), objects=3, colour_habit=0.75,
           texture_habit=0.95, centred=0.6, companion=0.4, skewed=True, background_habit=0.5)
TARGET = dict(side=96, radius=(10, 24), grain=(1.1, 1.5), objects=4, colour_habit=0.9,
              texture_habit=0.95, centred=0.0, companion=0.0, skewed=False, background_habit=0.0)


def draw_seed(*parts):
    """A seed of 63 bits, the same on every machine and in every process, from ints and strings.

    Everything random about an image comes from draw_seed(seed, epoch, id, what it is for).
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_shapes(seeds, side, radius, grain, objects, colour_habit, texture_habit, centred,
                companion, skewed, background_habit):
    """Draw one image per seed; an image depends on its own seed alone, not on its neighbours.

    seeds: list of B ints; the other arguments as in WEB and TARGET (side and radius in pixels,
    grain the size of the textures, the habits as probabilities).
    Returns images (uint8 B×3×side×side), labels (int64 B×side×side, 255 = background) and, for
    captions, classes (B×objects, -1 = no object), colours (B×objects) and background colours (B).
    """
    b, names = len(seeds), list(SHAPES)
    draws, noise = torch.empty(b, 40 + 32 * objects), torch.empty(b, side, side)
    for i, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        draws[i] = torch.rand(draws.shape[1], generator=generator)
        noise[i] = torch.rand(side, side, generator=generator)
    columns = iter(draws.T)
    uniform = lambda low=0.0, high=1.0: low + (high - low) * next(columns)  # one number per image
    choose = lambda n: (uniform() * n).long().clamp_(max=n - 1)

    rgb = torch.tensor(list(COLOURS.values()))
    habit = torch.tensor([[list(COLOURS).index(c) for c in SHAPES[n][2].split()] for n in names])
    friend = torch.tensor([names.index(SHAPES[n][3]) for n in names])
    outline_of = torch.tensor([OUTLINES.index(SHAPES[n][0]) for n in names])
    texture_of = torch.tensor([TEXTURES.index(SHAPES[n][1]) for n in names])
    frequency = torch.linspace(2.0, 0.5, len(names)) if skewed else torch.ones(len(names))
    cumulative = (frequency / frequency.sum()).cumsum(0)

    # What is in the picture, and where: each further object takes the emptiest of six places.
    count = 1 + choose(objects)
    classes = torch.full((b, objects), -1)
    colours = torch.zeros(b, objects, dtype=torch.long)
    places = torch.zeros(b, objects, 4)  # x, y, radius, rotation
    outlines, textures = torch.zeros(b, objects).long(), torch.zeros(b, objects).long()
    for j in range(objects):
        k = torch.searchsorted(cumulative, uniform()).clamp_(max=len(names) - 1)
        if j:
            k = torch.where(uniform() < companion, friend[classes[:, 0]], k)
        classes[:, j] = k
        outlines[:, j] = outline_of[k]
        textures[:, j] = torch.where(uniform() < texture_habit, texture_of[k],
                                     choose(len(TEXTURES)))
        colours[:, j] = torch.where(uniform() < colour_habit, habit[k, choose(2)], choose(len(rgb)))
        options = torch.stack([torch.stack([uniform(0.1, 0.9), uniform(0.1, 0.9)], 1)
                               for _ in range(6)], 1) * side
        if j:
            gap = (options[:, :, None] - places[:, None, :j, :2]).norm(dim=-1)
            best = (gap - places[:, None, :j, 2]).amin(-1).argmax(1)
        else:
            best = torch.zeros(b).long()
        xy = options[torch.arange(b), best]
        if j == 0:
            middle = torch.stack([uniform(0.42, 0.58), uniform(0.42, 0.58)], 1) * side
            xy = torch.where((uniform() < centred)[:, None], middle, xy)
        places[:, j] = torch.cat([xy, uniform(*radius)[:, None], uniform(-0.5, 0.5)[:, None]], 1)
    classes[torch.arange(objects) >= count[:, None]] = -1

    # Background: two muted colours, mixed plainly, as a gradient, as clouds or as waves.
    behind = torch.where(uniform() < background_habit, (classes[:, 0] * 7 + 3) % len(rgb),
                         choose(len(rgb)))
    grey = 0.25 + 0.5 * draws[:, -3:].mean(1)[:, None]
    first = 0.6 * rgb[behind] + 0.4 * grey
    second = 0.5 * first + 0.5 * rgb[choose(len(rgb))]
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    angle, period = uniform(0, 6.2832)[:, None, None], uniform(9, 20)[:, None, None]
    along = (x * angle.cos() + y * angle.sin())
    coarse = F.adaptive_avg_pool2d(noise[:, None], side // 8) * 4 - 1.5
    clouds = F.interpolate(coarse, (side, side), mode="bilinear")[:, 0].clamp(0, 1)
    mix = torch.stack([torch.zeros_like(along), 0.5 + 0.6 * along / side,
                       clouds, 0.5 + 0.5 * (6.2832 * along / period).sin()], 1).clamp(0, 1)
    mix = mix[torch.arange(b), choose(4)][:, None]
    images = first[:, :, None, None] * (1 - mix) + second[:, :, None, None] * mix
    labels = torch.full((b, side, side), 255)

    for j in range(objects):  # painter's order: later objects cover earlier ones
        px, py, size, turn = (places[:, j, i, None, None] for i in range(4))
        dx, dy = x - px, y - py
        u, v = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
        inside = by_kind(is_inside, OUTLINES, outlines[:, j], u / size, v / size)
        inside &= (classes[:, j] >= 0)[:, None, None]
        scale = uniform(*grain)[:, None, None]
        marks = by_kind(texture, TEXTURES, textures[:, j], u / scale, v / scale, size, noise)
        body = rgb[colours[:, j]]
        light = body.mean(1, keepdim=True) > 0.5
        mark = torch.where(light, 0.25 * body, 0.3 * body + 0.7)
        m = marks[:, None]
        paint = body[:, :, None, None] * (1 - m) + mark[:, :, None, None] * m
        shade = 1 + 0.24 * (uniform() - 0.5)[:, None, None, None]
        images = torch.where(inside[:, None], paint * shade, images)
        labels = torch.where(inside, classes[:, j, None, None], labels)
    images = images + 0.08 * (noise[:, None] - 0.5)
    return ((images.clamp(0, 1) * 255).round().to(torch.uint8), labels, classes, colours, behind)


def by_kind(function, kinds, which, *arguments):
    """Evaluate function(kind, …) on the rows of each kind and put the results together."""
    result = None
    for i, kind in enumerate(kinds):
        rows = (which == i).nonzero()[:, 0]
        if len(rows):
            values = function(kind, *(a[rows] for a in arguments))
            result = values.new_zeros(len(which), *values.shape[1:]) if result is None else result
            result[rows] = values
    return result


def is_inside(kind, u, v):
    """Boolean n×side×side: inside the outline; u (right), v (down) in units of the radius."""
    r, angle = torch.hypot(u, v), torch.atan2(u, -v)
    if kind == "disc":
        return r < 0.9
    if kind == "square":
        return torch.maximum(u.abs(), v.abs()) < 0.8
    if kind == "lens":
        return torch.hypot(u.abs() + 0.6, v) < 1.15
    if kind == "crescent":
        return (r < 0.95) & (torch.hypot(u - 0.45, v) > 0.72)
    if kind == "star":
        return r < 0.42 + 0.58 * (2 * (angle / 6.2832 * 5 % 1 - 0.5).abs()) ** 1.5
    if kind == "heart":
        a, c = u * 1.2, -v * 1.2 + 0.1
        return (a * a + c * c - 1) ** 3 < a * a * c ** 3
    if kind == "ring":
        return (r < 0.95) & (r > 0.4)
    if kind == "triangle":
        return torch.maximum(v - 0.6, 0.866 * u.abs() - 0.5 * v - 0.5) < 0
    return (torch.minimum(u.abs(), v.abs()) < 0.32) & (torch.maximum(u.abs(), v.abs()) < 0.92)


def texture(kind, u, v, size, noise):
    """Share of the mark's colour, n×side×side in 0…1; u, v in pixels, about 7 pixels a period."""
    if kind == "dots":
        return (torch.hypot(u / 8 % 1 - 0.5, v / 8 % 1 - 0.5) < 0.3).float()
    if kind == "stripes":
        return (u / 7 % 1 < 0.5).float()
    if kind == "checks":
        return ((u / 10 % 1 < 0.5) ^ (v / 10 % 1 < 0.5)).float()
    if kind == "veins":
        return ((u.abs() < 1) | ((v - 0.7 * u.abs()) / 6 % 1 < 0.3)).float()
    if kind == "gradient":
        return ((v / size + 1) / 2).clamp(0, 1) * 0.9
    if kind == "sprinkles":
        return ((0.9 * u + 0.5 * v).sin() * (0.7 * v - 0.6 * u).sin() > 0.55).float()
    if kind == "waves":
        return ((v + 1.5 * (u * 0.6).sin()) / 6 % 1 < 0.5).float()
    if kind == "noise":
        return (F.avg_pool2d(noise[:, None], 3, 1, 1)[:, 0] > 0.52).float()
    return torch.zeros_like(u)
