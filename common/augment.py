"""EDM's augmentation of training images, which does not leak into the samples   (EDM, arXiv:2206.00364, App. F.2).

Images are flipped, scaled, turned, stretched and shifted at random, and the network is told how. With labels of zero,
or none, it makes images to which nothing was done. Nothing is read back from the device."""
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

LABELS = 9                        # of each image: how it was changed
# Low-pass filter of the sym6 wavelet. It is orthonormal: up-sampling and down-sampling with it change nothing.
SYM6 = (.0154041093, .0034907121, -.1179901111, -.0483117426, .4910559419, .7876411410, .3379294217,
        -.0726375228, -.0210602925, .0447249018, .0017677119, -.0078007083)


def augment(x, p):
    """x [B,C,H,W] -> the same shape, labels [B, 9]. p: probability of each change, but of a horizontal flip 1/2."""
    a = draw(len(x), p, x.device)
    return change(x, a).to(x.dtype), labels(a)


def draw(n, p, device):
    """The changes of n images, a dict of [n], 0 for none: flips 0 or 1; scale and stretch in units of 0.2 octaves;
    turn and the axis of the stretch in radians; shifts in eighths of the image."""
    normal, uniform = partial(torch.randn, n, device=device), partial(torch.rand, n, device=device)
    flip_x, flip_y, turn, axis = uniform() < 0.5, uniform() < 0.5, uniform() * 2 - 1, uniform() * 2 - 1
    gates = [uniform() < p for _ in range(5)]             # one for both shifts
    return dict(flip_x=flip_x.float(), flip_y=flip_y * gates[0].float(), scale=normal() * gates[1],
                turn=turn * torch.pi * gates[2], stretch=normal() * gates[3], axis=axis * torch.pi * (uniform() < 0.5),
                shift_x=normal() * gates[4], shift_y=normal() * gates[4])


def labels(a):
    """What the network is told of the changes `a`: [B, 9], all 0 where nothing was done."""
    return torch.stack([a["flip_x"], a["flip_y"], a["scale"], a["turn"].cos() - 1, a["turn"].sin(),
                        a["stretch"] * a["axis"].cos(), a["stretch"] * a["axis"].sin(), a["shift_x"], a["shift_y"]], 1)


def change(x, a):
    """The images x [B,C,H,W] after the changes `a`."""
    def turned(angle):
        return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    for name, dim in (("flip_x", 3), ("flip_y", 2)):
        x = torch.where(a[name].view(-1, 1, 1, 1) > 0, x.flip(dim), x)
    s, q = 2 ** (0.2 * a["scale"]), 2 ** (0.2 * a["stretch"])
    A = turned(a["turn"] - a["axis"]) @ torch.diag_embed(torch.stack([1 / q, q], 1) / s[:, None]) @ turned(a["axis"])
    shift = torch.stack([a["shift_x"] * x.shape[3], a["shift_y"] * x.shape[2]], 1) / 8
    return resample(x, A, -A @ shift[:, :, None])


def resample(x, A, b):
    """x [B,C,H,W] at the points A p + b for each pixel p, from the centre; A [B,2,2], b [B,2,1]. An image is mirrored
    at its edges, once. Interpolates linearly at twice the resolution: at that of the image it would blur."""
    h, w = x.shape[2:]
    x = rescale(F.pad(x, (w - 1, w - 1, h - 1, h - 1), mode="reflect"), F.conv_transpose2d)
    p = [torch.arange(-n - 5.5, n + 6, device=x.device) / 2 + 0.25 for n in (w, h)]       # 3 pixels beyond the edges
    u, v = ((A @ torch.cartesian_prod(*p).T + b) * 2 - 0.5).unbind(1)     # the filter shifts by half a pixel
    grid = torch.stack([2 * u / x.shape[3], 2 * v / x.shape[2]], 2).view(len(x), 2 * w + 12, 2 * h + 12, 2)
    return rescale(F.grid_sample(x, grid.transpose(1, 2).to(x.dtype), align_corners=False), F.conv2d)[:, :, 3:-3, 3:-3]


def rescale(x, conv):             # conv2d: to half the resolution; conv_transpose2d: to twice
    taps = filter_on(x.device, x.dtype).expand(x.shape[1], 1, 12)
    x = conv(x, taps[:, :, :, None], stride=(2, 1), padding=(5, 0), groups=x.shape[1])
    return conv(x, taps[:, :, None, :], stride=(1, 2), padding=(0, 5), groups=x.shape[1])


@lru_cache                        # a copy to the device in each step would wait for it
def filter_on(device, dtype):
    return torch.tensor(SYM6, device=device, dtype=dtype)
