"""Reads records of messages: pairs of replies (`chosen`, `rejected`) and single dialogues. Used by `readers`."""

from __future__ import annotations

from typing import Any

from tuna_peft.data.bad_row import BadRow, kind, required
from tuna_peft.data.in_text import refuse_messages
from tuna_peft.data.messages import DIALOGUE_KEYS, clean_message
from tuna_peft.data.ranked import Record, unanswered


def is_dialogue(raw: Record) -> bool:
    """Whether a record has a dialogue whose turns have a role."""
    return _key(raw) is not None


def dialogue_prompt(raw: Record, where: str) -> list[Any] | None:
    """The dialogue if it waits for a reply, so that it is a prompt; None where its last message is the reply."""
    turns = _dialogue(raw, where)
    return None if _last_role(turns, where) == "assistant" else turns


def dialogue_responses(raw: Record, where: str) -> Record:
    """A dialogue whose last message is the response; `split_dialogues` makes the messages before it the prompt.

    Raises:
        BadRow: The last message is not the assistant's.
    """
    turns = _dialogue(raw, where)
    if (role := _last_role(turns, where)) != "assistant":
        raise unanswered(role, where)
    return {"completions": [turns], "scores": None, "ranks": [0], "reference": None}


def has_replies(raw: Record) -> bool:
    """Whether a record has a better and a worse reply, with a prompt before them or in them."""
    raw = _as_pair(raw)
    better, worse = _pair_keys(raw)
    prompted = "prompt" in raw or is_dialogue(raw) or isinstance(raw.get(better), list)
    return {better, worse} <= raw.keys() and prompted


def preference_prompt(raw: Record) -> Any:
    """The prompt, or the dialogue before the two replies (ShareGPT); None where the two are whole dialogues."""
    raw = _as_pair(raw)
    if raw.get("prompt") is not None:
        return raw["prompt"]
    key = _key(raw)
    return None if key is None else raw[key]


def preference_responses(raw: Record, where: str) -> Record:
    """`chosen`, one or several, before `rejected`; also used by the trainer for data sets of TRL's preference type."""
    raw = _as_pair(raw)
    sides = [_texts(required(raw, key, where), f"{where}, `{key}`") for key in _pair_keys(raw)]
    ranks = [rank for rank, side in enumerate(sides) for _ in side]
    return {"completions": [*sides[0], *sides[1]], "scores": None, "ranks": ranks, "reference": None}


def _as_pair(raw: Record) -> Record:
    """ms-swift's pairs as two dialogues: `messages` end with the better reply, the worse is beside them."""
    turns, worse = raw.get("messages"), raw.get("rejected_messages", raw.get("rejected_response"))
    if worse is None or not isinstance(turns, list) or {"chosen", "chosen_messages"} & raw.keys():
        return raw
    rest = {key: value for key, value in raw.items() if key not in ("messages", "rejected_messages")}
    rejected = [*turns[:-1], {"role": "assistant", "content": worse}] if isinstance(worse, str) else worse
    return rest | {"chosen": turns, "rejected": rejected}


def _pair_keys(raw: Record) -> tuple[str, str]:
    """The keys of the better and the worse response; those of LLaMA-Factory's version 1 hold whole dialogues."""
    return ("chosen_messages", "rejected_messages") if "chosen_messages" in raw else ("chosen", "rejected")


def _texts(value: Any, where: str) -> list[Any]:
    """Several chosen or rejected texts (RewardBench 2), or the only one."""
    refuse_messages(value, where)
    several = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    return value if several else [value]


def _key(raw: Record) -> str | None:
    """The key of the dialogue; None if there is none."""
    for key in DIALOGUE_KEYS:
        turns = raw.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and {"role", "from"} & turns[0].keys():
            return key
    return None


def _last_role(turns: list[Any], where: str) -> str:
    return str(clean_message(turns[-1], where)["role"])


def _dialogue(raw: Record, where: str) -> list[Any]:
    key = _key(raw)
    if key is None:
        found = next((key for key in DIALOGUE_KEYS if key in raw), DIALOGUE_KEYS[0])
        what = f"`{found}` is {kind(raw.get(found))}, not a list of messages"
        raise BadRow(what, reason="wrong type", where=where)
    return list(raw[key])
