"""Mistakes and damaged files, in tables: one line on stderr, exit code 2, nothing changed on disk.

Cases that start some work before they fail are in test_commands.py and test_worst_day.py.
"""

import gzip
import importlib
import io
import os
import pickle
import shlex
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

import evaluate
import reclip
from clip.clip import TINY_PATH
from conftest import REAL, Bomb, predictions, random_clip, run, save_clip, snapshot


def written(write, *args, **options):
    """What a function like torch.save or Image.save writes to a file."""
    file = io.BytesIO()
    write(*args, file, **options)
    return file.getvalue()


def picture(mode, size, color, kind="PNG"):
    return written(Image.new(mode, size, color).save, format=kind)


def png(width, height):
    """A PNG file that claims a size, whatever its content is."""
    small = picture("RGB", (1, 1), 0)
    header = b"IHDR" + struct.pack(">II", width, height) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def with_member(content, name, member, file):
    """Write a zip archive in which the member that ends in `name` has another content."""
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for other in old.namelist():
            new.writestr(other, member if other.endswith(name) else old.read(other))


def tar_bomb(file):
    """Write the oldest of torch's formats."""
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(BOMB)
            archive.addfile(member, io.BytesIO(BOMB))


BOMB = pickle.dumps(Bomb(), protocol=2)
WRAPPED = written(torch.save, {"state_dict": Bomb(), "settings": {}, "classes": [], "state": {}})
ARRAY = written(lambda array, file: np.save(file, array), np.array([Bomb()], dtype=object))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch would like TorchScript to be forgotten
    SCRIPT = written(lambda file: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file))
BOMBS = {  # files that would run code if they were unpickled without care
    "bomb.pt": WRAPPED, "bomb.pkl": BOMB, "tar-bomb.pt": written(tar_bomb),
    "old-bomb.pt": written(torch.save, Bomb(), _use_new_zipfile_serialization=False),
    "zip-bomb.pt": written(with_member, WRAPPED, "/data.pkl", BOMB)}
SCRIPTS = {"script.pt": SCRIPT, "script-bomb.pt": written(with_member, SCRIPT, ".pkl", BOMB)}
NO_ZIP = {"words.pt": b"weights", "zero.pt": b"", "damaged.pt": b"PK\x03\x04 no archive"}
LIST = {"list.pt": written(torch.save, [1, 2])}


@pytest.fixture(scope="session")
def sound(trained_demo, tmp_path_factory):
    """A folder with sound things: photographs, VOC's tree, a CLIP, runs; and empty folders."""
    root = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        shutil.copytree(REAL, "voc")
        shutil.copytree("voc/VOCdevkit/VOC2012/JPEGImages", "good")
        save_clip(random_clip().half(), "clip.pt")
        torch.save(random_clip(vision_layers=[1, 1, 1, 1], vision_width=8, vision_patch_size=None,
                               image_resolution=32, vocab_size=9).state_dict(), "resnet.pt")
        shutil.copytree(trained_demo, "run")
        run(reclip.main, *shlex.split(OWN), "--workers", 0)
        for folder in ("empty", "context/VOCdevkit/VOC2010/JPEGImages", "ade/images/validation",
                       "stuff/images", "city/leftImg8bit/val"):
            Path(folder).mkdir(parents=True)
        Path("file").write_text("no folder")
    return root


# ---- Cases: (command, what its one line says, {file: its content or a change of it, see change}) -

FOLDER = "--dataset folder --data-root"
NAMED = "--dataset folder --classes 'cat, dog' --data-root good"
VOC = "--dataset voc --data-root voc"
MASKCLIP = "--clip clip.pt --method maskclip"
OTHER = (REAL / "VOCdevkit/VOC2012/JPEGImages/2011_000003.jpg").read_bytes()
OWN = f"--out own {MASKCLIP} {FOLDER} good --classes cat"
SHORT = "reclip --epochs 3 --out run"  # the command that made the run
UNTRAINED = {"run/reclip.pt": None}  # only then it opens what has been made for the training
CHECKPOINT = "evaluate --checkpoint run/reclip.pt"
STUDENT = "evaluate --checkpoint run/distill.pt"
TEACHER = "distill --teacher run/reclip.pt"
LABEL = "voc/VOCdevkit/VOC2012/SegmentationClass/2011_000025.png"
IMAGE = "voc/VOCdevkit/VOC2012/JPEGImages/2011_000025.jpg"
SPLITS = [f"voc/VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt" for split in ("train", "val")]


