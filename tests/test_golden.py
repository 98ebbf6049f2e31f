"""Values recorded from OpenAI's CLIP and from the ReCLIP authors' program, to be met again."""

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
from conftest import GOLDEN, assert_close, golden, random_clip, refuses, run
from data import VOID


def golden_clip():
    """The CLIP and the dictionary of golden's clip_vit and dense, and their dense features."""
    recorded = golden("dense")
    model = build_model(golden("clip_vit")["state_dict"]).requires_grad_(False)
    return model, recorded, reclip.dense_features(model.visual, recorded["images"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip_vit", "clip_resnet"])
def test_clip(name):
    recorded = golden(name)
    model = build_model(recorded["state_dict"])
    assert_close(model.encode_image(recorded["image"]), recorded["image_features"])
    assert_close(model.encode_text(recorded["tokens"]), recorded["text_features"])
    if name == "clip_vit":
        tokens = clip.tokenize(recorded["texts"])
        assert torch.equal(tokens.long(), recorded["tokens"].long())
        per_image, per_text = model(recorded["image"], tokens)
        assert_close(per_image, recorded["logits_per_image"])
        assert torch.equal(per_text, per_image.t())


def test_tokenizer():
    tokenizer = SimpleTokenizer()
    for case in json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8")):
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]


def test_dense():
    model, recorded, features = golden_clip()
    grid = tuple(recorded["grid"].tolist())
    assert features.shape[2:] == grid
    values = recorded["value_features"].flatten(2).mT
    assert_close(features.flatten(2).mT, values @ model.visual.proj)
    assert_close(F.normalize(features, dim=1), F.normalize(recorded["Z"], dim=1))
    p = reclip.resized_positions(model.visual, *grid)
    assert_close(p.flatten(2).mT, recorded["positional_embedding"])


@pytest.mark.parametrize("surgery, sigma, name", [
    ("value", 5, "maskclip_no_residual"), ("clearclip", 5, "clearclip"), ("sclip", 5, "sclip"),
    ("naclip", 5, "naclip"), ("naclip", 2, "naclip_std2")])
def test_last_blocks_of_public_repositories(surgery, sigma, name):
    recorded = golden("encoders")
    visual = random_clip(image_resolution=48, vision_patch_size=8, vision_width=128).visual
    visual.load_state_dict({key.removeprefix("visual."): value.float()
                            for key, value in recorded["state"].items()})
    for kind, images in recorded["images"].items():
        features = reclip.dense_features(visual, images, surgery, sigma).flatten(2).mT
        assert (features - recorded["features"][kind][name]).abs().max() <= 2e-5, kind


def present(recorded, C):
    """The hypothesis B×C of a recorded step, from its list of classes per image."""
    return torch.tensor([[k in list(labels) for k in range(C)] for labels in recorded["labels"]])


def authors_file(path, weights):
    """What the authors' program saves: all under module., beside CLIP and what follows from it."""
    rest = {"clip.visual.proj": torch.ones(3), "vit.layers.0.weight": torch.ones(2),
            "text_encoder.positional_embedding": torch.ones(2), "logit_scale": torch.ones(()),
            "proj.weight": torch.ones(7, 32, 1, 1), "conv1.weight": torch.ones(1)}
    torch.save({f"module.{key}": value for key, value in (rest | weights).items()}, path)
    return path


def authors_network(path, recorded, method="reclip++", preset="release"):
    """The network of an authors' file, written there, with golden's CLIP and VOC's settings."""
    state = reclip.authors_state(authors_file(path, recorded["weights"]))
    assert evaluate.authors_method(state) == (method, preset)
    s = reclip.argparse.Namespace(**reclip.recipe("voc", preset, method), dataset="voc",
                                  preset=preset, method=method, seed=0)
    return reclip.from_authors(state, golden_clip()[0], recorded["class_names"], recorded["Wq"], s)


@pytest.mark.parametrize("file, method, preset, name, temperature", [
    ("reclippp", "reclip++", "release", "Mo", 0.01), ("reclip", "reclip", "paper", "M", 0.001)])
def test_rectification(tmp_path, file, method, preset, name, temperature):
    recorded, (model, _, features) = golden(file), golden_clip()
    network = authors_network(tmp_path / "model.pth", recorded, method, preset)
    rectifier, (Z, p) = network.rectifier.requires_grad_(True), network.inputs(features)
    weights, parts = set(reclip.renamed(recorded["weights"])), set(rectifier.state_dict())
    assert weights <= parts
    assert parts - weights == {"Wq", "reference.start"}
    # "chest of drawers" has lost its end token, as in the authors' program.
    endings = [tuple(id for id in ids if id) for ids in recorded["suffix_tokens"].tolist()]
    assert list(rectifier.reference.endings) == endings
    # The encoder is the preset's: exact GELU and ImageNet's statistics for ReCLIP's files.
    exact = isinstance(network.visual.transformer.resblocks[0].mlp.gelu, nn.GELU)
    assert exact == (preset == "paper")
    views = torch.arange(3 * 32 * 40).reshape(1, 3, 32, 40).to(torch.uint8)
    own = (data.IMAGENET_MEAN, data.IMAGENET_STD) if exact else (data.CLIP_MEAN, data.CLIP_STD)
    expected = reclip.dense_features(network.visual, data.normalise(views, *own))
    assert_close(network.encode(views), expected, 1e-6)
    with torch.no_grad():
        Wr = rectifier.reference(model)
        assert_close(Wr, recorded["Wr_normalised"])
        assert_close(network.Wr, Wr, 1e-6)
        Mq, logits = rectifier.eval()(Z, p, Wr)
        assert_close(logits, recorded[f"{name}_eval"])
        if method == "reclip++":
            Mb = rectifier.bias(Z, p, Wr)
            assert_close(Mq, recorded["Mq"])
            assert_close(Mb, recorded["Mb"])
            assert_close(Mq - Mb, recorded["M"])
    # One step of training, with Gumbel noise off: logits, loss and gradients.
    expected = recorded[f"{name}_train"]
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
    learned, gradients = dict(rectifier.named_parameters()), reclip.renamed(recorded["grads"])
    assert set(gradients) == set(learned)
    for parameter, gradient in gradients.items():
        # The bias of a convolution before a BatchNorm has rounding errors for a gradient.
        largest = gradient.abs().max()
        tolerance = 1e-3 * largest if largest > 1e-6 else 1e-6
        assert (learned[parameter].grad - gradient).abs().max() <= tolerance, parameter


def test_miou():
    recorded = golden("miou")
    C = len(recorded["iou"])
    labels = [raw.long() - 1 for raw in recorded["labels_raw"]]  # 0 is background, k is class k-1
    labels = [torch.where((label < 0) | (label >= C), VOID, label) for label in labels]
    confusion = sum(evaluate.confusion_matrix(prediction, label, C)
                    for prediction, label in zip(recorded["predictions"], labels))
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
    distill.load_backbone(network.backbone, recorded["backbone"], "golden")
    network.aspp.load_state_dict({k.removeprefix("aspp."): v for k, v in recorded["aspp"].items()})

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


def test_a_file_of_other_classes_or_another_clip(tmp_path):
    recorded, path = golden("reclippp"), tmp_path / "model.pth"
    for names in (recorded["class_names"][:6], data.CLASSES["voc"]):
        other = recorded | dict(class_names=names, Wq=torch.zeros(len(names), 32))
        refuses(f"does not fit {len(names)} classes", authors_network, path, other)
    del recorded["weights"]["pe_proj.bias"]
    refuses("(?s)and this CLIP: .*position.bias", authors_network, path, recorded)


@pytest.mark.parametrize("method, preset, position", [
    ("reclip++", "release", "pe_proj"), ("reclip", "paper", "proj_net")])
def test_the_command_knows_their_files(voc_root, clip_file, tmp_path, monkeypatch, mistake, method,
                                       preset, position):
    """What reclip.py has learned, written in the authors' layout, evaluates to the same."""
    monkeypatch.chdir(tmp_path)
    command = ("--clip", clip_file, "--data-root", voc_root)
    run(reclip.main, *command, "--dataset", "voc", "--method", method, "--preset", preset, "--out",
        "ours", "--workers", 0, "--epochs", 1, "--crop-ratio", 1)
    names, theirs = {value: key for key, value in reclip.AUTHORS_NAMES.items()}, {}
    for key, value in reclip.load_checkpoint(tmp_path / "ours/reclip.pt")["state"].items():
        for ours, name in (names | {"position": position}).items():
            if key.startswith(ours):
                theirs[name + key.removeprefix(ours)] = value[None] if "prompt" in name else value
    authors_file(tmp_path / "released.pth", theirs)
    ours = run(evaluate.main, *command, "--checkpoint", "ours/reclip.pt")
    released = (*command, "--checkpoint", "released.pth")
    same = run(evaluate.main, *released, "--dataset", "voc")
    assert same == ours and (tmp_path / "runs/authors-released/results.json").exists()
    for options, message in (((), "say with --dataset which data set it is of: voc, context"),
                             (("--dataset", "context"), "does not fit 59 classes")):
        assert message in mistake(evaluate.main, *released, *options)
