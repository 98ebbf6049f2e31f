"""What the tables of both papers report, and the runs of reclip.py and distill.py that make it.

Numbers are the papers', mIoU in per cent where nothing else is said; none of them was measured
here. tables.py makes ours and puts them beside these. "Conference paper": ReCLIP (CVPR 2024);
otherwise a table is one of ReCLIP++ (2024).
"""

# Runs of reclip.py: what they change of plain ReCLIP++; what follows from that, recipe() knows.
RECTIFIED = {
    "maskclip": "--method maskclip",
    "reclip": "--method reclip",
    "reclip++": "",
    "reclip-decoder": "--method reclip --decoder --hypothesis global",
    "reclip-decoder-crops": "--method reclip --decoder --hypothesis crops",
    "reclip-reference": "--method reclip --bias reference",
    "reclip-reference-query": "--method reclip --bias reference --learn-query",
    "reclip-add": "--method reclip --add",
    "query": "--learn-query",
    "add": "--add",
    "tune-encoder": "--tune-encoder --views 0",
    "global": "--hypothesis global",
    "no-bias": "--bias none",
    "no-decoder": "--no-decoder",
}
# Runs of distill.py: their teacher, and what they change of the recipe.
DISTILLED = {"maskclip+": ("maskclip", "")} | {
    f"{teacher}-{name}": (teacher, flags) for teacher in ("reclip", "reclip++")
    for name, flags in (("distilled", ""), ("mask", "--losses mask"),
                        ("mask-feature", "--losses mask,feature"), ("learned", "--head learned"),
                        ("query", "--head query"), ("query-bias", "--head query+bias"))}
