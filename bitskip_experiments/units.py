"""The papers' perplexities in bits per byte of text, the one unit that vocabularies share."""

from __future__ import annotations

import math

# Bytes of a GPT-2 token of the validation text: 1,121,681 bytes and 258,659 tokens of WikiText-2
# (with <unk>), 412,726 bytes and 101,958 tokens, ends of text among them, of our 500 TinyStories.
GPT2_BYTES = {"wikitext-2": 1_121_681 / 258_659, "tinystories": 412_726 / 101_958}


def bits_per_byte(nats: float, data: str) -> float:
    """A loss, or a difference of losses, in nats per GPT-2 token of a data set -> bits per byte."""
    return nats / (GPT2_BYTES[data] * math.log(2))


def effect(plus: float, minus: float, data: str) -> float:
    """What separates two perplexities of the papers, in bits per byte."""
    return bits_per_byte(math.log(plus / minus), data)
