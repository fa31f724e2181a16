# synthetic-7b: the shape of Llama-2-7B with random weights, for measuring speed; `make synthetic` writes them, 13.5 GB (scripts/synthetic.py).
WEIGHTS = weights/synthetic-7b
DTYPE = bfloat16
TP = 2
CONTEXT = 4096
MAX_SEQ_LEN = 4096
MAX_BATCH_SIZE = 256
