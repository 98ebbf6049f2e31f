"""Data: class names, images and labels of the data sets, and the views to train on.

    python data.py --dataset voc --data-root ~/data             # what is there; a contact sheet
    python data.py --dataset voc --data-root ~/data --download  # fetch it first (voc and ade)

The file goes from words to pixels: 1 mistakes, progress, processes, 2 class names and colours,
3 one file, 4 the data sets, 5 views, 6 answers kept on disk and reading ahead, 7 drawing, 8 the
command above.

Images are uint8 tensors 3×H×W (RGB). Labels are int64 tensors H×W holding class indices 0…C-1, and
VOID where a pixel has no class or counts for nothing. Only `SegmentationData.label` and `.objects`
open ground truth; training never calls them, unless asked for (--use-ground-truth-void).
"""

import argparse
import collections
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import time
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from clip.clip import CLIP_MEAN, CLIP_STD, TEMPLATES  # noqa: F401
from clip.shapes import SHAPES, TARGET, draw_seed, draw_shapes

# ------------------------------------------------------------------------------------------------
# 1. Mistakes, progress, processes


class UserError(Exception):
    """A mistake of the user's: the message says what is wrong, where, and what to do instead.

    `clean_exit` turns it into one line on stderr and exit code 2.
    """


class Parser(argparse.ArgumentParser):
    """An argument parser whose every complaint is a UserError, one line."""

    def error(self, message):
        # "argument --epochs: is 0; …", from the types below, reads "--epochs is 0; …"
        raise UserError(re.sub(r"^argument (\S+): is ", r"\1 is ", message))


def _number(kind, fits, expected):
    """An argparse type: kind(text), where it fits; otherwise the message says what is expected."""

    def parse(text):
        with contextlib.suppress(ValueError):
            text = kind(text)
            if fits(text):
                return text
        raise argparse.ArgumentTypeError(f"is {text}; expected {expected}")

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
    """One line that tells how far something is and how long it will take.

    Rewritten in place on a terminal, every few seconds a new line elsewhere.
    """

    def __init__(self, title, total, done=0):
        self.title, self.total, self.done, self.first = title, total, done, done
        self.start = self.shown = time.monotonic()
        self.live = sys.stdout.isatty()

    def advance(self, n=1, text=None):
        """n more are done; text(): what else to show, asked for only when the line is shown."""
        self.done = min(self.total, self.done + n)  # n is a guess with several processes
        now = time.monotonic()
        if now - self.shown > (0.3 if self.live else 5):
            self.shown = now
            left = (now - self.start) / (self.done - self.first) * (self.total - self.done)
            said = text() if text else ""
            print(f"{self.title} {self.done}/{self.total}{said}  {clock(left)} left",
                  end="\x1b[K\r" if self.live else "\n", flush=True)

    def close(self):
        """Say how long it took, if there was anything to do."""
        if self.done > self.first:
            print(f"{self.title} {self.done}/{self.total}  {clock(time.monotonic() - self.start)}",
                  end="\x1b[K\n" if self.live else "\n", flush=True)


def clock(seconds):
    """Seconds as 4 s, 1:05 or 2:03:04."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}" if minutes else f"{seconds} s"


@functools.cache
def say_once(line):
    """Print a line, of several processes only by the first, and not again in the same command."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def clean_exit(main):
    """Decorator for every script's main(): what a user can mend is one line on stderr, exit code 2.

    That is a UserError, what the system refuses, and too little memory. Anything else is a mistake
    of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        if hasattr(sys.stdout, "reconfigure"):  # "→" where the terminal's encoding has none
            sys.stdout.reconfigure(errors="backslashreplace")
        say_once.cache_clear()
        try:
            result = main(*args, **kwargs)
            print(end="", flush=True)  # here a reader that has left is noticed
            return result
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print("error: stopped, since nobody reads the output any more", file=sys.stderr)
            raise SystemExit(2) from None
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            line = explain(error)
            if line is None:
                raise
            print(f"error: {line}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("\nstopped; repeat the command, and whatever it had saved is used",
                  file=sys.stderr)
            raise SystemExit(130) from None

    return wrapper


def explain(error):
    """What an exception tells the user, in one line; None where there is nothing for them to do."""
    text = printable(" ".join(str(error).split()))
    if isinstance(error, UserError):
        return printable(error)
    if isinstance(error, OSError) and error.strerror:
        where = f" {printable(error.filename)}" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return (f"cannot write{where}: {error.strerror}; make room and repeat the command" if full
                else f"cannot use{where}: {error.strerror}")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return (f"out of memory ({text[:80]}…); repeat the command with a smaller --batch, or, in "
                "reclip.py, a smaller --crop and --scale")
    return None


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
    """A temporary path, which takes the place of `path` when all is written; on failure, nothing.

    It holds the process's number, so two processes cannot mix what they write.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a whole file under a temporary name, then rename it."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def make_folder(path):
    """Make a run's folder. Raises UserError where it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None


def fingerprint(*parts):
    """A short name for strings, bytes and tensors, one after the other: others, another name.

    The first 16 hex digits of their SHA-256; of tensors the bytes count, as they are.
    """
    digest = hashlib.sha256()
    for part in parts:
        if torch.is_tensor(part):
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(part.encode(errors="surrogateescape") if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


def evenly(count, limit):
    """At most `limit` of the indices 0…count-1, evenly spaced."""
    return [i * count // min(count, limit) for i in range(min(count, limit))]


# ------------------------------------------------------------------------------------------------
# 2. Class names and colours
#
# In the order of the labels and in the wording of the authors of ReCLIP: CLIP sees these words, so
# they are part of the method.

VOC = """airplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse,
motorbike, person, potted plant, sheep, sofa, train, tv monitor"""

CONTEXT = """airplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building,
bus, cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence,
floor, flower, food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse, person,
plate, platform, potted plant, road, rock, sheep, shelves, sidewalk, sign, sky, snow, sofa, table,
track, train, tree, truck, tv monitor, wall, water, window, wood"""

CITYSCAPES = """road, sidewalk, building, wall, fence, pole, traffic light, traffic sign,
vegetation, terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle"""

ADE = """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing,
cushion, base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace,
refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway,
river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove,
palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light,
truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track,
apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall,
tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal,
bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock,
flag"""

# COCO-Stuff's fine classes in the order of their ids, 0–181, without the eleven that nothing has.
STUFF171 = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage,
cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain,
desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood,
flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves,
light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow,
plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug,
salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete,
wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind,
window-other, wood"""
STUFF_UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}

# Its 27 coarse classes, each with the fine ids (the values in `stuffthingmaps`) that make it up.
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

CLASSES = {name: [c.strip() for c in text.replace("\n", " ").split(",")] for name, text in (
    ("voc", VOC), ("context", CONTEXT), ("ade", ADE), ("cityscapes", CITYSCAPES),
    ("stuff", ",".join(STUFF)), ("stuff171", STUFF171))}

DATASETS = ("shapes", *CLASSES, "folder")


