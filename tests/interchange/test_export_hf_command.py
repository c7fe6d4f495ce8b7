"""The command that exports: what it writes, what it refuses, and that it leaves nothing half done."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.checkpoint.run_dir import TOKENIZER_FOLDER
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.cli.main import main
from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece_bpe
from megatron_nexus.data.standard_library import standard_library_documents
from megatron_nexus.data.tokenizer import open_tokenizer
from megatron_nexus.errors import CheckpointError
from megatron_nexus.interchange import export as export_module
from megatron_nexus.interchange import safetensors_writer, tokenizer_files
from megatron_nexus.interchange.import_checkpoint import import_checkpoint
from megatron_nexus.interchange.safetensors_folder import open_folder
from tests.support import checkpoints

VOCABULARY = 500


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose settings name its tokenizer."""
    root = tmp_path_factory.mktemp("source")
    documents = [text for text, _ in zip(standard_library_documents(), range(60), strict=False)]
    train_sentencepiece_bpe(documents, root / "spm.model", VOCABULARY)
    data = {"data_path": ("corpus",), "tokenizer_model": str(root / "spm.model")}
    checkpoints.write_checkpoint(root / "run", checkpoints.configure(vocab_size=VOCABULARY, **data))
    checkpoints.write_checkpoint(root / "nameless", checkpoints.configure(data_path=("corpus",)))
    return root


def export(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["export_hf.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main("export")
    assert isinstance(end.value.code, int)
    return end.value.code


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_it_writes_a_folder_and_says_how_to_load_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    before = contents(source)
    read = CheckpointReader.read_box
    sizes = []

    def counted(self: CheckpointReader, tensor: str, state: str, box: object) -> object:
        sizes.append(box.numel)
        return read(self, tensor, state, box)

    monkeypatch.setattr(CheckpointReader, "read_box", counted)
    monkeypatch.setattr(safetensors_writer, "BLOCK_ELEMENTS", 64)
    assert export(monkeypatch, "--load", source / "run", "--output", tmp_path / "hf" / "a") == 0
    output = console.readouterr().out
    for kind in ("AutoModelForCausalLM", "AutoTokenizer"):
        assert f'{kind}.from_pretrained("{tmp_path}/hf/a", trust_remote_code=True)' in output
    assert "gives 20,000 lines the same ids" in output
    assert max(sizes) <= 64, "weights are streamed"
    assert contents(source) == before, "the source is never touched"
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["a"]
    held = {path.name for path in (tmp_path / "hf" / "a").iterdir()}
    assert held == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "configuration_nexusformer.py",
        "modeling_nexusformer.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
    }
    assert json.loads((tmp_path / "hf" / "a" / "config.json").read_text())["eos_token_id"] == 1


def test_a_run_without_a_tokenizer_is_exported_without_one_and_it_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    assert export(monkeypatch, "--load", source / "nameless", "--output", tmp_path / "a") == 0
    assert "tokenizer: none is known" in console.readouterr().out
    assert not list((tmp_path / "a").glob("tokenizer*"))
    words = ("--load", source / "run", "--output", tmp_path / "b", "--tokenizer-model", "none")
    assert export(monkeypatch, *words) == 0
    assert "tokenizer: none, as --tokenizer-model none says" in console.readouterr().out


@pytest.mark.slow
def test_what_comes_back_knows_the_corpora_of_its_tokenizer(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    assert export(monkeypatch, "--load", source / "run", "--output", tmp_path / "hf") == 0
    tokenizer = SentencePieceTokenizer(source / "spm.model")
    for folder, same in (("run", True), ("changed", False)):
        import_checkpoint(
            open_folder(tmp_path / "hf"),
            tmp_path / "hf",
            tmp_path / folder,
            checkpoints.configure(vocab_size=VOCABULARY),
        )
        found = open_tokenizer(tmp_path / folder / TOKENIZER_FOLDER)
        assert (found.fingerprint == tokenizer.fingerprint) == same
        manifest = read_manifest(tmp_path / folder / "iter_0000000")
        assert manifest.tokenizer_fingerprint == found.fingerprint
        # A tokenizer.json that was changed after the export is another tokenizer.
        record = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
        (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(record | {"truncation": None}))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--load {source}/run --output {source}/run", "holds files, and nothing is ever overwritten"),
        ("--load {source}/run --output {source}/run/iter_0000040/hf", "never touched"),
        ("--load {source} --output {new}", "no complete checkpoint"),
        ("--load {source}/run --output s3://bucket/x", "is not a folder on this disk"),
        ("--load {source}/nameless --output {new} --tokenizer-model {source}/spm.model", "500 tokens, the"),
        ("--load {source}/run --output {new} --tokenizer-model {source}/gone.model", "cannot be read"),
        ("--load {source}/run --output {new} --dtype fp16", "fp16"),
    ],
)
def test_mistakes_are_answered_and_nothing_is_left(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    console: pytest.CaptureFixture[str],
    words: str,
    expected: str,
) -> None:
    code = export(monkeypatch, *words.format(source=source, new=tmp_path / "new").split())
    error = console.readouterr().err
    assert code == 2 and expected in error and "Traceback" not in error, error
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None)
    monkeypatch.setattr(export_module, "output_dir", None)  # whoever begins to write fails
    words = ("--load", source / "run", "--output", tmp_path / "new")
    assert export(monkeypatch, *words) == 2
    assert "pip install tokenizers; or export without" in console.readouterr().err
    monkeypatch.undo()
    assert export(monkeypatch, *words, "--tokenizer-model", "none") == 0, "the other remedy works"


@pytest.mark.parametrize("failure", [CheckpointError("damaged"), KeyboardInterrupt()])
def test_an_export_that_ends_early_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(self: CheckpointReader, tensor: str, state: str, box: object) -> object:
        raise failure

    monkeypatch.setattr(CheckpointReader, "read_box", fail)
    words = ("--load", source / "nameless", "--output", tmp_path / "new")
    assert export(monkeypatch, *words) == (130 if isinstance(failure, KeyboardInterrupt) else 2)
    assert list(tmp_path.iterdir()) == []
