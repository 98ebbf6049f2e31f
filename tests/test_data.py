"""data.py: class names, files, every data set's tree and labels, views, answers kept on disk."""

import builtins
import itertools
import os
import shutil
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import data
from conftest import REAL, picture, raising, refuses, run, same, save
from data import VOID, UserError

H, W = 6, 8
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 1 << 16, (H, W)).astype(np.uint16)
LABEL = np.arange(H * W, dtype=np.uint8).reshape(H, W) % 3


def rows(*values):
    """A label map H×W whose row i holds values[i]; the last value fills the rest."""
    return np.repeat(np.array(values + values[-1:] * (H - len(values)))[:, None], W, axis=1)


def first_column(label):
    assert label.dtype == torch.int64 and (label == label[:, :1]).all()
    return label[:, 0].tolist()


def folder(path, classes="cat dog", **options):
    return data.open_dataset("folder", path, "val", classes.split(), **options)


def test_values_on_a_command_line():
    for kind, good, bad in (
            ("count", "1", "0"), ("natural", "0", "-1"), ("count", "7", "many"),
            ("share", "1", "1.1"), ("positive", "2", "inf"), ("seed_number", "-3", str(1 << 63))):
        parser = data.Parser()
        parser.add_argument("--n", type=getattr(data, kind))
        assert parser.parse_args(["--n", good]).n == float(good)
        refuses(f"--n.*{bad}.*expected", parser.parse_args, ["--n", bad])


@pytest.mark.parametrize("error, said", [
    (UserError("no image a\x1b[2J\nerror: b\udcff é.jpg"),
     "error: no image a\\x1b[2J error: b\\udcff é.jpg"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "--batch"),
    (MemoryError(), "out of memory"), (OSError(28, "No space left on device", "x.pt"), "x.pt"),
    (OSError("not a file's"), None), (RuntimeError("shapes cannot be multiplied"), None)])
def test_what_a_user_can_mend_is_one_line(error, said, capsys):
    end = refuses(None, data.clean_exit(raising(error)), error=SystemExit if said else type(error))
    err = capsys.readouterr().err
    assert err == "" if said is None else err.startswith("error: ") and err.count("\n") == 1
    assert said is None or said in err and end == "2"


def test_nothing_is_half_written(tmp_path, monkeypatch):
    data.write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "replace", raising(OSError(28, "No space left on device")))
    refuses("cannot write .*a: No space left", data.write_text, tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_names_and_ids_of_the_benchmarks():
    assert {name: len(set(names)) for name, names in data.CLASSES.items()} == dict(
        voc=20, context=59, ade=150, cityscapes=19, stuff=27, stuff171=171)
    assert (data.STUFF_IDS[182:255] == -1).all() and (data.STUFF_IDS[:182] >= 0).all()
    for raw, coarse, fine in (
            (0, "person", "person"), (8, "vehicle", "boat"), (9, "outdoor", "traffic light"),
            (89, "indoor", "toothbrush"), (105, "sky", "clouds"), (156, "sky", "sky-other"),
            (170, "wall", "wall-brick"), (181, "solid", "wood")):
        assert data.CLASSES["stuff"][data.STUFF_IDS[raw]] == coarse
        assert data.CLASSES["stuff171"][data.STUFF171_IDS[raw]] == fine
    assert [int(i) for i in data.CITYSCAPES_IDS if 0 <= i < VOID] == list(range(19))


@pytest.mark.parametrize("content, classes", [  # of a class file; or what is odd about it
    ("cat, dog,sofa  bed", ["cat", "dog", "sofa bed"]), ("\ufeffcat\n3d dog", ["cat", "3d dog"]),
    ("person, man,woman\ncat # a pet\n\n", ["person, man, woman", "cat"]), ("", "0 classes"),
    ("nc: 2\nnames: [cat,\n  'hot dog', \"men's hat\"]\n", ["cat", "hot dog", "men's hat"]),
    ("path: x\nnames:\n  0: cat\n  1: hot dog\nnc: 2", ["cat", "hot dog"]),
    ("names:\n- cat\n- 'hot dog'\nnc: 2", ["cat", "hot dog"]), ("1 cat\n2 dog", '"1 cat"'),
    ('["cat", "dog"]', ["cat", "dog"]), ("Pixel Value, Class\n0, background\n1, cat", '"0"'),
    ("Idx\tName\n1\twall", '"Idx.Name"'), ("64 128 64 cat\n192 0 128 dog", '"64 128 64 cat"'),
    ("names:\n  1: cat\n  5: dog", '"1: cat"'), ("__ignore__\ncat", '"__ignore__"'),
    ("person, man\nMan", '"man" is repeated'), ("cat\nperson, , man", '""'),
    ('["caf\\u00e9", "C# book"]', ["café", "C# book"]), (r"cat\ndog", "is no name"),
    ("cat,\ndog\x1b[2J", "is no name"), (",".join(map(str, range(256))), "256 classes")])
def test_class_files(tmp_path, content, classes):
    (tmp_path / "names.txt").write_text(content, "utf-8")
    if isinstance(classes, str):
        refuses(classes, data.parse_classes, str(tmp_path / "names.txt"))
        refuses("no file", data.parse_classes, str(tmp_path / "others.txt"))
    else:
        assert data.parse_classes(str(tmp_path / "names.txt")) == classes


TURNED = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.swapaxes(0, 1),
          6: RGB[::-1].swapaxes(0, 1), 7: RGB[::-1, ::-1].swapaxes(0, 1),
          8: RGB[:, ::-1].swapaxes(0, 1)}  # by EXIF orientation
