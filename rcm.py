"""
rcm.py: Score-regularised consistency models.    Zheng et al. 2025, arXiv:2510.08431.

Idea    sCM (scm.py) covers all that the teacher makes, but its images are blurred. Matching scores
        on the student's own images (DMD) sharpens them, but loses modes. Take both, the second with
        a small weight. The score of the student's images is that of a third network, fake: a
        diffusion model trained on them all along. Student and fake start as copies of the teacher.

One training step of the student: the first H steps, then one in student_every       [Algorithm 1]
    t       =  arctan(e^tau / sd),  tau ~ N(P_mean, P_std^2)
    x_t     =  cos(t)*x0 + sin(t)*z,   z = sd*eps          # f(x, t) = cos(t)*x - sin(t)*sd*F(x, t)
    F_T     =  F_u + (1 + guidance) * (F_c - F_u)          # teacher's F: u without label, c with
    dF      =  cos(t)*sin(t) * dF(x_t, t)/dt along (sd*F_T, 1)                            # JVP
    g       =  -cos(t)*sqrt(1 - (ramp*sin(t))^2)*(F - F_T) - ramp*cos(t)*sin(t)*x_t/sd - dF
    loss    =  loss_scale * |F - (F + g/(|g| + c))|^2      # no gradient through F + g; ramp: 0 .. 1
After the first H steps also, for images x that the student makes of noise in N = 1 .. N_max steps
    x_t     =  cos(t)*x + sin(t)*z                         # new z and t, by D_mean and D_std
    q       =  (f_fake - f_T) / W,   W = mean|x - f_T|     # at (x_t, t); f of fake and teacher
    loss    += lambda_dmd * |(x - (x - sd*q))/sd|^2        # gradient through x's last step alone

All other steps train fake, without dropout, with x, x_t and t made in the same way
    loss    =  |F_fake(x_t, t) - (cos(t)*z - sin(t)*x)/sd|^2

Deviations from the paper
    The paper distils large models of text to image and of video: the presets here are ours.
    Its sd is 1; here g, q and c are in units of sd, and D_mean = ln(sd) makes ln(tan t) the paper's
    N(0, 1.6^2). The student's images begin at sigma_max = 80, as they do in sampling, and not at
    pi/2: EDM's embedding of ln(sigma) has no such time. Warm-up counts the steps of both networks.
    Weights are the code's 100 and 1, not 1 and 0.01. N is random as in the paper; the code cycles.
    A loss or gradient that is not finite stops the run; the authors' code sets it to zero.

Read next: scm.py, the first part alone. What changes: diff scm.py rcm.py
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
def is_students(it, args):
    """Is step it the student's? The first H are, then one in student_every; others are fake's."""
    return not args.lambda_dmd or it < args.H or (it - args.H) % args.student_every == 0


def updates(it, args):
    """How often the student has been updated before step it."""
    late = max(it - args.H, 0) if args.lambda_dmd else 0
    return it - late + math.ceil(late / args.student_every)


def power(sigma_rel):
    """The exponent p of an average that weighs update k by k^p, so that the standard deviation of
    k is sigma_rel times the number of updates: power(0.05) = 16.97 (EDM2, arXiv:2312.02696)."""
    s = sigma_rel**-2                                     # (p + 2)^2 (p + 3) = s (p + 1), that is
    p = torch.linalg.eigvals(torch.tensor([[-7, s - 16, s - 12], [1, 0, 0], [0, 1, 0]]))
    return float(p.real.max())                            # p^3 + 7 p^2 + (16 - s) p + 12 - s = 0


def average(it, args):
    """EMA decay of step it: the average of `power` over the student's updates; 1 for fake's."""
    if not is_students(it, args):
        return 1.0
    k = updates(it, args)
    if not args.sigma_rel:
        return min(args.ema, (k + 1) / (k + 10))
    return (1 - 1 / (k + 1)) ** (power(args.sigma_rel) + 1)


def rounds(it, args):
    """N: in how many steps the student makes its images in step it. The same on every rank."""
    return int(torch.randint(args.N_max, (1,), generator=torch.Generator().manual_seed(it))) + 1


def times(x0, mean, std, args):
    """Draw a time t in (0, pi/2) for each image, [B, 1, 1, 1]."""
    tau = torch.randn(len(x0), 1, 1, 1, dtype=x0.dtype, device=x0.device) * std + mean
    return torch.atan(tau.exp() / args.sd)


def sampling_times(K, args):
    """The K times at which the sampler calls f: sigma_max down to t_mid, geometric in sigma."""
    hi, lo = math.log10(args.sigma_max), math.log10(args.sd * math.tan(args.t_mid))
    return torch.atan(torch.logspace(hi, lo, K, dtype=torch.float64) / args.sd)


def rollout_times(N, x0, args):
    """The times of a rollout, [N, B, 1, 1, 1]: that of sigma_max, then for each image the
    lowest of random ones drawn so far; with --rollout fixed those of the sampler."""
    fixed = sampling_times(N, args).to(x0, non_blocking=True)  # a GPU is not waited for
    fixed = fixed.expand(len(x0), 1, 1, 1, N).movedim(4, 0)
    if args.rollout == "fixed":
        return fixed
    ts = [times(x0, args.D_mean, args.D_std, args) for _ in range(N - 1)]
    return torch.stack([fixed[0], *ts]).cummin(0).values


# ==== 2. Loss =====================================================================================
def f(x, t, F, args):
    """f(x, t), given F = F(x, t) of a network; of teacher and fake it is the denoiser."""
    return t.cos() * x - t.sin() * args.sd * F


def guided(teacher, x, t, y, args):
    """F of the teacher, with classifier-free guidance."""
    F = teacher.F(x, t, y)
    return F + args.guidance * (F - teacher.F(x, t, None)) if args.guidance else F


def rollout(net, z, y, args):
    """Images x [B,C,H,W] that the student makes of noise z [N,B,C,H,W] in N steps."""
    ts = rollout_times(len(z), z[0], args)
    x = z[0]                                              # pure noise, as if ts[0] were pi/2
    with torch.no_grad():
        for t, r, z_r in zip(ts, ts[1:], z[1:]):
            x = r.cos() * f(x, t, net.F(x, t, y), args) + r.sin() * z_r
    return f(x, ts[-1], net.F(x, ts[-1], y), args)        # gradient through the last step alone


def scm_loss(net, teacher, x0, z, y, it, args, reseed):
    """The consistency part, |F - (F + g)|^2 [B]: scm.py in mode scd."""
    t = times(x0, args.P_mean, args.P_std, args)
    cos, sin = t.cos(), t.sin()
    x_t = cos * x0 + sin * z                              # data and noise have the same spread
    with torch.no_grad():                                 # the teacher is a constant
        F_T = guided(teacher, x_t, t, y, args)

    def masked(x, t):
        reseed()                                          # same dropout mask in all calls
        return net.F(x, t, y)
    tangents = cos * sin * args.sd * F_T, cos * sin       # the factor first: dF/dt is not bounded
    _, dF = jvp(masked, (x_t, t), tangents, exact=args.jvp == "exact")  # a pass without gradient

    F = masked(x_t, t)                                    # gradient flows here
    ramp = min(1, it / args.H) if args.H else 1           # as in the paper, dF has no ramp
    g = -cos * (1 - (ramp * sin) ** 2).sqrt() * (F.detach() - F_T)
    g = g - ramp * cos * sin * x_t / args.sd - dF
    size = g.flatten(1).norm(dim=1)                       # |g|, [B]
    g = g / (size.view(-1, 1, 1, 1) + args.c)             # bounded, however steep f is

    d = ((F - F.detach() - g) ** 2).flatten(1).sum(1)     # value |g|^2, gradient -2 g
    return d, dict(t=args.sd * t.tan(), tangent=size.mean(), ramp=ramp)


def dmd_loss(net, fake, teacher, z_roll, z, y, args):
    """The score part, |x - (x - q)|^2 [B] in units of sd, for images x that the student makes of
    z_roll [N,B,C,H,W]; z [B,C,H,W] is the noise at which the scores are compared."""
    x = rollout(net, z_roll, y, args)
    t = times(x, args.D_mean, args.D_std, args)
    with torch.no_grad():
        x_t = t.cos() * x + t.sin() * z
        f_T = f(x_t, t, guided(teacher, x_t, t, y, args), args)
        W = (x - f_T).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
        q = (f(x_t, t, fake.F(x_t, t, y), args) - f_T) / W
    d = (((x - (x - args.sd * q).detach()) / args.sd) ** 2).flatten(1).sum(1)
    return d, dict(t=args.sd * t.tan(), dmd=d.detach().mean())  # value |q|^2, gradient 2 q / sd


def loss_fn(net, fake, teacher, x0, y, it, args, reseed):
    """Of the student. x0 [B,C,H,W] in [-1, 1], y int64 [B] or None -> scalar loss, stats: t as
    noise level [B,1,1,1], loss [B]. Networks have TrigFlow's F(x, t, y), float64 all around it.
    reseed() resets the generator: one dropout mask in scm_loss. Reads args.sd, H, lambda_dmd,
    loss_scale, P_mean, P_std, jvp, guidance, c, N_max, rollout, D_mean, D_std, sigma_max, t_mid."""
    x0 = x0.to(torch.float32 if x0.is_mps else torch.float64)
    N = rounds(it, args) if args.lambda_dmd and it >= args.H else 0
    z_scm, z_dmd = args.sd * torch.randn_like(x0), args.sd * torch.randn_like(x0)
    z_roll = args.sd * torch.randn_like(x0.expand(N, *x0.shape))
    loss, stats = 0, {}
    if N:
        d, stats = dmd_loss(net, fake, teacher, z_roll, z_dmd, y, args)
        loss = loss + args.lambda_dmd * d
    if args.loss_scale:
        d, more = scm_loss(net, teacher, x0, z_scm, y, it, args, reseed)
        loss, stats = loss + args.loss_scale * d, stats | more  # t of this part, loss of both
    return loss.mean(), stats | dict(loss=loss.detach())


def fake_loss_fn(net, fake, x0, y, it, args):
    """As loss_fn, of fake: diffusion training on images of the student. x0 gives the shape."""
    x0 = x0.to(torch.float32 if x0.is_mps else torch.float64)
    z = args.sd * torch.randn_like(x0)
    z_roll = args.sd * torch.randn_like(x0.expand(rounds(it, args), *x0.shape))
    with torch.no_grad():                                 # the student is a constant
        x = rollout(net, z_roll, y, args)
    t = times(x, args.D_mean, args.D_std, args)
    cos, sin = t.cos(), t.sin()
    F = fake.F(cos * x + sin * z, t, y)
    loss = ((F - (cos * z - sin * x) / args.sd) ** 2).flatten(1).sum(1)
    return loss.mean(), dict(t=args.sd * t.tan(), loss=loss.detach(), fake=loss.detach().mean())


# ==== 3. Sampling =================================================================================
@torch.no_grad()
def sample(net, noise, y, args):
    """Denoise, add less noise, denoise again: one step for each slice of noise [K, B, C, H, W]."""
    for i, (t, z) in enumerate(zip(sampling_times(len(noise), args).to(noise), noise)):
        x = t.cos() * x + t.sin() * args.sd * z if i else args.sd * z   # the first t counts as pi/2
        x = net(x, t.expand(len(z), 1, 1, 1), y)
    return x.clamp(-1, 1)


# ==== 4. Arguments ================================================================================
@dataclass
class Args:
    renamed = dict(F="student_every")  # neither field nor flag: names in config.json of older runs
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
    iters: int = 100_000              # optimiser steps (>= 1)
    batch: int = 512                  # images per step, over all ranks (>= 1)
    accum: int = 1                    # parts a rank's batch is split into, to save memory (>= 1)
    lr: float = 5e-5                  # learning rate after warm-up (> 0)
    warmup: int = 100                 # steps of linear warm-up (>= 0)
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
    dropout: float = 0.0              # dropout inside the network (>= 0, < 1)
    # --- the method (defaults: the paper's for text to image, App. E; p_G is sCM's for CIFAR-10)
    flow: Literal["edm", "trig"] = "trig"  # parametrisation; trig: smooth in t, as in sCM
    jvp: Literal["exact", "fd"] = "exact"  # fd: finite difference, if forward mode is missing
    guidance: float = 0.0             # classifier-free: F + guidance * (F - F without label) (>= 0)
    c: float = 0.1                    # constant in g / (|g| + c) (> 0)
    H: int = 0                        # steps over which ramp rises from 0 to 1, without DMD (>= 0)
    loss_scale: float = 100.0         # weight of sCM; 0: DMD alone (>= 0)
    lambda_dmd: float = 1.0           # weight of DMD; 0: sCM alone, no steps of fake (>= 0)
    student_every: int = 5            # one step in so many is the student's, the rest fake's (>= 2)
    N_max: int = 4                    # the student's images take 1 to N_max steps (>= 1)
    rollout: Literal["random", "fixed"] = "random"  # .. at random times, or at those of the sampler
    fake_lr: float = 0.2              # learning rate of fake, in units of --lr (>= 0)
    sigma_rel: float = 0.05           # width of the EMA over all updates; 0: --ema (>= 0, <= 0.28)
    P_mean: float = -1.0              # mean of ln(sigma) in sCM, sigma = sd * tan(t)
    P_std: float = 1.4                # standard deviation of ln(sigma) in sCM (>= 0)
    D_mean: float = -0.69             # mean of ln(sigma) in DMD, for fake and random rollouts
    D_std: float = 1.6                # standard deviation of ln(sigma) there (>= 0)
    t_mid: float = 1.1                # t of the second step: sigma .98 if sd = .5 (> 0, < 1.5708)
    sigma_max: float = 80.0           # sigma of the first step, whose t = arctan(sigma / sd) (> 0)
    sd: float = 0.5                   # standard deviation of the data, sigma_data (> 0)


PRESETS = {
    "paper": dict(cost="100,000 steps of 512 images, a fifth the student's: days on several GPUs"),
    "fast": dict(cost="20,000 steps of 256 images", flow="edm", iters=20_000, batch=256),
    "small": dict(cost="about half an hour on two CPU cores, teacher included", iters=300, batch=64,
                  lr=1.5e-4, warmup=50, H=100, student_every=2, N_max=1, fake_lr=1.0, ch=32,
                  mult=(1, 1, 2), blocks=1, save_every=300),
    "digits": dict(cost="15 min on two cores, with teacher", iters=1_250, lr=3e-4, N_max=1, ch=32,
                   save_every=250, batch=128, warmup=50, H=100, lambda_dmd=50.0, student_every=2,
                   fake_lr=1.0, mult=(1, 2), blocks=1, attn=(4,), sd=.75, D_mean=-.29, t_mid=.92),
    "mnist": dict(sd=.55, D_mean=-.6, t_mid=1.06),        # sd, its ln, sigma .98
    "fashion_mnist": dict(sd=.66, D_mean=-.42, t_mid=.98),
}


def check(args):
    """Flags that contradict each other. Raises BadInput."""
    if not args.loss_scale and (args.H or not args.lambda_dmd):
        raise BadInput("--loss-scale 0 leaves DMD alone: add --H 0, and --lambda-dmd above 0")
    if args.guidance and not args.cond:
        raise BadInput("--guidance needs a teacher that knows the classes; add --cond")
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
    teacher, found, changes = teachers.get(args, data, run, needed=True)  # *
    args = run.resolve(**changes)                         # with a teacher: its architecture
    run.seed(-1)                                          # negative: the same on every rank
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    net = TrigFlow(backbone(args, data, teacher), args.sd, args.flow, dtype)  # *
    if args.jvp == "exact":                               # is it the derivative, here?  # *
        probe(net.F, data.images.shape[1:], run.device)   # *
    ema = run.place(deepcopy(net).eval().requires_grad_(False))  # averaged weights, for sampling
    fake = run.place(deepcopy(net).eval())                # score of the student's images  # *
    net = run.place(net)
    if args.compile:                                      # jvp uses the uncompiled code  # *
        for m in (net, fake, teacher):                    # *
            m.model.compile()                             # *
    opt_net, opt_fake = (torch.optim.AdamW(m.parameters(), lr=args.lr, betas=(0.0, 0.999),  # *
                         weight_decay=0.01, fused=True) for m in (net, fake))  # *
    state = dict(net=net, ema=ema, fake=fake, opt=opt_net, opt_fake=opt_fake)  # *
    steps = sorted({1, args.steps})                       # numbers of sampling steps to test  # *

    def draw(noise, y):
        return sample(ema, noise, y, args)

    def reseed():                                         # one dropout mask for all calls of a step
        run.seed(it, part, stream=1)

    it = run.start(state, data)                           # 0, or the step from which to resume
    teachers.show(teacher, found, run, data)              # *
    say(f"  t_mid     {args.t_mid:g}: noise level {args.sd * math.tan(args.t_mid):.3g}")  # *
    teacher = trig(teacher)                               # float32 in any case: see scm.py  # *
    while it < args.iters:
        students = is_students(it, args)                  # whose step it is  # *
        opt = opt_net if students else opt_fake           # *
        for part in range(args.accum):
            run.seed(it, part)
            x0, y = run.batch(data, it, part)
            if students:                                  # *
                loss, stats = loss_fn(net, fake, teacher, x0, y, it, args, reseed)  # *
            else:                                         # *
                loss, stats = fake_loss_fn(net, fake, x0, y, it, args)  # *
            (loss / args.accum).backward()
            run.count(stats)                              # for the log; stays on the device
        lr = args.lr * min(1, (it + 1) / max(args.warmup, 1)) * (students or args.fake_lr)  # *
        for group in opt.param_groups:
            group["lr"] = lr
        if run.sync(opt, it):                             # mean over ranks; False: not finite, skip
            opt.step()
            decay = average(it, args)                     # 1: fake's step  # *
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
