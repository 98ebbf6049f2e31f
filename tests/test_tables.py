"""The programs beside the tests: tables.py in small, statistics by hand; benchmark.py, quickly."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

import benchmark
import distill
import reclip
import tables
from conftest import run


@pytest.mark.parametrize("dataset, preset", [("shapes", "release"), ("voc", "paper")])
def test_every_row_has_a_command(dataset, preset):
    runs, rows = tables.all_runs(dataset, preset)
    used = {row["run"] for table in rows for row in table["rows"]}
    assert used == runs.keys() and len(runs) > 40  # nothing is trained that no row shows
    args = Namespace(out=Path("o"), dataset=dataset, preset=preset, passed_on=["--workers", "0"])
    found = {name: script.parse_arguments(words) for name in runs
             for script, words in [tables.command(name, 3, runs, args)]}
    found = {name: reclip.settings_of(s) for name, s in found.items() if not runs[name][0]}
    # One thing is changed at a time, and a mask's temperature goes with the decoder.
    for name, key in dict(add="sign", query="learn_query", global_="hypothesis").items():
        changed = {k for k, v in vars(found[name.strip("_")]).items()
                   if v != vars(found["reclip++"])[k]}
        assert changed - {"out", "cache", "top", "threshold"} == {key}, name
    assert all(s.mask_temperature == found["reclip++" if s.decoder else "reclip"].mask_temperature
               for s in found.values() if s.method != "maskclip")


def test_direction_by_hand():
    assert tables.direction([1, 2, 3], [10]) == "same"  # mean 2, s.d. 1
    assert tables.direction([-1, -2, -3], [10]) == tables.direction([1, 2, 3], [-10]) == "opposite"
    assert tables.direction([1, 2, -5], [-9]) == "within s.d."
    assert tables.direction([1], [9]) is tables.direction([0.02, 0.03], [7.2]) is None


def test_all_of_it_in_small(small_demo, tmp_path, monkeypatch, capsys):
    """Two rows, a sweep, two seeds; the second call makes what is missing, the third nothing."""
    rows = (("MaskCLIP", "maskclip", "49.5"), ("ReCLIP++", "reclip++ class_preference", "0.37"),
            ("distilled", "reclip++-mask", "79.2"))
    monkeypatch.setattr(tables, "TABLES", (("Table X", "VOC", 0, rows),))
    monkeypatch.setattr(tables, "STAGES", {})
    monkeypatch.setattr(tables, "RECTIFIED", {"maskclip": "--method maskclip", "reclip++":
                                              "--epochs 1", "global": "--hypothesis global"})
    monkeypatch.setattr(tables, "DISTILLED", {"reclip++-mask": ("reclip++", "--losses mask")})
    monkeypatch.setitem(tables.SWEEPS, "shapes", dict(threshold=(0.24,), crop_ratio=(1.0,)))
    monkeypatch.setitem(distill.DEMO, "epochs", 1)
    for seeds, left in (([0], 6), ([0, 1], 6), ([0, 1], 0)):
        made = run(tables.main, "--out", tmp_path, "--seeds", *seeds)
        assert f"{6 * len(seeds)} runs, {left} of them" in capsys.readouterr().out
    assert json.loads((tmp_path / "tables.json").read_text()) == json.loads(json.dumps(made))
    maskclip, rectified, distilled = made[0]["rows"]
    assert (maskclip["n"], maskclip["papers"], maskclip["mean"]) == (
        2, [49.5], pytest.approx(sum(maskclip["values"]) / 2))
    assert -1 <= rectified["mean"] <= 1 and distilled["mean"] > 0
    said = (tmp_path / "tables.md").read_text("utf-8")
    assert f"| MaskCLIP | {maskclip['mean']:.1f} ± {maskclip['sd']:.1f} | *49.5* |" in said
    assert (tmp_path / "fig3.png").exists()


def test_the_benchmark_runs(capsys):
    """At a tiny size, where its own comparisons of values hold."""
    benchmark.main(["--quick"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("Reference", "cached", "121 crops", "readers"))
