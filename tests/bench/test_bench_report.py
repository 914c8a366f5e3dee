"""README.md, docs/kernels.md and results files: a figure that the files do not give is found."""

from __future__ import annotations

import subprocess
import sys

import helpers_bench as made
import pytest

from bench import record
from bench.report import readme, tables

FILE = "bench/results/h200.json"
PEER = f"{FILE}#peer/S/256/float16/b1"
KERNEL = f"{FILE}#kernel/conv_relu_pool/S/conv2/b1/float16"
ROW = f"{FILE}#end_to_end/S/256/float16/b1"
TEXT = """# Title

<!-- figures: peers h200.json -->
<!-- end figures -->

One frame takes 0.2 ms ([H200](bench/results/h200.json#end_to_end/S/256/float16/b1)); on paper it
was 2.2 ms, the published figure ([paper](https://arxiv.org/abs/2303.14535)).

- At batch 1 it is 1.7x as fast as torch.compile
  ([H200](bench/results/h200.json#peer/S/256/float16/b1)).

```bash
sleep 3 ms  # code says what it likes: 99 ms
```

Images of 256x256 pixels, `4 ms` in code, tried 3 times, 16 MiB.
"""


@pytest.fixture
def folder(tmp_path):
    """A checkout with a README and one results file."""
    found = made.results()
    record.write(tmp_path / "bench" / "results" / "h200.json", found["about"], found["rows"])
    (tmp_path / "bench" / "results" / "old.json").write_text('[{"pillow_ms": 12.34}]')
    write(tmp_path, readme.make(TEXT, tmp_path))
    return tmp_path


def write(folder, text: str) -> None:
    (folder / "README.md").write_text(text)


def check(folder, *more: str) -> int:
    return readme.main([*more, "--file", str(folder / "README.md"), "--root", str(folder)])


def doctor(folder, old: str, new: str) -> None:
    text = (folder / "README.md").read_text()
    assert text.count(old) >= 1
    write(folder, text.replace(old, new, 1))


def test_what_the_files_give_passes(folder, capsys):
    text = (folder / "README.md").read_text()
    assert tables.peers_table(made.results()) in text
    assert "[h200.json](bench/results/h200.json): NVIDIA H200, driver 1.0" in text
    assert check(folder, "--check") == 0
    assert capsys.readouterr().err == ""


def test_a_doctored_figure_in_a_table_is_found(folder, capsys):
    row = next(x for x in (folder / "README.md").read_text().splitlines() if "max-autotune" in x)
    assert " 1.70 " in row
    doctor(folder, row, row.replace(" 1.70 ", " 2.70 "))
    assert check(folder, "--check") == 1
    said = capsys.readouterr().err
    assert "figures peers h200.json" in said
    assert "2.70" in said
    assert "1.70" in said
    assert check(folder) == 0  # makes it anew
    assert check(folder, "--check") == 0


def test_a_results_file_that_changed_is_found(folder, capsys):
    path = folder / "bench" / "results" / "h200.json"
    path.write_text(path.read_text().replace('"ratio": 1.7', '"ratio": 1.6'))
    assert check(folder, "--check") == 1
    assert "figures peers h200.json" in capsys.readouterr().err


def test_a_missing_file_is_found(folder, capsys):
    before = (folder / "README.md").read_text()
    (folder / "bench" / "results" / "h200.json").unlink()
    assert check(folder, "--check") == 1
    said = capsys.readouterr().err
    assert "figures peers: bench/results/h200.json is missing" in said
    assert said.count("bench/results/h200.json is missing") == 3  # the table and both sentences
    assert check(folder) == 1
    assert (folder / "README.md").read_text() == before


def test_a_doctored_figure_in_a_sentence_is_found(folder, capsys):
    doctor(folder, "takes 0.2 ms", "takes 0.1 ms")
    assert check(folder, "--check") == 1
    lines = (folder / "README.md").read_text().splitlines()
    line = next(i for i, text in enumerate(lines, start=1) if "takes 0.1 ms" in text)
    assert capsys.readouterr().err.strip() == f"README.md, line {line}: '0.1 ms' is not in {ROW}"


