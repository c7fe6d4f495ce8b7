"""Special tokens by name, from the files that Hugging Face puts beside a tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from megatron_nexus.base.json_text import parse_json
from megatron_nexus.errors import DataError

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"


def special_token(model_path: Path, name: str, files: Sequence[str]) -> tuple[str, Path] | None:
    """The text of the token `name`, such as "eos_token", and which of `files` beside a tokenizer says so.

    Raises:
        DataError: a file is damaged.
    """
    for file in files:
        token = tokenizer_settings(model_path, file).get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            return content, model_path.with_name(file)
    return None


def tokenizer_settings(model_path: Path, file: str) -> dict[str, object]:
    """Return what a file beside a tokenizer says; nothing where it does not exist. Raises DataError."""
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


def no_bos_token(model_path: Path) -> DataError:
    """Return the error for documents that are to begin with a token that the tokenizer does not name."""
    return DataError(
        f"documents are to begin with BOS, and the tokenizer {model_path} names no such token: put a "
        f'{TOKENIZER_CONFIG} with a "bos_token" that it has beside it, or preprocess with --no-prepend-bos'
    )
