"""Prompts hold what they should and nothing else; replies are read as they stand."""

import json
import re

import pytest

from hnlm_ref import llm, prompts
from hnlm_ref.artifacts import load_jsonl
from hnlm_ref.prompts import Reply, parse_reply

CLEAN = '{"hard_negative_item": "Orbit Chess Set", "reasoning": "r"}'


@pytest.mark.parametrize(
    ("raw", "status", "text"),
    [  # the 14 answers of case D01; nothing stands in for a missing one (D02)
        (CLEAN, "ok", "Orbit Chess Set"),
        (f"```json\n{CLEAN}\n```", "ok", "Orbit Chess Set"),
        (f"Sure! Here it is:\n{CLEAN}\nHope this helps {{smile}}", "ok", "Orbit Chess Set"),
        ('{"hard_negative_item": "None", "reasoning": "cannot"}', "no_negative", None),
        ('{"hard_negative_item": null, "reasoning": "cannot"}', "no_negative", None),
        ("", "bad", None),
        ('{"hard_negative_item": "Orbit Ch', "bad", None),
        ('{"hard_negative_item": "Orbit Chess Set"，"reasoning": "r"}', "bad", None),  # noqa: RUF001
        ('{"hard_negative_item": "A Set"}\n{"hard_negative_item": "B Set"}', "ok", "A Set"),
        ('{"hard_negative_item": "The ```Tick``` Game", "reasoning": "r"}', "ok", "The ```Tick``` Game"),
        ('{"hard_negative_item": ["A Set","B Set"], "reasoning": "r"}', "bad", None),
        ('{"title": "A Set", "reasoning": "r"}', "bad", None),
        ('{"hard_negative_item": "Galaxy Chess Set", "reasoning": "r"}', "is_positive", None),
        (f'<think>Perhaps {{"hard_negative_item": "Old Set"}}.</think>{CLEAN}', "ok", "Orbit Chess Set"),
        # and others of their kinds
        ('{"hard_negative_item": "  galaxy CHESS set "}', "is_positive", None),
        ('{"hard_negative_item": " nOnE "}', "no_negative", None),
        ('{"hard_negative_item": "null"}', "no_negative", None),
        ('{"hard_negative_item": 7}', "bad", None),
        ('{"hard_negative_item": false}', "bad", None),
        ('{"title": "x"} then {"hard_negative_item": "B"}', "ok", "B"),
        (f'Perhaps {{"hard_negative_item": "Old Set"}}.\n</think>\n\n{CLEAN}', "ok", "Orbit Chess Set"),
        ('<think>never\nclosed {"hard_negative_item": "Old Set"}', "bad", None),
        ('{"hard_negative_item": "Misérables (Les) {1998}"}', "ok", "Misérables (Les) {1998}"),
        ('{"a":' * 3_000, "bad", None),
    ],
)
def test_a_reply_gives_the_first_whole_object_with_the_key_or_a_status(raw, status, text):
    assert parse_reply(raw, prompts.NEGATIVE_KEY, "Galaxy Chess Set") == Reply(status, text, raw)


def test_without_a_positive_title_nothing_is_taken_for_the_positive():
    assert parse_reply('{"summarization": "likes chess"}', prompts.PROFILE_KEY).text == "likes chess"


def test_the_json_that_prompts_ask_for_is_valid_json_with_the_key():
    for template, key in (
        (prompts.NEGATIVE, prompts.NEGATIVE_KEY),
        (prompts.ITEM_PROFILE, prompts.PROFILE_KEY),
        (prompts.USER_PROFILE, prompts.PROFILE_KEY),
    ):
        asked, _ = json.JSONDecoder().raw_decode(template[template.index('{"') :])
        assert isinstance(asked[key], str)


def test_words_of_the_data_keep_their_braces_commas_and_quotes():
    item = {"item": 0, "title": 'A {title}, "x"', "text": "{text} {0}", "profile": "P {item}"}
    prompt = prompts.negative_prompt({"profile": "Lately took {profile}."}, item)
    assert 'A {title}, "x". P {item}' in prompt
    assert "Lately took {profile}." in prompt
    assert '"x"\nDescription: {text} {0}' in prompts.item_profile_prompt(item)


def test_a_missing_title_is_named_as_missing_and_a_title_is_not_repeated():
    assert prompts.item_words({"title": "", "profile": "Drama"}) == "an item without title. Drama"
    assert prompts.item_words({"title": "", "profile": ""}) == "an item without title"
    item = {"item": 0, "title": "", "text": ""}
    assert "\nTitle: an item without title\nDescription: none given\n" in prompts.item_profile_prompt(item)
    assert "\n- an item without title\n" in prompts.user_profile_prompt([(item, None)])
    assert prompts.item_words({"title": "Up", "profile": "Up. Comedy"}) == "Up. Comedy"
    assert prompts.item_words({"title": "Up", "profile": "Up"}) == "Up"
    assert prompts.item_words({"title": "Up", "profile": "For children."}) == "Up. For children."
    assert prompts.item_words({"title": "Up", "profile": "Uplifting fun."}) == "Up. Uplifting fun."


def test_a_user_prompt_lists_the_history_and_only_the_users_own_reviews():
    history = [({"title": "New", "text": "Drama"}, None), ({"title": "Old", "text": ""}, "loved it")]
    assert "- New. Drama\n- Old\n  Their review: loved it\n" in prompts.user_profile_prompt(history)


def test_no_prompt_of_the_toy_run_spells_vectors_out(toy_run):
    """Case D19, on what the model is given: text ids without decimal numbers, and one soft token per vector."""
    users, items = (load_jsonl(toy_run / "prep" / f"{who}.jsonl") for who in ("users", "items"))
    _, tokenizer = llm.tiny_model()
    queries = llm.make_queries(tokenizer, users, items, 400, 200)
    for triplet in load_jsonl(toy_run / "sft" / "triplets.jsonl")[::97]:
        u, i = triplet["user"], triplet["item"]
        prefix, (part,) = queries.row(u, [i])
        text = tokenizer.decode([n for n in prefix + part if n >= 0])
        assert [n for n in prefix + part if n < 0] == [-1 - u, -1 - len(users) - i]
        assert items[i]["title"] in text and users[u]["profile"][:40] in text
        for prompt in (text, prompts.negative_prompt(users[u], items[i])):
            assert len(re.findall(r"\d+\.\d+", prompt)) <= 8


@pytest.mark.parametrize(
    ("key", "echo"),
    [
        ("hard_negative_item", "title, at most 20 words"),
        ("hard_negative_item", " Title, At Most 20 Words"),
        ("summarization", "at most 100 words on who likes it and why"),
        ("summarization", "at most 100 words on what they like and dislike"),
    ],
)
def test_the_example_of_the_question_is_no_answer(key, echo):
    assert parse_reply(json.dumps({key: echo}), key).status == "bad"
    assert parse_reply(json.dumps({key: echo + " indeed"}), key).status == "ok"
