"""Layers that see one token cost a transfer and no compute: four ways to treat Flux's modulation layers.

    python benchmarks/one_token_layers.py [--measured] [--json FILE]

They are 27 % of Flux's weights. For each share of the weights that is resident, the predicted step of: every
layer treated alike (residents spread over bytes); modulation layers resident first; the planner's own choice,
which knows only times and bytes; and, with their outputs kept for a pass with the same prompt and sigma, a
model without them. `--measured`: also the steps of a first image, of a second one, and of one of a new
prompt, on the simulated accelerator.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import planner_models
import torch
from step_models import READ_BYTES, BusyFlux, BusyLinear, flux_work, lend_to_busy_layers
from step_rigs import SimulatedRig
from step_runner import WARM_UP_STEPS, budget_bytes
from torch import Tensor, nn

from lib_qswap.standalone.demo_file import demo_file
from lib_qswap.swap import ledger
from lib_qswap.swap.conditioning import FLUX_LAYERS, Conditioning
from lib_qswap.swap.manager import attach
from lib_qswap.swap.planner import LayerCost, make_plan, predict_step, spread

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # for the simulated accelerator

CASES = (
    ("Q4_K", 1024, 12, 8e9),
    ("Q4_K", 1024, 60, 6e9),
    ("Q4_K", 512, 60, 24e9),
    ("Q4_K", 512, 60, 12e9),
    ("Q8_0", 1024, 60, 12e9),
    ("Q8_0", 512, 100, 24e9),
)
"""Type, pixels of a side, TFLOPS, link in bytes/s."""
SHARES = (0.0, 0.25, 0.5)
STEPS = 12
RING_LAYERS = 4
"""The ring of the ways that choose none, in sizes of the largest layer."""

Row = dict[str, Any]


def is_modulation(layer: LayerCost) -> bool:
    return layer.name.endswith(("_mod", "modulation"))


def alike(layers: Sequence[LayerCost], resident_bytes: float) -> set[str]:
    """Residents of about so many bytes, spread over the bytes of all layers."""
    total = sum(layer.nbytes for layer in layers)
    chosen = spread([layer.nbytes for layer in layers], min(1.0, resident_bytes / total))
    return {layer.name for layer, taken in zip(layers, chosen, strict=True) if taken}


def modulation_first(layers: Sequence[LayerCost], resident_bytes: float) -> set[str]:
    """The modulation layers as far as they fit, the rest of the bytes spread over the others."""
    first = set()
    for layer in filter(is_modulation, layers):
        if layer.nbytes <= resident_bytes:
            first.add(layer.name)
            resident_bytes -= layer.nbytes
    return first | alike([layer for layer in layers if not is_modulation(layer)], resident_bytes)


def step_s(layers: Sequence[LayerCost], resident: Collection[str], link: float) -> float:
    ring = RING_LAYERS * max(layer.nbytes for layer in layers)
    return predict_step(layers, resident, ring_bytes=ring, link_bytes_per_s=link)


def measure(type_name: str, pixels: int, tflops: float, link: float, share: float) -> Row:
    layers = planner_models.flux(getattr(planner_models, type_name), tflops, pixels)
    others = [layer for layer in layers if not is_modulation(layer)]
    resident_bytes = share * sum(layer.nbytes for layer in layers)
    budget = round(resident_bytes) + RING_LAYERS * max(layer.nbytes for layer in layers)
    return {
        "type": type_name,
        "pixels": pixels,
        "tflops": tflops,
        "link_bytes_per_s": link,
        "resident_share": share,
        "compute_s": sum(layer.compute_s for layer in layers),
        "alike_s": step_s(layers, alike(layers, resident_bytes), link),
        "modulation_first_s": step_s(layers, modulation_first(layers, resident_bytes), link),
        "planner_s": make_plan(layers, budget_bytes=budget, link_bytes_per_s=link).step_s,
        "outputs_kept_s": make_plan(others, budget_bytes=budget, link_bytes_per_s=link).step_s,
    }


class Modulated(nn.Module):
    """The layers of a `BusyFlux` in their order; those of the modulation see the time and the text instead of
    the image.

    Attributes:
        modulation: the names of those.
    """

    def __init__(self, model: BusyFlux) -> None:
        super().__init__()
        self.model = model
        names = [name for name, module in self.named_modules() if isinstance(module, BusyLinear)]
        of_flux = dict(zip(names, flux_work(), strict=True))
        self.modulation = {name for name in names if re.search(FLUX_LAYERS, of_flux[name])}
        self._order = names

    def forward(self, x: Tensor, time: Tensor, pooled: Tensor) -> Tensor:
        vector = time[:, None] + pooled
        for name in self._order:
            layer = self.get_submodule(name)
            x = x[:, :READ_BYTES]  # Zeros that stand for a layer's output are as wide as its weight.
            x = x + layer(vector) if name in self.modulation else layer(x)
        return x


def least(named: dict[str, Any], count: int) -> dict[str, Any]:
    return {"x": named["x"].repeat(count, 1)}


class Images:
    """Images of a `Modulated` model with a share of its weights resident."""

    def __init__(self, rig: SimulatedRig, share: float) -> None:
        self.model = Modulated(cast(BusyFlux, rig.qswap_model()))
        layers = "|".join(map(re.escape, self.model.modulation))
        conditioning = Conditioning(("time", "pooled"), ("x",), f"^({layers})$", least=least)
        self.attachment = attach(
            self.model,
            device="simgpu",
            location="shared",
            budget_bytes=0,
            compute_dtype=torch.bfloat16,
            conditioning=conditioning,
        )
        lend_to_busy_layers(self.attachment)
        self.attachment.modules.keep_outputs(self.attachment)
        self.attachment.rebalance(budget_bytes(self.attachment, share))
        self._x, self._driver = rig.inputs(self.model)[0][None], rig.device

    @torch.no_grad()
    def step(self, step: int, prompt: int) -> Tensor:
        x = self._x
        time = torch.full((1,), step, dtype=x.dtype, device=x.device)
        return self.model(x, time, torch.full_like(x, prompt))

    def make(self, prompt: int, times: Tensor | None = None) -> tuple[list[Any], Tensor]:
        """The events before each of its steps and behind the last one, and what it ends with."""
        marks = []
        self.attachment.run.begin(STEPS, times)
        for step in range(STEPS):
            marks.append(self._marked())
            output = self.step(step, prompt)
        marks.append(self._marked())
        self._driver.synchronize()
        return marks, output.cpu()

    def _marked(self) -> Any:
        mark = self._driver.new_event(timing=True)
        mark.record(self._driver.current_stream())
        return mark

    @property
    def swapped_bytes(self) -> int:
        return ledger.model_snapshot(self.attachment)["bytes"]["swapped_per_step"]


def mean_s(marks: Sequence[Any], first: int = 0, last: int = STEPS) -> float:
    """Of the steps between the two."""
    return marks[first].elapsed_time(marks[last]) * 1e-3 / (last - first)


def steps_of_images(rig: SimulatedRig, share: float) -> Row:
    """The mean step of a first image whose times nobody tells, and of a second one of the same prompt, each
    without its first steps, which are measured for the plan or change it, and without its last, which has
    nothing to fetch for another; of all steps of an image of a new prompt, and of such an image where
    nothing is computed ahead; of all steps of a first image whose times are told; and whether images of one
    prompt end alike."""
    images, row, ends = Images(rig, share), {}, {0: [], 1: []}
    for image in ("first", "second"):
        marks, end = images.make(0)
        ends[0].append(end)
        row[f"{image}_image_s"] = mean_s(marks, WARM_UP_STEPS, STEPS - 1)
        row.setdefault("untold_image_s", mean_s(marks))
        row[f"{image}_image_bytes"] = images.swapped_bytes
    for image in ("new", "new_alone"):
        if image == "new_alone":
            images.attachment.idle.kept.clear()
            images.attachment.idle.allowed = False
            for step in range(WARM_UP_STEPS):  # The plan is made for all layers again.
                images.step(step, 1)
        marks, end = images.make(1)
        ends[1].append(end)
        row[f"{image}_prompt_s"] = mean_s(marks)
    images.attachment.detach()
    images = Images(rig, share)
    marks, end = images.make(0, torch.arange(STEPS).float())
    ends[0].append(end)
    row["told_image_s"] = mean_s(marks)
    images.attachment.detach()
    same = all(torch.equal(found[0], one) for found in ends.values() for one in found)
    return row | {"same": same}


def measured_rows(file: Path) -> list[Row]:
    """A step computes for a second, and the link takes `case` seconds for the whole model."""
    rig = SimulatedRig(file, compute_s=1.0, virtual=True)
    rows = []
    for name, case in rig.cases.items():
        for share in SHARES:
            with rig.case(case, 1.0):
                rows.append({"case": name, "budget_share": share, **steps_of_images(rig, share)})
            rig.clean_up()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measured", action="store_true", help="also on the simulated accelerator")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [measure(*case, share) for case in CASES for share in SHARES]
    ways = ("alike", "modulation_first", "planner", "outputs_kept")
    columns = ("type", "pixels", "TFLOPS", "GB/s", "resident", "compute", *ways)
    print(" ".join(f"{column:>16}" for column in columns))
    for row in rows:
        link, share = f"{row['link_bytes_per_s'] / 1e9:.0f}", f"{row['resident_share']:.0%}"
        seconds = [f"{row[f'{way}_s']:.3f}" for way in ("compute", *ways)]
        cells = (row["type"], row["pixels"], row["tflops"], link, share, *seconds)
        print(" ".join(f"{cell:>16}" for cell in cells))
    result: Row = {"predicted": rows}
    if arguments.measured:
        result["measured"] = measured_rows(demo_file("Q4_K"))
        for row in result["measured"]:
            seconds = (
                f"{row['first_image_s']:.3f} s a step (all {row['untold_image_s']:.3f} s, or "
                f"{row['told_image_s']:.3f} s where its times are told), "
                f"second {row['second_image_s']:.3f} s, new prompt {row['new_prompt_s']:.3f} s, "
                f"not ahead {row['new_alone_prompt_s']:.3f} s"
            )
            wrong = "" if row["same"] else "; THEIR OUTPUTS DIFFER"
            print(f"{row['case']}, budget {row['budget_share']:.0%}: first image {seconds}{wrong}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
