"""Data: class names, images and labels of the data sets, and the views to train on.

    python data.py --dataset voc --data-root ~/data    # what is there; a contact sheet

Images are uint8 tensors 3×H×W (RGB). Labels are int64 tensors H×W holding class indices 0…C-1, and
VOID where a pixel has no class or counts for nothing. Only `SegmentationData.label` and `.objects`
open ground truth; training never calls them, unless asked for (--use-ground-truth-void).
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
import time
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from clip.clip import CLIP_MEAN, CLIP_STD, TEMPLATES  # noqa: F401
from clip.shapes import SHAPES, TARGET, draw_seed, draw_shapes

# ---- 1. Mistakes, progress, processes ------------------------------------------------------------

class UserError(Exception):
    """A mistake of the user's: the message says what is wrong, where, and what was expected."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose every complaint is a UserError."""

    def error(self, message):
        raise UserError(message)


def _number(kind, fits, expected):
    """An argparse type: kind(text), where it fits; otherwise the message says what is expected."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if fits(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text}; expected {expected}")
    return parse


count = _number(int, lambda value: value >= 1, "1 or more")
natural = _number(int, lambda value: value >= 0, "0 or more")
share = _number(float, lambda value: 0 <= value <= 1, "0 to 1")
positive = _number(float, lambda value: 0 < value < float("inf"), "more than 0")
seed_number = _number(int, lambda value: -1 << 63 <= value < 1 << 63, "an integer of 64 bits")


def user_path(text):
    """An argparse type: a Path, with ~ for the home directory."""
    return Path(os.path.expanduser(text))


def printable(text):
    """str(text) with all that could move a cursor, end a line or forge one written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
                   for c in str(text))


class Progress:
    """A line, rewritten in place on a terminal: how far something is, and the time that is left."""

    def __init__(self, title, total, done=0):
        self.title, self.total, self.done, self.first = title, total, done, done
        self.start = self.shown = time.monotonic()

    def _show(self, text, seconds, rest, end):
        took = f"{seconds:.0f} s" if seconds < 99.5 else f"{seconds / 60:.0f} min"
        print(f"{self.title} {self.done}/{self.total}{text}  {took}{rest}",
              end="\x1b[K" + end if sys.stdout.isatty() else "\n", flush=True)

    def advance(self, n=1, text=None):
        """n more are done; text(): what else to show, asked for only when the line is shown."""
        self.done = min(self.total, self.done + n)  # n is a guess with several processes
        now = time.monotonic()
        if now - self.shown > (0.3 if sys.stdout.isatty() else 5):
            self.shown = now
            left = (now - self.start) / (self.done - self.first) * (self.total - self.done)
            self._show(text() if text else "", left, " left", "\r")

    def close(self):
        """Say how long it took, if there was anything to do."""
        if self.done > self.first:
            self._show("", time.monotonic() - self.start, "", "\n")


@functools.cache
def say_once(line):
    """Print a line, of several processes only by the first, and only once in a main()."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(line), flush=True)


def clean_exit(main):
    """Decorator of every main(): a UserError, what the system refuses, and too little memory are
    one line on stderr and exit code 2. A mistake of ours keeps its traceback."""
    @functools.wraps(main)
    def wrapper(*args):
        if not args and main.__module__ != "__main__":
            args = [[]]  # sys.argv is that of the notebook or web server that calls
        if hasattr(sys.stdout, "reconfigure"):  # "→" where the terminal's encoding has none
            sys.stdout.reconfigure(errors="backslashreplace")
        say_once.cache_clear()
        try:
            result = main(*args)
            print(end="", flush=True)  # here it shows if nobody reads on
            return result
        except KeyboardInterrupt:
            line, code = "stopped; repeat the command, and whatever it had saved is used", 130
        except UserError as error:
            line, code = str(error), 2
        except (OSError, MemoryError, RuntimeError) as error:
            line, code = str(error), 2
            if isinstance(error, BrokenPipeError):  # or Python would complain once more
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            elif isinstance(error, MemoryError) or re.search("out of memory|allocate", line):
                line = f"out of memory ({line[:80]}…); in training, try a smaller --batch"
            elif not getattr(error, "strerror", None):
                raise
        print(f"error: {printable(' '.join(line.split()))}", file=sys.stderr)
        raise SystemExit(code)
    return wrapper


def rank():
    """This process's number, 0 for the one that writes and for a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value):
    """What each process has, as a list, in each of them; plain values and CPU tensors."""
    everyone = [value] * world()
    if world() > 1:
        dist.all_gather_object(everyone, value)
    return everyone


def barrier():
    """Wait until all processes are here."""
    gather(None)


@contextlib.contextmanager
def replacing(path):
    """A temporary path, which takes the place of `path` when all is written. Raises UserError."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a whole file under a temporary name, then rename it. Raises UserError."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def make_folder(path):
    """Make a folder to write to, and see whether that can be done. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


