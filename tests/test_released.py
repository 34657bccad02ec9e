"""Checkpoints of EDM's format are read without executing them; damaged and hostile ones are refused in one line."""
import io
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, equal

from common import released, teacher
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

    def go(net, name="EDMPrecond", sigma_min=0.0, extra=None, change=lambda state: None, protocol=4):
        outer = persistent(net)
        outer.name = name
        outer.state |= dict(sigma_min=sigma_min, sigma_max=float("inf"), sigma_data=net.sd, img_channels=3)
        change(outer.state)
        path = tmp_path / "edm-test.pkl"
        path.write_bytes(pickle.dumps(dict(ema=outer, augment_pipe=None, **(extra or {})), protocol=protocol))
        return path
    return go


FAMILIES = dict(ddpmpp={}, ncsnpp=dict(fourier=1.0), adm=dict(ch=32, mult=(1, 4)))


def network(**kw):
    torch.manual_seed(0)
    shape = dict(size=16, channels=3, ch=16, mult=(1, 2), blocks=2, attn=(8,), classes=4)
    net = EDM(UNet(**(shape | FAMILIES[kw.get("net", "ddpmpp")] | kw)))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


@pytest.mark.parametrize("kw", [dict(), dict(classes=0, mult=(1, 2, 3), attn=(16, 4), blocks=1), dict(net="ncsnpp"),
                                dict(net="ncsnpp", classes=0, mult=(2, 1, 1), attn=(), blocks=1), dict(net="adm"),
                                dict(net="adm", classes=0, mult=(2, 2, 4), attn=(16, 8, 4), blocks=1)])
def test_a_released_file_gives_the_same_network(write, kw):
    """Architecture read off the tensors, weights and frequencies equal, nothing executed; catches a wrong blocks, mult,
    attn, family or width."""
    net = network(**kw)
    again = teacher.load(write(net))
    assert again.model.kwargs == dict(net.model.kwargs, dropout=0.0, fourier=16.0)
    assert again.spec["net"] == kw.get("net", "ddpmpp") and equal(net.state_dict(), again.state_dict())
    x, t = torch.randn(2, 3, 16, 16), torch.full((2, 1, 1, 1), 0.7)
    y = torch.tensor([0, 3]) if net.model.classes else None
    assert torch.allclose(net(x, t, y), again(x, t, y), atol=1e-5) and not again.training
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in again.parameters())
    assert (again.sd, again.t_min) == (0.5, 0.0)


@pytest.mark.parametrize("protocol", [3, 5])
def test_other_pickle_protocols_read_alike(write, protocol):
    net = network(blocks=1)
    assert equal(net.state_dict(), teacher.load(write(net, protocol=protocol)).state_dict())


