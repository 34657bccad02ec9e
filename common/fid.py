"""Distances between two sets of images, uint8 [N, C, H, W]: FID, and the Frechet distance of pixels, for data that are
too small for Inception and for runs without a GPU; precision, recall, density, coverage, which tell blur from missing
modes; the noise of which evaluations make their images."""
import os
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from common import assets
from common.data import load, mix
from common.flags import BadInput, Parser, brief, device_of, say

NOISE = 2**26                     # numbers of noise to draw at a time: half a gigabyte
MODE = "legacy_tensorflow"        # the resize behind the published figures; clean-fid's own is "clean"
FEW = 10_000                      # images, at most, whose neighbours are looked for: the time grows with the square
REAL = {}                         # {(SHA-256, n, mode): features of real images}, of the last figure


def noise_of(ids, k, shape, device, seed=0):
    """Standard normal noise [k, len(ids), *shape] for k sampling steps: image i depends on (seed, i) alone, not on its
    batch, its rank or the device, and its first slice does not depend on k. It is drawn in float32, three times as fast
    as float64, and returned in float64 where the device has it: the samplers compute in the precision of the noise."""
    noise = torch.empty(k, len(ids), *shape)
    for j, i in enumerate(ids):
        g = torch.Generator().manual_seed(mix(seed, int(i)))
        for step in noise[:, j]:                          # one by one: randn works in blocks of 16, which k would shift
            torch.randn(shape, generator=g, out=step)
    wide = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return noise.to(device).to(wide)


