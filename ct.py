"""
ct.py: Consistency Training.    Song et al. 2023, arXiv:2303.01469.

Idea    Consistency distillation (cd.py) without the teacher: x_r is x0 with less of the same noise.
        Why this works: given x_t, the mean of x0 + r*eps is exactly where one Euler step of the
        probability-flow ODE from t to r lands, since E[x0 | x_t] is what a perfect teacher returns.
        So the gradient equals that of CD up to higher orders of t - r. The loss also contains the
        scatter of x0 + r*eps around that mean: it stays above zero even at the solution, and its
        value does not show progress. With few levels training is fast but biased, with many slow
        but accurate: so the number of levels N grows, and with it the EMA decay mu of the target.

One training step                                                                    [Algorithm 3]
    N       <- N(it)                                   # 2 .. s1 + 1 levels t_1 < .. < t_N
    n       ~  uniform on 1 .. N-1;  t = t_(n+1), r = t_n
    x_t     =  x0 + t*eps;  x_r = x0 + r*eps           # the same eps
    f_t     =  f(x_t, t; net)                          # gradient flows here
    f_r     =  f(x_r, r; target), no gradient          # same dropout mask
    loss    =  mean over C,H,W of (f_t - f_r)^2        # weight 1                        [Eq. 10]
    target  <- mu*target + (1 - mu)*net                # mu = mu(it)                      [Eq. 8]

Deviations from the paper
    The distance is the squared L2 norm, one of the paper's three; its best figures are with LPIPS.
    Network and initialisation are EDM's, not the authors' own.
    The decay of the EMA ramps up during the first steps; in the paper it is constant.
    A loss or gradient that is not finite stops the run. GPUs multiply in TF32.
    mu = mu0^(s0 / N) as in the paper; its code has N - 1. The paper names no t_mid; this is iCT's.
    The presets digits and small are ours.

Read next: ict.py.  See only what changes: diff ct.py ict.py
"""
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch

from common import teacher as teachers
from common.data import load
from common.flags import parse
from common.networks import backbone
from common.precond import EDM
from common.run import Run


# ==== 1. Schedules ================================================================================
def levels(it, args):
    """N(it), the number of noise levels: from s0 to s1 + 1, the faster the fewer there are."""
    lo, hi = args.s0**2, (args.s1 + 1) ** 2
    return math.ceil(math.sqrt(it / args.iters * (hi - lo) + lo) - 1) + 1


def mu(it, args):
    """Decay of the target network: mu0 at the start, towards 1 as the levels get closer."""
    return args.mu0 ** (args.s0 / levels(it, args))


def karras(N, args):
    """t_min = t_1 < .. < t_N = t_max, float64 [N]: equal steps of t^(1/rho)."""
    lo, hi = args.t_min ** (1 / args.rho), args.t_max ** (1 / args.rho)
    return (lo + torch.linspace(0, 1, N, dtype=torch.float64) * (hi - lo)) ** args.rho


def times(n, it, args, device):
    """Draw n pairs of neighbouring noise levels t > r, each [n, 1, 1, 1]."""
    ts = karras(levels(it, args), args).float().to(device, non_blocking=True)  # no wait
    i = torch.randint(len(ts) - 1, (n, 1, 1, 1), device=device)
    return ts[i + 1], ts[i]


# ==== 2. Loss =====================================================================================
def loss_fn(net, target, x0, y, it, args, reseed):
    """x0 [B,C,H,W] in [-1, 1], y int64 [B] or None -> scalar loss, stats: t [B,1,1,1], loss [B].
    reseed() resets the random generator, so that both networks drop the same units.
    Reads args.s0, s1, iters, t_min, t_max, rho (mu() also mu0). net and target, its EMA by mu():
    net(x, t, y) -> images [B,C,H,W] for levels t [B,1,1,1]; net(x, t_min, y) = x."""
    t, r = times(len(x0), it, args, x0.device)
    eps = torch.randn_like(x0)                            # one eps for both points: same path

    reseed()                                              # same dropout mask in both calls
    f_t = net(x0 + t * eps, t, y)
    reseed()
    with torch.no_grad():                                 # the target is a constant
        f_r = target(x0 + r * eps, r, y)

    loss = ((f_t - f_r) ** 2).flatten(1).mean(1)          # [B]; a sum's gradient is too large ..
    # .. for RAdam's first five steps, which follow the gradient itself, without normalising it
    return loss.mean(), dict(t=t, loss=loss.detach(), N=levels(it, args))


# ==== 3. Sampling =================================================================================
@torch.no_grad()
def sample(net, noise, y, args):
    """Denoise, add less noise, denoise again: one step for each slice of noise [K, B, C, H, W]."""
    hi, lo, K = math.log10(args.t_max), math.log10(args.t_mid), len(noise)
    ts = torch.logspace(hi, lo, K, dtype=noise.dtype, device=noise.device)
    x = torch.zeros_like(noise[0])
    for t, z in zip(ts, noise):                           # K = 1: t_max;  K = 2: t_max, t_mid
        x = net(x + (t**2 - args.t_min**2).sqrt() * z, t.expand(len(z), 1, 1, 1), y)  # Alg. 1
    return x                                              # show images clamped to [-1, 1]


