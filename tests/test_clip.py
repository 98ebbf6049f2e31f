"""clip/: its layers against plain formulas, and the ways in which loading goes right or wrong."""

import gzip
import io

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import clip
from clip import clip as loading
from clip.model import Attention, LayerNorm, QuickGELU, build_model, convert_weights
from clip.simple_tokenizer import SimpleTokenizer
from conftest import random_clip, same


def make_clip(**changes):
    """A CLIP of a few thousand weights: 16-pixel images, 12 tokens, 50 words."""
    sizes = dict(embed_dim=8, image_resolution=16, vision_patch_size=8, context_length=12,
                 vocab_size=50)
    return random_clip(**sizes | changes)


@pytest.fixture
def model():
    return make_clip()


IMAGE = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([[48, 3, 7, 49, 0, 0, 0, 0, 0, 0, 0, 0],
                       [48, 9, 5, 11, 6, 49, 0, 0, 0, 0, 0, 0]])


RESNET = dict(vision_layers=[2, 1, 1, 3], vision_width=8, image_resolution=64)


def same_weights(model, other):
    return same(dict(model.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_attention_is_pytorchs_and_has_its_parameters(causal):
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(12, 3, batch_first=True)
    nn.init.normal_(reference.in_proj_bias)
    nn.init.normal_(reference.out_proj.bias)
    attention = Attention(12, 3, causal)
    attention.load_state_dict(reference.state_dict())
    x = torch.randn(2, 5, 12)
    later = torch.ones(5, 5).triu(1).bool() if causal else None
    assert_close(attention(x), reference(x, x, x, attn_mask=later)[0])


def test_layer_norm_computes_in_float32_and_keeps_the_type():
    x = 300 * torch.randn(4, 64).half()      # its squares overflow in float16
    y = LayerNorm(64)(x)
    assert y.dtype == torch.float16
    assert_close(y, nn.LayerNorm(64)(x.float()).half())


def test_activations(model):
    x = torch.linspace(-3, 3, 7)
    assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)))
    exact = build_model(model.state_dict(), activation="gelu")
    kinds = {type(module.gelu) for module in exact.modules() if hasattr(module, "gelu")}
    assert kinds == {nn.GELU}
    with pytest.raises(ValueError, match="activation 'relu': expected one of .*quick_gelu"):
        build_model(model.state_dict(), activation="relu")


@torch.no_grad()
def test_short_token_rows_give_the_same_text_features(model):
    full = model.encode_text(TOKENS)
    assert_close(model.encode_text(TOKENS[:, :6]), full)
    changed = TOKENS.clone()
    changed[:, 6:] = 13                      # what follows the end token does not matter
    assert_close(model.encode_text(changed), full)
    with pytest.raises(ValueError, match="13 tokens per text; this CLIP reads at most 12"):
        model.encode_text(torch.zeros(1, 13, dtype=torch.int))


@pytest.mark.parametrize("changes", [{}, RESNET], ids=["ViT", "ResNet"])
def test_float16_reaches_projections_and_nothing_else(changes):
    model = make_clip(**changes)
    convert_weights(model)
    assert model.dtype == torch.float16
    for name, parameter in model.named_parameters():
        kept = any(part in name for part in
                   ("ln_", "bn", "downsample.1", "embedding", "logit_scale"))
        assert (parameter.dtype == torch.float32) == kept, name


@torch.no_grad()
def test_half_precision_computes_nearly_the_same(model):
    image_features, text_features = model.encode_image(IMAGE), model.encode_text(TOKENS)
    convert_weights(model)
    assert_close(model.encode_image(IMAGE), image_features.half(), atol=1e-2, rtol=0)
    assert_close(model.encode_text(TOKENS), text_features.half(), atol=1e-2, rtol=0)
    model.bfloat16()
    assert_close(model.encode_image(IMAGE), image_features.bfloat16(), atol=5e-2, rtol=0)


