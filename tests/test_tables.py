"""tests/tables.py: rows and commands, statistics by hand, interruption, all of it in small."""

import functools
import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

import distill
import evaluate
import reclip
import tables
from conftest import TABLES, few_tables, run
from run import load_checkpoint
from tables import all_runs, collect, command, direction, markdown


def options(out, *seeds, **others):
    return Namespace(**dict(out=out, seeds=list(seeds), dataset="shapes", preset="release",
                            passed_on=["--device", "cpu"]) | others)


@pytest.mark.parametrize("dataset, preset", [("shapes", "release"), ("voc", "release"),
                                             ("voc", "paper")])
def test_every_row_has_a_command_and_every_command_parses(dataset, preset, tmp_path):
    runs, rows = all_runs(dataset, preset)
    used = {row["run"] for table in rows for row in table["rows"]}
    for table in rows:
        assert table["reference"] is None or table["rows"][table["reference"]]["run"] in runs
        assert all(len(row["papers"]) == len(table["data_sets"]) for row in table["rows"])
    assert used - {"–"} == runs.keys() and len(runs) > 45  # nothing is trained that no row shows
    assert {teacher for teacher, _ in runs.values()} <= {None, *runs}
    args = options(tmp_path, 3, dataset=dataset, preset=preset,
                   passed_on=["--device", "cpu", "--data-root", str(tmp_path)])
    found = {}
    for name in runs:
        script, words = command(name, 3, runs, args)
        parsed = script.parse_arguments(words)
        assert parsed.out == tmp_path / f"{name}-3" and parsed.data_root == tmp_path
        if script is reclip:
            found[name] = reclip.settings_of(parsed)
            assert found[name].preset == preset
    # One thing is changed at a time, and a mask's temperature goes with the decoder.
    plain = vars(found["reclip++"])
    assert all(s.mask_temperature == found["reclip++" if s.decoder else "reclip"].mask_temperature
               for name, s in found.items() if s.method != "maskclip")
    for name, key in {"add": "sign", "query": "learn_query", "cosine": "pooling",
                      "global": "hypothesis", "class-norm": "wr_norm", "no-bias": "bias"}.items():
        changed = {k for k, v in vars(found[name]).items() if v != plain[k]}
        assert changed - {"out", "cache", "top", "threshold"} == {key}, name
    # Runs share a folder of hypotheses and views if and only if they make the same ones.
    caches = {}
    for s in found.values():
        caches.setdefault(s.cache, set()).add(
            (s.hypothesis, s.crop_ratio if s.hypothesis == "crops" else None,
             s.surgery if s.views else plain["surgery"]))
    assert all(len(kinds) == 1 for kinds in caches.values())


def test_the_papers_agree_with_themselves():
    """A run that stands in several tables has the same number for a data set in each of them."""
    numbers = {}
    for title, data_sets, _, rows in tables.TABLES:
        for label, row, papers in rows:
            for name, number in zip(data_sets.split(), papers.split(), strict=True):
                if number != "–":
                    numbers.setdefault((row if row != "–" else label, name), set()).add(number)
    assert numbers.pop(("reclip-distilled", "VOC")) == {"75.8", "75.4"}  # a footnote says so
    assert all(len(found) == 1 for found in numbers.values())
    assert len(numbers) > 90
    theirs = {label: papers for label, row, papers in tables.TABLES[0][3] if row == "–"}
    assert len(theirs) == 12 and theirs["CLIP-S4"] == "72.0 33.6 – – –"


def test_direction_by_hand():
    assert direction([1, 2, 3], [10]) == "same"  # mean 2, s.d. 1
    assert direction([-1, -2, -3], [10]) == direction([1, 2, 3], [-10]) == "opposite"
    assert direction([1, 2, -5], [-9]) == "within s.d."
    assert direction([-1, -1.1], [9, -3.6]) == "opposite"  # of several data sets the mean counts
    assert direction([1], [9]) is None  # one seed has no s.d.
    assert direction([], [9]) is direction([1, 2], []) is direction([1, 2], [0.0]) is None
    # Nothing is said of an effect that is too small, ours or theirs.
    assert direction([0.02, 0.03], [7.2]) is direction([1, 2], [0.3]) is None
    assert direction([0.02, 0.03], [0.02], 0.01) == "same"
    assert direction([0.02, 0.03], [0.34 - 0.33], 0.01) == "same"


