import copy
import re
from html.parser import HTMLParser

import pytest
from run_folder import HARM, STAGES, write_run

from tuna_peft.evaluation.report.build import build_report
from tuna_peft.evaluation.report.markdown import render_markdown
from tuna_peft.evaluation.report.page import render_page

TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "h3", "p", "div", "nav", "a",
    "section", "table", "thead", "tbody", "tr", "th", "td", "span", "small", "b", "i", "em", "figure", "figcaption",
    "ul", "li", "details", "summary", "pre", "footer", "svg", "g", "defs", "path", "use", "text",
}  # fmt: skip


class Tags(HTMLParser):
    """Every tag with its attributes, and the text between them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def report(run_folder):
    return build_report(run_folder)


def test_what_a_model_says_is_text_and_nothing_else(report):
    parsed = Tags(render_page(report))
    assert {tag for tag, _ in parsed.tags} <= TAGS  # no script, no img, no link
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert parsed.texts.count(HARM) == len(STAGES) + 2  # the prompt, and the response of each stage


def test_names_stages_and_recipes_are_escaped_everywhere(report):
    wicked = copy.deepcopy(report)
    for part in ("stages", "evaluation", "changes", "curves", "v_by_rank", "by_length"):
        wicked[part] = {f"{name}{HARM}": value for name, value in wicked[part].items()}
    wicked["name"] = wicked["recipe"] = wicked["base"]["model"] = wicked["environment"]["gpu"] = HARM
    wicked["samples"][0]["references"] = [HARM]
    wicked["data"] = {HARM: {HARM: HARM}}
    assert {tag for tag, _ in Tags(render_page(wicked)).tags} <= TAGS


def test_nothing_is_fetched(report):
    page = render_page(report)
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page
    for _, attributes in Tags(page).tags:
        assert "src" not in attributes and attributes.get("href", "#").startswith("#")


def test_every_figure_has_data_and_says_what_it_shows(report):
    page = render_page(report)
    drawings = re.findall("<svg.*?</svg>", page, flags=re.DOTALL)
    # Two tasks, v by rank of base and stages, curves (loss, tokens, rate; loss, order, v, rate), length, costs.
    assert len(drawings) == page.count("<figure>") == 2 + 4 + (3 + 4 + 4) + 2 + 2
    marks = re.compile(r"(fill|stroke): (color-mix|var\(--(accent|quiet|best|worst))")  # colors of data, not of axes
    for drawing in drawings:
        assert marks.search(drawing) and re.search('aria-label="[^"]+"', drawing)
        assert not re.search('(?:d|x|y)="[^"]*(nan|inf)', drawing)


def test_a_part_without_data_is_left_out(tmp_path):
    bare = write_run(tmp_path / "run", finished=0)
    page = render_page(build_report(bare))
    assert 'id="training"' not in page and "Not finished: sft, probabilistic, contextual" in page


def test_numbers_say_what_they_are(report):
    report["data"]["sft"] |= {"omitted": 0}
    page = render_page(report)
    assert "records 100, kept 98; tokens: longest 70</td>" in page
    assert "in which the model finds the better response more likely" in page
    assert "40 prompts, others are excluded" in page


def test_curves_with_infinite_values_are_drawn_without_them(report):
    report["curves"]["sft"]["loss"]["loss"][3][1] = float("inf")
    report["curves"]["sft"]["loss"]["loss"][4][1] = float("nan")
    assert not re.search(r'd="[^"]*(nan|inf)', render_page(report), flags=re.IGNORECASE)


def test_markdown_has_the_table_and_escapes_responses(report):
    text = render_markdown(report)
    assert "| after | ranking accuracy | response score |" in text
    shown = report["evaluation"]["contextual"]["ranking"]["metrics"]["pair_accuracy"]
    assert f"{shown['value']:.3f} ({shown['low']:.3f} to {shown['high']:.3f})" in text
    assert "- response score: 1, the grader failed: &lt;oops&gt;" in text
    assert "<script" not in text and "&lt;script" in text and "\\# heading" in text and "\\|" in text
