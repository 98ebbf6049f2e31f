"""Reading weights, of whatever kind, on the CPU, and the configuration that lies beside them.

A weights file can be somebody else's program: a pickle runs code when it is loaded, and so may a
TorchScript archive. So OpenAI's archives are opened only when their SHA-256 is known, safetensors
files are read as the data they are, and all else goes through torch.load with `weights_only=True`.
"""

import gzip
import hashlib
import io
import json
import re
from pathlib import Path

import torch

# OpenAI's models and the SHA-256 of their archives, which is part of their address as well.
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
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}             # safetensors' names

# What programs put before every name (DataParallel, torch.compile, Lightning, wrappers), and
# open_clip before those of a text encoder that it keeps as a module of its own.
WRAPPERS = re.compile(r"^((module|_orig_mod|model|net|clip|text)\.)+|(?<=\.)_orig_mod\.")
HUGGING_FACE = {  # parts of the names of its CLIPModel -> OpenAI's
    "vision_model.": "visual.", "text_model.": "", "encoder.layers": "transformer.resblocks",
    "embeddings.": "", "position_embedding.weight": "positional_embedding",
    "patch_embedding": "conv1", "self_attn": "attn", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "final_layer_norm": "ln_final",
    "layer_norm": "ln_", "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}
USUAL = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
         "open_clip_pytorch_model.bin")                      # in folders of hubs, best first
ENDINGS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gz"}


def read_weights(path):
    """The dictionary in a file made by torch.save, in a safetensors file or OpenAI archive.

    All of these may be compressed by gzip; tensors are on the CPU. ValueError, one line that names
    the path: every other kind of file, damage, pickles that want code. OSError: no such file.
    """
    content = Path(path).read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        weights = unpacked(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # damaged files fail in many ways; torch.load's advice is unsafe
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(f"{path}: " + (
            f"it holds Python objects ({wanted[1]}), which are not made, since that can run code; "
            "save model.state_dict() alone" if wanted else "of another kind, damaged or cut short; "
            "expected a file made by torch.save, a safetensors file or an archive of OpenAI's"
        )) from None
    if not isinstance(weights, dict):
        raise ValueError(f"{path}: expected names and tensors, found a {type(weights).__name__}")
    return weights


def unpacked(content):
    """What a file's bytes hold; how they begin tells the kind. ValueErrors of ours: any other."""
    if content[4:9] == b"\0\0\0\0{":                         # a header of less than 4 GB
        return read_safetensors(content)
    if content.startswith(b"version https://git-lfs") or content[:99].lstrip().startswith(b"<"):
        raise ValueError("a web page or a Git-LFS pointer instead of weights; download the file "
                         "itself")
    if content.startswith(b"PK") and b"/constants.pkl" in content:       # torch.save writes none
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 not in MODELS.values():
            raise ValueError(f"a TorchScript archive that is none of OpenAI's (SHA-256 {sha256}); "
                             "loading it could run code: torch.save its state_dict() instead")
        return dict(torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict())
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def read_safetensors(content):
    """{name: tensor} of the bytes of a safetensors file.

    Eight bytes hold the length of a JSON header, {name: {dtype, shape, data_offsets: [start, end]}}
    and `__metadata__`; the tensors' bytes follow. ValueError: an unknown type; any error: damage.
    """
    body = 8 + int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8:body]), {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        kind, (start, end) = entry["dtype"], entry["data_offsets"]
        if kind not in DTYPES:
            raise ValueError(f"{name} is of type {kind}; those read are {', '.join(DTYPES)}")
        # A copy: in the file, numbers need not start at even addresses.
        numbers, kind = bytearray(content[body + start:body + end]), DTYPES[kind]
        flat = torch.frombuffer(numbers, dtype=kind) if numbers else torch.empty(0, dtype=kind)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def weight_files(path):
    """The files that together hold a model, from the path of one or of a folder.

    ValueError: one of several files, or a folder that does not tell which file to take.
    """
    if not path.is_dir():
        part = re.search(r"-\d+-of-0*(\d+)\.\w+$", path.name)
        if part and int(part[1]) > 1:
            raise ValueError(f"{path}: one of {part[1]} files of a model; give the folder instead")
        return [path]
    for name in USUAL:
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        parts = read_json(index).get("weight_map") if index.is_file() else None
        if parts:
            return [path / Path(part).name for part in sorted(set(parts.values()))]
    names = sorted(file.name for file in path.iterdir())
    found = [path / name for name in names if Path(name).suffix in ENDINGS]
    if len(found) != 1:
        raise ValueError(f"{path}: expected {' or '.join(USUAL[:2])} in this folder, or one other "
                         f"file of weights; found {', '.join(names[:5]) or 'nothing'}")
    return found


def read_state_dict(path):
    """The tensors of a model by name, on the CPU, from a file or a folder.

    They may lie under "state_dict" or "model", and their names behind prefixes of wrappers; Hugging
    Face's CLIPModel gets OpenAI's names. ValueError: as `read_weights` and `weight_files`, or what
    is there are not names and tensors.
    """
    content = {}
    for file in weight_files(Path(path)):
        content |= read_weights(file)
    for key in ("state_dict", "model_state_dict", "model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    if not all(isinstance(name, str) and torch.is_tensor(value) for name, value in content.items()):
        raise ValueError(f"{path}: expected a dictionary of names and tensors alone")
    state = {WRAPPERS.sub("", name): value for name, value in content.items()}
    if len(state) < len(content):
        raise ValueError(f"{path}: names are there twice, with and without a prefix")
    return from_hugging_face(state) if any("vision_model." in name for name in state) else state


def from_hugging_face(state):
    """A state dict of Hugging Face's CLIPModel -> OpenAI's names; queries, keys, values joined.

    What lacks a part or has one of another shape comes out misshapen, for `build_model` to name.
    """
    converted = {}
    for name, value in state.items():
        for theirs, ours in HUGGING_FACE.items():
            name = name.replace(theirs, ours)
        transposed = name in ("visual.proj", "text_projection")   # they multiply from the left
        converted[name] = value.t().contiguous() if transposed else value
    for name in [name for name in converted if ".q_proj." in name]:
        parts = [converted.pop(name.replace(".q_", f".{letter}_"), torch.empty(0))
                 for letter in "qkv"]
        converted[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return converted


def read_json(path):
    """The dictionary in a JSON file; ValueError where there is none."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected a JSON object ({error})") from None


def read_config(path):
    """(path of the configuration beside a file of weights, what it says), or (None, {}).

    What no shape tells: activation, heads (of the image encoder) and text_heads; and width (of the
    image encoder), which shows whether it is of these weights at all. As Hugging Face or open_clip
    write it; ValueError: not JSON.
    """
    names = ["config.json", "open_clip_config.json"]
    if path.name.startswith("open_clip"):
        names.reverse()
    for file in map(path.with_name, names):
        config = read_json(file) if file.is_file() else {}
        if config.get("vision_config"):
            vision, text = config["vision_config"], config.get("text_config") or {}
            return file, dict(
                activation=vision.get("hidden_act"), heads=vision.get("num_attention_heads"),
                text_heads=text.get("num_attention_heads"), width=vision.get("hidden_size"))
        model = config.get("model_cfg", config)
        if "vision_cfg" in model:
            vision = model["vision_cfg"]                     # a list of layers: a ResNet
            width = None if isinstance(vision.get("layers"), list) else vision.get("width")
            return file, dict(
                activation="quick_gelu" if model.get("quick_gelu") else "gelu", width=width,
                heads=width and width // vision.get("head_width", 64),
                text_heads=model.get("text_cfg", {}).get("heads"))
    return None, {}
