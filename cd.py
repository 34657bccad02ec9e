"""
cd.py: Consistency Distillation.    Song et al. 2023, arXiv:2303.01469.

Idea    A diffusion model moves noise to data along the paths of an ODE, in many small steps. Train
        a function f that jumps from any point of a path to its end: the teacher takes one step from
        x_t to x_r, and f learns to return the same image from both points. At the lowest level
        f(x, t_min) = x by construction, and training carries this up from level to level. With a
        perfect teacher and small steps the loss can reach zero, unlike that of CT (ct.py). Heun's
        second-order step makes 18 levels enough.

One training step                                                                    [Algorithm 2]
    n       ~  uniform on 1 .. N-1;  t = t_(n+1), r = t_n
    x_t     =  x0 + t*eps;  x_r = x_t + (r - t)*slope  # of the teacher: (x - D(x, t))/t  [Eq. 6]
    f_t     =  f(x_t, t; net)                          # gradient flows here
    f_r     =  f(x_r, r; target), no gradient          # same dropout mask
    loss    =  mean over C,H,W of (f_t - f_r)^2        # weight 1                         [Eq. 7]
    target  <- mu*target + (1 - mu)*net                # mu = 0: the network itself       [Eq. 8]

Deviations from the paper
    The distance is the squared L2 norm, one of the paper's three; its best figures are with LPIPS.
    Network, initialisation and teacher are EDM's, not the authors' own.
    The decay of the EMA ramps up during the first steps; in the paper it is constant.
    A loss or gradient that is not finite stops the run. GPUs multiply in TF32.
    The presets digits, small and latents are ours.
    Not in the paper: --distance huber (see ict.py); --boundaries (arXiv:2403.06807); --guidance w,
    which replaces the teacher's D by D + w * (D - D without label), a weight of 1 + w elsewhere,
    and needs a teacher trained with dropped labels, as ours is and EDM's are not.

Read next: ct.py.  See only what changes: diff cd.py ct.py
"""
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch

from common import teacher as teachers
from common.assets import perceptual
from common.data import load
from common.flags import BadInput, parse, say
from common.networks import backbone
from common.precond import EDM
from common.run import Run


# ==== 1. Schedules ================================================================================
def karras(N, args):
    """t_min = t_1 < .. < t_N = t_max, float64 [N]: equal steps of t^(1/rho); rho = 0: of Stable
    Diffusion's time, as ln(1 + t^2) is the integral of its beta, whose root rises by 3.757."""
    u = torch.linspace(0, 1, N, dtype=torch.float64)
    if args.rho == 0:
        lo, hi = math.log1p(args.t_min**2), math.log1p(args.t_max**2)
        return (lo + (hi - lo) * ((1 + 2.757 * u) ** 3 - 1) / (3.757**3 - 1)).expm1().sqrt()
    lo, hi = args.t_min ** (1 / args.rho), args.t_max ** (1 / args.rho)
    return (lo + u * (hi - lo)) ** args.rho


