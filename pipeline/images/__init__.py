"""Decode, resize and crop images. The result depends on the sample and the settings alone."""
