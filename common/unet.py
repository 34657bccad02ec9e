"""U-Net F(x, c_noise, label) of EDM (Karras et al. 2022, arXiv:2206.00364, Table 7), in three families:

ddpmpp   DDPM++ of Song et al. 2021, arXiv:2011.13456
ncsnpp   NCSN++ of the same paper: random Fourier features of the noise level, smooth resampling, and the image itself
         enters the encoder at every resolution
adm      Dhariwal & Nichol 2021, arXiv:2105.05233: the noise level also scales; more attention, with several heads

The names of parameters and buffers equal those of the released EDM checkpoints."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.jvp import along, dual

# Weights stay float32; each layer casts its own to the dtype of the activations. Unlike autocast this
# also works under forward-mode differentiation, and it needs no list of exceptions.
SCALE = 16.0                      # of the gradients of float16 tensors


class Half(torch.autograd.Function):
    """`cast` where one of the two types is float16."""
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.back, ctx.scale = x.dtype, SCALE if x.dtype == torch.float16 else 1 / SCALE
        return x.to(dtype)

    @staticmethod
    def backward(ctx, g):
        return (g.float() * ctx.scale).to(ctx.back), None


def cast(x, dtype):
    """x in `dtype`. Gradients of float16 tensors are kept SCALE times too large, else many would vanish: float16 ends
    at 6e-8, and a hundredth of those of ECT on CIFAR-10 are below 3e-7. Those of its weights reach 130, of 65504."""
    return x.to(dtype) if x.dtype == dtype or torch.float16 not in (x.dtype, dtype) else Half.apply(x, dtype)


class Linear(nn.Module):
    """x [.., c_in] -> [.., c_out]."""
    def __init__(self, c_in, c_out, bias=True):
        super().__init__()
        self.weight = nn.Parameter(xavier(c_out, c_in))
        self.bias = nn.Parameter(torch.zeros(c_out)) if bias else None

    def forward(self, x):
        w, b = cast(self.weight, x.dtype), None if self.bias is None else cast(self.bias, x.dtype)
        return along(lambda x: F.linear(x, w, b), lambda x, dx: F.linear(dx, w), x)


class Conv2d(nn.Module):
    """A k x k convolution, after an optional 2x resampling (up or down); with k = 0 the resampling alone.

    `taps` is the filter of the resampling: (1, 1) averages 2 x 2 pixels or copies one pixel to 2 x 2, (1, 3, 3, 1) is
    smooth. With `fused` the convolution comes first, on an image padded by one pixel more."""
    def __init__(self, c_in, c_out, k, up=False, down=False, gain=1.0, taps=(1, 1), fused=False):
        super().__init__()
        self.up, self.down, self.copies, self.fused = up, down, len(taps) == 2, fused
        self.weight = nn.Parameter(gain * xavier(c_out, c_in, k, k)) if k else None
        self.bias = nn.Parameter(torch.zeros(c_out)) if k else None
        if up or down:                            # a constant, but the released checkpoints list it
            f = torch.tensor(taps) / sum(taps)
            self.register_buffer("resample_filter", torch.outer(f, f)[None, None])

    def forward(self, x):
        bias = None if self.bias is None else cast(self.bias, x.dtype)
        return along(lambda x: self.linear(x, bias), lambda x, dx: self.linear(dx), x)

    def linear(self, x, b=None):
        if self.weight is None:
            return self.resample(x)
        w = self.weight
        if self.up and self.copies and w.shape[-1] == 3:  # the same sum in 16 products per pixel of x instead of 36
            return F.conv_transpose2d(x, cast(copy_then(w), x.dtype), b, stride=2, padding=1)
        first = self.fused or self.up and self.copies     # a 1 x 1 kernel may come first, which costs a quarter
        x = F.conv2d(x if first else self.resample(x), cast(w, x.dtype), b, padding=w.shape[-1] // 2 + self.fused)
        return self.resample(x) if first else x

    def resample(self, x):
        if not (self.up or self.down):
            return x
        if self.copies:
            return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.avg_pool2d(x, 2)
        c = x.shape[1]                            # every channel by itself
        f = self.resample_filter.to(x.dtype).expand(c, 1, -1, -1)
        if self.up:                               # times 4, as each output pixel meets a quarter of the taps
            return F.conv_transpose2d(x, 4 * f, stride=2, padding=1, groups=c)
        return F.conv2d(x, f, stride=2, padding=0 if self.fused else 1, groups=c)


def copy_then(w):
    """The kernel [in, out, 4, 4] of a transposed convolution with stride 2 that does two things at once: copy each
    pixel to 2 x 2, then convolve with w [out, in, 3, 3]."""
    w = w.flip(2, 3)
    return sum(F.pad(w, (i, 1 - i, j, 1 - j)) for i in (0, 1) for j in (0, 1)).transpose(0, 1)


class GroupNorm(nn.Module):
    """Group normalisation of x [B,C,H,W] in min(32, C/4) groups; the statistics of bfloat16 x are float32. ValueError
    if C does not split into them."""
    def __init__(self, channels, eps=1e-6):
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        if channels < 4 or channels % self.groups:
            raise ValueError(f"{channels} channels do not split into {self.groups} groups; take a --ch divisible by 32")
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        w, b = cast(self.weight, x.dtype), cast(self.bias, x.dtype)

        def spread(v):                            # [B, groups] -> [B, C, 1, 1]
            return v.repeat_interleave(len(w) // self.groups, 1)[:, :, None, None]

        def mean(v):                              # over a group
            return spread(v.mean((2, 3)).unflatten(1, (self.groups, -1)).mean(2))

        def derivative(x, dx):                    # n has mean 0 and variance 1 in each group
            n, _, rstd = torch.native_group_norm(x, None, None, *x.shape[:2], x[0, 0].numel(), self.groups, self.eps)
            return torch.addcmul(dx - mean(dx), n, mean(n * dx), value=-1) * (spread(rstd) * w[:, None, None])
        return along(lambda x: F.group_norm(x, self.groups, w, b, self.eps), derivative, x)


def xavier(*shape):
    """Uniform weights [out, in, ..] of variance 2 / (fan_in + fan_out)."""
    fan_in, fan_out = math.prod(shape[1:]), shape[0] * math.prod(shape[2:])
    return math.sqrt(6 / (fan_in + fan_out)) * (2 * torch.rand(shape) - 1)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for q, k, v [B, heads, tokens, d]: all attention in this project goes through here."""
    if dual(q, k, v):                             # the fused kernels have no forward mode
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def pnorm(x):
    """x divided by the root mean square of its channels (dimension 1): sCM's pnorm."""
    def derivative(x, dx):
        r = (x.square().mean(1, keepdim=True) + 1e-8).sqrt()
        return (dx - x * ((x * dx).mean(1, keepdim=True) / r**2)) / r
    return along(lambda x: x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt(), derivative, x)


