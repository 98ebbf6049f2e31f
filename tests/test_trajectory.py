"""Training step by step: forty steps of the authors' program, and BatchNorm written out."""

import functools

import pytest
import torch
import torch.nn.functional as F

import data
import reclip
from conftest import BEFORE_A_NORM, golden, random_clip
from reclip import Rectifier, gumbel_noise, rectification_loss


def test_forty_steps_of_the_authors_program():
    recorded = golden("trajectory")
    model = reclip.load_clip(recorded["clip"])
    views = data.normalise(recorded["images"], data.CLIP_MEAN, data.CLIP_STD)
    with torch.no_grad():
        features = reclip.dense_features(model.visual, views, recorded["surgery"])
    p = reclip.resized_positions(model.visual, *features.shape[2:])
    (method, run), = recorded["runs"].items()
    classes, Wq = recorded["classes"], recorded["Wq"]
    rectifier = Rectifier(model, classes, Wq, *reclip.METHODS[method])
    missing, unexpected = rectifier.load_state_dict(run["start"], strict=False)
    assert not unexpected and set(missing) == {"Wq", "reference.start"}
    optimizer = torch.optim.SGD(rectifier.parameters(), recorded["lr"], recorded["momentum"],
                                weight_decay=recorded["weight_decay"])
    for step, batch in enumerate(recorded["order"].tolist()):
        generator = torch.Generator().manual_seed(1000 * recorded["seed"] + step)
        u = torch.rand(len(batch), len(classes), *features.shape[2:], generator=generator)
        noise = -(-u.clamp(1e-6, 1 - 1e-6).log()).log()  # as the entry `noise` says
        loss = rectification_loss(rectifier.train(), features[batch], p, *rectifier.texts(model),
                                  recorded["hypothesis"][batch], noise, recorded["tau"],
                                  recorded["mask_temperature"])
        assert abs(loss.item() - run["losses"][step].item()) < 1e-5, step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = rectifier.state_dict()
    for name, value in run["end"].items():  # BatchNorm's statistics included
        error = (state[name] - value).abs().max() / value.abs().max()
        assert error < 1e-4, f"{name}: {error:.1e}"
        moved = (run["start"][name] - value).abs().max() / value.abs().max()
        assert name.startswith("decoder.conv.bias") or moved > 1e-2, name  # so this can fail


def plain_norm(norm, x):
    """BatchNorm in training mode, in plain operations, with the parameters of a given one."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]
    return (x - mean) / (variance + norm.eps).sqrt() * weight + bias


@pytest.mark.parametrize("method", ["reclip++", "reclip"])
@pytest.mark.parametrize("h, w", [(21, 21), (3, 4)])
@pytest.mark.parametrize("layout", ["plain", "channels last"])
def test_gradients_at_batch_1_with_batch_norm_written_out(method, h, w, layout):
    """PyTorch's CPU kernel of BatchNorm is wrong for one layout: none of ours may meet it."""
    C = 5
    model = random_clip()
    torch.manual_seed(1)
    features, p = torch.randn(1, 32, h, w), torch.randn(1, 64, h, w)
    if layout == "channels last":  # as from tokens, of which a map is a view
        features, p = (x.to(memory_format=torch.channels_last) for x in (features, p))
    noise, present = gumbel_noise((C, h, w), [3]), torch.tensor([[1, 0, 1, 1, 0]]).bool()
    Wq = F.normalize(torch.randn(C, 32), dim=1)
    rectifier = Rectifier(model, list("abcde"), Wq, *reclip.METHODS[method]).train()

    def gradients():
        rectifier.zero_grad()
        loss = rectification_loss(rectifier, features, p, *rectifier.texts(model), present, noise,
                                  0.1, 0.5)
        loss.backward()
        return loss.item(), {k: v.grad.clone() for k, v in rectifier.named_parameters()}

    loss, ours = gradients()
    for module in rectifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.forward = functools.partial(plain_norm, module)
    expected_loss, expected = gradients()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        if name not in BEFORE_A_NORM:
            largest = gradient.abs().max()
            assert largest > 0 and (ours[name] - gradient).abs().max() < 1e-3 * largest, name
