"""Tokenizers some of whose tokens are single bytes, of which a character takes up to four."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def byte_level():
    """Characters made of several tokens, and tokens of several characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<end>", "<mark>"])
    tokenizer.train_from_iterator(["one two three öä 学 ab##ab\n\n"] * 4, trainer)
    return tokenizer


def byte_fallback():
    """A run of bytes has a text only as a whole."""
    pieces = ["<unk>", "<end>", "<mark>", "\u2581", "a", "b", "#", "\u2581ab", "ab", "##"]
    pieces += [f"<0x{byte:02X}>" for byte in (0x0A, 0xC3, 0xB6, 0xE5, 0xAD, 0xA6)]
    vocabulary = [(piece, -1.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    metaspace = decoders.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace, decoders.Fuse()])
    tokenizer.add_special_tokens(["<end>", "<mark>"])
    return tokenizer
