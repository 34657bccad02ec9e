"""What a training script needs that is not mathematics: flags, ranks, seeds, run folder, log, checkpoint, signals.
Nothing in here knows which method is running."""
import argparse, atexit, contextlib, dataclasses, glob, hashlib, inspect, json, math, os, re
import shutil, signal, subprocess, sys, time
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

from common import fid

ROOT = Path(__file__).resolve().parent.parent
DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10")
MAY_CHANGE = {"iters", "steps", "t_mid", "grid", "log_every", "save_every", "keep", "max_skips",
              "fid", "fid_every", "device", "data_dir", "out", "resume"}      # on resume; the rest defines the run
AT_LEAST = dict(steps=1, iters=1, batch=1, accum=1, grid=1, log_every=1, save_every=1, blocks=1, double=1, ch=4, q=1,
                warmup=0, max_skips=0, fid=0, fid_every=0, dropout=0, ema=0, size=0, c=0, k=0, mu=0, P_std=0, F=2,
                guidance=0, boundaries=1, s0=2, H=0, decay=0, loss_scale=0, lambda_dmd=0, N_max=1, fake_lr=0, D_std=0,
                sigma_rel=0)
POSITIVE = ("lr", "sd", "t_min", "rho", "mu0", "sigma_max")
FD_IMAGES = 2048                                                # at most, for fd_pixels


class BadInput(SystemExit):
    """The user's mistake: one line on stderr that says what to do, exit status 2."""
    def __init__(self, message):
        super().__init__(2)
        self.message = message
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {message}", file=sys.stderr)


def refuse(rules):
    """Raise BadInput with the first message of rules [(wrong, message)] that applies."""
    for wrong, message in rules:
        if wrong:
            raise BadInput(message)