class UNetBlock(nn.Module):
    """Residual block x [B,c_in,H,W], emb [B,c_emb] -> [B,c_out,H or 2H or H/2, ..], with self-attention at its end if
    attn. emb, the embedding of noise level and label, shifts the activations; with adm or double it scales them, too.
    With adm there are several heads, of 64 channels each, else there is one."""
    def __init__(self, c_in, c_out, c_emb, dropout, up=False, down=False, attn=False, taps=(1, 1), adm=False,
                 double=False):
        super().__init__()
        self.dropout, self.adm, self.double, eps = dropout, adm, double, 1e-5 if adm else 1e-6
        self.norm0 = GroupNorm(c_in, eps)
        self.conv0 = Conv2d(c_in, c_out, 3, up=up, down=down, taps=taps)
        self.affine = Linear(c_emb, 2 * c_out if adm or double else c_out)
        self.norm1 = GroupNorm(c_out, eps)
        self.conv1 = Conv2d(c_out, c_out, 3, gain=1e-5)       # a block starts as (almost) its skip
        straight = c_in == c_out and not (up or down)
        k = 0 if adm and c_in == c_out else 1
        self.skip = None if straight else Conv2d(c_in, c_out, k, up=up, down=down, taps=taps)
        self.scale = 1 if adm else math.sqrt(0.5)             # of a sum of two: keeps the variance
        self.qkv = None
        if attn:
            self.heads = c_out // 64 if adm else 1
            if not self.heads or c_out % self.heads:
                raise ValueError(f"attention on {c_out} channels lacks heads of 64; take a --ch divisible by 64")
            self.norm2 = GroupNorm(c_out, eps)
            self.qkv = Conv2d(c_out, 3 * c_out, 1, gain=math.sqrt(0.2))
            self.proj = Conv2d(c_out, c_out, 1, gain=1e-5)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        p = self.affine(emb)[:, :, None, None]
        if self.adm or self.double:
            scale, shift = p.chunk(2, 1)
            scale, shift = (pnorm(scale), pnorm(shift)) if self.double else (1 + scale, shift)
            h = self.norm1(h) * scale + shift
        else:
            h = self.norm1(h + p)
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        x = (h + (self.skip(x) if self.skip else x)) * self.scale
        if self.qkv:
            # Channel (head * d + i) * 3 + {0: q, 1: k, 2: v} in the checkpoints; any other order runs, but is wrong.
            qkv = self.qkv(self.norm2(x)).flatten(2).transpose(1, 2)
            qkv = qkv.unflatten(2, (self.heads, -1, 3)).permute(4, 0, 2, 1, 3)
            a = attention(*qkv.contiguous())                  # [B, heads, H*W, d]; fused kernels want the last ..
            a = a.transpose(1, 2).flatten(2).transpose(1, 2)  # .. stride to be 1
            x = (self.proj(a.reshape(x.shape)) + x) * self.scale
        return x


