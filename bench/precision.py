"""How exact each compute precision is: the error of latents, relative to float64, on a CPU.

    python -m bench.precision [--side 256]

Half precision is computed as such. TF32 is emulated: the inputs and weights of each convolution and matrix product are
rounded to 10 bits of mantissa, and the sums are kept in float32, as GPUs do. The last rows are the error of only
storing exact latents in half precision. `demo` encodes the sample photographs. The other models have random weights in
the shape of SD's and FLUX.1's, and encode synthetic images.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.vae import MODELS
from pipeline.encoder import make_checked_image, normalize_pixels
from pipeline.images.decode import open_pixels
from pipeline.images.transform import Transform
from pipeline.limits import Limits
from vae import AutoencoderKL

PHOTOS = Path(__file__).resolve().parents[1] / "examples/photos"
IMAGES = 2


def round_to_tf32(values: Tensor) -> Tensor:
    """Round float32 values to 10 bits of mantissa, to nearest even."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def emulate_tf32(model: AutoencoderKL) -> AutoencoderKL:
    """Round the inputs and weights of the convolutions and linear layers of a copy of the model."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data = round_to_tf32(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: (round_to_tf32(inputs[0]),))
    return model


def make_images(name: str, side: int) -> Tensor:
    """Return two images, uint8 [2, side, side, 3]."""
    if name != "demo":
        return torch.stack([make_checked_image(number)[:side, :side] for number in range(IMAGES)])
    transform, images = Transform(resolution=side), []
    for path in sorted(PHOTOS.rglob("*.jpg"))[:IMAGES]:
        rgb = open_pixels(path.read_bytes(), Limits())
        fit = transform.fit(*rgb.shape[:2])
        assert fit is not None
        images.append(transform.apply(rgb, fit))
    return torch.stack(images)


@torch.inference_mode()
def measure(name: str, side: int) -> dict[str, float]:
    """Return the relative root mean square error of the latents for each precision."""
    torch.manual_seed(0)
    model = AutoencoderKL.from_pretrained("demo") if name == "demo" else AutoencoderKL(**MODELS[name])
    model.eval()
    images = make_images(name, side)

    def encode(model: AutoencoderKL, dtype: torch.dtype) -> Tensor:
        pixels = normalize_pixels(images, torch.float32).to(dtype)
        return model.to(dtype).encode(pixels).latent_dist.mode().double()

    exact = encode(copy.deepcopy(model), torch.float64)

    def compute_error(latents: Tensor) -> float:
        return float((latents - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())

    return {
        "fp32": compute_error(encode(copy.deepcopy(model), torch.float32)),
        "tf32 (emulated)": compute_error(encode(emulate_tf32(model), torch.float32)),
        "fp16": compute_error(encode(copy.deepcopy(model), torch.float16)),
        "bf16": compute_error(encode(copy.deepcopy(model), torch.bfloat16)),
        "storing float16": compute_error(exact.half().double()),
        "storing bfloat16": compute_error(exact.bfloat16().double()),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="side of the images in pixels (default: 256)")
    side = parser.parse_args().side
    results = {name: measure(name, side) for name in ("demo", "sd", "flux")}
    print("| precision | demo VAE | SD's shape, random weights | FLUX.1's shape, random weights |\n|---|---|---|---|")
    for precision in results["demo"]:
        print(f"| {precision} | " + " | ".join(f"{result[precision]:.2g}" for result in results.values()) + " |")


if __name__ == "__main__":
    main()
