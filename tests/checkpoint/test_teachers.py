"""Teacher files, the default teacher, and `efficientad distill`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import pytest
import safetensors
import torch
from helpers_distill import FACTS, SMALL, draw_photos, make_run
from safetensors.torch import save_file

from efficientad.checkpoint import teachers
from efficientad.checkpoint.loading import load_teacher
from efficientad.checkpoint.safe_pickle import CheckpointError
from efficientad.checkpoint.teachers import (
    default_teacher,
    default_teacher_facts,
    named_teacher,
    shipped_teacher,
    teacher_facts,
    teacher_license,
)
from efficientad.cli.distill import add_distill, run_distill
from efficientad.distillation.backbones import ResNet18Trunk


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    return draw_photos(tmp_path_factory.mktemp("photos"))


def test_a_teacher_file_says_what_it_is(photos, tmp_path):
    run = make_run(SMALL, photos, tmp_path)
    teacher = run.run(tmp_path / "t.safetensors", every=4, license="ours", log=lambda line: None)
    facts = teacher_facts(tmp_path / "t.safetensors")
    assert facts["license"] == "ours"
    assert facts["recipe"]["seed"] == 0
    assert facts["recipe"]["grey"] == 0.3
    assert facts["photos"]["count"] == 8
    assert facts["backbone"] == FACTS
    assert facts["result"]["step"] == 4
    assert facts["result"]["measured"]["held_out"] == run.curve[-1]["held_out"]
    assert "efficientad distill" in facts["make your own"]
    loaded = load_teacher(tmp_path / "t.safetensors", "S")
    for name, parameter in teacher.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.half().float())
    assert (tmp_path / "t.safetensors").stat().st_size < 5.5e6


@pytest.mark.parametrize("name", teachers.SHIPPED)
def test_one_flipped_bit_of_a_teacher_is_noticed(tmp_path, name):
    data = bytearray(shipped_teacher(name).read_bytes())
    assert "sha256" in teacher_facts(shipped_teacher(name))
    data[-1001] ^= 1  # the lowest bit of a weight: a finite number as before
    (tmp_path / "t.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"t\.safetensors: the checksum of the file differs"):
        load_teacher(tmp_path / "t.safetensors")


def test_a_teacher_from_before_the_checksum_is_read(tmp_path):
    with safetensors.safe_open(shipped_teacher(), framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
        header = {k: v for k, v in file.metadata().items() if k != "sha256"}
    save_file(weights, tmp_path / "t.safetensors", header)
    assert load_teacher(tmp_path / "t.safetensors").size == "S"


def test_headers_of_other_files(tmp_path):
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert teacher_facts(tmp_path / "other.safetensors") == {}
    (tmp_path / "text").write_text("hello, this is not a safetensors file")
    with pytest.raises(ValueError, match="has no readable header"):
        teacher_facts(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        teacher_facts(tmp_path / "none")


def test_a_missing_default_teacher_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "__file__", str(tmp_path / "checkpoint" / "teachers.py"))
    with pytest.raises(FileNotFoundError, match="efficientad distill"):
        default_teacher()


def test_the_default_teacher():
    try:
        path = shipped_teacher()
    except FileNotFoundError:
        pytest.skip("no default teacher in this checkout")
    facts = default_teacher_facts()
    assert "research" in facts["license"]
    assert facts["result"]["measured"]["held_out_inner"] < 0.7
    assert path.stat().st_size < 5.6e6
    teacher = default_teacher()
    with torch.no_grad():
        features = teacher(torch.randn(1, 3, 64, 64))
    assert features.shape == (1, 384, 8, 8)
    assert 0.1 < features.std() < 2


def test_the_commercial_teachers_sources_may_all_be_used_so():
    facts = teacher_facts(named_teacher("commercial"))
    assert facts["license"].startswith("Apache-2.0")
    assert facts["sources"]["backbone"]["licence"].startswith("Apache-2.0")
    photos = facts["sources"]["photos"]
    assert len(photos) == facts["photos"]["count"] == 252
    free = re.compile(r"CC0|public[ -]domain|no known copyright restrictions", re.IGNORECASE)
    assert all(free.match(photo["licence"]) for photo in photos)
    assert teacher_license("commercial") == facts["license"]
    assert teacher_license(load_teacher(named_teacher("commercial"), "S")) == facts["license"]


def test_teachers_that_ship_are_found_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named_teacher("research") == named_teacher(Path("research")) == shipped_teacher()
    assert named_teacher("commercial").name == "teacher_small_commercial.safetensors"
    for other in (None, "./commercial", tmp_path / "commercial", "teacher.pth"):
        assert named_teacher(other) is other
    assert sum(named_teacher(name).stat().st_size for name in teachers.SHIPPED) < 12e6


def _command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_distill(parser.add_subparsers())
    return run_distill(parser.parse_args(["distill", *map(str, arguments)]))


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("trunk") / "trunk.safetensors"
    save_file(ResNet18Trunk().state_dict(), path)
    return path


def test_the_command_distils_and_resumes(photos, trunk, tmp_path, capsys):
    few = photos[:3]
    out = tmp_path / "teacher.safetensors"
    options = ["--backbone", trunk, "--out", out, "--crop", 36, "--bank", 1, "--held-out", 1,
               "--batch-size", 1, "--steps", 2, "--every", 1, "--workers", 1, "--device", "cpu",
               "--license", "ours"]  # fmt: skip
    assert _command(*few, *options) == 0
    text = capsys.readouterr().out
    assert "step 2 of 2" in text
    assert "held_out" in text
    assert load_teacher(out).size == "S"
    assert teacher_facts(out)["backbone"]["kind"] == "ResNet18Trunk"
    with pytest.raises(ValueError, match="exists; --resume goes on with it"):
        _command(*few, *options)
    (tmp_path / "sources.json").write_text('{"photos": "our own"}')
    assert _command(*few, *options, "--resume", "--sources", tmp_path / "sources.json") == 0
    assert teacher_facts(out)["sources"] == {"photos": "our own"}


def test_the_commands_errors_come_before_the_work(photos, trunk, tmp_path):
    few, out = photos[:3], tmp_path / "t.safetensors"
    (tmp_path / "empty").mkdir()
    good = ["--backbone", trunk, "--device", "cpu"]
    (tmp_path / "text").write_text("no JSON")
    (tmp_path / "list").write_text("[1]")
    cases = [
        ([tmp_path / "empty", *good, "--out", out], ValueError, "no image in folder"),
        ([tmp_path / "none", *good, "--out", out], FileNotFoundError, "no such file or folder"),
        ([*few, "--backbone", tmp_path / "b", "--out", out], FileNotFoundError, "no such backbone"),
        ([*few, *good, "--out", tmp_path / "no" / "t"], FileNotFoundError, "is not a folder"),
        ([*few, *good, "--out", tmp_path], ValueError, "a folder; it must name a file"),
        ([*few, *good, "--out", out, "--state", out], ValueError, "they are two files"),
        ([*few, *good, "--out", out, "--crop", 35], ValueError, "crop is 35"),
        ([*few, *good, "--out", out, "--every", 0], ValueError, "--every is 0; it must be an int"),
        ([*few, *good, "--out", out, "--sources", tmp_path / "text"], ValueError, "as JSON"),
        ([*few, *good, "--out", out, "--sources", tmp_path / "list"], ValueError, "an object"),
        ([*few, *good[:2], "--out", out, "--device", "no"], ValueError, "device is 'no'"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            _command(*arguments)
    assert not out.exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(photos, trunk, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="cannot be written"):
            _command(*photos, "--backbone", trunk, "--out", tmp_path / "t.safetensors")
    finally:
        tmp_path.chmod(0o700)
