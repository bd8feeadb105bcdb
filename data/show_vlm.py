"""What a VLM says about validation pictures, a sheet with the truth where it is wrong, and a chat about a picture."""
import dataclasses
import time
from pathlib import Path

import torch
from tqdm import tqdm

import draw
import image_files
import judge as judges
import questions
import tokenizer
from kv_cache import KVCache
from text_codec import TextCodec

SPEED_TOKENS = 200  # that the speed of sampling is measured on
DESCRIBE, DESCRIBE_TOKENS = "What is there?", 80  # the question that asks for everything, tokens of an answer at most
PART, SIDE = 100, 192  # pictures described at once; pixels of one on the sheet
STRANGE = 0.005  # mean squared error of the tokenizer: of 2,000 scenes 0.0004, at most 0.0024, of photos and icons over 0.02
DESCRIBED = questions.FAMILIES.index("describe") + 1  # the number of its family


def read_picture(path, size):
    """The picture (3, size, size) of bytes in an image file, as training sees pictures. Raises as open_picture does."""
    return torch.from_numpy(image_files.stretch(image_files.open_picture(path), size))


def looks_like_the_world(picture):
    """Whether a picture (3, S, S) of bytes seems to be one of our scenes: if it has objects that the judge sees, and is
    one that the tokenizer of the world's pictures can tell."""
    picture = judges.enlarge(picture[None].float() / 255)
    coder = tokenizer.load_tokenizer()
    error = (coder.decode(coder.encode(picture)) - picture).square().mean().item()
    return error < STRANGE and bool(judges.load().read(picture)[0])