def fingerprint(*parts):
    """16 hex digits that tell strings, bytes and tensors, one after the other, from others."""
    digest = hashlib.sha256()
    for part in parts:
        if torch.is_tensor(part):
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(part.encode(errors="surrogateescape") if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


def evenly(count, limit):
    """At most `limit` of the indices 0…count-1, evenly spaced."""
    return [i * count // min(count, limit) for i in range(min(count, limit))]


# ---- 2. Class names and colours ------------------------------------------------------------------

# In the order of the labels and in the wording of the authors of ReCLIP: CLIP sees these words, so
# they are part of the method.

# COCO-Stuff's 27 coarse classes, each with the fine ids, 0–181, that make it up.
STUFF = {
    "electronic": "71-76", "appliance": "77-82", "food things": "51-60",
    "furniture things": "61-70", "indoor": "83-90", "kitchen": "43-50", "accessory": "25-32",
    "animal": "15-24", "outdoor": "9-14", "person": "0", "sports": "33-42", "vehicle": "1-8",
    "ceiling": "101-102", "floor": "100 113-117", "food stuff": "120-121 152 169",
    "furniture stuff": "97 106-107 109 111 122 129 132 155 160 164",
    "raw material": "99 131 138 142", "textile": "91-92 103-104 108 130 136 140 151 166-167",
    "wall": "170-176", "window": "179-180", "building": "94-95 127 150 157 165",
    "ground": "110 124-125 135 139 143-144 146 148 153 158",
    "plant": "93 96 118 123 128 133 141 162 168", "sky": "105 156",
    "solid": "126 134 149 159 161 181", "structural": "98 112 137 145 163",
    "water": "119 147 154 177-178",
}
CLASSES = {
    "voc": """airplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog,
horse, motorbike, person, potted plant, sheep, sofa, train, tv monitor""",
    "context": """airplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle,
building, bus, cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door,
fence, floor, flower, food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse,
person, plate, platform, potted plant, road, rock, sheep, shelves, sidewalk, sign, sky, snow,
sofa, table, track, train, tree, truck, tv monitor, wall, water, window, wood""",
    "ade": """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet,
sidewalk, person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa,
shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper,
fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door,
stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel,
bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver,
airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster,
stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool,
barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase,
traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower,
radiator, glass, clock, flag""",
    "cityscapes": """road, sidewalk, building, wall, fence, pole, traffic light, traffic sign,
vegetation, terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle""",
    "stuff": ", ".join(STUFF),
    "stuff171": """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic
light, fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports
ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine
glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse,
remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
scissors, teddy bear, hair drier, toothbrush, banner, blanket, branch, bridge, building-other,
bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds,
counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other,
floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass,
gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud,
napkin, net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing,
railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow,
solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree,
vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood,
water-other, waterdrops, window-blind, window-other, wood""",
}
CLASSES = {name: [" ".join(c.split()) for c in text.split(",")] for name, text in CLASSES.items()}
DATASETS = ("shapes", *CLASSES, "folder")


def parse_classes(text):
    """The classes of a data set of one's own, each a string: one name, or several, see `names_of`.
    text: "cat, dog, sofa", or the path of a file: a class a line, with further names after commas;
    one line like the first; a JSON list; or YAML's `names:`. Raises UserError for what is no name,
    is repeated, or is more than labels can hold."""
    lines = [text.replace(";", ",")]
    if os.path.isfile(user_path(text)):
        content = user_path(text).read_text("utf-8-sig", "replace").replace(";", ",")
        content = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), content)  # JSON's
        listed = re.search(r"(?:\A|^names:)\s*\[(.*?)\]", content, re.S | re.M)
        lines = re.sub(r"(^|\s)#.*", "", content, flags=re.M).splitlines()
        lines = [line.rstrip() for line in lines if line.strip()]
        if listed:
            names = re.findall(r"\"([^\"]*)\"|'([^']*)'|([^\s,'\"][^,\n]*)", listed[1])
            lines = ["".join(name).strip() for name in names]
        elif "names:" in lines:  # above "- cat" or, in order, "0: cat"
            below = lines[lines.index("names:") + 1 :]
            below = itertools.takewhile(lambda line: line[0] in " -", below)
            lines = [line.strip(" -").removeprefix(f"{k}:").strip(" '\"")
                     for k, line in enumerate(below)]
    elif re.search(r"\.(txt|csv|tsv|json|ya?ml)$|^[^,;]*([/\\][^,;]*|\.\w{1,5})$", text.lower()):
        raise UserError(f"no file {text}; --classes takes names (\"cat, dog\") or a text file")
    lines = lines[0].split(",") if len(lines) == 1 else lines
    classes = [[re.sub(" +", " ", name.strip()) for name in line.split(",")] for line in lines]
    if not 0 < len(classes) < VOID:
        raise UserError(f"{len(classes)} classes in --classes {text}; expected 1 to {VOID - 1}")
    names = [name.lower() for names in classes for name in names]
    for name in itertools.chain(*classes):
        if re.search(r"^$|[][{}<>:=\"\\\ufffd]|^_|^[\d.)]+( |$)", name) or not name.isprintable():
            raise UserError(f"\"{name}\" in --classes {text} is no name; expected a class a line")
        if names.count(name.lower()) > 1:
            raise UserError(f"class name \"{name}\" is repeated in --classes {text}")
    return [", ".join(names) for names in classes]


def names_of(cls):
    """The names of a class: "person, man, woman" is one class that has three."""
    return [name.strip() for name in cls.split(",")]


def name_counts(classes):
    """How many names each class has."""
    return [len(names_of(one)) for one in classes]


def called(cls):
    """What a class is called in tables, legends and results.json: the first of its names."""
    return names_of(cls)[0]


SHAPES_PALETTE = torch.tensor([
    (214, 39, 40), (31, 119, 180), (60, 60, 60), (44, 160, 44), (255, 221, 60), (255, 127, 14),
    (240, 110, 200), (140, 86, 75), (148, 103, 189), (23, 190, 207)], dtype=torch.uint8)


