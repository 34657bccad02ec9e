"""From a checkpoint file to a network; safe import of those released by EDM, and of ECT's, which have the same format.

Their .pkl files hold Python objects together with their source code, which NVIDIA's loader executes. Here every name
that a file asks for becomes inert data, or is refused; nothing that a file names is imported or called."""
import io
import json
import math
import os
import pickle
import pickletools
import re
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import torch

from common import assets, folder
from common.flags import BadInput, brief
from common.networks import build

ADDRESS = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-{}-{}.pkl"
STORAGES = {"torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
            "torch.BFloat16Storage": torch.bfloat16, "torch.DoubleStorage": torch.float64}
NAMES = {"torch_utils.persistence._reconstruct_persistent_obj", "torch.nn.modules.container.ModuleDict",
         "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes",
         "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "collections.OrderedDict",
         "dnnlib.util.EasyDict", "builtins.set", "__builtin__.set", "builtins.getattr", *STORAGES}


def download(url, data_dir):
    """The local path of a released checkpoint, fetched once into `data_dir`. Raises BadInput. Two addresses never share
    a file: all but EDM's own have a hash of the address before their name."""
    name = urlsplit(url).path.rsplit("/", 1)[-1]          # without a ?download=1
    if url != ADDRESS.rsplit("/", 1)[0] + "/" + name:
        name = f"{sha256(url.encode()).hexdigest()[:8]}-{name[-100:]}"
    path = Path(data_dir) / name
    if not os.path.isfile(path) and not assets.ready(path):     # unlike other assets, it is read from there
        raise BadInput(f"--data-dir {data_dir} cannot be written or has less than 1 GiB left; name another")
    sources = [(f"{url} (CC BY-NC-SA 4.0: not for commercial use)", lambda file: assets.download(url, file, 2**32))]
    assets.fetch(path, sources, read, ", or train a teacher first: --teacher train")
    return str(path)


def address(args, paper):
    """That of EDM's own checkpoint for the data and network of `args`; `paper`: its defaults. Raises BadInput."""
    family = dict(ddpmpp="vp", ncsnpp="ve").get(args.net)
    same = all(getattr(args, k, "edm") == getattr(paper, k) for k in ("flow", "ch", "mult", "blocks", "attn", "sd"))
    if args.dataset != "cifar10" or not family or not same:
        raise BadInput(f"no released teacher for {args.dataset} with this network and flow; "
                       "train one first: --teacher train")
    return ADDRESS.format("cond" if args.cond else "uncond", family)


class Inert(dict):
    """An object, dict or set of the file: the arguments of its call, its items and attributes, none of its code."""
    args, state = (), {}

    def __init__(self, *args):
        if len(args) > 9:                                 # each call copies them
            raise ValueError("a call in it has more arguments than any in a checkpoint")
        self.args = args

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value=None):               # other keys can share one hash: a million take hours
        if not (type(key) is str and len(key) < 200 or type(key) is int and abs(key) < 2**32):
            raise ValueError("a key in it is neither a short text nor a number")
        super().__setitem__(key, value)
    add = __setitem__


class Unpickler(pickle._Unpickler):                       # the one in C takes memory for any index that a file names
    """load() -> the next pickle in a file, as inert data. Raises ValueError, or whatever a damaged pickle leads to."""
    KNOWN = {name: type(name, (Inert,), {}) for name in NAMES}
    dispatch = pickle._Unpickler.dispatch | dict.fromkeys(b"}\x8f", lambda self: self.append(Inert()))   # dict and set

    def __init__(self, f, limit=10**6):
        start = f.tell()
        for n, (op, *_) in enumerate(pickletools.genops(f)):              # reads, makes nothing that lasts
            if n == limit or op.name in ("PUT", "DICT", "FROZENSET"):     # old ways to name keys of any kind
                raise ValueError("it has more parts than a checkpoint, or parts that none has")
        f.seek(start)
        super().__init__(f)

    def find_class(self, module, name):
        name = f"{module}.{name}"
        if name not in self.KNOWN:
            raise ValueError(f"it asks for {name}, which this reader does not know and will not load")
        return self.KNOWN[name]

    def persistent_load(self, key):
        return key


def tensor(weight):
    """The tensor of an Inert parameter or buffer, float32, and the bytes that hold it in the file."""
    if type(weight).__name__ == "torch._utils._rebuild_parameter":
        weight = weight.args[0]
    data, offset, size, stride = weight.args[:4]
    values = storage(data.args[0])
    fit = len(size) < 9 and all(type(n) is int and 0 <= n <= len(values) for n in (offset, *size, *stride))
    if not fit or math.prod(size) > len(values):          # with strides of 0 it would be larger than the file
        raise ValueError("a tensor reaches beyond its storage")
    return values.as_strided(size, stride, offset).to(torch.float32, copy=True), len(data.args[0])


def storage(data):
    """The 1-D tensor in a legacy torch.save stream: five pickles (magic number, version, machine, kind of the storage,
    its key), then the number of values in eight bytes, then the values. Raises ValueError."""
    f = io.BytesIO(data)
    magic, version, _, (_, kind, _, _, count, _), _ = (Unpickler(f, limit=100).load() for _ in range(5))
    start, dtype = f.tell() + 8, STORAGES[kind.__name__]
    if magic != 0x1950A86A20F9469CFC6C or version != 1001 or len(data) - start != count * dtype.itemsize:
        raise ValueError("a tensor's storage is damaged")
    return torch.frombuffer(bytearray(data), dtype=dtype, offset=start)


