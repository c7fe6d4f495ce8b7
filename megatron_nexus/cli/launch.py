"""The verb `launch`: DeepSpeed's runner, which starts `train` or `unlearn` on many devices or nodes.

    nexus launch --num_gpus 8 train --preset nexusformer-240m --tp 2

The runner is called in this process. DeepSpeed's own script `deepspeed` does the same, but cannot start from
a virtual environment whose path holds a space: pip gives it a bare shebang.
"""

import signal
import socket
import sys
from difflib import get_close_matches
from pathlib import Path

from megatron_nexus.base.imports import gc_paused, hidden_modules
from megatron_nexus.base.invocation import command, program_words
from megatron_nexus.errors import ConfigError
from megatron_nexus.log import importing

LAUNCHED = ("train", "unlearn")
HELP = """\
usage: {launch} [flags of DeepSpeed's runner] train|unlearn [flags of the verb]

Start the verb as one rank for each device, with DeepSpeed's runner. Without a flag: all devices of this
machine. On a machine without accelerators the verb starts the ranks that --tp and --pp need by itself.

  --num_gpus N               ranks on each node
  --num_nodes N              nodes of the hostfile to use
  --hostfile FILE            lines such as `worker-1 slots=8` (default: /job/hostfile)
  --include, --exclude HOSTS such as worker-1:0,2
  --master_addr, --master_port   where the ranks meet
  --launcher NAME            pdsh, openmpi, mpich, impi, slurm or mvapich, between nodes
  --no_ssh --node_rank N     called on every node itself, without ssh
  --bind_cores_to_rank       pin each rank to its cores

All other flags of the runner are passed on: `python -m deepspeed.launcher.runner --help` lists them;
`{train} --help` lists those of train.
"""


def run(argv: list[str]) -> None:
    """Run `nexus launch` with the flags `argv`; the exit code is that of the run.

    Raises ConfigError where the first word that is not a flag of the runner is neither verb.
    """
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(HELP.format(launch=command("launch"), train=command("train")))
        return
    if not set(LAUNCHED).intersection(argv):
        raise ConfigError(_not_launched(argv))
    with importing("DeepSpeed"), gc_paused(), hidden_modules("mlflow"):
        from deepspeed.launcher import runner
    given = runner.parse_args(argv)
    at = len(argv) - len(given.user_args) - 1
    flags = argv[:at]
    if argv[at] not in LAUNCHED:
        raise ConfigError(f"{argv[at]!r} cannot be launched: only train and unlearn run as many ranks")
    program = program_words(argv[at])
    script = ["--module", *program[1:]] if program[0] == "-m" else program
    # The ranks get Ctrl-C too, save and leave; the runner would end before them with a traceback.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    alone = not Path(given.hostfile).exists() and "--no_ssh" not in flags
    if alone and not any(flag.startswith("--master_port") for flag in flags):
        flags += ["--master_port", str(_free_port())]  # or two jobs of one machine would meet at 29500
    runner.main([*flags, *script, *argv[at + 1 :]])


def _not_launched(argv: list[str]) -> str:
    """Return what is wrong with a command line that has no verb to launch, with the word nearest to one."""
    words = [word for word in argv if not word.startswith("-")]
    near = [(word, verb) for word in words for verb in get_close_matches(word, LAUNCHED, n=1)]
    remedy = f"write `{command('launch')} ... train ...`"
    if near:
        remedy = f"did you mean {near[0][1]}?"
    word = near[0][0] if near else argv[0]
    named = "no verb is named" if word.startswith("-") else f"{word!r} cannot be launched"
    return f"{named}, only {' and '.join(LAUNCHED)} run as many ranks: {remedy}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port
