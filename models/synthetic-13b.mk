# synthetic-13b: the shape of Llama-2-13B with random weights, for measuring speed; `make synthetic MODEL=synthetic-13b` writes them, 26 GB.
WEIGHTS = weights/synthetic-13b
DTYPE = bfloat16
TP = 2
CONTEXT = 4096
MAX_SEQ_LEN = 4096
MAX_BATCH_SIZE = 256
