"""README's commands: they exist, and those of the demo run as written, at a small size.

`python tests/test_readme.py` brings the line numbers in README's "Where is …?" up to date.
"""

import ast
import re
import shlex

import pytest

import benchmark
import data
import distill
import evaluate
import reclip
import tables
from conftest import REPOSITORY, few_tables, run

README = (REPOSITORY / "README.md").read_text("utf-8")
DETAILS = (REPOSITORY / ".github/details.md").read_text("utf-8")
MAINS = {"data.py": data.main, "reclip.py": reclip.main, "distill.py": distill.main,
         "evaluate.py": evaluate.main, "tests/tables.py": tables.main,
         "tests/benchmark.py": benchmark.main}
PLACE = re.compile(r"`([\w/]+\.py):(\d+) ([\w.]+)`")  # `reclip.py:123 Rectifier.bias`


def commands():
    """Every command in README and details.md that starts with `python SCRIPT`, as its words."""
    text = re.sub(r"```python\n.*?```", "", README + DETAILS, flags=re.S)
    blocks = [line.strip() for block in re.findall(r"```\n(.*?)```", text, re.S)
              for line in block.splitlines()]
    found = [line for line in blocks + re.findall(r"`(python [^`]*)`", text.replace("\n", " "))
             if line.startswith("python ") and line.split()[1] in MAINS]
    return [shlex.split(line, comments=True)[1:] for line in found]


def known_flags(script, capsys):
    """All --flags in the help of a script."""
    with pytest.raises(SystemExit):
        MAINS[script](["--help"])
    return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_flags_exist(words, capsys):
    assert {word for word in words if word.startswith("--")} <= known_flags(words[0], capsys)


def test_flags_in_the_text_exist(capsys):
    known = {"--nproc_per_node"}.union(*(known_flags(script, capsys) for script in MAINS))
    text = re.sub(r"```.*?```", "", README + DETAILS, flags=re.S)
    assert {flag for code in re.findall(r"`[^`]+`", text)
            for flag in re.findall(r"--[a-z][\w-]*", code)} <= known


def test_demo_commands_run(small_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few_tables(monkeypatch)  # and few steps
    # what needs data or weights, and the programs in tests/, which have tests of their own
    outside = ("voc", "context", "folder", "--images", "FILE", "NAME", "tests/", "runs/mine",
               "runs/naclip")
    of_demo = [words for words in commands()
               if not any(part in word for part in outside for word in words)]
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


def defined_at(script):
    """{name: line} of a file's functions, classes, methods ("Class.method") and constants."""
    lines = {}

    def add(nodes, prefix=""):
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                lines[prefix + node.name] = node.lineno
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{node.name}.")
            if isinstance(node, ast.Assign):
                lines.update((prefix + part.id, node.lineno) for part in node.targets
                             if isinstance(part, ast.Name))

    add(ast.parse((REPOSITORY / script).read_text("utf-8")).body)
    return lines


def with_lines(text):
    """README's text with the present line number in every PLACE; KeyError for what is not there."""
    line = lambda found: defined_at(found[1])[found[3]]
    return PLACE.sub(lambda found: f"`{found[1]}:{line(found)} {found[3]}`", text)


def test_places_are_where_readme_says():
    places = PLACE.findall(README)
    wrong = [f"{script}:{line} {name}" for script, line, name in places
             if defined_at(script).get(name) != int(line)]
    assert not wrong, "python tests/test_readme.py brings these up to date"
    assert len(places) == len(re.findall(r"\.py:\d", README)) >= 40
    section = README.split("## Where is …?\n")[1].split("\n## ")[0]
    assert {int(n) for n in re.findall(r"^\| Eq\. (\d)", section, re.M)} == set(range(1, 10))


def test_line_numbers_are_brought_up_to_date():
    shifted = PLACE.sub(lambda found: f"`{found[1]}:1 {found[3]}`", README)
    assert with_lines(shifted) == README != shifted


def test_readme_takes_ten_minutes():
    assert len(README) <= 18_000


def test_what_is_referred_to_is_there():
    for folder, text in ((REPOSITORY, README), (REPOSITORY / ".github", DETAILS)):
        for name in re.findall(r"\[[^\]]*\]\(([^)]*)\)", text):  # pictures and files
            assert (folder / name).stat().st_size > 1000, name
    headings = {heading.lower() for heading in re.findall(r"^#+ (.*)", README, re.M)}
    for path in REPOSITORY.glob("*.py"):
        said = " ".join(re.sub(r'["\n]', " ", path.read_text("utf-8")).split())
        for section in re.findall(r"README, ([A-Z][a-z]+(?: [a-z]+)?)", said):
            assert section.lower() in headings, f"{path.name}: README, {section}"


if __name__ == "__main__":
    (REPOSITORY / "README.md").write_text(with_lines(README), "utf-8")
