"""The run folder: its number, its owner, config.json, checkpoints.

    runs/<method>[-<mode>]-<dataset>-<nnn>/
        config.json              every flag, as used; `about`: script, versions, data, and the flags as they were asked
        log.jsonl  eval.jsonl    one JSON object a line: the training log, the metrics of evaluations
        ckpt.pt  ckpt.prev.pt    the last two checkpoints; with --keep also ckpt-0005000.pt, ...
        samples/  source/        grids; the script and common/ as they were

A checkpoint is a dict of state dicts beside `it` (steps done), `config` (the flags) and `model` (what networks.build
needs to make the network again). It loads with torch.load(weights_only=True), and is the same whether the run was
sharded over several GPUs or not."""
import contextlib
import dataclasses
import errno
import functools
import glob
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from pickletools import genops

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

from common.flags import DATASETS, LARGEST, ROOT, BadInput, Unheard, brief, config_of, printable, say, script

DISK = ("ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EACCES", "EISDIR", "ENOTDIR", "EEXIST")


class Mine(threading.local):
    """What this thread owns, {folder: (open lock, is it a new run, folders made for it)}; what its main() ends with."""
    def __init__(self):
        self.held, self.end = {}, contextlib.ExitStack()


MINE = Mine()


def numbered(out, stem):
    """[(number, path)] of the run folders <out>/<stem>-<number>, oldest first."""
    paths = map(Path, glob.glob(glob.escape(f"{out}/{stem}-") + "*"))     # which minds no odd name
    found = ((p.name[len(stem) + 1:], p) for p in paths)
    return sorted((int(number), p) for number, p in found if number.isdecimal())


def stem_of(*words):
    """The name of a run folder but for its number, of script, mode and data set. The latter's may be long, or odd."""
    name = "-".join(filter(None, words))
    return "".join(c if c.isprintable() else "_" for c in name).encode()[:100].decode(errors="ignore")


def create(out, stem):
    """Make a run folder under `out`, and own it; return its path. Raises BadInput where that is not possible."""
    last = max((number for number, _ in numbered(out, stem)), default=-1)           # gaps in the numbers stay
    for number in itertools.count(last + 1):
        path = Path(out) / f"{stem}-{number:03d}"
        with contextlib.suppress(FileExistsError):        # another job was faster
            take(path, new=True)
            (path / "samples").mkdir()
            return path


# ---- its owner -----------------------------------------------------------------------------------
def take(path, new=False):
    """Own a folder, which is made if missing, until `free`, or until this process ends in whatever way: the operating
    system holds the lock. Returns "" if it is ours now, else who owns it. new: FileExistsError if it exists."""
    path = Path(path).resolve()
    if path in MINE.held:
        return ""
    try:
        made = [p for p in (path, *path.parents) if not os.path.exists(p)]
        path.mkdir(parents=True, exist_ok=not new)
        file = open(path / ".lock", "a+")
    except OSError as e:
        if new and isinstance(e, FileExistsError):
            raise
        raise BadInput(f"--out or --resume, {path}: {e.strerror or 'no lock'}; name a folder that can be written")
    try:
        if os.name == "nt":
            import msvcrt
            file.seek(2**30)                              # no one else can read what is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return (path / ".lock").read_text().strip() or "another process"
        say(f"{path}: this file system knows no locks; start no other job that writes there")
    if not ours(file, path):                              # its owner has removed it just before
        return take(path, new)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    MINE.held[path] = file, new, made
    MINE.end.callback(free, path)
    return ""


def ours(file, path):
    """Is this still the lock of the folder, which may have been moved, removed or made anew?"""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path / ".lock"))


def free(path):
    """The end of `take`. What it made is removed: a new run without checkpoint and log, any folder if it is empty."""
    path = Path(path).resolve()
    file, new, made = MINE.held.pop(path, (None, False, []))
    if file:
        with file, contextlib.suppress(OSError):
            kept = [n for n in os.listdir(path) if (n.startswith(("ckpt", "log.")) if new else n != ".lock")]
            if made and not kept and ours(file, path):
                shutil.rmtree(path)
                for p in made[1:]:                        # up to one that is not empty
                    p.rmdir()


def agree(call):
    """What call() returns on the first rank, on all ranks. None is to wait long for it: see teacher.wait_for."""
    if not dist.is_initialized():
        return call()
    dist.broadcast_object_list(box := [None if dist.get_rank() else call()])
    return box[0]


