"""How long the stages take: python tests/benchmark.py [--quick] [--threads N]

Runs on random weights of ViT-B/16's sizes. What is compared is run in turn in one process, so that
both meet the same machine; every number is a median.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from clip.model import CLIP  # noqa: E402
from conftest import plain_text_features  # noqa: E402
from data import CLASSES  # noqa: E402
from reclip import Reference, encode_shared_prefix  # noqa: E402

NAMES = {20: CLASSES["voc"], 59: CLASSES["context"], 150: CLASSES["ade"]}  # by their number


def vit_b16():
    """A frozen CLIP of random weights and ViT-B/16's sizes."""
    torch.manual_seed(0)
    model = CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
    nn.init.normal_(model.token_embedding.weight, std=0.1)
    nn.init.normal_(model.positional_embedding, std=0.1)
    return model.eval().requires_grad_(False)


def alternate(functions, repeats):
    """[(median seconds, last result)] of functions that are called in turn, `repeats` times."""
    seconds, results = [[] for _ in functions], [None] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            results[i] = function()
            seconds[i].append(time.perf_counter() - start)
    return [(statistics.median(s), result) for s, result in zip(seconds, results)]


def text_encoding(model, C, repeats):
    """Seconds for the Reference features of C classes, forward and backward to the prompt.

    All 77 positions of every class against the shared prefix. Returns (plain, ours); raises
    AssertionError unless features agree to 1e-5 and gradients to 1e-5 of the largest.
    """
    reference = Reference(model, NAMES[C])
    nn.init.normal_(reference.prompt, std=0.1)
    weights = torch.randn(C, model.text_projection.shape[1])

    def step(encode):
        Wr = encode(model, torch.cat([reference.start, reference.prompt]), reference.suffix)
        return Wr.detach(), torch.autograd.grad((Wr * weights).sum(), reference.prompt)[0]

    step(encode_shared_prefix)  # the first pass of a process is slower than all others
    (plain, expected), (ours, actual) = alternate(
        [lambda: step(plain_text_features), lambda: step(encode_shared_prefix)], repeats)
    for a, b in zip(actual, expected):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max()), "the two encodings differ"
    return plain, ours


def distillation(model, epochs=4):
    """Seconds a step and peak memory in GB of `distill.py` with a full-size student on real photos.

    ResNet-50, a ViT-B/16 teacher, crops of 512×512, two at a time, the three photographs of
    tests/real; both commands run in processes of their own.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), f"{folder}/clip.pt")
        photos, weights = str(ROOT / "tests/real"), f"{folder}/clip.pt"
        reclip = ["reclip.py", "--dataset", "voc", "--data-root", photos, "--clip", weights,
                  "--out", folder, "--epochs", "1", "--crop-ratio", "1"]
        distill = ["distill.py", "--teacher", f"{folder}/reclip.pt", "--backbone", "none",
                   "--batch", "2", "--epochs", str(epochs)]
        for command in (reclip, distill):
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
        row = json.loads(Path(folder, "log-distill.jsonl").read_text().splitlines()[-1])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    # three images in two steps an epoch
    return 1.5 / row["images_per_s"], peak


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 classes, once")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, ViT-B/16, random weights")

    model = vit_b16()
    print("Reference features, forward and backward (equal to 1e-5)")
    print("classes    77 positions each    shared prefix    ratio", flush=True)
    for C in [20] if args.quick else NAMES:
        plain, ours = text_encoding(model, C, 1 if args.quick else 3)
        print(f"{C:7}{plain:19.2f} s{ours:15.3f} s{plain / ours:9.1f}", flush=True)
    if not args.quick:
        seconds, peak = distillation(model)
        print(f"distillation, ResNet-50, 512×512, batch 2: {seconds:.1f} s a step, "
              f"peak {peak:.1f} GB")


if __name__ == "__main__":
    main()
