"""Python that loads a trained model and generates with it, for model cards."""

from __future__ import annotations

_LOAD_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("model", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("model")
"""
_LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("model")
"""
_LOAD_IMAGE_ADAPTER = """\
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = PeftConfig.from_pretrained("model").base_model_name_or_path
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype="auto"), "model")
processor = AutoProcessor.from_pretrained("model")
"""
_LOAD_IMAGE_MODEL = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("model", dtype="auto")
processor = AutoProcessor.from_pretrained("model")
"""
_CHAT_PROMPT = """\
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
"""
_TEXT_PROMPT = """\
inputs = tokenizer("Once upon a time", return_tensors="pt")
"""
_IMAGE_PROMPT = """\
content = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What is this?"}]
messages = [{"role": "user", "content": content}]
options = {"add_generation_prompt": True, "tokenize": True, "return_tensors": "pt", "return_dict": True}
inputs = processor.apply_chat_template(messages, **options)
"""
_GENERATE = """\
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def loading_code(folder: str, adapter: bool, images: bool, trusted: bool = False) -> str:
    """Return code that loads a model, or an adapter with its base, and what makes its inputs.

    Args:
        folder: of the model, or its name on the hub.
        adapter: True if it is an adapter.
        images: True if it comes with a processor.
        trusted: True if code that comes with it must run.
    """
    code = {
        (False, False): _LOAD_MODEL,
        (True, False): _LOAD_ADAPTER,
        (False, True): _LOAD_IMAGE_MODEL,
        (True, True): _LOAD_IMAGE_ADAPTER,
    }[adapter, images]
    code = code.replace('"model"', f'"{folder}"')
    return code.replace(f'"{folder}"', f'"{folder}", trust_remote_code=True') if trusted else code


def prompt_code(conversation: bool, images: bool) -> str:
    """Return code that generates from a prompt of the kind that the model was trained on."""
    prompt = _TEXT_PROMPT if not conversation else _IMAGE_PROMPT if images else _CHAT_PROMPT
    code = prompt + _GENERATE
    return code.replace("tokenizer", "processor") if images else code