def parse_classes(text):
    """The classes of a data set of one's own, each a string: one name, or several, see `names_of`.

    text: "cat, dog, sofa", or the path of a file with a class a line ('#' starts a comment), in
    which what follows a comma are further names of the same class; a file of a single line is a
    list like the first. Of other files, see `_class_lines`. ';' counts as a comma, and inner runs
    of blanks as one. Raises UserError for a file that cannot be read, an empty list, what is no
    name, an empty or repeated one, or more classes than labels can hold.
    """
    file = user_path(text)
    where, lines = f"--classes \"{text}\"", [text]
    if os.path.isfile(file):
        where = f"the file {text}"
        try:
            lines = _class_lines(file.read_text(encoding="utf-8-sig"), where)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read class names from {text}: {error}") from None
    elif re.search(r"\.(txt|csv|tsv|json|ya?ml)$|^[^,;]*([/\\][^,;]*|\.\w{1,5})$", text.lower()):
        raise UserError(f"no file {text}; --classes takes names (\"cat, dog\") or a text file")
    lines = [line.replace(";", ",") for line in lines if line.strip()]
    lines = lines[0].split(",") if len(lines) == 1 else lines
    classes, seen = [[" ".join(name.split()) for name in line.split(",")] for line in lines], set()
    if not classes:
        raise UserError(f"no class names in {where}; expected for example \"cat, dog, sofa\"")
    for k, name in ((k, name) for k, names in enumerate(classes, 1) for name in names):
        if not name:
            raise UserError(f"a name of class {k} is empty in {where}")
        if name.lower() in seen:
            raise UserError(f"class name \"{name}\" is repeated in {where}")
        if not name.isprintable() or re.search(r"[][{}<>:=\"]|^_|^[\d.]+ [\d.]+", name):
            raise UserError(f"\"{name}\" in {where} is no class name; expected a class a line, or "
                            "names between commas")
        seen.add(name.lower())
    if len(classes) > VOID:
        raise UserError(f"{len(classes)} classes in {where}; at most {VOID} fit in 8-bit labels")
    return [", ".join(names) for names in classes]


def _class_lines(text, where):
    """The lines of a class file, one a class; of files that tools have written what is meant.

    These are a JSON list; YOLO's data.yaml; tables with a column Name or Class, as ADE20K's and
    Roboflow's; numbered lines; CamVid's colours; labelme's list, without what it ignores.
    """
    listed = re.search(r'(?:\A|^\s*"?names"?\s*:)\s*\[(.*?)\]', text, re.S | re.M)
    if listed:
        names = re.findall(r'"([^"]*)"|\'([^\']*)\'|([^,\s][^,\n]*)', listed[1])
        return ["".join(name) for name in names]
    lines = [line.split("#")[0].rstrip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    for k, line in enumerate(lines):
        if re.match(r"names\s*:$", line):
            below = itertools.takewhile(lambda line: line[0] in " \t-", lines[k + 1:])
            lines = [re.sub(r"^\s*(-\s+)?(['\"]?)(.*)\2$", r"\3", line) for line in below]
            break
    cut = "\t" if "\t" in lines[0] else ","
    column = [cell.strip().lower() in ("name", "class") for cell in lines[0].split(cut)]
    if len(column) > 1 and any(column):
        lines = [line.split(cut)[column.index(True)] for line in lines[1:]]
    numbers = [re.match(r"\s*(\d+)\s*[:,.)\s]\s*(?=\D)", line) for line in lines]
    if all(numbers) and [int(m[1]) - int(numbers[0][1]) for m in numbers] == [*range(len(lines))]:
        lines = [re.sub(r"^(['\"])(.*)\1$", r"\2", m.string[m.end():]) for m in numbers]
    colours = re.compile(r"\s*\d+[\s,]+\d+[\s,]+\d+[\s,]+(?=\D)")
    if all(map(colours.match, lines)):
        lines = [colours.sub("", line) for line in lines]
    out = [line.strip() for line in lines if re.fullmatch(r"\s*_+(ignore|background)_+\s*", line)]
    if out:
        say_once(f"no classes in {where}: {', '.join(out)}; where labels number them, see "
                 "--labels-offset")
    return [line for line in lines if line.strip() not in out]


def names_of(cls):
    """The names of a class: "person, man, woman" is one class that has three."""
    return [name.strip() for name in cls.split(",")]


def name_counts(classes):
    """How many names each class has."""
    return [len(names_of(one)) for one in classes]


def called(cls):
    """What a class is called in tables, legends and results.json: the first of its names."""
    return names_of(cls)[0]


CITYSCAPES_PALETTE = torch.tensor([  # the official colours, in the order of the train ids
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
    (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
    (0, 80, 100), (0, 0, 230), (119, 11, 32)], dtype=torch.uint8)
SHAPES_PALETTE = torch.tensor([
    (214, 39, 40), (31, 119, 180), (60, 60, 60), (44, 160, 44), (255, 221, 60), (255, 127, 14),
    (240, 110, 200), (140, 86, 75), (148, 103, 189), (23, 190, 207)], dtype=torch.uint8)


def palette(num_classes):
    """uint8 C×3: class k gets colour k+1 of the PASCAL VOC map (colour 0, black, is background).

    The VOC map deals the bits of the index to R, G, B in turn, from the highest bit of each down.
    """
    index = torch.arange(1, num_classes + 1)
    return torch.stack([sum((index >> 3 * i + channel & 1) << 7 - i for i in range(8))
                        for channel in range(3)], 1).to(torch.uint8)


def dataset_palette(name, num_classes):
    """The colours of a data set's classes, uint8 C×3: its own where it has some, else VOC's."""
    own = {"cityscapes": CITYSCAPES_PALETTE, "shapes": SHAPES_PALETTE}.get(name, ())
    return own if len(own) == num_classes else palette(num_classes)


# ------------------------------------------------------------------------------------------------
# 3. One file

VOID = 255  # in every label map: no class here; never counted
PHOTOS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")
NO_PICTURES = (".txt", ".json", ".jsonl", ".csv", ".xml", ".md", ".html", ".ini", ".db", ".pt",
               ".npy", ".tmp")
BINS = ("@eadir", "#recycle", "$recycle.bin", "system volume information", "__macosx", "thumbs")
MARK = "Software", "ReCLIP"  # a text in every PNG that `save_picture` writes


@contextlib.contextmanager
def _opened(path, what="image"):
    """An opened PIL image; every way in which it can be broken is a UserError."""
    PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26  # room for long descriptions and colour profiles, none
    PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28  # for what inflates without end
    warnings.filterwarnings("ignore", module="PIL")  # about what is odd in a file, but legible
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"cannot read {what} {path}: it is no file")  # a pipe may never end
        with Image.open(path) as image:
            yield image
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds for damaged files
        reason = getattr(error, "strerror", None) or f"{error}; is it damaged?"
        raise UserError(f"cannot read {what} {path}: {reason}") from None


def read_image(path, turn=True):
    """Read any photograph as uint8 3×H×W, RGB.

    turn: as its EXIF orientation says; else it comes as it is stored. Grey, palette and CMYK images
    become RGB; transparent ones are laid on white; of 16-bit values the high byte is kept. Raises
    UserError, naming the file, if it is missing, truncated, empty or no image.
    """
    with _opened(path) as image:
        image.load()
        image = ImageOps.exif_transpose(image) if turn else image
        if image.mode == "F" or image.mode.startswith("I"):
            values = np.asarray(image)
            if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise UserError(f"cannot read image {path}: it does not hold whole numbers of 8 or "
                                "16 bits; convert it")
            image = Image.fromarray((values.astype(np.int64) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy()  # faster than by torch
    return torch.from_numpy(pixels)


def image_header(path):
    """(H, W) of an image as it is stored, and its EXIF orientation, 1 to 8. Raises UserError."""
    with _opened(path) as image:
        # a TIFF is turned by Pillow itself
        value = 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation)
        return image.size[::-1], value if value in range(1, 9) else 1


def image_size(path, turn=True):
    """(H, W) as `read_image` will return it. Raises UserError."""
    size, orientation = image_header(path)
    return size[::-1] if turn and orientation > 4 else size


def read_label(path, orientation=1):
    """Read a label map as int64 H×W of the values stored in it, palette indices staying indices.

    orientation: turn it as this EXIF orientation says. Raises UserError, naming the file, for an
    unreadable file or one with colours for values.
    """
    with _opened(path, "label") as image:
        if image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
            raise UserError(f"label {path} is a {image.mode} picture; expected one channel of "
                            "class ids (a grey or palette PNG)")
        image.load()
        image.getexif()[ExifTags.Base.Orientation] = orientation
        return torch.from_numpy(np.array(ImageOps.exif_transpose(image)).astype(np.int64))


def save_picture(picture, path):
    """Write a PIL image as PNG under a temporary name, then rename it. MARK says who made it."""
    info = PngImagePlugin.PngInfo()
    info.add_text(*MARK)
    with replacing(path) as temporary:
        # a quarter of the usual level's time, and a quarter more bytes
        picture.save(temporary, format="PNG", pnginfo=info, compress_level=2)


def _made_here(path):
    """Whether `save_picture` wrote a file."""
    with contextlib.suppress(OSError), open(path, "rb") as file:  # reading it will say why
        return "\0".join(MARK).encode() in file.read(100)
    return False


def list_folder(folder, suffix):
    """Sorted ids of the files folder/**/ID + suffix; links are followed, hidden files left out.

    suffix: one ending, cut off from the ids, or a tuple of endings in lower case, kept in them, as
    PHOTOS. One line tells what else is left out: BINS, links to nowhere, folders that cannot be
    entered, and of photographs other kinds of files and the pictures that these scripts have made.
    """
    ids, seen, left, closed = [], set(), collections.Counter(), []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=closed.append):
        if os.path.realpath(parent) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        left.update(f"folder {name}" for name in folders if name.lower() in BINS)
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".") and name.lower() not in BINS),
            key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        for name in files:
            kind, file = os.path.splitext(name)[1].lower(), Path(parent, name)
            single = isinstance(suffix, str)
            if name.startswith("."):
                continue
            if not (name.endswith(suffix) if single else kind in suffix):
                left[kind or "without an ending"] += not single and kind not in NO_PICTURES
            elif os.path.islink(file) and not os.path.exists(file):
                left["link to nowhere"] += 1
            elif not single and kind == ".png" and _made_here(file):
                left["made by this program"] += 1
            else:
                i = file.relative_to(folder).as_posix()
                ids.append(i.removesuffix(suffix) if single else i)
    told = [f"{n} {printable(kind)}" for kind, n in left.items() if n]
    told += [f"folder {printable(error.filename)} ({error.strerror})" for error in closed]
    if told:
        say_once(f"left out: {', '.join(sorted(told))}, in {printable(folder)}")
    return sorted(ids)


