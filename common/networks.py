"""From the flags, or from a checkpoint's description, to a network."""
import math
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from common.augment import LABELS
from common.dit import DiT
from common.flags import BadInput
from common.precond import EDM, TrigFlow
from common.unet import UNet

NETS = dict(ddpmpp=UNet, ncsnpp=UNet, adm=UNet, dit=DiT)


def build(spec, dtype=torch.float32):
    """The untrained network that `spec` describes: the `spec` of an EDM or TrigFlow, kept in every checkpoint. Raises
    ValueError, or whatever else a spec leads to that is none."""
    kwargs, sd, t_min = spec["kwargs"], float(spec["sd"]), float(0 if spec["flow"] == "trig" else spec["t_min"])
    if not (0 < sd < math.inf and 0 <= t_min < math.inf and 0 <= kwargs["dropout"] < 1
            and 0 < kwargs["size"] <= 4096 and 0 <= kwargs["classes"] < 2**31):
        raise ValueError("its sd, t_min, dropout, size or classes is that of no network")
    model = NETS[spec["net"]](**kwargs)
    if spec["flow"] == "trig":
        return TrigFlow(model, sd, spec["raw"], dtype)
    return EDM(model, sd, t_min, dtype)


def recompute(forward, *args):
    """A block's forward(*args), of which the inputs alone are kept for the backward pass. That calls it once more, with
    the same dropout. Where no gradient is asked for, as in sampling and in a derivative, a plain call."""
    return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)


def backbone(args, data, teacher=None, **more):
    """The raw network F that the flags describe, or a copy of the teacher's; in either case with the run's own dropout.
    `more`: keywords of a U-Net that have no flag. With --flow trig it gets sCM's changes, which make it smooth in the
    noise level: that loss contains the derivative with respect to it. BadInput where flags and images do not fit."""
    _, channels, size, _ = data.images.shape
    if teacher is not None:
        kwargs = dict(teacher.model.kwargs, dropout=args.dropout, augment_dim=0)
    else:
        if getattr(args, "flow", "edm") == "trig":
            more |= dict(norm="double", fourier=0.02)
        kwargs = dict(size=size, channels=channels, ch=args.ch, mult=args.mult, blocks=args.blocks, attn=args.attn,
                      classes=data.classes if args.cond else 0, dropout=args.dropout, net=args.net,
                      augment_dim=LABELS if getattr(args, "augment", 0) else 0)
        kwargs |= more if NETS[args.net] is UNet else {}
    if args.cond and not data.classes:
        raise BadInput(f"--cond: {data.name} has no labels")
    try:
        model = NETS[args.net](**kwargs)
    except ValueError as e:
        raise BadInput(f"--net {args.net}: {e}")
    if teacher is not None:
        weights = teacher.model.state_dict()
        weights.pop("map_augment.weight", None)           # only the teacher sees augmented images
        model.load_state_dict(weights)
    for block in model.modules() if args.checkpoint_acts else ():
        if type(block).__name__.endswith("Block"):
            block.forward = partial(recompute, block.forward)     # which deepcopy binds to the copy
    return model
