"""The networks against the obvious way of writing them (tests/bench/obvious.py) and against known counts."""
import itertools

import pytest
import torch
from bench import obvious
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import unet
from common.dit import DiT
from common.precond import EDM, TrigFlow
from common.unet import UNet


def random_net(**kw):
    torch.manual_seed(0)
    net = UNet(**(dict(size=16, channels=3, ch=16, mult=(1, 2), blocks=1, attn=(8,), classes=10) | kw))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)                 # the initialisation hides most of the network
    return net.double().eval()


def inputs(net, n=3):
    k = net.kwargs
    x = torch.randn(n, k["channels"], k["size"], k["size"], dtype=torch.float64)
    return x, torch.linspace(-1.5, 1.1, n, dtype=torch.float64), torch.arange(n) % 10


def agree(net, onehot=True):
    x, c, y = inputs(net)
    with torch.no_grad():
        ours = net(x, c, y if onehot else None)
        one = torch.eye(10, dtype=torch.float64)[y] if onehot else torch.zeros(len(x), 10, dtype=torch.float64)
        p, one = dict(net.named_parameters()), one if net.classes else None
        if net.net == "ncsnpp":
            theirs = obvious.ncsnpp(p, net.map_noise.freqs, x, c, one)
        else:
            theirs = dict(ddpmpp=obvious.unet, adm=obvious.adm)[net.net](p, x, c, one)
    return float((ours - theirs).abs().max() / theirs.abs().max())


FAMILIES = dict(ddpmpp=dict(), ncsnpp=dict(net="ncsnpp", fourier=1.0), adm=dict(net="adm", ch=32, mult=(1, 4)))
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("kw", [dict(), dict(mult=(1, 2, 2), blocks=2, attn=(16, 4)), dict(classes=0), dict(attn=())])
def test_equals_the_obvious_network(kw):
    assert agree(random_net(**kw)) < 1e-12


@pytest.mark.parametrize("kw", [
    dict(net="ncsnpp"), dict(net="ncsnpp", mult=(1, 2, 2), blocks=2, attn=(16, 4)), dict(net="ncsnpp", classes=0),
    dict(net="adm", ch=32, mult=(1, 4)), dict(net="adm", ch=32, mult=(2, 4, 6), blocks=2, attn=(16, 4), classes=0)])
def test_equals_the_other_obvious_networks(kw):
    """Catches, among others: a filter that is not normalised or too weak going up, the image's path kept beside the
    skip it replaces, a lost root of two; scale without its one, scale and shift exchanged, one head for all, another
    eps, sine and cosine exchanged, the label before the second layer."""
    kw = dict(fourier=1.0) | kw
    assert agree(random_net(**kw)) < 1e-12


@families
def test_no_label_equals_a_zero_row_and_minus_one(family):
    net = random_net(**FAMILIES[family])
    assert agree(net, onehot=False) < 1e-12
    x, c, y = inputs(net)
    assert torch.equal(net(x, c, None), net(x, c, torch.full_like(y, -1)))


def test_a_wrong_qkv_interleave_is_seen(monkeypatch):
    """The comparison above can fail: reading q, k, v as three blocks of channels changes the result."""
    net = random_net()
    for m in net.modules():
        if getattr(m, "qkv", None) is not None:
            w = m.qkv.weight.data
            m.qkv.weight.data = w.view(-1, 3, *w.shape[1:]).transpose(0, 1).reshape(w.shape).clone()
    p = {k: v for k, v in random_net().named_parameters()}
    x, c, y = inputs(net)
    one = torch.eye(10, dtype=torch.float64)[y]
    assert (net(x, c, y) - obvious.unet(p, x, c, one)).abs().max() > 1e-3


def test_embedding_is_sine_then_cosine_with_both_end_points():
    """Catches the swap of sine and cosine, and frequencies that stop short of 1/10000."""
    net = UNet(8, 1, ch=8, mult=(1,), blocks=1, attn=())
    seen = []
    net.map_layer0.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    net(torch.zeros(1, 1, 8, 8), torch.tensor([0.3]))
    a = torch.tensor([0.3 * 10000 ** (-j / 3) for j in range(4)])
    assert torch.allclose(seen[0][0], torch.cat([a.sin(), a.cos()]), atol=1e-7)
    assert torch.allclose(a[-1], torch.tensor(0.3e-4))


