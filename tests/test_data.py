"""data.py: class names, reading files, every data set's tree and labels, views, conversion."""

import contextlib
import hashlib
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import mat_file, normal, raising, refuses, run, same, save
from data import VOID

H, W = 6, 8


def photo(path, height=H, width=W, seed=0):
    save(path, np.random.default_rng(seed).integers(0, 256, (height, width, 3)))


def rows(*values):
    """A label map H×W whose row i holds values[i]; the last value fills the rest."""
    return np.repeat(np.array(values + values[-1:] * (H - len(values)))[:, None], W, axis=1)


def first_column(label):
    assert label.dtype == torch.int64 and label.shape == (H, W)
    assert (label == label[:, :1]).all()
    return label[:, 0].tolist()


def voc_tree(root, ids=("a", "b"), year="VOC2012", kind="", label=rows(0, 1, 20, 255)):
    tree = root / "VOCdevkit" / year
    lists = tree / f"ImageSets/Segmentation{kind}"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        (lists / f"{split}.txt").write_text("\n".join(ids) + "\n\n")
    for n, i in enumerate(ids):
        photo(tree / "JPEGImages" / f"{i}.jpg", seed=n)
        save(tree / f"SegmentationClass{kind}" / f"{i}.png", label, "P")
    return tree


def test_counts_of_names_and_templates():
    assert {name: len(names) for name, names in data.CLASSES.items()} == dict(
        voc=20, context=59, ade=150, cityscapes=19, stuff=27, stuff171=171)
    for names in data.CLASSES.values():
        assert len(set(names)) == len(names)
        assert all(name == " ".join(name.split()) and name.islower() for name in names)
    assert data.CLASSES["ade"][44] == "chest of drawers" and data.CLASSES["ade"][-1] == "flag"
    assert len(data.TEMPLATES) == len(set(data.TEMPLATES)) == 85
    assert all(t.count("{}") == 1 and t.endswith(".") and t == t.strip() for t in data.TEMPLATES)
    assert data.TEMPLATES[0] == "a bad photo of a {}."
    assert data.TEMPLATES[79:81] == ["a tattoo of the {}.", "there is a {} in the scene."]
    assert data.TEMPLATES[-1] == "this is one {} in the scene."


def test_ids_of_stuff_and_context():
    assert sorted(i for text in data.STUFF.values() for i in data._expand(text)) == list(range(182))
    assert len(data.CONTEXT_IDS) == 60 and data.CONTEXT_IDS == sorted(set(data.CONTEXT_IDS))
    assert (data.STUFF_IDS[182:255] == -1).all() and data.STUFF_IDS[255] == VOID
    for raw, name in {0: "person", 1: "vehicle", 8: "vehicle", 9: "outdoor", 90: "indoor",
                      152: "food stuff", 155: "furniture stuff", 156: "sky", 181: "solid",
                      114: "floor", 178: "water", 94: "building", 93: "plant"}.items():
        assert data.CLASSES["stuff"][data.STUFF_IDS[raw]] == name


def test_palettes():
    colours = data.palette(20)
    assert colours[:8].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128],
                                    [128, 0, 128], [0, 128, 128], [128, 128, 128], [64, 0, 0]]
    assert colours[19].tolist() == [0, 64, 128]
    assert len(set(map(tuple, data.palette(150).tolist())) - {(0, 0, 0)}) == 150
    assert len(data.CITYSCAPES_PALETTE) == 19
    assert torch.equal(data.dataset_palette("shapes", 12), data.palette(12))
    assert torch.equal(data.dataset_palette("shapes", 10), data.SHAPES_PALETTE)
    shown = data.visible(colours)  # on a grey picture: light greys are not
    assert (shown != colours).any(1).tolist() == [name == "car" for name in data.CLASSES["voc"]]
    assert len(set(map(tuple, shown.tolist()))) == 20
    assert torch.equal(data.visible(colours[6]), shown[6]) and shown[6].tolist() == [64, 255, 110]
    assert torch.equal(data.visible(data.SHAPES_PALETTE), data.SHAPES_PALETTE)