def each(command, table, files={}):
    """Cases of one command, each with more words."""
    return [(f"{command} {words}", message, files) for words, message in table.items()]


def damaged(path, contents, *commands, message="PATH is not a checkpoint"):
    """Cases of one file with different contents, for each of some commands."""
    return [(command, message.replace("PATH", path), {path: content})
            for content in contents for command in commands]


def out_of(limits, *flags):
    """{words: message} of flags with a number that is out of their limits."""
    number = int if limits.endswith("or more") else float  # as the message writes it
    named = {words: words.split()[:2] for words in flags}  # other flags may follow
    return {words: f"{flag} is {number(value)}; expected {limits}"
            for words, (flag, value) in named.items()}


WHAT = {"words.pt": "a text file that begins with 'weights'; ", "zero.pt": "an empty file; ",
        "tar-bomb.pt": "of no known kind (its first bytes: ", "list.pt": "not a state dict: ",
        "damaged.pt": "not a readable file of PyTorch weights: damaged or cut short; ",
        **dict.fromkeys(SCRIPTS, "a TorchScript archive that is none of OpenAI's (SHA-256 ")}
UNSAFE = "not a readable file of PyTorch weights: beside or instead of tensors it holds Python obj"


def among(files, command, message):
    """Cases in which VALUE is a file, named and with a content; WHAT: what it is said to be."""
    return [(command.replace("VALUE", name), message.replace("VALUE", name).replace(
        "WHAT", WHAT.get(name, UNSAFE)), {name: content}) for name, content in files.items()]


DATA = {  # of reclip.py and data.py
    "--dataset voc": "--dataset voc needs --data-root",
    "--dataset voc --data-root nowhere": "no folder nowhere",
    "--dataset voc --data-root file": "no folder file",
    "--dataset voc --data-root empty": "no voc in empty: expected empty/VOCdevkit",
    "--dataset ade --data-root voc": "no ade in voc: expected voc/ADEChallengeData",
    "--dataset coco --data-root voc": 'no data set "coco"; there are shapes, voc',
    f"{VOC} --classes cat": "--classes goes with",
    f"{FOLDER} empty --classes cat": "no images of folder train in empty",
    f"{FOLDER} good": "--dataset folder needs --classes",
    f"{FOLDER} good --classes ''": "no class names in --classes",
    f"{FOLDER} good --classes 'cat,, dog'": "class name 2 is empty",
    f"{FOLDER} good --classes 'cat, dog, cat'": 'class name "cat" is repeated',
    f"{FOLDER} good --classes gone.txt": "no file gone.txt",
    f"{FOLDER} good --classes 'cat, \udcff'": "no printable text",
}
NAMES = {  # files of class names
    b"# no names\n\n": "no class names in the file names.txt",
    b"cat\ndog\nCat\n": 'class name "Cat" is repeated',
    "Löwe\nBär\n".encode("latin-1"): "cannot read class names from names.txt",
    png(4, 4): "cannot read class names from names.txt",
    "\n".join(f"thing {n}" for n in range(256)).encode(): "256 classes",
    b"cat\n\x1b[31mdog\n": "no printable text",
}

