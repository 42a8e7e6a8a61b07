"""What chat templates do to prompts and responses: templates in the manner of known families, checked row by row."""

import copy

import datasets
import pytest

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.encoder import TokenReport
from tuna_peft.data.load import encode_source
from tuna_peft.data.ranked import normalise
from tuna_peft.data.rendering import SPECIAL, WHITESPACE, Renderer
from tuna_peft.data.texts import prompt_ids, prompt_text, reads_the_clock, set_template_date
from tuna_peft.data.tokenize import encode_dataset, encode_ranked
from tuna_peft.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# DeepSeek-R1: reasoning is dropped from the history, and opened for generation.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[U]{{ m['content'] }}{% else %}"
    "{% set c = m['content'] %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "[A]{{ c }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[A]<think>\n{% endif %}"
)
# Qwen3: reasoning is written again, and an empty one where there is none.
QWEN3 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[U]' + m['content'] + '\n' }}{% else %}"
    "{% set c = m['content'] %}{% set r = '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{{ '[A]<think>\n' + r + '\n</think>\n\n' + c + eos_token + '\n' }}"
    "{% else %}{{ '[A]' + c + eos_token + '\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[A]' }}{% endif %}"
)
TRIM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
# Zephyr's without its generation prompt.
NO_GENERATION = CHATML.partition("{% if add_generation_prompt %}")[0]
DOUBLED = CHATML.replace("+ m['content'] +", "+ m['content'] + m['content'] +")
LOWER = CHATML.replace("m['content'] +", "m['content'] | lower +")
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DATED = "{{ '[' + strftime_now('%d %B %Y %H:%M') + ']' }}" + CHATML
TOOLS = (
    "{% for tool in tools or [] %}{{ '<tool>' + (tool | tojson) }}{% endfor %}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] }}{% for c in m['tool_calls'] or [] %}"
    "{{ '<call>' + c['function']['name'] + (c['function']['arguments'] | tojson) }}{% endfor %}"
    "{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

USER = [{"role": "user", "content": "2 + 3?"}]
THOUGHTS = ["<think>\nAdd.\n</think>\n\n5", "<think>\nGuess.\n</think>\n\n6"]
LENIENT, VERBATIM = PromptConfig(rendering="lenient"), PromptConfig(rendering="verbatim")


@pytest.fixture(scope="module")
def templated():
    """The package's own tokenizer with a chat template."""
    from transformers import AutoTokenizer

    from tuna_peft.models.base.load import resolve_model_path

    pico = AutoTokenizer.from_pretrained(resolve_model_path("builtin:pico-llama"))

    def make(template):
        tokenizer = copy.deepcopy(pico)
        tokenizer.chat_template = template
        return tokenizer

    return make


def encode(tokenizer, responses, messages=USER, prompt=None, tools=None, **options):
    row = {"prompt": messages, "completions": responses, "ranks": list(range(len(responses))), "tools": tools}
    return encode_ranked(normalise(row, "x.jsonl: line 7").record, tokenizer, max_length=None, prompt=prompt,
                         where="x.jsonl: line 7", **options)  # fmt: skip


def with_loss(tokenizer, row, k):
    """The text of the tokens of response k that carry loss."""
    from tuna_peft.data.encoder import loss_tokens

    gaps = row.get("completion_gaps", [[]] * (k + 1))[k]
    return tokenizer.decode(loss_tokens(row["completions_ids"][k], row["completion_skips"][k], gaps))


@pytest.mark.parametrize(
    ("template", "responses", "what"),
    [
        (R1, THOUGHTS, "generation starts from .*<think>"),
        (R1, ["5", "6"], "generation starts from .*<think>"),
        (NO_GENERATION, ["5", "6"], r"writes '<\|assistant\|>' between its generation prompt and the response"),
        (DOUBLED, ["Five.", "Six."], "after this response and .* after others"),
        (LOWER, ["Five.", "Six."], "changes the response: 'Five.' becomes 'five."),
        (CHATML, ["5</s>", "6"], "contains '</s>', which becomes a control token"),
        (CHATML, ["<s>5", "6"], "contains '<s>'"),
        (CHATML.replace("m['content']", "''"), ["5", "6"], "drops or changes message 0 of the prompt"),
        (REFUSES.replace("'system'", "'user'"), ["5", "6"], r"refuses these messages \(user\): no system role"),
        ("{{ messages[0]['content'] + messages[0]['name'] }}", ["5", "6"], "refuses these messages"),
    ],
)
def test_changed_texts_are_errors_that_name_the_line(templated, template, responses, what):
    tokenizer = templated(template)
    with pytest.raises(UserError, match=what) as caught:
        encode(tokenizer, responses)
    assert caught.value.where.startswith("x.jsonl: line 7")
    assert caught.value.fix


@pytest.mark.parametrize("template", [CHATML, QWEN3, TRIM, DATED, TOOLS])
@pytest.mark.parametrize("responses", [["Five.", "Six"], ["{'a': 1}", "a\n\nb", "🙂 e\u0301", "שלום"]])
def test_whole_texts_pass_and_training_starts_where_generation_does(templated, template, responses):
    tokenizer = templated(template)
    row = encode(tokenizer, responses)
    start = prompt_ids(USER, tokenizer)
    for k, response in enumerate(responses):
        said = with_loss(tokenizer, row, k)
        assert response in said
        assert said.endswith("</s>")
        boundary = len(row["prompt_ids"]) + row["completion_skips"][k]
        joint = row["prompt_ids"] + row["completions_ids"][k]
        assert joint[:boundary] == start[:boundary]


def test_reasoning_of_the_qwen3_kind_is_whole(templated):
    tokenizer = templated(QWEN3)
    row = encode(tokenizer, THOUGHTS)
    assert with_loss(tokenizer, row, 0) == THOUGHTS[0] + "</s>"
    without = encode(tokenizer, ["5", "6"])
    assert with_loss(tokenizer, without, 1) == "<think>\n\n</think>\n\n6</s>"  # as the model itself writes it


@pytest.mark.parametrize(("responses", "loss"), [
    (THOUGHTS, "Add.\n</think>\n\n5</s>"), (["5", "6"], "\n</think>\n\n5</s>"),
])  # fmt: skip
def test_a_generation_prompt_may_open_the_reasoning(templated, responses, loss):
    """As Qwen3's thinking models do: training starts where generation does, behind the opening."""
    tokenizer = templated(QWEN3.replace("{{ '[A]' }}{% endif %}", "{{ '[A]<think>\n' }}{% endif %}"))
    row = encode(tokenizer, responses)
    assert with_loss(tokenizer, row, 0).lstrip("\n") == loss.lstrip("\n")


def test_verbatim_keeps_responses_and_opens_reasoning_once(templated):
    tokenizer = templated(R1)
    row = encode(tokenizer, THOUGHTS, prompt=VERBATIM)
    whole = [tokenizer.decode(row["prompt_ids"] + ids) for ids in row["completions_ids"]]
    assert whole == [prompt_text(USER, tokenizer) + said.removeprefix("<think>\n") + "</s>" for said in THOUGHTS]
    spaces = encode(templated(TRIM), ["  Five \n", "6"], prompt=VERBATIM)
    assert tokenizer.decode(spaces["completions_ids"][0]).endswith("  Five \n</s>")


@pytest.mark.parametrize(("template", "prompt"), [(QWEN3, PromptConfig()), (R1, VERBATIM)])
def test_reasoning_without_loss(templated, template, prompt):
    tokenizer = templated(template)
    quiet = prompt.model_copy(update={"reasoning_loss": False})
    row = encode(tokenizer, [*THOUGHTS, "7"] if template == QWEN3 else THOUGHTS, prompt=quiet)
    assert [with_loss(tokenizer, row, k) for k in range(2)] == ["5</s>", "6</s>"]
    assert row["prompt_ids"] + row["completions_ids"][0] == (
        (full := encode(tokenizer, THOUGHTS, prompt=prompt))["prompt_ids"] + full["completions_ids"][0]
    )
    sft = datasets.Dataset.from_list([{"prompt": "Q:", "completion": "<think>a</think> b"}])
    [encoded], _ = encode_dataset(sft, tokenizer, max_length=None, prompt=quiet)
    kept = [label for label in encoded["labels"] if label != -100]
    assert tokenizer.decode(kept) in ("b</s>", " b</s>")


def test_equal_tokens_are_no_pair(templated):
    report = TokenReport()
    row = encode(templated(TRIM), ["Five.", "Six.", " Five.\n"], report=report)
    assert (len(row["completions_ids"]), row["ranks"], report.responses_merged) == (2, [0, 1], 1)
    assert report.changes == {WHITESPACE: 1}
    with pytest.raises(UserError, match="same tokens"):
        encode(templated(TRIM), ["Five.", " Five.\n"])
    assert len(encode(templated(TRIM), ["Five.", " Five.\n"], merge=False)["completions_ids"]) == 2
    with pytest.raises(UserError, match="same tokens"):
        encode(templated(R1), ["<think>a</think>5", "<think>b</think>5"], prompt=LENIENT)


def test_lenient_counts_and_names_the_first(templated, caplog):
    report = TokenReport()
    row = encode(templated(R1), [*THOUGHTS, "7</s>"], prompt=LENIENT, report=report)
    assert len(row["completions_ids"]) == 3
    assert report.changes["prompt differs from generation"] == 3
    assert report.changes[SPECIAL] == 1 and not caplog.text  # whoever gives a report logs its sums
    encode(templated(R1), THOUGHTS + ["7"], prompt=LENIENT)
    assert "3 responses, the first in x.jsonl: line 7, candidate 0" in caplog.text


def test_errors_count_all_rows(templated):
    import datasets

    good = {"id": "a", "prompt": USER, "completions": ["5", "6"], "scores": [1.0, 0.0]}
    bad = {**good, "prompt": [{"role": "system", "content": "s"}, *USER]}
    dataset = datasets.Dataset.from_list([good, bad, good, bad, bad])
    with pytest.raises(UserError, match=r"row 1 .*no system role \(3 of 5 rows: refused by the chat template\)"):
        encode_dataset(dataset, templated(REFUSES), max_length=None)
    encoded, report = encode_dataset(dataset, templated(REFUSES), max_length=None, on_bad_row="skip")
    assert (len(encoded), report.skipped) == (2, {"refused by the chat template": 3})


def test_a_refused_row_names_its_line_and_can_be_skipped(templated, jsonl):
    from transformers import PretrainedConfig

    good = {"id": "own", "prompt": USER, "completions": ["5", "6"], "scores": [1, 0]}
    path = jsonl(good, {**good, "prompt": [{"role": "system", "content": "s"}, *USER]}, good)
    options = {"max_length": None, "overflow": "error"}
    source, tokenizer = DataSource(path=path), templated(REFUSES)
    with pytest.raises(UserError) as caught:
        encode_source(source, PromptConfig(), tokenizer, PretrainedConfig(), **options)
    assert caught.value.where == f"{path}: line 2"
    skipping = source.model_copy(update={"on_bad_row": "skip"})
    rows, counts = encode_source(skipping, PromptConfig(), tokenizer, PretrainedConfig(), **options)
    assert (len(rows), counts["tokens"]["skipped"]) == (2, {"refused by the chat template": 1})


def test_the_date_is_fixed(templated):
    tokenizer = templated(DATED)
    assert reads_the_clock(tokenizer)
    assert not reads_the_clock(templated(CHATML))
    set_template_date(tokenizer, "2024-02-05")
    assert prompt_text(USER, tokenizer).startswith("[05 February 2024 00:00]<|user|>")
    # Llama 3's way to ask.
    asks = "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer.chat_template = asks + "{{ d }}"
    assert prompt_text(USER, tokenizer) == "05 Feb 2024"


CALL = {"id": "c1", "type": "function", "function": {"name": "get_depth", "arguments": '{"lake": "Brenno"}'}}
TOOL = {"type": "function", "function": {"name": "get_depth", "parameters": {}}}


def test_tool_calls_and_tools_reach_the_template(templated):
    tokenizer = templated(TOOLS)
    called = [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
              {"role": "tool", "name": "get_depth", "tool_call_id": "c1", "content": '{"metres": 41}'}]  # fmt: skip
    row = encode(tokenizer, ["41", "I do not know."], called, tools=[TOOL])
    start = tokenizer.decode(row["prompt_ids"])
    assert '<tool>{"type": "function"' in start
    assert '<call>get_depth{"lake": "Brenno"}' in start
    assert '{"metres": 41}' in start
    for messages, tools, what in ((called, None, "`tool_calls` of message 1"), (USER, [TOOL], "`tools`")):
        with pytest.raises(UserError, match=what):
            encode(templated(CHATML), ["41", "42"], messages, tools=tools)


def test_a_response_may_be_a_tool_call(templated):
    tokenizer = templated(TOOLS)
    call = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    row = encode(tokenizer, [call, "I do not know."], tools=[TOOL])
    assert with_loss(tokenizer, row, 0) == '<call>get_depth{"lake": "Brenno"}</s>'
    with pytest.raises(UserError, match="drops `tool_calls` of the response.*\n  Use a model whose template supports"):
        encode(templated(CHATML), [call, "I do not know."])


def test_templates_that_join_arguments_as_text(templated):
    """DeepSeek-R1's adds them to a text, where others want an object."""
    tokenizer = templated(TOOLS.replace("(c['function']['arguments'] | tojson)", "c['function']['arguments']"))
    called = [*USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, *USER]
    assert '<call>get_depth{"lake": "Brenno"}' in prompt_text(normalise(
        {"prompt": called, "completions": ["a", "b"], "ranks": [0, 1]}, "x").record["prompt"], tokenizer)  # fmt: skip


def test_several_turns_carry_loss_on_the_assistants_alone(templated):
    tokenizer = templated(CHATML)
    turns = [{"role": "assistant", "content": "Which?"}, {"role": "user", "content": "Any."},
             {"role": "assistant", "content": "5"}]  # fmt: skip
    row = encode(tokenizer, [turns, "6"])
    assert with_loss(tokenizer, row, 0) == "Which?</s>5</s>"
    assert with_loss(tokenizer, row, 1) == "6</s>"
    whole = tokenizer.decode(row["prompt_ids"] + row["completions_ids"][0])
    assert whole == "<|user|>2 + 3?</s>\n<|assistant|>Which?</s>\n<|user|>Any.</s>\n<|assistant|>5</s>"
    rows = datasets.Dataset.from_list([{"prompt": USER, "completion": turns}])
    [sft], _ = encode_dataset(rows, tokenizer, max_length=None)
    assert tokenizer.decode([label for label in sft["labels"] if label != -100]) == "Which?</s>5</s>"
    assert [int(label != -100) for label in sft["labels"]] == sft["completion_mask"]


# Phi-3 ends the whole text with EOS; Qwen3 (above) writes an empty block of reasoning in the last turn alone.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TURNS = [
    {"role": "assistant", "content": "Five."}, {"role": "user", "content": "And 4?"},
    {"role": "assistant", "content": "Six."},
]  # fmt: skip


