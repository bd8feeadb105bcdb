"""The sections of data/frozen/README.md that scripts write."""
import re

from shards import FROZEN


def write_sections(text):
    """Put the sections of a Markdown text into data/frozen/README.md, in place of those with the same headings."""
    def sections(text):
        parts = filter(None, re.split(r"^(?=#+ )", text, flags=re.M))
        return {part.partition("\n")[0]: part.strip() + "\n" for part in parts}
    readme = FROZEN / "README.md"
    readme.write_text("\n".join((sections(readme.read_text()) | sections(text)).values()))
