"""U-Net F(x, c_noise, label): DDPM++ of Song et al. 2021 (arXiv:2011.13456) as used by EDM (Karras et al. 2022,
arXiv:2206.00364, Table 7). The names of parameters and buffers equal those of the released EDM checkpoints."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# Weights stay float32; each layer casts its own to the dtype of the activations. Unlike autocast this
# also works under forward-mode differentiation, and it needs no list of exceptions.


class Linear(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.weight = nn.Parameter(xavier(c_out, c_in))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """Optional 2x resampling, then a k x k convolution; the filter [1, 1] is a mean (down) or a copy (up)."""
    def __init__(self, c_in, c_out, k, up=False, down=False, gain=1.0):
        super().__init__()
        self.up, self.down = up, down
        self.weight = nn.Parameter(gain * xavier(c_out, c_in, k, k))
        self.bias = nn.Parameter(torch.zeros(c_out))
        if up or down:                            # a constant, kept because the checkpoints list it
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x):
        w, b = self.weight, self.bias.to(x.dtype)
        if self.up and w.shape[-1] == 3:          # 16 products a pixel of x; 36 on its copies
            return F.conv_transpose2d(x, copy_then(w).to(x.dtype), b, stride=2, padding=1)
        if self.down:
            x = F.avg_pool2d(x, 2)
        x = F.conv2d(x, w.to(x.dtype), b, padding=w.shape[-1] // 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x    # 1 x 1: either order


def copy_then(w):
    """The 4 x 4 kernel, for stride 2, that copies each pixel to 2 x 2 and then applies w [out, in, 3, 3]."""
    w = w.flip(2, 3)
    return sum(F.pad(w, (i, 1 - i, j, 1 - j)) for i in (0, 1) for j in (0, 1)).transpose(0, 1)


class GroupNorm(nn.Module):
    """min(32, C/4) groups; the statistics are float32 for bfloat16 x."""
    def __init__(self, channels, eps=1e-6):
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        if channels % self.groups:
            raise ValueError(f"{channels} channels do not split into {self.groups} groups; take a --ch divisible by 32")
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def xavier(*shape):
    fan_in, fan_out = math.prod(shape[1:]), shape[0] * math.prod(shape[2:])
    return math.sqrt(6 / (fan_in + fan_out)) * (2 * torch.rand(shape) - 1)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for q, k, v [B, heads, tokens, d]; the one place where attention happens."""
    return F.scaled_dot_product_attention(q, k, v)


class UNetBlock(nn.Module):
    def __init__(self, c_in, c_out, c_emb, dropout, up=False, down=False, attn=False):
        super().__init__()
        self.dropout, self.heads = dropout, 1
        self.norm0 = GroupNorm(c_in)
        self.conv0 = Conv2d(c_in, c_out, 3, up=up, down=down)
        self.affine = Linear(c_emb, c_out)
        self.norm1 = GroupNorm(c_out)
        self.conv1 = Conv2d(c_out, c_out, 3, gain=1e-5)       # a block starts as (almost) its skip
        self.skip = None
        if c_in != c_out or up or down:
            self.skip = Conv2d(c_in, c_out, 1, up=up, down=down)
        self.qkv = None
        if attn:
            self.norm2 = GroupNorm(c_out)
            self.qkv = Conv2d(c_out, 3 * c_out, 1, gain=math.sqrt(0.2))
            self.proj = Conv2d(c_out, c_out, 1, gain=1e-5)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (self.skip(x) if self.skip else x)) * math.sqrt(0.5)
        if self.qkv:
            # channel (head * d + i) * 3 + {0: q, 1: k, 2: v}; another interleave runs but is wrong
            qkv = self.qkv(self.norm2(x)).flatten(2).transpose(1, 2)
            qkv = qkv.unflatten(2, (self.heads, -1, 3)).permute(4, 0, 2, 1, 3)
            a = attention(*qkv.contiguous())                  # q, k, v [B, heads, H*W, d]; fused kernels
            a = a.transpose(1, 2).flatten(2).transpose(1, 2)  # .. want the last stride to be 1
            x = (self.proj(a.reshape(x.shape)) + x) * math.sqrt(0.5)
        return x


class UNet(nn.Module):
    """F(x, c_noise, y): x [B, C, size, size], c_noise [B] or [1], y int64 [B] or None -> like x.

    mult: width of each resolution as a multiple of ch, from full size down; blocks per resolution; attn:
    sizes with attention; classes: 0 for no label input. A label of -1, or y=None, means "no label"."""
    def __init__(self, size, channels, ch=128, mult=(2, 2, 2), blocks=4, attn=(16,), classes=0, dropout=0.0):
        super().__init__()
        self.kwargs = dict(size=size, channels=channels, ch=ch, mult=tuple(mult), blocks=blocks,
                           attn=tuple(attn), classes=classes, dropout=dropout)
        self.ch, self.classes, c_emb = ch, classes, 4 * ch
        if classes:
            self.map_label = Linear(classes, ch)
        self.map_layer0, self.map_layer1 = Linear(ch, c_emb), Linear(c_emb, c_emb)

        def block(c_in, c_out, **kw):
            return UNetBlock(c_in, c_out, c_emb, dropout, **kw)

        self.enc, widths, c = nn.ModuleDict(), [], ch         # widths: of the outputs kept for the decoder
        for level, m in enumerate(mult):
            r = size >> level
            if level == 0:
                self.enc[f"{r}x{r}_conv"] = Conv2d(channels, c, 3)
            else:
                self.enc[f"{r}x{r}_down"] = block(c, c, down=True)
            widths.append(c)
            for i in range(blocks):
                self.enc[f"{r}x{r}_block{i}"] = block(c, ch * m, attn=r in attn)
                c = ch * m
                widths.append(c)
        self.dec = nn.ModuleDict()
        for level, m in reversed(list(enumerate(mult))):
            r = size >> level
            if level == len(mult) - 1:
                self.dec[f"{r}x{r}_in0"] = block(c, c, attn=True)
                self.dec[f"{r}x{r}_in1"] = block(c, c)
            else:
                self.dec[f"{r}x{r}_up"] = block(c, c, up=True)
            for i in range(blocks + 1):
                last = i == blocks and r in attn
                self.dec[f"{r}x{r}_block{i}"] = block(c + widths.pop(), ch * m, attn=last)
                c = ch * m
        self.dec[f"{r}x{r}_aux_norm"] = GroupNorm(c)
        self.dec[f"{r}x{r}_aux_conv"] = Conv2d(c, channels, 3, gain=1e-5)

    def embed(self, c_noise, y):
        """Sinusoids of the noise level [B or 1, ch], plus the label; in the precision of c_noise."""
        half = self.ch // 2
        j = torch.arange(half, device=c_noise.device, dtype=c_noise.dtype)
        a = c_noise[:, None] * 10000 ** (-j / (half - 1))
        e = torch.cat([a.sin(), a.cos()], 1)                  # sine first, as in the checkpoints
        if self.classes:
            if y is None:
                y = torch.full((1,), -1, device=e.device)
            onehot = (y[:, None] == torch.arange(self.classes, device=e.device)).to(e.dtype)
            e = e + self.map_label(onehot * math.sqrt(self.classes))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(e))))

    def forward(self, x, c_noise, y=None):
        emb, skips = self.embed(c_noise, y).to(x.dtype), []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("conv") else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if name.endswith("aux_norm"):
                x = F.silu(layer(x))
            elif name.endswith("aux_conv"):
                x = layer(x)
            else:
                x = layer(torch.cat([x, skips.pop()], 1) if "block" in name else x, emb)
        return x