def test_means_and_marks_of_the_papers_numbers(tmp_path, monkeypatch):
    few_tables(monkeypatch)
    values = {"maskclip": (50, 52, 57), "reclip++": (40, 43, 46), "reclip++-mask": (60, 61, 65),
              "global": (1, 1, 1), "t-0.24": (2, 2, 2), "r-1": (3, 3, 3)}
    for name, miou in values.items():
        stage = dict(maskclip="maskclip").get(name, "distilled" if "mask" in name else "rectified")
        for seed, value in enumerate(miou):
            (tmp_path / f"{name}-{seed}").mkdir()
            (tmp_path / f"{name}-{seed}" / "results.json").write_text(json.dumps({
                stage: dict(miou=value, class_preference=value / 100, standard=True),
                f"linear_probe_{stage}": dict(miou=value + 20, standard=True),
                "other": dict(miou=-1, standard=True)}))
    monkeypatch.setitem(tables.CONTRADICTIONS, ("reclip++", "VOC"), "one and another")
    title, names, reference, rows = TABLES[0]
    quoted = ("HSG", "–", "41.9 –")
    monkeypatch.setattr(tables, "TABLES", ((title, names, reference, (*rows, quoted)), TABLES[1]))
    args = options(tmp_path, 0, 1, 2)
    runs, made = all_runs("shapes")
    collect(made, runs, args)
    first, second, *sweeps = made
    assert len(sweeps) == 2
    maskclip, rectified, distilled, other = first["rows"]
    assert (maskclip["mean"], maskclip["n"]) == (53, 3)
    assert maskclip["sd"] == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert (rectified["mean"], rectified["sd"]) == (43, 3)
    assert (rectified["difference"], rectified["difference_sd"]) == pytest.approx((-10, 1))
    assert rectified["papers"] == [73.5, 13.5] and maskclip["papers"] == [49.5, None]
    assert (other["mean"], other["n"], other["direction"]) == (None, 0, None)
    assert [row["direction"] for row in first["rows"][:3]] == ["reference", "opposite", "same"]
    assert [row["mean"] for row in second["rows"]] == pytest.approx([0.43, 63])
    assert [row["label"] for row in sweeps[0]["rows"]] == ["t = 0.12", "t = 0.24",
                                                           "global hypotheses"]
    said = markdown(made, runs, args)
    assert ("| ReCLIP++ | 43.0 ± 3.0 | *73.5*\\* | *13.5* | -10.0 ± 1.0, **opposite** | reclip++ |"
            in said)
    assert "\\* The papers contradict each other: one and another." in said
    assert "| HSG | not run | *41.9* | – | – | – |" in said
    assert "|  | ours, shapes | *theirs, VOC* | *theirs, ADE* | direction | run |" in said
    assert "| class | 0.43 ± 0.03 | *0.37* | – | reclip++ |" in said
    assert "over n = 3 seeds (0, 1, 2)" in said and "none of it was measured here" in said
    assert tables.sensitivity_figure(sweeps).height == 400
    collect(made, runs, options(tmp_path, 1))
    assert [(row["mean"], row["sd"], row["n"]) for row in first["rows"][:3]] == [
        (52, None, 1), (43, None, 1), (61, None, 1)]