def dataset_palette(name, num_classes):
    """The colours of a data set's classes, uint8 C×3: the demo's own, else PASCAL VOC's, where that
    of class k deals the bits of k+1 to R, G, B in turn, from the highest bit of each down."""
    if name == "shapes":
        return SHAPES_PALETTE[:num_classes]
    index = torch.arange(1, num_classes + 1)
    return torch.stack([sum((index >> 3 * i + channel & 1) << 7 - i for i in range(8))
                        for channel in range(3)], 1).to(torch.uint8)


# ---- 3. Files, and the data sets -----------------------------------------------------------------

VOID = 255  # in every label map: no class here; never counted
PHOTOS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")
BINS = ("@eadir", "#recycle", "$recycle.bin", "system volume information", "__macosx", "thumbs")
MARK = "Software", "ReCLIP"  # a text in every PNG that `save_picture` writes


@contextlib.contextmanager
def _opened(path, what="image"):
    """An opened PIL image; every way in which it can be broken is a UserError."""
    PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26  # room for long descriptions and colour profiles
    warnings.filterwarnings("ignore", module="PIL")  # about what is odd in a file, but legible
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no file")  # a pipe may never end
        with Image.open(path) as image:
            yield image
    except (MemoryError, UserError):
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds for damaged files
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {what} {path}: {reason}") from None


def read_image(path, turn=True):
    """Read any photograph as uint8 3×H×W, RGB; turned as its EXIF orientation says, or as stored.
    Grey, palette and CMYK images become RGB; transparent ones are laid on white; of 16-bit values,
    if any exceeds 255, the high byte is kept. Raises UserError, naming the file it cannot read."""
    with _opened(path) as image:
        image = ImageOps.exif_transpose(image) if turn else image
        if image.mode == "F" or image.mode.startswith("I"):
            values = np.asarray(image)
            if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError("expected whole numbers of 8 or 16 bits; convert it")
            shift = 8 * (values.max() > 255)
            image = Image.fromarray((values.astype(np.int64) >> shift).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        return torch.from_numpy(pixels.copy())  # faster than by torch


def read_label(path, photograph, turn=False):
    """Read a label map as int64 H×W of the values stored in it, palette indices staying indices.
    photograph: the path of its image; turn: whether EXIF turns that, as which a label is turned
    that was drawn before. Raises UserError for an unreadable file, colours, or another size."""
    with _opened(photograph) as image, _opened(path, "label") as label:
        if label.mode not in ("P", "L", "1") and not label.mode.startswith("I"):
            raise ValueError(f"a {label.mode} picture; expected one channel of class ids")
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if turn else 1
        size = (image if orientation == 1 else ImageOps.exif_transpose(image)).size
        if label.size != size:
            label.getexif()[ExifTags.Base.Orientation] = orientation
            label = ImageOps.exif_transpose(label)
        if label.size != size:
            raise ValueError(f"{label.width}×{label.height} pixels, its image {size[0]}×{size[1]}")
        return torch.from_numpy(np.array(label).astype(np.int64))


def save_picture(picture, path):
    """Write a PIL image as PNG under a temporary name, then rename it. MARK says who made it."""
    info = PngImagePlugin.PngInfo()
    info.add_text(*MARK)
    with replacing(path) as temporary:  # level 2: a quarter of the time, a quarter more bytes
        picture.save(temporary, format="PNG", pnginfo=info, compress_level=2)


def _made_here(path):
    """Whether `save_picture` wrote a file."""
    with open(path, "rb") as file:
        return "\0".join(MARK).encode() in file.read(100)


def list_folder(folder, suffix):
    """Sorted ids of the files folder/**/ID + suffix; links are followed, hidden files left out.
    suffix: one ending, cut off from the ids, or PHOTOS, in any case, kept in them. A line tells
    what else is left out: BINS, links to nowhere, folders that cannot be entered, and of
    photographs other kinds of files and the pictures that these scripts have made."""
    ids, seen, left = [], set(), collections.Counter()
    closed = lambda error: left.update([f"folder {error.filename} ({error.strerror})"])
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=closed):
        if os.path.realpath(parent) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        left.update(f"folder {name}" for name in folders if name.lower() in BINS)
        folders[:] = [name for name in folders if name.lower() not in BINS and name[0] != "."]
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        for name in (name for name in files if name[0] != "."):
            file, kind = Path(parent, name), os.path.splitext(name)[1].lower()
            if not (kind in suffix if suffix == PHOTOS else name.endswith(suffix)):
                left[kind or "without an ending"] += suffix == PHOTOS
            elif not file.exists():
                left[f"link to nowhere {name}"] += 1
            elif suffix == PHOTOS and kind == ".png" and _made_here(file):
                left["made by this program"] += 1
            else:
                i = file.relative_to(folder).as_posix()
                ids.append(i if suffix == PHOTOS else i.removesuffix(suffix))
    if any(left.values()):
        told = sorted(f"{n} {kind}" for kind, n in left.items() if n)
        say_once(f"left out: {', '.join(told)}, in {folder}")
    return sorted(ids)


def id_table(raws, void=()):
    """Class indices of the 256 values that labels can store, -1 for one that must not occur.
    raws: C values or lists of values, those of class k; void: values that count for nothing."""
    table = torch.full((256,), -1)
    table[[*void, VOID]] = VOID
    for k, raw in enumerate(raws):
        table[raw] = k
    return table


CITYSCAPES_IDS = id_table(
    [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33], void=range(34))
STUFF_IDS = id_table([sum((list(range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1))
                           for part in ids.split()), []) for ids in STUFF.values()])
# the fine classes in the order of their ids, of which nothing has these eleven
STUFF171_IDS = id_table(sorted({*range(182)} - {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}))

