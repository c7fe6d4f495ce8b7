"""Law: scores are those of lm-evaluation-harness' own `hf` backend on the exported model, item by item.

Both in float64, of the same checkpoint: log-likelihoods to 1e-10, the rounding of sums over a few dozen
tokens; accuracies, greedy flags and generated texts exactly.
"""

import os
import tempfile
from collections.abc import Mapping

# Before the import: what transformers keeps of the code of a model goes nowhere else.
os.environ |= {"HF_HOME": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1"}

import pytest
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_nexus.evaluation.harness import NexusLM
from megatron_nexus.evaluation.local_scorer import LocalScorer
from megatron_nexus.evaluation.task_files import PAPER_TASKS
from megatron_nexus.evaluation.tasks import Tasks, open_tasks
from megatron_nexus.interchange.export import export_checkpoint
from tests.support import eval_model
from tests.support.task_files import ITEMS, write_task_files

pytestmark = pytest.mark.slow  # the imports

# transformers' own classes round their norms and angles to float32, whatever the model's type.
TOLERANCES = {"nexusformer": 1e-10, "qwen3": 1e-5}
KINDS: dict[str, dict[str, object]] = {
    "nexusformer": {},
    "qwen3": {"projection": "linear", "num_query_groups": 1, "qk_layernorm": True},
}
TEXT = "The old man opens the door at night.  Why?\nNobody knows the answer.\n" * 9


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    return open_tasks(PAPER_TASKS, write_task_files(tmp_path_factory.mktemp("tasks")))


@pytest.fixture(scope="module", params=KINDS)
def backends(
    request: pytest.FixtureRequest,
    tokenizer: SentencePieceTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[LM, LM, float]:
    """Ours on a checkpoint, theirs on what it was exported to, and how far they may differ."""
    root = tmp_path_factory.mktemp("law")
    # transformers may generate ids that no piece stands for: there are none.
    options = {"vocab_size": eval_model.PIECES, **KINDS[request.param]}
    checkpoint, config = eval_model.write_run(root / "run", tokenizer.model_path, **options)
    export_checkpoint(checkpoint, root / "hf", config, tokenizer, "fp32", 10**9)
    loaded = eval_model.load(checkpoint, config)
    ours = NexusLM(LocalScorer(loaded, tokens_per_pass=512), tokenizer, loaded)
    theirs = HFLM(str(root / "hf"), dtype="float64", device="cpu", batch_size=5, trust_remote_code=True)
    return ours, theirs, TOLERANCES[request.param]


def samples(model: LM, tasks: Tasks) -> Mapping[str, list[dict]]:
    return evaluate(lm=model, task_dict={"tasks": dict(tasks)}, bootstrap_iters=0)["samples"]


def test_scores_are_those_of_the_hf_backend_item_by_item(
    backends: tuple[LM, LM, float], tasks: Tasks
) -> None:
    *models, tolerance = backends
    ours, theirs = (samples(model, tasks) for model in models)
    for task in PAPER_TASKS:
        assert len(ours[task]) == len(theirs[task]) == ITEMS
        for mine, other in zip(ours[task], theirs[task], strict=True):
            assert mine["arguments"] == other["arguments"]
            for (log_p, greedy), (their_log_p, their_greedy) in zip(
                mine["filtered_resps"], other["filtered_resps"], strict=True
            ):
                assert log_p == pytest.approx(their_log_p, abs=tolerance)
                assert greedy == their_greedy
            assert (mine["acc"], mine["acc_norm"]) == (other["acc"], other["acc_norm"])


def test_so_are_texts_without_context_and_longer_than_a_sample(backends: tuple[LM, LM, float]) -> None:
    pairs = [("", "She opens the door"), (TEXT, " the end"), ("A boy ", " sees"), ("A boy", " sees the lamp")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    rolled = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate((TEXT, "She"))]
    ours, theirs, tolerance = backends
    for mine, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert mine == (pytest.approx(other[0], abs=tolerance), other[1])
    assert ours.loglikelihood_rolling(rolled) == pytest.approx(
        theirs.loglikelihood_rolling(rolled), abs=tolerance
    )


def test_so_are_generated_texts(
    backends: tuple[LM, LM, float], tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["She opens", "Nobody forgets the", "The old man paints the river, and then he"]
    settings = {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, dict(settings)), i) for i, prompt in enumerate(prompts)]
    ours, theirs, _ = backends

    # Bytes that are no UTF-8, which a model of random weights writes, look different in each library.
    def decode(ids: list[int], skip_special_tokens: bool = True) -> str:
        return tokenizer.decode(ids) if skip_special_tokens else "</s>"

    monkeypatch.setattr(theirs, "tok_decode", decode)
    texts = ours.generate_until(asked)
    assert texts == theirs.generate_until(asked)
    assert any("e" not in text and len(text) > 3 for text in texts)
