"""
common/teacher.py: the diffusion model.    EDM, Karras et al. 2022, arXiv:2206.00364.

One training step
    t       ~  lognormal(P_mean, P_std)                     # noise level            [Table 1]
    loss    =  |D(x0 + t*eps, t) - x0|^2 * (t^2 + sd^2) / (t*sd)^2     # sum over C, H, W

    or, with --flow trig (sCM, arXiv:2410.11081), z = sd*eps and a = arctan(t/sd):
    loss    =  e^w |sd*F(cos(a)*x0 + sin(a)*z, a) - (cos(a)*z - sin(a)*x0)|^2 - w     # w(a) is learned

Deviations from the paper: no augmentation pipe (the paper's configuration E: FID 2.05 instead of 1.97
on CIFAR-10). With --cond, 10 % of the labels are dropped, for guidance. Gradients that are not finite
stop the run; the authors' code replaces them by numbers. GPUs multiply in TF32. The presets fast, small
and digits are ours.
"""
import io
import math
import pickle
import pickletools
import re
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from common import assets
from common.data import load as load_data
from common.precond import EDM, TrigFlow, backbone, build
from common.run import BadInput, Run, config_of, load_checkpoint, numbered, parse, say


# ==== 1. Arguments ================================================================================
@dataclass
class Args:
    dataset: str = "digits"           # digits | mnist | fashion_mnist | cifar10 | a folder | a .npz
    data_dir: str = "data"            # where downloads are kept
    out: str = "runs"                 # runs/teacher-<dataset>-<nnn> is created here
    resume: str = ""                  # go on with this run folder; a finished one is only sampled
    preset: Literal["auto", "small", "fast", "paper"] = "auto"  # small on a CPU, else fast, paper
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # auto: cuda if there is one
    seed: int = 0                     # everything random follows from (seed, rank, step)
    cond: bool = False                # condition on the class label
    size: int = 0                     # height and width of a folder's images; 0: 32, or as stored
    flow: Literal["edm", "trig"] = "edm"  # trig: TrigFlow, smooth in the noise level
    net: Literal["ddpmpp", "ncsnpp", "adm", "dit"] = "ddpmpp"  # network family
    ch: int = 128                     # base width of the network
    mult: tuple = (2, 2, 2)           # width of each resolution, times ch; not for dit
    blocks: int = 4                   # residual blocks per resolution; of dit: all
    attn: tuple = (16,)               # image sizes at which there is attention; not for dit
    iters: int = 390_625              # optimiser steps: 200 Mimg
    batch: int = 512                  # images per step, over all ranks
    accum: int = 1                    # parts into which a rank's batch is split to save memory
    lr: float = 1e-3                  # learning rate after warm-up
    warmup: int = 19_531              # steps of linear warm-up: 10 Mimg
    ema: float = 0.99929              # decay of the averaged weights: half-life 0.5 Mimg
    dropout: float = 0.13             # dropout inside the network
    flip: bool = False                # random horizontal flips
    bf16: bool = False                # bfloat16 activations; weights and loss stay float32
    compile: bool = False             # torch.compile the network
    shard: bool = False               # split weights and optimiser over the ranks (FSDP2)
    steps: int = 18                   # Heun steps of the sampler; network calls: 2 * steps - 1
    grid: int = 64                    # images in a sample grid
    log_every: int = 100              # steps between log lines
    save_every: int = 5_000           # steps between checkpoints, grids and figures
    keep: bool = False                # keep every checkpoint, not only the last two
    max_skips: int = 0                # steps that may be skipped because they are not finite
    fid: int = 0                      # images for an FID at the end: 50000 for a published figure
    fid_every: int = 0                # also measure it every so many steps
    ema_ramp: float = 0.05            # the half-life is at most this share of the images seen
    label_dropout: float = 0.1        # share of labels dropped with --cond, for guidance
    P_mean: float = -1.2              # mean of ln t
    P_std: float = 1.2                # standard deviation of ln t
    t_min: float = 0.002              # last noise level of the sampler
    t_max: float = 80.0               # first noise level of the sampler
    rho: float = 7.0                  # curvature of the sampler's grid
    sd: float = 0.5                   # standard deviation of the data, sigma_data


