"""What a MaskGIT draws from nothing and from parts of validation rows, and the judge's numbers on its pictures."""
import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoints
import digits
import draw
import streams
import studio
import world

STEPS = (1, 4, 8, 16, 32, 64)  # numbers of network evaluations that the judge's numbers are taken at
TABLE_PER_CLASS = 10  # pictures of each class that are drawn for it
FLOOR_STEPS = 16  # network evaluations of the pictures of a track's floors
PART = 240  # pictures drawn at once
FIRST_ROWS = 12  # validation rows that are filled in
TEXT_STEPS = (1, 4, 16, 64)  # numbers of network evaluations that texts are drawn in
TEXT_ROWS = 200  # texts whose order of places is looked at


def radical_inverse(i, base):
    """The digits of i in a base, mirrored at the point: a number from 0 to 1."""
    value, scale = 0.0, 1.0
    while i:
        scale /= base
        value += i % base * scale
        i //= base
    return value


def halton_order(side):
    """The cells of a grid (side * side,) in the order of the 2-D Halton sequence, which spreads them evenly
    (arXiv:2503.17076)."""
    cells, i = {}, 1  # a dict keeps the first time of each
    while len(cells) < side * side:
        row, column = int(radical_inverse(i, 2) * side), int(radical_inverse(i, 3) * side)
        cells.setdefault(row * side + column)
        i += 1
    return torch.tensor(list(cells))


