from run_folder import write_run
from typer.testing import CliRunner

from tuna_peft.cli.app import app


def test_report_of_a_run_that_is_not_finished(tmp_path):
    folder = write_run(tmp_path / "run", finished=2)
    result = CliRunner().invoke(app, ["report", str(folder), "--prompt", "g3"])
    assert result.exit_code == 0 and "report.html" in result.output
    page = (folder / "report.html").read_text()
    assert "Not finished: contextual." in page and "answer 2 to 3" in page


def test_report_of_no_run(tmp_path):
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (
        result.exit_code == 2
        and "no folder of a run or an evaluation" in result.output
        and "Traceback" not in result.output
    )
