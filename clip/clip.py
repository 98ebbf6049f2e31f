"""Finding, checking and loading CLIP weights; images and texts made into the models' input.

A weights file can be somebody else's program: a pickle runs code when it is loaded, and so may a
TorchScript archive. So OpenAI's archives are opened only when their SHA-256 is known, and all else
is read with `weights_only=True`.
"""

import gzip
import hashlib
import io
import os
import sys
import zipfile
from functools import lru_cache
from pathlib import Path

import torch
from torchvision import transforms

from .model import build_model, convert_weights
from .simple_tokenizer import END, START, SimpleTokenizer

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
    a photo of a small {}. | a tattoo of the {}. |
    there is a {} in the scene. | there is the {} in the scene. | this is a {} in the scene. |
    this is the {} in the scene. | this is one {} in the scene.""".split("|")]

# OpenAI's models and the SHA-256 of their archives, which is part of the address as well.
MODELS = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
URL = "https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
TRUSTED_ARCHIVES = {sha256: name for name, sha256 in MODELS.items()}  # torch.jit.load opens these
CACHE = "~/.cache/clip"

TINY = "shapes-tiny"                                  # the demo's CLIP comes with the program
TINY_PATH = Path(__file__).with_name("shapes-tiny.pt.gz")


def available_models():
    """The names of OpenAI's nine models, all of which `load` knows."""
    return list(MODELS)


def load(name, device=None, jit=False, download_root=None, activation="quick_gelu"):
    """Returns (model, preprocess): a CLIP in eval mode, and what turns a PIL image into its input.

    name: one of `available_models()` (downloaded once, into download_root or ~/.cache/clip),
    "shapes-tiny" (the small CLIP of the demo), or the path of a file: an archive of OpenAI's, or a
    state dict saved by torch.save, itself or under the key "state_dict", gzip-compressed or not.
    device: CUDA where there is one, else the CPU. Weights are float32, on CUDA as in OpenAI's
    package float16 (`model.float()` undoes that).
    activation: "quick_gelu", with which OpenAI's weights were trained, or "gelu".
    jit: only there because OpenAI's function has it; True is an error.

    `preprocess` gives a 3 x R x R float tensor, R being the model's resolution.
    ValueError: unknown name, not a CLIP file, an unknown TorchScript archive. OSError: no download.
    """
    if jit:
        raise ValueError("jit=True is not offered: the model is always built from the code in "
                         "clip/model.py, so that it can be read and changed")
    path = find_weights(name, Path(download_root or CACHE).expanduser())
    try:
        model = build_model(read_state_dict(path), activation=activation)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        convert_weights(model)
    return model.to(device), make_preprocess(model.visual.input_resolution)


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


@lru_cache
def default_tokenizer():
    """The one tokenizer of the process; reading its vocabulary takes a moment."""
    return SimpleTokenizer()


def make_preprocess(resolution):
    """PIL image of any mode -> CLIP's input, a normalised float tensor 3 x resolution x resolution.

    The conversion to RGB comes first, since palette images cannot be resized bicubically.
    """
    return transforms.Compose([
        to_rgb,
        transforms.Resize(resolution, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(resolution),
        transforms.ToTensor(),
        transforms.Normalize(CLIP_MEAN, CLIP_STD),
    ])


def to_rgb(image):
    """PIL image of any mode -> mode RGB."""
    return image.convert("RGB")


# ---- Files -------------------------------------------------------------------------------------


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
    with open(path, "rb") as file:
        return sha256_of(file)


def sha256_of(file):
    """SHA-256 of what is left to read in an open file, in hexadecimal."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def read_state_dict(path):
    """The state dict in a weights file, on the CPU. ValueError where there is none."""
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            file = io.BytesIO(unzip(path))
        if is_torchscript(file):
            return read_archive(file)
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:           # damaged files fail in many ways
            reason = str(error).strip().partition("\n")[0]
            raise ValueError("not a readable file of PyTorch weights "
                             f"({type(error).__name__}: {reason})") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
            isinstance(name, str) and torch.is_tensor(value) for name, value in content.items()):
        raise ValueError("not a state dict: expected a dictionary of names and tensors")
    return content


def unzip(path):
    """The content of a gzip file as bytes."""
    try:
        with gzip.open(path) as file:
            return file.read()
    except Exception as error:
        raise ValueError(f"damaged gzip file ({error})") from error


def is_torchscript(file):
    """Whether an open file is a TorchScript archive; torch.save writes no constants."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def read_archive(file):
    """The state dict of a TorchScript archive whose SHA-256 is in TRUSTED_ARCHIVES."""
    file.seek(0)
    sha256 = sha256_of(file)
    if sha256 not in TRUSTED_ARCHIVES:
        raise ValueError(f"a TorchScript archive that is none of OpenAI's (SHA-256 {sha256}); "
                         "loading it could run code: save its state_dict() with torch.save instead")
    file.seek(0)
    return torch.jit.load(file, map_location="cpu").state_dict()
