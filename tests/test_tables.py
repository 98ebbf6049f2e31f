"""evaluate.py --tables: rows and commands, statistics by hand, interruption, all of it in small."""

import functools
import json
import math
import re
from argparse import Namespace

import pytest
import torch
from PIL import Image

import distill
import evaluate
import reclip
from conftest import few_tables, run
from evaluate import all_runs, collect, command, direction, markdown


@pytest.fixture
def few(monkeypatch, small_demo):
    few_tables(monkeypatch)


def options(out, *seeds, **others):
    return Namespace(**dict(out=out, seeds=list(seeds), dataset="shapes", data_root=None, clip=None,
                            device="cpu", workers=None, amp=None) | others)


@pytest.mark.parametrize("dataset", ["shapes", "voc"])
def test_every_row_has_a_command_and_every_command_parses(dataset, tmp_path):
    runs, tables = all_runs(dataset)
    used = set()
    for table in tables:
        assert table["reference"] is None or table["rows"][table["reference"]]
        for row in table["rows"]:
            used.add(row["run"])
            assert len(row["papers"]) == len(table["data_sets"]), (table["title"], row["label"])
    assert used == {*runs, *evaluate.DISTILLED}  # nothing is trained that no row shows
    assert {teacher for teacher, _ in evaluate.DISTILLED.values()} <= runs.keys()
    args, found = options(tmp_path, 3, dataset=dataset, data_root=tmp_path), {}
    for name in used:
        script, words = command(name, 3, runs, args)
        parsed = {"reclip": reclip, "distill": distill}[script].parse_arguments(words)
        assert parsed.out == tmp_path / f"{name}-3" and parsed.data_root == tmp_path
        if script == "reclip":
            found[name] = reclip.settings_of(parsed)
    # One thing is changed at a time, and a mask's temperature goes with the decoder.
    plain = vars(found["reclip++"])
    assert all(s.mask_temperature == found["reclip++" if s.decoder else "reclip"].mask_temperature
               for name, s in found.items() if name != "maskclip")
    for name, key in dict(add="sign", query="learn_query", cosine="pooling", global_="hypothesis",
                          class_norm="wr_norm", no_bias="bias").items():
        name = name.rstrip("_").replace("_", "-")
        changed = {k for k, v in vars(found[name]).items() if v != plain[k]}
        assert changed - {"out", "cache", "top", "threshold"} == {key}, name
    # Runs share a folder of hypotheses if and only if they make the same ones.
    caches = {}
    for s in found.values():
        caches.setdefault(s.cache, set()).add(
            (s.hypothesis, s.crop_ratio if s.hypothesis == "crops" else None))
    assert all(len(kinds) == 1 for kinds in caches.values()) and len(caches) <= 7


def test_the_papers_agree_with_themselves():
    """A run that stands in several tables has the same number for a data set in each of them."""
    numbers = {}
    for title, data_sets, _, rows in evaluate.TABLES:
        for _, row, papers in rows:
            for name, number in zip(data_sets.split(), papers.split()):
                if number != "–":
                    numbers.setdefault((row, name), set()).add(number)
    # Table I and II of ReCLIP++ have 75.8 for ReCLIP, its own paper 75.4.
    assert numbers.pop(("reclip-distilled", "VOC")) == {"75.8", "75.4"}
    assert all(len(found) == 1 for found in numbers.values())
    assert len(numbers) > 70


def test_direction_by_hand():
    paper = ([70.0, None], [60.0, 50.0])
    assert direction([5, 6, 8], [4, 4, 5], *paper) == "same"  # 1 2 3: mean 2, s.d. 1
    assert direction([4, 4, 5], [5, 6, 8], *paper) == "opposite"
    assert direction([4, 4, 5], [5, 6, 8], *reversed(paper)) == "same"
    assert direction([5, 6, 1], [4, 4, 5], *paper) == "within s.d."
    assert direction([5], [4], *paper) is None  # one seed has no s.d.
    assert direction([5, None], [4, 4], *paper) is None
    assert direction([5, 6], [4, 4], [None], [60.0]) is None
    assert direction([5, 6], [4, 4], [60.0], [60.0]) is None
    # Of several data sets the mean counts: +9 and -3.6.
    assert direction([1, 1], [2, 2.1], [58.5, 16.2], [49.5, 19.8]) == "opposite"


