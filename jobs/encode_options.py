"""The options of `latentmill encode`."""

from dataclasses import dataclass
from typing import Literal

from jobs.common_options import ALL, Common, same_source
from jobs.parsing import REQUIRED, option
from pipeline.records import Container, Crop, Flip, JpegDecode, Recipe, Store


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(Common):
    """Encode images into a cache of latents. To resume or to extend the cache, run the same command again."""

    source: tuple[str, ...] = option(
        REQUIRED,
        "tars, zips, Parquet or Arrow files with images, folders, or manifests (JSONL, CSV or Parquet files that list "
        "images), as files, directories, globs or brace ranges; "
        "NAME=SOURCE sets the name of the source (default: the name of its directory)",
        "input",
        metavar="SOURCE",
        positional=True,
    )
    to: str = option(REQUIRED, "path or URL of the cache, new or existing", "output", metavar="CACHE")
    new_source: bool = option(
        False,
        "encode the sources as new ones even if most of their files match files in the cache by path and size",
        "input",
    )
    same_source: bool = same_source()
    vae: str = option(
        REQUIRED,
        "VAE to use: a diffusers directory (or one that contains vae/), a single file (.safetensors, .ckpt), the URL "
        "of either, a hub id, or 'demo'",
        "model and performance",
        metavar="REF",
    )
    vae_config: str = option(
        "",
        "VAE config for a single-file checkpoint, which does not record how its latents are scaled: a preset (sd, "
        "sdxl, flux, ...) or a directory with a config.json",
        "model and performance",
        metavar="NAME",
    )
    transform: Recipe = option(
        "center-crop",
        "recipe by which images are resized and cropped: center-crop, or exactly as a trainer does it "
        "(center-crop-dhariwal, diffusers, sd-scripts, aspect-ratio-512, aspect-ratio-1024, aspect-ratio-2048), or "
        "none if they are prepared already (see docs/inputs.md)",
        "preprocessing",
        metavar="RECIPE",
    )
    resolution: int = option(
        0,
        "output size: resize the shorter side to PX, then crop to PX x PX; with sd-scripts and none, the largest area "
        "is PX x PX",
        "preprocessing",
        metavar="PX",
        default_text="512; with none, 2048",
    )
    buckets: int = option(
        0,
        "use aspect-ratio buckets of about PX x PX pixels instead of square crops",
        "preprocessing",
        metavar="PX",
        default_text="off",
    )
    multiple_of: int = option(64, "make the sides of buckets multiples of PX", "preprocessing", metavar="PX")
    min_bucket_reso: int = option(256, "shortest side of a bucket of sd-scripts", "preprocessing", metavar="PX")
    max_bucket_reso: int = option(1024, "longest side of a bucket of sd-scripts", "preprocessing", metavar="PX")
    bucket_reso_steps: int = option(
        64, "make the sides of buckets of sd-scripts multiples of PX", "preprocessing", metavar="PX"
    )
    bucket_no_upscale: bool = option(
        False, "never enlarge an image to a bucket of sd-scripts; buckets depend on the images", "preprocessing"
    )
    no_upscale: bool = option(
        False,
        "never enlarge an image: with --buckets, a small image keeps its size, cropped to multiples of --multiple-of; "
        "otherwise it is skipped",
        "preprocessing",
    )
    min_size: int = option(
        0, "skip images whose shorter side is below PX pixels", "preprocessing", metavar="PX", default_text="off"
    )
    max_aspect: float = option(
        0.0,
        "skip images whose longer side is more than R times the shorter one",
        "preprocessing",
        metavar="R",
        default_text="off",
    )
    min_std: float = option(
        0.0,
        "skip near-empty images, such as blank pages: those whose pixels, after the crop, have a standard deviation "
        "below X gray levels of 255 (blank pages have less than 2, photographs mostly more than 20)",
        "preprocessing",
        metavar="X",
        default_text="off",
    )
    interpolation: Literal["auto", "bicubic", "bilinear", "lanczos"] = option(
        "auto",
        "resampling filter; always antialiased; auto: lanczos with diffusers, otherwise bicubic",
        "preprocessing",
    )
    jpeg_decode: JpegDecode = option(
        "full",
        "scaled: decode large JPEGs at 1/2, 1/4 or 1/8 of their size, but at least at twice the output's; faster, but "
        "changes the latents slightly (see docs/performance.md)",
        "preprocessing",
    )
    crop: Crop = option("center", "crop position; random: drawn from a seed of --seed, shard and key", "preprocessing")
    flip: Flip = option(
        "none",
        "both: store a second latent per image, latent_flipped, of the image mirrored left to right; takes twice the "
        "time and space. random: mirror half of the images, drawn from a seed of --seed, shard and key; costs nothing, "
        "but does not augment, because the draw is the same in every epoch: prefer both",
        "preprocessing",
    )
    exif: Literal["auto", "apply", "ignore"] = option(
        "auto", "apply: turn images by their EXIF orientation; auto: as the transform's recipe does", "preprocessing"
    )
    alpha: Literal["auto", "white", "black", "drop"] = option(
        "auto",
        "color behind transparent pixels; drop: keep the hidden colors, as most trainers do; auto: as the transform's "
        "recipe does",
        "preprocessing",
    )
    color: Literal["auto", "keep", "srgb"] = option(
        "auto",
        "srgb: convert images from their embedded color profile to sRGB; auto: keep, as all trainers do",
        "preprocessing",
    )
    allow_truncated: bool = option(
        False,
        "accept images that lack their end, and mark them in the column 'truncated'; otherwise they are rejected",
        "preprocessing",
    )
    store: Store = option(
        "mode",
        "what to store of the posterior: its mode, one sample drawn from a seed of --seed, shard and key, or its "
        "moments (mean and log-variance)",
        "output",
    )
    format: Container = option("parquet", "file format of the cache", "output")
    dtype: Literal["float16", "bfloat16", "float32"] = option("float16", "data type of the stored latents", "output")
    seed: int = option(
        0, "seed of random crops, flips and posterior samples", "preprocessing", metavar="N", default_text="0"
    )
    columns: str = option(
        ALL,
        "columns to copy from the source: text members of tars and Parquet columns; '' copies none",
        "output",
        metavar="NAME[,NAME...]",
    )
    caption_extensions: str = option(
        "txt,json",
        "extensions of the text files beside an image, or of a tar's members, that are columns",
        "input",
        metavar="EXT[,EXT...]",
    )
    text_encoding: str = option(
        "utf-8",
        "encoding of these text files, such as cp1252 or utf-16; a byte-order mark takes precedence",
        "input",
        metavar="NAME",
    )
    include: tuple[str, ...] = option(
        (),
        "encode only images and shards whose path below the root matches GLOB; repeatable",
        "input",
        metavar="GLOB",
    )
    exclude: tuple[str, ...] = option(
        (),
        "leave out files whose path below the root, name or folder matches GLOB, such as '*_mask.png' or rejected/; "
        "repeatable",
        "input",
        metavar="GLOB",
    )
    label_from_folder: bool = option(
        False,
        "columns label and label_name of image files, from the folders directly below the root, numbered in sorted "
        "order from 0, as torchvision does; not of images in tars, zips and tables",
        "input",
    )
    image_column: str = option(
        "",
        "Parquet or Arrow column that holds the images (COLUMN.FIELD in a struct); column of manifests and metadata "
        "that holds their paths or URLs; in tars and zips, the extension of the image of each sample, as in source.jpg",
        "input",
        metavar="NAME",
        default_text="the column with bytes; file_name, image_path, path, url or the like; jpg, png and the like",
    )
    key_column: str = option(
        "",
        "column of Parquet files, Arrow files and manifests that holds the keys",
        "input",
        metavar="NAME",
        default_text="the row number; for paths in manifests, the path without its extension",
    )
    image_root: str = option(
        "",
        "folder that the paths in manifests are relative to, and in which their images are",
        "input",
        metavar="FOLDER",
        default_text="the folder of the manifest",
    )
    max_shards: int = option(
        0,
        "process only the first N shards; run the command again without this option to process the rest",
        "input",
        metavar="N",
        default_text="all",
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = option(
        "auto",
        "precision of the computation; auto: on CUDA GPUs fp16, or tf32 if the VAE overflows in fp16; otherwise fp32",
        "model and performance",
    )
    batch_size: int = option(
        0,
        "images per forward pass of the model; a batch that is not full is padded",
        "model and performance",
        metavar="N",
        default_text="the fastest on CUDA GPUs, 8 on other GPUs, 1 on CPUs",
    )
    open_workers: int = option(
        0,
        "number of images that a worker opens at the same time: in threads, or in processes if there are more than 2",
        "model and performance",
        metavar="N",
        default_text="on a GPU, the cores of its machine per GPU; otherwise --cpus-per-worker",
    )
    remote_openers: int = option(
        0,
        "open images also in N processes per worker on nodes of the cluster without GPUs; each reserves one CPU",
        "cluster",
        metavar="N",
    )
    encoder_form: Literal["auto", "plain", "fused", "compiled"] = option(
        "auto",
        "implementation of the encoder; plain: torch's kernels; fused: Triton kernels, for CUDA GPUs; compiled: "
        "torch.compile, once per shape; auto: the fastest on the GPU, otherwise plain",
        "model and performance",
    )
    tile_above: int = option(
        0,
        "encode images with a longer side above PX in tiles of PX pixels; uses less memory, but changes the latents",
        "model and performance",
        metavar="PX",
        default_text="never",
    )
    rows_per_part: int = option(
        0,
        "images per output file",
        "output",
        metavar="N",
        default_text="up to 4096 and about 256 MiB",
    )
    max_reject_rate: float = option(
        0.05, "exit with code 3 if a larger fraction of the samples is rejected", "output", metavar="R"
    )