# Title; data sets of the papers' numbers; the row that the others are compared with; rows: what it
# is, run and, unless mIoU, measure, the papers' numbers.
TABLES = (
    ("Tables I and II: results", "VOC Context ADE Cityscapes Stuff", 0, (
        ("MaskCLIP", "maskclip", "49.5 21.7 9.5 19.8 13.6"),
        ("MaskCLIP+", "maskclip+", "70.0 31.1 12.2 25.2 19.5"),
        ("ReCLIP, rectified", "reclip", "58.5 25.8 11.1 16.2 14.6"),
        ("ReCLIP, distilled", "reclip-distilled", "75.8 33.8 14.3 19.9 20.3"),
        ("ReCLIP++, rectified", "reclip++", "73.5 34.0 13.5 21.7 20.9"),
        ("ReCLIP++, distilled", "reclip++-distilled", "79.2 34.5 14.5 26.9 23.2"))),
    ("Table I: linear probes, which are trained with ground truth", "VOC Cityscapes Stuff", 3, (
        ("MaskCLIP", "maskclip linear_probe", "– – –"),
        ("MaskCLIP+", "maskclip+ linear_probe", "– – –"),
        ("ReCLIP, rectified", "reclip linear_probe", "– – –"),
        ("ReCLIP, distilled", "reclip-distilled linear_probe", "76.1 49.3 26.2"),
        ("ReCLIP++, rectified", "reclip++ linear_probe", "– – –"),
        ("ReCLIP++, distilled", "reclip++-distilled linear_probe", "80.3 54.1 29.5"))),
    ("Table III: from ReCLIP to ReCLIP++, rectified", "VOC Context", 0, (
        ("ReCLIP", "reclip", "58.5 25.8"),
        ("+ decoder", "reclip-decoder", "68.6 27.8"),
        ("+ hypotheses of crops", "reclip-decoder-crops", "70.4 33.1"),
        ("+ independent biases (ReCLIP++)", "reclip++", "73.5 34.0"))),
    ("Table IV: should the Query be learned?", "VOC Context", -1, (
        ("learned", "query", "71.6 32.1"),
        ("fixed (ReCLIP++)", "reclip++", "73.5 34.0"))),
    ("Table V: subtract or add the bias", "VOC Context", -1, (
        ("add", "add", "72.4 32.9"),
        ("subtract (ReCLIP++)", "reclip++", "73.5 34.0"))),
    ("Table VI: fine-tuning CLIP's image encoder", "VOC Context", -1, (
        ("fine-tuned", "tune-encoder", "1.2 0.4"),
        ("frozen (ReCLIP++)", "reclip++", "73.5 34.0"))),
    ("Table VII: class-preference score", "Context", 0, (
        ("MaskCLIP", "maskclip class_preference", "0.29"),
        ("MaskCLIP+", "maskclip+ class_preference", "0.31"),
        ("ReCLIP, rectified", "reclip class_preference", "0.33"),
        ("ReCLIP++, rectified", "reclip++ class_preference", "0.37"))),
    ("Table VII: space-preference score", "VOC", 0, (
        ("MaskCLIP", "maskclip space_preference", "-0.50"),
        ("MaskCLIP+", "maskclip+ space_preference", "-0.48"),
        ("ReCLIP, rectified", "reclip space_preference", "-0.41"),
        ("ReCLIP++, rectified", "reclip++ space_preference", "-0.29"))),
    ("Table VIII: losses of distillation, ReCLIP++", "VOC", -1, (
        ("mask", "reclip++-mask", "77.7"),
        ("mask, feature", "reclip++-mask-feature", "78.9"),
        ("mask, feature, text", "reclip++-distilled", "79.2"))),
    ("Table IX: the student's head, ReCLIP++", "VOC", -1, (
        ("DeepLab's own, learned", "reclip++-learned", "76.2"),
        ("Query", "reclip++-query", "48.3"),
        ("Query, bias", "reclip++-query-bias", "50.6"),
        ("Query, bias, decoder", "reclip++-distilled", "79.2"))),
    ("Conference paper, Table 3: should the Query be learned?", "VOC Context ADE", -1, (
        ("learned", "reclip-reference-query", "56.7 23.7 9.4"),
        ("fixed (ReCLIP without position)", "reclip-reference", "56.7 24.4 10.5"))),
    ("Conference paper, Table 4: parts of the bias", "VOC Context ADE", 0, (
        ("Query (MaskCLIP)", "maskclip", "49.5 21.7 9.5"),
        ("Query, Reference", "reclip-reference", "56.7 24.4 10.5"),
        ("Query, Reference, position (ReCLIP)", "reclip", "58.5 25.8 11.1"))),
    ("Conference paper, Table 5: subtract or add the bias", "VOC Context", -1, (
        ("neither (MaskCLIP)", "maskclip", "49.5 21.7"),
        ("add", "reclip-add", "57.8 24.9"),
        ("subtract (ReCLIP)", "reclip", "58.5 25.8"))),
    ("Conference paper, Table 6: the student's head, ReCLIP", "VOC", 2, (
        ("DeepLab's own, learned", "reclip-learned", "73.8"),
        ("Query", "reclip-query", "74.1"),
        ("Query, Reference", "reclip-distilled", "75.4"),
        ("Query, Reference, position", "reclip-query-bias", "75.0"))),
    ("Conference paper, Table 7: losses of distillation, ReCLIP", "VOC", -1, (
        ("mask", "reclip-mask", "73.0"),
        ("mask, feature", "reclip-mask-feature", "74.1"),
        ("mask, feature, text", "reclip-distilled", "75.4"))),
    ("Not in the papers' tables, rectified", "–", None, (
        ("ReCLIP++", "reclip++", "–"),
        ("ReCLIP++, no prompt denoising", "reclip++ no_pd", "–"),
        ("no bias subtracted", "no-bias", "–"),
        ("no decoder", "no-decoder", "–"))),
)
# Other last blocks: as a mask, on VOC, Context, ADE and Cityscapes, with sliding windows and lists
# of synonyms, by the papers of ClearCLIP (the first three), SCLIP and NACLIP.
BLOCKS = {"program": "74.9 26.4 9.8 12.6", "value": "61.4 28.3 13.6 24.7",
          "clearclip": "80.9 35.9 16.7 30.0", "sclip": "80.4 34.2 16.1 32.2",
          "naclip": "79.7 35.2 17.4 35.5", "naclip pamr": "83.0 38.4 19.1 38.3"}
STAGES = {"masks": "maskclip", "rectified": "reclip++", "distilled": "reclip++-distilled"}
SWEEPS = {  # of Fig. 3, beside the recipe's own values
    "shapes": dict(threshold=(0.0, 0.24, 0.36, 0.48), crop_ratio=(1 / 4, 1 / 3, 2 / 3, 1.0)),
    "others": dict(threshold=(0.0, 0.035, 0.07, 0.14), crop_ratio=(1 / 12, 1 / 8, 1 / 4, 1 / 3)),
}
