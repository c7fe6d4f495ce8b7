#!/usr/bin/env bash
# The Nexusformer paper's base model: 240M, 100B tokens of FineWeb, context 4,096, batches of 1M tokens.
#   pip install huggingface_hub
#   hf download HuggingFaceFW/fineweb --repo-type dataset --include 'sample/100BT/*' --local-dir fineweb
#   bash examples/pretrain_240m.sh fineweb/sample/100BT [OUT] [flags of nexus train]
# One machine of 8 GPUs; on a cluster make the corpus with slurm/preprocess.sbatch and train with
# slurm/pretrain.sbatch. The preset holds the sizes, the context and the batch: 256 samples x 4,096 tokens.
# What is there already is not made again: after an interruption give the same command.
set -euo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
fineweb=$1
out=${2:-fineweb-240m}
shift $(($# < 2 ? $# : 2))
gpus=${GPUS:-8}
train_tokens=${TRAIN_TOKENS:-100B}

mkdir -p "$out"
[ -e "$out/spm.model" ] ||
    nexus train-tokenizer --input "$fineweb" --vocab-size 32000 --output "$out/spm.model"
[ -e "$out/corpus.json" ] ||
    nexus preprocess --input "$fineweb" --tokenizer-model "$out/spm.model" --output-prefix "$out/corpus"
nexus launch --num_gpus "$gpus" train --preset nexusformer-240m \
    --train-tokens "$train_tokens" --data-path "$out/corpus" --tokenizer-model "$out/spm.model" \
    --save "$out/run" --load auto "$@"
