"""python -m tests.bench.precision RUN: how much of the direction of the gradient is left in TF32, bfloat16 and float16?

cd, ct, ict and ect take the difference f(x_t, t) - f(x_r, r) of two near values; scm and rcm a derivative. For a trained
network (an untrained one shows nothing of it) this prints, per noise level, the cosine with the same quantity in
float64, and its relative error. --q, of ect, or --N, of the grids of cd, ct and ict, say how near r is to t. TF32 is
that of the GPU; on a CPU it is simulated: each layer's inputs and weights are rounded to ten bits."""
import argparse
import contextlib
from copy import deepcopy

import torch
from torch import nn

from common import teacher
from common.data import load
from common.flags import config_of
from common.jvp import along, jvp
from common.precond import TrigFlow
from common.sample import folder_of

LEVELS = (0.01, 0.05, 0.2, 1.0, 2.0, 5.0, 20.0)
PRECISIONS = ("float32", "TF32", "bfloat16", "float16")


def ten_bits(x):
    """float32 x rounded to the nearest number with ten bits after the first, ties to even."""
    i = x.contiguous().view(torch.int32)
    return ((i + 0xFFF + (i >> 13 & 1)) & ~0x1FFF).view(torch.float32)


def rounded(layer, inputs):
    """A forward hook; a tangent is rounded, too."""
    return along(ten_bits, lambda x, dx: ten_bits(dx), inputs[0]), *inputs[1:]


@contextlib.contextmanager
def computing(net, precision):
    """A copy of `net` that computes so."""
    net, before = deepcopy(net), (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    cuda = next(net.parameters()).is_cuda
    real = cuda and precision == "TF32"
    torch.set_float32_matmul_precision("high" if real else "highest")
    torch.backends.cudnn.allow_tf32 = real
    if precision == "TF32" and not cuda:
        for layer in net.modules():
            if isinstance(layer, nn.Module) and hasattr(layer, "weight") and getattr(layer.weight, "ndim", 0) in (2, 4):
                layer.weight.data = ten_bits(layer.weight.data)
                layer.register_forward_pre_hook(rounded)
    elif precision != "TF32":
        net.dtype = getattr(torch, precision)
        net = net.double() if precision == "float64" else net
    try:
        yield net
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def lower(t, a):
    """The noise level r below t: t/q below it for --q, else the next of a Karras grid of N levels through t."""
    if not a.N:
        n_t = 1 + 8 / (1 + torch.exp(torch.tensor(float(t))))             # ect.py: k = 8, b = 1
        return t * (1 - min(1.0, float(n_t) / a.q))
    lo, hi = (v ** (1 / 7) for v in (0.002, 80.0))
    return max(t ** (1 / 7) - (hi - lo) / (a.N - 1), 0) ** 7


@torch.no_grad()
def quantity(net, x0, y, eps, t, a):
    """f_t - f_r of an EDM network at the level t; of a TrigFlow network sin(t) cos(t) dF/dt along its own ODE."""
    t = torch.full((len(x0), 1, 1, 1), t, dtype=torch.float64, device=x0.device)
    if isinstance(net, TrigFlow):
        t, z = torch.atan(t / net.sd), net.sd * eps
        cos, sin = t.cos(), t.sin()
        tangents = cos * sin * (cos * z - sin * x0), cos * sin
        return jvp(lambda x, t: net.F(x, t, y), (cos * x0 + sin * z, t), tangents)[1].double()
    r = torch.full_like(t, lower(float(t[0]), a))
    f_r = net(x0 + r * eps, r, y).double() if r[0] > 0 else x0
    return net(x0 + t * eps, t, y).double() - f_r


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("run")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--images", type=int, default=64)
    ap.add_argument("--q", type=float, default=256.0)
    ap.add_argument("--N", type=int, default=0)
    ap.add_argument("--data-dir", default="data")
    a = ap.parse_args(argv)
    net = teacher.load(a.run, a.device)
    config = config_of(folder_of(a.run))
    data = load(config["dataset"], a.data_dir, config["size"], a.device)
    torch.manual_seed(0)
    x0, y = data.batch(0, a.images)
    x0, y, eps = x0.double(), y if config["cond"] else None, torch.randn(x0.shape, dtype=torch.float64).to(a.device)
    print("| cosine (relative error) at noise level |", *(f" {t:g} |" for t in LEVELS), sep="")
    print("|---|" + "---|" * len(LEVELS))
    rows = {}
    for precision in ("float64", *PRECISIONS):
        with computing(net, precision) as here:
            rows[precision] = [quantity(here, x0, y, eps, t, a) for t in LEVELS]
    for precision in PRECISIONS:
        cells = [f"{float((v * w).sum() / (v.norm() * w.norm())):.3f} ({float((v - w).norm() / w.norm()):.1g})"
                 for v, w in zip(rows[precision], rows["float64"])]
        print(f"| {precision} | " + " | ".join(cells) + " |")
    return rows


if __name__ == "__main__":
    main()
