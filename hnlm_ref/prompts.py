"""Every prompt of the project, and the parser of the model's replies.

Paper: the profile instructions S_v and S_u, the query q(u, i), and the zero-shot question of the text mode. All wording
is our own; the released files disagree with each other, and the item-profile prompt is missing there. Numbers never
enter a prompt as digits: collaborative vectors are soft tokens (case D19). `fill` puts the words of a data set in, in
one pass, so braces in a title do no harm.
"""

import json
import re
from dataclasses import dataclass

from hnlm_ref.artifacts import no_half_characters
from hnlm_ref.console import UserError

NO_TITLE = "an item without title"  # stands for a missing title in every prompt (case A04)

# ---- q(u, i): what the model reads in tuning and in embedding mode ----------------------------------------------
# Choice: the user part comes first, so that all pairs of a user share it. Both soft tokens, c_u and c_i, stand right
# before the end: read off the untuned SmolLM2's last token by a linear map, c_u is explained to 42 % and c_i to 66 %
# there (R2 on held-out pairs), against 17 % and 40 % for soft tokens beside the texts they belong to.

QUERY_USER = "Find an item that this user would pass over, although it fits their taste. {profile}"
QUERY_ITEM = "\nTook: {item}"
QUERY_END = "\nPassed over:"  # followed by the soft tokens and EOS

# ---- text mode: the paper's first method, no tuning -------------------------------------------------------------

NEGATIVE = """A user has this history. {profile}
They chose: {item}
Name one existing item of the same kind that looks right for this user at first sight but that they would not choose: \
close in theme, wrong in what matters to them. Do not repeat an item named above.
Answer with one JSON object and nothing else:
{"hard_negative_item": "title, at most 20 words", "reasoning": "one sentence"}
If there is no such item, set "hard_negative_item" to null."""

# ---- profiles: S_v and S_u --------------------------------------------------------------------------------------

ITEM_PROFILE = """Describe which kind of customer would enjoy this item, from its title and description.
Title: {title}
Description: {text}
Answer with one JSON object and nothing else:
{"summarization": "at most 100 words on who likes it and why", "reasoning": "one sentence"}"""

USER_PROFILE = """Describe the taste of a customer from the items they chose, newest first, with their own words if any.
{history}
Answer with one JSON object and nothing else:
{"summarization": "at most 100 words on what they like and dislike", "reasoning": "one sentence"}"""


def fill(template: str, **words: str) -> str:
    """Put words in the places of a template in one pass: braces inside the words stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda place: words[place[1]], template)


def item_words(item: dict) -> str:
    """Title and profile P_v of an item; a template profile begins with the title, which is then not repeated."""
    title, profile = item["title"], item["profile"]
    if not title or not f"{profile}. ".startswith(f"{title}. "):
        return f"{title or NO_TITLE}. {profile}".removesuffix(". ")
    return profile


def check_words(items: list[dict], what: str) -> None:
    """Raises UserError where all items read alike: `what` would go by the last digits of equal text vectors."""
    if len(words := {item_words(item) for item in items}) == 1:
        raise UserError(f"{what} need texts; every item is {words.pop()!r}, see prep's --items")


def negative_prompt(user: dict, item: dict) -> str:
    return fill(NEGATIVE, profile=user["profile"], item=item_words(item))


def item_profile_prompt(item: dict) -> str:
    return fill(ITEM_PROFILE, title=item["title"] or NO_TITLE, text=item["text"] or "none given")


def user_profile_prompt(history: list[tuple[dict, str | None]]) -> str:
    """history  the user's training items, newest first, each with the user's own text of it, if any."""
    lines = []
    for item, review in history:
        lines.append(f"- {item['title'] or NO_TITLE}. {item['text']}".removesuffix(". "))
        lines += [f"  Their review: {review}"] if review else []
    return fill(USER_PROFILE, history="\n".join(lines))


# ---- replies ----------------------------------------------------------------------------------------------------

NEGATIVE_KEY, PROFILE_KEY = "hard_negative_item", "summarization"


@dataclass(frozen=True)
class Reply:
    """What came of one question.

    status  ok | bad (no complete JSON object with a text under the key, or the question's own example repeated) |
            no_negative (null, blank, "none" or "null") | is_positive (names the item given) | failed (no answer)
    text    the answer if ok, else None: nothing ever stands in for a missing answer (cases D02, D20)
    raw     what the model wrote; why it did not, if failed
    """

    status: str
    text: str | None
    raw: str


def parse_reply(raw: str, key: str, positive_title: str | None = None) -> Reply:
    """Read the value of `key` from the first complete JSON object that has it, reasoning blocks dropped (case D01).

    Invalid JSON is not repaired. Equality with the positive ignores case and outer blanks.

    >>> parse_reply('<think>{...}</think> Sure: {"hard_negative_item": "Heat (1995)"}', NEGATIVE_KEY, "Ronin").text
    'Heat (1995)'
    >>> parse_reply('{"hard_negative_item": "ronin "}', NEGATIVE_KEY, "Ronin").status
    'is_positive'
    """
    raw = no_half_characters(raw)
    text = re.sub(r"<think>.*?(</think>|\Z)", "", raw, flags=re.DOTALL)
    text = text.rpartition("</think>")[2]  # of some models the prompt itself opens the block
    for brace in re.finditer(r"\{", text):
        try:
            found, _ = json.JSONDecoder().raw_decode(text, brace.start())
        except (ValueError, RecursionError):  # models fall into loops of brackets
            continue
        if key in found:
            break
    else:
        return Reply("bad", None, raw)
    value = found[key]
    if value is not None and not isinstance(value, str):
        return Reply("bad", None, raw)
    value = no_half_characters(value or "").strip()
    if any(f'"{key}": "{value}"'.lower() in asked.lower() for asked in (NEGATIVE, ITEM_PROFILE, USER_PROFILE)):
        return Reply("bad", None, raw)  # small models repeat the example: SmolLM2-135M did in most answers it completed
    if value.lower() in ("", "none", "null"):
        return Reply("no_negative", None, raw)
    if positive_title is not None and value.lower() == positive_title.strip().lower():
        return Reply("is_positive", None, raw)
    return Reply("ok", value, raw)