CASES = [
    *each("reclip", DATA), *each("data", DATA),
    *((f"{main} {FOLDER} good --classes names.txt", message, {"names.txt": content})
      for content, message in NAMES.items() for main in ("reclip", "data")),
    (f"reclip {FOLDER} hidden --classes cat", "no images of folder train in hidden",
     {"hidden/.a.jpg": b""}),
    *each("reclip", {
        f"--seed {1 << 70}": "--seed is 1180591620717411303424",
        "--crop 8": "--crop 8 is a single patch; expected more than 8",
        "--graph --device cpu": "--graph needs a CUDA device, and a single process",
        "--method maskclip --decoder": "--method maskclip learns nothing",
        "--method maskclip --bias joint --hypothesis crops": "--method maskclip learns nothing",
        "--epochs 2 --schedule 1": "--schedule is 1; expected 2 or more",
        **out_of("1 or more", "--batch 0", "--scale 0 9", "--epochs 0", "--crop 0",
                 "--top 0 --hypothesis global"),
        **out_of("0.02 to 1", "--crop-ratio 0", "--crop-ratio 1.5"),
        **out_of("more than 0", "--mask-temperature 0", "--lr 0", "--lr -1", "--lr nan",
                 "--tau 0", "--tau inf"),
        **out_of("0 or more", "--workers -1"), **out_of("0 to 1", "--threshold nan", "--pd -0.5"),
        **{f"--device {name}": f"--device {name} cannot be used here: "
           for name in ("cuda:99", "meta", "nonsense")},
        "--out file": "cannot write to file", "--out file/run": "cannot write to file/run",
        "--download --dataset voc": "--download needs --data-root",
        "--download": "there is nothing to download for --dataset shapes",
        "--dataset ade --data-root ade": "no ade in ade: expected",
        "--dataset stuff --data-root stuff": "no stuff in stuff: expected",
        "--dataset context --data-root context": "cannot read the list of images",
        "--clip empty": "'empty' is neither a file nor a model",
        "--clip ViT-B/17": "'ViT-B/17' is neither a file nor a model",
        "--clip nowhere.pt": "'nowhere.pt' is neither a file nor a model; models: RN50",
        f"{NAMED} --clip good/2011_000003.jpg": "2011_000003.jpg: of no known kind",
        f"{NAMED} --clip run/reclip.pt": "run/reclip.pt: not a state dict",
        f"{NAMED} --clip resnet.pt": "resnet.pt has a ResNet image encoder; the surgery",
        **{f"--dataset {name} --data-root empty":
           f"no {name} in empty: expected empty/{path}; see README, Data sets" for name, path in {
            "voc": "VOCdevkit/VOC2012/JPEGImages", "ade": "ADEChallengeData2016/images/training",
            "context": "VOCdevkit/VOC2010/JPEGImages", "stuff": "images/train2017",
            "cityscapes": "leftImg8bit/train"}.items()}}),
    ("reclip --dataset cityscapes --data-root city",
     "no images of cityscapes train in city/leftImg8bit/train; expected ID_leftImg8bit.png",
     {"city/leftImg8bit/train/notes.txt": b""}),
    *((f"reclip {VOC} --clip clip.pt", message, dict.fromkeys(SPLITS, content))
      for content, message in {
        b"../../../../good/2011_000003\n": "1 of the 1 images in voc",
        b"2011_000003\n0\n": f"1 of the 2 images in {SPLITS[0]} are missing, the first ",
        b"2011_000003\n2011_000003\n": "train.txt lists 2011_000003 twice",
        b"\n": f"no images of voc train in {SPLITS[0]}",
        None: f"cannot read the list of images {SPLITS[0]}: no such file"}.items()),
    (f"reclip {VOC} {MASKCLIP}", "no voc in voc: expected",
     {"voc/VOCdevkit/VOC2012/JPEGImages": b"no folder"}),
    # CLIP files
    *((f"reclip {NAMED} --clip clip.pt", f"clip.pt{message}", {"clip.pt": change})
      for message, change in {
        ": not a CLIP state dict: 1 missing (ln_final.weight)": {"ln_final.weight": None},
        ": not a CLIP state dict: 1 left over (visual.new)": {"visual.new": torch.zeros(2)},
        ": not a CLIP state dict: 1 of another shape (ln_final.weight":
            {"ln_final.weight": torch.zeros(3)},
        " has a vocabulary of 500": {"token_embedding.weight": torch.zeros(500, 64)},
        " has a vocabulary of 49408 and a context of 20 tokens":
            {"positional_embedding": torch.zeros(20, 64)},
        ": ": {"vision_heads": torch.tensor(5)},
        ": not a CLIP state dict": {"visual.conv1.weight": torch.zeros(4)},
        ": not a CLIP state dict: 1 with numbers that are not finite (visual.proj)":
            {"visual.proj": torch.full((64, 32), torch.nan)}}.items()),
    (f"reclip {NAMED} --clip cut.pt.gz", "damaged gzip file",
     {"cut.pt.gz": TINY_PATH.read_bytes()[:100_000]}),
    *among(LIST | {"nested.pt": written(torch.save, {"a": {"b": 1}})},
           f"reclip {NAMED} --clip VALUE", "VALUE: not a state dict"),
    *among(BOMBS | NO_ZIP | SCRIPTS | {"bomb.pt.gz": gzip.compress(WRAPPED)},
           f"reclip {NAMED} --clip VALUE", "VALUE: WHAT"),
    # another run in the same folder
    *each(SHORT, {
        "--lr 0.02": "made with other settings (lr 0.03 → 0.02)",
        "--schedule 40": "made with other settings (schedule 10 → 40)",
        **dict.fromkeys(["--seed 1", "--crop-ratio 0.25", "--method maskclip"],
                        "was made with other settings"),
        "--clip clip.pt": "with another CLIP",
        f"{NAMED} --clip clip.pt": "was made with other classes"}),
    (f"reclip {OWN}", "own/reclip.pt was made with other images", {"good/2011_000006.jpg": OTHER}),
    *each(SHORT, {"--clip clip.pt": "was made with another CLIP"}, {"run/hypotheses.npy": None}),
    *each(SHORT, {
        "--clip clip.pt": "hypotheses.json was made with other settings (clip ",
        "--crop-ratio 0.34": "hypotheses.json was made with other settings (view 0.5 → 0.34); del",
        "--hypothesis global": "was made with other settings (hypothesis crops → global",
        "--seed 1": "hypotheses.json was made with other settings (images ",
        "--crop 80": "views.json was made with other settings (crop 96 → 80); delete views.* there",
        "--views 1": "views.json was made with other settings (views 2 → 1)",
        "--surgery program": "views.json was made with other settings (surgery value → program)",
    }, UNTRAINED),
    *each(SHORT, {"": "run/views.json was made with other settings (activation None"},
          UNTRAINED | {"run/views.json": b"{}"}),
    # a damaged run
    *damaged("run/reclip.pt", [
        b"words", b"", {"settings": None}, {"clip": None}, {"state": {}}, {"state": "text"},
        {"settings": [1]}, lambda c: c["state"].update(Wq=torch.zeros(3, 64)),
        lambda c: c["state"].pop("position.weight")], SHORT, CHECKPOINT),
    *damaged("run/reclip.pt", [lambda c: c.update(optimizer=None, finished=False, step=2)], SHORT),
    *damaged("run/reclip.pt", [{"classes": 5}], SHORT, message="was made with other classes"),
    *damaged("run/reclip.pt", [
        {"Wr": None}, lambda c: c["settings"].update(bias="odd"), {"classes": 5},
        lambda c: c.update(classes=c["classes"][:4])], CHECKPOINT),
    *damaged("run/reclip.pt", [
        {"settings": None}, lambda c: c["settings"].pop("surgery"), {"Wr": torch.zeros(10, 9)},
        lambda c: c["state"].pop("position.weight")], TEACHER, CHECKPOINT),
    *damaged("run/distill.pt", [b"words"], STUDENT, TEACHER),
    *damaged("run/distill.pt", [
        {"settings": None}, lambda c: c["settings"].pop("student"), {"state": {}},
        lambda c: c["settings"].update(student="odd"),
        lambda c: c["state"].pop("network.aspp.1.conv.weight")], STUDENT, message="PATH is not a"),
    (SHORT, "run/hypotheses.jsonl has the format of an earlier version; delete it, and hypotheses "
     "will be made again", UNTRAINED | {"run/hypotheses.jsonl": b"{}\n"}),
    *((SHORT, "log.jsonl is damaged", UNTRAINED | {"run/log.jsonl": content}) for content in (
        b"words\n", b"\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n')),
    *((SHORT, f"run/{name}.npy is damaged or of an earlier version; delete it",
       UNTRAINED | {f"run/{name}.npy": content}) for name in ("hypotheses", "views")
      for content in (300, b"words", b"", BOMB, ARRAY, written(
          lambda file: np.save(file, np.zeros(24, "i2"))))),
    *((SHORT, f"run/{name}.json is damaged; delete {name}.* there",
       UNTRAINED | {f"run/{name}.json": content}) for name in ("hypotheses", "views")
      for content in (b"{", b"\xff\xfe", b"[1]", None)),
    *damaged("run/results.json", [b"words", b"[1]", b"\xff\xfe", b'{"maskclip": 7}', 300],
             CHECKPOINT, message="PATH is damaged"),
    # evaluation
    *each("evaluate", {
        "": "no checkpoint under runs/; run python reclip.py first",
        "--checkpoint gone.pt": "no checkpoint gone.pt",
        "--checkpoint empty": "empty is a folder without distill.pt or reclip.pt",
        "--checkpoint run/results.json": "run/results.json is not a checkpoint of reclip.py",
        "--checkpoint clip.pt": "clip.pt is not a checkpoint of reclip.py"}),
    *among(LIST | NO_ZIP | BOMBS | SCRIPTS, "evaluate --checkpoint VALUE",
           "VALUE is not a checkpoint of reclip.py"),
    *each(CHECKPOINT, {
        **out_of("0 or more", "--workers -1"), **out_of("0 to 1", "--pd nan"),
        **out_of("1 or more", "--batch -2"),
        "--slide 96 0": "--slide is 0; expected 1 or more", "--slide 10 20": "leaves gaps",
        "--out file": "cannot write to file", "--method maskclip": "--method goes with --images",
        "--pd 0.5 --no-pd": "contradict each other",
        **dict.fromkeys(["--surgery value", "--activation gelu"], "cannot be changed afterwards"),
        VOC: "was made for other classes (ladybug, flag, chessboard, leaf, moon, …) than voc's",
        "--dataset voc": "--dataset voc needs --data-root",
        "--dataset coco": 'no data set "coco"',
        "--clip clip.pt": "was made with another CLIP than",
        "--clip nowhere": "'nowhere' is neither a file nor a model",
        "--images nowhere": "--images: no file or folder nowhere",
        "--images empty": "--images: no images in empty; expected .jpg",
        **{f"--images good {flag}": f"--images predicts, {flag} evaluates"
           for flag in ("--hypotheses", "--count-absent", "--bias")},
        "--images good --classes cat": "--classes goes with",
        "--images good --out file": "cannot write to file",
        "--images good --out good/2011_000003.jpg": "cannot write to good/2011_000003.jpg"}),
    *each(STUDENT, {"--images good --method maskclip":
                    "--method maskclip: this checkpoint has only distilled"}),
    *each("evaluate --images good --method maskclip", {
        "--classes 'a, a'": "is repeated", "--classes a --dataset coco": 'no data set "coco"'}),
    # distillation
    ("distill --teacher empty", "empty is a folder without reclip.pt", {}),
    *among(BOMBS | SCRIPTS, "distill --teacher VALUE", "VALUE is not a checkpoint"),
    *each(TEACHER, {
        **out_of("more than 0", "--lr nan", "--lr inf", "--lr -1"),
        **out_of("1 or more", "--epochs 0"), **out_of("0 or more", "--workers -1", "--views -1"),
        **out_of("0 to 1", "--pd nan", "--pd 2", "--ignore-below 1.5"),
        f"--seed {1 << 63}": "--seed is 9223372036854775808",
        "--losses ''": "expected some of mask,feature,text",
        "--losses mask,depth": "expected some of mask,feature,text",
        "--head learned --losses text": "add mask to --losses",
        "--clip clip.pt": "with another CLIP than clip.pt", "--out file": "cannot write to file",
        "--student small --backbone imagenet": "small has no ImageNet weights",
        "--student resnet50 --backbone nowhere.pth": "no file nowhere.pth",
        "--student resnet50 --backbone clip.pt": "are not those of this ResNet"}),
    *among(LIST | NO_ZIP | BOMBS | SCRIPTS, f"{TEACHER} --student resnet50 --backbone VALUE",
           "VALUE: WHAT"),
    # data sets
    *each("data", {
        f"{VOC} --limit 0": "--limit is 0", f"{VOC} --limit -3": "--limit is -3",
        f"--seed {1 << 63}": "--seed is 9223372036854775808",
        "--dataset stuff --download": "--download cannot fetch stuff; get it from",
        "--dataset folder --download": "nothing to download",
        "--dataset voc --download": "--download needs --data-root",
        "--dataset voc --convert mats": "--convert goes with --dataset context",
        "--dataset context --data-root voc --convert mats": "no context in voc",
        "--dataset cityscapes --data-root city": "no cityscapes in city",
        f"{NAMED} --out good": "cannot write good",
        f"{NAMED} --out file/sheet.png": "cannot write file/sheet.png"}),
    ("data --dataset context --data-root context --convert mats", "cannot read mats/1.mat",
     {"mats/1.mat": b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + b"\7"}),
    *((f"data {VOC}", "cannot read the list of images", files) for files in (
        dict.fromkeys(SPLITS, b"2011_\xff\xfe\n"),
        dict.fromkeys(SPLITS) | {f"{path}/x": b"" for path in SPLITS})),
    (f"data {VOC} --out x.png", "1 of 2 labels of voc train are missing",
     {LABEL: None, SPLITS[1]: b"2011_000025\n2011_000003\n"}),
    *((f"data {VOC} --out x.png", message, {LABEL: content}) for message, content in {
        "cannot read label": 900, "cannot read label ": png(60_000, 60_000),
        "holds the id 77, which voc (20 classes) does not have": picture("L", (500, 375), 77),
        "holds the id 300": picture("I;16", (500, 375), 300),
        "is a RGBA picture; expected one channel": picture("RGBA", (500, 375), 0),
        "is a F picture": picture("F", (500, 375), 0, "TIFF"),
        "is 480×375 pixels, its image 500×375": picture("L", (480, 375), 0)}.items()),
    (f"data {VOC} --out x.png", f"cannot read image {IMAGE}", {IMAGE: 20_000}),
    *damaged("good/2011_000006.jpg", [9000, b"", b"I am no picture", png(90, 60)],
             f"data {NAMED} --out x.png", message="cannot read image PATH"),
    *damaged("good/0.tif", [
        png(60_000, 60_000), picture("F", (4, 4), 0.5, "TIFF"), Path("nowhere.jpg"),
        picture("I", (4, 4), 1 << 20, "TIFF")], f"data {NAMED} --out x.png", message="PATH"),
    # argparse's own errors
    *((f"{script} {words}", words.split()[0], {}) for script, lines in {
        "reclip": ("--method nonsense", "--preset best", "--seed x", "--scale 5", "--epochs 1.5",
                   "--bias odd", "--unknown", "--hypothesis none", "--data-root", "file"),
        "evaluate": ("--split test", "--slide 5", "--images", "--batch x", "--method reclip",
                     "--surgery odd"),
        "distill": ("--head odd", "--student big", "--text-masks odd", "--pd x", "--unknown"),
        "data": ("--limit x", "--convert", "--unknown")}.items() for words in lines),
]
assert len(CASES) >= 330


def change(path, content):
    """Give a file another content: None removes it, an integer is where it is cut off, a path what
    it links to, a dictionary replaces entries of what torch.save has written, or removes those
    that are None here, and a function changes that otherwise."""
    before = path.read_bytes() if path.is_file() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)  # it is a link to the sound one
    if isinstance(content, Path):
        path.symlink_to(content)
    elif isinstance(content, (int, bytes)):
        path.write_bytes(before[:content] if isinstance(content, int) else content)
    elif content is not None:
        saved = torch.load(io.BytesIO(before), weights_only=True)
        if callable(content):
            content(saved)
        else:
            saved = {name: v for name, v in (saved | content).items() if v is not None}
        torch.save(saved, path)


@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
@pytest.mark.parametrize("command, message, files", [
    pytest.param(*case, id=ascii(f"{n} {case[0]:.80}")) for n, case in enumerate(CASES)])
def test_one_line_and_nothing_changed(sound, tmp_path, monkeypatch, small_demo, mistake, command,
                                      message, files):
    shutil.copytree(sound, tmp_path / "place", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "place")
    for path, content in files.items():
        change(Path(path), content)
    script, *words = shlex.split(command)
    if script == "reclip" and "--clip" not in words:
        words += ["--clip", "shapes-tiny"]
    before = snapshot(".")
    said = mistake(importlib.import_module(script).main, *words)
    after = snapshot(".")
    assert after.keys() == before.keys()
    assert not [path for path in before if after[path] != before[path]]
    assert message in said.replace(" val ", " train ")  # data.py opens the other split of a folder


def test_class_names_are_no_paths(tmp_path, clip_file, photos, monkeypatch):
    """Whatever classes are called, nothing is written outside the folder that was named."""
    monkeypatch.chdir(tmp_path)
    before = set(snapshot("."))
    run(evaluate.main, "--images", photos, "--method", "maskclip", "--clip", clip_file, "--classes",
        "../../x, /tmp/y, a/b, ..", "--out", "out", "--workers", 0)
    assert all(Path(path).is_relative_to("out") for path in set(snapshot(".")) - before)
    names = {name for row in predictions() for name in row["areas"]}
    assert names <= {"../../x", "/tmp/y", "a/b", ".."}