def test_only_the_recipes_evaluation_counts(trained_demo, small_demo, tmp_path, capsys):
    checkpoint = ("--checkpoint", trained_demo / "reclip.pt", "--out", tmp_path)
    rectified = lambda: tables.measured(tmp_path, None, "")
    maskclip = lambda: tables.measured(tmp_path, None, "--method maskclip")
    usual = run(evaluate.main, *checkpoint, "--bias")
    assert rectified()["miou"] == usual["rectified"]["miou"]
    for words in ("--split train", "--count-absent", "--slide 64 32"):
        run(evaluate.main, *checkpoint, *words.split())
        assert rectified() == maskclip() == {}, words
    run(evaluate.main, *checkpoint)
    assert rectified()["miou"] == usual["rectified"]["miou"]
    unfinished = load_checkpoint(trained_demo / "reclip.pt") | {"finished": False}
    torch.save(unfinished, tmp_path / "half.pt")
    run(evaluate.main, "--checkpoint", tmp_path / "half.pt")
    assert rectified() == {}
    assert f"{tmp_path}/half.pt is not finished" in capsys.readouterr().out
    run(evaluate.main, *checkpoint)
    run(evaluate.main, *checkpoint, "--pd", 0.99)  # which is for the rectified logits alone
    assert rectified() == {} and maskclip()["miou"] == usual["maskclip"]["miou"]


def test_interrupted_and_in_parts_it_is_the_same(small_demo, tmp_path, monkeypatch, capsys,
                                                 mistake):
    few_tables(monkeypatch)
    trained = []

    def watched(main, words):
        if stop and len(trained) == 3:
            raise SystemExit(130)
        trained.append(Path(words[words.index("--out") + 1]).name)
        return main(words)

    for script in reclip, distill:
        monkeypatch.setattr(script, "main", functools.partial(watched, script.main))
    make = functools.partial(run, tables.main, "--out", tmp_path, "--seeds")
    stop = True
    with pytest.raises(SystemExit):
        make(0)
    assert trained == ["maskclip-0", "reclip++-0", "global-0"]
    assert not (tmp_path / "tables.json").exists()
    assert "classes per image" in (tmp_path / "reclip++-0" / "log.txt").read_text()
    stop = False
    capsys.readouterr()
    make(0)
    assert trained == [f"{name}-0" for name in ("maskclip", "reclip++", "global", "t-0.24", "r-1",
                                                "reclip++-mask")]
    said = capsys.readouterr().out
    assert said.startswith("6 runs, 3 of them still to be made") and "tables 6/6" in said
    assert "pixel accuracy" not in said  # that is in the logs
    zero = json.loads((tmp_path / "tables.json").read_text())
    make(1)
    assert len(trained) == 12
    both = make(0, 1)
    assert len(trained) == 12 and "12 runs, 0 of them" in capsys.readouterr().out
    assert json.loads(json.dumps(both)) == json.loads((tmp_path / "tables.json").read_text())
    for alone, together in zip(zero, both):
        for a, b in zip(alone["rows"], together["rows"]):
            assert a["values"] == b["values"][:1] and b["n"] == 2
    assert all(-1 <= v <= 1 for v in both[1]["rows"][0]["values"])
    assert "Table X" in (tmp_path / "tables.md").read_text("utf-8")
    assert Image.open(tmp_path / "fig3.png").size[1] == 400
    assert len(list(tmp_path.glob("cache-*"))) == 8  # none, crops 1/2 and 1, global; two seeds
    # A run of other settings is not taken for this one, nor overwritten.
    monkeypatch.setitem(tables.RECTIFIED, "global", "--hypothesis global --lr 0.02")
    said = mistake(tables.main, "--out", tmp_path, "--seeds", 0)
    assert said.startswith(f"error: {tmp_path}/global-0/reclip.pt was made with other settings")


@pytest.mark.parametrize("words, message", [
    (("--dataset", "voc", "--data-root", "voc"), "need labels to measure with; voc lacks"),
    (("--dataset", "folder"), "folder lacks them"),
    (("--dataset", "coco"), 'no data set "coco"'),
    (("--seeds", 0, 1, 0), "--seeds 0 1 0: one is repeated"),
    (("--wrong", 3), "unrecognized arguments: --wrong 3"),
])
def test_mistakes(voc_root, tmp_path, monkeypatch, mistake, words, message):
    monkeypatch.chdir(tmp_path)
    for path in voc_root.rglob("SegmentationClass/*.png"):
        path.unlink()
    assert message in mistake(tables.main, "--out", "out", *words)
    assert not Path("out").exists()


def test_the_tables_are_a_program_of_their_own(mistake):
    assert "python tests/tables.py" in mistake(evaluate.main, "--seeds", 0, "--tables")
