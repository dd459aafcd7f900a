#!/usr/bin/env bash
# The whole loop on one machine, about ten minutes on two CPU cores. Run it from the repository's
# root, through `make quickstart`. It starts from nothing each time.
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1

here=examples/quickstart
out=runs/quickstart
train="klear-megatron torchrun --standalone --nproc-per-node 2"
begin=$SECONDS
say() { printf '\n==> [%ss] %s\n' $((SECONDS - begin)) "$1"; }

rm -rf "$out"
say "1/10 a tiny Qwen3 base model and arithmetic problems"
python $here/prepare.py $out --seed 0
say "2/10 accuracy of the base model"
klear-megatron eval $here/eval.yaml --model $out/base --run_dir $out/eval-base
say "3/10 supervised fine-tuning: Megatron-Core on two ranks"
$train sft $here/sft.yaml
say "4/10 the fine-tuned model in Hugging Face format"
klear-megatron convert $out/sft $out/sft-hf
say "5/10 accuracy after fine-tuning"
klear-megatron eval $here/eval.yaml --model $out/sft-hf --run_dir $out/eval-sft
say "6/10 reinforcement learning with GPPO: two ranks and an SGLang server"
$train rl $here/rl.yaml
say "7/10 the trained model in Hugging Face format"
klear-megatron convert $out/rl $out/rl-hf
say "8/10 accuracy after reinforcement learning"
klear-megatron eval $here/eval.yaml --model $out/rl-hf --run_dir $out/eval-rl
say "9/10 a page to look at"
klear-megatron report $out
say "10/10 the result, loaded and answering with Transformers"
python $here/summary.py $out
say "done"
