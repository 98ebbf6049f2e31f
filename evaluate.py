"""Evaluate what reclip.py and distill.py have learned.

    python evaluate.py                                        the newest checkpoint under runs/
    python evaluate.py --checkpoint runs/voc/reclip.pt        any other, on its own data set

Prints mIoU, pixel accuracy and the IoU of every class, and adds them to results.json beside the
checkpoint. Shapes: B images, C classes, h×w patches, H×W pixels.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from data import (VOID, UserError, clean_exit, evaluation_view, evenly, open_dataset, overlay,
                  picture_sheet)
from reclip import (Progress, RectifiedCLIP, load_checkpoint, make_hypotheses, pick_device,
                    write_text)

# ------------------------------------------------------------------------------------------------
# Scores


def confusion_matrix(prediction, label, C):
    """Pixels by true class (rows) and predicted class (columns), int64 C×C.

    prediction, label: integer tensors of one shape; pixels whose label is not in 0…C-1 (void, 255)
    do not count.
    """
    valid = label < C
    pairs = label[valid].long() * C + prediction[valid].long()
    return pairs.bincount(minlength=C * C).reshape(C, C)


def scores(confusion, count_absent=False):
    """IoU of every class, their mean and pixel accuracy of a confusion matrix, in percent.

    A class without any pixel, true or predicted, is left out of the mean, as in mmsegmentation;
    count_absent counts it as 0, as the authors' program does. Its own IoU is None.
    """
    confusion = confusion.double()
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    iou = 100 * hits / union  # nan where a class is absent
    miou = iou.nan_to_num().mean() if count_absent else iou.nanmean()
    return dict(miou=miou.item(), pixel_accuracy=(100 * hits.sum() / confusion.sum()).item(),
                iou=[None if value != value else value for value in iou.tolist()])


# ------------------------------------------------------------------------------------------------
# Prediction


def prompt_denoising(logits, pd, temperature):
    """Switch off the classes that are nowhere likely (PD, MaskCLIP): their logits become -100.

    A class stays if its highest softmax(logits / temperature) over the image reaches pd; the most
    likely class always does. logits: B×C×h×w; pd: 0…1 or None for all. In float32: VOC's PD of 1.0
    keeps the classes whose float32 probability rounds to 1.
    """
    if pd is None:
        return logits
    confidence = (logits.float() / temperature).softmax(1).amax((2, 3))  # B×C
    off = (confidence < pd) & (confidence < confidence.amax(1, keepdim=True))
    return logits.masked_fill(off[:, :, None, None], -100.0)


def label_map(logits, padded, view, size, chunk=32):
    """Class of every pixel: logits upsampled (bilinearly) to the network's input, then to the label.

    logits: B×C×h×w, covering `padded` (height, width) pixels, of which the top left `view` are the
    image, whose label has `size`. Returns int64 B×H×W. Goes through the classes in chunks, so that
    memory does not grow with their number.
    """
    best = None
    for first in range(0, logits.shape[1], chunk):
        part = F.interpolate(logits[:, first : first + chunk], padded, mode="bilinear")
        part = part[..., : view[0], : view[1]]
        if tuple(view) != tuple(size):
            part = F.interpolate(part, size, mode="bilinear")
        value, index = part.max(1)
        if best is None:
            best, labels = value, index
        else:
            labels = torch.where(value > best, index + first, labels)
            best = torch.maximum(value, best)
    return labels


class Segmenter:
    """Any checkpoint as a function from images to label maps, one per stage it knows.

    names: "maskclip" and "rectified" for a checkpoint of reclip.py. pd: prompt denoising for the
    rectified logits, the recipe's by default. slide: None, or (window, stride) in pixels.
    """

    def __init__(self, path, device, source=None, pd="recipe", slide=None, amp=False):
        self.student = load_checkpoint(path).get("kind") == "distill"
        if self.student:
            from distill import load_student  # which needs this module
            self.network = load_student(path, device)
        else:
            self.network = RectifiedCLIP(path, device, source)
        self.settings, self.classes = self.network.settings, self.network.classes
        self.pd = self.settings.pd if pd == "recipe" else pd
        self.slide, self.amp = slide, amp
        self.names = ["distilled"] if self.student else (
            ["maskclip"] + ["rectified"] * (self.settings.method != "maskclip"))

    def logits(self, views):
        """{name: logits} of uint8 views B×3×H×W, and the (height, width) that they cover."""
        if self.slide:
            return self.sliding_logits(views), views.shape[2:]
        return self.whole_logits(views)

    def whole_logits(self, views):
        """The same without windows; a student's grid covers just the view, a ViT's whole patches."""
        if self.student:
            return {"distilled": self.network.logits(views, self.amp)}, views.shape[2:]
        outputs = dict(zip(self.names, self.network.logits(views, self.amp)))
        h, w = outputs["maskclip"].shape[2:]
        return outputs, (h * self.network.patch, w * self.network.patch)

    def sliding_logits(self, views):
        """Mean logits of overlapping windows, at the resolution of the views."""
        (window, stride), (H, W) = self.slide, views.shape[2:]
        starts = lambda side: sorted({min(i, max(side - window, 0)) for i in range(0, side, stride)})
        sums, count = {}, torch.zeros(H, W, device=views.device)
        for top in starts(H):
            for left in starts(W):
                part = views[:, :, top : top + window, left : left + window]
                h, w = part.shape[2:]
                outputs, padded = self.whole_logits(part)
                for name, logits in outputs.items():
                    logits = F.interpolate(logits, padded, mode="bilinear")[..., :h, :w]
                    total = sums.setdefault(name, logits.new_zeros(*logits.shape[:2], H, W))
                    total[:, :, top : top + h, left : left + w] += logits
                count[top : top + h, left : left + w] += 1
        return {name: total / count for name, total in sums.items()}

    @torch.no_grad()
    def __call__(self, views, size):
        """{name: int64 B×H×W} for uint8 views B×3×h×w of images whose labels have `size` (H, W)."""
        outputs, padded = self.logits(views)
        if "rectified" in outputs:
            outputs["rectified"] = prompt_denoising(outputs["rectified"], self.pd,
                                                    self.settings.pd_temperature)
        return {name: label_map(logits, padded, views.shape[2:], size)
                for name, logits in outputs.items()}


# ------------------------------------------------------------------------------------------------
# Evaluation


class Labelled(torch.utils.data.Dataset):
    """(view, label) of a SegmentationData, for decoding in worker processes."""

    def __init__(self, data, scale):
        self.data, self.scale = data, scale

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return evaluation_view(self.data.image(i), self.scale), self.data.label(i)


def grouped_by_size(pairs, batch):
    """Collect (view, label) pairs into batches whose views, and whose labels, are of one size."""
    groups = {}
    for view, label in pairs:
        group = groups.setdefault((view.shape, label.shape), [])
        group.append((view, label))
        if len(group) == batch:
            yield [torch.stack(part) for part in zip(*group)]
            group.clear()
    yield from ([torch.stack(part) for part in zip(*group)] for group in groups.values() if group)


def evaluate(segment, data, scale, device, batch=16, workers=0):
    """{name: confusion matrix} over all labelled images of `data`, each counted once.

    segment: a Segmenter, or any function (views, size) → {name: int64 B×H×W}.
    """
    loader = torch.utils.data.DataLoader(Labelled(data, scale), batch_size=None, num_workers=workers)
    C, totals, progress = len(data.classes), {}, Progress("evaluate", len(data))
    for views, labels in grouped_by_size(loader, batch):
        labels = labels.to(device)
        for name, prediction in segment(views.to(device), labels.shape[1:]).items():
            matrix = confusion_matrix(prediction, labels, C)
            totals[name] = totals[name] + matrix if name in totals else matrix
        progress.advance(len(views))
    progress.close()
    return {name: total.cpu() for name, total in totals.items()}


def hypothesis_quality(hypothesis, data):
    """Precision and recall, in per cent, of image-level hypotheses against the labels of `data`.

    hypothesis: bool len(data)×C. Counts all (image, class) pairs alike.
    """
    truth = torch.zeros_like(hypothesis)
    for i in range(len(data)):
        present = data.label(i).unique()
        truth[i, present[present != VOID]] = True
    hits = (hypothesis & truth).sum().item()
    return 100 * hits / max(1, hypothesis.sum().item()), 100 * hits / max(1, truth.sum().item())


def table(results, classes):
    """A text table: mIoU and pixel accuracy, then the IoU of every class; one column per result."""
    width = max(18, *(len(name) for name in classes))
    cell = lambda value: "     –" if value is None else f"{value:6.2f}"
    rows = [("mIoU", [r["miou"] for r in results.values()]),
            ("pixel accuracy", [r["pixel_accuracy"] for r in results.values()])]
    rows += [(name, [r["iou"][name] for r in results.values()]) for name in classes]
    lines = [" " * width + "".join(f"{name:>12}" for name in results)]
    lines += [f"{name:{width}}" + "".join(f"{cell(v):>12}" for v in values) for name, values in rows]
    lines.insert(3, "-" * (width + 12 * len(results)))
    return "\n".join(lines)


def save_results(path, results):
    """Add results to a run's results.json: {"maskclip": {"miou": …}, "rectified": …}, in percent."""
    old = json.loads(path.read_text()) if path.exists() else {}
    write_text(path, json.dumps(old | results, indent=1, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------
# Figures

TITLES = {"maskclip": "MaskCLIP", "rectified": "rectified", "distilled": "distilled"}


@torch.no_grad()
def comparison(segment, data, scale, device, count=8):
    """Image, truth and each prediction for `count` images, evenly spaced, two in a row (Fig. 5); PIL.

    Predictions are shown where the truth has a class: elsewhere they are not scored either.
    """
    shown, present = [], set()
    for i in evenly(len(data), count):
        image, label = data.image(i), data.label(i)
        view = evaluation_view(image, scale)[None].to(device)
        predictions = segment(view, label.shape).values()
        maps = [label] + [p[0].cpu().where(label != VOID, VOID) for p in predictions]
        present |= set(torch.stack(maps).unique().tolist()) - {VOID}
        shown.append([image] + [overlay(image, m, data.palette) for m in maps])
    headings = ["image", "truth"] + [TITLES[name] for name in segment.names]
    rows = [a + b for a, b in zip(shown[::2], shown[1::2])] or shown
    return picture_sheet(rows, headings * (len(rows[0]) // len(headings)), present, data.classes,
                         data.palette, cell=150)


# ------------------------------------------------------------------------------------------------
# The command


def newest_checkpoint(folder=Path("runs")):
    """The checkpoint under a folder that was written last. Raises UserError if there is none."""
    found = [path for name in ("reclip.pt", "distill.pt") for path in folder.glob(f"*/{name}")]
    if not found:
        raise UserError(f"no checkpoint under {folder}/; run python reclip.py first, or name one with "
                        "--checkpoint")
    return max(found, key=lambda path: path.stat().st_mtime)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--checkpoint", type=Path, help="default: the newest under runs/")
    flag("--dataset", help="default: the one it was trained on")
    flag("--data-root", type=Path, help="default: where it was trained")
    flag("--split", choices=("val", "train"), default="val")
    flag("--clip", help="where the checkpoint's CLIP is, if not where it was")
    flag("--pd", type=float, help="prompt denoising of the rectified logits (default: the recipe's)")
    flag("--no-pd", action="store_true", help="no prompt denoising")
    flag("--slide", type=int, nargs=2, metavar=("WINDOW", "STRIDE"), help="sliding windows instead of "
         "whole images, in pixels of the resized image")
    flag("--count-absent", action="store_true", help="a class without a pixel counts as IoU 0, as in the "
         "authors' program, instead of not counting")
    flag("--hypotheses", action="store_true", help="precision and recall of the run's image-level "
         "hypotheses on the true classes of the training images")
    flag("--figures", action="store_true", help="write comparison.png beside the checkpoint")
    flag("--batch", type=int, default=16, help="images of one size that go through at once")
    flag("--workers", type=int)
    flag("--device")
    flag("--amp", action=argparse.BooleanOptionalAction)
    return parser.parse_args(argv)


@clean_exit
def main(argv=None):
    args = parse_arguments(argv)
    device = pick_device(args.device)
    path = args.checkpoint or newest_checkpoint()
    amp = device.type == "cuda" if args.amp is None else args.amp
    for option, values in (("batch", [args.batch]), ("slide", args.slide or [1])):
        if min(values) < 1:
            raise UserError(f"--{option} is {min(values)}; expected 1 or more")
    pd = None if args.no_pd else "recipe" if args.pd is None else args.pd
    segment = Segmenter(path, device, args.clip, pd, args.slide, amp)
    s = segment.settings
    dataset = args.dataset or s.dataset
    data = open_dataset(dataset, args.data_root or s.data_root, args.split,
                        segment.classes if dataset == "folder" else None, s.seed)
    if data.classes != segment.classes:
        raise UserError(f"{path} was made for other classes ({', '.join(segment.classes[:5])}, …) than "
                        f"{dataset}'s")
    if not data.has_labels:
        print(f"{dataset} has no labels: nothing to compare with")
        return
    workers = s.workers if args.workers is None else args.workers
    confusions = evaluate(segment, data, s.scale, device, args.batch, workers)
    results = {}
    for name, confusion in confusions.items():
        result = scores(confusion, args.count_absent)
        result["iou"] = dict(zip(segment.classes, result["iou"]))
        results[name] = result | dict(
            dataset=dataset, split=args.split, images=len(data), slide=args.slide,
            pd=segment.pd if name == "rectified" else None, count_absent=args.count_absent)
        if getattr(s, "use_ground_truth_void", False):  # a student that was not trained unsupervised
            results[name]["trained_with_ground_truth_void"] = True
    print(table(results, segment.classes))
    save_results(path.parent / "results.json", results)
    if args.hypotheses:
        images = open_dataset(dataset, args.data_root or s.data_root, "train",
                              segment.classes if dataset == "folder" else None, s.seed)
        network = segment.network
        hypothesis = make_hypotheses(images, network.model, network.rectifier.Wq, s,
                                     path.with_name("hypotheses.jsonl"), device)
        precision, recall = hypothesis_quality(hypothesis, images)
        print(f"hypotheses of {len(images)} training images: precision {precision:.1f} %, recall "
              f"{recall:.1f} %")
    if args.figures:
        figure = path.parent / "comparison.png"
        comparison(segment, data, s.scale, device).save(figure)
        print(f"→ {figure}")
    print(f"{path}: {len(data)} images of {dataset} {args.split} → {path.parent / 'results.json'}")
    return results


if __name__ == "__main__":
    main()
