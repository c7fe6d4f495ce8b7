"""Imports go down, foreign libraries stay sealed, and nothing is configured that nothing reads."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nexus.config.run_config import SECTIONS
from tests.support.paths import REPOSITORY
from tests.support.sources import PACKAGE, SOURCES, STANDALONE, source

PROGRAMS = [REPOSITORY / "pretrain_nexus.py", *sorted((REPOSITORY / "tools").rglob("*.py"))]
LAYERS: list[set[str]] = [
    {"errors", "extras", "log"},
    {"base"},
    {"config", "spec", "kernels"},
    {"parallel", "data"},
    {"models", "checkpoint"},
    {"growth"},
    {"training", "evaluation", "interchange", "planner", "analysis"},
    {"advice", "comparison", "reports"},
    {"__main__", "api", "cli", "pretrain_nexus", "tools"},
]
HEIGHT = {noun: height for height, layer in enumerate(LAYERS) for noun in layer}
# Of layer 4, a model knows nothing of where its tokens come from, and a checkpoint nothing of models.
FORBIDDEN = {("models", "data"), ("checkpoint", "models"), ("checkpoint", "data")}
# Importing one of these is the affair of the files listed, and of nobody else.
SEALED = {
    "deepspeed": {
        "cli/launch.py",
        "training/engine.py",
        "training/float64_engine.py",
        "training/deepspeed_adam.py",
        "training/deepspeed_muon.py",
        "training/gradient_reducer.py",
        "training/gradient_sums.py",
        "training/linear_cross_entropy.py",
        "training/stage_module.py",
        "training/zero_state.py",
    },
    "apex": {"models/nvidia_apex.py"},
    "sentencepiece": {"data/sentencepiece_tokenizer.py"},
    "mpi4py": {"base/communicator.py"},
    "fcntl": {"base/durable.py"},  # one mechanism for locks,
    "multiprocessing": {"base/workers.py"},  # and one for pools of processes
    "fsspec": {"checkpoint/location.py"},
    "botocore": {"checkpoint/location.py"},
    "lm_eval": {"evaluation/harness.py", "evaluation/tasks.py"},
    "datasets": {"evaluation/tasks.py"},
    "tokenizers": {"data/huggingface_tokenizer.py"},
    "scipy": {
        f"analysis/{name}.py" for name in ("components", "cycles", "estimate", "scaling_law", "two_samples")
    },
    "safetensors": {"interchange/safetensors_folder.py"},
    "gguf": {"interchange/gguf_file.py"},
}


# JSON of others is parsed in one place, which answers whatever is wrong with it; these parse their own.
PARSE_JSON = {
    "base/json_text.py",
    "data/huggingface_tokenizer.py",  # what the library has just written
    "interchange/tokenizer_files.py",  # what the library, or this package, has written
    "interchange/gguf_tokenizer.py",
    "checkpoint/writer.py",  # what ranks tell one another
    "checkpoint/resume.py",
    "parallel/host_tree.py",
}


def name_of(path: Path) -> str:
    """The path in the package, or of a program in the repository."""
    return str(path.relative_to(PACKAGE if PACKAGE in path.parents else REPOSITORY))


def with_import(name: str) -> set[str]:
    """The files that import a module or a name, or what is in it."""
    return {
        name_of(path)
        for path in (*SOURCES, *PROGRAMS)
        if any(f"{found}.".startswith(f"{name}.") for found in source(path).imports)
    }


def reading(*attributes: tuple[str, str]) -> set[str]:
    """The files that read one of these attributes, such as `os.fsync`."""
    return {name_of(path) for path in (*SOURCES, *PROGRAMS) if source(path).reads & set(attributes)}


def noun_of(path: Path) -> str:
    """The folder, or the file at the top, that a source belongs to."""
    top = path.relative_to(PACKAGE if PACKAGE in path.parents else REPOSITORY).parts[0]
    return top.removesuffix(".py")


def test_every_folder_has_a_layer() -> None:
    nouns = {noun_of(path) for path in (*SOURCES, *PROGRAMS)} - {"__init__"}
    assert nouns <= HEIGHT.keys()
    assert len(SOURCES) > 30, "the package was not found"


def test_imports_go_down_and_never_sideways() -> None:
    wrong = []
    for path in (*SOURCES, *PROGRAMS):
        here = noun_of(path)
        names = [name.split(".") for name in source(path).imports if name.startswith("megatron_nexus.")]
        for there in {name[1] for name in names if name[1] in HEIGHT}:
            allowed = here == there or HEIGHT[there] < HEIGHT[here] or HEIGHT[here] == len(LAYERS) - 1
            if not allowed or (here, there) in FORBIDDEN:
                wrong.append(f"{path.relative_to(REPOSITORY)} imports {there}")
    assert wrong == []


@pytest.mark.parametrize(("folder", "foreign"), [("config", "torch"), ("spec", "torch.distributed")])
def test_low_layers_need_no_machine(folder: str, foreign: str) -> None:
    names = {name for path in SOURCES if noun_of(path) == folder for name in source(path).imports}
    assert names, f"{folder} imports nothing: was it found?"
    assert not [name for name in names if f"{name}.".startswith(f"{foreign}.")]


@pytest.mark.parametrize("library", SEALED)
def test_a_sealed_library_is_imported_in_its_files_only(library: str) -> None:
    assert with_import(library) == SEALED[library]


def test_one_file_makes_things_durable_and_one_completes_checkpoints() -> None:
    assert reading(("os", "fsync")) == {"base/durable.py"}
    completing = with_import("megatron_nexus.checkpoint.manifest.manifest_to_json")
    assert completing == {"checkpoint/new_checkpoint.py"}


def test_of_an_engine_checkpoints_know_only_its_train_state() -> None:
    names = {path.name: source(path).imports for path in SOURCES if noun_of(path) == "checkpoint"}
    assert "train_state.py" in names
    assert not [name for found in names.values() for name in found if name.startswith("deepspeed")]
    assert not [name for name in names["writer.py"] if "resume" in name], "saving imports loading"


def test_what_is_exported_stands_alone() -> None:
    imports = {name for path in STANDALONE.glob("*_nexusformer.py") for name in source(path).imports}
    assert {".".join(name.split(".")[:2]) for name in imports if name[0] == "."} == {
        ".configuration_nexusformer"
    }
    modules = {name.split(".")[0] for name in imports} - {""}
    assert modules - sys.stdlib_module_names == {"torch", "transformers"}


def test_there_is_no_module_state_and_no_print() -> None:
    assert [(path, line) for path in SOURCES for line in source(path).globals_and_prints] == []


def test_every_field_of_the_configuration_is_read() -> None:
    declared = {
        (section, field.name) for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)
    }
    # A rule that checks a field is no use of it: it would keep a dead flag alive.
    read = {
        ("logging" if base == "log_config" else base, name)
        for path in SOURCES
        if path.name not in ("rules.py", "model_rules.py")
        for base, name in source(path).reads
    }
    # These are read by properties of the section itself.
    spans = ("warmup", "decay", "wsd_decay")
    inside = {("model", "num_query_groups"), ("model", "base_pattention_slots")} | {
        ("optimizer", f"lr_{span}_{unit}") for span in spans for unit in ("iters", "samples")
    }
    assert {("self", name) for _, name in inside} <= read
    unread = declared - read - inside
    assert not unread, f"fields that nothing reads: {unread}; use them, or drop them"


def test_wrong_flags_the_api_s_settings_and_reading_a_checkpoint_need_no_torch() -> None:
    program = (
        "import sys, megatron_nexus.cli.train, megatron_nexus.checkpoint.store\n"
        "from megatron_nexus import api\napi.configure()\n"
        "print([name for name in ('torch', 'deepspeed', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_json_is_parsed_in_one_place() -> None:
    assert reading(("json", "loads"), ("json", "load"), ("json", "JSONDecoder")) == PARSE_JSON