# ------------------------------------------------------------------------------------------------
# 4. The data sets
#
# How stored label values become class indices: a table of 256 entries, -1 for a value that must not
# occur.


def _table(mapping):
    table = torch.full((256,), -1)
    for raw, index in mapping.items():
        table[raw] = index
    table[VOID] = VOID
    return table


def _expand(text):
    """"97 106-107" -> [97, 106, 107]"""
    ranges = [part.split("-") for part in text.split()]
    return [i for r in ranges for i in range(int(r[0]), int(r[-1]) + 1)]


def train_ids(num_classes):
    """Stored as they are: k is class k."""
    return _table({k: k for k in range(num_classes)})


def shifted_ids(num_classes):
    """0 is background or "other", which counts for nothing; k is class k-1."""
    return _table({0: VOID, **{k + 1: k for k in range(num_classes)}})


CITYSCAPES_IDS = _table({raw: VOID for raw in range(34)} | {raw: k for k, raw in enumerate(
    [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33])})

STUFF_IDS = _table({raw: k for k, ids in enumerate(STUFF.values()) for raw in _expand(ids)})
STUFF171_RAW = sorted({*range(182)} - STUFF_UNUSED)
STUFF171_IDS = _table({raw: k for k, raw in enumerate(STUFF171_RAW)})


class Tree(NamedTuple):
    """Where a data set keeps what; {} in a path stands for the split's own name."""

    places: tuple  # where under --data-root the tree may lie
    images: str  # the folder of the images ID + suffix
    suffix: str
    labels: tuple  # (folder, suffix, table): of these files the first that exists is the label
    splits: dict = {"train": "train", "val": "val"}  # our names of the splits and the tree's
    lists: str = ""  # the file that lists the ids of a split; none: all images in the folder
    instances: str = ""  # masks ID.png that tell the objects of an image apart, if there are any


TREES = {
    "voc": Tree(("VOCdevkit/VOC2012", "VOC2012", "."), "JPEGImages", ".jpg",
                (("SegmentationClass", ".png", shifted_ids(20)),
                 ("SegmentationClassAug", ".png", shifted_ids(20))),
                {"train": "train", "val": "val", "trainaug": "trainaug"},
                "ImageSets/Segmentation/{}.txt", "SegmentationObject"),
    "context": Tree(("VOCdevkit/VOC2010", "VOC2010", "."), "JPEGImages", ".jpg",
                    (("SegmentationClassContext", ".png", shifted_ids(59)),),
                    lists="ImageSets/SegmentationContext/{}.txt"),
    "ade": Tree(("ADEChallengeData2016", "."), "images/{}", ".jpg",
                (("annotations/{}", ".png", shifted_ids(150)),),
                {"train": "training", "val": "validation"}),
    "cityscapes": Tree((".", "cityscapes"), "leftImg8bit/{}", "_leftImg8bit.png",
                       (("gtFine/{}", "_gtFine_labelTrainIds.png", train_ids(19)),
                        ("gtFine/{}", "_labelTrainIds.png", train_ids(19)),
                        ("gtFine/{}", "_gtFine_labelIds.png", CITYSCAPES_IDS))),
    "stuff": Tree(("images", "."), "{}", ".jpg",
                  (("annotations/{}", "_27labelTrainIds.png", train_ids(27)),
                   ("annotations/{}", "_labelTrainIds.png",  # mmsegmentation's, of 171 classes
                    _table({k: int(STUFF_IDS[raw]) for k, raw in enumerate(STUFF171_RAW)})),
                   ("annotations/{}", ".png", STUFF_IDS),
                   ("stuffthingmaps/{}", ".png", STUFF_IDS)),
                  {"train": "train2017", "val": "val2017"}),
}
TREES["stuff171"] = TREES["stuff"]._replace(labels=(
    ("annotations/{}", "_labelTrainIds.png", train_ids(171)),
    ("annotations/{}", ".png", STUFF171_IDS), ("stuffthingmaps/{}", ".png", STUFF171_IDS)))

