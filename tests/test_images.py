"""evaluate.py --images: masks of one's own images, of any kind, name and number."""

import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
from conftest import picture, predictions, run


@pytest.fixture
def predict(trained_demo, tmp_path, monkeypatch):
    """predict(*paths) → the lines of predictions.jsonl; the output lies in ./out."""
    monkeypatch.chdir(tmp_path)

    def predict(*arguments, checkpoint=trained_demo / "reclip.pt"):
        chosen = ("--checkpoint", checkpoint) if checkpoint else ()
        run(evaluate.main, *chosen, "--out", "out", "--workers", 0, "--images", *arguments)
        return predictions()

    return predict


def check_outputs(rows, sizes):
    """Each line's mask is what it says; sizes: (width, height) of each."""
    for row, (width, height) in zip(rows, sizes, strict=True):
        assert (row["width"], row["height"]) == (width, height)
        with Image.open(Path("out", row["mask"])) as mask:
            assert mask.mode == "P" and mask.size == (width, height)
            values = torch.from_numpy(np.array(mask)).flatten()
            assert torch.equal(torch.tensor(mask.getpalette()[:30]).reshape(10, 3),
                               data.SHAPES_PALETTE.long())
        names = list(data.SHAPES)
        assert sum(row["areas"].values()) == pytest.approx(100, abs=0.01)
        assert list(row["areas"].values()) == sorted(row["areas"].values(), reverse=True)
        for k in values.unique().tolist():
            share = 100 * (values == k).float().mean().item()
            assert row["areas"][names[k]] == pytest.approx(share, abs=1e-3)
        assert len(values.unique()) == len(row["areas"])
        with Image.open(Path("out", row["overlay"])) as overlay:
            assert 420 <= overlay.width <= 1000 and overlay.height > min(height, 10)


def test_images_of_any_mode_and_size(predict):
    kinds = {"L.png": "L", "LA.png": "LA", "P.png": "P", "RGBA.png": "RGBA", "1.png": "1",
             "CMYK.jpg": "CMYK", "p.webp": "RGB", "b.bmp": "RGB"}
    for name, mode in kinds.items():
        picture(f"in/{name}", mode=mode)
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27).save("in/deep.png")
    sizes = {"one.png": (1, 1), "wide.png": (1201, 3), "tall.png": (5, 701), "odd.png": (97, 53)}
    for name, size in sizes.items():
        picture(f"in/{name}", size)
    turned = Image.new("RGB", (30, 20))
    turned.getexif()[0x0112] = 6
    turned.save("in/turned.jpg", exif=turned.getexif())
    rows = predict("in")
    sizes |= {"turned.jpg": (20, 30)} | dict.fromkeys([*kinds, "deep.png"], (60, 40))
    assert [Path(row["image"]).name for row in rows] == sorted(sizes)
    check_outputs(rows, [sizes[name] for name in sorted(sizes)])
    assert {row["stage"] for row in rows} == {"rectified"}


def test_masks_are_those_of_the_network(predict, trained_demo):
    picture("a.png", (96, 96))
    predict("a.png")
    view = data.resize_to_scale(data.read_image("a.png"), (96, 96))[None]
    expected = evaluate.Segmenter(trained_demo / "reclip.pt")(view, (96, 96))
    mask = lambda: torch.from_numpy(np.array(Image.open("out/masks/a.png"))).long()
    assert torch.equal(mask(), expected["rectified"][0])
    rows = predict("a.png", "--method", "maskclip")
    assert torch.equal(mask(), expected["maskclip"][0]) and rows[0]["stage"] == "maskclip"
    rows = predict("a.png", checkpoint=trained_demo / "distill.pt")
    assert rows[0]["stage"] == "distilled"


def test_nothing_is_overwritten_and_nothing_lies_outside(predict, tmp_path):
    names = ["x/photo.png", "y/photo.png", "x/photo.jpg", "x/Photo.png", "x/photo-2.png",
             "x/.._.._escape.png", "x/a b&ü;$(c).png", "x/" + "ö" * 90 + ".png", "x/ .png"]
    for seed, name in enumerate(names):
        picture(name, seed=seed)
    before = set(tmp_path.rglob("*"))
    # Hidden files are no part of a folder, but may be named.
    rows = predict("x", "y", "x/photo.png", "x/../x/photo.png", "x/.._.._escape.png")
    assert len(rows) == len(names) + 2
    masks = [row["mask"] for row in rows]
    assert len({mask.lower() for mask in masks}) == len(masks)
    for folder in ("out/masks", "out/overlays"):
        assert len(list(Path(folder).iterdir())) == len(masks)
    made = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "out") for path in made)
    same = [row for row in rows if Path(row["image"]).resolve() == (tmp_path / "x/photo.png")]
    assert len(same) == 3 and len({Path("out", row["mask"]).read_bytes() for row in same}) == 1


def test_broken_images_are_named_and_the_others_done(predict, capsys):
    picture("in/good.png"), picture("in/z.png")
    Path("in/cut.jpg").write_bytes(b"\xff\xd8\xff")
    Path("in/empty.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        predict("in")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert "cannot read image in/cut.jpg" in said[0] and "in/empty.png" in said[1]
    assert said[2] == "error: 2 of 4 images could not be read: in/cut.jpg, in/empty.png"
    assert [("error" in row, "mask" in row) for row in predictions()] == [
        (True, False), (True, False), (False, True), (False, True)]
    assert not list(Path("out").glob("*.part"))


def test_maskclip_without_a_checkpoint(predict, photos, clip_file, trained_demo):
    command = (photos, "--method", "maskclip", "--classes", "cat, dog, sofa", "--clip", clip_file)
    rows = predict(*command, checkpoint=None)
    assert len(rows) == 3 and all(set(row["areas"]) <= {"cat", "dog", "sofa"} for row in rows)
    first = [Path("out", row["mask"]).read_bytes() for row in rows]
    rows = predict(*command, "--surgery", "value", checkpoint=None)
    assert first != [Path("out", row["mask"]).read_bytes() for row in rows]
    # The demo's CLIP has its own recipe: the masks are those of its checkpoint's MaskCLIP.
    picture("a.png", (96, 96))
    shutil.rmtree("out")  # which would refuse another list of classes
    command = ("a.png", "--method", "maskclip")
    areas = predict(*command)[0]["areas"]
    command += ("--classes", ", ".join(data.SHAPES), "--clip", "shapes-tiny")
    assert predict(*command, checkpoint=None)[0]["areas"] == areas


def test_results_lie_beside_the_checkpoint_appear_one_by_one_and_images_are_not_kept(
        trained_demo, tmp_path, monkeypatch):
    for n in range(20):
        picture(tmp_path / "in" / f"{n}.png")
    shutil.copy(trained_demo / "reclip.pt", tmp_path)
    out = tmp_path / "predictions"
    part = out / "predictions.jsonl.part"
    read, images, alive, seen = evaluate.read_image, [], [], []

    def counted(path):
        seen.append(len(part.read_text().splitlines()))
        alive.append(sum(image() is not None for image in images))
        image = read(path)
        images.append(weakref.ref(image))
        return image

    monkeypatch.setattr(evaluate, "read_image", counted)
    run(evaluate.main, "--checkpoint", tmp_path / "reclip.pt", "--images", tmp_path / "in")
    # A line follows its picture, which is written while the next one is read.
    assert seen == [0, *range(19)] and not part.exists() and max(alive) <= 3
    assert len(predictions(out)) == 20
