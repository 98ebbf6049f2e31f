"""Mistakes and damaged files, in tables: one line on stderr, exit code 2, nothing changed on disk.

Cases that other files of the tests have (test_commands.py, test_data.py, test_images.py,
test_authors.py, test_distill.py) are not here.
"""

import contextlib
import io
import json
import pickle
import shutil
import struct
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import distill
import evaluate
import reclip
from clip import clip as loading
from conftest import REAL, random_clip, run, snapshot

VOC = Path("VOCdevkit/VOC2012")
RUN = ("reclip.pt", "hypotheses.jsonl", "views.npy", "views.json", "log.jsonl", "results.json")


def png(width, height, content=b""):
    """A PNG file that claims a size, whatever its content is."""
    chunk = lambda kind, body: (struct.pack(">I", len(body)) + kind + body
                                + struct.pack(">I", zlib.crc32(kind + body)))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0,
                                                             0))
            + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b""))


class Bomb:
    """Pickled, an order to make a file named `ran` in the working directory."""

    def __reduce__(self):
        return exec, ("open('ran', 'w').write('code')",)


def change_zip(path, out, name, content):
    """A copy of a zip archive in which the member that ends in `name` has another content."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for member in old.namelist():
            new.writestr(member, content if member.endswith(name) else old.read(member))


@contextlib.contextmanager
def changed(path, out):
    """The content of a file of torch.save, to be changed and saved as `out`."""
    content = torch.load(path, weights_only=True)
    yield content
    torch.save(content, out)


@pytest.fixture(scope="session")
def place(trained_demo, tmp_path_factory):
    """A working directory with things that are not what they should be. Nothing changes it."""
    root = tmp_path_factory.mktemp("place")
    with contextlib.chdir(root):
        make_data()
        make_class_lists()
        make_clips()
        make_checkpoints(trained_demo)
    return root


def make_data():
    photos = REAL / VOC / "JPEGImages"
    for name in ("good", "text", "bomb", "short", "floats", "deep", "dangling", "surrogate"):
        shutil.copytree(photos, name)
    Path("text/0.jpg").write_text("I am no picture")
    Path("bomb/0.png").write_bytes(png(60_000, 60_000))
    Path("short/0.png").write_bytes(png(90, 60, b"too little"))
    Image.new("F", (4, 4), 0.5).save("floats/0.tif")
    Image.new("I", (4, 4), 1 << 20).save("deep/0.tif")
    Path("dangling/0.jpg").symlink_to("nowhere.jpg")
    Path("hidden").mkdir()
    shutil.copy(photos / "2011_000003.jpg", "hidden/.a.jpg")
    Path("file").write_text("no folder")

    trees = {name: Path(name, VOC) for name in (
        "voc", "list-bytes", "list-folder", "list-outside", "jpegs-file", "label-cut", "label-ids",
        "label-rgba", "label-bomb", "label-float", "label-some", "image-cut")}
    for tree in trees.values():
        shutil.copytree(REAL / VOC, tree)
    lists, label = Path("ImageSets/Segmentation"), "SegmentationClass/2011_000025.png"
    for file in ("train.txt", "val.txt"):
        (trees["list-bytes"] / lists / file).write_bytes(b"2011_\xff\xfe\n")
        (trees["list-folder"] / lists / file).unlink()
        (trees["list-folder"] / lists / file).mkdir()
        (trees["list-outside"] / lists / file).write_text("../../../../good/2011_000003\n")
    shutil.rmtree(trees["jpegs-file"] / "JPEGImages")
    (trees["jpegs-file"] / "JPEGImages").write_text("no folder")
    whole = (trees["voc"] / label).read_bytes()
    (trees["label-cut"] / label).write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((375, 500), 300, np.uint16)).save(trees["label-ids"] / label)
    Image.new("RGBA", (500, 375)).save(trees["label-rgba"] / label)
    (trees["label-bomb"] / label).write_bytes(png(60_000, 60_000))
    Image.new("F", (500, 375)).save(trees["label-float"] / label, format="TIFF")
    (trees["label-some"] / lists / "val.txt").write_text("2011_000025\n2011_000003\n")
    (trees["label-some"] / label).unlink()
    jpeg = trees["image-cut"] / "JPEGImages/2011_000025.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:20_000])

    (Path("context") / "VOCdevkit/VOC2010/JPEGImages").mkdir(parents=True)
    Path("mats").mkdir()
    Path("mats/2008_000002.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + b"\7")
    (Path("ade") / "images/validation").mkdir(parents=True)
    (Path("stuff") / "images").mkdir(parents=True)
    (Path("city") / "leftImg8bit/val").mkdir(parents=True)


def make_class_lists():
    Path("latin.txt").write_bytes("Löwe\nBär\n".encode("latin-1"))
    Path("picture.txt").write_bytes(png(4, 4))
    Path("many.txt").write_text("\n".join(f"thing {n}" for n in range(256)))
    Path("escape.txt").write_text("cat\n\x1b[31mdog\n")


def make_clips():
    state = {name: value.half() for name, value in random_clip().state_dict().items()}

    def save(name, **changes):
        torch.save({k: v for k, v in (state | changes).items() if v is not None}, name)

    save("clip.pt")
    save("missing.pt", ln_final=None, **{"ln_final.weight": None})
    save("extra.pt", **{"visual.new": torch.zeros(2)})
    save("shape.pt", **{"ln_final.weight": torch.zeros(3)})
    save("vocabulary.pt", **{"token_embedding.weight": torch.zeros(500, 64)})
    save("context.pt", positional_embedding=torch.zeros(20, 64))
    save("heads.pt", vision_heads=torch.tensor(5))
    save("flat.pt", **{"visual.conv1.weight": torch.zeros(4)})
    save("nan.pt", **{"visual.proj": torch.full((64, 32), torch.nan)})
    torch.save([1, 2], "list.pt")
    torch.save({"a": {"b": 1}}, "nested.pt")
    Path("cut.pt.gz").write_bytes(loading.TINY_PATH.read_bytes()[:100_000])
    Path("words.pt").write_text("weights")
    Path("folder.pt").mkdir()

    # Files that would run code if they were unpickled without care.
    torch.save({"state_dict": Bomb(), "settings": {}, "classes": [], "state": {}}, "bomb.pt")
    Path("bomb.pkl").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save(Bomb(), "old-bomb.pt", _use_new_zipfile_serialization=False)
    change_zip("clip.pt", "zip-bomb.pt", "/data.pkl", pickle.dumps(Bomb(), protocol=2))
    np.save("array-bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with tarfile.open("tar-bomb.pt", "w") as file:  # the oldest of torch's formats
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Bomb(), protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    with warnings.catch_warnings(action="ignore"):  # PyTorch would like it to be forgotten
        torch.jit.script(torch.nn.Linear(2, 2)).save("script.pt")
    change_zip("script.pt", "script-bomb.pt", ".pkl", pickle.dumps(Bomb(), protocol=2))


def make_checkpoints(trained):
    """Folders of runs in which one file is not what it should be."""

    def folder(name, *files):
        Path(name).mkdir()
        for file in files or RUN:
            shutil.copy(trained / file, name)
        for lock in (".run.lock", ".cache.lock", ".results.lock"):
            Path(name, lock).touch()
        return Path(name)

    folder("run")
    for name in ("reclip", "distill"):
        content = (trained / f"{name}.pt").read_bytes()
        (folder(f"{name}-cut", f"{name}.pt") / f"{name}.pt").write_bytes(content[:-3000])

    def without(key):
        def change(checkpoint):
            del checkpoint[key]
        return change

    changes = {
        "no-settings": without("settings"), "no-clip": without("clip"), "no-wr": without("Wr"),
        "no-kind": without("kind"), "empty-state": lambda c: c.update(state={}),
        "text-state": lambda c: c.update(state="text"),
        "wrong-state": lambda c: c["state"].update(Wq=torch.zeros(3, 64)),
        "half-state": lambda c: c["state"].pop("position.weight"),
        "no-setting": lambda c: c["settings"].pop("surgery"),
        "odd-setting": lambda c: c["settings"].update(bias="odd"),
        "list-settings": lambda c: c.update(settings=[1]),
        "few-classes": lambda c: c.update(classes=c["classes"][:4]),
        "wrong-wr": lambda c: c.update(Wr=torch.zeros(10, 9)),
        "number-classes": lambda c: c.update(classes=5),
        "no-optimizer": lambda c: c.update(optimizer=None, finished=False, step=2),
    }
    for name, change in changes.items():
        with changed(trained / "reclip.pt", folder(name) / "reclip.pt") as checkpoint:
            change(checkpoint)
    for name, change in {"d-no-settings": without("settings"),
                         "d-no-setting": lambda c: c["settings"].pop("student"),
                         "d-odd-student": lambda c: c["settings"].update(student="odd"),
                         "d-half-state": lambda c: c["state"].pop("network.aspp.1.conv.weight"),
                         "d-no-state": lambda c: c.update(state={})}.items():
        with changed(trained / "distill.pt", folder(name, "distill.pt") / "distill.pt") as c:
            change(c)

    lines = (trained / "hypotheses.jsonl").read_text().splitlines(keepends=True)
    row = lambda **changes: json.dumps(json.loads(lines[1]) | changes) + "\n"
    for name, content in {"h-short": row(scores=[1, 2]), "h-text": row(scores="many"),
                          "h-words": row(scores=["a"] * 10), "h-list": "[1, 2]\n",
                          "h-no-scores": '{"id": "train-000"}\n', "h-number": "7\n",
                          "h-cut": lines[1][:20] + "\n"}.items():
        (folder(name) / "hypotheses.jsonl").write_text("".join([lines[0], content, *lines[2:]]))
    (folder("h-bytes") / "hypotheses.jsonl").write_bytes(b"\xff\xfe\n")
    (folder("h-pickle") / "hypotheses.jsonl").write_bytes(Path("bomb.pkl").read_bytes())
    for name, content in {"l-words": b"words\n", "l-bytes": b"\xff\xfe\n", "l-list": b"[1]\n",
                          "l-no-step": b'{"loss": 1}\n'}.items():
        (folder(name) / "log.jsonl").write_bytes(content)
    for name, file, content in (
            ("v-cut", "views.npy", (trained / "views.npy").read_bytes()[:9000]),
            ("v-words", "views.npy", b"words"), ("v-empty", "views.npy", b""),
            ("v-pickle", "views.npy", Path("array-bomb.npy").read_bytes()),
            ("v-json", "views.json", b"{"), ("v-bytes", "views.json", b"\xff\xfe"),
            ("v-list", "views.json", b"[1]"), ("v-other", "views.json", b"{}")):
        (folder(name) / file).write_bytes(content)
        Path(name, "reclip.pt").unlink()  # a finished run needs no views
    for name, content in {"r-words": b"words", "r-list": b"[1]", "r-bytes": b"\xff\xfe",
                          "r-cut": (trained / "results.json").read_bytes()[:300],
                          "r-number": b'{"maskclip": 7}'}.items():
        (folder(name) / "results.json").write_bytes(content)


FOLDER = ["--dataset", "folder", "--classes", "cat, dog", "--data-root"]
SHORT = ["--epochs", "3", "--out"]  # the command that made the run, given its folder


def on(tree):
    """The options for VOC's tree in a folder, with a small CLIP."""
    return ["--dataset", "voc", "--data-root", tree, "--clip", "clip.pt", "--method", "maskclip"]


