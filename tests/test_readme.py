"""README's commands and names: they exist, and its program runs."""

import re
import sys

import pytest

import benchmark
import data
import distill
import evaluate
import reclip
import tables
from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text("utf-8")
DETAILS = (REPOSITORY / ".github/details.md").read_text("utf-8")
MAINS = {"data.py": data.main, "reclip.py": reclip.main, "distill.py": distill.main,
         "evaluate.py": evaluate.main, "tests/tables.py": tables.main,
         "tests/benchmark.py": benchmark.main}


def flags(text):
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def test_flags_exist(capsys):
    known = {}
    for script, main in MAINS.items():
        with pytest.raises(SystemExit):
            main(["--help"])
        known[script] = flags(capsys.readouterr().out)
    text = re.sub(r"```python\n.*?```", "", README + DETAILS, flags=re.S)
    code = [line for block in re.findall(r"```\n(.*?)```", text, re.S) for line in
            block.splitlines()] + re.findall(r"`([^`]+)`", text.replace("\n", " "))
    for line in code:
        script = next((name for name in MAINS if line.startswith(f"python {name}")), None)
        anywhere = {"--nproc_per_node"}.union(*known.values())
        assert flags(line) <= known.get(script, anywhere), line
    assert sum(line.startswith("python ") for line in code) >= 10


def test_the_programs_run(clip_file, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = sorted(photos.iterdir())[0]
    first, *_ = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(first.replace("ViT-B/16", str(clip_file)).replace("photo.jpg", str(photo)), names)
    assert names["mask"].shape == data.read_image(photo).shape[1:]
    assert set(names["mask"].unique().tolist()) <= {0, 1, 2}


def test_names_exist():
    """What stands as `file.py Name` or `file.py Class.method` is there."""
    places = re.findall(r"`(\w+)\.py ([A-Za-z_][\w.]*)`", README)
    for file, name in places:
        found = sys.modules[file]
        for part in name.split("."):
            found = getattr(found, part)
    assert len(places) >= 25 and not re.search(r"\.py:\d", README)


def test_lengths_and_files():
    assert len(README) <= 14_000 and len(DETAILS) <= 8_000
    for folder, text in ((REPOSITORY, README), (REPOSITORY / ".github", DETAILS)):
        for name in re.findall(r"\]\(([^)#]+)\)", text):
            assert name.startswith("http") or (folder / name).exists(), name
