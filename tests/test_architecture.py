"""Imports go down, foreign libraries stay sealed, and nothing is configured that nothing reads."""

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_nexus.config.run_config import SECTIONS

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "megatron_nexus"
# Copied into what is exported, to run where this package is not.
STANDALONE = PACKAGE / "interchange" / "remote_code"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if STANDALONE not in path.parents)

LAYERS: list[set[str]] = [
    {"errors", "extras", "log"},
    {"base"},
    {"config", "spec", "kernels"},
    {"parallel", "data"},
    {"models", "checkpoint"},
    {"training", "growth", "evaluation", "interchange", "planner", "analysis"},
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
        "advice/probe.py",
        *(f"analysis/{name}.py" for name in ("components", "cycles", "scaling_law", "two_samples")),
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


def trees() -> Iterator[tuple[Path, ast.Module]]:
    programs = [REPOSITORY / "pretrain_nexus.py", *sorted((REPOSITORY / "tools").rglob("*.py"))]
    for path in [*SOURCES, *programs]:
        yield path, ast.parse(path.read_text(), str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in a file, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def noun_of(path: Path) -> str:
    """The folder, or the file at the top, that a source belongs to."""
    top = path.relative_to(PACKAGE if PACKAGE in path.parents else REPOSITORY).parts[0]
    return top.removesuffix(".py")


def test_every_folder_has_a_layer() -> None:
    nouns = {noun_of(path) for path, _ in trees()} - {"__init__"}
    assert nouns <= HEIGHT.keys()
    assert len(SOURCES) > 30, "the package was not found"


def test_imports_go_down_and_never_sideways() -> None:
    wrong = []
    for path, tree in trees():
        here = noun_of(path)
        names = [name.split(".") for name in imported(tree) if name.startswith("megatron_nexus.")]
        for there in {name[1] for name in names if name[1] in HEIGHT}:
            allowed = here == there or HEIGHT[there] < HEIGHT[here] or HEIGHT[here] == len(LAYERS) - 1
            if not allowed or (here, there) in FORBIDDEN:
                wrong.append(f"{path.relative_to(REPOSITORY)} imports {there}")
    assert wrong == []


@pytest.mark.parametrize(("folder", "foreign"), [("config", "torch"), ("spec", "torch.distributed")])
def test_low_layers_need_no_machine(folder: str, foreign: str) -> None:
    names = {name for path, tree in trees() if noun_of(path) == folder for name in imported(tree)}
    assert names, f"{folder} imports nothing: was it found?"
    assert not [name for name in names if f"{name}.".startswith(f"{foreign}.")]


@pytest.mark.parametrize("library", SEALED)
def test_a_sealed_library_is_imported_in_its_files_only(library: str) -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path, tree in trees()
        if any(name.split(".")[0] == library for name in imported(tree))
    }
    assert users == SEALED[library]


def test_one_file_makes_things_durable_and_one_completes_checkpoints() -> None:
    syncing = {
        str(path.relative_to(PACKAGE))
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if (node.value.id, node.attr) == ("os", "fsync")
    }
    assert syncing == {"base/durable.py"}
    completing = {
        str(path.relative_to(PACKAGE))
        for path, tree in trees()
        if "megatron_nexus.checkpoint.manifest.manifest_to_json" in imported(tree)
    }
    assert completing == {"checkpoint/new_checkpoint.py"}


def test_of_an_engine_checkpoints_know_only_its_train_state() -> None:
    names = {path.name: set(imported(tree)) for path, tree in trees() if noun_of(path) == "checkpoint"}
    assert "train_state.py" in names
    assert not [name for found in names.values() for name in found if name.startswith("deepspeed")]
    assert not [name for name in names["writer.py"] if "resume" in name], "saving imports loading"


def test_what_is_exported_stands_alone() -> None:
    nodes = [
        node
        for path in sorted(STANDALONE.glob("*_nexusformer.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    relative = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
    assert [node.module for node in relative] == ["configuration_nexusformer"]
    modules = {name.split(".")[0] for node in nodes if node not in relative for name in imported(node)}
    assert modules - sys.stdlib_module_names == {"torch", "transformers"}


def test_there_is_no_module_state_and_no_print() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path, tree in trees()
        if path in SOURCES
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
    ]
    assert found == []


def base_name(node: ast.Attribute) -> str:
    """`training` of `config.training.seed` and of `training.seed`; a local `log_config` is `logging`."""
    name = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
    return "logging" if name == "log_config" else name


def test_every_field_of_the_configuration_is_read() -> None:
    declared = {
        (section, field.name) for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)
    }
    # A rule that checks a field is no use of it: it would keep a dead flag alive.
    read = {
        (base_name(node), node.attr)
        for path, tree in trees()
        if path.name != "rules.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # These are read by properties of the section itself.
    spans = ("warmup", "decay", "wsd_decay")
    inside = {("model", "num_query_groups"), ("model", "base_pattention_slots")} | {
        ("optimizer", f"lr_{span}_{unit}") for span in spans for unit in ("iters", "samples")
    }
    assert {("self", name) for _, name in inside} <= read
    assert declared - read <= inside


def test_a_wrong_flag_is_answered_without_importing_torch() -> None:
    program = (
        "import sys, megatron_nexus.cli.train\n"
        "print([name for name in ('torch', 'deepspeed', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_json_is_parsed_in_one_place() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in {("json", "loads"), ("json", "load"), ("json", "JSONDecoder")}
    }
    assert found == PARSE_JSON
