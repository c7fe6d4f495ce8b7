"""Lines that tools print to continue with are run as printed, on the smallest models."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.checkpoint.run_dir import newest_checkpoint
from tests.support.cli import SMALL, WARM, Command, commands, ended, run_tool, summary, warm_deepspeed
from tests.support.paths import REPOSITORY
from tests.support.subprocesses import Spawn

pytestmark = pytest.mark.slow

TINY = (
    "--vocab-size 400 --num-layers 1 --hidden-size 16 --num-attention-heads 2 --kv-channels 8 "
    "--ffn-hidden-size 24 --nexus-m 20 --nexus-a 24 --seq-length 32 --micro-batch-size 2 "
    "--global-batch-size 2 --eval-iters 1 --train-iters 1"
)


@pytest.fixture
def command(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    yield from commands(tmp_path, tmp_path_factory.mktemp("logs"))


def tool(spawn: Spawn, folder: Path, name: str, words: str) -> str:
    code, output = run_tool(spawn, folder, name, words)
    assert code == 0, output
    return output


def follow(spawn: Spawn, folder: Path, output: str, launcher: list[str]) -> str:
    """Run the line that a tool printed last, one rank of it without DeepSpeed's launcher; what it says."""
    line = re.findall(r"continue with +(.*)", output)[-1]
    typed, *words = shlex.split(line)
    assert typed == "deepspeed"
    code, said = ended(spawn([*launcher, *words], folder))
    assert code == 0, said
    assert "resumed" in said and "finished after iteration" in said
    return said


def test_growth_of_the_vocabulary_on_the_built_in_corpus(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train = [*WARM, str(REPOSITORY / "pretrain_nexus.py"), *shlex.split(TINY)]
    code, output = ended(spawn([*train, "--save", "a"], tmp_path))
    assert code == 0, output
    grown = tool(spawn, tmp_path, "grow_sharded_checkpoint.py", "--load a --save b --vocab-size 403")
    said = follow(spawn, tmp_path, grown, warm_deepspeed())
    assert "Training a tokenizer" not in said and "Tokenizing" not in said, "the corpus is there already"
    ends = [newest_checkpoint(tmp_path / name) for name in ("a", "b")]
    assert ends[0] is not None and ends[1] is not None
    first, last = map(read_manifest, ends)
    assert last.progress.step == 2 and last.tokenizer_fingerprint == first.tokenizer_fingerprint
    assert last.prepend_bos is False
    (tmp_path / "text.txt").write_text("def main():\n    pass\n")
    assert "bits" in tool(spawn, tmp_path, "evaluate.py", "--load b --perplexity text.txt")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("grow_sharded_checkpoint.py", "--vocab-size 101"),
        ("grow_sharded_checkpoint.py", "--attention-order 2"),
        ("upcycle_checkpoint.py", ""),
    ],
)
def test_growth_and_upcycling_on_token_files(command: Command, spawn: Spawn, name: str, words: str) -> None:
    kind = "--projection linear " if name.startswith("upcycle") else ""
    code, output = command.run(f"{kind}--train-iters 1 --save a")
    assert code == 0, output
    follow(spawn, command.folder, tool(spawn, command.folder, name, f"--load a --save b {words}"), WARM)


def test_lines_of_the_module_name_the_module(command: Command, spawn: Spawn) -> None:
    nexus = [*WARM, "-m", "megatron_nexus"]
    code, output = ended(
        spawn([*nexus, "train", *SMALL, "--train-iters", "1", "--save", "a"], command.folder)
    )
    assert code == 0, output
    assert " -m megatron_nexus train --data-path corpus" in summary(output, "resume with")
    code, output = ended(
        spawn([*nexus, "grow", *["--load", "a", "--save", "b", "--nexus-m", "24"]], command.folder)
    )
    assert code == 0, output
    typed, *words = shlex.split(re.findall(r"continue with +(.*)", output)[-1])
    assert [typed, *words[:3]] == ["python", "-m", "megatron_nexus", "train"]
    code, output = ended(spawn([*WARM, *words], command.folder))
    assert code == 0 and "resumed b/iter_0000001" in output, output


def test_an_import_without_a_tokenizer_is_not_trained_on_other_ids(spawn: Spawn, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=97, max_position_embeddings=32, **sizes)).save_pretrained(
        tmp_path / "hf"
    )
    imported = tool(spawn, tmp_path, "import_hf.py", "--input hf --save a")
    upcycled = tool(spawn, tmp_path, "upcycle_checkpoint.py", "--load a --save b")
    for output, run in ((imported, "a"), (upcycled, "b")):
        assert "continue with" not in output
        assert "--tokenizer-model) or token files of it (--data-path)" in output
        script = str(REPOSITORY / "pretrain_nexus.py")
        code, said = ended(spawn([*WARM, script, "--load", run], tmp_path))
        assert code == 2 and "Traceback" not in said, said
        assert "knows no tokenizer" in said and "--tokenizer-model" in said and "--data-path" in said