# Where data sets keep what; {} in a path is the split's own name. places: where under --data-root
# the tree may lie; images: the folder of the images ID + suffix; labels: (folder, suffix, table),
# the first file that exists is the label; splits: our names and the tree's; lists: the file of the
# ids, else all in the folder; instances: masks ID.png that tell the objects of an image apart.
Tree = collections.namedtuple("Tree", "places images suffix labels splits lists instances",
                              defaults=({"train": "train", "val": "val"}, "", "none"))
TREES = {
    "voc": Tree(("VOCdevkit/VOC2012", "VOC2012", "."), "JPEGImages", ".jpg",
                (("SegmentationClass", ".png", id_table(range(1, 21), [0])),
                 ("SegmentationClassAug", ".png", id_table(range(1, 21), [0]))),
                {"train": "train", "val": "val", "trainaug": "trainaug"},
                "ImageSets/Segmentation/{}.txt", "SegmentationObject"),
    "context": Tree(("VOCdevkit/VOC2010", "VOC2010", "."), "JPEGImages", ".jpg",
                    (("SegmentationClassContext", ".png", id_table(range(1, 60), [0])),),
                    lists="ImageSets/SegmentationContext/{}.txt"),
    "ade": Tree(("ADEChallengeData2016", "."), "images/{}", ".jpg",
                (("annotations/{}", ".png", id_table(range(1, 151), [0])),),
                {"train": "training", "val": "validation"}),
    "cityscapes": Tree((".", "cityscapes"), "leftImg8bit/{}", "_leftImg8bit.png",
                       (("gtFine/{}", "_gtFine_labelTrainIds.png", id_table(range(19))),
                        ("gtFine/{}", "_labelTrainIds.png", id_table(range(19))),
                        ("gtFine/{}", "_gtFine_labelIds.png", CITYSCAPES_IDS))),
    "stuff": Tree(("images", "."), "{}", ".jpg",
                  (("annotations/{}", "_27labelTrainIds.png", id_table(range(27))),
                   ("annotations/{}", ".png", STUFF_IDS),
                   ("stuffthingmaps/{}", ".png", STUFF_IDS)),
                  {"train": "train2017", "val": "val2017"}),
    "folder": Tree((".",), ".", PHOTOS, ()),
}
TREES["stuff171"] = TREES["stuff"]._replace(labels=(
    ("annotations/{}", "_labelTrainIds.png", id_table(range(171))),  # mmsegmentation's
    ("annotations/{}", ".png", STUFF171_IDS), ("stuffthingmaps/{}", ".png", STUFF171_IDS)))
# What labels of one's own are called: ID and one of these, in any case.
LABEL_NAMES = [tail + ending for tail in ("", "_mask", "-mask", "_label", "_labels", "_seg", "_gt",
               "_L", "_gtFine_labelTrainIds", "_labelTrainIds", "_gtFine_labelIds", "_labelIds")
               for ending in (".png", ".bmp", ".tif", ".tiff", ".gif")]


class SegmentationData:
    """Images, and labels where there are any, of one split of a data set.
    name, split: as in `open_dataset`; classes: C names; palette: uint8 C×3; ids: one per image,
    unique, in a fixed order; whatever is stored about an image is keyed by its id. Photographs of
    one's own are turned as EXIF says. image_file: (folder, suffix), image i is folder/ID + suffix;
    label_files: [(folder, suffix, table)], the label is the first of these files that exists;
    instances: the folder of masks ID.png that tell the objects of an image apart, or None."""

    def __init__(self, name, split, classes, ids, image_file, label_files=(), instances=None):
        self.name, self.split, self.classes, self.ids = name, split, list(classes), list(ids)
        self.image_file, self.label_files, self.instances = image_file, label_files, instances
        self.palette, self.turn = dataset_palette(name, len(classes)), name == "folder"

    def __len__(self):
        return len(self.ids)

    def image_path(self, index):
        """Where an image lies."""
        return os.path.join(self.image_file[0], self.ids[index] + self.image_file[1])

    def image(self, index):
        """uint8 3×H×W. Raises UserError for a file that cannot be read."""
        return read_image(self.image_path(index), self.turn)

    @functools.cached_property
    def fingerprint(self):
        """Tells which images these are: by ids and, in a folder of one's own, the files' sizes."""
        sizes = [os.path.getsize(self.image_path(i)) for i in range(len(self)) if self.turn]
        return fingerprint("\n".join(self.ids), repr(sizes) if self.turn else "")

    @functools.cached_property
    def labels(self):
        """{id: (path, table)} of the labels, and the other files there. Opens nothing."""
        folders, found = dict.fromkeys(f for f, _, _ in self.label_files if os.path.isdir(f)), {}
        paths = [os.path.join(folder, i) for folder in folders for i in list_folder(folder, "")]
        fold = lambda path: unicodedata.normalize("NFC", path).casefold()
        there = {fold(path): path for path in paths} | {path: path for path in paths}
        for i, own in enumerate(self.ids):
            names = [own, os.path.splitext(own)[0]] if self.turn else [own]  # ID.jpg.png, ID.png
            for (folder, suffix, table), name in itertools.product(self.label_files, names):
                path = os.path.join(folder, name + suffix)
                path = there.get(path) or there.get(fold(path))
                if path and not (self.turn and os.path.samefile(path, self.image_path(i))):
                    found[own] = path, table
                    break
        return found, set(paths).difference(path for path, _ in found.values())

    @functools.cached_property
    def has_labels(self):
        """Whether this split can be evaluated. Looks at names, opens nothing.
        Raises UserError if only some images have labels, or if what is there fits none."""
        found, others = self.labels
        missing = [i for i in self.ids if i not in found]
        if missing and (others or len(missing) < len(self)):
            folder, suffix, _ = self.label_files[0]
            name = os.path.splitext(missing[0])[0] if self.turn else missing[0]
            raise UserError(f"{len(missing)} of {len(self)} labels of {self.name} {self.split} are "
                            f"missing, the first {os.path.join(folder, name + suffix)}; there are "
                            f"{min(others, default='no others')}")
        return not missing

    def label(self, index):
        """int64 H×W, values 0…C-1 and VOID. Opens the label file. Raises UserError where there is
        none, as `read_label`, and for an id that the data set does not have."""
        if self.ids[index] not in self.labels[0]:
            raise UserError(f"{self.name} {self.split} has no label for {self.ids[index]}")
        path, table = self.labels[0][self.ids[index]]
        raw, C = read_label(path, self.image_path(index), self.turn), len(self.classes)
        label = table[raw.clamp(0, 255)]
        wrong = raw[(label < 0) | (raw > 255) | (raw < 0)]
        if len(wrong):
            offset = wrong.max() == C and self.name == "folder" and table[0] == 0
            raise UserError(f"label {path} holds the id {wrong.max()}, and {self.name} has {C} "
                            f"classes{'; is 0 background? --labels-offset 1' if offset else ''}")
        return label

    def objects(self, index):
        """int64 H×W: an id from 1 on for every object of an image, 0 where there is none.
        From the instance mask where the data set has some, in which 255 is an object's rim, else
        the connected regions of each class in the label. Raises UserError as `label` does."""
        if self.instances is None:
            return connected_regions(self.label(index))
        raw = read_label(os.path.join(self.instances, self.ids[index] + ".png"),
                         self.image_path(index))
        return raw.masked_fill(raw == VOID, 0)