PRESETS = {
    "paper": dict(cost="200 Mimg, about two days on eight V100"),
    "fast": dict(cost="25.6 Mimg, an eighth of the paper's (ours)", iters=50_000, warmup=5_000),
    # ours: small networks for two CPU cores; the figure costs as much as 500 steps of `small`, so it comes once
    "small": dict(cost="about a quarter of an hour on two CPU cores", iters=1_200, batch=64, warmup=100, lr=1e-3,
                  ema=0.999, dropout=0.0, ch=32, mult=(1, 1, 2), blocks=1, save_every=1_200),
    "digits": dict(cost="about 4 minutes on two CPU cores", iters=1_600, batch=128, warmup=100, lr=2e-3, ema=0.999,
                   dropout=0.0, ch=32, mult=(1, 2), blocks=1, attn=(4,), save_every=800, sd=0.75),
    "mnist": dict(sd=0.55),
    "fashion_mnist": dict(sd=0.66),
}


# ==== 2. Loss =====================================================================================
def loss_fn(net, x0, y, args):
    """x0 [B,C,H,W] in [-1, 1], y int64 [B] or None -> scalar loss, stats: t [B,1,1,1], loss [B]."""
    t = (torch.randn(len(x0), 1, 1, 1, device=x0.device) * args.P_std + args.P_mean).exp()
    eps = torch.randn_like(x0)
    if y is not None:                                     # -1: the network is told no label
        y = torch.where(torch.rand(len(y), device=y.device) < args.label_dropout, -1, y)
    if args.flow == "trig":
        a = torch.atan(t / args.sd)
        cos, sin, z = a.cos(), a.sin(), args.sd * eps
        d = (args.sd * net.F(cos * x0 + sin * z, a, y) - (cos * z - sin * x0)) ** 2
        w = net.weigh(a)
        loss = w.exp() * d.flatten(1).mean(1) - w         # mean: w starts near where it ends
        return loss.mean(), dict(t=t, loss=loss.detach())
    d = ((net(x0 + t * eps, t, y) - x0) ** 2).flatten(1).sum(1)
    loss = d * ((t**2 + args.sd**2) / (t * args.sd) ** 2).flatten()
    return loss.mean(), dict(t=t, loss=loss.detach())


# ==== 3. Sampling =================================================================================
@torch.no_grad()
def sample(net, noise, y, args):
    """Heun's method on the probability-flow ODE (Algorithm 2 without churn), from noise [1, B, C, H, W]."""
    i = torch.arange(args.steps, dtype=noise.dtype) / max(args.steps - 1, 1)
    hi, lo = args.t_max ** (1 / args.rho), args.t_min ** (1 / args.rho)
    ts = (hi + i * (lo - hi)) ** args.rho
    ts = torch.cat([ts, torch.zeros(1, dtype=ts.dtype)]).to(noise.device)
    x = noise[0] * ts[0]
    D = getattr(net, "denoise", net)                      # of TrigFlow; EDM's networks are one
    slope = lambda x, t: (x - D(x, t.expand(len(x), 1, 1, 1), y)) / t
    for t, r in zip(ts, ts[1:]):
        d = slope(x, t)
        x_r = x + (r - t) * d
        x = x_r if r == 0 else x + (r - t) * (d + slope(x_r, r)) / 2
    return x.clamp(-1, 1)


# ==== 4. Training =================================================================================
def main(args):
    """Train as `args` say; return the final figure, {"fd_pixels_teacher": 0.12}."""
    run = Run(args, __file__)
    data = load_data(args.dataset, args.data_dir, args.size, run.device)
    run.seed(-1)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    wrap = TrigFlow if args.flow == "trig" else EDM
    net = wrap(backbone(args, data), args.sd, dtype=dtype)
    ema = run.place(deepcopy(net).eval().requires_grad_(False))
    net = run.place(net)
    if args.compile:
        net.model.compile()
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, foreach=True)
    state = dict(net=net, ema=ema, opt=opt)
    draw = lambda noise, y: sample(ema, noise, y, args)
    how = dict(net="teacher", steps=args.steps)

    it = run.start(state, data)
    while it < args.iters:
        for part in range(args.accum):
            run.seed(it, part)
            x0, y = run.batch(data, it, part)
            loss, stats = loss_fn(net, x0, y, args)
            (loss / args.accum).backward()
            run.count(stats)
        lr = args.lr * min(1, it / max(args.warmup, 1))  # the first step has lr 0, as in the authors' code
        for group in opt.param_groups:
            group["lr"] = lr
        if run.sync(opt, it):
            opt.step()
            decay = min(args.ema, 0.5 ** (1 / max(args.ema_ramp * it, 1e-8)))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        opt.zero_grad(set_to_none=True)

        it += 1
        run.log(it, lr=lr)
        if run.due(it):
            run.save(it, state)
            run.evaluate(it, data, draw, **how)
    return run.finish(it, data, draw, **how)


