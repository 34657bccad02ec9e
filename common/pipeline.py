"""The folder of a pipeline of diffusers: its parts, by what it is known, its schedule, its code for pictures. Needs the
packages diffusers and transformers, which are imported only here."""
import json
import os
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.flags import BadInput, brief, printable

PARTS = dict(unet=("diffusers", "UNet2DConditionModel", "UNet2DModel"), vae=("diffusers", "AutoencoderKL"),
             text_encoder=("transformers", "CLIPTextModel"), tokenizer=("transformers", "CLIPTokenizer"), scheduler=())


def is_pipeline(path):
    return os.path.isfile(Path(path) / "model_index.json")


def place(pipeline, name):
    """The folder of a part; that of a pipeline of one network may be the pipeline's own."""
    top = Path(pipeline)
    return top if (top / "config.json").is_file() else top / name


def config(file):
    """A part's own description, a .json. Raises BadInput."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError) as e:
        raise BadInput(f"{file} cannot be read ({brief(e)}); name the folder of a whole pipeline")


def part(pipeline, name):
    """One part of a pipeline, on the CPU, frozen. Raises BadInput where it, or a package, is missing."""
    (package, *known), path = PARTS[name], place(pipeline, name)
    try:
        module = __import__(package)
        module.utils.logging.disable_progress_bar()
        kind = known[0] if name == "tokenizer" else config(path / "config.json").get("_class_name", known[0])
        if kind == "Patches":
            return Patches.from_pretrained(path)
        if kind not in known:
            raise ValueError(f"it is a {kind}")
        found = getattr(module, kind).from_pretrained(str(path), local_files_only=True)
    except ImportError:
        raise BadInput(f"{pipeline} is a pipeline of diffusers: pip install diffusers transformers")
    except Exception as e:                                # these packages raise many kinds
        raise BadInput(f"{pipeline}: its {name} cannot be read ({brief(e)}); name the folder of a whole pipeline")
    return found.eval().requires_grad_(False) if isinstance(found, nn.Module) else found


def identity(pipeline):
    """SHA-256 of the configurations and weights of a pipeline's parts."""
    total, files = sha256(), set()
    for folder in {place(pipeline, name) for name in PARTS}:
        weights = sorted(f for f in folder.glob("*model.*") if f.suffix in (".safetensors", ".bin"))
        files |= {*folder.glob("*.json"), *folder.glob("*.txt"), *weights[-1:]}     # .safetensors, where there are both
    for file in sorted(files - {Path(pipeline) / "model_index.json"}):
        total.update(file.relative_to(pipeline).as_posix().encode())
        with open(file, "rb") as f:
            for chunk in iter(lambda: f.read(2**24), b""):
                total.update(chunk)
    return total.hexdigest()


def check(pipeline, known=""):
    """BadInput unless a folder holds a pipeline that SD can be, with the SHA-256 `known` where that is given."""
    if not is_pipeline(pipeline):
        raise BadInput(f"{pipeline} holds no pipeline (no model_index.json); name where it is: in training with "
                       "--teacher, elsewhere with --pipeline")
    kind = config(Path(pipeline) / "model_index.json").get("_class_name")
    if kind not in ("StableDiffusionPipeline", "DDPMPipeline", "DDIMPipeline"):
        raise BadInput(f"{pipeline} is a {printable(kind)}; only Stable Diffusion 1.x and 2.x, and DDPMs of pixels, "
                       "can be taken")
    if known and identity(pipeline) != known:
        raise BadInput(f"{pipeline} is not the pipeline with which this was made; name that one")


def log_sigmas(pipeline):
    """ln of the noise levels sqrt(1 / alpha_bar - 1) of all timesteps, float64 [1000], and whether the network predicts
    v instead of eps. Raises BadInput for schedules that are not of Stable Diffusion 1.x, 2.x or DDPM."""
    c = config(place(pipeline, "scheduler") / "scheduler_config.json")
    kind, predicts = c.get("beta_schedule"), c.get("prediction_type", "epsilon")
    odd = [k for k in ("trained_betas", "rescale_betas_zero_terminal_snr") if c.get(k)]
    if odd or kind not in ("linear", "scaled_linear") or predicts not in ("epsilon", "v_prediction"):
        raise BadInput(f"{pipeline}: a schedule with {printable(odd[0] if odd else f'{kind}, {predicts}')} cannot be "
                       "taken; betas linear or scaled_linear, prediction epsilon or v_prediction")
    p = 0.5 if kind == "scaled_linear" else 1
    betas = torch.linspace(c["beta_start"] ** p, c["beta_end"] ** p, c["num_train_timesteps"], dtype=torch.float64)
    return (1 / (1 - betas ** (1 / p)).cumprod(0) - 1).log() / 2, predicts == "v_prediction"


# ---- pictures and latents ------------------------------------------------------------------------
class Patches(nn.Module):
    """A linear code in place of a VAE: of each patch of 4x4 pixels the 12 principal components, with variance 1.
    mean [48]; basis [12, 48]: orthogonal rows, whose norms are 1 / standard deviation."""
    def __init__(self, mean, basis, patch=4):
        super().__init__()
        self.patch = patch
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)

    def encode(self, images):                             # [B,3,H,W] in [-1, 1] -> latents [B,12,H/4,W/4]
        x = F.pixel_unshuffle(images, self.patch) - self.mean[:, None, None]
        return torch.einsum("zp,bphw->bzhw", self.basis, x)

    def decode(self, latents):                            # and back; what the components left out is lost
        inverse = self.basis / self.basis.square().sum(1, keepdim=True)
        x = torch.einsum("zp,bzhw->bphw", inverse, latents) + self.mean[:, None, None]
        return F.pixel_shuffle(x, self.patch)

    @classmethod
    def from_pretrained(cls, folder):
        from safetensors.torch import load_file
        config = json.loads((Path(folder) / "config.json").read_text())
        return cls(**load_file(Path(folder) / "diffusion_pytorch_model.safetensors"), patch=config["patch"])

    def save_pretrained(self, folder):
        from safetensors.torch import save_file
        Path(folder).mkdir()
        shape = dict(patch=self.patch, latent_channels=len(self.basis))
        (Path(folder) / "config.json").write_text(json.dumps(dict(_class_name="Patches") | shape, indent=1))
        save_file(self.state_dict(), Path(folder) / "diffusion_pytorch_model.safetensors", dict(format="pt"))


@lru_cache(maxsize=1)
def code(pipeline, device):
    """The VAE, or Patches, of a pipeline."""
    return part(pipeline, "vae").to(device)


@torch.no_grad()
def encode(pipeline, x, device):
    """Images [B,3,H,W] in [-1, 1] -> latents [B,C,h,w], on the CPU: the mean of the VAE's posterior, in float32, as its
    activations overflow in float16."""
    vae = code(pipeline, device)
    z = vae.encode(x.to(device))
    return (z if isinstance(vae, Patches) else z.latent_dist.mean * vae.config.scaling_factor).cpu()


@torch.no_grad()
def decode(pipeline, z, device):
    """Latents [B,C,h,w] -> images [B,3,H,W], on the CPU; one by one, as a picture of 512 x 512 takes a gigabyte."""
    vae = code(pipeline, device)
    scale = 1 if isinstance(vae, Patches) else vae.config.scaling_factor
    x = (vae.decode(v / scale) for v in z.to(device, torch.float32).split(1))
    return torch.cat([getattr(v, "sample", v).cpu() for v in x])
