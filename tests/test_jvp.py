"""The forward derivative, which nothing else would notice if it were wrong: a network trains on any tangent."""
import pytest
import torch
from test_unet import FAMILIES, inputs, random_net
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.dit import DiT
from common.jvp import dual, jvp, probe
from common.precond import TrigFlow
from common.unet import UNet, attention

ALL = [dict(kw, norm=norm) for kw in FAMILIES.values() for norm in ("single", "double")]


@pytest.mark.parametrize("kw", ALL, ids=lambda kw: f"{kw.get('net', 'ddpmpp')}-{kw['norm']}")
def test_equals_torch_func_jvp_on_every_network(kw):
    """Value and tangent, float64; attention without its tangent, or scaled wrongly, is seen."""
    net = random_net(**kw)
    x, c, y = inputs(net, 2)
    v = torch.randn_like(x), torch.randn_like(c)
    F = lambda x, c: net(x, c, y)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        theirs = torch.func.jvp(F, (x, c), v)
    for ours, exact, tol in ((jvp(F, (x, c), v), True, 1e-12), (jvp(F, (x, c), v, exact=False), False, 1e-7)):
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() < tol * b.norm() and not a.requires_grad


def test_equals_torch_func_jvp_on_a_transformer():
    torch.manual_seed(0)
    net = DiT(8, 3, ch=32, blocks=2, classes=4).double().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, c, y = torch.randn(2, 3, 8, 8).double(), torch.rand(2).double(), torch.tensor([1, 3])
    v = torch.randn_like(x), torch.randn_like(c)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        theirs = torch.func.jvp(lambda x, c: net(x, c, y), (x, c), v)
    ours = jvp(lambda x, c: net(x, c, y), (x, c), v)
    assert all((a - b).norm() < 1e-12 * b.norm() for a, b in zip(ours, theirs, strict=True))