# What labels of one's own are called beside ID.png: usual tails and endings, in any case.
LABEL_NAMES = [tail + ending for tail in (
    "", "_mask", "_masks", "_label", "_labels", "_seg", "_segmentation", "_gt", "_L", "-mask",
    "_gtFine_labelTrainIds", "_labelTrainIds", "_gtFine_labelIds", "_labelIds")
    for ending in (".png", ".bmp", ".tif", ".tiff", ".gif")]


class SegmentationData:
    """Images, and labels where there are any, of one split of a data set.

    name, split: as in `open_dataset`; classes: C names; palette: uint8 C×3; ids: one per image,
    unique, in a fixed order; everything stored about an image is keyed by its id.

    image_file: (folder, suffix), image i is folder/ID + suffix; without a suffix ids have endings.
    label_files: [(folder, suffix, table)], the label is the first of these files that exists.
    instances: the folder of masks ID.png that tell the objects of an image apart, if there is one.
    """

    def __init__(self, name, split, classes, ids, image_file, label_files=(), instances=None):
        self.name, self.split, self.classes, self.ids = name, split, list(classes), list(ids)
        self.image_file, self.label_files = image_file, list(label_files)
        self.instances, self.palette = instances, dataset_palette(name, len(classes))
        # Photographs of one's own are turned as EXIF says; the benchmarks' labels fit stored ones.
        self.turn = name == "folder"

    def __len__(self):
        return len(self.ids)

    def image_path(self, index):
        """Where an image lies."""
        folder, suffix = self.image_file
        return os.path.join(folder, self.ids[index] + suffix)

    def image(self, index):
        """uint8 3×H×W. Raises UserError for a file that cannot be read."""
        return read_image(self.image_path(index), self.turn)

    def size(self, index):
        """(H, W) of image(index), read from the file's header."""
        return image_size(self.image_path(index), self.turn)

    @functools.cached_property
    def fingerprint(self):
        """A short name for which images these are: others, another name.

        From their ids, and in a folder of one's own, where names tell little, from the files' sizes
        too; no image is opened.
        """
        ids = "\n".join(self.ids)
        if self.name != "folder":
            return fingerprint(ids)
        sizes = [os.path.getsize(self.image_path(i)) for i in range(len(self))]
        return fingerprint(ids, repr(sizes))

    @functools.cached_property
    def _label_index(self):
        """{folder: {relative path: itself}} of all files in the folders of labels; paths stand in
        it as they are and, for other spellings, as `folded`. Opens none.
        """
        files = {folder: list_folder(folder, "") for folder, _, _ in self.label_files}
        return {folder: {folded(f): f for f in inside} | {f: f for f in inside}
                for folder, inside in files.items()}

    def label_path(self, index):
        """(path, table) of the label, or None if there is none. Opens nothing."""
        names = [self.ids[index]]
        if not self.image_file[1]:  # ID.jpg.png, ID.png
            names += [os.path.splitext(names[0])[0]]
            names += [names[1].removesuffix("_leftImg8bit")]
        for folder, suffix, table in self.label_files:
            files = self._label_index[folder]
            for name in names:
                file = files.get(name + suffix) or files.get(folded(name + suffix))
                if file and Path(folder, file) != Path(self.image_path(index)):
                    return os.path.join(folder, file), table
        return None

    @functools.cached_property
    def has_labels(self):
        """Whether this split can be evaluated. Looks for the files' names, opens none.

        Raises UserError if only some images have labels, or if what lies there fits none.
        """
        labels = [self.label_path(i) for i in range(len(self))]
        used = {os.path.join(*pair) for pair in ()} | {found[0] for found in labels if found}
        others = [os.path.join(folder, file) for folder, files in self._label_index.items()
                  for file in sorted(set(files.values()))
                  if os.path.join(folder, file) not in used]
        if None not in labels:
            return True
        if not (used or others or self.name == "folder" and self.label_files):
            return False
        missing = labels.count(None)
        raise UserError(f"{missing} of {len(self)} images of {self.name} {self.split} have no "
                        f"label, the first {self.ids[labels.index(None)]}; expected "
                        f"{self._expected(labels.index(None))}; of other names there is "
                        f"{others[0] if others else 'nothing there'}")

    def _expected(self, index):
        """Where the label of an image may be, in words."""
        name = os.path.splitext(self.ids[index])[0] if not self.image_file[1] else self.ids[index]
        paths = [os.path.join(folder, name + suffix) for folder, suffix, _ in self.label_files]
        return " or ".join(paths[:3]) + " …" * (len(paths) > 3)

    def label(self, index):
        """int64 H×W, values 0…C-1 and VOID. Opens the label file.

        Raises UserError for a missing or unreadable file, an id that the data set does not have,
        and a size other than the image's.
        """
        found = self.label_path(index)
        if found is None:
            raise UserError(f"no label for image {self.ids[index]} of {self.name}; expected "
                            f"{self._expected(index) or 'none: it has no labels'}; "
                            "see README, Data sets")
        path, table = found
        raw = self._read_map("label", path, index)
        label = table[raw.clamp(0, 255)]
        wrong = (label < 0) | (raw > 255) | (raw < 0)
        if wrong.any():
            C, value = len(self.classes), int(raw[wrong].max())
            offset = self.name == "folder" and value == C and label.min() >= -1 and table[0] == 0
            raise UserError(
                f"label {path} holds the id {value}, and {self.name} has {C} classes"
                + (f"; if 0 is background there and the classes are 1 to {C}, --labels-offset 1"
                   if offset else "; see README, Data sets"))
        return label

    def objects(self, index):
        """int64 H×W: an id from 1 on for every object of an image, 0 where there is none.

        From the instance mask where the data set has some, in which 255 is an object's rim, else
        the connected regions of each class in the label. Raises UserError as `label` does.
        """
        if self.instances is None:
            return connected_regions(self.label(index))
        path = os.path.join(self.instances, self.ids[index] + ".png")
        raw = self._read_map("instance mask", path, index)
        return raw.masked_fill(raw == VOID, 0)

    def _read_map(self, what, path, index):
        """What `read_label` gives, of the size of image(index) and turned as that. UserError.

        A map of one's own may have been drawn on the photograph as it is stored or on the turned
        one, as `evaluate.py --images` does; where both have the same size, nobody can tell.
        """
        raw, size = read_label(path), self.size(index)
        stored, orientation = image_header(self.image_path(index))
        if self.turn and orientation > 1 and raw.shape == stored and not _made_here(path):
            if stored == size:
                raise UserError(f"{what} {path}: its image is turned by EXIF (orientation "
                                f"{orientation}), and it may be drawn on the turned one or not; "
                                "save the image without EXIF")
            raw = read_label(path, orientation)
        if raw.shape != size:
            raise UserError(f"{what} {path} is {raw.shape[1]}×{raw.shape[0]} pixels, its image "
                            f"{size[1]}×{size[0]}")
        return raw


def folded(name):
    """A file's name, for comparing it with others: without case, accents in one spelling."""
    return unicodedata.normalize("NFC", name).casefold()


