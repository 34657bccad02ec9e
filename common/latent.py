"""Networks of diffusers as raw networks, and the latents of pictures with captions as a data set.

python -m common.latent FOLDER --pipeline PIPE --out coco.npz encodes the pictures of a folder once, with the VAE of the
Stable Diffusion 1.x or 2.x in the folder PIPE; --dataset coco.npz then trains on them, from that pipeline's network.
Captions stand in metadata.jsonl, a line {"file_name": "a.jpg", "text": "a red bus"} each, or in a.txt beside a.jpg.
Needs the packages diffusers and transformers."""
import json
import math
import os
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import data
from common.flags import BadInput, Parser, brief, config_of, device_of, printable, say
from common.pipeline import check, code, encode, identity, log_sigmas, part
from common.precond import EDM

# The layers that get adapters, by the ends of their names: as in the LoRA of LCM (arXiv:2311.05556), PCM and iCD
TARGETS = re.compile(r"(^|\.)(to_[qkv]|to_out\.0|proj_(in|out)|ff\.net\.(0\.proj|2)|conv[12]|conv_shortcut"
                     r"|(down|up)samplers\.0\.conv|time_emb_proj)$")


# ---- the raw network -----------------------------------------------------------------------------
class Scaled(torch.autograd.Function):
    """The identity. At a network's output (grow) its gradient is multiplied by the power of two that brings the largest
    number to about 1, at the weights divided by it: a mean over 16,384 numbers has gradients too small for float16."""
    @staticmethod
    def forward(ctx, x, box, grow=False):
        ctx.box, ctx.grow = box, grow
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        if ctx.grow:
            ctx.box["factor"] = torch.exp2(-g.abs().amax().clamp(min=1e-30).log2().ceil())
        return g * ctx.box["factor"] if ctx.grow else g / ctx.box["factor"], None, None


class LoRA(nn.Module):
    """layer(x) + up(down(x)) (arXiv:2106.09685) with a frozen layer, a Linear or Conv2d; `up` starts at 0."""
    def __init__(self, layer, rank, box):
        super().__init__()
        self.__dict__.update(layer=layer, box=box)        # no submodule: the layer's weights are not this one's
        shape = layer.weight.shape
        self.down = nn.Parameter(torch.empty(rank, *shape[1:]))
        self.up = nn.Parameter(torch.zeros(shape[0], rank, *[1] * (len(shape) - 2)))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def _apply(self, fn, recurse=True):                   # .to() and .double() of the layer, too
        self.layer._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, x):
        down, up = Scaled.apply(self.down, self.box), Scaled.apply(self.up, self.box)
        if isinstance(self.layer, nn.Conv2d):
            return self.layer(x) + F.conv2d(F.conv2d(x, down, None, self.layer.stride, self.layer.padding), up)
        return self.layer(x) + F.linear(F.linear(x, down), up)


