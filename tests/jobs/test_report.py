"""`latentmill report`: the seven planted faults, hostile texts, and the page in a real browser."""

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import encoded, smooth, write_tar
from tests.planted import UNITS, break_encoder, scale_latent, write_source

Command = Callable[..., tuple[int, str, str]]
ENCODE = ("--vae", "demo", "--resolution", 64, "--workers", 0)
SEVEN = {
    "wrong-range",
    "wrong-scaling",
    "swapped-channels",
    "duplicates",
    "constant-images",
    "missing-captions",
    "noisy-unit",
}


def report_codes(latentmill: Command, cache: Path, page: Path, *options: object) -> set[str]:
    code, out, err = latentmill("report", cache, "--to", page, "--json", *options)
    assert code == 0, err
    return {finding["code"] for finding in json.loads(out)["findings"]}


class Tags(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_seven_planted_faults_are_found(latentmill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "shards", faulty=True)
    with monkeypatch.context() as patch:
        break_encoder(patch)
        assert latentmill("encode", source, "--to", tmp_path / "cache", *ENCODE)[0] == 0
    found = report_codes(latentmill, tmp_path / "cache", tmp_path / "report.html")
    assert found >= SEVEN
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(code in html for code in SEVEN)
    assert f", encoded on {platform.node()}" in html, "of the noisy unit"
    assert 'aria-label="throughput of the workers"' in html
    assert len(html) < 10_000_000


@pytest.mark.slow
def test_statistics_alone_show_scaled_latents(
    latentmill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "shards", faulty=False)
    with monkeypatch.context() as patch:
        break_encoder(patch, {f"{number}.tar": scale_latent for number in range(UNITS)})
        assert latentmill("encode", source, "--to", tmp_path / "cache", *ENCODE)[0] == 0
    out = latentmill("stats", tmp_path / "cache")[1]
    assert "finding      The stored latents have a standard deviation of about 1" in out


def test_a_good_cache_has_no_findings(latentmill: Command, tmp_path: Path) -> None:
    source = write_source(tmp_path / "shards", faulty=False)
    assert latentmill("encode", source, "--to", tmp_path / "cache", *ENCODE)[0] == 0
    assert report_codes(latentmill, tmp_path / "cache", tmp_path / "report.html") == set()
    assert "finding" not in latentmill("stats", tmp_path / "cache")[1]
    assert "Nothing." in (tmp_path / "report.html").read_text(encoding="utf-8")


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> javascript:alert(3)"


@pytest.fixture
def hostile(latentmill: Command, tmp_path: Path) -> Path:
    """Return the page of a cache whose keys and captions are code, and of which one image is rejected for its own."""
    members: dict[str, bytes] = {}
    for number in range(3):
        key = f"\"'><script>alert({number})<!script>"
        members[f"{key}.jpg"] = encoded(smooth(number))
        members[f"{key}.txt"] = HOSTILE.encode()
    members["<svg onload=alert(4)>.jpg"] = b"no image"
    write_tar(tmp_path / "shards/<b>&.tar", members)
    assert latentmill("encode", tmp_path / "shards", "--to", tmp_path / "cache", *ENCODE)[0] == 3
    code, _, err = latentmill("report", tmp_path / "cache", "--to", tmp_path / "report.html")
    assert code == 0, err
    return tmp_path / "report.html"


def test_a_hostile_key_or_caption_is_only_text(hostile: Path) -> None:
    html = hostile.read_text(encoding="utf-8")
    tags = Tags(html).tags
    assert not {"script", "iframe", "object", "embed", "form"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        links = [attributes.get(name) or "" for name in ("src", "href", "xlink:href")]
        assert all(re.match(r"(data:image/(jpeg|png);base64,|data:,|#|$)", link) for link in links), (tag, attributes)
    assert "&lt;script&gt;alert(0)" in html
    assert "&lt;svg onload" in html
    assert html.count("the bytes are not a supported image format") == 1, "what all rejects say is said once"
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&gt;&lt;img src=x onerror=alert(2)&gt;") >= 3, (
        "the captions"
    )
    assert "http://" not in html and "https://" not in html


@pytest.mark.slow
def test_without_sources_the_report_says_why(latentmill: Command, tmp_path: Path, photos: Path) -> None:
    copy = tmp_path / "copy/photos"
    shutil.copytree(photos, copy)
    assert latentmill("encode", copy, "--to", tmp_path / "cache", *ENCODE)[0] == 0
    shutil.rmtree(copy)
    assert latentmill("report", tmp_path / "cache", "--to", tmp_path / "a.html", "--images", 2)[0] == 0
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "2 originals cannot be read" in html
    assert "; give their location with --source photos=PATH" in html
    assert html.count("data:image/jpeg") == 2
    assert latentmill("report", tmp_path / "cache", "--to", tmp_path / "b.html", "--vae", tmp_path / "none")[0] == 0
    assert "No images are shown: " in (tmp_path / "b.html").read_text(encoding="utf-8")
    assert latentmill("report", tmp_path / "cache", "--to", tmp_path / "c.html", "--source", photos)[0] == 0
    assert (tmp_path / "c.html").read_text(encoding="utf-8").count("data:image/jpeg") >= 10


def test_a_missing_package_is_named(latentmill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = latentmill("report", tmp_path, "--to", tmp_path / "a.html")
    assert code == 2
    assert 'pip install "latentmill[report]" (matplotlib is not installed)' in err


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECTIONS = ("findings", "made", "images", "channels", "sizes", "runs", "rejects")
# The page forbids scripts, so this one is put into a copy without the policy.
PROBE = """<script>
const shown = [...document.querySelectorAll("section")].map(s => s.id + ":" + (s.getBoundingClientRect().height > 20));
const style = getComputedStyle(document.body);
const over = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.body.dataset.probe = [style.backgroundColor, style.color, over, ...shown].join("|");
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize(("theme", "background"), [(1, "rgb(252, 252, 251)"), (0, "rgb(20, 23, 26)")])
def test_a_browser_shows_every_section_without_an_error(
    hostile: Path, tmp_path: Path, theme: int, background: str
) -> None:
    html = hostile.read_text(encoding="utf-8")
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html).replace("</body>", PROBE + "</body>")
    (tmp_path / "probed.html").write_text(probed, encoding="utf-8")
    for page, width in ((hostile, 1200), (tmp_path / "probed.html", 1200), (tmp_path / "probed.html", 500)):
        command = [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"),
            *(f"--blink-settings=preferredColorScheme={theme}", f"--window-size={width},900", "--dump-dom"),
            *(f"--user-data-dir={tmp_path}/browser", page.as_uri()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0
        assert "CONSOLE" not in done.stderr
        if page != hostile:
            probe = re.search(r'data-probe="([^"]*)"', done.stdout)
            assert probe is not None
            colors, over, shown = probe[1].split("|")[:2], probe[1].split("|")[2], probe[1].split("|")[3:]
            assert colors[0] == background
            assert over == "0"  # nothing has to be scrolled sideways
            assert shown == [f"{name}:true" for name in SECTIONS]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None or shutil.which("pdftoppm") is None, reason="there is no Chromium, or no Poppler")
def test_a_printed_page_is_light_and_no_heading_is_apart_from_its_images(hostile: Path, tmp_path: Path) -> None:
    """The images are printed at many heights of a page, in a browser with a dark theme."""
    html = hostile.read_text(encoding="utf-8")
    images = re.search(r'<section id="images">.*?</section>', html, re.DOTALL)
    assert images is not None
    copies = [f'<div style="height: {number * 70}px"></div>{images[0]}' for number in range(14)]
    (tmp_path / "many.html").write_text(html.replace(images[0], "".join(copies)), encoding="utf-8")
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--blink-settings=preferredColorScheme=0"),
        *("--no-pdf-header-footer", f"--print-to-pdf={tmp_path}/many.pdf", f"--user-data-dir={tmp_path}/browser"),
        (tmp_path / "many.html").as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    text = subprocess.run(["pdftotext", tmp_path / "many.pdf", "-"], check=True, capture_output=True, text=True).stdout
    assert text.count("Originals on the left") == len(copies)
    last_lines = [page.strip().splitlines()[-1] for page in text.split("\f") if page.strip()]
    assert not [line for line in last_lines if line.endswith(("Images", "worst reconstructions", "over the cache."))]
    subprocess.run(["pdftoppm", "-r", "40", "-png", tmp_path / "many.pdf", tmp_path / "page"], check=True)
    pages = [np.asarray(Image.open(path).convert("L")) for path in sorted(tmp_path.glob("page-*.png"))]
    assert len(pages) > 3
    assert [np.median(page) for page in pages] == [255] * len(pages), "the paper is white"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--store", "moments", "--dtype", "bfloat16"),
        ("--store", "sample", "--flip", "both"),
        ("--flip", "random", "--format", "webdataset"),
        ("--store", "moments", "--buckets", 256),
    ],
)
def test_every_form_of_a_cache_has_a_report(
    latentmill: Command, photos: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    encode = [option for option in ENCODE if "--buckets" not in options or option not in ("--resolution", 64)]
    assert latentmill("encode", photos, "--to", tmp_path / "cache", *encode, *options)[0] == 0
    found = report_codes(latentmill, tmp_path / "cache", tmp_path / "report.html")
    assert not found & {"other-latents", "wrong-range", "wrong-scaling", "swapped-channels", "not-finite"}
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count('alt="original of') >= 5


def test_a_cache_without_rows_has_a_report(latentmill: Command, tmp_path: Path) -> None:
    write_tar(tmp_path / "shards/0.tar", {"a.jpg": b"no image"})
    assert latentmill("encode", tmp_path / "shards", "--to", tmp_path / "cache", *ENCODE)[0] == 3
    assert report_codes(latentmill, tmp_path / "cache", tmp_path / "report.html") == {"rejects"}
    assert "The cache has no rows." in (tmp_path / "report.html").read_text(encoding="utf-8")