def without(state, part):
    return {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize("changes", [{}, RESNET], ids=["ViT", "ResNet"])
def test_build_model_round_trip(changes):
    model = make_clip(**changes)
    # without counters, as with open_clip's frozen norms
    built = build_model(without(model.state_dict(), "num_batches_tracked"))
    assert same_weights(built, model) and not built.training
    image = torch.randn(2, 3, *[built.visual.input_resolution] * 2)
    assert image.shape[2] == changes.get("image_resolution", 16)
    assert torch.equal(built.encode_image(image), model.encode_image(image))
    assert all(parameter.requires_grad for parameter in built.parameters())
    built.logit_scale.data.fill_(0)
    assert model.logit_scale != 0                            # a copy


def test_build_model_reads_open_clip_and_archive_entries(model):
    state = {f"module.{name}": value.half().float() for name, value in model.state_dict().items()}
    state["module.attn_mask"] = torch.zeros(12, 12)
    state |= {name: torch.tensor(16) for name in
              ("input_resolution", "context_length", "vocab_size")}
    assert build_model(state).state_dict().keys() == model.state_dict().keys()


def test_build_model_head_counts(model):
    state = model.state_dict()
    assert build_model(state).visual.transformer.resblocks[0].attn.num_heads == 1
    state |= dict(vision_heads=torch.tensor(4), text_heads=torch.tensor(2))
    built = build_model(state)
    assert built.visual.transformer.resblocks[1].attn.num_heads == 4
    assert built.transformer.resblocks[1].attn.num_heads == 2
    assert same_weights(built, model)
    told = build_model(state, vision_heads=8, text_heads=16)
    assert told.visual.transformer.resblocks[1].attn.num_heads == 8
    assert told.transformer.resblocks[1].attn.num_heads == 16
    with pytest.raises(ValueError, match="5 attention heads do not divide a width of 64"):
        build_model(state, text_heads=5)


def test_tokenize():
    tokens = clip.tokenize(["a photo of a cat.", ""])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.int32
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407]
    assert tokens[1, :3].tolist() == [49406, 49407, 0] and not tokens[0, 8:].any()
    assert torch.equal(clip.tokenize("a photo of a cat."), tokens[:1])


def test_tokenize_too_long():
    with pytest.raises(RuntimeError, match="'one two three' makes 5 tokens.* length is 4"):
        clip.tokenize("one two three", context_length=4)
    cut = clip.tokenize("one two three", context_length=4, truncate=True)
    whole = clip.tokenize("one two three", context_length=5)
    assert cut.tolist() == [[*whole[0, :3].tolist(), 49407]]


def test_tokenizer_decodes_what_it_encoded():
    tokenizer = SimpleTokenizer()
    assert len(tokenizer.encoder) == 49408
    ids = tokenizer.encode("A  Café &amp; 2 naïve 猫!")
    assert tokenizer.decode(ids) == "a café & 2 naïve 猫 ! "


def state_of(model):
    """What a file needs to hold: the tensors, and the heads, which no shape tells."""
    return model.state_dict() | {"vision_heads": torch.tensor(1)}


def save(content, path, zipped=False):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(gzip.compress(buffer.getvalue()) if zipped else buffer.getvalue())
    return path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_load_state_dict_files(model, tmp_path, zipped, wrapped):
    state = state_of(model)
    content = {"epoch": 3, "name": "run", "state_dict": state} if wrapped else state
    path = save(content, tmp_path / "weights.pt", zipped)
    loaded, _ = clip.load(str(path), device="cpu")
    assert same_weights(loaded, model) and not loaded.training
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "RGB", "1", "CMYK"])
def test_preprocess_takes_every_mode(model, tmp_path, mode):
    _, preprocess = clip.load(save(state_of(model), tmp_path / "weights.pt"), device="cpu")
    x = preprocess(Image.new("RGB", (40, 24), "white").convert(mode))
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32
    white = (1 - torch.tensor(loading.CLIP_MEAN)) / torch.tensor(loading.CLIP_STD)
    assert_close(x, white[:, None, None].expand(3, 16, 16))


def archive(model, path):
    """A TorchScript archive with the extra entries of OpenAI's -> its SHA-256."""
    del model.context_length, model.vocab_size               # there they are buffers
    for name in ("input_resolution", "context_length", "vocab_size"):
        model.register_buffer(name, torch.tensor(16))
    model.register_buffer("vision_heads", torch.tensor(1))
    torch.jit.trace(model, (IMAGE, TOKENS), check_trace=False).save(str(path))
    return loading.hash_file(path)


@pytest.mark.filterwarnings("ignore")        # PyTorch would like TorchScript to be forgotten
def test_torchscript_archives_need_a_known_hash(tmp_path, monkeypatch):
    path = tmp_path / "archive.pt"
    sha256 = archive(make_clip(), path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("opened an unknown archive"))
        with pytest.raises(ValueError, match=f"TorchScript archive that is none of.*{sha256}"):
            clip.load(path)
    monkeypatch.setitem(loading.TRUSTED_ARCHIVES, sha256, "test")
    assert same_weights(clip.load(path, device="cpu")[0], make_clip())


