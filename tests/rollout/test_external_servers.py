"""Servers that are already running are used if they serve what is wanted, and refused if not."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from klear_megatron.errors import UserError
from klear_megatron.rollout import (
    Generator,
    RolloutConfig,
    SamplingConfig,
    external_servers,
    serving,
)
from klear_megatron.rollout.external_servers import check_lengths
from tests.models import tiny
from tests.rollout.conftest import CONFIG, SharedServers


def set_version(url: str, version: str) -> None:
    body = {"new_version": version, "abort_all_requests": False}
    httpx.post(f"{url}/update_weight_version", json=body, timeout=30).raise_for_status()


def version_of(url: str) -> str:
    return httpx.get(f"{url}/model_info", timeout=30).json()["weight_version"]


@pytest.fixture
def fresh(servers: SharedServers) -> Iterator[SharedServers]:
    """Servers that report the weight version of a start, whatever other tests have pushed."""
    before = {url: version_of(url) for url in servers.urls}
    for url in servers.urls:
        set_version(url, "default")
    yield servers
    for url, version in before.items():
        set_version(url, version)


def given(urls: list[str]) -> RolloutConfig:
    return RolloutConfig.model_validate(CONFIG.model_dump() | {"urls": urls})


def refusal(urls: list[str], model: Path, tmp_path: Path, *, own_weights: bool = False) -> str:
    use = serving(given(urls), model, tmp_path / "logs", own_weights=own_weights)
    with pytest.raises(UserError) as error, use:
        pass
    return str(error.value)


def test_the_model_that_is_served_is_used_by_any_path_to_it(fresh, tmp_path, capsys):
    (tmp_path / "link").symlink_to(fresh.checkpoint)
    config = given([f"{url}/" for url in fresh.urls])
    with serving(config, tmp_path / "link", tmp_path / "logs") as running:
        client = Generator(running.urls, config, vocab_size=tiny.VOCAB, stop_token_ids=[])
        (drawn,) = client.generate([[1, 2, 3]], SamplingConfig(max_response_length=4))
    assert len(drawn[0].token_ids) == 4
    assert running.urls == fresh.urls
    assert "starting" not in capsys.readouterr().out


def test_another_model_than_the_one_that_is_served_is_refused(fresh, tmp_path):
    message = refusal(fresh.urls, tmp_path / "other", tmp_path)
    assert f"{fresh.urls[0]} serves {fresh.checkpoint}, but {tmp_path / 'other'} is" in message


def test_replaced_weights_are_refused_unless_the_caller_replaces_them_again(fresh, tmp_path):
    set_version(fresh.urls[1], "12")
    message = refusal(fresh.urls, fresh.checkpoint, tmp_path)
    assert message.startswith(f"rollout.urls: {fresh.urls[1]} was started with {fresh.checkpoint}")
    assert "(weight version 12)" in message
    # The policy's checkpoint may be another folder than the one that the servers started with.
    like = tiny.write(tmp_path / "like", tiny.qwen3(num_hidden_layers=2), seed=5)
    with serving(given(fresh.urls), like, tmp_path / "logs", own_weights=True) as running:
        assert running.urls == fresh.urls


@pytest.mark.parametrize(
    "config",
    [
        tiny.qwen3(num_hidden_layers=1),
        tiny.qwen3(num_hidden_layers=2, intermediate_size=128),
        tiny.qwen2(num_hidden_layers=2),
    ],
    ids=["layers", "width", "kind"],
)
def test_servers_of_a_model_of_another_shape_take_no_weights(fresh, tmp_path, config):
    model = tiny.write(tmp_path / "model", config)
    message = refusal(fresh.urls, model, tmp_path, own_weights=True)
    assert "whose weights have other names or shapes" in message


def test_servers_that_cannot_receive_a_trainers_weights_are_refused(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(external_servers, "WEIGHT_LOADER", "another.loader")
    message = refusal(fresh.urls, fresh.checkpoint, tmp_path, own_weights=True)
    assert f"{fresh.urls[0]} was started without" in message
    assert "or with `--custom-weight-loader another.loader` and PYTHONPATH=/" in message


def test_a_response_longer_than_the_servers_take_is_refused(servers):
    hf = tiny.qwen3(max_position_embeddings=100_000)
    fits = SamplingConfig(max_response_length=250)
    check_lengths(given(servers.urls), hf, 6, fits)
    with pytest.raises(UserError, match="make 257, but the servers take 256"):
        check_lengths(given(servers.urls), hf, 7, fits)
    # The user may set a lower limit.
    less = given(servers.urls).model_copy(update={"context_length": 128})
    with pytest.raises(UserError, match="but the servers take 128"):
        check_lengths(less, hf, 6, fits)


@pytest.mark.parametrize("url", ["node7:30000", "127.0.0.1", "ftp://node7"])
def test_anything_but_an_address_is_refused(url):
    with pytest.raises(ValidationError, match="write it as http://HOST:PORT"):
        RolloutConfig(urls=[url])
