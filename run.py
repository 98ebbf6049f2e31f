"""What keeps a run alive, of all scripts alike; what is learned is up to them.

1 what a frozen network says, asked once and kept in a file, 2 a training run: its batches, its
checkpoint, its log, and when it stops, 3 CLIPs, folders and locks, 4 devices and processes.
"""

import contextlib
import copy
import datetime
import json
import os
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import clip
from clip.model import MLP, Attention
from clip.weights import read_weights
from data import draw_seed, photometric_distortion
from files import Progress, UserError, fingerprint, printable, read_ahead, write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ------------------------------------------------------------------------------------------------
# 1. What a frozen network says once: votes of crops, global scores, features of views


def ask_once(path, facts, fields, items, blocks, ask, workers, collate=None):
    """What a frozen network says of all items, asked once, block by block, and kept in a file.

    path: of the .npy file, one record an item, mapped into memory. facts: plain values on which
    the records depend, kept in a .json file beside it. fields: {name: (numpy type, shape)} of a
    record. items: a dataset; blocks: lists of its keys, whose records follow each other; ask: a
    batch of items, collated → {name: tensor B×shape}; workers: processes that read items.

    A record ends with a checksum. Those without a right one, because the run was interrupted or the
    file has been damaged, are made (again). Several processes share the work. Returns the array.
    Raises UserError for a file of other facts or of an earlier version, and too small a disk.
    """
    name, n, starts = path.stem, sum(map(len, blocks)), np.cumsum([0, *map(len, blocks)])
    facts = {key: value for key, value in facts.items() if value is not None}
    kind = np.dtype([(key, *field) for key, field in fields.items()] + [("checksum", np.uint32)])
    for old in path.parent.glob(f"{name}.jsonl*"):
        raise UserError(f"{old} has the format of an earlier version; delete it, and {name} will "
                        "be made again")
    with folder_lock(path.parent / ".cache.lock", wait=True):
        barrier()
        if path.exists():
            check_facts(path.with_suffix(".json"), facts)
        elif rank() == 0:
            print(f"{name}: {n * kind.itemsize / 1e9:.2f} GB → {printable(path)}", flush=True)
            write_text(path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
            allocate(path, n, kind)
        barrier()
        records = open_records(path, n, kind)
        left, damaged = gather(wrong_blocks(records, starts) if rank() == 0 else None)[0]
        if damaged:
            print(f"{printable(path)}: {damaged} records are damaged and made again", flush=True)
        if left:
            records = open_records(path, n, kind, "r+")
            progress = Progress(name, n, n - sum(len(blocks[i]) for i in left))
            own = left[rank()::world()]
            batches = read_ahead(items, [blocks[i] for i in own], workers, collate)
            for i, batch in zip(own, batches):
                block = records[starts[i] : starts[i + 1]]
                for key, value in ask(batch).items():
                    block[key] = value.cpu().numpy()
                block["checksum"] = checksums(block)
                progress.advance(len(block) * world())
            progress.close()
            records.flush()
        barrier()
    return open_records(path, n, kind)


def checksums(records):
    """CRC-32 of each record but for its last field, the checksum."""
    return [zlib.crc32(row[:-4]) for row in records.view(np.uint8).reshape(len(records), -1)]


def wrong_blocks(records, starts):
    """Which blocks hold a record without a right checksum, and how many such records had another.

    starts: where each block begins, and the end. Reads the whole file, at about 1 GB a second.
    """
    wrong = np.array(checksums(records), np.uint32) != records["checksum"]
    blocks = np.add.reduceat(wrong, starts[:-1]).nonzero()[0].tolist()
    return blocks, int((wrong & (records["checksum"] != 0)).sum())


def check_facts(header, facts):
    """Raises UserError where the file beside a header was made from other facts."""
    try:
        old = json.loads(header.read_text("utf-8"))
    except (ValueError, OSError):
        old = "damaged"
    if old != json.loads(json.dumps(facts)):
        raise UserError(f"{header} {unlike(old, facts)}; delete {header.stem}.* there, or choose "
                        "another folder with --cache or --out")


def allocate(path, n, kind):
    """Make an .npy file of n zero records whose bytes are there: no write to it can fail later."""
    size, free = n * kind.itemsize, shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(f"{path} needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; "
                        "choose another folder with --cache, fewer --views, or --views 0")
    temporary = Path(f"{path}.tmp")
    np.lib.format.open_memmap(temporary, "w+", kind, (n,))
    if hasattr(os, "posix_fallocate"):
        with open(temporary, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
    os.replace(temporary, path)


def open_records(path, n, kind, mode="r"):
    """The .npy file of `allocate`, mapped into memory. Raises UserError for another one."""
    try:
        records = np.lib.format.open_memmap(path, mode)
    except Exception:  # numpy raises half a dozen kinds for a damaged header
        records = None
    if records is None or (records.shape, records.dtype) != ((n,), kind):
        raise UserError(f"{path} is damaged or of an earlier version; delete it, and it will be "
                        "made again")
    return records


class FixedViews(torch.utils.data.Dataset):
    """What a frozen network says of K views of each of n images; epoch e has view e mod K.

    They are the views that fresh augmentation gives in the first K epochs. records: K·n, as
    `ask_once` returns them.
    """

    def __init__(self, records, n):
        self.records, self.n = records, n

    def __getstate__(self):  # a worker that is not forked maps the file itself
        return self.records.filename, self.records.shape[0], self.records.dtype, self.n

    def __setstate__(self, state):
        self.records, self.n = open_records(*state[:3]), state[3]

    def __getitems__(self, batch):
        """A list of (epoch, index) → index, int64 B, and B×… of each field by name."""
        views = len(self.records) // self.n
        rows = self.records[[epoch % views * self.n + i for epoch, i in batch]]
        fields = {name: torch.from_numpy(np.ascontiguousarray(rows[name]))
                  for name in rows.dtype.names if name != "checksum"}
        return dict(index=torch.tensor([i for _, i in batch]), **fields)


@torch.no_grad()
def make_views(views, s, name, facts, fields, ask):
    """FixedViews of s.views views per image, kept in the file NAME.npy of the folder s.cache.

    views: TrainingViews; facts, fields, ask: as in `ask_once`; s: settings cache, views, workers.
    """
    n, data = len(views), views.data
    facts = dict(data=data.name, images=data.fingerprint, views=s.views, seed=views.seed,
                 scale=list(views.scale), crop=views.crop, ratio=list(views.ratio),
                 distort=views.distort, **facts)
    blocks = [[(k, i) for i in rows.tolist()]
              for k in range(s.views) for rows in torch.arange(n).split(16)]
    return FixedViews(ask_once(s.cache / f"{name}.npy", facts, fields, views, blocks, ask,
                               s.workers), n)


# ------------------------------------------------------------------------------------------------
# 2. A training run

STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Batches:
    """The batches of all epochs as lists of (epoch, index), from a step `first` on.

    The order of an epoch depends on (seed, epoch) alone, so any step can be the first. Of several
    processes each gets its share of every batch; where there is none left for it, a copy of the
    batch's first image, with the weight 0.
    """

    def __init__(self, n, batch, epochs, seed, first=0):
        self.n, self.batch, self.seed, self.first = n, batch, seed, first
        self.per_epoch = -(-n // batch)
        self.total = epochs * self.per_epoch
        self.epoch, self.order = None, None  # the last that was asked for

    def __len__(self):
        return max(0, self.total - self.first)

    def __iter__(self):
        for step in range(self.first, self.total):
            images = self.images(step)
            yield [(self.epoch, i) for i in images[rank()::world()] or images[:1]]

    def images(self, step):
        """The indices of a whole batch."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(draw_seed(self.seed, epoch, "order"))
            self.epoch, self.order = epoch, torch.randperm(self.n, generator=generator).tolist()
        return self.order[place * self.batch : (place + 1) * self.batch]

    def weight(self, step):
        """This process's share of a batch, relative to the mean share: 1 for a single process."""
        size = min(self.batch, self.n - step % self.per_epoch * self.batch)
        return len(range(rank(), size, world())) * world() / size


class Run:
    """What training keeps: the checkpoint of what was learned, and a log of how.

    In the checkpoint beside the learned parameters: `optimizer` and `step` to go on from, Wr to
    predict without the text encoder, the settings, and what tells whether another CLIP, other
    classes or other images are used with it. Within `with run:` Ctrl-C (and SIGTERM, SIGHUP) ends
    training after the step that is under way (of several processes, ten steps); twice, at once.
    Raises UserError where the folder holds the checkpoint of other settings.
    """

    every = 50  # steps between the lines of the log

    def __init__(self, path, s, data, model, learner=None, log="log.jsonl", title="rectify"):
        self.path, self.ids, self.model, self.learner = path, data.ids, model, learner
        self.log, self.title = path.with_name(log), title
        self.facts = dict(kind=path.stem, settings=plain(s), classes=list(data.classes),
                          images=data.fingerprint, clip=clip_fingerprint(model))
        self.previous = load_checkpoint(path) if path.exists() else None  # until training starts
        self.finished = bool(self.previous and self.previous["finished"])
        self.saved, self.kept, self.stopping = time.monotonic(), 0, False
        if self.previous:
            with as_checkpoint(path):
                check_same_run(self.previous, self.facts, path)

    def start(self, optimizer, batches):
        """Go on from the checkpoint, if there is one. Returns the batches, from there on."""
        checkpoint, self.previous = self.previous, None
        if checkpoint:
            with as_checkpoint(self.path):
                self.learner.load_state_dict(checkpoint["state"])
                optimizer.load_state_dict(checkpoint["optimizer"])
                self.kept = checkpoint["step"]
            if not checkpoint["finished"]:
                print(f"going on from step {self.kept}")
        self.batches, batches.first = batches, self.kept
        self.progress = Progress(self.title, batches.total, self.kept)
        self.bad, self.shown = None, ""
        return batches

    def trim_log(self):
        """Steps after the last checkpoint are repeated, and so are their lines in the log."""
        try:
            lines = self.log.read_text("utf-8").splitlines(True) if self.log.exists() else []
            whole = [line for line in lines if line.endswith("\n")]  # the last may be cut short
            kept = [line for line in whole if json.loads(line)["step"] <= self.kept]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{self.log} is damaged; delete it and repeat the command") from None
        write_text(self.log, "".join(kept))

    def begin_line(self):
        """Nothing is added up yet for the next line of the log."""
        self.sums, self.done, self.images, self.waited = {}, 0, 0, 0.0
        self.since = time.monotonic()

    def __enter__(self):
        def stop(number, frame):
            self.stopping = True
            self.__exit__()

        heeded = [number for number in STOP if signal.getsignal(number) != signal.SIG_IGN]  # nohup
        self.handlers = {number: signal.signal(number, stop) for number in heeded}

    def __exit__(self, *exception):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def steps(self, loader):
        """(step, batch) of all steps that are left, counting the seconds spent waiting for data."""
        if rank() == 0:
            self.trim_log()
        self.begin_line()
        batches = iter(loader)
        for step in range(self.kept, self.batches.total):
            start = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - start
            yield step, batch
        self.progress.close()

    def after(self, step, optimizer, images, loss, **parts):
        """To be called when `step` steps are done: logs, and saves at the end, when it is due and
        when it is asked to stop.

        images: how many this process had; loss, parts: 0-dim tensors, which are not waited for
        until a line is due. Raises UserError, before anything is written, where the loss has become
        nan or infinite.
        """
        loss = mean_over_processes(loss.detach())
        for name, value in dict(loss=loss, **parts).items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.done, self.images = self.done + 1, self.images + images * world()
        bad = torch.where(loss.isfinite(), torch.inf, step)
        self.bad = bad if self.bad is None else torch.minimum(self.bad, bad)
        finished = step == self.batches.total
        # Of several processes none may stop while the others wait for it in the next step.
        stopping = self.stopping if world() == 1 else (
            step % 10 == 0 and any(gather(self.stopping)))
        line = finished or step % self.every == 0
        due = finished or stopping or self.due(step % self.batches.per_epoch == 0)
        if due or line:
            self.check()
        if line:
            self.write_line(step, optimizer.param_groups[0]["lr"])
        self.progress.advance(1, lambda: self.shown)
        if due:
            self.save(step, optimizer, finished)
        if stopping and not finished:
            barrier()  # it is saved: where one process ends, torchrun ends the others
            if rank() == 0:
                print(f"\nstopped after step {step} and saved {self.path}; the same command goes "
                      "on", file=sys.stderr)
            raise SystemExit(130)

    def due(self, epoch_ends):
        """Whether to save: two minutes after the last time, at the end of an epoch after ten
        seconds. Where a run is saved changes nothing in its result.
        """
        return time.monotonic() - self.saved > (10 if epoch_ends else 120)

    def check(self):
        """Raises UserError if there was a bad step, one whose loss is not finite."""
        if self.bad is None or self.bad == torch.inf:
            return
        names = [printable(self.ids[i]) for i in self.batches.images(int(self.bad) - 1)]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        left = (f"{self.path} still has step {self.kept}" if self.kept else
                "there is no checkpoint yet")
        raise UserError(f"the loss is not finite at step {int(self.bad)} (images "
                        f"{', '.join(names[:8])}{more}); {left}; a smaller --lr may help")

    def write_line(self, step, lr):
        """A line of the log: the means since the last one, over all processes."""
        means = gather({name: float(value) / self.done for name, value in self.sums.items()})
        row = dict(step=step, lr=lr, waited_s=round(self.waited, 2),
                   images_per_s=round(self.images / (time.monotonic() - self.since), 2))
        row |= {name: round(sum(m[name] for m in means) / world(), 6) for name in self.sums}
        if rank() == 0:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.shown = "".join(f"  {name} {row[name]:.3f}" for name in self.sums)
        self.shown += (f"  lr {lr:.4f}  {row['images_per_s']:.0f} images/s"
                       f"  waited {self.waited:.0f} s")
        self.begin_line()

    def save(self, step, optimizer=None, finished=False):
        """Write the checkpoint; of several processes only the first does."""
        with torch.no_grad():
            Wr = self.learner.texts(self.model)[1] if hasattr(self.learner, "texts") else None
        if rank() == 0:
            save_checkpoint(self.path, self.facts | dict(
                state=self.learner.state_dict(), Wr=Wr, step=step, finished=finished,
                optimizer=optimizer and optimizer.state_dict()))
        self.saved, self.kept = time.monotonic(), step


def save_checkpoint(path, checkpoint):
    """torch.save to a temporary file, then rename. Everything in it passes weights_only=True."""
    temporary = Path(f"{path}.tmp")
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is what torch makes of a full disk
        temporary.unlink(missing_ok=True)
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"cannot write {path} ({reason}); what was there before is as it was, and "
                        "the same command goes on from it") from None


def load_checkpoint(path):
    """A checkpoint of reclip.py or distill.py as a dict. Raises UserError if it is none."""
    with as_checkpoint(path):
        checkpoint = read_weights(path)
        for key in ("settings", "classes", "clip", "state", "Wr", "step", "finished", "kind"):
            checkpoint[key]
    return checkpoint


@contextlib.contextmanager
def as_checkpoint(path):
    """What goes wrong inside is a UserError: there are many ways to be damaged or foreign."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a checkpoint of reclip.py or distill.py, or is damaged "
                        f"({type(error).__name__}: {reason})") from None


def checkpoint_in(path, *names):
    """The path of a checkpoint, or the first of `names` that is in the folder of a run.

    Raises UserError where a folder holds none of them.
    """
    if not path.is_dir():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} is a folder without {' or '.join(names)}")


# What may change when resuming: machine and places; weights are told apart by fingerprints.
MACHINE = {"device", "workers", "amp", "data_root", "out", "cache", "download", "clip", "teacher",
           "labels", "labels_offset", "graph"}
ADDED = dict(sigma=5.0, heads=None, train_split="train")  # what older checkpoints do not say


def check_same_run(checkpoint, facts, path):
    """Raises UserError where a run's folder holds the results of other settings."""
    def same(what, message):
        if checkpoint[what] != facts[what]:
            raise UserError(f"{path} was made with {message}; choose another folder with --out")

    same("classes", "other classes")
    same("clip", "another CLIP")
    old, new = ({key: value for key, value in (ADDED | settings).items() if key not in MACHINE}
                for settings in (checkpoint["settings"], facts["settings"]))
    if old != new:
        raise UserError(f"{path} {unlike(old, new)}; repeat them, delete the folder, or choose "
                        "another one with --out")
    same("images", "other images")


def unlike(old, new):
    """What is the matter with a file that was made from the facts `old` and not from `new`."""
    if not isinstance(old, dict):
        return "is damaged"
    changes = (f"{key} {old.get(key)!s:.40} → {new.get(key)!s:.40}"
               for key in sorted(old | new) if old.get(key) != new.get(key))
    return f"was made with other settings ({', '.join(changes)})"


def plain(s):
    """Settings as plain values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(s).items()}


def passed_on(s):
    """Settings that the evaluation after a training is given too, as a command line."""
    options = ["--amp" if s.amp else "--no-amp"]
    for name in ("device", "workers", "clip", "data_root", "labels", "labels_offset"):
        if getattr(s, name, None) is not None:
            options += [f"--{name.replace('_', '-')}", str(getattr(s, name))]
    return options


# ------------------------------------------------------------------------------------------------
# 3. CLIPs, folders and locks


def load_clip(source, activation="quick_gelu", device="cpu", heads=None):
    """A frozen float32 CLIP with a ViT image encoder, from a name or a file. Raises UserError.

    activation: what it was trained with; heads: of its image encoder, where its sizes do not tell.
    """
    try:
        with one_first():
            model, _ = clip.load(source, device="cpu", activation=activation, heads=heads)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from None
    if not hasattr(model.visual, "proj"):
        raise UserError(f"{source} has a ResNet image encoder; the surgery (MaskCLIP's) needs a "
                        "ViT, for example ViT-B/16")
    if model.vocab_size != 49408 or model.context_length != 77:
        raise UserError(f"{source} has a vocabulary of {model.vocab_size} and a context of "
                        f"{model.context_length} tokens; expected OpenAI's 49408 and 77")
    return model.float().to(device).eval().requires_grad_(False)


def clip_fingerprint(model):
    """A short name for a CLIP's weights, from its projections: other weights, another name."""
    return fingerprint(model.visual.proj, model.text_projection, model.positional_embedding)


def network_facts(model, s):
    """What the features of a frozen CLIP depend on beside the images, as plain values."""
    return dict(clip=clip_fingerprint(model), preset=s.preset, surgery=s.surgery,
                activation=s.activation, heads=getattr(s, "heads", None),
                sigma=s.sigma if s.surgery == "naclip" else None)


def image_encoder(model, preset, half=False):
    """The encoder of dense features: CLIP's own, for the paper's preset with exact GELU.

    half: for autocast alone, with matrices that are bf16 already; the outcome is the same, but
    autocast would round those of a frozen encoder anew in every call.
    """
    if preset != "paper" and not half:
        return model.visual
    visual = copy.deepcopy(model.visual)
    for module in visual.modules():
        if preset == "paper" and isinstance(module, MLP):
            module.gelu = nn.GELU()
        if half and isinstance(module, (nn.Linear, nn.Conv2d, Attention)):
            module.bfloat16()
    return visual


def usual_surgery(model, surgery="program"):
    """`surgery`, but "value" for a larger CLIP, with which "program" collapses (ClearCLIP)."""
    if surgery != "program" or len(model.visual.proj) <= 768:
        return surgery
    print("--surgery value: with CLIPs larger than ViT-B program collapses (README)")
    return "value"


def load_backbone(backbone, state, source):
    """Put a state dict into a ResNet, running statistics included.

    Raises UserError, which names `source`, unless every key and shape fits.
    """
    expected = backbone.state_dict()
    # Files from before PyTorch 0.4.1 do not count the batches.
    missing = [key for key in expected if key not in state and "num_batches" not in key]
    left_over = [key for key in state if key not in expected]
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    problems = [f"{len(keys)} {what}, first {keys[0]}" for keys, what in (
        (missing, "missing"), (left_over, "left over"), (wrong, "of another shape")) if keys]
    if problems:
        raise UserError(f"the weights in {source} are not those of this ResNet: "
                        f"{'; '.join(problems)}; --student (resnet50, resnet101) has to agree with "
                        "the file")
    backbone.load_state_dict(state)


@contextlib.contextmanager
def folder_lock(path, wait=False):
    """Hold a lock file, so that two processes do not write the same things at a time.

    It is free again when this process ends, however it ends. Where another has it: wait, or raise
    UserError. Nothing is held where nothing can be written, and where the system (Windows) or the
    file system knows no such locks.
    """
    if rank() or fcntl is None or not os.access(path.parent, os.W_OK):
        yield
        return
    with open(path, "w") as file:
        try:
            # Not flock: a process that reads images would inherit that, and outlive this one.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if not wait:
                raise UserError(f"another process is at work in {path.parent}; wait for it, or "
                                "choose another folder with --out") from None
            print(f"waiting for another process that is at work in {printable(path.parent)}",
                  flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


# ------------------------------------------------------------------------------------------------
# 4. Devices, and several processes by torchrun, on machines that share the run's folder

PATIENCE = datetime.timedelta(days=1)  # of a process for the others, while one downloads or waits


def pick_device(name=None):
    """CUDA, else MPS, else the CPU, unless named; under torchrun one device each.

    Raises UserError for one that is not there.
    """
    if name is None:
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = join_processes(torch.device(name))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0][:80]}; "
                        "without --device the best one that is there is taken") from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, still finer than the bf16 of --amp
        torch.backends.cudnn.benchmark = True
    return device


