"""The recipes of `--transform`, one per module, each with its own VERSION in the identity of a cache.

`fit` of a recipe returns the size to which an image is resized, and its crop at the center. A recipe that resizes in
its own way has `resize_and_crop`. `pipeline.images.transform` chooses among them.
"""
