"""Any noise levels, and what a consistency model does without training (CM, arXiv:2303.01469, Algorithms 1 and 4).

t is the standard deviation of the noise, also for networks with another time. Images are [B,C,H,W] in [-1, 1]."""
import math
import os

import torch
import torch.nn.functional as F

from common.data import load
from common.flags import BadInput, printable

LUMA = torch.tensor([.2989, .5870, .1140], dtype=torch.float64).view(3, 1, 1)     # luminance of red, green, blue


def noised(net, x, t, z):
    """Images x at noise level t. f(x, t_min) = x: images have the noise t_min already; none is added below."""
    return x + (t**2 - net.t_min**2).clamp(min=0).sqrt() * z


@torch.no_grad()
def multistep(net, noise, y, ts, x=0.0, keep=lambda x: x):
    """Algorithm 1: noise is added to x, and removed, for each level of `ts` and slice of noise [K,B,C,H,W].
    Algorithm 4 is the same, from an image instead of 0, and `keep` restores what is known after each step."""
    f = getattr(net, "denoise", net)                      # TrigFlow's f as a function of the noise level
    for t, z in zip(torch.tensor(ts, dtype=noise.dtype, device=noise.device), noise, strict=True):
        x = keep(f(noised(net, x, t, z), t.expand(len(z), 1, 1, 1), y))
    return x


def karras(hi, lo, n=40, rho=7):
    """n noise levels from hi to lo (EDM, arXiv:2206.00364, eq. 5)."""
    return [(hi ** (1 / rho) + i / (n - 1) * (lo ** (1 / rho) - hi ** (1 / rho))) ** rho for i in range(n)]


def search(score, lo, hi):
    """The t between lo and hi with the lowest score of those tried: seven, evenly in ln t, then the midpoints on both
    sides of the best, until its neighbours are within 10 %."""
    tried, new = {lo: math.inf, hi: math.inf}, [lo * (hi / lo) ** (i / 8) for i in range(1, 8)]
    while new:
        tried |= {t: score(t) for t in (float(f"{t:.4g}") for t in new)}          # figures that can be typed
        ts, best = sorted(tried), min(tried, key=tried.get)
        i = ts.index(best)
        new = [math.sqrt(best * r) for r in (ts[i - 1], ts[i + 1]) if max(best / r, r / best) > 1.1]
    return best


# ---- editing -------------------------------------------------------------------------------------
def known(edit, mask, patch):
    """The orthogonal projection P on what `edit` keeps of an image: A^-1 (1 - Omega) A of Algorithm 4, whose line
    A^-1[(Ay)(1 - Omega) + (Ax)Omega] is x + P(y - x). So the rows of A that are not kept are not needed."""
    if edit == "inpaint":
        return lambda x: x * ~mask
    if edit == "colorize":                                # the one row kept is proportional to the luminance
        return lambda x: (x * LUMA.to(x)).sum(1, keepdim=True) * (LUMA / (LUMA**2).sum()).to(x)
    if edit == "superres":                                # the one row kept of a patch is its mean
        return lambda x: F.interpolate(F.avg_pool2d(x, patch), scale_factor=patch)
    return torch.zeros_like                               # stroke, denoise: all is generated


def change(net, edit, x0, noise, y, ts, mask=None, patch=None):
    """Algorithm 4 on images x0: what the network gets to see of them, and the result."""
    P, whole = known(edit, mask, patch), edit in ("stroke", "denoise")
    start = x0 if whole else P(x0)                        # with Omega = 1 the first line, P(x0), would leave nothing

    def keep(x):
        x = x.clamp(-1, 1)                                # not after the next line: it would change what is kept
        return x + P(x0 - x)

    seen = noised(net, x0, torch.tensor(ts[0]), noise[0]) if whole else start
    if edit == "colorize":                                # the grey image of the same luminance
        seen = (x0 * LUMA.to(x0)).sum(1, keepdim=True).expand_as(x0)
    return seen, multistep(net, noise, y, ts, start, keep)


def slerp(a, b, w):
    """From a (w = 0) to b (w = 1) along a great circle, each pair with its own angle; w [B,1,1,1]."""
    cos = F.cosine_similarity(a.flatten(1), b.flatten(1)).view(-1, 1, 1, 1)
    angle = cos.clamp(-1, 1).acos()
    return (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()


# ---- files ---------------------------------------------------------------------------------------
def read_images(name, size, channels, flag="--images"):
    """The images of a path, made to fit the network: uint8 [N,C,H,W], and labels [N] or None. Raises BadInput."""
    path = os.path.abspath(os.path.expanduser(name))      # not the data set of this name
    if not os.path.exists(path):
        raise BadInput(f"{flag} {printable(name[-200:])}: there is no such file or folder")
    data = load(path, size=0 if path.lower().endswith(".npz") else size)
    images = data.images
    if data.latent:
        raise BadInput(f"{flag} {printable(name)} holds latents; name pictures")
    if images.shape[-1] != size:
        raise BadInput(f"{flag} {printable(name)} has images of {images.shape[-1]} pixels a side, this run {size}; "
                       "resize them, or give a folder of pictures, which are resized here")
    if images.shape[1] > channels:
        images = (images * LUMA).sum(1, keepdim=True).round().to(torch.uint8)
    return images.expand(-1, channels, -1, -1), data.labels if data.classes else None


def mask_of(file, size):
    """bool [H,W], true where to generate: where a picture is white, or the middle half of each side. BadInput."""
    if file:
        return read_images(file, size, 1, "--mask")[0][0, 0] > 127
    inside = (torch.arange(size) - (size - 1) / 2).abs() < size / 4
    return inside[:, None] & inside
