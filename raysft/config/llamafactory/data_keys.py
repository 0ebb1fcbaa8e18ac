"""Fields of LLaMA-Factory's DataArguments and GeneratingArguments."""

from __future__ import annotations

from raysft.config.llamafactory.keys import Key, Keys, harmless, joined, only, same
from raysft.config.llamafactory.values import boolean, choice, names, number, positive, text, whole

_CACHE = "tokens are always cached, under a key derived from everything they depend on"
_IN_TRAINING = "LLaMA-Factory uses it only for predictions during training; raysft predicts after training"
MIXING = {
    "concat": "concat", "interleave_under": "first_exhausted", "interleave_over": "all_exhausted",
    "interleave_once": "once",
}  # fmt: skip

DATA: Keys = {
    "template": same("model.chat_template", text),
    "dataset": joined("data.train", names, []),
    "eval_dataset": Key(
        names, [], path="data.eval", alone=False, reason="neither eval_strategy, do_eval nor do_predict asks for it"
    ),
    "dataset_dir": joined("data.registry", text, "data"),
    "media_dir": same("data.media_dir", text),
    "cutoff_len": same("data.sequence_length", whole, 2048),
    "train_on_prompt": same("data.train_on_prompt", boolean, False),
    "mask_history": same("data.mask_history", boolean, False),
    "streaming": harmless("data is streamed, but tokenized before the first step; examples are shuffled over the whole dataset"),
    "buffer_size": harmless("examples are shuffled over the whole dataset"),
    "mix_strategy": joined("data.mixing", choice(MIXING), "concat"),
    "interleave_probs": joined("data.train", names, []),
    "overwrite_cache": harmless(_CACHE),
    "preprocessing_batch_size": harmless("packing works on 10,000 examples at a time"),
    "preprocessing_num_workers": harmless("Ray Data uses the CPUs of the cluster"),
    "max_samples": same("data.max_examples", positive),
    "eval_num_beams": harmless(_IN_TRAINING),
    "ignore_pad_token_for_loss": only(True, "remove it: raysft never trains on padding", boolean),
    "val_size": joined("data.holdout", number, 0.0),
    "eval_on_each_dataset": harmless("metrics are always given for each set, along with their mean"),
    "packing": joined("data.packing", boolean),
    "neat_packing": joined("data.packing", boolean, False),
    "tool_format": only(
        None, "remove it: the chat template determines how tools are written; set template to one that supports tools"
    ),
    "default_system": same("data.default_system", str),
    "enable_thinking": joined("data.template_options", boolean, True),
    "preserve_thinking": joined("data.thinking", boolean, False),
    "tokenized_path": harmless(_CACHE + "; raysft prepare fills the cache"),
    "data_shared_file_system": harmless(_CACHE),
}  # fmt: skip

GENERATING: Keys = {
    "do_sample": same("generate.do_sample", boolean, True),
    "temperature": same("generate.temperature", number, 0.95),
    "top_p": same("generate.top_p", number, 0.7),
    "top_k": same("generate.top_k", whole, 50),
    "num_beams": same("generate.num_beams", whole, 1),
    "max_length": joined("generate.max_new_tokens", whole, 1024),
    "max_new_tokens": joined("generate.max_new_tokens", whole, 1024),
    "repetition_penalty": same("generate.repetition_penalty", number, 1.0),
    "length_penalty": same("generate.length_penalty", number, 1.0),
    "skip_special_tokens": same("generate.skip_special_tokens", boolean, True),
}
