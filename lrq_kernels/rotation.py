"""Rotation of the input channels: an orthogonal map along K, the same for activation and weight.

"hadamard" (LRQ-DiT equation 12, mild outliers, in blocks):
    v = (x[permutation] * signs) @ blockdiag(H) / sqrt(block), H in natural (Sylvester) order
"dual" (LRQ-DiT equation 12, salient outliers; DuQuant, arXiv 2406.01721):
    v = ((x @ blockdiag(R1))[permutation]) @ blockdiag(R2), one 128 x 128 pair for all blocks

x' @ w'.T == x @ w.T for x' = apply(x), w' = apply(w), since every factor is orthogonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .scheme import BLOCK_SIZES, DUAL_BLOCK_SIZE, ROTATIONS


@lru_cache(maxsize=32)
def _sylvester(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat(
            [torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)]
        )
    return matrix


def plain_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype: torch.autocast reaches into the CPU kernels of ops."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def block_hadamard(x: Tensor, block_size: int) -> Tensor:
    """x [..., K] times blockdiag(H) / sqrt(block_size), in x's own dtype (fp32 or fp64)."""
    h = _sylvester(block_size, x.dtype, x.device)
    blocks = plain_matmul(x.reshape(-1, block_size), h)
    return (blocks * block_size**-0.5).view(x.shape)


def block_dense(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., K] times blockdiag(matrix), in x's own dtype."""
    return plain_matmul(x.reshape(-1, matrix.shape[0]), matrix.to(x.dtype)).view(x.shape)


