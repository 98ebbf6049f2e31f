"""What several test files share: recorded values, small CLIPs, small data sets, commands.

The environment variable GOLDEN names another folder with the files of golden/.
"""

import gc
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
REAL = Path(__file__).with_name("real")  # three photographs in VOC's layout, one in Cityscapes'
GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).with_name("golden")))
# Biases that the BatchNorm after them takes away again: their gradients are rounding errors.
BEFORE_A_NORM = {"decoder.conv.bias", "position.0.bias", "position.3.bias", "position.6.bias"}
sys.path.insert(0, str(REPOSITORY))

import data  # noqa: E402
import distill  # noqa: E402
import reclip  # noqa: E402
from clip.model import CLIP  # noqa: E402


def pytest_configure():
    torch.set_num_threads(1)  # in small tests they would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started


@pytest.fixture(autouse=True)
def collect_garbage():
    """A caught exception holds the frames, and the models in them, until the collector comes by."""
    gc.freeze()  # what is there already need not be looked through each time
    yield
    gc.collect()
    gc.unfreeze()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A test that looks for another machine fails."""
    look_up = socket.getaddrinfo

    def local(host, *args, **kwargs):
        if host not in ("127.0.0.1", "localhost"):
            pytest.fail(f"looked for {host}")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", local)


def golden(name):
    """The recorded dictionary; its state dicts are float16, which .float() restores exactly."""
    with gzip.open(GOLDEN / f"{name}.pt.gz") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def normal(*shape, seed=0):
    """Numbers of a normal distribution, the same ones at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def same(a, b):
    """Whether two nested structures of tensors and plain values are equal, bit for bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def raising(error):
    """A function that raises an error, whatever it is called with."""
    return Mock(side_effect=error)


def refuses(message, function, *args, error=data.UserError, **options):
    """Assert that a call ends with an error whose text matches the pattern `message`."""
    with pytest.raises(error, match=message) as caught:
        function(*args, **options)
    return str(caught.value)


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
    prefix: P×width, embeddings; suffix: C×S, token ids; filled up with token 0. Returns C×D."""
    rest = torch.zeros(len(suffix), model.context_length - len(prefix) - suffix.shape[1])
    ids = torch.cat([suffix, rest.to(suffix)], 1)
    x = torch.cat([prefix.expand(len(ids), -1, -1), model.token_embedding(ids)], 1)
    x = model.ln_final(model.transformer(x + model.positional_embedding))
    end = len(prefix) + ids.argmax(1)
    return x[torch.arange(len(x)), end] @ model.text_projection


def save_clip(model, path):
    """Write a CLIP's state dict, which tells the heads of its image encoder."""
    heads = model.visual.transformer.resblocks[0].attn.num_heads
    torch.save(model.state_dict() | {"vision_heads": torch.tensor(heads)}, path)


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    """A file of random weights in OpenAI's layout, for --clip."""
    path = tmp_path_factory.mktemp("clip") / "random.pt"
    save_clip(random_clip(), path)
    return path


@pytest.fixture(scope="session")
def tiny_clip():
    return reclip.load_clip("shapes-tiny")


def save(path, pixels, mode=None):
    """Write a picture file; label maps with mode "P" get a palette, as VOC's have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    if mode == "P":
        image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(path)


def picture(path, size=(60, 40), mode="RGB", seed=0, **options):
    """Write a picture of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks).resize(size, 0).convert(mode).save(path, **options)


@pytest.fixture
def voc_root(tmp_path):
    """VOC's tree with three photographs: two to train on, one to evaluate."""
    return shutil.copytree(REAL / "VOCdevkit", tmp_path / "voc" / "VOCdevkit").parent


@pytest.fixture
def photos(tmp_path):
    """A folder of photographs alone."""
    return shutil.copytree(REAL / "VOCdevkit/VOC2012/JPEGImages", tmp_path / "photos")


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
        run(distill.main, "--teacher", out / "reclip.pt", "--epochs", 2)
    return out


@pytest.fixture
def demo_copy(trained_demo, small_demo, tmp_path, monkeypatch):
    """`trained_demo` to write to, which is "run" in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_demo, "run")
    return Path("run")


def run(main, *arguments):
    """A script's main() on the CPU; arguments may be of any type."""
    device = () if main is data.main or "--device" in arguments else ("--device", "cpu")
    return main([str(a) for a in (*arguments, *device)])


def python(*arguments, cwd=REPOSITORY, **environment):
    """Run the interpreter, which imports from the repository; what comes of it."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment,
                          text=True, capture_output=True, timeout=600)


@pytest.fixture
def mistake(capsys):
    """mistake(main, *arguments) → the one line that a command ends with, and exit code 2."""
    def mistake(main, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(main, *arguments)
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert said.startswith("error: ") and said.count("\n") == 1 and said.endswith("\n"), said
        return said

    return mistake


def learned(out, name="reclip.pt"):
    """All that training determines of the checkpoint in a run's folder: not paths and machines."""
    checkpoint = reclip.load_checkpoint(Path(out) / name)
    return {key: checkpoint[key] for key in ("state", "Wr", "optimizer", "step", "finished")}


def snapshot(folder):
    """{path: content} of all files in a folder."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def json_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def results(out):
    return json.loads(Path(out, "results.json").read_text())