def connected_regions(label):
    """The connected regions of equal label as objects: int64 H×W → int64 H×W.

    Ids start at 1, from the top left; 0 where the label is VOID. A pixel touches its eight
    neighbours. Exact: pixels make runs along the rows, runs that touch from row to row are joined,
    all at once, each to the smallest run it knows to belong to it, until nothing changes.
    """
    H, W = label.shape
    flat = F.pad(label, (0, 1), value=-1).flatten()  # the rim keeps rows apart
    run = F.pad((flat[1:] != flat[:-1]).long(), (1, 0)).cumsum(0)
    count, pairs = int(run[-1]) + 1, []
    for step in (W, W + 1, W + 2):  # lower left, below, lower right
        same = flat[:-step] == flat[step:]
        pairs.append(run[:-step][same] * count + run[step:][same])
    pairs = torch.cat(pairs).unique()
    a, b = pairs // count, pairs % count
    root, known = torch.arange(count), None
    while known is None or not torch.equal(root, known):
        known, lowest = root, torch.minimum(root[a], root[b])
        root = root.scatter_reduce(0, known[a], lowest, "amin")
        root = root.scatter_reduce(0, known[b], lowest, "amin")
        root = root[root]  # chains become shorter
    root = root[run].view(H, W + 1)[:, :W]
    objects, inside = torch.zeros_like(label), label != VOID
    objects[inside] = root[inside].unique(return_inverse=True)[1] + 1
    return objects


def check_dataset(name):
    """Raises UserError for a name that is none of DATASETS."""
    if name not in DATASETS:
        raise UserError(f"no data set \"{name}\"; there are {', '.join(DATASETS)}")


def open_dataset(name, root=None, split="train", classes=None, seed=0, labels=None, offset=0):
    """One split of a data set as SegmentationData. Opens no image and no label.

    name: one of DATASETS. root: the folder that holds the tree (README, Data sets), or the tree's
    own top. split: "train" or "val", of voc also "trainaug". seed: for `shapes`. For `folder` only,
    of which both splits are all images: classes, as `parse_classes` gives them; labels: the folder
    of the labels, called as LABEL_NAMES, if there are some; offset: 0, or 1 where class k is stored
    as k+1 and 0 counts for nothing. Raises UserError for a tree that is missing or not as expected,
    or that has no images, and for `labels` that do not fit the images.
    """
    check_dataset(name)
    splits = TREES[name].splits if name in TREES else ("train", "val")
    if split not in splits:
        raise UserError(f"no split \"{split}\"; there are {' and '.join(splits)}")
    for flag, value in (("classes", classes), ("labels", labels)):
        if value is not None and name != "folder":
            raise UserError(f"--{flag} goes with --dataset folder; {name} has its own "
                            f"{'class names' if flag == 'classes' else 'labels'}")
    if name == "shapes":
        return Shapes(split, seed)
    if name == "folder":
        return _open_folder(root, split, classes, labels, offset)

    tree, own = TREES[name], splits[split]
    images, listed = tree.images.format(own), tree.lists.format(own)
    place = _find_tree(name, root, tree.places, images)
    # with COCO's images in a folder of their own the labels lie beside that
    top = place.parent if "images" in tree.places and place.name == "images" else place
    if listed:
        ids, present = _read_list(place / listed, tree.suffix), set(os.listdir(place / images))
        missing = [i for i in ids if i + tree.suffix not in present]
        if missing:
            raise UserError(f"{len(missing)} of the {len(ids)} images in {place / listed} are "
                            f"missing, the first {place / images / missing[0]}{tree.suffix}")
    else:
        ids = list_folder(place / images, tree.suffix)
    if not ids:
        raise UserError(f"no images of {name} {split} in {place / (listed or images)}; expected "
                        f"ID{tree.suffix}; see README, Data sets")
    label_files = [(top / folder.format(own), suffix, table)
                   for folder, suffix, table in tree.labels]
    instances = place / tree.instances if tree.instances else None
    return SegmentationData(name, split, CLASSES[name], ids, (place / images, tree.suffix),
                            label_files, instances if instances and instances.is_dir() else None)


def _open_folder(root, split, classes, labels, offset):
    """`open_dataset` for a folder of one's own."""
    if classes is None:
        raise UserError("--dataset folder needs --classes, for example --classes \"cat, dog\"")
    root = _find_tree("folder", root, (".",), ".")
    ids, label_files = list_folder(root, PHOTOS), []
    if labels is not None:
        labels = user_path(labels)
        if not labels.is_dir():
            raise UserError(f"no folder {labels}; --labels is the folder of ID.png for each ID")
        if offset and len(classes) == VOID:
            raise UserError(f"--labels-offset 1: 8-bit labels hold {VOID - 1} classes then")
        table = (shifted_ids if offset else train_ids)(len(classes))
        label_files = [(labels, name, table) for name in LABEL_NAMES]
        # labels among the photographs are none
        found = SegmentationData("folder", split, classes, ids, (root, ""), label_files)
        found = [found.label_path(i) for i in range(len(ids))]
        found = {os.path.realpath(path) for path, _ in filter(None, found)}
        below = os.path.realpath(labels) + os.sep
        below = below if os.path.realpath(labels).startswith(os.path.realpath(root) + os.sep) else 0
        real = [os.path.realpath(root / i) for i in ids]
        ids = [i for i, path in zip(ids, real)
               if path not in found and not (below and path.startswith(below))]
    if not ids:
        raise UserError(f"no images of folder {split} in {root}; expected {', '.join(PHOTOS)}; "
                        "see README, Data sets")
    data = SegmentationData("folder", split, classes, ids, (root, ""), label_files)
    return data if labels is None or data.has_labels else data


