"""Files and what goes wrong with them: what every script needs before there is a data set.

1 command lines and mistakes, 2 reading one picture, label or array, 3 folders, 4 drawing,
5 writing, 6 reading ahead in other processes. Nothing here knows of data sets or of CLIP.

Images are uint8 tensors 3×H×W (RGB), label maps int64 tensors H×W.
"""

import argparse
import collections
import contextlib
import datetime
import errno
import functools
import hashlib
import io
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

VOID = 255  # in every label map: no class here; never counted

# ------------------------------------------------------------------------------------------------
# 1. Command lines and mistakes


class UserError(Exception):
    """A mistake of the user's: the message says what is wrong, where, and what to do instead.

    `clean_exit` turns it into one line on stderr and exit code 2.
    """


class Parser(argparse.ArgumentParser):
    """An argument parser whose every complaint is a UserError, one line."""

    def error(self, message):
        # "argument --epochs: is 0; …", from the types below, reads "--epochs is 0; …"
        raise UserError(re.sub(r"^argument (\S+): is ", r"\1 is ", message))


def _number(kind, fits, expected):
    """An argparse type: kind(text), where it fits; otherwise the message says what is expected."""

    def parse(text):
        with contextlib.suppress(ValueError):
            text = kind(text)
            if fits(text):
                return text
        raise argparse.ArgumentTypeError(f"is {text}; expected {expected}")

    return parse


count = _number(int, lambda value: value >= 1, "1 or more")
natural = _number(int, lambda value: value >= 0, "0 or more")
share = _number(float, lambda value: 0 <= value <= 1, "0 to 1")
positive = _number(float, lambda value: 0 < value < float("inf"), "more than 0")
seed = _number(int, lambda value: -1 << 63 <= value < 1 << 63, "an integer of 64 bits")


def path(text):
    """An argparse type: a Path, with ~ for the home directory."""
    return Path(os.path.expanduser(text))


def printable(text):
    """str(text) with all that could move a cursor, end a line or forge one written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
                   for c in str(text))


class Progress:
    """One line that tells how far something is and how long it will take.

    Rewritten in place on a terminal, every few seconds a new line elsewhere.
    """

    def __init__(self, title, total, done=0):
        self.title, self.total, self.done, self.first = title, total, done, done
        self.start = self.shown = time.monotonic()
        self.live = sys.stdout.isatty()

    def advance(self, n=1, text=None):
        """n more are done; text(): what else to show, asked for only when the line is shown."""
        self.done = min(self.total, self.done + n)  # n is a guess with several processes
        now = time.monotonic()
        if now - self.shown > (0.3 if self.live else 5):
            self.shown = now
            left = (now - self.start) / (self.done - self.first) * (self.total - self.done)
            said = text() if text else ""
            print(f"{self.title} {self.done}/{self.total}{said}  {clock(left)} left",
                  end="\x1b[K\r" if self.live else "\n", flush=True)

    def close(self):
        """Say how long it took, if there was anything to do."""
        if self.done > self.first:
            print(f"{self.title} {self.done}/{self.total}  {clock(time.monotonic() - self.start)}",
                  end="\x1b[K\n" if self.live else "\n", flush=True)


def clock(seconds):
    """Seconds as 4 s, 1:05 or 2:03:04."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    text = str(datetime.timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0")


@functools.cache
def say_once(line):
    """Print a line, of several processes only by the first, and not again in the same command."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


class _Quiet:
    """A text stream that goes quiet when nobody reads it any more, as after `| head`."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal is gone
                raise
            # what is still in the buffer goes there too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def flush(self):
        self.write("")


