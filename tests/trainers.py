"""The preparation of images by trainers, written from its steps with Pillow."""

from PIL import Image


def crop_like_adm(image: Image.Image, side: int) -> Image.Image:
    """Return the square that ADM's `center_crop_arr` makes of an image. side: in pixels."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
