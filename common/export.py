"""python -m common.export RUN OUT

The averaged weights of a run for other programs, float32. OUT ends in .safetensors: tensors, beside them as metadata
the description from which common.teacher.load, given that file, makes the network again; needs the package safetensors.
OUT ends in .pt: a state dict under the names of EDM's own checkpoints, for load_state_dict of its EDMPrecond."""
import json
import os
from pathlib import Path

import torch

from common import folder
from common.flags import BadInput, Parser, brief, say
from common.released import load


def to_safetensors(net, out):
    """Raises BadInput without the package."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise BadInput(f"{out}: this needs the package safetensors; pip install safetensors, or name a .pt")
    save_file(tensors(net), out, dict(format="pt", model=json.dumps(net.spec)))


def to_edm(net, out):
    """BadInput unless the network is one of EDM's: a U-Net in EDM's coordinates, without sCM's changes."""
    spec = net.spec
    if spec["flow"] != "edm" or spec["net"] == "dit" or spec["kwargs"]["norm"] != "single":
        raise BadInput(f"{out}: a {spec['net']} of flow {spec['flow']} is none of EDM's networks; name a .safetensors")
    torch.save(tensors(net), out)


def tensors(net):
    return {k: v.detach().to(torch.float32).contiguous() for k, v in net.state_dict().items()}


@folder.guarded
def main(argv=None):
    ap = Parser(prog="python -m common.export", allow_abbrev=False, description=__doc__.split("\n\n")[1])
    ap.add_argument("run", help="a run folder, or a checkpoint in one")
    ap.add_argument("out", help="a .safetensors or a .pt")
    a = ap.parse_args(argv)
    out = Path(a.out)
    write = {".safetensors": to_safetensors, ".pt": to_edm}.get(out.suffix)
    if write is None:
        raise BadInput(f"{out}: the ending says what is written; name a .safetensors or a .pt")
    net, tmp = load(a.run), out.with_name(f"{out.name}.tmp")
    try:
        write(net, tmp)
        os.replace(tmp, out)
    except OSError as e:
        raise BadInput(f"{out}: {e.strerror or brief(e)}")
    finally:
        tmp.unlink(missing_ok=True)
    say(f"{sum(v.numel() for v in net.parameters()) / 1e6:.2f} M parameters: {out}")
    return out


if __name__ == "__main__":
    main()
