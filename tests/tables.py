"""Every table of both papers, and Fig. 3 of ReCLIP++: ours beside theirs.

    python tests/tables.py                                              on the demo
    python tests/tables.py --dataset voc --data-root DIR --preset paper

Makes tables.md, tables.json and fig3.png by dozens of runs of the three scripts, each with a
log.txt in its folder. Goes on where it was interrupted; several may run at once, each with other
--seeds. Options that the scripts share, such as --device and --workers, are passed on to them. What
the papers report, and the runs that make it, stands in papers.py.
"""

import contextlib
import itertools
import json
import statistics
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distill  # noqa: E402
import evaluate  # noqa: E402
import reclip  # noqa: E402
from data import (Parser, Progress, UserError, clean_exit, make_folder, open_dataset,  # noqa: E402
                  save_picture, seed_number, user_path, write_text)
from papers import BLOCKS, DISTILLED, RECTIFIED, STAGES, SWEEPS, TABLES  # noqa: E402


def all_runs(dataset, preset="release"):
    """What there is to run, and the tables, with other last blocks and Fig. 3 filled in.
    Returns {run: (teacher or None, flags)}, teachers before students, and a list of
    dict(title, data_sets, reference, rows), each row a dict(label, run, measure, papers)."""
    own, sweeps = reclip.recipe(dataset, preset), SWEEPS.get(dataset, SWEEPS["others"])
    runs = {run: (None, flags) for run, flags in RECTIFIED.items()}
    students, tables = dict(DISTILLED), list(TABLES)
    for kind, run in STAGES.items():
        rows, theirs = [], BLOCKS if kind == "masks" else {}
        data_sets, blank = ("VOC Context ADE Cityscapes", "– – – –") if theirs else ("–", "–")
        for block in list(BLOCKS)[:5]:
            name = run if block == own["surgery"] else f"{run}-{block}"
            if kind == "distilled":
                students.setdefault(name, (name.replace("-distilled", ""), ""))
            else:  # the demo's grid is small
                sigma = " --sigma 2" * (block == "naclip" and dataset == "shapes")
                runs.setdefault(name, (None, f"{RECTIFIED[run]} --surgery {block}{sigma}"))
            for label, refined in ((block, ""), (f"{block}, PAMR", " pamr")):
                rows.append((label, name + refined, theirs.get(block + refined, blank)))
        tables.append((f"Other last blocks, {kind}", data_sets, 0, rows))
    for letter, key, title in (("t", "threshold", "Fig. 3 a: threshold t of the hypotheses"),
                               ("r", "crop_ratio", "Fig. 3 b: relative size r of the crops")):
        rows = []
        for value in sorted({own[key], *sweeps[key]}):
            run = "reclip++" if value == own[key] else f"{letter}-{value:.3g}"
            runs.setdefault(run, (None, f"--{key.replace('_', '-')} {value}"))
            rows.append((f"{letter} = {value:.3g}", run, "–"))
        rows.append(("global hypotheses", "global", "–"))
        tables.append((f"{title}, rectified", "–", None, rows))
    number = lambda text: None if text == "–" else float(text)
    return runs | students, [dict(title=title, data_sets=names.split(), reference=reference, rows=[
        dict(label=label, run=run.split()[0], measure=(run.split() + ["miou"])[1],
             papers=[*map(number, papers.split())]) for label, run, papers in rows])
        for title, names, reference, rows in tables]


def command(run, seed, runs, args):
    """How to make a run: the script, a module, and its arguments as a list of words."""
    (teacher, flags), out = runs[run], ["--out", f"{args.out}/{run}-{seed}", *args.passed_on]
    if teacher:
        path = f"{args.out}/{teacher}-{seed}/reclip.pt"
        return distill, ["--teacher", path, *flags.split(), *out]
    preset = ["--preset", args.preset] * (args.preset != "release")
    words = ["--dataset", args.dataset, "--seed", str(seed), *preset, *flags.split(), *out]
    return reclip, [*words, "--cache", f"{args.out}/cache-{seed}"]


