import json

import pytest

from klear_megatron.data import DataConfig, encode_prompt, load_prompts
from klear_megatron.errors import UserError
from tests.data.test_encoding import CHATML, make_tokenizer
from tests.data.test_rows import changed, write_lines

SYSTEM = {"role": "system", "content": "Be brief."}


def ask(text):
    return changed(prompt=[SYSTEM, {"role": "user", "content": text}])


@pytest.fixture
def tokenizer():
    return make_tokenizer(CHATML)


def test_long_prompts_are_dropped_and_bad_rows_skipped_and_both_counted(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", ask("1+1?"), "{", ask("?" * 1000), ask("2+2?"))
    loaded = load_prompts(DataConfig(path=path, max_prompt_length=100, bad_rows="skip"), tokenizer)
    assert [prompt.index for prompt in loaded.prompts] == [0, 3]
    assert loaded.token_ids == [encode_prompt(tokenizer, p.messages) for p in loaded.prompts]
    assert loaded.too_long == 1
    assert [str(problem).split(": ")[0] for problem in loaded.bad_rows] == [f"{path}, line 2"]
    with pytest.raises(UserError, match="line 2"):
        load_prompts(DataConfig(path=path), tokenizer)
    with pytest.raises(UserError, match="no prompt has at most 3 tokens; the shortest has"):
        load_prompts(DataConfig(path=path, max_prompt_length=3, bad_rows="skip"), tokenizer)


def test_prompts_are_told_from_others_wherever_they_lie(tmp_path, tokenizer):
    def fingerprint(name, *rows):
        path = write_lines(tmp_path / name, *rows)
        return load_prompts(DataConfig(path=path), tokenizer).fingerprint()

    rows = ask("1+1?"), ask("2+2?")
    assert fingerprint("a.jsonl", *rows) == fingerprint("b.jsonl", *rows)
    assert fingerprint("a.jsonl", *rows) != fingerprint("c.jsonl", ask("1+1?"), ask("2+3?"))


@pytest.mark.parametrize("limit", range(85, 100))
def test_long_prompts_are_cut_to_the_last_character_that_fits(tmp_path, tokenizer, limit):
    text = "".join(chr(ord("a") + i % 26) for i in range(500)) + " What is the sum?"
    path = write_lines(tmp_path / "a.jsonl", ask(text), ask("1+1?"))
    loaded = load_prompts(DataConfig(path=path, max_prompt_length=limit, too_long="cut"), tokenizer)
    cut, whole = (prompt.messages[1]["content"] for prompt in loaded.prompts)
    assert whole == "1+1?"
    assert loaded.too_long == 1
    assert text.endswith(cut)
    assert loaded.prompts[0].messages[0] == SYSTEM
    assert len(loaded.token_ids[0]) == limit  # a token is one byte here, so the cut fits exactly
    assert loaded.token_ids[0] == encode_prompt(tokenizer, loaded.prompts[0].messages)


def test_prompt_that_does_not_fit_without_its_text_is_refused(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", ask("1+1?"), json.dumps(json.loads(ask("x" * 99))))
    with pytest.raises(UserError, match="row 0 does not fit 20 tokens even without"):
        load_prompts(DataConfig(path=path, max_prompt_length=20, too_long="cut"), tokenizer)
