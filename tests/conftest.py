"""What several test files share: small CLIPs of random weights, small data sets, commands."""

import functools
import gc
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
REAL = Path(__file__).with_name("real")  # three photographs in VOC's layout, one in Cityscapes'
sys.path.insert(0, str(REPOSITORY))

import data  # noqa: E402
import distill  # noqa: E402
import evaluate  # noqa: E402
import reclip  # noqa: E402
from clip.model import CLIP  # noqa: E402


LONG = bool(os.environ.get("RECLIP_LONG"))  # run the long forms of test_fuzz and test_worst_day


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; leave out with -m 'not slow'")
    config.addinivalue_line("markers", "long: takes minutes; runs only with RECLIP_LONG=1")


def pytest_unconfigure(config):
    gc.unfreeze()  # see collect_garbage


def pytest_runtest_setup(item):
    if item.get_closest_marker("long") and not LONG:
        pytest.skip("long: runs with RECLIP_LONG=1")


@pytest.fixture(autouse=True)
def collect_garbage():
    """A caught exception holds the frames, and the models in them, until the collector comes by."""
    gc.freeze()  # what is there already need not be looked through each time
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A test that looks for another machine fails."""
    look_up = socket.getaddrinfo

    def local(host, *args, **kwargs):
        if host not in ("127.0.0.1", "localhost"):
            pytest.fail(f"looked for {host}")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", local)


# ---- CLIP --------------------------------------------------------------------------------------


def random_clip(seed=0, **changes):
    """A frozen CLIP of random weights, patches of 16 pixels; no number in it is negligible."""
    torch.manual_seed(seed)
    sizes = dict(embed_dim=32, image_resolution=64, vision_layers=2, vision_width=64,
                 vision_patch_size=16, context_length=77, vocab_size=49408, transformer_width=64,
                 transformer_heads=1, transformer_layers=2)
    model = CLIP(**sizes | changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    nn.init.normal_(model.token_embedding.weight, std=0.3)
    nn.init.normal_(model.positional_embedding, std=0.3)
    return model.eval().requires_grad_(False)


def plain_text_features(model, prefix, suffix):
    """Text features of C prompts with nothing shared: all positions of each through all blocks.

    prefix: P×width, embeddings; suffix: C×S, token ids; filled up with token 0. Returns C×D.
    """
    rest = torch.zeros(len(suffix), model.context_length - len(prefix) - suffix.shape[1])
    ids = torch.cat([suffix, rest.to(suffix)], 1)
    x = torch.cat([prefix.expand(len(ids), -1, -1), model.token_embedding(ids)], 1)
    x = model.ln_final(model.transformer(x + model.positional_embedding))
    end = len(prefix) + ids.argmax(1)
    return x[torch.arange(len(x)), end] @ model.text_projection


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    """A file of random weights in OpenAI's layout, for --clip."""
    path = tmp_path_factory.mktemp("clip") / "random.pt"
    torch.save(random_clip().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny_clip():
    return reclip.load_clip("shapes-tiny")


# ---- Data --------------------------------------------------------------------------------------


@pytest.fixture
def voc_root(tmp_path):
    """VOC's tree with three photographs: two to train on, one to evaluate."""
    shutil.copytree(REAL / "VOCdevkit", tmp_path / "voc" / "VOCdevkit")
    return tmp_path / "voc"


@pytest.fixture
def cityscapes_root(tmp_path):
    """Cityscapes' tree with one street scene, to train on and to evaluate."""
    shutil.copytree(REAL / "cityscapes", tmp_path / "cityscapes")
    for folder in ("leftImg8bit", "gtFine"):
        shutil.copytree(REAL / "cityscapes" / folder / "val",
                        tmp_path / "cityscapes" / folder / "train")
    return tmp_path / "cityscapes"


@pytest.fixture
def photos(tmp_path):
    """A folder of photographs alone."""
    shutil.copytree(REAL / "VOCdevkit" / "VOC2012" / "JPEGImages", tmp_path / "photos")
    return tmp_path / "photos"


class SmallShapes(data.Shapes):
    """The demo with 24 training and 12 validation images."""

    def __init__(self, split, seed):
        super().__init__(split, seed)
        self.ids = self.ids[: 24 if split == "train" else 12]


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(data, "Shapes", SmallShapes)


@pytest.fixture(scope="session")
def trained_demo(tmp_path_factory):
    """A folder with reclip.pt and distill.pt of the small demo, hardly trained; to read only."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "Shapes", SmallShapes)
        run(reclip.main, "--out", out, "--epochs", 3)
        run(distill.main, "--teacher", out / "reclip.pt", "--epochs", 1)
    return out


TABLES = (
    ("Table X: one", "VOC ADE", 0, (
        ("MaskCLIP", "maskclip", "49.5 –"),
        ("ReCLIP++", "reclip++", "73.5 13.5"),
        ("distilled", "reclip++-mask", "77.7 –"))),
    ("Table Y: another", "Context", None, (
        ("class", "reclip++ class_preference", "0.37"),
        ("probe", "reclip++ linear_probe", "–"))),
)


def few_tables(patch):
    """evaluate.py --tables with few rows, steps and runs of Fig. 3; patch: a MonkeyPatch."""
    scale, crop, _, _, *rest = reclip.DEMO
    patch.setattr(reclip, "DEMO", (scale, crop, 2, 2, *rest))
    patch.setitem(distill.DEMO, "epochs", 1)
    patch.setattr(evaluate, "linear_probe", functools.partial(evaluate.linear_probe, steps=2))
    patch.setattr(evaluate, "TABLES", TABLES)
    for name, kept in ("RECTIFIED", ("maskclip", "reclip++", "global")), ("DISTILLED",
                                                                          ("reclip++-mask",)):
        values = getattr(evaluate, name)
        patch.setattr(evaluate, name, {key: values[key] for key in kept})
    patch.setitem(evaluate.SWEEPS, "shapes", dict(threshold=(0.24,), crop_ratio=(1.0,)))


def snapshot(folder):
    """{path: content} of all files in a folder, None for a folder, the target for a link."""
    content = lambda path: (os.readlink(path) if path.is_symlink() else
                            path.read_bytes() if path.is_file() else None)
    return {str(path): content(path) for path in Path(folder).rglob("*")}


# ---- Commands ----------------------------------------------------------------------------------


def run(main, *arguments):
    """A script's main() on the CPU; arguments may be of any type."""
    return main([str(a) for a in (*arguments, "--device", "cpu")])


def same(a, b):
    """Whether two nested structures of tensors and plain values are equal, bit for bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def learned(out, name="reclip.pt"):
    """All that training determines of the checkpoint in a run's folder: not paths and machines."""
    checkpoint = reclip.load_checkpoint(out / name)
    return {key: checkpoint[key] for key in ("state", "Wr", "optimizer", "step", "finished")}
