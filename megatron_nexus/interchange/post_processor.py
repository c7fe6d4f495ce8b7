"""The post-processor of a tokenizer.json: which special tokens stand before and after a text."""

from collections.abc import Iterator, Sequence

from megatron_nexus.interchange.architecture import JsonObject

Special = tuple[str, int]
"""A special token: its text and its id."""

_TEXTS_ONLY = "ByteLevel"
"""Adds no token: it corrects offsets."""
_ENCLOSING = ("BertProcessing", "RobertaProcessing")
"""Put their `cls` before a text and their `sep` behind it."""


def beginning_with(post_processor: object, prefix: Sequence[Special]) -> JsonObject:
    """Return a post-processor that puts `prefix` before a text, and behind it what `post_processor` does."""
    steps = list(_steps(post_processor))
    suffix = [special for step in steps for special in _suffix(step)]
    kept = [step for step in steps if step["type"] == _TEXTS_ONLY]
    return {"type": "Sequence", "processors": [*kept, _template(prefix, suffix)]}


def _steps(post_processor: object) -> Iterator[JsonObject]:
    if not isinstance(post_processor, dict):
        return
    inner = post_processor.get("processors") if post_processor["type"] == "Sequence" else None
    if isinstance(inner, list):
        for step in inner:
            yield from _steps(step)
    else:
        yield post_processor


def _suffix(step: JsonObject) -> Iterator[Special]:
    """Return the special tokens that a step appends to a text."""
    single, specials, sep = step.get("single"), step.get("special_tokens"), step.get("sep")
    if step["type"] in _ENCLOSING and isinstance(sep, list):
        yield sep[0], sep[1]
    if isinstance(single, list) and isinstance(specials, dict):
        text = next(i for i, item in enumerate(single) if "Sequence" in item)
        for item in single[text + 1 :]:
            special = specials[item["SpecialToken"]["id"]]
            yield from zip(special["tokens"], special["ids"], strict=True)


def _template(prefix: Sequence[Special], suffix: Sequence[Special]) -> JsonObject:
    def around(text: str, type_id: int) -> list[JsonObject]:
        def name(specials: Sequence[Special]) -> list[JsonObject]:
            return [{"SpecialToken": {"id": token, "type_id": type_id}} for token, _ in specials]

        return [*name(prefix), {"Sequence": {"id": text, "type_id": type_id}}, *name(suffix)]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [token], "tokens": [text]} for text, token in (*prefix, *suffix)
        },
    }
