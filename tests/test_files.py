"""files.py and data.py: what users bring. Names, pictures, folders, labels, processes that read."""

import errno
import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import files
from conftest import REPOSITORY, python, raising, refuses, run, save
from data import UserError


@pytest.mark.parametrize("flag, text, said", [
    ("count", "0", "--n is 0; expected 1 or more"), ("natural", "-1", "--n is -1; expected 0 or"),
    ("count", "many", "--n is many; expected 1 or more"), ("share", "2", "--n is 2.0; expected 0"),
    ("share", "nan", "--n is nan; expected 0 to 1"), ("positive", "inf", "--n is inf; expected"),
    ("positive", "0", "--n is 0.0; expected more than 0"),
    ("seed", str(1 << 63), f"--n is {1 << 63}; expected an integer of 64 bits"),
    ("path", None, "argument --n: expected one argument")])
def test_values_on_a_command_line(flag, text, said):
    parser = data.Parser()
    parser.add_argument("--n", type=getattr(data, flag))
    refuses(f"^{re.escape(said)}", parser.parse_args, ["--n"] + ([text] if text else []))


def test_good_values_on_a_command_line(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    parser = data.Parser()
    for name in ("count", "natural", "share", "positive", "seed", "path"):
        parser.add_argument(f"--{name}", type=getattr(data, name))
    args = parser.parse_args("--count 1 --natural 0 --share 1 --positive 1e-9 --seed -3 "
                             "--path ~/x".split())
    assert vars(args) == dict(count=1, natural=0, share=1.0, positive=1e-9, seed=-3,
                              path=data.Path("/home/somebody/x"))


def test_names_are_printed_escaped(capsys):
    name = "a\x1b[2J\nerror: b\udcff é.jpg"
    assert data.printable(name) == "a\\x1b[2J\\nerror: b\\udcff é.jpg"
    refuses("^2$", data.clean_exit(raising(UserError(f"no image {name}"))), error=SystemExit)
    assert capsys.readouterr().err == f"error: no image {data.printable(name)}\n"


def test_fingerprints_of_strings_bytes_and_tensors():
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert data.fingerprint("abc") == "ba7816bf8f01cfea" == data.fingerprint(b"a", "bc")
    assert data.fingerprint(value.T) == data.fingerprint(value.T.contiguous().numpy().tobytes())


class Numbers(torch.utils.data.Dataset):
    """Item k: a nest of tensors; some items raise, kill their process, or cannot be sent."""

    def __getitem__(self, k):
        if k == "mistake":
            raise UserError("cannot read image x.jpg")
        if k == "disk":
            raise OSError(errno.EIO, "Input/output error", "x.jpg")
        if k == "death":
            os._exit(1)
        if k == "odd":
            return lambda: 0
        return {"x": torch.full((2, 3), k), "rest": (torch.tensor(True), [k, "text"])}


def test_reading_ahead_gives_the_same_items_in_order():
    for workers in (0, 2):
        items = list(data.read_ahead(Numbers(), iter([3, 1, [4, 1]]), workers))
        assert items[0]["rest"][0].dtype == torch.bool and items[0]["rest"][1] == [3, "text"]
        assert [item["x"].tolist() for item in items[:2]] == [[[3] * 3] * 2, [[1] * 3] * 2]
        assert items[2]["x"].shape == (2, 2, 3) and items[2]["x"][:, 0, 0].tolist() == [4, 1]
        items[0]["x"] += 1  # may be written to
        lists = list(data.read_ahead(Numbers(), [[1, 2]], workers, list))
        assert [item["x"][0, 0].item() for item in lists[0]] == [1, 2]


@pytest.mark.parametrize("key, said", [
    ("mistake", "error: cannot read image x.jpg"),
    ("disk", "error: cannot use x.jpg: Input/output error"),
    ("death", "error: a process that reads images has died")])
def test_what_goes_wrong_in_a_worker_is_one_line(key, said, capsys):
    read = data.clean_exit(lambda: list(data.read_ahead(Numbers(), [1, key, 2, 3, 4, 5], 1)))
    refuses("^2$", read, error=SystemExit)
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


def test_what_cannot_be_sent_ends_too():
    refuses("pickle", list, data.read_ahead(Numbers(), ["odd"], 1), error=Exception)


def test_no_room_for_processes_is_one_line(monkeypatch):
    full = raising(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", full)
    refuses("shared memory.*--workers 0", list, data.read_ahead(Numbers(), [1], 1))


def test_a_closed_pipe_ends_nothing(tmp_path):
    code = ("import sys, data\n@data.clean_exit\ndef main():\n"
            "    for n in range(9999):\n        print('line', n, flush=True)\n"
            f"    open({str(tmp_path / 'end')!r}, 'w')\nmain()\n")
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, cwd=REPOSITORY)
    command.stdout.read(1)
    command.stdout.close()
    assert command.stderr.read() == b""
    assert command.wait() == 0
    assert (tmp_path / "end").exists()


RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 1 << 16, (6, 8)).astype(np.uint16)
LABEL = np.arange(48, dtype=np.uint8).reshape(6, 8) % 3
on_three = lambda grey: np.stack([grey.astype(np.uint8)] * 3, -1)


