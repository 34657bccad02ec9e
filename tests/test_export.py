"""Weights for other programs: python -m common.export."""
import json
import sys

import pytest
import torch
from conftest import weights

from common import export, teacher
from common.dit import DiT
from common.precond import EDM, TrigFlow
from common.unet import UNet

SIZE = dict(size=16, channels=3, classes=10)


def saved(folder, net):
    """A run folder with this network as its average."""
    folder.mkdir()
    state = {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(i))
             for i, (k, v) in enumerate(net.state_dict().items())}
    torch.save(dict(it=1, config={}, model=net.spec, ema=state, net=net.state_dict()), folder / "ckpt.pt")
    return folder


def names(block, *more):
    return [f"{block}.{layer}.{kind}" for layer in ("norm0", "conv0", "affine", "norm1", "conv1", *more)
            for kind in ("weight", "bias")]


def edm_names():
    """The names in EDM's own DDPM++ of 16x16 pixels, two resolutions, one block each, attention at 8x8, 10 classes;
    written down from the architecture (EDM, arXiv:2206.00364, App. F.3, and the layers' names in its checkpoints)."""
    both, attention = ("weight", "bias"), ("norm2", "qkv", "proj")
    found = [f"map_{m}.{kind}" for m in ("label", "layer0", "layer1") for kind in both]
    found += [f"enc.16x16_conv.{kind}" for kind in both] + names("enc.16x16_block0")
    found += names("enc.8x8_down", "skip") + ["enc.8x8_down.conv0.resample_filter", "enc.8x8_down.skip.resample_filter"]
    found += names("enc.8x8_block0", "skip", *attention)
    found += names("dec.8x8_in0", *attention) + names("dec.8x8_in1")
    found += names("dec.8x8_block0", "skip") + names("dec.8x8_block1", "skip", *attention)
    found += names("dec.16x16_up", "skip") + ["dec.16x16_up.conv0.resample_filter", "dec.16x16_up.skip.resample_filter"]
    found += names("dec.16x16_block0", "skip") + names("dec.16x16_block1", "skip")
    found += [f"dec.16x16_aux_{layer}.{kind}" for layer in ("norm", "conv") for kind in both]
    return {f"model.{name}" for name in found}


def test_pt_has_edms_names(tmp_path):
    """A name of ours that EDM's network does not know; weights in another memory layout; raw in place of averaged."""
    run = saved(tmp_path / "run", EDM(UNet(**SIZE, ch=32, mult=(1, 2), blocks=1, attn=(8,), net="ddpmpp")))
    out = export.main([str(run), str(tmp_path / "x.pt")])
    got = torch.load(out, weights_only=True)
    assert got.keys() == edm_names()
    assert all(torch.equal(v, weights(run, "ema")[k]) and v.is_contiguous() for k, v in got.items())


@pytest.mark.parametrize("net", [EDM(UNet(**SIZE, ch=32, mult=(1, 2), blocks=1, attn=(8,), net="ncsnpp"), 0.7, 0.002),
                                 TrigFlow(UNet(**SIZE, ch=32, mult=(1,), blocks=1, attn=(), norm="double"), 0.4),
                                 TrigFlow(DiT(**SIZE, ch=32, blocks=2), raw="edm")], ids=["ncsnpp", "trigflow", "dit"])
def test_safetensors_come_back_to_the_bit(tmp_path, net):
    """A float16 copy; sd, t_min or the flow forgotten."""
    pytest.importorskip("safetensors")
    run = saved(tmp_path / "run", net)
    out = export.main([str(run), str(tmp_path / "x.safetensors")])
    back, own = teacher.load(out), teacher.load(run)
    assert back.spec == own.spec == net.spec
    assert all(torch.equal(v, own.state_dict()[k]) for k, v in back.state_dict().items())
    x, t, y = torch.randn(2, 3, 16, 16), torch.full((2, 1, 1, 1), 0.5), torch.tensor([1, 2])
    assert torch.equal(back(x, t, y), own(x, t, y))
    from safetensors import safe_open
    with safe_open(out, "pt") as f:
        assert json.loads(f.metadata()["model"])["flow"] == net.spec["flow"]
        assert all(f.get_tensor(k).dtype == torch.float32 for k in f.keys())


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    """A .pt that EDM's network cannot take; a file left behind; a traceback without the package."""
    run = saved(tmp_path / "run", TrigFlow(UNet(**SIZE, ch=32, mult=(1,), blocks=1, attn=())))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for out, words in (("x.pt", "none of EDM's networks"), ("x.onnx", "name a .safetensors or a .pt"),
                       ("x.safetensors", "pip install safetensors"), ("none/x.safetensors", "cannot be written"),
                       ("none/x.pt", "cannot be written"), ("run/ckpt.pt/x.pt", "cannot be written")):
        with pytest.raises(SystemExit) as e:
            export.main([str(run), str(tmp_path / out)])
        assert e.value.code == 2 and words in capsys.readouterr().err
    (run / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as e:
        export.main([str(run), str(run / "ckpt.pt")])
    assert e.value.code == 2 and "is a run folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        export.main([str(tmp_path / "missing"), str(tmp_path / "x.pt")])
    assert e.value.code == 2 and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_damaged_safetensors_is_refused(tmp_path, capsys):
    pytest.importorskip("safetensors")
    run = saved(tmp_path / "run", EDM(UNet(**SIZE, ch=32, mult=(1,), blocks=1, attn=())))
    out = export.main([str(run), str(tmp_path / "x.safetensors")])
    data = out.read_bytes()
    for broken in (data[:-100], data.replace(b'\\"blocks\\": 1', b'\\"blocks\\": 9'), b""):
        out.write_bytes(broken)
        with pytest.raises(SystemExit) as e:
            teacher.load(out)
        assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