def clean_exit(main):
    """Decorator for every script's main(): what a user can mend is one line on stderr, exit code 2.

    That is a UserError, a file that cannot be read or written, and too little memory. Anything else
    is a mistake of ours and keeps its traceback. A reader of the output who leaves ends nothing.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        streams = sys.stdout, sys.stderr
        if hasattr(sys.stdout, "reconfigure"):  # "→" where the terminal's encoding has none
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout, sys.stderr = (stream and _Quiet(stream) for stream in streams)
        say_once.cache_clear()
        try:
            return main(*args, **kwargs)
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            line = explain(error)
            if line is None:
                raise
            print(f"error: {line}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("\nstopped; repeat the command, and whatever it had saved is used",
                  file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            sys.stdout, sys.stderr = streams

    return wrapper


def explain(error):
    """What an exception tells the user, in one line; None where there is nothing for them to do."""
    text = printable(" ".join(str(error).split()))
    if isinstance(error, UserError):
        return printable(error)
    if isinstance(error, OSError):
        where = f" {printable(error.filename)}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"cannot write{where}: {error.strerror}; make room and repeat the command"
        return f"cannot use{where}: {error.strerror}" if where else None
    if re.search(r"DataLoader worker \(pid.* (killed|exited)", text):
        return (f"a process that reads images has died ({text[:80]}…), most likely for want of "
                "memory; repeat the command with fewer --workers, or 0")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return (f"out of memory ({text[:80]}…); repeat the command with a smaller --batch, or, in "
                "reclip.py, a smaller --crop and --scale")
    return None


# ------------------------------------------------------------------------------------------------
# 2. Reading one picture, label or array


def _load(path, what, load):
    """load(opened PIL image), with every way in which a file can be broken made a UserError."""
    PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26  # room for long descriptions and colour profiles, none
    PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28  # for what inflates without end
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"cannot read {what} {path}: it is no file")  # a pipe may never end
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return load(image)
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"no {what} {path}") from None
    except Image.DecompressionBombError:
        raise UserError(f"cannot read {what} {path}: it claims more than "
                        f"{2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; make it smaller"
                        ) from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds for damaged files
        reason = getattr(error, "strerror", None) or f"{error}; is it damaged?"
        raise UserError(f"cannot read {what} {path}: {reason}") from None


def read_image(path):
    """Read any photograph as uint8 3×H×W, RGB.

    EXIF orientation is applied; grey, palette and CMYK images become RGB; transparent ones are laid
    on white; of 16-bit values the high byte is kept. Raises UserError, naming the file, if it is
    missing, truncated, empty or no image.
    """

    def load(image):
        orientation = _orientation(image)
        pixels = np.asarray(_to_rgb(image)).transpose(2, 0, 1).copy()  # faster than by torch
        return turn(torch.from_numpy(pixels), orientation).contiguous()

    return _load(path, "image", load)


def image_header(path):
    """(H, W) of an image as it is stored, and its EXIF orientation, 1 to 8. Raises UserError."""
    return _load(path, "image", lambda image: (image.size[::-1], _orientation(image)))


def image_size(path):
    """(H, W) as `read_image` will return it, without decoding the image. Raises UserError."""
    size, orientation = image_header(path)
    return size if orientation < 5 else size[::-1]


def _orientation(image):
    """EXIF orientation of an opened PIL image, 1 to 8; 1 for a TIFF, which Pillow turns itself."""
    if image.format == "TIFF":
        return 1
    if image.format == "PNG":  # Pillow would decode it, to look for EXIF behind the pixels
        content = Path(image.filename).read_bytes()
        if not any(kind in content for kind in (b"eXIf", b"exif", b"iTXt", b"zTXt")):
            return 1
    value = image.getexif().get(0x0112)
    return value if value in range(1, 9) else 1


def turn(x, orientation):
    """A picture or label …×H×W, as it is stored, turned as its EXIF orientation, 1 to 8, says."""
    x = x.transpose(-1, -2) if orientation in (5, 6, 7, 8) else x
    x = x.flip(-1) if orientation in (2, 3, 6, 7) else x
    return x.flip(-2) if orientation in (3, 4, 7, 8) else x


def _to_rgb(image):
    """An opened PIL image of any mode as an RGB image, on white where it is transparent."""
    clear = image.info.get("transparency")
    if image.mode == "F":
        raise UserError(f"{image.filename} holds floating-point pixels; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own convert() would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            fault = "values below 0" if values.min() < 0 else "32 bits a pixel"
            raise UserError(f"{image.filename} has {fault}; convert it to 8 or 16 bits")
        tags = getattr(image, "tag_v2", {})  # a TIFF's: 258 bits, 339 whether they have a sign
        signed = tags.get(258) == (16,) and tags.get(339) == (2,)
        grey = values >> (7 if signed else 8)
        grey = 255 - grey if tags.get(262) == 0 else grey  # white is zero
        grey[values == clear] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:  # 16 bits a channel
        image.info["transparency"] = tuple(value >> 8 for value in clear)  # as Pillow's pixels
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or clear is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def read_label(path):
    """Read a label map as int64 H×W of the values stored in it, palette indices staying indices.

    Raises UserError, naming the file, for an unreadable file or one with colours for values.
    """

    def load(image):
        if image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
            raise UserError(f"label {path} is a {image.mode} picture; expected one channel of "
                            "class ids (a grey or palette PNG)")
        return torch.from_numpy(np.array(image).astype(np.int64))

    return _load(path, "label", load)


# Of the MAT-file format, level 5 (MathWorks, "MAT-File Format"), numeric types by their number in
# an element's tag, and numeric classes of arrays by theirs, as numpy writes them.
MAT_TYPES = dict(zip((1, 2, 3, 4, 5, 6, 7, 9, 12, 13), "i1 u1 i2 u2 i4 u4 f4 f8 i8 u8".split()))
MAT_CLASSES = dict(zip(range(6, 16), "f8 f4 i1 u1 i2 u2 i4 u4 i8 u8".split()))
MAT_MATRIX, MAT_COMPRESSED = 14, 15
MAT_LARGEST = 1 << 26  # bytes: what a compressed matrix may grow to


def _mat_elements(data, order):
    """Yield (type, bytes) of the elements that follow each other in `data`. order: "<" or ">"."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        at += 8
        if kind >> 16:  # small element: size and type share the first word, the data is the second
            kind, size, at = kind & 0xFFFF, kind >> 16, at - 4
            if size > 4:
                raise ValueError("a small element of more than 4 bytes")
        if at + size > len(data):
            raise ValueError("the file ends early")
        yield kind, data[at:at + size]
        at += size
        if kind != MAT_COMPRESSED:  # all others are padded to a multiple of 8 bytes
            at += -at % 8