def to_device(x, device):
    """A CPU tensor on a device, without waiting for what a GPU is at."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def views_on(device, batch):
    """Coloured views of a batch of TrainingViews, B×3×H×W, and their sizes, B×2, on the device."""
    view, size = (to_device(batch[key], device) for key in ("view", "size"))
    if "colours" in batch:
        view = photometric_distortion(view, to_device(batch["colours"], device))
    return view, size


def use_amp(given, device):
    """Whether networks run in bf16: as --amp says, else on a GPU that has instructions for it."""
    if given is not None:
        return given
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def join_processes(device):
    """Under torchrun join the other processes; returns this one's own device. Only one prints."""
    told = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if not told <= os.environ.keys():
        return device
    backend = "gloo"
    if device.type == "cuda":  # plain values go by way of the CPU: no GPU has to finish for them
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=PATIENCE)
        if rank():
            sys.stdout = open(os.devnull, "w")
    return device


def leave_processes():
    """The last thing that a script does."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """This process's number, 0 for the one that writes and for a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait until all processes are here."""
    gather(None)


@contextlib.contextmanager
def one_first():
    """Of the processes of a machine one is inside before the others: it downloads for all."""
    later = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if later:
        barrier()
    yield
    if not later:
        barrier()


def gather(value):
    """What each process has, as a list, in each of them; plain values and CPU tensors."""
    everyone = [value] * world()
    if world() > 1:
        dist.all_gather_object(everyone, value)
    return everyone


def mean_over_processes(value):
    """The mean of a 0-dim float tensor over all processes, in each of them."""
    if world() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value = value / world()
    return value


def parallel(module, device, unused=False):
    """The module itself, or, for several processes, in DistributedDataParallel.

    Gradients are then means over the processes. BatchNorm takes its statistics over all of them on
    CUDA; on the CPU, where PyTorch cannot, over each process's own share of the batch. unused:
    whether some parameters never get a gradient.
    """
    if world() == 1:
        return module
    if device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return nn.parallel.DistributedDataParallel(module, find_unused_parameters=unused)
