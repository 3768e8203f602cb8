"""The directory of a run: failed starts leave no trace, and one process at a time trains in it."""

import dataclasses
import io
import json
import os

import pytest

from hybrid_jax import data
from hybrid_jax.checkpoint import sidecars
from hybrid_jax.checkpoint.formats import folders
from hybrid_jax.data import chat
from hybrid_jax.training import run as run_lib
from scripts import quickstart
from tests.training import small


def _start(config, path):
    return small.train(config, path, stream=io.StringIO())


@pytest.mark.parametrize(
    ("model", "text", "message"),
    [
        ({"vocab_size": 100}, {}, "vocab_size=100 is too small"),
        ({}, {"tokenizer": "absent.json"}, "no tokenizer at absent.json"),
        (
            {},
            {"heldout_fraction": 0.999999},
            "All 12 documents of text fell into the held-out part",
        ),
        ({"vocab_size": 257}, {"tokenizer": "big.json"}, "vocab_size=257 ends at 256"),
    ],
)
def test_a_failed_start_takes_back_what_it_made(tmp_path, monkeypatch, model, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    config = small.small_run(small.write_text(tmp_path / "text"), model=small.small_model(**model))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **text))
    data.train_tokenizer(["alpha beta gamma " * 9], 270).save(tmp_path / "big.json")
    (tmp_path / "empty").mkdir()
    before = sorted(os.listdir(tmp_path))
    for path in (tmp_path / "new" / "run", tmp_path / "empty"):
        with pytest.raises((ValueError, OSError), match=message):
            _start(config, path)
    assert sorted(os.listdir(tmp_path)) == before
    assert not os.listdir(tmp_path / "empty")


def test_an_error_later_leaves_the_run(tmp_path):
    with (
        pytest.raises(ValueError, match="later"),
        run_lib.begin(small.small_run(), tmp_path) as run,
    ):
        run.checkpoints.mkdir()
        raise ValueError("later")
    assert run.config.exists()


def test_a_run_keeps_the_template_of_its_conversations(tmp_path):
    words = [{"prompt": f"Is {n} even?", "response": str(n % 2 == 0)} for n in range(20)]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, words)))
    config = small.small_run(file)
    (source,) = config.data.sources
    for template in (None, "minimax-m1"):
        sources = (dataclasses.replace(source, template=template, field="prompt"),)
        tuned = dataclasses.replace(
            config, data=dataclasses.replace(config.data, sources=sources, heldout_fraction=0.1)
        )
        with run_lib.begin(tuned, tmp_path / f"run-{template}") as run:
            run_lib.prepare_tokens(tuned, run, print)
        if template is None:
            assert not run.chat_template.exists()
        else:
            assert run.chat_template.read_text() == chat.published(template)
            assert run.chat_template.name in sidecars.find(folders.at(run.path))


def test_files_in_the_way_are_named_and_kept(tmp_path):
    (tmp_path / "file").write_text("mine")
    config = small.small_run()
    for path, message in (("file", "file is a file"), ("file/run", "file must be a directory")):
        with pytest.raises(OSError, match=message), run_lib.begin(config, tmp_path / path):
            pass
    with pytest.raises(FileExistsError, match="other files"), run_lib.begin(config, tmp_path):
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_a_second_process_is_told_who_holds_the_run(tmp_path):
    config = small.small_run()
    with run_lib.begin(config, tmp_path):
        # Another open file is another holder, in this process too.
        held = rf"held by process {os.getpid()} on .*Wait until it ends"
        with pytest.raises(BlockingIOError, match=held), run_lib.resume(config, tmp_path):
            pass
    with run_lib.resume(config, tmp_path) as run:
        assert run.read_config() == config


def test_a_torn_tokenizer_says_how_to_go_on(tmp_path):
    (tmp_path / "text").mkdir()
    config = small.small_run(small.write_text(tmp_path / "text"))
    with run_lib.begin(config, tmp_path / "run") as run:
        run.tokenizer.write_text("{")
    with pytest.raises(ValueError, match=r"not a tokenizer.json: .*Delete it to have one made"):
        small.train(config, run.path, resume=True, stream=io.StringIO())


def test_the_quickstart_replaces_leftovers_of_a_run_and_nothing_else(tmp_path):
    assert quickstart.foreign(tmp_path / "new") is None
    for name in ("loss.png", ".lock", "config.yaml.new", "export"):
        (tmp_path / name).write_text("")
    assert quickstart.foreign(tmp_path) is None
    (tmp_path / "thesis.txt").write_text("mine")
    assert quickstart.foreign(tmp_path) == "thesis.txt"
    assert quickstart.foreign(tmp_path / "thesis.txt") == "a file"
