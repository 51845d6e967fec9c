"""Reading a cache for training: its row groups, and batches of their rows as tensors."""
