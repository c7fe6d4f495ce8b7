"""Law: an export's config.json says all of a model: no field of ModelConfig can be forgotten there."""

from dataclasses import Field, fields, replace
from typing import Literal, get_args, get_origin, get_type_hints

from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.interchange.architecture import NEXUSFORMER, architecture_of, config_json
from megatron_nexus.interchange.hf_config import model_of
from tests.support import checkpoints

TYPES = get_type_hints(ModelConfig)
SCALED = checkpoints.configure(
    num_attention_heads=4, use_rope_scaling=True, original_max_position_embeddings=64
).model
LINEAR = replace(SCALED, projection="linear", nexus_m=0, nexus_a=0)
WITHOUT_MEANING = {
    *("attention_inner", "attention_gate"),
    *("nexus_m", "nexus_a", "nexus_inner_norm", "nexus_inner_norm_scale", "nexus_output_projection"),
    *("ffn_nexus_m", "pattention_slots", "base_nexus_m", "base_nexus_a", "base_ffn_nexus_m"),
    *("base_pattention_slots", "base_ffn_hidden_size"),
}
"""Fields that a decoder of linear projections, SwiGLU and attention of order 1 does not read."""


def _changed(model: ModelConfig, field: Field[object]) -> list[ModelConfig]:
    """The model with every other choice of a field, or with one other number."""
    value, kind = getattr(model, field.name), TYPES[field.name]
    others: list[object]
    if get_origin(kind) is Literal:
        others = [choice for choice in get_args(kind) if choice != value]
    elif kind is bool:
        others = [not value]
    elif kind is int:
        others = [value + 2]
    else:
        assert kind is float, f"{field.name}: teach this test what else a {kind} can be"
        others = [value * 2 + 0.5]
    return [replace(model, **{field.name: other}) for other in others]


def _json(model: ModelConfig, kind: object = NEXUSFORMER) -> dict[str, object]:
    assert isinstance(kind, type(NEXUSFORMER))
    return config_json(model, kind, 64, "float32", None)


def test_every_field_of_a_model_is_read_back_from_its_own_class() -> None:
    for field in fields(ModelConfig):
        for model in _changed(SCALED, field):
            assert getattr(model_of(_json(model)), field.name) == getattr(model, field.name), field.name


def test_a_class_of_transformers_is_told_of_every_field() -> None:
    for field in fields(ModelConfig):
        for model in _changed(LINEAR, field) if field.name not in WITHOUT_MEANING else []:
            kind = architecture_of(model)
            if kind is not NEXUSFORMER:
                assert _json(model, kind) != _json(LINEAR, architecture_of(LINEAR)), (
                    f"{kind} ignores {field.name}"
                )