CASES = {
    reclip.main: [
        # the command line
        (["--seed", str(1 << 70)], "--seed is 1180591620717411303424"),
        (["--crop", "8"], "--crop 8 is a single patch; expected more than 8"),
        (["--method", "maskclip", "--decoder"], "--method maskclip learns nothing"),
        (["--method", "maskclip", "--bias", "joint", "--hypothesis", "crops"],
         "--method maskclip learns nothing"),
        (["--lr", "nan"], "--lr is nan; expected more than 0"),
        (["--tau", "inf"], "--tau is inf; expected more than 0"),
        (["--threshold", "nan"], "--threshold is nan; expected 0 to 1"),
        (["--pd", "-0.5"], "--pd is -0.5; expected 0 to 1"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--device", "meta"], "--device meta"),
        (["--out", "file"], "cannot write to file"),
        (["--out", "file/run"], "cannot write to file/run"),
        (["--download", "--dataset", "voc"], "--download needs --data-root"),
        # data trees
        (["--dataset", "voc", "--data-root", "file"], "no folder file"),
        (["--dataset", "voc", "--data-root", "list-outside", "--clip", "clip.pt"],
         "1 of the 1 images in list-outside"),
        (on("jpegs-file"), "no voc in jpegs-file: expected"),
        (["--dataset", "ade", "--data-root", "ade"], "no ade in ade: expected"),
        (["--dataset", "stuff", "--data-root", "stuff"], "no stuff in stuff: expected"),
        (["--dataset", "context", "--data-root", "context"], "cannot read the list of images"),
        ([*FOLDER, "hidden"], "no images of folder train in hidden"),
        # class lists
        ([*FOLDER[:2], "--classes", "latin.txt", "--data-root", "good"],
         "cannot read class names from latin.txt"),
        ([*FOLDER[:2], "--classes", "picture.txt", "--data-root", "good"],
         "cannot read class names from picture.txt"),
        ([*FOLDER[:2], "--classes", "many.txt", "--data-root", "good"], "256 classes"),
        ([*FOLDER[:2], "--classes", "escape.txt", "--data-root", "good"], "no printable text"),
        ([*FOLDER[:2], "--classes", "cat, \udcff", "--data-root", "good"], "no printable text"),
        ([*FOLDER[:2], "--classes", "good.txt", "--data-root", "good"], "no file good.txt"),
        # CLIP files
        *(([*FOLDER, "good", "--clip", file], message) for file, message in {
            "missing.pt": "missing.pt: not a CLIP state dict: 1 missing (ln_final.weight)",
            "extra.pt": "extra.pt: not a CLIP state dict: 1 left over (visual.new)",
            "shape.pt": "shape.pt: not a CLIP state dict: 1 of another shape (ln_final.weight",
            "vocabulary.pt": "vocabulary.pt has a vocabulary of 500",
            "context.pt": "a context of 20 tokens",
            "heads.pt": "heads.pt: ", "flat.pt": "flat.pt: not a CLIP state dict",
            "nan.pt": "nan.pt: ", "list.pt": "list.pt: not a state dict",
            "nested.pt": "nested.pt: not a state dict", "cut.pt.gz": "damaged gzip file",
            "words.pt": "not a readable file", "folder.pt": "is neither a file nor a model",
            "run/reclip.pt": "run/reclip.pt: not a state dict",
            "good/2011_000003.jpg": "not a readable file",
            "bomb.pt": "not a readable file", "bomb.pkl": "not a readable file",
            "zip-bomb.pt": "not a readable file", "old-bomb.pt": "not a readable file",
            "tar-bomb.pt": "not a readable file",
            "script.pt": "a TorchScript archive that is none of OpenAI's",
            "script-bomb.pt": "a TorchScript archive that is none of OpenAI's"}.items()),
        # what lies in the run's folder
        *(([*SHORT, folder], "reclip.pt is not a checkpoint") for folder in (
            "no-settings", "list-settings", "reclip-cut", "no-clip", "empty-state", "text-state",
            "wrong-state", "half-state", "no-optimizer")),
        ([*SHORT, "number-classes"], "reclip.pt was made with other classes"),
        *(([*SHORT, folder], "hypotheses.jsonl is damaged; delete it") for folder in (
            "h-short", "h-text", "h-words", "h-list", "h-no-scores", "h-number", "h-cut", "h-bytes",
            "h-pickle")),
        *(([*SHORT, folder], "views.npy is damaged; delete it") for folder in (
            "v-cut", "v-words", "v-empty", "v-pickle")),
        *(([*SHORT, folder], "views.json is damaged; delete views.* there") for folder in (
            "v-json", "v-bytes", "v-list")),
        ([*SHORT, "v-other"], "v-other/views.json was made with other settings (activation None"),
        *(([*SHORT, folder], "log.jsonl is damaged") for folder in (
            "l-words", "l-bytes", "l-list", "l-no-step")),
    ],
    evaluate.main: [
        (["--checkpoint", "run"], "run is not a checkpoint"),
        (["--checkpoint", "run/results.json"], "run/results.json is not a checkpoint"),
        (["--checkpoint", "run/reclip.pt", "--workers", "-1"], "--workers is -1"),
        (["--checkpoint", "run/reclip.pt", "--pd", "nan"], "--pd is nan; expected 0 to 1"),
        (["--checkpoint", "run/reclip.pt", "--slide", "10", "20"], "leaves gaps"),
        (["--checkpoint", "run/reclip.pt", "--out", "file"], "cannot write to file"),
        (["--checkpoint", "run/reclip.pt", "--method", "maskclip"], "--method goes with --images"),
        (["--checkpoint", "run/reclip.pt", "--pd", "0.5", "--no-pd"], "contradict each other"),
        *((["--checkpoint", "run/reclip.pt", *words], "cannot be changed afterwards") for words in (
            ("--surgery", "value"), ("--activation", "gelu"))),
        *((["--checkpoint", "run/reclip.pt", "--images", "good", flag],
           f"--images predicts, {flag} evaluates") for flag in ("--hypotheses", "--count-absent")),
        (["--checkpoint", "run/reclip.pt", "--images", "good", "--out", "file"],
         "cannot write to file"),
        (["--images", "good", "--method", "maskclip", "--classes", "a, a"], "is repeated"),
        (["--images", "good", "--method", "maskclip", "--classes", "a", "--dataset", "coco"],
         'no data set "coco"'),
        (["--images", "good", "--method", "maskclip", "--classes", "a", "--clip", "script.pt"],
         "a TorchScript archive that is none of OpenAI's"),
        *((["--checkpoint", f"{name}/reclip.pt"], f"{name}/reclip.pt is not a checkpoint")
          for name in ("no-settings", "no-clip", "no-wr", "empty-state", "text-state",
                       "wrong-state", "half-state", "no-setting", "odd-setting", "list-settings",
                       "few-classes", "wrong-wr", "number-classes", "reclip-cut")),
        *((["--checkpoint", f"{name}/distill.pt"], f"{name}/distill.pt is not a")
          for name in ("d-no-settings", "d-no-setting", "d-odd-student", "d-half-state",
                       "d-no-state", "distill-cut")),
        *((["--checkpoint", file], f"{file} is not a checkpoint") for file in (
            "bomb.pt", "bomb.pkl", "zip-bomb.pt", "old-bomb.pt", "tar-bomb.pt", "script.pt",
            "script-bomb.pt", "clip.pt", "list.pt")),
        *((["--checkpoint", f"{name}/reclip.pt"], f"{name}/results.json is damaged")
          for name in ("r-words", "r-list", "r-bytes", "r-cut", "r-number")),
    ],
    distill.main: [
        (["--teacher", "run"], "run is not a checkpoint"),
        (["--teacher", "run/reclip.pt", "--lr", "nan"], "--lr is nan"),
        (["--teacher", "run/reclip.pt", "--lr", "inf"], "--lr is inf"),
        (["--teacher", "run/reclip.pt", "--workers", "-1"], "--workers is -1"),
        (["--teacher", "run/reclip.pt", "--seed", str(1 << 63)], "--seed is 9223372036854775808"),
        (["--teacher", "run/reclip.pt", "--losses", ""], "expected some of mask,feature,text"),
        (["--teacher", "run/reclip.pt", "--pd", "nan"], "--pd is nan; expected 0 to 1"),
        (["--teacher", "run/reclip.pt", "--clip", "clip.pt"], "with another CLIP than clip.pt"),
        (["--teacher", "run/reclip.pt", "--clip", "bomb.pt"], "not a readable file"),
        (["--teacher", "run/reclip.pt", "--out", "file"], "cannot write to file"),
        (["--teacher", "run/reclip.pt", "--out", "distill-cut"],
         "distill-cut/distill.pt is not a checkpoint"),
        *((["--teacher", f"{name}/reclip.pt"], f"{name}/reclip.pt is not a checkpoint")
          for name in ("no-settings", "half-state", "no-setting", "wrong-wr")),
        *((["--teacher", file], f"{file} is not a checkpoint") for file in (
            "bomb.pt", "bomb.pkl", "zip-bomb.pt", "old-bomb.pt", "tar-bomb.pt", "script.pt",
            "script-bomb.pt")),
        *((["--teacher", "run/reclip.pt", "--student", "resnet50", "--backbone", file],
           "holds no weights of a ResNet") for file in (
            "bomb.pt", "bomb.pkl", "zip-bomb.pt", "old-bomb.pt", "script.pt", "list.pt")),
        (["--teacher", "run/reclip.pt", "--student", "resnet50", "--backbone", "clip.pt"],
         "are not those of this ResNet"),
    ],
    data.main: [
        (["--limit", "-3"], "--limit is -3"),
        (["--seed", str(1 << 63)], "--seed is 9223372036854775808"),
        (["--dataset", "voc", "--data-root", "file"], "no folder file"),
        (["--dataset", "context", "--data-root", "context", "--convert", "mats"],
         "cannot read mats/2008_000002.mat"),
        (["--dataset", "context", "--data-root", "voc", "--convert", "mats"], "no context in voc"),
        (["--dataset", "cityscapes", "--data-root", "city"], "no cityscapes in city"),
        *((["--dataset", "voc", "--data-root", tree], message) for tree, message in {
            "list-bytes": "cannot read the list of images",
            "list-folder": "cannot read the list of images"}.items()),
        ([*FOLDER, "good", "--out", "good"], "cannot write good"),
        ([*FOLDER, "good", "--out", "file/sheet.png"], "cannot write file/sheet.png"),
        *(([*FOLDER, name, "--out", "sheet.png"], f"{name}/0") for name in (
            "text", "bomb", "short", "floats", "deep", "dangling")),
        *((["--dataset", "voc", "--data-root", tree, "--out", "sheet.png"], message)
          for tree, message in {
            "label-cut": "cannot read label", "label-ids": "holds the id 300",
            "label-rgba": "is a RGBA picture", "label-bomb": "cannot read label",
            "label-float": "is a F picture", "label-some": "1 of 2 labels of voc val are missing",
            "image-cut": "cannot read image"}.items()),
    ],
}


def refused(capsys, main, arguments):
    """What is said on stderr by a command that changes nothing and ends with exit code 2."""
    before = snapshot(".")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*arguments, *(["--device", "cpu"] if main is not data.main
                            and "--device" not in arguments else [])])
    said = capsys.readouterr().err
    assert end.value.code == 2
    after = snapshot(".")
    assert after == before, {path for path in after | before
                             if after.get(path) != before.get(path)}
    return said


