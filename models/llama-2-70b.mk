# Meta's Llama 2 70B
include models/families/llama-2.mk
TP = 8
