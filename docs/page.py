"""
Write docs/index.html, a page to look at: leaderboards from the logs, samples from docs/, commands from README.md.

    python docs/page.py            # write it, and copies of the plots in docs/plots/
    python docs/page.py --check    # write nothing; exit 1 if one on disk is out of date

A family's samples are docs/<task>*.png, .gif, .jpg, .webp and .txt, those that there are, and docs/<task>.log is the
run that made them; docs/real/<task>.png and .log are those on real data, and docs/side_by_side/<task>.png is what
records/side_by_side.py draws. The plots are copied because a server of docs/ alone has no ../records. Git keeps equal
files once, so a copy costs nothing; inside the page they would be a third larger and stored again with every change.
"""

import ast
import html
import posixpath
import re
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "records"))
import leaderboard  # noqa: E402
from rules import parse_log  # noqa: E402

ORDER = "4m gpt maskgit flow vlm".split()  # of the families; others follow by name
SHOWN = {"maskgit.png": "Four draws of every class, and validation pictures of which half is given.",
         "maskgit_steps.gif": "Every class as it is filled in, in 16 steps.",
         "maskgit_orders.png": "The judge's numbers on samples, by steps and by the order in which places are filled.",
         "4m_showcase.png": "What the ready model, trained for an hour, makes of validation scenes it has never seen.",
         "4m.png": "The same after a short run, the truth beside it.",
         "flow_steps.png": "The judge's numbers on samples, by Euler's steps, before and after reflow.",
         "flow.png": "Four draws of every class after a short run, and the way from noise to picture.",
         "vlm.png": "Questions about validation pictures and its answers, the truth where it errs.",
         "gpt.txt": 'What the ready model says after "ROMEO:".',
         "real/gpt.png": "Real data: handwritten digits of MNIST, of a GPT that learnt them as a stream of tokens.",
         "real/maskgit.png": "Real data: handwritten digits of MNIST, of a MaskGIT that learnt their tokens.",
         "real/flow.png": "Real data: handwritten digits of MNIST, of a flow that learnt their pixels.",
         "real/vlm.png": "Real data: questions of easy-VQA, and what it answers."}
