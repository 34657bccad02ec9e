"""A fixed linear code of pictures that takes the place of a VAE where nothing can be downloaded."""
import json
from pathlib import Path

import torch
import torch.nn.functional as F


class Patches(torch.nn.Module):
    """Each patch of 4x4 pixels as 12 numbers, its principal components divided by their standard deviations.
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
