"""
scm.py: Continuous-time consistency models, sCT and sCD.    Lu and Song 2024, arXiv:2410.11081.

Idea    Let the two points of a pair (t, r) coincide. What is left of f_t - f_r is the derivative of
        f along the path, one forward-mode derivative (JVP) a step, and no error of discretisation.
        The path is that of the data (sCT) or that of a diffusion model, the teacher (sCD).

One training step
    t       =  arctan(e^tau / sd),  tau ~ N(P_mean, P_std^2)                         [Algorithm 1]
    x_t     =  cos(t)*x0 + sin(t)*z,   z = sd*eps          # f(x, t) = cos(t)*x - sin(t)*sd*F(x, t)
    dx      =  cos(t)*z - sin(t)*x0  (sCT)  or  sd*F_teacher(x_t, t)  (sCD)
    dF      =  cos(t)*sin(t) * dF(x_t, t)/dt along (dx, 1)                           # JVP
    g       =  -cos(t)^2 * (sd*F - dx) - ramp*(cos(t)*sin(t)*x_t + sd*dF)            # ramp: 0 .. 1
    g       <- g / (|g| + c)
    loss    =  e^w |F - (F + g)|^2 - w                 # no gradient through F + g;  w(t) is learned

    For ramp = 1, g = cos(t)*df/dt: zero along the whole path where f is a consistency function.

Deviations from the paper
    The loss is not divided by the number of pixels: |g| is at most 1, so that w, which learns minus
    the logarithm of what it multiplies, begins where it ends. (It is, for --norm rms.)
    The norm in g is that of the image, as the paper prints it; --norm rms is per pixel.
    w is one linear layer on sixteen waves of t, and is averaged like the rest of the network.
    The decay of the averaged weights ramps up in the first steps; in the paper it is constant.
    The paper does not give the steps for CIFAR-10: 400,000 are those of its comparison with ECT.
    A teacher in EDM's variables is used as it is: F = -F_edm, with its own embedding of ln(sigma).
    Non-finite gradients stop the run. Presets fast, small and digits are ours.

Read next: ict.py, with two points in place of a derivative. What changes: diff ict.py scm.py
"""
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch

from common import teacher as teachers
from common.data import load
from common.flags import BadInput, parse, say
from common.jvp import jvp, probe
from common.networks import backbone
from common.precond import TrigFlow, trig
from common.run import Run


# ==== 1. Schedules ================================================================================
def times(n, it, args, device):
    """Draw n times t in (0, pi/2), [n, 1, 1, 1]."""
    sigma = (torch.randn(n, 1, 1, 1, device=device) * args.P_std + args.P_mean).exp()
    return torch.atan(sigma / args.sd)


# ==== 2. Loss =====================================================================================
def loss_fn(net, teacher, x0, y, it, args, reseed):
    """x0 [B,C,H,W] in [-1, 1], y int64 [B] or None -> scalar loss, stats: t [B,1,1,1], loss [B],
    t as noise level sigma. net and teacher have F(x, t, y) -> [B,C,H,W]; net also weigh(t) -> [B].
    reseed() resets the random generator, so that all calls of net drop the same units."""
    t = times(len(x0), it, args, x0.device)
    cos, sin = t.cos(), t.sin()
    z = args.sd * torch.randn_like(x0)                    # data and noise have the same spread
    x_t = cos * x0 + sin * z
    with torch.no_grad():                                 # the teacher is a constant
        dx = args.sd * teacher.F(x_t, t, y) if args.mode == "scd" else cos * z - sin * x0

    def masked(x, t):
        reseed()                                          # same dropout mask in all calls
        return net.F(x, t, y)
    tangents = cos * sin * dx, cos * sin                  # the factor first: dF/dt is not bounded
    _, dF = jvp(masked, (x_t, t), tangents, exact=args.jvp == "exact")  # a pass without gradient

    F, w = masked(x_t, t), net.weigh(t)                   # gradient flows here
    ramp = min(1, it / max(args.H, 1))                    # 0: diffusion training
    g = -(cos**2) * (args.sd * F.detach() - dx) - ramp * (cos * sin * x_t + args.sd * dF)
    D = g[0].numel() if args.norm == "rms" else 1
    norm = g.flatten(1).norm(dim=1) / math.sqrt(D)        # [B]
    g = g / (norm.view(-1, 1, 1, 1) + args.c)             # bounded, however steep f is

    d = ((F - F.detach() - g) ** 2).flatten(1).sum(1) / D  # value |g|^2, gradient -2 g
    loss = w.exp() * d - w
    stats = dict(t=args.sd * t.tan(), loss=loss.detach())
    return loss.mean(), stats | dict(tangent=norm.mean(), w=w.mean(), ramp=ramp)


