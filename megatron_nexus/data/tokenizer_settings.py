"""Special tokens by name, from the files that Hugging Face puts next to a tokenizer."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from megatron_nexus.base.json_text import parse_json
from megatron_nexus.errors import DataError

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"


def special_token(model_path: Path, name: str, files: Sequence[str]) -> tuple[str, Path] | None:
    """Return the text of the token `name`, such as "eos_token", and which of `files` names it.

    Raises DataError: a file is damaged.
    """
    for file in files:
        token = tokenizer_settings(model_path, file).get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            return content, model_path.with_name(file)
    return None


def tokenizer_settings(model_path: Path, file: str) -> dict[str, object]:
    """Return what a file next to a tokenizer says; nothing where it does not exist. Raises DataError."""
    path = model_path.with_name(file)
    try:
        found = parse_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): copy it again or remove it") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} cannot be read (it is not a JSON object): copy it again or remove it")
    return found


class WithBos:
    """A tokenizer whose documents begin with BOS, or do not; see `Tokenizer` for the fields."""

    model_path: Path
    bos_id: int | None
    document_prefix: tuple[int, ...]

    def with_bos(self, prepend: bool) -> Self:
        """Return the same tokenizer for documents that begin with BOS, or never do. Raises DataError."""
        changed = copy.copy(self)
        if not prepend:
            changed.bos_id, changed.document_prefix = None, ()
        elif not self.document_prefix:
            if self.bos_id is None:
                raise DataError(
                    f"documents are to begin with BOS, and the tokenizer {self.model_path} names no such "
                    f'token: put a {TOKENIZER_CONFIG} with a "bos_token" that it has next to it, or '
                    "preprocess with --no-prepend-bos"
                )
            changed.document_prefix = (self.bos_id,)
        return changed