def quantise(x, latent=False):
    """Images in [-1, 1] -> uint8, truncated as in EDM's generate.py: metrics are of what a file would hold; latents:
    float32. Raises FloatingPointError if a value is not finite, which would look like a black pixel."""
    if not x.isfinite().all():
        raise FloatingPointError("the images are not finite: the training of this network has diverged, or its file is "
                                 "damaged; take an earlier checkpoint")
    return x.float() if latent else (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def frechet(m1, c1, m2, c2):
    """Squared Frechet distance of the normal distributions N(m1, c1) and N(m2, c2), float64 (Dowson and Landau 1982,
    eq. 16). The trace of the root of c1 c2 is the sum of the roots of the eigenvalues of c1^1/2 c2 c1^1/2, which are
    real. BadInput if a value is not finite."""
    if not torch.cat([x.flatten() for x in (m1, c1, m2, c2)]).isfinite().all():
        raise BadInput("the statistics of these images are not finite, so they have no distance; check the device")
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float(((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * cross)


def pixels(images):
    """uint8 [N,C,H,W] -> float64 [N,D]: the pixels in [-1, 1], averaged down to 8x8; latents, which are floats, too."""
    x = images.cpu().double()
    return F.adaptive_avg_pool2d(x if images.is_floating_point() else x / 127.5 - 1, 8).flatten(1)


def fd_pixels(real, fake):
    """Frechet distance of `pixels` of uint8 images, with unbiased covariance. It is not an FID."""
    def moments(x):
        return x.mean(0), x.T.cov(correction=min(1, len(x) - 1))    # a single image has no spread
    return frechet(*moments(pixels(real)), *moments(pixels(fake)))


def prdc(real, fake, k=5):
    """How far two sets of points, [N,D] and [M,D], cover each other. A ball reaches from a point to the k-th nearest of
    its own set, or to the farthest of fewer; k = 5 is Naeem's, Kynkaanniemi has 3. Returns {name: value}:

    precision   share of fake points in the ball of a real one         (Kynkaanniemi et al. 2019, arXiv:1904.06991)
    recall      share of real points in the ball of a fake one         (the same)
    density     balls of real points around a fake one, divided by k   (Naeem et al. 2020, arXiv:2002.09797, eq. 3)
    coverage    share of real points whose own ball holds a fake one   (the same, eq. 4)"""
    real, fake = real.double(), fake.double()

    def radii(x):                                         # the nearest is the point itself
        return torch.cat([torch.cdist(rows, x).kthvalue(min(k, len(x) - 1) + 1).values for rows in x.split(1000)])
    r, s = radii(real), radii(fake)
    around, recall, coverage = torch.zeros(len(fake), dtype=torch.int64, device=fake.device), 0, 0
    for rows, radius in zip(real.split(1000), r.split(1000)):             # 10,000 x 10,000 distances are 0.8 GB
        d = torch.cdist(rows, fake)
        near = d <= radius[:, None]
        around += near.sum(0)
        recall += int((d <= s).any(1).sum())
        coverage += int(near.any(1).sum())
    return dict(precision=float((around > 0).double().mean()), recall=recall / len(real),
                density=float(around.double().mean()) / k, coverage=coverage / len(real))


def chosen(data, n):
    """The indices of the real images, at most n, with which others are compared: the same in every run."""
    return torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[:n]


# ---- FID (Heusel et al. 2017, arXiv:1706.08500) --------------------------------------------------
def fid(data, fake, data_dir, mode=MODE, kept=None):
    """FID of uint8 images [N,C,H,W] against all images of a data set, whose statistics are kept in `data_dir`.
    Several ranks share the work. `kept`: as of moments. Raises BadInput if there is no Inception to be had."""
    net = inception(data_dir, data.images.device)
    return frechet(*reference(data, data_dir, mode), *moments(fake, net, mode, kept))


def neighbours(data, n, data_dir, mode=MODE):
    """The features [n, D] of the real images with which prdc compares n generated ones; None if these are too many."""
    key = data.sha256, n, mode
    if n <= FEW and key not in REAL:
        images = data.images[chosen(data, n).to(data.images.device)]
        moments(images, inception(data_dir, images.device), mode, kept := [])
        REAL.clear()
        REAL[key] = torch.cat(kept)
    return REAL.get(key)


@lru_cache(maxsize=1)
def inception(data_dir, device):
    """The network on `device`; on the CPU instead of a device without float64."""
    return assets.inception(data_dir).to(device if device.type == "cuda" else "cpu")


def reference(data, data_dir, mode=MODE):
    """Mean and covariance of the features of a whole data set; computed once, then read from `data_dir`."""
    path = Path(data_dir) / f"inception-{data.name[:40]}-{data.sha256[:12]}-{mode}.npz"
    about = np.array([data.sha256, mode, assets.INCEPTION])   # what the figure depends on
    found = [stored(path, about)]
    if dist.is_initialized():                             # the ranks must agree on who computes
        dist.broadcast_object_list(found)
    if found[0]:
        return found[0]
    mean, cov = moments(data.images, inception(data_dir, data.images.device), mode)
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".inception-", dir=path.parent) as tmp:
                np.savez(f"{tmp}/new.npz", mean=mean, cov=cov, about=about)
                os.replace(f"{tmp}/new.npz", path)        # whatever bears the name is whole
        except OSError as error:                          # the figure does not need the file
            say(f"{path} cannot be written, so the next FID computes it again: {brief(error)}")
    return mean, cov


def stored(path, about):
    """Mean and covariance of an earlier run; None if there are none, or not of what is asked `about`, or damaged."""
    with suppress(Exception):                             # numpy's, zipfile's
        z = assets.npz(path) if path.is_file() else {}
        mean, cov = z["mean"], z["cov"]
        fit = mean.dtype == cov.dtype == np.float64 and cov.shape == (*mean.shape, *mean.shape) and mean.ndim == 1
        if fit and np.array_equal(z["about"], about) and np.isfinite(mean).all() and np.isfinite(cov).all():
            return torch.from_numpy(mean), torch.from_numpy(cov)


def moments(images, net, mode=MODE, kept=None):
    """Mean [D] and unbiased covariance [D, D], float64, of the features of uint8 images [N,C,H,W]; of at most FEW the
    features themselves, on the CPU, are appended to the list `kept`, in whatever order."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(net.parameters()).device
    mine, total = images[rank::world].split(100 if device.type == "cuda" else 25), 0
    for batch in tqdm(mine, "Inception", leave=False, disable=rank > 0, delay=2, file=sys.stderr):
        f = features(net, batch.to(device), mode)
        if kept is not None and len(images) <= FEW:
            kept.append(f.cpu())
        f = F.pad(f.double(), (1, 0), value=1.0)
        total = total + f.T @ f                           # the column of ones gives count and sum
    if world > 1:
        dist.all_reduce(total)
        if kept is not None and len(images) <= FEW:
            dist.all_gather_object(parts := [None] * world, kept)
            kept[:] = sum(parts, [])
    total = total.cpu()
    n, mean = total[0, 0], total[0, 1:] / total[0, 0]
    return mean, (total[1:, 1:] - n * mean.outer(mean)) / (n - 1).clamp(min=1)


@torch.no_grad()
def features(net, images, mode=MODE):
    """clean-fid's features, float32 [B, 2048], of uint8 images [B,C,H,W], grey ones taken as three equal channels."""
    x = images.expand(-1, 3, -1, -1)
    if mode == MODE:
        x = resize(x.float())
    else:
        from cleanfid.resize import build_resizer         # Pillow's, antialiased bicubic
        one = build_resizer(mode)
        x = np.stack([one(image) for image in x.permute(0, 2, 3, 1).cpu().numpy()])
        x = torch.from_numpy(x).permute(0, 3, 1, 2).to(images.device)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):   # TF32 moves the figure
        return net((x - 128) / 128).flatten(1)


def resize(x, size=299):
    """Bilinear as in TensorFlow 1, float [B,C,H,W]: output pixel j is read at j * W / size; no half-pixel shift."""
    for dim in (2, 3):
        n = x.shape[dim]
        at = torch.arange(size, device=x.device, dtype=x.dtype) * n / size
        low = at.long()
        weight = (at - low).view(-1, 1) if dim == 2 else at - low
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1)), weight)
    return x


