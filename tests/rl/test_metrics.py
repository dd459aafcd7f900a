"""What the metrics of a step are means of."""

from klear_megatron.rl.metrics import train_metrics


def test_one_wild_mini_batch_is_not_hidden_in_a_mean():
    mini_batches = [{"grad_norm": 1.0, "ratio_max": 2.0}] * 7 + [{"grad_norm": 9.0, "ratio_max": 3}]
    assert train_metrics(mini_batches) == {
        "train/skipped": 0,
        "train/grad_norm": 2.0,
        "train/grad_norm_max": 9.0,
        "train/ratio_max": 3,
    }
