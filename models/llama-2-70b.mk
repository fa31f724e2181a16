# Meta's Llama 2 70B
include models/shared/llama-2.mk
TP = 8