def measured(folder, teacher, flags):
    """{measure: value} in a run's results.json, of its own stage, by the recipe's evaluation."""
    file = Path(folder) / "results.json"
    stage = "distilled" if teacher else "maskclip" if "maskclip" in flags else "rectified"
    results = json.loads(file.read_text("utf-8")) if file.exists() else {}
    results = {name: result for name, result in results.items() if result.get("standard")}
    others = dict(linear_probe=f"linear_probe_{stage}", pamr=f"{stage}_pamr",
                  no_pd=f"{stage}_no_pd" if f"{stage}_no_pd" in results else stage)
    return results.get(stage, {}) | {measure: results[name]["miou"]
                                     for measure, name in others.items() if name in results}


def make_runs(runs, tables, args):
    """Train and evaluate whatever the tables need and is not there yet.
    A run's folder keeps the command that made it: after another one its script decides whether to
    go on or to refuse."""
    needed, todo, total = {run: set() for run in runs}, [], len(args.seeds) * len(runs)
    for row in itertools.chain(*(table["rows"] for table in tables)):
        needed.setdefault(row["run"], set()).add(row["measure"])
    for seed, run in itertools.product(args.seeds, runs):
        folder, (script, words) = args.out / f"{run}-{seed}", command(run, seed, runs, args)
        made = folder / "command.txt"
        known = made.read_bytes() if made.exists() else None
        if known != " ".join(words).encode() or needed[run] - measured(folder, *runs[run]).keys():
            todo.append((run, folder, script, words))
    print(f"{total} runs, {len(todo)} of them still to be made → {args.out}/", flush=True)
    progress = Progress("tables", total, total - len(todo))
    for run, folder, script, words in todo:
        make_folder(folder)
        print(f"{folder.name}, which tells in {folder}/log.txt how far it is", flush=True)
        with open(folder / "log.txt", "a", encoding="utf-8", buffering=1) as file:
            with contextlib.redirect_stdout(file):
                script.main(words)
                flags = {"--bias" if measure.endswith("preference") else
                         f"--{measure.replace('_', '-')}"
                         for measure in needed[run] - measured(folder, *runs[run]).keys()}
                if flags:
                    evaluate.main(["--checkpoint", f"{folder}/{script.__name__}.pt",
                                   *sorted(flags), *args.passed_on])
        write_text(folder / "command.txt", " ".join(words))
        progress.advance(1)
    progress.close()


def direction(differences, gaps, smallest=0.5):
    """Whether a row is on the same side of its table's reference row as in the paper, as in NOTE.
    differences: ours, one a seed; gaps: theirs, one a data set, of which the mean counts."""
    if not gaps or len(differences) < 2:
        return None
    mean, gap = statistics.mean(differences), statistics.mean(gaps)
    if min(abs(mean), abs(gap)) < smallest - 1e-9:  # 0.34 - 0.33 counts as 0.01
        return None
    if abs(mean) <= statistics.stdev(differences):
        return "within s.d."
    return "same" if mean * gap > 0 else "opposite"


def collect(tables, runs, args):
    """Add to each row of the tables of `all_runs`, for tables.json: our values, a value a seed, n,
    mean and sd (None where there is none), and its difference from the table's reference row."""
    mean = lambda values: statistics.mean(values) if values else None
    sd = lambda values: statistics.stdev(values) if len(values) > 1 else None
    minus = lambda pairs: [a - b for a, b in pairs if None not in (a, b)]
    for row in itertools.chain(*(table["rows"] for table in tables)):
        values = [measured(args.out / f"{row['run']}-{seed}", *runs[row["run"]])[row["measure"]]
                  for seed in args.seeds]
        known = [] if None in values else values
        row |= dict(seeds=args.seeds, values=values, n=len(values), mean=mean(known), sd=sd(known))
    for table in tables:
        for row in table["rows"]:
            other = {} if table["reference"] is None else table["rows"][table["reference"]]
            ours = minus(zip(row["values"], other.get("values", [])))
            gaps = minus(zip(row["papers"], other.get("papers", [])))
            smallest = 0.01 if row["measure"].endswith("preference") else 0.5
            row |= dict(difference=mean(ours), difference_sd=sd(ours), direction=(
                "reference" if row is other else direction(ours, gaps, smallest)))


