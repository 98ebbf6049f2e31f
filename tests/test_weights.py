"""Weights as users bring them: every kind of file, layouts of other programs, attention heads."""

import argparse
import gzip
import io
import json
import re
import struct
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clip
from clip.clip import read_state_dict, read_weights
from clip.model import ACTIVATIONS, CLIP, HEAD_CHANNELS, build_model, known_heads
from conftest import normal, random_clip, refuses, same

KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
         "U8": torch.uint8, "BOOL": torch.bool}
OLD = dict(_use_new_zipfile_serialization=False)
refused = partial(refuses, error=ValueError)


def saved(content, write=torch.save, **options):
    """What a function like torch.save writes, as bytes."""
    buffer = io.BytesIO()
    write(content, buffer, **options)
    return buffer.getvalue()


def safetensors(tensors, **changes):
    """A safetensors file as bytes; changes: {name: entry} put into its header instead."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        kind = next(kind for kind, dtype in KINDS.items() if dtype == tensor.dtype)
        header[name] = {"dtype": kind, "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    text = json.dumps(header | changes).encode()
    return struct.pack("<Q", len(text)) + text + body


EXPECTED = "expected a file made by torch.save, a safetensors file or an archive of OpenAI's"
UNREADABLE = "not a readable file of PyTorch weights: "
DAMAGED = f"{UNREADABLE}damaged or cut short; copy or download it again"
OBJECTS = (UNREADABLE + "beside or instead of tensors it holds Python objects ({}), which are not "
           "made, since that can run code; where it comes from, save model.state_dict() alone")
HTML = ("a page of HTML or XML, most likely a site's message instead of the file; open the address "
        "in a browser, log in if it asks for that, and download the file again")
HEADER = ("a safetensors file whose header does not fit it ({}); copy or download it again, or "
          "save it anew")
TENSOR = {"a": torch.arange(6.0).view(2, 3)}


def lying(name="a", shape=[2, 3], offsets=[0, 24], dtype="F32"):
    return safetensors(TENSOR, **{name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


BAD = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 350\n",
            "a Git-LFS pointer, not the weights it stands for; run `git lfs pull` where it comes "
            "from, or download the file itself"),
    "html": (b"\n <!DOCTYPE html><html>Sign in\x1b[31m</html>", HTML),
    "xml": (b"\xef\xbb\xbf<?xml version='1.0'?><Error>AccessDenied</Error>", HTML),
    "json": (b'{"weight_map": {}}',
             "a text file of JSON; give the file of weights that lies beside it"),
    "text": (b"Not \x1b[1mFound", f"a text file that begins with 'Not \\x1b[1mFound'; {EXPECTED}"),
    "empty": (b"", f"an empty file; {EXPECTED}"),
    "binary": (b"\0\1\2\3abc", f"of no known kind (its first bytes: 00 01 02 03); {EXPECTED}"),
    "zip": (saved({"a": 1, "b": 2}, lambda arrays, file: np.savez(file, **arrays)),
            "a zip archive of 2 files, none of them weights in PyTorch's form; unpack it and give "
            "the file of weights in it"),
    "half-zip": (saved(TENSOR)[:300], DAMAGED),
    "half-pickle": (saved(TENSOR, **OLD)[:60], DAMAGED),
    "half-gzip": (gzip.compress(saved(TENSOR))[:200], "damaged gzip file (Compressed file ended "
                  "before the end-of-stream marker was reached); copy it again"),
    "numpy-scalar": (saved({"state_dict": TENSOR, "best": np.float64(0.5)}),
                     OBJECTS.format(f"{np.float64(1).__reduce__()[0].__module__}.scalar")),
    "namespace": (saved({"state_dict": TENSOR, "args": argparse.Namespace(lr=1)}),
                  OBJECTS.format("argparse.Namespace")),
    "whole-model": (saved(nn.Linear(2, 2)), OBJECTS.format("torch.nn.modules.linear.Linear")),
    "old-model": (saved(nn.Linear(2, 2), **OLD), OBJECTS.format("torch.nn.modules.linear.Linear")),
    "list": (saved([]), "not a state dict: expected a dictionary of names and tensors, found list"),
    **{name: (content, HEADER.format(line)) for name, content, line in (
        ("long-header", struct.pack("<Q", 10 ** 9) + b"{}",
         "a header of 1000000000 bytes, where 2 are left"),
        ("no-json", struct.pack("<Q", 3) + b"{]}",
         "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("far", lying(shape=[8], offsets=[0, 32]), "'a' at bytes 0 to 32, where 0 to 24 are left"),
        ("gap", lying(shape=[4], offsets=[8, 24]), "'a' at bytes 8 to 24, where 0 to 24 are left"),
        ("negative", lying(offsets=[0, -4]), "'a' at bytes 0 to -4, where 0 to 24 are left"),
        ("overlap", lying("b"), "'b' at bytes 0 to 24, where 24 to 24 are left"),
        ("unused", lying(shape=[4], offsets=[0, 16]), "8 bytes of no tensor"),
        ("wrong-size", lying(shape=[7]), "shape '[7]' is invalid for input of size 6"),
        ("minus-one", lying(shape=[-1, 2]), "'a' of shape [-1, 2]"),
        ("dtype", lying(dtype="F8_E4M3"), f"'a' is of type 'F8_E4M3', not {', '.join(KINDS)}"),
        ("cut", safetensors(TENSOR)[:-4], "'a' at bytes 0 to 24, where 0 to 20 are left"))},
}


@pytest.mark.parametrize("content, line", BAD.values(), ids=BAD)
def test_what_a_file_is_instead(tmp_path, content, line):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    for read in (read_weights, read_state_dict, clip.load):
        said = refused(f"^{re.escape(f'{path}: {line}')}$", read, path)
        assert "weights_only" not in said and said.isprintable()


@pytest.mark.parametrize("header", [
    b'{"a": 1}', b'{"a": []}', b'{"a": {}}', b'{"a": {"dtype": "F32", "shape": 1}}',
    b'{"a": {"dtype": ["F32"], "shape": [0], "data_offsets": [0, 0]}}',
    b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [0, 1e3], "data_offsets": [0, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [0, 9223372036854775808], "data_offsets": [0, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, null]}}',
    b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [NaN, NaN]}}',
    b'{"a":' * 50_000, b"{" + b"\xff" * 8, b'{"a": ' + b"1" * 5000 + b"}",
])
def test_safetensors_headers_that_make_no_sense(tmp_path, header):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert refused("whose header does not fit it", read_weights, path).isprintable()


def test_a_folder_or_nothing_is_an_os_error(tmp_path):
    refuses("Is a directory", read_weights, tmp_path, error=IsADirectoryError)
    refuses("No such file", read_state_dict, tmp_path / "absent.pt", error=FileNotFoundError)


def test_safetensors_of_every_type(tmp_path):
    tensors = {kind: (10 * normal(3, 5)).to(dtype) for kind, dtype in KINDS.items()}
    tensors |= {"scalar": torch.tensor(4.6), "odd": torch.ones(3, dtype=torch.uint8),
                "after": normal(2), "none": torch.empty(0, 7)}
    for content in (safetensors(tensors), gzip.compress(safetensors(tensors))):
        (tmp_path / "a").write_bytes(content)
        read = read_weights(tmp_path / "a")
        assert read.keys() == tensors.keys()
        assert same(read, tensors)


@pytest.mark.parametrize("length", [0x80, 0x180, 0x500, 0x8b1f])
def test_safetensors_whose_length_begins_like_another_file(tmp_path, length):
    content = safetensors(TENSOR)
    text = content[8:-24].ljust(length)              # the format pads headers with blanks
    (tmp_path / "a").write_bytes(struct.pack("<Q", length) + text + content[-24:])
    assert torch.equal(read_weights(tmp_path / "a")["a"], TENSOR["a"])


def renamed(state, *changes):
    """The same weights; changes: patterns, and what replaces them in the names."""
    for pattern, other in changes:
        state = {re.sub(pattern, other, name): value for name, value in state.items()}
    return state


def hugging_face(state):
    """The same weights as Hugging Face's CLIPModel names and lays them out."""
    names = (("^positional_embedding", "text_model.embeddings.position_embedding.weight"),
             ("^text_projection", "text_projection.weight"),
             ("^transformer.resblocks", "text_model.encoder.layers"),
             ("visual.transformer.resblocks", "vision_model.encoder.layers"),
             ("visual.conv1", "vision_model.embeddings.patch_embedding"),
             ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
             ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
             ("visual.ln_pre", "vision_model.pre_layrnorm"),
             ("visual.ln_post", "vision_model.post_layernorm"),
             ("visual.proj", "visual_projection.weight"),
             ("token_embedding", "text_model.embeddings.token_embedding"),
             ("ln_final", "text_model.final_layer_norm"), ("attn[.]", "self_attn."),
             ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("c_fc", "fc1"), ("c_proj", "fc2"))
    theirs = {f"{part}_model.embeddings.position_ids": torch.arange(5)[None]
              for part in ("text", "vision")}
    for name, value in renamed(state, *names).items():
        if name.endswith("projection.weight"):
            theirs[name] = value.T
        elif "in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3)):
                theirs[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            theirs[name] = value
    return theirs


LAYOUTS = {  # what programs make of a state dict
    "openai": lambda state: state,
    "half": lambda state: {name: value.half() for name, value in state.items()},
    "DataParallel": lambda state: {"model": renamed(state, ("^", "module."))},
    "compiled": lambda state: renamed(state, ("^", "_orig_mod.")),
    "part-compiled": lambda state: renamed(state, ("visual.", "visual._orig_mod.")),
    "Lightning": lambda state: {"epoch": 3, "state_dict": renamed(state, ("^", "model."))},
    "open_clip, text apart": lambda state: renamed(state, ("^(?!visual|logit)", "text.")),
    "Hugging Face": hugging_face,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    state = random_clip(transformer_width=128, transformer_heads=2).state_dict()
    state = {name: value.half().float() for name, value in state.items()}
    content, path = LAYOUTS[layout](state), tmp_path / "weights"
    flat = next((value for value in content.values() if isinstance(value, dict)), content)
    for written in (saved(content), saved(content, **OLD), safetensors(flat)):
        path.write_bytes(written)
        loaded = clip.load(path, device="cpu", heads=1)[0].state_dict()
        assert loaded.keys() == state.keys()
        assert same(loaded, state)
        assert all(value.is_contiguous() for value in loaded.values())


def test_names_that_are_there_twice(tmp_path):
    torch.save({"a": torch.zeros(1), "module.a": torch.ones(1)}, tmp_path / "a.pt")
    refused("a.pt: not the state dict of one model: names are there twice, with and without a "
            "prefix$", read_state_dict, tmp_path / "a.pt")


@pytest.mark.parametrize("change, message", [
    (lambda key, value: None if ".k_proj.weight" in key else value, r"in_proj_weight, "),
    (lambda key, value: value[:3] if ".k_proj.weight" in key else value, r"in_proj_weight, "),
    (lambda key, value: torch.tensor(1.0) if "_projection" in key else value, "cannot read"),
])
def test_hugging_face_files_that_do_not_fit(tmp_path, change, message):
    theirs = {key: change(key, v) for key, v in hugging_face(random_clip().state_dict()).items()}
    torch.save({key: v for key, v in theirs.items() if v is not None}, tmp_path / "hf.bin")
    refused(f"hf.bin: not a CLIP state dict: .*{message}", clip.load, tmp_path / "hf.bin", heads=1)


def test_backbones_in_safetensors(tmp_path):
    state = {"conv1.weight": torch.randn(4, 3, 3, 3), "bn1.num_batches_tracked": torch.tensor(7)}
    (tmp_path / "resnet.safetensors").write_bytes(safetensors(state))
    assert same(read_state_dict(tmp_path / "resnet.safetensors"), state)


def plain_features(state, images, heads):
    """A ViT's image features from its state dict alone, by PyTorch's own transformer blocks."""
    state = {name[7:]: value for name, value in state.items() if name.startswith("visual.")}
    width = len(state["class_embedding"])
    norm = lambda x, name: F.layer_norm(x, [width], state[f"{name}.weight"], state[f"{name}.bias"])
    x = F.conv2d(images, state["conv1.weight"], stride=16).flatten(2).mT
    x = torch.cat([state["class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(x + state["positional_embedding"], "ln_pre")
    theirs = renamed(state, ("attn.", "self_attn."), ("ln_", "norm"), ("mlp.c_fc", "linear1"),
                     ("mlp.c_proj", "linear2"))
    for i in range(2):
        prefix = f"transformer.resblocks.{i}."
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0, ACTIVATIONS["quick_gelu"](),
                                           batch_first=True, norm_first=True)
        block.load_state_dict({name: theirs[prefix + name] for name in block.state_dict()})
        x = block(x)
    return norm(x[:, 0], "ln_post") @ state["proj"]


@torch.no_grad()
@pytest.mark.parametrize("width, heads", [(64, 4), (96, 3), (160, 2)])
def test_heads_are_told_or_refused(tmp_path, width, heads):
    state = random_clip(vision_width=width, vision_heads=heads).state_dict()
    images = normal(2, 3, 64, 64)
    expected, path = plain_features(state, images, heads), tmp_path / "clip.pt"
    torch.save(state, path)
    refused(f"clip.pt: an image encoder of {width} channels and 2 blocks is none of OpenAI's or "
            "open_clip's, and no shape tells its attention heads: give their number with --heads "
            r"\(heads=N in clip.load\)", clip.load, path)
    told = clip.load(path, device="cpu", heads=heads)[0]
    torch.testing.assert_close(told.encode_image(images), expected, atol=2e-5, rtol=1e-5)
    torch.save(state | {"vision_heads": torch.tensor(heads)}, path)
    stored = clip.load(path, device="cpu")[0]
    assert torch.equal(stored.encode_image(images), told.encode_image(images))
    assert not torch.allclose(build_model(state, vision_heads=1).encode_image(images), expected,
                              atol=1e-3)
    for wrong in (7, -1):
        refused(f"{wrong} attention heads do not divide a width", clip.load, path, heads=wrong)


def test_heads_of_known_models():
    known = {(768, 12): 12, (1024, 24): 16, (384, 12): 6, (512, 12): 8, (896, 12): 14,
             (1280, 32): 16, (1408, 40): 16, (1664, 48): 16, (1792, 56): 16}
    assert {sizes: known_heads(*sizes) for sizes in known} == known
    assert HEAD_CHANNELS.keys() < known.keys()
    assert known_heads(64, [3, 4, 6, 3]) == 32 and known_heads(80, [4, 6, 10, 6]) == 40
    for sizes in ((1280, 24), (1152, 27), (64, 12), (128, 2)):
        assert known_heads(*sizes) is None


def test_known_models_get_their_heads(monkeypatch, tmp_path):
    path = tmp_path / "small.pt"                     # as deep and as wide as open_clip's ViT-S
    torch.save(random_clip(vision_width=384, vision_layers=12).state_dict(), path)
    assert clip.load(path, device="cpu")[0].visual.transformer.resblocks[11].attn.num_heads == 6
    with torch.device("meta"):                       # ViT-g-14: no memory for a billion numbers
        state = CLIP(1024, 224, 40, 1408, 14, 77, 49408, 1024, 16, 24).state_dict()
    monkeypatch.setattr("clip.model.clean_state_dict", dict)
    monkeypatch.setattr("clip.model.check_state_dict", lambda state, expected: None)
    built = build_model(state, guess_heads=False)
    assert built.visual.transformer.resblocks[39].attn.num_heads == 16
    assert built.transformer.resblocks[23].attn.num_heads == 16
