"""Previews: decode latents to images and contact sheets that a person can look at."""
