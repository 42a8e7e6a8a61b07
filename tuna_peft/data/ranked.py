"""The ranked data set type. Every reader produces it, and everything after the readers uses it.

    {"id": str, "prompt": str or messages, "completions": [str or messages], "scores": [float] or None,
     "ranks": [int], "reference": str or messages or None, "tools": [object], only where there are some}

A response is a list of messages only where text cannot say it: tool calls, or several turns. Completions are in rank
order, best first. Ranks are dense (0, 1, 1, 2) and equal where responses are tied. In errors, "candidate 0" is the
first response in the order of the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from tuna_peft.data.bad_row import FIX_ROW, BadRow, check_unicode, kind
from tuna_peft.data.in_text import refuse_messages
from tuna_peft.data.messages import Message, clean_message, clean_tools, content_text, message_text

Prompt = str | list[Message]
Response = str | list[Message]
Record = dict[str, Any]

MAX_RESPONSES = 1000
"""Of one prompt. The loss compares all pairs, and each response is shown, tokenized and scored."""


@dataclasses.dataclass
class ReadReport:
    """Counts of the records of a source.

    Args:
        read: Records read.
        kept: Records kept.
        skipped: Number of skipped records, by reason.
        duplicates_merged: Responses of kept records that were identical to another one.
        omitted: Responses of kept records that the ranking does not mention (judge data); they are dropped.
        contradictions: Comparisons and ranks of kept records that contradict others of the same record.
        responses: Responses of kept records in the file, with duplicates.
        comparisons: Comparisons of kept records.
        first_contradiction: The place of the first record with one.
    """

    read: int = 0
    kept: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    duplicates_merged: int = 0
    omitted: int = 0
    contradictions: int = 0
    responses: int = 0
    comparisons: int = 0
    first_contradiction: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass
class Normalised:
    """A normalised record, and how many responses were merged as duplicates or dropped as not ranked."""

    record: Record
    merged: int
    omitted: int
    contradictions: int = 0
    comparisons: int = 0


def normalise(record: Record, where: str, *, pairs: bool = True) -> Normalised:
    """Checks a ranked record and converts it to the ranked type; idempotent.

    Args:
        record: `prompt`, `completions` (texts, or lists of messages), `scores` (higher is better) or
            `ranks` (lower is better; None where a response is not ranked), optional `reference`, `tools` and `id`.
            Completions may be whole dialogues, see `split_dialogues`.
        where: The record's place, for errors.
        pairs: False accepts one response, or only tied ones.

    Returns:
        A new record of the ranked type, best first, exact duplicates merged under the best of their ranks; and counts.

    Raises:
        BadRow: The record is invalid; the message names the place and the candidate.
    """
    prompt, completions = split_dialogues(record.get("prompt"), record.get("completions"), where)
    prompt = with_system(clean_prompt(prompt, where), record.get("system"), where)
    if completions is not None and (isinstance(completions, str) or not isinstance(completions, Sequence)):
        raise BadRow(f"the responses are {kind(completions)}, not a list", reason="wrong type", where=where)
    if not completions:
        raise BadRow("the record has no responses", reason="no responses", where=where)
    require_few(len(completions), where)

    scores, keys = _order(record, len(completions), where)
    responses: list[Response] = [
        str(completion) if key is None else clean_response(completion, prompt, f"{where}, candidate {index}")
        for index, (completion, key) in enumerate(zip(completions, keys, strict=True))
    ]
    ranked = sorted((key, index) for index, key in enumerate(keys) if key is not None)
    texts = [response_key(response) for response in responses]
    kept: list[int] = []
    seen: set[str] = set()
    for _, index in ranked:  # best first and stable, so the first of several duplicates has the best rank
        if texts[index] not in seen:
            seen.add(texts[index])
            kept.append(index)
    omitted = sum(key is None and text not in seen for key, text in zip(keys, texts, strict=True))
    ranks = dense_ranks([keys[index] for index in kept])
    if pairs:
        _require_a_pair(len(completions), ranks, where)

    reference, tools = record.get("reference"), clean_tools(record.get("tools"), where)
    if reference is not None:
        reference = _response(reference, f"{where}, reference")
        reference = reference if response_text(reference).strip() else None
    normalised = {
        "id": record_id(record.get("id"), where),
        "prompt": prompt,
        "completions": [responses[index] for index in kept],
        "scores": None if scores is None else [scores[index] for index in kept],
        "ranks": ranks,
        "reference": reference,
    } | ({} if tools is None else {"tools": tools})
    return Normalised(normalised, merged=len(completions) - len(kept) - omitted, omitted=omitted)


def require_few(count: int, where: str) -> None:
    """Raises BadRow for more than `MAX_RESPONSES` responses to one prompt."""
    if count > MAX_RESPONSES:
        what = f"{count:,} responses to one prompt, at most {MAX_RESPONSES:,} can be used"
        raise BadRow(what, reason="too many responses", where=where)


def add_reference(record: Record, place: str, where: str) -> Record:
    """A normalised record with its reference ranked above (`place="best"`) or below (`"worst"`) all others.

    If there are scores, the score of the reference is the best one plus 1, or the worst one minus 1.

    Raises:
        BadRow: The record has no reference.
    """
    if record["reference"] is None:
        raise BadRow("there is no reference response to add", reason="no reference", where=where)
    best = place == "best"
    scores, ranks = record["scores"], record["ranks"]
    return {
        **record,
        "completions": [*record["completions"], record["reference"]],
        "scores": scores and [*scores, scores[0] + 1.0 if best else scores[-1] - 1.0],
        "ranks": [*ranks, ranks[0] - 1 if best else ranks[-1] + 1],
    }


def dense_ranks(keys: Sequence[Any]) -> list[int]:
    """Ranks 0, 1, ... without gaps, equal for equal keys; the smallest key is the best."""
    place = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    return [place[key] for key in keys]


def clean_prompt(prompt: Any, where: str) -> Prompt:
    """The prompt as text or as messages; BadRow if it is missing, blank or of another type."""
    if isinstance(prompt, str):
        if prompt.strip():
            refuse_messages(prompt, f"{where}, prompt")
            return content_text(prompt, f"{where}, prompt")
    elif isinstance(prompt, Sequence) and prompt:
        return [clean_message(message, f"{where}, prompt") for message in prompt]
    elif prompt is not None and not isinstance(prompt, Sequence):
        raise BadRow(f"the prompt is {kind(prompt)}, not text or messages", reason="wrong type", where=where)
    raise BadRow("the prompt is missing or empty", reason="no prompt", where=where)


def with_system(prompt: Prompt, system: Any, where: str) -> Prompt:
    """The prompt after a system message that the record holds beside it, unless it has one of its own.

    Raises:
        BadRow: The prompt is text, or the message is not.
    """
    if system is None or isinstance(system, str) and not system.strip():
        return prompt
    if isinstance(prompt, str):
        raise BadRow(
            "the record has a system message, and the prompt is text",
            reason="system message beside text",
            where=where,
            fix="Use `prompt: {template: chat}`; for text under `prompt` also `columns: {instruction: prompt, system: "
            "system, ...}` with the other parts, or without `system` to leave it out.",
        )
    own = any(message["role"] == "system" for message in prompt)
    return prompt if own else [clean_message({"role": "system", "content": system}, f"{where}, system"), *prompt]


def clean_response(response: Any, prompt: Prompt, where: str) -> Response:
    """The response as text or messages; BadRow if it is missing, blank, or messages although the prompt is text."""
    if response is None:
        raise BadRow("the response is missing (null)", reason="empty response", where=where)
    plain = isinstance(response, str) or isinstance(response, Sequence) and len(response) == 1
    cleaned = _response(response, where) if plain or not isinstance(prompt, str) else response
    if not isinstance(cleaned, str) and isinstance(prompt, str):  # a message with nothing but text counts as text
        raise BadRow(
            f"the response is {kind(response)}, not text",
            reason="wrong type",
            where=where,
            fix="Give both prompt and responses as text, or both as messages.",
        )
    if not response_text(cleaned).strip():
        raise BadRow("the response is empty", reason="empty response", where=where)
    return cleaned


def response_text(response: Response) -> str:
    """A response as one text, for people, judges and graders; each turn of several begins with its role."""
    if isinstance(response, str):
        return response
    if len(response) == 1:
        return message_text(response[0])
    return "\n\n".join(f"{message['role']}: {message_text(message)}" for message in response)


def response_key(response: Response) -> str:
    """Equal for equal responses."""
    return response if isinstance(response, str) else json.dumps(response, sort_keys=True)


def split_dialogues(prompt: Any, responses: Any, where: str) -> tuple[Any, Any]:
    """Responses that are whole dialogues, split into their common beginning, which is the prompt, and the rest.

    Args:
        prompt: None, the same beginning as messages, or the text of one of its messages, as some data sets repeat it.
        responses: What a record holds. Only lists of messages that begin with the user's or the system's are split.

    Raises:
        BadRow: The dialogues share no beginning, or the prompt is not in it.
    """
    if not isinstance(responses, Sequence) or isinstance(responses, str) or not responses:
        return prompt, responses
    if not all(isinstance(one, Sequence) and not isinstance(one, str) and len(one) > 1 for one in responses):
        return prompt, responses
    dialogues = [
        [clean_message(message, f"{where}, candidate {index}") for message in response]
        for index, response in enumerate(responses)
    ]
    last = next((dialogue[-1]["role"] for dialogue in dialogues if dialogue[-1]["role"] != "assistant"), None)
    if last and not prompt and dialogues[0][0]["role"] != "assistant":
        raise unanswered(last, where)
    if last or any(dialogue[0]["role"] == "assistant" for dialogue in dialogues):
        return prompt, responses
    common = min(map(len, dialogues)) - 1
    common = next((i for i in range(common) if any(one[i] != dialogues[0][i] for one in dialogues)), common)
    while common and any(dialogue[common]["role"] != "assistant" for dialogue in dialogues):
        common -= 1
    shared = dialogues[0][:common]
    if not shared:
        what = "the responses are dialogues that begin differently, so that they answer no common prompt"
        raise BadRow(what, reason="no common prompt", where=where)
    contents = {message["content"].strip() for message in shared}
    if isinstance(prompt, str) and prompt.strip() and prompt.strip() not in contents:
        what = "the responses are dialogues, and the text of the prompt is none of their common messages"
        raise BadRow(what, reason="no common prompt", where=where, fix="Leave out the prompt, or correct the record.")
    if isinstance(prompt, Sequence) and prompt and not isinstance(prompt, str):
        given = clean_prompt(prompt, where)
        if given != shared[: len(given)]:
            what = "the responses are dialogues that do not begin with the messages of the prompt"
            raise BadRow(what, reason="no common prompt", where=where)
    return shared, [dialogue[common:] for dialogue in dialogues]


def unanswered(role: str, where: str) -> BadRow:
    """The error for a dialogue that ends with a message of another role than the assistant."""
    what = f"the dialogue ends with a message of the {role}, not with a reply of the assistant"
    fix = "Remove what follows the last reply, or skip such records (in a recipe: `on_bad_row: skip`)."
    return BadRow(what, reason="no reply", where=where, fix=fix)


def replies_alone(responses: Any, where: str) -> Any:
    """Responses that are whole dialogues, as the texts of their only replies; anything else unchanged.

    Raises:
        BadRow: The dialogues have more than one message of the user and a reply in text.
    """
    shared, rest = split_dialogues(None, responses, where)
    if rest is responses:
        return responses
    if len(shared) > 1 or any(len(turns) > 1 or turns[0].keys() != {"role", "content"} for turns in rest):
        what = "the responses are dialogues of several turns or with tool calls, and the prompt template is for text"
        fix = "Read them as messages: `prompt: {template: chat}` ranks several turns as a whole."
        raise BadRow(what, reason="several turns", where=where, fix=fix)
    return [turns[0]["content"] for turns in rest]


def _order(record: Record, count: int, where: str) -> tuple[list[float] | None, list[float | None]]:
    """The scores (or None), and for each candidate the key to sort by: smaller is better, None is not ranked."""
    scores, ranks = record.get("scores"), record.get("ranks")
    if scores is None and ranks is None:
        if count == 1:
            return None, [0]
        raise BadRow("the record has neither scores nor ranks", reason="no scores", where=where)
    for name, values in (("scores", scores), ("ranks", ranks)):
        if values is None:
            continue
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise BadRow(f"the {name} are {kind(values)}, not a list", reason="wrong type", where=where)
        if len(values) != count:
            raise BadRow(
                f"{count} responses, but {len(values)} {name}",
                reason="different numbers of scores and responses",
                where=where,
            )
    if ranks is not None:
        rank_keys = [
            None if value is None else number(value, "rank", f"{where}, candidate {index}")
            for index, value in enumerate(ranks)
        ]
        if all(key is None for key in rank_keys):
            raise BadRow("none of the responses is ranked", reason="no responses", where=where)
    if scores is None:
        return None, rank_keys
    numbers = [number(value, "score", f"{where}, candidate {index}") for index, value in enumerate(scores)]
    score_keys: list[float | None] = [-number for number in numbers]
    if ranks is not None and (None in rank_keys or dense_ranks(rank_keys) != dense_ranks(score_keys)):
        raise BadRow(
            f"scores {numbers} and ranks {list(ranks)} put the responses in different orders",
            reason="scores and ranks disagree",
            where=where,
        )
    return numbers, score_keys


def _require_a_pair(given: int, ranks: list[int], where: str) -> None:
    if len(ranks) == 1:
        what = "only one response" if given == 1 else f"only one response is left of {given} (duplicates are merged)"
        raise BadRow(f"{what}, ranking needs at least two", reason="one response", where=where)
    if ranks[-1] == 0:
        raise BadRow(f"all {len(ranks)} responses are tied, there is no pair", reason="all tied", where=where)


def number(value: Any, name: str, where: str) -> float:
    """A finite number; BadRow, which calls it `name`, for anything else."""
    if isinstance(value, str):
        fix = "Decimals have a point, not a comma." if re.fullmatch(r"\s*-?\d+,\d+\s*", value) else FIX_ROW
        raise BadRow(
            f"the {name} is the text {value[:40]!r}, not a number", reason=f"bad {name}", where=where, fix=fix
        )
    if value is None or not isinstance(value, (bool, int, float)):
        what = f"the {name} is missing (null)" if value is None else f"the {name} is {kind(value)}, not a number"
        raise BadRow(what, reason=f"bad {name}", where=where)
    if not math.isfinite(value):
        raise BadRow(f"the {name} is {float(value)}, not a finite number", reason=f"bad {name}", where=where)
    return float(value)


def _response(response: Any, where: str) -> Response:
    """A text, or messages that begin and end with the assistant's; one message with nothing but text becomes text."""
    if isinstance(response, dict):
        response = [response]
    if isinstance(response, str) or not isinstance(response, Sequence):
        return content_text(response, where)
    if len(response) == 1 and isinstance(response[0], str):
        return content_text(response[0], where)
    messages = [
        clean_message(
            {"role": "assistant", **message} if isinstance(message, dict) and "from" not in message else message, where
        )
        for message in response
    ]
    roles = [message["role"] for message in messages]
    if not roles or len(roles) > 1 and {roles[0], roles[-1]} != {"assistant"}:
        raise BadRow(
            f"a response of {len(messages)} messages, one is expected",
            reason="wrong type",
            where=where,
            fix="Several turns begin and end with the assistant's; what comes before them belongs to the prompt.",
        )
    return messages[0]["content"] if len(messages) == 1 and messages[0].keys() == {"role", "content"} else messages


def record_id(value: Any, where: str) -> str:
    # The place in the file stays the same under slices and shuffles: "file.jsonl: line 12" gives "line-12".
    if value is None:
        return where.rsplit(": ", 1)[-1].replace(" ", "-")
    check_unicode(str(value), f"{where}, id")
    return str(value)
