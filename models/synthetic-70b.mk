# synthetic-70b: the shape of Llama-2-70B with random weights, for measuring speed; `make synthetic MODEL=synthetic-70b` writes 7.9 GB,
# because layers repeat each other's numbers (scripts/synthetic.py); the ranks' files have 138 GB.
WEIGHTS = weights/synthetic-70b
DTYPE = bfloat16
TP = 2
CONTEXT = 4096
MAX_SEQ_LEN = 4096
MAX_BATCH_SIZE = 64
