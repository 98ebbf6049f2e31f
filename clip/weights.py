"""Reading a file of weights, of whatever kind, on the CPU.

A weights file can be somebody else's program: a pickle runs code when it is loaded, and so may a
TorchScript archive. So OpenAI's archives are opened only when their SHA-256 is known, safetensors
files are read as the data they are, and all else goes through torch.load with `weights_only=True`.
"""

import gzip
import hashlib
import io
import json
import re
import warnings
import zipfile
import zlib

import torch

# The SHA-256 of OpenAI's archives, which is part of their address as well; torch.jit.load opens
# these and no others.
TRUSTED_ARCHIVES = {
    "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762": "RN50",
    "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599": "RN101",
    "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd": "RN50x4",
    "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa": "RN50x16",
    "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c": "RN50x64",
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B/32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B/16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L/14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L/14@336px",
}

# How a file begins that holds no weights: what it is, and what to do instead of loading it.
OTHER_KINDS = (
    (b"version https://git-lfs", "a Git-LFS pointer, not the weights it stands for",
     "run `git lfs pull` where it comes from, or download the file itself"),
    (b"<", "a page of HTML or XML, most likely a site's message instead of the file",
     "open the address in a browser, log in if it asks for that, and download the file again"),
    (b"{", "a text file of JSON", "give the file of weights that lies beside it"),
)
NO_STATE_DICT = "not a state dict: expected a dictionary of names and tensors"
EXPECTED = "expected a file made by torch.save, a safetensors file or an archive of OpenAI's"
UNREADABLE = "not a readable file of PyTorch weights"
DAMAGED = f"{UNREADABLE}: damaged or cut short; copy or download it again"


def read_weights(path):
    """The dictionary in a file made by torch.save, in a safetensors file or OpenAI archive.

    All of these may be compressed by gzip; tensors are on the CPU. ValueError, one line that names
    the path, says what the file is and what to do: for every other kind of file, for damage, and
    for pickles that want code. OSError: no such file, or a folder.
    """
    with open(path, "rb") as file:
        try:
            if file.read(3) == b"\x1f\x8b\x08":
                file.seek(0)
                file = io.BytesIO(gzip.GzipFile(fileobj=file).read())
            content = read_open(file)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); copy it again") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {NO_STATE_DICT}, found {type(content).__name__}")
    return content


def read_open(file):
    """What an open, unpacked file of weights holds; how it begins tells its kind."""
    file.seek(0)
    head = file.read(1024)
    file.seek(0)
    if head[8:9] == b"{" and 0 in head[:8]:                  # first: the length may be any bytes
        return read_safetensors(file)
    if head.startswith(b"PK\x03\x04"):
        return read_zip(file)
    if head.startswith(b"\x80"):                             # a pickle: torch.save until 2020
        return read_torch(file)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for mark, kind, remedy in OTHER_KINDS:
        if start.startswith(mark):
            raise ValueError(f"{kind}; {remedy}")
    if not head:
        raise ValueError(f"an empty file; {EXPECTED}")
    if min(head) >= 9:                                       # bytes below are in no text
        said = ascii(head[:40].decode(errors="replace"))
        raise ValueError(f"a text file that begins with {said}; {EXPECTED}")
    raise ValueError(f"of no known kind (its first bytes: {head[:4].hex(' ')}); {EXPECTED}")


def read_zip(file):
    """What a zip archive holds: a TorchScript archive of OpenAI's, or a file made by torch.save."""
    try:
        archive = zipfile.ZipFile(file)
        names = [name.partition("/")[2] for name in archive.namelist()]
        if archive.testzip():                                # torch.load compares no checksums
            raise ValueError
    except Exception:                                        # damaged files fail in many ways
        raise ValueError(DAMAGED) from None
    if "data.pkl" not in names:
        raise ValueError(f"a zip archive of {len(names)} files, none of them weights in PyTorch's "
                         "form; unpack it and give the file of weights in it")
    file.seek(0)
    if "constants.pkl" not in names:                         # torch.save writes no constants
        return read_torch(file)
    sha256 = hashlib.sha256(file.read()).hexdigest()
    if sha256 not in TRUSTED_ARCHIVES:
        raise ValueError(f"a TorchScript archive that is none of OpenAI's (SHA-256 {sha256}); "
                         "loading it could run code: save its state_dict() with torch.save instead")
    file.seek(0)
    return dict(torch.jit.load(file, map_location="cpu").state_dict())


