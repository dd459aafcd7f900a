"""No prompt is lost when servers are killed, and they come back with the trainer's weights."""

from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from klear_megatron.rollout import (
    GenerationError,
    Generator,
    Response,
    SamplingConfig,
    ServersLostError,
)
from tests.models import tiny
from tests.rollout.conftest import CONFIG
from tests.servers import log_prob_difference, server_at, syncing

SAMPLING = SamplingConfig(max_response_length=150)
PROMPTS = tiny.random_sequences([5] * 60, seed=3)


def generator(urls: list[str], **options: Any) -> Generator:
    # Few at a time, so that most prompts are not drawn yet when a server is killed.
    config = CONFIG.model_copy(update={"max_running_requests": 8})
    return Generator(urls, config, vocab_size=tiny.VOCAB, stop_token_ids=[], **options)


def kill_when_done(count: int, urls: list[str], then: dict[int, list[Response]]) -> Any:
    """An `on_done` that stores the responses to each prompt and kills servers after `count`."""

    def on_done(position: int, responses: list[Response]) -> None:
        assert position not in then
        then[position] = responses
        if len(then) == count:
            for url in urls:
                server_at(url).kill()

    return on_done


def difference(model: PreTrainedModel, drawn: dict[int, list[Response]]) -> float:
    """The largest difference between the servers' log-probabilities and Hugging Face's."""
    return max(
        log_prob_difference(model, PROMPTS[position], response)
        for position, (response,) in drawn.items()
    )


def test_prompts_of_a_killed_server_are_answered_and_it_comes_back(servers):
    url = servers.urls[1]
    before = server_at(url).cmdline()
    drawn: dict[int, list[Response]] = {}
    client = generator(servers.urls, servers=servers.running)
    client.stream(PROMPTS, SAMPLING, kill_when_done(10, [url], drawn))
    assert sorted(drawn) == list(range(len(PROMPTS)))
    assert difference(tiny.load(servers.checkpoint), drawn) < 1e-4
    # The killed server is starting; a generator that has no other waits for it.
    assert len(generator([url], servers=servers.running).generate(PROMPTS[:4], SAMPLING)) == 4
    # With its old seed it would draw the same responses again.
    after = server_at(url).cmdline()
    seed = before.index("--random-seed") + 1
    assert after[:seed] + after[seed + 1 :] == before[:seed] + before[seed + 1 :]
    assert after[seed] != before[seed]


def test_what_is_missing_can_be_drawn_when_all_servers_were_killed_and_are_back(servers):
    client = generator(servers.urls)
    drawn: dict[int, list[Response]] = {}
    with pytest.raises(ServersLostError, match="no server is left: http://"):
        client.stream(PROMPTS, SAMPLING, kill_when_done(10, servers.urls, drawn))
    assert client.lost == set(servers.urls)
    assert 10 <= len(drawn) < len(PROMPTS)
    with pytest.raises(ServersLostError, match="all have been lost before"):
        client.generate(PROMPTS, SAMPLING)

    servers.running.restore(client.lost)
    client.lost.clear()
    missing = [i for i in range(len(PROMPTS)) if i not in drawn]
    rest = client.generate([PROMPTS[i] for i in missing], SAMPLING)
    drawn |= dict(zip(missing, rest, strict=True))
    assert difference(tiny.load(servers.checkpoint), drawn) < 1e-4


def _weights(checkpoint: Path, seed: int) -> dict[str, torch.Tensor]:
    """The checkpoint's weights with noise added."""
    torch.manual_seed(seed)
    named = tiny.load(checkpoint).named_parameters()
    return {name: (tensor + 0.1 * torch.randn_like(tensor)).detach() for name, tensor in named}


def test_server_that_comes_back_is_not_used_before_it_has_current_weights(servers):
    killed, other = servers.urls
    model = tiny.load(servers.checkpoint)
    own = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    with syncing(servers.urls, CONFIG, own) as sync:
        sync.push(iter(_weights(servers.checkpoint, 1).items()), version=1)
        server_at(killed).kill()
        servers.running.restore()
        # It answers, but with the weights of its checkpoint.
        client = generator(servers.urls)
        client.weight_versions = frozenset({"1"})
        drawn = client.generate(PROMPTS, SAMPLING)
        assert {response.weight_version for (response,) in drawn} == {"1"}
        assert client.lost == {killed}

        for version, weights in ((2, _weights(servers.checkpoint, 2)), (3, own)):
            sync.push(iter(weights.items()), version=version)
            model.load_state_dict(weights)
            for url in (killed, other):
                client = generator([url])
                client.weight_versions = frozenset({str(version)})
                drawn = client.generate(PROMPTS[:8], SAMPLING)
                assert difference(model, dict(enumerate(drawn))) < 1e-4


def test_prompt_that_is_never_answered_is_named(servers, capsys):
    settings = {"request_timeout_s": 0.01, "token_timeout_s": 0, "max_running_requests": 1}
    impatient = CONFIG.model_copy(update=settings)
    client = Generator(servers.urls[:1], impatient, vocab_size=tiny.VOCAB, stop_token_ids=[])
    with pytest.raises(GenerationError, match=r"prompt 0: no answer to 3 requests; .*within 0.0 s"):
        client.generate(PROMPTS[:1], SAMPLING)
    assert capsys.readouterr().out.count("it is asked again") == 2
    assert not client.lost


def test_one_prompt_alone_is_not_to_blame_for_two_servers(servers):
    # The prompt must not be given to a server that is known to be lost.
    client = servers.generator()

    def kill() -> None:
        for url in servers.urls:
            server_at(url).kill()

    soon = Timer(0.3, kill)
    soon.start()
    try:
        with pytest.raises(ServersLostError, match="no server is left"):
            client.generate(
                PROMPTS[:1], SamplingConfig(max_response_length=240), responses_per_prompt=8
            )
        assert client.lost == set(servers.urls)
    finally:
        soon.join()
        servers.running.restore(client.lost)
