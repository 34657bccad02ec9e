"""python -m tests.bench.gpu --out OUT [--minutes 9] [--parts speed,precision]: what only a GPU can say, in one call.

The parts run in the order of PARTS until the minutes are over; several calls may share them. Each row is a measurement;
one that fails is a row with its error, and the rest goes on. OUT/gpu.json and OUT/gpu.md hold all rows, and are written
anew after each, so that a call that is cut short loses nothing. `--device cpu --smoke` tries every part with tiny
networks on a CPU."""
import argparse
import contextlib
import importlib
import io
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from copy import deepcopy
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import ect
import rcm
import scm
from common import jvp, teacher, unet
from common.flags import ROOT, BadInput, parse
from common.precond import EDM, TrigFlow, trig
from common.run import Run
from tests.bench import precision

METHODS = ("ect", "scm", "rcm", "cd", "ct", "ict")
TINY = ["--batch", "8", "--ch", "16", "--blocks", "1", "--mult", "1", "--attn", "", "--grid", "4", "--iters", "3"]


class Bench:
    """What all parts need."""
    def __init__(self, a):
        self.device, self.smoke, self.out = torch.device(a.device), a.smoke, Path(a.out)
        self.data_dir, self.ends, self.cuda = a.data_dir, time.time() + 60 * a.minutes, a.device == "cuda"
        tiny = dict(size=8, channels=1, ch=16, mult=(1,), blocks=1, attn=())
        self.size = tiny if a.smoke else dict(size=32, channels=3)
        self.batch, self.steps = (4, 2) if a.smoke else (128, 10)

    def left(self):
        return self.ends - time.time()

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def main(self, script, *flags):
        """Run a script's main() quietly; return what it returns."""
        m = importlib.import_module(script)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return m.main(parse(m.Args, m.PRESETS, ["--device", self.device.type, "--out", str(self.out / "runs"),
                                                    "--data-dir", self.data_dir, *map(str, flags)]))

    def trainer(self, method, dtype=torch.float32, last=True, compiled=False, optimiser=None, **net):
        """A function that makes one training step of a method on random images, with the network of the paper."""
        torch.manual_seed(0)
        layout = torch.channels_last if last else torch.contiguous_format
        raw = unet.UNet(**self.size, **net).to(self.device, memory_format=layout)
        for p in raw.parameters():
            torch.nn.init.normal_(p, std=0.02)
        c, n = self.size["channels"], self.size["size"]
        x0 = (torch.rand(self.batch, c, n, n, device=self.device) * 2 - 1).contiguous(memory_format=layout)
        wrap = EDM if method in ("ect", "edm") else TrigFlow
        model, fixed, fake = (wrap(deepcopy(raw), dtype=dtype).to(self.device) for _ in range(3))
        fixed.requires_grad_(False)
        if compiled:
            model.model.compile()
        loss = dict(edm=lambda: teacher.loss_fn(model, x0, None, teacher.Args(augment=0.0)),
                    ect=lambda: ect.loss_fn(model, x0, None, 0, ect.Args(), reseed),
                    sct=lambda: scm.loss_fn(model, None, x0, None, 9, scm.Args(H=1), reseed),
                    scd=lambda: scm.loss_fn(model, fixed, x0, None, 9, scm.Args(H=1, mode="scd"), reseed),
                    rcm=lambda: rcm.loss_fn(model, fake, trig(fixed), x0, None, 0, rcm.Args(N_max=1), reseed))[method]
        opt = (optimiser or (lambda ps: torch.optim.RAdam(ps, lr=1e-4, foreach=True)))(model.parameters())

        def reseed():
            torch.manual_seed(1)

        def step():
            loss()[0].backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
        return step

    def time(self, step):
        """Milliseconds of a call, in the mean of several, and the peak memory in MiB (0 on a CPU)."""
        for _ in range(3):                                # compiles, tunes, fills the caches of the allocator
            step()
        self.wait()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(self.steps):
            step()
        self.wait()
        ms = 1e3 * (time.perf_counter() - began) / self.steps
        return round(ms, 2), torch.cuda.max_memory_allocated() >> 20 if self.cuda else 0

    def speed(self, **what):
        """A row: images per second and memory of one training step."""
        ms, mib = self.time(self.trainer(**what))
        return dict(ms=ms, img_s=round(1e3 * self.batch / ms), MiB=mib)


# ---- the parts: each yields pairs of a name and a function that returns a row ---------------------
def versions(b):
    def row():
        p = torch.cuda.get_device_properties(0) if b.cuda else None
        return dict(torch=torch.__version__, cuda=torch.version.cuda, python=platform.python_version(),
                    cudnn=torch.backends.cudnn.version(), device=p.name if p else platform.processor(),
                    GiB=p.total_memory >> 30 if p else 0)
    yield "machine", row


