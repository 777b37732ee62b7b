"""The steps of a plan that give layers other forms: quantizing, and packing what is not quantized."""

from __future__ import annotations

from typing import Any

import torch

from .choices import FormChoices, choose_for_pipeline
from .compiler.compilation import choose_compile
from .config import FastConfig
from .models.form import quantized_by_hand
from .models.offload import inner_offloading
from .models.vae import FastAutoencoderKL
from .steps import PlanStep
from .weights import (
    PackingChoice,
    apply_packing,
    apply_quantization,
    check_scheme,
    choose_packing,
    choose_quantization,
    fixed_scheme,
    memory_needed,
    remove_quantization,
)


class WeightSteps:
    """What `Plan` knows about forms of weights."""

    @property
    def config(self) -> FastConfig:
        """What is asked for."""
        raise NotImplementedError

    unet: Any
    vae: Any
    denoisers: list[Any]
    device: torch.device
    bar: dict
    by_user: dict[int, str]
    forms: dict[object, FormChoices]

    def _quantize(self) -> PlanStep:
        name, offloading = "quantize", inner_offloading(self.unet)
        if by_hand := sum(map(quantized_by_hand, self.denoisers)):
            return PlanStep(name, False, f"{by_hand} layers are quantized by you, and left so", lossless=False)
        fixed = next((scheme for model in self.denoisers if (scheme := fixed_scheme(model))), None)
        for model in self.denoisers:
            check_scheme(model, self.config.quantization)
        choice = choose_quantization(
            # What was loaded quantized stays so, and has to be possible where it is now.
            fixed or self.config.quantization,
            self.device,
            self.unet.dtype,
            parameters=sum(parameter.numel() for parameter in self.unet.parameters()),
            is_compiled=self._is_compiled(),
            is_shared=self._is_shared(),
            needed=lambda: sum(map(memory_needed, self.denoisers)),
        )
        if choice.scheme is None or (offloading is not None and fixed is None):
            for model in self._with_forms():
                remove_quantization(model)
            reason = choice.reason if choice.scheme is None else f"not with {offloading}"
            return PlanStep(name, False, reason, lossless=False)
        if choice.scheme == "int8-dynamic" and self.device.type == "cpu" and fixed is None:
            self._choose_forms(int8=True)
        records = []
        for model in self._with_forms() if self.forms else self.denoisers:
            chosen = self.forms.get(model)
            reason = choice.reason if chosen is None else f"{choice.reason}, {chosen.describe('int8')}"
            taken = None if chosen is None else chosen.taking("int8")
            records.append(apply_quantization(model, choice.scheme, reason, chosen=taken))
        reasons = dict.fromkeys(record.describe() for record in records if record.taken or not self.forms)
        return PlanStep(name, any(r.taken for r in records), "; ".join(reasons) or choice.reason, lossless=False)

    def _pack(self) -> PlanStep:
        choice, offloading = self._packing_choice(), inner_offloading(self.unet)
        if choice.enabled and offloading is not None:
            return PlanStep("pack_weights", False, f"{offloading} moves weights")
        if choice.enabled and not self.forms:
            self._choose_forms(int8=False)
        packed = 0
        for model in self._with_forms():
            packed += apply_packing(model, self.forms[model].taking("packed") if choice.enabled else ())
        if not choice.enabled:
            return PlanStep("pack_weights", False, choice.reason)
        reason = f"{packed} layers, {self.forms[self.unet].describe('packed')}: {choice.reason}"
        return PlanStep("pack_weights", packed > 0, reason)

    def _choose_forms(self, int8: bool) -> None:
        can_pack = self._packing_choice().enabled and inner_offloading(self.unet) is None
        vae = [model for model in self._with_forms() if model is self.vae]
        self.forms = choose_for_pipeline(self.denoisers, vae, self.config, int8=int8, can_pack=can_pack, bar=self.bar)

    def _with_forms(self) -> list:
        """The models whose layers may take other forms: on CPUs the VAE is one of them."""
        on_cpu = isinstance(self.vae, FastAutoencoderKL) and self.device.type == "cpu"
        return [*self.denoisers, *([self.vae] if on_cpu and self.vae.shares_weights_with() is None else [])]

    def _packing_choice(self) -> PackingChoice:
        compiled, shared = self._is_compiled(), self._is_shared()
        return choose_packing(self.config.pack_weights, self.unet, self.device, is_compiled=compiled, is_shared=shared)

    def _is_shared(self) -> bool:
        return any(model.shares_weights_with() is not None for model in self.denoisers)

    def _is_compiled(self) -> bool:
        # Or not by us, but by the user.
        planned = choose_compile(self.config.compile, self.unet, self.device).mode != "off"
        return planned or any(id(model) in self.by_user for model in self.denoisers)
