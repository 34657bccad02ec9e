"""
pd.py: Progressive Distillation.    Salimans and Ho 2022, arXiv:2202.00512.

The baseline of the consistency-model paper (arXiv:2303.01469), in EDM's variables: alpha = 1,
sigma = t. From the checkout: python -m tests.bench.pd

Idea    A student learns to make in one step of DDIM what its teacher makes in two. When it can, it
        becomes the teacher of a student with half as many steps, from N down to one. The target is
        an image, as in diffusion training, but one that a deterministic sampler has fixed: it has
        no noise to average over. Each stage adds its own error to those before it.

One training step, of the stage with N sampling steps                                [Algorithm 2]
    i       ~  uniform on 1 .. N;  t, s, r = t_(2i), t_(2i-1), t_(2i-2)  # of 2N + 1 levels from t_0
    x_t     =  x0 + t*eps
    x_s     =  x_t + (s - t)*(x_t - D(x_t, t))/t       # two DDIM steps of the teacher D
    x_r     =  x_s + (r - s)*(x_s - D(x_s, s))/s
    D_two   =  x_t - t*(x_r - x_t)/(r - t)             # one step with this D would end in x_r
    loss    =  max(1/t^2, 1) * mean over C,H,W of (D(x_t, t; net) - D_two)^2
                                                       # truncated SNR                    [Sec. 4]
At the end of a stage    teacher <- ema;  net <- ema;  a new optimiser;  N <- N/2

Deviations from the paper
    As in the consistency-model paper: EDM's network, preconditioning, noise levels (down to t_min,
    not 0) and teacher, and the settings of its authors' code (lr, stages, no average: ema = net).
    --warmup, and the ramp of the EMA's decay with --ema, are ours; they begin anew with each stage.
    A loss or gradient that is not finite stops the run. GPUs multiply in TF32.
    The presets digits and small are ours.
    The figures in eval.jsonl are of each stage's network in its own number of steps, if at most 64.
    `python -m common.sample` draws in --steps, which only a run that has ended is trained for.

Read next: cd.py, which learns the whole path at once.  diff cd.py tests/bench/pd.py
"""
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch

from common import teacher as teachers
from common.data import load
from common.flags import BadInput, parse
from common.networks import backbone
from common.precond import EDM
from common.run import Run


# ==== 1. Schedules ================================================================================
def karras(N, args):
    """t_min = t_1 < .. < t_N = t_max, float64 [N]: equal steps of t^(1/rho)."""
    lo, hi = args.t_min ** (1 / args.rho), args.t_max ** (1 / args.rho)
    return (lo + torch.linspace(0, 1, N, dtype=torch.float64) * (hi - lo)) ** args.rho


