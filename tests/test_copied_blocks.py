"""What the training scripts share is inlined between `# --- copied: NAME ---` and `# --- end: NAME ---`, byte for byte.

    python tests/test_copied_blocks.py                      # which blocks differ, as a diff
    python tests/test_copied_blocks.py --fix train_4m.py    # rewrite the others with the blocks of this file
"""
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^# --- copied: (.+?) ---\n(.*?)^# --- end: \1 ---\n", re.S | re.M)


def differences(files):
    """Unified diffs between the first file that carries a block and every other one; files: {name: text}."""
    first, found = {}, []
    for name, text in files.items():
        marks = re.findall(r"^# --- (?:copied|end): (.+?) ---$", text, re.M)
        marks = [mark for mark in marks if mark != "eval"]  # the end of the frozen block
        if marks != [title for title, _ in BLOCK.findall(text) for _ in "be"]:
            found.append(f"{name}: a block's marks do not pair up")
        for title, body in BLOCK.findall(text):
            origin, other = first.setdefault(title, (name, body))
            if body != other:
                found.append("".join(difflib.unified_diff(other.splitlines(True), body.splitlines(True),
                                                          f"{origin} [{title}]", f"{name} [{title}]")))
    return found


def fixed(text, source):
    """text with every block that source carries too replaced by source's."""
    bodies = dict(BLOCK.findall(source))
    return BLOCK.sub(lambda m: m[0].replace(m[2], bodies.get(m[1], m[2])) if m[2] else m[0], text)


def read_scripts(root=ROOT):
    paths = sorted([*root.glob("train_*.py"), *root.glob("baselines/*.py")])
    return {str(path.relative_to(root)): path.read_text() for path in paths}


def test_blocks_are_identical():
    files = read_scripts()
    shared = [title for text in files.values() for title, _ in BLOCK.findall(text)]
    assert len(files) < 2 or max(shared.count(title) for title in shared) > 1, "no block is carried twice"
    assert differences(files) == []


def test_checker_finds_and_fixes_a_difference():
    block = "# --- copied: sum ---\nx = {}\n# --- end: sum ---\n"
    files = {"a.py": "a\n" + block.format(1), "b.py": block.format(2) + "b\n"}
    found, = differences(files)
    assert "-x = 1" in found and "+x = 2" in found
    files["b.py"] = fixed(files["b.py"], files["a.py"])
    assert files["b.py"] == block.format(1) + "b\n" and differences(files) == []
    assert "do not pair up" in differences({"a.py": block.format(1).replace("end: sum", "end: sun")})[0]


if __name__ == "__main__":
    scripts = read_scripts()
    if sys.argv[1:2] == ["--fix"]:
        if len(sys.argv) != 3 or sys.argv[2] not in scripts:
            sys.exit(f"--fix takes the name of the script whose blocks are right: {', '.join(scripts)}")
        for name, text in scripts.items():
            if (new := fixed(text, scripts[sys.argv[2]])) != text:
                (ROOT / name).write_text(new)
                print(f"rewrote {name}")
    elif found := differences(scripts):
        sys.exit("\n".join(found))
