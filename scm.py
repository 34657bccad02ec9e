"""
scm.py: Continuous-time consistency models, sCT and sCD.    Lu and Song 2024, arXiv:2410.11081.

Idea    Let the two points of a pair (t, r) coincide: f_t - f_r becomes the derivative of f along
        the path. Each step takes one forward-mode derivative (Jacobian-vector product, JVP), and
        there is no discretisation error. The path leads from an image x0 to its noise z (sCT), or
        it is the ODE path of a diffusion model, the teacher (sCD).

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
    The loss is divided by the number of pixels only with --norm rms. With --norm l2, |g| is below 1
    by itself, and w, which learns -ln of the mean of |g|^2, starts close to its final value.
    The norm in g is that of the image, as the paper prints it; --norm rms is per pixel.
    w is linear in cos(k*t) and sin(k*t), k = 0 .. 15, and is part of the network and of its EMA.
    The decay of the EMA ramps up during the first steps; in the paper it is constant.
    The paper does not state the training steps for CIFAR-10; its comparison with ECT has 400,000.
    Images are not flipped at random; the paper does not say whether it did.
    A teacher in EDM's variables is used as it is: F = -F_edm, with its own embedding of ln(sigma).
    A loss or gradient that is not finite stops the run. Presets fast, small and digits are ours.

Read next: ict.py, which compares two points instead.  See only what changes: diff ict.py scm.py
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
    reseed() resets the random generator, so that all calls of net drop the same units.
    Reads args.P_mean, P_std, sd, mode, jvp, H, norm, c. teacher is read in mode scd only; F is as
    in common/precond.py, TrigFlow."""
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
    ramp = min(1, it / args.H) if args.H else 1           # 0: diffusion training
    g = -(cos**2) * (args.sd * F.detach() - dx) - ramp * (cos * sin * x_t + args.sd * dF)
    n = g[0].numel() if args.norm == "rms" else 1
    size = g.flatten(1).norm(dim=1) / math.sqrt(n)        # |g|, [B]
    g = g / (size.view(-1, 1, 1, 1) + args.c)             # bounded, however steep f is

    d = ((F - F.detach() - g) ** 2).flatten(1).sum(1) / n  # value |g|^2, gradient -2 g
    loss = w.exp() * d - w
    stats = dict(t=args.sd * t.tan(), loss=loss.detach())
    return loss.mean(), stats | dict(tangent=size.mean(), w=w.mean(), ramp=ramp)


# ==== 3. Sampling =================================================================================
@torch.no_grad()
def sample(net, noise, y, args):
    """Denoise, add less noise, denoise again: one step for each slice of noise [K, B, C, H, W]."""
    hi, lo = math.log10(args.sigma_max), math.log10(args.sd * math.tan(args.t_mid))
    ts = torch.logspace(hi, lo, len(noise), dtype=noise.dtype, device=noise.device)
    ts = torch.atan(ts / args.sd)                         # K = 1: sigma_max;  K = 2: also t_mid
    x = torch.zeros_like(noise[0])
    for i, (t, z) in enumerate(zip(ts, noise)):
        x = t.cos() * x + t.sin() * args.sd * z if i else args.sd * z   # the first t counts as pi/2
        x = net(x, t.expand(len(z), 1, 1, 1), y)
    return x.clamp(-1, 1)


