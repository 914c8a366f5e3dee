"""Distil a teacher PDN.

Source: arXiv 2303.14535, Algorithm 3. Every random choice is a function of (seed, step, item), so a
run that was interrupted goes on exactly as if it had not been.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efficientad.checkpoint.teachers import DEFAULT_LICENSE, save_teacher, teacher_header
from efficientad.distillation.photos import normalize, photos_digest
from efficientad.distillation.recipe import MARGIN, Recipe, initial_pdn
from efficientad.distillation.targets import Targets
from efficientad.model.calibration import Progress
from efficientad.model.networks import PDN
from efficientad.utils.devices import lay_out
from efficientad.utils.prefetch import ahead
from efficientad.utils.run_state import load_state, optimizer_tensors, restore_optimizer, save_state

Log = Callable[[str], None]
_SAVE_SECONDS = 300


class Distillation:
    """One run: networks, optimiser, photos, and the file that an interrupted run is resumed from.

    Args:
        photos: image files; `recipe.held_out` of them are never trained on.
        backbone: see `distillation.backbones`. backbone_facts: what to call it in the teacher's
            header; "sha256" tells backbones apart.
        state: file of the run's state; read if `resume`, and written by `run`. Resuming with
            another number of steps is allowed (a run that has to end earlier, or may go on) and
            noted in the teacher's header; everything else must be the same.
        bank_folder: default: beside the state.
        sources: where photos and backbone come from and under which licences; JSON, kept in the
            teacher's header.

    Raises:
        ValueError: no readable photo, or a state of another recipe, backbone or list of photos.
        FileNotFoundError: `resume` without a state.
    """

    def __init__(
        self,
        recipe: Recipe,
        photos: Sequence[Path],
        backbone: nn.Module,
        *,
        backbone_facts: dict[str, Any],
        state: str | os.PathLike,
        resume: bool = False,
        bank_folder: str | os.PathLike | None = None,
        sources: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        workers: int = 2,
        progress: Progress | None = None,
    ) -> None:
        self.recipe, self.state, self.device = recipe, Path(state), torch.device(device)
        self.workers, self.progress = workers, progress or (lambda what, done, total: None)
        self.identity = {
            "recipe": asdict(recipe),
            "photos": {"count": len(photos), "sha256": photos_digest(photos)},
            "backbone": backbone_facts,
        }
        self.sources = sources
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, Any]] = []
        self.planned: list[dict[str, int]] = []  # numbers of steps planned before, until when
        self.model = initial_pdn(recipe).to(self.device)
        if self.device.type == "cuda" or recipe.dtype == "bfloat16":
            lay_out(self.model, torch.channels_last)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.average = {k: p.detach().clone() for k, p in self.model.named_parameters()}
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        statistics = self._restore() if resume else None
        self.data = Targets(
            recipe,
            photos,
            backbone,
            backbone_facts=backbone_facts,
            bank_folder=bank_folder or self.state.with_suffix(".bank"),
            statistics=statistics,
            device=self.device,
            workers=workers,
            progress=progress,
        )

    def run(
        self,
        out: str | os.PathLike | None = None,
        *,
        until: int | None = None,
        every: int = 500,
        license: str = DEFAULT_LICENSE,
        log: Log = print,
        stop: Callable[[], bool] = lambda: False,
        save_seconds: float = _SAVE_SECONDS,
    ) -> PDN:
        """Train up to step `until` (default: the recipe's last); the teacher as it stands then.

        The held-out loss is measured every `every` steps and at the end. State and teacher (`out`,
        if given) are written then, every `save_seconds`, and when `stop()`, asked after each step,
        ends the run early.

        Raises:
            ValueError: the loss is not finite.
            OSError: state or teacher cannot be written.
        """
        last = self.recipe.steps if until is None else min(until, self.recipe.steps)
        batches = ahead(
            self.data.load_batch,
            range(self.step, last),
            workers=self.workers,
            depth=max(2, 2 * self.workers),
        )
        begun = saved = time.monotonic()
        first, before, losses = self.step, self.seconds, []
        try:
            for images, source in batches:
                losses.append(self.update(images, source))
                self.seconds = before + time.monotonic() - begun
                self.progress("steps", self.step, self.recipe.steps)
                if self.step % every == 0 or self.step == last:
                    self._measure(losses, (self.step - first) / (self.seconds - before), log)
                    losses = []
                    self.save(out, license)
                    saved = time.monotonic()
                elif time.monotonic() - saved > save_seconds:
                    self.save(out, license)
                    saved = time.monotonic()
                if stop():
                    self.save(out, license)
                    break
        finally:
            batches.close()
        if self.step == first:  # a run that had ended, resumed for its file
            self.save(out, license)
        return self.teacher()

    def update(self, images: Any, source: Any) -> Tensor:
        """One step of Algorithm 3 on what `Targets.load_batch` gave; the loss, still on the device.

        The loss is the mean over all elements of the squared difference of the PDN's features and
        the normalised features of the backbone.
        """
        x = normalize(images, self.device)
        with torch.no_grad():
            target = self.data.targets(self.step, source)
        if self.device.type == "cuda" or self.recipe.dtype == "bfloat16":
            x = x.contiguous(memory_format=torch.channels_last)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        with self._precision():
            features = self.model(x)
        loss = (features.float() - target).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        update_average(self.average, self.model, self.recipe.ema_decay(self.step))
        self.step += 1
        return loss.detach()

    def weights(self) -> dict[str, Tensor]:
        """The weights that are delivered: the average, or the last ones without averaging."""
        return self.average if self.recipe.ema else dict(self.model.named_parameters())

    @torch.no_grad()
    def held_out_loss(self) -> tuple[float, float]:
        """(loss on whole held-out photos through the padded PDN, the same over its inner cells).

        The first is the loss as Algorithm 3 defines it. The inner cells, 4 from the border, are
        those of the unpadded PDN, which is the one that is deployed.
        """
        pdn = PDN(self.recipe.size, padding=True).to(self.device)
        pdn.load_state_dict(self.weights())
        sums = torch.zeros(2, dtype=torch.float64)
        inner = slice(MARGIN, -MARGIN)
        for image, target in zip(self.data.held_images, self.data.held_targets, strict=True):
            with self._precision():
                features = pdn(normalize([image], self.device)).float()
            errors = (features - target.float()).square()
            sums += torch.tensor([errors.mean().item(), errors[..., inner, inner].mean().item()])
        whole, inside = (sums / max(1, len(self.data.held_images))).tolist()
        return whole, inside

    def teacher(self) -> PDN:
        """The teacher as it stands: unpadded, frozen, float32, on the CPU."""
        pdn = PDN(self.recipe.size).requires_grad_(False).eval()
        pdn.load_state_dict({k: v.detach().cpu() for k, v in self.weights().items()})
        return pdn

    def save(self, out: str | os.PathLike | None = None, license: str = DEFAULT_LICENSE) -> None:
        """Write the state, and the teacher to `out`. Raises OSError, ValueError for NaN weights."""
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(f"{name} is not finite at step {self.step}: lower the rate (--lr)")
        tensors: dict[str, Tensor] = {f"model.{k}": p for k, p in self.model.named_parameters()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        tensors |= optimizer_tensors(self.optimizer, self.names)
        tensors |= {"target.mean": self.data.target_mean, "target.std": self.data.target_std}
        facts = {**self.identity, **self._progress_facts()}
        save_state(self.state, tensors, facts)
        if out is not None:
            save_teacher(
                out,
                self.weights(),
                size=self.recipe.size,
                license=license,
                facts=teacher_header(facts, self.sources),
            )

    def _progress_facts(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "planned_before": self.planned,
            "seconds": round(self.seconds, 1),
            "held_out": len(self.data.held_images),
            "failed": len(self.data.failed),
            "curve": self.curve,
        }

    def _restore(self) -> tuple[Tensor, Tensor]:
        """Take the state over; the statistics of its targets."""
        tensors, facts = load_state(self.state)
        self._note_other_steps(facts)
        for name, value in self.identity.items():
            if facts.get(name) != value:
                raise ValueError(
                    f"{self.state} is of another run: its {name} is {facts.get(name)}, this run's "
                    f"is {value}. Resume with the same options, or start anew with another file"
                )
        try:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(tensors[f"model.{name}"])
                    self.average[name].copy_(tensors[f"average.{name}"])
            restore_optimizer(self.optimizer, self.names, tensors)
            self.step, self.curve = int(facts["step"]), list(facts["curve"])
            self.seconds = float(facts["seconds"])
            return tensors["target.mean"], tensors["target.std"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{self.state} is damaged: {error}") from error

    def _note_other_steps(self, facts: dict[str, Any]) -> None:
        """Accept another number of steps than the state's, as long as it lies ahead."""
        self.planned = list(facts.get("planned_before", []))
        recipe, steps = facts.get("recipe"), self.recipe.steps
        if isinstance(recipe, dict) and recipe.get("steps", steps) != steps:
            if steps < facts["step"]:
                raise ValueError(f"{self.state} is at step {facts['step']} already, of {steps}")
            self.planned.append({"steps": recipe["steps"], "until": facts["step"]})
            facts["recipe"] = {**recipe, "steps": steps}

    def _measure(self, losses: list[Tensor], rate: float, log: Log) -> None:
        train = torch.stack(losses).mean().item()
        if not torch.isfinite(torch.tensor(train)):
            raise ValueError(f"the loss is {train} at step {self.step}: lower the rate (--lr)")
        row: dict[str, float] = {"step": self.step, "train": train}
        if self.data.held_images:
            row["held_out"], row["held_out_inner"] = self.held_out_loss()
        row["lr"] = self.recipe.learning_rate(self.step - 1)
        row["seconds"] = round(self.seconds, 1)
        self.curve.append(row)
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step")
        remaining = (self.recipe.steps - self.step) / rate / 60
        log(
            f"step {self.step} of {self.recipe.steps}  {numbers}  {rate:.2f} steps/s  "
            f"{remaining:.0f} min to go"
        )

    def _precision(self) -> torch.autocast:
        half = self.recipe.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """average = decay average + (1 - decay) weights, in place."""
    for name, parameter in model.named_parameters():
        average[name].lerp_(parameter, 1 - decay)