def read_mat_v5(path):
    """The real numeric arrays of a MATLAB file (format 5, as written by save -v6 and -v7).

    Returns {variable name: numpy array, rows first}; variables of other kinds (text, cells,
    structures, sparse) are left out. Raises UserError for a file that is damaged or of another
    format.
    """
    try:
        data = Path(path).read_bytes()
        order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
        if order is None or struct.unpack(order + "H", data[124:126])[0] != 0x0100:
            raise ValueError("not a MATLAB 5 file")
        variables = {}
        for kind, element in _mat_elements(data[128:], order):
            if kind == MAT_COMPRESSED:
                stream = zlib.decompressobj()
                element = stream.decompress(element, MAT_LARGEST)
                if not stream.eof:
                    raise ValueError(f"cut short, or of more than {MAT_LARGEST >> 20} MiB")
                (kind, element), = _mat_elements(element, order)
            if kind != MAT_MATRIX:
                continue
            # parts of an array: flags (class in the lowest byte), dimensions, name, real values;
            # values may be stored in a narrower type than the array's class, column after column
            parts = list(_mat_elements(element, order))
            mat_class = np.frombuffer(parts[0][1], order + "u4")[0] & 0xFF
            if mat_class in MAT_CLASSES:
                (_, dims), (_, name), (stored, values) = parts[1:4]
                values = np.frombuffer(values, order + MAT_TYPES[stored])
                values = values.reshape(np.frombuffer(dims, order + "i4"), order="F")
                variables[name.decode("ascii")] = values.astype(MAT_CLASSES[mat_class])
        return variables
    except (OSError, ValueError, KeyError, IndexError, struct.error, zlib.error) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise UserError(f"cannot read {path}: {reason}; expected a .mat file of Pascal Context "
                        "(MATLAB 5)") from None


# ------------------------------------------------------------------------------------------------
# 3. Folders

PHOTOS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")
NO_PICTURES = (".txt", ".json", ".jsonl", ".csv", ".xml", ".md", ".html", ".ini", ".db", ".part",
               ".pt", ".npy", ".tmp")
MARK = b"Software\0ReCLIP"  # what `save_picture` leaves in the head of a PNG


def list_folder(folder, suffix):
    """Sorted ids of the files folder/**/ID + suffix; links are followed, hidden files left out.

    suffix: one ending, cut off from the ids, or a tuple of endings in lower case, kept in them, as
    PHOTOS. One line tells what else is left out: folders that cannot be entered, and of
    photographs other kinds of files and the pictures that these scripts have made.
    """
    ids, seen, left, closed = [], set(), collections.Counter(), []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=closed.append):
        if os.path.realpath(parent) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        for name in files:
            kind, file = os.path.splitext(name)[1].lower(), Path(parent, name)
            i = file.relative_to(folder).as_posix()
            if name.startswith("."):
                continue
            if isinstance(suffix, str):
                ids += [i[:-len(suffix)]] if name.endswith(suffix) else []
            elif kind not in suffix:
                left[kind or "without an ending"] += kind not in NO_PICTURES
            elif kind == ".png" and _is_ours(file):
                left["made by this program"] += 1
            else:
                ids.append(i)
    told = [f"{n} {printable(kind)}" for kind, n in left.items() if n]
    told += [f"folder {printable(error.filename)} ({error.strerror})" for error in closed]
    if told:
        say_once(f"left out: {', '.join(sorted(told))}, in {printable(folder)}")
    return sorted(ids)


