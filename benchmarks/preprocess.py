"""Throughput of preprocess_data.py compared with the tokenizer alone.

    python benchmarks/preprocess.py --tokenizer-model spm.model --workers 2

The tokenizer alone: as many processes as the tool has workers encode the same documents, which they hold in
memory, and keep nothing. Its rate is the sum of the processes' own rates, so that none waits for another. The
tool reads files, finds the documents, encodes, writes, merges. A round is each of them once while the other
sleeps; ratios are taken within a round, and the median over the rounds is reported.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_nexus.data.corpus_description import read_description
from megatron_nexus.data.standard_library import standard_library_documents

TOOL = Path(__file__).parents[1] / "tools" / "preprocess_data.py"
BATCH_CHARACTERS = 1 << 18

TIMED = """
import ctypes, os, resource, subprocess, sys, time
PR_SET_CHILD_SUBREAPER = 36  # the tool's workers outlive it by a moment: they are waited for here
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - began
try:
    while True:
        os.wait()
except ChildProcessError:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(seconds, used.ru_utime + used.ru_stime)
"""
"""Runs a command and prints its seconds, and the seconds of CPU of all its processes."""


def documents(megabytes: float) -> list[str]:
    """The standard library, over and over, to about so many UTF-8 bytes."""
    library = [text for text in standard_library_documents() if text]
    texts: list[str] = []
    left = megabytes * 1e6
    while left > 0:
        for text in library:
            texts.append(text)
            left -= len(text.encode())
            if left <= 0:
                break
    return texts


def serve_raw(model: Path, texts: list[str], connection: Connection) -> None:
    """A process of the tokenizer alone: when asked, it encodes all its texts.

    It answers with tokens, seconds and seconds of CPU.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        batches[-1].append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            batches.append([])
            size = 0
    if model.suffix == ".json":
        import tokenizers

        library = tokenizers.Tokenizer.from_file(str(model))

        def encode(batch: list[str]) -> int:
            encodings = library.encode_batch_fast(batch, add_special_tokens=False)
            return sum(len(encoding.ids) for encoding in encodings)
    else:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))

        def encode(batch: list[str]) -> int:
            return sum(map(len, processor.encode(batch, num_threads=1, return_type="numpy")))

    encode(batches[0])
    connection.send(None)
    while connection.recv():
        began, cpu_began = time.perf_counter(), time.process_time()
        tokens = sum(encode(batch) for batch in batches if batch)
        connection.send((tokens, time.perf_counter() - began, time.process_time() - cpu_began))


class Raw:
    """The tokenizer alone, on several processes."""

    def __init__(self, model: Path, texts: list[str], workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections = []
        for worker in range(workers):
            ours, theirs = context.Pipe()
            share = texts[worker::workers]
            context.Process(target=serve_raw, args=(model, share, theirs), daemon=True).start()
            self._connections.append(ours)
        for connection in self._connections:
            connection.recv()

    def rates(self) -> tuple[float, float]:
        """Tokens per second of all processes together, and tokens per second of CPU."""
        for connection in self._connections:
            connection.send(True)
        answers = [connection.recv() for connection in self._connections]
        rate = sum(tokens / seconds for tokens, seconds, _ in answers)
        return rate, sum(tokens for tokens, _, _ in answers) / sum(cpu_s for _, _, cpu_s in answers)

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.send(False)


def run_tool(source: Path, model: Path, workers: int) -> tuple[float, float]:
    """Seconds of the whole command, and seconds of CPU of all its processes."""
    command = [sys.executable, str(TOOL), "--input", str(source)]
    command += ["--output-prefix", str(source.with_name("corpus"))]
    command += ["--tokenizer-model", str(model), "--workers", str(workers), "--overwrite"]
    timed = subprocess.run([sys.executable, "-c", TIMED, *command], check=True, stdout=subprocess.PIPE)
    seconds, cpu_s = map(float, timed.stdout.split())
    return seconds, cpu_s


def main() -> None:
    """Run the rounds of the command line."""
    parser = argparse.ArgumentParser(description="preprocess_data.py compared with the tokenizer alone.")
    parser.add_argument(
        "--tokenizer-model", type=Path, required=True, help="SentencePiece .model or tokenizer.json"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--megabytes", type=float, default=100.0, help="of text")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(f"load average before the start: {os.getloadavg()[0]:.2f} (above 0.5: repeat later)")
    texts = documents(given.megabytes)
    with tempfile.TemporaryDirectory(prefix="preprocess-") as folder:
        source, tiny = Path(folder) / "in.jsonl", Path(folder) / "tiny.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tiny.write_text(json.dumps({"text": "one"}) + "\n")
        raw = Raw(given.tokenizer_model, texts, given.workers)
        whole, without_start, of_cpu = [], [], []
        for _ in range(given.rounds):
            alone, alone_of_cpu = raw.rates()
            start_s, start_cpu_s = run_tool(tiny, given.tokenizer_model, given.workers)
            seconds, cpu_s = run_tool(source, given.tokenizer_model, given.workers)
            description = read_description(Path(folder) / "corpus")
            assert description is not None and description.documents == len(texts)
            text_bytes = description.text_bytes
            # Without end tokens, like the tokenizer alone.
            tokens = description.tokens - description.documents
            whole.append(tokens / seconds / alone)
            without_start.append(tokens / (seconds - start_s) / alone)
            of_cpu.append(tokens / (cpu_s - start_cpu_s) / alone_of_cpu)
            print(
                f"tokenizer alone {alone / 1e6:.3f} M tokens/s, tool {tokens / seconds / 1e6:.3f} "
                f"(start {start_s:.2f} s of {seconds:.2f} s): {whole[-1]:.3f}, without start "
                f"{without_start[-1]:.3f}, by seconds of CPU {of_cpu[-1]:.3f}"
            )
        raw.close()
    print(
        f"{given.workers} workers, {text_bytes / 1e6:.0f} MB, {tokens / 1e6:.1f} M tokens: ratio "
        f"{statistics.median(whole):.3f} with start-up, {statistics.median(without_start):.3f} without; "
        f"by seconds of CPU, without start-up, {statistics.median(of_cpu):.3f}"
    )


if __name__ == "__main__":
    main()