@dataclass(frozen=True)
class Rotation:
    """kind: "none", "hadamard" or "dual"; signs: int8 [K] of +-1 (hadamard);
    permutation: int32 [K] (optional); matrices: fp32 [2, 128, 128] orthogonal (dual)."""

    kind: str = "none"
    block_size: int = DUAL_BLOCK_SIZE
    signs: Tensor | None = None
    permutation: Tensor | None = None
    matrices: Tensor | None = None

    @staticmethod
    def none() -> Rotation:
        return Rotation()

    @staticmethod
    def hadamard(
        in_features: int,
        block_size: int = 128,
        *,
        generator: torch.Generator | None = None,
        permutation: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Rotation:
        """Random signs drawn from `generator`, an optional permutation (int32 [K])."""
        signs = torch.randint(0, 2, (in_features,), generator=generator, dtype=torch.int8) * 2 - 1
        rotation = Rotation("hadamard", block_size, signs.to(device), permutation)
        rotation.validate(in_features)
        return rotation

    @staticmethod
    def regular(
        in_features: int, block_size: int = 128, *, device: torch.device | str | None = None
    ) -> Rotation:
        """Hadamard rotation whose signs spread what all channels of a block share evenly.

        Signs (1, 1, 1, -1) x (1, 1, 1, -1) x ... make every row of a block sum to +-sqrt(n) where
        its size n is a power of four: a regular Hadamard matrix but for signs of its rows (ConvRot,
        arXiv 2512.03673). In other blocks, with a last factor (1, 1), half of the rows sum to zero
        and half to +-sqrt(2 n)."""
        signs = torch.ones(1, dtype=torch.int8)
        while 4 * len(signs) <= block_size:
            signs = torch.kron(signs, torch.tensor([1, 1, 1, -1], dtype=torch.int8))
        signs = signs.repeat_interleave(block_size // len(signs))
        rotation = Rotation("hadamard", block_size, signs.repeat(in_features // block_size))
        rotation.validate(in_features)
        return rotation if device is None else rotation.to(device)

    @staticmethod
    def dual(matrices: Tensor, permutation: Tensor | None = None) -> Rotation:
        """The dense pair (fp32 [2, 128, 128]) with a permutation (int32 [K]) between the two."""
        return Rotation("dual", DUAL_BLOCK_SIZE, None, permutation, matrices)

    def validate(self, in_features: int) -> None:
        """Raise ValueError or TypeError unless this is a rotation of `in_features` channels."""
        if self.kind not in ROTATIONS:
            raise ValueError(f"Rotation: kind must be one of {ROTATIONS}, got {self.kind!r}")
        if self.kind == "none":
            extra = [
                n for n in ("signs", "permutation", "matrices") if getattr(self, n) is not None
            ]
            if extra:
                raise ValueError(f"Rotation: kind 'none' takes no tensors, got {extra}")
            return
        if self.block_size not in BLOCK_SIZES or in_features % self.block_size:
            raise ValueError(
                f"Rotation: block_size must be one of {BLOCK_SIZES} and divide K = {in_features}, "
                f"got {self.block_size}"
            )
        _check_permutation(self.permutation, in_features)
        if self.kind == "hadamard":
            _check_signs(self.signs, in_features)
            if self.matrices is not None:
                raise ValueError("Rotation: kind 'hadamard' takes no matrices")
        else:
            _check_matrices(self.matrices)
            if self.signs is not None or self.block_size != DUAL_BLOCK_SIZE:
                raise ValueError("Rotation: kind 'dual' takes no signs and blocks of 128")

    def apply(self, x: Tensor) -> Tensor:
        """Rotate the last dimension of x; computed in fp32 (fp64 for fp64), returned in x.dtype."""
        v = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "hadamard":
            if self.permutation is not None:
                v = v[..., self.permutation.long()]
            if self.signs is not None:
                v = v * self.signs.to(v.dtype)
            v = block_hadamard(v, self.block_size)
        elif self.kind == "dual" and self.matrices is not None:
            v = block_dense(v, self.matrices[0])
            if self.permutation is not None:
                v = v[..., self.permutation.long()]
            v = block_dense(v, self.matrices[1])
        return v.to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """The transpose map: inverse(apply(x)) == x up to rounding."""
        v = y.to(torch.promote_types(y.dtype, torch.float32))
        if self.kind == "hadamard":
            v = block_hadamard(v, self.block_size)  # H is symmetric
            if self.signs is not None:
                v = v * self.signs.to(v.dtype)
            v = self._unpermute(v)
        elif self.kind == "dual" and self.matrices is not None:
            v = block_dense(v, self.matrices[1].T)
            v = self._unpermute(v)
            v = block_dense(v, self.matrices[0].T)
        return v.to(y.dtype)

    def _unpermute(self, v: Tensor) -> Tensor:
        if self.permutation is None:
            return v
        return torch.empty_like(v).index_copy_(-1, self.permutation.long(), v)

    def to(self, device: torch.device | str) -> Rotation:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Rotation(
            self.kind,
            self.block_size,
            move(self.signs),
            move(self.permutation),
            move(self.matrices),
        )


def _check_permutation(permutation: Tensor | None, in_features: int) -> None:
    if permutation is None:
        return
    if permutation.dtype != torch.int32 or permutation.shape != (in_features,):
        raise ValueError(
            f"Rotation: permutation must be int32 [{in_features}], "
            f"got {permutation.dtype} {list(permutation.shape)}"
        )
    expected = torch.arange(in_features, dtype=torch.int32, device=permutation.device)
    if not torch.equal(permutation.sort().values, expected):
        raise ValueError(f"Rotation: permutation must hold each of 0..{in_features - 1} once")


def _check_signs(signs: Tensor | None, in_features: int) -> None:
    if signs is None or signs.dtype != torch.int8 or signs.shape != (in_features,):
        got = "None" if signs is None else f"{signs.dtype} {list(signs.shape)}"
        raise ValueError(f"Rotation: signs must be int8 [{in_features}], got {got}")
    if not bool((signs.abs() == 1).all()):
        raise ValueError("Rotation: signs must be +1 or -1")


def _check_matrices(matrices: Tensor | None) -> None:
    shape = (2, DUAL_BLOCK_SIZE, DUAL_BLOCK_SIZE)
    if matrices is None or matrices.dtype != torch.float32 or matrices.shape != shape:
        got = "None" if matrices is None else f"{matrices.dtype} {list(matrices.shape)}"
        raise ValueError(f"Rotation: matrices must be float32 {list(shape)}, got {got}")
    wide = matrices.double()
    identity = torch.eye(DUAL_BLOCK_SIZE, dtype=torch.float64, device=matrices.device)
    # fp32 storage of an orthogonal matrix leaves about 1e-6; NaN fails the comparison too.
    if not bool(((wide @ wide.transpose(1, 2) - identity).abs() < 1e-4).all()):
        raise ValueError("Rotation: matrices must be orthogonal")
