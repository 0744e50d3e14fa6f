"""Full-precision weights to a packed model folder (FORMAT), quantized by the reference."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitskip_export.renumber import VOCABULARY, frequent_first, reorder
from bitskip_ref.arithmetic.hadamard import rotate_unpadded
from bitskip_ref.arithmetic.quant import SCALE_FLOOR, quantize_activations, quantize_weights
from bitskip_ref.config import HEAD_BITS, ModelConfig
from bitskip_ref.documents import END_OF_TEXT, read_documents
from bitskip_ref.files import unfinished
from bitskip_ref.floats import stored
from bitskip_ref.folder import CONFIG, like_folder, read_json, write_folder
from bitskip_ref.packing import pack_ternary
from bitskip_ref.tensors import FormatError, expected_tensors, parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from bitskip_train.checkpoint import Checkpoint

DRAFTS = 4  # one in so many ids: the commonest quarter covers nearly all of a text; measured
CHUNK = 4096  # rows of an embedding that are quantized at a time, for bounded scratch


class ExportError(ValueError):
    """Weights that cannot be exported, or a place that cannot be written to."""


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    head_format: str | None = None,
    ternary: bool = False,
    exit_layer: int | None = None,
    by_frequency: Path | None = None,
    smooth_head: Path | None = None,
    force: bool = False,
) -> Path:
    """Write the model folder of a training checkpoint, which is only read; returns its path.

    head_format: one of CHOICES instead of the configuration's. ternary: the
    linear weights are -a, 0 and a already; keep that. exit_layer: what the folder recommends.
    by_frequency: a text; tokens are numbered by how common they are in it (renumber.py), and the
    folder recommends to draft among the first quarter. smooth_head: a text, on which what heads
    read is evened out (`bitskip_train.smooth`). What a folder of a like model at `out` says beside
    the weights (exits, ends of text, chat template) stays, unless given anew.
    force: write into a folder that holds something else. The end-of-text id is the tokenizer's.
    Raises ExportError, or bitskip_train's CheckpointError; nothing is written then.
    """
    from bitskip_train.checkpoint import load_checkpoint
    from bitskip_train.readings import departures
    from bitskip_train.tokenizer import parse_tokenizer

    root = Path(out)
    check_target(root, force)
    loaded = load_checkpoint(Path(checkpoint))
    if found := departures(loaded.train):
        raise ExportError(f"{checkpoint}: trained with {', '.join(found)}: no engine runs it")
    config = loaded.config.replace(head_format=head_format or loaded.config.head_format)
    if exit_layer is not None and not 1 <= exit_layer <= config.num_hidden_layers:
        raise ExportError(f"exit layer {exit_layer}: must be in 1..{config.num_hidden_layers}")
    weights = loaded.state
    if smooth_head is not None:
        weights = _smoothed(loaded, config, smooth_head)
    state = {name: tensor.numpy() for name, tensor in weights.items()}
    if config.rotated_head != loaded.config.rotated_head:  # SPEC 5.4: there and back alike
        state |= {n: rotate_unpadded(w) for n, w in state.items() if n.endswith(VOCABULARY)}
    tokenizer_json, end, draft_vocab = loaded.tokenizer_json, None, None
    if by_frequency is not None:
        if tokenizer_json is None:
            raise ExportError(f"{checkpoint} has no tokenizer that could be renumbered")
        tokenizer_json, order = frequent_first(
            tokenizer_json, read_documents(by_frequency), config.vocab_size
        )
        state = reorder(state, order)
        draft_vocab = -(-config.vocab_size // DRAFTS)
    if tokenizer_json is not None:
        tokenizer = parse_tokenizer(tokenizer_json, f"{checkpoint}: its tokenizer")
        tokenizer_json, end = tokenizer.json, tokenizer.token_id(END_OF_TEXT)
    facts: dict[str, Any] = {
        "eos_token_id": end, "exit_layer": exit_layer, "draft_vocab": draft_vocab,
        "trained_context": _trained_context(loaded), "trained_exits": _trained_exits(loaded),
    }  # fmt: skip
    if (older := like_folder(root, config, tokenizer_json)) is not None:
        kept = {
            "eos_token_id": older.end_ids, "bos_token_id": older.bos_token_id, "chat": older.chat,
            "exit_layer": older.exit_layer, "draft_vocab": older.draft_vocab,
        }  # fmt: skip
        facts = kept | {name: value for name, value in facts.items() if value is not None}
        facts["eos_token_id"] = older.end_ids or end
    tensors = pack(config, state, ternary=ternary)
    write_folder(root, config, tensors, tokenizer_json=tokenizer_json, **facts)
    return root


def _trained_context(loaded: Checkpoint) -> int | None:
    """Tokens of a window in training, if the model can hold them."""
    context = loaded.train.get("context")
    fits = type(context) is int and 0 < context <= loaded.config.max_position_embeddings
    return context if fits else None


def _smoothed(loaded: Checkpoint, config: ModelConfig, text: Path) -> dict[str, Tensor]:
    """The checkpoint's parameters with heads that a text has smoothed (smooth.py)."""
    from bitskip_train.smooth import TOKENS, smooth
    from bitskip_train.tokenizer import parse_tokenizer

    if loaded.tokenizer_json is None:
        raise ExportError(f"{text}: needs a tokenizer, and the checkpoint has none")
    tokenizer = parse_tokenizer(loaded.tokenizer_json, f"{text}: the checkpoint's tokenizer")
    end = tokenizer.token_id(END_OF_TEXT)
    ends = [] if end is None else [end]  # as in training
    tokens: list[int] = []
    for document in read_documents(text):
        if len(tokens) >= TOKENS:
            break
        tokens += [*tokenizer.encode(document), *ends]
    exits = _trained_exits(loaded) or [config.num_hidden_layers]
    context = _trained_context(loaded) or config.max_position_embeddings
    return smooth(config, loaded.state, np.array(tokens, np.int64), context, exits)


