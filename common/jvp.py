"""The derivative of a network along a direction of its inputs (Jacobian-vector product), in a pass of its own that
keeps no graph. Needs torch alone."""
import warnings
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch.autograd import forward_ad

# torch compiles a few derivatives this way when the first one is taken; nobody here can do it otherwise.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)

precise = False                                           # true while a derivative is taken; then activations are ..
# .. float32 at least, also in networks that otherwise compute in bfloat16: see TrigFlow.F


def dual(*tensors):
    """Does one of these tensors carry a tangent? In compiled code none ever does, see `exactly`."""
    return not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def along(fn, derivative, x):
    """fn(x), whose tangent is derivative(x, dx). torch has rules of its own for the layers that use this; they also
    multiply with the zero tangents of the weights, in Python, which takes most of the time of a small pass."""
    if not dual(x):
        return fn(x)
    x, dx = forward_ad.unpack_dual(x)
    return forward_ad.make_dual(fn(x), derivative(x, dx))


@contextmanager
def exactly(tf32):
    """Compute without bfloat16, whose rounding errors a derivative magnifies, with TF32 only if `tf32` and the caller
    allow it, and without compiled code: it knows no tangents, and a compiled module that meets one stays uncompiled
    ever after."""
    global precise
    precise, matmul, conv = True, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if not tf32:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = conv
        precise = False


@torch.no_grad()
def jvp(fn, primals, tangents, exact=True):
    """fn(*primals) and d/ds fn(primals + s * tangents) at s = 0, as torch.func.jvp gives them, but without a graph,
    which would cost several times the memory, and also through FSDP2. fn returns one tensor.

    exact=False takes a central difference instead, for networks without forward-mode derivative; fn is then called
    twice, and must draw the same random numbers in both calls. RuntimeError if the tangent is lost altogether."""
    tangents = [v.to(x.dtype) for x, v in zip(primals, tangents)]         # a mixture would pass without an error
    with exactly(tf32=exact):                             # a difference of near values would be of rounding errors
        if not exact:
            def at(s):
                return fn(*(x + s * v for x, v in zip(primals, tangents)))
            h = torch.finfo(torch.float32).eps ** (1 / 3)                 # errors of truncation and rounding are equal
            hi = at(h)
            if hi.dtype == torch.float64:                                 # not so where only the inputs are float64
                h = torch.finfo(hi.dtype).eps ** (1 / 3)
                hi = at(h)
            lo = at(-h)
            return (hi + lo) / 2, (hi - lo) / (2 * h)
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(fn(*map(forward_ad.make_dual, primals, tangents)))
    if out.tangent is None:
        raise RuntimeError("the derivative was lost on its way through the network; see common/jvp.py, probe")
    return out.primal, out.tangent


def probe(F, shape, device, tolerance=0.02):
    """Check, once before training, that the derivatives of a module's method F(x, t) in x [2, *shape] and in t agree
    with central differences. A tangent may get lost on the way (detach, a custom operator, a collective) without an
    error, and is then a zero like any other. The weights are perturbed first, since all derivatives of a network whose
    last layer is zero are zero; float64, since the difference of a steep embedding would else be the worse of the two.
    Raises RuntimeError if they differ by more than `tolerance`, relative."""
    device = torch.device("cpu" if torch.device(device).type == "mps" else device)       # mps has no float64
    net = deepcopy(F.__self__).to(device, torch.float64).eval()
    net.dtype = torch.float64
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    F, wide = getattr(net, F.__name__), dict(device=device, dtype=torch.float64)
    x, t = torch.randn(2, *shape, **wide), 0.3 + torch.rand(2, 1, 1, 1, **wide)
    for name, v in dict(x=(torch.randn_like(x), 0 * t), t=(0 * x, torch.ones_like(t))).items():
        (_, d), (_, fd) = (jvp(F, (x, t), v, exact) for exact in (True, False))
        error = float((d - fd).norm() / fd.norm())
        if not error < tolerance:
            raise RuntimeError(f"the derivative of this network in {name} is off by {error:.0%}: an operation in it "
                               "loses the tangent or has a wrong forward mode; --jvp fd works without")