def guarded(main):
    """The function main(args), which ends in one line where the reason lies outside of it: Ctrl-C, memory, a full disk,
    numbers that are not finite. However it ends, nothing stays locked, and no run folder without content is left."""
    @functools.wraps(main)
    def inner(args=None):
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))       # so that `finally` comes to pass
            MINE.end.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
        try:
            with contextlib.redirect_stdout(Unheard(sys.stdout)), contextlib.redirect_stderr(Unheard(sys.stderr)):
                return main(args)
        except KeyboardInterrupt:
            raise SystemExit(130)
        except FloatingPointError as e:
            line, status = e, 1
        except OSError as e:
            if errno.errorcode.get(e.errno) not in DISK:
                raise
            line, status = f"{e.strerror}: {e.filename or 'the disk'}; an earlier checkpoint, if any, is whole", 2
        except (MemoryError, RuntimeError) as e:          # the latter, of cuBLAS or on the CPU, has no kind of its own
            if isinstance(e, RuntimeError) and not re.search("allocate|ALLOC_FAILED", str(e)):
                raise
            line, status = f"{brief(e)[:100]}; {relief(args)}", 2
        finally:
            MINE.end.close()
        tqdm.write(f"error: {printable(line)}", file=sys.stderr)          # on each rank, of what it saw
        raise SystemExit(status)
    return inner


