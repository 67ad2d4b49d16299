"""What a linear sees once its input is quantized, and the weight that makes the best of it.

Quantizing a token v gives v_q = G v + e: a gain G close to 1 in every channel and noise e that v
does not explain (Bussgang's decomposition, channel by channel).  With H = E[v v^T] and D the
variances of e,

    E[v_q v_q^T] = G H G + D = H_q        E[v v_q^T] = H G = C        W' = W C H_q^-1.

W' v_q is the least-squares estimate of W v: where H has little energy the noise is let through less
(Wiener's filter).  That is the best for one product, not for a picture: what the filter takes away
is missing at every step of the sampler, while noise is another at each.  Half the way to W' costs a
fourth of what W' gains in one product and half of what it takes away: so far goes an input of 4
bits.  At 8 bits W' gains nothing to speak of (0.02 dB in a product) and pictures are better with W,
as at 16 bits, where both are the same.  Rounding then follows that weight by error feedback over
H_q.

What is lost of the gain of a row w, by the filter, by the clipping in G and by levels, which lie
nearer to zero than what they stand for, comes back in its scale, at no cost:

    w^ <- w^ E[(w v)^2] / E[(w v)(w^ v_q)] = w^ (w H w^T) / (w C w^^T).

The error of a product grows a little by that, but it no longer pulls all steps one way.  The bias
then takes up what the means leave.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .calibration import ActivationStats
from .error_feedback import ErrorFeedback, NearestValue, rotated_gram
from .twin_log import sensible_gain

_TINY = 1e-30
# Of the way from W to W', by the bits of the input; measured in pictures (README).
_SHARE = {4: 0.5}
# Damping is at least this times K over the distinct tokens: by about that share the moments of few
# tokens may be wrong about tokens to come; up to a limit, where feedback still helps.
_FEW_TOKENS, _FEW_TOKENS_LIMIT = 0.5, 0.1


class QuantizedInput:
    """Second moments of one smoothed, rotated and quantized input, shared by its linears.

    stats with gram; smooth_scale fp32 [K] or None; rotate acts on the last dimension; quantize maps
    sampled tokens fp32 [M, K], rotated, to what their codes stand for; damping as in ErrorFeedback,
    more where there are few tokens; passes of refinement.  Work is on `device`.

    Moments are about zero although the biases take up the mean (bias_offset): other pictures and
    single steps have other means, and a weight that is right about one mean alone draws worse ones
    (README), if better products of the tokens that were seen.
    """

    def __init__(
        self,
        stats: ActivationStats,
        smooth_scale: Tensor | None,
        rotate: Callable[[Tensor], Tensor],
        quantize: Callable[[Tensor], Tensor],
        *,
        device: torch.device,
        damping: float = 0.01,
        passes: int = 1,
    ) -> None:
        if stats.gram is None:
            raise ValueError(
                f"QuantizedInput: statistics of {stats.name} must hold the gram matrix, got none"
            )
        self._passes = passes
        scale = 1.0 if smooth_scale is None else smooth_scale
        self.mean = rotate(stats.mean.to(device) * scale)
        tokens = rotate(stats.sample.to(device, torch.float32) * scale)
        error = quantize(tokens) - tokens
        self.quantized_mean = self.mean + error.mean(0)

        gram = stats.gram.to(device) / max(stats.count, 1)
        moments = rotated_gram(gram, smooth_scale, rotate).double()
        del gram
        tokens, error = tokens.double(), error.double()
        power = tokens.square().mean(0)
        seen = power > _TINY
        shared = (tokens * error).mean(0)
        gain = torch.where(seen, 1 + shared / power.clamp_min(_TINY), torch.ones_like(power))
        noise = error.square().mean(0) - shared.square() / power.clamp_min(_TINY)
        noise = torch.where(seen, noise, torch.zeros_like(noise)).clamp_min(0)

        cross = moments * gain
        quantized = cross * gain[:, None]
        quantized.diagonal().add_(noise)
        uncertain = _FEW_TOKENS * len(power) / max(distinct_tokens(stats), 1.0)
        damping = max(damping, min(uncertain, _FEW_TOKENS_LIMIT))
        self.feedback = ErrorFeedback(quantized, damping=damping)
        self.importance = self.feedback.importance
        self._gain = gain
        self._cross = cross
        if self.feedback.added is not None:
            self._cross.diagonal().add_(self.feedback.added)

    def least_squares(self, weight: Tensor) -> Tensor:
        """W' fp32 [N, K] of the rotated weight [N, K]."""
        if self.feedback.added is None:
            return weight.float()
        return self.feedback.solve(weight.double() @ self._cross).float()

    def lost_gain(self, weight: Tensor, decoded: Tensor) -> Tensor:
        """Factor fp32 [N] on each row of `decoded` [N, K], with which its product holds the exact
        one in full: E[(w v)^2] / E[(w v)(w^ v_q)]; 1 where that is not a positive number."""
        exact = weight.double()
        projected = exact @ self._cross
        energy = (projected / self._gain * exact).sum(1)
        return sensible_gain(energy / (projected * decoded.double()).sum(1))

    def target(self, weight: Tensor, act_bits: int) -> Tensor:
        """What to round in place of the rotated weight [N, K], for an input of act_bits: the weight
        itself or the half-way to W', fp32 [N, K]."""
        share = _SHARE.get(act_bits, 0.0)
        if share == 0:
            return weight.float()
        return torch.lerp(weight.float(), self.least_squares(weight), share)

    def round(self, target: Tensor, nearest: NearestValue) -> Tensor:
        """target(weight) rounded with error feedback, fp32 [N, K]."""
        return self.feedback.round(target, nearest, self._passes)

    def bias_offset(self, weight: Tensor, decoded: Tensor) -> Tensor:
        """What the bias must take up, fp32 [N]: W E[v] - W^ E[v_q]."""
        return weight @ self.mean - decoded @ self.quantized_mean


def distinct_tokens(stats: ActivationStats) -> float:
    """About how many different tokens were counted: captions come again at every step, and the
    unguided half has one caption for all.

    The share of sampled rows that occur once is that of tokens of their own among all (Good and
    Turing); to these the values that occur more often are added.
    """
    if stats.sample.shape[0] == 0:
        return float(stats.count)
    times = torch.unique(stats.sample.float(), dim=0, return_counts=True)[1]
    once = float((times == 1).sum())
    return once / stats.sample.shape[0] * stats.count + float((times > 1).sum())