def times(n, it, args, device):
    """Draw n pairs of levels t > r and the lower edge s <= r of their segment; [n, 1, 1, 1]."""
    ts = karras(args.N, args).float().to(device, non_blocking=True)  # no wait
    i = torch.randint(len(ts) - 1, (n, 1, 1, 1), device=device)
    width = (len(ts) - 1) // args.boundaries              # of a segment
    return ts[i + 1], ts[i], ts[i // width * width]


# ==== 2. Loss =====================================================================================
def solve(teacher, x, t, r, y, args):
    """One step of the teacher's ODE, from x at level t to level r."""
    def slope(x, t):
        D = teacher(x, t, y)
        if args.guidance:
            D = D + args.guidance * (D - teacher(x, t, None))
        return (x - D) / t
    d = slope(x, t)
    if args.solver == "heun":
        d = (d + slope(x + (r - t) * d, r)) / 2
    return x + (r - t) * d


def line(x, y, t, r, s):
    """The point at level s of the line through x at noise level t and y at level r <= t."""
    w = (t - s) / (t - r).clamp(min=1e-9)                 # clamp: 0, not 0 / 0, where all are equal
    return (1 - w) * x + w * y


def loss_fn(net, target, teacher, x0, y, it, args, reseed, lpips=None):
    """x0 [B,C,H,W] in [-1, 1], y int64 [B] or None -> scalar loss, stats: t [B,1,1,1], loss [B].
    reseed() resets the random generator, so that both networks drop the same units.
    Reads args.N, boundaries, t_min, t_max, rho, guidance, solver, distance. net and target (net or
    its EMA), teacher (a denoiser): net(x, t, y) -> images [B,C,H,W] for levels t [B,1,1,1];
    net(x, t_min, y) = x."""
    t, r, s = times(len(x0), it, args, x0.device)
    x_t = x0 + t * torch.randn_like(x0)
    with torch.no_grad():
        x_r = solve(teacher, x_t, t, r, y, args)          # on the same path of the ODE

    reseed()                                              # same dropout mask in both calls
    f_t = net(x_t, t, y)
    reseed()
    with torch.no_grad():                                 # the target is a constant
        x_s = line(x_r, target(x_r, r, y), r, args.t_min, s)  # one segment: s = t_min, so that ..
        f_r = line(x_t, x_s, t, s, args.t_min)            # .. f_r = x_s = target(x_r, r, y)

    loss = ((f_t - f_r) ** 2).flatten(1).mean(1)          # [B]; a sum's gradient is too large ..
    if args.distance == "l1":                             # .. for RAdam's first, unnormalised steps
        loss = (f_t - f_r).abs().flatten(1).mean(1)
    if args.distance == "huber":
        c = 0.00054 * math.sqrt(x0[0].numel())
        loss = (((f_t - f_r) ** 2).flatten(1).sum(1) + c**2).sqrt() - c
    if args.distance == "lpips":
        loss = lpips(f_t, f_r)
    return loss.mean(), dict(t=t, loss=loss.detach())


# ==== 3. Sampling =================================================================================
@torch.no_grad()
def sample(net, noise, y, args):
    """Denoise, add less noise, denoise again: one step for each slice of noise [K, B, C, H, W]."""
    if args.boundaries > 1:                               # from edge to edge, without more noise
        ts, x = karras(len(noise) + 1, args).flip(0).to(noise), args.t_max * noise[0]
        for t, s in zip(ts, ts[1:]):
            x = line(x, net(x, t.expand(len(x), 1, 1, 1), y), t, args.t_min, s)
        return x
    hi, lo, K = math.log10(args.t_max), math.log10(args.t_mid), len(noise)
    ts = torch.logspace(hi, lo, K, dtype=noise.dtype, device=noise.device)
    x = torch.zeros_like(noise[0])
    for t, z in zip(ts, noise):                           # K = 1: t_max;  K = 2: t_max, t_mid
        x = net(x + (t**2 - args.t_min**2).sqrt() * z, t.expand(len(z), 1, 1, 1), y)  # Alg. 1
    return x                                              # show images clamped to [-1, 1]


# ==== 4. Arguments ================================================================================
@dataclass
class Args:
    empty = ("t_mid",)                # neither field nor flag: what a run may be without
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
    N: int = 0                        # noise levels; 0: 18, or more to fit --boundaries (>= 0)
    solver: Literal["heun", "euler"] = "heun"  # the teacher's step
    distance: Literal["l2", "l1", "huber", "lpips"] = "l2"  # l2: squared; lpips: needs lpips
    mu: float = 0.0                   # EMA decay of the target; 0: the network itself (>= 0, < 1)
    guidance: float = 0.0             # classifier-free: D + guidance * (D - D without label) (>= 0)
    boundaries: int = 1               # segments of the path; f jumps to the end of its own (>= 1)
    t_mid: float = 0.585              # noise level of the second sampling step (> t_min, < t_max)
    t_max: float = 80.0               # highest noise level, and that of the first step
    t_min: float = 0.002              # lowest noise level: f(x, t_min) = x (> 0)
    rho: float = 7.0                  # grid exponent; 0: even in Stable Diffusion's time (>= 0)
    sd: float = 0.5                   # standard deviation of the data, sigma_data (> 0)


PRESETS = {
    "paper": dict(cost="800,000 steps of 512 images; the authors used eight A100"),
    # ours, for two CPU cores; warm-up, as RAdam's first five steps are not normalised
    "small": dict(cost="half an hour on two CPU cores, teacher included", net="ddpmpp", iters=500,
                  batch=64, lr=3e-4, warmup=50, ema=0.99, ch=32, mult=(1, 1, 2), blocks=1,
                  save_every=500),
    "digits": dict(cost="about 15 minutes on two CPU cores, teacher included", iters=1_500, lr=2e-4,
                   batch=128, warmup=50, ema=0.995, ch=32, net="ddpmpp",
                   mult=(1, 2), blocks=1, attn=(4,), save_every=250, t_mid=0.15, sd=0.75),
    "cifar10": dict(flip=True),
    # the data's own standard deviation; the second sampling level follows it
    "mnist": dict(sd=0.55, t_mid=0.9),
    "fashion_mnist": dict(sd=0.66, t_mid=1.1),
    # ours, not tried: Stable Diffusion's range of levels, LCM's distance, 48 steps of the teacher
    "latents": dict(cost="half an hour on a GPU of 16 GB (estimate)", cond=True, iters=625, batch=8,
                    lr=1e-4, warmup=25, ema=0.95, lora=64, checkpoint_acts=True, save_every=125,
                    grid=16, N=49, rho=0.0, solver="euler", distance="huber", sd=1.0, t_mid=1.62,
                    t_min=0.02917, t_max=14.6146),
}


def check(args):
    """Flags that contradict each other. Raises BadInput."""
    if args.guidance and not args.cond:
        raise BadInput("--guidance needs a teacher that knows the classes; add --cond")
    if args.N and (args.N < 2 or (args.N - 1) % args.boundaries):
        raise BadInput(f"--N {args.N}: N - 1 must be 1, 2, .. times --boundaries {args.boundaries}")


def segments(args):
    """The flags that follow from --boundaries K: N; with several segments also steps and t_mid."""
    K, N = args.boundaries, args.N or 1 + math.ceil(17 / args.boundaries) * args.boundaries
    if K > 1:
        say(f"--boundaries {K}: {N} noise levels, sampled in {K} steps")
    return dict(N=N, steps=K, t_mid=None) if K > 1 else dict(N=N)


# ==== 5. Training (the same in every file, except the lines ending in  # *) =======================
@Run.guarded                                              # one line for what is no fault of ours
def main(args):
    """Train with `args`; return {"run": folder, "fd_pixels_2step": 0.38, ..}."""
    run = Run(args, __file__)                             # device and ranks; no file is written yet
    check(args)                                           # *
    args = run.resolve(**segments(args))                  # *
    data = load(args.dataset, args.data_dir, args.size, run.device)
    lpips = perceptual(data, run.device) if args.distance == "lpips" else None  # *
    teacher, found, changes = teachers.get(args, data, run, needed=True)  # *
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
        teacher.compile()                                 # *
    opt = torch.optim.RAdam(net.parameters(), lr=args.lr, foreach=True)  # *
    state = dict(net=net, ema=ema, target=target, opt=opt)  # *
    steps = [args.steps] if args.boundaries > 1 else sorted({1, args.steps})  # to evaluate  # *

    def draw(noise, y):
        return sample(ema, noise, y, args)

    def reseed():                                         # one dropout mask for all calls of a step
        run.seed(it, part, stream=1)

    it = run.start(state, data)                           # 0, or the step from which to resume
    teachers.show(teacher, found, run, data)              # *
    teacher.dtype = dtype                                 # --bf16 here costs no accuracy  # *
    while it < args.iters:
        for part in range(args.accum):
            run.seed(it, part)
            x0, y = run.batch(data, it, part)
            loss, stats = loss_fn(net, target, teacher, x0, y, it, args, reseed, lpips)  # *
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
                torch._foreach_lerp_(slow, fast, 1 - args.mu)  # *
        opt.zero_grad(set_to_none=True)

        it += 1
        run.log(it, lr=lr)
        if run.due(it):                                   # every --save-every, at end, on a signal
            run.save(it, state)
            run.evaluate(it, data, draw, steps)
    return run.finish(it, data, draw, steps)


if __name__ == "__main__":
    main(parse(Args, PRESETS))