def say(text):
    """A line on stdout, from the first rank only; it does not break a progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)


def mix(*ints):
    """One 63-bit seed from several integers; neighbouring inputs give unrelated seeds."""
    digest = hashlib.blake2b(repr(ints).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ---- flags ---------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (-h lists the flags)")


def parse(cls, presets, argv=None):
    """The flags of `argv` as a `cls`: explicit flag > resumed run's config > preset of the --mode, if any > preset >
    default of `cls`. The trailing comment of a field is the help. Raises BadInput."""
    source = inspect.getsource(cls)
    ap = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS, usage="%(prog)s [--flag value ..]",
                formatter_class=argparse.RawDescriptionHelpFormatter, description=sys.modules[cls.__module__].__doc__)
    for f in dataclasses.fields(cls):
        note = re.search(rf"^    {f.name}:.*?  #\s*(.*)$", source, re.M)
        text = f"{note[1] if note else ''} [{f.default}]".replace("%", "%%")
        kind = dict(type=integers if f.type is tuple else f.type, metavar=f.type.__name__)
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)            # --bf16 / --no-bf16
        elif choices := get_args(f.type):                                 # of a Literal
            kind = dict(choices=choices)
        ap.add_argument(*dict.fromkeys(["--" + f.name.replace("_", "-"), "--" + f.name]), help=text, **kind)
    given = vars(ap.parse_args(argv))
    if given.get("resume"):
        return resumed(cls, given)
    args = cls(**given)
    if args.dataset == "digits":
        if args.preset != "auto":
            raise BadInput("the digits have one preset; leave --preset out")
        preset, chosen = "digits", presets["digits"]
    else:
        cuda = args.device in ("auto", "cuda") and torch.cuda.is_available()
        best = "small" if not cuda else "fast" if "fast" in presets else "paper"
        preset = best if args.preset == "auto" else args.preset
        if preset not in presets:
            raise BadInput(f"there is no --preset {preset} here; leave it out")
        data = presets.get(args.dataset if args.dataset in DATASETS else "folder", {})
        chosen = presets[preset] | data | dict(preset=preset)
    chosen = chosen | presets.get(given.get("mode"), {})
    if "cost" in chosen:
        say(f"preset {preset}: {chosen.pop('cost')}")
    return cls(**chosen | given)


def integers(text):
    return tuple(int(s) for s in text.replace(",", " ").split())


def resumed(cls, given):
    old = config_of(given["resume"])
    if old["about"]["script"] != script(inspect.getfile(cls)):
        raise BadInput(f"{given['resume']} was made by {old['about']['script']}; resume it with that")
    old = {f.name: old[f.name] for f in dataclasses.fields(cls) if f.name in old}
    may = MAY_CHANGE - set(getattr(cls, "fixed", ()))
    wrong = [k for k, v in given.items() if k not in may and v != old.get(k)]
    if wrong:
        raise BadInput(f"--{wrong[0].replace('_', '-')} defines the run, --resume cannot change it; start a new run")
    return cls(**old | given)


def script(file):
    """Path of a script -> the name to import it by: ect, common.teacher."""
    return ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)


# ---- noise of the evaluation ---------------------------------------------------------------------
def noise_of(ids, k, shape, device, seed=0):
    """Standard normal noise [k, len(ids), *shape]: image i depends on (seed, i) alone, not on its batch, its rank or
    the device, and its first slice not on k. float64 where the device has it."""
    def one(i):
        g = torch.Generator().manual_seed(mix(seed, int(i)))
        return torch.stack([torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(k)])
    wide = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return torch.stack([one(i) for i in ids], 1).to(wide).to(device)


def picture(images, cols=0):
    """uint8 [N, C, H, W] -> one PIL image, `cols` to a row, grey lines between them; copies enlarge small pixels."""
    n, c, h, w = images.shape
    cols = min(cols or math.ceil(n**0.5), n)
    rows, zoom = math.ceil(n / cols), max(1, 32 // h)
    sheet = torch.full((rows * cols, 3, h + 1, w + 1), 128, dtype=torch.uint8)
    sheet[:n, :, :h, :w] = images.cpu()
    sheet = sheet.view(rows, cols, 3, h + 1, w + 1).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)[:-1, :-1]
    return Image.fromarray(sheet.numpy().repeat(zoom, 0).repeat(zoom, 1))


# ---- one run -------------------------------------------------------------------------------------
class Run:
    """runs/<method>-<dataset>-<nnn>/: config.json log.jsonl eval.jsonl ckpt.pt ckpt.prev.pt samples/ source/"""

    def __init__(self, args, file):
        dev = device_of(args.device)
        self.device = torch.device(dev, int(os.environ.get("LOCAL_RANK", 0)) if dev == "cuda" else None)
        self.device_name = f"{dev}, {torch.get_num_threads()} threads"
        if dev == "cuda":
            torch.cuda.set_device(self.device)
            self.device_name = torch.cuda.get_device_name(self.device)
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")          # TF32
        if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
            backend = dict(backend="nccl", device_id=self.device) if dev == "cuda" else dict(backend="gloo")
            dist.init_process_group(**backend)
            atexit.register(dist.destroy_process_group)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.args, self.file, self.skips = args, file, 0
        self.signum = self.stopping = 0                         # the signal of this rank; of any rank
        self.evaluating, self.evaluated = False, -1             # now; the last step that was
        self.edges = torch.logspace(-2, 2, 7).to(self.device)             # of 8 bins of the noise level
        self.check(args)

    def check(self, args):
        """Bounds that no type expresses. Raises BadInput."""
        value = lambda name, default: getattr(args, name, default)        # methods lack some
        refuse((not value(k, low) >= low, f"--{k.replace('_', '-')} must be at least {low}")    # NaN is refused, too
               for k, low in AT_LEAST.items())
        refuse((not 0 < value(k, 1) < math.inf, f"--{k.replace('_', '-')} must be positive") for k in POSITIVE)
        refuse([
            (max(args.dropout, args.ema, value("mu", 0)) >= 1, "--dropout, --ema and --mu must be below 1"),
            (value("sigma_rel", 0) > 0.28, "--sigma-rel must be at most 0.28: 0.29 weighs all updates alike"),
            (args.batch % (self.world * args.accum),
             f"--batch {args.batch} must be a multiple of ranks x --accum = {self.world} x {args.accum}"),
            (args.ch % 4, "--ch must be a multiple of 4"),
            (min(args.mult, default=0) < 1, "--mult takes one number, at least 1, for each resolution: such as 1,2,2"),
            (args.shard and self.world == 1, "--shard needs several ranks; start with torchrun"),
            (not value("t_min", 0) < value("t_mid", 1) < value("t_max", math.pi / 2),
             "--t-mid must lie between 0, or --t-min, and --t-max, or pi/2"),
            (value("s0", 0) > value("s1", math.inf), "--s0 must not exceed --s1"),
            (hasattr(args, "jvp") and args.compile and args.dropout,
             "--compile: compiled and differentiated networks drop different units; add --dropout 0")])
        if args.fid:
            fid.inception(args.data_dir, self.device)           # now, and not after a day of training

    # -- randomness
    def seed(self, it, part=0, stream=0):
        """Everything random in step `it` follows from (seed, rank, it, part): a resumed run draws the same numbers,
        and a dropout mask can be replayed. `stream` keeps uses apart (0 noise, 1 dropout), so that a mask never
        reuses the numbers of the noise. A negative `it` is the same on every rank."""
        torch.manual_seed(mix(self.args.seed, self.rank if it >= 0 else -1, it, part, stream))

    def batch(self, data, it, part=0):
        """This rank's images x0 [b,C,H,W] in [-1, 1] and labels [b] (None without --cond) of step `it`."""
        a = self.args
        x0, y = data.batch(it, a.batch, seed=a.seed, flip=a.flip,
                           part=self.rank * a.accum + part, parts=self.world * a.accum)
        return x0, y if a.cond else None

    # -- start
    def place(self, net):
        """Move a network to the device; with --shard, split its weights over the ranks (FSDP2)."""
        layout = torch.contiguous_format if self.args.shard else torch.channels_last  # FSDP2 takes no other
        net = net.to(self.device, memory_format=layout)
        if self.args.shard:
            mesh = init_device_mesh(self.device.type, (self.world,))
            for block in [m for m in net.modules() if type(m).__name__.endswith("Block")]:
                fully_shard(block, mesh=mesh)
            fully_shard(net, mesh=mesh, reshard_after_forward=True)      # ema has no backward that would
            for name in {"F", "weigh"} & set(dir(net)):         # called beside forward, they need whole weights, too
                register_fsdp_forward_method(net, name)
        return net

    def start(self, state, data):
        """Create the run folder, or restore `state` ({name: module or optimiser}) from it with --resume; return the
        step to go on from. From here on Ctrl-C and SIGTERM finish the step and save."""
        a, net = self.args, state["net"]
        name = [None if a.resume else self.new_folder(data.name)]
        if self.world > 1:
            dist.broadcast_object_list(name)                    # rank 0 chose it
        self.dir = Path(a.resume or name[0])
        it = self.restore(state, data) if a.resume else 0
        if self.rank == 0:
            self.write_config(data)
        self.began, self.start_it, self.logged = time.time(), it, (time.time(), it)
        self.reset()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.before = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        n, *size = data.images.shape
        count, left = sum(p.numel() for p in net.parameters()), max(a.iters - it, 0)
        say(f"{self.dir}\n"
            f"  data      {data.name}, {n:,} images {'x'.join(map(str, size))}\n"
            f"  network   {a.net}, {count / 1e6:.2f} M parameters\n"
            f"  training  {left:,} steps x {a.batch} images = {left * a.batch / 1e6:.3g} M images\n"
            f"  device    {self.device_name} x {self.world}")
        self.bar = tqdm(total=a.iters, initial=it, disable=self.rank != 0, dynamic_ncols=True,
                        desc=self.dir.name, mininterval=0.5)
        return it

    def new_folder(self, dataset):
        stem = "-".join(filter(None, [Path(self.file).stem, getattr(self.args, "mode", ""), dataset]))
        taken = numbered(self.args.out, stem)
        folder = Path(self.args.out) / f"{stem}-{int(taken[-1].name[len(stem) + 1:]) + 1 if taken else 0:03d}"
        if self.rank == 0:
            try:
                (folder / "samples").mkdir(parents=True)
            except OSError as e:
                raise BadInput(f"--out {self.args.out}: {e.strerror}; name a folder that can be written")
        return str(folder)

    def write_config(self, data):
        here = Path(self.file).resolve()
        git = subprocess.run("git describe --always --dirty", shell=True, cwd=ROOT, capture_output=True, text=True)
        about = dict(script=script(self.file), argv=sys.argv, commit=git.stdout.strip(), torch=torch.__version__,
                     ranks=self.world, device=self.device_name, data_sha256=data.sha256)
        flags = dataclasses.asdict(self.args) | dict(resume="")
        (self.dir / "config.tmp").write_text(json.dumps(flags | dict(about=about), indent=1))
        os.replace(self.dir / "config.tmp", self.dir / "config.json")
        if not (self.dir / "source").exists():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "common", self.dir / "source/common", ignore=skip)
            shutil.copy(here, self.dir / "source" / here.relative_to(ROOT))

    def on_signal(self, signum, frame):
        self.signum = signum
        for s in self.before if self.world == 1 else ():        # the second one leaves at once; torchrun sends two
            signal.signal(s, signal.SIG_DFL)                    # together, and kills what is left after half a minute
        if self.evaluating:                                     # what was learned is saved by then
            self.close()
            raise SystemExit(128 + signum)

    # -- each step
    def count(self, stats):
        """Keep what loss_fn returned: per-sample `t` and `loss` [b], and scalars. `sync` adds it up, on the device."""
        self.step.append({k: torch.as_tensor(v).detach() for k, v in stats.items()})

    def reset(self):
        self.sums = torch.zeros(2, 8, device=self.device)       # loss and number of images in 8 bins of t
        self.scalars, self.step = {}, []                        # name -> sum, number; the stats of this step

    def sync(self, opt, it):
        """Average the gradients of the optimiser's parameters over the ranks, in one flat all-reduce.

        False if a loss or gradient of any rank is not finite: the caller skips the update, and after --max-skips
        such steps this raises FloatingPointError on all ranks. DistributedDataParallel is not used: its hooks are
        skipped without a message when the module underneath is called or differentiated forward."""
        grads = [p.grad for g in opt.param_groups for p in g["params"] if p.grad is not None]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
        t, loss = (torch.cat([s[k].flatten().float() for s in self.step]) for k in ("t", "loss"))
        bad = ~(torch.stack(torch._foreach_norm(local)).sum() + loss.sum()).isfinite()
        own = torch.stack([bad.float(), torch.full_like(loss[0], self.signum != 0)])
        flags = own
        if self.world > 1:
            mine = [] if self.args.shard else grads             # FSDP2 has averaged them already
            flat = torch.cat([g.flatten() for g in mine] + [own])
            dist.all_reduce(flat)
            *means, flags = flat.div_(self.world).split([g.numel() for g in mine] + [2])
            if mine:
                torch._foreach_copy_(mine, [m.view_as(g) for m, g in zip(means, mine)])
        bad, stop = (flags > 0).tolist()                        # the one host read of a step
        if stop:                                                # now all ranks know it, at the same step
            self.stopping = self.signum or signal.SIGTERM
        if bad:
            self.skip(it, t, loss, mine=own[0] > 0)
        else:
            bins = torch.bucketize(t, self.edges)
            self.sums.index_add_(1, bins, torch.stack([loss, torch.ones_like(loss)]))
            for k, v in [(k, v) for s in self.step for k, v in s.items() if k not in ("t", "loss")]:
                total, n = self.scalars.get(k, (0.0, 0))
                self.scalars[k] = total + v, n + 1
        self.step = []
        return not bad

    def skip(self, it, t, loss, mine):
        finite = loss.isfinite()
        worst, what = (t, "gradient") if finite.all() else (t[~finite], "loss")
        where = (f"rank {self.rank}: {what} not finite, noise levels {worst.min():.4g} .. {worst.max():.4g} "
                 f"({len(worst)} of {len(t)} images)" if mine else "not finite on another rank, which says where")
        text = f"step {it}, seed {self.args.seed}, {where}"
        self.skips += 1
        if self.skips > self.args.max_skips:
            self.close()
            raise FloatingPointError(f"{text}; nothing was saved from this step (--max-skips allows some)")
        tqdm.write(f"{text}; skipped", file=sys.stderr)

    def log(self, it, **values):
        """Advance the bar; every --log-every steps write one line, averaged over steps and ranks, to log.jsonl."""
        self.bar.update()
        if it == self.start_it + 20:
            left = (time.time() - self.began) / 20 * (self.args.iters - it)
            end = time.strftime("%H:%M", time.localtime(time.time() + left))
            say(f"  expected end of training: {end}, in {left / 60:.0f} min, evaluation not counted")
        if it % self.args.log_every and it != self.args.iters:
            return
        names = sorted(self.scalars)
        means = [torch.as_tensor(total / n, device=self.device).float() for total, n in map(self.scalars.get, names)]
        v = torch.cat([self.sums.flatten(), torch.stack(means)]) if names else self.sums.flatten()
        if self.world > 1:
            dist.all_reduce(v)
        v, now = v.tolist(), time.time()
        if not any(v[8:16]):                                    # every step was skipped
            return
        speed = (it - self.logged[1]) * self.args.batch / (now - self.logged[0])
        line = dict(it=it, sec=round(now - self.began, 2), loss=sum(v[:8]) / max(sum(v[8:16]), 1), **values)
        line |= {k: x / self.world for k, x in zip(names, v[16:])}
        line |= {f"loss_t{i}": s / n for i, (s, n) in enumerate(zip(v[:8], v[8:16])) if n}
        line |= dict(img_s=round(speed, 1), mem_gb=round(memory(self.device), 3))
        self.append("log.jsonl", {k: float(f"{x:.6g}") if isinstance(x, float) else x for k, x in line.items()})
        self.bar.set_postfix(loss=f"{line['loss']:.4g}", img_s=f"{speed:.0f}", GB=f"{line['mem_gb']:.2f}")
        self.logged = (now, it)
        self.reset()

    def append(self, name, line):
        if self.rank == 0:
            with open(self.dir / name, "a") as f:
                f.write(json.dumps(line) + "\n")

    # -- checkpoints
    def due(self, it):
        return it % self.args.save_every == 0 or it == self.args.iters or self.fid_due(it) or self.stopping

    def fid_due(self, it):
        a = self.args                                           # it = 0: the teacher's
        return a.fid > 0 and (it == 0 or it >= a.iters or a.fid_every > 0 and it % a.fid_every == 0)

    def save(self, it, state):
        """Write ckpt.pt so that a kill at any moment leaves a loadable run, then obey a signal, if there was one."""
        ckpt = {k: full(dict(v.state_dict())) for k, v in state.items()}        # all ranks take part in gathering
        if self.rank == 0:
            ckpt |= dict(it=it, config=dataclasses.asdict(self.args), model=state["net"].spec)
            tmp, new, old = (self.dir / f"ckpt.{x}" for x in ("tmp", "pt", "prev.pt"))
            try:
                with open(tmp, "wb") as f:
                    torch.save(ckpt, f)
                    f.flush()
                    os.fsync(f.fileno())
            except BaseException:                               # a full disk leaves the old checkpoint
                tmp.unlink(missing_ok=True)
                raise
            if new.exists():
                os.replace(new, old)
            os.replace(tmp, new)
            if self.args.keep:
                shutil.copy(new, self.dir / f"ckpt-{it:07d}.pt")
        if stop := self.stopping or self.signum:                # the latter: it came while saving
            self.close()
            say(f"stopped by a signal after step {it}, saved; go on with: "
                f"python -m {script(self.file)} --resume {self.dir}")
            raise SystemExit(128 + stop)

    def restore(self, state, data):
        if config_of(self.dir)["about"]["data_sha256"] != data.sha256:
            raise BadInput(f"--resume {self.dir}: {data.name} no longer holds the images that this run began with")
        ckpt = load_checkpoint(self.dir)
        for k, v in state.items():
            v.load_state_dict(shard_like(ckpt[k], v) if self.args.shard else ckpt[k])
        return ckpt["it"]

    # -- evaluation
    def generate(self, data, n, k, draw):
        """n images, uint8 [n,C,H,W], of `draw(noise, y)`, the work shared by the ranks, the result on all."""
        ids = torch.arange(self.rank, n + -n % self.world, self.world)    # equal shares: sharded calls must pair up
        out = []
        for i in tqdm(ids.split(256), "images", leave=False, disable=self.rank > 0 or n <= FD_IMAGES):
            y = (i % data.classes).to(self.device) if self.args.cond else None
            out.append(fid.quantise(draw(noise_of(i, k, data.images.shape[1:], self.device), y)))
        out = torch.cat(out)
        if self.world > 1:
            parts = [torch.empty_like(out) for _ in range(self.world)]
            dist.all_gather(parts, out)
            out = torch.stack(parts, 1).flatten(0, 1)
        return out[:n].cpu()

    def evaluate(self, it, data, draw, net="ema", steps=None):
        """Draw a grid and measure fd_pixels, and --fid when it is due, for 1 and for --steps sampling steps, or for
        `steps` alone; `draw(noise, y)` turns noise [k,b,C,H,W] into images. The noise is always the same."""
        a, start = self.args, time.time()
        self.evaluating, n, many = True, min(len(data.images), FD_IMAGES), a.fid if self.fid_due(it) else 0
        g = torch.Generator().manual_seed(0)
        real = data.images[torch.randperm(len(data.images), generator=g)[:n].to(self.device)]
        whole = getattr(a, "boundaries", 1) == 1                # else one step jumps to the end of a segment
        for k in [steps] if steps else sorted({1, a.steps}) if whole else [a.steps]:
            began = time.time()
            fake = self.generate(data, max(n, a.grid, many), 1 if net == "teacher" else k, draw)
            t_mid = getattr(a, "t_mid", None) if k > 1 and net != "teacher" and whole else None

            def note(metric, value, n, mode):
                self.append("eval.jsonl", dict(it=it, metric=metric, value=round(value, 4), n=n, net=net, steps=k,
                                               t_mid=t_mid, mode=mode, seed=0, sec=round(time.time() - began, 2)))
            if self.rank == 0:
                name = f"{it:07d}_{'teacher' if net == 'teacher' else f'{k}step'}.png"
                picture(fake[:a.grid], data.classes if a.cond else 0).save(self.dir / "samples" / name)
                note("fd_pixels", fid.fd_pixels(real, fake[:n]), n, "8x8")
            if many:                                            # all ranks take part
                note("fid", fid.fid(data, fake[:many], a.data_dir), many, fid.MODE)
        self.evaluating, self.evaluated, spent = False, it, time.time() - start
        self.began, self.logged = self.began + spent, (self.logged[0] + spent, self.logged[1])

    def adopt(self, folder):
        """Show the last figures and grid of a teacher's run folder beside this run's own. False if they lack --fid."""
        last = {s["metric"]: s for s in figures(folder) if s["net"] == "teacher"}
        for line in last.values():
            self.append("eval.jsonl", line | dict(it=0))
            grid = folder / "samples" / f"{line['it']:07d}_teacher.png"
            if self.rank == 0 and grid.exists():
                shutil.copy(grid, self.dir / "samples" / "0000000_teacher.png")
        return "fd_pixels" in last and self.args.fid in (0, last.get("fid", {}).get("n"))

    def finish(self, it, data, draw, **how):
        """Evaluate once more if the last step was not, print the table, return {"fd_pixels_2step": value, ..}."""
        if self.evaluated != it:
            self.evaluate(it, data, draw, **how)
        self.close()
        if self.world > 1:
            dist.barrier()                                      # rank 0 has written its lines
        name = lambda s: "teacher" if s["net"] == "teacher" else f"{s['steps']}step"
        last = {(s["metric"], name(s)): s for s in figures(self.dir) if s["it"] in (0, it)}     # the last one wins
        result, names = dict(run=str(self.dir)), dict.fromkeys(["teacher", "1step", f"{self.args.steps}step"])
        for metric, title in (("fd_pixels", "FD (pixels)"), ("fid", f"FID ({fid.MODE})")):
            rows = [last[metric, k] for k in names if (metric, k) in last]
            rows = [s for s in rows if s["n"] == rows[-1]["n"]]           # the run's own: others do not compare
            if rows:
                say(f"\n{title} of {rows[0]['n']:,} images, lower is better")
            for s in rows:
                label = f"teacher, {s['steps']} Heun step" if s["net"] == "teacher" else f"{s['steps']} step"
                label += "s" * (s["steps"] > 1) + (f", t_mid {s['t_mid']:g}" if s["t_mid"] else "")
                say(f"  {label:26}{s['value']:8.3f}")
                result[f"{metric}_{name(s)}"] = s["value"]
        say(f"grids in {self.dir / 'samples'}, weights in {self.dir / 'ckpt.pt'}")
        return result

    def close(self):
        self.bar.close()
        for s, handler in self.before.items():
            signal.signal(s, handler)


