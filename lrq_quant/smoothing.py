"""Smoothing: per-channel factors that move outliers from the activation into the weight.

The input is multiplied by smooth_scale and the weight divided by it (method.md 2.4), so the product
is unchanged: (x * s) @ (W / s).T == x @ W.T.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Factors stay within this of their geometric mean: enough for a channel 10^6 times the others at
# alpha 0.5, and far from the limits of a half-precision activation.
MAX_FACTOR = 1024.0


def smooth_scale(
    act: Tensor,
    weight_absmax: Tensor,
    alpha: float,
    *,
    name: str | None = None,
    normalize: bool = True,
) -> Tensor:
    """Factors s_k = weight_absmax_k^(1 - alpha) / act_k^alpha, fp32 [K], finite and positive.

    act [K]: absmax or RMS of each input channel over the calibration; weight_absmax [K]: largest
    |W[:, k]| over all linears that read the input; alpha in [0, 1]: 0.5 balances both (the default
    of LRQ-DiT and SmoothQuant), 1 equalizes the activation alone.  normalize divides by the
    geometric mean, which changes no result of the default quantizer (its grids are relative to the
    RMS) but does that of the published one.  A channel dead in act or weight gets the factor 1; a
    warning under `name` counts them, unless name is None.
    """
    _check("act", act, weight_absmax.shape)
    _check("weight_absmax", weight_absmax, act.shape)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"smooth_scale: alpha must be in [0, 1], got {alpha}")
    act, weight_absmax = act.double(), weight_absmax.to(act.device).double()
    alive = (act > 0) & (weight_absmax > 0)
    dead = int((~alive).sum())
    if dead and name is not None:
        logger.warning(
            "smoothing of %s: %d of %d channels are dead in calibration, their factor is 1",
            name,
            dead,
            act.numel(),
        )
    one = torch.ones_like(act)
    log_act = torch.where(alive, act, one).log()
    log_weight = torch.where(alive, weight_absmax, one).log()
    log_factor = (1 - alpha) * log_weight - alpha * log_act
    center = log_factor[alive].mean() if dead < act.numel() else log_factor.new_zeros(())
    limit = torch.tensor(MAX_FACTOR, dtype=act.dtype).log().to(act.device)
    deviation = (log_factor - center).clamp(-limit, limit)
    factor = torch.exp(deviation if normalize else deviation + center)
    return torch.where(alive, factor, one).float()


def to_bf16(scale: Tensor) -> Tensor:
    """The factors in bf16, fp32 [K]: what the kernels of csrc/rotate multiply by. The weight is
    divided by the same, so that nothing is lost by it."""
    return scale.bfloat16().float()


def weight_absmax(weights: list[Tensor]) -> Tensor:
    """Largest |W[:, k]| over linears [N_i, K] that share an input, fp32 [K]."""
    return torch.stack([weight.detach().abs().amax(0).float() for weight in weights]).amax(0)


def _check(argument: str, value: Tensor, shape: torch.Size) -> None:
    if value.dim() != 1 or value.shape != shape or not value.is_floating_point():
        raise ValueError(
            "smooth_scale: act and weight_absmax must be floating [K] of one K, "
            f"got {argument} {value.dtype} {tuple(value.shape)}"
        )
    if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
        raise ValueError(f"smooth_scale: {argument} must be finite and not negative")
