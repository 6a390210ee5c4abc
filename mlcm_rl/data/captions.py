"""The conditioning of a training step's captions, a share of them dropped for classifier-free guidance."""

import torch
from torch import Tensor

from ..models.base import Base
from ..models.conditioning import Conditioning, in_dtype, on_device, rows_of, stacked
from ..storage import finite
from .trajectory_store import Store

MOST_BYTES = 8 * 2**30  # of encoded captions in the memory of a process; a caption of SDXL takes 0.3 MB, of FLUX 4 MB


class Captions:
    """The pictures' captions and their encodings; each is encoded when it is first drawn."""

    def __init__(self, base: Base, captions: list[list[str]], dropout: float):
        self.base, self.captions, self.dropout = base, captions, dropout
        (self.dropped,) = rows_of(on_device(base.unconditional(1), torch.device("cpu")))
        self.encoded: dict[str, Conditioning] = {}
        self.bytes = 0  # of them

    def draw(self, index: Tensor, draws: torch.Generator) -> Conditioning:
        """Return the conditioning (B, ...) of one caption of each picture of `index` (B,).

        A share `dropout` of them is unconditional, for classifier-free guidance.
        """
        chances = torch.rand(len(index), 2, generator=draws).tolist()
        texts = [self._choose(self.captions[i], *pair) for i, pair in zip(index.tolist(), chances, strict=True)]
        self._encode(sorted({text for text in texts if text is not None} - self.encoded.keys()))
        rows = [self.dropped if text is None else self.encoded[text] for text in texts]
        return stacked(rows)

    def _choose(self, captions: list[str], which: float, drop: float) -> str | None:
        return None if drop < self.dropout else captions[int(which * len(captions))]

    def _encode(self, texts: list[str]) -> None:
        if self.bytes > MOST_BYTES:
            self.encoded.clear()
            self.bytes = 0
        if texts:
            encoded = on_device(self.base.encode_prompts(texts), torch.device("cpu"))
            finite.refuse_encoded(encoded, texts, self.base.dtype)
            rows = in_dtype(encoded, self.base.dtype)  # that of the text encoders
            self.bytes += sum(value.nbytes for value in rows.values())
            self.encoded |= zip(texts, rows_of(rows), strict=True)


class StoredPrompts:
    """The prompts of stored trajectories, encoded there."""

    def __init__(self, base: Base, store: Store, dropout: float):
        self.store, self.dropout = store, dropout
        (self.dropped,) = rows_of(on_device(base.unconditional(1), torch.device("cpu")))

    def draw(self, index: Tensor, draws: torch.Generator) -> Conditioning:
        """Return the conditioning (B, ...) of trajectories `index` (B,), a share `dropout` of it unconditional."""
        rows = rows_of(self.store.conditioning(index))
        is_dropped = (torch.rand(len(index), generator=draws) < self.dropout).tolist()
        return stacked([self.dropped if dropped else row for row, dropped in zip(rows, is_dropped, strict=True)])


class RealPictures:
    """Pictures for an adversary: `latents` (N, C, H, W) on the CPU, and the captions of each."""

    def __init__(self, base: Base, latents: Tensor, captions: list[list[str]]):
        self.latents, self.captions = latents, Captions(base, captions, dropout=0.0)

    @property
    def texts(self) -> list[str]:
        """Return the captions of all pictures."""
        return [text for captions in self.captions.captions for text in captions]

    def draw(self, generator: torch.Generator, batch_size: int) -> tuple[Tensor, Conditioning]:
        """Return the latents (B, C, H, W) of B pictures, and the conditioning of a caption of each, on the CPU."""
        index = torch.randint(len(self.latents), (batch_size,), generator=generator)
        return self.latents[index], self.captions.draw(index, generator)
