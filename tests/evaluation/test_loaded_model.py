"""A model in one process is the checkpoint's, whatever topology wrote it."""

import dataclasses
from pathlib import Path

import grown
import judged
import pytest
import reference
import torch

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.evaluation.loaded_model import LoadedModel, choose_device


def test_its_logits_are_those_of_the_stored_weights(loaded: LoadedModel, run: tuple[Path, RunConfig]) -> None:
    checkpoint, config = run
    tokens = grown.sample(config.model)
    expected = reference.logits(grown.weights(checkpoint), tokens, dataclasses.asdict(config.model))
    assert torch.allclose(loaded.decoder(tokens).transpose(0, 1), expected, rtol=0.0, atol=1e-11)
    assert not any(parameter.requires_grad for parameter in loaded.decoder.parameters())


def test_low_precision_weights_are_the_cast_of_the_stored_ones(run: tuple[Path, RunConfig]) -> None:
    stored = judged.load(*run, dtype=torch.float32).decoder.state_dict()
    cast = judged.load(*run, dtype=torch.bfloat16).decoder.state_dict()
    assert all(torch.equal(stored[name].bfloat16(), values) for name, values in cast.items())


def test_a_configuration_of_another_model_is_refused(run: tuple[Path, RunConfig]) -> None:
    checkpoint, config = run
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, nexus_m=99))
    with pytest.raises(CheckpointError, match="not those of its configuration"):
        judged.load(checkpoint, other)


def test_a_device_that_is_not_there_is_named() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert choose_device("") == torch.device("cpu")
        with pytest.raises(ConfigError, match="--device cuda"):
            choose_device("cuda")
