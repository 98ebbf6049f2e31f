"""clip/: encoders against plain formulas, weights as users bring them, the demo's CLIP."""

import gzip
import hashlib
import io
import json
import re
import struct

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close

import clip
import pretrain
from clip import clip as loading
from clip.model import CLIP, LayerNorm, QuickGELU, build_model
from clip.shapes import TARGET, draw_seed, draw_shapes
from clip.weights import DTYPES, MODELS, read_state_dict, read_weights
from conftest import normal, raising, random_clip, refuses, same

RESNET = dict(vision_layers=[1, 2, 3, 1], vision_width=8, image_resolution=64)
BOTH = pytest.mark.parametrize("changes", [{}, RESNET], ids=["ViT", "ResNet"])
IMAGE = normal(3, 3, 16, 16, seed=1)
TOKENS = torch.tensor([[48, 3, 7, 49, *[0] * 8], [48, 9, 5, 11, 6, 49, *[0] * 6]])
TENSORS = {"a": torch.arange(6.0).view(2, 3)}


def make_clip(**changes):
    """A CLIP of a few thousand weights: 16-pixel images, 12 tokens, 50 words, one head."""
    return random_clip(**dict(embed_dim=8, image_resolution=16, vision_patch_size=8,
                              context_length=12, vocab_size=50) | changes)


@pytest.fixture
def model():
    return make_clip()


def refused(path, message, **options):
    """clip.load ends with one line that names the path and matches the pattern `message`."""
    said = refuses(message, clip.load, path, device="cpu", error=ValueError, **options)
    assert str(path) in said and said.isprintable()


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def safetensors(tensors, **changes):
    """A safetensors file as bytes; changes: {name: entry} put into its header instead."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        kind = next(kind for kind, dtype in DTYPES.items() if dtype == tensor.dtype)
        header[name] = {"dtype": kind, "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    text = json.dumps(header | changes).encode()
    return struct.pack("<Q", len(text)) + text + body


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(json.dumps(content).encode() if isinstance(content, dict) else content)
    return path


def as_saved(source, model, **options):
    """clip.load's model, which has to have the weights of `model`."""
    loaded = clip.load(source, device="cpu", **options)[0]
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    return loaded


def heads(model):
    """Those of the image and of the text encoder."""
    return tuple(encoder.resblocks[0].attn.num_heads
                 for encoder in (model.visual.transformer, model.transformer))


@pytest.mark.parametrize("activation, act", [
    ("gelu", F.gelu), ("quick_gelu", lambda x: x / (1 + torch.exp(-1.702 * x)))])
def test_image_features_by_pytorchs_own_blocks(activation, act):
    """A ViT's image features from its state dict alone; another number of heads gives others."""
    sizes, width, images = dict(vision_heads=3, activation=activation), 96, normal(2, 3, 64, 64)
    model = random_clip(vision_width=width, **sizes)
    state = {name[7:]: v for name, v in model.state_dict().items() if name.startswith("visual.")}
    norm = lambda x, name: F.layer_norm(x, [width], state[f"{name}.weight"], state[f"{name}.bias"])
    x = F.conv2d(images, state["conv1.weight"], stride=16).flatten(2).mT
    x = torch.cat([state["class_embedding"].expand(2, 1, -1), x], 1) + state["positional_embedding"]
    theirs = renamed(state, ("transformer.resblocks.", "layers."), ("attn.", "self_attn."),
                     ("ln_", "norm"), ("mlp.c_fc", "linear1"), ("mlp.c_proj", "linear2"))
    blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(
        width, 3, 384, 0, act, batch_first=True, norm_first=True), 2, enable_nested_tensor=False)
    blocks.load_state_dict({name: theirs[name] for name in blocks.state_dict()})
    expected = norm(blocks(norm(x, "ln_pre"))[:, 0], "ln_post") @ state["proj"]
    assert_close(model.encode_image(images), expected, atol=2e-5, rtol=1e-5)
    other = build_model(model.state_dict(), **sizes | dict(vision_heads=1))
    assert not torch.allclose(other.encode_image(images), expected, atol=1e-3)
    assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)))


