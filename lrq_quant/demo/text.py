"""CaptionEncoder: words of a caption -> embeddings. A word table and a position table, no more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from lrq_quant.demo.scenes import DEMO, RELATIONS, World

PAD, START = "<pad>", "<start>"


def caption_vocabulary(world: World = DEMO) -> list[str]:
    """Every word of the caption grammar, after the padding and the start mark."""
    words = ["a", *world.sizes, *world.colours, *world.shapes, *" ".join(RELATIONS).split()]
    return list(dict.fromkeys([PAD, START, *words]))


class CaptionEncoder(ModelMixin, ConfigMixin):
    """Word and position embeddings of a caption.

    The transformer's cross-attention does the rest: positions alone tell the first thing of a
    caption from the second, so nothing here mixes words. The empty caption (the unguided half) is
    the start mark alone.
    """

    @register_to_config
    def __init__(
        self, vocabulary: list[str] | None = None, embed_dim: int = 128, max_length: int = 16
    ) -> None:
        super().__init__()
        if vocabulary is None:
            vocabulary = caption_vocabulary()
            self.register_to_config(vocabulary=vocabulary)
        self._word_ids = {word: i for i, word in enumerate(vocabulary)}
        self.word_embedding = nn.Embedding(len(vocabulary), embed_dim)
        self.position_embedding = nn.Embedding(max_length, embed_dim)
        nn.init.normal_(self.word_embedding.weight, std=1.0)
        nn.init.normal_(self.position_embedding.weight, std=1.0)

    def tokenize(self, captions: Sequence[str]) -> torch.Tensor:
        """Word ids int64 [B, max_length] on the CPU. Raises ValueError on an unknown word."""
        ids = torch.full((len(captions), self.config.max_length), self._word_ids[PAD])
        for row, caption in enumerate(captions):
            words = [START, *caption.lower().split()]
            unknown = [word for word in words if word not in self._word_ids]
            if unknown:
                raise ValueError(
                    f"CaptionEncoder.tokenize: unknown word {unknown[0]!r} in {caption!r}; "
                    f"known: {', '.join(list(self._word_ids)[2:])}"
                )
            if len(words) > self.config.max_length:
                raise ValueError(
                    f"CaptionEncoder.tokenize: a caption holds at most "
                    f"{self.config.max_length - 1} words, got {len(words) - 1} in {caption!r}"
                )
            ids[row, : len(words)] = torch.tensor([self._word_ids[word] for word in words])
        return ids

    def mask(self, word_ids: torch.Tensor) -> torch.Tensor:
        """True where a word is, bool [B, L]."""
        return word_ids != self._word_ids[PAD]

    def forward(self, word_ids: torch.Tensor) -> torch.Tensor:
        """word_ids int64 [B, L] -> embeddings [B, L, embed_dim]."""
        positions = torch.arange(word_ids.shape[1], device=word_ids.device)
        # Through the modules, whose hooks bring offloaded weights: not through .weight.
        return self.word_embedding(word_ids) + self.position_embedding(positions)

    def encode(
        self, captions: Sequence[str], device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [B, L, embed_dim] and mask bool [B, L], on `device`: by default the weights',
        which are elsewhere between forwards when a pipeline is offloaded."""
        word_ids = self.tokenize(captions).to(device or self.word_embedding.weight.device)
        return self(word_ids), self.mask(word_ids)