def test_means_and_marks_of_the_papers_numbers(few, tmp_path):
    values = {"maskclip": (50, 52, 57), "reclip++": (40, 43, 46), "reclip++-mask": (60, 61, 65),
              "global": (1, 1, 1), "t-0.24": (2, 2, 2), "r-1": (3, 3, 3)}
    for name, miou in values.items():
        stage = dict(maskclip="maskclip").get(name, "distilled" if "mask" in name else "rectified")
        for seed, value in enumerate(miou):
            (tmp_path / f"{name}-{seed}").mkdir()
            results = {stage: dict(miou=value, class_preference=value / 100, standard=True),
                       f"linear_probe_{stage}": dict(miou=value + 20, standard=True),
                       "other": dict(miou=-1, standard=True)}
            (tmp_path / f"{name}-{seed}" / "results.json").write_text(json.dumps(results))
    args = options(tmp_path, 0, 1, 2)
    runs, tables = all_runs("shapes")
    collect(tables, args)
    first, second, *sweeps = tables
    maskclip, rectified, distilled = first["rows"]
    assert (maskclip["mean"], maskclip["n"]) == (53, 3)
    assert maskclip["sd"] == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert (rectified["mean"], rectified["sd"]) == (43, 3)
    assert rectified["papers"] == [73.5, 13.5] and maskclip["papers"] == [49.5, None]
    assert first["data_sets"] == ["VOC", "ADE"]
    assert [row["direction"] for row in first["rows"]] == ["reference", "opposite", "same"]
    assert [row["mean"] for row in second["rows"]] == pytest.approx([0.43, 63])
    assert [row["label"] for row in sweeps[0]["rows"]] == ["t = 0.12", "t = 0.24",
                                                           "global hypotheses"]
    said = markdown(tables, runs, args)
    assert "| ReCLIP++ | 43.0 ± 3.0 | *73.5* | *13.5* | **opposite** | reclip++ |" in said
    assert "|  | ours, shapes | *theirs, VOC* | *theirs, ADE* | direction | run |" in said
    assert "| class | 0.43 ± 0.03 | *0.37* | – | reclip++ |" in said
    assert "over n = 3 seeds (0, 1, 2)" in said and "none of it was measured here" in said
    assert evaluate.sensitivity_figure(sweeps).height == 400
    collect(tables, options(tmp_path, 1))
    assert [(row["mean"], row["sd"], row["n"]) for row in first["rows"]] == [
        (52, None, 1), (43, None, 1), (61, None, 1)]


def test_other_evaluations_are_not_taken_for_the_tables(trained_demo, small_demo, tmp_path, capsys):
    """Only what was evaluated in the way of the recipe, on the validation images, counts."""
    checkpoint = ("--checkpoint", trained_demo / "reclip.pt", "--out", tmp_path)
    usual = run(evaluate.main, *checkpoint, "--bias")
    assert evaluate.measured(tmp_path, "reclip++")["miou"] == usual["rectified"]["miou"]
    for words in ("--split train", "--count-absent", "--slide 64 32"):
        run(evaluate.main, *checkpoint, *words.split())
        assert evaluate.measured(tmp_path, "reclip++") == {}, words
        assert evaluate.measured(tmp_path, "maskclip") == {}, words
    run(evaluate.main, *checkpoint)
    assert evaluate.measured(tmp_path, "reclip++")["miou"] == usual["rectified"]["miou"]
    unfinished = reclip.load_checkpoint(trained_demo / "reclip.pt") | {"finished": False}
    torch.save(unfinished, tmp_path / "half.pt")
    run(evaluate.main, "--checkpoint", tmp_path / "half.pt")
    assert evaluate.measured(tmp_path, "reclip++") == {}
    assert f"{tmp_path}/half.pt is not finished" in capsys.readouterr().out
    run(evaluate.main, *checkpoint)
    run(evaluate.main, *checkpoint, "--pd", 0.99)  # which is for the rectified logits alone
    assert evaluate.measured(tmp_path, "reclip++") == {}
    assert evaluate.measured(tmp_path, "maskclip")["miou"] == usual["maskclip"]["miou"]


def test_interrupted_and_in_parts_it_is_the_same(few, tmp_path, monkeypatch, capsys):
    trained, mains = [], {"reclip": reclip.main, "distill": distill.main}

    def watched(name, words):
        if stop and len(trained) == 3:
            raise SystemExit(130)
        trained.append(re.search(r"/([^/]*)$", words[words.index("--out") + 1])[1])
        return mains[name](words)

    for script in reclip, distill:
        monkeypatch.setattr(script, "main", functools.partial(watched, script.__name__))
    tables = functools.partial(run, evaluate.main, "--tables", "--out", tmp_path, "--seeds")
    stop = True
    with pytest.raises(SystemExit):
        tables(0)
    assert trained == ["maskclip-0", "reclip++-0", "global-0"]
    assert not (tmp_path / "tables.json").exists()
    assert (tmp_path / "reclip++-0" / "log.txt").read_text().count("hypotheses:") == 1
    stop = False
    capsys.readouterr()
    tables(0)
    order = [f"{name}-0" for name in ("maskclip", "reclip++", "global", "t-0.24", "r-1",
                                      "reclip++-mask")]
    assert trained == order
    said = capsys.readouterr().out
    assert said.startswith("6 runs, 3 of them still to be made") and "tables 6/6" in said
    assert "pixel accuracy" not in said  # that is in the logs
    zero = json.loads((tmp_path / "tables.json").read_text())
    tables(1)
    assert len(trained) == 12
    both = tables(0, 1)
    assert len(trained) == 12 and "12 runs, 0 of them" in capsys.readouterr().out
    assert both == json.loads((tmp_path / "tables.json").read_text())
    for alone, together in zip(zero, both):
        for a, b in zip(alone["rows"], together["rows"]):
            assert a["values"] == b["values"][:1] and b["n"] == 2
    assert all(-1 <= v <= 1 for v in both[1]["rows"][0]["values"])
    assert "Table X" in (tmp_path / "tables.md").read_text("utf-8")
    assert Image.open(tmp_path / "fig3.png").size[1] == 400
    assert len(list(tmp_path.glob("cache-*"))) == 8  # none, crops 1/2 and 1, global; two seeds
    # A run of other settings is not taken for this one, nor overwritten.
    monkeypatch.setitem(evaluate.RECTIFIED, "global", "--hypothesis global --lr 0.02")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        tables(0)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"error: {tmp_path}/global-0/reclip.pt was made with other settings")
