"""DiT against the obvious way of writing it (tests/bench/obvious.py) and against what it promises."""
import pytest
import torch
import torch.nn.functional as F
from bench import obvious
from conftest import weights
from PIL import Image
from test_unet import inputs
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import dit, teacher
from common.dit import DiT
from common.precond import EDM
from common.flags import config_of
from common.unet import UNet

TINY = dict(size=8, channels=3, ch=128, blocks=2, classes=10)             # two heads
FLAGS = ("--net", "dit", "--ch", "16", "--blocks", "2")


def random_net(**kw):
    torch.manual_seed(0)
    net = DiT(**TINY | kw)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)                 # the initialisation hides all of the network
    return net.double().eval()


@pytest.mark.parametrize("kw", [dict(), dict(channels=1, ch=24, blocks=1, classes=0), dict(size=12, patch=3, ch=8),
                                dict(size=4, patch=1, ch=192)])
@torch.no_grad()
def test_equals_the_obvious_network(kw):
    """Catches, among others: a lost norm of q and k or one shared gain, the six parts in another order, a gain
    without its one, a missing gate, rows and columns exchanged, another GELU or eps, the label before the MLP of c."""
    net = random_net(**kw)
    x, c, y = inputs(net)
    p = dict(net.named_parameters())
    for y in (y, None) if net.classes else (None,):
        theirs = obvious.dit(p, x, c, y, net.patch)
        assert (net(x, c, y) - theirs).abs().max() < 1e-12 * theirs.abs().max()


@torch.no_grad()
def test_starts_as_zero_and_its_blocks_as_the_identity():
    torch.manual_seed(0)
    net = DiT(**TINY)
    x, c, y = torch.randn(3, 3, 8, 8), torch.linspace(-1, 1, 3), torch.arange(3)
    assert not net(x, c, y).any()
    h, c = torch.randn(3, 16, 128), torch.randn(3, 128)
    for block in net.blocks:
        assert torch.equal(block(h, c), h)
        assert block.qkv.weight.std() > 0.05 and block.proj.weight.any() and block.mlp1.weight.any()
    still = {k for k, p in net.named_parameters() if k.endswith("weight") and not p.any()}
    assert still == {"blocks.0.modulation.weight", "blocks.1.modulation.weight", "modulation.weight", "out.weight"}


def test_every_weight_gets_a_gradient():
    net, (x, c, y) = random_net(), inputs(random_net())
    net(x, c, y).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@torch.no_grad()
def test_attention_sees_normalised_queries_and_keys(monkeypatch):
    """q and k of root mean square 1 however large the weights, v as it is; by unet.attention, with heads of 64; the
    last axis has stride 1, or the fused kernels copy."""
    seen = []
    monkeypatch.setattr(dit, "attention", lambda q, k, v: seen.append((q, k, v)) or F.scaled_dot_product_attention(q, k, v))
    net = random_net()
    for block in net.blocks:
        block.qkv.weight *= 1e3
        block.q_norm.weight.fill_(1), block.k_norm.weight.fill_(1)
    net(*inputs(net))
    assert len(seen) == 2
    for q, k, v in seen:
        assert q.shape == k.shape == v.shape == (3, 2, 16, 64) and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert all(torch.allclose(u.square().mean(-1), torch.ones(3, 2, 16, dtype=u.dtype)) for u in (q, k))
        assert v.square().mean() > 100


@torch.no_grad()
def test_the_norm_of_q_and_k_is_computed_wide():
    """The gain, too, which is 1 in bfloat16."""
    x, norm = 30 * torch.randn(5, 64).bfloat16(), dit.RMSNorm(64)
    norm.weight.fill_(1.003)
    exact = (1.003 * x.double() / x.double().square().mean(-1, keepdim=True).sqrt()).bfloat16()
    assert norm(x).dtype == torch.bfloat16 and torch.equal(norm(x), exact)


@torch.no_grad()
def test_the_table_tells_places_apart(monkeypatch):
    """All are different, neighbours are more alike than strangers; and the network is not blind to a permutation."""
    e = dit.table(8, 64, torch.zeros(1))
    gap = torch.cdist(e, e) + 10 * torch.eye(64)
    assert e.shape == (64, 64) and gap.min() > 0.5 and gap[0, 1] < gap[0, 4] and gap[0, 8] < gap[0, 32]
    assert torch.equal(e[3, 32:], e[11, 32:]) and torch.equal(e[24, :32], e[27, :32])    # row-major: row, then column
    net = random_net()
    x, c, y = inputs(net)
    moved = net(x.roll((2, 2), (2, 3)), c, y).roll((-2, -2), (2, 3))
    assert (moved - net(x, c, y)).abs().max() > 1e-2
    monkeypatch.setattr(dit, "table", lambda n, width, like: torch.zeros(1, width, dtype=like.dtype))
    moved = net(x.roll((2, 2), (2, 3)), c, y).roll((-2, -2), (2, 3))
    assert torch.allclose(moved, net(x, c, y))            # nothing else tells


