#!/usr/bin/env bash
# From a folder of text to a trained model, on this machine:
#   bash examples/own_corpus.sh TEXTS [OUT] [flags of nexus train, such as --train-iters 1000]
# TEXTS holds .txt, .jsonl or .parquet files, also below folders; everything made goes to OUT (own-corpus).
# What is there already is not made again: after an interruption give the same command.
set -euo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
texts=$1
out=${2:-own-corpus}
shift $(($# < 2 ? $# : 2))
# A small model and vocabulary suit a small text; `nexus presets` lists larger ones.
preset=${PRESET:-nexusformer-tiny}
vocab_size=${VOCAB_SIZE:-4096}

mkdir -p "$out"
[ -e "$out/spm.model" ] ||
    nexus train-tokenizer --input "$texts" --vocab-size "$vocab_size" --output "$out/spm.model"
[ -e "$out/corpus.json" ] ||
    nexus preprocess --input "$texts" --tokenizer-model "$out/spm.model" --output-prefix "$out/corpus"
nexus train --preset "$preset" --vocab-size "$vocab_size" --data-path "$out/corpus" \
    --tokenizer-model "$out/spm.model" --save "$out/run" --save-interval 100 --load auto "$@"
