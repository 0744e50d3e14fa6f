"""One small tokenizer of each kind that the library builds, with what makes each hard to stream."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "Once upon a time there was a little cat. It didn't sit, did it ?",
    "Über den Wölken 😀 日本語のテキスト naïve café",
    "the cat sat on the mat; it 's <b>bold</b> | 7 > 3 !",
]
BYTES = [f"<0x{b:02X}>" for b in range(256)]
SPECIAL = ["<|endoftext|>", "<unk>", "<s>"]


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    """GPT-2's: any bytes, so that a character may be spread over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=SPECIAL[:1], initial_alphabet=alphabet,
            show_progress=False,
        ),
    )  # fmt: skip


def byte_fallback() -> Tokenizer:
    """Llama's: SentencePiece BPE with byte tokens, whose runs are a text only together."""
    vocab = {t: i for i, t in enumerate([*SPECIAL, *BYTES])}
    for text in CORPUS:
        for c in text.replace(" ", "▁"):
            if ord(c) < 256 or c == "▁":
                vocab.setdefault(c, len(vocab))
    merges = [("▁", "c"), ("a", "t"), ("t", "h"), ("▁", "t")]
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    return tokenizer


def metaspace() -> Tokenizer:
    """T5's: Unigram pieces with a sign for the space, the first one of which is dropped."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _train(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )


def unigram_bytes() -> Tokenizer:
    """Unigram pieces and byte tokens, decoded with a sign for the space and no fusing."""
    pieces = [*((t, 0.0) for t in SPECIAL), *((t, -20.0) for t in BYTES)]
    pieces += [(p, -3.0) for p in [*"▁abcthesi.,é", "▁the", "▁cat"]]
    tokenizer = Tokenizer(models.Unigram(pieces, 1, True))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's: words and `##` continuations, spaces made up, some taken away before signs."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _train(
        tokenizer,
        trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False),
    )


def ends_of_words() -> Tokenizer:
    """GPT-1's: a suffix marks the end of a word, a space unless it is the last one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return _train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=150, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
        ),
    )


def ctc() -> Tokenizer:
    """Speech models': repeats are one letter, a pad divides real ones."""
    letters = ["<pad>", *SPECIAL, "|", "'", *"abcdefgh", ".", "n't", "do not"]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(letters)}, "<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.CTC()
    return tokenizer


def words() -> Tokenizer:
    """No decoder: tokens are joined with spaces."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _train(tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        byte_level, byte_fallback, metaspace, unigram_bytes, word_piece, ends_of_words, ctc, words,
    )
}  # fmt: skip

DECODERS = {
    "gemma": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    ),
    "strip-two": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]
    ),
    "fallback-into-bytes": decoders.Sequence([decoders.ByteFallback(), decoders.ByteLevel()]),
    "made-bytes": decoders.Sequence([decoders.Replace("a", "<0xC3>"), decoders.ByteFallback()]),
    "whole-replace": decoders.Sequence([decoders.Fuse(), decoders.Replace("at", "@")]),
    "whole-letters": decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
    "late-metaspace": decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()]
    ),
    "hidden-missing-byte": decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("\ufffd", "")]
    ),
    "hidden-at-the-start": decoders.Sequence(
        [decoders.ByteLevel(), decoders.Strip("\ufffd", 3, 0)]
    ),
    "twice-fused": decoders.Sequence([decoders.Sequence([decoders.Fuse()]), decoders.ByteLevel()]),
    "ends-within": decoders.BPEDecoder("a"),
    "ends-then-pieces": decoders.Sequence([decoders.BPEDecoder("t"), decoders.Replace("a", "")]),
    "pieces-and-bytes": decoders.Sequence([decoders.WordPiece("▁"), decoders.ByteFallback()]),
    "ctc-and-bytes": decoders.Sequence([decoders.CTC("a", "▁"), decoders.ByteFallback()]),
    "ctc-then-pieces": decoders.Sequence([decoders.CTC("a", "▁"), decoders.WordPiece("s")]),
    "strip-tokens": decoders.Sequence([decoders.Strip("▁", 1, 0), decoders.Strip("t", 2, 0)]),
}
"""Decoders that no known tokenizer has, and that a stream must get right all the same."""


def with_decoder(name: str) -> Tokenizer:
    """The byte-fallback vocabulary with one of DECODERS."""
    tokenizer = byte_level() if "hidden" in name else byte_fallback()
    tokenizer.decoder = DECODERS[name]
    return tokenizer