# ==== 5. What the methods use =====================================================================
def load(path, device="cpu"):
    """The averaged network of a run folder or checkpoint of ours, of any method, or of a released EDM .pkl, frozen:
    net(x, t, y) -> float32 [B,C,H,W], D(x; t) of a diffusion model, f(x, t) of a consistency model; x [B,C,H,W],
    t [B,1,1,1] the noise's standard deviation, of a TrigFlow network the time in radians, y int64 [B] or None.
    Raises BadInput."""
    try:
        if str(path).endswith(".pkl"):
            spec, weights = read_released(path)
        else:
            ckpt = load_checkpoint(path)
            spec, weights = ckpt["model"], ckpt["ema"]
        with torch.device("meta"):                        # no memory for shapes that the file only claims
            net = build(spec)
        net.load_state_dict(weights, assign=True)         # strict: names what is missing or misshapen
    except Exception as e:                                # a damaged pickle raises anything
        raise BadInput(f"{path} cannot be read: {assets.brief(e)}")
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


SAME = ("dataset", "data_dir", "out", "device", "seed", "cond", "size", "flow", "net", "ch", "mult", "blocks", "attn",
        "accum", "bf16", "compile", "shard", "grid", "fid", "sd")   # flags that a method hands to its teacher
MATCH = ("cond", "flow", "net", "ch", "mult", "blocks", "attn", "sd")  # what a teacher found under --out must share


def get(args, data, run, needed=False):
    """The diffusion model that --teacher names, trained first if need be; None with `--teacher none`, and when a run
    is resumed, unless it is `needed` for more than the start. `args` then name it and its architecture. BadInput."""
    if args.teacher == "none" and needed:
        raise BadInput("--teacher none: there is nothing to distil; name a teacher, or leave the flag out")
    if args.teacher == "none" or args.resume and not needed:
        return None
    path = args.teacher
    if path == "auto":
        path = newest(args, data)
        if path and load_checkpoint(path)["it"] < (args.teacher_iters or config_of(path)["iters"]):
            say(f"the teacher {path} is unfinished; its training goes on")
            iters = ["--iters", str(args.teacher_iters)] if args.teacher_iters else []
            here = ["--device", args.device, "--data-dir", args.data_dir]
            main(parse(Args, PRESETS, ["--resume", path] + here + iters))
        path = path or (released(args) if args.preset in ("fast", "paper") else "train")
    if path == "train":
        path = train(args, run)
    if path.startswith(("http://", "https://")):
        path = download(path, args.data_dir)
    net = load(path, run.device)
    its, mine = net.model.kwargs, (args.sd, *data.images.shape[1:3], data.classes if args.cond else 0)
    theirs = (net.sd, its["channels"], its["size"], its["classes"])
    if mine != theirs:
        raise BadInput(f"the teacher {path} has (sd, channels, size, classes) = {theirs}, this run {mine}; "
                       "name another --teacher or train one")
    raw = getattr(net, "raw", "edm")                      # the flow that its raw network was made for
    if hasattr(args, "flow"):
        args.flow = raw
    elif net.spec["flow"] != "edm":
        raise BadInput(f"the teacher {path} is a TrigFlow model, from which only a method with --flow can start; "
                       "name another --teacher or train one")
    net.folder, net.diffuses = Path(path) if Path(path).is_dir() else None, is_diffusion(net, Path(path))
    if needed and not net.diffuses:
        raise BadInput(f"the teacher {path} is a consistency model, whose steps are no ODE; name a diffusion model")
    say(f"teacher: {path}")
    args.teacher = str(Path(path).resolve())              # a resumed run may start from another folder
    for k in ("net", "ch", "mult", "blocks", "attn"):
        setattr(args, k, its[k])
    return net