def png(pixels, *chunks, behind=()):
    """A PNG of 8 or 16 bits, grey or RGB, with further chunks (kind, content) around the pixels."""
    chunk = lambda kind, body: (struct.pack(">I", len(body)) + kind + body
                                + struct.pack(">I", zlib.crc32(kind + body)))
    bits, colour = 8 * pixels.dtype.itemsize, 2 if pixels.ndim > 2 else 0
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", *pixels.shape[1::-1], bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), *behind, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(pixels, photometric=1, sample=1, orientation=1):
    """A TIFF of one channel, or of three of 8 bits."""
    channels = 1 if pixels.ndim == 2 else 3
    tags = {256: pixels.shape[1], 257: pixels.shape[0], 258: 8 * pixels.dtype.itemsize, 259: 1,
            262: photometric, 273: 8, 274: orientation, 277: channels, 278: pixels.shape[0],
            279: pixels.nbytes, 339: sample}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    if channels == 3:  # three values of two bytes do not fit in the entry
        entries = entries.replace(struct.pack("<HHII", 258, 4, 1, 8),
                                  struct.pack("<HHII", 258, 3, 3, 8 + pixels.nbytes + 6 + 12 * 11))
    return (b"II*\0" + struct.pack("<I", 8 + pixels.nbytes) + pixels.tobytes()
            + struct.pack("<H", len(tags)) + entries + bytes(4) + struct.pack("<HHH", 8, 8, 8))


def exif(orientation):
    content = Image.Exif()
    content[0x0112] = orientation
    return b"eXIf", content.tobytes()[6:]  # a chunk of a PNG, without "Exif\0\0"


TURNED = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.swapaxes(0, 1),
          6: RGB[::-1].swapaxes(0, 1), 7: RGB[::-1, ::-1].swapaxes(0, 1),
          8: RGB[:, ::-1].swapaxes(0, 1)}  # by EXIF orientation
