"""The tutorials, run: every bash and python block of a page, in order, in a folder of its own.

What a reader's machine does in minutes is made small here, openly: EDITS are the replacements in
the blocks' text, PREPARED is what a page says that the reader has. Blocks that cannot run here are
marked `no-run` in the page and named in NOT_RUN with the reason; they are parsed. The output that a
page shows (text blocks) is compared with what its block printed, all but the numbers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import helpers_foreign
import pytest
import torch

from efficientad import save
from efficientad.cli.main import build_parser
from efficientad.demo.parts import write_dataset
from efficientad.model.synthetic import random_detector

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = ROOT / "docs" / "tutorials"
PAGES = sorted(page.stem for page in TUTORIALS.glob("*.md"))
SLOW = ("anomalib-model", "large-images")
WITH_COMMANDS = ["README.md", "CONTRIBUTING.md", "docs/index.md"]

# Page -> (what a block says, what is run instead): fewer steps, fewer and smaller pictures.
EDITS = {
    "first-detector": [
        ("write_dataset('parts')", "write_dataset('parts', train=4, good=1, per_defect=1)"),
        ("--steps 120", "--steps 2"),
        ("--log-every 20", "--log-every 1"),
    ],
    "large-images": [
        ("size=(640, 640)", "size=(400, 400)"),
        ("train=30, good=6, per_defect=2", "train=22, good=1, per_defect=1"),
        ('glob("0[01]*.png")', 'glob("00[0-2].png")'),
        ("range(12)", "range(2)"),
        ("--steps 200", "--steps 2"),
        ("--log-every 50", "--log-every 1"),
        ("good/02*.png", "good/02[01].png"),
        ("large/test --tiles", "large/test/good --tiles"),
    ],
}
# (page, words of the block): why it is not run.
NOT_RUN = {
    ("anomalib-model", "load_from_checkpoint"): "anomalib is not installed",
    ("camera-gpu", 'device="cuda:0"'): "needs a GPU",
    ("camera-gpu", "efficientad benchmark"): "times the machine, for a minute",
    ("camera-gpu", "--device cuda"): "needs a GPU, and runs the tests",
}
# Run by a test of its own, which needs anomalib's file.
ACCELERATED = ("anomalib-model", "ead.accelerate(model)")

FENCE = re.compile(r"^```(\w*)[ ]?([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d[\d.:e+-]*")
VERDICT = re.compile(r"\b(True|False|ANOMALOUS|good)\b")


class Block(NamedTuple):
    language: str
    mark: str  # "", "no-run", or "no-check" for output that no test can expect
    text: str


def blocks(page: str | Path) -> list[Block]:
    """The fenced blocks of a page."""
    path = TUTORIALS / f"{page}.md" if isinstance(page, str) else page
    return [Block(*found) for found in FENCE.findall(path.read_text(encoding="utf-8"))]


def edited(page: str, text: str) -> str:
    for said, run in EDITS.get(page, []):
        text = text.replace(said, run)
    return text


def command_lines(text: str) -> list[list[str]]:
    """The words of each command of a bash block."""
    commands: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
        commands.append([])
        for word in lexer:
            commands += [[]] if set(word) <= set(";|&") else []
            commands[-1] += [word] if set(word) - set(";|&") else []
    return [command for command in commands if command]


# ---- prepared folders ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    root = write_dataset(tmp_path_factory.mktemp("drawn") / "parts", train=2, good=1, per_defect=1)
    for defect in ("missing_hole", "missing_part", "wrong_order"):  # each image costs a second
        shutil.rmtree(root / "test" / defect)
    return root


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory) -> Path:
    """A detector with random weights, whose threshold is one of a trained one's."""
    detector = random_detector()
    detector.threshold = 0.11
    path = tmp_path_factory.mktemp("detector") / "part.safetensors"
    save(detector, path)
    return path


@pytest.fixture
def folder(page, tmp_path, request) -> Path:
    """What the page says that the reader has."""
    if page in ("anomalib-model", "camera-gpu", "evaluate"):
        shutil.copytree(request.getfixturevalue("parts"), tmp_path / "parts")
    if page in ("camera-gpu", "evaluate"):
        shutil.copy(request.getfixturevalue("detector_file"), tmp_path / "part.safetensors")
    if page == "anomalib-model":
        checkpoint = helpers_foreign.lightning_checkpoint(helpers_foreign.anomalib_model(), 2)
        helpers_foreign.torch_save(checkpoint, tmp_path / "model.ckpt")
    return tmp_path


# ---- running ---------------------------------------------------------------------------------

# Reads blocks from its input, runs them in one namespace, and ends the output of each with a mark.
_LOOP = """
import json, sys, traceback
namespace = {"__name__": "__main__"}
for line in sys.stdin:
    try:
        exec(compile(json.loads(line), "block", "exec"), namespace)
        failed = 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        failed = 1
    print(f"\\0{failed}", flush=True)
"""


