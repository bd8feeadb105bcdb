"""docs/index.html: links, pictures, tables against the logs; page.py on a made-up tree; the page in a real browser."""

import base64
import fcntl
import html.parser
import json
import math
import os
import re
import shutil
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import leaderboard
import rules
import verify
from test_leaderboard import BASE, FAST, TRACK, add_record, log_text

ROOT = rules.ROOT
sys.path.insert(0, str(ROOT / "docs"))
import page  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


class Reader(html.parser.HTMLParser):
    """The page as a browser's user has it: links, pictures, ids, and the table rows under each heading."""

    def __init__(self, text):
        super().__init__()
        self.links, self.pictures, self.texts, self.open, self.ids = [], [], [], [], set()
        self.tables, self.heading = {}, ""
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[key] for key in ("href", "src") if key in attrs]
        if tag == "img":
            self.pictures.append(attrs)
        if "id" in attrs:
            assert attrs["id"] not in self.ids
            self.ids.add(attrs["id"])
        if tag in ("h2", "h3"):
            self.heading = attrs["id"]
        rows = self.tables.setdefault(self.heading, [])
        if tag == "tr":
            rows.append([])
        elif tag in ("td", "th"):
            rows[-1].append("")
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[self.heading][-1][-1] += data


def read(root=ROOT):
    return Reader((root / "docs/index.html").read_text(encoding="utf-8"))


def check_links(root, reader):
    for link in reader.links:
        name, _, anchor = link.partition("#")
        if not re.match(r"\w+:", link) and name:
            path = (root / "docs" / name).resolve()
            assert path.is_file(), link  # a folder has no page of its own on a server
            assert not anchor or anchor in verify.anchors(path.read_text()), link
        assert name or anchor in reader.ids, link
    assert not any(link.startswith(("http", "//")) for link in reader.links)


def numbers(text):
    return [float(number) for number in re.findall(r"[+-]?\d+(?:\.\d+)?(?:e-?\d+)?", text)]


def check_tables(root, reader):
    """Every number of every record, read off the page and compared with the logs."""
    seen = 0
    for path in sorted(root.glob("records/*/track.json")):
        track, records = rules.read_track(path.parent)
        rows = reader.tables[path.parent.name][1:]
        assert len(rows) == len(records)
        for before, r, row in zip([None, *records], records, rows):
            seconds = np.mean([log["footer"]["train_seconds"] for log in r["logs"]])
            losses = [log["footer"]["val_loss"] for log in r["logs"]]
            assert row[0] == str(r["number"]) and row[9] == r["hardware"]
            assert row[7] == r["title"].replace("`", "")
            assert numbers(row[1]) == [pytest.approx(seconds, abs=0.051)]
            assert numbers(row[2]) == [pytest.approx(r["speedup"], abs=0.0051)]
            spread = [pytest.approx(np.std(losses, ddof=1), abs=6e-5)] * (len(losses) > 1)
            assert numbers(row[3]) == [pytest.approx(np.mean(losses), abs=6e-5), *spread, len(losses)]
            for cell, p in zip(row[4].split(", "), (r["p"], r["p_time"])):
                assert cell == "–" if math.isnan(p) else numbers(cell) == [pytest.approx(p, rel=0.06)]
            for key in track["floors"]:
                name = key.removeprefix("quality_").removeprefix("accuracy_")
                assert f"{name} {rules.quality(r['logs'], key):.4g}" in row[5]
            assert numbers(row[6]) == [r["lines"], *([r["lines"] - before["lines"]] if before else [])]
            assert row[10].split() == ["note", *sorted((log["path"].stem for log in r["logs"]), key=int)]
            seen += 1
        fronts = [row for row in reader.tables["leaderboard"] if row[0] == path.parent.name]
        assert len(fronts) == min(1, len(records)), "the current record alone"
        for row in fronts if records else ():
            r = records[int(re.match(r"#(\d+)", row[1])[1]) - 1]
            assert numbers(row[2]) == [pytest.approx(r["seconds"], abs=0.051)] and numbers(row[5]) == [track["target"]]
            assert numbers(row[3]) == [pytest.approx(r["speedup"], abs=0.0051)]
    return seen


