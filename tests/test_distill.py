"""distill.py: student against torchvision and teacher, losses, training, and every error."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.testing import assert_close
from torch.utils.data import default_collate

import data
import distill
import reclip
from conftest import golden, interrupt, normal, raising, refuses, results, run, same, save
from data import VOID

# ---- Teachers and students, small --------------------------------------------------------------

@pytest.fixture(scope="module", autouse=True)
def small_recipe():
    """The recipe of VOC at the size of the test's images, and a student of one-block stages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reclip.PAPER, "voc", ((48, 48), 48, 2, 2, 2, 0.01, None))
        patch.setitem(distill.STUDENTS, "small", dict(blocks=(1, 1), width=8, dilations=(1, 2)))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Five training images in VOC's layout, one of them also for validation, with labels."""
    root = tmp_path_factory.mktemp("voc")
    tree, lists = root / "VOCdevkit/VOC2012", root / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    images, labels = data.draw_shapes(list(range(5)), **data.TARGET)[:2]
    for i in range(5):
        height = 96 - 10 * i  # not all of one shape, so that some views need padding
        save(tree / f"JPEGImages/2011_{i}.jpg", images[i, :, :height].permute(1, 2, 0))
        save(tree / f"SegmentationClass/2011_{i}.png", (labels[i, :height].long() + 1) % 256)
    lists.mkdir(parents=True)
    for split, count in (("train", 5), ("val", 1)):
        (lists / f"{split}.txt").write_text("".join(f"2011_{i}\n" for i in range(count)))
    return root


@pytest.fixture(scope="module")
def teachers(root, tmp_path_factory):
    """The checkpoints of two epochs of every method, by its name."""
    out = tmp_path_factory.mktemp("teachers")
    for method in ("reclip++", "reclip", "maskclip"):
        run(reclip.main, "--dataset", "voc", "--data-root", root, "--method", method, "--out",
            out / method, "--workers", 0, "--surgery", "value", "--clip", "shapes-tiny",
            "--crop-ratio", 0.5, "--threshold", 0.1, "--mask-temperature", 0.1, "--scale", 48, 48,
            "--crop", 48, "--epochs", 2, "--batch", 2)
    return {path.name: path / "reclip.pt" for path in out.iterdir()}


@pytest.fixture
def teach(teachers, tmp_path):
    """teach(out, *options, method=…) → the checkpoint of a student of two epochs, six steps."""

    def teach(out, *options, method="reclip++"):
        run(distill.main, "--teacher", teachers[method], "--out", tmp_path / out, "--workers", 0,
            "--student", "small", "--backbone", "none", "--epochs", 2, "--batch", 2, *options)
        return torch.load(tmp_path / out / "distill.pt", weights_only=True)

    return teach


def student_of(teacher, *options):
    """An untrained student, its teacher and four views."""
    teacher = distill.find_teacher(teacher)[0]
    s = distill.settings_of(distill.parse_arguments(
        ["--student", "small", "--backbone", "none", *options]), teacher)
    views = (255 * normal(4, 3, 48, 40).sigmoid()).to(torch.uint8)
    return distill.make_student(s, teacher, "cpu"), teacher, views


# ---- DeepLabV2 and the inherited head ----------------------------------------------------------

def test_plain_backbone_is_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    theirs.avgpool = theirs.fc = torch.nn.Identity()
    ours, images = distill.ResNet(stem="plain").eval(), torch.randn(1, 3, 65, 49)
    distill.load_backbone(ours, theirs.state_dict(), "torchvision")
    assert ours(images).shape == (1, 2048, 9, 7)
    assert_close(ours(images).flatten(1), theirs(images))


@pytest.mark.parametrize("depth, stem", [("resnet50", "deep"), ("resnet101", "deep"),
                                         ("resnet50", "plain")])