def _read_list(path, suffix):
    """The ids in a split file: the first word of each line, ID or folder/ID + suffix."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the list of images {path}: {reason}; "
                        "see README, Data sets") from None
    ids = [line.split()[0].rpartition("/")[2].removesuffix(suffix) for line in lines
           if line.strip()]
    repeated = [i for i, n in collections.Counter(ids).items() if n > 1]
    if repeated:
        raise UserError(f"{path} lists {repeated[0]} twice")
    return ids


def _find_tree(name, root, places, probe):
    """The first of `places` under root that contains the folder `probe`."""
    if root is None:
        raise UserError(f"--dataset {name} needs --data-root, the folder that holds it; "
                        "see README, Data sets")
    root = user_path(root)
    if not root.is_dir():
        raise UserError(f"no folder {root}; --data-root is the folder that holds the data set "
                        f"{name}; see README, Data sets")
    for place in places:
        if (root / place / probe).is_dir():
            return root / place
    raise UserError(f"no {name} in {root}: expected {root / places[0] / probe}; "
                    "see README, Data sets")


class Shapes(SegmentationData):
    """The demo as a data set: pictures and labels are drawn, all at once, when first needed."""

    def __init__(self, split, seed):
        count = {"train": 600, "val": 250}[split]
        super().__init__("shapes", split, SHAPES, [f"{split}-{i:03}" for i in range(count)], None)
        self.seed, self.has_labels = seed, True

    @functools.cached_property
    def drawn(self):
        """All pictures, uint8 N×3×H×W, and labels, int64 N×H×W."""
        seeds = [draw_seed(self.seed, "shapes", name) for name in self.ids]
        parts = [draw_shapes(seeds[i : i + 50], **TARGET)[:2] for i in range(0, len(seeds), 50)]
        return [torch.cat(part) for part in zip(*parts)]

    def image(self, index):
        return self.drawn[0][index]

    @functools.cached_property
    def fingerprint(self):
        return f"{super().fingerprint}-{self.seed}"

    def size(self, index):
        return TARGET["side"], TARGET["side"]

    def label(self, index):
        return self.drawn[1][index]


DOWNLOADS = {  # name: (address, MD5, the tree inside)
    "voc": ("https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "6cd6e144f989b92b3379bac3b3de84fd", "VOCdevkit/VOC2012"),
    "ade": ("https://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            "7328b3957e407ddae1d3cbf487f149ef", "ADEChallengeData2016"),
}


def download(name, root):
    """Fetch and unpack a data set into root: voc (2 GB) and ade (1 GB). Raises UserError.

    Over https, and unpacked only if the hash is right; nothing to do where the tree is there.
    """
    if name not in DOWNLOADS:
        raise UserError(f"--download fetches {' and '.join(DOWNLOADS)}; where {name} is to be had "
                        "says README, Data sets")
    if root is None:
        raise UserError("--download needs --data-root, the folder to put the data set in")
    root, (url, md5, tree) = user_path(root), DOWNLOADS[name]
    if (root / tree).is_dir():
        return
    from torchvision.datasets.utils import download_and_extract_archive
    part = root / f"{name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)  # an earlier try was cut short
        download_and_extract_archive(url, root, part, md5=md5)
        (root / tree).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part / tree, root / tree)
        shutil.rmtree(part)
    except Exception as error:  # of the network, the disk, the hash, the archive
        raise UserError(f"downloading {name} into {root} failed: {error}; try again, or fetch it "
                        "by hand: see README, Data sets") from None


# ------------------------------------------------------------------------------------------------
# 5. Views: what the networks see of an image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resize_to_scale(image, scale, ratio=1.0):
    """Resize to the largest size within a scale, keeping the shape of the image.

    image: uint8 3×H×W. scale: (a, b) pixels, both times ratio: the longer side of the image comes
    to at most max(a, b), the shorter to at most min(a, b). Bilinear, antialiased (the authors'
    OpenCV filter is not). Returns uint8 3×h×w.
    """
    height, width = image.shape[-2:]
    long, short = int(max(scale) * ratio), int(min(scale) * ratio)
    factor = min(long / max(height, width), short / min(height, width))
    size = [max(1, int(side * factor + 0.5)) for side in (height, width)]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def training_view(image, scale, crop, ratio=(0.5, 2.0), generator=None):
    """A random square of an image: resized, cropped, flipped, padded.

    image: uint8 3×H×W. scale: as in `resize_to_scale`, times a random number within `ratio`.
    generator: a torch.Generator to draw from. Returns (uint8 3×crop×crop, (h, w)): the view proper
    lies in the top left h×w pixels, the rest is padding; `normalise` makes it zero.
    """
    factor = torch.empty(()).uniform_(*ratio, generator=generator).item()
    image = resize_to_scale(image, scale, factor)
    height, width = image.shape[-2:]
    top = int(torch.randint(max(height - crop, 0) + 1, (), generator=generator))
    left = int(torch.randint(max(width - crop, 0) + 1, (), generator=generator))
    image = image[:, top:top + crop, left:left + crop]
    if torch.rand((), generator=generator).item() < 0.5:
        image = image.flip(-1)
    height, width = image.shape[-2:]
    return F.pad(image, (0, crop - width, 0, crop - height)), (height, width)


def draw_colours(generator=None):
    """A random change of brightness, contrast, saturation and hue, each with probability ½.

    Returns the numbers for `photometric_distortion`, in the order in which it applies them:
    brightness adds up to ±32 levels; "contrast" multiplies all values by 0.5–1.5, and comes either
    before or after the other colour steps; saturation 0.5–1.5 blends with grey (the authors scale
    the S of HSV); hue turns by up to 18 of 180. generator: a torch.Generator to draw from.
    """

    def coin():
        return torch.rand((), generator=generator).item() < 0.5

    def uniform(wanted, low, high, otherwise):
        if not wanted:
            return otherwise
        return torch.empty(()).uniform_(low, high, generator=generator).item()

    contrast_first, contrast = coin(), coin()
    return [uniform(coin(), -32, 32, 0.0), uniform(contrast and contrast_first, 0.5, 1.5, 1.0),
            uniform(coin(), 0.5, 1.5, 1.0), uniform(coin(), -0.1, 0.1, 0.0),
            uniform(contrast and not contrast_first, 0.5, 1.5, 1.0)]


def photometric_distortion(images, colours):
    """Change the colours of a batch of images, each as `draw_colours` says, on their device.

    images: uint8 B×3×H×W; colours: float32 B×5, on the CPU, where nothing waits for a GPU. Returns
    uint8 B×3×H×W. Padding is changed too; `normalise` makes it zero.
    """
    from torchvision.transforms.v2 import functional as TF  # takes seconds to import

    def levels(values):
        return values.clamp(0, 255).to(torch.uint8)

    changed = []
    for image, (brightness, contrast, saturation, hue, last) in zip(images, colours.tolist()):
        image = levels(image + brightness) if brightness else image
        image = levels(image * contrast) if contrast != 1 else image
        image = TF.adjust_saturation(image, saturation) if saturation != 1 else image
        image = TF.adjust_hue(image, hue) if hue else image
        changed.append(levels(image * last) if last != 1 else image)
    return torch.stack(changed)


def normalise(images, mean, std, sizes=None):
    """uint8 B×3×H×W, values 0–255 -> float32 B×3×H×W, (value / 255 - mean) / std.

    sizes: B×2 (h, w), or None; everything outside the top left h×w becomes 0. Works on the device
    of `images`, where `sizes` should be as well; nothing waits for the device.
    """
    out = images.to(torch.float32, copy=True)
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
    """Training views of a SegmentationData, never its labels.

    A view depends on (seed, epoch, id of the image) alone: not on readers, processes or
    interruptions. distort: whether `batch` draws colours too.
    """

    def __init__(self, data, scale, crop, ratio=(0.5, 2.0), distort=True, seed=0):
        self.data, self.seed = data, int(seed)
        self.scale, self.crop, self.ratio, self.distort = scale, crop, ratio, distort

    def __len__(self):
        return len(self.data)

    def batch(self, keys):
        """A list of B (epoch, index) → dict of CPU tensors: view uint8 B×3×crop×crop, size int64
        B×2 (h, w), index int64 B, and with `distort` colours float32 B×5, for
        `photometric_distortion` of whole batches, on a GPU if there is one.
        """
        views, sizes, colours = [], [], []
        for epoch, index in keys:
            seed = draw_seed(self.seed, epoch, self.data.ids[index], "view")
            generator = torch.Generator().manual_seed(seed)
            view, size = training_view(self.data.image(index), self.scale, self.crop, self.ratio,
                                       generator)
            views.append(view)
            sizes.append(size)
            colours.append(draw_colours(generator) if self.distort else [])
        batch = dict(view=torch.stack(views), size=torch.tensor(sizes),
                     index=torch.tensor([index for _, index in keys]))
        return batch | dict(colours=torch.tensor(colours)) if self.distort else batch


# ------------------------------------------------------------------------------------------------
# 6. Answers kept on disk, and reading ahead


def read_ahead(read, keys, workers):
    """Yield read(key) for each key, in order, read by `workers` threads in advance; 0: by none.

    Decoding and resizing leave Python's lock to others. Raises what reading raises, where its item
    would be; nobody reads on when the generator is left.
    """
    if not workers:
        yield from map(read, keys)
        return
    threads = torch.get_num_threads()
    # a reader of its own is parallel enough: PyTorch would give each as many threads as there are
    pool = concurrent.futures.ThreadPoolExecutor(workers, initializer=_one_thread)
    try:
        keys, ahead = iter(keys), collections.deque()
        while True:
            wanted = 2 * workers - len(ahead)
            ahead.extend(pool.submit(read, key) for key in itertools.islice(keys, wanted))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _one_thread():
    """PyTorch's operations take one thread when this one calls them."""
    torch.get_num_threads()  # so that the number of this thread exists
    torch.set_num_threads(1)


