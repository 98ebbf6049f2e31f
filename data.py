"""Data: class names, prompts, images and labels of the data sets, and the views to train on.

    python data.py --dataset voc --data-root ~/data             # what is there; a contact sheet
    python data.py --dataset voc --data-root ~/data --download  # fetch it first (voc and ade)
    python data.py --dataset context --data-root ~/data --convert ~/data/trainval    # .mat to PNG

The file goes from names to pixels: 1 class names and templates, 2 colours, 3 reading one file,
4 the data sets, 5 the built-in demo, 6 views, 7 getting the data, 8 the command above.

Images are uint8 tensors 3×H×W (RGB). Labels are int64 tensors H×W holding class indices 0…C-1, and
VOID where a pixel has no class or counts for nothing. Only `SegmentationData.label` and `.objects`
open ground truth; training never calls them, unless asked for (--use-ground-truth-void).
"""

import argparse
import errno
import functools
import hashlib
import http.client
import os
import pickle
import re
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.v2 import functional as TF

from clip.clip import CLIP_MEAN, CLIP_STD, TEMPLATES, download as fetch  # noqa: F401
from clip.shapes import (COLOURS, SHAPES, TARGET, WEB,  # noqa: F401
                         draw_seed, draw_shapes)

VOID = 255  # in every label map: no class here; never counted

# ------------------------------------------------------------------------------------------------
# 0. What every script needs: command lines, mistakes, names that are safe to print


class UserError(Exception):
    """A mistake of the user's: the message says what is wrong, where, and what to do instead.

    `clean_exit` turns it into one line on stderr and exit code 2.
    """


def printable(text):
    """str(text) with all that could move a cursor, end a line or forge one written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
                   for c in str(text))


class Parser(argparse.ArgumentParser):
    """An argument parser whose every complaint is a UserError, one line."""

    def error(self, message):
        # "argument --epochs: is 0; …", from the types below, reads "--epochs is 0; …"
        raise UserError(re.sub(r"^argument (\S+): is ", r"\1 is ", message))


def _number(kind, fits, expected):
    """An argparse type: kind(text), where it fits; otherwise the message says what is expected."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text}; expected {expected}") from None
        if not fits(value):
            raise argparse.ArgumentTypeError(f"is {value}; expected {expected}")
        return value

    return parse


count = _number(int, lambda value: value >= 1, "1 or more")
natural = _number(int, lambda value: value >= 0, "0 or more")
share = _number(float, lambda value: 0 <= value <= 1, "0 to 1")
positive = _number(float, lambda value: 0 < value < float("inf"), "more than 0")
seed = _number(int, lambda value: -1 << 63 <= value < 1 << 63, "an integer of 64 bits")


def path(text):
    """An argparse type: a Path, with ~ for the home directory."""
    return Path(os.path.expanduser(text))


class _Quiet:
    """A text stream that goes quiet when nobody reads it any more, as after `| head`."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        return self._attempt(self._stream.write, text)

    def flush(self):
        self._attempt(self._stream.flush)

    def _attempt(self, function, *arguments):
        try:
            return function(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal is gone
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is still in the buffer goes there too
            os.close(nowhere)


def clean_exit(main):
    """Decorator for every script's main(): what a user can mend is one line on stderr, exit code 2.

    That is a UserError, a file that cannot be read or written, and too little memory. Anything else
    is a mistake of ours and keeps its traceback. A reader of the output who leaves ends nothing.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        streams = sys.stdout, sys.stderr
        if hasattr(sys.stdout, "reconfigure"):  # "→" where the terminal's encoding has none
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout, sys.stderr = (stream and _Quiet(stream) for stream in streams)
        try:
            return main(*args, **kwargs)
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
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
            sys.stdout, sys.stderr = streams

    return wrapper


def explain(error):
    """What an exception tells the user, in one line; None where there is nothing for them to do."""
    text = printable(" ".join(str(error).split()))
    if isinstance(error, UserError):
        # a DataLoader that is not `read_ahead`'s puts its worker's traceback in front
        return text.split("UserError: ")[-1] if "Traceback" in text else printable(error)
    if isinstance(error, OSError):
        where = f" {printable(error.filename)}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"cannot write{where}: {error.strerror}; make room and repeat the command"
        return f"cannot use{where}: {error.strerror}" if where else None
    if re.search(r"DataLoader worker \(pid.* (killed|exited)", text):
        return (f"a process that reads images has died ({text[:80]}…), most likely for want of "
                "memory; repeat the command with fewer --workers, or 0")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return (f"out of memory ({text[:80]}…); repeat the command with a smaller --batch, or, in "
                "reclip.py, a smaller --crop and --scale")
    return None


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


class _Reader(torch.utils.data.Dataset):
    """What a worker of `read_ahead` does: an item, or what went wrong, as bytes.

    The bytes go through a pipe. PyTorch would hand over tensors in shared memory, of which
    containers have little, and wait for ever for a worker that finds none left.
    """

    def __init__(self, dataset, collate):
        self.dataset, self.collate = dataset, collate

    def read(self, key):
        if not isinstance(key, list):
            return self.dataset[key]
        if self.collate is None and hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(key)
        collate = self.collate or torch.utils.data.default_collate
        return collate([self.dataset[k] for k in key])

    def __getitem__(self, key):
        try:
            return pickle.dumps(_exchange(self.read(key), torch.Tensor, torch.Tensor.numpy))
        except (UserError, OSError, MemoryError) as error:
            return pickle.dumps(error)