@torch.no_grad()
def test_smooth_resampling_is_the_filter_1331():
    """Each axis of an image by its matrix: zeros outside, weights that sum to 1 inside, the bias untouched."""
    down = torch.tensor([[3, 3, 1, 0, 0, 0], [0, 1, 3, 3, 1, 0], [0, 0, 0, 1, 3, 3]]) / 8
    up = 2 * down.T
    x = torch.randn(2, 4, 6, 6)
    layer = unet.Conv2d(4, 4, 0, down=True, taps=(1, 3, 3, 1))
    assert torch.allclose(layer(x), down @ x @ down.T, atol=1e-6) and not list(layer.parameters())
    layer = unet.Conv2d(4, 4, 0, up=True, taps=(1, 3, 3, 1))
    assert torch.allclose(layer(x[:, :, :3, :3]), up @ x[:, :, :3, :3] @ up.T, atol=1e-6)
    layer = unet.Conv2d(4, 4, 3, down=True, taps=(1, 3, 3, 1), fused=True)
    layer.weight.copy_(torch.eye(4)[:, :, None, None] * torch.tensor([0., 1, 0]).outer(torch.tensor([0., 1, 0])))
    layer.bias.fill_(0.5)
    assert torch.allclose(layer(x), down @ x @ down.T + 0.5, atol=1e-6)


RELEASED = [  # classes, network, parameters without map_augment, tensors of them, buffers
    (0, dict(size=32), 55_732_739, 416, 8), (10, dict(size=32), 55_734_147, 418, 8),
    (0, dict(size=32, net="ncsnpp"), 56_397_827 - 2_304, 420, 11),
    (10, dict(size=32, net="ncsnpp"), 56_400_643 - 2_304, 422, 11),
    (0, dict(size=64, mult=(1, 2, 2, 2)), 61_805_571 - 1_152, 540, 12),
    (0, dict(size=64, mult=(1, 2, 2, 2), net="ncsnpp"), 62_761_091 - 2_304, 546, 16),
    (1000, dict(size=64, ch=192, mult=(1, 2, 3, 4), blocks=3, attn=(32, 16, 8), net="adm"), 295_899_267, 541, 12)]


@pytest.mark.parametrize("classes, kw, params, tensors, buffers", RELEASED)
def test_counts_of_the_released_networks(classes, kw, params, tensors, buffers):
    """Catches attention or an image path too many or too few, and heads of the wrong width."""
    with torch.device("meta"):
        net = UNet(channels=3, classes=classes, **kw)
    ours = list(net.parameters())
    assert (sum(p.numel() for p in ours), len(ours), len(list(net.buffers()))) == (params, tensors, buffers)
    assert len(net.state_dict()) == tensors + buffers
    heads = {m.qkv.weight.shape[1]: m.heads for m in net.modules() if isinstance(m, unet.UNetBlock) and m.qkv}
    assert heads == ({384: 6, 576: 9, 768: 12} if net.net == "adm" else {256: 1})