OF_SEVERAL_RUNS = "maskgit_orders.png", "flow_steps.png"

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{css}">
</head>
<body>
"""
PAGE = """<h1>modded-nano4M</h1>
<p class="lead">Wall-clock speed runs for multimodal models. A model is trained to a fixed validation loss, the clock is
read, and the log goes on a leaderboard; whoever finds a faster way sets the next record. Each model family is one
Python file, meant to be read, copied and edited. A laptop is enough for the <code>cpu</code> tracks.</p>
{commands}
<nav><a href="#leaderboard">Leaderboard</a> <a href="#samples">Samples</a> <a href="#tracks">Every record</a>
<a href="#race">Race a script</a> <a href="../README.md">README</a> <a href="../README.md#rules">Rules</a>
{gallery}<a href="../records/NEGATIVE.md">What did not pay</a></nav>
<h2 id="leaderboard">Leaderboard</h2>
<p>The newest record of every track; it is measured against record #1, the public recipe.</p>
{summary}
<h2 id="samples">Samples</h2>
{families}
<h2 id="tracks">Every record</h2>
<p>Time is training time, without start-up and evaluation. Speed-up is over record #1, the baseline. p is that of a
one-sided t-test, that the mean loss reaches the target and that the record is faster than the one before. Quality is
what a track has floors for. Lines count the training script.</p>
{tracks}
<h2 id="race">Race a script</h2>
<p>Copy a script, change a line, race the copy against the original. With the data there, three commands say what came
of it:</p>
{race}
<p>They run in turn, A B A B, so that a machine that slows down slows both; the verdict is a sentence with intervals.
<a href="../README.md#hacking">More to try</a>, <a href="../README.md#rules">the rules and how to submit</a>.</p>
{scaling}<footer class="quiet"><p>Made by <a href="page.py">page.py</a> from the logs in
<a href="../records/README.md">records</a>; no number is typed. MIT licence, see <a href="../LICENSE">LICENSE</a>.</p>
</footer>
</body>
</html>
"""

# -----------------------------------------------------------------------------
# Markdown as leaderboard.py writes it -> HTML

def plot_name(path):
    """Where docs/ keeps the copy of records/<track>/loss.png or records/history.png."""
    return "plots/" + path.removeprefix("records/").replace("/", "-")

def address(link, base):
    """A link of a Markdown file in the folder `base` as one of docs/index.html."""
    name, _, anchor = link.partition("#")
    path = posixpath.normpath(posixpath.join(base, name))
    if re.match(r"\w+:", link) or not name:
        return link
    if path == "records/README.md" and anchor not in ("", "season-1"):  # a track: it is on the page too
        return "#" + anchor
    return plot_name(path) if path.endswith(".png") else posixpath.relpath(path, "docs") + "#" * bool(anchor) + anchor

def inline(text, base, root):
    """Links and code within a line. A link to a record leads to its note; one to its logs becomes a link to each."""
    def link(m):
        url, folder = address(m[2], base), root / base / m[2]
        if m[1] == "logs":
            logs = sorted(folder.glob("*.log"), key=lambda path: (len(path.stem), path.stem))
            return " ".join(f'<a href="{url}/{name}">{text}</a>' for text, name in
                            [("note", "README.md"), *((path.stem, path.name) for path in logs)])
        return f'<a href="{url}{"/README.md" * folder.is_dir()}">{m[1]}</a>'

    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text.replace("\\|", "|")))
    return re.sub(r"\[(.+?)\]\((\S+?)\)", link, text)

def shell(text):
    """Commands, their comments set apart."""
    return "<pre>" + re.sub(r"(?m)(^|[ ]+)(#.*)$", r"\1<i>\2</i>", html.escape(text.strip(), quote=False)) + "</pre>"

def head(title, css):
    """The beginning of a page, up to its body; css: where page.css is."""
    return HEAD.format(title=title, css=css)

def picture(path, link, alt, caption=""):
    """A figure, a sample if it has a caption; its size is in the page, so that this does not jump while it loads."""
    data = path.read_bytes()[:24]
    size = struct.unpack(">II", data[16:]) if data[1:4] == b"PNG" else struct.unpack("<HH", data[6:10])
    size = 'width="{}" height="{}" '.format(*size) if data[:3] in (b"\x89PN", b"GIF") else ""
    kind, below = ("sample", f"<figcaption>{caption}</figcaption>") if caption else ("plot", "")
    image = f'<a href="{link}"><img {size}src="{link}" alt="{html.escape(alt)}"></a>'
    return f'<figure class="{kind}">{image}{below}</figure>'

def table(lines, base, root):
    """A Markdown table; cells carry their column's name, by which a narrow screen lays each row out as a card."""
    head, rule, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])] for line in lines]
    kinds = ["number" if dashes.endswith(":") else "text" for dashes in rule]
    names = [f'<th class="{kind}">{html.escape(name)}</th>' for name, kind in zip(head, kinds)]
    out = ['<div class="table"><table>', "<thead><tr>", *names, "</tr></thead>", "<tbody>"]
    for row in rows:
        cells = [f'<td class="{kind}{" none" * (cell == "–")}" data-name="{html.escape(name)}">'
                 f"<span>{inline(cell, base, root)}</span></td>" for name, kind, cell in zip(head, kinds, row)]
        out += ["<tr>", *cells, "</tr>"]
    return "\n".join(out + ["</tbody>", "</table></div>"])

def convert(text, base, root):
    """Headings, paragraphs, tables, pictures and commands, parted by empty lines."""
    out = []
    for block in text.strip().split("\n\n"):
        if block.startswith("#"):
            name = block.strip("# ")
            out.append(f'<h3 id="{name}">{name}</h3>')
        elif block.startswith("|"):
            out.append(table(block.splitlines(), base, root))
        elif block.startswith("```"):
            out.append(shell(block.strip("`")))
        elif m := re.fullmatch(r"!\[(.*)\]\((.*)\)", block):
            out.append(picture(root / base / m[2], address(m[2], base), m[1]))
        else:
            out.append(f"<p>{inline(block[:1].upper() + block[1:], base, root)}</p>")
    return "\n".join(out)

# -----------------------------------------------------------------------------
# The page

def commands(text, heading=""):
    """README.md's first block of commands, or the first below a heading."""
    m = re.search(r"```bash\n(.*?)```", text.partition(f"\n## {heading}\n")[2] if heading else text, re.S)
    if not m:
        raise ValueError(f"README.md: the page needs a ```bash block {'below ## ' + heading if heading else 'in it'}")
    return shell(m[1])

def run_of(root, name):
    """What a log in docs/ says of its run, as the end of a caption; "" if it is not there."""
    if not (path := root / "docs" / name).is_file():
        return ""
    foot = parse_log(path)["footer"]
    run = f"{foot['steps']:,} steps, {foot['train_seconds']:.0f} s on {foot['hardware']}. " if foot["steps"] else ""
    return f' {html.escape(run)}Validation loss {foot["val_loss"]:.3f} (<a href="{name}">log</a>).'