def test_published_layouts_load(depth, stem, tmp_path):
    """Random weights with the keys and shapes of a published file, made without distill.py."""
    state = getattr(torchvision.models, depth)(weights=None).state_dict()
    if stem == "deep":  # golden/deeplabv2 has Open-MMLab's keys; there the widths are 1/16
        state = {key: value for key, value in state.items() if key.startswith(("layer", "fc"))}
        for key, value in golden("deeplabv2")["backbone"].items():
            channels = [n if n == 3 else 16 * n for n in value.shape[:2]]
            if key.startswith("stem"):
                state[key] = torch.empty(*channels, *value.shape[2:])
            elif depth == "resnet50":
                assert list(state[key].shape[:2]) == channels
    state = {k: torch.randn(v.shape) if v.is_floating_point() else v for k, v in state.items()}
    wrapped = {"meta": {}, "state_dict": {f"backbone.{k}": v for k, v in state.items()}}
    path = tmp_path / "weights.pth"
    torch.save(wrapped if depth == "resnet50" else state, path)
    read, found = distill.pretrained_backbone(str(path), depth)
    assert found == stem
    network = distill.DeepLabV2(8, stem=found, **distill.STUDENTS[depth])
    distill.load_backbone(network.backbone, read, path)
    loaded = network.backbone.state_dict()
    # All is there, running statistics too; only the counters of batches may be missing.
    assert all(torch.equal(loaded[k], state[k]) for k in loaded if k in state)
    assert all("num_batches" in key for key in set(loaded) - set(state))
    assert set(state) - set(loaded) == {"fc.weight", "fc.bias"}
    if depth == "resnet50" and stem == "deep":
        read = {k: v for k, v in read.items() if "num" not in k}
        refuses("255 missing, first layer3.6.conv1.weight", distill.load_backbone,
                distill.ResNet((3, 4, 23, 3)), read, path)
        refuses("1 left over, first extra", distill.load_backbone, network.backbone,
                read | {"extra": torch.ones(1)}, path)


@pytest.mark.parametrize("method, kind", [("reclip++", "inherit"), ("reclip", "query+bias"),
                                          ("maskclip", "inherit")])
def test_the_head_does_with_the_teachers_features_what_the_teacher_does(teachers, method, kind):
    student, teacher, views = student_of(teachers[method], "--head", kind)
    features = teacher.encode(views)  # on a grid that is not CLIP's own
    logits = student.eval().head(features, (48, 40))
    assert_close(logits, teacher.logits(features)[1], rtol=1e-4, atol=1e-5)


def test_heads_of_the_ablations(teachers):
    for method, kind, names in (("reclip++", "query", "Wq"), ("reclip++", "query+bias", "Wq Wr Wp"),
                                ("reclip", "inherit", "Wq Wr"), ("maskclip", "inherit", "Wq")):
        head = student_of(teachers[method], "--head", kind)[0].head
        assert list(head.state_dict()) == names.split()
    refuses("needs a teacher with a bias", student_of, teachers["maskclip"], "--head", "query+bias")
    student, _, views = student_of(teachers["reclip"])
    Z = F.normalize(student(views)[0], dim=1)
    expected = reclip.classify(Z, student.head.Wq) - reclip.classify(Z, student.head.Wr)
    assert_close(student(views)[1], expected)


# ---- The losses --------------------------------------------------------------------------------

def test_upsampling_by_matrices():
    x, y = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 33, 20)
    up = distill.upsample(x, (33, 20))
    assert_close(up, F.interpolate(x, (33, 20), mode="bilinear"))
    assert_close((up * y).sum(), (x * distill.to_cells(y, (5, 7))).sum())


@pytest.mark.parametrize("grid", [(6, 5), (4, 3)])
def test_feature_loss_is_the_distance_between_upsampled_features(grid):
    Z, Z_hat = torch.randn(2, 7, *grid), torch.randn(2, 7, 6, 5, requires_grad=True)
    valid = torch.rand(2, 41, 33) > 0.3
    up = lambda x: F.interpolate(x, (41, 33), mode="bilinear")
    expected = ((up(Z) - up(Z_hat)).abs().mean(1) * valid).sum() / valid.sum()
    loss = distill.feature_loss(Z, Z_hat, valid)
    assert_close(loss, expected)
    assert_close(*(torch.autograd.grad(x, Z_hat)[0] for x in (loss, expected)))


def test_text_loss_pools_pixels():
    Z_hat, Wq = F.normalize(torch.randn(2, 7, 6, 5), dim=1), torch.randn(4, 7)
    labels = torch.randint(4, (2, 41, 33)).where(torch.rand(2, 41, 33) > 0.2, VOID)
    hypothesis, tau = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]).bool(), 0.1
    up, total = F.interpolate(Z_hat, (41, 33), mode="bilinear"), 0.0
    for k in (0, 2):
        pooled = (up[0] * (labels[0] == k)).mean((1, 2))
        total += F.cross_entropy(Wq @ pooled / tau, torch.tensor(k)) / 2
    masks = distill.label_masks(labels, 4, (6, 5))
    assert_close(distill.text_loss(Z_hat, masks, Wq, hypothesis, tau), total / 2)


def test_losses_of_shares_are_those_of_the_whole():
    Z, Z_hat, logits = torch.randn(3, 4, 7, 6, 5).unbind()
    labels = torch.randint(7, (4, 41, 33)).where(torch.rand(4, 41, 33) > 0.3, VOID)
    labels[3] = VOID  # the share of a process that has no image left
    count = (labels != VOID).sum() / 2  # the mean of two processes

    def losses(part, *count):
        return torch.stack([
            distill.mask_loss(logits[part], labels[part], *count),
            distill.feature_loss(Z[part], Z_hat[part], labels[part] != VOID, *count)])

    shares = losses(slice(0, 1), count) + losses(slice(1, 4), count)
    assert_close(shares / 2, losses(slice(0, 4)))
    assert losses(slice(3, 4)).tolist() == [0, 0]  # without a pixel


