import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from areal_jax.data.config import DataConfig
from areal_jax.data.prompts import Prompts, fitting, prompt_limit, render_prompt
from areal_jax.data.readers import DataError, Dataset

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    characters = ["</s>", "<user>", "<system>", "<assistant>", *"abcdefghijklmnopqrstuvwxyz \n"]
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.add_special_tokens(characters[:4])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


def text(tokens, tokenizer):
    return "".join(tokenizer.convert_ids_to_tokens(tokens))


def test_plain_text_with_system_prompt_and_suffix(tokenizer):
    config = DataConfig(system_prompt="be kind", prompt_suffix=" now")
    assert text(render_prompt({"prompt": "go"}, tokenizer, config), tokenizer) == "be kind\n\ngo now"


def test_the_chat_template_is_used_where_there_is_one(tokenizer):
    tokenizer.chat_template = TEMPLATE
    try:
        config = DataConfig(system_prompt="s", prompt_suffix=" x")
        expected = "<system>s</s><user>go x</s><assistant>"
        assert text(render_prompt({"prompt": "go"}, tokenizer, config), tokenizer) == expected
        record = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "go"}]}
        tokens = render_prompt(record, tokenizer, config)
        assert text(tokens, tokenizer) == "<system>own</s><user>go x</s><assistant>"
        assert all(type(token) is int for token in tokens)
        assert record["messages"][1]["content"] == "go"  # the record itself is left alone
        assert text(render_prompt({"prompt": "go"}, tokenizer, DataConfig(template="none")), tokenizer) == "go"
    finally:
        tokenizer.chat_template = None


def test_a_missing_template_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="needs a chat template"):
        render_prompt({"prompt": "go"}, tokenizer, DataConfig(template="chat"))
    with pytest.raises(ValueError, match="needs a chat template"):
        render_prompt({"messages": [{"role": "user", "content": "go"}]}, tokenizer, DataConfig())
    with pytest.raises(ValueError, match=r"data\.template"):
        render_prompt({"prompt": "go"}, tokenizer, DataConfig(template="chta"))


def test_prompts_that_are_too_long_are_left_out_and_counted(tokenizer):
    data = Dataset("d", [{"prompt": "a" * n} for n in (1, 9, 3)], ["d:4: bad"])
    signs = []
    settings = DataConfig(prompt_suffix="b", too_long="skip")
    kept = fitting(data, tokenizer, settings, limit=4, going_on=lambda: signs.append(1))
    assert signs  # that this gets on
    assert [len(record["prompt"]) for record in kept] == [1, 3]
    assert kept.skipped == ["d:4: bad", "d record 1: its prompt has 10 tokens, 4 fit"]


def test_a_groups_prompt_is_rendered_once_and_another_record_never_gets_its_tokens(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "areal_jax.data.prompts.render_prompt",
        lambda record, *given: seen.append(record) or render_prompt(record, *given),
    )
    prompts = Prompts(tokenizer, DataConfig(), kept=2)
    group = [prompts.tokens({"prompt": "go", "answer": "1"}) for _ in range(8)]
    assert len(seen) == 1 and all(text(tokens, tokenizer) == "go" for tokens in group)
    for word in ("stay", "come", "go"):  # the third is forgotten meanwhile
        assert text(prompts.tokens({"prompt": word, "answer": "1"}), tokenizer) == word
    assert len(seen) == 4
    with pytest.raises(ValueError, match="read-only"):
        group[0][0] = 0
    record = {"prompt": "go", "answer": "1"}
    prompts.tokens(record)
    record["prompt"] = "stay"  # as a workflow may
    assert text(prompts.tokens(record), tokenizer) == "stay"


class Bytes:
    """A tokenizer with one token per byte and one before them; `seen` is what it was asked for."""

    chat_template = None

    def __init__(self):
        self.seen = []

    def encode(self, text):
        self.seen.append(text)
        return [0, *text.encode()]


def test_only_prompts_that_may_be_too_long_are_turned_into_tokens():
    prompts = ["a" * 30, "é" * 25, "é" * 15, "a" * 45, "a" * 35, "a" * 39, "a" * 40]
    byte = Bytes()
    skip = DataConfig(too_long="skip")
    kept = fitting(Dataset("d", [{"prompt": p} for p in prompts]), byte, skip, limit=40)
    assert [record["prompt"] for record in kept] == [p for p in prompts if 1 + len(p.encode()) <= 40]
    assert byte.seen == prompts[1:] and len(kept.skipped) == 3
    with pytest.raises(
        DataError, match=r"1 of 1 prompts are too long; the first: d record 0: its prompt has 53 tokens"
    ):
        fitting(Dataset("d", [{"prompt": "a" * 30}]), byte, DataConfig(system_prompt="b" * 20), limit=40)


@pytest.mark.parametrize(("asked", "limit"), [(0, 40), (60, 60), (200, 79)])
def test_a_prompt_always_leaves_room_for_one_token(asked, limit):
    config = {"data": {"max_prompt_tokens": asked}, "rollout": {"max_length": 80, "max_new_tokens": 40}}
    assert prompt_limit(config) == limit
