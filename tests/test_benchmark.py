"""The benchmark runs, and its own comparisons of values hold, at a tiny size."""

import json

import benchmark


def test_quick(capsys):
    apart = ("memory", "start", "demo")  # which start processes of their own
    stages = [stage for stage in benchmark.STAGES if stage not in apart]
    benchmark.main(["--quick", "--stages", *stages])
    printed = capsys.readouterr().out
    for word in ("share", "shared prefix", "cached", "121 crops", "evaluation", "distillation"):
        assert word in printed


def test_memory(capsys):
    benchmark.main(["--quick", "--memory", "cached"])
    before, peak = json.loads(capsys.readouterr().out)
    assert 0 < before <= peak < 100


def test_work_of_the_encoder():
    """Counted by hand for two blocks of width 64, one patch and the class token, patches of 2."""
    model = benchmark.random_clip(embed_dim=3, image_resolution=4, vision_width=64,
                                  vision_patch_size=2)
    patch, block, last, proj = 12 * 64, 2 * 12 * 64**2 + 2 * 2**2 * 64, 10 * 64**2, 64 * 3
    assert benchmark.encoder_work(model.visual, 2) == 2 * (patch + block + last + proj)