LONG_TEXT = zlib.compress(b"x" * (5 << 20))
TEXT = (b"zTXt", b"Comment\0\0" + LONG_TEXT)
RGB48 = RGB.astype(np.uint16) * 256 + 7
CLEAR = (b"tRNS", struct.pack(">HHH", *RGB48[2, 3]))  # pixels of this colour are transparent
ONE_CLEAR = np.where((RGB == RGB[2, 3]).all(-1, keepdims=True), 255, RGB)
PICTURES = {
    "text.png": (png(RGB, TEXT), RGB),
    "xmp.png": (png(RGB, (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG_TEXT)), RGB),
    "profile.png": (png(RGB, (b"iCCP", b"ICC\0\0" + LONG_TEXT)), RGB),
    "white-is-zero.tif": (tiff(GREY16, 0), on_three(255 - (GREY16 >> 8))),
    "black-is-zero.tif": (tiff(GREY16), on_three(GREY16 >> 8)),
    "signed.tif": (tiff((GREY16 >> 1).astype(np.int16), sample=2), on_three(GREY16 >> 8)),
    "clear16.png": (png(GREY16, (b"tRNS", struct.pack(">H", GREY16[1, 2]))), on_three(
        np.where(GREY16 == GREY16[1, 2], 255, GREY16 >> 8))),
    "clear48.png": (png(RGB48, CLEAR), ONE_CLEAR), "48.png": (png(RGB48), RGB),
    "clear48-text.png": (png(RGB48, TEXT, CLEAR), ONE_CLEAR),
    **{f"{k}.tif": (tiff(RGB, 2, orientation=k), turned) for k, turned in TURNED.items()},
    **{f"{k}.png": (png(RGB, exif(k)), turned) for k, turned in TURNED.items()},
    **{f"{k}-behind.png": (png(RGB, behind=[exif(k)]), turned) for k, turned in TURNED.items()},
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_are_seldom_met(tmp_path, name, recwarn):
    content, expected = PICTURES[name]
    (tmp_path / name).write_bytes(content)
    assert np.array_equal(data.read_image(tmp_path / name).permute(1, 2, 0).numpy(), expected)
    assert data.image_size(tmp_path / name) == expected.shape[:2] and not recwarn.list


@pytest.mark.parametrize("content, said", [
    (tiff((GREY16 - 40000).astype(np.int16), sample=2), "has values below 0; convert it to 8"),
    (tiff(GREY16.astype(np.int32) << 8, sample=2), "has 32 bits a pixel; convert it to 8 or 16")])
def test_pictures_that_are_refused(tmp_path, content, said):
    (tmp_path / "x.tif").write_bytes(content)
    refuses(f"x.tif {said}", data.read_image, tmp_path / "x.tif")


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    refuses("x.jpg: it is no file", data.read_image, tmp_path / "x.jpg")


def test_what_is_read_of_a_folder(tmp_path, capsys, monkeypatch):
    for name in ("a.jpg", "b.JFIF", "c.jpe", "d.JPEG", "album/e.png", ".hidden.jpg", ".git/f.jpg"):
        save(tmp_path / "photos" / name, RGB)
    for name in ("1.heic", "2.HEIC", "3.gif", "a\x1b[2J.b\x1b", "notes.txt", "photo"):
        (tmp_path / "photos" / name).write_text("x")
    save(tmp_path / "elsewhere/g.jpg", RGB)
    for link, target in {"linked": "../elsewhere", "album/loop": "..", "an-album": "album"}.items():
        (tmp_path / "photos" / link).symlink_to(target)
    closed = tmp_path / "photos/closed"
    closed.mkdir()
    error, scandir = PermissionError(errno.EACCES, "Permission denied", str(closed)), os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (
        raising(error) if str(path) == str(closed) else scandir)(path))
    for _ in range(2):
        data.say_once.cache_clear()
        ids = data.open_dataset("folder", tmp_path / "photos", classes=["cat"]).ids
        assert ids == ["a.jpg", "album/e.png", "b.JFIF", "c.jpe", "d.JPEG", "linked/g.jpg"]
        data.open_dataset("folder", tmp_path / "photos", "val", classes=["cat"])
        assert capsys.readouterr().out == (
            f"left out: 1 .b\\x1b, 1 .gif, 1 without an ending, 2 .heic, folder {closed} "
            f"(Permission denied), in {tmp_path}/photos\n")


def test_what_we_made_is_no_photograph(tmp_path, capsys):
    save(tmp_path / "a.jpg", RGB)
    command = (data.main, "--dataset", "folder", "--data-root", tmp_path, "--classes", "cat",
               "--out", tmp_path / "sheet.png")
    run(*command)
    (tmp_path / "sheet.png").rename(tmp_path / "renamed.png")
    mask = Image.fromarray(RGB[..., 0]).convert("P")
    data.save_picture(mask, tmp_path / "mask.png")
    run(*command)
    assert "folder: 1 images" in capsys.readouterr().out
    run(*command)
    said = capsys.readouterr().out
    assert "folder: 1 images" in said and said.count("left out: 3 made by this program") == 1
    assert np.array_equal(data.read_label(tmp_path / "mask.png").numpy(), np.asarray(mask))


