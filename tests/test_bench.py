"""The scripts of tests/bench that are needed where nobody can mend them: on a GPU that is lent for minutes."""
import json

import pytest
import torch
from bench import gpu, precision

from common.precond import EDM, TrigFlow
from common.unet import UNet


@pytest.mark.parametrize("parts", [",".join(p for p in gpu.PARTS if p not in ("compiled", "gpu_tests")),
                                   pytest.param("compiled,gpu_tests", marks=pytest.mark.slow)])
def test_every_part_runs_without_a_gpu(parts, tmp_path):
    """A part that has a mistake: seen after its minutes on a GPU are spent."""
    rows = gpu.main(["--out", str(tmp_path), "--device", "cpu", "--smoke", "--minutes", "30", "--parts", parts])
    assert not [r for r in rows if "error" in r]
    assert list(dict.fromkeys(r["part"] for r in rows)) == parts.split(",")
    assert json.loads((tmp_path / "gpu.json").read_text()) == rows
    assert all(f"## {part}\n" in (tmp_path / "gpu.md").read_text() for part in parts.split(","))


def test_a_row_that_fails_and_a_time_that_is_over(tmp_path, monkeypatch):
    """One mistake that costs all that comes after it; a call that runs into the limit with nothing written."""
    def part(b):
        yield "first", lambda: dict(value=1)
        yield "bad", lambda: 1 / 0
        yield "refused", lambda: b.main("ect", "--iters", "0")
        yield "last", lambda: dict(value=b.ends and setattr(b, "ends", 0) or 2)
        yield "too late", lambda: dict(value=3)
    monkeypatch.setattr(gpu, "PARTS", dict(a=part, b=part))
    rows = gpu.main(["--out", str(tmp_path), "--device", "cpu", "--smoke"])
    assert [r["name"] for r in rows] == ["first", "bad", "refused", "last"]
    assert "ZeroDivisionError" in rows[1]["error"] and "--iters" in rows[2]["error"] and rows[3]["value"] == 2
    assert len(json.loads((tmp_path / "gpu.json").read_text())) == 4


def test_ten_bits():
    """Truncation, nine bits or eleven, halves rounded up."""
    x = torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20, -1 - 2**-12, 3e-39, 0.0])
    want = torch.tensor([1 + 2**-10, 1, 1 + 2**-9, 1 + 2**-10, -1, 3e-39, 0.0])
    assert torch.equal(precision.ten_bits(x)[:5], want[:5]) and precision.ten_bits(x)[6] == 0


@pytest.mark.parametrize("wrap", [EDM, TrigFlow])
def test_precisions_come_in_their_order(wrap):
    """A network that computes in another precision than the row says, or in that of the row before."""
    torch.manual_seed(0)
    net = wrap(UNet(8, 1, ch=16, mult=(1,), blocks=1, attn=())).eval().requires_grad_(False)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    a = type("a", (), dict(q=256.0, N=0))
    x0, eps = torch.rand(8, 1, 8, 8).double() * 2 - 1, torch.randn(8, 1, 8, 8).double()
    out = {}
    for name in ("float64", *precision.PRECISIONS):
        with precision.computing(net, name) as here:
            out[name] = precision.quantity(here, x0, None, eps, 1.0, a)
    off = {k: float((v - out["float64"]).norm() / out["float64"].norm()) for k, v in out.items()}
    assert 0 < off["float32"] < 0.1 * off["TF32"], off
    if wrap is EDM:                                       # a derivative is taken in float32 in any case
        assert off["TF32"] < off["bfloat16"] and 2 * off["float16"] < off["bfloat16"], off
    assert net.dtype == torch.float32 and torch.equal(net.model.enc["8x8_conv"].weight, net.model.enc["8x8_conv"].weight.float())


def test_the_lower_level():
    """r of another schedule than the one that is named."""
    a = type("a", (), dict(q=256.0, N=0))
    assert precision.lower(20.0, a) == pytest.approx(20 * (1 - 1 / 256), rel=1e-6)
    assert precision.lower(1e-3, a) == pytest.approx(1e-3 * (1 - 5 / 256), rel=1e-3)
    import ict
    grid = ict.karras(1281, ict.Args())
    a.N = 1281
    assert precision.lower(float(grid[700]), a) == pytest.approx(float(grid[699]), rel=1e-9)