def _is_ours(path):
    """Whether `save_picture` wrote a file."""
    try:
        with open(path, "rb") as file:
            return MARK in file.read(100)
    except OSError:
        return False  # reading it will say why


# ------------------------------------------------------------------------------------------------
# 4. Drawing


def to_grey(image):
    """The brightness of a picture in whole levels: uint8 …×3×H×W → float32 …×H×W."""
    red, green, blue = image.unbind(-3)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def visible(colours):
    """The colours in overlays and legends: bright green for light greys (VOC's car, Cityscapes'
    pole), which would pass for no class there. uint8 …×3 → uint8 …×3."""
    low, high = colours.amin(-1, keepdim=True), colours.amax(-1, keepdim=True)
    green = torch.cat([low // 2, torch.full_like(low, 255), torch.full_like(low, 110)], -1)
    return torch.where((low >= 100) & (high - low < 30), green, colours)


def overlay(image, label, colours):
    """The classes of a label, int64 H×W, in their colours on a pale grey image; uint8 3×H×W.

    image: uint8 3×H×W; colours: uint8 C×3, shown as `visible`. Void stays grey.
    """
    label, tint = label.cpu(), torch.zeros(256, 3)
    tint[:len(colours)] = 0.8 * visible(colours)
    kept = torch.where(label == VOID, 1.0, 0.2) * (110 + 0.5 * to_grey(image))
    return (kept + tint[label].movedim(-1, 0)).clamp(0, 255).to(torch.uint8)


def picture_sheet(rows, headings, present, classes, colours, cell=240):
    """Rows of pictures under headings, above a legend of the classes in `present`, as a PIL image.

    rows: lists of uint8 3×H×W tensors, each scaled to fit a square of `cell` pixels; headings: one
    per column or empty; present: class indices; classes: C texts, of which what precedes a
    comma is shown; colours: uint8 C×3.
    """
    gap, top, step = 6, 26 if headings else 0, cell + 6
    width, bottom = len(rows[0]) * step + gap, top + len(rows) * step + gap
    names = legend([(classes[k].split(",")[0], colours[k]) for k in sorted(present)], width)
    sheet = Image.new("RGB", (width, bottom + names.height), "white")
    sheet.paste(names, (0, bottom))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            scale = cell / max(picture.shape[-2:])
            size = [max(1, round(side * scale)) for side in picture.shape[:0:-1]]
            method = Image.NEAREST if scale > 1 else Image.BILINEAR  # enlarged masks stay sharp
            picture = Image.fromarray(picture.cpu().movedim(0, -1).numpy()).resize(size, method)
            sheet.paste(picture, (x * step + gap, top + y * step + gap))
    for x, heading in enumerate(headings):
        ImageDraw.Draw(sheet).text((x * step + gap, 5), heading, "black", FONT())
    return sheet


@functools.cache
def FONT():
    """Pillow's own font, of which little more than ASCII is drawn."""
    return ImageFont.load_default(17)


ACCENTS = {  # how the font can draw them, and how many pixels up, above a small letter
    "\u0300": ("`", 0), "\u0301": ("´", 0), "\u0302": ("^", 4), "\u0303": ("~", 7),
    "\u0304": ("-", 6), "\u0308": ("··", 5), "\u030a": ("°", 3), "\u030b": ("´´", 0),
    "\u030c": ("v", 10), "\u0327": (",", 0)}


def spelled(text):
    """A text in signs of Pillow's font and ACCENTS; what they lack becomes its code point.

    So two names never look the same, as they would with the font's box for all that it lacks.
    """
    box, out = bytes(FONT().getmask("\uffff")), ""
    for c in unicodedata.normalize("NFC", text):
        parts = unicodedata.normalize("NFD", c)
        drawn = all(part in ACCENTS or bytes(FONT().getmask(part)) != box for part in parts)
        out += parts if drawn else f"\\u{ord(c):04x}"
    return out


def legend(entries, width):
    """Patches of colour, each with its name, in as many columns as fit; a PIL image.

    entries: pairs of a text and a uint8 colour (3 values); width: in pixels.
    """
    font, line, gap = FONT(), 26, 6
    entries = [(spelled(text), colour) for text, colour in entries]
    column = max([200] + [int(font.getlength(text)) + 56 for text, _ in entries])
    per_line = max(1, width // column)
    picture = Image.new("RGB", (width, -(-len(entries) // per_line) * line + gap), "white")
    draw = ImageDraw.Draw(picture)
    for n, (text, colour) in enumerate(entries):
        x, y = n % per_line * column + gap, n // per_line * line + 4
        draw.rectangle((x, y + 2, x + 28, y + 19), fill=tuple(visible(colour).tolist()))
        x, letter = x + 36, "a"
        for c in text:
            if c in ACCENTS:
                mark, up = ACCENTS[c]
                up += 0 if mark == "," else font.getbbox("a")[1] - font.getbbox(letter)[1]
                middle = x - (font.getlength(letter) + font.getlength(mark)) / 2
                draw.text((middle, y - up), mark, "black", font)
            else:
                letter = c
                draw.text((x, y), letter, "black", font)
                x += font.getlength(letter)
    return picture


# ------------------------------------------------------------------------------------------------
# 5. Writing


def save_picture(picture, path):
    """Write a PIL image as PNG under a temporary name, then rename it. MARK says who made it."""
    temporary, info = Path(f"{path}.tmp"), PngImagePlugin.PngInfo()
    info.add_text(*MARK.decode().split("\0"))
    try:
        # a quarter of the usual level's time, and a quarter more bytes
        picture.save(temporary, format="PNG", pnginfo=info, compress_level=2)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a whole file under a temporary name, then rename it."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def make_folder(path):
    """Make a run's folder. Raises UserError where it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None


def unpack(archive, root, tree):
    """Unpack a tar or zip file, of which `tree` appears in root when all of it is there.

    No member can land outside: of a tar file "data" refuses paths and links that lead there, of a
    zip file they are left out.
    """
    part = root / f"{archive.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    options = {} if archive.suffix == ".zip" else {"filter": "data"}
    shutil.unpack_archive(archive, part, **options)
    (root / tree).parent.mkdir(parents=True, exist_ok=True)
    os.replace(part / tree, root / tree)
    shutil.rmtree(part)


def fingerprint(*parts):
    """A short name for strings, bytes and tensors, one after the other: others, another name.

    The first 16 hex digits of their SHA-256; of tensors the bytes count, as they are.
    """
    digest = hashlib.sha256()
    for part in parts:
        if torch.is_tensor(part):
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(part.encode(errors="surrogateescape") if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# 6. Reading ahead
#
# What other processes read comes through a pipe. PyTorch would hand over tensors in shared memory,
# of which containers have little, and wait for ever for a process that finds none left.


class _Pickler(pickle.Pickler):
    """Pickles tensors as numpy arrays, which are plain bytes."""

    def reducer_override(self, value):
        return (torch.from_numpy, (value.numpy(),)) if torch.is_tensor(value) else NotImplemented


class _Reader(torch.utils.data.Dataset):
    """What a process of `read_ahead` does: an item, or what went wrong, as bytes."""

    def __init__(self, dataset, collate):
        self.dataset, self.collate = dataset, collate

    def read(self, key):
        if not isinstance(key, list):
            return self.dataset[key]
        if self.collate is None and hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(key)
        collate = self.collate or torch.utils.data.default_collate
        return collate([self.dataset[k] for k in key])

    def __getitem__(self, key):
        content = io.BytesIO()
        try:
            _Pickler(content).dump(self.read(key))
        except (UserError, OSError, MemoryError) as error:
            return pickle.dumps(error)
        return content.getvalue()


def _heedless(worker):
    """Ctrl-C is for the process that reads ahead; its workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def cores_each():
    """The cores of this machine that are there for each of its processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def read_ahead(dataset, keys, workers, collate=None):
    """Yield dataset[key] for each key, in order, read by `workers` processes; 0: by this one.

    keys: any iterable. A key that is a list stands for a batch: dataset.__getitems__(key) where
    there is such a method and no `collate`, else collate([dataset[k] for k in key]), by default
    PyTorch's default_collate. Raises what reading raises, and UserError where there can be no
    workers.
    """
    reader = _Reader(dataset, collate)
    if not workers:
        yield from map(reader.read, keys)
        return
    loader = torch.utils.data.DataLoader(reader, sampler=keys, batch_size=None, collate_fn=bytes,
                                         num_workers=workers, worker_init_fn=_heedless)
    try:  # the semaphores lie in shared memory too; a loader that lacks them ends in a traceback
        [torch.multiprocessing.Queue() for _ in range(workers + 3)].clear()
        items = iter(loader)
    except OSError as error:
        raise UserError(f"cannot start {workers} processes that read images ({error.strerror}); "
                        "most likely there is no room in shared memory, /dev/shm; repeat the "
                        "command with --workers 0") from None
    for item in map(pickle.loads, items):
        if isinstance(item, Exception):
            raise item
        yield item
