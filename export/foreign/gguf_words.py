"""The tokenizer that a GGUF file's metadata describes, as a tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from bitskip_export.foreign.source import RefusedError
from bitskip_ref.excerpt import one_line, shown
from bitskip_ref.folder import ChatForm, Folder
from bitskip_text.tokenizer import read_tokenizer

CONTROL, USER, BYTE, UNKNOWN = 3, 4, 6, 2  # token_type
LONGEST = 512  # characters of a token of SentencePiece's; 16 are its trainer's most
MERGES = 64  # a token, on average; Llama 2's have two
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Names of ways to cut a text into words, `tokenizer.ggml.pre`, that are known here.
SPLITS = {"llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST, "qwen2": _WORDS + r"\p{N}" + _REST}
PLAIN = ("gpt-2", "smollm")  # GPT-2's own expression, the second with single digits before it
# Control tokens of these names end a text, whatever the keys say.
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<|end|>", "<|eom_id|>",
)  # fmt: skip


def tokenizer_json(path: Path, metadata: dict[str, Any], vocab_size: int) -> str | None:
    """The text of a tokenizer.json; None for a file without one.

    Raises RefusedError for lists that do not fit each other and for kinds that are not known.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, "no_vocab"):
        return None
    tokens = _tokens(path, metadata)
    if len(tokens) > vocab_size:
        raise RefusedError(f"{path}: {len(tokens)} tokens for {vocab_size} rows of the embedding")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise RefusedError(f"{path}: a token is there twice")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise RefusedError(f"{path}: tokenizer.ggml.token_type does not fit the tokens")
    try:
        if model == "gpt2":
            made = _byte_level(path, metadata, vocabulary)
        elif model == "llama":
            made = _sentencepiece(path, metadata, vocabulary, kinds)
        else:
            raise RefusedError(f"{path}: tokenizer of kind {shown(model)}: gpt2, llama are known")
        special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
        user = [t for t, kind in zip(tokens, kinds, strict=True) if kind == USER]
        made.add_special_tokens([AddedToken(t, normalized=False) for t in special])
        made.add_tokens([AddedToken(t, normalized=False) for t in user])
        return str(made.to_str())
    except RefusedError:
        raise
    except Exception as error:  # the library's own
        raise RefusedError(f"{path}: its tokenizer cannot be built ({one_line(error)})") from None


