"""The VAE of the small model: 64 x 64 pixels to 4 x 16 x 16 latents, whitened."""

from __future__ import annotations

import random

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from library.world import concepts, draw, scenes
from library.world.backward import autocast, backward_of
from library.world.descent import Descent

CONFIG = {
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 2,  # with many groups a flat picture is normalised away
    "sample_size": draw.SIZE,
    "scaling_factor": 1.0,
}
KL_WEIGHT = 1e-8  # of the sum over latents, beside a mean over pixels
UNSEEN_CREATURES = 1000  # creatures below this seed are in no training set


class VaeLoss(nn.Module):
    """Mean L1 distance, four times for things, since the background is most of a picture; and a little KL."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> Tensor:
        """Of pixels (b, 3, 64, 64)."""
        with autocast(pixels.device):
            posterior = self.vae.encode(pixels).latent_dist
            decoded = self.vae.decode(posterior.sample()).sample
        things = (pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1
        distance = ((decoded.float() - pixels).abs() * (1 + 3 * things)).mean()
        return distance + KL_WEIGHT * posterior.kl().mean()


def train(steps: int, batch_size: int, device: torch.device, seed: int) -> AutoencoderKL:
    """An autoencoder of the world's scenes and of creatures, by L1 distance and a little KL."""
    torch.manual_seed(seed)
    rng = random.Random(f"vae {seed}")
    vae = AutoencoderKL(**CONFIG).to(device)
    with torch.no_grad():  # begin with little noise in the latents: unlearning that of scale 1 takes a thousand steps
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -6
    optimizer = torch.optim.AdamW(vae.parameters(), lr=7e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    descent = Descent("vae", optimizer, steps, rise=0.05)
    backward = backward_of(VaeLoss(vae), [draw.render(_pictures(batch_size, random.Random(seed)), device)])
    for _ in range(steps):
        loss = backward(draw.render(_pictures(batch_size, rng), device))
        descent.step("loss", loss)
    whiten(vae, draw.render(_pictures(512, rng), device))
    return vae.eval()


def _pictures(number: int, rng: random.Random) -> list[draw.Picture]:
    """Three scenes for every creature."""
    return [
        concepts.portrait(concepts.creature(rng.randrange(UNSEEN_CREATURES, 10**9)), rng)
        if i % 4 == 3
        else scenes.draw_scene(rng).picture()
        for i in range(number)
    ]


@torch.no_grad()
def whiten(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Gives the latents mean 0 and covariance 1, by folding the linear map into the 1 x 1 convolutions around them.

    The encoder's spread (log variance) shrinks with the map's mean stretch.
    """
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])
    flat = means.double().movedim(1, -1).flatten(0, -2)
    centre = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - centre).T @ (flat - centre) / len(flat))
    to_white, from_white = (vectors @ torch.diag(values**power) @ vectors.T for power in (-0.5, 0.5))
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(centre)
    weight, bias = quant.weight.double().flatten(1), quant.bias.double()
    stretch = torch.linalg.det(to_white).log() * 2 / channels
    quant.weight[:channels] = (to_white @ weight[:channels]).to(quant.weight.dtype)[:, :, None, None]
    quant.bias[:channels] = (to_white @ (bias[:channels] - centre)).to(quant.bias.dtype)
    quant.bias[channels:] += stretch.to(quant.bias.dtype)
    weight = post.weight.double().flatten(1)
    post.bias += (weight @ centre).to(post.bias.dtype)
    post.weight.copy_((weight @ from_white)[:, :, None, None])
