"""Files that were damaged, or made to do harm: each is read, or refused in one line. Never a traceback, code that runs,
ten seconds, or a gigabyte."""
import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_released import network, write  # noqa: F401

from common import data, edit, sample, teacher
from common.flags import parse
from common.networks import build

import ect

HUGE = [0, -1, 1, 255, 2**15, 2**31 - 1, 2**31, 2**63 - 1, 10**30]
ODD = [*HUGE, None, True, "", "x", "../x", "\x00", "9" * 400, 1e308, float("nan"), float("inf"), [], {}, [[]], [1] * 9,
       {"a": {}}, 10**400]


# ---- mutations -----------------------------------------------------------------------------------
def mutate(r, data):
    """Bytes with one to three things wrong."""
    data = bytearray(data)
    for _ in range(r.randint(1, 3)):
        i, n = r.randrange(len(data) + 1), r.choice([1, 2, 4, 8, 100])
        what = r.randrange(7)
        if what == 0 and i < len(data):
            data[i] ^= 1 << r.randrange(8)
        elif what == 1:
            del data[i:i + n]
        elif what == 2:
            data[i:i] = r.randbytes(n)
        elif what == 3:
            data[i:i + n] = r.randbytes(n)
        elif what == 4:
            data[i:i] = data[i:i + 1000 * n]
        elif what == 5:
            data[i:i + 8] = (r.choice(HUGE) % 2**64).to_bytes(8, r.choice(["little", "big"]))
        else:
            del data[i:]
    return bytes(data)


def part_of_zip(r, whole, wanted):
    """A .zip with one part mutated, and checksums that hold."""
    old, out = zipfile.ZipFile(io.BytesIO(whole)), io.BytesIO()
    name = r.choice([n for n in old.namelist() if wanted(n)])
    with zipfile.ZipFile(out, "w", r.choice([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED])) as new:
        for n in old.namelist():
            new.writestr(n, mutate(r, old.read(n)) if n == name else old.read(n))
    return out.getvalue()


def inside(r, tree, depth=4):
    """A tree of dicts and lists with one value replaced, removed, or put there again under another name."""
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    if not keys:
        return r.choice(ODD)
    k = r.choice(keys)
    if isinstance(tree[k], (dict, list)) and depth and r.random() < .8:
        tree[k] = inside(r, tree[k], depth - 1)
    elif torch.is_tensor(tree[k]) and r.random() < .8:
        v = tree[k]
        tree[k] = r.choice([lambda: v[:0], lambda: v.flatten(), lambda: v.double(), lambda: v.long(), lambda: v * float("nan"),
                            lambda: v.flatten()[:1].expand(10**r.randint(1, 12)), lambda: v[None],
                            lambda: v.reshape(-1)[:1].expand(v.shape), lambda: torch.zeros(3).to_sparse()])()
    elif r.random() < .3:
        del tree[k]
    else:
        tree[k] = r.choice(ODD)
    return tree


def torch_bytes(tree):
    torch.save(tree, out := io.BytesIO())
    return out.getvalue()


def png_of(width, height, rows=b""):
    """A picture that claims to be that large."""
    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ---- by hand -------------------------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def pickles():
    """What small pickles can do."""
    def number(i):
        return b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little")     # all of one hash
    yield b"(dp2147483647\n."                             # a memo of five gigabytes
    yield b"\x80\x02}r\xff\xff\xff\x7f."
    yield b"\x80\x02}(" + b"".join(number(i) + b"N" for i in range(10**5)) + b"u."
    yield b"\x80\x04\x8f(" + b"".join(map(number, range(10**5))) + b"\x90."
    yield b"\x80\x02}(" + b"".join(number(i) + b"\x85N" for i in range(10**5)) + b"u."
    yield b"\x80\x02}" + b"".join(number(i) + b"Ns" for i in range(10**5)) + b"."
    yield b"}" * 5 * 10**6 + b"."
    yield b"(" * 10**6 + b"t" * 10**6 + b"."
    yield b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"}."
    yield b"\x8e" + (2**40).to_bytes(8, "little") + b"."                  # a string of a terabyte
    yield b"L" + b"9" * 10**6 + b"L\n."
    yield pickle.dumps(Evil())
    yield b"cos\nsystem\n(S'mkdir pwned'\ntR."
    yield b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0bmkdir pwned\x85R."


