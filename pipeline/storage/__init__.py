"""All bytes are read and written here.

`connection` turns URLs into filesystems, `reading` opens and reads files, and `folder` writes a cache's files.
"""