def test_names_of_the_other_released_networks():
    with torch.device("meta"):
        ve = UNet(32, 3, classes=10, net="ncsnpp").state_dict()
        adm = UNet(64, 3, 192, (1, 2, 3, 4), 3, (32, 16, 8), 1000, net="adm").state_dict()
    shapes = {"map_noise.freqs": (128,), "map_layer0.weight": (512, 256), "map_label.weight": (256, 10),
              "enc.16x16_aux_residual.weight": (256, 3, 3, 3), "enc.8x8_aux_residual.weight": (256, 256, 3, 3),
              "enc.8x8_aux_residual.resample_filter": (1, 1, 4, 4), "dec.32x32_up.skip.resample_filter": (1, 1, 4, 4)}
    assert {k: tuple(ve[k].shape) for k in shapes} == shapes
    shapes = {"map_label.weight": (768, 1000), "enc.64x64_conv.weight": (192, 3, 3, 3), "out_conv.bias": (3,),
              "enc.32x32_down.skip.resample_filter": (1, 1, 2, 2), "enc.32x32_block0.affine.weight": (768, 768),
              "dec.32x32_block0.qkv.weight": (1152, 384, 1, 1), "out_norm.weight": (192,)}
    assert {k: tuple(adm[k].shape) for k in shapes} == shapes
    assert not {"map_label.bias", "enc.32x32_down.skip.weight", "enc.32x32_down.qkv.weight",
                "dec.64x64_aux_norm.weight", "dec.32x32_up.skip.weight", "dec.8x8_in1.qkv.weight",
                "enc.64x64_block0.qkv.weight", "dec.64x64_block0.qkv.weight"} & set(adm)
    first = {net: UNet(8, 3, 64, (2,), 1, (), net=net).enc["8x8_conv"].weight.shape[0] for net in FAMILIES}
    assert first == dict(ddpmpp=64, ncsnpp=64, adm=128)   # ADM's first convolution has the width of its blocks


def test_adm_starts_as_its_authors_say():
    """Uniform up to 1/sqrt(fan_in), biases too; exactly zero where a block ends; standard normal labels."""
    torch.manual_seed(0)
    net = UNet(16, 3, ch=64, mult=(1, 2), blocks=1, attn=(8,), classes=100, net="adm")
    for name, p in net.named_parameters():
        owner, part = name.split(".")[-2:]
        fan_in = net.get_submodule(name.rsplit(".", 1)[0]).weight[0].numel()
        if owner.startswith(("norm", "out_norm")):
            assert torch.equal(p, torch.full_like(p, part == "weight"))
        elif owner in ("conv1", "proj", "out_conv"):
            assert not p.any()
        elif owner == "map_label":
            assert abs(p.std() - 1) < 0.02 and p.abs().max() > 3
        else:
            assert 0.8 * fan_in**-0.5 < p.abs().max() <= fan_in**-0.5 and abs(p.mean()) < 0.25 * p.std()
    x = torch.randn(2, 3, 16, 16)
    assert not net(x, torch.zeros(2)).any()


def test_ncsnpp_starts_with_its_scale_and_reads_its_frequencies():
    """EDM draws the frequencies with scale 16, iCT with 0.02; they are no parameter, and loading replaces them."""
    torch.manual_seed(0)
    a, b = (UNet(8, 1, ch=256, mult=(1,), blocks=1, attn=(), net="ncsnpp", **kw) for kw in (dict(), dict(fourier=0.02)))
    assert abs(a.map_noise.freqs.std() / 16 - 1) < 0.2 and abs(b.map_noise.freqs.std() / 0.02 - 1) < 0.2
    assert b.kwargs["fourier"] == 0.02 and not [k for k, _ in a.named_parameters() if "map_noise" in k]
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.map_noise.freqs, b.map_noise.freqs)


@pytest.mark.parametrize("kw, words", [
    (dict(net="adm", ch=32, mult=(1, 2)), "heads of 64"), (dict(net="adm", ch=224), "heads of 64"),
    (dict(ch=132), "divisible by 32"), (dict(net="ncsnpp", ch=132), "divisible by 32")])
def test_widths_that_do_not_fit_are_refused(kw, words):
    """The authors' code leaves attention out where a width has no head of 64 channels, and says nothing."""
    with pytest.raises(ValueError, match=words):
        UNet(**dict(size=16, channels=3, mult=(1,), blocks=1, attn=(16,)) | kw)


@families
def test_kwargs_rebuild_the_network(family):
    net = random_net(**FAMILIES[family])
    assert UNet(**net.kwargs).state_dict().keys() == net.state_dict().keys()
    old = {k: v for k, v in random_net().kwargs.items() if k not in ("net", "fourier")}     # of an older checkpoint
    assert UNet(**old).kwargs == random_net().kwargs


