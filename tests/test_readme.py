"""README's commands: they exist, and those of the demo run as written, at a small size."""

import re
import shlex

import pytest

import data
import distill
import evaluate
import reclip
from conftest import REPOSITORY, run

README = (REPOSITORY / "README.md").read_text("utf-8")
MAINS = {"data.py": data.main, "reclip.py": reclip.main, "distill.py": distill.main,
         "evaluate.py": evaluate.main}


def commands():
    """Every command in README that starts with `python SCRIPT`, as a list of words."""
    text = re.sub(r"```python\n.*?```", "", README, flags=re.S)
    blocks = [line.strip() for block in re.findall(r"```\n(.*?)```", text, re.S)
              for line in block.splitlines()]
    found = [line for line in blocks + re.findall(r"`(python [^`]*)`", text.replace("\n", " "))
             if line.startswith("python ") and line.split()[1] in MAINS]
    return [shlex.split(line, comments=True)[1:] for line in found]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_flags_exist(words, capsys):
    with pytest.raises(SystemExit):
        MAINS[words[0]](["--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known


def test_demo_commands_run(small_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scale, crop, _, _, *rest = reclip.DEMO
    monkeypatch.setattr(reclip, "DEMO", (scale, crop, 2, 2, *rest))
    monkeypatch.setitem(distill.DEMO, "epochs", 1)
    # what needs data or weights, and --tables, which test_tables.py runs
    outside = ("voc", "context", "folder", "--images", "FILE", "NAME", "--tables")
    of_demo = [words for words in commands()
               if not any(part in word for part in (*outside, "runs/mine") for word in words)]
    assert len(of_demo) >= 9
    for words in of_demo:
        MAINS[words[0]](words[1:])
    said = capsys.readouterr().out
    assert said.count("mIoU") >= 10 and "precision" in said
    assert (tmp_path / "runs/shapes/comparison.png").exists()


def test_the_ten_lines_run(clip_file, photos, tmp_path):
    program = re.search(r"```python\n(.*?)```", README, re.S)[1]
    photo = sorted(photos.iterdir())[0]
    names = {}
    exec(program.replace("ViT-B/16", str(clip_file)).replace("photo.jpg", str(photo)), names)
    assert names["Wq"].shape == (3, 32) and names["Mq"].shape[:2] == (1, 3)
    assert names["mask"].shape == data.read_image(photo).shape[1:]
    assert set(names["mask"].unique().tolist()) <= {0, 1, 2}
    # It is what the command makes of the same photo.
    run(evaluate.main, "--images", photo, "--method", "maskclip", "--clip", clip_file, "--classes",
        "cat, dog, sofa", "--out", tmp_path / "out", "--workers", 0)
    written = data.read_label(tmp_path / "out/masks" / f"{photo.stem}.png")
    assert (written == names["mask"]).float().mean() > 0.999


def test_what_is_referred_to_is_there():
    for name in re.findall(r"\[[^\]]*\]\(([^)]*)\)", README):  # pictures and files
        assert (REPOSITORY / name).stat().st_size > 1000, name
    headings = {heading.lower() for heading in re.findall(r"^#+ (.*)", README, re.M)}
    for path in REPOSITORY.glob("*.py"):
        said = " ".join(re.sub(r'["\n]', " ", path.read_text("utf-8")).split())
        for section in re.findall(r"README, ([A-Z][a-z]+(?: [a-z]+)?)", said):
            assert section.lower() in headings, f"{path.name}: README, {section}"