@pytest.mark.parametrize("name", distill.LOSSES)
def test_every_loss_reaches_the_backbone_and_nothing_inherited(teachers, name):
    student, teacher, views = student_of(teachers["reclip++"])
    Z, labels = distill.teach(teacher, views, torch.tensor([[48, 40]] * 4))
    Z_hat, logits = student.train()(views)
    losses = distill.distillation_losses(logits, Z_hat, Z, labels, student.head.Wq,
                                         teacher.rectifier.names, losses=[name])
    assert list(losses) == [name]
    losses[name].backward()
    for part in (student.network.backbone, student.network.aspp):
        assert all(p.grad.isfinite().all() for p in part.parameters())
        assert sum(p.grad.abs().sum() for p in part.parameters()) > 0
    assert not any(p.requires_grad or p.grad is not None for p in student.head.parameters())
    assert not any(b.requires_grad for b in student.head.buffers())
    frozen = [*teacher.rectifier.parameters(), *teacher.model.parameters(), teacher.Wr, Z]
    assert not any(p.requires_grad for p in frozen)


def test_padding_and_uncertain_pixels_are_ignored(teachers):
    _, teacher, views = student_of(teachers["reclip++"])
    sizes = torch.tensor([[48, 40], [30, 40], [48, 11], [1, 1]])
    Z, labels = distill.teach(teacher, views, sizes)
    assert Z.shape == (4, 64, 6, 5) and labels.shape == (4, 48, 40)
    for label, (h, w) in zip(labels, sizes.tolist()):
        assert (label[:h, :w] < 20).all() and (label != VOID).sum() == h * w
    some = distill.teach(teacher, views, sizes, ignore_below=0.95)[1]
    assert torch.equal(some[some != VOID], labels[some != VOID])
    assert 0 < (some != VOID).sum() < (labels != VOID).sum()
    # prompt denoising that leaves one class leaves one label
    assert len(distill.teach(teacher, views[:1], sizes[:1], pd=1.0)[1].unique()) == 1


def test_void_follows_the_view(monkeypatch):
    def label(index):
        coins = torch.where(normal(9, 14, seed=index) > 0, VOID, 3)
        return coins.repeat_interleave(6, 0).repeat_interleave(6, 1)

    dataset = data.open_dataset("shapes")
    monkeypatch.setattr(dataset, "label", label)  # images show what labels leave out
    monkeypatch.setattr(dataset, "image", lambda index: (
        (label(index) == VOID).to(torch.uint8).mul(255).expand(3, -1, -1)))
    views = distill.ViewsWithGroundTruthVoid(dataset, (60, 60), 40, (0.5, 2.0), False, 5)
    for epoch in range(8):
        item = views[epoch, epoch % 2]
        assert torch.equal(item["void"], item["view"][0] > 127)
        h, w = item["size"]
        assert 0.2 < item["void"][:h, :w].float().mean() < 0.8


