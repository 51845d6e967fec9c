"""Contact sheets: labelled images in a grid, for a person to look at."""

import io
from collections.abc import Sequence
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


def draw_cell(cell: Cell) -> np.ndarray:
    """Return a cell as RGB uint8 [SIDE + LABEL, W, 3]: its images with their labels."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    width = len(cell.images) * SIDE + (len(cell.images) - 1) * 4
    page = Image.new("RGB", (width, SIDE + LABEL), BACKGROUND)
    draw = ImageDraw.Draw(page)
    for number, pixels in enumerate(cell.images):
        image = Image.fromarray(pixels)
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        left = number * (SIDE + 4) + (SIDE - image.width) // 2
        page.paste(image, (left, (SIDE - image.height) // 2))
    draw.text((0, SIDE + 3), _shorten(draw, cell.title, font, width), TEXT_COLOR, font)
    draw.text((0, SIDE + 21), _shorten(draw, cell.remark, small, width), REMARK_COLOR, small)
    return np.asarray(page)


def describe(cells: Sequence[np.ndarray]) -> str:
    """Return what the cells of a sheet show."""
    has_pairs = any(cell.shape[1] > SIDE for cell in cells)
    return "original on the left, decoded from the cache on the right" if has_pairs else "decoded from the cache"


def draw_contact_sheet(cells: Sequence[np.ndarray], heading: str) -> bytes:
    """Return a PNG with the cells in rows of three, below a heading. cells: of `draw_cell`, with one width or two."""
    cell_width = max(cell.shape[1] for cell in cells)
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    width = MARGIN + columns * (cell_width + MARGIN)
    height = MARGIN + LABEL + rows * (SIDE + LABEL + MARGIN)
    page = Image.new("RGB", (width, height), BACKGROUND)
    ImageDraw.Draw(page).text((MARGIN, MARGIN), heading, TEXT_COLOR, ImageFont.load_default(15))
    for index, cell in enumerate(cells):
        left = MARGIN + index % columns * (cell_width + MARGIN)
        top = MARGIN + LABEL + index // columns * (SIDE + LABEL + MARGIN)
        page.paste(Image.fromarray(cell), (left, top))
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


def decode_png(data: bytes) -> np.ndarray:
    """Return a PNG that `encode_png` made as RGB uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image)
