"""Metrics outlive crashes, progress reads well off a terminal, and the curve is a picture."""

import io
import json

import pytest

from hybrid_jax import observe


def write(path, steps):
    with observe.MetricsFile(path) as metrics:
        for step in range(1, steps + 1):
            metrics.append({"step": step, "loss": 5.0 - step / 10})


def test_a_torn_last_line_is_passed_over_and_a_resume_continues(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 5)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [record["step"] for record in observe.read_metrics(path)] == [1, 2, 3, 4, 5]
    with observe.MetricsFile(path, keep_until_step=3) as metrics:
        metrics.append({"step": 4, "loss": float("nan")})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert observe.read_metrics(path)[-1]["loss"] is None


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2, is not a JSON object"):
        observe.read_metrics(path)
    assert observe.read_metrics(tmp_path / "absent") == []


def test_progress_off_a_terminal_is_lines_with_loss_speed_and_time_left(monkeypatch):
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    out = io.StringIO()
    with observe.Progress(out) as progress:
        progress.start(90, 100)
        progress.note("[square brackets] stay")
        for step in range(91, 101):
            progress.update(
                step, 4.5678, 1234.5, mfu=0.417 if step == 100 else None, skipped=step // 95
            )
    lines = out.getvalue().splitlines()
    assert lines[0] == "[square brackets] stay"
    assert "step 91/100 (91%)  loss 4.568  1,234 tokens/s  time left: measuring" in lines[1]
    # 4 s a step; a line at most every 10 s, and always the last.
    assert "step 94/100 (94%)" in lines[2] and lines[2].endswith("0:24 left")
    assert "tokens/s (42% MFU)  1 skipped  done" in lines[-1] and len(lines) == 5
    assert "skipped" not in lines[2]
    assert "\x1b" not in out.getvalue()


def test_the_curve_is_a_picture(tmp_path):
    path = tmp_path / "loss.png"
    records = [{"step": step, "loss": 6 - step / 10} for step in range(1, 30)]
    records[-1]["heldout_loss"] = 3.4
    observe.draw_losses(records, path, title="nano", unigram_entropy=5.0)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="no loss to draw"):
        observe.draw_losses([{"step": 1, "loss": None}], path)
