"""Bytes to samples: tar shards, Parquet files, folders of images, and the texts and metadata beside them."""
