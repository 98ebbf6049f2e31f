"""Data: class names, images and labels of the data sets, and the views to train on.

    python data.py --dataset voc --data-root ~/data             # what is there; a contact sheet
    python data.py --dataset voc --data-root ~/data --download  # fetch it first (voc and ade)
    python data.py --dataset context --data-root ~/data --convert ~/data/trainval    # .mat to PNG

The file goes from names to pixels: 1 class names, 2 colours, 3 the data sets, 4 views, 5 getting
the data, 6 the command above. How one file is read is files.py's.

Images are uint8 tensors 3×H×W (RGB). Labels are int64 tensors H×W holding class indices 0…C-1, and
VOID where a pixel has no class or counts for nothing. Only `SegmentationData.label` and `.objects`
open ground truth; training never calls them, unless asked for (--use-ground-truth-void).
"""

import collections
import functools
import http.client
import os
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from clip.clip import CLIP_MEAN, CLIP_STD, TEMPLATES, download as fetch  # noqa: F401
from clip.shapes import SHAPES, TARGET, draw_seed, draw_shapes
from files import (PHOTOS, VOID, Parser, UserError, clean_exit, count, explain,  # noqa: F401
                   fingerprint, image_header, image_size, legend, list_folder, natural, overlay,
                   path, picture_sheet, positive, printable, read_ahead, read_image, read_label,
                   read_mat_v5, save_picture, say_once, seed, share, to_grey, turn, unpack,
                   visible, write_text)

