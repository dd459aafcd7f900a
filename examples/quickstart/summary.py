"""What the quickstart achieved: the trained model answers a problem, and a table of accuracies.

python examples/quickstart/summary.py OUT_DIR
"""

import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(checkpoint: Path, messages: list[dict[str, str]]) -> str:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompt: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]))


def main() -> None:
    out = Path(sys.argv[1])
    problem = json.loads((out / "heldout.jsonl").read_text().splitlines()[0])
    print(f"question  {problem['prompt'][0]['content']}")
    print(f"answer    {answer(out / 'rl-hf', problem['prompt'])!r}")
    print(f"expected  {problem['reward_model']['ground_truth']}\n")

    print("held-out accuracy at temperature 1.0")
    for stage, name in (("base model", "base"), ("after SFT", "sft"), ("after GPPO", "rl")):
        results = json.loads((out / f"eval-{name}" / "results.json").read_text())
        scores = results["heldout"]
        print(
            f"  {stage:11} avg@{scores['samples_per_problem']} {scores['accuracy']:6.1%} "
            f"± {scores['standard_error']:.1%}"
        )
    print(f"\nreport       {out / 'report.html'}   (open it in a browser)")
    print(f"checkpoint   {out / 'rl-hf'}")
    print(f"TensorBoard  {out / 'rl' / 'tensorboard'}   (tensorboard --logdir {out})")
    print(f"metrics      {out / 'rl' / 'metrics.jsonl'}")
    print(f"rollouts     {out / 'rl' / 'rollouts'}")


if __name__ == "__main__":
    main()