@torch.no_grad()
@pytest.mark.parametrize("size, patch", [(8, 2), (6, 3)])
def test_patches_come_back_to_their_place(monkeypatch, size, patch):
    """With no blocks and inverse maps at both ends, the network is the identity; transposed patches would not be."""
    k = 3 * patch**2
    net = DiT(size, 3, ch=32, blocks=0, patch=patch).double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    net.patches.weight.copy_(torch.eye(32, k))
    net.out.weight.copy_(torch.eye(k, 32))
    monkeypatch.setattr(dit, "modulate", lambda h, scale, shift: h - dit.table(size // patch, 32, h))
    assert torch.allclose(net(x, torch.zeros(2, dtype=torch.float64)), x)


@torch.no_grad()
def test_labels():
    """-1 and None are the same, for some images of a batch too; classes differ from it and from each other."""
    net = random_net()
    x, c, y = inputs(net)
    assert torch.equal(net(x, c, None), net(x, c, torch.full_like(y, -1)))
    mixed = net(x, c, torch.tensor([-1, 4, -1]))
    assert torch.allclose(mixed[[0, 2]], net(x, c)[[0, 2]]) and torch.allclose(mixed[1], net(x, c, y + 3)[1])
    same = x[:1].expand(10, -1, -1, -1)
    out = torch.cat([net(same, c[:1], torch.arange(10)), net(x[:1], c[:1])]).flatten(1)
    assert (torch.cdist(out, out) + torch.eye(11)).min() > 1e-3


@torch.no_grad()
def test_one_noise_level_serves_a_batch():
    net = random_net(classes=0)
    x, c, _ = inputs(net)
    assert torch.allclose(net(x, c[:1]), net(x, c[:1].expand(3))) and not torch.allclose(net(x, c[:1]), net(x, c))


@pytest.mark.parametrize("kw", [dict(), dict(classes=0, ch=64, blocks=3, channels=1), dict(patch=4, ch=24)])
def test_parameter_count(kw):
    net, k = random_net(**kw), TINY | dict(patch=2) | kw
    D, L, P = k["ch"], k["blocks"], k["channels"] * k["patch"] ** 2
    d, labels = D // max(1, D // 64), (k["classes"] + 1) * D if k["classes"] else 0
    block = 18 * D**2 + 15 * D + 2 * d                    # 6 modulation, 3 qkv, 1 proj, 8 MLP
    assert sum(p.numel() for p in net.parameters()) == L * block + 4 * D**2 + 5 * D + labels + 2 * P * D + P
    assert not list(net.buffers()) and {b.heads for b in net.blocks} == {max(1, D // 64)}


@torch.no_grad()
def test_bfloat16_stays_close_and_computes_c_wide():
    """c_noise in bfloat16 would be off by up to 4e-3."""
    net = random_net().float()
    x, c, y = inputs(net)
    x, c, seen = x.float(), c.float(), []
    a = net(x, c, y)
    for m in (net.modulation, net.blocks[0].modulation, net.map_layer0):
        m.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    half = net(x.bfloat16(), c, y)
    assert half.dtype == torch.bfloat16 and (half - a).norm() < 0.05 * a.norm()
    assert seen == [torch.float32] * 3 and {p.dtype for p in net.parameters()} == {torch.float32}
    last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), c, y)
    assert torch.allclose(a, last, atol=1e-5 * float(a.abs().max()))


@torch.no_grad()
def test_float32_weights_work_in_float64():
    """Under EDM(dtype=float64) nothing is rounded to float32: table, sines and norms included."""
    net = random_net()
    for p in net.parameters():
        p.copy_(p.float())
    x, c, y = inputs(net)
    expect = net(x, c, y)
    ours = net.float()(x, c, y)
    assert ours.dtype == torch.float64 and (ours - expect).abs().max() < 1e-13 * expect.abs().max()


def test_forward_derivative_is_a_difference_quotient():
    """In the image and in the noise level; a float32 or an in-place step would show."""
    net = random_net().requires_grad_(False)
    x, c, y = inputs(net, 2)
    dx, dc, h = torch.randn_like(x), torch.randn_like(c), 1e-6
    with sdpa_kernel(SDPBackend.MATH):
        for dx, dc in ((dx, dc), (0 * dx, dc)):
            _, dF = torch.func.jvp(lambda x, c: net(x, c, y), (x, c), (dx, dc))
            quotient = (net(x + h * dx, c + h * dc, y) - net(x - h * dx, c - h * dc, y)) / (2 * h)
            assert dF.norm() > 1e-3 and (dF - quotient).norm() < 1e-6 * quotient.norm()


@pytest.mark.slow
def test_compiles_as_one_graph():
    """A break of the graph or a read on the host is an error."""
    net = random_net(ch=16, blocks=1)
    whole = torch.compile(net, fullgraph=True)
    for y in (None, inputs(net)[2]):
        x, c, _ = inputs(net)
        ours, theirs = whole(x, c, y), net(x, c, y)
        assert torch.allclose(ours, theirs)
        for a, b in zip(*(torch.autograd.grad(f.square().sum(), net.blocks.parameters()) for f in (ours, theirs))):
            assert torch.allclose(a, b)


def test_dropout_follows_the_seed_and_stops_in_eval():
    net = random_net(dropout=0.5).train()
    x, c, y = inputs(net)
    out = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out.append(net(x, c, y))
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])
    assert torch.equal(net.eval()(x, c, y), net(x, c, y))