@families
def test_forward_derivative_is_a_difference_quotient(family):
    """The methods that differentiate the network need it; an operation in place would lose the tangent."""
    net = random_net(**FAMILIES[family]).requires_grad_(False)
    x, c, y = inputs(net, 2)
    dx, dc, h = torch.randn_like(x), torch.randn_like(c), 1e-6
    with sdpa_kernel(SDPBackend.MATH):
        _, dF = torch.func.jvp(lambda x, c: net(x, c, y), (x, c), (dx, dc))
        quotient = (net(x + h * dx, c + h * dc, y) - net(x - h * dx, c - h * dc, y)) / (2 * h)
    assert (dF - quotient).norm() < 1e-6 * quotient.norm()


def test_cifar10_network_has_the_names_and_counts_of_the_released_one():
    for classes, params, keys in ((0, 55_732_739, 424), (10, 55_732_739 + 1_408, 426)):
        net = UNet(32, 3, classes=classes)
        assert sum(p.numel() for p in net.parameters()) == params and len(net.state_dict()) == keys
        assert sum(1 for _ in net.buffers()) == 8
    names = set(net.state_dict())
    assert {"map_label.weight", "map_layer1.bias", "enc.32x32_conv.weight", "enc.16x16_down.skip.resample_filter",
            "enc.16x16_block3.qkv.weight", "dec.8x8_in0.proj.bias", "dec.16x16_up.conv0.resample_filter",
            "dec.16x16_block4.norm2.weight", "dec.32x32_block4.skip.weight", "dec.32x32_aux_conv.bias"} <= names
    assert "enc.8x8_block0.qkv.weight" not in names and "dec.16x16_block3.qkv.weight" not in names
    assert net.dec["32x32_block4"].conv0.weight.shape == (256, 384, 3, 3)


def test_starts_as_almost_zero():
    """Catches a lost 1e-5 gain: at the start D(x) must be about c_skip * x."""
    torch.manual_seed(0)
    net = UNet(16, 3, ch=32, mult=(1, 2), blocks=1, attn=(8,))
    assert net(torch.randn(2, 3, 16, 16), torch.zeros(2)).abs().max() < 1e-3


def test_blocks_start_as_their_skip():
    """Catches a lost 1e-5 gain inside a block: deep stacks would then start as noise."""
    torch.manual_seed(0)
    for block in [m for m in UNet(16, 3, ch=16, mult=(1,), blocks=1, attn=(16,)).modules() if isinstance(m, unet.UNetBlock)]:
        x, emb = torch.randn(2, block.norm0.weight.numel(), 16, 16), torch.randn(2, 64)
        start = (block.skip(x) if block.skip else x) * 0.5**0.5
        assert torch.allclose(block(x, emb), start * 0.5**0.5 if block.qkv else start, atol=1e-3)


def test_dropout_follows_the_seed_and_stops_in_eval():
    net = random_net(dropout=0.5).train()
    x, c, y = inputs(net)
    out = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out.append(net(x, c, y))
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])
    assert torch.equal(net.eval()(x, c, y), net(x, c, y))


@families
@torch.no_grad()
def test_bfloat16_and_channels_last_change_little(family):
    net = random_net(**FAMILIES[family]).float()
    x, c, y = (v.float() if v.is_floating_point() else v for v in inputs(net))
    a = net(x, c, y)
    last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), c, y)
    assert torch.allclose(a, last, atol=1e-4 * float(a.abs().max()))
    half = net(x.bfloat16(), c, y)
    assert half.dtype == torch.bfloat16 and (half - a).norm() < 0.05 * a.norm()

