"""The pipeline: storage -> shards -> samples -> pixels -> latents -> part files -> statistics, and back.

Read `flow` first. This package imports `vae`. It does not import Ray.
"""
