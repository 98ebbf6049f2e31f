"""--views: features computed once are those of fresh views, are kept safely and shared."""

import shutil

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import reclip
from conftest import learned, results, same


@pytest.fixture
def encoded(monkeypatch):
    """Counts the images that the dense encoder sees, and can stop after some."""
    original = reclip.dense_features

    def encode(visual, images, surgery):
        encode.images += len(images)
        if encode.images > encode.limit:
            raise KeyboardInterrupt
        return original(visual, images, surgery)

    encode.images, encode.limit = 0, 10**6
    monkeypatch.setattr(reclip, "dense_features", encode)
    return encode


def test_as_many_views_as_epochs_are_fresh_views(demo):
    fresh, fixed, two = (demo("--views", views, out=str(views), epochs=3) for views in (0, 3, 2))
    assert not (fresh / "views.npy").exists()
    features = np.load(fixed / "views.npy")["features"]
    assert features.shape == (3, 24, 64, 12, 12) and features.dtype == np.float16
    for name, value in learned(fresh)["state"].items():  # apart by float16 alone
        assert_close(learned(fixed)["state"][name], value, atol=2e-3, rtol=2e-2)
    assert np.array_equal(np.load(two / "views.npy")["features"], features[:2])
    assert not same(learned(two)["state"], learned(fixed)["state"])


def test_epochs_after_the_last_view_begin_again():
    records = np.zeros((2, 4), [("features", np.float16, (1, 1, 1))])
    records["features"] = np.arange(2 * 4).reshape(2, 4, 1, 1, 1)
    views = reclip.FixedViews(records)
    for epoch in range(5):
        batch = views[[(epoch, 3), (epoch, 1)]]
        assert batch["index"].tolist() == [3, 1]
        assert batch["features"].flatten().tolist() == [epoch % 2 * 4 + 3, epoch % 2 * 4 + 1]


def test_views_are_computed_once_and_shared(demo, encoded, tmp_path, capsys):
    demo("--cache", tmp_path / "cache", out="one")
    once = encoded.images
    assert once >= 48 and "0.00 GB" in capsys.readouterr().out
    whole = demo("--cache", tmp_path / "cache", "--add", out="two")
    assert "views:" not in capsys.readouterr().out
    assert encoded.images - once < 48  # the evaluation, and one image to learn the shape
    assert not (whole / "views.npy").exists() and (whole / "reclip.pt").exists()


def test_an_interrupted_cache_goes_on(demo, encoded, tmp_path):
    whole = demo(out="whole")
    total, encoded.images, encoded.limit = encoded.images, 0, 1 + 16
    with pytest.raises(SystemExit, match="130"):
        demo(out="parts")
    assert not (tmp_path / "parts" / "views.npy").exists()
    encoded.images, encoded.limit = 0, 10**6
    parts = demo(out="parts")
    assert encoded.images == total - 16
    assert np.array_equal(np.load(parts / "views.npy"), np.load(whole / "views.npy"))
    assert sorted(p.name for p in parts.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert same(learned(parts), learned(whole))


def test_a_small_disk_is_noticed_before_anything_is_written(tmp_path, small_demo, mistake,
                                                            monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    said = mistake(reclip.main, "--out", tmp_path / "run", "--epochs", 2)
    assert "0.00 GB, and 0.00 GB are free" in said and "--views 0" in said
    assert not list((tmp_path / "run").glob("views.npy*"))


@pytest.mark.parametrize("options, has, stages", [
    (("--learn-query",), "query.prompt", ["rectified"]),
    (("--tune-encoder", "--views", 0), "visual.proj", ["rectified"]),
    (("--wr-norm", "class"), "reference.prompt", ["maskclip", "rectified"]),
    (("--pooling", "cosine"), "reference.prompt", ["maskclip", "rectified"]),
])
def test_each_ablation_changes_the_result_and_is_evaluated(demo, options, has, stages):
    plain = learned(demo(out="plain"))["state"]
    out = demo(*options, out="changed")
    state = learned(out)["state"]
    assert has in state and not torch.equal(state["decoder.conv.weight"],
                                            plain["decoder.conv.weight"])
    assert list(results(out)) == stages  # what is not CLIP's any more is not called MaskCLIP


def test_a_learned_query_moves_and_is_what_is_evaluated(demo):
    model = reclip.load_clip("shapes-tiny")
    checkpoint = reclip.load_checkpoint(demo("--learn-query") / "reclip.pt")
    classes, Wq = checkpoint["classes"], checkpoint["state"]["Wq"]
    start = reclip.LearnedQuery(model, classes)
    with torch.no_grad():
        # at first it is the plain prompt "a photo of a NAME"
        prompts = reclip.query_features(model, classes, ["a photo of a {}"])
        assert_close(start(model), prompts, atol=1e-5, rtol=0)
        assert (Wq - prompts).abs().max() > 1e-3
        start.load_state_dict({k.removeprefix("query."): v for k, v in checkpoint["state"].items()
                               if k.startswith("query.")})
        assert_close(start(model), Wq, atol=1e-6, rtol=0)


def test_wr_by_row_or_by_matrix(demo):
    rows = {norm: learned(demo("--wr-norm", norm, out=norm))["Wr"].norm(dim=1)
            for norm in ("matrix", "class")}
    assert rows["matrix"].square().sum().item() == pytest.approx(1)
    assert rows["class"].tolist() == pytest.approx([1] * 10)


def test_cosine_pooling_by_hand():
    masks = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # B×C×h×w = 1×2×1×2
    Z = torch.tensor([[[[0.6, 0.0]], [[0.8, 1.0]]]])
    Wq = torch.eye(2)
    expected = torch.tensor([[[0.6, 0.8], [0.0, 1.0]]])
    assert_close(reclip.cosine_pooling(masks, Z, Wq), expected)
