"""Values recorded from OpenAI's CLIP and from the ReCLIP authors' program, to be met again."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clip
import data
import distill
import evaluate
import reclip
from clip.model import build_model
from clip.simple_tokenizer import SimpleTokenizer
from conftest import GOLDEN, assert_close, golden, golden_clip, run
from data import VOID, shifted_ids
from run import load_checkpoint


@torch.no_grad()
def test_clip_vit():
    recorded = golden("clip_vit")
    model = build_model(recorded["state_dict"])
    tokens = clip.tokenize(recorded["texts"])
    assert torch.equal(tokens.long(), recorded["tokens"].long())
    assert_close(model.encode_image(recorded["image"]), recorded["image_features"])
    assert_close(model.encode_text(tokens), recorded["text_features"])
    per_image, per_text = model(recorded["image"], tokens)
    assert_close(per_image, recorded["logits_per_image"])
    assert torch.equal(per_text, per_image.t())


@torch.no_grad()
def test_clip_resnet():
    recorded = golden("clip_resnet")
    model = build_model(recorded["state_dict"])
    assert_close(model.encode_image(recorded["image"]), recorded["image_features"])
    assert_close(model.encode_text(recorded["tokens"]), recorded["text_features"])


def test_tokenizer():
    recorded = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = SimpleTokenizer()
    for case in recorded:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]


def test_dense():
    model, recorded, features = golden_clip()
    h, w = recorded["grid"].tolist()
    tokens, grid = reclip.tokens_before_last_block(model.visual, recorded["images"])
    assert grid == (h, w)
    values = reclip.last_block(model.visual, tokens, grid, "program")
    assert_close(values.mT.unflatten(2, grid), recorded["value_features"])
    assert_close(F.normalize(features, dim=1), F.normalize(recorded["Z"], dim=1))
    p = reclip.resized_positions(model.visual, h, w)
    assert_close(p.flatten(2).mT, recorded["positional_embedding"])
    whole = reclip.global_feature(model.visual, recorded["images"])
    assert_close(whole, F.normalize(recorded["image_features"], dim=-1))


def recorded_rectifier(recorded, method):
    """A Rectifier with the recorded weights and the authors' three-token suffixes; its inputs."""
    model, _, features = golden_clip()
    weights = reclip.renamed(recorded["weights"])
    rectifier = reclip.Rectifier(model, recorded["class_names"], recorded["Wq"],
                                 *reclip.METHODS[method])
    if method == "reclip":
        hidden = [len(weights[f"position.{i}.weight"]) for i in (0, 3)]
        width, C = model.visual.proj.shape[0], len(recorded["Wq"])
        rectifier.position = reclip.PositionLogits(width, C, hidden)
    rectifier.reference.prompt = torch.nn.Parameter(weights.pop("reference.prompt"))
    rectifier.reference.suffix = recorded["suffix_tokens"].long()
    missing, unexpected = rectifier.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) == {"Wq", "reference.prompt", "reference.suffix", "reference.start"}
    p = reclip.resized_positions(model.visual, *features.shape[2:])
    return model, rectifier, F.normalize(features, dim=1), p


def present(recorded, C):
    """The hypothesis B×C of a recorded step, from its list of classes per image."""
    rows = [[k in labels for k in range(C)] for labels in map(list, recorded["labels"])]
    return torch.tensor(rows)


def check_training_step(model, rectifier, Z, p, recorded, temperature, expected):
    """The recorded step: logits, loss and gradients in training mode, Gumbel noise off."""
    rectifier.train()
    Mq, logits = rectifier(Z, p, rectifier.reference(model))
    assert_close(logits, expected)
    hypothesis = present(recorded, len(rectifier.Wq))
    # At τ1 = 0.001 rounding errors of 1e-6 in the logits change the gradient by 1e-3; so it is
    # taken at the recorded logits, which ours have just matched.
    logits = logits + (expected - logits).detach()
    masks = reclip.gumbel_masks(logits, temperature)
    similarities = reclip.masked_pooling(masks, Mq)
    # Pooling Z and multiplying by Wq afterwards, as the papers put it, is the same.
    assert_close(reclip.masked_pooling(masks, Z) @ rectifier.Wq.T, similarities, 1e-5)
    loss = reclip.contrastive_loss(similarities, hypothesis, 1 / model.logit_scale.exp())
    assert abs(loss.item() / recorded["loss"].item() - 1) < 1e-3
    loss.backward()
    learned = dict(rectifier.named_parameters())
    gradients = reclip.renamed(recorded["grads"])
    assert set(gradients) == set(learned)
    for name, gradient in gradients.items():
        # The bias of a convolution before a BatchNorm has rounding errors for a gradient.
        largest = gradient.abs().max().item()
        tolerance = 1e-3 * largest if largest > 1e-6 else 1e-6
        assert (learned[name].grad - gradient).abs().max().item() <= tolerance, name