# ==== 4. Arguments ================================================================================
@dataclass
class Args:
    renamed = dict(decay="lr_decay")  # neither field nor flag: names in config.json of older runs
    # --- the run (the same in every file)
    dataset: str = "digits"          # digits, mnist, fashion_mnist, cifar10, a folder, .zip or .npz
    data_dir: str = "data"            # where downloads are kept
    out: str = "runs"                 # runs/<method>-<dataset>-<nnn> is created here
    resume: str = ""                  # continue this run folder; a finished run is only evaluated
    preset: Literal["auto", "small", "fast", "paper"] = "auto"  # auto: small without CUDA
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # auto: cuda if there is one
    seed: int = 0                     # everything random follows from (seed, rank, step)
    cond: bool = False                # condition on the class label
    size: int = 0                     # side of a folder's images; 0: 32, an EDM set's own (>= 0)
    teacher: str = "auto"             # auto, train, none, a run folder, .pt, .pkl or address
    teacher_iters: int = 0            # steps of a teacher trained here; 0: its preset's (>= 0)
    iters: int = 400_000              # optimiser steps (>= 1)
    batch: int = 512                  # images per step, over all ranks (>= 1)
    accum: int = 1                    # parts a rank's batch is split into, to save memory (>= 1)
    lr: float = 1e-4                  # learning rate after warm-up (> 0)
    warmup: int = 0                   # steps of linear warm-up (>= 0)
    ema: float = 0.99929              # EMA decay; the averaged weights are sampled (>= 0, < 1)
    flip: bool = False                # random horizontal flips
    bf16: bool = False                # bfloat16 activations; weights and loss stay float32
    tf32: bool = True                 # TensorFloat-32 products on CUDA: 10 bits of 23, and faster
    compile: bool = False             # torch.compile the network
    checkpoint_acts: bool = False     # recompute activations in the backward pass, to save memory
    lora: int = 0                     # rank of a pipeline's LoRA adapters; 0: train all (>= 0)
    shard: bool = False               # split weights and optimiser over the ranks (FSDP2)
    steps: int = 2                    # sampling steps (>= 1, <= 1000)
    grid: int = 64                    # images in a sample grid (>= 1, <= 10000)
    log_every: int = 100              # steps between log lines (>= 1)
    save_every: int = 5_000           # steps between checkpoints, grids and figures (>= 1)
    keep: bool = False                # keep every checkpoint, not only the last two
    max_skips: int = 0                # non-finite steps to skip before the run stops (>= 0)
    fid: int = 0                      # images for an FID at the end; 0: none; papers: 50000 (>= 0)
    fid_every: int = 0                # with --fid: steps between more FIDs; 0: none (>= 0)
    # --- the network (the same in every file)
    net: Literal["ddpmpp", "ncsnpp", "adm", "dit"] = "ddpmpp"  # network family
    ch: int = 128                     # base width of the network (>= 4)
    mult: tuple = (2, 2, 2)           # width of each resolution, in units of ch; not for dit (>= 1)
    blocks: int = 4                   # residual blocks per resolution; dit: in total (>= 1)
    attn: tuple = (16,)               # image sizes at which there is attention; not for dit
    dropout: float = 0.2              # dropout inside the network (>= 0, < 1)
    # --- the method (defaults: the paper's recipe for CIFAR-10, App. G)
    mode: Literal["sct", "scd"] = "sct"  # sct: path of the data; scd: of the teacher, dropout 0
    flow: Literal["edm", "trig"] = "trig"  # parametrisation; trig: smooth in t, as in the paper
    jvp: Literal["exact", "fd"] = "exact"  # fd: finite difference, if forward mode is missing
    norm: Literal["l2", "rms"] = "l2"  # |g| as the root of the sum of squares, or of their mean
    c: float = 0.1                    # constant in g / (|g| + c) (> 0)
    H: int = 10_000                   # steps over which ramp rises from 0 to 1 (>= 0)
    lr_decay: int = 0                 # from this step on lr ~ 1/sqrt(step); 0: never (>= 0)
    P_mean: float = -1.0              # mean of ln(sigma), sigma = sd * tan(t)
    P_std: float = 1.4                # standard deviation of ln(sigma) (>= 0)
    t_mid: float = 1.1                # t of the second step: sigma .98 if sd = .5 (> 0, < 1.5708)
    sigma_max: float = 80.0           # sigma of the first step, whose t = arctan(sigma / sd) (> 0)
    sd: float = 0.5                   # standard deviation of the data, sigma_data (> 0)


