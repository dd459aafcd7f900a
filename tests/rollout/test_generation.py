"""Real servers return what was asked for, with the numbers that Hugging Face computes."""

import httpx
import pytest
import torch

from klear_megatron.errors import UserError
from klear_megatron.rollout import GenerationError, Generator, SamplingConfig
from tests.models import tiny
from tests.servers import log_prob_difference

PROMPTS = tiny.random_sequences([3, 40, 1, 17, 9], seed=5)


def test_groups_come_in_the_prompts_order_with_hugging_faces_log_probs(servers):
    done = {}
    drawn = servers.generator().generate(
        PROMPTS,
        SamplingConfig(max_response_length=20),
        responses_per_prompt=3,
        on_done=done.__setitem__,
    )
    assert done == dict(enumerate(drawn))
    assert [len(responses) for responses in drawn] == [3] * len(PROMPTS)
    model = tiny.load(servers.checkpoint)
    for prompt, responses in zip(PROMPTS, drawn, strict=True):
        assert len({tuple(response.token_ids) for response in responses}) > 1
        for response in responses:
            assert log_prob_difference(model, prompt, response) < 1e-4


def test_greedy_is_hugging_faces_argmax(servers):
    greedy = SamplingConfig(temperature=0, max_response_length=10)
    drawn = servers.generator().generate(PROMPTS, greedy)
    model = tiny.load(servers.checkpoint)
    for prompt, (response,) in zip(PROMPTS, drawn, strict=True):
        tokens = prompt + response.token_ids
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        assert response.token_ids == expected[len(prompt) - 1 : -1]


def test_a_response_ends_with_its_stop_token_or_is_truncated(servers):
    # Half of the vocabulary ends a response, so it ends soon.
    stops = list(range(0, tiny.VOCAB, 2))
    generator = Generator(servers.urls, servers.config, vocab_size=tiny.VOCAB, stop_token_ids=stops)
    (stopped,) = generator.generate([[1, 2]], SamplingConfig(max_response_length=60))
    assert not stopped[0].truncated
    assert stopped[0].token_ids[-1] in stops
    assert not set(stopped[0].token_ids[:-1]) & set(stops)
    assert len(stopped[0].token_ids) == len(stopped[0].log_probs)
    (cut,) = servers.generator().generate([[1, 2]], SamplingConfig(max_response_length=2))
    assert cut[0].truncated
    assert len(cut[0].token_ids) == 2


@pytest.mark.parametrize("prompt", [[], [1, tiny.VOCAB], [-1]])
def test_prompt_that_would_kill_a_server_never_reaches_it(servers, prompt):
    with pytest.raises(UserError, match=r"prompt 1: .* 0 to 330 \(vocab_size\)"):
        servers.generator().generate([[1], prompt], SamplingConfig(max_response_length=2))
    assert all(httpx.get(f"{url}/health").status_code == 200 for url in servers.urls)


def test_refused_request_says_what_the_server_said(servers):
    too_long = [1] * 400
    with pytest.raises(GenerationError, match=r"/generate answered 400: .*400"):
        servers.generator().generate([too_long], SamplingConfig(max_response_length=2))


def test_server_that_is_not_there_is_named(servers):
    with pytest.raises(GenerationError, match=r"http://127\.0\.0\.1:9.*no answer"):
        servers.generator(["http://127.0.0.1:9"]).generate([[1]], SamplingConfig())