@pytest.mark.parametrize("main, arguments, message", [
    pytest.param(main, *case, id=f"{main.__module__} {' '.join(case[0])}".encode(
        "ascii", "backslashreplace").decode())
    for main, cases in CASES.items() for case in cases])
def test_one_line_and_nothing_changed(place, small_demo, monkeypatch, capsys, main, arguments,
                                      message):
    monkeypatch.chdir(place)
    if main is reclip.main and "--clip" not in arguments:
        arguments = [*arguments, "--clip", "shapes-tiny"]
    said = refused(capsys, main, arguments)
    assert said.startswith("error: ") and said.count("\n") == 1 and said.endswith("\n"), said
    assert message in said


@pytest.mark.parametrize("main, arguments", [
    (main, line.split()) for main, lines in {
        reclip.main: ("--method nonsense", "--preset best", "--seed x", "--scale 5", "--epochs 1.5",
                      "--bias odd", "--unknown", "--hypothesis none", "--data-root", "file"),
        evaluate.main: ("--split test", "--slide 5", "--images", "--batch x", "--method reclip",
                        "--surgery odd"),
        distill.main: ("--head odd", "--student big", "--text-masks odd", "--pd x", "--unknown"),
        data.main: ("--limit x", "--convert", "--unknown")}.items() for line in lines],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.__module__)
def test_usage(place, monkeypatch, capsys, main, arguments):
    """argparse's own errors: the usage, and one line."""
    monkeypatch.chdir(place)
    *usage, last = refused(capsys, main, arguments).splitlines()
    assert usage[0].startswith("usage: ") and ": error: " in last
    assert all(line.startswith(" ") for line in usage[1:])


def test_class_names_are_no_paths(tmp_path, clip_file, photos, monkeypatch):
    """Whatever classes are called, nothing is written outside the folder that was named."""
    monkeypatch.chdir(tmp_path)
    before = set(snapshot("."))
    run(evaluate.main, "--images", photos, "--method", "maskclip", "--clip", clip_file, "--classes",
        "../../x, /tmp/y, a/b, ..", "--out", "out", "--workers", 0)
    assert all(Path(path).is_relative_to("out") for path in set(snapshot(".")) - before)
    rows = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert {name for row in rows for name in row["areas"]} <= {"../../x", "/tmp/y", "a/b", ".."}


def test_there_are_enough_cases():
    assert sum(map(len, CASES.values())) >= 100