def test_half_precision_weights_become_float32(write):
    net = network(blocks=1).half()
    again = teacher.load(write(net)).state_dict()
    assert all(v.dtype == torch.float32 for v in again.values())
    assert all(torch.equal(v.float(), again[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("kw", [dict(), dict(net="ncsnpp"), dict(net="adm")])
def test_an_ect_snapshot_keeps_its_boundary_and_loses_its_loss(write, kw):
    """ECT's files hold a bound method (a getattr in the pickle) and sigma_min = 0.003, where f(x) = x."""
    net = network(**kw)
    again = teacher.load(write(net, "ECMPrecond", 0.003, extra=dict(loss_fn="text".upper)))
    assert again.spec["t_min"] == 0.003
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(again(x, torch.full((2, 1, 1, 1), 0.003)), x, atol=1e-6)


def inside(state, *path):
    """The attributes of a module of a file, by the names of its parents."""
    for name in path:
        child = state["_modules"][name]
        state = child.state if isinstance(child, Persistent) else child.__dict__
    return state


def augmentation(state):
    inside(state, "model")["_modules"]["map_augment"] = Persistent(
        "Linear", dict(_parameters=dict(weight=torch.zeros(16, 9)), _buffers={}, _modules={}))


def lose(state):
    del inside(state, "model")["_modules"]["map_layer1"]


def lose_frequencies(state):
    del inside(state, "model")["_modules"]["map_noise"]


def lose_a_filter(state):
    del inside(state, "model", "dec", "16x16_up", "conv0")["_buffers"]["resample_filter"]


def add(state):
    second = Persistent("Linear", dict(_parameters=dict(weight=torch.zeros(2))))
    inside(state, "model")["_modules"]["map_second"] = second


def widen(state):
    inside(state, "model", "map_layer1")["_parameters"]["bias"] = torch.zeros(65)


def test_the_augmentation_weights_are_dropped(write):
    assert teacher.load(write(network(), change=augmentation))


@pytest.mark.parametrize("kw, change, name", [
    (dict(), lose, "map_layer1.weight"), (dict(), lose_a_filter, "dec.16x16_up.conv0.resample_filter"),
    (dict(net="ncsnpp"), lose_frequencies, "aux_residual"), (dict(net="adm"), lose, "map_layer1.bias"),
    (dict(), add, "map_second.weight"), (dict(), widen, "map_layer1.bias")])
def test_missing_unexpected_and_misshapen_tensors_are_named(write, capsys, kw, change, name):
    with pytest.raises(SystemExit) as e:
        teacher.load(write(network(**kw), change=change))
    err = capsys.readouterr().err
    assert e.value.code == 2 and name in err and err.count("\n") == 1


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
    assert isinstance(released.Unpickler(io.BytesIO(data)).load(), released.Inert)


def test_code_nested_in_a_tensor_is_refused(write, tmp_path, capsys):
    """A storage is itself a pickle: torch's own loader would run this one."""
    inner = Evil(torch.storage._load_from_bytes, pickle.dumps(Evil(os.mkdir, str(tmp_path / "pwned"))))
    weight = Evil(torch._utils._rebuild_tensor_v2, inner, 0, (1,), (1,), False, {})
    with pytest.raises(SystemExit) as e:
        teacher.load(write(network(), change=lambda s: inside(s, "model")["_parameters"].update(w=weight)))
    assert e.value.code == 2 and "mkdir" in capsys.readouterr().err and not (tmp_path / "pwned").exists()


# ---- truncation ----------------------------------------------------------------------------------
@pytest.fixture
def refused(tmp_path, capsys):
    """Assert that these bytes as a .pkl are refused in one line, and return it."""
    def go(data):
        path = tmp_path / "hostile.pkl"
        path.write_bytes(data)
        with pytest.raises(SystemExit) as e:
            teacher.load(path)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ") and len(err) < 600
        return err
    return go


def test_a_truncated_file_is_refused(write, refused):
    """Cut before and after each tensor's bytes, at each frame, and in between."""
    data = write(network(ch=4, mult=(1,), blocks=1, attn=(), classes=0)).read_bytes()
    marks = [pos for op, _, pos in pickletools.genops(data) if op.name in ("FRAME", "BINBYTES", "STOP")]
    assert len(marks) > 40
    for n in [0, 1, 2, *marks, *(m + 1 for m in marks[:-1]), *range(7, len(data), len(data) // 40)]:
        refused(data[:n])


def test_a_truncated_storage_is_refused():
    """At every length, so also at the ends of the five pickles inside; and with a byte too many."""
    data = stream([1.0, 2.0])
    assert torch.equal(released.storage(bytearray(data)), torch.tensor([1.0, 2.0]))
    for n in [*range(len(data)), len(data) + 1]:
        with pytest.raises(Exception):
            released.storage(bytearray((data + b"0")[:n]))


def test_ctrl_c_is_no_damage(write, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(released.Unpickler, "find_class", press)
    with pytest.raises(KeyboardInterrupt):
        teacher.load(write(network(blocks=1)))


# ---- hostile files, opcode by opcode -------------------------------------------------------------
RECONSTRUCT = "torch_utils.persistence._reconstruct_persistent_obj"
TENSOR, BYTES = "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes"
SCALAR, MAGIC = "numpy.core.multiarray.scalar", 0x1950A86A20F9469CFC6C


class Op(bytes):
    """Opcodes that leave one object on the stack."""


def op(value):
    """The opcodes of a plain value."""
    if isinstance(value, Op):
        return value
    if isinstance(value, dict):
        return Op(b"}(" + b"".join(op(k) + op(v) for k, v in value.items()) + b"u")
    if isinstance(value, (tuple, list)):
        first, last = (b"(", b"t") if isinstance(value, tuple) else (b"](", b"e")
        return Op(first + b"".join(map(op, value)) + last)
    return Op(pickle.dumps(value, 3)[2:-1])               # without its header and its end


def glob(name):
    return Op("c{}\n{}\n".format(*name.rsplit(".", 1)).encode())


def call(name, *args):
    return Op(glob(name) + op(args) + b"R")


def pickled(value):
    return b"\x80\x02" + op(value) + b"."


def stream(values, kind="torch.FloatStorage", count=None, fmt="f"):
    """A storage as torch.save wrote it before it wrote zip files."""
    about = ("storage", glob(kind), "7", "cpu", len(values) if count is None else count, None)
    head = pickled(MAGIC) + pickled(1001) + pickled(dict(little_endian=True)) + op(about) + b"Q." + pickled(["7"])
    return head + struct.pack(f"<q{len(values)}{fmt}", len(values), *values)


def tensor(values=(0.0,) * 4, offset=0, size=(2, 2), stride=(2, 1), **kw):
    return call(TENSOR, call(BYTES, stream(values, **kw)), offset, size, stride, False, {})


def module(name="EDMPrecond", version=6, **state):
    meta = dict(type="class", version=version, class_name=name, state=state)
    return call(RECONSTRUCT, meta)


def ema(value):
    return pickled(dict(ema=value))


def file(modules=None, sigma_data=0.5, sigma_min=0.0, name="EDMPrecond", **state):
    state = dict(sigma_data=sigma_data, sigma_min=sigma_min, _modules=modules or {}) | state
    return ema(module(name, **state))


def model(**tensors):
    """A file whose network has these parameters."""
    return file(dict(model=module("SongUNet", _parameters=tensors)))


def put(i):
    return b"r" + struct.pack("<I", i)


def get(i):
    return Op(b"j" + struct.pack("<I", i))


def laughs(n, pair=b"\x86"):
    """Two references to two references to ..: 2**n elements in a few bytes. pair: the opcode of a tuple or list."""
    return Op(b"N" + b"".join(put(i) + get(i) + pair for i in range(n)))


def laughing_modules(n):
    """A module that holds one module twice, which holds one module twice, and so on."""
    out = module("Linear") + put(1)                       # 0 is taken: texts are put there
    for i in range(1, n):
        out += b"0" + module("Linear", _modules=dict(a=get(i), b=get(i))) + put(i + 1)
    return Op(out)


def deep_modules(n, name="a"):
    head, tail = module("Linear", _modules={name: Op(b"@@")}).split(b"@@")
    return Op(head * n + b"N" + tail * n)


SAME_HASH = b"".join(op(i * (2**61 - 1)) + b"N" for i in range(9))       # keys and their values


HOSTILE = dict(
    empty_pickle=b".", no_stop=b"\x80\x04N", no_mark=b"t.", underflow=b"N\x86.", pop_beyond=b"0.", lost_put=b"q\0.",
    no_dict=pickled([1]), no_ema=pickled(dict(net=1)), ema_is_a_number=ema(1), unknown_opcode=b"\xff.",
    string_with_escapes=file(name="\x1b[2J\n\n\x07\ud800"), name_of_a_megabyte=file(name="x" * 2**20),

    # lengths that the file does not have
    bytes8=b"\x8e" + struct.pack("<Q", 2**40) + b"x.",
    bytes8_more=b"\x8e" + struct.pack("<Q", 2**62) + b".",
    unicode8=b"\x8d" + struct.pack("<Q", 2**50) + b".",
    bytearray8=b"\x96" + struct.pack("<Q", 2**40) + b".",
    frame=b"\x95" + struct.pack("<Q", 2**60) + b"N.",
    long4=b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\1.",
    negative_long4=b"\x8b" + struct.pack("<i", -5) + b".",
    decimal=b"L" + b"9" * 10**6 + b"L\n.",
    memo_index=b"}" + put(5 * 10**7) + b".", text_memo_index=b"}p50000000\n.",

    # many small parts
    million=b"N" * (10**6 + 1) + b".", dicts=b"}" * (2 * 10**6) + b".",
    classes=glob("numpy.dtype") * (4 * 10**5) + b".",
    copied_arguments=op((None,) * 10**5) + put(0) + (glob("numpy.dtype") + get(0) + b"R") * 10**4 + b".",
    million_in_a_storage=model(w=call(TENSOR, call(BYTES, b"N" * 101 + stream([])), 0, (0,), (1,))),

    # keys of one hash
    ints=b"}(" + SAME_HASH + b"u.", one_by_one=b"}" + SAME_HASH.replace(b"N", b"Ns") + b".",
    old_dict=b"(" + SAME_HASH + b"d.",
    ints_in_an_object=glob("collections.OrderedDict") + b")R(" + SAME_HASH + b"u.", set=b"\x8f(" + SAME_HASH + b"\x90.",
    frozen_set=b"(" + SAME_HASH + b"\x91.", tuples=op({(2**61 - 1,): 1, (0,): 1}) + b".", numbers=op({0.5: 1}) + b".",
    memo=b"}" + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(9)) + b".",

    # depth and sharing
    laughing_modules=file(dict(model=laughing_modules(40))), laughing_name=file(name=laughs(60)),
    laughing_version=ema(module(version=laughs(60))), laughing_meta=ema(call(RECONSTRUCT, laughs(60))),
    laughing_size=model(w=tensor(size=laughs(60))), laughing_arguments=ema(Op(b"cnumpy\ndtype\n" + laughs(60) + b"R")),
    shared_storage=model(w=Op(tensor([0.0] * 2**18, size=(2**18,), stride=(1,)) + put(5)),
                         **{f"w{i}": get(5) for i in range(500)}),
    shared_and_empty=model(w=Op(tensor([0.0], size=(0,), stride=(0,)) + put(5)), **{f"w{i}": get(5) for i in range(99)}),
    shared_list=file({"a": module("Linear", _parameters=dict.fromkeys(map(str, range(1001))))}),
    strange_number=file(sigma_data=call(SCALAR, call("numpy.dtype", laughs(60)), b"12345678")),
    deep_list=b"]" * 30_000 + b"a" * 29_999 + b".", deep_tuple=b"N" + b"\x85" * 30_000 + b".",
    deep_modules=file(dict(model=deep_modules(2000))), nameless_modules=file(dict(model=deep_modules(2000, ""))),
    long_names=file(dict(model=deep_modules(150, "n" * 10**4))), prefix=file(dict(model=deep_modules(150, "n" * 199))),
    cycle=file(dict(model=Op(b"ctorch.nn.modules.container\nModuleDict\n)\x81" + put(9)
                             + op(dict(_modules=dict(a=get(9)))) + b"b"))),

    # modules
    other_class=file(name="VPPrecond"), other_version=ema(module(version=5)), meta_is_none=ema(call(RECONSTRUCT, None)),
    no_network=file(), no_sigma=ema(module(_modules={})), modules_are_a_list=ema(module(_modules=[])),
    parameters_are_a_list=file(dict(model=module("SongUNet", _parameters=[1]))), key_is_a_number=pickled({3: 1}),
    parameter_is_text=model(w="text"), module_is_a_tensor=file(dict(model=tensor())),
    whole_numbers=model(w=tensor((1,) * 4, kind="torch.LongStorage", fmt="q")),
    truths=model(w=tensor((1,) * 4, kind="torch.BoolStorage", fmt="b")),
    not_a_level=file(sigma_data=float("nan")), negative_level=file(sigma_min=-1.0), text_level=file(sigma_data="x"),

    # tensors
    beyond=model(w=tensor(size=(3, 3), stride=(3, 1))), offset=model(w=tensor(offset=1)),
    negative_offset=model(w=tensor(offset=-1)), negative_size=model(w=tensor(size=(-2, -2))),
    negative_stride=model(w=tensor(size=(2,), stride=(-1,), offset=3)),
    enormous=model(w=tensor(size=(10**9, 10**9), stride=(0, 0))), expanded=model(w=tensor(size=(10**12,), stride=(0,))),
    repeated=model(w=tensor(size=(4, 4), stride=(0, 0))),
    many_axes=model(w=tensor(size=(1,) * 10**4, stride=(0,) * 10**4)),
    list_times_number=model(w=tensor(size=([0], 10**10), stride=(1, 1))),
    text_times_number=model(w=tensor(size=(10**10, 1), stride=("aaaa", 1))),
    huge_stride=model(w=tensor(size=(3,), stride=(2**62 + 1,))),
    many_factors=model(w=tensor(size=(2,) * 9, stride=(0,) * 9)),
    huge_numbers=model(w=tensor(size=(2**2000,) * 4, stride=(1,) * 4)),
    float_size=model(w=tensor(size=(2.0, 2.0))), fewer_strides=model(w=tensor(size=(2, 2), stride=(1,))),
    few_arguments=model(w=call(TENSOR, 1)), storage_is_none=model(w=call(TENSOR, None, 0, (1,), (1,))),
    storage_is_text=model(w=call(BYTES, "text")), storage_is_a_list=model(w=call(BYTES, [1] * 9)),
    short_storage=model(w=tensor(count=5)), long_storage=model(w=tensor(count=3)),
    huge_storage=model(w=tensor(count=2**62)), count_is_a_list=model(w=tensor(count=[1] * 4)),
    count_is_negative=model(w=tensor(count=-4)), odd_storage=model(w=tensor(kind="torch.ComplexFloatStorage")),
    storage_from_elsewhere=model(w=tensor(kind="os.system")),
    copies=op(stream([0.0] * 2**20)) + put(0) + (glob(BYTES) + get(0) + b"\x85R") * 1000 + b".",

    # functions called with what they are not meant for
    set_of_a_tensor=ema(call("builtins.set", tensor([0.0] * 2**16, size=(2**16,), stride=(1,)))),
    dict_of_a_tensor=ema(call("collections.OrderedDict", tensor())),
    easy_dict=ema(call("dnnlib.util.EasyDict", [["a", 1]])),
    object_number=file(sigma_data=call(SCALAR, call("numpy.dtype", "O", False, True), b"12345678")),
    short_number=file(sigma_data=call(SCALAR, call("numpy.dtype", "f8"), b"1234")),
    number_without_type=file(sigma_data=call(SCALAR, "f8", b"12345678")),
    call_of_text=op("a") + b")R.", call_without_tuple=glob("collections.OrderedDict") + b"NR.",
    instance=b"(ios\nsystem\n.", object=b"(cos\nsystem\no.", extension=b"\x82\1.",
    persistent=op("a") + b"Q.", text_persistent=b"Pa\n.", keywords=glob("numpy.dtype") + b")}\x92.",
    many_arguments=glob("numpy.dtype") + op((None,) * 1000) + b"R.",
    build_a_function=glob(TENSOR) + op((None, {"__defaults__": ()})) + b"b.",
    build_a_class=glob("numpy.dtype") + op({"__init__": None}) + b"b.",
    code_in_a_storage=model(w=call(TENSOR, call(BYTES, pickled(MAGIC) + pickled(call("os.system", "echo pwned"))),
                                   0, (1,), (1,))),

    # names and shapes that claim a large network, or an endless one
    claims_a_width=model(**{f"enc.8x8_{k}.weight": tensor((0.0,) * 2**11, size=(2**11, 1), stride=(1, 1))
                            for k in ("conv", "block0.norm0", "block0.conv0")}),
    no_size=model(**{f"enc.0x0_{k}.weight": tensor((0.0,) * 16, size=(4, 4), stride=(4, 1))
                     for k in ("conv", "block0.norm0", "block0.conv0")}),
    many_blocks=model(**{f"enc.8192x8192_{k}.weight": tensor((0.0,) * 4, size=(4, 1, 1, 1), stride=(1,) * 4)
                         for k in ("conv", *(f"block{i}.{p}" for i in range(98) for p in ("norm0", "conv0")))}),
)


REASONS = {                                               # where another check would refuse the file later
    "out of bounds": "offset", "more arguments than any": "copied_arguments many_arguments",
    "beyond its storage": "beyond enormous repeated expanded negative_offset negative_size negative_stride huge_stride "
                          "many_axes many_factors list_times_number text_times_number huge_numbers float_size",
    "neither a short text": "ints one_by_one ints_in_an_object set tuples numbers long_names", "KeyError": "memo_index",
    "more parts than": "million dicts million_in_a_storage text_memo_index memo old_dict frozen_set",
    "storage is damaged": "short_storage long_storage huge_storage count_is_a_list count_is_negative",
    "VPPrecond is not supported": "other_class", "of version 6": "other_version laughing_version laughing_name",
    "share their storage": "shared_storage shared_and_empty",
    "part of itself": "cycle laughing_modules prefix shared_list",
    "asks for torch.": "whole_numbers truths odd_storage",
    "asks for os.system": "code_in_a_storage storage_from_elsewhere object instance"}


def test_hostile_files_are_refused_without_harm(tmp_path):
    """Each in one line and status 2, in seconds, with less than 300 MB, under a limit of 1 GB more than torch has."""
    pytest.importorskip("resource")
    for name, data in HOSTILE.items():
        (tmp_path / f"{name}.pkl").write_bytes(data)
    script = tmp_path / "script.py"
    script.write_text(LOAD_ALL)
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                          env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    bad = {k: v for k, v in seen.items() if (v["code"], v["lines"]) != (2, 1) or v["seconds"] > 20 or v["mega"] > 300}
    assert not bad and seen.keys() == HOSTILE.keys() and "pwned" not in done.stdout
    assert all(v["text"].strip("\n").isprintable() for v in seen.values())       # no commands for the terminal
    other = {name: seen[name] for why, names in REASONS.items() for name in names.split() if why not in seen[name]["text"]}
    assert not other


def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "x.pkl")
    pipe = os.open(tmp_path / "x.pkl", os.O_RDWR)         # else the mistake would be to wait for ever
    with pytest.raises(SystemExit):
        teacher.load(tmp_path / "x.pkl")
    os.close(pipe)
    assert "no such file" in capsys.readouterr().err


LOAD_ALL = """
import contextlib, io, json, resource, sys, time
from pathlib import Path
from common import teacher
if Path("/proc/self/statm").exists():
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, -1))
seen = {}
for path in sorted(Path(sys.argv[1]).glob("*.pkl")):
    err, code, began, before = io.StringIO(), None, time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.redirect_stderr(err):
        try:
            teacher.load(path)
        except SystemExit as e:
            code = e.code
    mega = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    text = err.getvalue()
    seen[path.stem] = dict(code=code, lines=text.count("\\n"), seconds=time.time() - began, text=text, mega=mega)
print(json.dumps(seen))
"""


def test_the_reader_takes_what_torch_writes():
    """Whole numbers as keys (an optimiser's), tuples as persistent ids, attributes of an OrderedDict, inside a .zip."""
    net, out = torch.nn.Linear(2, 2), io.BytesIO()
    optimiser = torch.optim.RAdam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    torch.save(dict(net=net.state_dict(), opt=optimiser.state_dict(), config=dict(a=None, b=(1, 0.5, True))), out)

    class Reader(released.Unpickler):
        KNOWN = {name: type(name, (released.Inert,), {}) for name in (
            "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch.FloatStorage")}
    with zipfile.ZipFile(out) as z, z.open("archive/data.pkl") as f:
        found = Reader(f).load()
    (_, kind, _, _, count), offset, size, stride = found["net"]["weight"].args[:4]
    assert (kind.__name__, count, offset, size, stride) == ("torch.FloatStorage", 4, 0, (2, 2), (2, 1))
    assert list(found["opt"]["state"]) == [0, 1] and found["config"] == dict(a=None, b=(1, 0.5, True))


def test_a_released_file_is_downloaded_within_limits(monkeypatch, tmp_path):
    """Gigabytes without end; an hour of it, and then the folder cannot be written."""
    seen = []
    monkeypatch.setattr(released.assets, "fetch", lambda path, sources, *a: seen.extend(sources))
    released.download("https://a.org/x.pkl", tmp_path)
    (_, get), = seen
    monkeypatch.setattr(released.assets, "download", lambda *a: seen.append(a))
    get("file")
    assert seen[1:] == [("https://a.org/x.pkl", "file", 2**32)]
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / ("x" * 300)):
        with pytest.raises(SystemExit) as e:
            released.download("https://a.org/x.pkl", folder)
        assert e.value.code == 2 and "cannot be written" in e.value.message and len(seen) == 2


def test_addresses_do_not_share_a_file(monkeypatch, tmp_path):
    """a.org/x.pkl served for b.org/x.pkl; a name that ends in ?download=1, which is then no .pkl."""
    monkeypatch.setattr(released.assets, "fetch", lambda path, *a: None)
    own = released.ADDRESS.format("uncond", "vp")
    urls = [own, "https://a.org/x.pkl", "https://b.org/x.pkl", "https://a.org/x.pkl?download=1", "https://a.org/y/x.pkl",
            "https://a.org/" + own.rsplit("/", 1)[1], "https://a.org/" + "x" * 300 + ".pkl"]
    paths = [Path(released.download(url, tmp_path)) for url in urls]
    assert len(set(paths)) == len(urls) and all(p.suffix == ".pkl" and len(p.name) < 120 for p in paths)
    assert paths[0] == tmp_path / "edm-cifar10-32x32-uncond-vp.pkl"       # where a user would put it by hand
