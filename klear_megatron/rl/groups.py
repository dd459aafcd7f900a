"""One step's rollouts: draw, grade, compare, drop what teaches nothing, and share with all ranks.

The first rank of each model-parallel group leads: it draws and grades its share of the prompts.
Every rank ends up with the whole batch.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from klear_megatron.data import LoadedPrompts, Prompt, PromptSampler
from klear_megatron.evaluation.responses import response_row, write_rows
from klear_megatron.losses import group_advantages
from klear_megatron.models.tokenizer import decode_response
from klear_megatron.observability import Phases, Progress
from klear_megatron.platform import objects
from klear_megatron.policy.batch import Batch
from klear_megatron.rewards import Reward, RewardPool
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.servers import PolicyServers
from klear_megatron.rollout import Generator, Response, Share


@dataclass(frozen=True)
class Group:
    """The responses to one prompt and what they were worth."""

    prompt: Prompt
    prompt_ids: list[int]
    responses: list[Response]
    texts: list[str]
    rewards: list[Reward]
    advantages: list[float]

    @property
    def informative(self) -> bool:
        """Some responses were better than others."""
        return any(self.advantages)


@dataclass(frozen=True)
class Rollouts:
    """What a step trains on, the same on every rank."""

    batch: Batch
    """Of groups of `responses_per_prompt` sequences each. Fields: `loss_mask`, `correct`,
    `advantages`, and `rollout_log_probs`, the servers' own."""
    groups: int
    metrics: dict[str, float]


class RolloutWorker:
    """Makes rollouts; on ranks that do not lead it only takes part in sharing them.

    Args:
        prompts: the sampler hands out indices into them.
        rewards: None on a rank that does not lead; the main rank leads.
    """

    def __init__(
        self,
        config: RLConfig,
        tokenizer: PreTrainedTokenizerBase,
        prompts: LoadedPrompts,
        sampler: PromptSampler,
        servers: PolicyServers,
        rewards: RewardPool | None,
        *,
        leader: int | None,
        leaders: int,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._sampler = sampler
        self._leader, self._leaders = leader, leaders
        leads = objects.all_gather(leader is not None)
        self._leading_ranks = [rank for rank, does in enumerate(leads) if does]
        self.servers, self.rewards = servers, rewards
        self._dumps = config.run_dir / "rollouts"
        self._dumps.mkdir(parents=True, exist_ok=True)

    def collect(self, step: int, phases: Phases) -> Rollouts:
        """Collective. Groups until `prompts_per_step` of them are informative, if the config's
        limit on generation batches allows; possibly none.

        Raises:
            UserError: servers refused a request, or were lost and did not come back.
        """
        wanted = self._config.prompts_per_step
        drawn: list[Group] = []
        for _ in range(self._config.max_generation_batches):
            rows = self._sampler.next_batch(wanted)
            mine = rows[self._leader :: self._leaders] if self._leader is not None else []
            drawn += self._draw(mine, phases)
            informative = [group for group in drawn if group.informative]
            if sum(objects.all_gather(len(informative))) >= wanted:
                break
        if self._leader is not None:
            write_rows(self._dumps / f"step_{step:08}_{self._leader}.jsonl", _rows(drawn))
        with phases("share"):
            share = self._batch(informative), _statistics(drawn), _parts(drawn)
            shared = [objects.broadcast(share, source) for source in self._leading_ranks]
            batches, tables, parts = zip(*shared, strict=True)
        batch = Batch.concatenate(batches)
        size = self._config.responses_per_prompt
        groups = min(wanted, len(batch.lengths) // size)
        metrics = _summary(torch.cat(tables)) | _means(list(chain.from_iterable(parts)))
        metrics["rollout/groups"] = groups
        crashes = self.rewards.crashes if self.rewards is not None else 0
        metrics["reward/crashes"] = sum(objects.all_gather(crashes))  # since the run was started
        return Rollouts(batch.select(range(groups * size)), groups, metrics)

    def _draw(self, rows: Sequence[int], phases: Phases) -> list[Group]:
        """Collective. One group per row, of those that this rank leads."""
        prompts = [self._prompts.prompts[row] for row in rows]
        prompt_ids = [self._prompts.token_ids[row] for row in rows]
        size = self._config.responses_per_prompt
        with phases("generate"):
            drawn = self._generate(prompt_ids)
        if self.rewards is None:
            return []
        with phases("reward"):
            texts = [
                [decode_response(self._tokenizer, response.token_ids) for response in responses]
                for responses in drawn
            ]
            jobs = [
                (prompt.data_source, text, prompt.ground_truth)
                for prompt, answers in zip(prompts, texts, strict=True)
                for text in answers
            ]
            graded = self.rewards.grade(jobs)
        groups = []
        for i, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True)):
            rewards = graded[i * size : (i + 1) * size]
            scores = torch.tensor([reward.score for reward in rewards], dtype=torch.float64)
            advantages = group_advantages(scores, torch.zeros(size, dtype=torch.int64))
            groups.append(Group(prompt, ids, drawn[i], texts[i], rewards, advantages.tolist()))
        return groups

    def _generate(self, prompt_ids: Sequence[list[int]]) -> list[list[Response]]:
        """Collective. The responses to each prompt."""
        drawn: dict[int, list[Response]] = {}

        def draw_missing(generator: Generator) -> None:
            missing = [i for i in range(len(prompt_ids)) if i not in drawn]

            def keep(i: int, responses: list[Response]) -> None:
                drawn[missing[i]] = responses
                progress.advance()

            generator.stream(
                [prompt_ids[i] for i in missing],
                self._config.sampling,
                keep,
                responses_per_prompt=self._config.responses_per_prompt,
                share=Share(self._leader or 0, self._leaders),
            )

        enabled = self._leader == 0
        with Progress("  generate", len(prompt_ids), enabled=enabled, keep=False) as progress:
            self.servers.persist(draw_missing)
        return [drawn[i] for i in range(len(prompt_ids))]

    def _batch(self, groups: Sequence[Group]) -> Batch:
        rows: dict[str, list[Sequence[float]]] = {
            name: []
            for name in ("tokens", "loss_mask", "correct", "advantages", "rollout_log_probs")
        }
        for group in groups:
            for response, reward, advantage in zip(
                group.responses, group.rewards, group.advantages, strict=True
            ):
                prompt, length = group.prompt_ids, len(response.token_ids)
                trained = not (self._config.mask_truncated and response.truncated)
                rows["tokens"].append(prompt + response.token_ids)
                for name, values in {
                    "loss_mask": [float(trained)] * length,
                    "correct": [float(reward.correct)] * length,
                    "advantages": [advantage] * length,
                    "rollout_log_probs": response.log_probs,
                }.items():
                    rows[name].append([0.0] * len(prompt) + values)
        return Batch.from_sequences(rows.pop("tokens"), **rows)  # type: ignore[arg-type]


