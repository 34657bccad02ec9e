"""The network and the training step written the obvious way: the other side of the speed comparison, and an
independent statement of the network for the tests. NCHW, einsum attention, torch's own layers as functions."""
import math

import torch
import torch.nn.functional as F


def block(p, name, x, emb, up=False, down=False):
    """One residual block; p: dict of weights by their checkpoint names."""
    def conv(part, h, k):
        return F.conv2d(h, p[f"{name}.{part}.weight"], p[f"{name}.{part}.bias"], padding=k // 2)

    def norm(part, h):
        return F.group_norm(h, min(32, h.shape[1] // 4), p[f"{name}.{part}.weight"], p[f"{name}.{part}.bias"], 1e-6)

    def resample(h):
        if up:
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        b, c, height, width = h.shape
        return h.view(b, c, height // 2, 2, width // 2, 2).mean((3, 5)) if down else h

    h = conv("conv0", resample(F.silu(norm("norm0", x))), 3)
    h = h + (emb @ p[f"{name}.affine.weight"].T + p[f"{name}.affine.bias"])[:, :, None, None]
    h = conv("conv1", F.silu(norm("norm1", h)), 3)
    x = conv("skip", resample(x), 1) if f"{name}.skip.weight" in p else x
    x = (x + h) * math.sqrt(0.5)
    if f"{name}.qkv.weight" in p:
        b, c, height, width = x.shape
        qkv = conv("qkv", norm("norm2", x), 1).view(b, c, 3, height * width)      # q, k, v interleaved in threes
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        w = torch.einsum("bci,bcj->bij", q, k / math.sqrt(c)).softmax(-1)
        x = (conv("proj", torch.einsum("bij,bcj->bci", w, v).view_as(x), 1) + x) * math.sqrt(0.5)
    return x


def unet(p, x, c_noise, onehot=None):
    """DDPM++ without dropout. p: weights by name, x [B,C,H,W], c_noise [B], onehot [B, classes] or None."""
    half = p["map_layer0.weight"].shape[1] // 2
    freqs = torch.tensor([10000 ** (-j / (half - 1)) for j in range(half)], dtype=x.dtype, device=x.device)
    a = torch.outer(c_noise, freqs)
    e = torch.cat([torch.sin(a), torch.cos(a)], dim=1)
    if onehot is not None:
        e = e + onehot * math.sqrt(onehot.shape[1]) @ p["map_label.weight"].T + p["map_label.bias"]
    for layer in ("map_layer0", "map_layer1"):
        e = F.silu(e @ p[f"{layer}.weight"].T + p[f"{layer}.bias"])
    skips = []
    for name in dict.fromkeys(".".join(k.split(".")[:2]) for k in p if k.startswith(("enc", "dec"))):
        if name.endswith("_conv"):
            if name.startswith("dec"):
                return F.conv2d(x, p[name + ".weight"], p[name + ".bias"], padding=1)
            x = F.conv2d(x, p[name + ".weight"], p[name + ".bias"], padding=1)
        elif name.endswith("_norm"):
            x = F.silu(F.group_norm(x, min(32, x.shape[1] // 4), p[name + ".weight"], p[name + ".bias"], 1e-6))
        else:
            x = torch.cat([x, skips.pop()], 1) if name.startswith("dec") and "block" in name else x
            x = block(p, name, x, e, up=name.endswith("_up"), down=name.endswith("_down"))
        if name.startswith("enc"):
            skips.append(x)


def edm(p, x, t, sd, onehot=None):
    """D(x; t) with t [B]."""
    t4 = t.view(-1, 1, 1, 1)
    f = unet(p, x / torch.sqrt(t4**2 + sd**2), torch.log(t) / 4, onehot)
    return sd**2 / (t4**2 + sd**2) * x + t4 * sd / torch.sqrt(t4**2 + sd**2) * f
