import castlm.progress
from castlm.progress import shown_progress


def test_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(castlm.progress, "SECONDS_BETWEEN_LINES", 0)
    with shown_progress("perplexity, sequences") as told:
        told(1, 4)
        told(4, 4)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("castlm: perplexity, sequences 1/4, ")


def test_short_work_says_nothing(capsys):
    with shown_progress("sparsegpt, blocks") as told:
        told(1, 2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_goes_away(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the stream for a terminal
    with shown_progress("perplexity, sequences") as told:
        told(1, 2)
        told(2, 2)
    shown = capsys.readouterr().err
    assert "perplexity, sequences" in shown
    assert "\x1b[" in shown


def test_a_line_with_a_rate_leaves_out_what_an_earlier_start_did(capsys, monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(castlm.progress, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(castlm.progress.time, "monotonic", lambda: next(clock))
    with shown_progress("sampling, tokens", rate="tokens/s", before=1000) as told:
        told(3000, 5000)
    assert capsys.readouterr().err == "castlm: sampling, tokens 3,000/5,000, 200 tokens/s, 10 s left\n"