class SD(nn.Module):
    """The network of a pipeline as EDM's raw network: u [B,C,H,W], c_noise [B], y [B] or None -> F [B,C,H,W], float32.

    With x = x0 + t eps, t = exp(4 c_noise) and u = c_in x, the network's own input is x / sqrt(1 + t^2), and EDM's
    denoiser becomes D = x - t eps(x / sqrt(1 + t^2), timestep, caption), with a timestep that is linear in ln t between
    two of them. DDIM's steps are then Euler's. y is the index of a caption; -1, and None, are the empty one.

    lora: rank of adapters, which then are the only parameters; 0: all weights are. Copies share what is frozen.
    With `dtype` bfloat16 it computes in it inside; on CUDA with adapters in float16, whose rounding is an eighth."""
    mixed = True                                          # see EDM.forward

    def __init__(self, pipeline, sha256, prompts, size, channels, sd=1.0, lora=0, **_):
        super().__init__()
        check(pipeline, sha256)
        self.kwargs = dict(net="sd", pipeline=str(pipeline), sha256=sha256, prompts=list(prompts), size=size, sd=sd,
                           channels=channels, lora=0, classes=len(prompts), dropout=0.0, mult=(), blocks=0)
        self.sd, self.box, self.text, self.tokenizer = sd, {}, None, None
        self.ln_sigma, self.predicts_v = log_sigmas(pipeline)
        self.unet = part(pipeline, "unet")
        c = self.unet.config
        if {c["in_channels"], c["out_channels"]} != {channels} or any(
                c.get(k) for k in ("num_class_embeds", "class_embed_type", "addition_embed_type")):
            raise BadInput(f"{pipeline}: its network takes {c['in_channels']} and gives {c['out_channels']} channels, "
                           f"where the data have {channels}, or it has inputs beside a caption")
        if prompts:
            self.__dict__["text"], self.tokenizer = part(pipeline, "text_encoder"), part(pipeline, "tokenizer")
            self.say(prompts)
        if lora:
            self.adapt(lora)

    def say(self, prompts):
        """From now on label i stands for prompts[i], and -1 for the empty prompt."""
        length = self.text.config.max_position_embeddings
        ids = self.tokenizer([*prompts, ""], padding="max_length", truncation=True, max_length=length).input_ids
        self.register_buffer("tokens", torch.tensor(ids, device=self.text.device), persistent=False)
        self.kwargs |= dict(prompts=list(prompts), classes=len(prompts))

    def adapt(self, rank):
        """Freeze all weights, and hide them; put adapters beside the layers of TARGETS."""
        unet = self.__dict__["unet"] = self._modules.pop("unet").requires_grad_(False)      # no submodule any more
        layers = {n: m for n, m in unet.named_modules() if TARGETS.search(n) and isinstance(m, (nn.Linear, nn.Conv2d))}
        self.lora = nn.ModuleDict({n.replace(".", "/"): LoRA(m, rank, self.box) for n, m in layers.items()})
        for name in layers:
            top, _, last = name.rpartition(".")
            setattr(unet.get_submodule(top), last, self.lora[name.replace(".", "/")])
        self.kwargs["lora"] = rank

    def student(self, args):
        """A trainable copy, as the flags lora, checkpoint_acts and bf16 of a run have it: with adapters, or with
        weights of its own."""
        new = deepcopy(self)
        if args.lora:
            new.adapt(args.lora)
            for v in new.frozen() if args.bf16 and next(new.unet.parameters()).is_cuda else ():
                v.data = v.data.half() if v.is_floating_point() else v.data       # shared: the teacher's, too
        else:
            new.unet = deepcopy(self.unet).requires_grad_(True)
        if args.checkpoint_acts:
            new.unet.enable_gradient_checkpointing()      # has no effect without a gradient
        return new.requires_grad_(True)

    def frozen(self):
        modules = [m for m in (self.unet, self.text) if m is not None]
        modules += [m.layer for m in self.unet.modules() if isinstance(m, LoRA)]
        return [v for m in modules for v in (*m.parameters(), *m.buffers()) if not v.requires_grad]

    def __deepcopy__(self, memo):
        """Frozen tensors are shared: net, its averages and its teacher have one set of them."""
        memo |= {id(v): v for v in (*self.frozen(), self.tokenizer)}
        new = memo[id(self)] = SD.__new__(SD)
        new.__dict__.update(deepcopy(self.__dict__, memo))
        return new

    def _apply(self, fn, recurse=True):
        """.to() and .double() of what is hidden, too."""
        for m in filter(None, (self.__dict__.get("unet"), self.text)):
            m._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def timestep(self, t):
        """The timestep, with a fraction, of noise level t [B]."""
        table, ln = self.ln_sigma.to(t), t.log()
        i = torch.searchsorted(table, ln).clamp(1, len(table) - 1)
        return (i - 1 + (ln - table[i - 1]) / (table[i] - table[i - 1])).clamp(0, len(table) - 1)

    def forward(self, u, c_noise, y=None, dtype=torch.float32):
        t, more, half = (4 * c_noise).exp().expand(len(u)), {}, dtype == torch.bfloat16
        wide = t.view(-1, 1, 1, 1)
        x = u * ((wide**2 + self.sd**2) / (1 + wide**2)).sqrt()
        if half and u.is_cuda and self.kwargs["lora"]:
            dtype = torch.float16
        with torch.autocast(u.device.type, dtype if half else torch.bfloat16, enabled=half):
            if self.text is not None:
                y = torch.full((len(u),), -1, device=u.device) if y is None else y
                more["encoder_hidden_states"] = self.text(self.tokens[y])[0]
            eps = Scaled.apply(self.unet(x, self.timestep(t), **more).sample.to(u.dtype), self.box, True)
        if self.predicts_v:                               # v = a eps - s x0 with a = 1 / sqrt(1 + t^2), s = t a
            eps = (wide * x + eps) / (1 + wide**2).sqrt()
        return (wide * u - (wide**2 + self.sd**2).sqrt() * eps) / self.sd


def from_pipeline(args, data, run):
    """As teacher.get, of a pipeline: the one that --teacher names, or that of the latents."""
    path = data.latent["pipeline"] if args.teacher == "auto" else args.teacher
    if hasattr(args, "flow"):
        raise BadInput(f"{path}: networks of diffusers have no smooth derivative in time; take a method without --flow")
    known = data.latent.get("sha256") or args.resume and config_of(args.resume)["about"].get("teacher_sha256")
    known, (_, channels, size, _) = known or identity(path), data.images.shape
    net = EDM(SD(path, known, data.names if data.latent else (), size, channels, args.sd), args.sd)
    run.about |= dict(teacher_sha256=known, network=f"of {Path(path).name}" + f", LoRA {args.lora}" * (args.lora > 0))
    say(f"teacher: {path}")
    if data.latent:                                       # for pictures
        data.latent["pipeline"] = path
    changes = dict(teacher=str(Path(path).resolve()), dropout=0.0)
    return net.to(run.device).eval().requires_grad_(False), None if data.latent else Path(path), changes


