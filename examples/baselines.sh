#!/usr/bin/env bash
# Trains the tiny model of each family on the built-in corpus, one after the other, on the same samples in the
# same order, and shows their validation losses, true sizes and costs:
#   bash examples/baselines.sh [OUT] [flags of nexus train, such as --train-iters 1000]
# Everything made goes to OUT (baselines). PRESETS names other models, as in PRESETS="qwen3-240m nexusformer-240m".
# What is there already is not trained again: after an interruption give the same command.
set -euo pipefail

out=${1:-baselines}
shift $(($# < 1 ? $# : 1))
presets=${PRESETS:-$(python -c 'from megatron_nexus.config.presets import PRESETS
print(*[name for name in PRESETS if name.endswith("-tiny")])')}

for preset in $presets; do
    nexus train --preset "$preset" --save "$out/$preset" --load auto "$@"
done

python - "$out" "$presets" <<'PYTHON'
import json
import sys
from pathlib import Path

from megatron_nexus.cli.count import count
from megatron_nexus.training.metrics import METRICS_FILE, read_metrics

out, presets = Path(sys.argv[1]), sys.argv[2].split()
print("\n| model | parameters | without vocabulary | tokens | training FLOPs | validation loss, nats/token |")
print("|---|---:|---:|---:|---:|---:|")
for preset in presets:
    cost = json.loads("\n".join(count(["--load", str(out / preset), "--json"])))
    records = read_metrics(out / preset / METRICS_FILE)
    tokens = max(record["tokens"] for record in records if "tokens" in record)
    losses = [record["validation_loss"] for record in records if record.get("name") == "validation"]
    flops = tokens * cost["flops_per_token"]["forward_and_backward"]
    print(
        f"| {preset} | {cost['parameters']:,} | {cost['non_embedding_parameters']:,} | {tokens:,} | {flops:.2e} "
        f"| {losses[-1]:.4f} |"
    )
print("\nOne seed each, at settings that were tuned for none of them and at unequal sizes: this shows that")
print("all of them train, and says nothing about how the families compare at the paper's sizes.")
PYTHON
