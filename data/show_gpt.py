"""What a GPT makes of a prompt: text, printed as it comes; of labels, in a stream of pictures: a sheet."""
import dataclasses
import re

import torch
from tqdm import tqdm

import digits
import speculate
import streams
from kv_cache import KVCache

PICTURE_TOKENS = {"scenes": 64, "patches2": 49}  # of a picture, by the encoding of a stream of pictures
PER_LABEL, PER_ROW, JUDGED_PER_LABEL = 4, 8, 40
TEXTS, TEMPERATURE = 40, 0.8  # texts whose words are looked at, and how they are drawn, whatever the samples' options
KNOWN_TOKENS = 10_000_000  # of the training stream, the first ones of its first file, whose words are known
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
REPEATED = 8  # words in a row
SNIPPETS, SNIPPET_TOKENS, PYTHON = 200, 128, "3.11"  # of code, and by which version of Python its tokens are judged
FUNCTION = "\n\n\ndef"  # after two empty lines: after one its body could be a method's, further to the right
CODE_TEMPERATURE = 0.5  # of snippets, as one wrong quote spoils a whole one; repetition is counted beside it


def words(text):
    return WORD.findall(text.lower())


def word_numbers(texts, known):
    """The share of the texts' words that are in the set `known`, and of their runs of eight words the share that an
    earlier place of the texts has. The last word of a text may be cut off and does not count."""
    found, runs = [], []
    for text in texts:
        whole = words(text)[:-1]
        found += whole
        runs += [tuple(whole[i:i + REPEATED]) for i in range(len(whole) - REPEATED + 1)]
    return {"quality_known_words": round(sum(word in known for word in found) / max(1, len(found)), 4),
            "quality_repeated_8grams": round(1 - len(set(runs)) / max(1, len(runs)), 4)}


def tokenizes(text):
    """Whether the whole lines of a text, whose end may be missing, are tokens of Python: by parso, as Python's own
    tokenizer has other opinions in every version. A string of several lines may be open at the end."""
    from parso.python.tokenize import tokenize
    from parso.utils import parse_version_string
    for token in tokenize(text[:text.rfind("\n") + 1], version_info=parse_version_string(PYTHON)):
        if token.type.name in ("ERRORTOKEN", "ERROR_DEDENT") and not re.match(r"\w*(\"{3}|'{3})", token.string):
            return False
    return True