def parameters(module, prefix, seen):
    """(name, Inert tensor) of an Inert module and all below, in torch's order. `seen`: the ids of those met before."""
    state = module.args[0]["state"] if module.args else module.state      # EDM's own classes; torch's ModuleDict
    tensors = state.get("_parameters", {}) | state.get("_buffers", {})
    if id(module) in seen or len(prefix) > 200 or len(tensors) > 1000:    # 40 of them, sharing the next, are 2**40
        raise ValueError("a module in it is part of itself or of two others, or larger than any of EDM's")
    seen.add(id(module))
    yield from ((prefix + k, v) for k, v in tensors.items() if v is not None)
    for k, v in state.get("_modules", {}).items():
        yield from parameters(v, f"{prefix}{k}.", seen)


def read(path):
    """The averaged network in a .pkl of EDM or ECT: its spec for networks.build, and its weights {name: float32}.
    Raises ValueError, or whatever else a damaged file leads to."""
    if not os.path.isfile(path):                          # a pipe would be waited for
        raise ValueError("there is no such file")
    with open(path, "rb") as f:
        net = Unpickler(f).load()["ema"]
    meta, weights, room = net.args[0], {}, Path(path).stat().st_size
    if meta["class_name"] not in ("EDMPrecond", "ECMPrecond") or meta["version"] != 6:
        name = meta["class_name"] if type(meta["class_name"]) is str else "what it holds"
        raise ValueError(f"{name} is not supported, only EDMPrecond and ECMPrecond in EDM's format of version 6")
    for name, weight in parameters(net, "", set()):
        weights[name], length = tensor(weight)
        room -= length
        if room < 0:
            raise ValueError("its tensors share their storage")
    weights.pop("model.map_augment.weight", None)         # augmentation labels are zero when sampling
    kwargs, state = shape_of(weights), meta["state"]
    return dict(flow="edm", net=kwargs["net"], kwargs=kwargs, sd=float(state["sigma_data"]),
                t_min=float(state["sigma_min"])), weights


def shape_of(weights):
    """The arguments of unet.UNet, read off the names and shapes of its weights. Raises ValueError."""
    first = next((k for k in weights if re.fullmatch(r"model\.enc\.(\d{1,4})x\1_conv\.weight", k)), None)
    if not first:
        raise ValueError("it holds no U-Net")
    net = "adm" if "model.out_norm.weight" in weights else "ncsnpp" if "model.map_noise.freqs" in weights else "ddpmpp"
    size, (width, channels) = int(re.search(r"(\d+)x", first)[1]), weights[first].shape[:2]
    ch = weights["model.map_layer0.weight"].shape[1] if net == "adm" else width
    name = "model.enc.{0}x{0}_block{1}.{2}.weight".format
    sizes = [r for r in (size >> i for i in range(14)) if name(r, 0, "norm0") in weights]
    blocks = next(i for i in range(20) if name(size, i, "norm0") not in weights)
    return dict(size=size, channels=channels, ch=ch, blocks=blocks, dropout=0.0, net=net,
                mult=tuple(weights[name(r, 0, "conv0")].shape[0] // ch for r in sizes),
                attn=tuple(r for r in sizes if name(r, 0, "qkv") in weights),
                classes=weights["model.map_label.weight"].shape[1] if "model.map_label.weight" in weights else 0)


def load(path, device="cpu", pipeline=""):
    """The averaged network of a run folder, checkpoint or .safetensors of ours, or of a released EDM .pkl, frozen:
    net(x, t, y) -> float32 [B,C,H,W], D(x; t) of a diffusion model, f(x, t) of a consistency model; x [B,C,H,W],
    t [B,1,1,1] the noise's standard deviation, of a TrigFlow network the time in radians, y int64 [B] or None.
    `pipeline`: where the one from which it was trained is now. Raises BadInput."""
    try:
        if str(path).endswith(".pkl"):
            spec, weights = read(path)
        elif str(path).endswith(".safetensors"):          # of common.export
            from safetensors import safe_open
            with safe_open(path, "pt") as f:
                spec, weights = json.loads(f.metadata()["model"]), {k: f.get_tensor(k).float() for k in f.keys()}
        else:
            ckpt = folder.load(path)
            spec, weights = ckpt["model"], ckpt["ema"]
        parts = spec["kwargs"]["blocks"] * max(1, len(spec["kwargs"]["mult"]))
        if parts > len(weights):                          # each block has at least one weight
            raise ValueError(f"it claims {parts} blocks")
        if spec["net"] == "sd":                           # its frozen part is where the pipeline is
            spec = spec | dict(kwargs=spec["kwargs"] | (dict(pipeline=pipeline) if pipeline else {}))
        with torch.device("cpu" if spec["net"] == "sd" else "meta"):      # no memory for shapes that a file only claims
            net = build(spec)
        net.load_state_dict(weights, assign=True)         # strict: names what is missing or misshapen
    except BadInput:                                      # of the pipeline
        raise
    except Exception as e:                                # a damaged pickle raises anything
        raise BadInput(f"{path} cannot be read: {brief(e)}")
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
