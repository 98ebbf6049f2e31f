"""Rectification checkpoints of the authors' program, in their layout."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import evaluate
import reclip
from conftest import assert_close, golden, golden_clip, run


def authors_file(path, weights):
    """What the authors' program saves: all under module., beside CLIP and what follows from it."""
    rest = {"clip.visual.proj": torch.ones(3), "vit.layers.0.weight": torch.ones(2),
            "text_encoder.positional_embedding": torch.ones(2), "logit_scale": torch.ones(()),
            "proj.weight": torch.ones(7, 32, 1, 1), "conv1.weight": torch.ones(1)}
    torch.save({f"module.{key}": value for key, value in (rest | weights).items()}, path)
    return path


def settings(method, preset):
    recipe = reclip.recipe("voc", preset, method)
    return reclip.argparse.Namespace(**recipe, dataset="voc", preset=preset, method=method, seed=0)


@pytest.mark.parametrize("name, method, preset, expected", [
    ("reclippp", "reclip++", "release", "Mo_eval"), ("reclip", "reclip", "paper", "M_eval")])
def test_files_give_the_golden_logits(tmp_path, name, method, preset, expected):
    recorded, (model, _, features) = golden(name), golden_clip()
    state = reclip.authors_state(authors_file(tmp_path / "model.pth", recorded["weights"]))
    assert reclip.authors_method(state) == (method, preset)
    network = reclip.from_authors(state, model, recorded["class_names"], recorded["Wq"],
                                  settings(method, preset))
    # "chest of drawers" has lost its end token, as in the authors' program.
    assert torch.equal(network.rectifier.reference.suffix, recorded["suffix_tokens"].long())
    assert_close(network.Wr, recorded["Wr_normalised"])
    p = reclip.resized_positions(network.visual, *features.shape[2:])
    Mq, logits = network.rectifier(F.normalize(features, dim=1), p, network.Wr)
    assert_close(logits, recorded[expected])
    # The encoder is the preset's: exact GELU and ImageNet's statistics for ReCLIP's files.
    exact = isinstance(network.visual.transformer.resblocks[0].mlp.gelu, nn.GELU)
    assert exact == (preset == "paper") == (network.mean == data.IMAGENET_MEAN)


def test_a_file_of_other_classes_or_another_clip(tmp_path):
    recorded, (model, _, _) = golden("reclippp"), golden_clip()
    state = reclip.authors_state(authors_file(tmp_path / "model.pth", recorded["weights"]))
    for names in (recorded["class_names"][:6], data.CLASSES["voc"]):
        with pytest.raises(data.UserError, match=f"does not fit {len(names)} classes"):
            reclip.from_authors(state, model, names, torch.zeros(len(names), 32),
                                settings("reclip++", "release"))
    del state["pe_proj.bias"]
    with pytest.raises(data.UserError, match="and this CLIP: it lacks position.bias"):
        reclip.from_authors(state, model, recorded["class_names"], recorded["Wq"],
                            settings("reclip++", "release"))


THEIRS = {"reference.prompt": "text_encoder.prompt_token", "decoder.conv": "decoder_conv2",
          "decoder.norm": "decoder_norm2"}


@pytest.mark.parametrize("method, preset, position", [
    ("reclip++", "release", "pe_proj"), ("reclip", "paper", "proj_net")])
def test_the_command_knows_their_files(voc_root, clip_file, tmp_path, monkeypatch, mistake, method,
                                       preset, position):
    """What reclip.py has learned, written in the authors' layout, evaluates to the same."""
    monkeypatch.chdir(tmp_path)
    for module in reclip, evaluate:
        monkeypatch.setattr(module, "query_features", functools.partial(
            reclip.query_features, templates=["a {}."]))
    run(reclip.main, "--dataset", "voc", "--data-root", voc_root, "--clip", clip_file, "--method",
        method, "--preset", preset, "--out", "ours", "--workers", 0, "--epochs", 1, "--crop-ratio",
        1)
    theirs = {}
    for key, value in reclip.load_checkpoint(tmp_path / "ours" / "reclip.pt")["state"].items():
        for ours, name in (THEIRS | {"position": position}).items():
            if key.startswith(ours):
                theirs[name + key.removeprefix(ours)] = value[None] if "prompt" in name else value
    authors_file(tmp_path / "released.pth", theirs)
    command = ("--clip", clip_file, "--data-root", voc_root, "--checkpoint")
    ours = run(evaluate.main, *command, "ours/reclip.pt")
    same = run(evaluate.main, *command, "released.pth", "--dataset", "voc")
    assert same == ours and (tmp_path / "runs/authors-released/results.json").exists()
    run(evaluate.main, *command, "released.pth", "--dataset", "voc", "--images",
        voc_root / "VOCdevkit/VOC2012/JPEGImages")
    assert len(list((tmp_path / "runs/authors-released/predictions/masks").iterdir())) == 3
    for options, message in (((), "say with --dataset which data set it is of: voc, context"),
                             (("--dataset", "context"), "does not fit 59 classes")):
        assert message in mistake(evaluate.main, *command, "released.pth", *options)