class Show:
    """Opened before the clock starts: the encoding and the prompt in it, the draft; or the tokenizer of pictures."""

    def __init__(self, script, run, meta):
        self.script, self.options, self.meta, self.device = script, run.options, meta, run.device
        self.folder = script.ROOT / "data" / run.config.data
        self.is_pictures, self.draft = meta["encoding"] in PICTURE_TOKENS, None
        try:
            if self.is_pictures:
                import studio
                self.studio = studio.Studio(run.device, meta["encoding"])
                self.glimpse = None
                self.labels = torch.arange(meta["document_start"], meta["vocab"], device=run.device)
            else:
                self.encode, self.decode = streams.codec(meta)
                self.prompt = self.encode(run.options.prompt or "\n")
        except UnicodeError:
            raise script.Fault(f"--prompt={ascii(run.options.prompt)} is not text") from None
        except Exception as error:  # tiktoken fetches GPT-2's merges, with errors of several libraries
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise script.Fault(f"the encoding {meta['encoding']!r} of samples cannot be opened ({reason})") from None
        if not self.is_pictures and max(self.prompt) >= meta["vocab"]:
            raise script.Fault(f"--prompt={run.options.prompt} has characters that {run.config.data} does not")
        if run.options.quality_tokens and not self.is_pictures and not list(self.folder.glob("train*.bin")):
            raise script.Fault(f"quality numbers count the words of {self.folder}/train*.bin, and there are none: pass "
                               "--quality_tokens=0")
        if self.is_pictures and (run.options.draft or run.options.prompt.strip()):
            raise script.Fault(f"{run.config.data} is of pictures: --prompt and --draft are for texts")
        if run.options.draft:
            self.draft = speculate.load_draft(script, run.options.draft, run.config, meta, run.device)

    def show(self, model, folder):
        with torch.autocast(self.device.type, enabled=False):  # casting all weights for one token takes longer
            if self.is_pictures:
                self.sheet(model, folder / "gpt.png")
                return self.judged(model) if self.options.quality_tokens else {}
            return self.text(model, folder / "gpt.txt")

    def text(self, model, path):
        """Continue the prompt on the terminal and in a file: tokens per second, of the draft as well."""
        start = torch.tensor([self.prompt], device=self.device)
        ids, _, speed = speculate.speak(self.generate(model, start, self.options), self.decode)
        path.write_bytes(self.decode(self.prompt + ids))
        numbers = {"sampled_per_second": round(speed, 1)}
        if self.draft:
            chunks = speculate.speculate(self.script, model, self.draft, start, self.options)
            ids, checks, speed = speculate.speak(chunks, self.decode)
            numbers["speculated_per_second"] = round(speed, 1)
            numbers["tokens_per_check"] = round(len(ids) / checks, 2)
        if self.options.quality_tokens:
            numbers |= self.quality(model)
        return numbers

    def generate(self, model, start, options):
        """What the script's generate yields, which takes a cache if its blocks do."""
        cache = {"cache": KVCache()} if hasattr(self.script, "no_cache") else {}
        return self.script.generate(model, start, options, **cache)

    def glimpse(self, model):
        """Cells of a sheet: three texts that continue the prompt."""
        options = dataclasses.replace(self.options, temperature=TEMPERATURE, top_k=0, top_p=1.0, sample_tokens=320)
        start = torch.tensor([self.prompt] * 3, device=self.device)
        rows = torch.cat(list(self.generate(model, start, options)), 1)
        return [self.decode(row).decode(errors="replace") for row in rows.tolist()]

    def quality(self, model):
        """Whether what is drawn has words: of 40 texts that begin as the samples do by default, after a line end; or of
        200 snippets of code, each from a function's first word on, and whether those are tokens of Python."""
        code = self.folder.name == "pycode"
        if code:
            texts = self.drawn(model, FUNCTION, SNIPPETS, SNIPPET_TOKENS, CODE_TEMPERATURE)
            texts = ["def" + text for text in texts]
        else:
            texts = self.drawn(model, "\n", TEXTS, -(-self.options.quality_tokens // TEXTS), TEMPERATURE)
        training = streams.read_bin(min(self.folder.glob("train*.bin")))[:KNOWN_TOKENS]
        known = set(words(self.decode(training.tolist()).decode(errors="replace")))
        numbers = word_numbers(texts, known)
        if code:
            numbers["quality_python"] = sum(map(tokenizes, texts)) / SNIPPETS
        return numbers

    def drawn(self, model, prompt, texts, tokens, temperature):
        """What continues a prompt in so many tokens, so many times."""
        options = dataclasses.replace(self.options, temperature=temperature, top_k=0, top_p=1.0, sample_tokens=tokens)
        start = torch.tensor([self.encode(prompt)] * texts, device=self.device)
        bar = tqdm(self.generate(model, start, options), total=tokens, desc="quality", unit="token",
                   dynamic_ncols=True)
        return [self.decode(row).decode(errors="replace") for row in torch.cat(list(bar), 1).tolist()]

    def sheet(self, model, path):
        """Pictures of every label, four each."""
        import draw
        pictures = list(self.drawn_pictures(model, self.labels.repeat_interleave(PER_LABEL)))
        draw.sheet([pictures[i:i + PER_ROW] for i in range(0, len(pictures), PER_ROW)], path)

    def drawn_pictures(self, model, labels):
        """Pictures (B, 3, S, S) of the tokens that continue labels (B,), which are tokens too."""
        length = PICTURE_TOKENS[self.meta["encoding"]]
        options = dataclasses.replace(self.options, sample_tokens=length)
        tokens = self.generate(model, labels[:, None], options)
        bar = tqdm(tokens, total=length, desc="samples", unit="token", dynamic_ncols=True)
        return self.studio.pictures(torch.cat(list(bar), 1).clamp(max=self.meta["document_start"] - 1))

    def judged(self, model):
        """The share of pictures in which a judge sees the class that was asked for, if it knows the classes."""
        judge, reference = digits.judge_of_tokens(self.studio, self.device)
        if judge.classes != len(self.labels):
            return {}
        labels = self.labels.repeat(JUDGED_PER_LABEL)
        pictures = self.drawn_pictures(model, labels)
        return {"quality_class_accuracy": round(judge.accuracy(pictures, labels - self.labels[0]), 4),
                "quality_frechet": round(judge.frechet_distance(pictures, reference), 3)}
