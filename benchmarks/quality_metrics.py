"""How close pictures are to a reference, and how alike two sets of pictures are.

PSNR and SSIM need no network.  The feature distance (as LPIPS, arXiv 1801.03924: unit-normalized
channels, squared differences, averaged over places and summed over layers) and the distribution
distance (Frechet, arXiv 1706.08500) use FeatureNet, a small network that learns here, in seconds,
to name what is in a scene of the testbed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lrq_quant.demo.compare import psnr_db

__all__ = ["FeatureNet", "feature_net", "frechet_distance", "psnr_db", "ssim"]

_WIDTHS = (32, 64, 64)
_SSIM_SIGMA, _SSIM_WINDOW = 1.5, 11
_TRAIN_BATCH, _TRAIN_RATE = 64, 2e-3
# Draws n scenes: pictures fp32 [n, 3, H, W] in 0..1 and what is in them, 0 or 1, fp32 [n, labels].
DrawScenes = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def ssim(
    pictures: np.ndarray, reference: np.ndarray, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Structural similarity of each pair [P, H, W, 3] in 0..1, as Wang et al. 2004: Gaussian window
    of sigma 1.5, 11 wide, without padding, mean over colours and places. Computed in fp64, on
    `device`."""
    a = torch.from_numpy(pictures).to(device).double().permute(0, 3, 1, 2)
    b = torch.from_numpy(reference).to(device).double().permute(0, 3, 1, 2)
    offsets = torch.arange(_SSIM_WINDOW, dtype=torch.float64, device=device) - _SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * _SSIM_SIGMA**2))
    window = (window / window.sum()).repeat(a.shape[1], 1, 1)

    def blur(x: Tensor) -> Tensor:
        channels = x.shape[1]
        x = F.conv2d(x, window[:, :, None, :], groups=channels)
        return F.conv2d(x, window[:, :, :, None], groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    total = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return (similar / total).mean(dim=(1, 2, 3)).cpu().numpy()


class FeatureNet(nn.Module):
    """Three strided convolutions and a linear head on the mean and the maximum over places."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        sizes = (3, *_WIDTHS)
        self.stages = nn.ModuleList(
            nn.Conv2d(i, o, 5 if i == 3 else 3, stride=2, padding=2 if i == 3 else 1)
            for i, o in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.head = nn.Linear(2 * _WIDTHS[-1], labels)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Activations of every stage of pictures fp32 [B, 3, H, W] in 0..1."""
        x, stages = pictures * 2 - 1, []
        for stage in self.stages:
            x = F.gelu(stage(x))
            stages.append(x)
        return stages

    def pooled(self, pictures: Tensor) -> Tensor:
        """fp32 [B, 128], what the head reads."""
        last = self.features(pictures)[-1].flatten(2)
        return torch.cat([last.mean(-1), last.amax(-1)], dim=1)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.pooled(pictures))

    @torch.no_grad()
    def distance(self, pictures: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """Feature distance of each pair [P, H, W, 3] in 0..1."""
        total = torch.zeros(len(pictures))
        for a, b in zip(
            self.features(as_tensor(pictures)), self.features(as_tensor(reference)), strict=True
        ):
            a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
            total += (a - b).square().sum(1).mean(dim=(1, 2))
        return total.numpy()

    @torch.no_grad()
    def frechet(self, pictures: np.ndarray, reference: np.ndarray) -> float:
        """Frechet distance of the pooled features of two sets of pictures [P, H, W, 3]."""
        return frechet_distance(self.pooled(as_tensor(pictures)), self.pooled(as_tensor(reference)))


def as_tensor(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).float().permute(0, 3, 1, 2)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^1/2) of two samples [n, D] taken as Gaussian, over
    tr B, so that it does not depend on the scale of features.  Says little below D samples."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    distance = mean + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance / cov_b.trace().clamp_min(1e-30)))


def feature_net(
    draw: DrawScenes,
    cache: Path,
    *,
    steps: int = 400,
    device: torch.device | str = "cpu",
) -> FeatureNet:
    """The network of one testbed, on the CPU: from the file `cache`, or trained and put there."""
    labels = draw(1, torch.Generator(device).manual_seed(0))[1].shape[1]
    torch.manual_seed(0)
    net = FeatureNet(labels)
    if cache.is_file():
        net.load_state_dict(load_file(cache))
        return net.eval()
    net = net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=_TRAIN_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _TRAIN_RATE, total_steps=steps)
    generator = torch.Generator(device).manual_seed(1)
    for _ in range(steps):
        pictures, target = draw(_TRAIN_BATCH, generator)
        noise = torch.randn(pictures.shape, generator=generator, device=pictures.device)
        loss = F.binary_cross_entropy_with_logits(net(pictures + 0.05 * noise), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    net = net.cpu().eval()
    save_file(net.state_dict(), temporary)
    os.replace(temporary, cache)
    return net
