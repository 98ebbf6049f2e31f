"""Pre-train the demo's tiny CLIP on image–caption pairs: python tests/pretrain.py

The pairs imitate what CLIP learned from: pictures whose habits differ from those of the data to be
segmented (WEB), each with a caption that names most of what is in it. No mask is ever seen. The
outcome, clip/shapes-tiny.pt.gz, is a CLIP's state dict, which `clip.load("shapes-tiny")` reads.
"""

import argparse
import gzip
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clip  # noqa: E402
from clip.clip import CLIP_MEAN, CLIP_STD, TEMPLATES, TINY_PATH  # noqa: E402
from clip.model import CLIP  # noqa: E402
from clip.shapes import COLOURS, SHAPES, draw_seed, draw_shapes  # noqa: E402
from data import normalise  # noqa: E402

# As shapes.TARGET, but smaller, and with the habits that are CLIP's biases later.
WEB = dict(side=48, radius=(7, 18), grain=(0.85, 1.2), objects=3, colour_habit=0.75,
           texture_habit=0.95, centred=0.6, companion=0.4, skewed=True, background_habit=0.5)


def web_captions(seeds, classes, colours, backgrounds):
    """One caption per image: mostly the objects, now and then a colour or the background.
    seeds: B ints; classes, colours: int64 B×objects (-1 = no object); backgrounds: int64 B."""
    names, hues, captions = list(SHAPES), list(COLOURS), []
    for seed, present, paints, behind in zip(seeds, classes, colours, backgrounds):
        generator = torch.Generator().manual_seed(draw_seed(seed, "caption"))
        chance = iter(torch.rand(2 * len(present) + 2, generator=generator).tolist())
        objects = []
        for j, (k, paint) in enumerate(zip(present.tolist(), paints.tolist())):
            left_out, coloured = next(chance) < 0.2, next(chance) < 0.25
            if k >= 0 and not (j and left_out):
                objects.append(f"{hues[paint]} {names[k]}" if coloured else names[k])
        phrase = " and a ".join(dict.fromkeys(objects))
        if next(chance) < 0.1:
            phrase += f" on a {hues[behind]} background"
        captions.append(TEMPLATES[int(next(chance) * len(TEMPLATES))].format(phrase))
    return captions


def encode_half(visual, images, generator):
    """visual(images), B×3×H×W → B×D, from a random half of the patches (FLIP, Li et al., 2023).
    Twice as fast, and it keeps a small encoder from reading the whole picture off a few patches."""
    x = visual.conv1(images).flatten(2).mT + visual.positional_embedding[1:]
    b, n, width = x.shape
    kept = torch.rand(b, n, generator=generator).argsort(1)[:, : n // 2, None]
    x = x.gather(1, kept.expand(-1, -1, width))
    first = (visual.class_embedding + visual.positional_embedding[0]).expand(b, 1, -1)
    x = visual.transformer(visual.ln_pre(torch.cat([first, x], 1)))
    return visual.ln_post(x[:, 0]) @ visual.proj


@torch.no_grad()
def zero_shot_accuracy(model, seed=12345, count=2000):
    """Share of single-object pictures, of seeds never trained on, whose class is ranked first."""
    model.eval()
    seeds = [draw_seed(seed, "zero-shot", i) for i in range(count)]
    images, _, classes, *_ = draw_shapes(seeds, **{**WEB, "objects": 1})
    words = torch.stack([F.normalize(model.encode_text(clip.tokenize(
        [template.format(name) for template in TEMPLATES])), dim=-1).mean(0) for name in SHAPES])
    features = model.encode_image(normalise(images, CLIP_MEAN, CLIP_STD))
    best = (features @ F.normalize(words, dim=-1).T).argmax(1)
    return (best == classes[:, 0]).float().mean().item()


def save(model, used, path):
    """Half precision, and only the token rows that training has touched: the rest are zeros."""
    state = {key: value.half() for key, value in model.state_dict().items()}
    table = state["token_embedding.weight"]
    table[~torch.zeros(len(table), dtype=torch.bool).index_fill(0, used, True)] = 0
    state |= dict(vision_heads=torch.tensor(3), text_heads=torch.tensor(2))
    temporary = Path(f"{path}.{os.getpid()}")
    with gzip.GzipFile(temporary, "wb", mtime=0) as file:
        torch.save(state, file)
    temporary.replace(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=TINY_PATH)
    parser.add_argument("--pairs", type=int, default=60_000, help="different image–caption pairs")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, captions = [], []
    for i in range(0, args.pairs, 1000):
        seeds = [draw_seed(args.seed, "web", j) for j in range(i, min(i + 1000, args.pairs))]
        pictures, _, *content = draw_shapes(seeds, **WEB)
        images.append(pictures)
        captions += web_captions(seeds, *content)
        print(f"\rdrew {len(captions)}/{args.pairs} pairs", end="", flush=True)
    images, tokens = torch.cat(images), clip.tokenize(captions)
    # Attention is causal, so nothing after the longest caption can matter.
    tokens = tokens[:, : int(tokens.argmax(1).max()) + 1]
    model = CLIP(embed_dim=64, image_resolution=48, vision_layers=3, vision_width=96,
                 vision_patch_size=8, vision_heads=3, context_length=77, vocab_size=49408,
                 transformer_width=64, transformer_heads=2, transformer_layers=2)
    optimizer = torch.optim.AdamW([
        dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=0.05),
        dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0)], lr=2e-3)
    steps = args.epochs * (args.pairs // args.batch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps)))
    for step in range(steps):
        if step % (args.pairs // args.batch) == 0:
            batches = iter(torch.randperm(args.pairs, generator=generator).split(args.batch))
        batch = next(batches)
        pictures = normalise(images[batch], CLIP_MEAN, CLIP_STD)
        if torch.rand((), generator=generator) < 0.5:
            pictures = pictures.flip(-1)
        z = F.normalize(encode_half(model.visual, pictures, generator), dim=-1)
        t = F.normalize(model.encode_text(tokens[batch]), dim=-1)
        logits = model.logit_scale.exp() * z @ t.T
        target = torch.arange(len(batch))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if (step + 1) % 20 == 0 or step + 1 == steps:
            print(f"\rstep {step + 1}/{steps}  loss {loss.item():.3f}   ", end="", flush=True)
    # Id 0, where the learned Reference prompt starts, is among the tokens: captions end in zeros.
    save(model, tokens.unique().long(), args.out)
    model, _ = clip.load(str(args.out), device="cpu")
    print(f"\nzero-shot accuracy {100 * zero_shot_accuracy(model):.1f} % → {args.out}")


if __name__ == "__main__":
    main()
