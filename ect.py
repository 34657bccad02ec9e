"""
ect.py: Easy Consistency Tuning.    Geng et al. 2024, arXiv:2406.14548.

Idea    Diffusion training is consistency training in which the second noise level r is always 0. So
        start from a diffusion model and let r grow towards t: each stage of the curriculum divides
        the gap t - r by q. There is no grid of noise levels, no teacher in the loss and no EMA
        target: the network is its own target.

One training step
    t       ~  lognormal(P_mean, P_std)                # continuous noise level
    gap     <- t * min(1, n(t) / q^a),  r = t - gap    # n(t) = 1 + k*sigmoid(-b*t)
                                                       # a = 1 + it // double
    f_t     =  f(x0 + t*eps, t)                        # gradient flows here
    f_r     =  f(x0 + r*eps, r), no gradient           # same weights, eps and dropout mask;
                                                       # f_r = x0 where r = 0
    loss    =  d(f_t, f_r) / gap                       # d = sqrt(|f_t - f_r|^2 + c^2) - c

Deviations from the paper
    a counts from 1, as in the authors' code: a = 0 is diffusion training, done for the teacher.
    Stages change at the exact step. In the authors' code they wait for a tick, every 100 steps.
    f(x, 0) = x in training and in sampling. The authors' code samples with f(x, 0.003) = x instead,
    which changes the coefficients by less than 0.6 % at t = 0.821.
    The decay of the EMA ramps up during the first steps; in the authors' code it is constant.
    A loss or gradient that is not finite stops the run; the authors' code replaces it by numbers.
    GPUs multiply in TF32, which the authors' code leaves off.
    The presets digits and small are ours.

Read next: common/teacher.py, the diffusion model it starts from.
"""
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch

from common import teacher as teachers
from common.data import load
from common.flags import BadInput, parse, say
from common.networks import backbone
from common.precond import EDM
from common.run import Run


# ==== 1. Schedules ================================================================================
def times(n, it, args, device):
    """Draw n noise levels t and their gaps t - r, each [n, 1, 1, 1], 0 < gap <= t."""
    t = (torch.randn(n, 1, 1, 1, device=device) * args.P_std + args.P_mean).exp()
    n_t = 1 + args.k * torch.sigmoid(-args.b * t)
    a = 1 + it // args.double
    gap = t * (n_t * args.q**-a).clamp(max=1)
    return t, gap                     # the gap itself: t - r would lose digits when r is close to t


# ==== 2. Loss =====================================================================================
def loss_fn(net, x0, y, it, args, reseed):
    """x0 [B,C,H,W] in [-1, 1], y int64 [B] or None -> scalar loss, stats: t [B,1,1,1], loss [B].
    reseed() resets the random generator, so that both calls of net drop the same units.
    Reads args.P_mean, P_std, k, b, q, double, c. net(x, t, y) -> images [B,C,H,W] for levels
    t [B,1,1,1]; it has to tend to x as t goes to 0."""
    t, gap = times(len(x0), it, args, x0.device)
    r = t - gap
    eps = torch.randn_like(x0)                            # one eps for both points: same path

    reseed()                                              # same dropout mask in both calls
    f_t = net(x0 + t * eps, t, y)
    reseed()
    with torch.no_grad():                                 # the target is a constant
        f_r = net(x0 + r * eps, torch.where(r > 0, r, t), y)  # ln r is never taken at r = 0 ..
        f_r = torch.where(r > 0, f_r, x0)                 # .. where f(x, 0) = x is known

    d = ((f_t - f_r) ** 2).flatten(1).sum(1)              # squared distance per image [B]
    d = (d + args.c**2).clamp(min=1e-24).sqrt() - args.c  # clamp: no NaN gradient at distance 0
    loss = d / gap.flatten()
    return loss.mean(), dict(t=t, loss=loss.detach(), gap=(gap / t).mean())


# ==== 3. Sampling =================================================================================
@torch.no_grad()
def sample(net, noise, y, args):
    """Denoise, add less noise, denoise again: one step for each slice of noise [K, B, C, H, W]."""
    hi, lo, K = math.log10(args.t_max), math.log10(args.t_mid), len(noise)
    ts = torch.logspace(hi, lo, K, dtype=noise.dtype, device=noise.device)
    x = torch.zeros_like(noise[0])
    for t, z in zip(ts, noise):                           # K = 1: t_max;  K = 2: t_max, t_mid
        x = net(x + t * z, t.expand(len(z), 1, 1, 1), y)
    return x                                              # show images clamped to [-1, 1]