class Records:
    """Records in a file, read when they are asked for; see `ask_once`."""

    def __init__(self, path, kind, n, start):
        self.path, self.kind, self.n, self.start = path, kind, n, start
        self.file = open(path, "rb", buffering=0)

    def __len__(self):
        return self.n

    def rows(self, indices):
        """The records of a list of indices, a numpy structured array."""
        size = self.kind.itemsize
        parts = [os.pread(self.file.fileno(), size, self.start + i * size) for i in indices]
        return np.frombuffer(b"".join(parts), self.kind)

    def done(self, index):
        """Whether a record has been written: its last byte is its flag."""
        at = self.start + (index + 1) * self.kind.itemsize - 1
        return os.pread(self.file.fileno(), 1, at) == b"\1"


@torch.no_grad()
def ask_once(folder, name, facts, fields, blocks, read, ask, workers):
    """What a frozen network says of all items, asked once, block by block, and kept in a file.

    The file is folder/NAME-FINGERPRINT.npy. facts: plain values on which the records depend; their
    fingerprint stands in the name, so other facts are another file. fields: {name: (numpy type,
    shape)} of a record. blocks: lists of keys, whose records follow each other; read(block), in
    `workers` threads, gives what `ask` is given → {name: tensor B×shape}.

    A record ends with a flag: done. Blocks with a record that lacks it, because the run was
    interrupted, are asked (again); several processes share them. A complete file is only read.
    Returns Records. Raises UserError for a damaged file and a full disk.
    """
    kind = np.dtype([(key, *field) for key, field in fields.items()] + [("done", np.uint8)])
    starts = [0, *itertools.accumulate(map(len, blocks))]
    n, facts = starts[-1], dict(facts, records=starts[-1], fields=repr(kind.descr))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{fingerprint(json.dumps(facts, sort_keys=True))}.npy"
    # the head of an .npy file, version 1, as numpy.load expects it
    head = repr(dict(descr=kind.descr, fortran_order=False, shape=(n,)))
    head += " " * (-(len(head) + 11) % 64) + "\n"
    head = b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head.encode("ascii")
    if rank() == 0:
        _make_file(path, name, head, len(head) + n * kind.itemsize)
    barrier()
    records = Records(path, kind, n, len(head))
    left = gather([b for b in range(len(blocks)) if rank() == 0 and not all(
        map(records.done, range(starts[b], starts[b + 1])))])[0]
    own = left[rank()::world()]
    if own:
        progress = Progress(name, n, n - sum(len(blocks[b]) for b in left))
        with open(path, "r+b", buffering=0) as file:
            batches = read_ahead(read, [blocks[b] for b in own], workers)
            for b, batch in zip(own, batches):
                block = np.zeros(len(blocks[b]), kind)
                for key, value in ask(batch).items():
                    block[key] = value.cpu().numpy()
                block["done"] = 1
                _write(file, block.tobytes(), len(head) + starts[b] * kind.itemsize)
                progress.advance(len(block) * world())
        progress.close()
    barrier()
    return records


