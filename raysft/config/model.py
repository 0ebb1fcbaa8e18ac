"""The ``model`` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from raysft.config.rope_scaling import RopeType, rope_settings
from raysft.config.section import Count, Options, PathOrHubId, Positive, Section, Text
from raysft.config.train import Targets
from raysft.errors import as_yaml

Part = Literal["language", "projector", "vision"]


class FreezeSection(Section):
    """Layers to train."""

    layers: Annotated[int, Field(strict=True)] | list[Annotated[int, Field(strict=True)]] | Literal["auto"] = "auto"
    """Layers to train: N for the last N, -N for the first N, or a list of indices from 0 on, negative ones from the end, such as
    ``[0, 11, -1]``. ``auto``: the layers added by ``model.new_layers``, or the last 2 if there are none."""
    spread: bool = False
    """Spread the N layers of ``layers`` evenly over the model, each the last layer of its block: these are the new layers of a
    model that was expanded by N layers earlier (LLaMA Pro)."""
    modules: Targets = "all"
    """Modules to train inside these layers, for example ``[mlp]``. ``all``: the whole layers."""
    extra_modules: list[Text] = []
    """Additional modules to train outside the layers, for example ``[embed_tokens, norm]``."""

    @field_validator("layers")
    @classmethod
    def _each_once(cls, value: int | list[int] | str) -> int | list[int] | str:
        if value == 0:
            raise ValueError("selects no layers to train; use N for the last N layers, or -N for the first N")
        if value == []:
            raise ValueError(
                "selects no layers to train; list layers, for example [0, -1], or use N for the last N layers"
            )
        if (
            isinstance(value, list)
            and (twice := next((index for index in value if value.count(index) > 1), None)) is not None
        ):
            raise ValueError(f"names layer {twice} twice; name each layer once")
        return value

    @model_validator(mode="after")
    def _spread_some(self) -> FreezeSection:
        if self.spread and not (isinstance(self.layers, int) and self.layers > 0):
            raise ValueError(
                f"spread=true needs a number of layers, but layers={as_yaml(self.layers)}; set layers to a number above 0, or "
                "remove spread"
            )
        return self


class LoraSection(Section):
    """Low-rank adapters."""

    rank: Positive = 8
    """Rank of the adapter matrices."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the adapter: its update is multiplied by alpha / rank. Default: 2 · rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target: Targets = "all"
    """Modules that get an adapter. ``all``: every linear layer except the output head and, in a mixture of experts, the routers
    (``gate``, ``router``, ``shared_expert_gate``). Or a list of module names, which may include routers, and ``experts``: the
    weights of all routed experts. If peft supports the experts of a model (Mixtral, Qwen3, DeepSeek and others), ``all`` includes
    them, too; shared experts and dense layers with the same module names (``gate_proj``, ``up_proj``, ``down_proj``) then get no
    adapter. With experts, ``dropout``, ``dora`` and ``pissa`` are not available."""
    extra_modules: list[Text] = []
    """Modules to train in full and save with the adapter, for example ``[embed_tokens, lm_head]``."""
    dora: bool = False
    """DoRA: train the magnitude and the direction of each weight separately."""
    rslora: bool = False
    """Rank-stabilized LoRA: scale by alpha / √rank instead of alpha / rank."""
    pissa: bool = False
    """PiSSA: initialize the adapter with the principal singular vectors of each weight. The saved adapter is an ordinary LoRA
    adapter for the unchanged base model."""
    pissa_iterations: Count = 16
    """Iterations of PiSSA's fast SVD. 0: compute the exact SVD."""
    loraplus_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA+: ratio of the learning rate of the B matrices to that of the A matrices. Default: the same learning rate for
    both."""


class OftSection(Section):
    """Orthogonal adapters."""

    block_size: Positive = 32
    """Size of the orthogonal blocks."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the blocks that are dropped at random."""
    target: Targets = "all"
    """Modules that get an adapter. ``all``: every linear layer except the output head and the routers of a mixture of experts.
    Or a list of module names."""
    extra_modules: list[Text] = []
    """Modules to train in full and save with the adapter."""