# ------------------------------------------------------------------------------------------------
# 1. Class names
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

    text: "cat, dog, sofa", or the path of a text file with a class a line ('#' starts a comment),
    in which what follows a comma are further names of the same class; a file of a single line is
    a list like the first. Inner runs of blanks become one. Raises UserError for a file that cannot
    be read, an empty list, an empty, repeated or unprintable name, or more classes than labels can
    hold.
    """
    file = os.path.expanduser(text)
    where, lines = f"--classes \"{text}\"", [text]
    if os.path.isfile(file):
        where = f"the file {text}"
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read class names from {text}: {error}") from None
        lines = [line.split("#")[0] for line in lines]
    elif re.search(r"\.(txt|csv|tsv|json)$|^[^,]*([/\\][^,]*|\.\w{1,5})$", text.lower()):
        raise UserError(f"no file {text}; --classes takes names (\"cat, dog\") or a text file")
    lines = [line for line in lines if line.strip()]
    lines = lines[0].split(",") if len(lines) == 1 else lines
    classes, seen = [[" ".join(name.split()) for name in line.split(",")] for line in lines], set()
    if not classes:
        raise UserError(f"no class names in {where}; expected for example \"cat, dog, sofa\"")
    for k, name in ((k, name) for k, names in enumerate(classes, 1) for name in names):
        if not name:
            which = "class name" if len(classes[k - 1]) == 1 else "a name of class"
            raise UserError(f"{which} {k} is empty in {where}")
        if name.lower() in seen:
            raise UserError(f"class name \"{name}\" is repeated in {where}")
        if not name.isprintable():
            raise UserError(f"class name {name} in {where} is no printable text")
        seen.add(name.lower())
    if len(classes) > VOID:
        raise UserError(f"{len(classes)} classes in {where}; at most {VOID} fit in 8-bit labels")
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


# ------------------------------------------------------------------------------------------------
# 2. Colours


def palette(num_classes):
    """uint8 C×3: class k gets colour k+1 of the PASCAL VOC map (colour 0, black, is background).

    The VOC map deals the bits of the index to R, G, B in turn, from the highest bit of each down.
    """
    index = torch.arange(1, num_classes + 1)
    return torch.stack([sum((index >> 3 * i + channel & 1) << 7 - i for i in range(8))
                        for channel in range(3)], 1).to(torch.uint8)


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
# 3. The data sets
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
STUFF171_IDS = _table({raw: k for k, raw in enumerate(sorted({*range(182)} - STUFF_UNUSED))})


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
                        ("gtFine/{}", "_gtFine_labelIds.png", CITYSCAPES_IDS))),
    "stuff": Tree(("images", "."), "{}", ".jpg",
                  (("annotations/{}", "_27labelTrainIds.png", train_ids(27)),
                   ("annotations/{}", ".png", STUFF_IDS),
                   ("stuffthingmaps/{}", ".png", STUFF_IDS)),
                  {"train": "train2017", "val": "val2017"}),
}
TREES["stuff171"] = TREES["stuff"]._replace(labels=(
    ("annotations/{}", ".png", STUFF171_IDS), ("stuffthingmaps/{}", ".png", STUFF171_IDS)))


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

    def __len__(self):
        return len(self.ids)

    def image_path(self, index):
        folder, suffix = self.image_file
        return os.path.join(folder, self.ids[index] + suffix)

    def image(self, index):
        """uint8 3×H×W. Raises UserError for a file that cannot be read."""
        return read_image(self.image_path(index))

    def __getitem__(self, index):  # a dataset of images, for read_ahead
        return self.image(index)

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

    def label_paths(self, index):
        """[(path, table)] of all places where the label may be. Opens nothing."""
        name = self.ids[index] if self.image_file[1] else os.path.splitext(self.ids[index])[0]
        return [(os.path.join(folder, name + suffix), table)
                for folder, suffix, table in self.label_files]

    def label_path(self, index):
        """(path, table) of the label, or None if there is none. Opens nothing."""
        return next((found for found in self.label_paths(index) if os.path.exists(found[0])), None)

    @functools.cached_property
    def has_labels(self):
        """Whether this split can be evaluated. Looks whether the files exist, opens none.

        Raises UserError if some images have labels and others have not.
        """
        missing = [i for i in range(len(self)) if self.label_path(i) is None]
        if missing and len(missing) < len(self):
            raise UserError(f"{len(missing)} of {len(self)} labels of {self.name} {self.split} are "
                            f"missing, the first {self.label_paths(missing[0])[-1][0]}; "
                            "see README, Data sets")
        return not missing

    def label(self, index):
        """int64 H×W, values 0…C-1 and VOID. Opens the label file.

        Raises UserError for a missing or unreadable file, an id that the data set does not have,
        and a size other than the image's.
        """
        found = self.label_path(index)
        if found is None:
            expected = " or ".join(path for path, _ in self.label_paths(index))
            raise UserError(f"no label for image {self.ids[index]} of {self.name}; expected "
                            f"{expected or 'none: this data set has no labels'}; "
                            "see README, Data sets")
        path, table = found
        raw = self._read_map("label", path, index)
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
        raw = self._read_map("instance mask", path, index)
        return raw.masked_fill(raw == VOID, 0)

    def _read_map(self, what, path, index):
        """What `read_label` gives, of the size of image(index), and turned as EXIF turns that.

        A map that fits the picture as it is stored was drawn on that; one's own may have been drawn
        on the turned one, and where both have the same size nobody can tell. Raises UserError.
        """
        raw, (stored, orientation) = read_label(path), image_header(self.image_path(index))
        (h, w), (height, width) = raw.shape, stored if orientation < 5 else stored[::-1]
        if orientation > 1 and (height, width) == stored and self.name == "folder":
            raise UserError(f"{what} {path}: its image is turned by EXIF (orientation "
                            f"{orientation}), and it may be drawn on the turned one or not; save "
                            "the image without EXIF")
        if (h, w) == stored:
            return turn(raw, orientation)
        if (h, w) != (height, width):
            raise UserError(f"{what} {path} is {w}×{h} pixels, its image {width}×{height}")
        return raw


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
    of the labels ID.png, if there are some; offset: 0, or 1 where class k is stored as k+1 and 0
    counts for nothing. Raises UserError for a tree that is missing or not as expected, or that has
    no images.
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
        ids, present = _read_list(place / listed), set(os.listdir(place / images))
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
        labels = Path(labels).expanduser()
        if not labels.is_dir():
            raise UserError(f"no folder {labels}; --labels is the folder of ID.png for each ID")
        if offset and len(classes) == VOID:
            raise UserError(f"--labels-offset 1: 8-bit labels hold {VOID - 1} classes then")
        inside = os.path.realpath(labels) + os.sep  # labels among the photographs are none
        ids = [i for i in ids if not (i.lower().endswith(".png") and
                                      os.path.realpath(root / i).startswith(inside))]
        table = (shifted_ids if offset else train_ids)(len(classes))
        label_files = [(labels, ".png", table)]
    if not ids:
        raise UserError(f"no images of folder {split} in {root}; expected {', '.join(PHOTOS)}; "
                        "see README, Data sets")
    return SegmentationData("folder", split, classes, ids, (root, ""), label_files)


def _read_list(path):
    """The ids in a split file: the first word of each line."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise UserError(f"cannot read the list of images {path}: {reason}; "
                        "see README, Data sets") from None
    ids = [line.split()[0] for line in lines if line.strip()]
    repeated = [i for i, n in collections.Counter(ids).items() if n > 1]
    if repeated:
        raise UserError(f"{path} lists {repeated[0]} twice")
    return ids


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
# 4. Views: what the networks see of an image

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


