"""clip/: its layers against plain formulas, and the ways in which loading goes right or wrong."""

import gzip

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import clip
from clip import clip as loading
from clip.model import Attention, LayerNorm, QuickGELU, build_model, convert_weights
from clip.simple_tokenizer import SimpleTokenizer
from conftest import normal, random_clip, refuses, same


def make_clip(**changes):
    """A CLIP of a few thousand weights: 16-pixel images, 12 tokens, 50 words."""
    return random_clip(**dict(embed_dim=8, image_resolution=16, vision_patch_size=8,
                              context_length=12, vocab_size=50) | changes)


@pytest.fixture
def model():
    return make_clip()


IMAGE = normal(3, 3, 16, 16, seed=1)
TOKENS = torch.tensor([[48, 3, 7, 49, 0, 0, 0, 0, 0, 0, 0, 0],
                       [48, 9, 5, 11, 6, 49, 0, 0, 0, 0, 0, 0]])
RESNET = dict(vision_layers=[2, 1, 1, 3], vision_width=8, image_resolution=64)
ENTRIES = "input_resolution", "context_length", "vocab_size"  # of an archive, beside its weights


def same_weights(model, other):
    return same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_pytorchs_and_has_its_parameters(causal):
    torch.manual_seed(0)
    attention, reference = Attention(12, 3, causal), nn.MultiheadAttention(12, 3, batch_first=True)
    for parameter in reference.parameters():
        nn.init.normal_(parameter)
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
    assert {type(m.gelu) for m in exact.modules() if hasattr(m, "gelu")} == {nn.GELU}
    refuses("activation 'relu': expected one of .*quick_gelu", build_model, model.state_dict(),
            activation="relu", error=ValueError)


def test_short_token_rows_give_the_same_text_features(model):
    full = model.encode_text(TOKENS)
    assert_close(model.encode_text(TOKENS[:, :6]), full)
    changed = TOKENS.where(torch.arange(12) < 6, 13)  # what follows the end token does not matter
    assert_close(model.encode_text(changed), full)
    refuses("13 tokens per text; this CLIP reads at most 12", model.encode_text,
            torch.zeros(1, 13, dtype=torch.int), error=ValueError)


@pytest.mark.parametrize("changes", [{}, RESNET], ids=["ViT", "ResNet"])
def test_float16_reaches_projections_and_nothing_else(changes):
    model = make_clip(**changes)
    convert_weights(model)
    assert model.dtype == torch.float16
    in_float32 = "ln_", "bn", "downsample.1", "embedding", "logit_scale"
    for name, parameter in model.named_parameters():
        kept = any(part in name for part in in_float32)
        assert (parameter.dtype == torch.float32) == kept, name


def test_half_precision_computes_nearly_the_same(model):
    image, text = model.encode_image(IMAGE), model.encode_text(TOKENS)
    convert_weights(model)
    assert_close(model.encode_image(IMAGE), image.half(), atol=1e-2, rtol=0)
    assert_close(model.encode_text(TOKENS), text.half(), atol=1e-2, rtol=0)
    model.bfloat16()
    assert_close(model.encode_image(IMAGE), image.bfloat16(), atol=5e-2, rtol=0)


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
    state |= {"module.attn_mask": torch.zeros(12, 12)} | dict.fromkeys(ENTRIES, torch.tensor(16))
    assert build_model(state).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("stored, told, vision, text", [
    ({}, {}, 1, 1), (dict(vision_heads=4, text_heads=2), {}, 4, 2),
    (dict(vision_heads=4, text_heads=2), dict(vision_heads=8, text_heads=16), 8, 16)])
def test_build_model_head_counts(model, stored, told, vision, text):
    state = model.state_dict() | {name: torch.tensor(heads) for name, heads in stored.items()}
    built = build_model(state, **told)
    assert all(b.attn.num_heads == vision for b in built.visual.transformer.resblocks)
    assert all(b.attn.num_heads == text for b in built.transformer.resblocks)
    assert same_weights(built, model)
    refuses("5 attention heads do not divide a width of 64", build_model, state, text_heads=5,
            error=ValueError)


def test_tokenize():
    tokens = clip.tokenize(["a photo of a cat.", ""])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.int32
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407]
    assert tokens[1, :3].tolist() == [49406, 49407, 0] and not tokens[0, 8:].any()
    assert torch.equal(clip.tokenize("a photo of a cat."), tokens[:1])
    text, message = "one two three", "'one two three' makes 5 tokens.* length is 4"
    refuses(message, clip.tokenize, text, context_length=4, error=RuntimeError)
    cut = clip.tokenize(text, context_length=4, truncate=True)
    assert cut.tolist() == [[*clip.tokenize(text, context_length=5)[0, :3].tolist(), 49407]]


