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

import clip
import data
import distill
import evaluate
import reclip
from conftest import LONG, bits_flipped, mat_file, picture, random_clip, save_clip
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
        content = bits_flipped(content, draw, draw.choice((1, 3, 30)), (n, min(n, 200)))
    elif kind == 2:
        size = draw.choice((4, 64, 512))
        a, b = (draw.randrange(max(1, n - size)) for _ in range(2))
        content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]
    else:
        at, size = draw.randrange(n), draw.choice((1, 16, 1000))
        content[at : at + size] = bytes(len(content[at : at + size]))
    return bytes(content)


def make_clip(path, **options):
    save_clip(random_clip(vocab_size=300, transformer_width=32, vision_width=64), path, **options)


def make_zipped_clip(path):
    make_clip(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def save_matrix(path, **options):
    mat_file(path, "LabelMap", np.arange(600, dtype=np.uint16).reshape(20, 30), **options)


def read_hypotheses(path):
    """Whatever a record holds, those without a right checksum are told."""
    kind = np.dtype([("scores", np.int16, (10,)), ("checksum", np.uint32)])
    wrong_blocks(open_records(path, 24, kind), np.arange(25))


def read_log(path):
    s, images = argparse.Namespace(), argparse.Namespace(ids=[], fingerprint="", classes=[])
    training = Run(path.with_name("none.pt"), s, images, random_clip())
    training.start(None, Batches(3, 1, 1, 0))
    training.trim_log()


READ_PICTURE = (data.image_size, data.read_image)
load_clip = functools.partial(clip.load, device="cpu")
KINDS = {  # kind: who writes a sound file (None: it is one of a trained run), and all who read it
    **dict.fromkeys(("jpg", "png", "bmp", "webp", "tif", "gif"), (picture, *READ_PICTURE)),
    "lzw.tif": (functools.partial(picture, compression="tiff_lzw"), *READ_PICTURE),
    "label.png": (functools.partial(picture, mode="P"), data.read_label),
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
    "reclip.pt": (None, reclip.open_rectified, reclip.authors_state),
    "distill.pt": (None, distill.load_student),
    "hypotheses.npy": (None, read_hypotheses),
    "log.jsonl": (None, read_log),
    "results.json": (
        None, lambda path: evaluate.save_results(path, {"maskclip": {"miou": 5.0, "iou": {}}})),
}


@pytest.mark.filterwarnings("ignore")  # Pillow's and PyTorch's about what is odd in a file
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, trained_demo, tmp_path):
    name = kind if "." in kind else f"x.{kind}"
    path, (make, *readers) = tmp_path / name, KINDS[kind]
    make(path) if make else shutil.copy(trained_demo / name, path)
    content = path.read_bytes()
    for read in readers if kind != "script.pt" else ():
        read(path)
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(COUNT):
        path.write_bytes(damaged(content, seed))
        start = time.monotonic()
        try:
            for read in readers:
                read(path)
        except (ValueError if readers == [load_clip] else UserError) as error:
            refused += 1
            assert str(path) in str(error), f"seed {seed}: {error}"
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
        assert time.monotonic() - start < LONGEST, f"seed {seed}"
    assert refused > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LARGEST
    locks = {".results.lock"} if kind == "results.json" else set()
    assert {path.name for path in tmp_path.iterdir()} == {name, *locks}
