"""A data set is one uint8 tensor on the device: no workers, no queue; a batch is an index."""
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from glob import glob
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from common import assets
from common.flags import DATASETS, BadInput

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


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
    a folder of images | an image | a .npz. Downloads stay in `data_dir`. `size` (pixels a side,
    0 = 32) is for images and folders of them. Raises BadInput."""
    path, base = Path(name).expanduser(), name.removesuffix("-test")
    if name == "digits":
        path = Path(__file__).with_name("digits.npz")
    if base in DATASETS and base != "digits":
        check_size(name, size, 32)                                    # before the download
        images, labels = assets.dataset(base, data_dir, "train" if name == base else "test")
        edge = (32 - images.shape[1]) // 2                            # black, for MNIST's 28 pixels
        images = np.pad(images, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    elif path.is_dir():
        images, labels = from_folder(path, size or 32)
        name = path.resolve().name
    elif path.suffix.lower() in ENDINGS:
        images, labels, name = pictures([path], size or 32), None, path.stem
    elif path.is_file() and path.suffix == ".npz":
        images, labels = from_npz(path)
        check_size(name, size, images.shape[1])
        name = path.stem
    else:
        raise BadInput(f"{name}: no such folder of images or .npz; or take {', '.join(DATASETS)}")
    classes = 0 if labels is None else int(labels.max()) + 1
    labels = torch.zeros(len(images)) if labels is None else torch.from_numpy(labels)
    images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # as a view: channels_last
    return Data(name, images, labels.to(device, torch.int64), classes)


def check_size(name, size, native):
    if size not in (0, native):
        raise BadInput(f"{name} has {native} pixels a side, not {size}; leave the size out")


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


def from_folder(folder, size):
    """Images as from `pictures`, of all files below, hidden ones apart; labels [N] or None: the
    folders of the first level, sorted, are the classes. Raises BadInput."""
    found = glob("**/*", root_dir=folder, recursive=True)             # rglob skips links
    files = sorted(f for f in found if f.lower().endswith(ENDINGS))
    if not files:
        raise BadInput(f"{folder}: no images there ({' '.join(ENDINGS)})")
    tops = [Path(f).parts[0] if Path(f).name != f else "" for f in files]
    names, labels = np.unique(tops, return_inverse=True)
    if "" in names and len(names) > 1:
        raise BadInput(f"{folder}: {files[tops.index('')]} lies beside folders; sort all images "
                       "into folders, which are the classes, or none")
    return pictures([folder / f for f in files], size), None if "" in names else labels


def pictures(files, size):
    """uint8 [N,size,size,C] of image files, C = 1 if all are grey. BadInput names broken ones."""
    images, bad = np.empty((len(files), size, size, 3), np.uint8), []

    def read(i):
        try:
            images[i], grey = decode(files[i], size)
            return grey
        except Exception as error:                                    # any decoder's
            bad.append(f"{files[i]} ({type(error).__name__})")

    with ThreadPoolExecutor() as pool:                                # Pillow releases the GIL
        grey = list(pool.map(read, range(len(files))))
    if bad:
        raise BadInput(f"{len(bad)} of {len(files)} images cannot be read; remove or replace "
                       + ", ".join(sorted(bad)[:3]))
    return images[..., :1].copy() if all(grey) else images


def decode(file, size):
    """The centre square of an image file, uint8 [size, size, 3], and whether it is grey."""
    with Image.open(file) as im:
        im = ImageOps.exif_transpose(im)                              # phones store turned pixels
    if im.mode.startswith("I"):                                       # 16 bits: convert() clips
        im = Image.fromarray((np.asarray(im) / 257).round().astype(np.uint8))
    grey = im.mode in ("1", "L", "LA")
    if im.has_transparency_data:
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA"))
    side = min(im.size)
    left, top = (im.width - side) // 2, (im.height - side) // 2
    im = im.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(im.resize((size, size), Image.LANCZOS)), grey
