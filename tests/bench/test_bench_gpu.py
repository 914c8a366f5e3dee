"""`python -m bench.gpu`: children that die, the command, and what comes out of it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import types

import helpers_bench as made
import pytest

from bench import record
from bench.gpu import run as gpu
from bench.gpu import steps
from bench.gpu.run_log import Budget, RunLog, run_all
from bench.report import plots, tables
from bench.report.format import number


def log(folder, earlier=None) -> RunLog:
    return RunLog(folder / "results.json", made.about(), earlier)


# ---- children ------------------------------------------------------------------------------------

CHILD = """
import json, os, sys, time
out = sys.argv[1]
again = "--resume" in sys.argv
path = os.path.join(out, "results.json")
if again:
    found = json.load(open(path))
else:
    found = {"about": {"parts": [{}], "keys": {"x/1": 1}, "left_out": []},
             "rows": [{"kind": "x", "key": "x/1", "part": 1}]}
    json.dump(found, open(path, "w"))
with open(os.path.join(out, "calls"), "a") as file:
    file.write(json.dumps([list(found["about"]["keys"]), sys.argv[2:]]) + "\\n")
print("> x/2", flush=True)
if not again:
    BREAK
print("= x/2 0.1 s", flush=True)
"""


def supervised(folder, broken: str, budget: float = 60.0, patience: float = 20.0):
    program = folder / "child.py"
    program.write_text(textwrap.dedent(CHILD).replace("BREAK", broken))
    command = [sys.executable, str(program), str(folder)]
    code = gpu.supervise(command, folder, Budget(budget), lambda key: patience)
    calls = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    return code, calls, record.read(folder / "results.json")


def test_a_crash_is_noted_and_a_new_child_goes_on(tmp_path):
    code, calls, found = supervised(tmp_path, "time.sleep(0.3), os._exit(11)")
    assert code == 0
    assert [keys for keys, _ in calls] == [["x/1"], ["x/1", "x/2"]]
    (failure,) = [row for row in found["rows"] if row["kind"] == "failure"]
    assert failure["name"] == "x/2"
    assert failure["error"] == "the process ended with 11"
    first, second = (arguments for _, arguments in calls)
    assert first[0] == second[0] == "--budget"
    assert 0 < float(second[1]) < float(first[1]) <= 60.0
    assert second[2:] == ["--resume", str(tmp_path / "results.json")]


def test_a_child_that_hangs_is_ended(tmp_path):
    code, calls, found = supervised(tmp_path, "time.sleep(300)", patience=2.0)
    assert (code, len(calls)) == (0, 2)
    assert [row["error"] for row in found["rows"] if row["kind"] == "failure"] == [
        "no answer within 2 s"
    ]


def test_what_the_budget_cut_off_is_left_out_and_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.0)
    code, calls, found = supervised(tmp_path, "time.sleep(300)", budget=2.0)
    assert (code, len(calls)) == (0, 1)
    assert found["about"]["left_out"] == ["x/2"]
    assert "x/2" not in found["about"]["keys"]
    assert not [row for row in found["rows"] if row["kind"] == "failure"]


def test_a_child_that_dies_at_its_start_is_not_tried_again(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    assert gpu.supervise(command, tmp_path, Budget(60), lambda key: 20.0) == 1


# ---- the command ---------------------------------------------------------------------------------


def test_the_budget_on_the_command_line():
    assert [gpu.seconds(text) for text in ("9m", "540s", "540", "1.5m")] == [540, 540, 540, 90]
    for text in ("", "9h", "0", "-3"):
        with pytest.raises(gpu.argparse.ArgumentTypeError, match="--budget is"):
            gpu.seconds(text)


def test_steps_come_in_order_of_value_with_the_ceilings_they_need():
    assert steps.chosen(None)[:4] == ["correctness", "ceilings", "kernels", "predictor"]
    assert steps.chosen(["sweeps", "correctness"]) == ["correctness", "ceilings", "sweeps"]
    assert steps.chosen(["predictor"]) == ["predictor"]
    with pytest.raises(ValueError, match="--only is 'speed'"):
        steps.chosen(["speed"])


def test_a_step_that_cannot_be_set_up_is_one_that_fails(tmp_path, monkeypatch):
    def broken(plan):
        raise ImportError("no module")
        yield

    monkeypatch.setitem(steps.STEPS, "sweeps", broken)
    monkeypatch.setitem(steps.STEPS, "kernels", lambda plan: iter([("x/1", list)]))
    found = log(tmp_path)
    plan = steps.Plan("cpu", 0, found)
    run_all(steps.measurements(plan, ["sweeps", "kernels"]), found, Budget(100))
    assert list(found.keys) == ["setup/sweeps", "x/1"]
    assert "ImportError: no module" in found.rows[0]["error"]


def test_every_process_measures_its_own_ceilings(tmp_path):
    first = log(tmp_path)
    plan = steps.Plan("cpu", 0, first)
    with pytest.raises(ValueError, match="products"):
        plan.ceilings()
    first.add("ceiling/part1", made.ceilings(), 1.0)
    assert plan.ceilings().tflops["bfloat16"] == 790.0
    second = log(tmp_path, first.path)
    plan = steps.Plan("cpu", 0, second)
    assert [key for key, _ in steps.ceilings_step(plan)] == ["ceiling/part2"]
    with pytest.raises(ValueError, match="products"):
        plan.ceilings()


def test_results_that_are_there_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--device", "cpu", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "already; resume it, or name another folder" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "{}"
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--out", str(tmp_path / "new"), "--resume", "missing.json"])
    assert "--resume is missing.json" in capsys.readouterr().err


def test_the_whole_command_on_the_cpu(tmp_path, capsys):
    arguments = ["--device", "cpu", "--budget", "80s", "--only", "ceilings", "--commit", "c0ffee"]
    assert gpu.main([*arguments, "--out", str(tmp_path)]) == 0
    found = record.read(tmp_path / "results.json")
    assert found["about"]["commit"] == "c0ffee"
    assert found["about"]["command"] == (
        "python -m bench.gpu --budget 80s --device cpu --only ceilings"
    )
    assert {row["kind"] for row in found["rows"]} == {"ceiling"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.txt"]
    shown = capsys.readouterr().out
    assert "= ceiling/part1" in shown
    assert "matmul 1024" in shown


def test_what_measures_needs_no_pytest():
    program = (
        "import sys; sys.modules['pytest'] = None; import bench.gpu.steps, bench.predictor.run; "
        "from bench.kernels import sweeps; print('all there')"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True)
    assert done.stdout == "all there\n", done.stderr


@pytest.mark.parametrize("room", ["census", "gpu", "predictor", "report"])
def test_rooms_that_are_commands(room):
    command = [sys.executable, "-m", f"bench.{room}", "--help"]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: bench.{room} ")


def test_a_rooms_command_is_noted_as_it_is_typed(monkeypatch):
    main = types.SimpleNamespace(__spec__=types.SimpleNamespace(name="bench.gpu.__main__"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["bench/gpu/__main__.py", "--budget", "9m"])
    assert record.about()["command"] == "python -m bench.gpu --budget 9m"
    main.__spec__ = types.SimpleNamespace(name="bench.predictor.soak")
    assert record.about()["command"] == "python -m bench.predictor.soak --budget 9m"
    main.__spec__ = None
    assert record.about()["command"] == "python bench/gpu/__main__.py --budget 9m"


def test_the_sanitizers_program_exists():
    (path,) = [word for word in steps.SANITIZED if word.startswith("tests/")]
    assert (record.ROOT / path).is_file()


def test_the_sanitizers_verdict_is_read(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$2: ========= ERROR SUMMARY: 3 errors"\nexit 9\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    row = steps.sanitize("memcheck", ("true",))
    assert (row["errors"], row["exit_code"], row["ok"]) == (3, 9, False)
    assert row["log_end"].startswith("memcheck:")
    tool.write_text('#!/bin/sh\necho "RACECHECK SUMMARY: 0 hazards displayed"\n')
    row = steps.sanitize("racecheck", ("true",))
    assert (row["errors"], row["ok"]) == (0, True)
    tool.write_text("#!/bin/sh\necho nothing\n")
    assert not steps.sanitize("racecheck", ("true",))["ok"]


# ---- what comes out ------------------------------------------------------------------------------


def test_few_and_small_files(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    found = made.results()
    record.write(tmp_path / "results.json", found["about"], found["rows"])
    files = gpu.finish(tmp_path)
    assert sorted(path.name for path in files) == [
        "floor.png", "latency.png", "results.json", "results.txt", "speed_error.png",
    ]  # fmt: skip
    assert sorted(tmp_path.iterdir()) == sorted(files)
    for path in files:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
            assert path.stat().st_size > 10_000
    monkeypatch.setattr(gpu, "MAX_BYTES", 5_000)
    with pytest.raises(ValueError, match="5 files"):
        gpu.finish(tmp_path)
    monkeypatch.setattr(gpu, "MAX_BYTES", 16 << 20)
    monkeypatch.setattr(gpu, "MAX_FILES", 4)
    with pytest.raises(ValueError, match="5 files"):
        gpu.finish(tmp_path)


def test_a_picture_without_rows_is_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    found = {"about": made.about("CPU"), "rows": [made.kernel()]}
    assert [path.name for path in plots.render(found, tmp_path)] == ["floor.png"]


def test_the_page_says_what_was_measured():
    page = tables.page(made.results())
    assert page.startswith("NVIDIA H200, driver 1.0, torch 2.11.0, triton 3.6.0, commit abc")
    assert page.index("sweeps") < page.index("end-to-end") < page.index("targets\n")
    line = next(x for x in page.splitlines() if x.startswith("| conv2 (conv_relu_pool) "))
    assert " 128x256x128B w8 s4 " in line  # of the sweep
    kernel = [x for x in page.splitlines() if x.startswith("| conv2 (conv_relu_pool) ")][1]
    cells = [cell.strip() for cell in kernel.strip("|").split("|")]
    assert cells[4:13] == ["51.2", "0.500", "600", "200", "76 %", "1.80", "-", "1.80", "1.0e-04"]
    assert "| peer/x" in page
    assert "Left out for lack of time (1 noted)" in page


def test_a_table_says_why_there_is_no_time():
    """That a result is wrong the row says in a field, whatever its reason is called."""
    reasons = [
        {"no_time": "wrong: map error 0.3 and more", "wrong": True},
        {"no_time": "not installed"},
        {"no_time": "failed: RuntimeError: wrong number of channels"},
    ]
    rows = [made.end_to_end(kind="peer", p50_ms=None, **reason) for reason in reasons]
    lines = tables.peers_table({"about": made.about(), "rows": rows}).splitlines()[2:]
    shown = [[cell.strip() for cell in line.strip("|").split("|")][6] for line in lines]
    assert shown == ["wrong", "not installed", "no time"]


def test_numbers_have_three_digits_or_more():
    shown = [number(x) for x in (0.123456, 1.23456, 12.3456, 123.456, 12345.6, 7, 0.0, None)]
    assert shown == ["0.123", "1.23", "12.3", "123", "12,346", "7", "0.00", "-"]
