"""DiT F(x, c_noise, label): the transformer of Peebles & Xie 2022, arXiv:2212.09748, on pixels, with adaLN-zero.

    tokens  =  linear(patches of the image) + fixed sinusoidal position embedding
    c       =  SiLU(MLP(sines of the noise level) + embedding of the label)
    block   :  h <- h + gate * attention(norm(h) * (1 + scale) + shift), then likewise with an MLP
    F       =  linear(norm(h) * (1 + scale) + shift), back to pixels; each gate, scale and shift is linear in c

Deviations from the paper: q and k are normalised per head, as the derivative in the noise level is unstable otherwise;
the frequencies of the sines are at most 1, as in DDPM++, since c_noise is of order 1 and not 0..1000; no variance
output; the MLP of c is initialised like all other layers; there is dropout."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.unet import Linear, attention, cast

# As in unet.py: float32 weights, cast by each layer to the dtype of its input. Tokens have the dtype of the image; c,
# the linear maps that read it, the norms of q and k and the table are computed in float32 at least.


def sines(v, width):
    """v [N] -> [N, width]: sines, then cosines, of v times frequencies from 1 down to 1/10000."""
    j = torch.arange(width // 2, device=v.device, dtype=v.dtype)
    a = v[:, None] * 10000 ** (-j / (width // 2 - 1))
    return torch.cat([a.sin(), a.cos()], 1)


def table(n, width, like):
    """[n * n, width]: half the channels tell a token's row, half its column."""
    e = sines(torch.arange(n, device=like.device, dtype=like.dtype), width // 2)
    return torch.cat([e.repeat_interleave(n, 0), e.repeat(n, 1)], 1)


def zero(layer):
    nn.init.zeros_(layer.weight)
    return layer


class RMSNorm(nn.Module):
    """gain * x / sqrt(mean(x^2)) over the last axis; in bfloat16 the gain would keep three digits."""
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        return cast(F.rms_norm(cast(x, wide), x.shape[-1:], self.weight.to(wide), self.eps), x.dtype)


def modulate(x, scale, shift):
    """LayerNorm whose gain and bias are functions of c."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Attention and an MLP, each behind a gate that starts closed: the block starts as the identity."""
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.modulation = zero(Linear(width, 6 * width))
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.mlp0, self.mlp1 = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, h, c):
        scale0, shift0, gate0, scale1, shift1, gate1 = cast(self.modulation(c), h.dtype)[:, None].chunk(6, 2)
        q, k, v = self.qkv(modulate(h, scale0, shift0)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        a = attention(self.q_norm(q), self.k_norm(k), v)      # [B, heads, tokens, width / heads]
        h = h + gate0 * self.proj(a.transpose(1, 2).flatten(2))
        m = F.gelu(self.mlp0(modulate(h, scale1, shift1)), approximate="tanh")
        return h + gate1 * self.mlp1(F.dropout(m, self.dropout, self.training))


class DiT(nn.Module):
    """F(x, c_noise, y, augment): x [B, C, size, size], c_noise [B] or [1], y int64 [B] or None, augment
    [B, augment_dim] or None, which is as zeros -> like x.

    ch: width of a token; blocks: depth; heads of (about) 64 channels; patch: pixels along the side of a token;
    classes: 0 for no label input. A label of -1, or y=None, means "no label". augment_dim: as for a UNet. mult and attn
    describe U-Nets: they are kept for the flags' sake and change nothing."""
    def __init__(self, size, channels, ch=384, mult=(), blocks=12, attn=(), classes=0, dropout=0.0, net="dit", patch=2,
                 augment_dim=0):
        super().__init__()
        self.kwargs = dict(size=size, channels=channels, ch=ch, mult=tuple(mult), blocks=blocks, attn=tuple(attn),
                           classes=classes, dropout=dropout, net=net, patch=patch, augment_dim=augment_dim)
        heads = max(1, ch // 64)
        if size % patch:
            raise ValueError(f"images of {size} x {size} do not split into patches of {patch} x {patch}; "
                             "take an even --size")
        if ch < 8 or ch % 4 or ch % heads:
            raise ValueError(f"a width of {ch} is too small or does not split into {heads} heads; "
                             "take a --ch divisible by 64")
        self.ch, self.classes, self.patch = ch, classes, patch
        self.map_layer0, self.map_layer1 = Linear(ch, ch), Linear(ch, ch)
        if classes:                               # the last row, which -1 finds, is "no label"
            self.map_label = nn.Parameter(0.02 * torch.randn(classes + 1, ch))
        if augment_dim:
            self.map_augment = zero(Linear(augment_dim, ch, bias=False))
        self.patches = Linear(channels * patch**2, ch)
        self.blocks = nn.ModuleList(DiTBlock(ch, heads, dropout) for _ in range(blocks))
        self.modulation = zero(Linear(ch, 2 * ch))
        self.out = zero(Linear(ch, channels * patch**2))      # F starts as 0

    def embed(self, c_noise, y, augment=None):
        """c, from the noise level [B or 1] and the labels; in the precision of c_noise."""
        c = self.map_layer1(F.silu(self.map_layer0(sines(c_noise, self.ch))))
        if self.classes:
            y = torch.full((1,), -1, device=c.device) if y is None else y
            c = c + F.embedding(y + 1, self.map_label.roll(1, 0).to(c.dtype))     # IndexError where y is no class
        if augment is not None:
            c = c + self.map_augment(augment.to(c.dtype))
        return F.silu(c)

    def forward(self, x, c_noise, y=None, augment=None):
        c, n = self.embed(c_noise, y, augment), x.shape[-1] // self.patch
        h = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)       # [B, tokens, C * patch^2]
        h = self.patches(h) + table(n, self.ch, c).to(h.dtype)  # recomputed: a buffer would be lost in a meta load
        for block in self.blocks:
            h = block(h, c)
        scale, shift = cast(self.modulation(c), h.dtype)[:, None].chunk(2, 2)
        h = self.out(modulate(h, scale, shift))
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, (n, n)), self.patch)
