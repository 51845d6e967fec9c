"""Contact sheets: labelled images in a grid, for a person to look at."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 3
SIDE = 256  # the longest side of an image on the sheet, in pixels
MARGIN = 12
LABEL = 40  # the height of a label, in pixels
TEXT_COLOR, BACKGROUND, REMARK_COLOR = (32, 32, 32), (250, 250, 248), (130, 130, 130)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the grid: images side by side (RGB uint8 [H, W, 3]), with a title and a remark below them."""

    images: tuple[np.ndarray, ...]
    title: str
    remark: str


def draw_contact_sheet(cells: list[Cell], heading: str) -> bytes:
    """Return a PNG with the cells in rows of three, below a heading."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    images_per_cell = max(len(cell.images) for cell in cells)
    cell_width = images_per_cell * SIDE + (images_per_cell - 1) * 4
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    width = MARGIN + columns * (cell_width + MARGIN)
    height = MARGIN + LABEL + rows * (SIDE + LABEL + MARGIN)
    page = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), heading, TEXT_COLOR, font)
    for index, cell in enumerate(cells):
        left = MARGIN + index % columns * (cell_width + MARGIN)
        top = MARGIN + LABEL + index // columns * (SIDE + LABEL + MARGIN)
        for number, pixels in enumerate(cell.images):
            image = Image.fromarray(pixels)
            image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            x = left + number * (SIDE + 4) + (SIDE - image.width) // 2
            page.paste(image, (x, top + (SIDE - image.height) // 2))
        draw.text((left, top + SIDE + 3), _shorten(draw, cell.title, font, cell_width), TEXT_COLOR, font)
        draw.text((left, top + SIDE + 21), _shorten(draw, cell.remark, small, cell_width), REMARK_COLOR, small)
    return encode_png(np.asarray(page))


def _shorten(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    """Return the text, with its beginning cut off if it is wider than `width` pixels."""
    cut = text[-200:]
    while cut and draw.textlength(("..." if cut != text else "") + cut, font) > width:
        cut = cut[1:]
    return cut if cut == text else "..." + cut


def encode_png(pixels: np.ndarray) -> bytes:
    """Return RGB uint8 [H, W, 3] as a PNG."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()
