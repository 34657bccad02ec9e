"""python -m common.export RUN OUT

The averaged weights of a run for other programs, float32. OUT ends in .safetensors: tensors, and as metadata the
description from which common.teacher.load, given that file, makes the network again; needs the package safetensors. OUT
ends in .pt: a state dict with the names of EDM's checkpoints, for load_state_dict of its EDMPrecond. Otherwise, of a
run on latents: a folder that diffusers loads, the pipeline with the run's weights and a scheduler with which it samples
as the run does, up to the noise of its t_min, at guidance_scale=1; with adapters also pytorch_lora_weights.safetensors
for a pipeline's load_lora_weights."""
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from common import folder
from common.flags import BadInput, Parser, brief, config_of, say
from common.latent import LoRA
from common.released import load


def write_pipeline(net, run, place):
    """A copy of the run's pipeline with its own network and scheduler, in the folder `place`."""
    from safetensors.torch import save_file
    source, unet = Path(net.model.kwargs["pipeline"]), net.model.unet
    adapters = {name: m for name, m in unet.named_modules() if isinstance(m, LoRA)}
    for name, m in adapters.items():
        m.layer.weight += (m.up.flatten(1) @ m.down.flatten(1)).view_as(m.layer.weight)
        top, _, last = name.rpartition(".")
        setattr(unet.get_submodule(top), last, m.layer)
    shutil.copytree(source, place, ignore=shutil.ignore_patterns("unet", ".*"))
    unet.save_pretrained(place / "unet")
    jumps = config_of(run)["t_mid"] is None               # from edge to edge, without more noise: DDIM
    kind = "DDIMScheduler" if jumps else "LCMScheduler"
    scheduler = json.loads((source / "scheduler/scheduler_config.json").read_text()) | dict(
        _class_name=kind, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False, skip_prk_steps=True)
    (place / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler, indent=1))
    index = json.loads((source / "model_index.json").read_text()) | dict(scheduler=["diffusers", kind])
    (place / "model_index.json").write_text(json.dumps(index, indent=1))
    lora = {f"unet.{name}.lora_{k}.weight": v.detach().contiguous()
            for name, m in adapters.items() for k, v in (("A", m.down), ("B", m.up))}
    if lora:
        save_file(lora, place / "pytorch_lora_weights.safetensors", dict(format="pt"))


def write(net, run, out, file):
    """Write `file`, in the format that the ending of `out` names. Raises BadInput where that is not possible."""
    if out.suffix not in (".safetensors", ".pt"):
        return write_pipeline(net, run, file)
    spec, weights = net.spec, {k: v.to(torch.float32).contiguous() for k, v in net.state_dict().items()}
    if out.suffix == ".safetensors":
        try:
            from safetensors.torch import save_file
        except ImportError:
            raise BadInput(f"{out}: this needs the package safetensors; pip install safetensors, or name a .pt")
        return save_file(weights, file, dict(format="pt", model=json.dumps(spec)))
    if spec["flow"] != "edm" or spec["net"] in ("dit", "sd") or spec["kwargs"]["norm"] != "single":
        raise BadInput(f"{out}: a {spec['net']} of flow {spec['flow']} is none of EDM's networks; name a .safetensors")
    torch.save(weights, file)
    say(f"not in the file: sigma_data {spec['sd']:g}" + (
        f"; c_skip and c_out of f(x, {spec['t_min']:g}) = x, which EDMPrecond lacks" if spec["t_min"] else ""))


@folder.guarded
def main(argv=None):
    ap = Parser(prog="python -m common.export", allow_abbrev=False, description=__doc__.split("\n\n")[1])
    ap.add_argument("run", help="a run folder, or a checkpoint in one")
    ap.add_argument("out", help="a .safetensors or a .pt; of a run on latents a new folder")
    ap.add_argument("--pipeline", default="", help="where the run's pipeline is now [where it was]")
    a = ap.parse_args(argv)
    out, run = Path(a.out), Path(a.run) if os.path.isdir(a.run) else Path(a.run).parent
    if (out.parent / "config.json").exists():
        raise BadInput(f"{out}: this is a run folder, whose own files end in .pt, too; name another place")
    net, file = load(a.run, pipeline=a.pipeline), out.suffix in (".safetensors", ".pt")
    if not file and (getattr(net.model, "text", None) is None or out.exists()):
        raise BadInput(f"{out}: the ending says what is written; name a .safetensors or a .pt"
                       + ", or a new folder" * (getattr(net.model, "text", None) is not None))
    try:
        with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
            write(net, run, out, Path(tmp) / out.name)
            os.replace(Path(tmp) / out.name, out)
    except Exception as e:                                # of the disk; safetensors has kinds of its own
        raise BadInput(f"{out} cannot be written: {getattr(e, 'strerror', None) or brief(e)}")
    say(f"{sum(v.numel() for v in net.parameters()) / 1e6:.2f} M parameters: {out}")
    return out


if __name__ == "__main__":
    main()