# ---- Training ----------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["reclip++", "reclip", "maskclip"])
def test_training(teachers, teach, method, tmp_path, monkeypatch):
    student, _, views = student_of(teachers[method])
    checkpoint = teach("run", method=method)
    state = checkpoint["state"]
    assert checkpoint["kind"] == "distill" and checkpoint["finished"] and checkpoint["step"] == 6
    inherited = {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
    assert same(inherited, student.head.state_dict())
    learned = state["network.backbone.conv1.weight"]
    assert not torch.equal(learned, student.network.backbone.conv1.weight)
    assert "distilled" in results(tmp_path / "run")
    # A student stands on its own: without CLIP, and without its teacher.
    monkeypatch.setattr(reclip.clip, "load", None)
    alone = distill.load_student(tmp_path / "run" / "distill.pt")
    student.load_state_dict(state)
    logits = alone(views)[1]
    assert logits.shape == (4, 20, 6, 5) and alone.classes == data.CLASSES["voc"]
    assert torch.equal(logits, student.eval()(views)[1])


@pytest.mark.parametrize("options", [(), (
    "--text-masks", "teacher", "--head", "learned", "--losses", "text,mask", "--pd", "0.1",
    "--ignore-below", "0.9"), ("--views", "1")])
def test_interrupted_and_resumed_is_uninterrupted(teach, tmp_path, monkeypatch, options):
    whole = teach("whole", *options)
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        refuses("130", teach, "parts", *options, error=SystemExit)
    assert torch.load(tmp_path / "parts" / "distill.pt", weights_only=True)["step"] == 3
    assert same(whole["state"], teach("parts", *options)["state"])
    assert same(whole["state"], teach("parts", *options)["state"])  # finished: nothing to do
    refuses("^2$", teach, "parts", *options, "--lr", 0.02, error=SystemExit)


def test_no_label_is_opened_but_on_request(root, teach, tmp_path, monkeypatch, capsys):
    expected = teach("labelled")
    dropped = teach("void", "--use-ground-truth-void")
    assert dropped["settings"]["use_ground_truth_void"]
    assert not same(expected["state"], dropped["state"])
    bare = shutil.copytree(root, tmp_path / "bare")
    shutil.rmtree(bare / "VOCdevkit" / "VOC2012" / "SegmentationClass")
    monkeypatch.setattr(data, "read_label", None)  # opening one would fail
    assert same(expected["state"], teach("unlabelled", "--data-root", bare)["state"])
    for options, message in ((("--use-ground-truth-void",), "has no training labels"),
                             (("--data-root", "nowhere"), "nowhere")):
        refuses("^2$", teach, "no", "--data-root", bare, *options, error=SystemExit)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no" / "distill.pt").exists()


def test_views_are_asked_about_once(teachers, teach, tmp_path, monkeypatch, capsys):
    # Asked about two blocks, each of what one epoch has of five images; the second is interrupted.
    answers = [distill.teach, raising(KeyboardInterrupt), distill.teach]
    options = ("--views", 2, "--epochs", 4, "--cache", tmp_path)
    file = tmp_path / "views-distill.npy"
    with monkeypatch.context() as patch:
        patch.setattr(distill, "teach", lambda *arguments: answers.pop(0)(*arguments))
        refuses("130", teach, "a", *options, error=SystemExit)
        assert (np.load(file)["checksum"] != 0).tolist() == [True] * 5 + [False] * 5
        expected = teach("a", *options)
    records = np.load(file)
    assert records.shape == (2 * 5,)
    assert records["view"].shape[1:] == (3, 48, 48) and records["labels"].dtype == np.uint8
    # They are what the teacher says of the views of the first two epochs.
    teacher, s = distill.find_teacher(teachers["reclip++"])[0], expected["settings"]
    views = data.TrainingViews(data.open_dataset("voc", s["data_root"]), (48, 48), 48)
    for k, i in ((0, 3), (1, 0)):
        record, batch = records[5 * k + i], default_collate([views[k, i]])
        view = data.photometric_distortion(batch["view"], batch["colours"])
        Z, labels = distill.teach(teacher, view, batch["size"], s["pd"])
        assert np.array_equal(record["view"], view[0]) and not torch.equal(view, batch["view"])
        assert record["size"].tolist() == batch["size"][0].tolist()
        assert (record["labels"] == labels[0].numpy()).mean() > 0.99
        assert_close(torch.from_numpy(record["Z"]).float(), Z[0], rtol=2e-3, atol=2e-3)
    monkeypatch.setattr(distill, "teach", None)  # another run asks nothing
    assert same(expected["state"], teach("b", *options)["state"])
    refuses("^2$", teach, "c", *options, "--pd", 0.5, error=SystemExit)
    assert "views-distill.json was made with other settings" in capsys.readouterr().err


def test_newest_teacher(teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses("run python reclip.py first", distill.find_teacher, None)
    for n, method in enumerate(("reclip", "reclip++", "maskclip")):  # the last is not rectified
        copy = shutil.copytree(teachers[method].parent, f"runs/{method}")
        os.utime(f"{copy}/reclip.pt", (n, n))
    for named in (None, Path("runs/reclip++")):
        assert distill.find_teacher(named)[1] == Path("runs/reclip++/reclip.pt")


# ---- Mistakes ----------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (None, "no checkpoint"), (dict(finished=False), "is not finished; repeat"),
    (dict(kind="distill"), "is a student")])
def test_wrong_teachers(teachers, tmp_path, change, message):
    path = tmp_path / "reclip.pt"
    if change:
        torch.save(torch.load(teachers["reclip++"], weights_only=True) | change, path)
    refuses(message, distill.find_teacher, path)
    refuses("is not a student's checkpoint", distill.load_student, teachers["reclip++"])


def test_failed_downloads_and_foreign_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url",
                        raising(OSError("no route to host")))
    load, path = distill.pretrained_backbone, tmp_path / "weights.pth"
    refuses("cannot download https://.*resnet101.*--backbone none", load, "imagenet", "resnet101")
    torch.save(torch.ones(3), path)
    refuses("not a state dict: .*takes the weights of a ResNet", load, str(path))