# ==== 3. Sampling =================================================================================
@torch.no_grad()
def sample(net, noise, y, args):
    """Denoise, add less noise, denoise again: one step for each slice of noise [K, B, C, H, W]."""
    hi, lo = math.log10(args.sigma_max), math.log10(args.sd * math.tan(args.t_mid))
    ts = torch.logspace(hi, lo, len(noise), dtype=noise.dtype, device=noise.device)
    ts = torch.atan(ts / args.sd)                         # K = 1: t_max;  K = 2: t_max, t_mid
    x = torch.zeros_like(noise[0])
    for i, (t, z) in enumerate(zip(ts, noise)):
        x = t.cos() * x + t.sin() * args.sd * z if i else args.sd * z   # t_max counts as pi/2
        x = net(x, t.expand(len(z), 1, 1, 1), y)
    return x.clamp(-1, 1)


# ==== 4. Arguments ================================================================================
@dataclass
class Args:
    # --- the run (the same in every file)
    dataset: str = "digits"          # digits, mnist, fashion_mnist, cifar10, a folder, .zip or .npz
    data_dir: str = "data"            # where downloads are kept
    out: str = "runs"                 # runs/<method>-<dataset>-<nnn> is created here
    resume: str = ""                  # go on with this run folder; a finished one is only sampled
    preset: Literal["auto", "small", "fast", "paper"] = "auto"  # auto: small without a GPU
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # auto: cuda if there is one
    seed: int = 0                     # everything random follows from (seed, rank, step)
    cond: bool = False                # condition on the class label
    size: int = 0                     # side of a folder's images; 0: 32, an EDM set's own (>= 0)
    teacher: str = "auto"             # auto, train, none, a run folder, .pt, .pkl or address
    teacher_iters: int = 0            # steps of a teacher trained here; 0: of its preset (>= 0)
    iters: int = 400_000              # optimiser steps (>= 1)
    batch: int = 512                  # images per step, over all ranks (>= 1)
    accum: int = 1                    # parts a rank's batch is split into, to save memory (>= 1)
    lr: float = 1e-4                  # learning rate after warm-up (> 0)
    warmup: int = 0                   # steps of linear warm-up (>= 0)
    ema: float = 0.99929              # EMA decay; the averaged weights are sampled (>= 0, < 1)
    flip: bool = False                # random horizontal flips
    bf16: bool = False                # bfloat16 activations; weights and loss stay float32
    compile: bool = False             # torch.compile the network
    shard: bool = False               # split weights and optimiser over the ranks (FSDP2)
    steps: int = 2                    # sampling steps (>= 1)
    grid: int = 64                    # images in a sample grid (>= 1)
    log_every: int = 100              # steps between log lines (>= 1)
    save_every: int = 5_000           # steps between checkpoints, grids and figures (>= 1)
    keep: bool = False                # keep every checkpoint, not only the last two
    max_skips: int = 0                # steps that may be skipped as not finite (>= 0)
    fid: int = 0                      # images for an FID at the end; published: 50000 (>= 0)
    fid_every: int = 0                # also measure it every so many steps (>= 0)
    # --- the network (the same in every file)
    net: Literal["ddpmpp", "ncsnpp", "adm", "dit"] = "ddpmpp"  # network family
    ch: int = 128                     # base width of the network (>= 4)
    mult: tuple = (2, 2, 2)           # width of each resolution over ch; not for dit (>= 1)
    blocks: int = 4                   # residual blocks per resolution; of dit: all (>= 1)
    attn: tuple = (16,)               # image sizes at which there is attention; not for dit
    dropout: float = 0.2              # dropout inside the network (>= 0, < 1)
    # --- the method (defaults: the paper's recipe for CIFAR-10, App. G)
    mode: Literal["sct", "scd"] = "sct"  # the path of the data, or the teacher's (dropout 0)
    flow: Literal["edm", "trig"] = "trig"  # of the teacher; trig: smooth in t, as in the paper
    jvp: Literal["exact", "fd"] = "exact"  # fd: a difference, for networks without forward mode
    norm: Literal["l2", "rms"] = "l2"  # |g| of the image, or per pixel
    c: float = 0.1                    # g / (|g| + c) (>= 0)
    H: int = 10_000                   # steps in which ramp goes from 0 to 1 (>= 0)
    decay: int = 0                    # from this step on lr ~ 1/sqrt(step); 0: never (>= 0)
    P_mean: float = -1.0              # mean of ln(sigma), sigma = sd * tan(t)
    P_std: float = 1.4                # standard deviation of ln(sigma) (>= 0)
    t_mid: float = 1.1                # time of the second step; sigma .98 at sd .5 (> 0, < 1.5708)
    sigma_max: float = 80.0           # noise level of the first, t = arctan(sigma_max / sd) (> 0)
    sd: float = 0.5                   # standard deviation of the data, sigma_data (> 0)