def draw_colours():
    """A random change of brightness, contrast, saturation and hue, each with probability ½.

    Returns the numbers for `photometric_distortion`, in the order in which it applies them:
    brightness adds up to ±32 levels; "contrast" multiplies all values by 0.5–1.5, and comes either
    before or after the other colour steps; saturation 0.5–1.5 blends with grey (the authors scale
    the S of HSV); hue turns by up to 18 of 180. Draws from torch's global generator.
    """

    def coin():
        return torch.rand(()).item() < 0.5

    def uniform(wanted, low, high, otherwise):
        return torch.empty(()).uniform_(low, high).item() if wanted else otherwise

    contrast_first, contrast = coin(), coin()
    return [uniform(coin(), -32, 32, 0.0), uniform(contrast and contrast_first, 0.5, 1.5, 1.0),
            uniform(coin(), 0.5, 1.5, 1.0), uniform(coin(), -0.1, 0.1, 0.0),
            uniform(contrast and not contrast_first, 0.5, 1.5, 1.0)]


def photometric_distortion(images, colours):
    """Change the colours of a batch of images, each as `draw_colours` says, on their device.

    images: uint8 B×3×H×W; colours: float32 B×5. Returns uint8 B×3×H×W. Padding is changed too;
    `normalise` makes it zero.
    """
    brightness, contrast, saturation, hue, last = colours.T[..., None, None, None]  # each B×1×1×1
    images = levels(images + brightness)
    images = levels(images * contrast)
    images = levels(images * saturation + to_grey(images)[:, None] * (1 - saturation))
    images = torch.where(hue == 0, images, change_hue(images, hue))
    return levels(images * last)


def levels(images):
    """Any numbers as levels of brightness: whole, 0 to 255, uint8."""
    return images.clamp(0, 255).to(torch.uint8)


def change_hue(images, share):
    """Turn the hue by a share of the full circle, in HSV: uint8 B×3×H×W, B×1×1×1 → same."""
    rgb = images / 255
    low, v = rgb.amin(1, keepdim=True), rgb.amax(1, keepdim=True)
    chroma = v - low
    red, green, blue = ((v - rgb) / chroma.masked_fill(chroma == 0, 1)).split(1, 1)
    h = torch.where(v == rgb[:, :1], blue - green,
                    torch.where(v == rgb[:, 1:2], 2 + red - blue, 4 + green - red)) + 6 * share
    # A channel is v where its own hue is near, v less the chroma where it is far.
    places = torch.arange(5, 0, -2, device=h.device)[:, None, None]  # of red, green, blue
    way = (h + places).remainder(6)
    return levels(255.999 * (v - chroma * torch.minimum(way, 4 - way).clamp(0, 1)))


def training_view(image, scale, crop, ratio=(0.5, 2.0)):
    """A random square of an image: resized, cropped, flipped, padded.

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
    height, width = image.shape[-2:]
    return F.pad(image, (0, crop - width, 0, crop - height)), (height, width)


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


class TrainingViews(torch.utils.data.Dataset):
    """Training views of a SegmentationData, never its labels; indexed by (epoch, index).

    An item is a dict: view uint8 3×crop×crop, size int64 (h, w), index int, and with `distort`
    colours float32 5, for `photometric_distortion` of whole batches, on a GPU if there is one. It
    depends on (seed, epoch, id of the image) alone: not on workers, processes or interruptions.
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
            view, size = training_view(image, self.scale, self.crop, self.ratio)
            colours = dict(colours=torch.tensor(draw_colours())) if self.distort else {}
        return dict(view=view, size=torch.tensor(size), index=index, **colours)


# ------------------------------------------------------------------------------------------------
# 5. Getting the data: downloads, and the conversion of Pascal Context

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
ELSEWHERE["stuff171"] = ELSEWHERE["stuff"]


