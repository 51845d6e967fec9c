"""Rows to part files and back: the record of a part, Parquet, WebDataset."""
