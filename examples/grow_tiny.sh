#!/usr/bin/env bash
# Train the tiny preset, grow its M and A, train on at other topologies; the losses as a picture and numbers:
#   bash examples/grow_tiny.sh [OUT] [flags of the first run, such as --train-iters 50]
# On this machine, in minutes. The run that is not grown reads the same samples: the first losses agree.
# What is there already is not made again: after an interruption give the same command.
set -euo pipefail

out=${1:-grown-tiny}
shift $(($# < 1 ? $# : 1))
# Optimizer steps before growth and after it.
steps=${STEPS:-100}
sizes=${SIZES:---nexus-m 224 --nexus-a 288}
# One schedule over all of it: the base ends in its stable phase, and the rate decays once, over the last fifth.
schedule=(--lr-decay-style WSD --lr-decay-iters "$((2 * steps))" --lr-wsd-decay-iters "$(((2 * steps + 4) / 5))")
go_on=(--train-iters "$((2 * steps))" --load auto)

# How the run lies on its ranks, and how many ranks the grown ones have.
read -ra mesh <<<"${MESH_FLAGS:---tp 2 --pp 2}"
ranks=${RANKS:-4}

nexus train "${mesh[@]}" "${schedule[@]}" --train-iters "$steps" --save "$out/base" --load auto "$@"
# shellcheck disable=SC2086  # sizes holds several words
{ # without sizes the tool reshards
    [ -e "$out/ungrown" ] || nexus grow --load "$out/base" --save "$out/ungrown" "${mesh[@]}"
    [ -e "$out/zero1" ] || nexus grow --load "$out/base" --save "$out/zero1" $sizes --pp 2 --verify
    [ -e "$out/zero3" ] || nexus grow --load "$out/base" --save "$out/zero3" $sizes --verify
}
nexus train "${mesh[@]}" --save "$out/ungrown" "${go_on[@]}"
nexus launch --num_gpus "$ranks" train --pp 2 --zero-stage 1 --save "$out/zero1" "${go_on[@]}"
nexus launch --num_gpus "$ranks" train --micro-batch-size 8 --zero-stage 3 --save "$out/zero3" "${go_on[@]}"

nexus plot "$out/base" "$out/ungrown" "$out/zero1" "$out/zero3" --output "$out/losses.png" \
    --title "grown after step $steps: $sizes"