def _make_file(path, name, head, size):
    """See to it that a file begins with `head` and has its size; what is not written is zero."""
    if path.exists() and path.stat().st_size == size:
        with open(path, "rb") as file:
            if file.read(len(head)) == head:
                return
    if not path.exists():
        print(f"{name}: {size / 1e9:.2f} GB → {printable(path)}", flush=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise UserError(f"{path} needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; "
                            "choose another folder with --cache, fewer --views, or --views 0")
    elif path.read_bytes()[:len(head)] not in (head, b""):
        raise UserError(f"{path} is damaged; delete it, and it will be made again")
    # not under a temporary name: whoever else makes it does the same
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
        _write(file, head, 0)
        file.truncate(size)


def _write(file, content, at):
    """Write bytes at a place in an unbuffered file. Raises UserError where there is no room."""
    file.seek(at)
    try:
        while content:
            content = content[file.write(content):]
    except OSError as error:
        raise UserError(f"cannot write {file.name}: {error.strerror}; make room, or choose another "
                        "folder with --cache, and repeat the command") from None


class CachedViews:
    """What a frozen network says of K views of each of n images; epoch e has view e mod K.

    They are the views that fresh augmentation gives in the first K epochs. records: K·n, as
    `ask_once` returns them.
    """

    def __init__(self, records, n):
        self.records, self.n = records, n

    def __len__(self):
        return self.n

    def batch(self, keys):
        """A list of B (epoch, index) → index, int64 B, and B×… of each field by name."""
        views = len(self.records) // self.n
        rows = self.records.rows([epoch % views * self.n + i for epoch, i in keys])
        fields = {name: torch.from_numpy(rows[name].copy()) for name in rows.dtype.names[:-1]}
        return dict(index=torch.tensor([i for _, i in keys]), **fields)


def cached_views(views, K, folder, name, facts, fields, ask, workers):
    """CachedViews of K views per image of TrainingViews; the rest as in `ask_once`."""
    n, data = len(views), views.data
    facts = dict(facts, data=data.name, images=data.fingerprint, views=K, seed=views.seed,
                 scale=list(views.scale), crop=views.crop, ratio=list(views.ratio),
                 distort=views.distort)
    blocks = [[(k, i) for i in rows.tolist()]
              for k in range(K) for rows in torch.arange(n).split(16)]
    return CachedViews(ask_once(folder, name, facts, fields, blocks, views.batch, ask, workers), n)


# ------------------------------------------------------------------------------------------------
# 7. Drawing


def visible(colours):
    """The colours in overlays and legends: bright green for light greys (VOC's car, Cityscapes'
    pole), which would pass for no class there. uint8 …×3 → uint8 …×3."""
    low, high = colours.amin(-1, keepdim=True), colours.amax(-1, keepdim=True)
    green = torch.cat([low // 2, torch.full_like(low, 255), torch.full_like(low, 110)], -1)
    return torch.where((low >= 100) & (high - low < 30), green, colours)


def overlay(image, label, colours):
    """The classes of a label, int64 H×W, in their colours on a pale grey image; uint8 3×H×W.

    image: uint8 3×H×W; colours: uint8 C×3, shown as `visible`. Void stays grey.
    """
    label, tint = label.cpu(), torch.zeros(256, 3)
    tint[:len(colours)] = 0.8 * visible(colours)
    grey = 110 + 0.5 * image.float().mean(0)
    kept = torch.where(label == VOID, 1.0, 0.2) * grey
    return (kept + tint[label].movedim(-1, 0)).clamp(0, 255).to(torch.uint8)


def legend(entries, width):
    """Patches of colour, each with its name, in as many columns as fit; a PIL image.

    entries: pairs of a text and a uint8 colour (3 values); width: in pixels. Pillow's own font has
    ASCII; other letters come as their code, so that no two names look the same.
    """
    font, line, gap = ImageFont.load_default(17), 26, 6
    names = [unicodedata.normalize("NFC", text).encode("ascii", "backslashreplace").decode()
             for text, _ in entries]
    column = max([200] + [int(font.getlength(name)) + 56 for name in names])
    per_line = max(1, width // column)
    picture = Image.new("RGB", (width, -(-len(entries) // per_line) * line + gap), "white")
    draw = ImageDraw.Draw(picture)
    for n, (name, (_, colour)) in enumerate(zip(names, entries)):
        x, y = n % per_line * column + gap, n // per_line * line + 4
        draw.rectangle((x, y + 2, x + 28, y + 19), fill=tuple(visible(colour).tolist()))
        draw.text((x + 36, y), name, "black", font)
    return picture


def picture_sheet(rows, headings, present, classes, colours, cell=240):
    """Rows of pictures under headings, above a legend of the classes in `present`, as a PIL image.

    rows: lists of uint8 3×H×W tensors, each scaled to fit a square of `cell` pixels; headings: one
    per column or empty; present: class indices; classes: C texts, shown as `called`; colours: uint8
    C×3.
    """
    gap, top, step = 6, 26 if headings else 0, cell + 6
    width, bottom = len(rows[0]) * step + gap, top + len(rows) * step + gap
    names = legend([(called(classes[k]), colours[k]) for k in sorted(present)], width)
    sheet = Image.new("RGB", (width, bottom + names.height), "white")
    sheet.paste(names, (0, bottom))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            scale = cell / max(picture.shape[-2:])
            size = [max(1, round(side * scale)) for side in picture.shape[:0:-1]]
            method = Image.NEAREST if scale > 1 else Image.BILINEAR  # enlarged masks stay sharp
            picture = Image.fromarray(picture.cpu().movedim(0, -1).numpy()).resize(size, method)
            sheet.paste(picture, (x * step + gap, top + y * step + gap))
    for x, heading in enumerate(headings):
        ImageDraw.Draw(sheet).text((x * step + gap, 5), heading, "black",
                                   ImageFont.load_default(17))
    return sheet


# ------------------------------------------------------------------------------------------------
# 8. The command: what is in a data set?


def contact_sheet(data, count=12):
    """A PIL image: `count` images, each beside its labels if there are any, and a legend below."""
    pictures, present = [], set()
    for i in evenly(len(data), count):
        image = data.image(i)
        pictures.append(image)
        if data.has_labels:
            label = data.label(i)
            pictures.append(overlay(image, label, data.palette))
            present |= set(label.unique().tolist()) - {VOID}
    rows = [pictures[i : i + 6] for i in range(0, len(pictures), 6)]
    return picture_sheet(rows, [], present, data.classes, data.palette)


def describe(data, limit):
    """Print the number and sizes of images; return class counts C+1 (the last: void), or None.

    Sizes and labels are those of at most `limit` images.
    """
    some = evenly(len(data), limit)
    sizes = torch.tensor([data.size(i) for i in some])
    low, middle, high = sizes.amin(0), sizes.median(0).values, sizes.amax(0)
    which = "folder" if data.name == "folder" else f"{data.name} {data.split}"
    print(f"{which}: {len(data)} images, {len(data) if data.has_labels else 'no'} labels, "
          f"{len(data.classes)} classes")
    for side, axis in (("height", 0), ("width", 1)):
        print(f"  {side}: {low[axis]} to {high[axis]}, median {middle[axis]} "
              f"({len(some)} images looked at)")
    if not data.has_labels:
        return None
    counts = sum(data.label(i).flatten().bincount(minlength=256) for i in some)
    return torch.cat([counts[:len(data.classes)], counts[VOID:]])


@clean_exit
def main(argv=None):
    parser = Parser(description="Show what a data set holds; fetch it first, if asked to. This "
                                "command opens ground truth; training does not.")
    flag = parser.add_argument
    flag("--dataset", metavar="NAME", default="shapes", help=", ".join(DATASETS))
    flag("--data-root", type=user_path, metavar="DIR", help="the folder that holds the data set")
    flag("--train-split", metavar="NAME", default="train", help="train, of voc also trainaug")
    flag("--classes", metavar="NAMES", help="for folder: \"cat, dog\", or a file")
    flag("--labels", type=user_path, metavar="DIR", help="for folder: the folder of ID.png, ID_mask.png, … for each image ID")
    flag("--labels-offset", type=int, choices=(0, 1), default=0,
         help="1: in --labels 0 is background and class k is k+1")
    flag("--download", action="store_true", help="fetch voc or ade into --data-root")
    flag("--limit", type=count, default=200, metavar="N",
         help="images per split whose sizes and labels are read (default 200)")
    flag("--seed", type=seed_number, default=0, help="for shapes")
    flag("--out", type=user_path, metavar="FILE", help="contact sheet (runs/data-DATASET.png)")
    args = parser.parse_args(argv)
    classes = None if args.classes is None else parse_classes(args.classes)
    if args.download:
        download(args.dataset, args.data_root)

    # of a folder, both splits are the same images
    names = ("val",) if args.dataset == "folder" else (args.train_split, "val")
    splits, problems = [], []
    for split in names:
        try:
            splits.append(open_dataset(args.dataset, args.data_root, split, classes, args.seed,
                                       args.labels, args.labels_offset))
        except UserError as error:
            problems.append(error)
    if not splits:
        raise problems[0]
    for problem in problems:  # one split is enough to look at
        print(f"one split cannot be opened: {printable(problem)}")
    counts = [describe(data, args.limit) for data in splits]
    labelled = [(data, count) for data, count in zip(splits, counts) if count is not None]
    if labelled:
        print(f"\nper cent of the labelled pixels of at most {args.limit} images")
        print(f"{'':28}" + "".join(f"{data.split:>9}" for data, _ in labelled))
        for k, name in enumerate(splits[0].classes):
            shares = [100 * count[k] / count[:-1].sum().clamp(min=1) for _, count in labelled]
            print(f"{k:>3} {called(name):24}" + "".join(f"{share:9.2f}" for share in shares))
        shares = [100 * count[-1] / count.sum() for _, count in labelled]
        print(f"{'void, of all pixels':28}" + "".join(f"{share:9.2f}" for share in shares))

    out = args.out or Path(f"runs/data-{args.dataset}.png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_picture(contact_sheet(splits[-1]), out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from None
    print(f"\nwrote {out}: images, beside their labels if there are any")


if __name__ == "__main__":
    main()