# ==== 4. Arguments ================================================================================
@dataclass
class Args:
    fixed = ("iters",)                # neither field nor flag: what --resume may not change here
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
    teacher: str = "none"             # auto, train, none, a run folder, .pt, .pkl or address
    teacher_iters: int = 0            # steps of a teacher trained here; 0: its preset's (>= 0)
    iters: int = 800_000              # optimiser steps (>= 1)
    batch: int = 512                  # images per step, over all ranks (>= 1)
    accum: int = 1                    # parts a rank's batch is split into, to save memory (>= 1)
    lr: float = 4e-4                  # learning rate after warm-up (> 0)
    warmup: int = 0                   # steps of linear warm-up (>= 0)
    ema: float = 0.9999               # EMA decay; the averaged weights are sampled (>= 0, < 1)
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
    net: Literal["ddpmpp", "ncsnpp", "adm", "dit"] = "ncsnpp"  # network family
    ch: int = 128                     # base width of the network (>= 4)
    mult: tuple = (2, 2, 2)           # width of each resolution, in units of ch; not for dit (>= 1)
    blocks: int = 4                   # residual blocks per resolution; dit: in total (>= 1)
    attn: tuple = (16,)               # image sizes at which there is attention; not for dit
    dropout: float = 0.0              # dropout inside the network (>= 0, < 1)
    # --- the method (defaults: the paper's recipe for CIFAR-10, Table 3)
    s0: int = 2                       # noise levels at the start (>= 2, <= s1)
    s1: int = 150                     # noise levels at the end, less one
    mu0: float = 0.9                  # EMA decay of the target network at the start (> 0, < 1)
    t_mid: float = 0.821              # noise level of the second sampling step (> t_min, < t_max)
    t_max: float = 80.0               # highest noise level, and that of the first step
    t_min: float = 0.002              # lowest noise level: f(x, t_min) = x (> 0)
    rho: float = 7.0                  # grid exponent; higher: more low noise levels (> 0)
    sd: float = 0.5                   # standard deviation of the data, sigma_data (> 0)


PRESETS = {
    "paper": dict(cost="800,000 steps of 512 images; the authors used eight A100"),
    # ours, for two CPU cores: small networks, short averages, warm-up as the first five steps of
    # RAdam are not normalised; few levels and a fast target, or time would not suffice
    "small": dict(cost="30 min on two CPU cores", net="ddpmpp", iters=2_000, batch=64, warmup=50,
                  lr=1e-3, ema=0.99, s1=60, mu0=0.05, ch=32, mult=(1, 1, 2), blocks=1,
                  save_every=500),
    "digits": dict(cost="about 10 minutes on two CPU cores", iters=2_500, lr=1e-3, s1=60, mu0=0.05,
                   batch=128, warmup=50, ema=0.995, ch=32, net="ddpmpp",
                   mult=(1, 2), blocks=1, attn=(4,), save_every=250, t_mid=1.2, sd=0.75),
    "cifar10": dict(flip=True),
    # the data's own standard deviation; the second sampling level follows it
    "mnist": dict(sd=0.55, t_mid=0.9),
    "fashion_mnist": dict(sd=0.66, t_mid=1.1),
    # ours, not tried: Stable Diffusion's range of noise levels, a few minutes' training
    "latents": dict(cost="half an hour on a GPU of 16 GB (estimate)", cond=True, iters=625, batch=8,
                    lr=1e-4, warmup=25, ema=0.95, lora=64, checkpoint_acts=True, save_every=125,
                    grid=16, sd=1.0, t_max=14.6146, t_mid=1.62, t_min=0.02917),
}


# ==== 5. Training (the same in every file, except the lines ending in  # *) =======================
@Run.guarded                                              # one line for what is no fault of ours
def main(args):
    """Train with `args`; return {"run": folder, "fd_pixels_2step": 0.38, ..}."""
    run = Run(args, __file__)                             # device and ranks; no file is written yet
    data = load(args.dataset, args.data_dir, args.size, run.device)
    teacher, found, changes = teachers.get(args, data, run)  # *
    args = run.resolve(**changes)                         # with a teacher: its architecture
    run.seed(-1)                                          # negative: the same on every rank
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    net = EDM(backbone(args, data, teacher), args.sd, args.t_min, dtype)  # *
    ema = run.place(deepcopy(net).eval().requires_grad_(False))  # averaged weights, for sampling
    target = run.place(deepcopy(net).requires_grad_(False))  # EMA target, with dropout  # *
    net = run.place(net)
    if args.compile:                                      # all: dropout masks must be equal  # *
        net.compile()                                     # *
        target.compile()                                  # *
    opt = torch.optim.RAdam(net.parameters(), lr=args.lr, foreach=True)  # *
    state = dict(net=net, ema=ema, target=target, opt=opt)  # *
    steps = sorted({1, args.steps})                       # numbers of sampling steps to test  # *

    def draw(noise, y):
        return sample(ema, noise, y, args)

    def reseed():                                         # one dropout mask for all calls of a step
        run.seed(it, part, stream=1)

    it = run.start(state, data)                           # 0, or the step from which to resume
    teachers.show(teacher, found, run, data)              # *
    while it < args.iters:
        for part in range(args.accum):
            run.seed(it, part)
            x0, y = run.batch(data, it, part)
            loss, stats = loss_fn(net, target, x0, y, it, args, reseed)  # *
            (loss / args.accum).backward()
            run.count(stats)                              # for the log; stays on the device
        lr = args.lr * min(1, (it + 1) / max(args.warmup, 1))  # *
        for group in opt.param_groups:
            group["lr"] = lr
        if run.sync(opt, it):                             # mean over ranks; False: not finite, skip
            opt.step()
            decay = min(args.ema, (it + 1) / (it + 10))   # a short average at first  # *
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
                slow, fast = list(target.parameters()), list(net.parameters())  # *
                torch._foreach_lerp_(slow, fast, 1 - mu(it, args))  # *
        opt.zero_grad(set_to_none=True)

        it += 1
        run.log(it, lr=lr)
        if run.due(it):                                   # every --save-every, at end, on a signal
            run.save(it, state)
            run.evaluate(it, data, draw, steps)
    return run.finish(it, data, draw, steps)


if __name__ == "__main__":
    main(parse(Args, PRESETS))
