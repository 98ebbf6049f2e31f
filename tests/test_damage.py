"""What a run has made, damaged: every file in every way, one record, and many records in little
memory. RECLIP_LONG=1 damages every file in every way, and opens as many records as COCO has images.
"""

import argparse
import json
import random
import shutil
import tracemalloc

import numpy as np
import pytest
import torch

import distill
import reclip
from conftest import LONG, learned, results, run, same
from run import allocate, checksums, clip_fingerprint

COMMANDS = {  # what made the files of `trained_demo`, where it lies in a folder "run"
    "reclip": (reclip.main, "--epochs", 3, "--out", "run"),
    "distill": (distill.main, "--epochs", 1, "--teacher", "run/reclip.pt"),
}
SHARED = ["hypotheses.npy", "hypotheses.json", "results.json", ".run.lock", ".cache.lock",
          ".results.lock"]
FILES = {
    "reclip": ["reclip.pt", "log.jsonl", "views.npy", "views.json", *SHARED],
    "distill": ["reclip.pt", "distill.pt", "log-distill.jsonl", "views-distill.npy",
                "views-distill.json", *SHARED],
}


@pytest.fixture
def again(trained_demo, small_demo, tmp_path, monkeypatch):
    """again(script, damaged) → whether it trains again what `trained_demo` has: all of it, or what
    the damaged file lets be. Its results are compared."""
    monkeypatch.chdir(tmp_path)

    def again(script, damage, name):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(trained_demo, "run")
        out = tmp_path / "run"
        if not name.endswith(".pt"):  # a finished run would not open what it was trained on
            (out / f"{script}.pt").unlink()
        damage(out / name)
        run(*COMMANDS[script])
        checkpoint, stage = f"{script}.pt", dict(reclip="rectified").get(script, "distilled")
        assert same(learned(out, checkpoint), learned(trained_demo, checkpoint))
        assert results(out)[stage] == results(trained_demo)[stage]

    return again


# ---- Every file ----------------------------------------------------------------------------------


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path):
    """One bit in each of five places."""
    content, draw = bytearray(path.read_bytes()), random.Random(path.name)
    for _ in range(5 if content else 0):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def emptied(path):
    path.write_bytes(b"")


def a_folder(path):
    path.unlink()
    path.mkdir()
    (path / "something").write_bytes(b"something")


CASES = [(script, name, damage) for script in COMMANDS for name in FILES[script]
         for damage in (truncated, zeroed, flipped, emptied, a_folder)]


@pytest.mark.parametrize("script, name, damage", [
    pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2].__name__}")
    for case in (CASES if LONG else random.Random(0).sample(CASES, 8))])
def test_one_line_or_made_again(again, capsys, script, name, damage):
    try:
        again(script, damage, name)
    except SystemExit as end:
        said = capsys.readouterr().err
        assert end.code == 2 and said.count("\n") == 1 and said.startswith("error: "), said
        assert f"run/{name.split('.')[0]}" in said or f"run/{name}" in said


def test_every_file_of_a_run_is_damaged(trained_demo):
    assert {path.name for path in trained_demo.iterdir()} == {*FILES["reclip"], *FILES["distill"]}


# ---- One record ----------------------------------------------------------------------------------


def flip(record):
    record[len(record) // 3] ^= 4


def zero(record):
    record[5 : len(record) // 2] = 0


@pytest.mark.parametrize("damage", [flip, zero])
@pytest.mark.parametrize("script, name, where", [
    ("reclip", "views.npy", 7), ("reclip", "views.npy", 47), ("reclip", "hypotheses.npy", 11),
    ("distill", "views-distill.npy", 30), ("distill", "hypotheses.npy", 0)])
def test_a_damaged_record_is_made_again(again, trained_demo, tmp_path, capsys, script, name, where,
                                        damage):
    def damaged(path):
        records = np.lib.format.open_memmap(path, "r+")
        damage(records.view(np.uint8).reshape(len(records), -1)[where])
        records.flush()
        assert path.read_bytes() != (trained_demo / name).read_bytes()

    again(script, damaged, name)
    said = capsys.readouterr().out
    assert said.count("records are damaged and made again") == 1
    assert f"run/{name}: 1 records are damaged and made again\n" in said
    assert (tmp_path / "run" / name).read_bytes() == (trained_demo / name).read_bytes()


@pytest.mark.parametrize("script, name", [("reclip", "views.npy"), ("reclip", "hypotheses.npy"),
                                          ("distill", "views-distill.npy")])
def test_records_lost_altogether_are_made_again(again, trained_demo, tmp_path, capsys, script,
                                                name):
    """As after a power cut: as long as before, but part of it, checksums included, is zero."""
    def lost(path):
        records = np.lib.format.open_memmap(path, "r+")
        records.view(np.uint8).reshape(len(records), -1)[3:9] = 0
        records.flush()

    again(script, lost, name)
    assert f"{name.split('.')[0]} {len(np.load(trained_demo / name))}/" in capsys.readouterr().out
    assert (tmp_path / "run" / name).read_bytes() == (trained_demo / name).read_bytes()


# ---- Many records --------------------------------------------------------------------------------


def test_many_images_of_many_classes_in_little_memory(tiny_clip, tmp_path):
    """Votes of n images for LVIS's 1,203 classes: opening and checking them, and reading the
    hypotheses of a batch, take memory for neither all of them nor their text."""
    n, C = 100_000 if LONG else 5_000, 1203
    images = argparse.Namespace(name="many", fingerprint="f", classes=[f"c{k}" for k in range(C)])
    images = type("Images", (argparse.Namespace,), {"__len__": lambda self: n})(**vars(images))
    s = argparse.Namespace(hypothesis="crops", activation="quick_gelu", crop_ratio=1 / 6, amp=False,
                           workers=0, threshold=0.07, top=0, heads=None,
                           learn_query=False)
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
