"""python -m tests.bench.step: one training step of ECT, ours against the same network written the obvious way.

Obvious: NCHW, einsum attention, EMA as a Python loop, the optimiser with its default arguments. Both sides run the same
loss on the same images, alternating, in one process; the median of the repetitions is printed, and the ratio."""
import argparse
import statistics
import time
from copy import deepcopy

import torch

import ect
from common.precond import EDM
from common.unet import UNet
from tests.bench import obvious

SIZES = dict(digits=(8, 1), small=(32, 3), paper=(32, 3))


def ours(net, args, bf16, compiled):
    net = EDM(deepcopy(net), args.sd, dtype=torch.bfloat16 if bf16 else torch.float32)
    net = net.to(memory_format=torch.channels_last)
    ema = deepcopy(net).requires_grad_(False)
    if compiled:
        net.compile()
    opt = torch.optim.RAdam(net.parameters(), lr=args.lr, foreach=True)

    def average():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1e-3)
    return net, opt, average


def plain(net, args):
    p = {k: v.detach().clone().requires_grad_() for k, v in net.named_parameters()}
    ema = {k: v.detach().clone() for k, v in p.items()}
    opt = torch.optim.RAdam(p.values(), lr=args.lr)

    def average():
        for k, v in p.items():
            ema[k].copy_(ema[k] * 0.999 + v.detach() * 0.001)
    return lambda x, t, y: obvious.edm(p, x, t.flatten(), args.sd), opt, average


def step(net, opt, average, x0, args):
    loss, _ = ect.loss_fn(net, x0, None, 0, args, lambda: torch.manual_seed(1))
    loss.backward()
    opt.step()
    with torch.no_grad():
        average()
    opt.zero_grad(set_to_none=True)
    if x0.is_cuda:
        torch.cuda.synchronize()
    return float(loss.detach())


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--preset", choices=list(SIZES), default="small")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--batch", type=int, default=0)
    ap.add_argument("--bf16", action="store_true", help="ours only")
    ap.add_argument("--compile", action="store_true", help="ours only")
    ap.add_argument("--repeat", type=int, default=7)
    a = ap.parse_args()
    size, channels = SIZES[a.preset]
    args = ect.Args(**{k: v for k, v in ect.PRESETS[a.preset].items() if k != "cost"} | dict(dropout=0.0))
    if a.device == "cuda":                                # as a run does
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    net = UNet(size, channels, args.ch, args.mult, args.blocks, args.attn).to(a.device)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)
    x0 = torch.rand(a.batch or args.batch, channels, size, size, device=a.device) * 2 - 1
    sides = dict(ours=(*ours(net, args, a.bf16, a.compile), x0.contiguous(memory_format=torch.channels_last)),
                 obvious=(*plain(net, args), x0))
    seconds, losses = {k: [] for k in sides}, {k: [] for k in sides}
    for i in range(a.repeat + 1):                         # the first repetition warms up
        for name, (f, opt, average, x) in sides.items():
            torch.manual_seed(i)
            began = time.perf_counter()
            losses[name].append(step(f, opt, average, x, args))
            seconds[name].append(time.perf_counter() - began)
    med = {k: statistics.median(v[1:]) for k, v in seconds.items()}
    print(f"{a.preset} on {a.device}, {torch.get_num_threads()} threads, batch {len(x0)}: "
          f"ours {1e3 * med['ours']:.1f} ms{' (bf16)' * a.bf16}{' (compiled)' * a.compile}, obvious {1e3 * med['obvious']:.1f} ms, "
          f"ratio {med['obvious'] / med['ours']:.2f}; first losses {losses['ours'][0]:.4f} {losses['obvious'][0]:.4f}")


if __name__ == "__main__":
    main()
