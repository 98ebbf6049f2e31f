"""Mistakes and damaged files, in tables: one line on stderr, exit code 2, nothing changed on disk.

Cases that start some work before they fail are in test_commands.py and test_worst_day.py.
"""

import contextlib
import gzip
import io
import json
import pickle
import shlex
import shutil
import struct
import sys
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
from conftest import REAL, Bomb, random_clip, run, snapshot

VOC = Path("VOCdevkit/VOC2012")


def png(width, height, content=b""):
    """A PNG file that claims a size, whatever its content is."""
    chunk = lambda kind, body: (struct.pack(">I", len(body)) + kind + body
                                + struct.pack(">I", zlib.crc32(kind + body)))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0,
                                                             0))
            + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b""))


def change_zip(path, out, name, content):
    """A copy of a zip archive in which the member that ends in `name` has another content."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for member in old.namelist():
            new.writestr(member, content if member.endswith(name) else old.read(member))


@pytest.fixture(scope="session")
def place(trained_demo, tmp_path_factory):
    """A working directory with things that are not what they should be. Nothing changes it."""
    root = tmp_path_factory.mktemp("place")
    with contextlib.chdir(root):
        make_pictures()
        make_trees()
        make_class_lists()
        make_clips()
        shutil.copytree(trained_demo, "run")
        run(reclip.main, *shlex.split(OWN), "good", "--workers", 0)
    return root


def make_pictures():
    photos = REAL / VOC / "JPEGImages"
    whole = (photos / "2011_000006.jpg").read_bytes()
    for name, file, content in (
            ("good", "2011_000006.jpg", whole), ("cut", "2011_000006.jpg", whole[:9000]),
            ("zero", "2011_000006.jpg", b""), ("text", "0.jpg", b"I am no picture"),
            ("bomb", "0.png", png(60_000, 60_000)), ("short", "0.png", png(90, 60, b"too little")),
            ("other", "2011_000006.jpg", (photos / "2011_000003.jpg").read_bytes())):
        shutil.copytree(photos, name)
        Path(name, file).write_bytes(content)
    for name in ("empty", "hidden", "floats", "deep", "dangling"):
        Path(name).mkdir()
    shutil.copy(photos / "2011_000003.jpg", "hidden/.a.jpg")
    Image.new("F", (4, 4), 0.5).save("floats/0.tif")
    Image.new("I", (4, 4), 1 << 20).save("deep/0.tif")
    Path("dangling/0.jpg").symlink_to("nowhere.jpg")
    Path("file").write_text("no folder")


def voc(name, part="README", content=None):
    """A copy of VOC's tree without a part, or with another content of it; the path of the part."""
    path = Path(name, VOC, part)
    if not Path(name).exists():
        shutil.copytree(REAL / VOC, Path(name, VOC))
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    return path


