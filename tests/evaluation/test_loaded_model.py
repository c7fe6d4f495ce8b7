"""A model in one process is the checkpoint's, whatever topology wrote it."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.evaluation.loaded_model import LoadedModel, choose_device
from tests.support import checkpoints, eval_model, reference


def test_its_logits_are_those_of_the_stored_weights(loaded: LoadedModel, run: tuple[Path, RunConfig]) -> None:
    checkpoint, config = run
    tokens = checkpoints.sample(config.model)
    expected = reference.logits(checkpoints.weights(checkpoint), tokens, dataclasses.asdict(config.model))
    assert torch.allclose(loaded.decoder(tokens).transpose(0, 1), expected, rtol=0.0, atol=1e-11)
    assert not any(parameter.requires_grad for parameter in loaded.decoder.parameters())


def test_low_precision_weights_are_the_cast_of_the_stored_ones(run: tuple[Path, RunConfig]) -> None:
    stored = eval_model.load(*run, dtype=torch.float32).decoder.state_dict()
    cast = eval_model.load(*run, dtype=torch.bfloat16).decoder.state_dict()
    assert all(torch.equal(stored[name].bfloat16(), values) for name, values in cast.items())


def test_a_configuration_of_another_model_is_refused(run: tuple[Path, RunConfig]) -> None:
    checkpoint, config = run
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, nexus_m=99))
    with pytest.raises(CheckpointError, match="not those of its configuration"):
        eval_model.load(checkpoint, other)


def test_a_device_that_is_not_there_is_named() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert choose_device("") == torch.device("cpu")
        with pytest.raises(ConfigError, match="--device cuda"):
            choose_device("cuda")
