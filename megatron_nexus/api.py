"""The Python API: train, load, generate, grow, retrieve, unlearn, with the settings of the command line.

    from megatron_nexus import api

    run = api.train(save="runs/a", preset="nexusformer-tiny", train_iters=200)
    print(api.load(run.folder).generate("def main("))
    grown = api.grow(load=run.folder, save="runs/b", nexus_m=160, nexus_a=176)
    api.train(save="runs/b", load="runs/b", train_iters=400)

A setting is a flag of the command with underscores: `nexus_m=160` is `--nexus-m 160`, `bf16=True` is `--bf16`
and `data_path=["0.7", "web", "0.3", "code"]` several words; `nexus train --help` lists them all. A mistake
raises a class of `megatron_nexus.errors` with the command's own message. torch is imported by the first call
that computes, not by this module.

Training, unlearning and retrieval run in processes of their own, the tp x pp ranks of one mesh on this
machine, so a notebook keeps its signal handlers and joins no process group; `nexus launch` and torchrun start
more. Loading, generation and growth run in this process.
"""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nexus import errors
from megatron_nexus.base.json_text import parse_json
from megatron_nexus.base.linux import require_linux
from megatron_nexus.errors import ConfigError, NexusError, TrainingError, path_errors
from megatron_nexus.parallel.local_ranks import die_with_parent

if TYPE_CHECKING:
    from megatron_nexus.cli.model_arguments import TrainedModel
    from megatron_nexus.config.run_config import RunConfig
    from megatron_nexus.evaluation.loaded_model import LoadedModel

Setting = int | float | str | bool | Path | Sequence[str]
"""The value of a flag."""

_PRINTING = {"help", "version", "dry_run", "world_size", "device", "search"}


def configure(**settings: Setting) -> "RunConfig":
    """Return the configuration of `nexus train` with these settings, checked for one tp x pp mesh.

    `load` continues a checkpoint's configuration, `config` reads a YAML file below the settings.

    Raises:
        ConfigError: settings that are unknown, wrong or contradict each other or the checkpoint.
        CheckpointError: `load` names nothing that can be loaded.
    """
    return _configure("train", settings)


def _configure(verb: str, settings: Mapping[str, Setting]) -> "RunConfig":
    require_linux()
    from megatron_nexus.cli.train_command import read_train_command
    from megatron_nexus.config.rules import check

    with path_errors():
        config = read_train_command(_flags(settings), verb).config
        check(config, config.model_parallel_size)
    return config


@dataclass(frozen=True)
class Run:
    """A finished training run: its folder, its newest checkpoint, and losses in nats per token by step."""

    folder: Path
    checkpoint: Path
    losses: Mapping[int, float]
    validation_losses: Mapping[int, float]


def train(save: str | Path, *, echo: bool = True, **settings: Setting) -> Run:
    """Train as `nexus train --save SAVE` does with these settings, and return what came of it.

    The ranks of one tp x pp mesh run on this machine in processes of their own; their lines go to stdout
    where `echo` says so. `load` resumes a run or begins from a checkpoint. Ctrl-C has the run save and end,
    then raises KeyboardInterrupt.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is started, or where the ranks find it.
        TrainingError: a loss is not finite, or a rank failed; the message ends with what it wrote.
    """
    configure(**settings, save=save)
    _run("train", {**settings, "save": save}, echo)
    return open_run(save)


def unlearn(
    load: str | Path,
    save: str | Path,
    forget: str | Path,
    retain: str | Path | None = None,
    *,
    echo: bool = True,
    **settings: Setting,
) -> Run:
    """Unlearn as `nexus unlearn` does with these settings, and return what came of it.

    `forget` and `retain` are .jsonl files of answers; `lr` and `train_iters` must be given, `loss` and
    `retain_loss` say what is minimised. Without `retain`, `retain_loss` is "none". Processes, Ctrl-C and
    errors as in `train`.
    """
    sides = {"retain_loss": "none"} if retain is None else {"retain": retain}
    given = {"load": load, "save": save, "forget": forget, **sides, **settings}
    _configure("unlearn", given)
    _run("unlearn", given, echo)
    return open_run(save)