def steps(b):
    """Three steps of each method, on the digits."""
    for more in ([], ["--bf16"], ["--fp16"]):
        for m in ("ect", "ict") if more == ["--fp16"] else (*METHODS, "common.teacher"):
            start = ["--teacher", "train", "--teacher-iters", "2"] if m in ("cd", "rcm") else ["--teacher", "none"]
            flags = [*(start if m != "common.teacher" else []), *more]
            yield " ".join([m, *more]), lambda m=m, flags=flags: b.main(m, *TINY, *flags)


def speed(b):
    """One training step at batch 128 of DDPM++ with 55.7 M parameters."""
    for method in ("edm", "ect", "sct", "scd", "rcm"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for last in (True, False):
                if last or dtype != torch.float16:
                    name = f"{method} {str(dtype)[6:]}{' channels_last' * last}"
                    yield name, lambda k=dict(method=method, dtype=dtype, last=last): b.speed(**k)
        yield f"{method} float32 without TF32", lambda m=method: strict(b, m)


def strict(b, method):
    """speed without TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        return b.speed(method=method)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def waits(b):
    """How often a step waits for the GPU, as CUDA itself counts."""
    def row(m, start):
        marks, log = [], Run.log

        def count(self, it, **v):
            marks.append(len(seen))
            return log(self, it, **v)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                Run.log = count
                if b.cuda:
                    torch.cuda.set_sync_debug_mode("warn")
                b.main(m, *TINY, "--iters", "5", "--log-every", "99", "--save-every", "99", *start)
            finally:
                Run.log = log
                if b.cuda:
                    torch.cuda.set_sync_debug_mode("default")
        where = {f"{Path(w.filename).name}:{w.lineno}" for w in seen[marks[-4]:marks[-2]]}
        return dict(per_step=(marks[-2] - marks[-4]) / 2, where=" ".join(sorted(where)))
    for m in METHODS:
        start = ["--teacher", "train", "--teacher-iters", "2"] if m in ("cd", "rcm") else ["--teacher", "none"]
        yield m, lambda m=m, start=start: row(m, start)


def derivative(b):
    """The pass that carries a tangent, against a plain forward pass."""
    net = unet.UNet(**b.size, norm="double", fourier=0.02).to(b.device, memory_format=torch.channels_last)
    x = torch.randn(b.batch, b.size["channels"], b.size["size"], b.size["size"], device=b.device)
    t = torch.rand(b.batch, device=b.device)

    def plain():
        with torch.no_grad():
            return net(x, t)

    def row(precision, along=None):
        before, unet.along = unet.along, along or unet.along
        torch.set_float32_matmul_precision(precision)
        try:
            (ms, mib), (forward, _) = b.time(lambda: jvp.jvp(net, (x, t), (x, t))), b.time(plain)
            return dict(ms=ms, MiB=mib, ratio=round(ms / forward, 2))
        finally:
            unet.along = before
            torch.set_float32_matmul_precision("high")
    yield "float32", lambda: row("highest")
    yield "TF32", lambda: row("high")
    # contiguous: else torch 2.11 has no derivative of a group norm
    yield "TF32, torch's own rules", lambda: row("high", lambda fn, derivative, x: fn(x.contiguous()))


def optimisers(b):
    """The optimiser's share: a step of ECT with each."""
    for name, make in dict(radam_foreach=lambda p: torch.optim.RAdam(p, lr=1e-4, foreach=True),
                           radam_capturable=lambda p: torch.optim.RAdam(p, lr=1e-4, foreach=True, capturable=b.cuda),
                           adam_foreach=lambda p: torch.optim.Adam(p, lr=1e-4, foreach=True),
                           adam_fused=lambda p: torch.optim.Adam(p, lr=1e-4, fused=True)).items():
        yield name, lambda make=make: b.speed(method="ect", optimiser=make)


def idle(b):
    """The share of a step of ECT in which no kernel runs."""
    def row(dtype):
        step = b.trainer("ect", dtype)
        ms, _ = b.time(step)
        kind = ProfilerActivity.CUDA if b.cuda else ProfilerActivity.CPU
        with profile(activities=[kind]) as p:
            for _ in range(b.steps):
                step()
            b.wait()
        name = "self_device_time_total" if b.cuda else "self_cpu_time_total"
        busy = sum(getattr(e, name) for e in p.key_averages()) / 1e3 / b.steps
        return dict(ms=ms, busy_ms=round(busy, 2), idle=round(1 - busy / ms, 3))
    for dtype in (torch.float32, torch.bfloat16):
        yield str(dtype)[6:], lambda dtype=dtype: row(dtype)


def gpu_tests(b):
    """The tests that need a GPU."""
    def row():
        argv = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"] + ["--collect-only"] * b.smoke
        p = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=max(b.left(), 30))
        return dict(result=p.stdout.strip().splitlines()[-1], rc=p.returncode)
    yield "pytest -m gpu", row


