"""`hybrid-jax eval`: a run's own held-out loss, files and tables, and what it says of bad input."""

import json
import math
import sys

import pytest

import hybrid_jax
from hybrid_jax import cli, evaluation
from hybrid_jax import model as models
from hybrid_jax.data import train_tokenizer
from tests.checkpoint import published
from tests.training import small


def saved(tmp_path, tokenizer=False):
    """A published directory without a tokenizer, or with one."""
    config = published.original_config()
    path = published.write_directory(tmp_path / "m", config, published.tensors(config))
    if tokenizer:
        train_tokenizer(["alpha beta"], 300).save(path / "tokenizer.json")
    return path


def speaking(tmp_path):
    """A model that is as large as its tokenizer, which the published one is not."""
    path = tmp_path / "m"
    hybrid_jax.save(models.build(small.small_model(num_kv_heads=2)), path, format="orbax")
    train_tokenizer(["alpha beta"], small.VOCAB).save(path / "tokenizer.json")
    return path


def complaint(capsys, *options) -> str:
    assert cli.main(["eval", *map(str, options)]) == 2
    return capsys.readouterr().err


def test_a_run_is_measured_on_what_it_held_out(tmp_path, capsys):
    text, run, out = tmp_path / "text", tmp_path / "run", tmp_path / "out"
    text.mkdir()
    outcome = small.train(small.small_run(small.write_text(text)), run)
    options = ["--task", "perplexity", "mqar", "--perplexity.lengths", "16", "32"]
    options += ["--mqar.pairs", "2", "4", "--mqar.length", "32", "--mqar.rows", "2", "--seed", "3"]
    assert cli.main(["eval", str(run), "--out", str(out), *options]) == 0
    perplexity, mqar = (json.loads((out / f"{name}.json").read_text()) for name in options[1:3])
    assert [each["length"] for each in perplexity["lengths"]] == [16, 32]
    # At the run's own length. Two float32 sums over the same tokens, in another order.
    assert perplexity["lengths"][1]["nats"] == pytest.approx(outcome.heldout_loss, rel=1e-5)
    assert [each["questions"] for each in mqar["pairs"]] == [2 * 28, 2 * 24]
    assert (mqar["model"], mqar["seed"]) == ("small", 3)
    assert mqar["settings"]["pairs"] == [2, 4]
    for name in options[1:3]:
        assert (out / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    said = capsys.readouterr()
    assert f"up to 32 {perplexity['lengths'][1]['nats']:.4f}" in " ".join(said.out.split())
    assert "mqar ..." in said.err
    options = ["--task", "quantization", "--quantize", "int8", "--perplexity.lengths", "32"]
    assert cli.main(["eval", str(run), "--out", str(out), *options]) == 0
    report = json.loads((out / "quantization.json").read_text())
    assert report["reference_perplexity"] == pytest.approx(math.exp(outcome.heldout_loss), rel=1e-4)
    # Half a percent is what int8 may cost; something it does change.
    assert 0 < abs(report["ratio"] - 1) < 0.005


@pytest.mark.nightly
def test_a_mesh_changes_no_figure(tmp_path):
    path, out = speaking(tmp_path), tmp_path / "out"
    options = ["--task", "token-needle", "needle", "--out", str(out), "--token-needle.lengths"]
    options += ["40", "--token-needle.samples", "3", "--needle.lengths", "400"]
    found = []
    for mesh in ([], ["--mesh", "data=4,tensor=2"]):
        assert cli.main(["eval", str(path), *options, *mesh]) == 0
        reports = [json.loads((out / f"{name}.json").read_text()) for name in options[1:3]]
        found.append([cell["logprob"] for report in reports for cell in report["cells"]])
    # float32 sums over parts.
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.nightly
def test_a_task_of_lm_eval_from_the_command_line(tmp_path):
    pytest.importorskip("lm_eval")
    path, data = speaking(tmp_path), tmp_path / "data.jsonl"
    data.write_text('{"q": "alpha", "a": " beta"}\n{"q": "beta", "a": " alpha"}\n')
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\noutput_type: loglikelihood\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {data}.cache}}\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\nmetric_list: [{metric: perplexity}]\n"
    )
    options = ["--task", "lm_eval:own", "--include-path", str(tmp_path), "--limit", "1"]
    assert cli.main(["eval", str(path), "--out", str(tmp_path / "out"), *options]) == 0
    report = json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    assert report["results"]["own"]["perplexity,none"] > 1
    assert report["samples"]["own"] == {"original": 2, "effective": 1}


def test_bad_input_is_one_sentence_before_the_model_is_read(tmp_path, capsys):
    path, out = saved(tmp_path), ("--out", tmp_path / "out")
    words = complaint(capsys, path, *out, "--task", "perplexty")
    assert "There is no task 'perplexty'" in words and "perplexity" in words
    assert "has no held-out text of its own" in complaint(
        capsys, path, *out, "--task", "perplexity"
    )
    assert "tokenizer.json, which needle needs" in complaint(capsys, path, *out, "--task", "needle")
    assert "is not a directory" in complaint(capsys, tmp_path / "x", *out, "--task", "mqar")
    words = complaint(capsys, path, "--out", tmp_path / "out", "--task", "mqar", "--limit", 0)
    assert "--limit must be at least 1; got 0" in words
    words = complaint(capsys, path, *out, "--task", "quantization")
    assert "say with --quantize int8 or fp8 which" in words
    words = complaint(capsys, path, *out, "--task", "mqar", "--quantize", "int4")
    assert "one of int8, fp8; got 'int4'" in words
    (tmp_path / "file").write_text("")
    options = (path, "--out", tmp_path / "file", "--task", "mqar")
    assert "is no directory to write to" in complaint(capsys, *options)
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_short_says_so(tmp_path, capsys):
    path = saved(tmp_path, tokenizer=True)
    (tmp_path / "a.txt").write_text("alpha beta")
    options = (path, "--out", tmp_path / "out", "--perplexity.text", tmp_path / "a.txt")
    words = complaint(capsys, *options, "--task", "perplexity")
    assert "No document of the text gives a context of 1,024 tokens" in words


def test_without_lm_eval_the_way_out_is_named(tmp_path, capsys, monkeypatch):
    path = saved(tmp_path, tokenizer=True)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "hybrid_jax.evaluation.harness", raising=False)
    monkeypatch.delattr(evaluation, "harness", raising=False)
    words = complaint(capsys, path, "--out", tmp_path / "out", "--task", "lm_eval:x")
    assert "pip install 'hybrid-jax[eval]'" in words