def _exchange(item, kind, change):
    """A nest of dicts, lists and tuples in which `change` is applied to all that is of a kind."""
    if isinstance(item, kind):
        return change(item)
    if isinstance(item, dict):
        return {key: _exchange(value, kind, change) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return type(item)(_exchange(value, kind, change) for value in item)
    return item


def read_ahead(dataset, keys, workers, collate=None):
    """Yield dataset[key] for each key, in order, read by `workers` processes; 0: by this one.

    keys: any iterable. A key that is a list stands for a batch: dataset.__getitems__(key) where
    there is such a method and no `collate`, else collate([dataset[k] for k in key]), by default
    PyTorch's default_collate. Raises what reading raises, and UserError where there can be no
    workers.
    """
    reader = _Reader(dataset, collate)
    if not workers:
        yield from map(reader.read, keys)
        return
    loader = torch.utils.data.DataLoader(reader, sampler=keys, batch_size=None, collate_fn=bytes,
                                         num_workers=workers)
    try:
        items = iter(loader)
    except OSError as error:
        raise UserError(f"cannot start {workers} processes that read images ({error.strerror}); "
                        "most likely there is no room in shared memory, /dev/shm; repeat the "
                        "command with --workers 0") from None
    for item in map(pickle.loads, items):
        if isinstance(item, Exception):
            raise item
        yield _exchange(item, np.ndarray, torch.from_numpy)


# ------------------------------------------------------------------------------------------------
# 1. Class names and prompt templates
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

# COCO-Stuff's 27 coarse classes, each with the fine ids (0–181, the values in `stuffthingmaps`)
# that make it up.
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
    ("voc", VOC), ("context", CONTEXT), ("ade", ADE), ("cityscapes", CITYSCAPES))}
CLASSES["stuff"] = list(STUFF)

DATASETS = ("shapes", "voc", "context", "ade", "cityscapes", "stuff", "folder")


def parse_classes(text):
    """The class names of a data set of one's own.

    text: "cat, dog, sofa", or the path of a text file with one name a line ('#' starts a comment).
    Returns the names in order, inner runs of blanks made one. Raises UserError for a file that
    cannot be read, an empty list, an empty, repeated or unprintable name, or more classes than
    labels can hold.
    """
    if os.path.isfile(text):
        try:
            lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read class names from {text}: {error}") from None
        names = [line.split("#")[0] for line in lines]
        names = [name for name in names if name.strip()]
        where = f"the file {text}"
    elif text.endswith(".txt"):
        raise UserError(f"no file {text}; --classes takes names (\"cat, dog\") or a text file")
    else:
        names = text.split(",") if text.strip() else []
        where = f"--classes \"{text}\""
    names = [" ".join(name.split()) for name in names]
    if not names:
        raise UserError(f"no class names in {where}; expected for example \"cat, dog, sofa\"")
    if "" in names:
        raise UserError(f"class name {names.index('') + 1} is empty in {where}")
    seen = set()
    for name in names:
        if name.lower() in seen:
            raise UserError(f"class name \"{name}\" is repeated in {where}")
        if not name.isprintable():
            raise UserError(ascii(f"class name {name} in {where} is no printable text")[1:-1])
        seen.add(name.lower())
    if len(names) > VOID:
        raise UserError(f"{len(names)} classes in {where}; at most {VOID} fit in 8-bit labels")
    return names


def names_of(cls):
    """The names of a class: "person, man, woman" is one class that has three."""
    return [name.strip() for name in cls.split(",")]


def called(cls):
    """What a class is called in tables, legends and results.json: the first of its names."""
    return names_of(cls)[0]


# ------------------------------------------------------------------------------------------------
# 2. Colours


def palette(num_classes):
    """uint8 C×3: class k gets colour k+1 of the PASCAL VOC map (colour 0, black, is background).

    The VOC map deals the bits of the index to R, G, B in turn, from the highest bit of each down.
    """
    colours = torch.zeros(num_classes, 3, dtype=torch.uint8)
    for k in range(num_classes):
        index = k + 1
        for bit in range(7, -1, -1):
            for channel in range(3):
                colours[k, channel] |= (index >> channel & 1) << bit
            index >>= 3
    return colours


CITYSCAPES_PALETTE = torch.tensor([  # the official colours, in the order of the train ids
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
    (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
    (0, 80, 100), (0, 0, 230), (119, 11, 32)], dtype=torch.uint8)


SHAPES_PALETTE = torch.tensor([
    (214, 39, 40), (31, 119, 180), (60, 60, 60), (44, 160, 44), (255, 221, 60), (255, 127, 14),
    (240, 110, 200), (140, 86, 75), (148, 103, 189), (23, 190, 207)], dtype=torch.uint8)


def dataset_palette(name, num_classes):
    """The colours of a data set's classes, uint8 C×3: its own where it has some, else VOC's."""
    own = {"cityscapes": CITYSCAPES_PALETTE, "shapes": SHAPES_PALETTE}.get(name, ())
    return own if len(own) == num_classes else palette(num_classes)


# ------------------------------------------------------------------------------------------------
# 3. Reading one file


def _load(path, what, load):
    """load(opened PIL image), with every way in which a file can be broken made a UserError."""
    try:
        with Image.open(path) as image:
            return load(image)
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"no {what} {path}") from None
    except Image.DecompressionBombError:
        raise UserError(f"cannot read {what} {path}: it claims more than "
                        f"{2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; make it smaller"
                        ) from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds for damaged files
        reason = getattr(error, "strerror", None) or f"{error}; is it damaged?"
        raise UserError(f"cannot read {what} {path}: {reason}") from None


