"""The ``model`` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from raysft.config.section import Count, Positive, Section, Text
from raysft.config.train import Targets


class FreezeSection(Section):
    layers: Annotated[int, Field(strict=True)] = 2
    """How many layers are trained: the last N; with a negative number the first N."""
    modules: Targets = "all"
    """Modules inside those layers that are trained, for example ``[mlp]``; ``all``: whole layers."""
    extra_modules: list[Text] = []
    """Modules outside the layers that are trained as well, for example ``[embed_tokens, norm]``."""

    @field_validator("layers")
    @classmethod
    def _some(cls, value: int) -> int:
        if not value:
            raise ValueError("0 layers train nothing; give the last N, or the first N as a negative number")
        return value


class LoraSection(Section):
    rank: Positive = 8
    """Rank of the adapter matrices."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the adapter; the update is multiplied by alpha / rank. Default: 2 · rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target: Targets = "all"
    """``all``: every linear layer but the output head and, in mixtures of experts, the routers (``gate``, ``router``,
    ``shared_expert_gate``); or a list of module names, which may name routers. Where peft knows a model's experts, as those of
    Mixtral, Qwen3 and DeepSeek, ``all`` covers them, without ``dropout``, ``dora`` and ``pissa``, and leaves out the shared
    experts and dense layers whose parts have the same names (``gate_proj``, ``up_proj``, ``down_proj``)."""
    extra_modules: list[Text] = []
    """Modules that are trained whole and kept with the adapter, for example ``[embed_tokens, lm_head]``."""
    dora: bool = False
    """DoRA: train the magnitude of each weight apart from its direction."""
    rslora: bool = False
    """Rank-stabilised LoRA: scale by alpha / √rank."""
    pissa: bool = False
    """PiSSA: begin with the principal singular vectors of each weight, and train these. What is written is an ordinary LoRA
    of the unchanged model."""
    pissa_iterations: Count = 16
    """Iterations of the fast SVD that PiSSA begins with; 0: the exact one."""
    loraplus_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA+: how many times higher the learning rate of the B matrices is. Default: the same for both."""


class OftSection(Section):
    block_size: Positive = 32
    """Size of the orthogonal blocks."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the blocks that are left out at random."""
    target: Targets = "all"
    """``all``: every linear layer but the output head and the routers of a mixture of experts; or a list of module names."""
    extra_modules: list[Text] = []
    """Modules that are trained whole and kept with the adapter."""


class ModelSection(Section):
    path: Text
    """Model folder, Hugging Face hub id, ``*.gguf`` file, or ``package:NAME/FILE`` inside an installed Python package."""
    trust_remote_code: list[Text] = []
    """Models whose own code may run, by name: ``[org/model]``. A model that only code of its own can load is refused unless its
    ``path`` stands here, exactly as it is written there; if it takes code from another repository, that one's name too. Read
    the code first: it runs on every node, with all rights of the run. Default: nobody."""
    chat_template: Text | None = None
    """Chat template to use instead of the tokenizer's own, and to save with the model: a name (``chatml``, ``llama3``,
    ``gemma``, ``alpaca``, ``vicuna``) or a ``*.jinja`` file."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in training and generation. ``auto``: bfloat16 on GPU, float32 on CPU. ``float16`` trains with
    dynamic loss scaling."""
    finetuning: Literal["full", "freeze", "lora", "oft"] = "lora"
    """What is trained: all weights, those of some layers, low-rank adapters, or orthogonal ones."""
    freeze: FreezeSection = FreezeSection()
    """Which layers are trained, used when ``finetuning`` is freeze."""
    lora: LoraSection = LoraSection()
    """Adapter settings, used when ``finetuning`` is lora."""
    oft: OftSection = OftSection()
    """Adapter settings, used when ``finetuning`` is oft."""
    adapters: list[Text] = []
    """Folders of adapters that were trained before, in their order: all but the last are merged into the model, and the
    last is trained on."""
    new_adapter: bool = False
    """Merge all of ``adapters``, and begin a new one."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the frozen weights quantized by bitsandbytes (QLoRA). Checkpoints that are quantized already (GPTQ, AWQ,
    bitsandbytes) are loaded as they are, where the library that they need is installed."""
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    """Data type of 4-bit weights."""
    double_quantization: bool = True
    """Quantize the scales of 4-bit weights too."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "flex_attention", "eager"] = "auto"
    """Attention kernel; each keeps the examples of a row apart. ``auto``: FlashAttention's varlen kernel on GPU where the
    package flash-attn is installed, else torch's sdpa."""
    liger: bool = False
    """Use Liger's fused kernels on GPU (extra ``liger``)."""

    @field_validator("trust_remote_code", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if value is True:
            raise ValueError("name the models whose code may run, for example [org/model]")
        return value or []

    @property
    def runs_code(self) -> bool:
        """True if code that comes with the model may run."""
        return self.path in self.trust_remote_code

    @property
    def adapter(self) -> LoraSection | OftSection | None:
        """Settings of the adapter that is trained; None if the model's own weights are trained."""
        return {"lora": self.lora, "oft": self.oft}.get(self.finetuning)
