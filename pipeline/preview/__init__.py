"""The way back: latents to images that a person can look at."""