def test_a_tree_with_links_and_a_list_with_a_byte_order_mark(tmp_path):
    save(tmp_path / "disk/bonn_1_leftImg8bit.png", RGB)
    (tmp_path / "leftImg8bit/val").mkdir(parents=True)
    (tmp_path / "leftImg8bit/val/bonn").symlink_to(tmp_path / "disk")
    assert data.open_dataset("cityscapes", tmp_path, "val").ids == ["bonn/bonn_1"]
    tree = tmp_path / "VOC2012"
    save(tree / "JPEGImages/a.jpg", RGB)
    (tree / "ImageSets/Segmentation").mkdir(parents=True)
    (tree / "ImageSets/Segmentation/val.txt").write_bytes(b"\xef\xbb\xbfa\r\n")
    assert data.open_dataset("voc", tmp_path, "val").ids == ["a"]


@pytest.mark.parametrize("content, classes", [
    ("cat, dog,sofa  bed", ["cat", "dog", "sofa bed"]), ("\ufeffcat\ndog", ["cat", "dog"]),
    ("person, man,woman\ncat # a pet\n\n", ["person, man, woman", "cat"]), ("# one\ncat", ["cat"]),
    ("person, man\nman", 'class name "man" is repeated in the file'),
    ("person, man, MAN\ncat", 'class name "MAN" is repeated'), ("cat,", "class name 2 is empty"),
    ("cat\nperson, , man", "a name of class 2 is empty"), ("cat\nperson,", "a name of class 2 is")])
def test_class_files(tmp_path, content, classes):
    (tmp_path / "names.csv").write_text(content, "utf-8")
    if isinstance(classes, str):
        refuses(classes, data.parse_classes, str(tmp_path / "names.csv"))
        return
    assert data.parse_classes(str(tmp_path / "names.csv")) == classes
    assert [data.called(c) for c in classes] == [c.split(",")[0] for c in classes]
    assert data.names_of("person, man, woman") == ["person", "man", "woman"]


@pytest.mark.parametrize("text", ["classes.csv", "~/names", "lists/pets", "pets.TXT", "a, b.txt"])
def test_a_class_file_that_is_not_there(text):
    refuses("no file .*--classes takes names", data.parse_classes, text)
    assert data.parse_classes("st. bernard") == ["st. bernard"]
    assert data.parse_classes("../../x, a/b") == ["../../x", "a/b"]


def test_no_two_names_look_the_same():
    names = ("Kase Käse Köse Kåse Kâse Kãse Kàse Káse Kašse Kaçse 猫 犬 кот ß é e É ё 각 ø o 🐈 "
             "naïve naive").split()
    drawn = lambda name: data.legend([(name, torch.tensor([1, 2, 3]))], 400).tobytes()
    assert len(set(map(drawn, names))) == len(names)
    assert files.spelled("Käse 猫 각") == "Ka\u0308se \\u732b \\uac01"
    assert drawn("Käse") == drawn("Ka\u0308se")  # however the same name is written


@pytest.mark.parametrize("orientation, drawn", [(6, "stored"), (6, "turned"), (3, "stored"),
                                                (8, "stored"), (1, "stored")])
def test_labels_turn_with_their_photographs(tmp_path, orientation, drawn):
    tree = tmp_path / "VOC2012"
    for folder in ("ImageSets/Segmentation", "JPEGImages"):
        (tree / folder).mkdir(parents=True)
    (tree / "ImageSets/Segmentation/val.txt").write_text("a")
    turned = data.turn(torch.from_numpy(LABEL), orientation).contiguous().numpy()
    for folder in ("SegmentationClass", "SegmentationObject"):
        save(tree / folder / "a.png", LABEL if drawn == "stored" else turned)
    Image.fromarray(RGB).save(tree / "JPEGImages/a.jpg", exif=b"Exif\0\0" + exif(orientation)[1])
    voc = data.open_dataset("voc", tmp_path, "val")
    assert np.array_equal(voc.objects(0).numpy(), turned)
    assert np.array_equal(voc.label(0).numpy(), np.where(turned == 0, 255, turned - 1))
    assert voc.image(0).shape[1:] == voc.label(0).shape == voc.size(0)