def stage(it, args):
    """What step `it` trains for: a number of sampling steps N; the first step of this stage, and
    that of the next. The stages of two steps and of one are twice as long as the others."""
    halved = [args.N >> k for k in range((args.N // args.steps).bit_length())]  # N, N/2, .., steps
    parts, begin = [1 + (N <= 2) for N in halved], 0
    for k, N in enumerate(halved, 1):
        end = args.iters * sum(parts[:k]) // sum(parts)
        if it < end:
            return N, begin, end
        begin = end


def times(n, it, args, device):
    """Draw n steps of the student, from t to r, and their middle s in t^(1/rho); [n, 1, 1, 1]."""
    N, _, _ = stage(it, args)
    ts = karras(2 * N + 1, args).float().to(device, non_blocking=True)  # no wait
    i = torch.randint(N, (n, 1, 1, 1), device=device)
    return ts[2 * i + 2], ts[2 * i + 1], ts[2 * i]


# ==== 2. Loss =====================================================================================
def slope(D, x, t, y):
    """dx/dt of the ODE whose denoiser is D: the direction in which DDIM steps."""
    return (x - D(x, t, y)) / t


def answer(teacher, x, t, s, r, y):
    """The image D for which one step x + (r - t)*(x - D)/t ends where two steps of the teacher do:
    from t to s, and on to r."""
    d = slope(teacher, x, t, y)
    d_s = slope(teacher, x + (s - t) * d, s, y)
    return x - t * ((s - t) * d + (r - s) * d_s) / (r - t)  # a mean slope; ends would lose digits


def loss_fn(net, teacher, x0, y, it, args):
    """x0 [B,C,H,W] in [-1, 1], y int64 [B] or None -> scalar loss, stats: t [B,1,1,1], loss [B].
    Reads args.N, steps, iters, t_min, t_max, rho. net and teacher are denoisers: net(x, t, y) ->
    images [B,C,H,W] for levels t [B,1,1,1]."""
    t, s, r = times(len(x0), it, args, x0.device)
    x_t = x0 + t * torch.randn_like(x0)
    with torch.no_grad():                                 # the target is a constant
        D_two = answer(teacher, x_t, t, s, r, y)
    weight = (1 / t**2).clamp(min=1).flatten()            # the SNR, truncated at 1
    loss = weight * ((net(x_t, t, y) - D_two) ** 2).flatten(1).mean(1)  # [B]
    return loss.mean(), dict(t=t, loss=loss.detach())


# ==== 3. Sampling =================================================================================
@torch.no_grad()
def sample(net, noise, y, args):
    """DDIM, from t_max to t_min in K steps: what a student of K steps has learned. Deterministic:
    of the noise [K, B, C, H, W] only the first slice is used."""
    ts, x = karras(len(noise) + 1, args).flip(0).to(noise), args.t_max * noise[0]
    for t, r in zip(ts, ts[1:]):
        x = x + (r - t) * slope(net, x, t.expand(len(x), 1, 1, 1), y)
    return x.clamp(-1, 1)


# ==== 4. Arguments ================================================================================
@dataclass
class Args:
    fixed = ("iters", "steps")        # neither field nor flag: what --resume may not change here
    t_mid = None                      # nor this: there are no other levels to be sampled at
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
    iters: int = 750_000              # optimiser steps (>= 1)
    batch: int = 512                  # images per step, over all ranks (>= 1)
    accum: int = 1                    # parts a rank's batch is split into, to save memory (>= 1)
    lr: float = 5e-5                  # learning rate after warm-up (> 0)
    warmup: int = 0                   # steps of linear warm-up (>= 0)
    ema: float = 0.0                  # EMA decay; the averaged weights are sampled (>= 0, < 1)
    flip: bool = False                # random horizontal flips
    bf16: bool = False                # bfloat16 activations; weights and loss stay float32
    tf32: bool = True                 # TensorFloat-32 products on CUDA: 10 bits of 23, and faster
    compile: bool = False             # torch.compile the network
    checkpoint_acts: bool = False     # recompute activations in the backward pass, to save memory
    lora: int = 0                     # rank of a pipeline's LoRA adapters; 0: train all (>= 0)
    shard: bool = False               # split weights and optimiser over the ranks (FSDP2)
    steps: int = 1                    # sampling steps (>= 1, <= 1000)
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
    # --- the method (defaults: the consistency-model paper's code for CIFAR-10)
    N: int = 4096                     # sampling steps of the first student, halved down to --steps
    t_max: float = 80.0               # highest noise level (> t_min)
    t_min: float = 0.002              # lowest noise level, where sampling ends (> 0)
    rho: float = 7.0                  # grid exponent; higher: more low noise levels (> 0)
    sd: float = 0.5                   # standard deviation of the data, sigma_data (> 0)


PRESETS = {
    "paper": dict(cost="13 stages, 750,000 steps of 512 images, three calls of the network each"),
    # ours, for two CPU cores: small networks, few stages, and a first teacher of 32 DDIM steps,
    # which has to be good: nothing repairs later what it does wrong
    "small": dict(cost="half an hour on two CPU cores, teacher included", net="ddpmpp", iters=500,
                  batch=64, lr=3e-4, warmup=10, ch=32, mult=(1, 1, 2), blocks=1, save_every=500,
                  N=16),
    "digits": dict(cost="about 10 minutes on two CPU cores, teacher included", iters=1_000,
                   batch=128, lr=1e-3, warmup=10, ch=32, net="ddpmpp", mult=(1, 2), blocks=1,
                   attn=(4,), save_every=500, sd=0.75, N=16),
    "cifar10": dict(flip=True),
    "mnist": dict(sd=0.55),
    "fashion_mnist": dict(sd=0.66),
}


def check(args):
    """Flags that contradict each other. Raises BadInput."""
    ratio = args.N // args.steps
    if args.N != args.steps * ratio or ratio < 1 or ratio & (ratio - 1):
        raise BadInput(f"--N {args.N} must be --steps = {args.steps} times a power of two, such as "
                       f"{16 * args.steps}")
    if args.iters < 2 * ratio.bit_length():
        raise BadInput(f"--iters {args.iters}: too few for {ratio.bit_length()} stages; take more, "
                       "or a lower --N")


# ==== 5. Training (the same in every file, except the lines ending in  # *) =======================
@Run.guarded                                              # one line for what is no fault of ours
def main(args):
    """Train with `args`; return {"run": folder, "fd_pixels_2step": 0.38, ..}."""
    run = Run(args, __file__)                             # device and ranks; no file is written yet
    check(args)                                           # *
    data = load(args.dataset, args.data_dir, args.size, run.device)
    first, found, changes = teachers.get(args, data, run, needed=not args.resume)  # *
    args = run.resolve(**changes)                         # with a teacher: its architecture
    run.seed(-1)                                          # negative: the same on every rank
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    net = EDM(backbone(args, data, first), args.sd, dtype=dtype)  # *
    ema = run.place(deepcopy(net).eval().requires_grad_(False))  # averaged weights, for sampling
    teacher = run.place(deepcopy(net).eval().requires_grad_(False))  # *
    net = run.place(net)
    if args.compile:                                      # *
        net.compile()                                     # *
        teacher.compile()                                 # *
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)  # *
    state = dict(net=net, ema=ema, teacher=teacher, opt=opt)  # *
    steps = [args.steps]                                  # to evaluate  # *

    def draw(noise, y):
        return sample(ema, noise, y, args)

    it = run.start(state, data)                           # 0, or the step from which to resume
    teachers.show(first, found, run, data)                # *
    while it < args.iters:
        N, begin, end = stage(it, args)                   # *
        if it == begin:                                   # in the first one all are equal  # *
            with torch.no_grad():                         # *
                for other in (teacher, net):              # lerp: sharded ones cannot copy  # *
                    torch._foreach_lerp_(list(other.parameters()), list(ema.parameters()), 1)  # *
            opt.state.clear()                             # *
        for part in range(args.accum):
            run.seed(it, part)
            x0, y = run.batch(data, it, part)
            loss, stats = loss_fn(net, teacher, x0, y, it, args)  # *
            (loss / args.accum).backward()
            run.count(stats)                              # for the log; stays on the device
        lr = args.lr * (end - it) / (end - begin)         # linear, to 0 with the stage  # *
        lr *= min(1, (it - begin + 1) / max(args.warmup, 1))  # *
        for group in opt.param_groups:
            group["lr"] = lr
        if run.sync(opt, it):                             # mean over ranks; False: not finite, skip
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # *
            opt.step()
            k = it - begin                                # *
            decay = min(args.ema, (k + 1) / (k + 10))     # a short average at first  # *
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        opt.zero_grad(set_to_none=True)

        it += 1
        run.log(it, lr=lr)
        if run.due(it) or it == end:                      # the end of a stage  # *
            run.save(it, state)
            if N <= 64:                                   # more cost as much as training  # *
                run.evaluate(it, data, draw, [N])         # *
    return run.finish(it, data, draw, steps)


if __name__ == "__main__":
    main(parse(Args, PRESETS))
