"""Many writers that create one file at once."""

import threading

from pipeline.storage.folder import Folder


def winners(folder: Folder) -> list[int]:
    """Let 16 writers create `data/x` at once, and return those that won. Readers see whole files only."""
    barrier, won = threading.Barrier(17), list[int]()

    def create(number: int) -> None:
        barrier.wait()
        if folder.create("data/x", bytes([number]) * 100_000):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    barrier.wait()
    while any(thread.is_alive() for thread in threads):
        seen = folder.read_if_exists("data/x")
        assert seen is None or (len(seen), len(set(seen))) == (100_000, 1)
        assert folder.list_files("data") in ([], ["x"])
    for thread in threads:
        thread.join()
    return won
