"""Law: BOS is where lm-evaluation-harness' `hf` backend puts it, on the source and on our export.

Log-likelihoods to 1e-5, or 1e-7 of long texts: transformers rounds norms and angles of a Llama to float32.
"""

import dataclasses
import os
import tempfile
from pathlib import Path

# Before the import: what transformers keeps of the code of a model goes nowhere else.
os.environ |= {"HF_HOME": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1"}

import pytest
import torch
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_nexus.checkpoint.manifest import MANIFEST_FILE, manifest_to_json, read_manifest
from megatron_nexus.checkpoint.saved_run import saved_config
from megatron_nexus.cli.import_hf import configuration
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.evaluation.harness import NexusLM
from megatron_nexus.evaluation.local_scorer import LocalScorer
from megatron_nexus.evaluation.perplexity import measure_perplexity
from megatron_nexus.evaluation.tasks import open_tasks
from megatron_nexus.growth.checkpoint_tokenizer import tokenizer_record
from megatron_nexus.interchange.export import export_checkpoint
from megatron_nexus.interchange.import_checkpoint import import_checkpoint
from megatron_nexus.interchange.safetensors_folder import open_folder
from tests.support import eval_model
from tests.support.task_files import ITEMS, write_task_files

pytestmark = pytest.mark.slow  # the imports

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
TOLERANCE = 1e-5
TEXT = "The old man opens the door at night.  Why?\nNobody knows the answer.\n" * 9
PAIRS = [("", "She opens the door"), (TEXT, " the end"), ("A boy ", " sees"), ("A boy", " sees the lamp")]
PROMPTS = ["She opens", "The old man paints the river, and then he", "Nobody forgets the"]


def write_llama(folder: Path, prepends: bool) -> None:
    """A random Llama whose tokenizer names a BOS token, and puts it before texts or does not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(eval_model.TEXTS, trainer)
    bytes_only = processors.ByteLevel(trim_offsets=False)
    template = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.post_processor = processors.Sequence([bytes_only, template]) if prepends else bytes_only
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    made.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=eval_model.SEQ_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def ours(checkpoint: Path, export: Path) -> NexusLM:
    """A checkpoint as evaluate.py sees it; exported on the way."""
    manifest = read_manifest(checkpoint)
    config = saved_config(checkpoint, manifest)
    tokenizer = find_tokenizer(config, tokenizer_record(manifest))
    assert tokenizer is not None
    export_checkpoint(checkpoint, export, config, tokenizer, "fp32", 10**9)
    loaded = eval_model.load(checkpoint, config)
    scorer = LocalScorer(loaded)
    model = NexusLM(scorer, tokenizer, loaded)
    rolled = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)])
    assert measure_perplexity(scorer, tokenizer, TEXT).log_likelihood == pytest.approx(rolled[0])
    return model


def assert_same(mine: NexusLM, folder: Path, tasks: object) -> None:
    theirs = HFLM(str(folder), dtype="float64", device="cpu", batch_size=3)
    found = [
        evaluate(lm=model, task_dict={"tasks": tasks}, bootstrap_iters=0)["samples"]["piqa"]
        for model in (mine, theirs)
    ]
    assert len(found[0]) == ITEMS
    for one, other in zip(*found, strict=True):
        log_ps = [[log_p for log_p, _ in item["filtered_resps"]] for item in (one, other)]
        assert log_ps[0] == pytest.approx(log_ps[1], abs=TOLERANCE, rel=1e-7)
        assert (one["acc"], one["acc_norm"]) == (other["acc"], other["acc_norm"])
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    assert [p for p, _ in mine.loglikelihood(asked)] == pytest.approx(
        [p for p, _ in theirs.loglikelihood(asked)], abs=TOLERANCE, rel=1e-7
    )
    rolled = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate((TEXT, "She"))]
    assert mine.loglikelihood_rolling(rolled) == pytest.approx(
        theirs.loglikelihood_rolling(rolled), abs=TOLERANCE, rel=1e-7
    )
    settings = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, dict(settings)), i) for i, prompt in enumerate(PROMPTS)]
    assert mine.generate_until(asked) == theirs.generate_until(asked)


@pytest.mark.parametrize("prepends", [True, False])
def test_an_import_is_scored_as_its_source_and_as_its_export(tmp_path: Path, prepends: bool) -> None:
    write_llama(tmp_path / "hf", prepends)
    tasks = dict(open_tasks(["piqa"], write_task_files(tmp_path)))
    source = open_folder(tmp_path / "hf")
    checkpoint = import_checkpoint(source, tmp_path / "hf", tmp_path / "run", configuration(source))
    mine = ours(checkpoint, tmp_path / "export")
    assert mine.tok_encode("She")[0] == 0 if prepends else mine.tok_encode("She")[0] != 0
    assert_same(mine, tmp_path / "hf", tasks)
    assert_same(mine, tmp_path / "export", tasks)


def test_a_model_trained_without_bos_is_exported_without_it_and_the_other_way_round(tmp_path: Path) -> None:
    tasks = dict(open_tasks(["piqa"], write_task_files(tmp_path)))
    for prepends in (True, False):
        root = tmp_path / str(prepends)
        write_llama(root / "hf", prepends)
        source = open_folder(root / "hf")
        checkpoint = import_checkpoint(source, root / "hf", root / "run", configuration(source))
        trained = dataclasses.replace(read_manifest(checkpoint), prepend_bos=not prepends)
        (checkpoint / MANIFEST_FILE).write_text(manifest_to_json(trained))
        mine = ours(checkpoint, root / "export")
        exported = AutoTokenizer.from_pretrained(root / "export")
        assert exported("She").input_ids == mine.tok_encode("She")
        assert exported.bos_token_id == (None if prepends else 0)
        assert (mine.tok_encode("She")[0] == 0) is not prepends
        assert_same(mine, root / "export", tasks)
        # What comes back begins texts as the model that went out.
        source = open_folder(root / "export")
        back = import_checkpoint(source, root / "export", root / "back", configuration(source))
        assert ours(back, root / "again").tok_encode("She") == mine.tok_encode("She")