def read_image(path):
    """Read any photograph as uint8 3×H×W, RGB.

    EXIF orientation is applied; grey, palette and CMYK images become RGB; transparent ones are laid
    on white; of 16-bit grey values the high byte is kept. Raises UserError, naming the file, if it
    is missing, truncated, empty or no image.
    """

    def load(image):
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own convert() would clip at 255
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise UserError(f"{path} has 32 bits a pixel; convert it to 8 or 16 bits")
            image = Image.fromarray((values >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise UserError(f"{path} holds floating-point pixels; convert it to 8 or 16 bits")
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()

    return _load(path, "image", load)


def image_size(path):
    """(H, W) as `read_image` will return it, from the file's header alone. Raises UserError."""

    def load(image):
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation by 90°
        return (width, height) if turned else (height, width)

    return _load(path, "image", load)


def read_label(path):
    """Read a label map as int64 H×W of the values stored in it, palette indices staying indices.

    Raises UserError, naming the file, for an unreadable file or one with colours for values.
    """

    def load(image):
        if image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
            raise UserError(f"label {path} is a {image.mode} picture; expected one channel of "
                            "class ids (a grey or palette PNG)")
        return torch.from_numpy(np.array(image).astype(np.int64))

    return _load(path, "label", load)


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


def connected_regions(label):
    """The connected regions of equal label as objects: int64 H×W → int64 H×W.

    Ids start at 1, from the top left; 0 where the label is VOID. A pixel touches its eight
    neighbours. Exact: pixels make runs along the rows, runs that touch from row to row are joined,
    all at once, each to the smallest run it knows to belong to it, until nothing changes.
    """
    H, W = label.shape
    starts = torch.ones(H, W, dtype=torch.bool)
    starts[:, 1:] = label[:, 1:] != label[:, :-1]
    run, count = starts.flatten().cumsum(0).reshape(H, W) - 1, int(starts.sum())
    pairs = []
    for shift in (-1, 0, 1):  # lower left, below, lower right
        upper = slice(max(0, -shift), W - max(0, shift))
        lower = slice(max(0, shift), W + min(0, shift))
        same = label[:-1, upper] == label[1:, lower]
        pairs.append(run[:-1, upper][same] * count + run[1:, lower][same])
    pairs = torch.cat(pairs).unique()
    a, b = pairs // count, pairs % count
    root, known = torch.arange(count), None
    while known is None or not torch.equal(root, known):
        known = root
        lowest = torch.minimum(known[a], known[b])
        root = known.scatter_reduce(0, known[a], lowest, "amin")
        root = root.scatter_reduce(0, known[b], lowest, "amin")
        while not torch.equal(root, root[root]):  # follow the chains to their ends
            root = root[root]
    void = label == VOID
    objects = torch.full((H, W), 0)
    objects[~void] = root[run[~void]].unique(return_inverse=True)[1] + 1
    return objects


class SegmentationData:
    """Images, and labels where there are any, of one split of a data set.

    name, split: as in `open_dataset`; classes: C names; palette: uint8 C×3; ids: one per image,
    unique, in a fixed order; everything stored about an image is keyed by its id.

    image_file: (folder, suffix), image i is folder/ID + suffix.
    label_files: [(folder, suffix, table)], the label is the first of these files that exists.
    instances: the folder of masks ID.png that tell the objects of an image apart, if there is one.
    """

    def __init__(self, name, split, classes, ids, image_file, label_files=(), instances=None):
        self.name, self.split, self.classes, self.ids = name, split, list(classes), list(ids)
        self.image_file, self.label_files = image_file, list(label_files)
        self.instances, self.palette = instances, dataset_palette(name, len(classes))

    def __len__(self):
        return len(self.ids)

    def image_path(self, index):
        folder, suffix = self.image_file
        return os.path.join(folder, self.ids[index] + suffix)

    def image(self, index):
        """uint8 3×H×W. Raises UserError for a file that cannot be read."""
        return read_image(self.image_path(index))

    def size(self, index):
        """(H, W) of image(index), read from the file's header."""
        return image_size(self.image_path(index))

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

    def label_path(self, index):
        """(path, table) of the label, or None if there is none. Opens nothing."""
        for folder, suffix, table in self.label_files:
            path = os.path.join(folder, self.ids[index] + suffix)
            if os.path.exists(path):
                return path, table
        return None

    @functools.cached_property
    def has_labels(self):
        """Whether this split can be evaluated. Looks whether the files exist, opens none.

        Raises UserError if some images have labels and others have not.
        """
        missing = [i for i in range(len(self)) if self.label_path(i) is None]
        if missing and len(missing) < len(self):
            folder, suffix, _ = self.label_files[-1]
            raise UserError(f"{len(missing)} of {len(self)} labels of {self.name} {self.split} are "
                            f"missing, the first {os.path.join(folder, self.ids[missing[0]])}"
                            f"{suffix}; see README, Data sets")
        return not missing

    def label(self, index):
        """int64 H×W, values 0…C-1 and VOID. Opens the label file.

        Raises UserError for a missing or unreadable file, an id that the data set does not have,
        and a size other than the image's.
        """
        found = self.label_path(index)
        if found is None:
            expected = " or ".join(os.path.join(folder, self.ids[index]) + suffix
                                   for folder, suffix, _ in self.label_files)
            raise UserError(f"no label for image {self.ids[index]} of {self.name}; expected "
                            f"{expected or 'none: this data set has no labels'}; "
                            "see README, Data sets")
        path, table = found
        raw = read_label(path)
        (h, w), (height, width) = raw.shape, self.size(index)
        if (h, w) != (height, width):
            raise UserError(f"label {path} is {w}×{h} pixels, its image {width}×{height}")
        label = table[raw.clamp(0, 255)]
        wrong = (label < 0) | (raw > 255) | (raw < 0)
        if wrong.any():
            raise UserError(f"label {path} holds the id {int(raw[wrong][0])}, which {self.name} "
                            f"({len(self.classes)} classes) does not have; see README, Data sets")
        return label

    def objects(self, index):
        """int64 H×W: an id from 1 on for every object of an image, 0 where there is none.

        From the instance mask where the data set has some, in which 255 is an object's rim, else
        the connected regions of each class in the label. Raises UserError as `label` does.
        """
        if self.instances is None:
            return connected_regions(self.label(index))
        path = os.path.join(self.instances, self.ids[index] + ".png")
        raw = read_label(path)
        if tuple(raw.shape) != tuple(self.size(index)):
            (h, w), (height, width) = raw.shape, self.size(index)
            raise UserError(f"instance mask {path} is {w}×{h} pixels, its image {width}×{height}")
        return raw.masked_fill(raw == VOID, 0)


def _find_tree(name, root, places, probe):
    """The first of `places` under root that contains the folder `probe`."""
    if root is None:
        raise UserError(f"--dataset {name} needs --data-root, the folder that holds it; "
                        "see README, Data sets")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"no folder {root}; --data-root is the folder that holds the data set "
                        f"{name}; see README, Data sets")
    for place in places:
        if (root / place / probe).is_dir():
            return root / place
    raise UserError(f"no {name} in {root}: expected {root / places[0] / probe}; "
                    "see README, Data sets")


def _read_list(path):
    """The ids in a split file: the first word of each line."""
    try:
        ids = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise UserError(f"cannot read the list of images {path}: {reason}; "
                        "see README, Data sets") from None
    if len(set(ids)) < len(ids):
        repeated = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise UserError(f"{path} lists {repeated} twice")
    return ids


def list_folder(folder, suffix):
    """Sorted ids of the files folder/**/ID + suffix, hidden ones left out.

    suffix: one ending, cut off from the ids, or a tuple of endings in lower case, kept in them.
    """
    ids = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(parent, name).relative_to(folder).as_posix()
            if name.startswith("."):
                continue
            if isinstance(suffix, str) and name.endswith(suffix):
                ids.append(path[:-len(suffix)])
            elif isinstance(suffix, tuple) and name.lower().endswith(suffix):
                ids.append(path)
    return sorted(ids)


PHOTOS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def check_dataset(name):
    """Raises UserError for a name that is none of DATASETS."""
    if name not in DATASETS:
        raise UserError(f"no data set \"{name}\"; there are {', '.join(DATASETS)}")


def open_dataset(name, root=None, split="train", classes=None, seed=0):
    """One split of a data set as SegmentationData. Opens no image and no label.

    name: one of DATASETS. root: the folder that holds the tree (README, Data sets), or the tree's
    own top. split: "train" or "val". classes: list of names, for `folder` only. seed: for `shapes`.
    Raises UserError for a tree that is missing or not as expected, or that has no images.
    """
    check_dataset(name)
    if split not in ("train", "val"):
        raise UserError(f"no split \"{split}\"; there are train and val")
    if classes is not None and name != "folder":
        raise UserError(f"--classes goes with --dataset folder; {name} has its own class names")
    if name == "shapes":
        return Shapes(split, seed)
    if name == "folder" and classes is None:
        raise UserError("--dataset folder needs --classes, for example --classes \"cat, dog\"")
    classes = classes or CLASSES[name]
    C, instances = len(classes), None

    if name in ("voc", "context"):
        year, lists, labels = {"voc": ("VOC2012", "Segmentation", "SegmentationClass"),
                               "context": ("VOC2010", "SegmentationContext",
                                           "SegmentationClassContext")}[name]
        tree = _find_tree(name, root, (f"VOCdevkit/{year}", year, "."), "JPEGImages")
        listed = tree / "ImageSets" / lists / f"{split}.txt"
        ids = _read_list(listed)
        image_file = (tree / "JPEGImages", ".jpg")
        label_files = [(tree / labels, ".png", shifted_ids(C))]
        if name == "voc" and (tree / "SegmentationObject").is_dir():
            instances = tree / "SegmentationObject"
        present = set(os.listdir(tree / "JPEGImages"))
        missing = [i for i in ids if i + ".jpg" not in present]
        if missing:
            raise UserError(f"{len(missing)} of the {len(ids)} images in {listed} are missing, the "
                            f"first {tree / 'JPEGImages' / missing[0]}.jpg")
    elif name == "ade":
        folder = {"train": "training", "val": "validation"}[split]
        tree = _find_tree(name, root, ("ADEChallengeData2016", "."), f"images/{folder}")
        image_file = (tree / "images" / folder, ".jpg")
        ids = list_folder(*image_file)
        label_files = [(tree / "annotations" / folder, ".png", shifted_ids(C))]
    elif name == "cityscapes":
        tree = _find_tree(name, root, (".", "cityscapes"), f"leftImg8bit/{split}")
        image_file = (tree / "leftImg8bit" / split, "_leftImg8bit.png")
        ids = list_folder(*image_file)
        truth = tree / "gtFine" / split
        label_files = [(truth, "_gtFine_labelTrainIds.png", train_ids(C)),
                       (truth, "_gtFine_labelIds.png", CITYSCAPES_IDS)]
    elif name == "stuff":
        part = f"{split}2017"
        tree = _find_tree(name, root, ("images", "."), part)
        image_file = (tree / part, ".jpg")
        ids = list_folder(*image_file)
        top = tree.parent if tree.name == "images" else tree
        label_files = [(top / "annotations" / part, "_27labelTrainIds.png", train_ids(C)),
                       (top / "annotations" / part, ".png", STUFF_IDS),
                       (top / "stuffthingmaps" / part, ".png", STUFF_IDS)]
    else:  # folder: all its images are both training and prediction set
        image_file = (_find_tree(name, root, (".",), "."), "")
        ids, label_files, listed = list_folder(image_file[0], PHOTOS), [], image_file[0]

    if not ids:
        where = listed if name in ("voc", "context") else image_file[0]
        kinds = ", ".join(PHOTOS) if name == "folder" else f"ID{image_file[1]}"
        raise UserError(f"no images of {name} {split} in {where}; expected {kinds}; "
                        "see README, Data sets")
    return SegmentationData(name, split, classes, ids, image_file, label_files, instances)


class Shapes(SegmentationData):
    """The demo as a data set: pictures and labels are drawn, all at once, when first needed."""

    def __init__(self, split, seed):
        count = {"train": 600, "val": 250}[split]
        super().__init__("shapes", split, SHAPES, [f"{split}-{i:03}" for i in range(count)], None)
        self.seed, self.has_labels = seed, True

    @functools.cached_property
    def drawn(self):
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


# ------------------------------------------------------------------------------------------------
# 6. Views: what the networks see of an image

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
    return TF.resize(image, size, antialias=True)


def photometric_distortion(image):
    """Random brightness, contrast, saturation and hue, each with probability ½. uint8 3×H×W, same.

    Brightness adds up to ±32 levels; "contrast" multiplies all values by 0.5–1.5, and comes either
    before or after the other colour steps; saturation 0.5–1.5 blends with grey (the authors scale
    the S of HSV); hue turns by up to 18 of 180.
    """

    def uniform(low, high):
        return torch.empty(()).uniform_(low, high).item()

    def coin():
        return torch.rand(()).item() < 0.5

    contrast_first, contrast = coin(), coin()
    if coin():
        image = (image.float() + uniform(-32, 32)).clamp(0, 255).to(torch.uint8)
    if contrast and contrast_first:
        image = TF.adjust_brightness(image, uniform(0.5, 1.5))  # torchvision's word for a product
    if coin():
        image = TF.adjust_saturation(image, uniform(0.5, 1.5))
    if coin():
        image = TF.adjust_hue(image, uniform(-0.1, 0.1))
    if contrast and not contrast_first:
        image = TF.adjust_brightness(image, uniform(0.5, 1.5))
    return image


def training_view(image, scale, crop, ratio=(0.5, 2.0), distort=True):
    """A random square of an image: resized, cropped, flipped, distorted, padded.

    image: uint8 3×H×W. scale: as in `resize_to_scale`, times a random number within `ratio`.
    Returns (uint8 3×crop×crop, (h, w)): the view proper lies in the top left h×w pixels, the rest
    is padding; `normalise` makes it zero. Draws from torch's global generator.
    """
    image = resize_to_scale(image, scale, torch.empty(()).uniform_(*ratio).item())
    height, width = image.shape[-2:]
    top = int(torch.randint(max(height - crop, 0) + 1, ()))
    left = int(torch.randint(max(width - crop, 0) + 1, ()))
    image = image[:, top:top + crop, left:left + crop]
    if torch.rand(()).item() < 0.5:
        image = image.flip(-1)
    if distort:
        image = photometric_distortion(image)
    height, width = image.shape[-2:]
    return TF.pad(image, [0, 0, crop - width, crop - height]), (height, width)


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


def check_seed(seed):
    """Raises UserError for a --seed that torch cannot take."""
    if not -1 << 63 <= seed < 1 << 63:
        raise UserError(f"--seed is {seed}; expected an integer of 64 bits")


class TrainingViews(torch.utils.data.Dataset):
    """Training views of a SegmentationData, never its labels; indexed by (epoch, index).

    An item is a dict: view uint8 3×crop×crop, size int64 (h, w), index int. It depends on
    (seed, epoch, id of the image) alone: not on workers, processes, order or interruptions.
    """

    def __init__(self, data, scale, crop, ratio=(0.5, 2.0), distort=True, seed=0):
        self.data, self.seed = data, int(seed)
        self.scale, self.crop, self.ratio, self.distort = scale, crop, ratio, distort

    def __len__(self):
        return len(self.data)

    def __getitem__(self, key):
        epoch, index = int(key[0]), int(key[1])
        image = self.data.image(index)
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: that would also reset the generators of the GPUs
            torch.default_generator.manual_seed(
                draw_seed(self.seed, epoch, self.data.ids[index], "view"))
            view, size = training_view(image, self.scale, self.crop, self.ratio, self.distort)
        return {"view": view, "size": torch.tensor(size), "index": index}


# ------------------------------------------------------------------------------------------------
# 7. Getting the data: downloads, and the conversion of Pascal Context


DOWNLOADS = {  # name: (address, SHA-256, the tree inside); of ADE's only the MD5 is published
    "voc": ("https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
            "VOCdevkit/VOC2012"),
    "ade": ("https://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            "7328b3957e407ddae1d3cbf487f149ef", "ADEChallengeData2016"),
}
ELSEWHERE = {
    "context": "images: http://host.robots.ox.ac.uk/pascal/VOC/voc2010/, labels: trainval of "
               "https://cs.stanford.edu/~roozbeh/pascal-context/, then --convert",
    "cityscapes": "https://www.cityscapes-dataset.com (needs an account)",
    "stuff": "images: https://cocodataset.org/#download, labels: stuffthingmaps of "
             "https://github.com/nightrome/cocostuff",
}


def download(name, root):
    """Fetch and unpack a data set into root: voc (2 GB) and ade (1 GB). Raises UserError.

    Over https, and unpacked only if the hash is right; nothing to do where the tree is there.
    """
    if name in ELSEWHERE:
        raise UserError(f"--download cannot fetch {name}; get it from {ELSEWHERE[name]}; "
                        "see README, Data sets")
    if name not in DOWNLOADS:
        raise UserError(f"there is nothing to download for --dataset {name}")
    if root is None:
        raise UserError("--download needs --data-root, the folder to put the data set in")
    root = Path(root).expanduser()
    url, digest, tree = DOWNLOADS[name]
    if (root / tree).is_dir():
        return
    archive = root / url.rpartition("/")[2]
    try:
        if len(digest) == 64:
            fetch(url, archive, digest)
        else:
            torchvision.datasets.utils.download_url(url, root, archive.name, digest)
        unpack(archive, root, tree)
    except (OSError, http.client.HTTPException, RuntimeError, tarfile.TarError,
            zipfile.BadZipFile) as error:
        raise UserError(f"downloading {name} into {root} failed: {error}; try again, or fetch it "
                        "by hand: see README, Data sets") from None


def unpack(archive, root, tree):
    """Unpack a tar or zip file, of which `tree` appears in root when all of it is there.

    No member can land outside: "data" refuses paths and links that lead there, zipfile cuts them.
    """
    part = root / f"{archive.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as file:
            file.extractall(part, filter="data")
    else:
        with zipfile.ZipFile(archive) as file:
            file.extractall(part)
    (root / tree).parent.mkdir(parents=True, exist_ok=True)
    os.replace(part / tree, root / tree)
    shutil.rmtree(part)


# Numeric data types of the MAT-file format, level 5 (MathWorks, "MAT-File Format"): the number in
# an element's tag, and the letter of the type in numpy.
MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8",
             13: "u8"}
MAT_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4",
               14: "i8", 15: "u8"}
