"""CLIP's tokenizer: lower-cased text to the ids of 49,408 byte-pair units.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016, on bytes as in
GPT-2. The vocabulary file lists the merges, most frequent first.
"""

import gzip
import html
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import ftfy
import regex

VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
VOCABULARY_SIZE = 49408
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"                            # marks a unit that ends a word

# A word is a special token, an English clitic, a run of letters, one digit, or a run of the rest.
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE)


def byte_alphabet():
    """A printable character for each of the 256 bytes, in the order of the vocabulary.

    Printable Latin-1 bytes stand for themselves; the others borrow characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(printable + others, map(chr, [*printable, *range(256, 512)])))


class SimpleTokenizer:
    """`encode` turns text into a list of ids; `encoder` is the dictionary unit -> id."""

    def __init__(self, bpe_path=VOCABULARY):
        self.byte_encoder = byte_alphabet()
        units = list(self.byte_encoder.values())
        with gzip.open(bpe_path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1:]              # the first is a comment
        merges = [tuple(line.split()) for line in lines[:VOCABULARY_SIZE - 2 * len(units) - 2]]
        units += [unit + WORD_END for unit in units]
        units += ["".join(pair) for pair in merges] + [START, END]
        self.encoder = {unit: i for i, unit in enumerate(units)}
        self.bpe_ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.bpe = lru_cache(maxsize=65536)(self.split_word)

    def split_word(self, word):
        """A word, as characters of the byte alphabet -> the list of its units.

        Starts from single characters and joins the most frequent pair until none is known.
        """
        if word in (START, END):
            return [word]
        units = [*word[:-1], word[-1] + WORD_END]
        while len(units) > 1:
            pair = min(pairwise(units), key=lambda pair: self.bpe_ranks.get(pair, float("inf")))
            if pair not in self.bpe_ranks:
                break
            joined = []
            for unit in units:
                if joined and (joined[-1], unit) == pair:
                    joined[-1] += unit
                else:
                    joined.append(unit)
            units = joined
        return units

    def encode(self, text):
        """Text -> list of token ids, without start and end tokens.

        Broken encodings and HTML entities are repaired, white space joined, letters lower-cased.
        """
        # Web captions are often escaped twice ("&amp;lt;"), hence two passes.
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        ids = []
        for word in WORDS.findall(regex.sub(r"\s+", " ", text).strip().lower()):
            characters = "".join(self.byte_encoder[byte] for byte in word.encode("utf-8"))
            ids += [self.encoder[unit] for unit in self.bpe(characters)]
        return ids
