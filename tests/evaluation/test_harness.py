"""The harness asks our model: tasks from local files, and the answers it gets; generation up to a stop."""

import json
import logging
import random
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_nexus.errors import ConfigError, DataError
from megatron_nexus.evaluation.harness import NexusLM, require_scoring, run_harness
from megatron_nexus.evaluation.loaded_model import LoadedModel
from megatron_nexus.evaluation.local_scorer import LocalScorer
from megatron_nexus.evaluation.perplexity import measure_perplexity, windows
from megatron_nexus.evaluation.results import task_table
from megatron_nexus.evaluation.task_files import PAPER_TASKS
from megatron_nexus.evaluation.tasks import open_tasks
from megatron_nexus.models.scores import Request
from tests.support.task_files import ITEMS, write_task_files

pytestmark = pytest.mark.slow  # the imports

TEXT = "The old man opens the door at night.  Why?\nNobody knows \U0001f680.\n" * 7


def log_p(loaded: LoadedModel, tokenizer: SentencePieceTokenizer, context: str, continuation: str) -> float:
    """By the text as a whole, which the model sees the end of."""
    ids, count = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    request = Request(tuple(ids[:count]), tuple(ids[count:]))
    return LocalScorer(loaded).score([request])[0].log_likelihood


def test_a_task_from_a_file_scores_twice_alike(
    loaded: LoadedModel, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    folder = write_task_files(tmp_path)
    tasks = open_tasks(PAPER_TASKS, folder)
    assert tuple(tasks) == PAPER_TASKS
    hub = logging.getLogger("huggingface_hub.utils._http")
    assert not hub.isEnabledFor(logging.WARNING), "each try to reach the hub would be a line"
    model = NexusLM(LocalScorer(loaded), tokenizer, loaded)
    states = (random.getstate(), torch.get_rng_state())
    results = run_harness(model, tasks)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    again = run_harness(model, {"piqa": tasks["piqa"]})
    assert again["piqa"] == results["piqa"], "a task can be asked again"
    # The first task by hand: the likelier of two solutions, per character for acc_norm.
    right, right_norm = 0, 0
    for record in tasks["piqa"].test_docs():
        context = f"Question: {record['goal']}\nAnswer:"
        sums = [log_p(loaded, tokenizer, context, " " + record[name]) for name in ("sol1", "sol2")]
        means = [value / len(record[name]) for value, name in zip(sums, ("sol1", "sol2"), strict=True)]
        right += sums.index(max(sums)) == record["label"]
        right_norm += means.index(max(means)) == record["label"]
    found = results["piqa"]
    assert found.items == ITEMS
    assert found.metrics == {"acc": right / ITEMS, "acc_norm": right_norm / ITEMS}
    assert found.standard_errors.keys() == found.metrics.keys()
    table = task_table(results)
    assert table[0].split() == [*PAPER_TASKS, "average"]
    assert table[1].split()[:2] == ["acc", f"{100 * right / ITEMS:.2f}"]
    assert run_harness(model, {"piqa": tasks["piqa"]}, limit=3)["piqa"].items == 3


def test_a_question_is_not_its_own_example(tmp_path: Path) -> None:
    goals = [f"goal {number};" for number in range(ITEMS)]
    lines = [json.dumps({"goal": goal, "sol1": "a", "sol2": "b", "label": 0}) for goal in goals]
    (tmp_path / "piqa.jsonl").write_text("\n".join(lines))
    task = open_tasks(["piqa"], tmp_path, num_fewshot=ITEMS - 1)["piqa"]
    for goal, doc in zip(goals, task.test_docs(), strict=True):
        prompt = task.fewshot_context(doc, ITEMS - 1)
        assert [prompt.count(each) for each in goals] == [1] * ITEMS
        assert goal in prompt.split("\n\n")[-1]
    with pytest.raises(ConfigError, match=f"at most {ITEMS - 1}"):
        open_tasks(["piqa"], tmp_path, num_fewshot=ITEMS)
    hellaswag = open_tasks(["hellaswag"], write_task_files(tmp_path), num_fewshot=2)["hellaswag"]
    assert hellaswag.fewshot_context(next(iter(hellaswag.test_docs())), 2).count("Washing dishes") == 3


def test_wrong_tasks_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no file arc_easy\.jsonl"):
        open_tasks(["arc_easy"], tmp_path)
    folder = write_task_files(tmp_path)
    task = open_tasks(["piqa"], folder)["piqa"]
    require_scoring({"piqa": task})
    task.OUTPUT_TYPE = "generate_until"
    with pytest.raises(ConfigError, match=r"piqa has the model generate text.*nexus evaluate"):
        require_scoring({"piqa": task})


def greedy(loaded: LoadedModel, tokenizer: SentencePieceTokenizer, prompt: str, count: int) -> str:
    ids = tokenizer.encode(prompt)
    made: list[int] = []
    for _ in range(count):
        logits_V = loaded.decoder(torch.tensor([[*ids, *made]]))[-1, 0, : tokenizer.vocab_size]
        made.append(int(logits_V.argmax()))
        if made[-1] == tokenizer.eod_id:
            return tokenizer.decode(made[:-1])
    return tokenizer.decode(made)


def ask(model: NexusLM, prompts: list[str], **settings: object) -> list[str]:
    return model.generate_until(
        [Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)]
    )


def test_texts_are_generated_up_to_a_stop(loaded: LoadedModel, tokenizer: SentencePieceTokenizer) -> None:
    model = NexusLM(LocalScorer(loaded), tokenizer, loaded)
    prompts = ["She", "The old man paints", "Nobody forgets the"]
    whole = [greedy(loaded, tokenizer, prompt, 12) for prompt in prompts]
    assert all(len(text) > 4 for text in whole)
    assert ask(model, prompts, until=["\0"], max_gen_toks=12) == whole
    stop = whole[0][3]
    cut = ask(model, prompts, until=[stop], max_gen_toks=12)
    assert cut == [text.split(stop)[0] for text in whole]
    drawn = [ask(model, prompts, until=[], max_gen_toks=9, do_sample=True, temperature=2.0) for _ in "ab"]
    assert drawn[0] == drawn[1] != ask(model, prompts, until=[], max_gen_toks=9)
    long = " ".join(prompts * 20)
    seen = tokenizer.decode(tokenizer.encode(long)[-(loaded.seq_length - 5) :])
    assert ask(model, [long], until=[], max_gen_toks=5) == [greedy(loaded, tokenizer, seen, 5)]
    with pytest.raises(DataError, match="48 new tokens, and the model sees 48"):
        ask(model, prompts, until=[], max_gen_toks=48)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 30])
def test_windows_of_perplexity_are_those_of_the_harness(count: int) -> None:
    tokens = list(range(100, 100 + count))
    theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, 0, max_seq_len=8, context_len=1))
    assert [(list(w.context), list(w.continuation)) for w in windows(tokens, 0, 8, 8)] == list(theirs)


def test_perplexity_is_the_rolling_log_likelihood_of_the_harness(
    loaded: LoadedModel, tokenizer: SentencePieceTokenizer
) -> None:
    scorer = LocalScorer(loaded)
    assert len(tokenizer.encode(TEXT)) > 3 * loaded.seq_length
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate((TEXT, "A boy"))]
    rolled = NexusLM(scorer, tokenizer).loglikelihood_rolling(asked)
    found = [measure_perplexity(scorer, tokenizer, text).log_likelihood for text in (TEXT, "A boy")]
    assert found == pytest.approx(rolled, abs=1e-11)