def connected_regions(label):
    """The connected regions of equal label as objects: int64 H×W → int64 H×W.
    Ids are above 0; 0 where the label is VOID. A pixel touches its eight neighbours. Runs of pixels
    along the rows are joined, all at once, each to the least that it touches, to the end."""
    H, W = label.shape
    flat = F.pad(label, (0, 1), value=-1).flatten()  # the rim keeps rows apart
    run = F.pad((flat[1:] != flat[:-1]).long(), (1, 0)).cumsum(0)
    pairs = [torch.stack([run[:-step], run[step:]])[:, flat[:-step] == flat[step:]]
             for step in (W, W + 1, W + 2)]  # lower left, below, lower right
    a, b = torch.cat(pairs, 1).unique(dim=1)
    root, known = torch.arange(int(run[-1]) + 1), None
    while known is None or not torch.equal(root, known):
        known, lowest = root, torch.minimum(root[a], root[b])
        root = root.scatter_reduce(0, known[a], lowest, "amin")
        root = root.scatter_reduce(0, known[b], lowest, "amin")
        root = root[root]  # chains become shorter
    return (root[run].view(H, W + 1)[:, :W] + 1).masked_fill(label == VOID, 0)


def check_dataset(name):
    """Raises UserError for a name that is none of DATASETS."""
    if name not in DATASETS:
        raise UserError(f"no data set \"{name}\"; there are {', '.join(DATASETS)}")


def open_dataset(name, root=None, split="train", classes=None, seed=0, labels=None, offset=0):
    """One split of a data set as SegmentationData. Opens no image and no label.
    name: one of DATASETS. root: the folder that holds the tree (README, Data sets), or the tree's
    own top. split: "train" or "val", of voc also "trainaug". seed: for `shapes`. For `folder` only,
    of which both splits are all images: classes, as of `parse_classes`; labels: None, or the folder
    of the labels, called as LABEL_NAMES; offset: 0, or 1 where class k is stored as k+1 and 0 is
    void. Raises UserError for a tree that is not as expected or has no images, and for labels that
    do not fit the images; OSError for a list that is missing."""
    check_dataset(name)
    splits = TREES[name].splits if name in TREES else ("train", "val")
    if split not in splits:
        raise UserError(f"no split \"{split}\"; there are {' and '.join(splits)}")
    if name != "folder" and (classes or labels) or name == "folder" and not classes:
        raise UserError("--dataset folder needs --classes; others have their own, and --labels")
    if name == "shapes":
        return Shapes(split, seed)
    if root is None:
        raise UserError(f"--dataset {name} needs --data-root, the folder that holds it")
    tree, own = TREES[name], splits[split]
    images, listed = tree.images.format(own), tree.lists.format(own)
    places = [user_path(root) / place for place in tree.places]
    place = next((place for place in places if (place / images).is_dir()), None)
    if place is None:
        raise UserError(f"no {name} in --data-root {root}: expected a folder {places[0] / images}")
    folder, suffix = place / images, "" if tree.suffix == PHOTOS else tree.suffix
    if listed:  # a line: ID, or folder/ID + suffix, and perhaps more words
        lines = (place / listed).read_text("utf-8-sig", "replace").splitlines()
        words = [line.split()[0].rpartition("/")[2] for line in lines if line.strip()]
        ids = list(dict.fromkeys(word.removesuffix(suffix) for word in words))
        missing = {i + suffix for i in ids} - set(os.listdir(folder))
        if missing:
            raise UserError(f"{len(missing)} of the {len(ids)} images in {place / listed} are "
                            f"missing, for example {folder / min(missing)}")
    else:
        ids = list_folder(folder, tree.suffix)
    if not ids:
        raise UserError(f"no images of {name} {split} in {place / (listed or images)}; expected "
                        f"ID and {tree.suffix}")
    # with COCO's images in a folder of their own the labels lie beside that
    top = place.parent if "images" in tree.places and place.name == "images" else place
    label_files = [(top / part.format(own), tail, table) for part, tail, table in tree.labels]
    if labels is not None:
        table = id_table(range(offset, len(classes) + offset), range(offset))
        label_files = [(user_path(labels), tail, table) for tail in LABEL_NAMES]
    instances = place / tree.instances if (place / tree.instances).is_dir() else None
    data = SegmentationData(name, split, classes or CLASSES[name], ids, (folder, suffix),
                            label_files, instances)
    if labels is not None:  # those that lie among the photographs are none
        taken = {os.path.realpath(path) for path, _ in data.labels[0].values()}
        data.ids = [i for i in ids if os.path.realpath(folder / i) not in taken]
        if not data.has_labels:
            raise UserError(f"no labels in --labels {labels}; expected ID.png for each image ID")
    return data


