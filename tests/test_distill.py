"""distill.py: student against torchvision and teacher, losses against plain ones, and training."""

import copy
import functools
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.testing import assert_close

import data
import distill
import evaluate
import reclip
from conftest import SmallShapes, golden, json_lines, normal, raising, refuses, run, same
from data import VOID

@pytest.fixture(scope="module")
def teachers(trained_demo, tmp_path_factory):
    """Checkpoints of every method on the small demo, by its name."""
    found = {"reclip++": trained_demo / "reclip.pt"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "Shapes", SmallShapes)
        for method in ("reclip", "maskclip"):
            found[method] = tmp_path_factory.mktemp(method) / "reclip.pt"
            run(reclip.main, "--method", method, "--out", found[method].parent, "--epochs", 1)
    return found


@pytest.fixture
def teach(teachers, small_demo, tmp_path):
    """teach(out, *options, method=…) → the state of a student of two epochs, four steps."""
    def teach(out, *options, method="reclip++"):
        run(distill.main, "--teacher", teachers[method], "--out", tmp_path / out, "--epochs", 2,
            *options)
        return reclip.load_checkpoint(tmp_path / out / "distill.pt")["state"]

    return teach


def student_of(teacher, *options):
    """An untrained student, its teacher and four views, which end within a patch."""
    teacher = distill.find_teacher(teacher)[0]
    s = distill.settings_of(distill.parse_arguments(options), teacher)
    views = (255 * normal(4, 3, 68, 60).sigmoid()).to(torch.uint8)
    return distill.make_student(s, teacher, "cpu"), teacher, views


HEADS = [("reclip++", "inherit"), ("reclip", "query+bias"), ("maskclip", "inherit")]


@torch.no_grad()
def test_backbones_of_torchvision_and_open_mmlab(tmp_path):
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    wrapped = {f"backbone.{k}": v for k, v in golden("deeplabv2")["backbone"].items()}  # width 4
    for name, state in (("plain", theirs.state_dict()), ("deep", {"state_dict": wrapped})):
        torch.save(state, tmp_path / name)
        state, stem = distill.pretrained_backbone(str(tmp_path / name))
        network = distill.ResNet(stem=stem, width=dict(plain=64, deep=4)[name]).eval()
        distill.load_backbone(network, state, name)
        # All is there, running statistics too; only the counters of batches may be missing.
        loaded = network.state_dict()
        assert stem == name and set(state) <= set(loaded)
        assert all(torch.equal(loaded[k], state[k]) for k in loaded if "num_batches" not in k)
        other = distill.ResNet((3, 4, 5, 3), stem)
        message = refuses(f"{name}.*--student", distill.load_backbone, other, state, name)
        assert "\n" not in message and len(message) < 400
        if name == "plain":
            images, theirs.avgpool, theirs.fc = normal(1, 3, 65, 49), *2 * [torch.nn.Identity()]
            assert_close(network(images).flatten(1), theirs(images))