def download(name, root):
    """Fetch and unpack a data set into root: voc (2 GB) and ade (1 GB). Raises UserError.

    Over https, and unpacked only if the hash is right; nothing to do where the tree is there.
    """
    if name not in DOWNLOADS:
        raise UserError(f"--download cannot fetch {name}; get it from {ELSEWHERE[name]}; see "
                        "README, Data sets" if name in ELSEWHERE else
                        f"there is nothing to download for --dataset {name}")
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
            from torchvision.datasets.utils import download_url  # takes seconds to import
            download_url(url, root, archive.name, digest)
        unpack(archive, root, tree)
    except (OSError, http.client.HTTPException, RuntimeError, tarfile.TarError) as error:
        raise UserError(f"downloading {name} into {root} failed: {error}; try again, or fetch it "
                        "by hand: see README, Data sets") from None


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
    tree = _find_tree("context", root, TREES["context"].places, "JPEGImages")
    mat_dir = Path(mat_dir).expanduser()
    ids = list_folder(mat_dir, ".mat")
    if not ids:
        raise UserError(f"no .mat files in {mat_dir}; expected ID.mat from Pascal Context's "
                        "trainval; see README, Data sets")
    table = np.zeros(460, dtype=np.uint8)
    table[CONTEXT_IDS] = np.arange(60)
    out = tree / "SegmentationClassContext"
    for n, i in enumerate(ids, 1):
        target, path = out / f"{Path(i).name}.png", mat_dir / f"{i}.mat"
        if not target.exists():
            labels = read_mat_v5(path).get("LabelMap")
            if labels is None or labels.ndim != 2:
                raise UserError(f"{path} has no matrix LabelMap; is it from Pascal Context?")
            if labels.size == 0 or not (labels.min() >= 0 and labels.max() <= 459):
                raise UserError(f"{path}: LabelMap has ids outside 0–459")
            out.mkdir(exist_ok=True)
            save_picture(Image.fromarray(table[labels.astype(np.int64)]), target)
        if n % 500 == 0 or n == len(ids):
            print(f"converted {n} of {len(ids)}", flush=True)
    labelled = {Path(i).name for i in ids}
    for split in ("train", "val"):
        source = tree / "ImageSets" / "Main" / f"{split}.txt"
        target = tree / TREES["context"].lists.format(split)
        if target.exists():
            continue
        if not source.exists():
            raise UserError(f"the labels are converted, but there is no list {target}, and no "
                            f"{source} to make it from; see README, Data sets")
        target.parent.mkdir(parents=True, exist_ok=True)
        listed = [i for i in _read_list(source) if i in labelled]
        write_text(target, "".join(f"{i}\n" for i in listed))
        print(f"wrote {target}: {len(listed)} images")


# ------------------------------------------------------------------------------------------------
# 6. The command: what is in a data set?


def evenly(count, limit):
    """At most `limit` of the indices 0…count-1, evenly spaced."""
    return [i * count // min(count, limit) for i in range(min(count, limit))]


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
    parser = Parser(description="Show what a data set holds; fetch or convert it first, if asked "
                                "to. This command opens ground truth; training does not.")
    flag = parser.add_argument
    flag("--dataset", metavar="NAME", default="shapes", help=", ".join(DATASETS))
    flag("--data-root", type=path, metavar="DIR", help="the folder that holds the data set")
    flag("--train-split", metavar="NAME", default="train", help="train, of voc also trainaug")
    flag("--classes", metavar="NAMES", help="for folder: \"cat, dog\", or a file")
    flag("--labels", type=path, metavar="DIR", help="for folder: ID.png for each image ID")
    flag("--labels-offset", type=int, choices=(0, 1), default=0,
         help="1: in --labels 0 is background and class k is k+1")
    flag("--download", action="store_true", help="fetch voc or ade into --data-root")
    flag("--convert", type=path, metavar="DIR", help="for context: make PNGs of DIR/*.mat")
    flag("--limit", type=count, default=200, metavar="N",
         help="images per split whose sizes and labels are read (default 200)")
    flag("--seed", type=seed, default=0, help="for shapes")
    flag("--out", type=path, metavar="FILE", help="contact sheet (runs/data-DATASET.png)")
    args = parser.parse_args(argv)
    classes = None if args.classes is None else parse_classes(args.classes)
    if args.download:
        download(args.dataset, args.data_root)
    if args.convert:
        if args.dataset != "context":
            raise UserError("--convert goes with --dataset context")
        convert_context(args.convert, args.data_root)

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
