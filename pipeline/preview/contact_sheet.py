"""Contact sheets: labelled images in a grid, to be looked at by a person."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 3
SIDE = 256  # longest side of an image on the sheet, in pixels
MARGIN = 12
LABEL = 40
INK, PAPER, FAINT = (32, 32, 32), (250, 250, 248), (130, 130, 130)


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in one place of the grid: images side by side (RGB uint8 [H, W, 3]) and two lines below them."""

    images: tuple[np.ndarray, ...]
    title: str
    remark: str


def draw_contact_sheet(cells: list[Cell], heading: str) -> bytes:
    """A PNG with the cells in rows of three, below a heading."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    beside = max(len(cell.images) for cell in cells)
    cell_width = beside * SIDE + (beside - 1) * 4
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    width = MARGIN + columns * (cell_width + MARGIN)
    height = MARGIN + LABEL + rows * (SIDE + LABEL + MARGIN)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), heading, INK, font)
    for index, cell in enumerate(cells):
        left = MARGIN + index % columns * (cell_width + MARGIN)
        top = MARGIN + LABEL + index // columns * (SIDE + LABEL + MARGIN)
        for place, pixels in enumerate(cell.images):
            image = Image.fromarray(pixels)
            image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            x = left + place * (SIDE + 4) + (SIDE - image.width) // 2
            page.paste(image, (x, top + (SIDE - image.height) // 2))
        draw.text((left, top + SIDE + 3), _fitting(draw, cell.title, font, cell_width), INK, font)
        draw.text((left, top + SIDE + 21), _fitting(draw, cell.remark, small, cell_width), FAINT, small)
    return encode_png(np.asarray(page))


def _fitting(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    """The text, its beginning cut off where it is wider than `width`."""
    cut = text[-200:]
    while cut and draw.textlength(("..." if cut != text else "") + cut, font) > width:
        cut = cut[1:]
    return cut if cut == text else "..." + cut


def encode_png(pixels: np.ndarray) -> bytes:
    """RGB uint8 [H, W, 3] as a PNG."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()