def make_trees():
    label, image = "SegmentationClass/2011_000025.png", "JPEGImages/2011_000025.jpg"
    for split in ("train", "val"):
        listed = f"ImageSets/Segmentation/{split}.txt"
        voc("list-bytes", listed, b"2011_\xff\xfe\n")
        voc("list-folder", listed).mkdir()
        voc("list-outside", listed, b"../../../../good/2011_000003\n")
    voc("jpegs-file", "JPEGImages", b"no folder")
    whole = voc("voc").parent.joinpath(label).read_bytes()
    voc("label-cut", label, whole[: len(whole) // 2])
    voc("label-bomb", label, png(60_000, 60_000))
    Image.fromarray(np.full((375, 500), 300, np.uint16)).save(voc("label-ids", label))
    Image.new("RGBA", (500, 375)).save(voc("label-rgba", label))
    Image.new("F", (500, 375)).save(voc("label-float", label), format="TIFF")
    Image.new("L", (480, 375)).save(voc("label-small", label))
    Image.new("L", (500, 375), 77).save(voc("label-77", label))
    voc("label-some", label)
    voc("label-some", "ImageSets/Segmentation/val.txt", b"2011_000025\n2011_000003\n")
    voc("image-cut", image, voc("voc").parent.joinpath(image).read_bytes()[:20_000])

    for folder in ("context/VOCdevkit/VOC2010/JPEGImages", "ade/images/validation", "stuff/images",
                   "city/leftImg8bit/val", "mats"):
        Path(folder).mkdir(parents=True)
    Path("mats/2008_000002.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + b"\7")


def make_class_lists():
    Path("latin.txt").write_bytes("Löwe\nBär\n".encode("latin-1"))
    Path("picture.txt").write_bytes(png(4, 4))
    Path("empty.txt").write_text("# no names\n\n")
    Path("twice.txt").write_text("cat\ndog\nCat\n")
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
    Path("damaged.pt").write_bytes(b"PK\x03\x04 no archive")
    Path("zero.pt").touch()
    Path("folder.pt").mkdir()
    resnet = random_clip(vision_layers=[1, 1, 1, 1], vision_width=8, vision_patch_size=None,
                         image_resolution=32, vocab_size=9)
    torch.save(resnet.state_dict(), "resnet.pt")

    # Files that would run code if they were unpickled without care.
    torch.save({"state_dict": Bomb(), "settings": {}, "classes": [], "state": {}}, "bomb.pt")
    Path("bomb.pt.gz").write_bytes(gzip.compress(Path("bomb.pt").read_bytes()))
    Path("bomb.pkl").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save(Bomb(), "old-bomb.pt", _use_new_zipfile_serialization=False)
    change_zip("clip.pt", "zip-bomb.pt", "/data.pkl", pickle.dumps(Bomb(), protocol=2))
    with tarfile.open("tar-bomb.pt", "w") as file:  # the oldest of torch's formats
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Bomb(), protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    with warnings.catch_warnings(action="ignore"):  # PyTorch would like it to be forgotten
        torch.jit.script(torch.nn.Linear(2, 2)).save("script.pt")
    change_zip("script.pt", "script-bomb.pt", ".pkl", pickle.dumps(Bomb(), protocol=2))


FOLDER = "--dataset folder --data-root"
NAMED = "--dataset folder --classes 'cat, dog' --data-root"
TREE = "--dataset voc --data-root"
MASKCLIP = "--clip clip.pt --method maskclip"
OWN = f"--out own {MASKCLIP} --dataset folder --classes cat --data-root"
SHORT = "--epochs 3 --out"  # the command that made the run, given its folder
TRAIN = f"reclip {SHORT} run --clip shapes-tiny"
CHECKPOINT = "--checkpoint run/reclip.pt"
TEACHER = "--teacher run/reclip.pt"
BOMBS = "bomb.pt bomb.pkl zip-bomb.pt old-bomb.pt tar-bomb.pt"
SCRIPTS = "script.pt script-bomb.pt"


def each(names, arguments, message):
    """A case for each of some names, which stand for NAME in both."""
    return [(arguments.replace("NAME", n), message.replace("NAME", n)) for n in names.split()]


DATA = [  # of reclip.py and data.py
    ("--dataset voc", "--dataset voc needs --data-root"),
    (f"{TREE} nowhere", "no folder nowhere"),
    (f"{TREE} file", "no folder file"),
    (f"{TREE} empty", "no voc in empty: expected empty/VOCdevkit"),
    ("--dataset ade --data-root voc", "no ade in voc: expected voc/ADEChallengeData"),
    ("--dataset coco --data-root voc", 'no data set "coco"; there are shapes, voc'),
    (f"{TREE} voc --classes cat", "--classes goes with"),
    (f"{FOLDER} empty --classes cat", "no images of folder train in empty"),
    (f"{NAMED} hidden", "no images of folder train in hidden"),
    (f"{FOLDER} good", "--dataset folder needs --classes"),
    *((f"{FOLDER} good --classes {names}", message) for names, message in {
        "''": "no class names in --classes", "'cat,, dog'": "class name 2 is empty",
        "'cat, dog, cat'": 'class name "cat" is repeated',
        "empty.txt": "no class names in the file empty.txt",
        "twice.txt": 'class name "Cat" is repeated', "gone.txt": "no file gone.txt",
        "latin.txt": "cannot read class names from latin.txt",
        "picture.txt": "cannot read class names from picture.txt", "many.txt": "256 classes",
        "escape.txt": "no printable text", "'cat, \udcff'": "no printable text"}.items()),
]

CASES = {
    reclip.main: [
        *DATA,
        # the command line
        (f"--seed {1 << 70}", "--seed is 1180591620717411303424"),
        ("--crop 8", "--crop 8 is a single patch; expected more than 8"),
        ("--method maskclip --decoder", "--method maskclip learns nothing"),
        ("--method maskclip --bias joint --hypothesis crops", "--method maskclip learns nothing"),
        ("--batch 0", "--batch is 0, for 1 processes; expected one image each at least"),
        ("--scale 0 9", "--scale is (0, 9); expected 1 or more"),
        ("--epochs 2 --schedule 1", "--schedule is 1; expected 2 or more"),
        ("--hypothesis global --top 0", "--top is 0; expected 1 or more"),
        ("--workers -1", "--workers is -1; expected 0 or more"),
        *each("epochs crop", "--NAME 0", "--NAME is 0; expected 1 or more"),
        *each("0.0 1.5", "--crop-ratio NAME", "--crop-ratio is NAME; expected 0.02 to 1"),
        *each("tau lr mask-temperature", "--NAME 0", "--NAME is 0.0; expected more than 0"),
        *each("-1.0 nan", "--lr NAME", "--lr is NAME; expected more than 0"),
        ("--tau inf", "--tau is inf; expected more than 0"),
        ("--threshold nan", "--threshold is nan; expected 0 to 1"),
        ("--pd -0.5", "--pd is -0.5; expected 0 to 1"),
        *each("cuda:99 meta nonsense", "--device NAME", "--device NAME"),
        *each("file file/run", "--out NAME", "cannot write to NAME"),
        ("--download --dataset voc", "--download needs --data-root"),
        ("--download", "there is nothing to download for --dataset shapes"),
        # data trees
        (f"{TREE} list-outside --clip clip.pt", "1 of the 1 images in list-outside"),
        (f"{TREE} jpegs-file {MASKCLIP}", "no voc in jpegs-file: expected"),
        *each("ade stuff", "--dataset NAME --data-root NAME", "no NAME in NAME: expected"),
        ("--dataset context --data-root context", "cannot read the list of images"),
        # CLIP files
        *((f"{NAMED} good --clip {file}", message) for file, message in {
            "missing.pt": "missing.pt: not a CLIP state dict: 1 missing (ln_final.weight)",
            "extra.pt": "extra.pt: not a CLIP state dict: 1 left over (visual.new)",
            "shape.pt": "shape.pt: not a CLIP state dict: 1 of another shape (ln_final.weight",
            "vocabulary.pt": "vocabulary.pt has a vocabulary of 500",
            "context.pt": "a context of 20 tokens",
            "resnet.pt": "resnet.pt has a ResNet image encoder; the surgery",
            "heads.pt": "heads.pt: ", "flat.pt": "flat.pt: not a CLIP state dict",
            "nan.pt": "nan.pt: ", "cut.pt.gz": "damaged gzip file",
            "nowhere.pt": "'nowhere.pt' is neither a file nor a model; models: RN50",
            "good/2011_000003.jpg": "not a readable file"}.items()),
        *each("folder.pt ViT-B/17", "--clip NAME", "'NAME' is neither a file nor a model"),
        *each("list.pt nested.pt run/reclip.pt", f"{NAMED} good --clip NAME",
              "NAME: not a state dict"),
        *each(f"words.pt damaged.pt zero.pt bomb.pt.gz {BOMBS}", f"{NAMED} good --clip NAME",
              "NAME: not a readable file of PyTorch weights"),
        *each(SCRIPTS, f"{NAMED} good --clip NAME",
              "a TorchScript archive that is none of OpenAI's"),
        # another run in the same folder
        *((f"{SHORT} run {changes}", message) for changes, message in {
            "--lr 0.02": "made with other settings (lr 0.03 → 0.02)",
            "--schedule 40": "made with other settings (schedule 10 → 40)",
            "--seed 1": "was made with other settings",
            "--crop-ratio 0.25": "was made with other settings",
            "--method maskclip": "was made with other settings",
            "--clip clip.pt": "with another CLIP",
            f"{NAMED} good --clip clip.pt": "was made with other classes"}.items()),
        (f"{OWN} other", "own/reclip.pt was made with other images"),
    ],
    evaluate.main: [
        ("", "no checkpoint under runs/; run python reclip.py first"),
        ("--checkpoint gone.pt", "no checkpoint gone.pt"),
        *each(f"run run/results.json damaged.pt zero.pt clip.pt list.pt {BOMBS} {SCRIPTS}",
              "--checkpoint NAME", "NAME is not a checkpoint of reclip.py"),
        *((f"{CHECKPOINT} {words}", message) for words, message in {
            "--workers -1": "--workers is -1", "--pd nan": "--pd is nan; expected 0 to 1",
            "--batch -2": "--batch is -2; expected 1 or more",
            "--slide 96 0": "--slide is 0; expected 1 or more", "--slide 10 20": "leaves gaps",
            "--out file": "cannot write to file",
            "--method maskclip": "--method goes with --images",
            "--pd 0.5 --no-pd": "contradict each other",
            "--surgery value": "cannot be changed afterwards",
            "--activation gelu": "cannot be changed afterwards",
            f"{TREE} voc": "was made for other classes (ladybug, flag, chessboard, leaf, moon, …) "
                           "than voc's",
            "--dataset voc": "--dataset voc needs --data-root",
            "--dataset coco": 'no data set "coco"',
            "--clip clip.pt": "was made with another CLIP than",
            "--clip nowhere": "'nowhere' is neither a file nor a model",
            "--clip resnet.pt": "has a ResNet image encoder"}.items()),
        # predictions
        *each("--hypotheses --count-absent --bias", f"{CHECKPOINT} --images good NAME",
              "--images predicts, NAME evaluates"),
        *each("file good/2011_000003.jpg", f"{CHECKPOINT} --images good --out NAME",
              "cannot write to NAME"),
        (f"{CHECKPOINT} --images nowhere", "--images: no file or folder nowhere"),
        (f"{CHECKPOINT} --images empty", "--images: no images in empty; expected .jpg"),
        (f"{CHECKPOINT} --images good --classes cat", "--classes goes with"),
        ("--checkpoint run/distill.pt --images good --method maskclip",
         "--method maskclip: this checkpoint has only distilled"),
        ("--images good --method maskclip --classes 'a, a'", "is repeated"),
        ("--images good --method maskclip --classes a --dataset coco", 'no data set "coco"'),
        ("--images good --method maskclip --classes a --clip script.pt",
         "a TorchScript archive that is none of OpenAI's"),
    ],
    distill.main: [
        *((f"{TEACHER} {words}", message) for words, message in {
            "--lr nan": "--lr is nan", "--lr inf": "--lr is inf", "--lr -1": "--lr is -1.0",
            "--workers -1": "--workers is -1", "--epochs 0": "--epochs is 0",
            "--views -1": "--views is -1; expected 0 or more",
            f"--seed {1 << 63}": "--seed is 9223372036854775808",
            "--losses ''": "expected some of mask,feature,text",
            "--losses mask,depth": "expected some of mask,feature,text",
            "--head learned --losses text": "add mask to --losses",
            "--pd nan": "--pd is nan; expected 0 to 1", "--pd 2": "--pd is 2.0; expected 0 to 1",
            "--ignore-below 1.5": "--ignore-below is 1.5",
            "--clip clip.pt": "with another CLIP than clip.pt",
            "--clip bomb.pt": "not a readable file", "--out file": "cannot write to file",
            "--student small --backbone imagenet": "small has no ImageNet weights",
            "--student resnet50 --backbone nowhere.pth": "no file nowhere.pth",
            "--student resnet50 --backbone clip.pt": "are not those of this ResNet"}.items()),
        *each(f"run {BOMBS} {SCRIPTS}", "--teacher NAME", "NAME is not a checkpoint"),
        *each("words.pt list.pt script.pt bomb.pt bomb.pkl zip-bomb.pt old-bomb.pt",
              f"{TEACHER} --student resnet50 --backbone NAME", "holds no weights of a ResNet"),
    ],
    data.main: [
        *DATA,
        *each("0 -3", f"{TREE} voc --limit NAME", "--limit is NAME"),
        (f"--seed {1 << 63}", "--seed is 9223372036854775808"),
        ("--dataset stuff --download", "--download cannot fetch stuff; get it from"),
        ("--dataset folder --download", "nothing to download"),
        ("--dataset voc --download", "--download needs --data-root"),
        ("--dataset voc --convert mats", "--convert goes with --dataset context"),
        ("--dataset context --data-root context --convert mats",
         "cannot read mats/2008_000002.mat"),
        ("--dataset context --data-root voc --convert mats", "no context in voc"),
        ("--dataset cityscapes --data-root city", "no cityscapes in city"),
        *each("list-bytes list-folder", f"{TREE} NAME", "cannot read the list of images"),
        *each("good file/sheet.png", f"{NAMED} good --out NAME", "cannot write NAME"),
        *each("text short floats deep dangling", f"{NAMED} NAME --out x.png", "NAME/0"),
        (f"{NAMED} bomb", "bomb/0.png: it claims more than 179 million pixels; make it"),
        *each("cut zero", f"{NAMED} NAME --out x.png", "cannot read image NAME/2011_000006.jpg"),
        *((f"{TREE} {tree} --out sheet.png", message) for tree, message in {
            "label-cut": "cannot read label", "label-ids": "holds the id 300",
            "label-77": "holds the id 77, which voc (20 classes) does not have",
            "label-rgba": "is a RGBA picture; expected one channel",
            "label-small": "is 480×375 pixels, its image 500×375",
            "label-bomb": "cannot read label", "label-float": "is a F picture",
            "label-some": "1 of 2 labels of voc train are missing",
            "image-cut": "cannot read image"}.items()),
    ],
}


@contextlib.contextmanager
def nothing_changes():
    before = snapshot(".")
    yield
    after = snapshot(".")
    assert after == before, {path for path in after | before if after.get(path) != before.get(path)}


@pytest.mark.parametrize("main, arguments, message", [
    pytest.param(main, *case, id=ascii(f"{main.__module__} {case[0]:.80}"))
    for main, cases in CASES.items() for case in cases])
def test_one_line_and_nothing_changed(place, small_demo, monkeypatch, mistake, main, arguments,
                                      message):
    monkeypatch.chdir(place)
    if main is reclip.main and "--clip" not in arguments:
        arguments += " --clip shapes-tiny"
    with nothing_changes():
        said = mistake(main, *shlex.split(arguments))
    assert message in said.replace(" val ", " train ")  # data.py opens the other split of a folder


def without(key):
    def change(checkpoint):
        del checkpoint[key]
    return change


def pickled_array():
    file = io.BytesIO()
    np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    return file.getvalue()


def second_line(change):
    """A change of a text file's second line."""
    return lambda content: b"".join(
        line + b"\n" if n != 1 else change(line) + b"\n"
        for n, line in enumerate(content.splitlines()))


ROW = lambda **changes: second_line(lambda line: json.dumps(json.loads(line) | changes).encode())
NO_CHECKPOINT, FOREIGN = "run/reclip.pt is not a checkpoint", "made with other settings"
EVALUATE, DISTILL = f"evaluate {CHECKPOINT}", f"distill {TEACHER}"
STUDENT = "evaluate --checkpoint run/distill.pt"

DAMAGES = [  # (file of the run, its content or a change of it, message, *commands)
    ("reclip.pt", without("settings"), NO_CHECKPOINT, TRAIN, EVALUATE, DISTILL),
    ("reclip.pt", without("clip"), NO_CHECKPOINT, TRAIN, EVALUATE),
    ("reclip.pt", without("Wr"), NO_CHECKPOINT, EVALUATE),
    ("reclip.pt", lambda c: c.update(state={}), NO_CHECKPOINT, TRAIN, EVALUATE),
    ("reclip.pt", lambda c: c.update(state="text"), NO_CHECKPOINT, TRAIN, EVALUATE),
    ("reclip.pt", lambda c: c.update(settings=[1]), NO_CHECKPOINT, TRAIN, EVALUATE),
    ("reclip.pt", lambda c: c.update(classes=5), "was made with other classes", TRAIN),
    ("reclip.pt", lambda c: c.update(classes=5), NO_CHECKPOINT, EVALUATE),
    ("reclip.pt", lambda c: c.update(classes=c["classes"][:4]), NO_CHECKPOINT, EVALUATE),
    ("reclip.pt", lambda c: c.update(Wr=torch.zeros(10, 9)), NO_CHECKPOINT, EVALUATE, DISTILL),
    ("reclip.pt", lambda c: c.update(optimizer=None, finished=False, step=2), NO_CHECKPOINT, TRAIN),
    ("reclip.pt", lambda c: c["state"].update(Wq=torch.zeros(3, 64)), NO_CHECKPOINT, TRAIN,
     EVALUATE),
    ("reclip.pt", lambda c: c["state"].pop("position.weight"), NO_CHECKPOINT, TRAIN, EVALUATE,
     DISTILL),
    ("reclip.pt", lambda c: c["settings"].pop("surgery"), NO_CHECKPOINT, EVALUATE, DISTILL),
    ("reclip.pt", lambda c: c["settings"].update(bias="odd"), NO_CHECKPOINT, EVALUATE),
    *(("distill.pt", change, "run/distill.pt is not a", STUDENT) for change in (
        without("settings"), lambda c: c["settings"].pop("student"),
        lambda c: c["settings"].update(student="odd"), lambda c: c.update(state={}),
        lambda c: c["state"].pop("network.aspp.1.conv.weight"))),
    ("distill.pt", b"words", "run/distill.pt is not a checkpoint", STUDENT, DISTILL),
    ("reclip.pt", b"words", NO_CHECKPOINT, TRAIN, EVALUATE, DISTILL),
    *(("hypotheses.jsonl", content, "hypotheses.jsonl is damaged; delete it", TRAIN)
      for content in (ROW(scores=[1, 2]), ROW(scores="many"), ROW(scores=["a"] * 10),
                      *(second_line(lambda line, new=new: new) for new in (
                          b"[1, 2]", b'{"id": "train-000"}', b"7", b"{nonsense", b'{"id": "tr')),
                      b"\xff\xfe\n", b"", pickle.dumps(Bomb()))),
    ("hypotheses.jsonl", None, "was made with another CLIP", f"{TRAIN} --clip clip.pt"),
    *(("reclip.pt", None, f"hypotheses.jsonl was {FOREIGN} ({named}", f"{TRAIN} {change}")
      for change, named in {
        "--clip clip.pt": "clip ", "--crop-ratio 0.34": "view 0.5 → 0.34",
        "--hypothesis global": "hypothesis crops → global", "--seed 1": "seed 0 → 1"}.items()),
    *(("reclip.pt", None, f"views.json was {FOREIGN} ({named}); delete views.* there",
       f"{TRAIN} {change}") for change, named in {
        "--crop 80": "crop 96 → 80", "--views 1": "views 2 → 1",
        "--surgery program": "surgery value → program"}.items()),
    ("views.json", b"{}", f"run/views.json was {FOREIGN} (activation None", TRAIN),
    *(("views.npy", content, "views.npy is damaged; delete it", TRAIN) for content in (
        lambda content: content[:9000], b"words", b"", pickled_array())),
    *(("views.json", content, "views.json is damaged; delete views.* there", TRAIN)
      for content in (b"{", b"\xff\xfe", b"[1]", None)),
    *(("log.jsonl", content, "log.jsonl is damaged", TRAIN)
      for content in (b"words\n", b"\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n')),
    *(("results.json", content, "run/results.json is damaged", EVALUATE) for content in (
        b"words", b"[1]", b"\xff\xfe", b'{"maskclip": 7}', lambda content: content[:300])),
]


@pytest.mark.parametrize("file, content, message, command", [
    pytest.param(file, content, message, command, id=ascii(f"{file}-{n} {command}"))
    for n, (file, content, message, *commands) in enumerate(DAMAGES) for command in commands])
def test_damaged_runs(place, small_demo, tmp_path, monkeypatch, mistake, file, content, message,
                      command):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "run", "run")
    Path("clip.pt").symlink_to(place / "clip.pt")
    path = Path("run", file)
    if file.startswith("views"):  # a finished run needs no views
        Path("run/reclip.pt").unlink()
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".pt":
        checkpoint = torch.load(path, weights_only=True)
        content(checkpoint)
        torch.save(checkpoint, path)
    else:
        path.write_bytes(content(path.read_bytes()))
    script, *words = shlex.split(command)
    with nothing_changes():
        assert message in mistake(sys.modules[script].main, *words)


@pytest.mark.parametrize("main, line", [
    (main, line) for main, lines in {
        reclip.main: ("--method nonsense", "--preset best", "--seed x", "--scale 5", "--epochs 1.5",
                      "--bias odd", "--unknown", "--hypothesis none", "--data-root", "file"),
        evaluate.main: ("--split test", "--slide 5", "--images", "--batch x", "--method reclip",
                        "--surgery odd"),
        distill.main: ("--head odd", "--student big", "--text-masks odd", "--pd x", "--unknown"),
        data.main: ("--limit x", "--convert", "--unknown")}.items() for line in lines])
def test_usage(place, monkeypatch, capsys, main, line):
    """argparse's own errors: the usage, and one line."""
    monkeypatch.chdir(place)
    with nothing_changes(), pytest.raises(SystemExit, match="2"):
        run(main, *line.split())
    *usage, last = capsys.readouterr().err.splitlines()
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
    assert sum(map(len, CASES.values())) >= 200