def test_labels_of_ones_own(tmp_path):
    photos, labels = tmp_path / "photos", tmp_path / "photos/labels"
    for name, mode in {"a.jpg": "P", "album/b.jpeg": None}.items():
        save(photos / name, RGB)
        save((labels / name).with_suffix(".png"), LABEL, mode)
    opened = lambda classes, **options: data.open_dataset(
        "folder", photos, "val", classes.split(), **{"labels": labels, **options})
    three = opened("cat dog sofa")
    assert three.ids == ["a.jpg", "album/b.jpeg"] and three.has_labels
    assert all(np.array_equal(three.label(i).numpy(), LABEL) for i in range(2))
    two = opened("cat dog", offset=1)
    assert np.array_equal(two.label(1).numpy(), np.where(LABEL == 0, 255, LABEL - 1))
    refuses(r"a.png holds the id 2, which folder \(2 classes\) does", opened("cat dog").label, 0)
    refuses("no folder .*nowhere; --labels is", opened, "cat dog", labels=tmp_path / "nowhere")
    refuses("--labels goes with --dataset folder", data.open_dataset, "voc", photos, labels=labels)
    Image.fromarray(RGB).save(photos / "a.jpg", exif=b"Exif\0\0" + exif(3)[1])
    refuses("a.png: its image is turned by EXIF", three.label, 0)
    (labels / "album/b.png").unlink()
    refuses("1 of 2 labels of folder val are missing, .*album/b.png",
            lambda: opened("cat dog").has_labels)


def test_trainaug_and_its_labels(tmp_path):
    tree = tmp_path / "VOC2012"
    (tree / "ImageSets/Segmentation").mkdir(parents=True)
    (tree / "ImageSets/Segmentation/trainaug.txt").write_text("a\nb\n")
    for name, folder in {"a": "SegmentationClass", "b": "SegmentationClassAug"}.items():
        save(tree / f"JPEGImages/{name}.jpg", RGB)
        save(tree / folder / f"{name}.png", LABEL)
    voc = data.open_dataset("voc", tmp_path, "trainaug")
    assert voc.ids == ["a", "b"] and voc.has_labels and torch.equal(voc.label(0), voc.label(1))
    refuses('no split "trainaug"; there are train and val', data.open_dataset, "ade", tmp_path,
            "trainaug")


def test_stuff_with_its_fine_classes(tmp_path):
    names = data.CLASSES["stuff171"]
    ids = [raw for raw in range(182) if data.STUFF171_IDS[raw] >= 0]
    assert len(names) == len(ids) == 171 and (data.STUFF171_IDS[list(data.STUFF_UNUSED)] < 0).all()
    for raw, name in {0: "person", 12: "stop sign", 79: "toaster", 89: "toothbrush", 91: "banner",
                      105: "clouds", 156: "sky-other", 170: "wall-brick", 181: "wood"}.items():
        assert names[data.STUFF171_IDS[raw]] == name
    save(tmp_path / "train2017/7.jpg", RGB)
    save(tmp_path / "stuffthingmaps/train2017/7.png", LABEL)
    stuff = data.open_dataset("stuff171", tmp_path, "train")
    assert stuff.classes == names and np.array_equal(stuff.label(0).numpy(), LABEL)


def test_colours_and_sizes_change_as_torchvision_changes_them():
    from torchvision.transforms.v2 import functional as TF

    torch.manual_seed(0)
    for k in range(12):
        image = torch.randint(0, 256, (3, 40 + k, 57)).to(torch.uint8)
        image = image // 64 * 64 if k % 3 == 0 else image  # many equal channels
        for factor in (0.5, 0.83, 1.5):
            share = (factor - 1) / 5
            for colours, theirs, most in (
                    ([0, factor, 1, 0, 1], TF.adjust_brightness(image, factor), 0),
                    ([0, 1, 1, 0, factor], TF.adjust_brightness(image, factor), 0),
                    ([0, 1, factor, 0, 1], TF.adjust_saturation(image, factor), 1),
                    ([0, 1, 1, share, 1], TF.adjust_hue(image, share), 1)):
                ours = data.photometric_distortion(image[None], torch.tensor([colours]))[0]
                wrong = (ours.int() - theirs.int()).abs()
                assert wrong.max() <= most and wrong.float().mean() < 5e-3
        small = data.resize_to_scale(image, (50, 30))
        assert torch.equal(small, TF.resize(image, list(small.shape[1:]), antialias=True))


def test_slow_imports_are_left_out():
    code = ("import clip, distill, sys; clip.load('shapes-tiny', device='cpu'); "
            "sys.exit(bool({'torchvision', 'torch._dynamo'} & sys.modules.keys()))")
    assert python("-c", code).returncode == 0
