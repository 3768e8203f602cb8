"""Arguments of a conversion that make no sense are refused before anything is touched."""

import os

import pytest

from hybrid_jax import cli
from hybrid_jax.checkpoint import convert
from hybrid_jax.checkpoint.convert import workers_for
from tests.checkpoint import published
from tests.checkpoint.published import original_config


def test_an_existing_destination_is_kept_unless_it_may_be_replaced(tmp_path):
    config = original_config()
    tensors = published.tensors(config)
    source = published.write_directory(tmp_path / "src", config, tensors)
    kept = tmp_path / "dst"
    kept.mkdir()
    convert(source, kept, "orbax")
    before = sorted(os.listdir(kept))
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert(source, kept, "hf")
    assert sorted(os.listdir(kept)) == before
    convert(source, kept, "hf-original", overwrite=True)
    assert published.read_directory(kept) == published.stored(tensors)
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a directory or not exist"):
        convert(source, tmp_path / "file", "hf")
    for inside in (source, source / "x", tmp_path):
        with pytest.raises(ValueError, match="must be apart"):
            convert(source, inside, "hf", overwrite=True)
    # What lies in these places is removed as what an earlier attempt has left.
    for name in (".dst.draft", ".dst.draft-0"):
        source = source.rename(tmp_path / name)
        with pytest.raises(ValueError, match=r"lies where the work on .* would lie"):
            convert(source, tmp_path / "dst", "hf", overwrite=True)
    assert len(os.listdir(source)) == 2


def test_arguments_and_sources_that_make_no_sense_are_refused(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    # An empty shell variable, which must not mean the working directory.
    for paths, what in ((("", "q"), "source"), (("q", ""), "destination")):
        assert cli.main(["convert", *paths, "--format", "hf"]) == 2
        assert f"The {what} must be a directory; got an empty path" in capsys.readouterr().err
    assert cli.main(["convert", "x", "\udcff", "--format", "hf"]) == 2
    assert "name must be UTF-8" in capsys.readouterr().err
    for option, bad in (
        *(("--shard-gb", value) for value in ("0", "-1", "nan", "inf", "1e300")),
        # Lists that long would fill the memory.
        *(("--workers", value) for value in ("0", "1000000000")),
        ("--process=0", "--of=1000000000"),
    ):
        assert cli.main(["convert", "x", "q", "--format", "hf", option, bad]) == 2
        assert f"{option.lstrip('-').split('=')[0]} must be" in capsys.readouterr().err
    for source, format, dtype, message in (
        ("x", "hf-orignal", None, "no format 'hf-orignal'.*'hf-original'"),
        ("x", "hf", "int8", "dtype must be one of float32, bfloat16"),
        ("x", "hf", None, "x does not exist"),
        ("empty", "hf", None, "empty is no checkpoint"),
        ("file", "hf", None, "file is a file"),
        ("loop", "hf", None, "loop does not exist"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / source, tmp_path / "dst", format, dtype)
    published.write_safetensors(tmp_path / "empty" / "model.safetensors", {})
    with pytest.raises(ValueError, match=r"config.json is missing"):
        convert(tmp_path / "empty", tmp_path / "dst", "hf")


def test_of_itself_it_takes_a_process_for_each_gb_and_core_and_no_more_than_four(monkeypatch):
    for cores, nbytes, wanted in ((2, 9e8, 1), (2, 8e9, 2), (8, 3.5e9, 3), (8, 9e11, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert workers_for(int(nbytes)) == wanted