PRESETS = {
    "paper": dict(cost="400,000 steps of 512 images: days on several GPUs, and the teacher's"),
    # ours, not measured: from EDM's released checkpoint
    "fast": dict(cost="20,000 steps of 256 images", flow="edm", iters=20_000, batch=256, H=2_000,
                 ema=0.999, save_every=2_000),
    # ours, for two CPU cores. Warm-up: the first five steps of RAdam are not normalised. Small lr
    # and decay: sCT's tangent is mostly noise; at 5e-4 it was worse after 200 steps than after
    # 100. sCD bears 5e-4, and gains by it
    "small": dict(cost="about half an hour on two CPU cores, teacher included", iters=450, batch=64,
                  lr=1.5e-4, warmup=50, decay=150, H=150, ema=0.99, dropout=0.0, ch=32,
                  mult=(1, 1, 2), blocks=1, save_every=150),
    "digits": dict(cost="about 8 minutes on two CPU cores, teacher included", iters=450, batch=128,
                   lr=1.5e-4, warmup=50, decay=150, H=150, ema=0.99, dropout=0.0, ch=32,
                   mult=(1, 2), blocks=1, attn=(4,), save_every=150, sd=0.75),
    "scd": dict(dropout=0.0),         # with --mode scd
    # the data's own standard deviation
    "mnist": dict(sd=0.55),
    "fashion_mnist": dict(sd=0.66),
}


def check(args):
    """Flags that contradict each other. Raises BadInput."""
    if args.compile and args.dropout:
        raise BadInput("--compile: compiled and differentiated networks drop different units; "
                       "add --dropout 0")


# ==== 5. Training (the same in every file, except the lines ending in  # *) =======================
def main(args):
    """Train as `args` say; return the final figures, such as {"fd_pixels_2step": 0.38}."""
    run = Run(args, __file__)                             # device and ranks; no file is written yet
    check(args)                                           # *
    data = load(args.dataset, args.data_dir, args.size, run.device)
    teacher, found, changes = teachers.get(args, data, run, needed=args.mode == "scd")  # *
    args = run.resolve(**changes)                         # the architecture is the teacher's
    run.seed(-1)                                          # negative: the same on every rank
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    net = TrigFlow(backbone(args, data, teacher), args.sd, args.flow, dtype)  # *
    if args.jvp == "exact":                               # is it the derivative, here?  # *
        probe(net.F, data.images.shape[1:], run.device)   # *
    ema = run.place(deepcopy(net).eval().requires_grad_(False))  # averaged weights, for sampling
    net = run.place(net)
    if args.compile:                                      # jvp goes around it  # *
        net.model.compile()                               # *
    opt = torch.optim.RAdam(net.parameters(), lr=args.lr, betas=(0.9, 0.99), foreach=True)  # *
    state = dict(net=net, ema=ema, opt=opt)               # *

    def draw(noise, y):                                   # what is evaluated
        return sample(ema, noise, y, args)

    def reseed():                                         # both calls of a step drop the same units
        run.seed(it, part, stream=1)

    it = run.start(state, data)                           # a new folder, or where it stopped
    teachers.show(teacher, found, run, data)              # *
    say(f"  t_mid     {args.t_mid:g}: noise level {args.sd * math.tan(args.t_mid):.3g}")  # *
    teacher = trig(teacher) if args.mode == "scd" else None  # its F, whatever its own flow  # *
    while it < args.iters:
        for part in range(args.accum):
            run.seed(it, part)
            x0, y = run.batch(data, it, part)
            loss, stats = loss_fn(net, teacher, x0, y, it, args, reseed)  # *
            (loss / args.accum).backward()
            run.count(stats)                              # sums stay on the device
        lr = args.lr * min(1, (it + 1) / max(args.warmup, 1))  # *
        lr /= max(1, it / args.decay) ** 0.5 if args.decay else 1  # *
        for group in opt.param_groups:
            group["lr"] = lr
        if run.sync(opt, it):                             # mean over ranks; False: not finite, skip
            opt.step()
            decay = min(args.ema, (it + 1) / (it + 10))   # a short average at first  # *
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        opt.zero_grad(set_to_none=True)

        it += 1
        run.log(it, lr=lr)
        if run.due(it):                                   # each --save-every, at the end, a signal
            run.save(it, state)
            run.evaluate(it, data, draw)
    return run.finish(it, data, draw)


if __name__ == "__main__":
    main(parse(Args, PRESETS))
