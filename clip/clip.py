"""Finding and loading CLIP; images and texts made into the models' input."""

import sys
from functools import lru_cache, partial
from pathlib import Path

import torch

from .model import build_model, convert_weights
from .simple_tokenizer import END, START, SimpleTokenizer
from .weights import MODELS, read_config, read_state_dict, weight_files

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)       # RGB, of pixels in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The 80 ImageNet templates of OpenAI's CLIP, in their order, then the five "in the scene".
TEMPLATES = [" ".join(line.split()) for line in """
    a bad photo of a {}. | a photo of many {}. | a sculpture of a {}. | a photo of the hard to see
    {}. | a low resolution photo of the {}. | a rendering of a {}. | graffiti of a {}. | a bad
    photo of the {}. | a cropped photo of the {}. | a tattoo of a {}. | the embroidered {}. | a
    photo of a hard to see {}. | a bright photo of a {}. | a photo of a clean {}. | a photo of a
    dirty {}. | a dark photo of the {}. | a drawing of a {}. | a photo of my {}. | the plastic {}.
    | a photo of the cool {}. | a close-up photo of a {}. | a black and white photo of the {}. | a
    painting of the {}. | a painting of a {}. | a pixelated photo of the {}. | a sculpture of the
    {}. | a bright photo of the {}. | a cropped photo of a {}. | a plastic {}. | a photo of the
    dirty {}. | a jpeg corrupted photo of a {}. | a blurry photo of the {}. | a photo of the {}. |
    a good photo of the {}. | a rendering of the {}. | a {} in a video game. | a photo of one {}.
    | a doodle of a {}. | a close-up photo of the {}. | a photo of a {}. | the origami {}. | the
    {} in a video game. | a sketch of a {}. | a doodle of the {}. | a origami {}. | a low
    resolution photo of a {}. | the toy {}. | a rendition of the {}. | a photo of the clean {}. |
    a photo of a large {}. | a rendition of a {}. | a photo of a nice {}. | a photo of a weird {}.
    | a blurry photo of a {}. | a cartoon {}. | art of a {}. | a sketch of the {}. | a embroidered
    {}. | a pixelated photo of a {}. | itap of the {}. | a jpeg corrupted photo of the {}. | a
    good photo of a {}. | a plushie {}. | a photo of the nice {}. | a photo of the small {}. | a
    photo of the weird {}. | the cartoon {}. | art of the {}. | a drawing of the {}. | a photo of
    the large {}. | a black and white photo of a {}. | the plushie {}. | a dark photo of a {}. |
    itap of a {}. | graffiti of the {}. | a toy {}. | itap of my {}. | a photo of a cool {}. | a
    photo of a small {}. | a tattoo of the {}. | there is a {} in the scene. | there is the {} in
    the scene. | this is a {} in the scene. | this is the {} in the scene. | this is one {} in the
    scene.""".split("|")]

URL = "https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
CACHE = "~/.cache/clip"

TINY = "shapes-tiny"                                  # the demo's CLIP comes with the program
TINY_PATH = Path(__file__).with_name("shapes-tiny.pt.gz")


def available_models():
    """The names of OpenAI's nine models, all of which `load` knows."""
    return list(MODELS)


def load(name, device=None, jit=False, download_root=None, activation=None, heads=None):
    """Returns (model, preprocess): a CLIP in eval mode, and what turns a PIL image into its input.

    name: one of `available_models()` (downloaded once, into download_root or ~/.cache/clip),
    "shapes-tiny" (the demo's), or the path of a file or folder that `read_state_dict` reads.
    device: CUDA where there is one, else the CPU. Weights are float32, on CUDA as in OpenAI's
    package float16 (`model.float()` undoes that). jit: OpenAI's; True is an error.
    activation ("quick_gelu" or "gelu"), heads (of the image encoder): None for what a configuration
    beside the weights says, else "quick_gelu" and as `build_model` has it; `model.activation` tells
    what it became. `preprocess` gives a 3 x R x R float tensor, R being the model's resolution.
    ValueError: unknown name, not a CLIP, nothing tells its heads, its configuration says something
    else than what is given or is of another CLIP. OSError: no file, no download.
    """
    if jit:
        raise ValueError("jit=True is not offered: the model is always built from clip/model.py")
    path = find_weights(name, download_root or CACHE)
    state = read_state_dict(path)
    own = name in (*MODELS, TINY)            # what lies beside these is not theirs
    config, said = (None, {}) if own else read_config(weight_files(path)[0])
    try:
        model = build_model(state, heads or said.get("heads"), said.get("text_heads"),
                            activation or said.get("activation") or "quick_gelu",
                            guess_heads=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    given = dict(activation=activation, heads=heads, width=len(model.visual.conv1.weight))
    for key, value in given.items():
        if None not in (value, said.get(key)) and value != said[key]:
            raise ValueError(f"{path}: {key} {value}, but {config} says {said[key]}")
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
    """PIL image of any mode -> its middle as CLIP's input, 3 x resolution x resolution."""
    import torchvision.transforms.functional as T     # its import takes seconds
    image = T.resize(image.convert("RGB"), resolution, T.InterpolationMode.BICUBIC)
    image = T.center_crop(image, [resolution, resolution])
    return T.normalize(T.to_tensor(image), CLIP_MEAN, CLIP_STD)


def find_weights(name, cache):
    """The path of the weights for a model's name or a path, downloaded where necessary."""
    if name in MODELS:
        file = name.replace("/", "-").replace("@", "-") + ".pt"
        url = URL.format(sha256=MODELS[name], file=file)
        try:
            return download(url, Path(cache).expanduser() / file, MODELS[name])
        except RuntimeError:
            raise OSError(f"no home folder for {cache}/{file}: set HOME") from None
    if name == TINY:
        return TINY_PATH
    if not (path := Path(name).expanduser()).exists():
        raise ValueError(f"{str(name)!r} is neither a file, a folder nor a model; models: "
                         + ", ".join([*MODELS, TINY]))
    return path


def download(url, path, sha256):
    """Returns `path`, where the file at `url` is put, unless one is there.

    It takes its place only when it is complete and its SHA-256 is right. OSError otherwise.
    """
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} to {path}", file=sys.stderr)
        # It writes to a temporary file beside `path`, compares the hash, then renames.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=True)
    except Exception as error:
        raise OSError(f"cannot download {url} ({error}); "
                      f"you can fetch it elsewhere and put it at {path}") from error
    return path