def test_fsdp_splits_its_blocks():
    """Run.place takes the modules whose class name ends so; else the whole network would be gathered at once."""
    blocks = [m for m in DiT(**TINY).modules() if type(m).__name__.endswith("Block")]
    assert len(blocks) == 2 and sum(p.numel() for b in blocks for p in b.parameters()) > 590_000


@pytest.mark.parametrize("kw", [dict(), dict(classes=0, patch=4, dropout=0.1, mult=(1, 2), attn=(4,))])
def test_kwargs_rebuild_the_network(kw):
    net = random_net(**kw)
    again = EDM(DiT(**net.kwargs)).double().eval()
    again.load_state_dict(EDM(net).state_dict())
    x, c, y = inputs(net)
    assert again.spec["net"] == "dit" and torch.equal(again.model(x, c, y), net(x, c, y))


def test_a_run_trains_resumes_and_loads(train):
    _, run = train("common.teacher", *FLAGS, "--cond", "--dropout", "0.1", "--steps", "2", "--lr", "1e-3")
    net = teacher.load(run)
    k = net.model.kwargs
    assert isinstance(net.model, DiT) and (k["net"], k["ch"], k["blocks"], k["patch"], k["classes"]) == ("dit", 16, 2, 2, 10)
    assert all(torch.equal(v, net.state_dict()[n]) for n, v in weights(run, "ema").items())
    x, t = torch.randn(4, 1, 8, 8), torch.full((4, 1, 1, 1), 0.5)
    assert net(x, t, torch.arange(4)).isfinite().all() and net.model(x, t.flatten()).any()
    before = weights(run)
    train("common.teacher", "--resume", str(run), "--iters", "5")
    assert teacher.load(run).spec == net.spec and not torch.equal(before["model.out.weight"], weights(run)["model.out.weight"])


def test_a_student_takes_a_dit_from_its_teacher(train, monkeypatch):
    """--net says ddpmpp by default; flags, checkpoint and weights follow the teacher, whose patch has no flag."""
    monkeypatch.setattr(teacher, "show", lambda *_: None)
    _, old = train("common.teacher", *FLAGS, "--steps", "2", "--iters", "2")
    _, new = train("ect", "--teacher", str(old), "--iters", "1", "--lr", "1e-12", "--dropout", "0.3")
    a, b = teacher.load(old), teacher.load(new)
    assert config_of(new)["net"] == "dit" and config_of(new)["ch"] == 16 and config_of(new)["blocks"] == 2
    assert b.model.kwargs == a.model.kwargs | dict(dropout=0.3)
    assert all(torch.allclose(v, b.state_dict()[k], atol=1e-8) for k, v in a.state_dict().items())


@pytest.mark.parametrize("flags, words", [(["--size", "7"], "take an even --size"), (["--ch", "200"], "divisible by 64"),
                                          (["--ch", "4"], "divisible by 64")])
def test_what_does_not_fit_is_one_line(train, capsys, tmp_path, flags, words):
    (tmp_path / "images").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "images/a.png")
    with pytest.raises(SystemExit) as e:
        train("ect", "--net", "dit", "--dataset", str(tmp_path / "images"), "--size", "8", *flags)
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_mult_and_attn_do_not_count(train):
    """6 x 6 pixels cannot be halved twice, which is no concern of a transformer; a U-Net still says so."""
    nets = [DiT(6, 1, ch=16, blocks=1, mult=m, attn=a) for m, a in (((), ()), ((2, 2, 2), (16,)))]
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()
    _, run = train("ect", *FLAGS, "--mult", "1,1,1,1,1", "--iters", "1")
    assert "model.blocks.1.qkv.weight" in weights(run)
    with pytest.raises(ValueError, match="halved 2 times"):
        UNet(6, 1, mult=(2, 2, 2))
