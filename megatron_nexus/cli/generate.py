"""The verb `generate`: continue a text with a trained model, shown token by token.

    nexus generate --load runs/x --prompt "def main(" --temperature 0.8 --top-p 0.95

The text goes to stdout, everything else to stderr.
"""

import argparse
import os
import sys
import time

from megatron_nexus import log
from megatron_nexus.cli.arguments import count, fraction, not_negative, positive
from megatron_nexus.cli.model_arguments import TrainedModel, add_model_arguments, find_model
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.data.tokenizer import encode_prompt
from megatron_nexus.errors import DataError


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser("generate", "--load RUN [flags]", description="Continue a text with a trained model.")
    add_model_arguments(parser)
    flag = parser.add_flag
    flag("--prompt", "the text to continue (default: stdin)", metavar="TEXT")
    flag("--max-new-tokens", "(default: 128)", type=positive(int), default=128)
    text = "divides the logits; 0 takes the likeliest token (default: 1)"
    flag("--temperature", text, type=not_negative, default=1.0)
    flag("--top-k", "draw from this many likeliest tokens; 0: from all", type=count, default=0)
    text = "draw from the likeliest tokens that have this probability together (default: 1)"
    flag("--top-p", text, type=fraction, default=1.0)
    flag("--num-samples", "(default: 1)", type=positive(int), default=1)
    flag("--seed", "of the first sample, then counting up", type=count, default=1234)
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus generate` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    log.configure(is_main_rank=True, stream=sys.stderr)
    _generate(find_model(given), _read_prompt(given.prompt), given)


def _read_prompt(given: str | None) -> str:
    """Return the text to continue. Raises DataError where it is not UTF-8."""
    if given is None:
        if sys.stdin.isatty():
            log.logger.info("type the text to continue, and end it with Ctrl-D")
        contents = sys.stdin.buffer.read().removesuffix(b"\n")
    else:
        contents = os.fsencode(given)
    try:
        return contents.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"the prompt is not UTF-8 text ({error}): convert it") from error


def _generate(trained: TrainedModel, prompt: str, given: argparse.Namespace) -> None:
    with log.importing("torch"):
        from megatron_nexus.evaluation.continuation import continue_text
        from megatron_nexus.evaluation.decoding import Decoding
        from megatron_nexus.evaluation.sampling import Sampling

    tokenizer, loaded = trained.tokenizer, trained.load()
    sampling = Sampling(given.temperature, given.top_k, given.top_p)
    ids = encode_prompt(tokenizer, prompt)
    if len(ids) + given.max_new_tokens > loaded.seq_length:
        log.logger.warning(
            "%d tokens of prompt and %d new ones are more than the %d of a training sample: the model has "
            "never seen such positions",
            len(ids),
            given.max_new_tokens,
            loaded.seq_length,
        )
    decoding = Decoding(loaded, [ids], given.max_new_tokens, tokenizer.vocab_size)
    for number in range(given.num_samples):
        if given.num_samples > 1:
            _show(f"--- sample {number + 1} of {given.num_samples}, seed {given.seed + number}\n")
        _show(prompt)
        began, made = time.perf_counter(), 0
        seed = given.seed + number
        for part in continue_text(decoding, tokenizer, ids, given.max_new_tokens, sampling, seed):
            _show(part)
            made += 1
        _show("\n")
        taken_s = time.perf_counter() - began
        made = min(made, given.max_new_tokens)  # the last part is of the end token, or of none
        log.logger.info("%d tokens, %.1f tokens/s", made, made / taken_s)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
