"""docs/gallery/: the page is what the numbers and files there say, whole without a network, and small."""
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

import capabilities
import gallery
import test_page

INDEX = gallery.FOLDER / "index.html"


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.files, self.bare, self.players, self.sliders = [], [], 0, []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.files += [attrs[key] for key in ("href", "src") if key in attrs and not attrs[key].startswith("data:")]
        self.bare += [attrs] if tag == "img" and not attrs.get("alt") else []
        self.players += tag == "audio"
        self.sliders += [attrs] if attrs.get("type") == "range" else []


@pytest.fixture(scope="module")
def links():
    parser = Links()
    parser.feed(INDEX.read_text())
    return parser


def test_it_is_of_the_numbers():
    assert INDEX.read_text() == gallery.page(json.loads(capabilities.NUMBERS.read_text()))


def test_all_that_it_shows_is_there(links):
    missing = [name for name in links.files if not (gallery.FOLDER / name).resolve().is_file()]
    assert not missing and not links.bare
    shown = {Path(name).name for name in links.files}
    left = {path.name for path in gallery.FOLDER.iterdir()} - shown - {"index.html", "captions.json"}
    assert not left, "files that nothing shows"
    assert links.players == 3 * len(gallery.SPOKEN)
    for slider in links.sliders:
        assert len(slider["data-values"].split()) == int(slider["max"]) + 1


def test_docs_are_small():
    files = [path for path in gallery.FOLDER.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix != ".log") < 15e6


@pytest.mark.skipif(not test_page.BROWSER, reason="there is no Chromium here")
def test_in_a_browser(tmp_path):
    """On a phone and on a desk, light and dark; a slider moves its pictures."""
    with test_page.Chromium(INDEX.as_uri(), tmp_path / "profile") as browser:
        for width in 390, 1200:
            for scheme in "light", "dark":
                seen = browser.show(width, scheme)
                assert seen["width"] == width >= seen["scroll"], seen
        moved = browser.value("""(() => {
            const slider = document.querySelector("input[type=range]");
            slider.value = 2;
            slider.dispatchEvent(new Event("input"));
            const figure = slider.closest("figure");
            return [figure.querySelector(".strip img").style.transform, figure.querySelector("output").textContent]})()""")
        assert moved == ["translateX(-256px)", f"{gallery.STEPS[2]:g}"] and browser.errors == []
