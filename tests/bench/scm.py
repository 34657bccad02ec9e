"""python -m tests.bench.scm: one training step of sCM against one of ECT on the same network.

Forward passes: ECT 2, one of them with a backward pass; sCM 1 with a backward pass and 1 that carries a tangent (about 3),
and with --mode scd the teacher's. The two alternate in one process; the median of the repetitions is printed, and the
ratio. Peak memory beyond the weights: of the GPU, or, on a CPU, of the tensors that the profiler saw in a step."""
import argparse
import statistics
import time
from copy import deepcopy

import torch
from torch.profiler import ProfilerActivity, profile

import ect
import scm
from common.precond import EDM, TrigFlow, trig
from common.unet import UNet
from tests.bench.step import SIZES


def peak(step, cuda):
    """MiB at most in use during step(), less what was in use before."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        step()
    sizes = [e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = now = 0
    for n in sizes:
        now += n
        most = max(most, now)
    return most / 2**20


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--preset", choices=list(SIZES), default="small")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--batch", type=int, default=0)
    ap.add_argument("--mode", choices=["sct", "scd"], default="sct")
    ap.add_argument("--jvp", choices=["exact", "fd"], default="exact")
    ap.add_argument("--bf16", action="store_true")
    ap.add_argument("--compile", action="store_true")
    ap.add_argument("--repeat", type=int, default=7)
    a = ap.parse_args()
    size, channels = SIZES[a.preset]
    args = scm.Args(**{k: v for k, v in scm.PRESETS[a.preset].items() if k != "cost"} | dict(dropout=0.0, mode=a.mode, jvp=a.jvp))
    if cuda := a.device == "cuda":                        # as a run does
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    raw = UNet(size, channels, args.ch, args.mult, args.blocks, args.attn).to(a.device, memory_format=torch.channels_last)
    for p in raw.parameters():
        torch.nn.init.normal_(p, std=0.02)
    x0 = torch.rand(a.batch or args.batch, channels, size, size, device=a.device) * 2 - 1
    x0, dtype = x0.contiguous(memory_format=torch.channels_last), torch.bfloat16 if a.bf16 else torch.float32
    net, old = TrigFlow(deepcopy(raw), args.sd, "edm", dtype).to(a.device), EDM(deepcopy(raw), args.sd, dtype=dtype)
    teacher = trig(EDM(raw.eval(), args.sd, dtype=dtype))
    if a.compile:
        net.model.compile()
        old.compile()
    seed = lambda: torch.manual_seed(1)
    losses = dict(ect=lambda: ect.loss_fn(old, x0, None, 0, ect.Args(sd=args.sd), seed)[0],
                  scm=lambda: scm.loss_fn(net, teacher, x0, None, args.H, args, seed)[0])
    opts = {k: torch.optim.RAdam(m.parameters(), lr=args.lr, foreach=True) for k, m in dict(ect=old, scm=net).items()}

    def step(k):
        losses[k]().backward()
        opts[k].step()
        opts[k].zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
    seconds = dict(ect=[], scm=[])
    for i in range(a.repeat + 1):                         # the first repetition warms up
        for k in seconds:
            began = time.perf_counter()
            step(k)
            seconds[k].append(1e3 * (time.perf_counter() - began))
    ms = {k: statistics.median(v[1:]) for k, v in seconds.items()}
    mib = {k: peak(lambda: step(k), cuda) for k in ms}
    print(f"{a.preset} on {a.device}, {torch.get_num_threads()} threads, batch {len(x0)}{' (bf16)' * a.bf16}{' (compiled)' * a.compile}: "
          f"{a.mode} ({a.jvp}) {ms['scm']:.1f} ms {mib['scm']:.0f} MiB, ect {ms['ect']:.1f} ms {mib['ect']:.0f} MiB, "
          f"ratio {ms['scm'] / ms['ect']:.2f} of time, {mib['scm'] / mib['ect']:.2f} of memory")


if __name__ == "__main__":
    main()
