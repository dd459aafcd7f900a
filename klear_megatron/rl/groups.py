"""Groups: the responses to one prompt, drawn, graded and compared with each other.

A group is graded as soon as its responses are there, while others are still drawn.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from klear_megatron.data import LoadedPrompts, Prompt
from klear_megatron.losses import AdvantageConfig, advantages_of
from klear_megatron.models.tokenizer import decode_response
from klear_megatron.platform import heartbeat, stop
from klear_megatron.rewards import Job, Reward, RewardPool
from klear_megatron.rl.config import RLConfig
from klear_megatron.rollout import Generator, Response, Share

_GRADED_AT_ONCE = 64
"""Groups; each takes a thread that waits for the pool's processes or for an async reward."""


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, and what they were worth."""

    prompt: Prompt
    prompt_ids: list[int]
    responses: list[Response]
    texts: list[str]
    rewards: list[Reward]
    advantages: list[float]
    """Over each other, before a step's are whitened."""
    drop_equal: bool = True
    """Whether it is dropped if no response was better than another."""

    @property
    def informative(self) -> bool:
        """Whether it is trained on."""
        return not self.drop_equal or min(self.advantages) < max(self.advantages)


def compared(
    prompt: Prompt,
    prompt_ids: list[int],
    responses: list[Response],
    texts: list[str],
    rewards: list[Reward],
    config: AdvantageConfig,
) -> Group:
    """The group of these responses, with their advantages over each other.

    Raises:
        UserError: a reward does not have a part that the config names.
    """
    scores = [reward.score for reward in rewards]
    advantages = advantages_of(scores, [reward.parts for reward in rewards], config)
    return Group(prompt, prompt_ids, responses, texts, rewards, advantages, config.drop_equal)


def penalised(reward: Reward, length: int, config: RLConfig) -> Reward:
    """The reward of a response of so many tokens, less the overlong penalty, which becomes a part
    of it."""
    if config.overlong is None:
        return reward
    free = config.sampling.max_response_length - config.overlong.buffer
    share = min(max(length - free, 0) / config.overlong.buffer, 1.0)
    penalty = -config.overlong.penalty * share
    parts = {**reward.parts, "overlong": penalty}
    return replace(reward, score=reward.score + penalty, parts=parts)


class GroupMaker:
    """Turns the prompts of one leader into groups; a context manager that ends its threads.

    Args:
        share: which of the leaders this is.
    """

    def __init__(
        self,
        config: RLConfig,
        tokenizer: PreTrainedTokenizerBase,
        rewards: RewardPool,
        share: Share,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self.rewards = rewards
        self.share = share
        self._threads = ThreadPoolExecutor(_GRADED_AT_ONCE, thread_name_prefix="grade")

    def __enter__(self) -> "GroupMaker":
        return self

    def __exit__(self, *exception: object) -> None:
        # Those that wait for a grade end with the pool.
        self._threads.shutdown(wait=False, cancel_futures=True)

    def start(self, prompts: LoadedPrompts, rows: Sequence[int]) -> "Making":
        """The groups of these rows of the prompts, none of them drawn yet."""
        questions = [(prompts.prompts[row], prompts.token_ids[row]) for row in rows]
        return Making(questions, self)

    def draw(
        self,
        generator: Generator,
        prompt_ids: Sequence[list[int]],
        keep: Callable[[int, list[Response]], None],
    ) -> None:
        """Calls `keep` with the position of each prompt as its responses arrive."""
        generator.stream(
            prompt_ids,
            self._config.sampling,
            keep,
            responses_per_prompt=self._config.responses_per_prompt,
            share=self.share,
        )

    async def drawing(
        self,
        generator: Generator,
        prompt_ids: Iterable[Sequence[int] | None],
        keep: Callable[[int, list[Response]], None],
    ) -> None:
        """`draw` as a coroutine; see `Generator.streaming`."""
        await generator.streaming(
            prompt_ids,
            self._config.sampling,
            keep,
            responses_per_prompt=self._config.responses_per_prompt,
            share=self.share,
        )

    def grade(
        self, prompt: Prompt, prompt_ids: list[int], responses: list[Response]
    ) -> Future[Group]:
        """The group, graded and compared, in the background."""

        def grade() -> Group:
            texts = [self.text_of(one.token_ids) for one in responses]
            jobs = [
                Job(
                    prompt.data_source,
                    text,
                    prompt.ground_truth,
                    prompt=prompt.messages,
                    extra_info=prompt.extra_info,
                    response_length=len(response.token_ids),
                    index=prompt.index,
                )
                for text, response in zip(texts, responses, strict=True)
            ]
            graded = self.rewards.grade(jobs, lambda _: heartbeat.beat())
            rewards = [
                penalised(reward, len(response.token_ids), self._config)
                for reward, response in zip(graded, responses, strict=True)
            ]
            advantages = self._config.advantages
            return compared(prompt, prompt_ids, responses, texts, rewards, advantages)

        return self._threads.submit(grade)

    def text_of(self, token_ids: list[int]) -> str:
        """The text of a response."""
        return decode_response(self._tokenizer, token_ids)


class Making:
    """The groups of some prompts while they are made."""

    def __init__(self, questions: Sequence[tuple[Prompt, list[int]]], maker: GroupMaker) -> None:
        self._questions = questions
        self._maker = maker
        self._groups: dict[int, Future[Group]] = {}
        self._failed: list[Future[Group]] = []

    def draw(self, generator: Generator, on_drawn: Callable[[], None]) -> None:
        """Returns when all responses are there. Where servers were lost, call it again: it draws
        what is missing.

        Args:
            on_drawn: is called for each group that has its responses.

        Raises:
            UserError: a server refused a request, or all were lost; or a reward function failed,
                which ends the drawing.
        """
        missing = [i for i in range(len(self._questions)) if i not in self._groups]

        def keep(position: int, responses: list[Response]) -> None:
            for failed in self._failed:
                failed.result()
            i = missing[position]
            self._groups[i] = self._maker.grade(*self._questions[i], responses)
            self._groups[i].add_done_callback(note_failure)
            on_drawn()

        def note_failure(group: Future[Group]) -> None:
            if not group.cancelled() and group.exception() is not None:
                self._failed.append(group)

        self._maker.draw(generator, [self._questions[i][1] for i in missing], keep)

    def finish(self) -> list[Group]:
        """All groups, in the prompts' order, once they are graded.

        Raises:
            UserError: a reward function returned something else than a reward.
            Stopped: this process was told to stop.
        """
        return [stop.result_of(self._groups[i]) for i in range(len(self._questions))]
