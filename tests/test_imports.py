"""Imports go one way, clip ← files ← data ← run, maps ← reclip ← distill ← evaluate, and to few
packages; run.py and maps.py know nothing of each other."""

import ast
import sys

import pytest

from conftest import REPOSITORY

LEVELS = dict(clip=0, files=1, data=2, run=3, maps=3, reclip=4, distill=5, evaluate=6)
# Two commands end with an evaluation.
ALLOWED = {("reclip", "main", "evaluate"), ("distill", "main", "evaluate")}
PACKAGES = {"torch", "torchvision", "numpy", "PIL", "ftfy", "regex", *sys.stdlib_module_names}
FILES = [*sorted(REPOSITORY.glob("clip/*.py")), *sorted(REPOSITORY.glob("*.py"))]


def imports(node, place=""):
    """(place, package) of all imports below a node; place: the outermost function or class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((place, alias.name.split(".")[0]) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield place, "clip" if child.level else child.module.split(".")[0]
        yield from imports(child, place or getattr(child, "name", ""))


def refused(name, source):
    """Which imports of a file's source point upwards or to other packages, sorted."""
    found = set(imports(ast.parse(source)))
    upwards = {(place, other) for place, other in found if other != name
               and LEVELS.get(other, -1) >= LEVELS[name] and (name, place, other) not in ALLOWED}
    return sorted(upwards | {(place, other) for place, other in found
                             if other not in PACKAGES.union(LEVELS)})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_imports_point_downwards(path):
    name = "clip" if path.parent.name == "clip" else path.stem
    assert refused(name, path.read_text("utf-8")) == []


def test_every_file_has_its_place():
    assert {path.stem for path in REPOSITORY.glob("*.py")} == LEVELS.keys() - {"clip"}


SOURCE = """
import numpy.linalg, torch as t
from clip.clip import load
from . import model
def main():
    import evaluate
    if t:
        from distill import LOSSES
    import maps
class Network:
    def forward(self):
        import evaluate, pandas.io
"""


@pytest.mark.parametrize("name, expected", [
    ("clip", "Network.evaluate Network.pandas main.distill main.evaluate main.maps"),
    ("evaluate", "Network.pandas"),
    ("distill", "Network.evaluate Network.pandas"),
    ("reclip", "Network.evaluate Network.pandas main.distill"),
    ("run", "Network.evaluate Network.pandas main.distill main.evaluate main.maps")])
def test_the_test_can_fail(name, expected):
    """It sees an import upwards, or of another package, wherever it stands."""
    assert " ".join(map(".".join, refused(name, SOURCE))) == expected
