"""What a nano4M makes of data that are not our scenes: the texts of validation rows, the true ones beside them."""
import numpy as np
import torch

import generate_4m

ROWS = 8


class TextShow:
    """Opened before the clock starts; tokens (B, size) are validation rows of a set that data/course.py made."""

    def __init__(self, script, run, layout, tokens):
        path = script.ROOT / run.config.frozen
        try:
            with np.load(path, allow_pickle=False) as arrays:
                self.bytes, self.edges = arrays["word_bytes"].tobytes(), arrays["word_edges"].tolist()
        except KeyError:
            raise script.Fault(f"{path} does not say how its texts are spelled: it is made by `python data/course.py "
                               "ROOT`") from None
        self.script, self.run, self.layout, self.tokens = script, run, layout, tokens[:ROWS].to(run.device)

    def text(self, row, modality):
        """A modality's text in a row of tokens, up to its end token, on one line; without ids that are no words."""
        ids = row[self.layout.span[modality]].tolist()
        end = self.layout.end[modality]
        if end in ids:
            ids = ids[:ids.index(end)]
        words = [self.bytes[self.edges[i]:self.edges[i + 1]] for i in ids if i + 1 < len(self.edges)]
        return " ".join(b"".join(words).decode("utf-8", "replace").split())

    @torch.no_grad()
    def show(self, model, folder):
        self.run.say("pictures and quality numbers need our own tokenizer, judge and scenes: of other data there are "
                     "texts")
        known, made = generate_4m.only(self.layout, self.tokens, "rgb"), {}
        for m in ("desc", "caption"):
            output = self.script.Output(m, temperature=0)
            made[m], _ = generate_4m.generate(self.script, model, self.layout, self.tokens, known, [output])
        lines = []
        for i, row in enumerate(self.tokens):
            lines.append(f"validation row {i}, from rgb")
            for m, rows in made.items():
                lines += [f"    {m}: {self.text(rows[i], m)}", f"    true {m}: {self.text(row, m)}"]
        (folder / "4m.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {}
