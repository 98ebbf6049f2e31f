"""What a run has made, damaged: every file in every way, one record, and many records in little
memory. RECLIP_LONG=1 damages every file in every way, and opens as many records as COCO has images.
"""

import argparse
import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
import reclip
from conftest import LONG, bits_flipped, demo_command, learned, results, run, same
from run import allocate, checksums, clip_fingerprint

SHARED = "reclip.pt hypotheses.npy hypotheses.json results.json .run.lock .cache.lock .results.lock"
FILES = {
    reclip: f"log.jsonl views.npy views.json {SHARED}".split(),
    distill: f"distill.pt log-distill.jsonl views-distill.npy views-distill.json {SHARED}".split(),
}


@pytest.fixture
def again(demo_copy, trained_demo):
    """again(script, name, damage): with a damaged file, all that is missing is made again."""

    def again(script, name, damage):
        checkpoint = f"{script.__name__}.pt"
        if not name.endswith(".pt"):  # a finished run would not open what it was trained on
            (demo_copy / checkpoint).unlink()
        damage(demo_copy / name)
        run(*demo_command(script))
        assert same(learned(demo_copy, checkpoint), learned(trained_demo, checkpoint))
        stage = "rectified" if script is reclip else "distilled"
        assert results(demo_copy)[stage] == results(trained_demo)[stage]

    return again


DAMAGES = {  # what becomes of a file's content
    "truncated": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "flipped": lambda content: bits_flipped(content, random.Random(len(content)), 5),
    "emptied": lambda content: b"",
    "a folder": lambda content: b"of a file in it",
}
CASES = [(script, name, how) for script, names in FILES.items() for name in names
         for how in DAMAGES]


@pytest.mark.parametrize("script, name, how", CASES if LONG else random.Random(0).sample(CASES, 8))
def test_one_line_or_made_again(again, capsys, script, name, how):
    def damage(path):
        content = path.read_bytes()
        if how == "a folder":
            path.unlink()
            path.mkdir()
            path /= "something"
        path.write_bytes(DAMAGES[how](content))

    try:
        again(script, name, damage)
    except SystemExit as end:
        said = capsys.readouterr().err
        assert end.code == 2 and said.count("\n") == 1 and said.startswith("error: "), said
        assert f"run/{name.split('.')[0]}" in said or f"run/{name}" in said


def test_every_file_of_a_run_is_damaged(trained_demo):
    assert {path.name for path in trained_demo.iterdir()} == {*FILES[reclip], *FILES[distill]}


def in_records(change):
    """A damage: `change` is given the bytes of all records, N×B."""
    def damage(path):
        before, records = path.read_bytes(), np.lib.format.open_memmap(path, "r+")
        change(records.view(np.uint8).reshape(len(records), -1))
        records.flush()
        assert path.read_bytes() != before
    return damage


def flip(record):
    record[len(record) // 3] ^= 4


def zero(record):
    record[5 : len(record) // 2] = 0


@pytest.mark.parametrize("damage", [flip, zero])
@pytest.mark.parametrize("script, name, where", [
    (reclip, "views.npy", 7), (reclip, "views.npy", 47), (reclip, "hypotheses.npy", 11),
    (distill, "views-distill.npy", 30), (distill, "hypotheses.npy", 0)])
def test_a_damaged_record_is_made_again(again, trained_demo, capsys, script, name, where, damage):
    again(script, name, in_records(lambda records: damage(records[where])))
    said = capsys.readouterr().out
    assert said.count("records are damaged and made again") == 1
    assert f"run/{name}: 1 records are damaged and made again\n" in said
    assert Path("run", name).read_bytes() == (trained_demo / name).read_bytes()


def lose(records):
    """As after a power cut: as long as before, but part of it, checksums included, is zero."""
    records[3:9] = 0


@pytest.mark.parametrize("script, name", [(reclip, "views.npy"), (reclip, "hypotheses.npy"),
                                          (distill, "views-distill.npy")])
def test_records_lost_altogether_are_made_again(again, trained_demo, capsys, script, name):
    again(script, name, in_records(lose))
    assert f"{name.split('.')[0]} {len(np.load(trained_demo / name))}/" in capsys.readouterr().out
    assert Path("run", name).read_bytes() == (trained_demo / name).read_bytes()


def test_many_images_of_many_classes_in_little_memory(tiny_clip, tmp_path):
    """Votes of n images for LVIS's 1,203 classes: opening and checking them, and reading the
    hypotheses of a batch, take memory for neither all of them nor their text."""
    n, C = 100_000 if LONG else 5_000, 1203
    images = argparse.Namespace(name="many", fingerprint="f", classes=[f"c{k}" for k in range(C)])
    images = type("Images", (argparse.Namespace,), {"__len__": lambda self: n})(**vars(images))
    s = argparse.Namespace(hypothesis="crops", activation="quick_gelu", crop_ratio=1 / 6, amp=False,
                           workers=0, threshold=0.07, top=0, heads=None, learn_query=False)
    kind = np.dtype([("scores", np.int16, (C,)), ("checksum", np.uint32)])
    path = tmp_path / "hypotheses.npy"
    allocate(path, n, kind)
    records = np.lib.format.open_memmap(path, "r+")
    for first in range(0, n, 1000):
        part = records[first : first + 1000]
        part["scores"][np.arange(len(part)), (first + np.arange(len(part))) % C] = 121
        part["checksum"] = checksums(part)
    facts = dict(hypothesis="crops", data="many", images="f", classes=images.classes,
                 clip=clip_fingerprint(tiny_clip), activation="quick_gelu", view=1 / 6)
    path.with_suffix(".json").write_text(json.dumps(facts))
    tracemalloc.start()
    try:
        hypothesis = reclip.make_hypotheses(images, tiny_clip, None, s, tmp_path,
                                            torch.device("cpu"))
        found = hypothesis([n - 1, 0, 1300])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.nonzero()[:, 1].tolist() == [(n - 1) % C, 0, 1300 % C]
    assert peak < 2e6 + 300 * n < 0.4 * path.stat().st_size