def trained(b):
    """Precision, of networks trained on the digits for about two minutes in all."""
    def row(script):
        iters = ["--iters", "3", "--teacher-iters", "3"] if b.smoke else []
        run = b.main(script, *(TINY if b.smoke else []), *iters)["run"]
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            precision.main([run, "--device", b.device.type, "--data-dir", b.data_dir, *["--images", "8"] * b.smoke])
        (b.out / f"precision-{script}.md").write_text(text.getvalue())
        return dict(table=f"precision-{script}.md")
    for script in ("ect", "scm"):
        yield script, lambda script=script: row(script)


def compiled(b):
    """--compile: three steps of each method, and the speed of the large network."""
    for m in METHODS:
        start = ["--teacher", "train", "--teacher-iters", "2"] if m in ("cd", "rcm") else ["--teacher", "none"]
        flags = ["--compile", "--dropout", "0"]
        yield m, lambda m=m, start=start: b.main(m, *TINY, *start, *flags)
    for method in ("edm", "ect", "sct"):
        for dtype in (torch.float32, torch.bfloat16):
            yield f"{method} {str(dtype)[6:]}", lambda k=dict(method=method, dtype=dtype): b.speed(compiled=True, **k)


def fid(b):
    """With the time that is left: train EDM on CIFAR-10 in bfloat16, tune with ECT in float32, measure FID."""
    def row():
        if b.smoke:
            its, tune, more = 2, 2, [*TINY, "--dataset", "digits"]
        else:
            rate = 1e3 / b.speed(method="edm", dtype=torch.bfloat16)["ms"]
            tuned = 1e3 / b.speed(method="ect")["ms"]
            left = b.left() - 90                          # FID of 5,000 images of the teacher and in 1 and 2 steps
            its, tune = int(0.7 * left * rate), int(0.3 * left * tuned)
            more = ["--dataset", "cifar10", "--preset", "fast", "--fid", "5000", "--batch", "128"]
        slow = ["--save-every", "1000000", "--log-every", "50"]
        first = b.main("common.teacher", *more, *slow, *["--bf16"] * (not b.smoke), "--iters", its, "--lr", "5e-4",
                       "--warmup", 200, "--ema", "0.999")
        out = b.main("ect", *more, *slow, "--teacher", first["run"], "--iters", tune, "--ema", "0.999")
        return dict(teacher_steps=its, steps=tune) | first | out
    yield "EDM, then ECT", row


PARTS = dict(versions=versions, steps=steps, speed=speed, waits=waits, derivative=derivative, optimisers=optimisers,
             idle=idle, gpu_tests=gpu_tests, trained=trained, compiled=compiled, fid=fid)


def table(rows):
    """All rows as Markdown, one table a part."""
    text = ""
    for name in dict.fromkeys(r["part"] for r in rows):
        mine = [{k: v for k, v in r.items() if k != "part"} for r in rows if r["part"] == name]
        keys = list(dict.fromkeys(k for r in mine for k in r))
        text += f"\n## {name}\n\n| " + " | ".join(keys) + " |\n|" + "---|" * len(keys) + "\n"
        text += "".join("| " + " | ".join(str(r.get(k, "")) for k in keys) + " |\n" for r in mine)
    return text


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--out", required=True)
    ap.add_argument("--minutes", type=float, default=9)
    ap.add_argument("--parts", default=",".join(PARTS))
    ap.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    ap.add_argument("--data-dir", default="data")
    ap.add_argument("--smoke", action="store_true", help="tiny networks: does every part run?")
    a = ap.parse_args(argv)
    if unknown := set(a.parts.split(",")) - set(PARTS):
        raise BadInput(f"--parts {','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    b, rows = Bench(a), []
    b.out.mkdir(parents=True, exist_ok=True)
    if b.cuda:                                            # as a run does
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    for part in a.parts.split(","):
        for name, row in PARTS[part](b):
            if b.left() < 0:
                print("the time is over")
                return rows
            began = time.time()
            try:
                row = row()
            except BaseException as e:                    # SystemExit, too: the rest goes on
                if isinstance(e, KeyboardInterrupt):
                    raise
                row = dict(error=f"{type(e).__name__}: {getattr(e, 'message', None) or e}".splitlines()[0][:300])
                torch.cuda.empty_cache() if b.cuda else None
            rows.append(dict(part=part, name=name, **row, sec=round(time.time() - began, 1)))
            print(json.dumps(rows[-1]), flush=True)
            for file, text in (("gpu.json", json.dumps(rows, indent=1)), ("gpu.md", table(rows))):
                (b.out / "tmp").write_text(text)
                os.replace(b.out / "tmp", b.out / file)
    return rows


if __name__ == "__main__":
    main()
