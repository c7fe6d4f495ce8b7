"""How long tasks take through our model class, compared with lm-evaluation-harness' own `hf` backend.

    python pretrain_nexus.py --preset nexusformer-20m --train-iters 2 --save runs/bench
    python benchmarks/evaluate.py --load runs/bench

The checkpoint is exported for transformers; then both backends answer the same tasks in turn, in one process
with the same threads and precision. Ratios are taken within a round; printed is their median over the rounds:
above 1, ours is faster. Seconds are those of the whole evaluation, tokens of all texts included; those of
CPU are what other processes on the machine disturb least. Without --task-path, records are made up of
words of Python's standard library, as many as items of the published sets have in the middle.
"""

import argparse
import json
import logging
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Before the imports: what transformers keeps of the code of a model goes nowhere else.
os.environ |= {"HF_HOME": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}

import torch
from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from megatron_nexus import log
from megatron_nexus.checkpoint.location import location
from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.checkpoint.run_dir import find_checkpoint
from megatron_nexus.checkpoint.saved_run import saved_config
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.data.standard_library import standard_library_documents
from megatron_nexus.evaluation.harness import NexusLM
from megatron_nexus.evaluation.loaded_model import load_model
from megatron_nexus.evaluation.local_scorer import LocalScorer
from megatron_nexus.evaluation.task_files import PAPER_TASKS
from megatron_nexus.evaluation.tasks import Tasks, open_tasks
from megatron_nexus.growth.checkpoint_tokenizer import tokenizer_record
from megatron_nexus.interchange.export import export_checkpoint
from megatron_nexus.models.layer_context import DTYPES

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def write_records(folder: Path, items: int) -> None:
    """Files of the five tasks, of words in the numbers that items of the published sets have."""
    rng = random.Random(0)
    text = " ".join(document for document, _ in zip(standard_library_documents(), range(200), strict=False))
    words = re.findall(r"[a-z]{2,9}", text)

    def some(count: int) -> str:
        begin = rng.randrange(len(words) - 2 * count)
        return " ".join(words[begin : begin + max(1, round(count * rng.uniform(0.5, 1.5)))])

    def question(name: str, length: int, choice: int) -> dict[str, object]:
        choices = {"text": [some(choice) for _ in range(4)], "label": list("ABCD")}
        return {name: some(length) + "?", "choices": choices, "answerKey": rng.choice("ABCD")}

    def record(task: str) -> dict[str, object]:
        match task:
            case "piqa":
                return {"goal": some(8), "sol1": some(20), "sol2": some(20), "label": rng.randrange(2)}
            case "hellaswag":
                context = {"activity_label": some(3), "ctx_a": some(40), "ctx_b": some(3)}
                return {**context, "endings": [some(22) for _ in range(4)], "label": str(rng.randrange(4))}
            case "openbookqa":
                return question("question_stem", 11, 3)
            case _:
                return question("question", 20, 4)

    for task in PAPER_TASKS:
        lines = [json.dumps(record(task)) + "\n" for _ in range(items)]
        (folder / f"{task}.jsonl").write_text("".join(lines))


def answers(model: LM, tasks: Tasks) -> tuple[float, float, list[float]]:
    """Seconds of an evaluation, its seconds of CPU, and all its log-likelihoods."""
    began, began_cpu = time.perf_counter(), time.process_time()
    samples: Mapping[str, list[dict[str, Any]]] = evaluate(
        lm=model, task_dict={"tasks": dict(tasks)}, bootstrap_iters=0
    )["samples"]
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    rows = [row for of_task in samples.values() for row in of_task]
    return seconds, cpu_s, [log_p for row in rows for log_p, _ in row["filtered_resps"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--load", required=True, help="a run's folder or a checkpoint")
    parser.add_argument("--task-path", type=Path, help="local files of the five tasks")
    parser.add_argument("--items", type=int, default=64, help="of each task, where they are made up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64], help="of the hf backend")
    given = parser.parse_args()
    log.configure(is_main_rank=False)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(given.threads)
    checkpoint = find_checkpoint(location(given.load))
    manifest = read_manifest(checkpoint)
    config = saved_config(checkpoint, manifest)
    tokenizer = find_tokenizer(config, tokenizer_record(manifest))
    assert tokenizer is not None, "train with --tokenizer-model"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.task_path is None:
            write_records(folder, given.items)
        tasks = open_tasks(PAPER_TASKS, given.task_path or folder)
        export_checkpoint(checkpoint, folder / "hf", config, tokenizer, given.precision, 10**10)
        device, length = torch.device("cpu"), config.training.seq_length
        loaded = load_model(checkpoint, config.model, length, device, DTYPES[given.precision])
        models: dict[str, LM] = {"ours": NexusLM(LocalScorer(loaded), tokenizer, loaded)}
        for size in given.batch_sizes:
            kind = {"dtype": TORCH_NAMES[given.precision], "device": "cpu", "trust_remote_code": True}
            models[f"hf, batch {size}"] = HFLM(str(folder / "hf"), batch_size=size, **kind)
        print(
            f"{config.preset}, {given.precision}, {given.threads} threads; ratio: theirs / ours, in seconds"
        )
        compare(models, tasks, given.rounds)


def compare(models: Mapping[str, LM], tasks: Tasks, rounds: int) -> None:
    """Time each task, and all of them, by every model in turn, and print the ratios."""
    print("| tasks | model | seconds | ratio | from | to | CPU ratio | log-likelihoods differ by |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for label, some in [*((name, {name: task}) for name, task in tasks.items()), ("all five", tasks)]:
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        found = {}
        for _ in range(rounds):
            for name, model in models.items():
                seconds, cpu_s, found[name] = answers(model, some)
                taken[name].append((seconds, cpu_s))
        for name, times in taken.items():
            ratios, cpu_ratios = (
                [theirs[clock] / ours[clock] for theirs, ours in zip(times, taken["ours"], strict=True)]
                for clock in (0, 1)
            )
            cells = [statistics.median(s for s, _ in times), statistics.median(ratios), min(ratios)]
            cells += [max(ratios), statistics.median(cpu_ratios)]
            error = max(abs(a - b) for a, b in zip(found[name], found["ours"], strict=True))
            row = " | ".join(f"{cell:.2f}" for cell in cells)
            print(f"| {label} | {name} | {row} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()