MAT_MATRIX, MAT_COMPRESSED = 14, 15
MAT_LARGEST = 1 << 26  # bytes: what a compressed matrix may grow to


def _mat_elements(data, order):
    """Yield (type, bytes) of the elements that follow each other in `data`. order: "<" or ">"."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        if kind >> 16:  # small element: size and type share the first word, the data is the second
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
            if size > 4:
                raise ValueError("a small element of more than 4 bytes")
        else:
            start = at + 8
            end = start + size
            if kind != MAT_COMPRESSED:  # all others are padded to a multiple of 8 bytes
                end += -end % 8
        if start + size > len(data):
            raise ValueError("the file ends early")
        yield kind, data[start:start + size]
        at = end


def read_mat_v5(path):
    """The real numeric arrays of a MATLAB file (format 5, as written by save -v6 and -v7).

    Returns {variable name: numpy array, rows first}; variables of other kinds (text, cells,
    structures, sparse) are left out. Raises UserError for a file that is damaged or of another
    format.
    """
    try:
        data = Path(path).read_bytes()
        order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
        if order is None or struct.unpack(order + "H", data[124:126])[0] != 0x0100:
            raise ValueError("not a MATLAB 5 file")
        variables = {}
        for kind, element in _mat_elements(data[128:], order):
            if kind == MAT_COMPRESSED:
                stream = zlib.decompressobj()
                element = stream.decompress(element, MAT_LARGEST)
                if not stream.eof:
                    raise ValueError(f"cut short, or of more than {MAT_LARGEST >> 20} MiB")
                (kind, element), = _mat_elements(element, order)
            if kind != MAT_MATRIX:
                continue
            # parts of an array: flags (class in the lowest byte), dimensions, name, real values;
            # values may be stored in a narrower type than the array's class, column after column
            parts = list(_mat_elements(element, order))
            mat_class = np.frombuffer(parts[0][1], order + "u4")[0] & 0xFF
            if mat_class not in MAT_CLASSES:
                continue
            (_, dims), (_, name), (stored, values) = parts[1:4]
            values = np.frombuffer(values, order + MAT_TYPES[stored])
            values = values.reshape(np.frombuffer(dims, order + "i4"), order="F")
            variables[name.decode("ascii")] = values.astype(MAT_CLASSES[mat_class])
        return variables
    except (OSError, ValueError, KeyError, IndexError, struct.error, zlib.error) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise UserError(f"cannot read {path}: {reason}; expected a .mat file of Pascal Context "
                        "(MATLAB 5)") from None


# Of the 459 classes of the original annotation, the 59 frequent ones in the order of CONTEXT (which
# is that of their ids), after 0.
CONTEXT_IDS = [int(i) for i in """
    0 2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159 162 187
    189 207 220 232 258 259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397 415 416 420
    424 427 440 445 454 458""".split()]


def convert_context(mat_dir, root):
    """Turn Pascal Context's original labels into PNGs, 0 = other and 1–59, and list the splits.

    mat_dir: holds ID.mat with one matrix LabelMap, H×W ids 0–459. root: holds VOCdevkit/VOC2010.
    Writes SegmentationClassContext/ID.png there, leaving those that exist, and, unless they exist,
    ImageSets/SegmentationContext/{train,val}.txt: VOC 2010's own splits, so far as they have
    labels. Raises UserError.
    """
    tree = _find_tree("context", root, ("VOCdevkit/VOC2010", "VOC2010", "."), "JPEGImages")
    mat_dir = Path(mat_dir).expanduser()
    ids = list_folder(mat_dir, ".mat")
    if not ids:
        raise UserError(f"no .mat files in {mat_dir}; expected ID.mat from Pascal Context's "
                        "trainval; see README, Data sets")
    table = np.zeros(460, dtype=np.uint8)
    table[CONTEXT_IDS] = np.arange(60)
    out = tree / "SegmentationClassContext"
    for n, i in enumerate(ids, 1):
        target = out / f"{Path(i).name}.png"
        if not target.exists():
            path = mat_dir / f"{i}.mat"
            labels = read_mat_v5(path).get("LabelMap")
            if labels is None or labels.ndim != 2:
                raise UserError(f"{path} has no matrix LabelMap; is it from Pascal Context?")
            if labels.size == 0 or not (labels.min() >= 0 and labels.max() <= 459):
                raise UserError(f"{path}: LabelMap has ids outside 0–459")
            out.mkdir(exist_ok=True)
            save_picture(Image.fromarray(table[labels.astype(np.int64)]), target)
        if n % 500 == 0 or n == len(ids):
            print(f"converted {n} of {len(ids)}", flush=True)

    lists = tree / "ImageSets" / "SegmentationContext"
    labelled = {Path(i).name for i in ids}
    for split in ("train", "val"):
        source, target = tree / "ImageSets" / "Main" / f"{split}.txt", lists / f"{split}.txt"
        if not target.exists():
            if not source.exists():
                raise UserError(f"the labels are converted, but there is no list {target}, and no "
                                f"{source} to make it from; see README, Data sets")
            lists.mkdir(parents=True, exist_ok=True)
            listed = [i for i in _read_list(source) if i in labelled]
            write_text(target, "".join(f"{i}\n" for i in listed))
            print(f"wrote {target}: {len(listed)} images")


# ------------------------------------------------------------------------------------------------
# 8. The command: what is in a data set?


def evenly(count, limit):
    """At most `limit` of the indices 0…count-1, evenly spaced."""
    return [i * count // min(count, limit) for i in range(min(count, limit))]


def describe(data, limit):
    """Print the number and sizes of images; return class counts C+1 (the last: void), or None.

    Sizes and labels are those of at most `limit` images.
    """
    some = evenly(len(data), limit)
    sizes = torch.tensor([data.size(i) for i in some])
    low, middle, high = sizes.amin(0), sizes.median(0).values, sizes.amax(0)
    has_labels = data.has_labels
    split = "" if data.name == "folder" else f" {data.split}"  # which has all of them in both
    print(f"{data.name}{split}: {len(data)} images, {len(data) if has_labels else 'no'} labels, "
          f"{len(data.classes)} classes")
    for side, axis in (("height", 0), ("width", 1)):
        print(f"  {side}: {low[axis]} to {high[axis]}, median {middle[axis]} "
              f"({len(some)} images looked at)")
    if not has_labels:
        return None
    counts = torch.zeros(256, dtype=torch.int64)
    for i in some:
        counts += data.label(i).flatten().bincount(minlength=256)
    return torch.cat([counts[:len(data.classes)], counts[VOID:]])


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
    grey = TF.rgb_to_grayscale(image, 3).float()
    table = torch.cat([visible(colours), colours.new_full((256 - len(colours), 3), 255)])
    paint = table[label.cpu()].movedim(-1, 0)
    share = torch.where(label.cpu() == VOID, 0.0, 0.8)
    return ((1 - share) * (110 + 0.5 * grey) + share * paint).clamp(0, 255).to(torch.uint8)


def picture_sheet(rows, headings, present, classes, colours, cell=240):
    """Rows of pictures under headings, above a legend of the classes in `present`, as a PIL image.

    rows: lists of uint8 3×H×W tensors, each scaled to fit a square of `cell` pixels; headings: one
    per column or empty; present: class indices; classes: C names; colours: uint8 C×3.
    """
    cells, filter = [], TF.InterpolationMode.NEAREST_EXACT  # masks stay sharp when enlarged
    for picture in (picture for row in rows for picture in row):
        scale = cell / max(picture.shape[-2:])
        height, width = (max(1, round(side * scale)) for side in picture.shape[-2:])
        picture = TF.resize(picture, [height, width], filter) if scale > 1 else TF.resize(
            picture, [height, width], antialias=True)
        cells.append(TF.pad(picture, [0, 0, cell - width, cell - height], fill=255))
    columns, gap, line = len(rows[0]), 6, 26
    grid = torchvision.utils.make_grid(torch.stack(cells), columns, padding=gap, pad_value=255)

    font, top = ImageFont.load_default(17), line if headings else 0
    names = legend([(classes[k], colours[k]) for k in sorted(present)], grid.shape[2])
    bottom = top + grid.shape[1]
    sheet = Image.new("RGB", (grid.shape[2], bottom + names.height), "white")
    sheet.paste(TF.to_pil_image(grid), (0, top))
    sheet.paste(names, (0, bottom))
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        draw.text((column * (cell + gap) + gap, 5), heading, fill="black", font=font)
    return sheet


def save_picture(picture, path):
    """Write a PIL image as PNG under a temporary name, then rename it."""
    temporary = Path(f"{path}.tmp")
    try:
        picture.save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a whole file under a temporary name, then rename it."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def legend(entries, width):
    """Patches of colour, each with its name, in as many columns as fit; a PIL image.

    entries: pairs of a text and a uint8 colour (3 values); width: in pixels.
    """
    font, line, gap = ImageFont.load_default(17), 26, 6
    column = max([200] + [int(font.getlength(text)) + 56 for text, _ in entries])
    per_line = max(1, width // column)
    picture = Image.new("RGB", (width, -(-len(entries) // per_line) * line + gap), "white")
    draw = ImageDraw.Draw(picture)
    for n, (text, colour) in enumerate(entries):
        x, y = n % per_line * column + gap, n // per_line * line
        draw.rectangle((x, y + 2, x + 28, y + 19), fill=tuple(visible(colour).tolist()))
        draw.text((x + 36, y), text, fill="black", font=font)
    return picture


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
    columns = min(6, len(pictures))
    pictures += [torch.full_like(pictures[0], 255)] * (-len(pictures) % columns)
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    return picture_sheet(rows, [], present, data.classes, data.palette)


@clean_exit
def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Show what a data set holds; fetch or convert it first, if asked to. "
                    "This command opens ground truth; training does not.")
    parser.add_argument("--dataset", metavar="NAME", default="shapes", help=", ".join(DATASETS))
    parser.add_argument("--data-root", metavar="DIR", help="the folder that holds the data set")
    parser.add_argument("--classes", metavar="NAMES", help="for folder: \"cat, dog\", or a file")
    parser.add_argument("--download", action="store_true", help="fetch voc or ade into --data-root")
    parser.add_argument("--convert", metavar="DIR", help="for context: make PNGs of DIR/*.mat")
    parser.add_argument("--limit", type=int, default=200, metavar="N",
                        help="images per split whose sizes and labels are read (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="for shapes")
    parser.add_argument("--out", metavar="FILE", help="contact sheet (runs/data-DATASET.png)")
    args = parser.parse_args(argv)
    if args.limit < 1:
        raise UserError(f"--limit is {args.limit}; expected 1 or more")
    check_seed(args.seed)
    classes = parse_classes(args.classes) if args.classes is not None else None
    if args.download:
        download(args.dataset, args.data_root)
    if args.convert:
        if args.dataset != "context":
            raise UserError("--convert goes with --dataset context")
        convert_context(args.convert, args.data_root)

    # of a folder, both splits are the same images
    names = ("val",) if args.dataset == "folder" else ("train", "val")
    splits, problems = [], []
    for split in names:
        try:
            splits.append(open_dataset(args.dataset, args.data_root, split, classes, args.seed))
        except UserError as error:
            problems.append(error)
    if not splits:
        raise problems[0]
    for problem in problems:  # one split is enough to look at
        print(f"one split cannot be opened: {problem}")
    counts = [describe(data, args.limit) for data in splits]
    labelled = [(data, count) for data, count in zip(splits, counts) if count is not None]
    if labelled:
        print(f"\nper cent of the labelled pixels of at most {args.limit} images")
        print(f"{'':28}" + "".join(f"{data.split:>8}" for data, _ in labelled))
        for k, name in enumerate(splits[0].classes):
            shares = [100 * count[k] / count[:-1].sum().clamp(min=1) for _, count in labelled]
            print(f"{k:>3} {name:24}" + "".join(f"{share:8.2f}" for share in shares))
        shares = [100 * count[-1] / count.sum() for _, count in labelled]
        print(f"{'void, of all pixels':28}" + "".join(f"{share:8.2f}" for share in shares))

    out = Path(args.out or f"runs/data-{args.dataset}.png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_picture(contact_sheet(splits[-1]), out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from None
    print(f"\nwrote {out}: images, beside their labels if there are any")


if __name__ == "__main__":
    main()
