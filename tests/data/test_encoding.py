import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from klear_megatron.data import ConversationsConfig, encode_conversation, encode_prompt
from klear_megatron.data.chat_template import check_template, ends_turns
from klear_megatron.data.encoded import encode_part
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


def test_a_template_that_is_not_jinja_is_refused_with_its_line():
    with pytest.raises(UserError, match=r"config, or else .* is not Jinja: line 2: unexpected '}'"):
        check_template(make_tokenizer("{% for m in messages %}\n{{ m.content } }}{% endfor %}"))


def test_a_template_that_ends_no_turn_is_noticed():
    endless = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    ends = make_tokenizer(CHATML)
    stop = ends.convert_tokens_to_ids("<|im_end|>")
    assert ends_turns(ends, [stop])
    assert not ends_turns(endless, [stop])
    assert not ends_turns(ends, [stop + 1])


REASONS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}",
)
USES_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + REASONS
TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALLS = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]
ASKED = {"role": "user", "content": "1+1?"}


def answered(**keys):
    return [ASKED, {"role": "assistant", "content": "2", **keys}]


@pytest.mark.parametrize(
    ("template", "keys", "trained"),
    [
        (REASONS, {"reasoning_content": "one more"}, "<think>one more</think>2<|im_end|>"),
        (REASONS, {"content": "", "tool_calls": CALLS}, '"arguments": "{}"'),
        (CHATML, {"id": 7, "name": "bot"}, "2<|im_end|>"),  # nothing that the model says
    ],
)
def test_every_key_of_a_message_reaches_the_template(template, keys, trained):
    (text,) = trained_texts(make_tokenizer(template), answered(**keys))
    assert trained in text


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "tool_calls"])
def test_what_the_template_leaves_out_of_an_answer_is_refused(key):
    with pytest.raises(UserError, match=rf"^messages\.1\.{key}: the chat template does not use it"):
        encode_conversation(make_tokenizer(CHATML), answered(**{key: CALLS}))


def test_tools_are_given_to_the_template_or_refused():
    tokenizer = make_tokenizer(USES_TOOLS)
    assert '"name": "add"' in tokenizer.decode(encode_conversation(tokenizer, answered(), TOOLS)[0])
    with pytest.raises(UserError, match=r"^tools: the chat template does not use them"):
        encode_conversation(make_tokenizer(CHATML), answered(), TOOLS)


def test_message_of_weight_0_is_not_trained():
    messages = [*answered(weight=0), *answered(content="3")]
    assert trained_texts(make_tokenizer(CHATML), messages) == ["3<|im_end|>"]


def test_developer_is_the_system_for_a_template_that_does_not_know_the_role():
    developer = [{"role": "developer", "content": "Be brief."}, ASKED]
    system = [{**developer[0], "role": "system"}, ASKED]
    tokenizer = make_tokenizer(CHATML)
    assert encode_prompt(tokenizer, developer) == encode_prompt(tokenizer, system)
    knows = make_tokenizer("{% if messages[0].role == 'developer' %}D{% endif %}" + CHATML)
    assert knows.decode(encode_prompt(knows, developer)).startswith("D<|im_start|>developer")


def test_template_that_does_not_open_the_turn_is_refused_if_it_has_a_header():
    never_opens = CHATML.partition("{% if add_generation_prompt %}")[0]
    with pytest.raises(UserError, match=r"messages\.1: .*the header .*im_start.*assistant"):
        encode_conversation(make_tokenizer(never_opens), answered())
    no_header = "{% for m in messages %}{{ m.content }}{{ loop.cycle(' => ', '') }}{% endfor %}"
    assert trained_texts(make_tokenizer(no_header), answered()) == ["2"]


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "TemplateError: roles must alternate"),
        ("{{ 1 + messages[0].content }}", "TypeError: "),
    ],
)
def test_template_that_fails_is_one_message_with_the_row(tmp_path, template, what):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": answered()}) + "\n")
    config = ConversationsConfig(path=path)
    with pytest.raises(UserError) as refusal:
        encode_part(config, make_tokenizer(template), tmp_path, part=0, parts=1)
    problem, _ = str(refusal.value).splitlines()
    assert problem.startswith(f"{path}, line 1, field messages: the chat template")
    assert what in problem
