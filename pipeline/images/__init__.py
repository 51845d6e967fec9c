"""Bytes to pixels: images decoded, resized and cropped, by rules that depend on the sample alone."""
