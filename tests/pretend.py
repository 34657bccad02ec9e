"""A GPU that is not there: CPU tensors that say they are on "cuda", so that the CUDA path runs anywhere.

    with pretend(monkeypatch) as gpu:
        ect.main(parse(ect.Args, ect.PRESETS, ["--device", "cuda", ..]))

An operation on tensors of two devices, or with a generator of the other, raises, as it would there. `gpu.waits` lists
what would make the CPU wait for the GPU: values read (.item(), .tolist(), .cpu(), bool, nonzero, a boolean index) and
copies to it without non_blocking. What kernels compute there, and how fast, this cannot say."""
import contextlib
import traceback

import torch
import torch._decomp.decompositions_for_jvp  # compiles what it finds in torch: before that is replaced
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FACTORIES = ("arange", "as_tensor", "asarray", "empty", "empty_like", "empty_permuted", "empty_strided", "eye", "full", "full_like",
             "linspace", "logspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like",
             "randperm", "scalar_tensor", "tensor", "zeros", "zeros_like")
aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.masked_select, aten.nonzero, aten._unique2)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class Gpu(TorchDispatchMode):
    """Which memory pretends. What an operation makes of tensors on the GPU is on the GPU."""
    def __init__(self):
        super().__init__()
        self.storages, self.waits = {}, []                # kept alive: a new tensor at an old address is not there

    def has(self, x):
        return x.untyped_storage()._cdata in self.storages

    def tag(self, out, there=True):
        for x in (x for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if there:
                self.storages[x.untyped_storage()._cdata] = x.untyped_storage()
            else:
                self.storages.pop(x.untyped_storage()._cdata, None)
        return out

    def wait(self, what):
        """Note `what`, and in which line of ours."""
        ours = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__][-1]
        self.waits.append(f"{what} at {ours.filename.rsplit('/', 1)[-1]}:{ours.lineno}: {ours.line}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs, wants = placed(args, kwargs or {})
        # A single number may come from the CPU; and the zero tangents of weights are made below us, on the CPU.
        tensors, name = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)], func.overloadpacket
        there = [x for x in tensors if self.has(x)]
        here = [x for x in tensors if not self.has(x) and not x._is_zerotensor()
                and x.untyped_storage().nbytes() > x.element_size()]
        if func.namespace == "prims":                     # the parts of a derivative, which is taken on the GPU alone
            return self.tag(func(*args, **kwargs))
        if not there:
            return self.tag(func(*args, **kwargs), wants) if wants else func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"a generator of the CPU for a tensor on cuda: {func}")
        if name in INDEXED:
            if here:
                self.wait("an index copied to the GPU")
            if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                self.wait("boolean index")
        elif here and name is aten.copy_:
            self.wait("copy between CPU and GPU")
            return func(*args, **kwargs)                  # both stay where they are
        elif here:
            raise RuntimeError(f"tensors on cuda and on the CPU meet in {func}: {[list(x.shape) for x in tensors]}")
        if name in READS:
            self.wait(name.__name__)
        out = func(*args, **kwargs)
        return out if name is aten._local_scalar_dense else self.tag(out)


def placed(args, kwargs):
    """Arguments with "cuda" replaced by the CPU; and whether there was one."""
    wants = any(torch.device(v).type == "cuda" for v in tree_leaves((args, kwargs)) if is_device(v))
    return *tree_map(lambda v: CPU if is_device(v) else v, (tuple(args), kwargs)), wants


def is_device(v):
    return isinstance(v, torch.device) or isinstance(v, str) and v.split(":")[0] in ("cpu", "cuda")


def to(gpu, real):
    """Tensor.to"""
    def go(x, *args, **kwargs):
        other = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if other is not None:
            args = (other.device, other.dtype, *args[1:])
        if not any(map(is_device, (*args, kwargs.get("device")))):
            return real(x, *args, **kwargs)
        soon = kwargs.get("non_blocking", False)
        args, kwargs, wants = placed(args, kwargs)
        if gpu.has(x) == wants:
            return real(x, *args, **kwargs)
        if not (wants and soon):
            gpu.wait("copy to the GPU" if wants else "copy to the CPU")
        return gpu.tag(real(x, *args, **{**kwargs, "copy": True}), wants)
    return go


def factory(gpu, real):
    """torch.zeros and the like, which in a build without CUDA, or without a GPU, stop at the name of the device."""
    def go(*args, **kwargs):
        args, kwargs, wants = placed(args, kwargs)
        if wants and real.__name__ in ("tensor", "as_tensor", "asarray"):
            gpu.wait(f"torch.{real.__name__} on the GPU")
        return gpu.tag(real(*args, **kwargs)) if wants else real(*args, **kwargs)
    return go


def reads(gpu, real):
    """Tensor.tolist, and numpy, which refuses."""
    def go(x, *args, **kwargs):
        if gpu.has(x):
            if real.__name__ != "tolist":
                raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
            gpu.wait("tolist")
        return real(x, *args, **kwargs)
    return go


@contextlib.contextmanager
def pretend(monkeypatch):
    """A context in which --device cuda works; yields the Gpu."""
    gpu = Gpu()
    told = dict(is_available=True, set_device=None, get_device_name="none", reset_peak_memory_stats=None,
                max_memory_allocated=0, synchronize=None)
    with monkeypatch.context() as mp:
        for name, value in told.items():
            mp.setattr(torch.cuda, name, lambda *a, value=value, **k: value)
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # by torch's version
            mp.setattr(torch.optim.Optimizer, name, lambda self: None, raising=False)
        mp.setattr(torch._prims_common, "check_same_device", lambda *a, **k: None)    # it minds those zero tangents
        for name in FACTORIES:
            mp.setattr(torch, name, factory(gpu, getattr(torch, name)))
        T = torch.Tensor
        mp.setattr(T, "to", to(gpu, T.to))
        mp.setattr(T, "cpu", lambda x: x.to(CPU))
        mp.setattr(T, "cuda", lambda x: x.to(CUDA))
        for name in ("tolist", "numpy", "__array__"):
            mp.setattr(T, name, reads(gpu, getattr(T, name)))
        mp.setattr(T, "device", property(lambda x: CUDA if gpu.has(x) else CPU), raising=False)
        mp.setattr(T, "is_cuda", property(gpu.has), raising=False)
        mp.setattr(T, "is_cpu", property(lambda x: not gpu.has(x)), raising=False)
        with gpu:
            yield gpu