def _rows(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    for group in groups:
        for text, response, reward, advantage in zip(
            group.texts, group.responses, group.rewards, group.advantages, strict=True
        ):
            yield response_row(group.prompt, text, response, reward, advantage=advantage)


_STATISTICS = ("score", "correct", "formatted", "timed_out", "tokens", "truncated", "informative")


def _statistics(groups: Sequence[Group]) -> Tensor:
    """[responses, len(_STATISTICS)] float64."""
    rows = [
        (
            reward.score,
            reward.correct,
            reward.formatted,
            reward.timed_out,
            len(response.token_ids),
            response.truncated,
            group.informative,
        )
        for group in groups
        for response, reward in zip(group.responses, group.rewards, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).view(-1, len(_STATISTICS))


def _summary(table: Tensor) -> dict[str, float]:
    column = dict(zip(_STATISTICS, table.T, strict=True))
    return {
        "reward/mean": column["score"].mean().item(),
        "reward/accuracy": column["correct"].mean().item(),
        "reward/formatted": column["formatted"].mean().item(),
        "reward/timed_out": column["timed_out"].sum().item(),
        "response/length_mean": column["tokens"].mean().item(),
        "response/length_max": column["tokens"].max().item(),
        "response/truncated": column["truncated"].mean().item(),
        "rollout/dropped_groups": 1 - column["informative"].mean().item(),
        "rollout/tokens": column["tokens"].sum().item(),
    }


def _parts(groups: Sequence[Group]) -> list[dict[str, float]]:
    return [dict(reward.parts) for group in groups for reward in group.rewards]


def _means(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each part of the rewards, over the responses that have it."""
    names = sorted({name for part in parts for name in part})
    return {
        f"reward/{name}": statistics.mean(part[name] for part in parts if name in part)
        for name in names
    }
