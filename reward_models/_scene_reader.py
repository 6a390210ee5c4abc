"""A small convolutional network that reads one cell of a scene, and the probability that a scene is as asked.

Letters: B pictures, N = NUM_CELLS cells of each, C concepts, S styles, G backgrounds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlcm_rl.rewards.scenes import BACKGROUNDS, CANVAS, NUM_CELLS, STYLES, Request, border_of, cells_of, palette

WIDTHS = (24, 48, 96, 128)  # of convolutions of stride 2, from 64 x 64 pixels to 4 x 4
SIDE = 4
COLOUR_SPREAD = 0.06  # of a border's mean colour around the background's, in [0, 1]: what is taken for one colour


class SceneReader(nn.Module):
    """Reads cells: a concept, "empty" (index C) or "unknown" (C + 1), and the style of what is there."""

    def __init__(self, num_concepts: int) -> None:
        super().__init__()
        self.num_kinds = num_concepts + 2
        layers: list[nn.Module] = []
        for before, after in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTHS[-1] * SIDE**2, self.num_kinds + len(STYLES))

    def forward(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of kinds (M, C + 2) and styles (M, S) of cells (M, 3, 64, 64) in [0, 1]."""
        logits = self.head(self.body(2 * cells - 1).flatten(1)).float()
        kinds, styles = logits.split([self.num_kinds, len(STYLES)], dim=1)
        return kinds.log_softmax(1), styles.log_softmax(1)

    def read(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of kinds (B, N, C + 2), styles (B, N, S) and backgrounds (B, G) of pictures.

        Pictures (B, 3, H, W) in [0, 1] are resized to the canvas. A background's is by the distance of the border's
        mean colour to it.
        """
        resized = F.interpolate(images.float(), (CANVAS, CANVAS), mode="bilinear", antialias=True)
        cells = cells_of(resized).to(self.head.weight.dtype)
        kinds, styles = (part.unflatten(0, (len(images), NUM_CELLS)) for part in self(cells))
        colours = border_of(resized).float().mean(-1)
        distances = (colours[:, None] - palette(images.device)).square().sum(-1)
        return kinds, styles, (-distances / (2 * COLOUR_SPREAD**2)).log_softmax(1)


def log_match(
    kinds: Tensor, styles: Tensor, backgrounds: Tensor, requests: Sequence[Request], concepts: Sequence[str]
) -> Tensor:
    """Return log P(all that is asked) (B,) of pictures whose cells and background are independent, as `read` says.

    The probabilities of all arrangements that fit are summed: they exclude each other.
    """
    places = {concept: i for i, concept in enumerate(concepts)} | {None: len(concepts)}
    cells, scores = torch.arange(NUM_CELLS), []
    for b, request in enumerate(requests):
        arranged = torch.tensor([[places[concept] for concept in cell] for cell in request.arrangements])  # (A, N)
        of_arrangements = kinds[b, cells, arranged].sum(1)  # (A,)
        if request.style is not None:
            occupied = (arranged != len(concepts)).to(styles)
            of_arrangements = of_arrangements + occupied @ styles[b, :, STYLES.index(request.style)]
        score = of_arrangements.logsumexp(0)
        if request.background is not None:
            score = score + backgrounds[b, list(BACKGROUNDS).index(request.background)]
        scores.append(score)
    return torch.stack(scores) if scores else kinds.new_zeros(0)
