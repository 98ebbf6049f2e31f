"""Objects of an image: connected regions against a flood fill, VOC's instance masks."""

import pytest
import torch
from PIL import Image

from data import VOID, UserError, connected_regions, open_dataset


def flood_fill(label):
    """Regions of equal label, one after the other, pixel by pixel."""
    H, W = label.shape
    objects, count = torch.zeros(H, W, dtype=torch.int64), 0
    for top in range(H):
        for left in range(W):
            if label[top, left] == VOID or objects[top, left]:
                continue
            count += 1
            todo = [(top, left)]
            while todo:
                y, x = todo.pop()
                if not (0 <= y < H and 0 <= x < W) or objects[y, x]:
                    continue
                if label[y, x] == label[top, left]:
                    objects[y, x] = count
                    todo += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return objects


@pytest.mark.parametrize("H, W, C", [(1, 1, 2), (1, 17, 2), (17, 1, 2), (30, 40, 2), (41, 29, 3),
                                     (60, 60, 9)])
def test_connected_regions_are_those_of_a_flood_fill(H, W, C):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        label = torch.randint(C, (H, W), generator=generator)
        label[torch.rand(H, W, generator=generator) < 0.15 * seed] = VOID
        assert torch.equal(connected_regions(label), flood_fill(label))


def test_connected_regions_that_wind():
    spiral = torch.full((33, 33), VOID)
    y, x, dy, dx, steps = 16, 16, 0, 1, 2
    while 0 < y < 32 and 0 < x < 32:
        for _ in range(steps):
            if 0 <= y < 33 and 0 <= x < 33:
                spiral[y, x] = 5
            y, x = y + dy, x + dx
        dy, dx, steps = dx, -dy, steps + 1
    for label in (spiral, spiral.T, spiral.flip(0), spiral.masked_fill(spiral == VOID, 7)):
        assert torch.equal(connected_regions(label), flood_fill(label))
    comb = torch.zeros(20, 20, dtype=torch.int64)
    comb[1:, ::2] = 3  # teeth that meet nowhere
    comb[19, :] = 3  # and then do
    assert connected_regions(comb).unique().tolist() == flood_fill(comb).unique().tolist()
    assert connected_regions(torch.full((4, 5), VOID)).sum() == 0


def test_voc_has_instance_masks(voc_root):
    tree = voc_root / "VOCdevkit" / "VOC2012"
    data = open_dataset("voc", voc_root, "val")
    assert torch.equal(data.objects(0), connected_regions(data.label(0)))  # there are none yet
    H, W = data.size(0)
    mask = Image.new("L", (W, H))
    mask.paste(1, (0, 0, 100, H))
    mask.paste(2, (100, 0, 200, H))
    mask.paste(255, (98, 0, 102, H))
    folder = tree / "SegmentationObject"
    folder.mkdir()
    mask.save(folder / f"{data.ids[0]}.png")
    objects = open_dataset("voc", voc_root, "val").objects(0)
    assert objects.unique().tolist() == [0, 1, 2] and objects.dtype == torch.int64
    assert (objects == 1).sum() == (objects == 2).sum() == 98 * H
    mask.crop((0, 0, 50, H)).save(folder / f"{data.ids[0]}.png")
    with pytest.raises(UserError, match="instance mask .* is 50×375 pixels, its image 500×375"):
        open_dataset("voc", voc_root, "val").objects(0)
    (folder / f"{data.ids[0]}.png").unlink()
    with pytest.raises(UserError, match="no label .*SegmentationObject"):
        open_dataset("voc", voc_root, "val").objects(0)
