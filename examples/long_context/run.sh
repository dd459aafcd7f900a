#!/usr/bin/env bash
# A model with 256 tokens of context learns 8,192, by stages. Run it from the repository's root:
#   bash examples/long_context/run.sh
# It starts from nothing each time.
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1

here=examples/long_context
out=runs/long_context
ranks="python -m klear_megatron torchrun --standalone --nproc-per-node 2"
begin=$SECONDS
say() { printf '\n==> [%ss] %s\n' $((SECONDS - begin)) "$1"; }

stage() {  # TOKENS MODEL BATCH_SIZE
  say "stage: $1 tokens"
  $ranks sft $here/stage.yaml --run_dir $out/$1 --policy.path "$2" --data.path $out/$1.jsonl \
    --data.max_length "$1" --batch_size "$3"
  python -m klear_megatron convert $out/$1 $out/$1-hf
}

probe() {  # NAME MODEL
  say "probe: $1"
  $ranks probe $here/probe.yaml --run_dir $out/probe-$1 --policy.path "$2"
}

rm -rf $out/{256,2048,8192}{,-hf} $out/*-long
say "two tiny models and texts"
python $here/prepare_tiny.py $out
stage 256 $out/base 32
python $here/extend.py $out/256-hf $out/plain-long --positions 8192
python $here/extend.py $out/256-hf $out/yarn-long --positions 8192 --yarn
probe before $out/plain-long
probe yarn $out/yarn-long
python $here/extend.py $out/256-hf $out/2048-long --positions 2048 --rope-theta 80000
stage 2048 $out/2048-long 8
python $here/extend.py $out/2048-hf $out/8192-long --positions 8192 --rope-theta 320000
stage 8192 $out/8192-long 4
probe after $out/8192-hf
python $here/compare.py $out/stages.png before=$out/probe-before yarn=$out/probe-yarn \
  after=$out/probe-after
say "done"