class Shapes(SegmentationData):
    """The demo as a data set: pictures and labels are drawn, all at once, when first needed."""

    def __init__(self, split, seed):
        ids = [f"{split}-{i:03}" for i in range({"train": 600, "val": 250}[split])]
        super().__init__("shapes", split, SHAPES, ids, None)
        self.seed, self.has_labels = seed, True

    @functools.cached_property
    def drawn(self):
        """All pictures, uint8 N×3×H×W, and labels, int64 N×H×W."""
        seeds = [draw_seed(self.seed, "shapes", name) for name in self.ids]
        parts = [draw_shapes(seeds[i : i + 50], **TARGET)[:2] for i in range(0, len(seeds), 50)]
        return [torch.cat(part) for part in zip(*parts)]

    @functools.cached_property
    def fingerprint(self):
        return f"{super().fingerprint}-{self.seed}"

    def image(self, index):
        return self.drawn[0][index]

    def label(self, index):
        return self.drawn[1][index]


# ---- 4. Views: what the networks see of an image -------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resize_to_scale(image, scale, ratio=1.0):
    """Resize to the largest size within a scale, keeping the shape of the image.
    image: uint8 3×H×W. scale: (a, b) pixels, both times ratio: the longer side of the image comes
    to at most max(a, b), the shorter to at most min(a, b). Bilinear, antialiased (the authors'
    OpenCV filter is not). Returns uint8 3×h×w."""
    height, width = image.shape[-2:]
    long, short = int(max(scale) * ratio), int(min(scale) * ratio)
    factor = min(long / max(height, width), short / min(height, width))
    size = [max(1, int(side * factor + 0.5)) for side in (height, width)]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def training_view(image, scale, crop, ratio=(0.5, 2.0), generator=None):
    """A random square of an image: resized, cropped, flipped, padded.
    image: uint8 3×H×W. scale: as in `resize_to_scale`, times a random number within `ratio`.
    generator: a torch.Generator to draw from. Returns (uint8 3×crop×crop, (h, w)): the view proper
    lies in the top left h×w pixels, the rest is padding; `normalise` makes it zero."""
    factor = torch.empty(()).uniform_(*ratio, generator=generator).item()
    image = resize_to_scale(image, scale, factor)
    top, left = (int(torch.randint(max(side - crop, 0) + 1, (), generator=generator))
                 for side in image.shape[1:])
    image = image[:, top:top + crop, left:left + crop]
    if torch.rand((), generator=generator).item() < 0.5:
        image = image.flip(-1)
    height, width = image.shape[-2:]
    return F.pad(image, (0, crop - width, 0, crop - height)), (height, width)


def draw_colours(generator=None):
    """A random change of brightness, contrast, saturation and hue, each with probability ½.
    Returns the numbers for `photometric_distortion`, in the order in which it applies them:
    brightness adds up to ±32 levels; contrast, 0.5–1.5, comes before or after the other steps;
    saturation, 0.5–1.5, blends with grey (the authors scale the S of HSV); hue turns by up to 18 of
    180. generator: a torch.Generator to draw from."""
    coin = lambda: torch.rand((), generator=generator).item() < 0.5
    uniform = lambda low, high: torch.empty(()).uniform_(low, high, generator=generator).item()
    first, contrast = coin(), coin()
    return [uniform(-32, 32) if coin() else 0.0, uniform(0.5, 1.5) if contrast and first else 1.0,
            uniform(0.5, 1.5) if coin() else 1.0, uniform(-0.1, 0.1) if coin() else 0.0,
            uniform(0.5, 1.5) if contrast and not first else 1.0]


def photometric_distortion(images, colours):
    """Change the colours of images, uint8 B×3×H×W, each as `draw_colours` says, on their device.
    colours: float32 B×5, on the CPU. Padding is changed too; `normalise` makes it zero."""
    from torchvision.transforms.v2 import functional as TF  # takes seconds to import
    levels = lambda values: values.clamp(0, 255).to(torch.uint8)
    changed = []
    for image, (brightness, contrast, saturation, hue, last) in zip(images, colours.tolist()):
        image = levels(levels(image + brightness) * contrast)
        image = TF.adjust_saturation(image, saturation) if saturation != 1 else image
        image = TF.adjust_hue(image, hue) if hue else image
        changed.append(levels(image * last))
    return torch.stack(changed)


def normalise(images, mean, std, sizes=None):
    """uint8 B×3×H×W, values 0–255 -> float32 B×3×H×W, (value / 255 - mean) / std. sizes: None, or
    B×2 on the same device: outside the top left h×w all becomes 0. Nothing waits for a GPU."""
    out = images.float()
    for channel, (m, s) in enumerate(zip(mean, std)):  # plain numbers: no copies to the device
        out[:, channel].div_(255).sub_(m).div_(s)
    if sizes is not None:
        out.masked_fill_(padding(sizes, *out.shape[2:])[:, None], 0)
    return out


