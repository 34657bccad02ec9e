"""
cd.py: Consistency Distillation.    Song et al. 2023, arXiv:2303.01469.

Idea    A diffusion model moves noise to data along the paths of an ODE, in many small steps. Learn
        a function f that jumps from any point of a path to its end: let the teacher do one step
        from x_t to x_r, and ask f for the same image from both. f(x, t_min) = x holds by the way f
        is written, and spreads from level to level. With a perfect teacher and small steps the loss
        does go to zero; Heun's second-order step makes 18 levels enough.

One training step                                                                    [Algorithm 2]
    n       ~  uniform on 1 .. N-1;  t = t_(n+1), r = t_n
    x_t     =  x0 + t*eps;  x_r = x_t + (r - t)*slope  # of the teacher: (x - D(x, t))/t  [Eq. 6]
    f_t     =  f(x_t, t; net)                          # gradient flows here
    f_r     =  f(x_r, r; target), no gradient          # same dropout mask
    loss    =  |f_t - f_r|^2                           # weight 1                         [Eq. 7]
    target  <- mu*target + (1 - mu)*net                # mu = 0: the network itself       [Eq. 8]

Deviations from the paper
    The distance is the squared L2 norm, one of the paper's three; its best figures are with LPIPS.
    The norm is a sum over pixels, the paper's a mean: RAdam divides the factor out.
    The decay of the averaged weights ramps up in the first steps; in the paper it is constant.
    Non-finite gradients stop the run. GPUs multiply in TF32. Presets digits and small are ours.
    Not in the paper: --distance huber (see ict.py); --guidance, for teachers trained with dropped
    labels (ours, not EDM's); --boundaries, from multistep consistency models (arXiv:2403.06807).

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
from common.precond import EDM, backbone
from common.run import BadInput, Run, parse, say


# ==== 1. Arguments ================================================================================
@dataclass
class Args:
    # --- the run (the same in every file)
    dataset: str = "digits"           # digits | mnist | fashion_mnist | cifar10 | a folder | a .npz
    data_dir: str = "data"            # where downloads are kept
    out: str = "runs"                 # runs/<method>-<dataset>-<nnn> is created here
    resume: str = ""                  # go on with this run folder; a finished one is only sampled
    preset: Literal["auto", "small", "fast", "paper"] = "auto"  # small on a CPU, else fast, paper
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # auto: cuda if there is one
    seed: int = 0                     # everything random follows from (seed, rank, step)
    cond: bool = False                # condition on the class label
    size: int = 0                     # height and width of a folder's images; 0: 32, or as stored
    net: Literal["ddpmpp", "ncsnpp", "adm", "dit"] = "ncsnpp"  # network family
    ch: int = 128                     # base width of the network
    mult: tuple = (2, 2, 2)           # width of each resolution, times ch; not for dit
    blocks: int = 4                   # residual blocks per resolution; of dit: all
    attn: tuple = (16,)               # image sizes at which there is attention; not for dit
    teacher: str = "auto"             # auto | train | none | run folder | .pt | .pkl | address
    teacher_iters: int = 0            # steps of a teacher trained here; 0: its own preset
    iters: int = 800_000              # optimiser steps
    batch: int = 512                  # images per step, over all ranks
    accum: int = 1                    # parts into which a rank's batch is split to save memory
    lr: float = 4e-4                  # learning rate after warm-up
    warmup: int = 0                   # steps of linear warm-up
    ema: float = 0.9999               # decay of the averaged weights, which are the ones sampled
    dropout: float = 0.0              # dropout inside the network
    flip: bool = False                # random horizontal flips
    bf16: bool = False                # bfloat16 activations; weights and loss stay float32
    compile: bool = False             # torch.compile the network
    shard: bool = False               # split weights and optimiser over the ranks (FSDP2)
    steps: int = 2                    # sampling steps
    grid: int = 64                    # images in a sample grid
    log_every: int = 100              # steps between log lines
    save_every: int = 5_000           # steps between checkpoints, grids and figures
    keep: bool = False                # keep every checkpoint, not only the last two
    max_skips: int = 0                # steps that may be skipped because they are not finite
    fid: int = 0                      # images for an FID at the end: 50000 for a published figure
    fid_every: int = 0                # also measure it every so many steps
    # --- the method (defaults: the paper's recipe for CIFAR-10, Table 3)
    N: int = 0                        # noise levels; 0: 18, or the next that --boundaries allows
    solver: Literal["heun", "euler"] = "heun"  # the teacher's step
    distance: Literal["l2", "l1", "huber", "lpips"] = "l2"  # l2: squared; lpips: of that package
    mu: float = 0.0                   # decay of the target network; 0: the network itself
    guidance: float = 0.0             # classifier-free guidance of the teacher, with --cond
    boundaries: int = 1               # K segments of the path: f jumps to the end of its own
    t_mid: float = 0.585              # noise level of the second sampling step
    t_max: float = 80.0               # noise level of the first, and the highest of the grid
    t_min: float = 0.002              # the lowest: f(x, t_min) = x
    rho: float = 7.0                  # bends the grid towards low levels
    sd: float = 0.5                   # standard deviation of the data, sigma_data


PRESETS = {
    "paper": dict(cost="800,000 steps of 512 images; the authors used eight A100"),
    # ours, for two CPU cores: small networks, short averages, warm-up as the first five steps of
    # RAdam are not normalised, and would wreck what the teacher knows
    "small": dict(cost="half an hour on two CPU cores, teacher included", net="ddpmpp", iters=500,
                  batch=64, lr=3e-4, warmup=50, ema=0.99, ch=32, mult=(1, 1, 2), blocks=1,
                  save_every=500),
    "digits": dict(cost="10 minutes on two CPU cores, teacher included", iters=1_500, lr=2e-4,
                   batch=128, warmup=50, ema=0.995, ch=32, net="ddpmpp",
                   mult=(1, 2), blocks=1, attn=(4,), save_every=250, t_mid=0.15, sd=0.75),
    "cifar10": dict(flip=True),
    # the data's own standard deviation; the second sampling level follows it
    "mnist": dict(sd=0.55, t_mid=0.9),
    "fashion_mnist": dict(sd=0.66, t_mid=1.1),
}


def settle(args):
    """Check and complete the flags, before anything is trained or written."""
    K = args.boundaries
    if args.guidance and not args.cond:
        raise BadInput("--guidance needs a teacher that knows the classes; add --cond")
    if args.N and (args.N < 2 or (args.N - 1) % K):
        raise BadInput(f"--N {args.N}: N - 1 must be a positive multiple of --boundaries {K}")
    args.N = args.N or 1 + math.ceil(17 / K) * K
    if K > 1:
        args.steps = K
        say(f"--boundaries {K}: {args.N} noise levels, sampled in {K} steps")


# ==== 2. Schedules ================================================================================
def karras(N, args):
    """t_min = t_1 < .. < t_N = t_max, float64 [N]: equal steps of t^(1/rho)."""
    lo, hi = args.t_min ** (1 / args.rho), args.t_max ** (1 / args.rho)
    return (lo + torch.linspace(0, 1, N, dtype=torch.float64) * (hi - lo)) ** args.rho


def times(n, it, args, device):
    """Draw n pairs of levels t > r and the lower edge s <= r of their segment; [n, 1, 1, 1]."""
    ts = karras(args.N, args).float().to(device)
    i = torch.randint(len(ts) - 1, (n, 1, 1, 1), device=device)
    width = (len(ts) - 1) // args.boundaries              # of a segment
    return ts[i + 1], ts[i], ts[i // width * width]


# ==== 3. Loss =====================================================================================
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
    """The straight line from x at noise level t to y at level r <= t, taken at level s."""
    w = (t - s) / (t - r).clamp(min=1e-9)                 # clamp: 0, not 0 / 0, where all are equal
    return (1 - w) * x + w * y


def loss_fn(net, target, teacher, x0, y, it, args, reseed, lpips=None):
    """x0 [B,C,H,W] in [-1, 1], y int64 [B] or None -> scalar loss, stats: t [B,1,1,1], loss [B].
    reseed() resets the random generator, so that both networks drop the same units."""
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

    loss = ((f_t - f_r) ** 2).flatten(1).sum(1)           # squared distance per image [B]
    if args.distance == "l1":
        loss = (f_t - f_r).abs().flatten(1).sum(1)
    if args.distance == "huber":
        c = 0.00054 * math.sqrt(x0[0].numel())
        loss = (loss + c**2).sqrt() - c
    if args.distance == "lpips":
        loss = lpips(f_t, f_r)
    return loss.mean(), dict(t=t, loss=loss.detach())


# ==== 4. Sampling =================================================================================
@torch.no_grad()
def sample(net, noise, y, args):
    """Denoise, add less noise, denoise again: one step for each slice of noise [K, B, C, H, W]."""
    if args.boundaries > 1:                               # from edge to edge, without more noise
        ts, x = karras(len(noise) + 1, args).flip(0).to(noise), args.t_max * noise[0]
        for t, s in zip(ts, ts[1:]):
            x = line(x, net(x, t.expand(len(x), 1, 1, 1), y), t, args.t_min, s)
        return x.clamp(-1, 1)
    hi, lo, K = math.log10(args.t_max), math.log10(args.t_mid), len(noise)
    ts = torch.logspace(hi, lo, K, dtype=noise.dtype, device=noise.device)
    x = torch.zeros_like(noise[0])
    for t, z in zip(ts, noise):                           # K = 1: t_max;  K = 2: t_max, t_mid
        x = net(x + (t**2 - args.t_min**2).sqrt() * z, t.expand(len(z), 1, 1, 1), y)  # Alg. 1
    return x.clamp(-1, 1)


# ==== 5. Training (the same in every file, except the lines ending in  # *) =======================
def main(args):
    """Train as `args` say; return the final figures, such as {"fd_pixels_2step": 0.38}."""
    run = Run(args, __file__)                             # device and ranks; no file is written yet
    settle(args)                                          # *
    lpips = perceptual(run.device) if args.distance == "lpips" else None  # *
    data = load(args.dataset, args.data_dir, args.size, run.device)
    teacher = teachers.get(args, data, run, needed=True)  # *
    run.seed(-1)                                          # negative: the same on every rank
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    net = EDM(backbone(args, data, teacher), args.sd, args.t_min, dtype)  # *
    ema = run.place(deepcopy(net).eval().requires_grad_(False))  # averaged weights, for sampling
    target = run.place(deepcopy(net).requires_grad_(False))  # slow copy, training mode  # *
    net = run.place(net)
    if args.compile:                                      # both: other kernels, other masks  # *
        net.compile()                                     # *
        target.compile()                                  # *
        teacher.compile()                                 # *
    opt = torch.optim.RAdam(net.parameters(), lr=args.lr, foreach=True)  # *
    state = dict(net=net, ema=ema, target=target, opt=opt)  # *
    draw = lambda noise, y: sample(ema, noise, y, args)

    it = run.start(state, data)                           # a new folder, or where it stopped
    teachers.show(teacher, run, data)                     # *
    while it < args.iters:
        for part in range(args.accum):
            run.seed(it, part)
            x0, y = run.batch(data, it, part)
            reseed = lambda: run.seed(it, part, stream=1)
            loss, stats = loss_fn(net, target, teacher, x0, y, it, args, reseed, lpips)  # *
            (loss / args.accum).backward()
            run.count(stats)                              # sums stay on the device
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
        if run.due(it):                                   # each --save-every, at the end, a signal
            run.save(it, state)
            run.evaluate(it, data, draw)
    return run.finish(it, data, draw)


if __name__ == "__main__":
    main(parse(Args, PRESETS))