def test_attention_looks_at_each_input():
    """Tangents in q, in k or in v alone; without any the fused kernel is taken, also inside a dual level."""
    q, k, v = torch.randn(3, 2, 1, 5, 4, dtype=torch.float64)
    soft = lambda q, k, v: torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) / 2).softmax(-1), v)
    for i in range(3):
        others = [q, k, v]
        put = lambda f, x: f(*others[:i], x, *others[i + 1:])
        for a, b in zip(jvp(lambda x: put(attention, x), (others[i],), (torch.ones_like(q),)),
                        torch.func.jvp(lambda x: put(soft, x), (others[i],), (torch.ones_like(q),))):
            assert torch.allclose(a, b, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        assert not dual(q, k, v) and dual(q, torch.autograd.forward_ad.make_dual(k, v))
    assert not dual(q)


def test_bfloat16_is_not_differentiated():
    """--bf16: the derivative is taken of float32 activations; the other calls stay bfloat16."""
    seen = []
    class Spy(torch.nn.Module):
        def forward(self, x, c, y=None):
            seen.append(x.dtype)
            return x * c.view(-1, 1, 1, 1).to(x.dtype)
    net = TrigFlow(Spy(), dtype=torch.bfloat16)
    x, t = torch.randn(2, 1, 2, 2), torch.rand(2, 1, 1, 1)
    for exact in (True, False):
        out, d = jvp(net.F, (x, t), (x, t), exact)
        assert net.F(x, t).dtype == out.dtype == d.dtype == torch.float32
        assert torch.allclose(d, 4 * x * t, atol=1e-3)    # F = (x / .5) t
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    with pytest.raises(ZeroDivisionError):
        jvp(lambda x: 1 / 0, (x,), (x,))
    assert net.F(x, t) is not None and seen[-1] == torch.bfloat16


def test_tangents_take_the_dtype_of_their_input():
    """A float64 tangent of a float32 input would silently make half the network float64."""
    x = torch.randn(3)
    for exact in (True, False):
        out, d = jvp(lambda x: x * x, (x,), (torch.ones(3, dtype=torch.float64),), exact)
        assert out.dtype == d.dtype == torch.float32 and torch.allclose(d, 2 * x, atol=1e-3)


def test_a_lost_tangent_is_an_error():
    for lose in (lambda x: x.detach(), lambda x: x.data * 2, lambda x: torch.from_numpy(x.numpy())):
        with pytest.raises((RuntimeError, NotImplementedError)):
            jvp(lose, (torch.randn(2),), (torch.ones(2),))


def test_precision_is_full_inside_and_restored_after():
    """TF32 has ten bits: it would drown a difference. Restored after an error, too, or every later product would be slow;
    in the exact derivative the caller's choice holds."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    seen = []
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        state = lambda: (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
        f = lambda x: seen.append(state()) or x * x
        jvp(f, (torch.ones(2),), (torch.ones(2),))
        assert set(seen) == {("high", True)}
        seen.clear()
        jvp(f, (torch.ones(2),), (torch.ones(2),), exact=False)
        with pytest.raises(ZeroDivisionError):
            jvp(lambda x: 1 / 0, (torch.ones(2),), (torch.ones(2),), exact=False)
        assert set(seen) == {("highest", False)} and state() == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_compiled_networks_are_passed_by_and_stay_compiled():
    """jvp of a compiled module falls back to eager for good, without a word."""
    runs = []
    def backend(graph, example):
        return lambda *a: runs.append(1) or graph.forward(*a)
    torch._dynamo.reset()
    net = random_net(size=8, mult=(1,), attn=(8,), classes=0).float()
    x, c = torch.randn(2, 3, 8, 8), torch.rand(2)
    want = jvp(net, (x, c), (x, c))
    net.compile(backend=backend)
    for n in (1, 2):
        assert torch.allclose(net(x, c), want[0], atol=1e-4) and len(runs) == n       # one graph, no break
        got = jvp(net, (x, c), (x, c))
        assert len(runs) == n and all(torch.equal(a, b) for a, b in zip(got, want))
    torch._dynamo.reset()


def test_layers_have_rules_of_their_own():
    """A rule that is off, in any family, or that loses the part of the tangent from another input: against torch.func,
    which differentiates the plain layers, in float64."""
    import common.unet
    for family, kw in (FAMILIES | dict(double=dict(norm="double"))).items():
        net = random_net(**kw)
        g = torch.Generator().manual_seed(0)
        size = net.kwargs["size"]
        x, v = (torch.randn(2, net.kwargs["channels"], size, size, generator=g).double() for _ in "ab")
        c, y = torch.rand(2, generator=g).double(), torch.zeros(2, dtype=torch.int64)
        with torch.no_grad():
            got = jvp(lambda x, c: net(x, c, y), (x, c), (v, torch.ones_like(c)))
            with pytest.MonkeyPatch.context() as mp:
                # contiguous: else torch 2.11 has no derivative of a group norm
                mp.setattr(common.unet, "along", lambda fn, derivative, x: fn(x.contiguous()))
                want = torch.func.jvp(lambda x, c: net(x, c, y), (x, c), (v, torch.ones_like(c)))
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(got, want)), family


def test_no_warning_of_a_layer_below(shell):
    """torch announces the end of torch.jit at each start of scm.py; nobody who reads it can do anything about it."""
    code = ("import torch, common.jvp as j; x = torch.ones(2, 2);"
            "print(j.jvp(lambda x: torch.nn.functional.layer_norm(x * x, (2,)), (x,), (x,))[1].shape)")
    assert shell("-W", "error::FutureWarning", "-c", code).stderr == ""


# ---- probe ---------------------------------------------------------------------------------------
class Detached(torch.nn.Module):
    """A network that ends in zeros, as ours start, and loses the tangent of x or t on the way there."""
    def __init__(self, lost=None):
        super().__init__()
        self.lost, self.a = lost, torch.nn.Parameter(torch.ones(1))
        self.end = torch.nn.Parameter(torch.zeros(1))

    def F(self, x, t, y=None):
        if self.lost == "x":
            x = x + (x.detach().sin() - x.detach()) * 0.9
        if self.lost == "t":
            t = t.detach()
        return self.end * (self.a * x).sin() * (1 + t) + 0 * t


@pytest.mark.parametrize("lost, words", [("x", "in x"), ("t", "in t")])
def test_probe_finds_what_zero_weights_hide(lost, words):
    """At the start all derivatives are exactly zero, the lost ones too: only perturbed weights tell."""
    torch.manual_seed(0)
    net, x, t = Detached(lost), torch.randn(2, 1, 4, 4), torch.rand(2, 1, 1, 1)
    assert not jvp(net.F, (x, t), (x, t))[1].any()
    with pytest.raises(RuntimeError, match=words):
        probe(net.F, (1, 4, 4), "cpu")
    probe(Detached().F, (1, 4, 4), "cpu")


@pytest.mark.parametrize("kw", ALL, ids=lambda kw: f"{kw.get('net', 'ddpmpp')}-{kw['norm']}")
@pytest.mark.parametrize("raw", ["trig", "edm"])
def test_probe_accepts_our_networks_and_leaves_them_alone(kw, raw):
    """Whatever the network computes in; the weights are not touched."""
    torch.manual_seed(0)
    net = TrigFlow(UNet(**dict(size=8, channels=1, ch=16, mult=(1, 2), blocks=1, attn=(4,), dropout=0.5) | kw), 0.75, raw)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for net.dtype in (torch.float32, torch.bfloat16):
        probe(net.F, (1, 8, 8), "cpu")
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_probe_accepts_steep_embeddings():
    """Fourier features of scale 16, as in EDM's NCSN++: a float32 difference is off by half, not the derivative."""
    for seed in range(3):
        torch.manual_seed(seed)
        probe(TrigFlow(UNet(8, 1, 32, (1, 2), 1, (4,), net="ncsnpp"), 0.75, "edm").F, (1, 8, 8), "cpu")


@pytest.mark.slow
def test_compiled_training_equals_eager():
    """Loss and gradient of sCM with the gradient pass through inductor; the derivative beside it stays what it was."""
    import scm
    out = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = TrigFlow(UNet(8, 1, ch=16, mult=(1, 2), blocks=1, attn=(4,), norm="double"))
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
        if compiled:
            net.model.compile()
        for it in range(2):
            torch.manual_seed(it)
            net.zero_grad()
            loss, _ = scm.loss_fn(net, None, torch.randn(4, 1, 8, 8), None, 5, scm.Args(H=5), lambda: None)
            loss.backward()
        out.append([loss.detach()] + [p.grad for p in net.parameters()])
    assert all((a - b).norm() < 1e-3 * a.norm() + 1e-6 for a, b in zip(*out))


@pytest.mark.parametrize("part", ["map_layer0", "qkv", "affine"])
def test_probe_finds_one_lost_layer(part):
    """The share of one layer among many is enough."""
    torch.manual_seed(0)
    net = TrigFlow(UNet(8, 1, ch=16, mult=(1, 2), blocks=1, attn=(8, 4), norm="double"))
    for name, layer in net.named_modules():
        if name.endswith(part):
            layer.register_forward_hook(lambda m, a, out: out.detach())
    with pytest.raises(RuntimeError, match="off by"):
        probe(net.F, (1, 8, 8), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_derivative_has_full_precision(dtype):
    """As a run sets it up, TF32 on: against float64 on the CPU. bfloat16 inside would be off by 3e-2 and more."""
    net = random_net(norm="double", classes=0)
    wide, narrow = TrigFlow(net, dtype=torch.float64), TrigFlow(random_net(norm="double", classes=0).float(), dtype=dtype)
    x, t, v = torch.randn(4, 3, 16, 16).double(), torch.rand(4, 1, 1, 1).double(), torch.randn(4, 3, 16, 16).double()
    want = jvp(wide.F, (x, t), (v, torch.ones_like(t)))
    narrow = narrow.to("cuda", memory_format=torch.channels_last)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        got = jvp(narrow.F, *[[a.float().cuda() for a in pair] for pair in ((x, t), (v, torch.ones_like(t)))])
    finally:
        torch.set_float32_matmul_precision(before)
    assert all((a.cpu() - b).norm() < 5e-3 * b.norm() for a, b in zip(got, want))
    probe(narrow.F, (3, 16, 16), "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_difference_suits_the_precision_of_the_network_not_of_its_inputs(dtype):
    """rcm's inputs are float64 and its network float32: a step for float64 would leave a third of the derivative."""
    net = TrigFlow(random_net(**FAMILIES["ddpmpp"]).to(dtype), dtype=dtype)
    g = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, net.model.kwargs["channels"], *[net.model.kwargs["size"]] * 2, generator=g).double() for _ in "ab")
    t = torch.full((2, 1, 1, 1), 0.9, dtype=torch.float64)
    y = torch.zeros(2, dtype=torch.int64)
    (_, d), (_, fd) = (jvp(lambda x, t: net.F(x, t, y), (x, t), (v, torch.ones_like(t)), exact) for exact in (True, False))
    assert (d - fd).norm() < (2e-3 if dtype == torch.float32 else 1e-7) * d.norm()
