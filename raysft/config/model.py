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
    ``[0, 11, -1]``. ``auto``: the layers of ``model.new_layers``; without them, the last 2."""
    spread: bool = False
    """Spread the N layers of ``layers`` evenly over the model, each the last of its part: the new layers of a model that was
    expanded by N layers before."""
    modules: Targets = "all"
    """Modules to train inside these layers, for example ``[mlp]``. ``all``: the whole layers."""
    extra_modules: list[Text] = []
    """Modules outside the layers to train as well, for example ``[embed_tokens, norm]``."""

    @field_validator("layers")
    @classmethod
    def _each_once(cls, value: int | list[int] | str) -> int | list[int] | str:
        if value == 0:
            raise ValueError("trains no layer; use N for the last N layers, or -N for the first N")
        if value == []:
            raise ValueError("trains no layer; name layers, for example [0, -1], or use N for the last N layers")
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
                f"spread=true spreads a number of layers, but layers={as_yaml(self.layers)}; set layers to a number above 0, "
                "or remove spread"
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
    """LoRA+: ratio of the learning rate of the B matrices to that of the A matrices. Default: the same for both."""


class OftSection(Section):
    """Orthogonal adapters."""

    block_size: Positive = 32
    """Size of the orthogonal blocks."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the blocks to drop at random."""
    target: Targets = "all"
    """Modules that get an adapter. ``all``: every linear layer except the output head and the routers of a mixture of experts.
    Or a list of module names."""
    extra_modules: list[Text] = []
    """Modules to train in full and save with the adapter."""


class NewTokensSection(Section):
    """Tokens to add to the tokenizer and the model. Adapters train and save the whole embedding and output head with them."""

    plain: list[Text] = []
    """Words and signs of the text, for example ``[<b>, </b>]``; predictions show them."""
    special: list[Text] = []
    """Control tokens, for example ``[<|tool|>]``, which a chat template may write; ``generate.skip_special_tokens`` hides them in
    predictions. Tokens that the tokenizer has already, here or in ``plain``, keep their embeddings, which are trained; those
    that are pieces of words become tokens wherever a text spells them."""
    descriptions: dict[Text, Text] = {}
    """New token → text. Its embedding starts as the mean of those of the text's tokens. Default: the mean of all tokens'
    embeddings."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of noise on the new embeddings, in units of 1 / √(hidden size). LLaMA-Factory's ``noise_init`` has 1."""

    @model_validator(mode="after")
    def _each_once(self) -> NewTokensSection:
        tokens = self.tokens
        for token in tokens:
            if not token.strip():
                raise ValueError(f"a token of white space alone ({token!r}) cannot be added; remove it")
        if twice := next((token for token in tokens if tokens.count(token) > 1), None):
            raise ValueError(f"{twice!r} is named twice; name each token once, in plain or in special")
        if unknown := next((token for token in self.descriptions if token not in tokens), None):
            raise ValueError(
                f"descriptions has {unknown!r}, which is no new token; add it to plain or special, or remove it"
            )
        if empty := next((token for token, text in self.descriptions.items() if not text.strip()), None):
            raise ValueError(f"the description of {empty!r} is empty; write what it stands for, or remove it")
        return self

    @property
    def tokens(self) -> list[str]:
        """All of them, in the order of their ids."""
        return [*self.plain, *self.special]