def checkpoints(good):
    """What torch.load does not look at."""
    old, out = zipfile.ZipFile(io.BytesIO(good)), io.BytesIO()
    for method, code in ((zipfile.ZIP_DEFLATED, None), *((zipfile.ZIP_STORED, p) for p in list(pickles())[2:])):
        with zipfile.ZipFile(out := io.BytesIO(), "w", method) as new:
            for name in old.namelist():
                new.writestr(name, code if code and name.endswith("data.pkl") else old.read(name))
        yield out.getvalue()
    tree = torch.load(io.BytesIO(good), weights_only=True)
    tree["model"]["kwargs"]["ch"] = 1024
    with torch.device("meta"):
        net = build(tree["model"])
    flat = {k: torch.zeros(1).expand(v.shape) for k, v in net.state_dict().items()}       # strides of 0
    yield torch_bytes(tree | dict(ema=flat))
    for more in (dict(blocks=10**6), dict(mult=(1,) * 10**6), dict(ch=10**6), dict(classes=10**8), dict(size=10**6)):
        tree = torch.load(io.BytesIO(good), weights_only=True)
        tree["model"]["kwargs"] |= more
        yield torch_bytes(tree)


def arrays():
    parts = io.BytesIO()
    with zipfile.ZipFile(parts, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z, \
            z.open("images.npy", "w", force_zip64=True) as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=(5 * 2**28, 1, 1, 1)))
        for _ in range(80):
            f.write(bytes(2**24))
    yield parts.getvalue()                                # a bomb
    for shape in ((10**9, 1, 1, 1), (2**62, 2, 2, 1), (1, 0, 0, 1), (-1, 2, 2, 1)):
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, dict(descr="|u1", fortran_order=False, shape=shape))
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as z:
            z.writestr("images.npy", head.getvalue() + b"abcd")
        yield out.getvalue()
    for labels in (np.array([0, 10**9]), np.array([-1, 0]), np.array([2**63 + 1, 0], np.uint64), np.array(["a", "b"]),
                   np.array([None, Evil()], object)):
        out = io.BytesIO()
        np.savez(out, images=np.zeros((2, 8, 8, 1), np.uint8), labels=labels)
        yield out.getvalue()


def pictures():
    yield from (png_of(w, h, bytes(100)) for w, h in ((13_000, 13_000), (2**31 - 1, 1), (0, 0), (1, 10**8), (60_000, 60_000)))
    out = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(out, "PNG")
    yield out.getvalue()


# ---- what reads them -----------------------------------------------------------------------------
class Reader:
    """A folder with good files of each kind, and for each kind a function that writes a bad one and reads it."""
    kinds = ("checkpoint", "pickle", "npz", "config", "image", "mask", "zip")

    def __init__(self, top, run, pkl):
        self.top, self.run, self.good_pickle = top, run, pkl.read_bytes()
        self.good_ckpt = (run / "ckpt.pt").read_bytes()
        self.good_config = json.loads((run / "config.json").read_text())
        g = np.random.default_rng(0)
        self.npz_files = {}
        for save in (np.savez, np.savez_compressed):
            save(out := io.BytesIO(), images=g.integers(0, 256, (8, 8, 8, 3), np.uint8), labels=np.arange(8) % 2)
            self.npz_files[save] = out.getvalue()
        self.image_files = {}
        for ending in (".png", ".jpg", ".webp", ".bmp"):
            picture = Image.fromarray(g.integers(0, 256, (16, 16, 3), np.uint8))
            picture.save(out := io.BytesIO(), Image.registered_extensions()[ending])
            self.image_files[ending] = out.getvalue()
        with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("0/a.png", self.image_files[".png"])
            z.writestr("0/b.jpg", self.image_files[".jpg"])
            z.writestr("dataset.json", json.dumps(dict(labels=[["0/a.png", 0], ["0/b.jpg", 1]])))
        self.zip_file = out.getvalue()

    def sampled(self):
        sample.main([str(self.run), "--n", "2", "--steps", "1", "--device", "cpu", "--out", str(self.top / "x.png")])

    def checkpoint(self, r, given=None):
        bad = (lambda: given) if given else r.choice([
            lambda: mutate(r, self.good_ckpt), lambda: part_of_zip(r, self.good_ckpt, lambda n: True),
            *[lambda: part_of_zip(r, self.good_ckpt, lambda n: n.endswith("data.pkl"))] * 2,
            *[lambda: torch_bytes(inside(r, torch.load(io.BytesIO(self.good_ckpt), weights_only=True)))] * 4])
        (self.run / "ckpt.pt").write_bytes(bad())
        try:
            self.sampled()
        finally:
            (self.run / "ckpt.pt").write_bytes(self.good_ckpt)

    def pickle(self, r, given=None):
        (self.top / "x.pkl").write_bytes(given or mutate(r, self.good_pickle))
        teacher.load(self.top / "x.pkl")

    def npz(self, r, given=None):
        whole = r.choice(list(self.npz_files.values()))
        bad = given or r.choice([mutate(r, whole), part_of_zip(r, whole, lambda n: True)])
        (self.top / "x.npz").write_bytes(bad)
        data.load(str(self.top / "x.npz"))

    def config(self, r, given=None):
        bad = given or r.choice([mutate(r, json.dumps(self.good_config).encode()), json.dumps(inside(r, self.good_config)).encode()])
        (self.run / "config.json").write_bytes(bad)
        parse(ect.Args, ect.PRESETS, ["--resume", str(self.run)])
        self.sampled()

    def image(self, r, given=None):
        shutil.rmtree(self.top / "images", ignore_errors=True)
        (self.top / "images").mkdir()
        ending, good = r.choice(list(self.image_files.items()))
        (self.top / f"images/a{'.png' if given else ending}").write_bytes(given or mutate(r, good))
        data.load(str(self.top / "images"), size=8)

    def mask(self, r, given=None):
        (self.top / "mask.png").write_bytes(given or mutate(r, self.image_files[".png"]))
        edit.mask_of(str(self.top / "mask.png"), 8)

    def zip(self, r, given=None):
        (self.top / "x.zip").write_bytes(given or r.choice([mutate(r, self.zip_file), part_of_zip(r, self.zip_file, lambda n: True)]))
        data.load(str(self.top / "x.zip"), size=8)