def _tokens(path: Path, metadata: dict[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise RefusedError(f"{path} lacks tokenizer.ggml.tokens")
    for token in tokens:
        if any("\ud800" <= c <= "\udfff" for c in token):
            raise RefusedError(f"{path}: the token {shown(token)} is not UTF-8")
    return tokens


def _byte_level(path: Path, metadata: dict[str, Any], vocabulary: dict[str, int]) -> Tokenizer:
    merges = metadata.get("tokenizer.ggml.merges")
    pre = metadata.get("tokenizer.ggml.pre")
    if not isinstance(merges, list):
        raise RefusedError(f"{path} lacks tokenizer.ggml.merges")
    if pre not in SPLITS and pre not in PLAIN:
        raise RefusedError(
            f"{path}: words are cut in the way {shown(pre)}; known: {', '.join([*PLAIN, *SPLITS])}"
        )
    pairs = [tuple(m.split(" ")) for m in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise RefusedError(f"{path}: a merge is not two tokens")
    made = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    if pre in SPLITS:
        made.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        if pre == "qwen2":
            made.normalizer = normalizers.NFC()
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(
    path: Path, metadata: dict[str, Any], vocabulary: dict[str, int], kinds: np.ndarray
) -> Tokenizer:
    """SentencePiece's BPE: whichever two neighbours make the token of the best score are joined."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(vocabulary):
        raise RefusedError(f"{path}: tokenizer.ggml.scores do not fit the tokens")
    if np.isnan(scores).any():
        raise RefusedError(f"{path}: tokenizer.ggml.scores hold what is no number")
    tokens, pairs = list(vocabulary), list[tuple[float, int, int]]()
    for token, i in vocabulary.items():
        if kinds[i] in (CONTROL, USER, BYTE, UNKNOWN):
            continue
        if len(token) > LONGEST:
            raise RefusedError(f"{path}: the token {shown(token)} has {len(token)} characters")
        cuts = [(token[:n], token[n:]) for n in range(1, len(token))]
        local = [
            (vocabulary[a], vocabulary[b]) for a, b in cuts if a in vocabulary and b in vocabulary
        ]
        pairs += [(-float(scores[i]), a, b) for a, b in sorted(local)]
        if len(pairs) > MERGES * len(tokens):
            raise RefusedError(f"{path}: its tokens are made of each other in too many ways")
    pairs.sort(key=lambda scored: scored[0])
    unknown = [t for t, i in vocabulary.items() if kinds[i] == UNKNOWN]
    made = Tokenizer(
        models.BPE(
            vocabulary, [(tokens[a], tokens[b]) for _, a, b in pairs],
            unk_token=unknown[0] if unknown else None, fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    made.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    return made


def end_ids(path: Path, metadata: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Ids that end a text: those of the keys, and control tokens named as such."""
    found = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if found[0] is None and metadata.get("tokenizer.ggml.model") == "llama":
        found[0] = 2  # as llama.cpp has it
    tokens = metadata.get("tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, np.ndarray):
        found += [
            i for i, (t, kind) in enumerate(zip(tokens, kinds, strict=False))
            if kind == CONTROL and t in ENDS
        ]  # fmt: skip
    ids = list(dict.fromkeys(i for i in found if i is not None))
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise RefusedError(f"{path}: eos_token_id {shown(i)} is not in 0..{vocab_size - 1}")
    return tuple(ids)


def chat_form(path: Path, metadata: dict[str, Any]) -> ChatForm | None:
    """How messages become a prompt, if the file says so."""
    template, tokens = (metadata.get(f"tokenizer.{n}") for n in ("chat_template", "ggml.tokens"))
    if template is None or not isinstance(tokens, list):
        return None
    if not isinstance(template, str):
        raise RefusedError(f"{path}: tokenizer.chat_template is no text")
    words = []
    for name in ("bos", "eos"):
        i = metadata.get(f"tokenizer.ggml.{name}_token_id")
        words.append(tokens[i] if type(i) is int and 0 <= i < len(tokens) else "")
    return ChatForm(template, *words)


# ---- written --------------------------------------------------------------------------

NORMAL, UNUSED = 1, 5  # token_type


def words_of(folder: Folder, vocab_size: int) -> dict[str, Any]:
    """The keys that describe a folder's tokenizer, end ids and template.

    Raises RefusedError for a tokenizer that is not byte-level BPE, or cuts words in a way that has
    no name there.
    """
    if folder.tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    stored = json.loads(read_tokenizer(folder.tokenizer, vocab_size).json)
    model, pre = stored["model"], _name_of_split(stored)
    plain = not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    plain &= bool(model.get("ignore_merges")) == (pre == "llama-bpe")
    if model.get("type") != "BPE" or pre is None or not plain:
        raise RefusedError(
            f"{folder.tokenizer}: words are cut in another way than "
            f"{', '.join([*PLAIN, *SPLITS])}, which llama.cpp has names for: not exported"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = np.full(vocab_size, UNUSED, np.int32)
    for token, i in model["vocab"].items():
        tokens[i], kinds[i] = token, NORMAL
    for added in stored.get("added_tokens") or ():
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": folder.bos_token_id is not None,
    }  # fmt: skip
    for name, end in zip(("eos", "eot", "eom"), folder.end_ids, strict=False):
        found[f"tokenizer.ggml.{name}_token_id"] = end
    if unnamed := [tokens[i] for i in folder.end_ids[3:] if tokens[i] not in ENDS]:
        raise RefusedError(f"{unnamed[0]!r} ends a text, too: the format has keys for three ids")
    if folder.bos_token_id is not None:
        found["tokenizer.ggml.bos_token_id"] = folder.bos_token_id
    if folder.chat is not None:
        found["tokenizer.chat_template"] = folder.chat.template
    return found


def _name_of_split(stored: dict[str, Any]) -> str | None:
    """`tokenizer.ggml.pre` of a tokenizer.json, by what `_byte_level` makes of each name."""
    for pre in (*PLAIN, *SPLITS):
        metadata = {"tokenizer.ggml.merges": [], "tokenizer.ggml.pre": pre}
        made = json.loads(_byte_level(Path(), metadata, {"a": 0}).to_str())
        if all(_steps(made[k]) == _steps(stored.get(k)) for k in ("pre_tokenizer", "normalizer")):
            return pre
    return None


def _steps(stored: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer or normalizer without what does not change ids."""
    if stored is None:
        return []
    lists = ("pretokenizers", "normalizers")
    inner = next((stored[name] for name in lists if name in stored), [stored])
    return [{k: v for k, v in step.items() if k != "trim_offsets"} for step in inner]
