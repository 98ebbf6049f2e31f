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
    rf"{regex.escape(START)}|{regex.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE)


def byte_alphabet():
    """A printable character for each of the 256 bytes, in the order of the vocabulary.

    Printable Latin-1 bytes stand for themselves; the others borrow characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return ({byte: chr(byte) for byte in printable}
            | {byte: chr(256 + i) for i, byte in enumerate(others)})


class SimpleTokenizer:
    """`encode` turns text into a list of ids, `decode` ids into text.

    encoder, decoder: dictionaries unit -> id and id -> unit.
    """

    def __init__(self, bpe_path=VOCABULARY):
        alphabet = byte_alphabet()
        units = list(alphabet.values())
        with gzip.open(bpe_path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1:]              # the first is a comment
        merges = [tuple(line.split()) for line in lines[:VOCABULARY_SIZE - 2 * len(units) - 2]]
        units += [unit + WORD_END for unit in units]
        units += ["".join(pair) for pair in merges]
        units += [START, END]
        self.byte_encoder = alphabet
        self.byte_decoder = {character: byte for byte, character in alphabet.items()}
        self.encoder = {unit: i for i, unit in enumerate(units)}
        self.decoder = dict(enumerate(units))
        self.bpe_ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.bpe = lru_cache(maxsize=65536)(self.split_word)

    def split_word(self, word):
        """A word, as characters of the byte alphabet -> the tuple of its units.

        Starts from single characters and joins the most frequent pair until none is known.
        """
        if word in (START, END):
            return (word,)
        units = [*word[:-1], word[-1] + WORD_END]
        while len(units) > 1:
            pair = min(pairwise(units), key=lambda pair: self.bpe_ranks.get(pair, float("inf")))
            if pair not in self.bpe_ranks:
                break
            units = join_pair(units, pair)
        return tuple(units)

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

    def decode(self, tokens):
        """Iterable of token ids -> text; every word is followed by a space."""
        characters = "".join(self.decoder[int(token)] for token in tokens)
        data = bytes(self.byte_decoder[character] for character in characters)
        return data.decode("utf-8", errors="replace").replace(WORD_END, " ")


def join_pair(units, pair):
    """Every occurrence of `pair` in the list, from the left, joined into one unit."""
    joined = []
    for unit in units:
        if joined and (joined[-1], unit) == pair:
            joined[-1] += unit
        else:
            joined.append(unit)
    return joined
