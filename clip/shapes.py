"""The demo's pictures: ten things, each a shape with a habitual texture and habitual colours.

An outline alone teaches a small CLIP nothing local; texture and colour do. A picture is drawn from
its seed alone: `draw_shapes([draw_seed(0, "demo", 7)], **TARGET)` is the same on every machine.
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
OUTLINES = {  # inside or not; u to the right and v down in units of the radius, r and angle polar
    "disc": lambda u, v, r, angle: r < 0.9,
    "square": lambda u, v, r, angle: torch.maximum(u.abs(), v.abs()) < 0.8,
    "lens": lambda u, v, r, angle: torch.hypot(u.abs() + 0.6, v) < 1.15,
    "crescent": lambda u, v, r, angle: (r < 0.95) & (torch.hypot(u - 0.45, v) > 0.72),
    "star": lambda u, v, r, angle:
        r < 0.42 + 0.58 * (2 * (angle / 6.2832 * 5 % 1 - 0.5).abs()) ** 1.5,
    "heart": lambda u, v, r, angle: (
        ((u * 1.2) ** 2 + (-v * 1.2 + 0.1) ** 2 - 1) ** 3 < (u * 1.2) ** 2 * (-v * 1.2 + 0.1) ** 3),
    "ring": lambda u, v, r, angle: (r < 0.95) & (r > 0.4),
    "triangle": lambda u, v, r, angle: torch.maximum(v - 0.6, 0.866 * u.abs() - 0.5 * v - 0.5) < 0,
    "cross": lambda u, v, r, angle:
        (torch.minimum(u.abs(), v.abs()) < 0.32) & (torch.maximum(u.abs(), v.abs()) < 0.92),
}
TEXTURES = {  # share of the mark's colour, 0 to 1; u, v and size in pixels, about 7 pixels a period
    "dots": lambda u, v, size, noise: torch.hypot(u / 8 % 1 - 0.5, v / 8 % 1 - 0.5) < 0.3,
    "stripes": lambda u, v, size, noise: u / 7 % 1 < 0.5,
    "checks": lambda u, v, size, noise: (u / 10 % 1 < 0.5) ^ (v / 10 % 1 < 0.5),
    "veins": lambda u, v, size, noise: (u.abs() < 1) | ((v - 0.7 * u.abs()) / 6 % 1 < 0.3),
    "plain": lambda u, v, size, noise: torch.zeros_like(u),
    "gradient": lambda u, v, size, noise: ((v / size + 1) / 2).clamp(0, 1) * 0.9,
    "sprinkles": lambda u, v, size, noise:
        (0.9 * u + 0.5 * v).sin() * (0.7 * v - 0.6 * u).sin() > 0.55,
    "waves": lambda u, v, size, noise: (v + 1.5 * (u * 0.6).sin()) / 6 % 1 < 0.5,
    "noise": lambda u, v, size, noise: F.avg_pool2d(noise[:, None], 3, 1, 1)[:, 0] > 0.52,
}

# The data to be segmented has none of the habits from which CLIP's biases come (a preferred centre,
# companions, frequent classes, typical backgrounds); tests/pretrain.py draws a "web" that has them.
TARGET = dict(side=96, radius=(10, 24), grain=(1.1, 1.5), objects=4, colour_habit=0.9,
              texture_habit=0.95, centred=0.0, companion=0.0, skewed=False, background_habit=0.0)


def draw_seed(*parts):
    """A seed of 63 bits, the same everywhere, from (seed, epoch, image's id, what it is for)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_shapes(seeds, side, radius, grain, objects, colour_habit, texture_habit, centred,
                companion, skewed, background_habit):
    """Draw one image per seed; an image depends on its own seed alone, not on its neighbours.

    seeds: list of B ints; the other arguments as in TARGET (side and radius in pixels, grain the
    size of the textures, the habits as probabilities).
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
    outline_of = torch.tensor([list(OUTLINES).index(SHAPES[n][0]) for n in names])
    texture_of = torch.tensor([list(TEXTURES).index(SHAPES[n][1]) for n in names])
    frequency = torch.linspace(2.0, 0.5, len(names)) if skewed else torch.ones(len(names))
    cumulative = (frequency / frequency.sum()).cumsum(0)

    # What is in the picture, and where: each further object takes the emptiest of six places.
    count = 1 + choose(objects)
    classes = torch.full((b, objects), -1)
    colours, textures = torch.zeros(b, objects).long(), torch.zeros(b, objects).long()
    places = torch.zeros(b, objects, 4)  # x, y, radius, rotation
    for j in range(objects):
        k = torch.searchsorted(cumulative, uniform()).clamp_(max=len(names) - 1)
        if j:
            k = torch.where(uniform() < companion, friend[classes[:, 0]], k)
        classes[:, j] = k
        textures[:, j] = torch.where(uniform() < texture_habit, texture_of[k],
                                     choose(len(TEXTURES)))
        colours[:, j] = torch.where(uniform() < colour_habit, habit[k, choose(2)], choose(len(rgb)))
        options = torch.stack([torch.stack([uniform(0.1, 0.9), uniform(0.1, 0.9)], 1)
                               for _ in range(6)], 1) * side
        if j:
            gap = (options[:, :, None] - places[:, None, :j, :2]).norm(dim=-1)
            best = (gap - places[:, None, :j, 2]).amin(-1).argmax(1)
            xy = options[torch.arange(b), best]
        else:
            middle = torch.stack([uniform(0.42, 0.58), uniform(0.42, 0.58)], 1) * side
            xy = torch.where((uniform() < centred)[:, None], middle, options[:, 0])
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
        polar = torch.hypot(u / size, v / size), torch.atan2(u / size, -v / size)
        inside = by_kind(OUTLINES, outline_of[classes[:, j]], u / size, v / size, *polar) > 0
        inside &= (classes[:, j] >= 0)[:, None, None]
        scale = uniform(*grain)[:, None, None]
        m = by_kind(TEXTURES, textures[:, j], u / scale, v / scale, size, noise)[:, None]
        body = rgb[colours[:, j]]
        mark = torch.where(body.mean(1, keepdim=True) > 0.5, 0.25 * body, 0.3 * body + 0.7)
        paint = body[:, :, None, None] * (1 - m) + mark[:, :, None, None] * m
        shade = 1 + 0.24 * (uniform() - 0.5)[:, None, None, None]
        images = torch.where(inside[:, None], paint * shade, images)
        labels = torch.where(inside, classes[:, j, None, None], labels)
    images = images + 0.08 * (noise[:, None] - 0.5)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels, classes, colours, behind


def by_kind(functions, which, *arguments):
    """Float n×side×side: for each picture the outcome of function number `which` (int64 n)."""
    result = torch.zeros(arguments[0].shape)
    for i, function in enumerate(functions.values()):
        rows = which == i
        result[rows] = function(*(a[rows] for a in arguments)).float()
    return result