def test_what_follows_the_end_token_does_not_matter(model):
    full = model.encode_text(TOKENS)
    assert_close(model.encode_text(TOKENS[:, :6]), full)
    assert_close(model.encode_text(TOKENS.where(torch.arange(12) < 6, 13)), full)


@BOTH
def test_float16_for_all_but_norms_and_embeddings(changes):
    model, x = make_clip(**changes), 300 * normal(4, 64).half()
    text, image = model.encode_text(TOKENS), None if changes else model.encode_image(IMAGE)
    loading.convert_weights(model)
    for name, parameter in model.named_parameters():
        kept = any(p in name for p in ("ln_", "bn", "downsample.1", "embedding", "logit_scale"))
        assert (parameter.dtype == torch.float32) == kept, name
    assert_close(model.encode_text(TOKENS), text.half(), atol=1e-2, rtol=0)
    assert changes or (model.encode_image(IMAGE) - image).abs().max() < 1e-2
    # Norms compute in float32 all the same: squares of x overflow in float16.
    assert_close(LayerNorm(64)(x), nn.LayerNorm(64)(x.float()).half())


def test_tokenize_cuts_only_if_told():
    text, tokens = "one two three", clip.tokenize(["one two three", ""], context_length=5)
    assert tokens.dtype == torch.int32 and tokens[1].tolist() == [49406, 49407, 0, 0, 0]
    refuses(text, clip.tokenize, text, context_length=4, error=RuntimeError)
    cut = clip.tokenize(text, context_length=4, truncate=True)
    assert cut.tolist() == [[*tokens[0, :3].tolist(), 49407]]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "RGB", "1", "CMYK"])
def test_preprocess_takes_the_middle_in_every_mode(mode):
    image = Image.new("L", (100, 50))
    image.paste(255, (50, 0, 100, 50))                       # left black, right white
    x = clip.load("shapes-tiny", device="cpu")[1](image.convert(mode))
    white = (1 - torch.tensor(loading.CLIP_MEAN)) / torch.tensor(loading.CLIP_STD)
    assert x.shape == (3, 48, 48) and (x[:, :, :20] < 0).all()
    assert_close(x[:, :, 28:], white[:, None, None].expand(3, 48, 20))


@BOTH
def test_build_model_gives_the_same_model(changes):
    model = make_clip(**changes)
    state = {name: value for name, value in model.state_dict().items()
             if "num_batches_tracked" not in name}           # as open_clip's frozen norms
    state["input_resolution"] = torch.tensor(16)             # beside weights in OpenAI's archives
    built = build_model(state)
    assert same(dict(built.state_dict()), dict(model.state_dict())) and not built.training
    image = normal(2, 3, *[changes.get("image_resolution", 16)] * 2)
    assert_close(built.encode_image(image), model.encode_image(image))
    built.logit_scale.data.fill_(0)
    assert model.logit_scale != 0 and built.logit_scale.requires_grad    # a copy, to be trained


def renamed(state, *changes):
    """The same weights; changes: patterns, and what replaces them in the names."""
    for pattern, other in changes:
        state = {re.sub(pattern, other, name): value for name, value in state.items()}
    return state


def hugging_face(state):
    """The same weights as Hugging Face's CLIPModel names and lays them out."""
    names = (("^text_projection", "text_projection.weight"),
             ("visual.proj", "visual_projection.weight"),
             ("^(token|pos|trans|ln_final)", r"text_model.\1"), ("^visual[.]", "vision_model."),
             ("transformer.resblocks", "encoder.layers"), ("conv1", "embeddings.patch_embedding"),
             ("(token|class)_embedding", r"embeddings.\1_embedding"),
             ("positional_embedding", "embeddings.position_embedding.weight"),
             ("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"), ("attn[.]", "self_attn."),
             ("ln_final", "final_layer_norm"), ("ln_", "layer_norm"), ("c_fc", "fc1"),
             ("c_proj", "fc2"))
    theirs = {"text_model.embeddings.position_ids": torch.arange(5)[None]}
    for name, value in renamed(state, *names).items():
        if "in_proj_" in name:
            theirs |= {name.replace("in_proj_", f"{letter}_proj."): part
                       for letter, part in zip("qkv", value.chunk(3))}
        else:
            theirs[name] = value.T if name.endswith("projection.weight") else value
    return theirs


