"""A data set is one uint8 tensor on the device: no workers, no queue; a batch is an index."""
import hashlib
import io
import json
import math
import os
import re
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageOps

from common import assets
from common.flags import DATASETS, BadInput, brief, meant, printable, say

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")     # whatever the ending: EPS would run a program
INDEX = "dataset.json"      # the labels of a data set in EDM's format, at its top
LATENT = dict(prompts=list, pipeline=str, sha256=str, size=int)     # in a .npz of common.latent, beside images, labels
warnings.filterwarnings("ignore", module="PIL")             # what cannot be read is named here
say_once = lru_cache(maxsize=None)(say)                     # a run and its teacher load the same


def mix(*ints):
    """One 63-bit seed from several integers; neighbouring inputs give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(ints).encode(), digest_size=8).digest(), "little") >> 1


@dataclass
class Data:
    name: str                 # digits, cifar10, ..., or that of the folder or file, if short
    images: torch.Tensor      # uint8 [N, C, H, W] on the device, channels_last; latents: float16
    labels: torch.Tensor      # int64 [N] on the device, zeros if there are none
    classes: int              # number of classes, 0 without labels
    names: list = field(default_factory=list)   # of the classes: str; of latents the captions
    latent: dict = field(default_factory=dict)  # of latents alone: pipeline, its sha256, size in pixels

    def batch(self, it, n, seed=0, flip=False, part=0, parts=1):
        """Images [n/parts, C, H, W] in [-1, 1], or latents, and labels [n/parts]: slice `part` of step `it`.

        The step takes images [it n, (it + 1) n) of an endless sequence of shuffled epochs. They and their flips follow
        from (seed, it), whatever `parts` (ranks x --accum) is."""
        size, device, count = len(self.images), self.images.device, n // parts
        start = it * n + part * count                                 # place in the sequence
        epochs = range(start // size, (start + count - 1) // size + 1)
        i = torch.cat([shuffled(size, seed, e, device) for e in epochs])[start % size:][:count]
        x = self.images[i]
        if flip:
            g = torch.Generator().manual_seed(mix(seed, 1, it))           # not the global one
            heads = torch.rand(n, 1, 1, 1, generator=g)[part * count:][:count] < 0.5
            x = torch.where(heads.to(device, non_blocking=True), x.flip(-1), x)         # no host sync
        return x.float() if self.latent else x.float() / 127.5 - 1, self.labels[i]

    @cached_property
    def sha256(self):
        """Of the bytes of images [N, C, H, W], labels and captions: what config.json knows the data by."""
        said = ["\0".join(self.names).encode()] if self.latent else []
        parts = [v.cpu().numpy().tobytes() for v in (self.images, self.labels)]
        return hashlib.sha256(b"".join(parts + said)).hexdigest()


@lru_cache(maxsize=2)         # a step may straddle two epochs
def shuffled(size, seed, epoch, device):
    g = torch.Generator().manual_seed(mix(seed, 0, epoch))
    return torch.randperm(size, generator=g).to(device)


# ---- reading -------------------------------------------------------------------------------------
def load(name, data_dir="data", size=0, device="cpu"):
    """The data set `name`: digits | mnist | fashion_mnist | cifar10, with -test: its test images | a folder or .zip of
    images, also in EDM's format | an image | a .npz. `size`, pixels a side, is for images, folders and .zip files; 0:
    32, or in EDM's format the size of its images; None: the one size of all. Raises BadInput."""
    path, base, names, latent = Path(os.path.expanduser(name)), name.removesuffix("-test"), None, {}
    if name == "digits":
        path = Path(__file__).with_name("digits.npz")
    if base in DATASETS and base != "digits":
        if size not in (None, 0, 32):                                 # before the download
            raise BadInput(f"{name} has images of 32 pixels a side; leave --size out")
        images, labels = assets.dataset(base, data_dir, "train" if name == base else "test")
        edge = (32 - images.shape[1]) // 2                            # black, for MNIST's 28 pixels
        images = np.pad(images, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    elif os.path.isdir(path) or os.path.isfile(path) and path.suffix.lower() in (".zip", *ENDINGS):
        images, labels, names = from_files(path, size)
        name = path.resolve().name if path.is_dir() else path.stem
    elif os.path.isfile(path) and path.suffix.lower() == ".npz":
        images, labels, names, latent = from_npz(path)
        if size not in (None, 0, images.shape[1]):
            raise BadInput(f"{printable(name)} has images of {images.shape[1]} pixels a side; leave --size out")
        name = path.stem
    else:
        such = "" if os.path.exists(path) else "such "
        raise BadInput(f"{printable(name[-200:])} is no {such}folder of images, .zip, .npz or picture, nor one of "
                       f"{', '.join(DATASETS)}{meant(name, DATASETS)}")
    classes = len(names) if latent else 0 if labels is None else int(labels.max()) + 1
    labels = torch.zeros(len(images)) if labels is None else torch.from_numpy(labels.astype(int))
    images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # as a view: channels_last
    labels, names = labels.to(device, torch.int64), names or [*map(str, range(classes))]
    return Data(printable(name)[:50], images, labels, classes, names, latent)


def from_npz(file):
    """uint8 [N, H, W, C], labels [N] or None, None, {}; of common.latent: float16 [N, h, w, C], labels, captions, and
    what Data.latent holds. Raises BadInput."""
    def array(z, name):                                               # in parts, whatever it claims
        part = SimpleNamespace(read=lambda n, read=z.open(name).read: read(min(n, 2**24)))
        return np.lib.format.read_array(part, allow_pickle=False)
    try:
        with zipfile.ZipFile(file) as z:
            assets.check_claims(file, z.infolist())
            images = array(z, "images.npy")
            labels = array(z, "labels.npy") if "labels.npy" in z.namelist() else None
            more = {k: array(z, f"{k}.npy") for k in LATENT} if "pipeline.npy" in z.namelist() else {}
        n, h, w, c = images.shape if images.ndim == 4 else (*images.shape, 1)
        kinds = (np.float16, range(1, 65), np.isfinite(images).all()) if more else (np.uint8, (1, 3), True)
        if images.dtype != kinds[0] or 0 in (n, h) or h != w or c not in kinds[1] or not kinds[2]:
            raise ValueError(f"images are {images.dtype} {images.shape}")
        if labels is not None and (labels.shape != (n,) or labels.dtype.kind not in "iu"
                                   or not 0 <= labels.min() <= labels.max() < max(n, 1000)):
            raise ValueError(f"labels, {labels.dtype} {labels.shape}, reach {labels.max()}")
        names = more.pop("prompts").astype(str).tolist() if more else None
        latent = {k: kind(more[k]) for k, kind in LATENT.items() if k in more}
        if more and not labels.max() < len(names):
            raise ValueError(f"labels reach {labels.max()}, of {len(names)} captions")
    except Exception as error:                                        # zip, zlib, numpy, ours
        raise BadInput(f"{printable(file)}: {brief(error)}; expected square images, uint8 [N,H,W] or [N,H,W,C], C 1 "
                       "or 3, and labels, if any, integers [N]: number the classes 0, 1, 2, ..")
    return images.reshape(n, h, w, c), labels, names, latent


# ---- folders, .zip files, pictures ---------------------------------------------------------------
def from_files(path, size):
    """Images uint8 [N, size, size, C] of a folder, a .zip or one picture, labels [N] or None, and the names of the
    classes. Says what was read, skipped and resized. Raises BadInput."""
    found, opened = contents(path)
    files, edm = [f for f in found if f.lower().endswith(ENDINGS)], INDEX in found
    skipped = sorted({*found} - {*files, INDEX})
    if not files:
        raise BadInput(f"{printable(path)}: no images {ENDINGS}, but {endings(skipped)}")
    labels, names = edm_labels(path, files, opened) if edm else class_folders(path, files)
    lost = {f.split("/")[0] for f in skipped if "/" in f} - set(names) if names and not edm else ()
    stored = size is None                                             # for a measurement
    with suppress(Exception), opened(files[0]) as file, Image.open(file, formats=FORMATS) as im:
        size = size or (edm or stored) and im.width == im.height and im.width     # `pictures` names broken ones
    if not 0 < (size := size or 32) <= 1024:
        raise BadInput(f"{printable(path)}: {size} pixels a side; give a --size of 1 .. 1024")
    images, sizes = pictures(path, files, opened, size)
    if stored and set(sizes) != {(size, size)}:
        raise BadInput(f"{printable(path)}: its images are not square and of one size; --size N makes them so")
    report(path, skipped, names, sorted(lost), sizes, size)
    return images, labels, names


def walk(top):
    """The files below a folder, also through links, without hidden ones: their names, sorted."""
    top, found, todo = top.absolute(), [], [""]
    for folder in todo:                                               # which grows
        path = top / folder
        if folder and path.is_symlink() and path.resolve() in [p.resolve() for p in path.parents]:
            raise BadInput(f"{printable(path)} is a link to a folder that holds it; remove it")
        for name in os.listdir(path):
            if not name.startswith("."):
                name = Path(folder, name).as_posix()
                (todo if os.path.isdir(top / name) else found).append(name)
    return sorted(found)


def contents(path):
    """The files of a folder, a .zip or, if it is a picture, that one: their names, sorted, without hidden ones, and a
    function that opens a name for reading. Raises BadInput."""
    def opened(f):
        file = path / f if path.is_dir() else path
        if not file.is_file():                                        # a pipe may wait for ever
            raise ValueError("no regular file")
        return open(file, "rb")

    try:
        if path.is_dir() or path.suffix.lower() != ".zip":
            return walk(path) if path.is_dir() else [path.name], opened
        pack = zipfile.ZipFile(path)
        assets.check_claims(path, pack.infolist())
    except Exception as error:                                        # zipfile's, struct's, codecs'
        raise BadInput(f"{printable(path)} cannot be read: {brief(error)}")
    found = {i.filename: min(i.file_size, assets.LIMIT) for i in pack.infolist()
             if i.filename[-1:] != "/" and "/." not in f"/{i.filename}"}
    return sorted(found), lambda f: io.BytesIO(pack.open(f).read(found[f]))


def class_folders(path, files):
    """Labels [N] and names: of the folders at the top, 2 before 10; or (None, []). BadInput."""
    tops = [f.rpartition("/")[0].split("/")[0] for f in files]
    names = sorted(set(tops), key=lambda s: (re.sub("[0-9]+", lambda d: d[0].zfill(30), s), s))
    if names == [""]:
        return None, []
    if "" in names:
        raise BadInput(printable(f"{path}: {files[tops.index('')]:.200} lies beside folders; sort all images into "
                                 "folders, which are the classes, or none"))
    label = {name: i for i, name in enumerate(names)}
    return np.array([label[top] for top in tops]), names


def edm_labels(path, files, opened):
    """Labels [N] and the numbers as names, from dataset.json: {"labels": [["00000/a.png", 6], ..]}; (None, []) if it
    holds null. Raises BadInput."""
    try:
        with opened(INDEX) as file:                                   # whose lines are short
            listed = dict(json.loads(file.read(2**20 + 1000 * len(files)))["labels"] or [])
        for v in listed.values():
            if type(v) is not int or not 0 <= v < max(len(listed), 1000):
                raise ValueError(f"label {v!r:.99}; number the classes 0, 1, 2, ..")
    except Exception as error:                                        # json's, zipfile's, ours
        raise BadInput(f"{printable(path)}: {INDEX} is not in EDM's format ({brief(error)})"
                       '; expected {"labels": [["00000/a.png", 6], ..]} or null; or rename it')
    if not listed:
        return None, []
    if wrong := sorted(listed.keys() ^ set(files), key=str):
        what = "has a label but is no image there" if wrong[0] in listed else "has no label"
        raise BadInput(f"{printable(path)}: by {INDEX}, {wrong[0]!r:.200} {what} ({len(wrong):,} such files); each "
                       "image needs a label, and each label an image")
    return np.array([listed[f] for f in files]), [str(i) for i in range(max(listed.values()) + 1)]


def pictures(path, files, opened, size):
    """uint8 [N,size,size,C] of image files, C = 1 if all are grey, and each one's (width, height). Raises BadInput."""
    try:
        images, bad = np.empty((len(files), size, size, 3), np.uint8), []
    except MemoryError as error:
        raise BadInput(f"{printable(path)}: {brief(error)}; give a smaller --size")

    def read(i):
        try:
            with opened(files[i]) as file:
                images[i], *seen = decode(file, size, alone)
            return seen
        except Exception as error:                                    # any decoder's, and ours
            why = type(error).__name__ if isinstance(error, OSError) else error
            bad.append(printable(f"{files[i]:.200} ({why!s:.200})"))

    with ThreadPoolExecutor() as pool, ThreadPoolExecutor(1) as alone:      # Pillow frees the GIL
        seen = list(pool.map(read, range(len(files))))
    if bad:
        raise BadInput(f"{printable(path)}: {len(bad):,} of {len(files):,} images cannot be read; remove or replace "
                       f"{', '.join(sorted(bad)[:3])}")
    grey, sizes = zip(*seen)
    return images[..., :1].copy() if all(grey) else images, sizes


def decode(file, size, alone=None):
    """The centre square of an image, uint8 [size,size,3]; whether it is grey; (width, height)."""
    im = Image.open(file, formats=FORMATS)                            # decodes no pixel yet
    if (pixels := math.prod(im.size)) > 50e6:
        raise ValueError(f"{im.width}x{im.height}, more than 50 million pixels")
    if pixels > 4e6 and alone:                                        # one by one: for the memory
        return alone.submit(decode, file, size).result()
    ImageOps.exif_transpose(im, in_place=True)                        # phones store turned pixels
    own, edge = im.size, min(im.size)
    left, top = (im.width - edge) // 2, (im.height - edge) // 2
    im = im.crop((left, top, left + edge, top + edge))
    if im.mode.startswith("I"):                                       # 16 bits: convert() clips
        im = Image.fromarray((np.asarray(im) / np.float32(257)).round().astype(np.uint8))
    grey = im.mode in ("1", "L", "LA")
    if im.has_transparency_data:
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    return np.asarray(im.convert("RGB").resize((size, size), Image.LANCZOS)), grey, own


# ---- what was read -------------------------------------------------------------------------------
def report(path, skipped, names, lost, sizes, size):
    """Say how many images were read, which files and folders (`lost`) were not, the labels of the classes, and what
    became of the (width, height); of a picture only the last, if it changed."""
    counts = dict(shrunk=sum(min(s) > size for s in sizes), enlarged=sum(min(s) < size for s in sizes),
                  cropped=sum(w != h for w, h in sizes))
    done = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)
    ends = min(sizes, key=math.prod), max(sizes, key=math.prod)
    own = " .. ".join(dict.fromkeys(f"{w}x{h}" for w, h in ends))     # one if they are the same
    change = f"{own} -> {size}x{size}: {done or 'as stored'}"
    if path.is_file() and path.suffix.lower() in ENDINGS:
        return say_once(f"{printable(path.name)}: {change}") if done else None
    text = f"{printable(path.resolve().name)}: {len(sizes):,} image{'s' * (len(sizes) > 1)} read"
    if skipped:
        text += f", {len(skipped):,} skipped ({endings(skipped)})"
    if names:
        labels = [f"{i} {name:.50}" for i, name in enumerate(names)]
        labels[5:-1] = [".."] if len(labels) > 6 else labels[5:-1]
        text += f"\n  labels    {printable(', '.join(labels))}"
    if lost:
        none = [f"{t:.50} ({endings(f for f in skipped if f.split('/')[0] == t)})" for t in lost[:3]]
        text += f"\n  no class  {printable(', '.join(none))}{', ..' * (len(lost) > 3)}: no image that is read"
    say_once(f"{text}\n  size      {change}")


def endings(files):
    """'.gif 2, .txt 1': how many files have which ending, of the first five."""
    count = Counter(Path(f).suffix.lower() or "no ending" for f in files).most_common(5)
    return printable(", ".join(f"{end} {n:,}" for end, n in count)) or "no other files"