# ==== 4. Arguments ================================================================================
@dataclass
class Args:
    added = dict(fp16=False)         # neither field nor flag: what older runs did, without it
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
    iters: int = 200_000              # optimiser steps (>= 1)
    batch: int = 128                  # images per step, over all ranks (>= 1)
    accum: int = 1                    # parts a rank's batch is split into, to save memory (>= 1)
    lr: float = 1e-4                  # learning rate after warm-up (> 0)
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
    net: Literal["ddpmpp", "ncsnpp", "adm", "dit"] = "ddpmpp"  # network family
    ch: int = 128                     # base width of the network (>= 4)
    mult: tuple = (2, 2, 2)           # width of each resolution, in units of ch; not for dit (>= 1)
    blocks: int = 4                   # residual blocks per resolution; dit: in total (>= 1)
    attn: tuple = (16,)               # image sizes at which there is attention; not for dit
    dropout: float = 0.2              # dropout inside the network (>= 0, < 1)
    # --- the method (defaults: the authors' 200k-step recipe for CIFAR-10, run_ecm.sh)
    fp16: bool = False                # float16 activations: finer than --bf16, for narrow gaps
    q: float = 2.0                    # each stage shrinks the gap by this factor (>= 1)
    double: int = 25_000              # steps of a stage (>= 1)
    k: float = 8.0                    # n(t) = 1 + k * sigmoid(-b * t) (>= 0)
    b: float = 1.0                    # slope of n(t)
    c: float = 0.0                    # pseudo-Huber constant; 0: the plain L2 norm (>= 0)
    P_mean: float = -1.1              # mean of ln t
    P_std: float = 2.0                # standard deviation of ln t (>= 0)
    t_mid: float = 0.821              # noise level of the second sampling step (> 0, < t_max)
    t_max: float = 80.0               # noise level of the first sampling step
    sd: float = 0.5                   # standard deviation of the data, sigma_data (> 0)


PRESETS = {
    "paper": dict(cost="200,000 steps, about 25 hours on one A100"),
    # the authors' one-hour recipe, run_ecm_1hour.sh: the narrowest gap from the start
    "fast": dict(cost="8,000 steps, about one hour on one A100", q=256.0, double=10**9, iters=8_000,
                 ema=0.9993, save_every=2_000),
    # ours, for two CPU cores: small networks, a short average. Warm-up: the first five steps of
    # RAdam are not rectified, and would wreck what the teacher knows. With the gap, lr and noise
    # levels of digits, small was worse in two steps than in one: see tests/bench/README.md
    "small": dict(cost="about half an hour on two CPU cores, teacher included", q=16.0,
                  double=10**9, P_mean=0.0, P_std=1.6, t_mid=2.0, iters=600, batch=64, lr=1.5e-4,
                  warmup=50, ema=0.99, dropout=0.0, ch=32, mult=(1, 1, 2), blocks=1,
                  save_every=600),
    "digits": dict(cost="about 10 minutes on two CPU cores, teacher included", q=256.0,
                   double=10**9, iters=1_000, lr=5e-4, warmup=50, ema=0.99, dropout=0.0, ch=32,
                   mult=(1, 2), blocks=1, attn=(4,), save_every=250, t_mid=1.2, sd=0.75),
    # the data's own standard deviation; the second sampling level follows it
    "mnist": dict(sd=0.55, t_mid=0.9),
    "fashion_mnist": dict(sd=0.66, t_mid=1.1),
    # ours, not tried: Stable Diffusion's range of noise levels, a few minutes' training
    "latents": dict(cost="half an hour on a GPU of 16 GB (estimate)", cond=True, iters=625, batch=8,
                    lr=1e-4, warmup=25, ema=0.95, lora=64, checkpoint_acts=True, save_every=125,
                    grid=16, sd=1.0, t_max=14.6146, t_mid=1.62, P_mean=-0.4),
}


def check(args):
    """Refuse flags that contradict each other; say what --bf16 costs. Raises BadInput."""
    if args.bf16 and args.fp16:
        raise BadInput("--bf16 and --fp16 are two precisions; give one of them")
    if args.bf16:                                         # measured: tests/bench/README.md
        say("--bf16 loses the direction of the gradient at narrow gaps (ect on digits, one step: "
            "FD 1.23, float32 0.40, --fp16 0.46)")


# ==== 5. Training (the same in every file, except the lines ending in  # *) =======================
@Run.guarded                                              # one line for what is no fault of ours
def main(args):
    """Train with `args`; return {"run": folder, "fd_pixels_2step": 0.38, ..}."""
    run = Run(args, __file__)                             # device and ranks; no file is written yet
    check(args)                                           # *
    data = load(args.dataset, args.data_dir, args.size, run.device)
    teacher, found, changes = teachers.get(args, data, run)  # *
    args = run.resolve(**changes)                         # with a teacher: its architecture
    run.seed(-1)                                          # negative: the same on every rank
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    dtype = torch.float16 if args.fp16 else dtype         # *
    net = EDM(backbone(args, data, teacher), args.sd, dtype=dtype)  # *
    ema = run.place(deepcopy(net).eval().requires_grad_(False))  # averaged weights, for sampling
    net = run.place(net)
    if args.compile:                                      # in place: both calls are compiled  # *
        net.compile()                                     # *
    opt = torch.optim.RAdam(net.parameters(), lr=args.lr, foreach=True)  # *
    state = dict(net=net, ema=ema, opt=opt)               # *
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
            loss, stats = loss_fn(net, x0, y, it, args, reseed)  # *
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
        opt.zero_grad(set_to_none=True)

        it += 1
        run.log(it, lr=lr)
        if run.due(it):                                   # every --save-every, at end, on a signal
            run.save(it, state)
            run.evaluate(it, data, draw, steps)
    return run.finish(it, data, draw, steps)


if __name__ == "__main__":
    main(parse(Args, PRESETS))