# -----------------------------------------------------------------------------
# The committed page

def test_up_to_date():
    assert page.main(["--check"]) == 0


def test_links_and_pictures():
    reader = read()
    check_links(ROOT, reader)
    shown = {picture["src"] for picture in reader.pictures}
    assert shown >= {path.name for path in ROOT.glob("docs/*") if path.suffix in (".png", ".gif")}
    assert shown >= {f"real/{path.name}" for path in ROOT.glob("docs/real/*.png")}
    assert shown >= {f"plots/{path.parent.name}-loss.png" for path in ROOT.glob("records/*/loss.png")}
    for picture in reader.pictures:
        assert re.fullmatch(r"((plots|real|side_by_side)/)?[^/]+", picture["src"]) and picture["alt"]  # docs/ alone can be served
    assert {path.stem.removeprefix("train_") for path in ROOT.glob("train_*.py")} <= reader.ids


def test_tables_are_the_logs():
    assert check_tables(ROOT, read()) == len(list(ROOT.glob("records/*/*/README.md")))


def test_colours_read_on_their_ground():
    from test_records_tools import luminance
    schemes = re.findall(r":root \{(.*?)\}", (ROOT / "docs/page.css").read_text())
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w+)", scheme))
        shades = {name: luminance(c if len(c) == 7 else "#" + 2 * c[1:]) for name, c in colours.items()}
        for text in "text", "quiet", "accent":
            for ground in "ground", "box":
                low, high = sorted((shades[text], shades[ground]))
                assert (high + 0.05) / (low + 0.05) > 4.5, (text, ground)


# -----------------------------------------------------------------------------
# A made-up tree

@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "records"))
    add_record(tmp_path, title="# The <baseline> & [more]\n")
    (tmp_path / "records/4m-cpu/track.json").write_text(json.dumps(TRACK))
    (tmp_path / "README.md").write_text("# Hi\n\n```bash\n./run.sh    # a < b\n```\n\n<!-- leaderboard:start -->\n"
                                        "<!-- leaderboard:end -->\n\n## Rules\n\n## Hacking\n\n```bash\nrace\n```\n")
    for name in "LICENSE", "records/NEGATIVE.md", "train_4m.py", "train_new.py":
        (tmp_path / name).write_text('"""New: a model <learns>.\n\nMore.\n"""\n')
    (tmp_path / "docs").mkdir()
    for name in "page.py", "page.css":
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    return tmp_path


def test_grows_with_records_and_samples(root, capsys):
    assert leaderboard.main([], root) == 0  # it makes the page too
    reader = read(root)
    check_links(root, reader)
    assert check_tables(root, reader) == 1 and reader.tables["4m-cpu"][1][7] == "The <baseline> & [more]"
    assert {"4m", "new"} <= reader.ids and "flow" not in reader.ids and "A model <learns>." in reader.texts
    assert [picture["src"] for picture in reader.pictures] == ["plots/4m-cpu-loss.png"]
    add_record(root, FAST, seconds=40.0, title="# Muon | `for` all\n\nWhy.")
    folder = root / "records/new-gpu"
    folder.mkdir()
    (folder / "track.json").write_text(json.dumps(TRACK | dict(task="new", track="gpu")))
    for name in "new.png", "new_long.png", "new_steps.gif":
        shutil.copy(root / "records/4m-cpu/loss.png", root / "docs" / name)
    (root / "docs/new.txt").write_text("To <be> & not")
    (root / "docs/new.log").write_text(log_text(loss=2.5, seconds=61.0))
    (root / "docs/new_long.log").write_text(log_text(loss=1.5, seconds=900.0))
    (root / "docs/plots/old.png").write_text("")
    assert page.main(["--check"], root) == 1
    said = capsys.readouterr().err
    assert "history.png is not there: run python records/leaderboard.py first" in said
    assert leaderboard.main(["--check"], root) == 1 and leaderboard.main([], root) == 0
    assert leaderboard.main(["--check"], root) == 0 == page.main(["--check"], root)
    reader = read(root)
    check_links(root, reader)
    assert check_tables(root, reader) == 2 and reader.tables["4m-cpu"][2][7] == "Muon | for all"
    assert "To <be> & not" in reader.texts and not (root / "docs/plots/old.png").exists()
    assert [picture["src"] for picture in reader.pictures] == [
        "plots/history.png", "new.png", "new_long.png", "new_steps.gif", "plots/4m-cpu-loss.png"]
    assert " ".join(reader.texts).count("20 steps, 61 s on 2 cores of Some CPU. Validation loss 2.500") == 3
    assert " ".join(reader.texts).count("20 steps, 900 s on 2 cores of Some CPU. Validation loss 1.500") == 1, "its own log"