def is_diffusion(net, path):
    """Is this network a denoiser D, not the f of a consistency model? Their weights look the same."""
    folder = path if path.is_dir() else path.parent
    script = config_of(folder)["about"]["script"] if (folder / "config.json").exists() else ""
    return script in ("", "common.teacher") and net.t_min == 0


def show(teacher, run, data):
    """The teacher's figures and grid beside the run's own: those of its folder, or measured now."""
    there = teacher is None or not teacher.diffuses or run.args.resume
    if not there and not (teacher.folder and run.adopt(teacher.folder)):
        draw = lambda noise, y: sample(teacher, noise, y, Args())
        run.evaluate(0, data, draw, net="teacher", steps=Args.steps)


def newest(args, data):
    """The latest teacher folder under --out for the same data and network, or None."""
    for folder in reversed(numbered(args.out, f"teacher-{data.name}")):
        if (folder / "ckpt.pt").exists() or (folder / "ckpt.prev.pt").exists():
            old = config_of(folder)
            same = all(old.get(k, "edm") == getattr(args, k, "edm") for k in MATCH)    # who has no `flow` means EDM's
            if old["about"]["data_sha256"] == data.sha256 and same:
                return str(folder)


def train(args, run):
    """Train a teacher with the network and data of `args`; return its folder."""
    say("training the teacher first")
    argv = ["--dataset", args.dataset, "--device", args.device]
    its = parse(Args, PRESETS, argv + (["--preset", args.preset] if args.preset in PRESETS else []))
    for k in SAME:
        setattr(its, k, getattr(args, k, getattr(its, k)))
    its.iters, parts = args.teacher_iters or its.iters, run.world * args.accum
    its.batch = math.ceil(its.batch / parts) * parts       # its preset does not know the number of ranks
    return main(its)["run"]


# ==== 6. Released checkpoints =====================================================================
# EDM's .pkl files hold Python objects together with their source code, which NVIDIA's loader executes. Here every name
# that a file asks for becomes inert data, or is refused; nothing that a file names is imported or called.
RELEASED = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-{}-{}.pkl"
STORAGES = {"torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
            "torch.BFloat16Storage": torch.bfloat16, "torch.DoubleStorage": torch.float64}
KNOWN = {"torch_utils.persistence._reconstruct_persistent_obj", "torch.nn.modules.container.ModuleDict",
         "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes",
         "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "collections.OrderedDict",
         "dnnlib.util.EasyDict", "builtins.set", "__builtin__.set", "builtins.getattr", *STORAGES}


def released(args):
    """The address of EDM's own checkpoint for the data and network of `args`. Raises BadInput if there is none."""
    family = dict(ddpmpp="vp", ncsnpp="ve").get(args.net)
    same = all(getattr(args, k, "edm") == getattr(Args, k) for k in ("flow", "ch", "mult", "blocks", "attn", "sd"))
    if args.dataset != "cifar10" or not family or not same:
        raise BadInput(f"no released teacher for {args.dataset} with this network and flow; "
                       "train one first: --teacher train")
    return RELEASED.format("cond" if args.cond else "uncond", family)


def download(url, data_dir):
    """The local path of a released checkpoint, fetched once into `data_dir`. Raises BadInput."""
    path = Path(data_dir) / url.rsplit("/", 1)[-1]
    sources = [(f"{url} (CC BY-NC-SA 4.0: not for commercial use)", partial(torch.hub.download_url_to_file, url))]
    assets.fetch(path, sources, read_released, ", or train a teacher first: --teacher train")
    return str(path)


class Inert(dict):
    """An object of the file: the arguments of the call that made it, its items and attributes, none of its code."""
    args, state = (), {}

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        name = f"{module}.{name}"
        if name not in KNOWN:
            raise ValueError(f"it asks for {name}, which this reader does not know and will not load")
        return type(name, (Inert,), {})

    def persistent_load(self, key):
        return key


def unpickle(f):
    """The next pickle in the stream f. One opcode of nine bytes can make Python's memo as long as the memory."""
    start = f.tell()
    if any(op.name == "LONG_BINPUT" and arg > 10**6 for op, arg, _ in pickletools.genops(f)):
        raise ValueError("it numbers more parts than a checkpoint has")
    f.seek(start)
    return Unpickler(f).load()