def test_several_turns_where_only_the_last_one_ends_the_text(templated):
    tokenizer = templated(PHI3)
    row = encode(tokenizer, [TURNS, "6"])
    assert with_loss(tokenizer, row, 0) == "Five.<|end|>\nSix.<|end|>\n</s>"


def test_several_turns_of_the_qwen3_kind(templated):
    tokenizer = templated(QWEN3)
    with pytest.raises(UserError, match="changes a turn when others follow it") as caught:
        encode(tokenizer, [TURNS, "6"])
    assert "verbatim" not in caught.value.fix and "lenient" in caught.value.fix
    row = encode(tokenizer, [TURNS, "6"], prompt=LENIENT)
    # The first turn is without the block in the whole text: nothing of the user's turn carries loss.
    assert with_loss(tokenizer, row, 0).startswith("Five.") and "And 4?" not in with_loss(tokenizer, row, 0)
    assert "Six.</s>" in with_loss(tokenizer, row, 0)
    dropping = templated(QWEN3.replace("{% else %}{{ '[A]' + c +", "{% else %}{{ '[A]' +"))
    with pytest.raises(UserError, match="drops or changes a turn of the response: 'Five.'"):
        encode(dropping, [TURNS, "6"], prompt=LENIENT)


def test_gaps_reach_the_loss(templated):
    from tuna_peft.data.collate import RankedCollator

    tokenizer = templated(CHATML)
    turns = [{"role": "assistant", "content": "a"}, *USER, {"role": "assistant", "content": "b"}]
    row = encode(tokenizer, [turns, "c"])
    batch = RankedCollator(0)([row])
    targets = batch.targets_R[batch.predictions_P[batch.responses_P == 0]].tolist()
    assert tokenizer.decode(targets) == with_loss(tokenizer, row, 0) == "a</s>b</s>"


def test_special_tokens_of_a_prompt_are_left_alone(templated):
    """A prompt that another tool rendered holds them."""
    renderer = Renderer(templated(CHATML), "strict", True)
    record = {"prompt": "<s>[INST] a</s>", "completions": ["b</s>", "c"], "reference": None}
    assert renderer.render(record, "x", ["0", "1"])[0] == "<s>[INST] a</s>"
