"""README and details.md: their commands, names and programs work, and they stay short."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark
import data
import distill
import evaluate
import reclip
import tables
from conftest import REPOSITORY, assert_close

README = (REPOSITORY / "README.md").read_text("utf-8")
DETAILS = (REPOSITORY / ".github/details.md").read_text("utf-8")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def test_flags_exist(capsys):
    known = {"torchrun": {"--nproc_per_node"}}
    for module in (data, reclip, distill, evaluate, tables, benchmark):
        with pytest.raises(SystemExit):
            module.main(["--help"])
        known[f"{module.__name__}.py"] = set(FLAG.findall(capsys.readouterr().out))
    text = re.sub(r"```python\n.*?```", "", README + DETAILS, flags=re.S)
    lines = "\n".join(re.findall(r"```\n(.*?)```", text, re.S)).splitlines()
    lines += re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S).replace("\n", " "))
    for line in lines:
        allowed = [known[name] for name in known if name in line] or known.values()
        assert set(FLAG.findall(line)) <= set().union(*allowed), line


def test_the_programs_run(clip_file, trained_demo, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", types.SimpleNamespace(
        loadmat=lambda file: {"LabelMap": np.arange(460)[None]}))
    photo, names = min(photos.iterdir()), {}
    masks, export, context = re.findall(r"```python\n(.*?)```", README + DETAILS, re.S)
    exec(masks.replace("ViT-B/16", str(clip_file)).replace("photo.jpg", str(photo)), names)
    assert names["mask"].shape == data.read_image(photo).shape[1:] and names["mask"].max() <= 2
    exec(export.replace("runs/mine", trained_demo.as_posix()), names)
    views = torch.arange(3 * 96 * 120).view(1, 3, 96, 120).to(torch.uint8)
    assert_close(torch.export.load("student.pt2").module()(views), names["student"](views))
    for folder in ("trainval/1.mat", "VOCdevkit/VOC2010"):
        Path(folder).mkdir(parents=True)
    exec(context, names)
    label = np.array(Image.open("VOCdevkit/VOC2010/SegmentationClassContext/1.png"))[0]
    assert label[[0, 1, 2, 9, 458, 459]].tolist() == [0, 0, 1, 2, 59, 0]
    assert {*label} == {*range(60)}


def test_names_and_lengths():
    """What stands as `file.py name, Class.method` is there."""
    places = re.findall(r"`(\w+)\.py ([A-Za-z_][\w., ]*)`", README)
    names = [(sys.modules[file], name) for file, some in places for name in some.split(", ")]
    for module, name in names:
        assert eval(f"module.{name}", dict(module=module)) is not None
    assert len(names) >= 40 and len(README) <= 14_000 and len(DETAILS) <= 8_000