def test_check_and_faults(root, capsys):
    leaderboard.main([], root)
    assert page.main(["--check"], root) == 0
    text = (root / "docs/index.html").read_text()
    (root / "docs/index.html").write_text(text.replace("100.0", "90.0"))
    assert page.main(["--check"], root) == 1 and "index.html is out of date" in capsys.readouterr().err
    with pytest.raises(AssertionError):
        check_tables(root, read(root))
    assert page.main([], root) == 0 and (root / "docs/index.html").read_text() == text
    assert page.main(["--chekc"], root) == 2
    (root / f"records/4m-cpu/{BASE}/0.log").write_text("x")
    assert page.main([], root) == 1 and "0.log: not a training log" in capsys.readouterr().err
    (root / f"records/4m-cpu/{BASE}/0.log").write_text(log_text(0, 2.89))
    (root / "README.md").write_text((root / "README.md").read_text().replace("## Hacking", "## Hack"))
    assert page.main([], root) == 1 and "needs a ```bash block below ## Hacking" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# A real browser, spoken to over the DevTools protocol: JSON texts that end in a zero byte, on file descriptors 3 and 4

class Chromium:
    def __init__(self, url, profile=None):
        (to_read, self.writing), (self.reading, to_write) = pipes = os.pipe(), os.pipe()
        to_read, to_write = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (to_read, to_write))  # not 3 or 4
        os.close(pipes[0][0]), os.close(pipes[1][1])
        flags = "--headless=new --remote-debugging-pipe --no-sandbox --disable-gpu --no-first-run --hide-scrollbars"
        flags += " --disable-background-networking --disable-dev-shm-usage"
        flags += f" --user-data-dir={profile}" if profile else ""
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "sh", BROWSER, *flags.split(), "about:blank"],
            pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL, start_new_session=True)
        os.close(to_read), os.close(to_write)
        self.url, self.number, self.rest, self.errors, self.events, self.session = url, 0, b"", [], [], None

    def __enter__(self):
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in "Page", "Runtime", "Log", "Network":
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        os.close(self.writing), os.close(self.reading)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def receive(self):
        while b"\0" not in self.rest:
            assert select.select([self.reading], [], [], 120)[0], "the browser says nothing"
            data = os.read(self.reading, 1 << 16)
            assert data, "the browser has gone"
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(message)
        kind, told = message.get("method", ""), message.get("params", {})
        self.events.append(kind)
        if kind == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])
        elif kind == "Runtime.consoleAPICalled" or kind in ("Runtime.exceptionThrown", "Network.loadingFailed"):
            self.errors.append(json.dumps(told))
        elif kind == "Network.requestWillBeSent" and not re.match("file:|data:|about:", told["request"]["url"]):
            self.errors.append(f"asks the network for {told['request']['url']}")
        return message

    def ask(self, method, **words):
        self.number += 1
        message = dict(id=self.number, method=method, params=words)
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def value(self, expression):
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"]["value"]

    def show(self, width, scheme):
        """Load the page anew: what it looks like in a window of that width."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500)
        self.ask("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
        self.events.clear()
        self.ask("Page.navigate", url=self.url)
        while "Page.loadEventFired" not in self.events:
            self.receive()
        return self.value("""({
            width: innerWidth, scroll: document.documentElement.scrollWidth, title: document.title,
            ground: getComputedStyle(document.body).backgroundColor, figures: [...document.querySelectorAll(
                "td.number")].map(e => getComputedStyle(e).fontVariantNumeric),
            images: [...document.images].map(i => [i.getAttribute("src"), i.complete && i.naturalWidth]),
            wide: [...document.querySelectorAll("body *")].filter(e => !e.closest(".table, pre")
                && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80)),
            hidden: [...document.querySelectorAll(".table")].filter(e => e.scrollWidth > e.clientWidth).map(
                e => e.scrollWidth),
            small: [...document.querySelectorAll("p, td, a, pre, figcaption")].filter(
                e => parseFloat(getComputedStyle(e).fontSize) < 13).length})""")

    def screenshot(self):
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])


@pytest.mark.skipif(not BROWSER, reason="there is no Chromium here")
def test_in_a_browser(tmp_path):
    """docs/ alone, as a server may have it: pictures, colours and widths in both schemes, on a phone and on a desk."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    names, grounds = [picture["src"] for picture in read().pictures], set()
    with Chromium((tmp_path / "docs/index.html").as_uri(), tmp_path / "profile") as browser:
        for width in 320, 390, 768, 1200:
            for scheme in "light", "dark":
                seen = browser.show(width, scheme)
                assert seen["width"] == width >= seen["scroll"] and seen["wide"] == [], seen
                assert [name for name, size in seen["images"] if size > 0] == names, seen["images"]
                # only a window in between may need to scroll a table
                assert not seen["hidden"] or 700 < width < 1200, seen["hidden"]
                assert seen["small"] == 0 and {*seen["figures"]} <= {"tabular-nums"} and "nano4M" in seen["title"]
                grounds.add((scheme, seen["ground"]))
        assert browser.errors == [] and len(grounds) == 2 == len(set(dict(grounds).values()))
        browser.ask("Page.navigate", url=(tmp_path / "docs/none.html").as_uri())  # a fault would have been seen
        assert any("ERR_FILE_NOT_FOUND" in error for error in browser.errors)


