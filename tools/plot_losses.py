"""Plots each loss's value and gradient over the ratio, as the package computes them.

    python -m tools.plot_losses docs/losses.svg

Responses of one token, whose old probability is 0.3, with the default options of each loss.
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from klear_megatron.losses import LossConfig, LossInputs, Sequences
from klear_megatron.losses.registry import default_losses, resolve_loss

RATIOS = torch.linspace(0.01, 2.5, 500, dtype=torch.float64)
OLD_LOG_PROB = math.log(0.3)
SIGNS = {1.0: ("#0072B2", "A = +1"), -1.0: ("#D55E00", "A = −1")}


def value_and_gradient(config: LossConfig, advantage: float) -> tuple[Tensor, Tensor]:
    """The loss at each of RATIOS, and its derivative by the token's log-probability."""
    log_probs = (RATIOS.log() + OLD_LOG_PROB).requires_grad_()
    inputs = LossInputs(
        log_probs=log_probs,
        old_log_probs=torch.full_like(RATIOS, OLD_LOG_PROB),
        advantages=torch.full_like(RATIOS, advantage),
        mask=torch.ones_like(RATIOS),
        sequences=Sequences.whole([1] * len(RATIOS)),
        entropy=torch.zeros_like(RATIOS),
    )
    values = resolve_loss(config)(inputs).values
    (gradient,) = torch.autograd.grad(values.sum(), log_probs)
    return values.detach(), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s OUT")
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    plt.rcParams |= {"svg.hashsalt": "losses", "svg.fonttype": "none", "font.size": 9}
    figure, rows = plt.subplots(3, 6, figsize=(13, 7), sharex=True, layout="constrained")
    for config, pair in zip(default_losses(), rows.reshape(-1, 2), strict=True):
        for advantage, (colour, label) in SIGNS.items():
            for axes, values in zip(pair, value_and_gradient(config, advantage), strict=True):
                axes.plot(RATIOS, values, color=colour, label=label, linewidth=1.8)
        for axes, title in zip(pair, ("value", "gradient"), strict=True):
            axes.set_title(f"{config.name}: {title}")
            axes.axvline(1, color="0.75", linewidth=0.8, zorder=0)
            axes.axhline(0, color="0.75", linewidth=0.8, zorder=0)
            axes.set_ylim(-3.4, 3.4)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in rows[-1]:
        axes.set_xlabel("ratio δ")
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
