"""Two small encoders into one space: a bilingual text tower that can be shipped, and a head for picture features.

The tower is a weighted bag of hashed pieces, in the manner of fastText: names and tags of a few words, English or
Chinese, need no word order. A text becomes its words, the parts of its words, its Han characters and their pairs; each
is hashed to a row of one table (Bojanowski et al., arXiv 1607.04606), so that no vocabulary is shipped and no script is
unknown. Legend: B texts or pictures, L pieces, D width.
"""

import re
import unicodedata
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_ROWS, WIDTH = 16384, 128  # of the table
MEANING_WIDTH = 384  # of multilingual-e5-small, which the tower learns to agree with
JOINT_WIDTH = 128
PART_LENGTHS = (3, 4)  # of the parts of a word, its two ends counted as letters
RUNS = re.compile(r"[\u3400-\u9fff]+|[^\W_\u3400-\u9fff]+")  # Han characters, or letters and digits of other scripts


def pieces_of(text: str) -> list[str]:
    """Return the pieces of a text; never none, as every text has the empty piece."""
    pieces = [""]
    for run in RUNS.findall(unicodedata.normalize("NFKC", text).casefold()):
        if "\u3400" <= run[0] <= "\u9fff":
            pieces += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
        else:
            word = f"<{run}>"
            pieces.append(word)
            pieces += [word[i : i + n] for n in PART_LENGTHS for i in range(len(word) - n + 1)]
    return pieces


def rows_of(text: str) -> list[int]:
    """Return the rows of the table that a text's pieces hash to: CRC-32, the same on every machine."""
    return [zlib.crc32(piece.encode()) % NUM_ROWS for piece in pieces_of(text)]


class TextTower(nn.Module):
    """The mean of the pieces' vectors by the weight that each has learnt, and a small residual network."""

    def __init__(self, num_rows: int = NUM_ROWS, width: int = WIDTH) -> None:
        super().__init__()
        self.vectors, self.weights = nn.Embedding(num_rows, width), nn.Embedding(num_rows, 1)
        nn.init.zeros_(self.weights.weight)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.meaning = nn.Linear(width, MEANING_WIDTH)

    def forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return unit vectors (B, MEANING_WIDTH) of B texts given as the rows of their pieces."""
        device = self.vectors.weight.device
        texts = torch.tensor([i for i, text in enumerate(rows) for _ in text], device=device)
        flat = torch.tensor([row for text in rows for row in text], device=device)
        weights = self.weights(flat).float().exp().to(self.vectors.weight.dtype)  # (B L, 1)
        empty = torch.zeros(len(rows), 1 + self.vectors.embedding_dim, dtype=weights.dtype, device=device)
        summed = empty.index_add(0, texts, torch.cat([weights, weights * self.vectors(flat)], dim=1))
        pooled = self.norm(summed[:, 1:] / summed[:, :1])
        return F.normalize(self.meaning(pooled + self.mix(pooled)), dim=-1)


class DualEncoder(nn.Module):
    """Text tower and both heads. Pictures come as features, frozen; D is JOINT_WIDTH."""

    def __init__(self, picture_width: int, num_rows: int = NUM_ROWS) -> None:
        super().__init__()
        self.tower = TextTower(num_rows)
        self.text_head = nn.Linear(MEANING_WIDTH, JOINT_WIDTH)
        layers = [nn.Linear(picture_width, 512), nn.SiLU(), nn.Linear(512, JOINT_WIDTH)]
        self.picture_head = nn.Sequential(*layers)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    @property
    def scale(self) -> Tensor:
        """What a cosine is multiplied by to be a logit, the inverse temperature: a scalar."""
        return self.log_scale.exp()

    def text_vectors(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return unit vectors (B, D) of texts given as `rows_of` each."""
        return F.normalize(self.text_head(self.tower(rows)), dim=-1)

    def picture_vectors(self, features: Tensor) -> Tensor:
        """Return unit vectors (B, D) of picture features (B, picture_width)."""
        return F.normalize(self.picture_head(features), dim=-1)