@dataclass(frozen=True)
class Retrieved:
    """The two files that a search has written, and the numbers of its report.json."""

    forget: Path
    retain: Path
    report: Mapping[str, object]


def retrieve(
    load: str | Path,
    corpus: str | Path | Sequence[str],
    queries: str | Path,
    forget: int,
    retain: int,
    output: str | Path = "retrieved",
    *,
    echo: bool = True,
    **settings: Setting,
) -> Retrieved:
    """Choose samples to forget and to retain as `nexus retrieve` does, and return where they are.

    `forget` and `retain` are numbers of samples, `settings` such as `sketch_size=1024`. Processes and errors
    as in `train`.
    """
    require_linux()
    given = {"load": load, "queries": queries, "forget": forget, "retain": retain, "output": output}
    _run("retrieve", {**given, "corpus": corpus, **settings}, echo)
    folder = Path(output)
    report = parse_json((folder / "report.json").read_bytes())
    return Retrieved(folder / "forget.jsonl", folder / "retain.jsonl", report)


def _run(verb: str, settings: Mapping[str, Setting], echo: bool) -> None:
    """Run a verb in a process of its own; raise the error that it ends with."""
    run_program(["-m", "megatron_nexus", verb, *_flags(settings)], echo)


def run_program(words: Sequence[str], echo: bool) -> None:
    """Run a command of this package, whose `words` follow `python`; its lines go to stdout where `echo`.

    Raises the error that it ends with.
    """
    lines = []
    with subprocess.Popen(
        [sys.executable, "-u", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=partial(die_with_parent, signal.SIGTERM),
    ) as process:
        for line in _lines(process):
            lines.append(line)
            if echo:
                sys.stdout.write(line)
    if process.returncode:
        raise error_of("".join(lines), process.returncode)


def open_run(folder: str | Path) -> Run:
    """Return a run on this disk by its folder. Raises CheckpointError where it has no complete checkpoint."""
    require_linux()
    from megatron_nexus.checkpoint.run_dir import find_checkpoint
    from megatron_nexus.training.metrics import METRICS_FILE, read_metrics

    folder = Path(folder)
    checkpoint = find_checkpoint(folder)
    records = read_metrics(folder / METRICS_FILE)
    losses, validation_losses = (
        {int(record["step"]): float(record[kind]) for record in records if kind in record}
        for kind in ("loss", "validation_loss")
    )
    return Run(folder, Path(str(checkpoint)), losses, validation_losses)


def _lines(process: "subprocess.Popen[str]") -> Iterator[str]:
    """Yield what a process writes until it ends, and pass Ctrl-C on to it."""
    assert process.stdout is not None
    interrupted = False
    while True:
        try:
            line = process.stdout.readline()
        except KeyboardInterrupt:
            # Ranks that wait within a collective heed the second alone.
            process.send_signal(signal.SIGTERM if interrupted else signal.SIGINT)
            interrupted = True
            continue
        if not line:
            break
        yield line
    if interrupted:
        process.wait()
        raise KeyboardInterrupt


def error_of(output: str, code: int) -> NexusError:
    """Return the error that the command wrote last, in its own class."""
    found = list(re.finditer(r"^(\w+Error): ", output, re.MULTILINE))
    if found:
        kind, message = getattr(errors, found[-1][1], None), output[found[-1].end() :].strip()
        if kind is ConfigError:
            return ConfigError([line.strip() for line in message.splitlines()[1:]])
        if isinstance(kind, type) and issubclass(kind, NexusError):
            return kind(message)
    return TrainingError(f"the command ended with exit code {code}; it wrote at the end:\n{output[-3000:]}")


class Model:
    """A trained model in this process, opened by `load`."""

    def __init__(self, trained: "TrainedModel") -> None:
        self._trained = trained
        self.config = trained.config
        """The configuration of its run."""
        self.step = trained.manifest.progress.step
        """The optimizer steps that it has been trained for."""

    @cached_property
    def loaded(self) -> "LoadedModel":
        """Its decoder, read at first use: a torch module and its device."""
        return self._trained.load()

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1234,
    ) -> str:
        """Return the continuation of a prompt, without the prompt; a seed repeats it.

        `temperature` 0 takes the likeliest token each time. `top_k` 0 and `top_p` 1 draw from all.

        Raises ConfigError where a value is outside its range.
        """
        from megatron_nexus.cli.generate import make_parser

        numbers = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        make_parser().parse_args(_flags({"load": self._trained.checkpoint.name, **numbers}))
        from megatron_nexus.data.tokenizer import encode_prompt
        from megatron_nexus.evaluation.continuation import continue_text
        from megatron_nexus.evaluation.decoding import Decoding
        from megatron_nexus.evaluation.sampling import Sampling

        tokenizer = self._trained.tokenizer
        ids = encode_prompt(tokenizer, prompt)
        decoding = Decoding(self.loaded, [ids], max_new_tokens, tokenizer.vocab_size)
        sampling = Sampling(temperature, top_k, top_p)
        return "".join(continue_text(decoding, tokenizer, ids, max_new_tokens, sampling, seed))


