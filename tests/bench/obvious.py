"""The networks and the training step written the obvious way: the other side of the speed comparison, and an
independent statement of the networks for the tests. NCHW, einsum attention, torch's own layers as functions."""
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


# ---- the two other families: each layer by the names of its weights, nothing shared with common/unet.py -----------
def smooth_up(h):
    """[1, 3, 3, 1] / 4 on each axis between zeros, pixel by pixel: 3/4 of the nearest pixel, 1/4 of the next."""
    for axis in (2, 3):
        n, zero = h.shape[axis], torch.zeros_like(h.narrow(axis, 0, 1))
        before = torch.cat([zero, h.narrow(axis, 0, n - 1)], axis)
        after = torch.cat([h.narrow(axis, 1, n - 1), zero], axis)
        h = torch.stack([(3 * h + before) / 4, (3 * h + after) / 4], axis + 1).flatten(axis, axis + 1)
    return h


def smooth_down(h, border=1):
    """[1, 3, 3, 1] / 8 on each axis, every second position; `border` zeros are put around first."""
    h = F.pad(h, (border,) * 4)
    h = (h[:, :, 0:-3:2] + 3 * h[:, :, 1:-2:2] + 3 * h[:, :, 2:-1:2] + h[:, :, 3::2]) / 8
    return (h[..., 0:-3:2] + 3 * h[..., 1:-2:2] + 3 * h[..., 2:-1:2] + h[..., 3::2]) / 8