LAYOUTS = {  # what programs make of a state dict
    "half": lambda state: {name: value.half() for name, value in state.items()},
    "DataParallel": lambda state: {"model": renamed(state, ("^", "module."))},
    "compiled": lambda state: renamed(state, ("^", "_orig_mod.")),
    "part-compiled": lambda state: renamed(state, ("visual.", "visual._orig_mod.")),
    "Lightning": lambda state: {"epoch": 3, "state_dict": renamed(state, ("^", "model."))},
    "open_clip, text apart": lambda state: renamed(state, ("^(?!visual|logit)", "text.")),
    "Hugging Face": hugging_face,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_formats(tmp_path, layout):
    model = make_clip(transformer_width=128, transformer_heads=2).half().float()
    content = LAYOUTS[layout](model.state_dict())
    flat = next((value for value in content.values() if isinstance(value, dict)), content)
    old = saved(content, _use_new_zipfile_serialization=False)
    for file in (saved(content), old, safetensors(flat), gzip.compress(saved(content))):
        as_saved(write(tmp_path / "w", file), model, heads=1)


def test_safetensors_of_every_type(tmp_path):
    tensors = {kind: (10 * normal(3, 5)).to(dtype) for kind, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(4.6), "odd": torch.ones(3, dtype=torch.uint8),
                "after": normal(2), "none": torch.empty(0, 7)}
    assert same(read_weights(write(tmp_path / "a", safetensors(tensors))), tensors)


WRONG = {  # a file, and what its one line has to name beside the path
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1f\n", "Git-LFS pointer"),
    "html": (b"\n <!DOCTYPE html><html>Sign in\x1b[31m</html>", "web page"),
    "empty": (b"", "expected"),
    "half-zip": (saved(TENSORS)[:300], "damaged"),
    "half-gzip": (gzip.compress(saved(TENSORS))[:200], "damaged"),
    "whole-model": (saved(nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"),
    "number": (saved({"x": 3}), "tensors"),
    "twice": (saved({"a": torch.zeros(1), "module.a": torch.ones(1)}), "twice"),
    "another": (saved({"fc.weight": torch.zeros(2, 2)}), "fc.weight"),
    "cut": (safetensors(TENSORS)[:-4], "."),
    "no-header": (struct.pack("<Q", 3) + b"{]}", "."),
    "dtype": (safetensors(TENSORS, a=dict(dtype="F8_E4M3", data_offsets=[0, 6])), "F8_E4M3"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_named(tmp_path, kind):
    refused(write(tmp_path / "weights.pt", WRONG[kind][0]), WRONG[kind][1])
    refused(tmp_path / "absent.pt", "RN50, .*shapes-tiny")


@pytest.mark.parametrize("name, value, message", [
    ("ln_final.bias", None, "ln_final.bias"), ("extra", torch.zeros(1), "extra"),
    ("visual.proj", torch.zeros(64, 9), "visual.proj"), ("text_projection", None, "projection"),
    ("visual.proj", torch.full((64, 8), torch.nan), "visual.proj.*finite")])
def test_what_does_not_fit_is_named(model, tmp_path, name, value, message):
    state = {k: v for k, v in (model.state_dict() | {name: value}).items() if v is not None}
    refused(write(tmp_path / "some.pt", saved(state)), message, heads=1)
    lacks = {k: v for k, v in hugging_face(model.state_dict()).items() if ".k_proj.weight" not in k}
    refused(write(tmp_path / "hf.bin", saved(lacks)), "in_proj_weight", heads=1)


@pytest.mark.filterwarnings("ignore")            # PyTorch would like TorchScript to be forgotten
def test_torchscript_archives_need_a_known_hash(model, tmp_path, monkeypatch):
    path = tmp_path / "archive.pt"
    model.register_buffer("vision_heads", torch.tensor(1))
    torch.jit.trace(model, (IMAGE, TOKENS), check_trace=False).save(str(path))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("opened an unknown archive"))
        refused(path, sha256)
    monkeypatch.setitem(MODELS, "test", sha256)
    as_saved(path, make_clip())


def test_heads_are_told_or_stored_or_refused(model, tmp_path):
    path, state = write(tmp_path / "clip.pt", saved(model.state_dict())), model.state_dict()
    refused(path, "64 channels and 2 blocks")
    assert heads(clip.load(path, device="cpu", heads=4)[0]) == (4, 1)
    for wrong in (7, -1):
        refused(path, f"{wrong} .* 64", heads=wrong)
    state |= dict(vision_heads=torch.tensor(2), text_heads=torch.tensor(8))
    assert heads(build_model(state)) == (2, 8) and heads(build_model(state, 4, 16)) == (4, 16)


@pytest.mark.parametrize("width, layers, expected", [
    (768, 12, 12), (1024, 24, 16), (384, 12, 6), (1280, 32, 16), (1408, 40, 16), (1664, 48, 16)])
def test_heads_of_known_sizes(monkeypatch, width, layers, expected):
    with torch.device("meta"):                   # no memory for a billion numbers
        state = CLIP(8, 28, layers, width, 14, 12, 50, 64, 1, 1).state_dict()
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: torch.ones(1))
    assert heads(build_model(state, guess_heads=False)) == (expected, 1)


HF = {"vision_config": {"hidden_act": "gelu", "num_attention_heads": 4, "hidden_size": 64},
      "text_config": {"num_attention_heads": 2}}
OPEN = {"model_cfg": {"quick_gelu": True, "vision_cfg": {"width": 64, "head_width": 8},
                      "text_cfg": {"heads": 4}}}
BESIDE = {"config.json": HF, "open_clip_config.json": OPEN}


@pytest.mark.parametrize("file, configurations, expected", [
    ("mine.safetensors", {"open_clip_config.json": OPEN}, ("quick_gelu", (8, 4))),
    ("any.bin", {"config.json": {"vision_cfg": {"width": 64, "head_width": 16}}}, ("gelu", (4, 1))),
    ("model.safetensors", BESIDE, ("gelu", (4, 2))),
    ("open_clip_model.safetensors", BESIDE, ("quick_gelu", (8, 4)))])
def test_configurations_beside_weights(model, tmp_path, file, configurations, expected):
    content = hugging_face if file == "model.safetensors" else dict
    path = write(tmp_path / file, safetensors(content(model.state_dict())))
    for name, configuration in configurations.items():
        write(tmp_path / name, configuration)
    for source in (path, tmp_path):
        loaded = as_saved(source, model)
        assert (loaded.activation, heads(loaded)) == expected
    said = dict(activation=expected[0], heads=expected[1][0])
    assert heads(clip.load(path, device="cpu", **said)[0]) == expected[1]
    other, = {"gelu", "quick_gelu"} - {expected[0]}
    for name, value in dict(activation=other, heads=2).items():
        refused(path, f"{value}.*config.json.*{said[name]}", **{name: value})


def test_a_configuration_of_another_model(model, tmp_path):
    path = write(tmp_path / "model.bin", saved(model.state_dict()))
    write(tmp_path / "config.json", {"model_type": "clip"})  # says nothing
    assert as_saved(path, model, heads=1).activation == "quick_gelu"
    write(tmp_path / "config.json", {"vision_config": {"hidden_size": 128}})
    refused(path, "64.*config.json.*128", heads=1)
    write(tmp_path / "config.json", b"{")
    refuses("config.json", clip.load, path, device="cpu", heads=1, error=ValueError)


def test_folders_and_shards(model, tmp_path):
    state, index = hugging_face(model.state_dict()), tmp_path / "model.safetensors.index.json"
    for i in (0, 1):
        part = {name: state[name] for name in list(state)[i::2]}
        write(tmp_path / f"model-0000{i + 1}-of-00002.safetensors", safetensors(part))
    refused(tmp_path, "model.safetensors")       # two files, and no index
    refused(tmp_path / "model-00001-of-00002.safetensors", "2 files.*folder")
    shards = [f"model-0000{i % 2 + 1}-of-00002.safetensors" for i in range(len(state))]
    write(index, {"metadata": {}, "weight_map": dict(zip(state, shards))})
    as_saved(str(tmp_path), model, heads=1)
    (tmp_path / shards[1]).unlink()
    refuses(shards[1], clip.load, tmp_path, heads=1, error=FileNotFoundError)
    alone = write(tmp_path / "one/any-00001-of-00001.pt", saved(model.state_dict())).parent
    as_saved(alone, model, heads=1)
    refused(write(tmp_path / "none/README.md", b"x").parent, "README.md")


def test_download(model, tmp_path, monkeypatch):
    state, cache = model.state_dict() | dict(vision_heads=torch.tensor(1)), tmp_path / "cache"
    source, copy = write(tmp_path / "ViT-B-16.pt", saved(state)), cache / "ViT-B-16.pt"
    monkeypatch.setattr(loading, "URL", tmp_path.as_uri() + "/{file}")
    load = lambda: as_saved("ViT-B/16", model, download_root=cache)
    refuses(re.escape(str(copy)), load, error=OSError)       # of another hash
    assert not list(cache.iterdir())
    write(cache / "config.json", HF)                         # of something else
    monkeypatch.setitem(MODELS, "ViT-B/16", hashlib.sha256(source.read_bytes()).hexdigest())
    assert load().activation == "quick_gelu"
    source.unlink()                              # from now on only the downloaded file can serve
    load()
    assert {path.name for path in cache.iterdir()} == {"ViT-B-16.pt", "config.json"}
    monkeypatch.setattr("pathlib.Path.expanduser", raising(RuntimeError("no home")))
    refuses("HOME", clip.load, "ViT-B/16", error=OSError)
    assert clip.load("shapes-tiny", device="cpu")[0].activation == "quick_gelu"


@pytest.mark.parametrize("world", [pretrain.WEB, TARGET])
def test_pictures(world):
    seeds, side = [draw_seed("test", i) for i in range(200)], world["side"]
    drawn = images, labels, classes, *_ = draw_shapes(seeds, **world)
    assert images.shape == (200, 3, side, side) and (labels == 255).any()
    for label, present in zip(labels, classes):
        assert set(label.unique().tolist()) - {255} <= set(present.tolist()) - {-1}
    first, *_, last = classes[:, 0].bincount(minlength=10)   # the web is skewed, the target is not
    assert (first > 2 * last) == (world is not TARGET) and not torch.equal(images[5], images[6])
    assert same(list(draw_shapes(seeds[5:7], **world)), [part[5:7] for part in drawn])


def test_the_shipped_clip():
    model = clip.load("shapes-tiny", device="cpu")[0]
    assert heads(model) == (3, 2) and model.visual.input_resolution == 48
    assert pretrain.zero_shot_accuracy(model, count=400) >= 0.80


def test_pretraining_sees_no_mask_and_gives_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "zero_shot_accuracy", lambda model: 0)
    monkeypatch.setattr(pretrain, "draw_shapes", lambda *a, **k: (
        lambda images, _, *rest: (images, None, *rest))(*draw_shapes(*a, **k)))
    paths = [tmp_path / name for name in ("first.pt.gz", "again.pt.gz")]
    for path in paths:
        pretrain.main(["--pairs", "64", "--epochs", "3", "--batch", "16", "--out", str(path)])
    first, again = map(read_state_dict, paths)
    assert same(first, again) and sorted(tmp_path.iterdir()) == sorted(paths)