@pytest.mark.parametrize("change, message", [
    (lambda state: without(state, "ln_final.bias"),
     r"not a CLIP state dict: 1 missing \(ln_final.bias\).*expected the \d+ entries"),
    (lambda state: state | {name: torch.zeros(1) for name in "abcd"},
     r"not a CLIP state dict: 4 left over \(a, b, c, ...\)"),
    (lambda state: state | {"visual.proj": torch.zeros(64, 9)},
     r"not a CLIP state dict: 1 of another shape \(visual.proj is \(64, 9\), not"),
    (lambda state: without(state, "resblocks"), "cannot read 'visual.transformer.resblocks.0'"),
    (lambda state: {"fc.weight": torch.zeros(2, 2)}, "not a CLIP state dict: .* found fc.weight"),
    (lambda state: {"x": 3}, "not a state dict: expected a dictionary"),
    (lambda state: {4: torch.zeros(1)}, "not a state dict: expected a dictionary"),
    (lambda state: torch.zeros(2), "not a state dict: expected a dictionary"),
], ids=["missing", "left over", "shape", "no blocks", "foreign", "number", "key", "tensor"])
def test_load_names_what_is_wrong_with_a_file(model, tmp_path, change, message):
    path = save(change(state_of(model)), tmp_path / "some.pt")
    with pytest.raises(ValueError, match=f"some.pt: .*{message}"):
        clip.load(path)


@pytest.mark.parametrize("name", ["ViT-Z/3", ".", "absent.pt"])
def test_load_names_the_models(name):
    with pytest.raises(ValueError, match="neither a file nor a model; models: RN50, .*tiny"):
        clip.load(name)
    with pytest.raises(ValueError, match="jit=True is not offered"):
        clip.load("ViT-B/16", jit=True)


def test_tiny_clip_may_be_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "TINY_PATH", tmp_path / "shapes-tiny.pt.gz")
    with pytest.raises(ValueError, match="is missing; `python -m clip.pretrain` makes it"):
        clip.load("shapes-tiny")
    save(state_of(make_clip()), loading.TINY_PATH, zipped=True)
    assert clip.load("shapes-tiny", device="cpu")[0].visual.input_resolution == 16


@pytest.fixture
def server(model, tmp_path, monkeypatch):
    """A folder in place of OpenAI's server, with one file; returns (file, cache folder)."""
    source = save(state_of(model), tmp_path / "ViT-B-16.pt")
    monkeypatch.setattr(loading, "URL", tmp_path.as_uri() + "/{file}")
    monkeypatch.setitem(loading.MODELS, "ViT-B/16", loading.hash_file(source))
    return source, tmp_path / "cache"


def test_download_once(server, model):
    source, cache = server
    assert same_weights(clip.load("ViT-B/16", device="cpu", download_root=cache)[0], model)
    source.unlink()                          # from now on only the cached file can serve
    assert same_weights(clip.load("ViT-B/16", device="cpu", download_root=cache)[0], model)
    assert [path.name for path in cache.iterdir()] == ["ViT-B-16.pt"]


def test_wrong_download_leaves_nothing(server):
    source, cache = server
    source.write_bytes(b"something else")
    with pytest.raises(OSError, match="cannot download file:.*invalid hash.*put it at .*B-16.pt"):
        clip.load("ViT-B/16", download_root=cache)
    assert not list(cache.iterdir())


def test_damaged_cache_is_replaced(server, model, capsys):
    _, cache = server
    cache.mkdir()
    (cache / "ViT-B-16.pt").write_bytes(b"half a download")
    assert same_weights(clip.load("ViT-B/16", device="cpu", download_root=cache)[0], model)
    assert "does not have the right SHA-256" in capsys.readouterr().err


def test_no_connection_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "URL", "http://127.0.0.1:9/{file}")
    with pytest.raises(OSError, match=r"cannot download http://127.0.0.1:9/RN50.pt .* put it at"):
        clip.load("RN50", download_root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_available_models():
    assert clip.available_models() == list(loading.MODELS) and len(loading.MODELS) == 9
    assert all(len(sha256) == 64 for sha256 in loading.MODELS.values())