def ncsnpp_block(p, name, x, emb):
    """DDPM++'s block around smooth resampling."""
    resample = smooth_up if name.endswith("_up") else smooth_down
    if not name.endswith(("_up", "_down")):
        return block(p, name, x, emb)
    w = {k[len(name) + 1:]: v for k, v in p.items() if k.startswith(name + ".")}
    h = F.silu(F.group_norm(x, min(32, x.shape[1] // 4), w["norm0.weight"], w["norm0.bias"], 1e-6))
    h = F.conv2d(resample(h), w["conv0.weight"], w["conv0.bias"], padding=1)
    h = h + F.linear(emb, w["affine.weight"], w["affine.bias"]).view(len(emb), -1, 1, 1)
    h = F.silu(F.group_norm(h, min(32, h.shape[1] // 4), w["norm1.weight"], w["norm1.bias"], 1e-6))
    h = F.conv2d(h, w["conv1.weight"], w["conv1.bias"], padding=1)
    return (h + F.conv2d(resample(x), w["skip.weight"], w["skip.bias"])) / math.sqrt(2)


def ncsnpp(p, freqs, x, c_noise, onehot=None):
    """NCSN++ without dropout; freqs: the buffer map_noise.freqs."""
    a = 2 * math.pi * torch.outer(c_noise, freqs)
    e = torch.cat([torch.sin(a), torch.cos(a)], dim=1)
    if onehot is not None:
        e = e + onehot * math.sqrt(onehot.shape[1]) @ p["map_label.weight"].T + p["map_label.bias"]
    for layer in ("map_layer0", "map_layer1"):
        e = F.silu(e @ p[f"{layer}.weight"].T + p[f"{layer}.bias"])
    skips, image = [], x
    for name in dict.fromkeys(".".join(k.split(".")[:2]) for k in p if k.startswith(("enc", "dec"))):
        if name.startswith("enc") and name.endswith("_conv"):
            skips.append(F.conv2d(x, p[name + ".weight"], p[name + ".bias"], padding=1))
        elif name.endswith("_aux_residual"):
            image = smooth_down(F.conv2d(image, p[name + ".weight"], padding=2), border=0)
            image = image + p[name + ".bias"].view(1, -1, 1, 1)
            image = (skips.pop() + image) / math.sqrt(2)
            skips.append(image)
        elif name.startswith("enc"):
            skips.append(ncsnpp_block(p, name, skips[-1], e))
        elif name.endswith("_in0"):
            x = ncsnpp_block(p, name, skips[-1], e)
        elif name.endswith("_aux_norm"):
            x = F.silu(F.group_norm(x, min(32, x.shape[1] // 4), p[name + ".weight"], p[name + ".bias"], 1e-6))
        elif name.endswith("_aux_conv"):
            return F.conv2d(x, p[name + ".weight"], p[name + ".bias"], padding=1)
        else:
            x = ncsnpp_block(p, name, torch.cat([x, skips.pop()], 1) if "_block" in name else x, e)


def adm_block(p, name, x, emb):
    def conv(part, h, k):
        return F.conv2d(h, p[f"{name}.{part}.weight"], p[f"{name}.{part}.bias"], padding=k // 2)

    def norm(part, h):
        g = min(32, h.shape[1] // 4)
        h = h.view(h.shape[0], g, h.shape[1] // g, *h.shape[2:])
        h = (h - h.mean((2, 3, 4), keepdim=True)) / torch.sqrt(h.var((2, 3, 4), correction=0, keepdim=True) + 1e-5)
        w, b = p[f"{name}.{part}.weight"], p[f"{name}.{part}.bias"]
        return h.flatten(1, 2) * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)

    def resample(h):
        if name.endswith("_up"):
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2]) / 4 \
            if name.endswith("_down") else h

    h = conv("conv0", resample(F.silu(norm("norm0", x))), 3)
    both = emb @ p[f"{name}.affine.weight"].T + p[f"{name}.affine.bias"]
    half = both.shape[1] // 2
    h = norm("norm1", h) * (both[:, :half, None, None] + 1) + both[:, half:, None, None]
    h = conv("conv1", F.silu(h), 3)
    x = resample(x)
    x = h + (conv("skip", x, 1) if f"{name}.skip.weight" in p else x)
    if f"{name}.qkv.weight" in p:
        b, c, height, width = x.shape
        heads, qkv = c // 64, conv("qkv", norm("norm2", x), 1)
        out = []
        for i in range(heads):                            # head by head, q, k, v interleaved in threes
            mine = qkv[:, 3 * i * (c // heads):3 * (i + 1) * (c // heads)].flatten(2)
            q, k, v = mine[:, 0::3], mine[:, 1::3], mine[:, 2::3]
            w = (q.transpose(1, 2) @ k / math.sqrt(c // heads)).softmax(-1)
            out.append(v @ w.transpose(1, 2))
        x = x + conv("proj", torch.cat(out, 1).view_as(x), 1)
    return x


def adm(p, x, c_noise, onehot=None):
    """ADM without dropout."""
    half = p["map_layer0.weight"].shape[1] // 2
    a = torch.outer(c_noise, torch.tensor([10000 ** (-j / half) for j in range(half)], dtype=x.dtype))
    e = torch.cat([torch.cos(a), torch.sin(a)], dim=1)
    e = F.silu(e @ p["map_layer0.weight"].T + p["map_layer0.bias"]) @ p["map_layer1.weight"].T + p["map_layer1.bias"]
    e = F.silu(e if onehot is None else e + onehot @ p["map_label.weight"].T)
    skips = []
    for name in dict.fromkeys(".".join(k.split(".")[:2]) for k in p if k.startswith(("enc", "dec"))):
        if name.endswith("_conv"):
            x = F.conv2d(x, p[name + ".weight"], p[name + ".bias"], padding=1)
        else:
            x = torch.cat([x, skips.pop()], 1) if name.startswith("dec") and "_block" in name else x
            x = adm_block(p, name, x, e)
        if name.startswith("enc"):
            skips.append(x)
    x = F.silu(F.group_norm(x, min(32, x.shape[1] // 4), p["out_norm.weight"], p["out_norm.bias"], 1e-5))
    return F.conv2d(x, p["out_conv.weight"], p["out_conv.bias"], padding=1)


# ---- DiT: image by image, token by token, head by head, with torch's own layers where there are some ---------------
def layer(p, name):
    w = p[name + ".weight"]
    module = torch.nn.Linear(w.shape[1], w.shape[0], dtype=w.dtype)
    with torch.no_grad():
        module.weight.copy_(w)
        module.bias.copy_(p[name + ".bias"])
    return module


def waves(v, n):
    freqs = [10000 ** (-j / (n // 2 - 1)) for j in range(n // 2)]
    return [math.sin(v * f) for f in freqs] + [math.cos(v * f) for f in freqs]


def rms(x, gain):
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) * gain


def dit_block(p, name, h, c):
    """h [tokens, width] and c [width] of one image."""
    width, d = h.shape[1], len(p[name + ".q_norm.weight"])
    norm = torch.nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
    m = layer(p, name + ".modulation")(c)
    gain0, bias0, gate0, gain1, bias1, gate1 = [m[i * width:(i + 1) * width] for i in range(6)]
    qkv, out = layer(p, name + ".qkv")(norm(h) * (1 + gain0) + bias0), []
    for i in range(width // d):
        q, k, v = [qkv[:, j * width + i * d:j * width + (i + 1) * d] for j in range(3)]
        q, k = rms(q, p[name + ".q_norm.weight"]), rms(k, p[name + ".k_norm.weight"])
        out.append(torch.stack([sum(w * u for w, u in zip(torch.softmax(k @ one / math.sqrt(d), 0), v)) for one in q]))
    h = h + gate0 * layer(p, name + ".proj")(torch.cat(out, 1))
    mlp = torch.nn.Sequential(layer(p, name + ".mlp0"), torch.nn.GELU("tanh"), layer(p, name + ".mlp1"))
    return h + gate1 * mlp(norm(h) * (1 + gain1) + bias1)


def dit(p, x, c_noise, y=None, patch=2):
    """DiT without dropout. p: weights by name, x [B,C,H,W], c_noise [B], y [B] or None."""
    width, (_, channels, size, _), images = len(p["patches.bias"]), x.shape, []
    tower = torch.nn.Sequential(layer(p, "map_layer0"), torch.nn.SiLU(), layer(p, "map_layer1"))
    for i, image in enumerate(x):
        c = tower(torch.tensor(waves(float(c_noise[i]), width), dtype=x.dtype))
        if "map_label" in p:
            c = c + p["map_label"][len(p["map_label"]) - 1 if y is None or y[i] < 0 else int(y[i])]
        c, tokens = torch.nn.functional.silu(c), []
        places = [(row, col) for row in range(size // patch) for col in range(size // patch)]
        for row, col in places:
            pixels = image[:, row * patch:(row + 1) * patch, col * patch:(col + 1) * patch]
            place = torch.tensor(waves(row, width // 2) + waves(col, width // 2), dtype=x.dtype)
            tokens.append(layer(p, "patches")(pixels.flatten()) + place)
        h = torch.stack(tokens)
        for name in dict.fromkeys(".".join(k.split(".")[:2]) for k in p if k.startswith("blocks.")):
            h = dit_block(p, name, h, c)
        m = layer(p, "modulation")(c)
        h = torch.nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)(h) * (1 + m[:width]) + m[width:]
        out = torch.empty_like(image)
        for (row, col), token in zip(places, layer(p, "out")(h)):
            out[:, row * patch:(row + 1) * patch, col * patch:(col + 1) * patch] = token.view(channels, patch, patch)
        images.append(out)
    return torch.stack(images)