def test_tokenizer_decodes_what_it_encoded():
    tokenizer = SimpleTokenizer()
    assert len(tokenizer.encoder) == 49408
    assert tokenizer.decode(tokenizer.encode("A  Café &amp; 2 naïve 猫!")) == "a café & 2 naïve 猫 ! "


@pytest.fixture
def state(model):
    """What a file needs to hold: the tensors, and the heads, which no shape tells."""
    return model.state_dict() | {"vision_heads": torch.tensor(1)}


def save(content, path, zipped=False):
    with (gzip.open if zipped else open)(path, "wb") as file:
        torch.save(content, file)
    return path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_load_state_dict_files(model, state, tmp_path, zipped, wrapped):
    content = {"epoch": 3, "name": "run", "state_dict": state} if wrapped else state
    loaded, _ = clip.load(str(save(content, tmp_path / "weights.pt", zipped)), device="cpu")
    assert same_weights(loaded, model) and not loaded.training
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "RGB", "1", "CMYK"])
def test_preprocess_takes_every_mode(state, tmp_path, mode):
    _, preprocess = clip.load(save(state, tmp_path / "weights.pt"), device="cpu")
    x = preprocess(Image.new("RGB", (40, 24), "white").convert(mode))
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32
    white = (1 - torch.tensor(loading.CLIP_MEAN)) / torch.tensor(loading.CLIP_STD)
    assert_close(x, white[:, None, None].expand(3, 16, 16))


@pytest.mark.filterwarnings("ignore")        # PyTorch would like TorchScript to be forgotten
def test_torchscript_archives_need_a_known_hash(model, tmp_path, monkeypatch):
    path = tmp_path / "archive.pt"
    del model.context_length, model.vocab_size               # as OpenAI's, it has buffers for them
    for name in (*ENTRIES, "vision_heads"):
        model.register_buffer(name, torch.tensor(16 if name in ENTRIES else 1))
    torch.jit.trace(model, (IMAGE, TOKENS), check_trace=False).save(str(path))
    sha256 = loading.hash_file(path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("opened an unknown archive"))
        refuses(f"TorchScript archive that is none of.*{sha256}", clip.load, path, error=ValueError)
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
def test_load_names_what_is_wrong_with_a_file(state, tmp_path, change, message):
    path = save(change(state), tmp_path / "some.pt")
    refuses(f"some.pt: .*{message}", clip.load, path, error=ValueError)


@pytest.mark.parametrize("name", ["ViT-Z/3", ".", "absent.pt"])
def test_load_names_the_models(name):
    refuses("neither a file nor a model; models: RN50, .*tiny", clip.load, name, error=ValueError)
    refuses("jit=True is not offered", clip.load, "ViT-B/16", jit=True, error=ValueError)


def test_tiny_clip_may_be_missing(state, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "TINY_PATH", tmp_path / "shapes-tiny.pt.gz")
    refuses("is missing; `python -m clip.pretrain` makes it", clip.load, "shapes-tiny",
            error=ValueError)
    save(state, loading.TINY_PATH, zipped=True)
    assert clip.load("shapes-tiny", device="cpu")[0].visual.input_resolution == 16


@pytest.fixture
def server(state, tmp_path, monkeypatch):
    """A folder in place of OpenAI's server, with one file; (file, cache folder, load())."""
    source, cache = save(state, tmp_path / "ViT-B-16.pt"), tmp_path / "cache"
    monkeypatch.setattr(loading, "URL", tmp_path.as_uri() + "/{file}")
    monkeypatch.setitem(loading.MODELS, "ViT-B/16", loading.hash_file(source))
    return source, cache, lambda: clip.load("ViT-B/16", device="cpu", download_root=cache)[0]


@pytest.mark.parametrize("damaged", [False, True])
def test_download_once_unless_the_cache_is_damaged(server, model, capsys, damaged):
    source, cache, load = server
    if damaged:
        cache.mkdir()
        (cache / "ViT-B-16.pt").write_bytes(b"half a download")
    assert same_weights(load(), model)
    assert ("does not have the right SHA-256" in capsys.readouterr().err) == damaged
    source.unlink()                          # from now on only the cached file can serve
    assert same_weights(load(), model)
    assert [path.name for path in cache.iterdir()] == ["ViT-B-16.pt"]


@pytest.mark.parametrize("url, message", [
    (None, "cannot download file:.*invalid hash.*put it at .*B-16.pt"),
    ("http://127.0.0.1:9/{file}", "cannot download http://127.0.0.1:9/ViT-B-16.pt .* put it at")])
def test_failed_download_says_what_to_do_and_leaves_nothing(server, monkeypatch, url, message):
    source, cache, load = server
    source.write_bytes(b"something else")
    monkeypatch.setattr(loading, "URL", url or loading.URL)
    refuses(message, load, error=OSError)
    assert not list(cache.iterdir())


def test_available_models():
    assert clip.available_models() == list(loading.MODELS) and len(loading.MODELS) == 9
    assert all(len(sha256) == 64 for sha256 in loading.MODELS.values())