def numbered(out, stem):
    """The run folders <out>/<stem>-<nnn>, oldest first."""
    found = [p for p in Path(out).glob(glob.escape(stem) + "-*") if p.name[len(stem) + 1:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(stem) + 1:]))


def config_of(folder):
    """The flags of a run folder, with `about`. Raises BadInput."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        config["about"]["script"]                               # or KeyError
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"{folder} is no run folder: its config.json is missing or damaged")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def figures(folder):
    """The lines of eval.jsonl; one that a kill has torn is passed over."""
    path, found = Path(folder) / "eval.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def full(tree):
    """Gather every sharded tensor of a state dict: one checkpoint format, sharded run or not."""
    whole = lambda v: v.full_tensor() if isinstance(v, DTensor) else v
    return tree_map(lambda v: whole(v).cpu() if torch.is_tensor(v) else v, tree)


def shard_like(saved, owner):
    """The inverse of `full`: split the saved tensors as those of `owner`, a sharded module or its optimiser, are."""
    def split(v, p):
        same = isinstance(p, DTensor) and torch.is_tensor(v) and v.shape == p.shape
        return distribute_tensor(v.to(p.device), p.device_mesh, p.placements) if same else v
    if isinstance(owner, torch.nn.Module):
        now = owner.state_dict()
        return {k: split(v, now[k]) for k, v in saved.items()}
    params = [p for g in owner.param_groups for p in g["params"]]
    return saved | dict(state={i: {k: split(v, params[i]) for k, v in s.items()} for i, s in saved["state"].items()})


def load_checkpoint(path):
    """The newest readable checkpoint of a run folder, or a checkpoint file, on the CPU; BadInput if there is none."""
    path = Path(path)
    for f in [path / "ckpt.pt", path / "ckpt.prev.pt"] if path.is_dir() else [path]:
        try:
            return torch.load(f, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except Exception as e:                                  # torch raises many kinds for a damaged file
            say(f"{f} cannot be read ({type(e).__name__}); trying the checkpoint before it")
    raise BadInput(f"no readable checkpoint in {path}; name a run folder or a ckpt.pt")


def device_of(flag):
    """--device -> cuda, cpu or mps. Raises BadInput if it is not there."""
    if flag == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if flag != "cpu" and not (torch.cuda if flag == "cuda" else torch.backends.mps).is_available():
        raise BadInput(f"--device {flag}: there is no such device here; leave --device out")
    return flag


def memory(device):
    """Peak memory of this process in GB: of the GPU if there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":                                 # it has no such module
        return 0.0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
