"""The network against the obvious way of writing it (tests/bench/obvious.py) and against known counts."""
import pytest
import torch
from bench import obvious

from common import unet
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
        theirs = obvious.unet(dict(net.named_parameters()), x, c, one if net.classes else None)
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("kw", [dict(), dict(mult=(1, 2, 2), blocks=2, attn=(16, 4)), dict(classes=0), dict(attn=())])
def test_equals_the_obvious_network(kw):
    assert agree(random_net(**kw)) < 1e-12


def test_no_label_equals_a_zero_row_and_minus_one():
    net = random_net()
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


@torch.no_grad()
def test_bfloat16_and_channels_last_change_little():
    net = random_net().float()
    x, c, y = (v.float() if v.is_floating_point() else v for v in inputs(net))
    a = net(x, c, y)
    last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), c, y)
    assert torch.allclose(a, last, atol=1e-4 * float(a.abs().max()))
    half = net(x.bfloat16(), c, y)
    assert half.dtype == torch.bfloat16 and (half - a).norm() < 0.05 * a.norm()


def test_attention_is_softmax_of_scaled_products():
    q, k, v = torch.randn(3, 2, 1, 5, 4, dtype=torch.float64)
    w = (torch.einsum("bhid,bhjd->bhij", q, k) / 2).softmax(-1)
    assert torch.allclose(unet.attention(q, k, v), torch.einsum("bhij,bhjd->bhid", w, v))
