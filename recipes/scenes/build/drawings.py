"""The pictures of scenes: drawings with their transparency, rendered once into a sheet, and laid on a canvas."""

import base64
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mlcm_rl.data.scenes import BACKGROUNDS, CANVAS, CELL, STYLES

sys.path.append(str(Path(__file__).parents[2] / "emoji" / "build"))  # its packages and its small tools serve here too

from scenes import SUBJECT, Scene, read_concepts
from sources import read_drawings

DRAWING = 60  # pixels a side
MARGIN = (CELL - DRAWING) // 2
SHEET, COLUMNS = SUBJECT / "drawings.png", 8  # all drawings, so many concepts a row


def render_transparent(svg: str, size: int) -> np.ndarray:
    """Return the drawing in the middle of a transparent square: uint8 (size, size, 4)."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    drawing = Image.open(io.BytesIO(base64.b64decode(png) if isinstance(png, str) else bytes(png))).convert("RGBA")
    page = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    page.paste(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    return np.asarray(page)


class Drawings:
    """Every concept in every style, `pixels` uint8 (concepts, styles, DRAWING, DRAWING, 4), RGB and transparency."""

    def __init__(self, pixels: np.ndarray, concepts: Sequence[str]) -> None:
        self.pixels = pixels
        self.places = {(c, s): (i, j) for i, c in enumerate(concepts) for j, s in enumerate(STYLES)}

    def paint(self, scene: Scene) -> np.ndarray:
        """Return the picture of a scene: uint8 (CANVAS, CANVAS, 3)."""
        canvas = np.empty((CANVAS, CANVAS, 3), np.uint8)
        canvas[:] = BACKGROUNDS[scene.background]
        for o in scene.objects:
            drawing = self.pixels[self.places[o.concept, o.style]].astype(np.uint16)
            top, left = (o.cell // 2) * CELL + MARGIN, (o.cell % 2) * CELL + MARGIN
            below = canvas[top : top + DRAWING, left : left + DRAWING]
            alpha = drawing[..., 3:]
            below[:] = ((drawing[..., :3] * alpha + below * (255 - alpha) + 127) // 255).astype(np.uint8)
        return canvas


def load_drawings() -> Drawings:
    """Return the drawings of all concepts, out of the sheet."""
    sheet = np.asarray(Image.open(SHEET).convert("RGBA"))
    rows = sheet.reshape(sheet.shape[0] // DRAWING, DRAWING, COLUMNS, len(STYLES), DRAWING, 4)
    return Drawings(
        rows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, len(STYLES), DRAWING, DRAWING, 4),
        [concept.codepoint for concept in read_concepts()],
    )


def main() -> None:
    """Render every concept in every style into the sheet: COLUMNS concepts a row, each in the order of STYLES."""
    sources = [read_drawings(style) for style in STYLES]
    pixels = np.stack([[render_transparent(s[c.codepoint], DRAWING) for s in sources] for c in read_concepts()])
    pixels[pixels[..., 3] == 0] = 0
    rows = pixels.reshape(-1, COLUMNS, len(STYLES), DRAWING, DRAWING, 4).transpose(0, 3, 1, 2, 4, 5)
    sheet = rows.reshape(len(rows) * DRAWING, -1, 4)
    Image.fromarray(sheet).save(SHEET, optimize=True)
    print(f"{SHEET.name}: {pixels.shape[0]} concepts, {SHEET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
