"""python -m common.export RUN OUT

The averaged weights of a run for other programs, float32. OUT ends in .safetensors: tensors, and as metadata the
description from which common.teacher.load, given that file, makes the network again; needs the package safetensors. OUT
ends in .pt: a state dict with the names of EDM's checkpoints, for load_state_dict of its EDMPrecond."""
import json
import os
import tempfile
from pathlib import Path

import torch

from common import folder
from common.flags import BadInput, Parser, brief, say
from common.released import load


def write(net, out, file):
    """Write `file`, in the format that the ending of `out` names. Raises BadInput where that is not possible."""
    spec, weights = net.spec, {k: v.to(torch.float32).contiguous() for k, v in net.state_dict().items()}
    if out.suffix == ".safetensors":
        try:
            from safetensors.torch import save_file
        except ImportError:
            raise BadInput(f"{out}: this needs the package safetensors; pip install safetensors, or name a .pt")
        return save_file(weights, file, dict(format="pt", model=json.dumps(spec)))
    if spec["flow"] != "edm" or spec["net"] == "dit" or spec["kwargs"]["norm"] != "single":
        raise BadInput(f"{out}: a {spec['net']} of flow {spec['flow']} is none of EDM's networks; name a .safetensors")
    torch.save(weights, file)
    say(f"not in the file: sigma_data {spec['sd']:g}" + (
        f"; c_skip and c_out of f(x, {spec['t_min']:g}) = x, which EDMPrecond lacks" if spec["t_min"] else ""))


@folder.guarded
def main(argv=None):
    ap = Parser(prog="python -m common.export", allow_abbrev=False, description=__doc__.split("\n\n")[1])
    ap.add_argument("run", help="a run folder, or a checkpoint in one")
    ap.add_argument("out", help="a .safetensors or a .pt")
    a = ap.parse_args(argv)
    out = Path(a.out)
    if out.suffix not in (".safetensors", ".pt"):
        raise BadInput(f"{out}: the ending says what is written; name a .safetensors or a .pt")
    if (out.parent / "config.json").exists():
        raise BadInput(f"{out}: this is a run folder, whose own files end in .pt, too; name another place")
    net = load(a.run)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
            write(net, out, Path(tmp) / out.name)
            os.replace(Path(tmp) / out.name, out)
    except Exception as e:                                # of the disk; safetensors has kinds of its own
        raise BadInput(f"{out} cannot be written: {getattr(e, 'strerror', None) or brief(e)}")
    say(f"{sum(v.numel() for v in net.parameters()) / 1e6:.2f} M parameters: {out}")
    return out


if __name__ == "__main__":
    main()