def padding(sizes, H, W):
    """Where views are padding: sizes B×2, (h, w) of what is not → bool B×H×W, on their device."""
    rows = torch.arange(H, device=sizes.device) >= sizes[:, :1]  # B×H
    columns = torch.arange(W, device=sizes.device) >= sizes[:, 1:]  # B×W
    return rows[:, :, None] | columns[:, None, :]


class TrainingViews:
    """Training views of a SegmentationData, never its labels; distort: whether colours are drawn.
    A view depends on (seed, epoch, id of the image) alone."""

    def __init__(self, data, scale, crop, ratio=(0.5, 2.0), distort=True, seed=0):
        self.data, self.seed = data, int(seed)
        self.scale, self.crop, self.ratio, self.distort = scale, crop, ratio, distort

    def batch(self, keys):
        """B pairs (epoch, index) → dict of CPU tensors: view uint8 B×3×crop×crop, size int64 B×2
        (h, w), index int64 B, and with `distort` colours float32 B×5, for `photometric_distortion`
        of the whole batch, on a GPU if there is one."""
        parts = []
        for epoch, i in keys:
            generator = torch.Generator()
            generator.manual_seed(draw_seed(self.seed, epoch, self.data.ids[i], "view"))
            view = training_view(self.data.image(i), self.scale, self.crop, self.ratio, generator)
            parts.append((*view, draw_colours(generator), i))
        views, sizes, colours, index = zip(*parts)
        batch = dict(view=torch.stack(views), size=torch.tensor(sizes), index=torch.tensor(index))
        return batch | dict(colours=torch.tensor(colours)) if self.distort else batch


# ---- 5. Answers kept on disk, and reading ahead --------------------------------------------------

def read_ahead(read, keys, workers):
    """Yield read(key) for each key, in order, read in advance by `workers` threads; 0: by none. An
    error is raised where its item would be; nobody reads on when the generator is left."""
    if not workers:
        yield from map(read, keys)
        return
    # a reader's operations take one thread: PyTorch would give each as many as there are cores
    threads = torch.get_num_threads()
    pool = concurrent.futures.ThreadPoolExecutor(workers, "reader", torch.set_num_threads, (1,))
    keys, ahead = iter(keys), collections.deque()
    try:
        while True:
            some = itertools.islice(keys, 2 * workers - len(ahead))
            ahead.extend([pool.submit(read, key) for key in some])
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


