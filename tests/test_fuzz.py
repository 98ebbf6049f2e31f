"""Damaged files of every kind that is read: success or the error that is promised, nothing else.

Every kind has a fixed list of damages: cut short, bits flipped, blocks swapped or zeroed. CI runs
the first few of each; RECLIP_LONG=1 runs them all.
"""

import argparse
import functools
import gzip
import random
import resource
import shutil
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
from conftest import LONG, mat_file, random_clip, save_clip
from data import UserError
from run import Batches, Run, open_records, wrong_blocks

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


def make_clip(path, **options):
    save_clip(random_clip(vocab_size=300, transformer_width=32, vision_width=64), path, **options)


def make_zipped_clip(path):
    make_clip(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def save_matrix(path, **options):
    mat_file(path, "LabelMap", np.arange(600, dtype=np.uint16).reshape(20, 30), **options)


def read_picture(path):
    data.image_size(path)
    data.read_image(path)


def read_checkpoint(path):
    reclip.open_rectified(path)
    reclip.authors_state(path)


def read_records(path, n, fields):
    """Whatever a record holds, those without a right checksum are told."""
    kind = np.dtype([*fields, ("checksum", np.uint32)])
    wrong_blocks(open_records(path, n, kind), np.arange(n + 1))


def read_log(path):
    s, images = argparse.Namespace(), argparse.Namespace(ids=[], fingerprint="", classes=[])
    training = Run(path.with_name("none.pt"), s, images, random_clip())
    training.start(None, Batches(3, 1, 1, 0))
    training.trim_log()


def load_clip(path):
    clip.load(path, device="cpu")


KINDS = {  # kind: who writes a sound file (None: it is one of a trained run) and who reads it
    **dict.fromkeys(("jpg", "png", "bmp", "webp", "tif", "gif"), (picture, read_picture)),
    "lzw.tif": (functools.partial(picture, compression="tiff_lzw"), read_picture),
    "label.png": (functools.partial(picture, label=True), data.read_label),
    "mat": (save_matrix, data.read_mat_v5),
    "mat-plain": (functools.partial(save_matrix, compressed=False), data.read_mat_v5),
    "clip.pt": (make_clip, load_clip),
    "legacy.pt": (functools.partial(make_clip, _use_new_zipfile_serialization=False), load_clip),
    "clip.pt.gz": (make_zipped_clip, load_clip),
    "script.pt": (lambda path: torch.jit.script(torch.nn.Linear(3, 3)).save(str(path)), load_clip),
    "backbone.pth": (
        lambda path: torch.save({"state_dict": {"conv1.weight": torch.ones(64, 3, 7, 7)}}, path),
        lambda path: distill.pretrained_backbone(str(path))),
    "classes.txt": (
        lambda path: path.write_text("# Tiere\nKatze\nLöwe  # groß\nMöwe\n猫\n", "utf-8"),
        lambda path: data.parse_classes(str(path))),
    "reclip.pt": (None, read_checkpoint),
    "distill.pt": (None, distill.load_student),
    "hypotheses.npy": (None, functools.partial(read_records, n=24, fields=[
        ("scores", np.int16, (10,))])),
    "log.jsonl": (None, read_log),
    "results.json": (
        None, lambda path: evaluate.save_results(path, {"maskclip": {"miou": 5.0, "iou": {}}})),
}


@pytest.mark.filterwarnings("ignore")  # Pillow's and PyTorch's about what is odd in a file
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, trained_demo, tmp_path, monkeypatch):
    name = kind if "." in kind else f"x.{kind}"
    path, (make, read) = tmp_path / name, KINDS[kind]
    make(path) if make else shutil.copy(trained_demo / name, path)
    content = path.read_bytes()
    shutil.copy(path, tmp_path / "sound")
    if kind != "script.pt":
        read(path)
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(COUNT):
        path.write_bytes(damaged(content, seed))
        start = time.monotonic()
        try:
            read(path)
        except (ValueError if read is load_clip else UserError) as error:
            refused += 1
            assert str(path) in str(error), f"seed {seed}: {error}"
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
        assert time.monotonic() - start < LONGEST, f"seed {seed}"
    assert refused > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LARGEST
    locks = [".results.lock"] * (kind == "results.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["sound", name, *locks])
