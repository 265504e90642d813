"""--cache-latents: a folder that keeps each picture's latents, so that the VAE encodes it once."""

import hashlib
import os

import torch

from metaquery import InputError


class CachedLatents:
    """A MetaQuery's `encode_latents` that keeps what it made, a file for each picture.

    The file's name tells the weights of the VAE and the pixels, so any runs may share a folder.
    """

    def __init__(self, model, folder):
        if not hasattr(model.vae.config, "encoder_block_out_channels"):
            raise InputError("--cache-latents needs Sana's VAE: another's latents are random.")
        self.encode, self.dtype = model.encode_latents, model.vae.dtype
        digest = hashlib.sha256()
        for weight in model.vae.encoder.parameters():
            digest.update(weight.detach().flatten().view(torch.uint8).cpu().numpy())
        self.folder = os.path.join(folder, digest.hexdigest()[:16])

    def __call__(self, pixels):
        """As `encode_latents`."""
        names = [
            hashlib.sha256(picture.numpy()).hexdigest() for picture in pixels.cpu().contiguous()
        ]
        paths = [os.path.join(self.folder, name[:3], name) for name in names]
        new = [i for i, path in enumerate(paths) if not os.path.exists(path)]
        if new:
            for i, latents in zip(new, self.encode(pixels[new]).to(self.dtype).cpu(), strict=True):
                os.makedirs(os.path.dirname(paths[i]), exist_ok=True)
                aside = f"{paths[i]}-{os.getpid()}"
                torch.save(latents.clone(), aside)
                os.replace(aside, paths[i])
        latents = torch.stack([torch.load(path) for path in paths])  # (B, C, h, w)
        return latents.float().to(pixels.device)
