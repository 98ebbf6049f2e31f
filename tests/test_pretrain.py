"""The demo's pictures, and the program that made the tiny CLIP from pictures and captions alone."""

import functools
import re

import torch

import clip
from clip import pretrain
from clip.clip import TINY_PATH
from clip.shapes import COLOURS, SHAPES, TARGET, WEB, draw_seed, draw_shapes
from conftest import normal, same
from data import VOID


def test_a_picture_depends_on_its_own_seed_alone():
    for world in (WEB, TARGET):
        seeds = [draw_seed("test", i) for i in range(12)]
        together = draw_shapes(seeds, **world)
        for i in (0, 5, 11):
            alone = draw_shapes(seeds[i : i + 1], **world)
            assert same([a[0] for a in alone], [b[i] for b in together])
        backwards = draw_shapes(seeds[::-1], **world)
        assert all(torch.equal(a.flip(0), b) for a, b in zip(backwards, together))
        assert not torch.equal(together[0][0], together[0][1])


def test_pictures_and_labels():
    images, labels, classes, *_ = draw_shapes(range(200), **TARGET)
    assert images.dtype == torch.uint8 and images.shape == (200, 3, 96, 96)
    assert labels.dtype == torch.int64 and labels.shape == (200, 96, 96)
    assert set(labels.unique().tolist()) == {*range(10), VOID}
    for label, present in zip(labels, classes):
        assert set(label.unique().tolist()) - {VOID} <= set(present.tolist()) - {-1}
    # The target has every class about equally often; the web's first class is four times its last.
    web = draw_shapes(range(2000), **WEB)[2][:, 0].bincount(minlength=10)
    assert classes[classes >= 0].bincount(minlength=10).min() > 20
    assert web[0] > 2.5 * web[9]


def test_captions_name_the_first_object_and_none_that_is_not_there():
    seeds, some_left_out, coloured = list(range(300)), 0, 0
    _, _, *drawn = draw_shapes(seeds, **WEB)
    texts = pretrain.web_captions(seeds, *drawn)
    for present, text in zip(drawn[0].tolist(), texts):
        # "star" and "flag" are words of their own; texts have templates around the names
        named = {k for k, name in enumerate(SHAPES) if re.search(rf"\b{name}\b", text)}
        assert present[0] in named and named <= set(present)
        some_left_out += len(set(present) - {-1}) > len(named)
        coloured += any(re.search(rf"\b{colour}\b", text) for colour in COLOURS)
    assert 0 < some_left_out < 150 and 60 < coloured < 240
    # A caption depends on its own picture alone.
    assert pretrain.web_captions(*(part[7:9] for part in (seeds, *drawn))) == texts[7:9]


def test_half_of_the_patches(tiny_clip):
    images = normal(6, 3, 48, 48)
    encode = lambda seed: pretrain.encode_half(tiny_clip.visual, images,
                                               torch.Generator().manual_seed(seed))
    assert encode(0).shape == (6, 64) and torch.equal(encode(0), encode(0))
    assert not torch.allclose(encode(0), encode(1), atol=1e-3)
    whole = tiny_clip.encode_image(images)  # of both halves, one looks much like the whole
    assert torch.cosine_similarity(encode(0), whole).mean() > 0.5


def test_the_shipped_clip():
    assert TINY_PATH.stat().st_size < 5_000_000
    model, _ = clip.load("shapes-tiny", device="cpu")
    heads = pretrain.ARCHITECTURE["vision_heads"], pretrain.ARCHITECTURE["transformer_heads"]
    assert (model.visual.transformer.resblocks[0].attn.num_heads,
            model.transformer.resblocks[0].attn.num_heads) == heads
    assert model.visual.input_resolution == 48 and len(model.visual.transformer.resblocks) == 3
    assert pretrain.zero_shot_accuracy(model, count=400) >= 0.80


def test_pretraining_sees_pictures_and_captions_and_no_mask(tmp_path, monkeypatch, capsys):
    def without_labels(*args, **kwargs):
        images, _, *rest = draw_shapes(*args, **kwargs)
        return images, None, *rest

    monkeypatch.setattr(pretrain, "draw_shapes", without_labels)
    monkeypatch.setattr(pretrain, "zero_shot_accuracy",
                        functools.partial(pretrain.zero_shot_accuracy, count=50))
    states = []
    for name in ("first.pt.gz", "again.pt.gz"):
        pretrain.main(["--pairs", "64", "--epochs", "3", "--batch", "16", "--out",
                       str(tmp_path / name)])
        said = capsys.readouterr().out
        assert "step 12/12" in said and "zero-shot accuracy" in said
        states.append(clip.load(str(tmp_path / name), device="cpu")[0].state_dict())
    first, again = map(dict, states)
    assert same(first, again)
    used = first["token_embedding.weight"].abs().sum(1) > 0
    ladybug, unused = clip.tokenize(["ladybug", "xylophone"])[:, 1].tolist()
    assert used[ladybug] and used[0] and not used[unused] and used.sum() < 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.pt.gz", "first.pt.gz"]