@pytest.mark.parametrize("net", ["ddpmpp", "ncsnpp", "adm", "dit"])
@pytest.mark.parametrize("small", [pytest.param(1.0, marks=pytest.mark.slow), 0.01])
def test_float16_keeps_gradients_and_float32_weights(net, small):
    """A cast past `cast`: the gradient of a layer is 16 times too large or too small. With `small`: gradients that
    float16 cannot hold vanish, where they are not kept larger."""
    model = DiT(8, 3, ch=64, blocks=2, classes=10) if net == "dit" else random_net(net=net, ch=64).float()
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    grads = []
    for wrap, dtype in itertools.product((EDM, TrigFlow), (torch.float32, torch.float16)):
        f, k = wrap(model, dtype=dtype), model.kwargs
        x = torch.randn(4, 3, k["size"], k["size"], generator=torch.Generator().manual_seed(0)).requires_grad_()
        model.zero_grad()
        out = f(x, torch.full((4, 1, 1, 1), 0.7), torch.arange(4))
        assert out.dtype == torch.float32
        (small * out.square().sum()).backward()
        grads.append({k: p.grad / small for k, p in model.named_parameters()} | dict(x=x.grad / small))
        grads[-1] |= {f"{k}, q": g[:len(g) // 3] for k, g in grads[-1].items() if k.endswith("qkv.weight") and small == 1}
    for full, half in (grads[:2], grads[2:]):
        assert all(p.dtype == torch.float32 for p in half.values())
        off = {k: float((half[k] - g).norm() / g.norm()) for k, g in full.items() if g.norm() > 0}
        assert len(off) > 20 and max(off.values()) < (0.01 if small == 1 else 0.03), sorted(off.items(), key=lambda i: -i[1])[:3]


# ---- adaptive double normalisation ---------------------------------------------------------------
@families
def test_double_normalisation_is_its_formula(family):
    """norm(h) * pnorm(s) + pnorm(b), in the place of + p or * (1 + s) + b, and nothing else: no 1 +, each part over its
    own channels, s first."""
    net = random_net(**FAMILIES[family], norm="double")
    block = next(m for m in net.modules() if isinstance(m, unet.UNetBlock))
    seen = {}
    block.norm1.register_forward_hook(lambda m, a, out: seen.update(norm1=out))
    block.affine.register_forward_hook(lambda m, a, out: seen.update(affine=out))
    block.conv1.register_forward_pre_hook(lambda m, a: seen.update(h=a[0]))
    block.conv0.register_forward_hook(lambda m, a, out: seen.update(conv0=out))
    block.norm1.register_forward_pre_hook(lambda m, a: seen.update(into=a[0]))
    net(*inputs(net))
    s, b = (v / v.square().mean(1, keepdim=True).sqrt() for v in seen["affine"].chunk(2, 1))
    h = torch.nn.functional.silu(seen["norm1"] * s[:, :, None, None] + b[:, :, None, None])
    assert torch.allclose(seen["h"], h, atol=1e-6) and torch.equal(seen["into"], seen["conv0"])
    assert agree(random_net(**FAMILIES[family])) < 1e-12                  # and without it nothing has changed


@families
def test_double_normalisation_is_bounded_and_starts_smooth(family):
    """However far the layer above grows; at the start neither part turns fast with the noise level."""
    torch.manual_seed(0)
    net = UNet(**dict(size=8, channels=1, ch=32, mult=(1, 2), blocks=1, attn=(4,)) | FAMILIES[family], norm="double")
    layer = next(m for m in net.modules() if isinstance(m, unet.UNetBlock)).affine
    emb = net.embed(torch.linspace(0, 1.57, 200), None)
    for part in layer(emb).chunk(2, 1):
        p, grown = unet.pnorm(part), unet.pnorm(100 * part)
        assert torch.allclose(p.square().mean(1), torch.ones(200), atol=1e-4) and torch.allclose(p, grown, atol=1e-3)
        assert (p.diff(dim=0) / (1.57 / 199)).square().mean().sqrt() < 1.5
    assert abs(layer(emb).chunk(2, 1)[0].mean() - 1) < 0.3
    assert net(torch.randn(2, 1, 8, 8), torch.zeros(2)).abs().max() < 1e-3
    assert UNet(**net.kwargs).kwargs["norm"] == "double"


def test_attention_is_softmax_of_scaled_products():
    q, k, v = torch.randn(3, 2, 1, 5, 4, dtype=torch.float64)
    w = (torch.einsum("bhid,bhjd->bhij", q, k) / 2).softmax(-1)
    assert torch.allclose(unet.attention(q, k, v), torch.einsum("bhij,bhjd->bhid", w, v))