class ModelSection(Section):
    """The model, and which of its weights to train."""

    path: PathOrHubId
    """Model folder, Hugging Face Hub id, ``*.gguf`` file, or ``package:NAME/FILE`` for a file of an installed Python package."""
    revision: Text | None = None
    """Branch, tag or commit of a model on the Hugging Face Hub. The run keeps the commit that it begins with, on all
    nodes and when it resumes. Default: the main branch."""
    trust_remote_code: list[Text] = []
    """Models that may run their own Python code, for example ``[org/model]``. A model that needs its own code is refused unless
    this list contains its ``path``, spelled the same way, and the name of any other repository that the code comes from. Read
    the code first: it runs on every node, with the permissions of the run. Default: none."""
    chat_template: PathOrHubId | None = None
    """Chat template that replaces the tokenizer's own and is saved with the model: the name of a template of LLaMA-Factory, such
    as ``chatml``, ``llama3`` or ``qwen3`` (``configs/README.md`` lists them), or the path of a ``*.jinja`` file."""
    new_tokens: NewTokensSection = NewTokensSection()
    """Tokens to add to the tokenizer and the model."""
    new_layers: Count = 0
    """Layers to insert, spread evenly (LLaMA Pro): each is a copy of the layer before it with zeroed outputs, so that the model
    computes what it did before. ``finetuning: freeze`` trains them alone."""
    rope_scaling: RopeType | Options | None = None
    """Scale rotary positions, for examples longer than the model's positions: ``linear``, ``dynamic``, ``yarn`` or ``llama3``, by
    ``data.sequence_length`` / positions of the model, rounded up. Or a mapping with transformers' names, for example
    ``{rope_type: yarn, factor: 4, original_max_position_embeddings: 32768}``. It is saved in the model's ``config.json``.
    Default: positions stay as the model has them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights in training and generation. ``auto``: bfloat16 on GPU, float32 on CPU. ``float16`` trains with
    dynamic loss scaling."""
    finetuning: Literal["full", "freeze", "lora", "oft"] = "lora"
    """Weights to train. ``full``: all; ``freeze``: those of some layers; ``lora``: low-rank adapters; ``oft``: orthogonal
    adapters."""
    train_parts: Annotated[list[Part], Field(min_length=1)] = ["language"]
    """Parts to train of a model for text and images: ``language`` (decoder, embeddings and output head), ``projector`` (what turns
    an image's features into tokens of the language model) and ``vision`` (what sees the image). With ``lora`` and ``oft``,
    ``language`` and ``vision`` get adapters, and the projector is trained in full and saved with them; with ``freeze``, the
    projector and ``vision`` are trained whole. Parts that see images need data with images. A model for text alone is
    ``language``."""
    freeze: FreezeSection = FreezeSection()
    """Layers to train with ``finetuning: freeze``."""
    lora: LoraSection = LoraSection()
    """Adapter settings with ``finetuning: lora``."""
    oft: OftSection = OftSection()
    """Adapter settings with ``finetuning: oft``."""
    adapters: list[PathOrHubId] = []
    """Folders or Hub ids (``ORG/NAME`` or ``ORG/NAME@REVISION``) of earlier adapters, in the order in which they were trained. All
    except the last are merged into the model; training continues with the last."""
    new_adapter: bool = False
    """Merge all of ``adapters`` into the model and train a new adapter."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Quantize the frozen weights with bitsandbytes (QLoRA; extra ``quant``). A model that is already quantized (GPTQ, AWQ,
    bitsandbytes) needs no setting; it loads as it is if the library that it needs is installed. Of a model for images, the
    language model alone is quantized."""
    dequantize: bool = True
    """Train, evaluate and generate with a copy in 16 bits of a model that is stored in FP8 (DeepSeek-V3, Qwen3-FP8) or MXFP4
    (gpt-oss). The copy is made once, in ``data.cache``, and is two or four times as large. false: load the model as it is stored;
    then only adapters can be trained, and only on GPUs for which transformers has the kernels."""
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    """Data type of 4-bit weights."""
    double_quantization: bool = True
    """Also quantize the scales of 4-bit weights."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "eager"] = "auto"
    """Attention implementation. All of them keep the examples of a row apart. ``auto``: FlashAttention 2's varlen kernel on GPU
    if the package flash-attn is installed, otherwise PyTorch's SDPA. ``flash_attention_3`` needs the package flash_attn_3 and
    GPUs of the Hopper generation."""
    liger: bool = False
    """Use Liger's fused kernels on GPU (extra ``liger``)."""
    experts: Literal["auto", "kt"] = "auto"
    """Where a mixture of experts computes its experts. ``auto``: on the workers' devices, as the rest of the model. ``kt``: on the
    CPU of each node, in KTransformers' kernel (package ``kt-kernel``; ``configs/README.md`` says how to install it), so that their
    weights need the node's memory and none of the GPU's. For ``finetuning: lora`` in bfloat16, on CPUs with AVX-512 BF16, with one
    worker on each node and ``zero_stage`` 0 to 2. Training and evaluations use it, generation does not."""

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
