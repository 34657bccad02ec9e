"""--teacher: what is found, trained or refused; and reading checkpoints of EDM's format without executing them."""
import io
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from conftest import equal

from common import teacher
from common.precond import EDM
from common.unet import UNet


# ---- files in EDM's format -----------------------------------------------------------------------
class Persistent:
    """An object pickled the way EDM's `persistence` decorator does it: class name, attributes, source text."""
    def __init__(self, name, state):
        self.name, self.state = name, state

    def __reduce__(self):
        source = 'raise RuntimeError("the source in a checkpoint must never run")'
        rebuild = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        return rebuild, (dict(type="class", version=6, module_src=source, class_name=self.name, state=self.state),)


def persistent(module):
    """A torch module as such objects; ModuleDicts stay what they are, as in EDM's networks."""
    state = dict(training=False, _parameters=dict(module._parameters), _buffers=dict(module._buffers, unused=None),
                 _non_persistent_buffers_set=set(), skip_scale=np.float64(np.sqrt(0.5)),
                 _modules={k: persistent(m) for k, m in module._modules.items() if m is not None})
    if isinstance(module, torch.nn.ModuleDict):
        copy = torch.nn.ModuleDict()
        copy.__dict__["_modules"] = state["_modules"]
        return copy
    return Persistent(type(module).__name__, state)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write {"ema": an EDM network, ..} in that format; return the path."""
    module = types.ModuleType("torch_utils.persistence")
    exec("def _reconstruct_persistent_obj(meta): pass", module.__dict__)
    module._reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)

    def go(net, name="EDMPrecond", sigma_min=0.0, extra=None, change=lambda state: None):
        outer = persistent(net)
        outer.name = name
        outer.state |= dict(sigma_min=sigma_min, sigma_max=float("inf"), sigma_data=net.sd, img_channels=3)
        change(outer.state)
        path = tmp_path / "edm-test.pkl"
        path.write_bytes(pickle.dumps(dict(ema=outer, augment_pipe=None, **(extra or {})), protocol=4))
        return path
    return go


def network(**kw):
    torch.manual_seed(0)
    net = EDM(UNet(**(dict(size=16, channels=3, ch=16, mult=(1, 2), blocks=2, attn=(8,), classes=4) | kw)))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


@pytest.mark.parametrize("kw", [dict(), dict(classes=0, mult=(1, 2, 3), attn=(16, 4), blocks=1)])
def test_a_released_file_gives_the_same_network(write, kw):
    """Architecture read off the tensors, weights equal, nothing executed; catches a wrong blocks, mult or attn."""
    net = network(**kw)
    again = teacher.load(write(net))
    assert again.model.kwargs == dict(net.model.kwargs, dropout=0.0) and equal(net.state_dict(), again.state_dict())
    x, t = torch.randn(2, 3, 16, 16), torch.full((2, 1, 1, 1), 0.7)
    y = torch.tensor([0, 3]) if net.model.classes else None
    assert torch.allclose(net(x, t, y), again(x, t, y), atol=1e-5) and not again.training
    assert not any(p.requires_grad for p in again.parameters())


def test_an_ect_snapshot_keeps_its_boundary_and_loses_its_loss(write):
    """ECT's files hold a bound method (a getattr in the pickle) and sigma_min = 0.003, where f(x) = x."""
    net = network()
    again = teacher.load(write(net, "ECMPrecond", 0.003, extra=dict(loss_fn="text".upper)))
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(again(x, torch.full((2, 1, 1, 1), 0.003)), x, atol=1e-6)


def test_the_augmentation_weights_are_dropped_and_nothing_else_is(write, capsys):
    def augment(state):
        state["_modules"]["model"].state["_modules"]["map_augment"] = Persistent(
            "Linear", dict(_parameters=dict(weight=torch.zeros(16, 9)), _buffers={}, _modules={}))
    assert teacher.load(write(network(), change=augment))

    def lose(state):
        del state["_modules"]["model"].state["_modules"]["map_layer1"]
    with pytest.raises(SystemExit) as e:
        teacher.load(write(network(), change=lose))
    assert e.value.code == 2 and "map_layer1.weight" in capsys.readouterr().err


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("call, name", [((os.mkdir, "pwned"), "mkdir"), ((exec, "raise KeyError"), "builtins.exec"),
                                        ((torch.load, "x.pt"), "torch.serialization.load")])
def test_an_unknown_global_is_refused_by_name(write, tmp_path, monkeypatch, capsys, call, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        teacher.load(write(network(), extra=dict(loss_fn=Evil(*call))))
    err = capsys.readouterr().err
    assert e.value.code == 2 and name in err and err.count("\n") == 1 and not (tmp_path / "pwned").exists()


def test_getattr_in_a_file_reaches_nothing():
    """ECT's files ask for it; the real one leads from any allowed function to its __globals__."""
    data = pickle.dumps(Evil(getattr, "text", "upper"))
    assert isinstance(teacher.Reader(io.BytesIO(data), teacher.FILE).load(), teacher.Inert)


def test_code_nested_in_a_tensor_is_refused(tmp_path, capsys):
    """A storage is itself a pickle: torch's own loader would run this one."""
    path = tmp_path / "nested.pkl"
    inner = pickle.dumps(Evil(os.mkdir, str(tmp_path / "pwned")))
    path.write_bytes(pickle.dumps(dict(ema=Evil(torch.storage._load_from_bytes, inner))))
    with pytest.raises(SystemExit) as e:
        teacher.load(path)
    assert e.value.code == 2 and "mkdir" in capsys.readouterr().err and not (tmp_path / "pwned").exists()


def test_a_truncated_file_is_refused(write, capsys):
    path = write(network())
    data = path.read_bytes()
    for n in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:n])
        with pytest.raises(SystemExit) as e:
            teacher.load(path)
        assert e.value.code == 2
    assert capsys.readouterr().err.count("\n") == 5


@pytest.mark.parametrize("size, stride, offset", [((3, 3), (3, 1), 1), ((2, 2), (-1, 1), 3), ((10**9, 10**9), (0, 0), 0)])
def test_a_tensor_beyond_its_storage_is_refused(size, stride, offset):
    with pytest.raises(ValueError, match="reaches beyond"):
        teacher.tensor(torch.zeros(9), offset, size, stride)


# ---- what --teacher finds ------------------------------------------------------------------------
def test_without_a_released_file_fast_and_paper_say_what_to_do(monkeypatch, tmp_path, capsys):
    """One line with the address and the way out; no folder is left."""
    import ect
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a: (_ for _ in ()).throw(OSError("no network")))
    args = ect.Args(dataset="cifar10", preset="paper", data_dir=str(tmp_path / "data"), out=str(tmp_path / "runs"))
    with pytest.raises(SystemExit) as e:
        teacher.download(teacher.released(args), args.data_dir)
    err = capsys.readouterr().err
    assert e.value.code == 2 and "edm-cifar10-32x32-uncond-vp.pkl" in err and "--teacher train" in err
    assert "CC BY-NC-SA" in err and not list(tmp_path.iterdir())
    args.ch = 64
    with pytest.raises(SystemExit):
        teacher.released(args)
