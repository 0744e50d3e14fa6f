"""Other readings of the papers, as training's arithmetic has them (SPEC 10 rows 5, 18, 21)."""

import math

import numpy as np
import pytest
import torch

from bitskip_ref.config import ConfigError, small_twin
from bitskip_train.data import pad_documents
from bitskip_train.fast import FastOps
from bitskip_train.model import BitskipModel
from bitskip_train.readings import AfterOps, UnscaledOps, shifted
from bitskip_train.settings import TrainConfig, check_settings


def _input(width: int = 48) -> torch.Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(1))


def test_an_unscaled_transform_has_the_same_codes_and_larger_steps():
    x = _input()
    codes, step = {}, {}
    for ops in (FastOps(), UnscaledOps()):
        turned = ops.rotate(x, ops.rotations((48,), x.device))
        codes[type(ops)], step[type(ops)] = ops.quantize(turned, 8)
    assert torch.equal(codes[FastOps], codes[UnscaledOps])
    torch.testing.assert_close(step[UnscaledOps], step[FastOps] * math.sqrt(64))


def test_after_transforms_quantized_values():
    x, ops = _input(), AfterOps()
    rotations = ops.rotations((48,), x.device)
    values, step = ops.quantize(ops.rotate(x, rotations), 8)
    plain = FastOps()
    codes, same = plain.quantize(x, 8)
    assert torch.equal(step, same)
    torch.testing.assert_close(values, plain.rotate(codes, rotations))
    assert not torch.equal(values, values.round())  # no second quantization


@pytest.mark.parametrize("form", ["unscaled", "after"])
def test_a_form_changes_the_model_and_trains(form):
    model = BitskipModel(small_twin("bitskip-v3"), torch.Generator().manual_seed(0))
    ids = torch.arange(12)[None]
    before = model(ids)[4]
    model.hadamard_form = form
    after = model(ids)[4]
    assert not torch.equal(before, after)
    after.square().mean().backward()
    assert all(p.grad.isfinite().all() for _, p in model.quantized_weights())


def test_targets():
    ids = torch.arange(5)[None]
    assert shifted(ids, "next").tolist() == [[1, 2, 3, 4]]
    assert shifted(ids, "same").tolist() == [[0, 1, 2, 3]]


def test_padding_fills_and_cuts_documents():
    tokens = np.array([5, 6, 0, 7, 0, 1, 2, 3, 4, 5, 0], np.uint16)
    padded = pad_documents(tokens, 4, 0)
    assert padded.dtype == np.uint16
    assert padded.reshape(-1, 4).tolist() == [[5, 6, 0, 0], [7, 0, 0, 0], [1, 2, 3, 4]]


def test_a_form_without_hadamard_is_refused():
    with pytest.raises(ConfigError, match="needs model"):
        check_settings(small_twin("bitskip-v1"), TrainConfig(context=32, hadamard_form="after"))