class NewTokensSection(Section):
    """Tokens to add to the tokenizer and the model. With adapters, the entire embedding and output head are trained and saved
    along with them."""

    plain: list[Text] = []
    """Tokens that are ordinary text, for example ``[<b>, </b>]``; predictions show them."""
    special: list[Text] = []
    """Control tokens, for example ``[<|tool|>]``, which a chat template may emit; ``generate.skip_special_tokens`` hides them
    in predictions. Tokens that the tokenizer already has, here or in ``plain``, keep their embeddings, which are trained; those
    that were only subwords become tokens of their own wherever a text spells them."""
    descriptions: dict[Text, Text] = {}
    """New token → text. The embedding is initialized to the mean of the embeddings of the text's tokens. Default: the mean of
    all token embeddings."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of the noise added to the new embeddings, in units of 1 / √(hidden size). LLaMA-Factory's
    ``noise_init`` corresponds to 1."""

    @model_validator(mode="after")
    def _each_once(self) -> NewTokensSection:
        tokens = self.tokens
        for token in tokens:
            if not token.strip():
                raise ValueError(f"{token!r} consists only of whitespace, which cannot be added as a token; remove it")
        if twice := next((token for token in tokens if tokens.count(token) > 1), None):
            raise ValueError(f"{twice!r} is named twice; name each token once, in plain or in special")
        if unknown := next((token for token in self.descriptions if token not in tokens), None):
            raise ValueError(
                f"descriptions has {unknown!r}, which is not one of the new tokens; add it to plain or special, or remove it"
            )
        if empty := next((token for token, text in self.descriptions.items() if not text.strip()), None):
            raise ValueError(f"the description of {empty!r} is empty; write what it stands for, or remove it")
        return self

    @property
    def tokens(self) -> list[str]:
        """All of them, in the order of their ids."""
        return [*self.plain, *self.special]


