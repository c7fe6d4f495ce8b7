"""A folder of Hugging Face's: `config.json`, safetensors in one file or several, a `tokenizer.json`."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_nexus.base.durable import naming_errors
from megatron_nexus.base.json_text import parse_json
from megatron_nexus.data.tokenizer import JSON_NAME
from megatron_nexus.errors import CheckpointError
from megatron_nexus.interchange.architecture import JsonObject
from megatron_nexus.interchange.source_model import Array, SourceModel
from megatron_nexus.interchange.tokenizer_files import copy_tokenizer

CONFIG_FILE = "config.json"
DTYPES = ("F64", "F32", "F16", "BF16")
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def open_folder(folder: Path) -> SourceModel:
    """Open the model in a folder. Raises CheckpointError where files are missing or damaged."""
    config = _read_json(folder / CONFIG_FILE)
    tokenizer = folder / JSON_NAME
    writer = partial(copy_tokenizer, folder) if tokenizer.is_file() else None
    weights = SafetensorsWeights(_weight_files(folder))
    return SourceModel(folder.resolve().name, "safetensors", config, weights, writer)


def _remedy(path: Path) -> str:
    """Return the remedy for a path that does not exist; it may name a repository of the Hugging Face Hub."""
    name = str(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return ": give a folder as Hugging Face's save_pretrained writes it, or a .gguf file"
    target = path.name
    return (
        ": if it is a model of the Hugging Face Hub, download it first, with  hf download "
        f"{name} --local-dir {target}  (pip install huggingface_hub), and give --input {target}"
    )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        held = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".gguf"))
        pickles = f", but {', '.join(held)}: pickles are never loaded" if held else ""
        raise CheckpointError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{pickles}; give a folder with safetensors, "
            "or a .gguf file"
        )
    places = _read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / INDEX_FILE} maps no weights to files: copy it again")
    return [folder / Path(name).name for name in sorted(set(places.values()))]


def _read_json(path: Path) -> JsonObject:
    try:
        with naming_errors(path):
            found = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        place = path if path.parent.is_dir() else path.parent
        raise CheckpointError(f"{place}: {error.strerror}{_remedy(place)}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): copy it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object: copy it again")
    return found


class SafetensorsWeights:
    """The tensors of some files, read by the library safetensors where they lie."""

    def __init__(self, paths: list[Path]) -> None:
        """Read the headers.

        Raises CheckpointError: a file cannot be read, is not a safetensors file, or holds a type that is not
        imported; or two files hold one name.
        """
        self._places: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            with _errors(path), safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118 - the file itself is not iterable
                    if name in self._places:
                        raise CheckpointError(f"{path} and {self._places[name]} both hold {name}: keep one")
                    stored = file.get_slice(name)
                    if stored.get_dtype() not in DTYPES:
                        raise CheckpointError(
                            f"{path}: {name} is of the type {stored.get_dtype()}, of which nothing is "
                            f"imported: save the model in one of {', '.join(DTYPES)}"
                        )
                    self._places[name], shapes[name] = path, tuple(stored.get_shape())
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def read_rows(self, name: str, first: int, last: int) -> Array:
        """Return rows [first, last), or a vector's elements, as float32. Raises CheckpointError."""
        path = self._places[name]
        with _errors(path), safe_open(path, "pt") as file:  # numpy has no bfloat16
            rows: Array = file.get_slice(name)[first:last].float().numpy()
        return rows


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Raise CheckpointError for an error of the library about a file."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file: copy the missing file") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): make it a readable file") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}): copy it again") from error
