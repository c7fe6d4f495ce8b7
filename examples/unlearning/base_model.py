"""The model to unlearn from, trained by the product's own commands: tokenizer, corpus, training."""

import json
import subprocess
import sys
from pathlib import Path

from corpora import make_corpus

VOCABULARY = 384
MODEL = (
    f"--vocab-size {VOCABULARY} --num-layers 2 --hidden-size 48 --num-attention-heads 2 --kv-channels 24 "
    "--ffn-hidden-size 128 --nexus-m 60 --nexus-a 72 --init-method-std 0.08"
)
TRAINING = (
    "--seq-length 64 --micro-batch-size 16 --global-batch-size 16 --fp32 --lr 4e-3 --min-lr 2e-4 "
    "--lr-warmup-iters 50 --weight-decay 0 --reset-position-ids --reset-attention-mask --eval-iters 0 "
    "--split 1 --log-interval 200"
)


def nexus(words: str, log: Path) -> None:
    """Run a command of the product; raise SystemExit with the end of its output where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_nexus", *words.split()], capture_output=True, text=True
    )
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        sys.exit(f"nexus {words}\n{(done.stdout + done.stderr)[-2000:]}")


def train_base(folder: Path, seed: int, steps: int) -> Path:
    """Return the run of a seed's model, trained where it is not there yet."""
    run = folder / "base"
    if list(run.glob(f"iter_{steps:07d}/manifest.json")):
        return run
    folder.mkdir(parents=True, exist_ok=True)
    corpus = make_corpus(seed)
    text = folder / "corpus.jsonl"
    text.write_text("".join(json.dumps({"text": sample.text}) + "\n" for sample in corpus.samples))
    words = sorted({sample.text for sample in corpus.samples})
    (folder / "texts.txt").write_text("\n".join(words))
    tokenizer = folder / "tokenizer.model"
    nexus(
        f"train-tokenizer --input {folder / 'texts.txt'} --output {tokenizer} --vocab-size {VOCABULARY} "
        "--overwrite",  # of a study that was stopped
        folder / "tokenizer.log",
    )
    nexus(
        f"preprocess --input {text} --output-prefix {folder / 'corpus'} --tokenizer-model {tokenizer} "
        "--overwrite",
        folder / "preprocess.log",
    )
    nexus(
        f"train {MODEL} {TRAINING} --data-path {folder / 'corpus'} --tokenizer-model {tokenizer} "
        f"--seed {seed} --train-iters {steps} --save {run} --load auto",
        folder / "train.log",
    )
    return run