def read_torch(file):
    """torch.load that runs nothing; its own messages advise what is unsafe: none is passed on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:                               # damaged files fail in many ways
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{UNREADABLE}: beside or instead of tensors it holds Python objects ({wanted[1]}), "
            "which are not made, since that can run code; where it comes from, save "
            "model.state_dict() alone" if wanted else DAMAGED) from None


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(file):
    """{name: tensor} of an open safetensors file.

    Eight bytes hold the length of a JSON header, {name: {dtype, shape, data_offsets: [start, end]}}
    and `__metadata__`, which is left out; the tensors' bytes follow, without a gap or an overlap.
    ValueError where any of that is not so.
    """
    size = file.seek(0, io.SEEK_END) - 8
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    tensors, position = {}, 0
    try:
        if length > min(size, 100_000_000):                  # the format's own limit
            raise ValueError(f"a header of {length} bytes, where {size} are left")
        size -= length
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if kind not in DTYPES:
                raise ValueError(f"{name!r} is of type {kind!r}, not {', '.join(DTYPES)}")
            if start != position or not start <= end <= size:
                raise ValueError(f"{name!r} at bytes {start} to {end}, where {position} to {size} "
                                 "are left")
            # Read into memory of its own: in the file, numbers need not start at even addresses.
            content = bytearray(file.read(end - start))
            flat = torch.frombuffer(content, dtype=DTYPES[kind]) if content else torch.empty(0)
            tensors[name], position = flat.to(DTYPES[kind]).view(shape), end
            if list(tensors[name].shape) != shape:           # view fills in a -1
                raise ValueError(f"{name!r} of shape {shape}")
        if position != size:
            raise ValueError(f"{size - position} bytes of no tensor")
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]              # of torch's, several lines
        raise ValueError(f"a safetensors file whose header does not fit it ({reason}); copy or "
                         "download it again, or save it anew") from None
    return tensors


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


def read_state_dict(path):
    """The tensors in a weights file by name, on the CPU.

    They may lie under "state_dict" or "model", and their names behind prefixes of DataParallel,
    torch.compile or Lightning; Hugging Face's CLIPModel gets OpenAI's names. ValueError: as
    `read_weights`, or what is there are not names and tensors.
    """
    content = read_weights(path)
    for key in ("state_dict", "model_state_dict", "model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    if not all(isinstance(name, str) and torch.is_tensor(value) for name, value in content.items()):
        raise ValueError(f"{path}: {NO_STATE_DICT}")
    state = {WRAPPERS.sub("", name): value for name, value in content.items()}
    if len(state) < len(content):
        raise ValueError(f"{path}: not the state dict of one model: names are there twice, with "
                         "and without a prefix")
    if any(name.startswith("vision_model.") for name in state):
        state = from_hugging_face(state)
    return state


def from_hugging_face(state):
    """A state dict of Hugging Face's CLIPModel -> OpenAI's names; queries, keys, values joined.

    What does not fit together is left as it is, for `build_model` to name.
    """
    converted = {}
    for name, value in state.items():
        for theirs, ours in HUGGING_FACE.items():
            name = name.replace(theirs, ours)
        if name in ("visual.proj", "text_projection") and value.ndim == 2:
            value = value.t().contiguous()                   # there it multiplies from the left
        converted[name] = value
    for name in [name for name in converted if ".q_proj." in name]:
        parts = [converted.get(name.replace(".q_", f".{letter}_")) for letter in "qkv"]
        if all(part is not None and part.ndim and part.shape == parts[0].shape for part in parts):
            converted[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return {name: value for name, value in converted.items()
            if not re.search(r"\.[qkv]_proj\.", name)}
