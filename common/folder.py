"""The run folder: its number, config.json, checkpoints and metrics.

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
import glob
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from common.flags import ROOT, BadInput, config_of, say, script


def numbered(out, stem):
    """The run folders <out>/<stem>-<nnn>, oldest first."""
    found = [p for p in Path(out).glob(glob.escape(stem) + "-*") if p.name[len(stem) + 1:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(stem) + 1:]))


def next_number(out, stem):
    """The path of a new run folder: one above the highest number there, so gaps left by deleted runs are not filled."""
    taken = numbered(out, stem)
    number = int(taken[-1].name[len(stem) + 1:]) + 1 if taken else 0
    return Path(out) / f"{stem}-{number:03d}"


def create(folder):
    """Make a run folder. Raises BadInput where that is not possible."""
    try:
        (folder / "samples").mkdir(parents=True)
    except OSError as e:
        raise BadInput(f"--out {folder.parent}: {e.strerror}; name a folder that can be written")


def write_config(folder, args, asked, file, data, **about):
    """Write config.json, and copy the script `file` and common/ into source/ if that is not there yet.

    args: the flags as the run uses them; asked: as they were given, before the teacher and the method settled some."""
    commit = subprocess.run("git describe --always --dirty", shell=True, cwd=ROOT, capture_output=True, text=True)
    about = dict(script=script(file), argv=sys.argv, commit=commit.stdout.strip(), torch=torch.__version__,
                 data_sha256=data.sha256, classes=data.names, **about)
    if data.classes:
        about["images_per_class"] = data.labels.bincount(minlength=data.classes).tolist()
    about["asked"] = config_of(folder)["about"].get("asked", {}) if args.resume else dataclasses.asdict(asked)
    text = json.dumps(dataclasses.asdict(args) | dict(resume="", about=about), indent=1)
    (folder / "config.tmp").write_text(text)
    os.replace(folder / "config.tmp", folder / "config.json")
    if not (folder / "source").exists():
        file = Path(file).resolve()
        shutil.copytree(ROOT / "common", folder / "source/common", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(file, folder / "source" / file.relative_to(ROOT))


def lines(path):
    """The objects of a .jsonl file; a line that a kill has torn is passed over."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [v for v in found if isinstance(v, dict)]


def figures(folder):
    """The lines of eval.jsonl."""
    return lines(Path(folder) / "eval.jsonl")


def cut_logs(folder, it):
    """Take the steps after `it`, which will be made again, and torn lines out of log.jsonl and eval.jsonl."""
    for path in (folder / "log.jsonl", folder / "eval.jsonl"):
        kept = [line for line in lines(path) if line.get("it", 0) <= it]
        path.with_suffix(".tmp").write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(path.with_suffix(".tmp"), path)


def described(path):
    """', 1,600 steps, FD (pixels) 0.130': what is known of the teacher in a run folder; nothing of another path."""
    if not Path(path).is_dir():
        return ""
    last = {s["metric"]: s["value"] for s in figures(path) if s["net"] == "teacher"}
    figure = f", FD (pixels) {last['fd_pixels']:.3f}" if "fd_pixels" in last else ""
    return f", {load(path)['it']:,} steps{figure}"


# ---- checkpoints ---------------------------------------------------------------------------------
def save(folder, ckpt, keep):
    """Write ckpt.pt so that a kill at any moment leaves a loadable run; the one before it becomes ckpt.prev.pt."""
    tmp, new, old = (folder / f"ckpt.{ending}" for ending in ("tmp", "pt", "prev.pt"))
    try:
        with open(tmp, "wb") as f:
            torch.save(ckpt, f)
            f.flush()
            os.fsync(f.fileno())                          # else a power cut may leave an empty file of this name
    except BaseException:                                 # a full disk leaves the old checkpoint
        tmp.unlink(missing_ok=True)
        raise
    if intact(new):                                       # else the one before it is worth more
        os.replace(new, old)
    os.replace(tmp, new)
    if keep:
        shutil.copy(new, tmp)
        os.replace(tmp, folder / f"ckpt-{ckpt['it']:07d}.pt")


def intact(file):
    """Does this checkpoint hold the bytes that were written? torch.load does not look at the checksums in the file.
    torch compresses nothing: what is compressed may be a small file that fills the memory."""
    try:
        with zipfile.ZipFile(file) as z:
            return all(i.compress_type == zipfile.ZIP_STORED for i in z.infolist()) and z.testzip() is None
    except Exception:                                     # zipfile raises many kinds for a damaged file
        return False


def load(path):
    """The newest readable checkpoint of a run folder, or a checkpoint file, on the CPU; BadInput if there is none."""
    path, why = Path(path), "there is none"
    # ckpt.tmp is the newest where a kill came between the two renames; otherwise it is not intact
    files = [path / f"ckpt.{ending}" for ending in ("pt", "tmp", "prev.pt")] if path.is_dir() else [path]
    files = [f for f in files if f.exists()]
    for f in files:
        try:
            ckpt = torch.load(f, map_location="cpu", weights_only=True) if intact(f) else None
            if isinstance(ckpt, dict) and "model" in ckpt:
                return ckpt
            why = "damaged, or not of torch.save" if ckpt is None else "the file is not one of these scripts'"
        except Exception as e:                            # torch raises many kinds
            why = type(e).__name__
        if f != files[-1]:
            say(f"{f} cannot be read ({why}); trying the checkpoint before it")
    raise BadInput(f"no readable checkpoint in {path} ({why}); name a run folder or a checkpoint in one; "
                   "a teacher may also be one of EDM's .pkl files, or the address of one")


def finite(state):
    """Are all weights of the networks in `state` finite, on all ranks?"""
    weights = [p for m in state.values() if isinstance(m, torch.nn.Module) for p in m.parameters()]
    size = torch.stack(torch._foreach_norm([p.to_local() if hasattr(p, "to_local") else p for p in weights])).sum()
    if dist.is_initialized():
        dist.all_reduce(size)
    return bool(size.isfinite())


def full(tree):
    """Gather every sharded tensor of a state dict on the CPU: one format, sharded run or not. All ranks take part."""
    def whole(v):
        if not torch.is_tensor(v):
            return v
        return (v.full_tensor() if hasattr(v, "full_tensor") else v).cpu()
    return tree_map(whole, tree)


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
