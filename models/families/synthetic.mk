# The shape of a Llama 2 with random weights, for measuring speed (scripts/synthetic.py).
WEIGHTS = weights/$(MODEL)
DTYPE = bfloat16
TP = 2
CONTEXT = 4096
MAX_SEQ_LEN = 4096
MAX_BATCH_SIZE = 256