@pytest.mark.parametrize(
    ("sentence", "problem"),
    [
        ("It takes 0.2 ms.", "'0.2 ms' has neither a link"),
        ("It takes 0.2&nbsp;ms.", "'0.2&nbsp;ms' has neither a link"),
        ("| fast | 0.2 ms |", "'0.2 ms' has neither a link"),
        ("It does 5,000 images/s.", "'5,000 images/s' has neither a link"),
        ("It is 4x faster.", "'4x' has neither a link"),
        ("It is 4 times as fast.", "'4 times' has neither a link"),
        ("It reaches 600 TFLOP/s.", "'600 TFLOP/s' has neither a link"),
        ("Others take 2.2 ms ([paper](https://arxiv.org/abs/1)).", "'2.2 ms' has neither a link"),
        ("The published figure is 2.2 ms.", "'2.2 ms' has neither a link"),
        # The unit decides the field: 1.7 is a ratio there, and no time.
        (f"It takes 1.7 ms ([H200]({ROW})).", f"'1.7 ms' is not in {ROW}"),
        (f"It takes 0.25 ms ([H200]({ROW})).", "'0.25 ms' is not in"),
        # 0.13 ms stand in another row; a file of many rows would hold any number.
        (f"It takes 0.13 ms ([H200]({ROW})).", "'0.13 ms' is not in"),
        (f"It takes 0.2 ms ([H200]({FILE})).", "and not the key of one of its rows"),
        (f"It takes 0.2 ms ([H200]({FILE}#none)).", "and not the key of one of its rows"),
        # A link belongs to the figures before it.
        (
            f"Ours takes 0.1 ms ([H200]({ROW})), the published time is 2.2 ms "
            "([paper](https://arxiv.org/abs/1)).",
            "'0.1 ms' is not in",
        ),
        ("See [it](bench/results/none.json).", "bench/results/none.json is missing"),
    ],
)
def test_a_figure_without_its_file_is_found(folder, capsys, sentence, problem):
    write(folder, f"# Title\n\n{sentence}\n")
    assert check(folder, "--check") == 1
    said = capsys.readouterr().err
    assert problem in said
    assert "line 3" in said


@pytest.mark.parametrize(
    "sentence",
    [
        f"It takes 0.20 ms ([H200]({ROW})).",
        f"The H200's file ([here]({ROW})) says 0.2 ms.",
        f"It does 5,000 images/s ([H200]({ROW})).",
        f"It is 4 times as fast ([H200]({PEER})).",
        f"conv2 runs at 600 TFLOP/s in 51.2 us ([H200]({KERNEL})).",
        "Older: 12.3 ms ([old](bench/results/old.json)).",
        "Published: 2.2 ms, the published time ([paper](https://arxiv.org/abs/1)).",
        "We tried 3 times with 256x256 images and 4x4 filters of 8 GB.",
    ],
)
def test_a_figure_with_its_file_passes(folder, capsys, sentence):
    write(folder, f"# Title\n\n{sentence}\n")
    assert check(folder, "--check") == 0, capsys.readouterr().err


def test_a_page_of_docs_names_files_without_links_and_its_tables_are_checked(folder, capsys):
    page = folder / "docs" / "kernels.md"
    page.parent.mkdir()
    page.write_text("one takes 3 us\n\n<!-- figures: kernels h200.json -->\n<!-- end figures -->\n")
    arguments = ["--file", "docs/kernels.md", "--root", str(folder)]
    assert readme.main(arguments) == 0, capsys.readouterr().err
    text = page.read_text()
    assert "`bench/results/h200.json`: NVIDIA H200" in text
    assert "](bench" not in text
    assert readme.main(["--check", *arguments]) == 0
    page.write_text(text.replace("51.2", "41.2"))
    assert readme.main(["--check", *arguments]) == 1
    assert "kernels.md, line 3: figures kernels h200.json: says" in capsys.readouterr().err


def test_the_overview_joins_graph_call_and_peers():
    found = made.results()
    found["rows"] += [
        made.stage("graph", 9.0, batch=16) | {"dtype": "bfloat16"},  # of another predictor
        *made.peer("channels_last", 2.0, size="M", batch=32),
    ]
    lines = tables.overview_table(found).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, rows = cells[0], cells[2:]
    assert head[4:10] == [
        "graph ms", "host to host ms", "images/s", "x nelson1425 order, eager",
        "x torch.compile max-autotune", "x channels_last",
    ]  # fmt: skip
    assert [row[0] + row[2] for row in rows] == [
        f"EfficientAD-{s}{b}" for s in "SM" for b in (1, 16, 32)
    ]
    assert rows[0][4:10] == ["0.130", "0.200", "5,000", "4.00", "1.70", "-"]
    assert rows[1][4:10] == ["-", "1.70", "9,412", "-", "-", "-"]
    assert rows[5][4:10] == ["-", "3.30", "9,697", "-", "-", "2.00"]


def test_markers_that_stand_alone_and_unknown_tables_are_found(folder, capsys):
    write(folder, "<!-- figures: peers h200.json -->\n\ntext\n")
    assert check(folder, "--check") == 1
    assert "stands alone" in capsys.readouterr().err
    assert check(folder) == 1
    write(folder, "<!-- figures: speed h200.json -->\n<!-- end figures -->\n")
    assert check(folder, "--check") == 1
    assert "figures 'speed' are asked for" in capsys.readouterr().err


@pytest.mark.skipif(not record.RESULTS.is_dir(), reason="bench/results is not in the sdist")
def test_this_projects_pages_say_what_its_files_give(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().err


def test_the_check_needs_no_torch(folder):
    """Nor the kernels: figures are checked where neither is installed."""
    program = (
        "import sys; sys.modules |= {'torch': None, 'triton': None, 'efficientad.kernels': None}; "
        "from bench.report.readme import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--check", "--file", str(folder / "README.md"), "--root", str(folder)]
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
