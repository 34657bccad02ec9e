"""One training run: its device and ranks, random numbers, gradients over the ranks, log, signals.

A method's main() makes one `Run` and calls, in this order: seed and place while it builds its networks; start, which
makes the run folder or restores it; each step seed, batch, count, sync, log; when due, save and evaluate; finish."""
import atexit
import dataclasses
import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import evaluate, fid, folder
from common.data import mix
from common.flags import BadInput, check_bounds, device_of, memory, say, script

clock = time.perf_counter         # never goes back


class Run:
    """A run and its folder. Public attributes: args, device, rank, world (number of ranks), dir."""
    guarded = staticmethod(folder.guarded)                # for main()
    others = 0.0                                          # seconds that other runs of this process took: the teacher's

    def __init__(self, args, file):
        self.born = clock() - Run.others
        dev = device_of(args.device)
        self.device = torch.device(dev, int(os.environ.get("LOCAL_RANK", 0)) if dev == "cuda" else None)
        self.device_name = f"{dev}, {torch.get_num_threads()} threads"
        if dev == "cuda":
            torch.cuda.set_device(self.device)
            self.device_name = torch.cuda.get_device_name(self.device)
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = args.tf32
        if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
            backend, device = ("nccl", self.device) if dev == "cuda" else ("gloo", None)
            dist.init_process_group(backend, device_id=device)
            atexit.register(dist.destroy_process_group)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.args, self.asked, self.file, self.skips = args, args, file, 0
        self.about = dict(ranks=self.world, device=self.device_name)      # for config.json, beside the flags
        self.signum = self.stopping = 0                   # the signal that this rank got; that any rank got
        self.evaluating, self.evaluated = False, -1       # now; the last step that was
        self.edges = torch.logspace(-2, 2, 7).to(self.device)   # of the 8 bins of the noise level in log.jsonl
        self.check(args)

    def check(self, args):
        """Refuse what no flag's own type and bounds can: values that do not fit each other. Raises BadInput."""
        check_bounds(args)
        if args.batch % (self.world * args.accum):
            raise BadInput(f"--batch {args.batch} must be a multiple of ranks x --accum = {self.world} x {args.accum}")
        if args.ch % 4:
            raise BadInput(f"--ch {args.ch} must be a multiple of 4")
        if not args.mult:
            raise BadInput("--mult takes one number for each resolution, such as 1,2,2")
        if args.shard and self.world == 1:
            raise BadInput("--shard needs several ranks; start with torchrun")
        if args.fid_every and not args.fid and not args.resume:           # a resumed run may do without its FIDs
            raise BadInput("--fid-every needs --fid, the number of images, such as 10000")
        if args.fid:
            fid.inception(args.data_dir, self.device)     # fetched now, and not after a day of training

    def resolve(self, **changes):
        """The flags with `changes`: what a teacher, or the method itself, decides. config.json keeps those asked."""
        self.args = dataclasses.replace(self.args, **changes)
        return self.args

    # ---- randomness ------------------------------------------------------------------------------
    def seed(self, it, part=0, stream=0):
        """Seed torch for step `it`: all that is random in it follows from (seed, rank, it, part), so that a resumed run
        draws the same numbers. `stream` keeps uses apart (0: noise; 1: dropout, whose mask can be replayed and never
        reuses the numbers of the noise). A negative `it` gives the same numbers on every rank."""
        torch.manual_seed(mix(self.args.seed, self.rank if it >= 0 else -1, it, part, stream))

    def batch(self, data, it, part=0):
        """This rank's images x0 [b,C,H,W] in [-1, 1] and labels [b] (None without --cond) of step `it`."""
        a = self.args
        x0, y = data.batch(it, a.batch, seed=a.seed, flip=a.flip,
                           part=self.rank * a.accum + part, parts=self.world * a.accum)
        return x0, y if a.cond else None

    # ---- start -----------------------------------------------------------------------------------
    def place(self, net):
        """Move a network to the device; with --shard, split its weights over the ranks (FSDP2)."""
        if not self.args.shard:
            return net.to(self.device, memory_format=torch.channels_last)
        from torch.distributed.device_mesh import init_device_mesh       # a second of start-up, which others save
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        net = net.to(self.device, memory_format=torch.contiguous_format)  # FSDP2 takes no other
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in [m for m in net.modules() if type(m).__name__.endswith("Block")]:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh, reshard_after_forward=True)           # ema never runs backward, which would reshard
        for name in {"F", "weigh"} & set(dir(net)):       # methods beside forward also need gathered weights
            register_fsdp_forward_method(net, name)
        return net

    def start(self, state, data):
        """Make the run folder or, with --resume, restore `state` ({name: module or optimiser}) from it; return the step
        to go on from. From here on Ctrl-C and SIGTERM finish the step and save."""
        a = self.args
        folder.check_room(a.resume or a.out, state)
        stem = folder.stem_of(Path(self.file).stem, getattr(a, "mode", ""), data.name)
        self.dir = Path(a.resume or folder.agree(lambda: folder.create(a.out, stem)))
        if owner := folder.agree(lambda: folder.take(self.dir)):
            raise BadInput(f"--resume {self.dir}: {owner} is training it; wait, or stop that")
        it = folder.restore(self.dir, state, data, a.shard, a.keep) if a.resume else 0
        count, left = sum(p.numel() for p in state["net"].parameters()), max(a.iters - it, 0)
        if self.rank == 0:
            evaluate.cut_logs(self.dir, it)
            folder.write_config(self.dir, a, self.asked, self.file, data, parameters=count, **self.about)
        folder.free(a.out)                                # taken by teacher.locate, until others can see this config
        self.began, self.start_it, self.logged = clock(), it, (clock(), it)
        earlier = [s["sec"] for s in evaluate.lines(self.dir / "log.jsonl") if type(s.get("sec")) is float]
        self.earlier = max(earlier, default=0.0)          # seconds of training before this --resume
        self.spent = {"evaluation": 0.0, "saves": 0.0, "start-up": self.began - Run.others - self.born}  # seconds
        self.reset()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self.before = {s: signal.signal(s, self.on_signal) for s in signals}      # only the main thread may do that
        folder.MINE.end.callback(self.close)
        n, *size = data.images.shape
        say(f"{self.dir}\n"
            f"  data      {data.name}, {n:,} images {'x'.join(map(str, size))}\n"
            f"  network   {self.about.get('network', a.net)}, {count / 1e6:.2f} M parameters\n"
            f"  training  {left:,} steps x {a.batch} images = {left * a.batch / 1e6:.3g} M images\n"
            f"  device    {self.device_name} x {self.world}")
        self.bar = tqdm(desc=self.dir.name, total=a.iters, initial=it, disable=self.rank > 0, dynamic_ncols=True,
                        mininterval=0.5)
        return it

    def on_signal(self, signum, frame):
        self.signum = signum
        for s in self.before if self.world == 1 else ():  # a second signal ends the process at once; not under ..
            signal.signal(s, signal.SIG_DFL)              # .. torchrun, which sends two, then kills after half a minute
        if self.evaluating:                               # save() came before: nothing that was learned is lost
            self.obey()

    def obey(self):
        """End the run, if a signal has come."""
        if stop := self.stopping or self.signum:
            self.close()
            raise SystemExit(128 + stop)

    # ---- each step -------------------------------------------------------------------------------
    def count(self, stats):
        """Keep what loss_fn returned: per-sample `t` and `loss` [b], and scalars. `sync` adds it up, on the device."""
        self.step.append({k: torch.as_tensor(v).detach() for k, v in stats.items()})

    def reset(self):
        """Begin a new interval of the log."""
        self.sums = torch.zeros(2, 8, device=self.device)       # loss and number of images in the 8 bins of t
        self.scalars, self.step = {}, []                        # {name: (sum, number)}; the stats of this step

    def sync(self, opt, it):
        """Average the gradients of the optimiser's parameters over the ranks, in one flat all-reduce. False if a loss
        or gradient of any rank is not finite: the caller skips the update; after --max-skips such steps this raises
        FloatingPointError on all ranks. DistributedDataParallel is not used: its hooks are skipped without a message
        when the module underneath is called or differentiated forward."""
        grads = [p.grad for g in opt.param_groups for p in g["params"] if p.grad is not None]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
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
        """Report a step that was not finite, or end the run if there were too many. mine: it happened on this rank."""
        finite = loss.isfinite()
        worst, what = (t, "gradient") if finite.all() else (t[~finite], "loss")
        where = (f"rank {self.rank}: {what} not finite, noise levels {worst.min():.4g} .. {worst.max():.4g} "
                 f"({len(worst)} of {len(t)} images)" if mine else "not finite on another rank, which says where")
        text = f"step {it}, seed {self.args.seed}, {where}"
        self.skips += 1
        if self.skips > self.args.max_skips:
            raise FloatingPointError(f"{text}; nothing was saved from this step (--max-skips allows some)")
        tqdm.write(f"{text}; skipped", file=sys.stderr)

    def log(self, it, **values):
        """Advance the bar; every --log-every steps write one line, averaged over steps and ranks, to log.jsonl."""
        self.bar.update()
        if it == self.start_it + 20:
            left = (clock() - self.spent["evaluation"] - self.began) / 20 * (self.args.iters - it)
            end = time.strftime("%H:%M, ", time.localtime(time.time() + left)) if left < 1e9 else ""
            say(f"  expected end of training: {end}in {left / 60:,.0f} min, evaluation not counted")
        if it % self.args.log_every and it != self.args.iters:
            return
        names = sorted(self.scalars)
        means = [(total / n).to(self.sums) for total, n in map(self.scalars.get, names)]
        v = torch.stack([*self.sums.flatten(), *means])
        if self.world > 1:
            dist.all_reduce(v)
        v, now = v.tolist(), clock() - self.spent["evaluation"]
        if not any(v[8:16]):                                    # every step was skipped
            return
        speed = (it - self.logged[1]) * self.args.batch / max(now - self.logged[0], 1e-9)     # a clock may stand still
        line = dict(it=it, sec=round(self.earlier + now - self.began, 2), loss=sum(v[:8]) / max(sum(v[8:16]), 1))
        line |= values | {k: x / self.world for k, x in zip(names, v[16:])}
        line |= {f"loss_t{i}": s / n for i, (s, n) in enumerate(zip(v[:8], v[8:16])) if n}
        line |= dict(img_s=round(speed, 1), mem_gb=round(memory(self.device), 3))
        self.append("log.jsonl", {k: float(f"{x:.6g}") if isinstance(x, float) else x for k, x in line.items()})
        self.bar.set_postfix(loss=f"{line['loss']:.4g}", img_s=f"{speed:.0f}", GB=f"{line['mem_gb']:.2f}")
        self.logged = (now, it)
        self.reset()

    def append(self, name, line):
        """Add an object to a .jsonl file of the run folder, on the first rank."""
        if self.rank == 0:
            with open(self.dir / name, "a") as f:
                f.write(json.dumps(line) + "\n")

    # ---- checkpoints and figures -----------------------------------------------------------------
    def due(self, it):
        """Is it time to save and evaluate? Every --save-every and --fid-every steps, at the end, after a signal."""
        return it % self.args.save_every == 0 or it == self.args.iters or self.fid_due(it) or self.stopping

    def fid_due(self, it):
        """Is an FID to be measured after step `it`? 0 is the teacher."""
        a = self.args
        return a.fid > 0 and (it == 0 or it >= a.iters or a.fid_every > 0 and it % a.fid_every == 0)

    def save(self, it, state):
        """Write a checkpoint of `state`, then obey a signal, if there was one. All ranks take part."""
        start = clock()
        if self.skips == self.args.iters - self.start_it > 0:
            raise FloatingPointError(f"step {it}: no step was finite; nothing was saved")
        ckpt = {k: folder.full(dict(v.state_dict())) for k, v in state.items()}
        evaluate.check_state(it, ckpt, self.world)
        if self.rank == 0:
            ckpt |= dict(it=it, config=dataclasses.asdict(self.args), model=state["net"].spec)
            folder.save(self.dir, ckpt, self.args.keep)
        self.spent["saves"] += clock() - start
        if self.stopping or self.signum:                  # the latter came while saving
            launch = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE')}" if self.world > 1 else "python"
            say(f"stopped by a signal after step {it}, saved; go on with: "
                f"{launch} -m {script(self.file)} --resume {shlex.quote(str(self.dir))}")
        self.obey()

    def evaluate(self, it, data, draw, steps, **how):
        """evaluate.evaluate, not counted as time of training. A signal ends it: all that was learned is saved."""
        start, self.evaluating = clock(), True
        self.obey()                                       # what came since save()
        evaluate.evaluate(self, it, data, draw, steps, **how)
        self.evaluating, self.evaluated = False, it
        self.spent["evaluation"] += clock() - start

    def finish(self, it, data, draw, steps, **how):
        """Evaluate if the last step was not, print the table, return {"run": folder, "fd_pixels_2step": value, ..}."""
        if self.evaluated != it:
            self.evaluate(it, data, draw, steps, **how)
        self.close()
        if self.world > 1:
            dist.barrier()                                # rank 0 has written its lines
        result = dict(run=str(self.dir)) | evaluate.table(self, it)
        total = max(clock() - Run.others - self.born, 1e-9)
        Run.others += total
        shares = ", ".join(f"{k} {v / total:.1%}" for k, v in self.spent.items())
        lines = [evaluate.verdict(self.dir) if self.rank == 0 else "", f"{total / 60:.1f} min, of which {shares}",
                 f"grids in {self.dir / 'samples'}, weights in {self.dir / 'ckpt.pt'}",
                 f"curves, also beside other runs: python -m common.compare {shlex.quote(str(self.dir))}"]
        say("\n".join(filter(None, lines)))
        self.obey()                                       # of a teacher: its student is not to begin
        return result

    def close(self):
        """End the progress bar, give the signals and the folder back."""
        self.bar.close()
        while self.before:
            signal.signal(*self.before.popitem())
        folder.free(self.dir)