PRESETS = {
    "paper": dict(cost="400,000 steps of 512 images: days on several GPUs, and the teacher's"),
    # ours, not measured: from EDM's released checkpoint
    "fast": dict(cost="20,000 steps of 256 images", flow="edm", iters=20_000, batch=256, H=2_000,
                 ema=0.999, save_every=2_000),
    # ours, for two CPU cores. The lr is the paper's, and decays: sCT's tangent is mostly noise, and
    # at 1.5e-4 one seed in three on the digits broke down as ramp reached 1. sCD bears 5e-4
    "small": dict(cost="about half an hour on two CPU cores, teacher included", iters=450, batch=64,
                  warmup=50, lr_decay=150, H=150, ema=0.99, dropout=0.0, ch=32,
                  mult=(1, 1, 2), blocks=1, save_every=450),
    "digits": dict(cost="about 10 minutes on two CPU cores, teacher included", iters=700, batch=128,
                   warmup=50, lr_decay=150, H=150, ema=0.99, dropout=0.0, ch=32,
                   mult=(1, 2), blocks=1, attn=(4,), save_every=175, sd=0.75,
                   t_mid=0.92),
    "scd": dict(dropout=0.0),         # with --mode scd
    # the data's own standard deviation; t_mid at the paper's noise level, 0.98
    "mnist": dict(sd=0.55, t_mid=1.06),
    "fashion_mnist": dict(sd=0.66, t_mid=0.98),
}


def check(args):
    """Flags that contradict each other. Raises BadInput."""
    if args.compile and args.dropout:
        raise BadInput("--compile needs --dropout 0: compiled and plain networks drop other units")
    if args.sd * math.tan(args.t_mid) >= args.sigma_max:
        raise BadInput("--t-mid must lie below the time of --sigma-max, arctan(sigma_max / sd)")


# ==== 5. Training (the same in every file, except the lines ending in  # *) =======================
@Run.guarded                                              # one line for what is no fault of ours
def main(args):
    """Train with `args`; return {"run": folder, "fd_pixels_2step": 0.38, ..}."""
    run = Run(args, __file__)                             # device and ranks; no file is written yet
    check(args)                                           # *
    data = load(args.dataset, args.data_dir, args.size, run.device)
    teacher, found, changes = teachers.get(args, data, run, needed=args.mode == "scd")  # *
    args = run.resolve(**changes)                         # with a teacher: its architecture
    run.seed(-1)                                          # negative: the same on every rank
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    net = TrigFlow(backbone(args, data, teacher), args.sd, args.flow, dtype)  # *
    if args.jvp == "exact":                               # is it the derivative, here?  # *
        probe(net.F, data.images.shape[1:], run.device)   # *
    ema = run.place(deepcopy(net).eval().requires_grad_(False))  # averaged weights, for sampling
    net = run.place(net)
    if args.compile:                                      # jvp uses the uncompiled code  # *
        for m in (net, teacher) if args.mode == "scd" else (net,):  # *
            m.model.compile()                             # *
    opt = torch.optim.RAdam(net.parameters(), lr=args.lr, betas=(0.9, 0.99), foreach=True)  # *
    state = dict(net=net, ema=ema, opt=opt)               # *
    steps = sorted({1, args.steps})                       # numbers of sampling steps to test  # *

    def draw(noise, y):
        return sample(ema, noise, y, args)

    def reseed():                                         # one dropout mask for all calls of a step
        run.seed(it, part, stream=1)

    it = run.start(state, data)                           # 0, or the step from which to resume
    teachers.show(teacher, found, run, data)              # *
    say(f"  t_mid     {args.t_mid:g}: noise level {args.sd * math.tan(args.t_mid):.3g}")  # *
    # The teacher stays float32 with --bf16: rounding would drown F - F_T, a part of g.  # *
    teacher = trig(teacher) if args.mode == "scd" else None  # TrigFlow's F from either flow  # *
    while it < args.iters:
        for part in range(args.accum):
            run.seed(it, part)
            x0, y = run.batch(data, it, part)
            loss, stats = loss_fn(net, teacher, x0, y, it, args, reseed)  # *
            (loss / args.accum).backward()
            run.count(stats)                              # for the log; stays on the device
        lr = args.lr * min(1, (it + 1) / max(args.warmup, 1))  # *
        lr /= max(1, it / args.lr_decay) ** 0.5 if args.lr_decay else 1  # *
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
        if run.due(it):                                   # every --save-every, at end, on a signal
            run.save(it, state)
            run.evaluate(it, data, draw, steps)
    return run.finish(it, data, draw, steps)


if __name__ == "__main__":
    main(parse(Args, PRESETS))
