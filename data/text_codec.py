"""Text to tokens and back for the VLM, in our encoding or in that of a pretrained language model, and its template."""
import tokenizer


class TextCodec:
    """encode(text) -> token ids, decode(ids) -> text; in our encoding, or in the one of a model's folder.

    Raises OSError or ValueError where it cannot be read.
    """

    def __init__(self, lm_folder=None):
        self.ours, self.theirs = tokenizer.load_text(tokenizer.QA), None
        if lm_folder:
            from tokenizers import Tokenizer
            try:
                self.theirs = Tokenizer.from_file(str(lm_folder / "tokenizer.json"))
            except Exception as error:  # the library raises nothing more exact
                raise ValueError(f"{lm_folder / 'tokenizer.json'} cannot be read ({error})") from None
        self.stop = self.encode("\n")[-1]  # ends every answer

    def encode(self, text):
        if self.theirs:
            return self.theirs.encode(text, add_special_tokens=False).ids
        return self.ours.encode_ordinary(text)

    def decode(self, ids):
        return self.theirs.decode(ids) if self.theirs else self.decode_ours(ids)

    def decode_ours(self, ids):
        return tokenizer.decode_text(self.ours, ids)

    def question(self, text):
        return self.encode(f"Question: {text} Answer:")