def family(root, task, tracks):
    """A model family: what its script says it is, how to run it, its samples and the run that made them."""
    script = f"train_{task}.py"
    source = (root / script).read_text(encoding="utf-8")
    name, _, what = (ast.get_docstring(ast.parse(source)) or task).partition("\n")[0].partition(": ")
    links = [f'<a href="../{script}">{script}</a>, {len(source.splitlines())} lines']
    links += [f'<a href="#{folder.name}">{folder.name}</a>' for folder, track, _ in tracks if track["task"] == task]
    out = [f'<h3 id="{task}">{html.escape(name)}</h3>', f"<p>{html.escape(what[:1].upper() + what[1:])}</p>",
           shell(f"./run.sh {task}"), f'<p class="quiet">{" · ".join(links)}</p>']
    for path in sorted(root.glob("docs/*"), key=lambda path: (path.stem, path.suffix != ".png", path.suffix)):
        what = SHOWN.get(path.name, f"Samples of {name}.")
        if not re.fullmatch(rf"{task}([_-].*)?", path.stem):
            continue
        origin = "" if path.name in OF_SEVERAL_RUNS else run_of(root, f"{path.stem}.log") or run_of(root, f"{task}.log")
        if path.suffix in (".png", ".gif", ".jpg", ".webp"):
            out.append(picture(path, path.name, what, html.escape(what) + origin))
        elif path.suffix == ".txt":
            text = re.sub(r"\n{3,}", "\n\n", path.read_text(encoding="utf-8", errors="replace").strip())
            text = html.escape(text, quote=False)
            out.append(f'<figure class="sample"><pre tabindex="0">{text}</pre>'
                       f"<figcaption>{what}{origin}</figcaption></figure>")
    if (path := root / "docs" / "side_by_side" / f"{task}.png").is_file():
        what = "What a speed-up buys: the public recipe and the record after the same seconds of training."
        out.append(picture(path, f"side_by_side/{task}.png", what, what))
    link = f"real/{task}.png"
    if (path := root / "docs" / link).is_file():
        what = SHOWN.get(link, f"Samples of {name} on real data.")
        origin = run_of(root, f"real/{task}.log") + ' <a href="DATA.md#real-data">How to train on it</a>.'
        out.append(picture(path, link, what, html.escape(what) + origin))
    return "\n".join(out)

def build(root=ROOT):
    """{path: bytes} of the page and its plots."""
    tracks, readme = leaderboard.read_tracks(root), (root / "README.md").read_text(encoding="utf-8")
    tasks = [path.stem.removeprefix("train_") for path in sorted(root.glob("train_*.py"))]
    tasks.sort(key=lambda task: ORDER.index(task) if task in ORDER else len(ORDER))
    paths = [path.relative_to(root).as_posix() for path in leaderboard.plots(root, tracks)]
    if missing := [path for path in paths if not (root / path).is_file()]:
        raise ValueError(f"{missing[0]} is not there: run python records/leaderboard.py first")
    sections = (convert(leaderboard.track_section(*track), "records", root) for track in tracks)
    plot, scaling = root / "docs" / "scaling.png", ""
    if plot.is_file():
        scaling = '<h2 id="scaling">More processes</h2>\n' + picture(
            plot, plot.name, "milliseconds per step against processes: measured, and by formula",
            'A training step of nano4M on more processes (<a href="SCALING.md">what was measured</a>).') + "\n"
    gallery = root / "docs" / "gallery" / "index.html"
    gallery = '<a href="gallery/index.html">Gallery</a> ' if gallery.is_file() else ""
    text = PAGE.format(gallery=gallery, scaling=scaling, commands=commands(readme), race=commands(readme, "Hacking"),
                       summary=convert(leaderboard.summary(tracks), "", root),
                       families="\n".join(family(root, task, tracks) for task in tasks),
                       tracks="\n".join(sections))
    files = {root / "docs" / plot_name(path): (root / path).read_bytes() for path in paths}
    text = head("modded-nano4M: speed runs for multimodal models", "page.css") + text
    return {root / "docs" / "index.html": text.encode()} | files

def main(argv, root=ROOT):
    """Returns the exit status."""
    if set(argv) - {"--check"}:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    try:
        files = build(Path(root))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    old = [path for path, data in files.items() if not path.is_file() or path.read_bytes() != data]
    left = [path for path in Path(root, "docs", "plots").glob("*") if path not in files]
    for path in old + left:
        if "--check" in argv:
            print(f"{path} is out of date: run python docs/page.py", file=sys.stderr)
        elif path in left:
            path.unlink()
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(files[path])
    return int("--check" in argv and bool(old + left))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
