# `make synthetic MODEL=synthetic-70b-4-layers` writes 7.9 GB: Llama-2-70B's shape with 4 layers instead of 80. `make
# verified` compares it with Hugging Face's model at this size, on machines that cannot hold 80 layers twice.
include models/families/synthetic.mk
MAX_BATCH_SIZE = 64
