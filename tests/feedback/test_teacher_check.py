"""What is known before sampling about whether a teacher can read the prompts."""

from __future__ import annotations

import pytest
from tiny_llama import write_base
from transformers import AutoTokenizer

from tuna_peft.data.bad_row import BadRow
from tuna_peft.errors import UserError
from tuna_peft.feedback.settings import ScoreSettings
from tuna_peft.feedback.teacher_check import check_teacher

ROWS = [{"id": i, "prompt": [{"role": role, "content": "w1"}]} for i, role in enumerate(("system", "user"))]
TEXTS = [{"id": 0, "prompt": "w1"}]
FUSSY = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0]['content'] }}"
)
SERVER = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}


@pytest.fixture
def teacher(tmp_path):
    """Writes a model with this chat template."""

    def write(template):
        folder = tmp_path / "teacher"
        write_base(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return str(folder)

    return write


def check(rows, *, online=True, **settings):
    check_teacher(rows, ScoreSettings.model_validate(settings), "stages.rank.data.score", online=online)


@pytest.mark.parametrize("server", [None, SERVER])
def test_messages_need_a_chat_template(teacher, server):
    name = teacher(None)
    settings = {"server": server, "tokenizer": name} if server else {"model": name}
    check(TEXTS, **settings)
    with pytest.raises(UserError, match="the teacher's tokenizer has no chat template") as caught:
        check(ROWS, **settings, online=False)
    assert f"stages.rank.data.score ({name})" in str(caught.value)


def test_one_prompt_that_the_template_takes_is_enough(teacher):
    name = teacher(FUSSY)
    check(ROWS, model=name)
    with pytest.raises(BadRow, match=r"prompt 0 for stages.rank.data.score .*no system"):
        check(ROWS[:1], model=name)


def test_a_server_without_a_tokenizer_takes_text():
    check(TEXTS, server=SERVER)
    check(ROWS, server=SERVER, generate={"n": 2})  # it renders them itself
    with pytest.raises(UserError, match="a completions server takes text"):
        check(ROWS, server=SERVER)


def test_what_is_not_here_is_checked_only_by_the_run():
    check(ROWS, model="nobody/nothing", online=False)
    with pytest.raises(UserError, match="nobody/nothing"):
        check(ROWS, model="nobody/nothing")