def load(
    run: str | Path,
    *,
    precision: str = "",
    device: str = "",
    tokenizer_model: str | Path | None = None,
) -> Model:
    """Return the model of a run's folder or of one checkpoint in it, whatever its topology; s3:// too.

    Args:
        run: what `--load` names.
        precision: "fp32" or "bf16"; as it was trained where it is empty.
        device: "cpu" or "cuda"; an accelerator where there is one and it is empty.
        tokenizer_model: where its tokenizer is now, if not where the run had it.

    Raises:
        CheckpointError, DataError: there is no such checkpoint or tokenizer.
        ConfigError: another precision or device than these.
    """
    require_linux()
    from megatron_nexus.cli.generate import make_parser
    from megatron_nexus.cli.model_arguments import find_model

    settings = {"precision": precision, "device": device, "tokenizer_model": tokenizer_model}
    given = {name: value for name, value in settings.items() if value}
    with path_errors():
        return Model(find_model(make_parser().parse_args(_flags({"load": run, **given}))))


def grow(load: str | Path, save: str | Path, **settings: Setting) -> Path:
    """Write a checkpoint as a larger model, and return the new checkpoint.

    The settings are those of `nexus grow`: sizes (`nexus_m`, `nexus_a`, `hidden_size`, `num_layers`, ...) or
    a `preset`, `tp` and `pp` of the files, `init`, `verify=True`. It computes the same function, but for new
    layers, which are stacked unless `depth_init` says otherwise. Without a size it reshards. The source is
    not touched, and a growth that fails leaves nothing.

    Raises:
        ConfigError: a size that cannot grow, or a `save` that holds checkpoints.
        CheckpointError: the source is missing or damaged, or `verify` finds another function.
    """
    require_linux()
    from megatron_nexus.cli import grow

    wanted = {name: value for name, value in settings.items() if value is not False}
    given = grow.make_parser().parse_args(_flags({**wanted, "load": load, "save": save}))
    with path_errors():
        made = grow.grow(given)
    assert made is not None, "dry_run is refused"
    return made


def _flags(settings: Mapping[str, Setting]) -> list[str]:
    """Return the command line of settings. Raises ConfigError for flags that only print."""
    printing = sorted(settings.keys() & _PRINTING)
    if printing:
        raise ConfigError([f"{name} only prints: use it with the command nexus" for name in printing])
    argv = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, str | int | float | Path):
            argv.append(f"{flag}={value}")
        else:
            argv += [flag, *map(str, value)]
    return argv
