"""The report is one file that shows what a run recorded, escapes it, and needs nothing else."""

import html.parser
import json
import re

import pytest

from hybrid_jax import cli
from hybrid_jax.observe.report import figures, panels, recorded

HOSTILE = '<i>&amp; $x$ "it\'s"'


def record(step: int, **more) -> dict:
    loss = 5 - step / 20
    return {
        "step": step,
        "loss": loss,
        "tokens": 128,
        "tokens_per_second": 1000.0 + step,
        "peak_memory_bytes": 2 << 30,
        "learning_rate": 1e-3,
        "gradient_norm": 1.0,
        "expert_load_entropy": 0.9,
        "skipped": 0.0,
        "loss_by_position": [loss, loss + 1],
        "something_new": 3.0,
    } | more


def write(folder, records, config="seed: 0\nmodel:\n  name: a\n", starts=(0,)):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (folder / "config.yaml").write_text(config)
    environments = [{"step": s, "environment": {"jax": f"0.{s}"}} for s in starts]
    (folder / "environment.json").write_text(json.dumps(environments))
    return folder


class Page(html.parser.HTMLParser):
    """What a browser would make of it: open elements, texts, addresses."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.tags, self.addresses = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def made(capsys, out, *runs) -> tuple[str, Page]:
    assert cli.main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    text = out.read_text()
    return text, Page(text)


def test_two_runs_side_by_side_in_one_file_that_needs_no_network(tmp_path, capsys):
    events = [
        record(3, skipped=1.0, loss=None),
        record(4, skipped=1.0, loss=80.0, rewound_to=2),
        record(5, checkpoint_failed=4, heldout_loss=4.2, state_norms=[0.1, 0.2]),
    ]
    first = write(tmp_path / HOSTILE, [record(1), record(2), *events], starts=(0, 2))
    second = write(tmp_path / "b", [record(s) for s in range(1, 4)], "seed: 7\nnew: <b>\n")
    text, page = made(capsys, tmp_path / "report.html", first, second)
    words = " ".join(" ".join(page.text).split())
    # Everything is inside: marks that figures refer to are their own.
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import|<script", text)
    # What runs are called and hold is text, never markup or mathematics.
    assert HOSTILE in words and "i" not in page.tags and "b" not in page.tags
    assert f"{HOSTILE}, training (mean)" in page.text
    for title in (
        *("Loss", "Learning rate", "Throughput", "Peak memory", "Gradient norm"),
        *("Router load entropy", "Loss by position", "Memories of lightning layers"),
        "Something new",
    ):
        assert page.text.count(title) == 1, title
    assert "Use of the devices" not in words  # on these devices nobody knows the peak
    assert page.tags.count("svg") == 9
    for axis in ("loss (nats per token)", "tokens per second", "memory (GB)", "step"):
        assert axis in page.text
    assert "update skipped, the loss or the gradient was no number" in words
    assert "update skipped, a spike: loss 80, gradient norm 1" in words
    assert "parameters went back to those of step 2" in words
    assert "the checkpoint of step 4 was not written" in words
    assert "resumed after this step; changed: jax: 0.0 -> 0.2" in words
    differences = words[words.index("Differences") : words.index("Configurations")]
    assert "seed 0 7" in differences and "new absent '<b>'" in differences
    assert "model.name 'a' absent" in differences
    # Curves of both runs, each in its own colour.
    assert figures.colour_of(0) in text and figures.colour_of(1) in text


def test_one_run_has_no_differences_and_says_that_nothing_happened(tmp_path, capsys):
    run = write(tmp_path / "a", [record(1)])
    _, page = made(capsys, tmp_path / "report.html", run)
    words = " ".join(page.text)
    assert "None: no update was skipped" in words and "Differences" not in words


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([1.1, 1.9], {"1.2", "1.8"}), ([0.5, 30.0], {"1", "10"}), ([0.0, 5.0], {"2"})],
)
def test_an_axis_has_numbers_whatever_the_values(values, ticks):
    line = figures.Line(([1, 2], values), "a", "#000000")
    svg = figures.draw("norm", [line], ylabel="norm", is_logarithmic=True)
    assert ticks <= set(Page(svg).text)


def test_long_runs_are_thinned_without_losing_their_mean():
    steps, values = list(range(1, 10_002)), [float(s % 10) for s in range(10_001)]
    thin_steps, thin = figures.thinned((steps, values))
    assert len(thin) <= figures.MAX_POINTS and thin_steps[-1] == 10_001
    assert sum(thin) / len(thin) == pytest.approx(4.5, abs=0.05)
    assert figures.thinned(([1, 2], [3.0, 4.0])) == ([1, 2], [3.0, 4.0])


def test_only_finite_numbers_are_drawn():
    records = [record(1, loss="high"), record(2, loss=True), record(3, loss=2.0), {"step": 4}]
    run = recorded.Recorded("a", records, {}, [])
    assert recorded.curve(run, "loss") == ([3], [2.0])
    records[0]["loss_by_position"] = [1.0, None, 3.0]
    assert recorded.curves(run, "loss_by_position")[2] == ([1], [3.0])


def refused(capsys, *arguments) -> str:
    assert cli.main(["report", *map(str, arguments)]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_bad_input_is_named(tmp_path, capsys):
    out = ("--out", tmp_path / "report.html")
    assert "Name at least one run" in refused(capsys, *out)
    assert "holds no run with metrics: there is no metrics.jsonl" in refused(capsys, tmp_path, *out)
    assert "recorded no step yet" in refused(capsys, write(tmp_path / "empty", []), *out)
    run = write(tmp_path / "run", [record(1), record(2)])
    assert "named twice" in refused(capsys, run, run, *out)
    assert "No such file or directory" in refused(capsys, run, "--out", tmp_path / "no" / "x.html")
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('{"step": 1', '{"step" 1'))
    assert "line 1, is not a JSON object with a step" in refused(capsys, run, *out)
    assert not (tmp_path / "report.html").exists()


def test_a_run_without_a_readable_configuration_is_drawn_and_the_gap_is_said(tmp_path, capsys):
    run = write(tmp_path / "a", [record(1)], config="{")
    (run / "environment.json").unlink()
    assert cli.main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    assert "configuration of" in capsys.readouterr().err
    assert "not known" in (tmp_path / "report.html").read_text()


def test_elements_have_the_names_of_their_sources_and_positions_and_documents_their_lengths():
    lengths = {"edges": [1, 2, 4, 8], "documents": [0, 3, 1], "tokens": [0, 9, 7]}
    records = [
        record(step, loss_by_source=[2.0, 3.0], heldout_loss_by_source=[2.5, None])
        for step in (1, 2)
    ]
    run = recorded.Recorded(
        "run", records, {}, [], sources=("web", "code"), lengths={"web": lengths}
    )
    drawn = dict(panels.draw([run]))
    assert ">web<" in drawn["Loss by source"] and ">code<" in drawn["Loss by source"]
    assert ">0-127<" in drawn["Loss by position"] and ">128-255<" in drawn["Loss by position"]
    assert "code" not in drawn["Held-out loss by source"]
    assert "tokens in a document" in drawn["Document lengths"]
