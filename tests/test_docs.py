"""What the texts in docs/ say can be run."""
import re
import subprocess
import sys

import pytest
from PIL import Image

from runs import ROOT


def blocks(language):
    """The code of a language in README.md and docs/, with the file that it is in."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [(path.name, code) for path in paths for code in re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)]


@pytest.mark.parametrize("name, code", blocks("python"))
def test_python_runs(name, code, tmp_path):
    """As it stands there, in the top folder, but for where pictures go."""
    made = re.findall(r'"(\w+\.png)"', code)
    for picture in made:
        code = code.replace(f'"{picture}"', repr(str(tmp_path / picture)))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert made and all(Image.open(tmp_path / picture).size[0] > 100 for picture in made)