@torch.no_grad()
@pytest.mark.parametrize("method, head", HEADS[:2] + [("maskclip", "learned")])
def test_a_student_is_exported_for_any_size(teachers, method, head):
    student, _, views = student_of(teachers[method], "--head", head)
    student.eval()
    free = dict(images=dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO))
    exported = torch.export.export(student, (views,), dynamic_shapes=free).module()
    for images in (views, views[:2, :, :41, :50], views.repeat(2, 1, 2, 1)):
        for way in (copy.deepcopy(student), pickle.loads(pickle.dumps(student)), exported):
            assert_close(way(images), student(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method, head", HEADS)
def test_the_head_does_with_the_teachers_features_what_the_teacher_does(teachers, method, head):
    # The teacher projects p after resizing it, the head resizes what was projected.
    student, teacher, views = student_of(teachers[method], "--head", head)
    views = F.pad(views, (0, 4, 0, 4))  # whole patches, so that both grids cover the same
    features = teacher.encode(views)  # on a grid that is not CLIP's own
    expected = teacher.rectifier(*teacher.inputs(features), teacher.Wr)[1]
    assert_close(student.eval().head(features, (72, 64)), expected, rtol=1e-4, atol=1e-5)


def test_what_covers_patches_is_read_at_the_cells_centres():
    x = 16 * torch.arange(5) + 8.0  # of each patch the place of its centre, in pixels
    ramp = distill.resample(x[:, None] + 1000 * x, 16, (70, 65), (9, 5))
    rows, columns = (((torch.arange(n) + 0.5) * side / n).clamp(8, 72)
                     for n, side in ((9, 70), (5, 65)))
    assert_close(ramp, rows[:, None] + 1000 * columns)


def test_heads_of_the_ablations(teachers):
    for method, head, names in (("reclip++", "query", "Wq"), ("reclip++", "query+bias", "Wq Wr Wp"),
                                ("reclip", "inherit", "Wq Wr"), ("maskclip", "inherit", "Wq")):
        student = student_of(teachers[method], "--head", head)[0]
        assert list(student.head.state_dict()) == names.split()
    refuses("needs a teacher with a bias", student_of, teachers["maskclip"], "--head", "query+bias")
    student, teacher, views = student_of(teachers["reclip"])
    Z = F.normalize(student(views)[0], dim=1)
    for student.head.sign in (-1, 1):
        W = teacher.rectifier.Wq + student.head.sign * teacher.Wr
        assert_close(student(views)[1], torch.einsum("bdhw,cd->bchw", Z, W))


upsampled = functools.partial(F.interpolate, size=(41, 33), mode="bilinear")


def labels_with_void(C):
    labels = torch.randint(C, (2, 41, 33), generator=torch.Generator().manual_seed(0))
    return labels.where(normal(2, 41, 33) > -0.6, VOID)


@pytest.mark.parametrize("D, grid", [(7, (6, 5)), (7, (4, 3)), (401, (4, 3))])
def test_feature_loss_is_the_distance_between_upsampled_features(D, grid):
    Z, Z_hat = normal(2, D, *grid), normal(2, D, 6, 5, seed=1).requires_grad_()
    valid = normal(2, 41, 33) > -0.5
    expected = ((upsampled(Z) - upsampled(Z_hat)).abs().mean(1) * valid).sum() / valid.sum()
    loss = distill.feature_loss(Z, Z_hat, valid)
    assert_close(loss, expected)
    assert_close(*(torch.autograd.grad(x, Z_hat)[0] for x in (loss, expected)))
    assert distill.feature_loss(Z, Z_hat, valid & False) == 0
    assert distill.mask_loss(Z, torch.full(valid.shape, VOID)) == 0


def test_text_masks_are_the_students_where_there_are_labels():
    logits, Z_hat, Wq, noise = *normal(2, 1, 7, 6, 5), normal(7, 7), normal(1, 7, 6, 5, seed=1)
    labels = torch.tensor([VOID, VOID, 0, 0, 0, 0])[None, :, None].repeat(1, 1, 5)

    def text(labels, noise, classes):
        present = None if classes is None else torch.arange(7)[None] < classes
        return distill.distillation_losses(logits, Z_hat, None, labels, Wq, [1] * 7, present,
                                           noise, ["text"], 0.1)["text"]

    own = (logits / 0.01 + noise).argmax(1).where(labels != VOID, VOID)
    assert_close(text(labels, noise, 3), text(own, None, 3))
    assert_close(text(labels, noise, None), text(labels, noise, 1))  # the labels hold class 0 alone
    assert not torch.isclose(text(labels, noise, 3), text(labels, None, 3))


@pytest.mark.parametrize("name", distill.LOSSES)
def test_every_loss_reaches_the_backbone_and_nothing_inherited(teachers, name):
    student, teacher, views = student_of(teachers["reclip++"])
    Z, labels = distill.teach(teacher, views, torch.tensor([[68, 60]] * 4))
    Z_hat, logits = student.train()(views)
    assert not student.head.training and student.network.training
    losses = distill.distillation_losses(logits, Z_hat, Z, labels, student.head.Wq,
                                         teacher.rectifier.names, losses=[name])
    losses[name].backward()
    for part in (student.network.backbone, student.network.aspp):
        assert 0 < sum(p.grad.abs().sum() for p in part.parameters()) < torch.inf
    frozen = [*student.head.parameters(), *student.head.buffers(), *teacher.model.parameters(),
              *teacher.rectifier.parameters(), teacher.Wr, Z]
    assert not any(tensor.requires_grad for tensor in frozen)


def test_means_over_processes_are_those_over_all_pixels(monkeypatch):
    Z, Z_hat, logits, labels = *normal(3, 2, 7, 6, 5).unbind(), labels_with_void(7)
    labels[1, 9:] = VOID

    def losses(*part):
        found = distill.distillation_losses(*part, None, [1], losses=["mask", "feature"])
        return torch.stack([*found.values()])

    whole, count = losses(logits, Z_hat, Z, labels), (labels != VOID).sum()
    monkeypatch.setattr(distill, "world", lambda: 2)
    monkeypatch.setattr(distill.dist, "all_reduce", lambda pixels: pixels.copy_(count))
    parts = zip(*(x.split(1) for x in (logits, Z_hat, Z, labels)))
    assert_close(sum(losses(*part) for part in parts) / 2, whole)


def test_padding_is_ignored(teachers):
    _, teacher, views = student_of(teachers["reclip++"])
    sizes = torch.tensor([[68, 60], [30, 40], [48, 11], [1, 1]])
    labels = distill.teach(teacher, views, sizes)[1]
    for label, (h, w) in zip(labels, sizes.tolist()):
        assert (label[:h, :w] < 10).all() and (label != VOID).sum() == h * w
    assert len(distill.teach(teacher, views[:1], sizes[:1], pd=1.0)[1].unique()) == 1


def test_void_follows_the_view(monkeypatch):
    coins = normal(9, 14).repeat_interleave(6, 0).repeat_interleave(6, 1) > 0
    dataset = data.open_dataset("shapes")  # its images show what its labels leave out
    monkeypatch.setattr(dataset, "label", lambda index: torch.where(coins, VOID, 3))
    monkeypatch.setattr(dataset, "image", lambda index: 255 * coins.byte().expand(3, -1, -1))
    views = distill.ViewsWithGroundTruthVoid(dataset, (60, 60), 40, (0.5, 2.0), False, 5)
    batch = views.batch([(epoch, epoch % 2) for epoch in range(8)])
    assert torch.equal(batch["void"], batch["view"][:, 0] > 127)
    for void, (h, w) in zip(batch["void"], batch["size"].tolist()):
        assert 0.2 < void[:h, :w].float().mean() < 0.8


@pytest.mark.parametrize("method", ["reclip++", "reclip", "maskclip"])
def test_training(teachers, teach, method, tmp_path, monkeypatch):
    student, _, views = student_of(teachers[method])
    state, before = teach("run", method=method), student.state_dict()
    assert all(same(state[key], before[key]) == key.startswith("head.") for key in state)
    row = json_lines(tmp_path / "run" / "log-distill.jsonl")[-1]
    weights = dict(mask=1, feature=0.5, text=0.5) if method != "maskclip" else dict(mask=1)
    assert set(row) == {"step", "lr", "loss", *weights}
    assert row["loss"] == pytest.approx(sum(weights[k] * row[k] for k in weights), abs=1e-5)
    assert row["lr"] == pytest.approx(3e-3 * 0.5**0.9)
    # A student stands on its own: without CLIP, and without its teacher.
    monkeypatch.setattr(reclip.clip, "load", None)
    alone = distill.load_student(tmp_path / "run" / "distill.pt")
    student.load_state_dict(state)
    assert alone.classes == [*data.SHAPES]
    assert torch.equal(alone(views)[1], student.eval()(views)[1])


def test_every_option_is_heeded(teach, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "main", lambda argv: None)
    seen = [teach("usual")]
    with monkeypatch.context() as patch:
        patch.setattr(distill, "gumbel_noise", None)  # which the teacher's masks do without
        seen.append(teach("masks", "--text-masks", "teacher"))
        patch.setattr(distill, "make_hypotheses", None)  # as does a MaskCLIP teacher
        teach("maskclip", "--text-masks", "teacher", "--losses", "text", method="maskclip")
    for n, options in enumerate((
            ("--losses", "feature, mask"), ("--pd", 0.5), ("--head", "query"), ("--seed", 5),
            ("--use-ground-truth-void",), ("--views", 1), ("--views", 0), ("--lr", 1e-5))):
        state = teach(str(n), *options)
        assert not any(same(state, other) for other in seen), options
        seen.append(state)
    assert json_lines(tmp_path / str(n) / "log-distill.jsonl")[-1]["lr"] == 1e-4  # the floor


def test_views_are_asked_about_once(teachers, teach, tmp_path, monkeypatch):
    monkeypatch.setitem(distill.DEMO, "distort", True)
    monkeypatch.setitem(distill.DEMO, "ratio", (0.5, 2.0))
    expected = teach("a", "--cache", tmp_path)
    records, = map(np.load, tmp_path.glob("views-distill-*.npy"))
    # They are what the teacher says of the views of the first two epochs, 24 each.
    teacher, views = student_of(teachers["reclip++"])[1], data.open_dataset("shapes")
    batch = data.TrainingViews(views, (96, 96), 96).batch([(0, 3), (1, 0)])
    view = data.photometric_distortion(batch["view"], batch["colours"])
    Z, labels = distill.teach(teacher, view, batch["size"])
    rows = records[[3, 24]]
    assert len(records) == 48 and np.array_equal(rows["view"], view)
    assert (rows["labels"] == labels.numpy()).mean() > 0.99
    assert_close(torch.tensor(rows["Z"].tolist()), Z, rtol=2e-3, atol=2e-3)
    monkeypatch.setattr(distill, "teach", None)  # another run asks nothing
    assert same(expected, teach("b", "--cache", tmp_path))


def test_newest_teacher(teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses("run python reclip.py first", distill.find_teacher, None)
    for n, method in enumerate(("reclip", "reclip++", "maskclip")):  # the last is not rectified
        folder = shutil.copytree(teachers[method].parent, f"runs/{method}")
        os.utime(f"{folder}/reclip.pt", (n, n))
    assert str(distill.find_teacher(None)[1]) == "runs/reclip++/reclip.pt"


def test_mistakes(teachers, small_demo, monkeypatch, mistake):
    monkeypatch.setattr(SmallShapes, "has_labels", property(lambda self: False, lambda *_: None))
    command = distill.main, "--teacher", teachers["reclip++"], "--use-ground-truth-void"
    assert "no training labels" in mistake(*command)
    refuses("is not a student's", distill.load_student, teachers["reclip++"])


def test_failed_downloads_and_foreign_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url",
                        raising(OSError("no route to host")))
    refuses("https://.*resnet101.*no route", distill.pretrained_backbone, "imagenet", "resnet101")
    torch.save(torch.ones(3), tmp_path / "ones.pth")
    for name in ("ones.pth", "missing.pth"):
        refuses(f"{name}.*--backbone", distill.pretrained_backbone, str(tmp_path / name))
