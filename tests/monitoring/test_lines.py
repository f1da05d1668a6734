"""Logs and histories with torn lines."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from support.monitoring_cases import drawn, profile_of

from softprompt_fast.base.files import append_json_lines
from softprompt_fast.monitoring.lines import HISTORY_FILE, read_history, read_lines, read_log

PROFILE = profile_of(drawn(40, 0))


def test_a_torn_line_is_left_out_and_the_next_one_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "sub" / "lines.jsonl"
    append_json_lines(path, [{"a": 1}])
    with path.open("a") as file:
        file.write('{"a": 2, "b')
    append_json_lines(path, [{"a": 3}])
    with caplog.at_level(logging.WARNING):
        assert read_lines(path) == [{"a": 1}, {"a": 3}]
    assert "1 of its lines are torn and left out (line 2)" in caplog.text


def test_history_is_of_one_prompt(tmp_path: Path) -> None:
    report = {"digest": "0123", "time": "2026-01-01T00:00:00+00:00", "tests": [], "rows": 1}
    for values in (report, report | {"digest": "other"}, {"digest": "0123"}):
        append_json_lines(tmp_path / HISTORY_FILE, [values])
    assert read_history(tmp_path, "0123") == [report]
    assert read_history(tmp_path / "none", "0123") == []


def test_a_log_of_another_prompt_is_refused_and_a_mixed_one_is_divided(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "answers.log"
    for name, digest in (("tweets", "9"), ("tweets", "9"), ("movies", "0123")):
        append_json_lines(path, [{"prompt": name, "digest": digest}])
    with caplog.at_level(logging.WARNING):
        assert read_log(path, PROFILE) == [{"prompt": "movies", "digest": "0123"}]
    assert "2 rows of 'tweets' (9) are left out" in caplog.text
    with pytest.raises(ValueError, match=r"rows of prompt 'movies' \(77\), got 2 rows of 'tweets' \(9\)"):
        read_log(path, profile_of(drawn(40, 0), digest="77"))
    path.write_text("")
    with pytest.raises(ValueError, match="got none"):
        read_log(path, PROFILE)
