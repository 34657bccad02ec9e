"""Longer checks, not part of the default run: python -m pytest -m slow, and -m gpu where there is a CUDA device."""
import pytest
import torch
from conftest import weights

import ect
from common import evaluate
from common.precond import EDM
from common.unet import UNet


def masks_agree(net, x0):
    """With r ~ t, all that can differ between the two calls is the dropout mask."""
    args = ect.Args(q=1e6, P_mean=0.0, P_std=0.3)
    _, stats = ect.loss_fn(net, x0, None, 0, args, lambda: torch.manual_seed(3))
    return float((stats["loss"] * stats["gap"] * stats["t"].flatten()).max() / x0[0].numel() ** 0.5) < 2e-3


def noisy_net(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    net = EDM(UNet(16, 3, ch=16, mult=(1, 2), blocks=1, attn=(8,), dropout=0.5), dtype=dtype)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net.to(device, memory_format=torch.channels_last)


@pytest.mark.slow
def test_digits_become_digits(train, monkeypatch):
    """A fifth of the default training already beats these bounds by far; noise has an FD above 20."""
    monkeypatch.setattr(evaluate, "FD_IMAGES", 1797)
    metrics, _ = train("ect", "--teacher", "train", "--teacher-iters", "400", "--iters", "200", "--save-every", "200",
                       tiny=["--device", "cpu", "--log-every", "100"])
    assert metrics["fd_pixels_teacher"] < 1.0 and metrics["fd_pixels_2step"] < 3.0
    assert metrics["fd_pixels_1step"] < 8.0


@pytest.mark.slow
def test_digits_become_digits_by_the_derivative(train, monkeypatch):
    """The same for sCM, distilling a short TrigFlow teacher."""
    monkeypatch.setattr(evaluate, "FD_IMAGES", 1797)
    metrics, _ = train("scm", "--teacher", "train", "--teacher-iters", "400", "--mode", "scd", "--lr", "5e-4", "--H", "50",
                       "--iters", "120", "--save-every", "120", tiny=["--device", "cpu", "--log-every", "40"])
    assert metrics["fd_pixels_teacher"] < 1.0 and metrics["fd_pixels_2step"] < 1.5
    assert metrics["fd_pixels_1step"] < 4.0


@pytest.mark.slow
def test_compiled_calls_share_the_dropout_mask():
    net, x0 = noisy_net(), torch.rand(4, 3, 16, 16) * 2 - 1
    net.compile()
    assert masks_agree(net, x0)
    assert "_orig_mod" not in "".join(net.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestGpu:
    def test_masks_agree_eager_compiled_and_bf16(self):
        x0 = torch.rand(4, 3, 16, 16, device="cuda") * 2 - 1
        for dtype in (torch.float32, torch.bfloat16):
            net = noisy_net("cuda", dtype)
            assert masks_agree(net, x0)
            net.compile()
            assert masks_agree(net, x0)

    def test_bf16_is_close_to_float32(self):
        x, t = torch.randn(4, 3, 16, 16, device="cuda"), torch.full((4, 1, 1, 1), 0.7, device="cuda")
        with torch.no_grad():
            a, b = (noisy_net("cuda", dtype).eval()(x, t) for dtype in (torch.float32, torch.bfloat16))
        assert b.dtype == torch.float32 and (a - b).norm() < 0.02 * a.norm()

    def test_training_and_resume(self, train):
        flags = ["--device", "cuda", "--bf16", "--dropout", "0.2", "--keep"]
        _, whole = train("ect", *flags)
        (whole / "ckpt-0000002.pt").replace(whole / "ckpt.pt")
        before = weights(whole, name="ckpt-0000004.pt")
        train("ect", "--resume", str(whole))
        after = weights(whole)
        assert all(torch.allclose(before[k], after[k], atol=1e-3) for k in before)