def test_parse_classes(tmp_path):
    assert data.parse_classes("cat, dog,  potted   plant") == ["cat", "dog", "potted plant"]
    path = tmp_path / "names.txt"
    path.write_text("# pets\ncat\n\ndog  # the second\nsofa, red\n")
    assert data.parse_classes(str(path)) == ["cat", "dog", "sofa, red"]
    refuses("256 classes", data.parse_classes, ",".join(map(str, range(256))))


def test_what_read_image_takes_and_refuses(tmp_path, monkeypatch):
    def stored(image, name="x.png", **options):
        image.save(tmp_path / name, **options)
        read = data.read_image(tmp_path / name)
        assert read.dtype == torch.uint8 and read.shape[0] == 3 and read.is_contiguous()
        assert data.image_size(tmp_path / name) == tuple(read.shape[1:])
        return read[:, 0, 0].tolist()

    new = lambda mode, colour: Image.new(mode, (W, H), colour)
    assert stored(new("RGB", (10, 20, 30))) == [10, 20, 30]
    assert stored(new("L", 77)) == [77, 77, 77]
    assert stored(new("1", 1)) == [255, 255, 255]
    palette = new("P", 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert stored(palette) == [200, 100, 50]
    assert stored(palette, transparency=1) == [255, 255, 255]
    assert stored(new("RGBA", (10, 20, 30, 255))) == [10, 20, 30]
    assert stored(new("RGBA", (10, 20, 30, 0))) == [255, 255, 255]
    assert stored(new("RGBA", (0, 100, 200, 128))) == pytest.approx([127, 177, 227], abs=1)
    assert stored(new("LA", (40, 0))) == [255, 255, 255]
    cyan = stored(new("CMYK", (255, 0, 0, 0)), "x.jpg", quality=100)
    assert cyan == pytest.approx([0, 255, 255], abs=3)
    for value, expected in {65535: 255, 0x8000: 128, 255: 0, 256: 1}.items():
        image = Image.fromarray(np.full((H, W), value, dtype=np.uint16))
        assert stored(image) == stored(image, "x.tif") == [expected] * 3
    refuses("x.tif holds floating-point pixels", stored, new("F", 0.5), "x.tif")
    refuses("x.tif has 32 bits a pixel", stored, new("I", 1 << 20), "x.tif")
    refuses("no image .*gone.jpg", data.read_image, tmp_path / "gone.jpg")
    monkeypatch.setattr(Image, "open", raising(PermissionError(13, "Permission denied")))
    refuses("cannot read image .*x.png: Permission denied$", data.read_image, tmp_path / "x.png")


def test_exif_orientation(tmp_path):
    pixels = np.zeros((H, W, 3), dtype=np.uint8)
    pixels[:, : W // 2] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: the left side becomes the top
    for name in ("turned.jpg", "turned.png"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        image = data.read_image(tmp_path / name)
        assert image.shape == (3, W, H) and data.image_size(tmp_path / name) == (W, H)
        assert (image[:, : W // 2] > 200).all() and (image[:, W // 2:] < 50).all()


def test_voc_and_context(tmp_path):
    tree = voc_tree(tmp_path)
    for root in (tmp_path, tmp_path / "VOCdevkit", tree):
        voc = data.open_dataset("voc", root, "val")
        assert voc.ids == ["a", "b"] and len(voc) == 2 and voc.has_labels
        assert voc.image(1).shape == (3, H, W)
        assert first_column(voc.label(0)) == [VOID, 0, 19, VOID, VOID, VOID]
    assert not torch.equal(voc.image(0), voc.image(1))
    voc_tree(tmp_path, year="VOC2010", kind="Context", label=rows(0, 1, 59))
    context = data.open_dataset("context", tmp_path, "train")
    assert first_column(context.label(0)) == [VOID, 0, 58, 58, 58, 58]


def test_ade(tmp_path):
    tree = tmp_path / "ADEChallengeData2016"
    for n, i in enumerate(("ADE_2", "ADE_1")):
        photo(tree / "images" / "validation" / f"{i}.jpg", seed=n)
        save(tree / "annotations" / "validation" / f"{i}.png", rows(0, 1, 150))
    for root in (tmp_path, tree):
        ade = data.open_dataset("ade", root, "val")
        assert ade.ids == ["ADE_1", "ADE_2"]
        assert first_column(ade.label(0)) == [VOID, 0, 149, 149, 149, 149]


def test_cityscapes_in_both_encodings(tmp_path):
    for i in ("bonn_1", "bonn_2"):
        photo(tmp_path / f"cityscapes/leftImg8bit/val/bonn/{i}_leftImg8bit.png")
    labels = tmp_path / "cityscapes/gtFine/val/bonn"
    save(labels / "bonn_1_gtFine_labelIds.png", rows(0, 7, 26, 33, 29, 10))
    save(labels / "bonn_2_gtFine_labelIds.png", rows(7))
    save(labels / "bonn_2_gtFine_labelTrainIds.png", rows(255, 0, 13, 18))  # goes first
    for root in (tmp_path, tmp_path / "cityscapes"):
        city = data.open_dataset("cityscapes", root, "val")
        assert city.ids == ["bonn/bonn_1", "bonn/bonn_2"] and city.has_labels
        assert first_column(city.label(0)) == [VOID, 0, 13, 18, VOID, VOID]
        assert first_column(city.label(1)) == [VOID, 0, 13, 18, 18, 18]
    assert city.palette is data.CITYSCAPES_PALETTE
    assert [int(i) for i in data.CITYSCAPES_IDS if 0 <= i < VOID] == list(range(19))


@pytest.mark.parametrize("images, label, raw, expected", [
    ("images", "annotations/val2017/7_27labelTrainIds.png", (255, 0, 26), [VOID, 0, 26]),
    ("images", "annotations/val2017/7.png", (255, 0, 181), [VOID, 9, 24]),
    ("images", "stuffthingmaps/val2017/7.png", (255, 0, 71), [VOID, 9, 0]),
    (".", "stuffthingmaps/val2017/7.png", (255, 0, 156), [VOID, 9, 23])])
def test_stuff_in_every_layout(tmp_path, images, label, raw, expected):
    photo(tmp_path / images / "val2017" / "7.jpg")
    if "27label" in label:
        save(tmp_path / "annotations/val2017/7.png", rows(0))  # the authors' labels go first
    save(tmp_path / label, rows(*raw))
    stuff = data.open_dataset("stuff", tmp_path, "val")
    assert stuff.ids == ["7"] and stuff.has_labels
    assert first_column(stuff.label(0))[:3] == expected


def test_folder(tmp_path):
    for name in ("b.JPG", "a.png", "b.png", "sub/a.png", ".hidden.png", ".cache/c.png"):
        photo(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    train, val = (data.open_dataset("folder", tmp_path, split, ["cat", "dog"])
                  for split in ("train", "val"))
    assert train.ids == val.ids == ["a.png", "b.JPG", "b.png", "sub/a.png"]
    assert not val.has_labels and val.classes == ["cat", "dog"]
    assert val.image(3).shape == (3, H, W)
    refuses("no label for image a.png of folder", val.label, 0)
    refuses('no split "test"', data.open_dataset, "folder", tmp_path, "test", ["cat"])


def test_trees_without_labels_open(tmp_path):
    labels = voc_tree(tmp_path) / "SegmentationClass"
    (labels / "b.png").unlink()
    voc = data.open_dataset("voc", tmp_path, "val")
    refuses(r"no label for image b .*SegmentationClass.b\.png", voc.label, 1)
    shutil.rmtree(labels)
    voc = data.open_dataset("voc", tmp_path, "val")
    assert not voc.has_labels and voc.image(0).shape == (3, H, W)


@pytest.mark.parametrize("height, width, scale, ratio, expected", [
    (375, 500, (2048, 336), 1.0, (336, 448)),     # release, VOC
    (375, 500, (520, 520), 1.0, (390, 520)),      # paper, Context: the long side is bounded
    (1024, 2048, (2048, 448), 1.0, (448, 896)),   # release, Cityscapes
    (1024, 2048, (1024, 512), 1.0, (512, 1024)),  # paper, Cityscapes
    (100, 1000, (2048, 512), 1.0, (205, 2048)),   # a panorama: 1000·2.048 long, 204.8 short
    (1000, 100, (512, 2048), 1.0, (2048, 205)),   # the order within the scale is immaterial
    (375, 500, (2048, 336), 0.5, (168, 224)),
    (375, 500, (2048, 336), 2.0, (672, 896)),
    (1, 900, (20, 10), 1.0, (1, 20))])            # never zero pixels
def test_resize_to_scale(height, width, scale, ratio, expected):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    assert tuple(data.resize_to_scale(image, scale, ratio).shape[1:]) == expected


def test_resize_to_scale_is_antialiased():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = data.resize_to_scale(stripes, (16, 16))
    assert small.dtype == torch.uint8 and (small.float() - 127.5).abs().max() < 20


def test_training_view_is_a_cut_of_the_image():
    torch.manual_seed(0)
    image = torch.arange(3 * 20 * 30).remainder(251).to(torch.uint8).view(3, 20, 30)
    cuts = image.unfold(1, 16, 1).unfold(2, 16, 1).flatten(1, 2)  # 3×75×16×16
    is_cut = lambda view: (cuts == view[:, None]).all(3).all(2).all(0).any().item()
    flips = 0
    for _ in range(20):  # ratio 1 and a scale of the image's own size: nothing is resized
        view, size = data.training_view(image, (30, 20), 16, (1.0, 1.0))
        assert size == (16, 16) and view.shape == (3, 16, 16)
        assert is_cut(view) or is_cut(view.flip(-1))
        flips += is_cut(view.flip(-1))
    assert 3 < flips < 17


def test_training_view_pads_and_normalise_makes_padding_zero():
    image = torch.full((3, 20, 30), 200, dtype=torch.uint8)
    view, size = data.training_view(image, (30, 20), 40, (1.0, 1.0))
    assert size == (20, 30) and view.shape == (3, 40, 40)
    images, sizes = torch.stack([view, view]), torch.tensor([[20, 30], [5, 40]])
    kept = images.clone()
    out = data.normalise(images, data.CLIP_MEAN, data.CLIP_STD, sizes)
    assert torch.equal(images, kept) and out.dtype == torch.float32
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.CLIP_MEAN, data.CLIP_STD))
    expected = (view / 255 - mean) / std
    for n, (height, width) in enumerate(sizes.tolist()):
        assert torch.allclose(out[n, :, :height, :width], expected[:, :height, :width])
        assert (out[n, :, height:] == 0).all() and (out[n, :, :, width:] == 0).all()
    assert torch.allclose(data.normalise(images, data.CLIP_MEAN, data.CLIP_STD)[0], expected)
    floats = torch.ones(1, 3, 2, 2)
    data.normalise(floats, data.CLIP_MEAN, data.CLIP_STD)
    assert (floats == 1).all()  # the argument is left alone


def drawn_colours(count):
    torch.manual_seed(0)
    return torch.tensor([data.draw_colours() for _ in range(count)])


def test_photometric_distortion():
    images = normal(64, 3, 12, 12).mul(300).clamp(0, 255).to(torch.uint8)
    colours = drawn_colours(64)
    results = data.photometric_distortion(images, colours)
    assert results.dtype == torch.uint8 and results.shape == images.shape
    for image, colour, result in zip(images, colours, results):
        assert torch.equal(data.photometric_distortion(image[None], colour[None])[0], result)
    assert 0 < (results == images).flatten(1).all(1).sum() < 20  # one in 16 is expected
    grey = torch.full((300, 3, 4, 4), 100, dtype=torch.uint8)
    levels = data.photometric_distortion(grey, drawn_colours(300)).float()
    assert levels.std(1).max() < 2  # grey stays grey: no step favours a channel
    assert levels.min() < 60 and levels.max() > 150  # both product and sum are at work
    assert levels.min() >= (100 - 32) * 0.5 - 2 and levels.max() <= (100 + 32) * 1.5 + 2


def test_the_order_of_colour_steps():
    changed = drawn_colours(400) != torch.tensor([0.0, 1, 1, 0, 1])
    assert not (changed[:, 1] & changed[:, 4]).any()
    shares = changed.float().mean(0)
    assert ((shares - torch.tensor([0.5, 0.25, 0.5, 0.5, 0.25])).abs() < 0.08).all()
    orange = torch.tensor([200, 100, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(3, -1, -1, -1)
    colours = torch.tensor([[0, 1.5, 0.5, 0, 1], [0, 1, 0.5, 0, 1.5], [-20, 1, 0.5, 0.5, 1]])
    results = data.photometric_distortion(orange, colours).flatten(1).tolist()
    assert results == [[209, 157, 82], [238, 163, 88], [50, 100, 140]]  # by hand


def test_training_views_depend_on_seed_epoch_and_id_alone(tmp_path):
    views = lambda seed=3: data.TrainingViews(data.open_dataset("voc", tmp_path, "train"),
                                              scale=(40, 24), crop=16, seed=seed)
    tree = voc_tree(tmp_path, ids=("a", "b", "c"))
    some = views()
    first = {(e, i): some[e, i] for e in range(2) for i in range(3)}
    state = torch.manual_seed(99).get_state()
    for key in reversed(first):
        assert same(some[key], first[key])
        assert first[key]["index"] == key[1]
    assert not torch.equal(first[0, 0]["colours"], first[1, 0]["colours"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[0, 0]["view"], first[1, 0]["view"])
    assert not torch.equal(first[0, 0]["view"], views(seed=4)[0, 0]["view"])
    (tree / "ImageSets/Segmentation/train.txt").write_text("c\na\n")  # another position
    assert torch.equal(views()[1, 0]["view"], first[1, 2]["view"])


def test_draw_seed():
    assert data.draw_seed(0, 1, "a", "view") == 5165717157452797070  # by sha256sum
    seeds = {data.draw_seed(s, e, i) for s in range(3) for e in range(3) for i in ("1", "2", 1)}
    assert len(seeds) == 27 and all(0 <= s < 1 << 63 for s in seeds)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("name", ["LabelMap", "x"])
def test_mat_round_trip(tmp_path, order, compressed, name):
    array = np.arange(35, dtype=np.uint16).reshape(5, 7) * 13
    for array in (array, (array // 13).astype(np.uint8), array[:1, :2]):  # narrow and tiny ones
        mat_file(tmp_path / "x.mat", name, array, order, compressed)
        (found, values), = data.read_mat_v5(tmp_path / "x.mat").items()
        assert found == name and values.dtype == np.uint16
        assert np.array_equal(values, array)


def test_mat_with_several_variables(tmp_path):
    one, other = (np.full((3, n), n, dtype=np.uint16) for n in (5, 6))
    for compressed in (True, False):
        mat_file(tmp_path / "x.mat", "one", one, compressed=compressed)
        first = (tmp_path / "x.mat").read_bytes()
        assert not compressed or len(first) % 8  # what follows is not aligned
        mat_file(tmp_path / "x.mat", "other", other, compressed=compressed)
        (tmp_path / "x.mat").write_bytes(first + (tmp_path / "x.mat").read_bytes()[128:])
        found = data.read_mat_v5(tmp_path / "x.mat")
        assert list(found) == ["one", "other"]
        assert np.array_equal(found["one"], one) and np.array_equal(found["other"], other)


def test_mat_skips_what_is_not_numeric_and_refuses_what_is_foreign(tmp_path):
    path = tmp_path / "x.mat"
    mat_file(path, "text", np.arange(600, dtype=np.uint16).reshape(20, 30), mat_class=4)
    assert data.read_mat_v5(path) == {}
    mat_file(path, "LabelMap", np.zeros((1 << 13, 1 << 13), dtype=np.uint8))  # a bomb
    refuses("cut short, or of more than 64 MiB", data.read_mat_v5, path)
    path.write_bytes(b"MATLAB 7.3".ljust(124) + b"\0\2IM" + bytes(64))
    refuses("not a MATLAB 5 file", data.read_mat_v5, path)
    refuses("no such file", data.read_mat_v5, tmp_path / "gone.mat")


@pytest.fixture
def context_tree(tmp_path):
    """Context's tree before the conversion of its two .mat files, and their folder."""
    tree, mats = tmp_path / "VOCdevkit" / "VOC2010", tmp_path / "trainval"
    for i in ("a", "b", "c"):
        photo(tree / "JPEGImages" / f"{i}.jpg")
    (tree / "ImageSets/Main").mkdir(parents=True)
    (tree / "ImageSets/Main/train.txt").write_text("a\nc\n")
    (tree / "ImageSets/Main/val.txt").write_text("b\n")
    mats.mkdir()
    mat_file(mats / "a.mat", "LabelMap", rows(0, 1, 2, 458, 459, 9).astype(np.uint16))
    mat_file(mats / "b.mat", "LabelMap", rows(2).astype(np.uint8), compressed=False)
    return tree, mats


def test_convert_context(context_tree, tmp_path, capsys):
    tree, mats = context_tree
    data.convert_context(mats, tmp_path)
    assert "converted 2 of 2" in capsys.readouterr().out
    train, val = (data.open_dataset("context", tmp_path, split) for split in ("train", "val"))
    assert train.ids == ["a"] and val.ids == ["b"]
    assert first_column(train.label(0)) == [VOID, VOID, 0, 58, VOID, 1]
    assert first_column(val.label(0)) == [0] * H
    assert not list(tree.rglob("*.tmp"))
    save(tree / "SegmentationClassContext/b.png", rows(5))  # a second run leaves what is there
    data.convert_context(mats, tmp_path)
    assert first_column(val.label(0)) == [4] * H


@pytest.mark.parametrize("name, array, kind, message", [
    ("LabelMap", rows(460).astype(np.uint16), {}, "c.mat: LabelMap has ids outside 0–459"),
    ("LabelMap", np.full((H, W), np.nan), dict(mat_class=6, stored=9),
     "c.mat: LabelMap has ids outside 0–459"),
    ("Other", rows(4).astype(np.uint16), {}, "c.mat has no matrix LabelMap")])
def test_matrices_that_are_no_labels(context_tree, tmp_path, name, array, kind, message):
    mat_file(context_tree[1] / "c.mat", name, array, **kind)
    refuses(message, data.convert_context, context_tree[1], tmp_path)


def test_conversion_without_mats_or_lists(context_tree, tmp_path):
    tree, mats = context_tree
    refuses("no .mat files in", data.convert_context, tmp_path / "nowhere", tmp_path)
    (tree / "ImageSets/Main/val.txt").unlink()
    refuses("converted, but there is no list .*val.txt", data.convert_context, mats, tmp_path)


def test_main_describes_a_data_set(tmp_path, capsys):
    voc_tree(tmp_path)
    out = tmp_path / "sheets" / "voc.png"
    run(data.main, "--dataset", "voc", "--data-root", tmp_path, "--out", out)
    said = capsys.readouterr().out
    assert "voc train: 2 images, 2 labels, 20 classes" in said and "height: 6 to 6" in said
    lines = {line[:28].strip(): line[28:].split() for line in said.splitlines()}
    assert lines["0 airplane"] == lines["19 tv monitor"] == ["50.00", "50.00"]
    assert lines["void, of all pixels"] == ["66.67", "66.67"]
    with Image.open(out) as sheet:
        assert sheet.mode == "RGB" and sheet.width > 900


def test_main_without_labels_and_with_one_split(tmp_path, capsys):
    for n in range(15):
        photo(tmp_path / f"{n}.jpg", 10 + n, 20)
    photo(tmp_path / "leftImg8bit/val/bonn/1_leftImg8bit.png")
    options = ("--data-root", tmp_path, "--out", tmp_path / "sheets/s.png")
    run(data.main, "--dataset", "folder", "--classes", "cat, dog", "--limit", 5, *options)
    run(data.main, "--dataset", "cityscapes", *options)
    said = capsys.readouterr().out
    assert "folder: 16 images, no labels, 2 classes" in said and "per cent" not in said
    assert "one split cannot be opened: no cityscapes" in said
    assert "cityscapes val: 1 images, no labels" in said


@pytest.mark.parametrize("error, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "a smaller --batch"),
    (MemoryError(), "out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't "
                  "allocate memory: you tried to allocate 9 bytes"), "a smaller --batch"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "fewer --workers"),
    (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "fewer --workers"),
    (OSError(28, "No space left on device", "x.pt"), "cannot write x.pt: No space left"),
    (PermissionError(13, "Permission denied", "x.pt"), "cannot use x.pt: Permission denied"),
    (OSError("not a file's"), None),
    (RuntimeError("shapes cannot be multiplied"), None)])
def test_what_a_user_can_mend_is_one_line(error, said, capsys):
    refuses(None, data.clean_exit(raising(error)), error=SystemExit if said else type(error))
    err = capsys.readouterr().err
    assert err == "" if said is None else err.startswith("error: ") and err.count("\n") == 1
    assert said is None or said in err


def test_fingerprints_tell_images_apart(tmp_path):
    for folder, size in (("a", 4), ("b", 4), ("c", 9)):
        for name in "xy":
            save(tmp_path / folder / f"{name}.bmp", np.zeros((size, size, 3)))
    name = lambda folder: data.open_dataset("folder", tmp_path / folder, classes=["cat"])
    a, b, c = (name(folder).fingerprint for folder in "abc")
    assert a == b != c
    (tmp_path / "a/x.bmp").unlink()
    assert name("a").fingerprint not in (b, c)
    shapes = {data.open_dataset("shapes", split=split, seed=seed).fingerprint
              for split in ("train", "val") for seed in (0, 1)}
    assert len(shapes) == 4


def archive(path, *members):
    """A tar or zip file of empty files, (name, target of a link or None)."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, _ in members:
                file.writestr(name, "")
        return
    with tarfile.open(path, "w") as file:
        for name, target in members:
            member = tarfile.TarInfo(name)
            member.type = tarfile.SYMTYPE if target else tarfile.REGTYPE
            member.linkname = target or ""
            file.addfile(member)


@pytest.mark.parametrize("name", ["voc", "ade"])  # a tar and a zip file
def test_archives_are_unpacked_whole_or_not_at_all(tmp_path, monkeypatch, name):
    for place in ("torch.hub.download_url_to_file", "torchvision.datasets.utils.download_url"):
        monkeypatch.setattr(place, raising(OSError("network is unreachable")))
    refuses(rf"downloading {name} into .*unreachable\)?;.*try again", data.download, name, tmp_path)
    url, _, tree = data.DOWNLOADS[name]
    assert all(url.startswith("https://") for url, _, _ in data.DOWNLOADS.values())
    path = tmp_path / url.rpartition("/")[2]
    archive(path, (f"{tree}/a.txt", None), (f"{tree}/b.txt", None))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(data.DOWNLOADS, name, (url, digest, tree))
    (tmp_path / f"{path.name}.part").mkdir()  # an earlier try was killed
    data.download(name, tmp_path)  # finds the archive, whose hash is right
    assert sorted(p.name for p in (tmp_path / tree).iterdir()) == ["a.txt", "b.txt"]
    assert not list(tmp_path.glob("*.part"))
    path.write_bytes(b"")
    data.download(name, tmp_path)  # the tree is there: nothing to do
    shutil.rmtree(tmp_path / tree)
    refuses(f"downloading {name} into", data.download, name, tmp_path)  # the hash is wrong


@pytest.mark.parametrize("suffix, members", [
    (".tar", [("../out.txt", None)]), (".tar", [("/tmp/out-of-the-archive.txt", None)]),
    (".tar", [("link", "../.."), ("link/out.txt", None)]), (".tar", [("link", "/etc")]),
    (".zip", [("../out.txt", None)]), (".zip", [("/out-of-the-archive.txt", None)])])
def test_archives_cannot_write_outside(tmp_path, suffix, members):
    root = tmp_path / "a" / "root"
    root.mkdir(parents=True)
    path = root / f"bad{suffix}"
    archive(path, *members, ("tree/x.txt", None))
    before = set(tmp_path.rglob("*"))
    with contextlib.suppress(tarfile.TarError):
        data.unpack(path, root, "tree")
    assert all(p.is_relative_to(root / "tree") or p.is_relative_to(root / f"bad{suffix}.part")
               for p in set(tmp_path.rglob("*")) - before)
    assert not any(Path(place, "out-of-the-archive.txt").exists() for place in ("/", "/tmp"))
