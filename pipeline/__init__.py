"""The data's way: storage -> shards -> samples -> pixels -> latents -> part files -> statistics; and back.

Read `flow` first. Knows vae, nothing of Ray.
"""