def judge(read, r, given):
    """What is wrong with how one file was read, or ""."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            read(r, given)
            return ""
        except SystemExit as e:
            said = [line for line in err.getvalue().split("\n") if "error: " in line]
            return "" if e.code in (1, 2) and len(said) == 1 else f"exit {e.code}: {said}"
        except BaseException as e:
            return f"{type(e).__name__}: {e}"[:500]


def trial(top, reader, cases):
    """Read the files of `cases`, [(kind, seed, bytes or None)], in a child process; {case: what is wrong}. A child that
    takes ten seconds for one is ended by its clock."""
    wrong, left = {}, list(cases)
    while left:
        if (pid := os.fork()) == 0:
            os.chdir(top)
            with open(top / "log", "w", buffering=1) as log:
                for kind, seed, given in left:
                    log.write(f"{kind} {seed}\n")
                    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                    signal.alarm(10)
                    what = judge(getattr(reader, kind), random.Random(f"{kind} {seed}"), given)
                    signal.alarm(0)
                    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
                    log.write(json.dumps(what or (f"{more >> 10} MB" if more > 2**20 else "")) + "\n")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seen = (top / "log").read_text().splitlines()
        wrong |= {name: said for name, said in zip(seen[::2], map(json.loads, seen[1::2])) if said}
        if status:                                        # ended within the last one
            wrong[seen[-1]] = "ten seconds" if status == -signal.SIGALRM else f"ended by {status}"
        left = left[(len(seen) + 1) // 2:] if status else []
    return wrong


@pytest.fixture
def reader(train, write, tmp_path):  # noqa: F811
    _, run = train("ect", "--iters", "1", "--cond")
    return Reader(tmp_path, run, Path(write(network(size=16))))


def check(wrong, top):
    assert not wrong, "\n".join(f"{k}: {v}" for k, v in wrong.items())
    assert not (top / "pwned").exists() and not Path("pwned").exists(), "it ran"


def test_what_was_made_to_do_harm(reader, tmp_path):
    """A small file that takes gigabytes or minutes, or runs what it holds."""
    made = dict(pickle=pickles(), npz=arrays(), image=pictures(), mask=pictures(), checkpoint=checkpoints(reader.good_ckpt))
    check(trial(tmp_path, reader, [(kind, i, b) for kind, files in made.items() for i, b in enumerate(files)]), tmp_path)


def test_mutations(reader, tmp_path):
    """An exception of a library that nobody thought of."""
    check(trial(tmp_path, reader, [(kind, i, None) for kind in reader.kinds for i in range(60)]), tmp_path)


@pytest.mark.slow
def test_many_mutations(reader, tmp_path):
    check(trial(tmp_path, reader, [(kind, i, None) for kind in reader.kinds for i in range(60, 1000)]), tmp_path)
