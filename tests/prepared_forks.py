"""What every process of a training would import and make for itself, done once, before such processes are forked."""

from functools import cache

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
# DeepSpeed's Adam for CPUs asks three times about the processor, each time in a new process that takes a second.
_cpuinfo = __import__("cpuinfo")
_cpuinfo.get_cpu_info = cache(_cpuinfo.get_cpu_info)
_cpuinfo.get_cpu_info()
resume_collection()