@pytest.mark.parametrize("method, name, temperature, expected", [
    ("reclip++", "reclippp", 0.01, "Mo"), ("reclip", "reclip", 0.001, "M")])
def test_rectification(method, name, temperature, expected):
    recorded = golden(name)
    model, rectifier, Z, p = recorded_rectifier(recorded, method)
    with torch.no_grad():
        Wr = rectifier.reference(model)
        assert_close(Wr, recorded["Wr_normalised"])
        Mq, logits = rectifier.eval()(Z, p, Wr)
        assert_close(logits, recorded[f"{expected}_eval"])
        if method == "reclip++":
            reference = rectifier.reference
            prefix = torch.cat([reference.start, reference.prompt])
            assert_close(reclip.encode_shared_prefix(model, prefix, reference.suffix),
                         recorded["Wr"])
            Mb = rectifier.bias(Z, p, Wr)
            assert_close(Mq, recorded["Mq"])
            assert_close(Mb, recorded["Mb"])
            assert_close(Mq - Mb, recorded["M"])
    check_training_step(model, rectifier, Z, p, recorded, temperature,
                        recorded[f"{expected}_train"])


def test_miou():
    recorded = golden("miou")
    C = len(recorded["iou"])
    table = shifted_ids(C)  # raw label 0 is background, k is class k-1
    confusion = sum(evaluate.confusion_matrix(prediction, table[raw.long()], C)
                    for prediction, raw in zip(recorded["predictions"], recorded["labels_raw"]))
    result = evaluate.scores(confusion, count_absent=True)  # the authors' way
    iou = [value or 0.0 for value in result["iou"]]
    assert iou == pytest.approx((100 * recorded["iou"]).nan_to_num().tolist(), abs=1e-6)
    assert result["miou"] == pytest.approx(100 * recorded["miou"], abs=1e-6)
    # The authors' pixel accuracy is ours: right pixels over those whose label counts.
    assert result["pixel_accuracy"] == pytest.approx(100 * recorded["pixel_acc"], abs=1e-6)


@torch.no_grad()
def test_deeplabv2():
    recorded = golden("deeplabv2")
    network = distill.DeepLabV2(16, width=4).eval()
    backbone = {key: value.float() for key, value in recorded["backbone"].items()}
    distill.load_backbone(network.backbone, backbone, "golden")
    aspp = {key.removeprefix("aspp."): value.float() for key, value in recorded["aspp"].items()}
    network.aspp.load_state_dict(aspp)

    def close(actual, expected):
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()

    x, means = recorded["image"], []
    for name, part in network.backbone.named_children():
        x = part(x)
        means += [x.mean()] if name.startswith("layer") else []
    for mean, expected in zip(means, recorded["stage_means"], strict=True):
        close(mean, torch.tensor(expected))
    close(x, recorded["layer4"])
    close(network(recorded["image"]), recorded["features"])


def test_distillation_losses():
    recorded = golden("distill")
    labels, Z_hat = recorded["pseudo_labels"], recorded["student_features"]
    valid = labels != VOID
    # The authors divide the mask loss by all pixels, and use the logit scale without exp.
    mask = distill.mask_loss(recorded["student_logits"], labels) * valid.float().mean()
    feature = distill.feature_loss(recorded["teacher_features"], Z_hat, valid)
    masks = distill.label_masks(labels, len(recorded["Wq"]), Z_hat.shape[2:])
    hypothesis = present(recorded, len(recorded["Wq"]))
    text = distill.text_loss(Z_hat, masks, recorded["Wq"], hypothesis, 1 / recorded["scale"])
    assert_close(mask, recorded["mask_loss"], 1e-5)
    assert_close(feature, recorded["feature_loss"], 1e-5)
    assert_close(text, recorded["text_loss"], 1e-5)
    assert_close(mask + 0.5 * feature + 0.5 * text, recorded["total"], 1e-5)


# ---- The authors' checkpoints -------------------------------------------------------------------


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
    assert exact == (preset == "paper")
    views = torch.arange(3 * 32 * 40).reshape(1, 3, 32, 40).to(torch.uint8)
    own = ((data.IMAGENET_MEAN, data.IMAGENET_STD) if exact else (data.CLIP_MEAN, data.CLIP_STD))
    expected = reclip.dense_features(network.visual, data.normalise(views, *own))
    assert torch.equal(network.encode(views), expected)


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
    for key, value in load_checkpoint(tmp_path / "ours" / "reclip.pt")["state"].items():
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