class UNet(nn.Module):
    """F(x, c_noise, y, augment): x [B, C, size, size], c_noise [B] or [1], y int64 [B] or None, augment
    [B, augment_dim] or None, which is as zeros -> like x.

    mult: the width of each resolution as a multiple of ch, from full size down, with `blocks` blocks each; attn: the
    sizes with attention; classes: 0 for no label input, else a label of -1, or y=None, means "no label"; fourier: the
    scale of ncsnpp's random frequencies; augment_dim: labels of common/augment.py, 0 for none.
    norm="double" also normalises the scale and shift that come from the noise level (sCM, arXiv:2410.11081, Sec. 4.1),
    which bounds their derivative in it. ValueError: size and mult, or ch and attention, do not fit each other."""
    def __init__(self, size, channels, ch=128, mult=(2, 2, 2), blocks=4, attn=(16,), classes=0, dropout=0.0,
                 net="ddpmpp", fourier=16.0, norm="single", augment_dim=0):
        super().__init__()
        self.kwargs = dict(size=size, channels=channels, ch=ch, mult=tuple(mult), blocks=blocks, attn=tuple(attn),
                           classes=classes, dropout=dropout, net=net, fourier=fourier, norm=norm,
                           augment_dim=augment_dim)
        if size % 2 ** (len(mult) - 1):
            raise ValueError(f"images of {size} x {size} cannot be halved {len(mult) - 1} times; shorten --mult")
        self.net, self.ch, self.classes, c_emb = net, ch, classes, 4 * ch
        ncsnpp, adm = net == "ncsnpp", net == "adm"
        taps, c_noise = ((1, 3, 3, 1), 2 * ch) if ncsnpp else ((1, 1), ch)
        if ncsnpp:
            self.map_noise = nn.Module()
            self.map_noise.register_buffer("freqs", fourier * torch.randn(ch))  # fixed; the checkpoints list it
        if classes:
            self.map_label = Linear(classes, c_emb if adm else c_noise, bias=not adm)
        if augment_dim:
            self.map_augment = Linear(augment_dim, c_noise, bias=False)
        self.map_layer0, self.map_layer1 = Linear(c_noise, c_emb), Linear(c_emb, c_emb)

        def block(c_in, c_out, **kw):
            return UNetBlock(c_in, c_out, c_emb, dropout, taps=taps, adm=adm, double=norm == "double", **kw)

        self.enc, widths, aux = nn.ModuleDict(), [], channels  # widths: of the outputs kept for the decoder
        c = ch * mult[0] if adm else ch
        for level, m in enumerate(mult):
            r = size >> level
            if level == 0:
                self.enc[f"{r}x{r}_conv"] = Conv2d(channels, c, 3)
            else:
                self.enc[f"{r}x{r}_down"] = block(c, c, down=True)
            if level and ncsnpp:
                self.enc[f"{r}x{r}_aux_residual"] = Conv2d(aux, c, 3, down=True, taps=taps, fused=True)
                aux = c
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
                here = r in attn and (adm or i == blocks)
                self.dec[f"{r}x{r}_block{i}"] = block(c + widths.pop(), ch * m, attn=here)
                c = ch * m
        if adm:
            self.out_norm, self.out_conv = GroupNorm(c, 1e-5), Conv2d(c, channels, 3)
            self.start_as_adm()
        else:
            self.dec[f"{r}x{r}_aux_norm"] = GroupNorm(c)
            self.dec[f"{r}x{r}_aux_conv"] = Conv2d(c, channels, 3, gain=1e-5)
        # Double normalisation starts with a scale of 1 and a random shift, both constant: pnorm of values near 0 would
        # jump with the noise level.
        for m in self.modules() if norm == "double" else ():
            if isinstance(m, UNetBlock):
                nn.init.ones_(m.affine.bias.chunk(2)[0])
                nn.init.normal_(m.affine.bias.chunk(2)[1])

    def start_as_adm(self):
        """ADM's own initialisation: weights and biases uniform up to 1/sqrt(fan_in), the last layer of a block zero."""
        for name, layer in self.named_modules():
            if isinstance(layer, (Linear, Conv2d)) and layer.weight is not None:
                zero = name.endswith(("conv1", "proj", "out_conv", "map_augment"))
                bound = 0 if zero else layer.weight[0].numel() ** -0.5
                for p in layer.parameters():
                    nn.init.uniform_(p, -bound, bound)
        if self.classes:
            nn.init.normal_(self.map_label.weight)

    def embed(self, c_noise, y, augment=None):
        """c_noise [B] or [1], y and augment [B, ..] or None -> [B or 1, 4 ch]: sinusoids of the noise level and the
        labels, through two layers, in the precision of c_noise."""
        adm, half = self.net == "adm", self.ch // 2
        if self.net == "ncsnpp":
            freqs = 2 * math.pi * self.map_noise.freqs.to(c_noise.dtype)
        else:
            j = torch.arange(half, device=c_noise.device, dtype=c_noise.dtype)
            freqs = 10000 ** (-j / (half if adm else half - 1))
        a = c_noise[:, None] * freqs
        e = torch.cat([a.cos(), a.sin()] if adm else [a.sin(), a.cos()], 1)   # as in the checkpoints
        label = 0
        if augment is not None:
            e = e + self.map_augment(augment.to(e.dtype))
        if self.classes:
            y = torch.full((1,), -1, device=e.device) if y is None else y
            rows = torch.eye(self.classes + 1, device=e.device, dtype=e.dtype)[:, 1:]     # the first: no label
            onehot = F.embedding(y + 1, rows)     # IndexError where y is no class
            label = self.map_label(onehot if adm else onehot * math.sqrt(self.classes))
        e = self.map_layer1(F.silu(self.map_layer0(e if adm else e + label)))
        return F.silu(e + label if adm else e)

    def forward(self, x, c_noise, y=None, augment=None):
        emb, skips, aux = cast(self.embed(c_noise, y, augment), x.dtype), [], x
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):     # ncsnpp: the image at this size joins, and replaces the last skip
                x = aux = (x + layer(aux)) * math.sqrt(0.5)
                skips[-1] = x
            else:
                x = layer(x) if name.endswith("conv") else layer(x, emb)
                skips.append(x)
        for name, layer in self.dec.items():
            if name.endswith("aux_norm"):
                x = F.silu(layer(x))
            elif name.endswith("aux_conv"):
                x = layer(x)
            else:
                x = layer(torch.cat([x, skips.pop()], 1) if "block" in name else x, emb)
        return self.out_conv(F.silu(self.out_norm(x))) if self.net == "adm" else x
