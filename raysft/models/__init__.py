import logging

# peft imports bitsandbytes, which recommends a package for 4-bit weights to every process on a CPU with AVX-512 BF16.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