def tensor(weight):
    """The tensor of an Inert parameter or buffer, float32."""
    if type(weight).__name__ == "torch._utils._rebuild_parameter":
        weight = weight.args[0]
    data, offset, size, stride = weight.args[:4]
    values = storage(data.args[0])
    if math.prod(size) > len(values):                     # with strides of 0 it would be larger than the file
        raise ValueError("a tensor reaches beyond its storage")
    return values.as_strided(size, stride, offset).to(torch.float32, copy=True)


def storage(data):
    """The 1-D tensor of a legacy torch.save stream: five pickles (magic number, version, machine, what the storage is,
    its key), the count of values, the values."""
    f = io.BytesIO(data)
    magic, version, _, (_, kind, _, _, count, _), _ = (unpickle(f) for _ in range(5))
    start, dtype = f.tell() + 8, STORAGES[kind.__name__]
    if magic != 0x1950A86A20F9469CFC6C or version != 1001 or len(data) - start != count * dtype.itemsize:
        raise ValueError("a tensor's storage is damaged")
    return torch.frombuffer(bytearray(data), dtype=dtype, offset=start)


def parameters(module, prefix, seen):
    """(name, Inert tensor) of an Inert module, in the order of torch's state_dict."""
    if id(module) in seen:                                # 40 such modules are 2**40 to whoever walks them
        raise ValueError("a module in it is part of itself or of two others")
    seen.add(id(module))
    state = module.args[0]["state"] if module.args else module.state      # EDM's own classes; torch's ModuleDict
    tensors = state.get("_parameters", {}) | state.get("_buffers", {})
    yield from ((prefix + k, v) for k, v in tensors.items() if v is not None)
    for k, v in state.get("_modules", {}).items():
        yield from parameters(v, f"{prefix}{k}.", seen)


def read_released(path):
    """(spec for `build`, weights) of the averaged network in an EDM or ECT .pkl. Raises ValueError, or what else a
    damaged file leads to."""
    with open(path, "rb") as f:
        net = unpickle(f)["ema"]
    meta, weights, room = net.args[0], {}, Path(path).stat().st_size
    if meta["class_name"] not in ("EDMPrecond", "ECMPrecond") or meta["version"] != 6:
        name = meta["class_name"] if type(meta["class_name"]) is str else "what it holds"
        raise ValueError(f"{name} is not supported, only EDMPrecond and ECMPrecond in EDM's format of version 6")
    for name, weight in parameters(net, "", set()):
        weights[name] = tensor(weight)
        room -= weights[name].numel()
        if room < 0:
            raise ValueError("its tensors share their storage")
    weights.pop("model.map_augment.weight", None)         # augmentation labels are zero when sampling
    kwargs, state = shape_of(weights), meta["state"]
    return dict(flow="edm", net=kwargs["net"], kwargs=kwargs, sd=float(state["sigma_data"]),
                t_min=float(state["sigma_min"])), weights


def shape_of(weights):
    """The arguments of UNet, read off the names and shapes of its weights."""
    first = next((k for k in weights if re.fullmatch(r"model\.enc\.(\d{1,4})x\1_conv\.weight", k)), None)
    if not first:
        raise ValueError("it holds no U-Net")
    net = "adm" if "model.out_norm.weight" in weights else "ncsnpp" if "model.map_noise.freqs" in weights else "ddpmpp"
    size, (width, channels) = int(re.search(r"(\d+)x", first)[1]), weights[first].shape[:2]
    ch = weights["model.map_layer0.weight"].shape[1] if net == "adm" else width
    name = "model.enc.{0}x{0}_block{1}.{2}.weight".format
    sizes = [r for r in (size >> i for i in range(14)) if name(r, 0, "norm0") in weights]
    blocks = next(i for i in range(99) if name(size, i, "norm0") not in weights)
    return dict(size=size, channels=channels, ch=ch, blocks=blocks, dropout=0.0, net=net,
                mult=tuple(weights[name(r, 0, "conv0")].shape[0] // ch for r in sizes),
                attn=tuple(r for r in sizes if name(r, 0, "qkv") in weights),
                classes=weights["model.map_label.weight"].shape[1] if "model.map_label.weight" in weights else 0)


if __name__ == "__main__":
    main(parse(Args, PRESETS))
