import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from klear_megatron.data import encode_conversation, encode_prompt
from klear_megatron.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As in Qwen3's template, only the last answer keeps its reasoning.
DROPS_REASONING = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}",
)
NO_NEWLINE_AFTER_TURN = CHATML.replace("<|im_end|>\n", "<|im_end|>")


def make_tokenizer(chat_template, corpus=()):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    # The end of a turn is not always the tokenizer's eos_token: Qwen3-Base's is <|endoftext|>.
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", chat_template=chat_template
    )


def trained_texts(tokenizer, messages):
    """The text of each run of trained tokens."""
    ids, mask = encode_conversation(tokenizer, messages)
    assert len(ids) == len(mask)
    runs, previous = [], 0
    for token, trained in zip(ids, mask, strict=True):
        if trained and not previous:
            runs.append([])
        if trained:
            runs[-1].append(token)
        previous = trained
    return [tokenizer.decode(run) for run in runs]


def random_conversation(rng):
    words = ["hello", " two\n", "\n\n", "  ", "assistant", "12+3", "<think>", "é日本", "<|im"]
    roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(1, 4)
    # Not empty: a template may then put the end of the turn right after the opening's newline.
    return [{"role": role, "content": "".join(rng.choices(words, k=6))} for role in roles]


@pytest.mark.parametrize("template", [CHATML, NO_NEWLINE_AFTER_TURN], ids=["newline", "bare"])
@pytest.mark.parametrize("seed", range(20))
def test_trains_exactly_the_assistants_words_and_their_end_of_turn(template, seed):
    tokenizer = make_tokenizer(template)
    messages = random_conversation(random.Random(seed))
    assert trained_texts(tokenizer, messages) == [
        message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"
    ]


def test_conversation_is_the_prompt_that_generation_sees_and_then_the_answer():
    tokenizer = make_tokenizer(CHATML)
    messages = random_conversation(random.Random(0))[-2:]
    prompt = encode_prompt(tokenizer, messages[:1])
    assert tokenizer.decode(prompt) == (
        f"<|im_start|>user\n{messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids, mask = encode_conversation(tokenizer, messages)
    assert ids[: len(prompt)] == prompt
    assert mask[: len(prompt)] == [0] * len(prompt)
    assert mask[len(prompt)] == 1


def test_template_that_rewrites_earlier_turns_is_refused_only_where_it_does():
    tokenizer = make_tokenizer(DROPS_REASONING)
    question = {"role": "user", "content": "1+1?"}
    answer = {"role": "assistant", "content": "<think>one more</think>2"}
    assert trained_texts(tokenizer, [question, answer]) == ["<think>one more</think>2<|im_end|>"]
    with pytest.raises(UserError, match=r"messages\.1: the chat template"):
        encode_conversation(tokenizer, [question, answer, question, answer])


def test_tokenizer_that_merges_prompt_and_answer_is_refused():
    tokenizer = make_tokenizer(CHATML, corpus=["a\n\n" * 100])  # "\n\n" becomes one token
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\n\na"}]
    with pytest.raises(UserError, match=r"messages\.1: the chat template"):
        encode_conversation(tokenizer, messages)


def test_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(make_tokenizer(None), [{"role": "user", "content": "?"}])