class Show:
    """Opened before the clock starts: tokenizer and judge; frozen is (tokens (N, L), labels (N,), masked (N, L))."""

    def __init__(self, script, run, modalities, frozen):
        self.script, self.device = script, run.device
        self.tokens, self.labels, self.masked = frozen
        self.side = math.isqrt(modalities["rgb"]["length"])
        self.order = halton_order(self.side)
        self.is_text = "text" in modalities
        if self.is_text:
            self.open_encoding(modalities["text"])
            self.glimpse = None
            return
        self.classes = torch.arange(modalities["label"]["vocab"], device=run.device)
        own_names = modalities["label"].get("names")  # of the user's own pictures, which the judge does not know
        quality_pictures = 0 if own_names else run.options.quality_pictures
        self.per_class = quality_pictures // len(self.classes)
        # a model that never, or always, saw labels has nothing to be guided by, nor has one of a single class
        guided = len(self.classes) > 1 and any(0 < share < 1 for share in checkpoints.label_drops(run))
        self.guidance = 2.0 if guided else 1.0
        length, vocab = modalities["rgb"]["length"], modalities["rgb"]["vocab"]
        decoder = modalities["rgb"].get("decoder")
        try:
            self.studio = studio.Studio(run.device, decoder)
        except Exception as error:  # safetensors and torch have several kinds
            raise script.Fault(f"the tokenizer of the pictures, data/{decoder}, cannot be opened ({error})") from None
        if self.side ** 2 != length or vocab != self.studio.vocab:
            raise script.Fault(f"the tokenizer decodes squares of tokens out of {self.studio.vocab}, and "
                               f"{run.config.frozen} has {length} out of {vocab}")
        self.names = own_names or list(world.CLASSES)
        if len(self.classes) != len(self.names):
            self.names = [f"class {i}" for i in self.classes.tolist()]
        if quality_pictures:
            self.open_judge(run)

    def open_encoding(self, meta):
        """What turns tokens of the text into bytes. Raises Fault."""
        self.vocab = meta["vocab"]
        try:
            self.encode, self.decode = streams.codec(meta)
        except Exception as error:  # tiktoken fetches GPT-2's merges, with errors of several libraries
            raise self.script.Fault(f"the encoding {meta['encoding']!r} cannot be opened ({error})") from None

    def open_judge(self, run):
        """The judge, if it can judge these pictures. Raises Fault."""
        self.judge, self.reference = digits.judge_of_tokens(self.studio, run.device)
        known, wanted = self.judge.classes, run.options.quality_pictures
        if len(self.classes) != known or self.side % self.judge.cells:
            raise self.script.Fault(f"the judge knows {known} classes and not those of {run.config.frozen}: pass "
                                    "--quality_pictures=0")
        if not self.per_class:
            raise self.script.Fault(f"--quality_pictures={wanted} is less than one for each of the {known} classes")

    def show(self, model, folder):
        tasks = len(TEXT_STEPS) + 2 if self.is_text else 3
        if not self.is_text and self.per_class:
            tasks += 2 + len(STEPS)
        with tqdm(total=tasks, desc="samples", unit="task", dynamic_ncols=True) as bar:
            self.bar = bar
            if self.is_text:
                self.text(model, folder)
                return {}
            if len(self.classes) == 1:
                tqdm.write("one class: guidance has nothing to tell apart and is off")
            draw.sheet([*self.every_class(model), *self.from_half(model)], folder / "maskgit.png")
            self.animation(model, folder / "maskgit_steps.gif")
            return self.quality(model) if self.per_class else {}

    def generate(self, model, what, labels, *given, **settings):
        """What the script's generate returns; one task of the bar."""
        self.bar.set_postfix_str(f"{what}, {len(labels)} rows")
        made = self.script.generate(model, labels, *given, **settings)
        self.bar.update()
        return made

    def text(self, model, folder):
        """Rows from nothing in ever more steps and validation rows with gaps filled in, in a file and on the console;
        and a plot of the order in which a model that draws one token per step, the surest, goes through a text."""
        tokens, labels, masked = (part[:FIRST_ROWS] for part in (self.tokens, self.labels, self.masked))
        lines = []
        for steps in TEXT_STEPS:
            made = self.generate(model, f"in {steps} steps", labels[:4], steps=steps, cosine=False)
            lines += [*(f"{f'{steps} steps':14}{self.as_text(row)}" for row in made), ""]
        filled = self.generate(model, "filled in", labels, tokens, masked, steps=model.length, cosine=False)
        gaps = tokens.masked_fill(masked, self.encode("_")[0])
        for given, result, true in zip(gaps, filled, tokens):
            lines += [f"given         {self.as_text(given)}", f"filled in     {self.as_text(result)}",
                      f"true          {self.as_text(true)}", ""]
        (folder / "maskgit.txt").write_text("\n".join(lines), encoding="utf-8")
        tqdm.write("\n".join(lines))
        many = self.labels[:1].expand(TEXT_ROWS)
        settings = {"steps": model.length, "cosine": False, "noise": 0, "return_history": True}
        _, history = self.generate(model, "one token per step", many, **settings)
        draw.order_of_places(sum(hidden.long() for _, hidden in history) + 1, folder / "maskgit_order.png")

    def as_text(self, row):
        """Tokens as one line of text, ~ for a line break; ids above the vocabulary are left out."""
        ids = [i for i in row.tolist() if i < self.vocab]
        return self.decode(ids).decode("utf-8", "replace").replace("\n", "~")

    def glimpse(self, model):
        """Cells of a sheet: a draw of eight classes each."""
        labels = self.classes[::max(1, len(self.classes) // 8)][:8]
        tokens = self.generate(model, "a glimpse", labels, steps=16, guidance=self.guidance, order=self.order)
        return [(picture, self.names[label]) for picture, label in zip(self.studio.pictures(tokens), labels.tolist())]

    def every_class(self, model):
        """Rows of the sheet: a heading, then four draws of every class."""
        labels = self.classes.repeat_interleave(4)
        tokens = self.generate(model, "every class", labels, steps=16, guidance=self.guidance, order=self.order)
        cells = [(picture, self.names[label]) for picture, label in zip(self.studio.pictures(tokens), labels.tolist())]
        return ["four draws of every class", *(cells[i:i + 8] for i in range(0, len(cells), 8))]

    def from_half(self, model, pictures=3):
        """Rows of the sheet: a heading, then three validation pictures of which half of the tokens are given."""
        length = self.side ** 2
        hidden = torch.rand(length, generator=torch.Generator().manual_seed(0)).argsort() < length // 2
        cover = self.enlarge(hidden.view(1, -1))[0]
        self.bar.set_postfix_str("half of the tokens given")
        rows = ["half of the tokens in  >  the whole picture out (four draws)"]
        masked = hidden.to(self.device).expand(4, -1)
        some = self.tokens[:pictures]
        for tokens, label, true in zip(some, self.labels, self.studio.pictures(some)):
            made = self.script.generate(model, label.expand(4), tokens.expand(4, -1), masked, order=self.order)
            drawn = [(picture, "filled in") for picture in self.studio.pictures(made)]
            rows.append([(true * (1 - cover) + 0.15 * cover, "given"), *drawn, (true, "true")])
        self.bar.update()
        return rows

    def enlarge(self, masked):
        """Masked places (B, L) as pictures (B, 1, H, W) of 0 and 1, on the CPU."""
        return F.interpolate(masked.view(-1, 1, self.side, self.side).float(), scale_factor=8).cpu()

    def animation(self, model, path):
        """A picture of every class as it is filled in."""
        tokens, history = self.generate(model, "step by step", self.classes, steps=16, guidance=self.guidance,
                                        order=self.order, return_history=True)
        made, frames = self.studio.pictures(tokens), []
        for _, masked in history:  # a token that is placed stays: of the final picture show what there is
            cover = self.enlarge(masked)
            frames.append(made * (1 - cover) + 0.5 * cover)
        draw.animation(frames, path)

    def quality(self, model):
        """The judge's accuracy and Frechet distance: by the number of steps on few pictures, and a track's floors."""
        numbers = {}
        for steps in STEPS:
            accuracy, distance = self.judged(model, steps, min(self.per_class, TABLE_PER_CLASS))
            numbers |= {f"accuracy_{steps}_steps": accuracy, f"frechet_{steps}_steps": distance}
        accuracy, distance = self.judged(model, FLOOR_STEPS, self.per_class)
        return numbers | {"quality_class_accuracy": accuracy, "quality_frechet": distance,
                          "quality_inpainting_accuracy": self.inpainted(model),
                          "quality_steps": FLOOR_STEPS, "quality_guidance": self.guidance}

    def inpainted(self, model):
        """Class accuracy of validation pictures of which another random half of the tokens is given each."""
        n = min(self.per_class * len(self.classes), len(self.tokens))
        tokens, labels = self.tokens[:n].to(self.device), self.labels[:n].to(self.device)
        rng = torch.Generator().manual_seed(0)
        hidden = torch.rand(tokens.shape, generator=rng).argsort(1) < tokens.size(1) // 2
        pictures = self.drawn(model, "filled in", FLOOR_STEPS, labels, tokens, hidden.to(self.device))
        return round(self.judge.accuracy(pictures, labels), 4)

    def judged(self, model, steps, per_class):
        """Class accuracy and Frechet distance of some pictures of each class."""
        labels = self.classes.repeat(per_class)
        pictures = self.drawn(model, f"in {steps} steps", steps, labels)
        return (round(self.judge.accuracy(pictures, labels), 4),
                round(self.judge.frechet_distance(pictures, self.reference), 3))

    def drawn(self, model, what, steps, *given):
        """Pictures as the judge knows them, for labels and perhaps tokens and masks; one task of the bar."""
        self.bar.set_postfix_str(f"{len(given[0])} pictures {what}")
        settings = {"steps": steps, "guidance": self.guidance, "order": self.order}
        parts = zip(*(part.split(PART) for part in given))
        tokens = [self.script.generate(model, *part, seed=i, **settings) for i, part in enumerate(parts)]
        self.bar.update()
        return F.avg_pool2d(self.studio.pictures(torch.cat(tokens)), self.side // self.judge.cells)