class Session:
    """Runs blocks in a folder as a reader would, on the CPU: bash in a shell each, python in one
    interpreter for the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = clean | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}
        self.python: subprocess.Popen | None = None

    def run(self, block: Block) -> str:
        """What the block printed; an assertion that says it if it failed."""
        output, failed = getattr(self, f"_{block.language}")(block.text)
        assert not failed, f"{block.text}\nprinted\n{output}"
        return output

    def _bash(self, text: str) -> tuple[str, int]:
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", text],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        return done.stdout, done.returncode

    def _python(self, text: str) -> tuple[str, int]:
        if self.python is None:
            self.python = subprocess.Popen(
                [sys.executable, "-u", "-c", _LOOP],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.python.stdin.write(json.dumps(text) + "\n")
        self.python.stdin.flush()
        output = ""
        for line in self.python.stdout:
            before, mark, failed = line.partition("\0")
            output += before
            if mark:
                return output, int(failed)
        return output, 1

    def close(self) -> None:
        if self.python is not None:
            self.python.stdin.close()
            self.python.wait(timeout=60)
            self.python.stdout.close()


def comparable(line: str) -> str:
    """A line without its numbers and verdicts, which depend on the detector, and its spaces."""
    return "".join(VERDICT.sub("?", NUMBER.sub("#", line)).split())


def assert_shown(block: Block, output: str) -> None:
    """Every line that the page shows, but for `...`, is one of those printed."""
    printed = {comparable(line) for line in output.splitlines()}
    for line in block.text.splitlines():
        assert line == "..." or comparable(line) in printed, f"{line!r} is not in\n{output}"


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in PAGES]
)
def test_every_block_runs_and_prints_what_the_page_shows(page, folder):
    session, output = Session(folder), ""
    try:
        for block in blocks(page):
            if block.language in ("bash", "python"):
                output = ""
                if block.mark != "no-run" and ACCELERATED[1] not in block.text:
                    output = session.run(block._replace(text=edited(page, block.text)))
            elif block.mark != "no-check":
                assert_shown(block, output)
    finally:
        session.close()


def test_a_block_that_fails_and_a_line_that_nothing_printed_are_seen(tmp_path):
    session = Session(tmp_path)
    try:
        assert session.run(Block("python", "", "a = 3")) == ""
        output = session.run(Block("python", "", "print(a, 'good')"))
        assert output == "3 good\n"
        for language, text in (("python", "print(b)"), ("bash", "false\ntrue"), ("bash", "exit 3")):
            with pytest.raises(AssertionError, match="printed"):
                session.run(Block(language, "", text))
    finally:
        session.close()
    assert_shown(Block("text", "", "...\n4.5 ANOMALOUS\n"), output)
    with pytest.raises(AssertionError, match="'3 parts' is not in"):
        assert_shown(Block("text", "", "3 parts\n"), output)


def test_the_accelerated_model_of_the_anomalib_page(anomalib, capsys):
    page, words = ACCELERATED
    (block,) = (b for b in blocks(page) if b.language == "python" and words in b.text)
    lightning = torch.nn.Module()  # stands for load_from_checkpoint's: the core is its `.model`
    lightning.model = anomalib.EfficientAdModel(teacher_out_channels=384)
    state = helpers_foreign.anomalib_model().state_dict()
    lightning.model.load_state_dict(state)
    namespace = {"model": lightning.eval()}
    exec(compile(block.text, page, "exec"), namespace)
    scale = float(namespace["before"].anomaly_map.abs().max())
    assert float(capsys.readouterr().out.removeprefix("tensor(").rstrip(")\n")) <= 1e-4 * scale
    assert "forward" in vars(lightning.model)


# ---- what is not run -------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_known_kinds_and_compile(page):
    for block in blocks(page):
        marks = {"bash": ("", "no-run"), "python": ("", "no-run"), "text": ("", "no-check")}
        assert block.mark in marks.get(block.language, ()), block
        if block.language == "python":
            compile(block.text, page, "exec")
    assert len(re.findall("^```", (TUTORIALS / f"{page}.md").read_text(), re.MULTILINE)) == 2 * len(
        blocks(page)
    )


@pytest.mark.parametrize("path", [*WITH_COMMANDS, *(f"docs/tutorials/{page}.md" for page in PAGES)])
def test_commands_are_ones_that_exist(path):
    parser, found = build_parser(), 0
    for block in blocks(ROOT / path):
        for command in command_lines(block.text) if block.language == "bash" else ():
            if Path(command[0]).name == "efficientad":
                parser.parse_args(command[1:])  # exits if it does not know an option
                found += 1
            if Path(command[0]).name.startswith("python") and command[1] == "-m":
                assert importlib.util.find_spec(command[2]), command
                found += 1
    assert found


def test_tables_name_what_is_in_the_pages():
    for page, edits in EDITS.items():
        text = "\n".join(block.text for block in blocks(page))
        assert [said for said, _ in edits if said not in text] == []
    left_out = [(p, b.text) for p in PAGES for b in blocks(p) if b.mark == "no-run"]
    for page, words in NOT_RUN:
        assert len([1 for p, text in left_out if p == page and words in text]) == 1, words
    assert len(left_out) == len(NOT_RUN)
