"""Every odd or damaged image file is opened, or rejected by a reason of ours. None crashes, and none is passed over."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from pipeline.errors import Rejected
from pipeline.images.decode import open_pixels
from pipeline.images.decode_settings import DecodeSettings
from pipeline.limits import Limits
from tests.pipeline.images.corpus import OddFile, make_corpus, make_other_files, make_sound_files
from tests.pipeline.images.test_decode import assert_own_message

LIMITS = Limits(pixels=2_000_000)  # so that a changed size is found, too
SETTINGS = (
    DecodeSettings(),
    DecodeSettings(color="srgb", alpha="drop", exif="ignore"),
    DecodeSettings(color="srgb", alpha="black", allow_truncated=True),
)


def open_all(files: Iterable[OddFile]) -> Counter[str]:
    """Open each file with each of the settings. Return the number of arrays (empty reason) and rejects by reason."""
    outcomes = Counter[str]()
    for file in files:
        for settings in SETTINGS:
            try:
                array = open_pixels(file.data, LIMITS, 1, settings)
            except Rejected as reject:
                assert not file.is_sound, (file.name, reject.detail)
                assert reject.stage == "open"
                assert_own_message(reject)
                outcomes[reject.reason] += 1
            else:
                assert array.dtype == np.uint8, file.name
                assert array.ndim == array.shape[2] == 3, file.name
                assert 0 < array.size <= 3 * LIMITS.pixels, file.name
                outcomes[""] += 1
    return outcomes


def test_every_sound_file_is_opened_and_others_are_rejected(capfd: pytest.CaptureFixture[str]) -> None:
    files = [*make_other_files(), *make_sound_files(("L", "RGBA", "CMYK", "I;16", "F"))]
    capfd.readouterr()  # of libraries that write
    outcomes = open_all(files)
    assert outcomes[""] > 400
    assert {"empty", "not_an_image", "unsupported_format", "missing_plugin", "unsupported_mode"} <= outcomes.keys()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_thousands_of_damaged_files_are_opened_or_rejected() -> None:
    outcomes = open_all(make_corpus())
    assert outcomes.total() > 6000
    assert outcomes[""] > 2000
    assert outcomes["corrupt"] > 1000