def relief(args):
    """What to try where the memory is too small for `args`."""
    ranks, batch, accum = int(os.environ.get("WORLD_SIZE", 1)), getattr(args, "batch", 0), getattr(args, "accum", 1)
    parts = next((n for n in range(2 * accum, batch // ranks + 1) if batch % (ranks * n) == 0), 0)
    if parts and not args.resume:
        return f"try --accum {parts}, or a smaller --batch or network"
    return "try a smaller --batch or network, or more ranks with --shard"


def check_room(path, state):
    """BadInput unless the disk has room for three checkpoints of `state`: the last two, and one being written. An
    optimiser keeps two numbers for each weight."""
    numbers = [v.numel() for m in state.values() if isinstance(m, torch.nn.Module) for v in m.state_dict().values()]
    numbers += [2 * p.numel() for o in state.values() for g in getattr(o, "param_groups", ()) for p in g["params"]]
    path = Path(path).resolve()
    there = path / "ckpt.pt", path / "ckpt.prev.pt"
    need = 3 * 4 * sum(numbers) - sum(os.path.getsize(f) for f in there if os.path.isfile(f))
    room = shutil.disk_usage(next(p for p in (path, *path.parents) if os.path.exists(p))).free
    if room < need:
        raise BadInput(f"{path}: {room >> 20:,} MiB free, three checkpoints take {need >> 20:,}; name another --out")


# ---- config.json ---------------------------------------------------------------------------------
def write_config(folder, args, asked, file, data, **about):
    """Write config.json, and copy the script `file` and common/ into source/ if that is not there yet. args: the flags
    as the run uses them; asked: as they were given, before the teacher and the method settled some."""
    commit = subprocess.run("git describe --always --dirty", shell=True, cwd=ROOT, capture_output=True, text=True)
    old = config_of(folder)["about"] if args.resume else dict(asked=dataclasses.asdict(asked))
    about = old | dict(script=script(file), argv=sys.argv, commit=commit.stdout.strip(), torch=torch.__version__,
                       data_sha256=data.sha256, classes=data.names,
                       images=[len(data.images), 3, *2 * [data.latent["size"]]] if data.latent else
                       list(data.images.shape), **about)
    if data.classes:
        about["images_per_class"] = data.labels.bincount(minlength=data.classes).tolist()
    places = {"data_dir"} if args.dataset.removesuffix("-test") in DATASETS else {"data_dir", "dataset"}
    places = {k: str(Path(getattr(args, k)).expanduser().resolve()) for k in places}    # from any working directory
    text = json.dumps(dataclasses.asdict(args) | places | dict(resume="", about=about), indent=1)
    (folder / "config.tmp").write_text(text)
    os.replace(folder / "config.tmp", folder / "config.json")
    if not (folder / "source").exists():
        file = Path(file).resolve()
        shutil.copytree(ROOT / "common", folder / "source/common", ignore=shutil.ignore_patterns("__pycache__"))
        copy = folder / "source" / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)    # of a script in a folder of its own
        shutil.copy(file, copy)


# ---- checkpoints ---------------------------------------------------------------------------------
def save(folder, ckpt, keep):
    """Write ckpt.pt so that a kill at any moment leaves a loadable run; the one before it becomes ckpt.prev.pt."""
    tmp, held = folder / "ckpt.tmp", MINE.held.get(folder.resolve())
    if held and not ours(held[0], folder):
        raise BadInput(f"{folder} was moved or replaced while this run wrote there; nothing is written into another's")
    try:
        with open(tmp, "wb") as f:
            torch.save(ckpt, f)
            f.flush()
            os.fsync(f.fileno())                          # else a power cut may leave an empty file of this name
    except BaseException:                                 # a full disk leaves the old checkpoint
        tmp.unlink(missing_ok=True)
        raise
    settle(folder, keep)


def settle(folder, keep):
    """The second half of a save, done again by `restore` after a kill: ckpt.tmp, which is whole, gets its names."""
    tmp, new, old, part = (folder / f"ckpt.{ending}" for ending in ("tmp", "pt", "prev.pt", "part"))
    if keep:                                              # first: later nothing would show that it was left out
        os.replace(shutil.copy(tmp, part), folder / f"ckpt-{torch.load(tmp, mmap=True)['it']:07d}.pt")
    if intact(new):                                       # else the one before it is worth more
        os.replace(new, old)
    os.replace(tmp, new)


def intact(file, ours=True):
    """Does this checkpoint hold the bytes that were written? torch.load does not look at the checksums in the file. Not
    `ours`: it may be small and fill the memory, as parts that are compressed or stored twice would, or take hours, as
    keys of one hash would, which numbers above 2**60 can have."""
    try:
        with zipfile.ZipFile(file) as z:
            parts = z.infolist()
            if sum(i.file_size for i in parts) > os.path.getsize(file) or z.testzip():
                return False
            code = b"." if ours else z.read(next(i for i in parts if i.filename.endswith("/data.pkl")))
        return not any(n == 10**6 or type(v) is int and abs(v) > 2**60 for n, (_, v, _) in enumerate(genops(code)))
    except Exception:                                     # zipfile raises many kinds for a damaged file
        return False


def load(path):
    """The newest readable checkpoint of a run folder, or a checkpoint file, on the CPU; BadInput if there is none."""
    path, why = Path(path), "there is none"
    # ckpt.tmp is the newest where a kill came between the two renames; otherwise it is not intact
    files = [path / f"ckpt.{ending}" for ending in ("pt", "tmp", "prev.pt")] if os.path.isdir(path) else [path]
    for f in (files := [f for f in files if os.path.isfile(f)]):
        try:
            ckpt = torch.load(f, map_location="cpu", weights_only=True) if intact(f, ours=False) else None
            why = "damaged, or not of torch.save" if ckpt is None else "the file is not one of these scripts'"
            if isinstance(ckpt, dict) and "model" in ckpt and type(ckpt.get("it", 0)) is int:
                # a tensor with strides of 0 may be larger than its file; networks and averages may share their numbers
                if sum(v.nbytes for v in tree_leaves(ckpt) if torch.is_tensor(v)) <= 4 * os.path.getsize(f):
                    return ckpt
                why = "its tensors claim to be larger than the file"
        except Exception as e:                            # torch raises many kinds
            why = type(e).__name__
        if f != files[-1]:
            say(f"{f} cannot be read ({why}); trying the checkpoint before it")
    raise BadInput(f"no readable checkpoint in {path} ({why}); name a run folder or a checkpoint in one; "
                   "a teacher may also be one of EDM's .pkl files, or the address of one")


def restore(folder, state, data, shard, keep):
    """Load a run's newest checkpoint into `state`; return its step. BadInput where it or `data` does not fit."""
    if config_of(folder)["about"]["data_sha256"] != data.sha256:
        raise BadInput(f"--resume {folder}: {data.name} does not hold the images of this run; say with --dataset where")
    try:
        agree(lambda: intact(folder / "ckpt.tmp") and settle(folder, keep))
        ckpt = load(folder)
        if not 0 <= ckpt["it"] <= LARGEST:
            raise ValueError(f"its step is {ckpt['it']}")
        for k, v in state.items():
            v.load_state_dict(shard_like(ckpt[k], v) if shard else ckpt[k])
            if any(x.shape not in (p.shape, ()) for p, s in getattr(v, "state", {}).items() for x in s.values()):
                raise ValueError(f"a part of {k} has another shape")      # which torch does not look at
    except Exception as e:                                # KeyError, TypeError, whatever torch raises
        raise BadInput(f"{folder}: its checkpoint does not fit this run ({brief(e)}); start a new run")
    return ckpt["it"]


def full(tree):
    """Gather every sharded tensor of a state dict on the CPU: one format, sharded run or not. All ranks take part."""
    def whole(v):
        return (v.full_tensor() if hasattr(v, "full_tensor") else v).cpu()
    return tree_map_only(torch.Tensor, whole, tree)


def shard_like(saved, owner):
    """The inverse of `full`: split the saved tensors as those of `owner`, a sharded module or its optimiser, are."""
    from torch.distributed.tensor import DTensor, distribute_tensor      # a second of start-up, for --shard alone

    def split(v, p):
        same = isinstance(p, DTensor) and torch.is_tensor(v) and v.shape == p.shape
        return distribute_tensor(v.to(p.device), p.device_mesh, p.placements) if same else v
    if isinstance(owner, torch.nn.Module):
        now = owner.state_dict()
        return {k: split(v, now[k]) for k, v in saved.items()}
    params = [p for g in owner.param_groups for p in g["params"]]
    state = {i: {k: split(v, params[i]) for k, v in s.items()} for i, s in saved["state"].items()}
    return saved | dict(state=state)