def _trained_exits(loaded: Checkpoint) -> list[int] | None:
    """Exits that had a loss of their own at the end of training, the full depth among them."""
    from bitskip_train.losses import exit_weights
    from bitskip_train.settings import TrainConfig

    layers = loaded.config.num_hidden_layers
    try:
        train = TrainConfig.from_dict(loaded.train)
        early = exit_weights(train, layers) if train.exit_lambda > 0 else ()
    except (ValueError, TypeError):  # of another version
        return None
    return sorted({*early, layers})


def check_target(
    root: Path,
    force: bool = False,
    ours: Callable[[dict[str, Any]], bool] = lambda config: config.get("model_type") == "bitskip",
) -> None:
    """Raise ExportError if writing a model to `root` would mix it with something else.

    ours: whether a folder of some config.json is of the kind that is written there.
    """
    if root.exists() and not root.is_dir():
        raise ExportError(f"{root} is a file: choose another folder with -o")
    if force or not root.exists() or all(unfinished(entry.name) for entry in root.iterdir()):
        return
    try:
        known = ours(read_json(root / CONFIG))
    except FormatError:
        known = False
    if not known:
        raise ExportError(
            f"{root} holds files and no model of this kind: choose another folder, or --force"
        )


def check_apart(source: Path, out: Path) -> None:
    """Raise ExportError if what is only read would be written over."""
    if source.exists() and out.exists() and source.samefile(out):
        raise ExportError(f"{out} is what is read: choose another name with -o")


def pack(
    config: ModelConfig, state: Mapping[str, np.ndarray], *, ternary: bool = False
) -> dict[str, np.ndarray]:
    """A folder's tensors from f32 parameters under FORMAT's names; `state` is not changed.

    Raises ExportError for missing, extra or misshapen parameters, another dtype, values that are
    not finite or do not fit; and, with `ternary`, for linear weights that are not -a, 0, a of one
    a. Without it, weights that are so are refused too: SPEC 4.1 would give them another scale.
    """
    shapes = parameter_shapes(config)
    for problem, names in (
        ("lacks", shapes.keys() - state.keys()),
        ("has an unknown", state.keys() - shapes.keys()),
    ):
        if names:
            raise ExportError(f"the checkpoint {problem} tensor {min(names)} ({len(names)} in all)")
    tensors: dict[str, np.ndarray] = {}
    for name, (kind, _) in expected_tensors(config).items():
        if name not in shapes:
            continue  # a scale: made with its weight
        w = state[name]
        if w.shape != shapes[name] or w.dtype != np.float32:
            raise ExportError(
                f"{name} is {w.dtype}{list(w.shape)}, "
                f"the configuration asks for float32{list(shapes[name])}"
            )
        if not np.isfinite(w).all():
            at = [int(i) for i in np.argwhere(~np.isfinite(w))[0]]
            raise ExportError(
                f"{name}{at} is {w[tuple(at)]}: training has diverged, export an older checkpoint"
            )
        tensors |= packed(config, name, kind, w, ternary)
    return tensors


def packed(
    config: ModelConfig, name: str, kind: type, w: np.ndarray, ternary: bool = False
) -> dict[str, np.ndarray]:
    """A folder's tensor of an f32 parameter, and its scale if it has one; `kind`: its dtype there.

    Errors as of `pack`.
    """
    scale = name.removesuffix("weight") + "scale"
    if kind is np.uint8:
        codes, alpha = ternary_codes(name, w, ternary)
        return {name: pack_ternary(codes), scale: np.array([alpha])}
    if kind is np.int8:
        form = "int8" if name.endswith("_proj.weight") else config.head_format
        rows, scales = integer_rows(w, HEAD_BITS[form])
        return {name: rows, scale: scales}
    try:
        return {name: stored(w, kind)}
    except ValueError as error:
        raise ExportError(f"{name} {error}: use --head int8 or float32") from None


def ternary_codes(name: str, w: np.ndarray, ternary: bool) -> tuple[np.ndarray, np.float32]:
    """Codes int8 and alpha of a linear weight f32 [out, in]; errors as of `pack`."""
    magnitudes = np.abs(w)
    largest = magnitudes.max()
    already = bool(((magnitudes == largest) | (w == 0)).all())
    if ternary and not already:
        odd = w[(magnitudes != largest) & (w != 0)]
        raise ExportError(
            f"{name} is not ternary: beside 0 and +-{largest:.6g} it holds {odd[0]:.6g} "
            f"({odd.size} of {w.size} values): export without --ternary to quantize it"
        )
    if ternary:
        return np.sign(w).astype(np.int8), np.maximum(largest, SCALE_FLOOR)
    codes, alpha = quantize_weights(w)
    if already and (w == 0).any() and largest > 0:
        raise ExportError(
            f"{name} is ternary already, +-{largest:.6g}; quantizing would make it +-{alpha:.6g}: "
            "export with --ternary to keep it"
        )
    return codes, alpha


def integer_rows(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """SPEC 4.4: f32 [V, D] -> (codes int8 [V, D], scales f32 [V])."""
    parts = [quantize_activations(w[i : i + CHUNK], bits) for i in range(0, len(w), CHUNK)]
    codes, steps = (np.concatenate(part) for part in zip(*parts, strict=True))
    return codes, steps[:, 0]
