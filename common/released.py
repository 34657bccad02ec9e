"""Safe import of the checkpoints released by EDM, and of ECT's snapshots, which have the same format.

Their .pkl files hold Python objects together with their source code, which NVIDIA's loader executes. Here every name
that a file asks for becomes inert data, or is refused; nothing that a file names is imported or called."""
import io
import math
import pickle
import pickletools
import re
from functools import partial
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import torch

from common import assets

ADDRESS = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-{}-{}.pkl"
STORAGES = {"torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
            "torch.BFloat16Storage": torch.bfloat16, "torch.DoubleStorage": torch.float64}
KNOWN = {"torch_utils.persistence._reconstruct_persistent_obj", "torch.nn.modules.container.ModuleDict",
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
    sources = [(f"{url} (CC BY-NC-SA 4.0: not for commercial use)", partial(torch.hub.download_url_to_file, url))]
    assets.fetch(path, sources, read, ", or train a teacher first: --teacher train")
    return str(path)


class Inert(dict):
    """An object of the file: the arguments of the call that made it, its items and attributes, none of its code."""
    args, state = (), {}

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class Unpickler(pickle.Unpickler):
    """Turns every name in KNOWN into a class of inert data, and refuses all others."""
    def find_class(self, module, name):
        name = f"{module}.{name}"
        if name not in KNOWN:
            raise ValueError(f"it asks for {name}, which this reader does not know and will not load")
        return type(name, (Inert,), {})

    def persistent_load(self, key):
        return key


def unpickle(f):
    """The next pickle in the stream f, as inert data. Raises ValueError, or whatever a damaged pickle leads to."""
    start = f.tell()                                      # a LONG_BINPUT in a file of nine bytes could fill the memory
    if any(op.name == "LONG_BINPUT" and arg > 10**6 for op, arg, _ in pickletools.genops(f)):
        raise ValueError("it numbers more parts than a checkpoint has")
    f.seek(start)
    return Unpickler(f).load()


def tensor(weight):
    """The tensor of an Inert parameter or buffer, float32."""
    if type(weight).__name__ == "torch._utils._rebuild_parameter":
        weight = weight.args[0]
    data, offset, size, stride = weight.args[:4]
    values = storage(data.args[0])
    if math.prod(size) > len(values):                     # with strides of 0 it would be larger than the file
        raise ValueError("a tensor reaches beyond its storage")
    return values.as_strided(size, stride, offset).to(torch.float32, copy=True)


def storage(data):
    """The 1-D tensor in a legacy torch.save stream: five pickles (magic number, version, machine, kind of the storage,
    its key), then the number of values in eight bytes, then the values. Raises ValueError."""
    f = io.BytesIO(data)
    magic, version, _, (_, kind, _, _, count, _), _ = (unpickle(f) for _ in range(5))
    start, dtype = f.tell() + 8, STORAGES[kind.__name__]
    if magic != 0x1950A86A20F9469CFC6C or version != 1001 or len(data) - start != count * dtype.itemsize:
        raise ValueError("a tensor's storage is damaged")
    return torch.frombuffer(bytearray(data), dtype=dtype, offset=start)


def parameters(module, prefix, seen):
    """(name, Inert tensor) of an Inert module and all below it, in the order of torch's state_dict. `seen` are the ids
    of the modules met so far."""
    if id(module) in seen:                                # 40 modules, each holding the next twice, take 2**40 steps
        raise ValueError("a module in it is part of itself or of two others")
    seen.add(id(module))
    state = module.args[0]["state"] if module.args else module.state      # EDM's own classes; torch's ModuleDict
    tensors = state.get("_parameters", {}) | state.get("_buffers", {})
    yield from ((prefix + k, v) for k, v in tensors.items() if v is not None)
    for k, v in state.get("_modules", {}).items():
        yield from parameters(v, f"{prefix}{k}.", seen)


def read(path):
    """The averaged network in a .pkl of EDM or ECT: its spec for networks.build, and its weights {name: float32}.
    Raises ValueError, or whatever else a damaged file leads to."""
    with open(path, "rb") as f:
        net = unpickle(f)["ema"]
    meta, weights, room = net.args[0], {}, Path(path).stat().st_size
    if meta["class_name"] not in ("EDMPrecond", "ECMPrecond") or meta["version"] != 6:
        name = meta["class_name"] if type(meta["class_name"]) is str else "what it holds"
        raise ValueError(f"{name} is not supported, only EDMPrecond and ECMPrecond in EDM's format of version 6")
    for name, weight in parameters(net, "", set()):
        weights[name] = tensor(weight)
        room -= weights[name].numel()
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
    blocks = next(i for i in range(99) if name(size, i, "norm0") not in weights)
    return dict(size=size, channels=channels, ch=ch, blocks=blocks, dropout=0.0, net=net,
                mult=tuple(weights[name(r, 0, "conv0")].shape[0] // ch for r in sizes),
                attn=tuple(r for r in sizes if name(r, 0, "qkv") in weights),
                classes=weights["model.map_label.weight"].shape[1] if "model.map_label.weight" in weights else 0)