class ModelSection(Section):
    """The model and the weights to train."""

    path: PathOrHubId
    """Model folder, Hugging Face Hub id, ``*.gguf`` file, or ``package:NAME/FILE`` for a file of an installed Python package."""
    revision: Text | None = None
    """Branch, tag or commit of a model on the Hugging Face Hub. A run pins the commit that it starts with, on all nodes and
    when it resumes. Default: the main branch."""
    trust_remote_code: list[Text] = []
    """Models that may run their own Python code, for example ``[org/model]``. A model that needs its own code is rejected
    unless this list contains its ``path``, spelled the same way, and the name of any other repository that the code comes from.
    Read the code first: it runs on every node, with the permissions of the run. Default: none."""
    chat_template: PathOrHubId | None = None
    """Chat template that replaces the tokenizer's own and is saved with the model: the name of a LLaMA-Factory template, such
    as ``chatml``, ``llama3`` or ``qwen3`` (``configs/README.md`` lists them), or the path of a ``*.jinja`` file."""
    new_tokens: NewTokensSection = NewTokensSection()
    """Tokens to add to the tokenizer and the model."""
    new_layers: Count = 0
    """Number of layers to insert, spread evenly (LLaMA Pro): each is a copy of the layer before it with zeroed output
    projections, so the expanded model initially computes the same as the original. ``finetuning: freeze`` trains only these
    layers."""
    rope_scaling: RopeType | Options | None = None
    """RoPE scaling, for examples longer than the model's context length: ``linear``, ``dynamic``, ``yarn`` or ``llama3``, by
    ``data.sequence_length`` / the model's context length, rounded up. Or a mapping with transformers' names, for example
    ``{rope_type: yarn, factor: 4, original_max_position_embeddings: 32768}``. It is saved in the model's ``config.json``.
    Default: the model's own setting."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights in training and generation. ``auto``: bfloat16 on GPU, float32 on CPU. ``float16`` trains with
    dynamic loss scaling."""
    finetuning: Literal["full", "freeze", "lora", "oft"] = "lora"
    """Which weights to train. ``full``: all; ``freeze``: only those of some layers; ``lora``: low-rank adapters; ``oft``:
    orthogonal adapters."""
    train_parts: Annotated[list[Part], Field(min_length=1)] = ["language"]
    """Which parts of a vision-language model to train: ``language`` (decoder, embeddings and output head), ``projector`` (which
    maps image features to embeddings of the language model) and ``vision`` (the vision encoder). With ``lora`` and ``oft``,
    ``language`` and ``vision`` get adapters, and the projector is trained in full and saved with them; with ``freeze``, the
    projector and ``vision`` are trained in full. ``projector`` and ``vision`` need data with images. A text-only model has only
    ``language``."""
    freeze: FreezeSection = FreezeSection()
    """Layers to train with ``finetuning: freeze``."""
    lora: LoraSection = LoraSection()
    """Adapter settings with ``finetuning: lora``."""
    oft: OftSection = OftSection()
    """Adapter settings with ``finetuning: oft``."""
    adapters: list[PathOrHubId] = []
    """Folders or Hub ids (``ORG/NAME`` or ``ORG/NAME@REVISION``) of existing adapters, in the order in which they were trained.
    All but the last are merged into the model; training continues with the last."""
    new_adapter: bool = False
    """Merge all of ``adapters`` into the model and train a new adapter."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Quantize the frozen weights with bitsandbytes (QLoRA; extra ``quant``). A model that is already quantized (GPTQ, AWQ,
    bitsandbytes) needs no setting; it is loaded directly if the required library is installed. In a vision-language model, only
    the language model is quantized."""
    dequantize: bool = True
    """Dequantize a model that is stored in FP8 (DeepSeek-V3, Qwen3-FP8) or MXFP4 (gpt-oss) to 16 bits for training, evaluation
    and generation. The dequantized copy is made once, in ``data.cache``, and is two or four times as large. false: load the
    quantized weights directly; then only adapters can be trained, and only on GPUs for which transformers has the kernels."""
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    """Data type of 4-bit weights."""
    double_quantization: bool = True
    """Also quantize the scales of 4-bit weights."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "eager"] = "auto"
    """Attention implementation. With all of them, the examples in a row do not attend to each other. ``auto``: FlashAttention
    2's varlen kernel on GPU if the package flash-attn is installed, otherwise PyTorch's SDPA. ``flash_attention_3`` needs the
    package flash_attn_3 and GPUs of the Hopper generation."""
    liger: bool = False
    """Use Liger's fused kernels on GPU (extra ``liger``)."""
    experts: Literal["auto", "kt"] = "auto"
    """Where the experts of a mixture-of-experts model are computed. ``auto``: on the workers' devices, like the rest of the
    model. ``kt``: on the CPU of each node, with KTransformers' kernel (package ``kt-kernel``; ``configs/README.md`` explains
    how to install it), so that their weights occupy host memory and no GPU memory. Requires ``finetuning: lora`` in bfloat16,
    CPUs with AVX-512 BF16, one worker per node and ``zero_stage`` 0 to 2. Training and evaluation use the kernel, generation
    does not."""

    @field_validator("rope_scaling")
    @classmethod
    def _known_scaling(cls, value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        return value if value is None or isinstance(value, str) else rope_settings(value)

    @field_validator("train_parts")
    @classmethod
    def _each_part_once(cls, value: list[Part]) -> list[Part]:
        if twice := next((part for part in value if value.count(part) > 1), None):
            raise ValueError(f"names {twice} twice; name each part once")
        return [part for part in get_args(Part) if part in value]

    @field_validator("trust_remote_code", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if value is True:
            raise ValueError("list the models that may run their own code, for example [org/model]")
        return value or []

    @property
    def runs_code(self) -> bool:
        """True if code that comes with the model may run."""
        return self.path in self.trust_remote_code

    @property
    def trained_layers(self) -> int | list[int] | str:
        """Layers that ``finetuning: freeze`` trains, as ``freeze.layers`` says it; ``new`` for those of ``new_layers``."""
        if self.freeze.layers != "auto":
            return self.freeze.layers
        return "new" if self.new_layers else 2

    @property
    def adapter(self) -> LoraSection | OftSection | None:
        """Settings of the adapter that is trained; None if the model's own weights are trained."""
        return {"lora": self.lora, "oft": self.oft}.get(self.finetuning)
