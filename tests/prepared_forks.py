"""What every process of a training would import and make for itself, done once, before such processes are forked."""

from raysft.garbage import postpone_collection, resume_collection

MODULES = (
    "tests.training",
    "raysft.train.loop",
    "raysft.train.engine",
    "raysft.train.export",
    "deepspeed",
    "peft",
    "pyarrow.dataset",
    "transformers.models.llama.modeling_llama",
)

postpone_collection()
for _name in MODULES:
    __import__(_name)
# Compiles a thousand regular expressions, for all kinds of models.
__import__("transformers.conversion_mapping", fromlist=["_"]).get_checkpoint_conversion_mapping("llama")
resume_collection()
