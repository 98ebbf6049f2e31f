"""Finding and loading CLIP; images and texts made into the models' input."""

import hashlib
import os
import sys
from functools import lru_cache, partial
from pathlib import Path

import torch
from PIL import Image

from .model import build_model, convert_weights
from .simple_tokenizer import END, START, SimpleTokenizer
from .weights import TRUSTED_ARCHIVES, read_state_dict, read_weights  # noqa: F401

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)       # RGB, of pixels in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The 80 ImageNet templates of OpenAI's CLIP, in their order, then the five "in the scene".
TEMPLATES = [line.strip() for line in """
    a bad photo of a {}. | a photo of many {}. | a sculpture of a {}. |
    a photo of the hard to see {}. | a low resolution photo of the {}. | a rendering of a {}. |
    graffiti of a {}. | a bad photo of the {}. | a cropped photo of the {}. | a tattoo of a {}. |
    the embroidered {}. | a photo of a hard to see {}. | a bright photo of a {}. |
    a photo of a clean {}. | a photo of a dirty {}. | a dark photo of the {}. | a drawing of a {}. |
    a photo of my {}. | the plastic {}. | a photo of the cool {}. | a close-up photo of a {}. |
    a black and white photo of the {}. | a painting of the {}. | a painting of a {}. |
    a pixelated photo of the {}. | a sculpture of the {}. | a bright photo of the {}. |
    a cropped photo of a {}. | a plastic {}. | a photo of the dirty {}. |
    a jpeg corrupted photo of a {}. | a blurry photo of the {}. | a photo of the {}. |
    a good photo of the {}. | a rendering of the {}. | a {} in a video game. | a photo of one {}. |
    a doodle of a {}. | a close-up photo of the {}. | a photo of a {}. | the origami {}. |
    the {} in a video game. | a sketch of a {}. | a doodle of the {}. | a origami {}. |
    a low resolution photo of a {}. | the toy {}. | a rendition of the {}. |
    a photo of the clean {}. | a photo of a large {}. | a rendition of a {}. |
    a photo of a nice {}. | a photo of a weird {}. | a blurry photo of a {}. | a cartoon {}. |
    art of a {}. | a sketch of the {}. | a embroidered {}. | a pixelated photo of a {}. |
    itap of the {}. | a jpeg corrupted photo of the {}. | a good photo of a {}. | a plushie {}. |
    a photo of the nice {}. | a photo of the small {}. | a photo of the weird {}. |
    the cartoon {}. | art of the {}. | a drawing of the {}. | a photo of the large {}. |
    a black and white photo of a {}. | the plushie {}. | a dark photo of a {}. | itap of a {}. |
    graffiti of the {}. | a toy {}. | itap of my {}. | a photo of a cool {}. |
    a photo of a small {}. | a tattoo of the {}. | there is a {} in the scene. |
    there is the {} in the scene. | this is a {} in the scene. | this is the {} in the scene. |
    this is one {} in the scene.""".split("|")]

MODELS = {name: sha256 for sha256, name in TRUSTED_ARCHIVES.items()}
URL = "https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
CACHE = "~/.cache/clip"

TINY = "shapes-tiny"                                  # the demo's CLIP comes with the program
TINY_PATH = Path(__file__).with_name("shapes-tiny.pt.gz")


def available_models():
    """The names of OpenAI's nine models, all of which `load` knows."""
    return list(MODELS)


def load(name, device=None, jit=False, download_root=None, activation="quick_gelu", heads=None):
    """Returns (model, preprocess): a CLIP in eval mode, and what turns a PIL image into its input.

    name: one of `available_models()` (downloaded once, into download_root or ~/.cache/clip),
    "shapes-tiny" (the small CLIP of the demo), or the path of a file that `read_state_dict` reads.
    device: CUDA where there is one, else the CPU. Weights are float32, on CUDA as in OpenAI's
    package float16 (`model.float()` undoes that).
    activation: "quick_gelu", with which OpenAI's weights were trained, or "gelu".
    heads: attention heads of the image encoder, where it is no known model (see `build_model`).
    jit: only there because OpenAI's function has it; True is an error.
    `preprocess` gives a 3 x R x R float tensor, R being the model's resolution.
    ValueError: unknown name, not a CLIP file, nothing tells its heads. OSError: no download.
    """
    if jit:
        raise ValueError("jit=True is not offered: the model is always built from the code in "
                         "clip/model.py, so that it can be read and changed")
    path = find_weights(name, Path(download_root or CACHE).expanduser())
    state = read_state_dict(path)
    try:
        model = build_model(state, vision_heads=heads, activation=activation, guess_heads=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        convert_weights(model)
    return model.to(device), partial(preprocess, resolution=model.visual.input_resolution)


default_tokenizer = lru_cache(SimpleTokenizer)        # one a process: reading it takes a moment


def tokenize(texts, context_length=77, truncate=False):
    """Texts -> int32 token ids, T x context_length: start, text, end, zeros.

    texts: a string or a list of T strings. truncate: cut a text that is too long, keeping its end
    token; otherwise it is a RuntimeError, as in OpenAI's package.
    """
    texts = [texts] if isinstance(texts, str) else texts
    tokenizer = default_tokenizer()
    start, end = tokenizer.encoder[START], tokenizer.encoder[END]
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int)
    for row, text in zip(tokens, texts):
        ids = [start, *tokenizer.encode(text), end]
        if len(ids) > context_length:
            if not truncate:
                raise RuntimeError(f"the text {text!r} makes {len(ids)} tokens with start and end; "
                                   f"the context length is {context_length}")
            ids = ids[:context_length - 1] + [end]
        row[:len(ids)] = torch.tensor(ids)
    return tokens


def preprocess(image, resolution):
    """PIL image of any mode -> CLIP's input, a normalised float tensor 3 x resolution x resolution.

    Bicubic, the shorter side first, then the middle; torchvision's transforms give the same.
    """
    image = image.convert("RGB")             # palette images cannot be resized bicubically
    sides = [int(resolution * side / min(image.size)) for side in image.size]
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (round((side - resolution) / 2) for side in sides)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return normalise(pixels.view(1, resolution, resolution, 3).permute(0, 3, 1, 2))[0].contiguous()


def normalise(images):
    """uint8 B x 3 x H x W, values 0 to 255 -> CLIP's input, float32 B x 3 x H x W."""
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    return (images / 255 - mean) / std


def find_weights(name, cache):
    """The path of the weights for a model's name or a path, downloaded where necessary."""
    if name in MODELS:
        file = name.replace("/", "-").replace("@", "-") + ".pt"
        return download(URL.format(sha256=MODELS[name], file=file), cache / file, MODELS[name])
    if name == TINY:
        if not TINY_PATH.is_file():
            raise ValueError(f"{TINY_PATH} is missing; `python -m clip.pretrain` makes it")
        return TINY_PATH
    if os.path.isfile(name):
        return Path(name)
    raise ValueError(f"{str(name)!r} is neither a file nor a model; models: "
                     + ", ".join([*MODELS, TINY]))


def download(url, path, sha256):
    """Returns `path`, having made sure that it holds the file at `url` with that SHA-256.

    The file takes its place only when it is complete and its hash is right. OSError otherwise.
    """
    if path.is_file():
        if hash_file(path) == sha256:
            return path
        print(f"{path} does not have the right SHA-256; downloading it again", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} to {path}", file=sys.stderr)
        # It writes to a temporary file beside `path`, compares the hash, then renames.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=True)
    except Exception as error:
        raise OSError(f"cannot download {url} ({error}); "
                      f"you can fetch it elsewhere and put it at {path}") from error
    return path


def hash_file(path):
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