def main(argv=None):
    """python -m common.fid IMAGES REFERENCE"""
    ap = Parser(prog="python -m common.fid", allow_abbrev=False, description="FID of one set of images against "
                "another; each is a data set, such as cifar10 or cifar10-test, a folder or .zip of images, a .npz.")
    ap.add_argument("images")
    ap.add_argument("reference", help="its statistics are kept in --data-dir")
    ap.add_argument("--mode", choices=[MODE, "clean"], default=MODE, help="how images are resized [%(default)s]")
    ap.add_argument("--size", type=int, help="crop and shrink a folder's images to this many pixels a side [as stored]")
    ap.add_argument("--data-dir", "--data_dir", default="data", help="where downloads are kept [%(default)s]")
    ap.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="[%(default)s]")
    a = ap.parse_args(argv)
    if a.size is not None and not 0 < a.size < 2**12:
        raise BadInput(f"--size {a.size} must be at least 1 and below {2**12}")
    fake, real = (load(name, a.data_dir, a.size, device_of(a.device)) for name in (a.images, a.reference))
    if fake.latent or real.latent:
        raise BadInput("latents are no images: draw some of a run with python -m common.sample RUN --out images.npz")
    side, other = fake.images.shape[-1], real.images.shape[-1]
    if side != other:                                     # a blurred set is another set
        raise BadInput(f"{a.images} has images of {side} pixels a side, {a.reference} of {other}; --size N crops and "
                       "shrinks the images of folders")
    n, kept = len(fake.images), []
    value, near = fid(real, fake.images, a.data_dir, a.mode, kept), neighbours(real, n, a.data_dir, a.mode)
    print(f"FID {value:.3f}: {n:,} images of {a.images} against {len(real.images):,} of {a.reference}, "
          f"{side}x{side}, {a.mode}")
    if near is not None:
        print(", ".join(f"{name} {v:.3f}" for name, v in prdc(near, torch.cat(kept)).items()))
    return value


if __name__ == "__main__":
    main()
