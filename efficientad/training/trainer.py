"""The training loop and its exact resume.

Source: arXiv 2303.14535, Algorithm 1. Nothing random runs along: what a step sees and drops out is
a function of (seed, step, item), so an interrupted training continues as if it had not been.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientad.model.calibration import ChannelStatistics, Progress
from efficientad.model.detector import EfficientAD
from efficientad.model.region import index_of, of_cells
from efficientad.training.graph_step import GraphStep
from efficientad.training.losses import (
    TERMS,
    StepInputs,
    learning_rate,
    step_losses,
    teacher_features,
)
from efficientad.training.pictures import Pictures, PictureSource, to_rgb
from efficientad.training.settings import Settings, TrainingError, TrainingStopped
from efficientad.utils.files import write_text
from efficientad.utils.interrupts import held_back
from efficientad.utils.prefetch import ahead
from efficientad.utils.processes import computing
from efficientad.utils.run_state import load_state, optimizer_tensors, restore_optimizer, save_state
from efficientad.utils.sampling import random_numbers

FEATURE_CACHE_BYTES = 2 * 2**30  # of teacher features of training images, kept on the device
History = list[dict[str, Any]]


class Trainer:
    """Trains a detector's student and autoencoder in place, by Algorithm 1.

    What another schedule changes are `terms`, `recipe`, `prepare`, `finish`, `rates`, `inputs` and
    `losses`.

    Args:
        detector: with its teacher's weights; on the device to train on.
        source: the pictures of each step.
        settings: see `Settings`. identity: facts that a state must share to be resumed here.
        feature_budget: bytes of teacher features kept; the rest is computed anew each time, by the
            same program, so that the result is the same.
    """

    algorithm = "EfficientAD, arXiv 2303.14535, Algorithm 1"
    terms: tuple[str, ...] = TERMS  # of the loss, which is their sum
    recipe: Mapping[str, Any] = {}  # what no setting names and a state must share, too

    def __init__(
        self,
        detector: EfficientAD,
        source: PictureSource,
        settings: Settings,
        *,
        identity: dict[str, Any] | None = None,
        feature_budget: int = FEATURE_CACHE_BYTES,
    ) -> None:
        self.detector, self.source, self.settings = detector, source, settings
        self.identity = {**(identity or {}), **self.recipe, **asdict(settings)}
        self.device = detector.teacher_mean.device
        self.cells = index_of(detector.region_cells)  # of distance maps, that count; None: all
        self.step = 0
        self.threads: int | None = None  # those of a CPU that the state was made with
        self.history: History = []
        self.half = settings.dtype == "bfloat16"
        named = [
            (f"{part}.{name}", parameter)
            for part in ("student", "autoencoder")
            for name, parameter in getattr(detector, part).named_parameters()
        ]
        self._names, self._parameters = (list(column) for column in zip(*named, strict=True))
        on_gpu = self.device.type == "cuda"
        # A group for each network: a schedule may have a rate for each.
        groups = [
            {
                "params": list(part.parameters()),
                "lr": torch.tensor(settings.learning_rate, device=self.device) if on_gpu else 1e-4,
            }
            for part in (detector.student, detector.autoencoder)
        ]
        self.optimizer = torch.optim.Adam(
            groups, weight_decay=settings.weight_decay, fused=True, capturable=on_gpu
        )
        self._graph: GraphStep | None = None
        self._sums = torch.zeros(len(self.terms), dtype=torch.float64, device=self.device)
        self._summed = 0
        self._features: dict[int, Tensor] = {}
        self._feature_budget = feature_budget

    # ---- before the first step ---------------------------------------------------------------

    def prepare(self, workers: int = 2, progress: Progress | None = None) -> None:
        """Channel statistics of the teacher over all training images; leaves out unreadable ones.

        Raises:
            ValueError: no image can be read, or too many are of one colour.
        """
        computing()
        statistics = ChannelStatistics()
        pictures = self.source.images.read_all("channel statistics", workers, progress)
        for good, (_, found) in enumerate(pictures):
            features = self._teacher(good, to_rgb(torch.tensor(found)[None], self.device))
            statistics.add(of_cells(features, self.cells))
        self.detector.set_statistics(*statistics.of_teacher())

    def finish(self, workers: int = 2, progress: Progress | None = None) -> None:
        """What is left to do after the last step: nothing."""

    def _teacher(self, index: int, rgb: Tensor) -> Tensor:
        """Teacher features (1, 384, h, w) of one training image, always computed alone."""
        found = self._features.get(index)
        if found is None:
            found = teacher_features(self.detector, rgb)
            if (len(self._features) + 1) * found.nbytes <= self._feature_budget:
                self._features[index] = found
        return found

    # ---- steps -------------------------------------------------------------------------------

    def run(
        self,
        *,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 1000,
        evaluate: Callable[[], dict[str, Any]] | None = None,
        evaluate_every: int = 0,
        workers: int = 2,
        progress: Progress | None = None,
        on_history: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Train to the last step. `prepare` or `resume` comes first.

        Raises:
            TrainingError: a loss that is not finite. OSError: a state that cannot be written.
            TrainingStopped: Ctrl-C; the step under way is finished and, with a `checkpoint`, the
                state written first. A second Ctrl-C does not wait for the step.
        """
        if not self.detector.has_statistics:
            raise ValueError("the channel statistics are not set; call prepare() first")
        computing()
        s, evaluate_every = self.settings, evaluate_every if evaluate is not None else 0
        self.detector.student.train()
        self.detector.autoencoder.train()
        if progress is not None:
            progress("training", self.step, s.steps)
        whole = True  # weights, optimizer, sums and step number belong together
        pictures = ahead(
            self.source, range(self.step, s.steps), workers=workers, depth=2 * workers + 1
        )
        try:
            for found in pictures:
                entry = None
                with held_back() as interrupted:
                    whole = False
                    self.one_step(found)
                    due = evaluate_every > 0 and self.step % evaluate_every == 0
                    if due or self.step % s.log_every == 0 or self.step == s.steps:
                        entry = self._entry()
                        self.history.append(entry)
                    whole = True
                if interrupted():
                    raise KeyboardInterrupt
                if due and evaluate is not None and entry is not None:
                    self.detector.eval()
                    entry |= evaluate()
                    self.detector.student.train()
                    self.detector.autoencoder.train()
                if entry is not None and on_history is not None:
                    on_history(entry)
                last = self.step == s.steps
                if checkpoint is not None and (last or self.step % checkpoint_every == 0):
                    self.save(checkpoint)
                if progress is not None:
                    progress("training", self.step, s.steps)
        except KeyboardInterrupt:
            if whole and checkpoint is not None:
                self.save(checkpoint)
            raise TrainingStopped(self.step, checkpoint if whole else None) from None
        finally:
            pictures.close()
            self.detector.eval()

    def one_step(self, pictures: Pictures) -> Tensor:
        """Train one step on these pictures; the terms of its loss, before the step.

        The networks must be in training mode, as `run` leaves them to its steps.
        """
        inputs = self.inputs(pictures)
        for group, rate in zip(self.optimizer.param_groups, self.rates(self.step), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        with self.seeded(self.step):
            if self.device.type != "cuda":
                terms = self._eager(inputs)
            else:
                if self._graph is None:
                    self._graph = GraphStep(self._eager, self.optimizer, self._parameters, inputs)
                    self._seed_device(self.step)  # the warm-up drew from the generator
                terms = self._graph(inputs)
        self._sums += terms
        self._summed += 1
        self.step += 1
        return terms

    def rates(self, step: int) -> tuple[float, float]:
        """The learning rates of a step, of student and autoencoder."""
        rate = learning_rate(step, self.settings.steps, self.settings.learning_rate)
        return rate, rate

    def inputs(self, pictures: Pictures) -> StepInputs:
        """What the losses of a step are computed from, on the device."""
        image = to_rgb(pictures.image, self.device)
        return StepInputs(
            image,
            to_rgb(pictures.augmented, self.device),
            None if pictures.photo is None else to_rgb(pictures.photo, self.device),
            torch.cat([self._teacher(i, image[k : k + 1]) for k, i in enumerate(pictures.indices)]),
        )

    def losses(self, inputs: StepInputs) -> Tensor:
        """One value for each of `terms`, differentiable."""
        return step_losses(self.detector, inputs, self.settings.hard_quantile, self.cells)

    def _eager(self, inputs: StepInputs) -> Tensor:
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.half, cache_enabled=False
        ):
            terms = self.losses(inputs)
        terms.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return terms.detach()

    def _seed_device(self, step: int) -> None:
        seed = int(random_numbers(self.settings.seed, "dropout", step).integers(2**63))
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    @contextmanager
    def seeded(self, step: int) -> Iterator[None]:
        """The device's generator seeded for this step, and as it was afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self._seed_device(step)
            yield

    def _entry(self) -> dict[str, Any]:
        """Means of the terms since the last entry; TrainingError if one is not finite."""
        means = (self._sums / self._summed).tolist()
        if not all(map(math.isfinite, means)):
            shown = ", ".join(f"{name} {v:g}" for name, v in zip(self.terms, means, strict=True))
            raise TrainingError(
                f"a loss is not finite by step {self.step} ({shown}); the last checkpoint is older"
            )
        rate, _ = self.rates(self.step - 1)
        self._sums.zero_()
        self._summed = 0
        return {
            "step": self.step,
            "loss": sum(means),
            **dict(zip(self.terms, means, strict=True)),
            "learning_rate": rate,
        }

    # ---- state -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write all that `resume` needs, atomically. OSError: the old state is still whole."""
        detector = self.detector
        tensors = dict(zip(self._names, self._parameters, strict=True))
        tensors |= {"teacher_mean": detector.teacher_mean, "teacher_std": detector.teacher_std}
        tensors |= optimizer_tensors(self.optimizer, self._names) | {"sums": self._sums}
        images = self.source.images
        facts = {
            "step": self.step,
            "summed": self._summed,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "identity": self.identity,
            "images": images.digest(),
            "failed": images.failed,
            "history": self.history,
        }
        save_state(path, tensors, facts)

    def resume(self, path: str | os.PathLike) -> None:
        """Continue from a state of `save`; replaces `prepare`.

        Raises:
            FileNotFoundError: nothing is there. ValueError: damaged. TrainingError: it is the
                state of a training with other settings, images or teacher.
        """
        tensors, facts = load_state(Path(path))
        images, known = self.source.images, facts.get("identity", {})
        for name in (*self.identity, *known):  # what one of the two lacks is None
            now = self.identity.get(name)
            if known.get(name) != now:
                raise TrainingError(
                    f"{path} is of a training with {name} {known.get(name)!r}; here it is {now!r}. "
                    "Resume with the same settings, or start anew with another checkpoint"
                )
        failed = {name for name, _ in facts["failed"]}
        images.paths = [p for p in images.paths if str(p) not in failed]
        images.failed = [tuple(row) for row in facts["failed"]]
        if images.digest() != facts["images"]:
            raise TrainingError(f"{path} is of a training on other images than are there now")
        try:
            with torch.no_grad():
                for name, parameter in zip(self._names, self._parameters, strict=True):
                    parameter.copy_(tensors[name])
                self.detector.set_statistics(tensors["teacher_mean"], tensors["teacher_std"])
                self._sums.copy_(tensors["sums"])
            restore_optimizer(self.optimizer, self._names, tensors)
        except (KeyError, RuntimeError) as error:
            raise TrainingError(f"{path} does not fit these networks: {error}") from error
        self._graph = None
        self._features.clear()
        self.step, self._summed = int(facts["step"]), int(facts["summed"])
        self.history, self.threads = list(facts["history"]), facts.get("threads")


def write_history(checkpoint: str | os.PathLike | None, history: History) -> None:
    """Write a training's history, as JSON, beside its state, if it has one."""
    if checkpoint is not None and history:
        path = Path(checkpoint)
        write_text(path.with_name(f"{path.name}.history.json"), json.dumps(history, indent=1))