EXIF = {orientation: Image.Exif() for orientation in TURNED}
for orientation, content in EXIF.items():
    content[0x0112] = orientation


def stored(path, pixels, mode=None, **options):
    """Write pixels as an image file, and read that: H×W×3."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    read = data.read_image(path)
    assert read.dtype == torch.uint8 and read.shape[0] == 3 and read.is_contiguous()
    return read.permute(1, 2, 0).numpy().astype(int)


def test_pictures_of_any_mode(tmp_path, recwarn):
    png, three = tmp_path / "x.png", lambda grey: np.stack([grey] * 3, -1)
    grey = np.array(Image.fromarray(RGB).convert("L"))
    for name in ("x.png", "x.bmp", "x.tif"):
        assert (stored(tmp_path / name, RGB) == RGB).all()
        assert (stored(tmp_path / name, RGB, "L") == three(grey)).all()
    for name in ("x.png", "x.tif"):
        assert (stored(tmp_path / name, GREY16) == three(GREY16 >> 8)).all()
    alpha = np.where(LABEL == 0, 0, 255).astype(np.uint8)
    on_white = np.where(alpha[..., None], RGB, 255)
    assert (stored(png, np.dstack([RGB, alpha])) == on_white).all()
    palette = Image.fromarray(RGB).quantize(4)
    shown, clear = np.array(palette.convert("RGB")), np.array(palette) == 1
    assert (stored(png, palette, transparency=1) == np.where(clear[..., None], 255, shown)).all()
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * (5 << 20), zip=True)
    assert (stored(png, RGB, pnginfo=text) == RGB).all() and not recwarn.list


@pytest.mark.parametrize("orientation", TURNED)
def test_photographs_are_turned(tmp_path, orientation):
    for path in (tmp_path / "x.tif", tmp_path / "x.png"):
        assert (stored(path, RGB, exif=EXIF[orientation]) == TURNED[orientation]).all()
    assert (data.read_image(path, turn=False).permute(1, 2, 0).numpy() == RGB).all()


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "x.tif"
    for mode, value in (("F", 0.5), ("I", -1), ("I", 1 << 20)):
        Image.new(mode, (W, H), value).save(path)
        refuses("x.tif: .*convert it", data.read_image, path)
    Image.new("I", (W, H), 200).save(path)
    assert (data.read_image(path) == 200).all()
    picture(tmp_path / "x.jpg")
    path.write_bytes((tmp_path / "x.jpg").read_bytes()[:-300])
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in {"x.tif": "", "gone.jpg": "No such file", "pipe.jpg": "no file"}.items():
        refuses(f"^cannot read image .*{name}: .*{reason}", data.read_image, tmp_path / name)
    refuses("label .*x.jpg: .*RGB", data.read_label, tmp_path / "x.jpg", tmp_path / "x.jpg")


def test_what_is_read_of_a_folder(tmp_path, capsys, monkeypatch):
    photos = tmp_path / "photos"
    for name in ("a.jpg", "b.JFIF", "album/e.png", ".hidden.jpg", "@eaDir/a.jpg"):
        save(photos / name, RGB)
    for name in ("1.heic", "2.HEIC", "a\x1b[2J.b\x1b"):
        (photos / name).write_text("x")
    save(tmp_path / "elsewhere/g.jpg", RGB)
    for link, target in {"linked": "../elsewhere", "album/loop": "..", "an-album": "album",
                         "lost.jpg": "nowhere.jpg"}.items():
        (photos / link).symlink_to(target)
    (photos / "closed").mkdir()
    error, scandir = PermissionError(13, "Permission denied", str(photos / "closed")), os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (
        raising(error) if Path(path).name == "closed" else scandir)(path))
    data.save_picture(Image.fromarray(RGB), photos / "sheet.png")
    for _ in range(2):
        assert folder(photos).ids == ["a.jpg", "album/e.png", "b.JFIF", "linked/g.jpg"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(photos) in said
    for part in ("@eaDir", "2 .heic", "1 .b\\x1b", "lost.jpg", "closed (Permission denied)",
                 "1 made by this program"):
        assert part in said


def voc_tree(root, lists, label=rows(0, 1, 20, 255)):
    """A tree with the images a and b; lists: {split: content of its list}."""
    tree = root / "VOCdevkit/VOC2012"
    (tree / "ImageSets/Segmentation").mkdir(parents=True)
    for split, content in lists.items():
        (tree / f"ImageSets/Segmentation/{split}.txt").write_bytes(content.encode())
    for i in "ab":
        save(tree / f"JPEGImages/{i}.jpg", RGB)
        save(tree / f"SegmentationClass/{i}.png", label, "P")
    return tree


def test_voc(tmp_path):
    paths = "".join(f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png\n" for i in "ba")
    tree = voc_tree(tmp_path, dict(val="\ufeffa\r\nb\r\n\r\n", trainaug=paths))
    for root in (tmp_path, tmp_path / "VOCdevkit", tree):
        voc = data.open_dataset("voc", root, "val")
        assert voc.ids == ["a", "b"] and voc.has_labels
        assert first_column(voc.label(1)) == [VOID, 0, 19, VOID, VOID, VOID]
    assert (voc.objects(0) == data.connected_regions(voc.label(0))).all()
    save(tree / "SegmentationObject/a.png", rows(0, 1, 2, 255))
    assert first_column(data.open_dataset("voc", root, "val").objects(0)) == [0, 1, 2, 0, 0, 0]
    save(tree / "SegmentationClassAug/b.png", rows(2))
    (tree / "SegmentationClass/b.png").unlink()
    aug = data.open_dataset("voc", tmp_path, "trainaug")
    assert aug.ids == ["b", "a"] and aug.has_labels and first_column(aug.label(0)) == [1] * H
    (tree / "JPEGImages/a.jpg").unlink()
    refuses("1 of the 2 images .*missing.*a.jpg", data.open_dataset, "voc", tmp_path, "val")
    refuses("train.txt", data.open_dataset, "voc", tmp_path, error=OSError)


CITY = "leftImg8bit/val/a/7_leftImg8bit.png"


@pytest.mark.parametrize("name, image, label, stored, expected", [
    ("ade", "images/validation/7.jpg", "annotations/validation/7.png", (0, 1, 150), [VOID, 0, 149]),
    ("cityscapes", CITY, "gtFine/val/a/7_gtFine_labelIds.png", (0, 7, 33), [VOID, 0, 18]),
    ("cityscapes", CITY, "gtFine/val/a/7_labelTrainIds.png", (255, 0, 18), [VOID, 0, 18]),
    ("stuff", "images/val2017/7.jpg", "annotations/val2017/7_27labelTrainIds.png", (255, 0, 26),
     [VOID, 0, 26]),
    ("stuff", "val2017/7.jpg", "annotations/val2017/7.PNG", (255, 0, 181), [VOID, 9, 24]),
    ("stuff171", "val2017/7.jpg", "stuffthingmaps/val2017/7.png", (255, 0, 181), [VOID, 0, 170]),
    ("stuff171", "val2017/7.jpg", "annotations/val2017/7_labelTrainIds.png", (255, 0, 170),
     [VOID, 0, 170])])
def test_other_trees(tmp_path, name, image, label, stored, expected):
    save(tmp_path / image, RGB)
    assert not data.open_dataset(name, tmp_path, "val").has_labels
    save(tmp_path / label, rows(*stored))
    one = data.open_dataset(name, tmp_path, "val")
    assert len(one) == 1 and one.has_labels and first_column(one.label(0))[:3] == expected
    shutil.copy(tmp_path / image, tmp_path / image.replace("/7", "/8"))
    refuses("1 of 2 labels .*8", lambda: data.open_dataset(name, tmp_path, "val").has_labels)
    (tmp_path / image).unlink()  # what is there fits none: a file that lies there is named
    refuses("1 of 1 .*8.*7", lambda: data.open_dataset(name, tmp_path, "val").has_labels)


@pytest.mark.parametrize("label", [
    "0.png", "0.PNG", "0.bmp", "0_mask.png", "0_Label.tif", "0_labels.png", "0_seg.gif",
    "0_gtFine_labelTrainIds.png", "0.jpg.png"])
def test_labels_of_usual_names(tmp_path, label):
    for name in ("0.jpg", unicodedata.normalize("NFD", "ü/é.png")):
        save(tmp_path / "photos" / name, RGB)
    save(tmp_path / "labels" / label, LABEL)
    save(tmp_path / "labels/ü" / label.replace("0", "é").replace("jpg", "png"), LABEL[::-1])
    one = folder(tmp_path / "photos", "cat dog sofa", labels=tmp_path / "labels")
    assert (one.label(0).numpy() == LABEL).all() and (one.label(1).numpy() == LABEL[::-1]).all()


def test_labels_that_do_not_fit(tmp_path):
    photos, labels = tmp_path / "photos", tmp_path / "labels"
    [save(photos / name, RGB) for name in ("a.jpg", "b.png")]
    opened = lambda *classes, **options: folder(photos, *classes, labels=labels, **options)
    refuses("no labels in .*labels", opened)
    save(labels / "other.jpg", RGB)
    refuses("2 of .*labels.a.png.*other.jpg", opened)
    save(labels / "a_mask.png", LABEL, "P")
    refuses("1 of .*b.png.*other.jpg", opened)
    save(labels / "b.png", LABEL)
    assert (opened("cat dog sofa").label(0).numpy() == LABEL).all()
    refuses("a_mask.png holds the id 2.*--labels-offset", opened().label, 0)
    two = opened(offset=1)
    assert (two.label(1).numpy() == np.where(LABEL == 0, 255, LABEL - 1.0)).all()
    save(labels / "b.png", LABEL[1:])
    refuses("b.png: 8×5 pixels, its image 8×6", two.label, 1)
    save(photos / "b_mask.png", LABEL)  # labels among photographs of the same ending
    save(photos / "a.png", LABEL)
    assert folder(photos, labels=photos).ids == ["a.jpg", "b.png"]


@pytest.mark.parametrize("drawn, orientation", [("stored", 6), ("turned", 6), ("turned", 3)])
def test_labels_turn_with_their_photographs(tmp_path, drawn, orientation):
    picture(tmp_path / "photos/a.png", (W, H), exif=EXIF[orientation])
    turned = LABEL[::-1].swapaxes(0, 1) if orientation == 6 else LABEL[::-1, ::-1]
    save(tmp_path / "labels/a.png", LABEL if drawn == "stored" else turned)
    one = folder(tmp_path / "photos", "cat dog sofa", labels=tmp_path / "labels")
    assert (one.label(0).numpy() == turned).all()


def real_views(**options):
    voc = data.open_dataset("voc", REAL, "train")
    return data.TrainingViews(voc, **{"scale": (90, 60), "crop": 64, "seed": 3, **options})


def test_views_are_what_the_recipe_says():
    """Drawn from the global generator, resized by torchvision, cut and padded by numpy."""
    from torchvision.transforms.v2 import functional as TF
    views = real_views()
    keys = [(epoch, i) for epoch in range(6) for i in range(len(views.data))]
    batch = views.batch(keys)
    for n, (epoch, i) in enumerate(keys):
        torch.manual_seed(data.draw_seed(3, epoch, views.data.ids[i], "view"))
        image = data.read_image(views.data.image_path(i))
        factor = torch.empty(()).uniform_(0.5, 2).item()
        shape = image.shape[1:]
        factor = min(int(90 * factor) / max(shape), int(60 * factor) / min(shape))
        size = [int(side * factor + 0.5) for side in shape]
        image = TF.resize(image, size, antialias=True).numpy()
        top, left = (int(torch.randint(max(side - 64, 0) + 1, ())) for side in size)
        cut = image[:, top:top + 64, left:left + 64]
        cut = cut[:, :, ::-1] if torch.rand(()) < 0.5 else cut
        h, w = batch["size"][n].tolist()
        assert (h, w) == cut.shape[1:] and (batch["view"][n, :, :h, :w].numpy() == cut).all()
        assert not batch["view"][n, :, h:].any() and not batch["view"][n, :, :, w:].any()
        assert batch["colours"][n].tolist() == torch.tensor(data.draw_colours()).tolist()
    assert batch["index"].tolist() == [i for _, i in keys]
    assert same(views.batch(keys[3:5]), {name: value[3:5] for name, value in batch.items()})
    assert "colours" not in real_views(distort=False).batch([(0, 0)])


def test_normalise_makes_padding_zero():
    images = torch.randint(0, 256, (2, 3, 8, 9), dtype=torch.uint8)
    kept = images.clone()
    out = data.normalise(images, data.CLIP_MEAN, data.CLIP_STD, torch.tensor([[8, 7], [5, 9]]))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.CLIP_MEAN, data.CLIP_STD))
    expected = (images / 255 - mean) / std
    expected[0, :, :, 7:], expected[1, :, 5:] = 0, 0
    assert torch.allclose(out, expected) and torch.equal(images, kept)


def test_colours():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([data.draw_colours(generator) for _ in range(400)])
    changed = drawn != torch.tensor([0.0, 1, 1, 0, 1])
    assert not (changed[:, 1] & changed[:, 4]).any()
    shares = torch.tensor([0.5, 0.25, 0.5, 0.5, 0.25])
    assert ((changed.float().mean(0) - shares).abs() < 0.08).all()
    for values, limits in ((drawn.amin(0), [-32, 0.5, 0.5, -0.1, 0.5]),
                           (drawn.amax(0), [32, 1.5, 1.5, 0.1, 1.5])):
        span = torch.tensor([64, 1, 1, 0.2, 1])
        assert ((values - torch.tensor(limits)).abs() < 0.05 * span).all()
    orange = torch.tensor([200, 100, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(3, -1, -1, -1)
    colours = torch.tensor([[0, 1.5, 0.5, 0, 1], [0, 1, 0.5, 0, 1.5], [-20, 1, 0.5, 0.5, 1]])
    results = data.photometric_distortion(orange, colours).flatten(1)
    expected = [[209, 157, 82], [238, 163, 88], [50, 100, 140]]  # by hand
    assert (results - torch.tensor(expected)).abs().max() <= 2


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_reading_ahead(workers):
    read, running = [], threading.active_count()

    def item(k):
        if k == 12:
            raise UserError("cannot read image x.jpg")
        read.append(k)
        assert not workers or torch.get_num_threads() == 1
        return [k]

    items = data.read_ahead(item, itertools.count(), workers)
    assert [next(items) for _ in range(12)] == [[k] for k in range(12)]
    assert len(read) <= 12 + 2 * workers
    refuses("x.jpg", next, items)
    items = data.read_ahead(item, range(9), workers)
    next(items)
    items.close()
    assert threading.active_count() == running


BLOCKS = [[0, 1, 2], [3], [4, 5, 6, 7], [8, 9]]
asked = []


def ask_ten(path, facts=0, block_by=lambda block: block, workers=2):
    """Records of ten items: k² twice."""

    def ask(block):
        asked.append(block_by(block))
        return dict(x=torch.tensor([[k * k] * 2 for k in block]), y=torch.tensor(block) > 4)

    asked.clear()
    fields = dict(x=("int16", (2,)), y=("bool", ()))
    return data.ask_once(path, "squares", dict(facts=facts), fields, BLOCKS, list, ask, workers)


def test_a_network_is_asked_once(tmp_path, monkeypatch):
    def interrupt(block):
        if 4 in block:
            raise KeyboardInterrupt
        return block

    refuses(None, ask_ten, tmp_path, block_by=interrupt, error=KeyboardInterrupt)
    records = ask_ten(tmp_path)
    rows = records.rows([9, 0, 4])
    assert rows["x"].tolist() == [[81, 81], [0, 0], [16, 16]] and rows["y"].tolist() == [1, 0, 0]
    assert asked == BLOCKS[2:]
    file, = tmp_path.iterdir()
    content = file.read_bytes()
    assert np.load(file)["x"][:, 0].tolist() == [k * k for k in range(10)]
    ask_ten(tmp_path, facts=1)
    assert len(list(tmp_path.iterdir())) == 2 and asked == BLOCKS
    for cut, left in ((-1, BLOCKS[3:]), (-30, BLOCKS[2:])):  # cut short
        file.write_bytes(content[:cut])
        ask_ten(tmp_path)
        assert asked == left and file.read_bytes() == content
    opened = builtins.open
    monkeypatch.setattr(builtins, "open", lambda path, mode="r", *args, **options: (
        raising(PermissionError(13, "Permission denied")) if set(mode) & set("wa+x") else opened
    )(path, mode, *args, **options))
    ask_ten(tmp_path)  # a colleague's, to read only
    assert not asked and opened(file, "rb").read() == content
    refuses("Permission denied", ask_ten, tmp_path, facts=2, error=PermissionError)


def test_cached_views_are_those_of_the_first_epochs(tmp_path):
    views = real_views()
    cached = data.cached_views(views, 3, tmp_path, "views", {}, dict(mean=("float32", (3,))),
                               lambda batch: dict(mean=batch["view"].float().mean((2, 3))), 2)
    keys = [(4, 1), (2, 0), (0, 1)]
    expected = views.batch([(1, 1), (2, 0), (0, 1)])["view"].float().mean((2, 3))
    assert same(cached.batch(keys), dict(index=torch.tensor([1, 0, 1]), mean=expected))


def test_the_command(tmp_path, capsys, monkeypatch):
    voc_tree(tmp_path / "voc", dict(train="a\nb", val="a"))
    out = tmp_path / "sheets/voc.png"
    run(data.main, "--dataset", "voc", "--data-root", tmp_path / "voc", "--out", out)
    said = capsys.readouterr().out
    assert "voc train: 2 images, 2 labels, 20 classes" in said and "voc val: 1 images" in said
    assert Image.open(out).mode == "RGB" and Image.open(out).width > 480
    monkeypatch.chdir(out.parent)
    picture("leftImg8bit/val/bonn/1_leftImg8bit.png")
    for _ in range(2):  # its own contact sheet is no photograph the second time
        run(data.main, "--dataset", "folder", "--data-root", ".", "--classes", "cat")
        assert "folder val: 1 images, no labels, 1 classes" in capsys.readouterr().out
    run(data.main, "--dataset", "cityscapes", "--data-root", ".")
    said = capsys.readouterr().out
    assert "no cityscapes" in said and "cityscapes val: 1 images, no labels" in said