# ---- pictures with captions ----------------------------------------------------------------------
def lines(prompts):
    """The captions of --prompts: one, or a file with one in each line. Raises BadInput."""
    text = Path(prompts).read_text(errors="replace") if os.path.isfile(prompts) else prompts
    if not (found := [line.strip() for line in text.splitlines() if line.strip()]):
        raise BadInput("--prompts holds no caption; give a text, or a file with one in each line")
    return found


def captions(folder, files):
    """The caption of each file, from metadata.jsonl or from .txt files beside them; of several the first. BadInput."""
    listed, found = folder / "metadata.jsonl", {}
    for line in listed.read_text(errors="replace").splitlines() if listed.is_file() else ():
        try:
            row = json.loads(line)
            text = next(row[k] for k in ("text", "prompt", "caption") if k in row)
            found[row["file_name"]] = str(text[0] if isinstance(text, list) else text).strip()
        except (ValueError, LookupError, StopIteration, TypeError):
            raise BadInput(f'{listed}: {printable(line[:99])}; expected {{"file_name": "a.jpg", "text": "a red bus"}}')
    if not listed.is_file():
        beside = {f: (folder / f).with_suffix(".txt") for f in files}
        found = {f: t.read_text(errors="replace").strip() for f, t in beside.items() if t.is_file()}
    for names, what in (([f for f in files if not found.get(f)], "without a caption"),
                        (sorted(found.keys() - set(files)), "with a caption, but no picture")):
        if names:
            raise BadInput(printable(f"{folder}: {', '.join(names[:3])}{', ..' * (len(names) > 3)}, {len(names):,} "
                                     f"{what}; captions stand in metadata.jsonl, or in a.txt beside a.jpg"))
    return [found[f] for f in files]


def write(out, latents, texts, pipeline, size):
    """The .npz that --dataset reads: images float16 [N,h,w,C], labels [N] into prompts."""
    prompts, tmp = sorted(set(texts)), out.with_suffix(".tmp")
    number = {text: i for i, text in enumerate(prompts)}
    with open(tmp, "wb") as f:
        np.savez(f, images=latents.permute(0, 2, 3, 1).numpy().astype(np.float16), prompts=np.array(prompts),
                 labels=np.array([number[t] for t in texts]), pipeline=str(Path(pipeline).resolve()),
                 sha256=identity(pipeline), size=size)
    os.replace(tmp, out)


def main(argv=None):
    ap = Parser(prog="python -m common.latent", allow_abbrev=False, description=__doc__.split("\n\n")[1])
    ap.add_argument("folder", help="pictures with captions")
    ap.add_argument("--pipeline", required=True, help="the folder of a Stable Diffusion, as diffusers saves it")
    ap.add_argument("--size", type=int, default=512, help="pixels a side of the centre square [%(default)s]")
    ap.add_argument("--out", default="latents.npz", help="[%(default)s]")
    ap.add_argument("--device", choices=["auto", "cuda", "cpu", "mps"], default="auto", help="[%(default)s]")
    a = ap.parse_args(argv)
    folder, out, device = Path(a.folder), Path(a.out), device_of(a.device)
    if out.suffix != ".npz" or out.exists() or not os.access(out.absolute().parent, os.W_OK):
        raise BadInput(f"--out {out}: name a new file that ends in .npz, in a folder that can be written")
    if not 0 < a.size <= 2048 or a.size % 8:
        raise BadInput(f"--size {a.size} must be a multiple of 8, at most 2048")
    files = [f for f in data.walk(folder) if f.lower().endswith(data.ENDINGS)] if folder.is_dir() else []
    if not files:
        raise BadInput(f"{folder} is no folder with pictures {data.ENDINGS}")
    texts, latents = captions(folder, files), []
    check(a.pipeline)
    code(a.pipeline, device)                              # what is missing is said before the work
    for f in tqdm(files, "encoding"):
        try:
            with open(folder / f, "rb") as file:
                image, *_ = data.decode(file, a.size)
        except Exception as e:                            # any decoder's
            raise BadInput(printable(f"{f} cannot be read ({brief(e)}); remove or replace it"))
        x = torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1
        latents.append(encode(a.pipeline, x, device))
    write(out, torch.cat(latents), texts, a.pipeline, a.size)
    say(f"{len(files):,} pictures, {len(set(texts)):,} captions: {out}")
    return out


if __name__ == "__main__":
    main()