NOTE = """Ours: mean ± standard deviation over n = {n} seeds ({seeds}), on the validation images of
{dataset}, by the preset {preset}. *Theirs*: the number of the papers for the same row, on the data
set named, which is not ours; none of it was measured here. mIoU in per cent unless the title says
otherwise. *Theirs* of other last blocks: ClearCLIP, SCLIP and NACLIP, with sliding windows and
lists of synonyms. The papers contradict themselves: ReCLIP distilled on VOC 75.4 and 75.8, ReCLIP++
on Stuff 20.9 and 21.2.

Direction: our difference from the table's reference row ± its standard deviation over the seeds,
and whether it has the sign of the papers'; "within s.d.": it is smaller than that. A dash: one of
the two is below 0.5 mIoU (0.01 for a preference score) or not there, or there is a single seed.
"""


def markdown(tables, runs, args):
    """Tables with our numbers as text in Markdown, with the command of every run at the end."""
    line = lambda cells: "| " + " | ".join(cells) + " |"
    lines = [NOTE.format(n=len(args.seeds), seeds=", ".join(map(str, args.seeds)),
                         dataset=args.dataset, preset=args.preset)]
    for table in tables:
        theirs = [f"*theirs, {name}*".replace(", –", "") for name in table["data_sets"]]
        heads = ["", f"ours, {args.dataset}", *theirs, "direction", "run"]
        lines += [f"### {table['title']}\n", line(heads), "|---" * len(heads) + "|"]
        for row in table["rows"]:
            form = ".2f" if row["measure"].endswith("preference") else ".1f"
            spread = lambda mean, sd, sign="": f"{mean:{sign}{form}}" + (
                "" if sd is None else f" ± {sd:{form}}")
            ours = "–" if row["mean"] is None else spread(row["mean"], row["sd"])
            theirs = ["–" if value is None else f"*{value:{form}}*" for value in row["papers"]]
            verdict = row["direction"] or "–"
            verdict = "**opposite**" if verdict == "opposite" else verdict
            if row["difference"] is not None and verdict != "reference":
                verdict = f"{spread(row['difference'], row['difference_sd'], '+')}, {verdict}"
            lines.append(line([row["label"], ours, *theirs, verdict, row["run"]]))
        lines.append("")
    lines += [f"### Runs, with seed {args.seeds[0]}\n", "| run | command |", "|---|---|"]
    for run in runs:
        script, words = command(run, args.seeds[0], runs, args)
        lines.append(line([run, f"`python {script.__name__}.py {' '.join(words)}`"]))
    return "\n".join(lines) + "\n"


def sensitivity_figure(tables):
    """Fig. 3, of its two tables: mIoU against t and r, and that of global hypotheses; PIL."""
    sheet, point = Image.new("RGB", (940, 400)), lambda x, row: (x, row["mean"], row["sd"] or 0)
    for left, (*rows, last) in zip((0, 470), (table["rows"] for table in tables)):
        xs = [float(row["label"].split()[-1]) for row in rows]
        lines = {"hypotheses of crops": [*map(point, xs, rows)],
                 last["label"]: [point(xs[i], last) for i in (0, -1)]}
        sheet.paste(evaluate.chart(lines, xs, rows[0]["label"].split()[0], 470, 400), (left, 0))
    return sheet


@clean_exit
def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--dataset", default="shapes", help="default: shapes, the built-in demo")
    flag("--data-root", type=user_path, help="the folder that holds the data set")
    flag("--preset", choices=("release", "paper"), default="release", help="which published recipe")
    flag("--seeds", type=seed_number, nargs="+", default=[0, 1, 2])
    flag("--out", type=user_path, default=Path("runs/tables"), help="default: runs/tables")
    args, args.passed_on = parser.parse_known_args(argv)
    args.passed_on += ["--data-root", str(args.data_root)] if args.data_root else []
    args.seeds = sorted(set(args.seeds))
    if args.dataset == "folder" or not all(
            open_dataset(args.dataset, args.data_root, split).has_labels
            for split in ("train", "val")):
        raise UserError(f"the tables need labels to measure with; {args.dataset} lacks them")
    runs, tables = all_runs(args.dataset, args.preset)
    make_runs(runs, tables, args)
    collect(tables, runs, args)
    write_text(args.out / "tables.json", json.dumps(tables, indent=1, ensure_ascii=False) + "\n")
    write_text(args.out / "tables.md", markdown(tables, runs, args))
    save_picture(sensitivity_figure(tables[-2:]), args.out / "fig3.png")
    print(f"→ {args.out}/tables.md, tables.json, fig3.png")
    return tables


if __name__ == "__main__":
    main()