class Show:
    """Opened before the clock starts: the text encoding, the picture to chat about; frozen is the validation set."""

    def __init__(self, script, run, frozen, backbones):
        self.script, self.options = script, run.options
        self.pixels, self.tokens, self.answer, _ = (part[:run.options.samples] for part in frozen)
        self.wanted = [part[:run.options.quality_pictures] for part in frozen]
        try:
            self.codec = backbones.codec if backbones else TextCodec()
        except (OSError, ValueError) as error:
            raise script.Fault(f"the text encoding cannot be read ({error}): `git checkout data/frozen`") from None
        self.picture = self.open_picture(frozen[0].size(-1)) if run.options.chat else None
        self.of_the_world = run.options.chat and Path(run.config.frozen).name.startswith("qa")

    def open_picture(self, size):
        path = self.options.chat
        try:
            return read_picture(self.script.ROOT / path, size)
        except Exception as error:  # Pillow's decoders raise what they like
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise self.script.Fault(f"--chat={path} is not a picture that can be read ({reason})") from None

    def show(self, model, folder):
        numbers = {}
        total = len(self.wanted[0])
        if len(self.pixels):
            total += len(self.pixels) + 2
        with tqdm(total=total, desc="samples", unit="picture", dynamic_ncols=True) as bar:
            if len(self.wanted[0]):
                numbers |= self.quality(model, bar)
            if len(self.pixels):
                self.sheet(model, folder / "vlm.png", bar)
                numbers["sampled_per_second"] = self.speed(model, True, bar)
                numbers["sampled_per_second_uncached"] = self.speed(model, False, bar)
        return numbers

    def quality(self, model, bar):
        """The quality number: of descriptions if conversations have any, else of answers."""
        if (self.wanted[3] == DESCRIBED).any():
            return {"quality_describe_f1": self.describe_f1(model, bar)}
        return {"quality_exact_answers": self.exact_answers(model, bar)}

    def describe_f1(self, model, bar):
        """Object F1, sizes included, of what the model says is in validation pictures, asked for nothing else before."""
        bar.set_postfix_str("descriptions")
        told, meant = [], []
        for pixels, tokens, answer, family in zip(*(part.split(PART) for part in self.wanted)):
            told += [questions.parse_description(text) for text in self.describe(model, pixels)]
            turns = (family == DESCRIBED).int().argmax(1, keepdim=True) + 1
            for row, asked in zip(tokens.cpu(), (answer == turns).cpu()):
                meant.append(questions.parse_description(self.codec.decode(row[asked].tolist())))
            bar.update(len(pixels))
        return round(judges.object_f1(told, meant, questions.VALUES), 4)

    def exact_answers(self, model, bar):
        """Share of answers right to the letter, each after the true turns before it: drawing the likeliest tokens
        gives a true answer exactly where each of its tokens is the likeliest one after those before it."""
        bar.set_postfix_str("answers")
        device, vocab = model.project.weight.device, len(model.lm.embed_tokens.weight)
        rows = max(1, min(PART, self.script.EVAL_VALUES // (self.wanted[1].size(1) * vocab)))
        solved = []
        for pixels, tokens, answer, _ in zip(*(part.to(device).split(rows) for part in self.wanted)):
            counted = answer > 0  # (B, L)
            _, likeliest = self.script.target_log_probs(model, pixels, tokens, tokens, counted, vocab)
            right = torch.ones_like(counted)
            right[counted] = likeliest
            for turn in range(1, int(answer.max()) + 1):
                inside = answer == turn
                solved.append((right | ~inside).all(1)[inside.any(1)])
            bar.update(len(pixels))
        return round(torch.cat(solved).float().mean().item(), 4)

    def describe(self, model, pixels):
        """What the model says is in each of some pictures (n, 3, S, S), always its likeliest token: a list of texts."""
        device = model.project.weight.device
        row = [self.script.IMAGE] * model.image_tokens + self.codec.question(DESCRIBE)
        x = model.embed(torch.tensor(row, device=device).expand(len(pixels), -1), pixels.to(device))  # (n, T, C)
        cache, made = KVCache(), []
        running = torch.ones(len(pixels), 1, dtype=torch.bool, device=device)
        while len(made) < DESCRIBE_TOKENS and bool(running.any()):
            new = self.script.next_logits(model, x, cache).argmax(-1, keepdim=True)  # (n, 1)
            x = torch.cat([x, model.lm.embed_tokens(new).type_as(x)], 1)
            running &= new != self.codec.stop
            made.append(new)
        texts = []
        for row in torch.cat(made, 1).tolist():
            end = row.index(self.codec.stop) if self.codec.stop in row else len(row)
            texts.append(self.codec.decode(row[:end]))
        return texts

    def ask(self, model, picture, tokens):
        """What the model answers to a picture and the tokens of questions."""
        cache = KVCache()
        said = self.script.generate(model, picture, tokens, self.codec.stop, self.options, cache=cache)
        return self.codec.decode(said).strip()

    def cells(self, model, most, bar):
        """Cells of a sheet: some pictures, each with questions, answers and the truth."""
        cells = []
        for picture, row, marks in zip(self.pixels[:most], self.tokens.tolist(), self.answer.tolist()):
            lines = [self.turn(model, picture, row, marks, turn) for turn in range(1, max(marks) + 1)]
            cells += [picture.float() / 255, "\n".join(lines)]
            bar.update()
        return cells

    def glimpse(self, model):
        """Cells of a sheet: three pictures and what it answers."""
        return self.cells(model, 3, tqdm(disable=True))

    def sheet(self, model, path, bar):
        cells = self.cells(model, len(self.pixels), bar)
        rows = [cells[i:i + 4] for i in range(0, len(cells), 4)]
        draw.sheet(["questions, the model's answers, and the true ones where it is wrong", *rows], path, SIDE)

    def turn(self, model, picture, row, marks, turn):
        """One line: a turn's question, the answer, and the true one if that is another."""
        first, last = marks.index(turn), len(marks) - marks[::-1].index(turn)
        asked = len(marks) - marks[::-1].index(turn - 1) if turn > 1 else 0
        said = self.ask(model, picture, row[:first])
        truth = self.codec.decode(row[first:last]).strip()
        question = self.codec.decode(row[asked:first]).replace("Question:", "").replace("Answer:", "").strip()
        return f"{question} {said}" if said == truth else f"{question} {said}   (true: {truth})"

    def speed(self, model, cached, bar):
        """Tokens per second of an answer of 200 tokens, whatever they say."""
        bar.set_postfix_str(f"speed {'with' if cached else 'without'} the cache")
        options = dataclasses.replace(self.options, max_tokens=SPEED_TOKENS)
        question = self.codec.question("How many objects are there?")
        start = time.perf_counter()
        cache = KVCache() if cached else None
        made = self.script.generate(model, self.pixels[0], question, None, options, cache=cache)
        bar.update()
        return round(len(made) / (time.perf_counter() - start), 1)

    def chat(self, model):
        """Answer questions about the picture, typed in the terminal, until an empty line or Ctrl-C. None: no chat."""
        if self.picture is None:
            return
        if self.of_the_world and not looks_like_the_world(self.picture):
            print("This picture is not of the world that the model was trained on: take its answers for guesses.")
        print("Ask about the picture; an empty line ends it.")
        while True:
            try:
                question = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if not question:
                return
            print(self.ask(model, self.picture, self.codec.question(question)))
