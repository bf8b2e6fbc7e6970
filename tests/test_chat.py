import pytest
from conftest import NO_SYSTEM, TEMPLATE, make_tokenizer

from steerheal import chat


def test_system_text_has_its_own_turn_where_the_template_has_one():
    t = make_tokenizer()
    assert chat.has_system_role(t)
    assert chat.text(t, "Be kind.", [("user", "hi")]) == "<|system|>Be kind.<|end|><|user|>hi<|end|><|assistant|>"


@pytest.mark.parametrize("template", [NO_SYSTEM, TEMPLATE.replace("{% for m in messages %}",
                                                                  "{% for m in messages if m['role'] != 'system' %}")])
def test_system_text_heads_the_first_user_turn_where_it_has_none(template):
    t = make_tokenizer(template, bos=True)
    assert not chat.has_system_role(t)
    shown = chat.text(t, "Be kind.", [("user", "hi"), ("assistant", "yes"), ("user", "so?")])
    assert "<|user|>Be kind.\n\nhi<|end|><|assistant|>yes<|end|><|user|>so?<|end|><|assistant|>" in shown


def test_bos_is_written_once():
    t = make_tokenizer(NO_SYSTEM, bos=True)
    ids = chat.prompt(t, "hi")
    assert ids.count(t.bos_token_id) == 1 and ids[0] == t.bos_token_id
    plain = make_tokenizer()
    assert chat.prompt(plain, "hi")[0] == plain.convert_tokens_to_ids("<|system|>")


def test_dates_are_frozen():
    dated = make_tokenizer("{{ strftime_now('%Y-%m-%d') }}{{ date_string }}" + TEMPLATE)
    assert chat.text(dated, "", [("user", "x")]).startswith("01 Jan 202501 Jan 2025")


FOLDS = ("{% set head = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
         "{% for m in messages if m['role'] != 'system' %}<|{{ m['role'] }}|>{{ head if loop.first else '' }}"
         "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def test_a_template_that_folds_has_no_system_role():
    t = make_tokenizer(FOLDS)
    assert not chat.has_system_role(t) and not chat.default_system(t)
    assert chat.text(t, "Be kind.", [("user", "hi")]) == "<|user|>Be kind.\n\nhi<|end|><|assistant|>"


def test_a_default_system_text_is_seen_and_replaced():
    t = make_tokenizer("{% if messages[0]['role'] != 'system' %}<|system|>I am a robot.<|end|>{% endif %}" + TEMPLATE)
    assert chat.default_system(t) and not chat.default_system(make_tokenizer())
    assert "robot" not in chat.text(t, "Be kind.", [("user", "hi")])
