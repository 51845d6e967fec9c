"""The kinds of inputs that are no part of a sample, under which the report of a unit counts them."""

HIDDEN = "hidden"  # members: files of operating systems
STRAY = "stray"  # members: documents and indexes
TABLES = "tables"  # members: tables of metadata, which are read only if they are files themselves
APART = "apart"  # images and texts of one key that are not adjacent in a tar
OTHER_IMAGES = "other images"  # members: further images of a sample
NO_IMAGES = "no_images"  # files without images
NO_METADATA = "tars without metadata"
NO_ROW = "samples without a row"
