#!/usr/bin/env bash
# Train, grow, train on, grow, ... as dependent jobs, each of which begins when the one before has ended well:
#   bash examples/slurm/progressive_scaling.sh                 the tiny preset, whose M and A grow twice
# The Nexusformer paper's chain of 240M, 300M, 380M and 440M (arXiv 2604.19147, Table 6; steps are yours to choose):
#   OUT=/shared/chain STEPS="30000 40000 50000 60000" SBATCH_FLAGS="--nodes=4 --partition=gpu" \
#   CONFIG_FLAGS="--preset nexusformer-240m --data-path corpus --tokenizer-model spm.model" MESH_FLAGS="--tp 2" \
#       bash examples/slurm/progressive_scaling.sh \
#       "--nexus-m 1088 --nexus-a 1228" "--nexus-m 1340 --nexus-a 1530" "--nexus-m 1540 --nexus-a 1730"
#
# Each argument is a growth: sizes and whatever else nexus grow takes. One learning rate schedule over all of it:
# growth in its stable phase, one decay over the last fifth of all steps. A job that is requeued keeps its place
# in the chain; where one fails for good, SLURM cancels those that wait for it. Submit again to go on: what is
# there is not made again.
set -euo pipefail

# nexus must be on the PATH of the shell that submits: activate its environment first.
if [ $# = 0 ]; then
    set -- "--nexus-m 192 --nexus-a 224" "--nexus-m 224 --nexus-a 288"
fi
# Optimizer steps at which each stage ends, counted from the start of the first: one more than there are growths.
read -ra steps <<<"${STEPS:-100 150 200}"
# The first model and its training, but for its length; the grown ones inherit them.
CONFIG_FLAGS=${CONFIG_FLAGS:---preset nexusformer-tiny}
# How each model lies on the ranks.
MESH_FLAGS=${MESH_FLAGS:-}
# Checkpoints go to $OUT/0, $OUT/1, ...
OUT=${OUT:-runs/chain}
# Nodes, tasks and partition of the training jobs, over the #SBATCH lines of pretrain.sbatch; and of growth.
read -ra sbatch_flags <<<"${SBATCH_FLAGS:-}"
read -ra grow_flags <<<"${GROW_SBATCH_FLAGS:-}"
# Tasks of lm-evaluation-harness for the last model; none: no evaluation.
TASKS=${TASKS:-}
# SRUN_FLAGS and CONTAINER start nexus in a container (docs/clusters.md#containers).

if [ ${#steps[@]} != $(($# + 1)) ]; then
    echo "STEPS: $# growths need $(($# + 1)) numbers of steps, not ${#steps[@]} (${steps[*]})" >&2
    exit 2
fi
here=$(dirname "$0")
total=${steps[-1]}
export SAVE_INTERVAL=${SAVE_INTERVAL:-100}
schedule="--lr-decay-style WSD --lr-decay-iters $total --lr-wsd-decay-iters $(((total + 4) / 5))"

before=
# Submit a job that waits for the last one: submit NAME [sbatch's flags] SCRIPT
submit() {
    local waits=()
    if [ -n "$before" ]; then
        waits=("--dependency=afterok:$before" --kill-on-invalid-dep=yes)
    fi
    before=$(sbatch --parsable --job-name="$1" "${waits[@]}" "${@:2}")
    before=${before%%;*} # of several clusters the name follows the number
    echo "$before  $1"
}

# Train stage $1 with the flags $2.
train() {
    CONFIG_FLAGS="$2 $MESH_FLAGS --train-iters ${steps[$1]}" SAVE="$OUT/$1" \
        submit "train-$1" "${sbatch_flags[@]}" "$here/pretrain.sbatch"
}

train 0 "$CONFIG_FLAGS $schedule"
stage=0
for sizes; do
    from=$OUT/$stage
    stage=$((stage + 1))
    if [ ! -e "$OUT/$stage/latest" ]; then
        submit "grow-$stage" --output="nexus-grow-%j.log" "${grow_flags[@]}" \
            --wrap "srun --ntasks=1 ${SRUN_FLAGS:-} ${CONTAINER:-} nexus grow --load '$from' --save '$OUT/$stage' $sizes"
    fi
    train "$stage" ""
done
if [ -n "$TASKS" ]; then
    LOAD="$OUT/$stage" SCORES="$OUT/scores" submit "evaluate" "$here/evaluate.sbatch"
fi
