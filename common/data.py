"""A data set is one uint8 tensor on the device: no workers, no queue; a batch is an index."""
import hashlib
import json
import math
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from glob import glob
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from common import assets
from common.flags import DATASETS, BadInput, meant, say

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
INDEX = "dataset.json"      # the labels of a data set in EDM's format, at its top
LIMIT = 2**28               # bytes of a file in a .zip: a small archive may claim any size


def mix(*ints):
    """One 63-bit seed from several integers; neighbouring inputs give unrelated seeds."""
    digest = hashlib.blake2b(repr(ints).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass
class Data:
    name: str                 # digits, cifar10, ..., or that of the folder or file
    images: torch.Tensor      # uint8 [N, C, H, W] on the device, channels_last
    labels: torch.Tensor      # int64 [N] on the device, zeros if there are none
    classes: int              # number of classes, 0 without labels
    names: list = field(default_factory=list)   # of the classes: str

    def batch(self, it, n, seed=0, flip=False, part=0, parts=1):
        """Images [n/parts, C, H, W] in [-1, 1] and labels [n/parts]: slice `part` of step `it`.

        The step takes images [it n, (it + 1) n) of an endless sequence of shuffled epochs. They
        and their flips follow from (seed, it), whatever `parts` (ranks x --accum) is."""
        size, device, count = len(self.images), self.images.device, n // parts
        start = it * n + part * count                                 # place in the sequence
        epochs = range(start // size, (start + count - 1) // size + 1)
        i = torch.cat([shuffled(size, seed, e, device) for e in epochs])[start % size:][:count]
        x = self.images[i]
        if flip:
            g = torch.Generator().manual_seed(mix(seed, 1, it))           # not the global one
            heads = torch.rand(n, generator=g)[part * count:][:count] < 0.5
            heads = heads.view(-1, 1, 1, 1).to(device, non_blocking=True)       # no host sync
            x = torch.where(heads, x.flip(-1), x)
        return x.float() / 127.5 - 1, self.labels[i]

    @cached_property
    def sha256(self):
        """Of the bytes of images [N, C, H, W] and labels: what config.json knows the data by."""
        images, labels = self.images.cpu().numpy(), self.labels.cpu().numpy()
        return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


@lru_cache(maxsize=2)         # a step may straddle two epochs
def shuffled(size, seed, epoch, device):
    g = torch.Generator().manual_seed(mix(seed, 0, epoch))
    return torch.randperm(size, generator=g).to(device)


# ---- reading -------------------------------------------------------------------------------------
def load(name, data_dir="data", size=0, device="cpu"):
    """The data set `name`: digits | mnist | fashion_mnist | cifar10, with -test: its test images |
    a folder or .zip of images, also in EDM's format | an image | a .npz. Downloads stay in
    `data_dir`. `size`, pixels a side, is for images, folders and .zip files; 0 stands for 32, or
    in EDM's format for the size of its images; None for the one size of all. Raises BadInput."""
    path, base, names = Path(name).expanduser(), name.removesuffix("-test"), None
    if name == "digits":
        path = Path(__file__).with_name("digits.npz")
    if base in DATASETS and base != "digits":
        check_size(name, size, 32)                                    # before the download
        images, labels = assets.dataset(base, data_dir, "train" if name == base else "test")
        edge = (32 - images.shape[1]) // 2                            # black, for MNIST's 28 pixels
        images = np.pad(images, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    elif path.is_dir() or path.is_file() and path.suffix.lower() in (".zip", *ENDINGS):
        images, labels, names = from_files(path, size)
        name = path.resolve().name if path.is_dir() else path.stem
    elif path.is_file() and path.suffix == ".npz":
        images, labels = from_npz(path)
        check_size(name, size, images.shape[1])
        name = path.stem
    else:
        what = f"is no{'' if path.exists() else ' such'} folder of images, .zip, .npz or picture"
        raise BadInput(f"{name} {what}, nor one of {', '.join(DATASETS)}{meant(name, DATASETS)}")
    classes = 0 if labels is None else int(labels.max()) + 1
    labels = torch.zeros(len(images)) if labels is None else torch.from_numpy(labels)
    images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # as a view: channels_last
    names = names or [str(i) for i in range(classes)]
    return Data(name, images, labels.to(device, torch.int64), classes, names)


def check_size(name, size, native):
    if size not in (None, 0, native):
        raise BadInput(f"{name} has images of {native} pixels a side, not {size}; leave --size out")


def from_npz(file):
    """uint8 [N, H, W, C], labels [N] or None. Raises BadInput."""
    try:
        with np.load(file, allow_pickle=False) as z:
            images, labels = z["images"], z["labels"] if "labels" in z else None
        if images.ndim == 3:
            images = images[..., None]
        n, h, w, c = images.shape
        if images.dtype != np.uint8 or n == 0 or h != w or c not in (1, 3):
            raise ValueError(f"images are {images.dtype} {images.shape}")
        if labels is not None and (labels.shape != (n,) or labels.dtype.kind not in "iu"
                                   or labels.min() < 0):
            raise ValueError(f"labels are {labels.dtype} {labels.shape} for {n} images")
    except Exception as error:                                        # zip, zlib, numpy, ours
        raise BadInput(f"{file}: {assets.brief(error)}; expected square images, uint8 [N,H,W] "
                       "or [N,H,W,C], C 1 or 3, and labels, if any, integers [N] from 0")
    return images, labels


# ---- folders, .zip files, pictures ---------------------------------------------------------------
def from_files(path, size):
    """Images uint8 [N, size, size, C] of a folder, a .zip or one picture, labels [N] or None, and
    the names of the classes. Says what was read, skipped and resized. Raises BadInput."""
    found, opened = contents(path)
    files, edm = [f for f in found if f.lower().endswith(ENDINGS)], INDEX in found
    skipped = [f for f in found if not f.lower().endswith(ENDINGS) and f != INDEX]
    if not files:
        raise BadInput(f"{path}: no images there ({' '.join(ENDINGS)}), but {endings(skipped)}")
    labels, names = edm_labels(path, files, opened) if edm else class_folders(path, files)
    stored, size = size is None, size or (edm or size is None) and side(opened, files[0]) or 32
    images, sizes = pictures(path, files, opened, size)
    if stored and set(sizes) != {(size, size)}:
        raise BadInput(f"{path}: the images are not square and of one size; --size N makes them so")
    report(path, skipped, names, sizes, size)
    return images, labels, names


def contents(path):
    """The files of a folder, a .zip or, if it is a picture, that one: their names, sorted, without
    hidden ones, and a function that opens a name for reading. Raises BadInput."""
    if path.suffix.lower() != ".zip" or path.is_dir():
        top = path if path.is_dir() else path.parent
        found = glob("**/*", root_dir=path, recursive=True) if path.is_dir() else [path.name]
        found = [Path(f).as_posix() for f in found if not (top / f).is_dir()]   # rglob skips links

        def opened(f):
            return open(top / f, "rb")
        return sorted(found), opened
    try:
        pack = zipfile.ZipFile(path)
    except Exception as error:                                        # zipfile's, struct's, codecs'
        raise BadInput(f"{path} cannot be read as a .zip: {assets.brief(error)}")
    found = {i.filename: i.file_size for i in pack.infolist() if not i.is_dir()
             and not any(part.startswith(".") for part in i.filename.split("/"))}
    for f, length in found.items():                                   # a line of INDEX is short
        limit = min(LIMIT, 2**20 + 1000 * len(found)) if f == INDEX else LIMIT
        if length > limit and f.lower().endswith((*ENDINGS, INDEX)):
            raise BadInput(f"{path}: {f!r} claims {length / 2**20:,.0f} MiB, more than the "
                           f"{limit >> 20} that it may have; remove it")
    return sorted(found), pack.open


def class_folders(path, files):
    """Labels [N] and names: the folders of the first level, sorted, are the classes; (None, []) if
    there are none. Raises BadInput."""
    tops = [f.split("/")[0] if "/" in f else "" for f in files]
    names, labels = np.unique(tops, return_inverse=True)
    if "" in names and len(names) > 1:
        raise BadInput(f"{path}: {files[tops.index('')]} lies beside folders; sort all images "
                       "into folders, which are the classes, or none")
    return (None, []) if "" in names else (labels, names.tolist())


def edm_labels(path, files, opened):
    """Labels [N] and the numbers as names, from dataset.json: {"labels": [["00000/a.png", 6], ..]};
    (None, []) if it holds null. Raises BadInput."""
    try:
        with opened(INDEX) as file:
            listed = dict(json.load(file)["labels"] or [])
        if not all(type(v) is int and 0 <= v < 10**6 for v in listed.values()):
            raise ValueError("a label is no integer from 0")
    except Exception as error:                                        # json's, zipfile's, ours
        raise BadInput(f"{path}: {INDEX} is not in EDM's format ({assets.brief(error)}); expected "
                       '{"labels": [["00000/a.png", 6], ..]} or null; or rename it')
    wrong = sorted(listed.keys() ^ set(files)) if listed else []
    if wrong:
        what = "has a label but is no image there" if wrong[0] in listed else "has no label"
        raise BadInput(f"{path}: by {INDEX}, {wrong[0]!r} {what} ({len(wrong):,} such files); "
                       "each image needs a label, and each label an image")
    labels = np.array([listed[f] for f in files]) if listed else None
    return labels, [str(i) for i in range(labels.max() + 1)] if listed else []


def side(opened, name):
    """Pixels a side of a square image; 0 of another, and of a broken one: `pictures` names it."""
    try:
        with opened(name) as file, Image.open(file) as im:
            return im.width if im.width == im.height else 0
    except Exception:                                                 # any decoder's
        return 0


def pictures(path, files, opened, size):
    """uint8 [N,size,size,C] of image files, C = 1 if all are grey, and the (width, height) that
    each had. BadInput names broken ones."""
    images, bad = np.empty((len(files), size, size, 3), np.uint8), []

    def read(i):
        try:
            with opened(files[i]) as file:
                images[i], *seen = decode(file, size)
            return seen
        except Exception as error:                                    # any decoder's
            bad.append(f"{files[i]} ({type(error).__name__})")

    with ThreadPoolExecutor() as pool:                                # Pillow releases the GIL
        seen = list(pool.map(read, range(len(files))))
    if bad:
        raise BadInput(f"{path}: {len(bad):,} of {len(files):,} images cannot be read; remove or "
                       f"replace {assets.printable(', '.join(sorted(bad)[:3]))}")
    grey, sizes = zip(*seen)
    return images[..., :1].copy() if all(grey) else images, sizes


def decode(file, size):
    """The centre square of an image file, uint8 [size, size, 3], whether it is grey, and its own
    (width, height)."""
    with Image.open(file) as im:
        im = ImageOps.exif_transpose(im)                              # phones store turned pixels
    if im.mode.startswith("I"):                                       # 16 bits: convert() clips
        im = Image.fromarray((np.asarray(im) / 257).round().astype(np.uint8))
    grey, own = im.mode in ("1", "L", "LA"), im.size
    if im.has_transparency_data:
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA"))
    edge = min(own)
    left, top = (im.width - edge) // 2, (im.height - edge) // 2
    im = im.convert("RGB").crop((left, top, left + edge, top + edge))
    return np.asarray(im.resize((size, size), Image.LANCZOS)), grey, own


# ---- what was read -------------------------------------------------------------------------------
def report(path, skipped, names, sizes, size):
    """Say how many images were read, which files were not, which class has which label, and what
    became of the images' (width, height); of a single picture only the last, if it changed."""
    counts = dict(shrunk=sum(min(s) > size for s in sizes),
                  enlarged=sum(min(s) < size for s in sizes),
                  cropped=sum(w != h for w, h in sizes))
    done = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)
    ends = min(sizes, key=math.prod), max(sizes, key=math.prod)
    own = " .. ".join(dict.fromkeys(f"{w}x{h}" for w, h in ends))     # one if they are the same
    change = f"{own} -> {size}x{size}: {done or 'as stored'}"
    if path.is_file() and path.suffix.lower() in ENDINGS:
        return say_once(f"{path.name}: {change}") if done else None
    shown = [f"{i} {name}" for i, name in enumerate(names)]
    if len(shown) > 6:
        shown[5:-1] = [".."]
    say_once(f"{path.resolve().name}: {len(sizes):,} image{'s' * (len(sizes) > 1)} read"
             + (f", {len(skipped):,} skipped ({endings(skipped)})" if skipped else "")
             + (f"\n  labels    {assets.printable(', '.join(shown))}" if names else "")
             + f"\n  size      {change}")


def endings(files):
    """'.gif 2, .txt 1': how many files have which ending, of the first five."""
    count = Counter(Path(f).suffix.lower() or "no ending" for f in files).most_common(5)
    return assets.printable(", ".join(f"{end} {n:,}" for end, n in count)) or "no other files"


@lru_cache(maxsize=None)
def say_once(text):
    """A run and the teacher that it trains load the same data."""
    say(text)
