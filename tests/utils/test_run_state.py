"""The state of a training in one file: exact, atomic, and refused when it is damaged."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import efficientad.utils.run_state as run_state
from efficientad.utils.run_state import load_state, optimizer_tensors, restore_optimizer, save_state

ROOT = Path(__file__).resolve().parents[2]


def _network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return net.to(memory_format=torch.channels_last)


def _adam(net: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-5)


def _names(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_parameters()]


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(step))
        loss = net(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_tensors_and_facts_come_back(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).t(),  # not contiguous
        "b": torch.arange(5),
        "c": torch.tensor(1.5, dtype=torch.float64),
        "d": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "e": torch.zeros(0, 3),
    }
    facts = {"step": 3, "curve": [{"step": 1, "loss": 0.1}], "name": "é", "none": None}
    save_state(tmp_path / "run.state", tensors, facts)
    found, found_facts = load_state(tmp_path / "run.state")
    assert found_facts == facts
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_tensors_that_share_memory_are_stored(tmp_path):
    shared = torch.randn(4)
    save_state(tmp_path / "run.state", {"a": shared, "b": shared, "c": shared[1:]}, {})
    assert torch.equal(load_state(tmp_path / "run.state")[0]["c"], shared[1:])


def test_resumed_adam_is_bit_for_bit_the_same(tmp_path):
    whole = _network()
    _train(whole, _adam(whole), range(6))

    broken = _network()
    optimizer = _adam(broken)
    _train(broken, optimizer, range(3))
    tensors = {f"model.{k}": v for k, v in broken.named_parameters()}
    tensors |= optimizer_tensors(optimizer, _names(broken))
    save_state(tmp_path / "run.state", tensors, {})

    tensors, _ = load_state(tmp_path / "run.state")
    resumed = _network()
    with torch.no_grad():
        for name, parameter in resumed.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    optimizer = _adam(resumed)
    restore_optimizer(optimizer, _names(resumed), tensors)
    _train(resumed, optimizer, range(3, 6))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_without_the_optimizer_the_steps_would_differ():
    """What the test above would see if nothing were restored."""
    whole, forgetful = _network(), _network()
    _train(whole, _adam(whole), range(6))
    _train(forgetful, _adam(forgetful), range(3))
    _train(forgetful, _adam(forgetful), range(3, 6))
    differs = [not torch.equal(p, forgetful.get_parameter(n)) for n, p in whole.named_parameters()]
    assert all(differs)


def test_an_optimizer_that_never_stepped_has_no_state():
    net = _network()
    optimizer = _adam(net)
    assert optimizer_tensors(optimizer, _names(net)) == {}
    stepped = _adam(net)
    _train(net, stepped, range(1))
    restore_optimizer(stepped, _names(net), {})
    assert optimizer_tensors(stepped, _names(net)) == {}


def test_a_half_or_foreign_optimizer_is_refused():
    net = _network()
    optimizer = _adam(net)
    _train(net, optimizer, range(1))
    tensors = optimizer_tensors(optimizer, _names(net))
    half = {k: v for k, v in tensors.items() if k != "optimizer.0.bias.exp_avg_sq"}
    with pytest.raises(ValueError, match=r"exp_avg_sq of 0\.bias is missing"):
        restore_optimizer(optimizer, _names(net), half)
    other = {**tensors, "optimizer.0.weight.exp_avg": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"exp_avg of 0\.weight has shape \(1,\)"):
        restore_optimizer(optimizer, _names(net), other)
    with pytest.raises(ValueError, match="1 names for 4 parameters"):
        optimizer_tensors(optimizer, ["a"])


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_state(tmp_path / "none")


@pytest.mark.parametrize("damage", ["empty", "short", "header", "text", "foreign", "facts", "deep"])
def test_damaged_and_foreign_files(tmp_path, damage):
    path = tmp_path / "run.state"
    save_state(path, {"a": torch.randn(100)}, {"step": 1})
    data = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "short":
        path.write_bytes(data[:-7])
    elif damage == "header":
        path.write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    elif damage == "text":
        path.write_text("not a state at all, only text")
    elif damage == "foreign":
        save_file({"a": torch.zeros(1)}, path)
    else:
        facts = "{" if damage == "facts" else "[" * 100_000
        save_file({"a": torch.zeros(1)}, path, {"format": run_state.FORMAT, "facts": facts})
    with pytest.raises(ValueError, match=r"run\.state is (damaged|not the state)"):
        load_state(path)


@pytest.mark.parametrize("where", ["tensor", "facts"])
def test_one_flipped_bit_is_noticed(tmp_path, where):
    path = tmp_path / "run.state"
    save_state(path, {"a": torch.ones(100)}, {"step": 1234})
    data = bytearray(path.read_bytes())
    data[-200 if where == "tensor" else data.index(b"1234")] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"run\.state is damaged: its checksum differs"):
        load_state(path)


def test_a_state_from_before_the_checksum_is_read(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "s", {"format": run_state.FORMAT, "facts": "{}"})
    assert load_state(tmp_path / "s")[1] == {}


def test_facts_that_json_cannot_hold(tmp_path):
    for facts in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises(ValueError, match="cannot be stored as JSON"):
            save_state(tmp_path / "run.state", {}, facts)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "run.state"
    save_state(path, {"a": torch.ones(3)}, {"step": 1})

    def full(tensors, part, header):
        Path(part).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_state, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*older state there is unchanged"):
        save_state(path, {"a": torch.zeros(3)}, {"step": 2})
    monkeypatch.undo()
    tensors, facts = load_state(path)
    assert facts == {"step": 1}
    assert torch.equal(tensors["a"], torch.ones(3))
    assert os.listdir(tmp_path) == ["run.state"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        save_state(tmp_path / "file" / "run.state", {}, {})


def test_a_killed_writer_leaves_a_whole_state(tmp_path):
    """SIGKILL at a random moment while states of 1 MB are written one after another."""
    path = tmp_path / "run.state"
    program = (
        "import sys, torch\n"
        "from efficientad.utils.run_state import save_state\n"
        "step = 0\n"
        "while True:\n"
        "    step += 1\n"
        "    save_state(sys.argv[1], {'a': torch.full((1 << 18,), float(step))}, {'step': step})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(8):  # a reader in the middle of the writing sees whole states too
            tensors, facts = load_state(path)
            assert (tensors["a"] == facts["step"]).all()
    finally:
        process.kill()
        process.wait()
    tensors, facts = load_state(path)
    assert (tensors["a"] == facts["step"]).all()