def test_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 10_240


def test_readme_says_what_the_log_says():
    log = rules.parse_log(ROOT / "docs" / "4m.log")
    footer, text = log["footer"], " ".join((ROOT / "README.md").read_text().split())
    single, whole = footer["quality_desc_f1"], footer["quality_desc_object_f1"]
    assert f"attributes F1 {single:.2f}, whole objects {whole:.2f} over 1,000 scenes" in text
    drawn, told = footer["quality_rgb_from_desc_f1"], footer["quality_rgb_from_caption_f1"]
    assert f"from a description (F1 {drawn:.2f} by the judge) or a caption ({told:.2f})" in text
    assert f"normals within {footer['quality_normal_degrees']:.1f} degrees" in text
    assert '"quality_scenes": 1000' in log["config"] and f"train {footer['steps']:,} steps" in text
    ready = rules.parse_log(ROOT / "docs" / "4m_showcase.log")
    settings, footer = json.loads(ready["config"])["config"], ready["footer"]
    assert f"{footer['steps']:,} steps at dim {settings['dim']}, {footer['train_seconds'] / 60:.0f} minutes on one core" in text
    whole, drawn = footer["quality_desc_object_f1"], footer["quality_rgb_from_desc_f1"]
    assert f"whole objects F1 {whole:.2f}, drawn from a description {drawn:.2f}, normals within " in text
    assert f"normals within {footer['quality_normal_degrees']:.1f} degrees. Once" in text
    maskgit = rules.parse_log(ROOT / "docs" / "maskgit.log")["footer"]
    assert f"after {maskgit['train_seconds']:.0f} seconds of training ([log](docs/maskgit.log))" in text
    assert f"{100 * maskgit['quality_class_accuracy']:.0f} % of them right by the judge" in text
