"""Damaged files of every kind that is read: success or the error that is promised, nothing else.

Every kind has a fixed list of damages: cut short, bits flipped, blocks swapped or zeroed. CI runs
the first few of each; RECLIP_LONG=1 runs them all.
"""

import gzip
import json
import random
import resource
import time

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
import distill
import evaluate
import reclip
from conftest import LONG, random_clip
from data import UserError
from test_data import mat_file

COUNT = 60 if LONG else 6  # damages of each file
LONGEST, LARGEST = 20, 1 << 20  # seconds for one of them; KiB that memory may grow by


def damaged(content, seed):
    """`content`, bytes, as a broken disk, copy or download would leave it."""
    draw = random.Random(seed)
    content, n = bytearray(content), len(content)
    kind = seed % 4
    if kind == 0:
        del content[draw.randrange(n):]
    elif kind == 1:  # anywhere, or in the first bytes, where the sizes stand
        for _ in range(draw.choice((1, 3, 30))):
            content[draw.randrange(draw.choice((n, min(n, 200))))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        size = draw.choice((4, 64, 512))
        a, b = (draw.randrange(max(1, n - size)) for _ in range(2))
        content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]
    else:
        at, size = draw.randrange(n), draw.choice((1, 16, 1000))
        content[at : at + size] = bytes(len(content[at : at + size]))
    return bytes(content)


def picture(path, label=False, **options):
    values = np.random.default_rng(0).integers(0, 20 if label else 256, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(values[..., 0] if label else values).resize((90, 60), 0)
    if label:
        image = image.convert("P")
    image.save(path, **options)


def small_clip():
    return random_clip(vocab_size=300, transformer_width=32, vision_width=32)


def make(kind, path, trained):
    """Write a sound file of a kind."""
    if kind in ("jpg", "png", "bmp", "webp", "tif", "gif"):
        picture(path)
    elif kind == "lzw.tif":
        picture(path, compression="tiff_lzw")
    elif kind == "label.png":
        picture(path, label=True)
    elif kind.startswith("mat"):
        labels = np.arange(600, dtype=np.uint16).reshape(20, 30)
        mat_file(path, "LabelMap", labels, compressed=kind == "mat")
    elif kind in ("reclip.pt", "distill.pt", "hypotheses.jsonl", "log.jsonl", "results.json"):
        path.write_bytes((trained / kind).read_bytes())
    elif kind == "clip.pt":
        torch.save(small_clip().state_dict(), path)
    elif kind == "legacy.pt":
        torch.save(small_clip().state_dict(), path, _use_new_zipfile_serialization=False)
    elif kind == "clip.pt.gz":
        torch.save(small_clip().state_dict(), path)
        path.write_bytes(gzip.compress(path.read_bytes()))
    elif kind == "script.pt":
        torch.jit.script(torch.nn.Linear(3, 3)).save(str(path))
    elif kind == "backbone.pth":
        torch.save({"state_dict": {"conv1.weight": torch.ones(64, 3, 7, 7)}}, path)
    elif kind == "classes.txt":
        path.write_text("# Tiere\nKatze\nLöwe  # groß\nMöwe\n猫\n", "utf-8")


def read(kind, path):
    """Read a file of a kind as the program does."""
    if kind in ("jpg", "png", "bmp", "webp", "tif", "lzw.tif", "gif"):
        data.image_size(path)
        data.read_image(path)
    elif kind == "label.png":
        data.read_label(path)
    elif kind.startswith("mat"):
        data.read_mat_v5(path)
    elif kind == "reclip.pt":
        reclip.open_rectified(path)
        reclip.authors_state(path)
    elif kind == "distill.pt":
        distill.load_student(path)
    elif kind in ("clip.pt", "legacy.pt", "clip.pt.gz", "script.pt"):
        clip.load(path, device="cpu")
    elif kind == "backbone.pth":
        distill.pretrained_backbone(str(path))
    elif kind == "hypotheses.jsonl":
        header = json.loads((path.with_name("sound")).read_text().split("\n")[0])
        known = reclip.read_scores(path, header)
        torch.tensor([row for row in known.values()], dtype=torch.float64)
    elif kind == "log.jsonl":
        reclip.Log(path, "rectify", 10)
    elif kind == "results.json":
        evaluate.save_results(path, {"maskclip": {"miou": 5.0, "iou": {}}})
    elif kind == "classes.txt":
        data.parse_classes(str(path))


EXPECTED = {kind: (ValueError,) for kind in ("clip.pt", "legacy.pt", "clip.pt.gz", "script.pt")}
KINDS = ("jpg", "png", "bmp", "webp", "tif", "lzw.tif", "gif", "label.png", "mat", "mat-plain",
         "reclip.pt", "distill.pt", "clip.pt", "legacy.pt", "clip.pt.gz", "script.pt",
         "backbone.pth", "hypotheses.jsonl", "log.jsonl", "results.json", "classes.txt")


@pytest.mark.filterwarnings("ignore")  # Pillow's and PyTorch's about what is odd in a file
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, trained_demo, tmp_path, monkeypatch):
    suffix = kind if "." in kind else f"x.{kind}"
    sound, path = tmp_path / "sound", tmp_path / suffix
    make(kind, path, trained_demo)
    content = path.read_bytes()
    sound.write_bytes(content)
    if kind != "script.pt":
        read(kind, path)
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(COUNT):
        path.write_bytes(damaged(content, seed))
        start = time.monotonic()
        try:
            read(kind, path)
        except EXPECTED.get(kind, (UserError,)) as error:
            refused += 1
            assert str(path) in str(error), f"seed {seed}: {error}"
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
        assert time.monotonic() - start < LONGEST, f"seed {seed}"
    assert refused > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LARGEST
    locks = [".results.lock"] * (kind == "results.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["sound", suffix, *locks])