@torch.no_grad()
def ask_once(folder, name, facts, fields, blocks, read, ask, workers):
    """What a frozen network says of all items, asked once, block by block, and kept in the file
    folder/NAME-FINGERPRINT.npy. facts: plain values on which the records depend; other facts,
    another file. fields: {name: (numpy type, shape)} of a record. blocks: lists of keys, whose
    records follow each other; read(block), in `workers` threads, gives what `ask` is given → {name:
    tensor B×shape}. A record ends with a flag: done. Blocks that lack it, because the run was
    interrupted, are asked (again); several processes share them. A complete file is only read.
    Returns a namespace with rows(list of indices), a numpy structured array. Raises OSError."""
    kind = np.dtype([(key, *field) for key, field in fields.items()] + [("done", np.uint8)])
    starts = [0, *itertools.accumulate(map(len, blocks))]
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, dict(descr=kind.descr, fortran_order=False, shape=(starts[-1],)))
    head = head.getvalue()
    path = folder / f"{name}-{fingerprint(json.dumps(facts, sort_keys=True), head)}.npy"
    size = len(head) + starts[-1] * kind.itemsize
    if rank() == 0 and not (path.exists() and path.stat().st_size == size):
        print(f"{name}: {size / 1e6:,.1f} MB → {printable(path)}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()  # not under a temporary name: whoever else makes it writes the same
        os.truncate(path, size)
        with open(path, "r+b") as file:
            file.write(head)
    barrier()
    file = open(path, "rb", buffering=0)

    def rows(indices):
        at = [len(head) + i * kind.itemsize for i in indices]
        return np.frombuffer(b"".join(os.pread(file.fileno(), kind.itemsize, i) for i in at), kind)

    # a block is written from its beginning: if its last byte is there, so is the rest
    ends = [len(head) + end * kind.itemsize - 1 for end in starts[1:]]
    left = gather([b for b, end in enumerate(ends)
                   if rank() == 0 and os.pread(file.fileno(), 1, end) != b"\1"])[0]
    own = left[rank()::world()]
    progress = Progress(name, starts[-1], starts[-1] - sum(len(blocks[b]) for b in left))
    for b, batch in zip(own, read_ahead(read, [blocks[b] for b in own], workers)):
        block = np.ones(len(blocks[b]), kind)
        for key, value in ask(batch).items():
            block[key] = value.cpu().numpy()
        with open(path, "r+b") as out:
            out.seek(len(head) + starts[b] * kind.itemsize)
            out.write(block.tobytes())
        progress.advance(len(block) * world())
    progress.close()
    barrier()
    return argparse.Namespace(rows=rows)


def cached_views(views, K, folder, name, facts, fields, ask, workers):
    """What a frozen network says of K views of each of n images, with a `batch` like that of views:
    of each field B×…, and index, int64 B. Epoch e has view e mod K, so these are the views that
    fresh augmentation gives in the first K epochs. views: TrainingViews; the rest as `ask_once`."""
    n, data = len(views.data), views.data
    own = {key: value for key, value in vars(views).items() if key != "data"}
    facts = facts | own | dict(data=data.name, images=data.fingerprint, views=K)
    blocks = [[(k, i) for i in rows.tolist()]
              for k in range(K) for rows in torch.arange(n).split(16)]
    records = ask_once(folder, name, facts, fields, blocks, views.batch, ask, workers)

    def batch(keys):
        rows = records.rows([epoch % K * n + i for epoch, i in keys])
        found = {name: torch.from_numpy(rows[name].copy()) for name in fields}
        return found | dict(index=torch.tensor([i for _, i in keys]))

    return argparse.Namespace(batch=batch)


# ---- 6. Drawing, and the command: what is in a data set? -----------------------------------------

def overlay(image, label, colours):
    """The classes of a label, int64 H×W, in their colours on a pale image; uint8 3×H×W.
    image: uint8 3×H×W; colours: uint8 C×3. Where the label is VOID the image stays as it is."""
    label, image, tint = label.cpu(), image.float(), torch.zeros(256, 3)
    tint[:len(colours)] = 0.8 * colours
    pale = 0.2 * (110 + 0.5 * image.mean(0)) + tint[label].movedim(-1, 0)
    return torch.where(label == VOID, image, pale).clamp(0, 255).to(torch.uint8)


def legend(entries, width):
    """Patches of colour, each with its name, in as many columns as fit; a PIL image.
    entries: pairs of a text and a uint8 colour (3 values); width: in pixels. Pillow's own font has
    ASCII; other letters are shown as their codes, so that no two names look the same."""
    font, line, gap = ImageFont.load_default(17), 26, 6
    names = [unicodedata.normalize("NFC", text).encode("ascii", "backslashreplace").decode()
             for text, _ in entries]
    per_line = max(1, width // max([200] + [int(font.getlength(name)) + 56 for name in names]))
    picture = Image.new("RGB", (width, -(-len(names) // per_line) * line + gap), "white")
    draw = ImageDraw.Draw(picture)
    for n, (name, (_, colour)) in enumerate(zip(names, entries)):
        x, y = n % per_line * (width // per_line) + gap, n // per_line * line + 4
        draw.rectangle((x, y + 2, x + 28, y + 19), fill=tuple(colour.tolist()))
        draw.text((x + 36, y), name, "black", font)
    return picture


def picture_sheet(rows, headings, present, classes, colours, cell=240):
    """Rows of pictures under headings, above a legend of the classes in `present`, as a PIL image.
    rows: lists of uint8 3×H×W tensors, each scaled to fit a square of `cell` pixels; headings: one
    per column or none; present: class indices; classes: C texts; colours: uint8 C×3."""
    gap, top, step = 6, 26 if headings else 0, cell + 6
    width, bottom = len(rows[0]) * step + gap, top + len(rows) * step + gap
    names = legend([(called(classes[k]), colours[k]) for k in sorted(present)], width)
    sheet = Image.new("RGB", (width, bottom + names.height), "white")
    sheet.paste(names, (0, bottom))
    for (y, row), x in ((row, x) for row in enumerate(rows) for x in range(len(row[1]))):
        scale = cell / max(row[x].shape[-2:])
        size = [max(1, round(side * scale)) for side in row[x].shape[:0:-1]]
        method = Image.NEAREST if scale > 1 else Image.BILINEAR  # enlarged masks stay sharp
        picture = Image.fromarray(row[x].cpu().movedim(0, -1).numpy()).resize(size, method)
        sheet.paste(picture, (x * step + gap, top + y * step + gap))
    for x, heading in enumerate(headings):
        ImageDraw.Draw(sheet).text((x * step + gap, 5), heading, "black",
                                   ImageFont.load_default(17))
    return sheet


@clean_exit
def main(argv=None):
    parser = Parser(description="What a data set holds. Opens ground truth; training does not.")
    flag = parser.add_argument
    flag("--dataset", metavar="NAME", default="shapes", help=", ".join(DATASETS))
    flag("--data-root", type=user_path, metavar="DIR", help="the folder that holds the data set")
    flag("--train-split", metavar="NAME", default="train", help="train, of voc also trainaug")
    flag("--classes", metavar="NAMES", help="for folder: \"cat, dog\", or a file")
    flag("--labels", type=user_path, metavar="DIR", help="for folder: ID.png for each image ID")
    flag("--labels-offset", type=int, choices=(0, 1), default=0, help="1: 0 is background")
    flag("--out", type=user_path, metavar="FILE", help="contact sheet (runs/data-DATASET.png)")
    args = parser.parse_args(argv)
    classes, shown = args.classes and parse_classes(args.classes), None
    # of a folder, both splits are the same images
    for split in ("val",) if args.dataset == "folder" else (args.train_split, "val"):
        try:
            data = open_dataset(args.dataset, args.data_root, split, classes,
                                labels=args.labels, offset=args.labels_offset)
            print(f"{data.name} {split}: {len(data)} images, "
                  f"{len(data) if data.has_labels else 'no'} labels, {len(data.classes)} classes")
            shown = data
        except (UserError, OSError) as error:  # one split is enough to look at
            if split == "val" and shown is None:
                raise
            print(printable(error))
    pictures, present = [], set()
    for i in evenly(len(shown), 12):
        pictures.append(shown.image(i))
        if shown.has_labels:
            label = shown.label(i)
            pictures.append(overlay(pictures[-1], label, shown.palette))
            present |= set(label.unique().tolist()) - {VOID}
    rows, out = [pictures[i : i + 6] for i in range(0, len(pictures), 6)], args.out
    out = out or Path(f"runs/data-{args.dataset}.png")
    make_folder(out.parent)
    save_picture(picture_sheet(rows, [], present, shown.classes, shown.palette), out)
    print(f"wrote {out}: images, beside their labels if there are any")


if __name__ == "__main__":
    main()
